"""Where a trainer is in its epochs, by Lightning's own counts."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def epochs_ended(trainer: "Trainer") -> int:
    """Number of epochs whose batches are all done."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return int(progress.processed)


def within_epoch(trainer: "Trainer") -> bool:
    """Whether an epoch is under way; it is over when its last hooks are called."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return bool(progress.started > progress.processed)


def forget_cut_epoch(trainer: "Trainer") -> None:
    """Have a fit begin an epoch after one that was interrupted, which Lightning would go on counting."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    progress.ready = progress.started = progress.completed = progress.processed
