"""Checkpoints from which a run goes on as if nothing had happened."""

import math
import os
import random
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from adadim_lightning.distributed import world_size
from adadim_lightning.functional._numeric import check_integer, check_number
from adadim_lightning.guard import NonFiniteError

KEY = "adadim_processes"
SUFFIX = ".ckpt"
SUMS = ("value", "cumulated_batch_size")
CLOCK_STEPS = 16  # between two looks at the clock that several processes agree on


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all: to a file beside it, to the disk, and only then to its name."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; what has its name stays until the new one is whole."""
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
        return None


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk, where the system can do that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RunCheckpoints(Checkpoint):
    """Writes all that a run needs to go on exactly: at intervals, at the end of epochs, and when told to stop.

    Beside what Lightning puts in, a checkpoint holds for each process the state of the random numbers of Python,
    NumPy and torch, the sums behind the means of the epoch that are logged, and the gradients that were
    accumulated so far. With the batches of :class:`~adadim_lightning.data.ImageData`, whose order and views depend
    on their place alone, a resumed run ends with the weights and figures, to the bit, of one that was never cut
    off, on the same machine and with as many processes.

    At SIGTERM it writes one after the step that is under way, or within the validation; at SIGUSR1 (on Slurm: the
    job's time is nearly up) too, and then calls whoever handled that signal before.

    Args:
        dirpath: folder to write to; by default ``checkpoints`` in that of the first logger or the trainer.
        every_n_steps: longest distance between two; None sets no limit.
        every_n_minutes: longest time between two; None sets no limit.
        keep: number of the last ones to keep; ``last.ckpt`` points to the last of all.

    Example:
        >>> callback = RunCheckpoints("runs/first/checkpoints", every_n_minutes=5)
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = 10.0,
        keep: int = 2,
    ) -> None:
        super().__init__()
        if every_n_steps is not None:
            check_integer("every_n_steps", every_n_steps, low=1)
        if every_n_minutes is not None:
            check_number("every_n_minutes", every_n_minutes, low=0)
        check_integer("keep", keep, low=1)
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.every_n_steps = every_n_steps
        self.every_n_minutes = math.inf if every_n_minutes is None else every_n_minutes
        self.keep = keep
        self._folder = Path()
        self._saved_at = 0.0
        self._saved_step = 0
        self._signaled = False
        self._epoch_is_over = False
        self._handler: Any = None
        self._restored: Mapping[str, Any] | None = None
        self._logged: dict[str, Mapping[str, Tensor]] = {}

    # When.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder."""
        folder = trainer.strategy.broadcast(trainer.log_dir or trainer.default_root_dir)
        self._folder = self.dirpath or Path(folder) / "checkpoints"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to SIGUSR1, and start the clock."""
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        self._signaled = False
        if hasattr(signal, "SIGUSR1") and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGUSR1, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signaled = True

    def _stop_listening(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGUSR1, self._handler)
        self._handler = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave SIGUSR1 to others."""
        self._stop_listening()

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        if self.every_n_steps is not None and step - self._saved_step >= self.every_n_steps:
            return True
        due = self._signaled or time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        if world_size() == 1:
            return due
        # All processes have to agree, which takes a message.
        return step % CLOCK_STEPS == 0 and bool(trainer.strategy.broadcast(due))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Go on with the means of the epoch; write a checkpoint if it is time."""
        self._restore_means(trainer)
        # What follows the last batch ends with a checkpoint of its own.
        if not trainer.is_last_batch and self._is_due(trainer):
            self._save(trainer)
            if self._signaled:
                self._signaled = False
                if callable(self._handler):
                    self._handler(signal.SIGUSR1, None)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint."""
        self._epoch_is_over = True
        try:
            self._save(trainer)
        finally:
            self._epoch_is_over = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write a checkpoint if the run was told to stop."""
        self._stop_listening()
        if isinstance(exception, SIGTERMException) and trainer.state.fn == "fit":
            try:
                self._save(trainer)
            except NonFiniteError:
                pass  # the last one is from before the first bad step

    # What.

    def _save(self, trainer: Trainer) -> None:
        name = f"epoch={trainer.current_epoch:04d}-step={trainer.global_step:06d}{SUFFIX}"
        trainer.save_checkpoint(self._folder / name)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        self._tidy(name)

    @rank_zero_only
    def _tidy(self, name: str) -> None:
        """Point to the newest, and remove those that are too many."""
        link = self._folder / f".last.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        os.replace(link, self._folder / f"last{SUFFIX}")
        written = sorted(self._folder.glob(f"epoch=*{SUFFIX}"), key=lambda path: (path.stat().st_mtime, path.name))
        for path in written[: -self.keep]:
            path.unlink(missing_ok=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put in the state of each process."""
        own = {
            "random": random_state(pl_module.device),
            "logged": {} if self._epoch_is_over else _means_so_far(trainer) | self._logged,
            "gradients": self._gradients(trainer, pl_module),
        }
        processes: list[Any] = [own]
        if world_size() > 1:
            processes = [None] * world_size()
            torch.distributed.all_gather_object(processes, own)
        checkpoint[KEY] = processes

    def _gradients(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """Those of an optimizer step that is not complete yet."""
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            return {}
        named = pl_module.named_parameters()
        return {name: p.grad.detach().cpu() for name, p in named if p.grad is not None}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the state of this process."""
        processes = checkpoint.get(KEY, ())
        # Of as many processes as before each goes on as it was; of others, none can.
        self._restored = processes[trainer.global_rank] if len(processes) == trainer.world_size else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the random numbers and the gradients."""
        if self._restored is None:
            return
        self._logged = dict(self._restored["logged"])
        for name, gradient in self._restored["gradients"].items():
            pl_module.get_parameter(name).grad = gradient.to(pl_module.device)
        set_random_state(self._restored["random"], pl_module.device)
        self._restored = None

    def _restore_means(self, trainer: Trainer) -> None:
        """Add what was logged in the epoch before the checkpoint, as soon as it is logged again."""
        if not self._logged:
            return
        for key, metric in trainer.fit_loop.epoch_loop._results.items():
            for name, value in self._logged.pop(key, {}).items():
                setattr(metric, name, getattr(metric, name) + value.to(metric.device))


def _means_so_far(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """The sums behind the means and sums that are logged at the end of the epoch, by Lightning's own keys."""
    return {
        key: {name: getattr(metric, name).cpu() for name in SUMS if hasattr(metric, name)}
        for key, metric in trainer.fit_loop.epoch_loop._results.items()
        if metric.is_tensor
        and metric.meta.on_epoch
        and (metric.meta.is_mean_reduction or metric.meta.is_sum_reduction)
    }


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of the random numbers of Python, NumPy and torch, in plain values and tensors."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Go on from :func:`random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
