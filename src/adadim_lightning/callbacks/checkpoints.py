"""Checkpoints from which a run goes on as if nothing had happened."""

import math
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from adadim_lightning.distributed import of_all_processes, world_size
from adadim_lightning.functional._numeric import check_integer, check_number
from adadim_lightning.guard import NonFiniteError

KEY = "adadim_processes"
SUFFIX = ".ckpt"
UNFINISHED = ".tmp"
SUMS = ("value", "cumulated_batch_size")
SIGNALS = [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
CLOCK_STEPS = 16  # between two looks at the clock that several processes agree on


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, reach the disk; of folders, where the system can do that."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@runtime_checkable
class Suspicious(Protocol):
    """A callback that knows bad times, in which no checkpoint is written."""

    def suspects(self) -> bool:
        """Whether these are such; all processes ask together."""


class RunCheckpoints(Checkpoint):
    """Writes all that a run needs to go on exactly: at intervals, at the end of epochs, and when told to stop.

    Beside what Lightning puts in, a checkpoint holds for each process the state of the random numbers of Python,
    NumPy and torch, the sums behind the means of the epoch that are logged, and the gradients that were
    accumulated so far. With the batches of :class:`~adadim_lightning.data.ImageData`, whose order and views depend
    on their place alone, a resumed run ends with the weights and figures, to the bit, of one that was never cut
    off, on the same machine and with as many processes.

    A checkpoint is written whole or not at all: under another name, to the disk, and only then to its own.

    At SIGTERM it writes one after the step or the validation that is under way, and the run stops. At SIGUSR1 and
    SIGUSR2 (a cluster says that the job's time is nearly up) it writes one too, and then calls whoever handled the
    signal before.

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
        self._signal: int | None = None
        self._epoch_is_over = False
        self._handlers: dict[int, Any] = {}
        self._restored: Mapping[str, Any] | None = None
        self._logged: dict[str, Mapping[str, Tensor]] = {}

    # When.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder."""
        folder = trainer.strategy.broadcast(trainer.log_dir or trainer.default_root_dir)
        self._folder = self.dirpath or Path(folder) / "checkpoints"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the signals, and start the clock."""
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        self._signal = None
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = number

    def _stop_listening(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the signals to others."""
        self._stop_listening()

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        if self.every_n_steps is not None and step - self._saved_step >= self.every_n_steps:
            return True
        due = self._signal is not None or time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
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
            self._hand_on()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint."""
        self._epoch_is_over = True
        try:
            self._save(trainer)
        finally:
            self._epoch_is_over = False
        self._hand_on()

    def _hand_on(self) -> None:
        """Call who handled the signal that has come."""
        number, self._signal = self._signal, None
        handler = self._handlers.get(number) if number is not None else None
        if callable(handler):
            handler(number, None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write a checkpoint if the run was told to stop."""
        self._stop_listening()
        if isinstance(exception, SIGTERMException) and trainer.state.fn == "fit":
            with suppress(NonFiniteError):  # the last one is from before the first bad step
                self._save(trainer)

    # What.

    def written(self) -> list[Path]:
        """The checkpoints in the folder, the newest last."""
        found = self._folder.glob(f"epoch=*{SUFFIX}")
        return sorted(found, key=lambda path: (path.stat().st_mtime, path.name))

    def _save(self, trainer: Trainer) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        guards = [callback for callback in callbacks if isinstance(callback, Suspicious)]
        if any(guard.suspects() for guard in guards):
            return  # those that are kept are good
        name = f"epoch={trainer.current_epoch:04d}-step={trainer.global_step:06d}{SUFFIX}"
        temporary = self._folder / f"{name}{UNFINISHED}"
        try:
            trainer.save_checkpoint(temporary)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._publish(temporary, name)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    @rank_zero_only
    def _publish(self, temporary: Path, name: str) -> None:
        """Give a whole checkpoint its name, point to it, and remove those that are too many."""
        sync(temporary)
        os.replace(temporary, self._folder / name)
        link = self._folder / f"last{SUFFIX}{UNFINISHED}"
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(name)
        except OSError:  # a disk without links
            shutil.copyfile(self._folder / name, link)
        os.replace(link, self._folder / f"last{SUFFIX}")
        sync(self._folder)
        for path in self._folder.glob(f"*{SUFFIX}{UNFINISHED}"):  # of a run that was killed while it wrote
            path.unlink(missing_ok=True)
        for path in self.written()[: -self.keep]:
            path.unlink(missing_ok=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put in the state of each process."""
        own = {
            "random": random_state(pl_module.device),
            "logged": {} if self._epoch_is_over else _means_so_far(trainer) | self._logged,
            "gradients": self._gradients(trainer, pl_module),
        }
        checkpoint[KEY] = of_all_processes(own)

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
    numpy: Any = np.random.get_state()
    kind, keys, *rest = numpy
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
