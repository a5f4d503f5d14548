"""Checkpoints from which a run goes on as if nothing had happened."""

import functools
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from adadim_lightning.callbacks.continuing import (
    add_logged,
    begin_epoch,
    conclude_epoch,
    logged_so_far,
    metrics_so_far,
    random_state,
    set_metrics,
    set_random_state,
    within_epoch,
)
from adadim_lightning.distributed import of_all_processes, world_size
from adadim_lightning.functional._numeric import check_integer, check_number
from adadim_lightning.guard import NonFiniteError

KEY = "adadim_run"
SUFFIX = ".ckpt"
UNFINISHED = ".tmp"
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

    It removes no files but its own: those of this run, and of the run that it goes on with.

    Args:
        dirpath: folder to write to; by default that of Lightning's ``ModelCheckpoint``: ``checkpoints`` in the
            folder of the first logger's run, or of the trainer.
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
        self._handlers: dict[int, Any] = {}
        self._restored: Mapping[str, Any] | None = None
        self._logged: list[dict[str, Any]] = []
        self._names: list[str] = []

    # When.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder.

        Raises:
            ValueError: a plugin of the trainer writes files later than it says.
        """
        if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
            raise ValueError(
                "RunCheckpoints has to see a file whole before it counts; leave out AsyncCheckpointIO"
            )
        self._folder = self.dirpath or Path(trainer.strategy.broadcast(_folder(trainer)))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the signals, and start the clock."""
        self._saved_at = time.monotonic()
        self._signal = None
        self._listen(*SIGNALS)

    def _listen(self, *numbers: int) -> None:
        if threading.current_thread() is threading.main_thread():
            self._handlers |= {number: signal.signal(number, self._on_signal) for number in numbers}

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = number

    def _leave(self, pl_module: LightningModule) -> None:
        vars(pl_module).pop("on_train_batch_end", None)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the signals and the module to others."""
        self._leave(pl_module)

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        if self.every_n_steps is not None and step - self._saved_step >= self.every_n_steps:
            return True
        due = self._signal is not None or time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        if world_size() == 1:
            return due
        # All processes have to agree, which takes a message.
        return step % CLOCK_STEPS == 0 and trainer.strategy.reduce_boolean_decision(due, all=False)

    def _after_batch(self, trainer: Trainer) -> None:
        """Go on with the figures of the epoch; write a checkpoint if it is time."""
        add_logged(trainer, self._logged)
        self._logged = []
        # What follows the last batch ends with a checkpoint of its own; a validation that is due would be lost.
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        if trainer.is_last_batch or loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            return
        if self._is_due(trainer):
            signals = self._signals()
            if signal.SIGTERM not in signals:
                self._save(trainer)
            self._hand_on(trainer, signals)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint."""
        self._save(trainer)
        self._hand_on(trainer, self._signals())

    def _signals(self) -> set[int]:
        """What any of the processes was told since the last time."""
        told, self._signal = self._signal, None
        return {number for number in of_all_processes(told) if number is not None}

    def _hand_on(self, trainer: Trainer, signals: set[int]) -> None:
        """Call who handled them before."""
        for number in signals:
            handler = self._handlers.get(number)
            if number == signal.SIGTERM:
                trainer._signal_connector.received_sigterm = True  # all processes end after this batch
            elif callable(handler):
                handler(number, None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write a checkpoint if the run was told to stop."""
        self._leave(pl_module)
        if self._signal == signal.SIGTERM:  # why it failed, perhaps
            trainer._signal_connector.received_sigterm = True
        if isinstance(exception, SIGTERMException) and trainer.state.fn == "fit":
            with suppress(NonFiniteError):  # the last one is from before the first bad step
                self._save(trainer)

    # What.

    def written(self) -> list[Path]:
        """The checkpoints of this run, the newest last."""
        paths = (self._folder / name for name in self._names)
        return [path for path in paths if path.is_file()]

    def _new_name(self, trainer: Trainer) -> str:
        """A name that no checkpoint of another run has."""
        stem = f"epoch={trainer.current_epoch:04d}-step={trainer.global_step:06d}"
        names = (f"{stem}{suffix}{SUFFIX}" for suffix in chain([""], (f"-v{i}" for i in count(1))))
        return next(name for name in names if name in self._names or not (self._folder / name).exists())

    def _save(self, trainer: Trainer) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        guards = [callback for callback in callbacks if isinstance(callback, Suspicious)]
        if trainer.fast_dev_run or any(guard.suspects() for guard in guards):  # type: ignore[attr-defined]
            return  # those that are kept are good
        name = trainer.strategy.broadcast(self._new_name(trainer))
        temporary = self._folder / f"{name}{UNFINISHED}"
        before = self._names
        self._names = [x for x in before if x != name] + [name]
        try:
            trainer.save_checkpoint(temporary)
        except BaseException:
            self._names = before
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
        for path in self.written()[: -self.keep]:
            path.unlink(missing_ok=True)
        self._names = [path.name for path in self.written()]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put in the state of each process."""
        within = within_epoch(trainer)
        own = {
            "random": random_state(pl_module.device),
            "logged": logged_so_far(trainer) if within else [],
            "metrics": metrics_so_far(pl_module) if within else {},
            "gradients": self._gradients(trainer, pl_module),
        }
        checkpoint[KEY] = {"processes": of_all_processes(own), "written": self._names[-self.keep - 1 :]}
        if not within:
            conclude_epoch(checkpoint["loops"]["fit_loop"])

    def _gradients(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """Those of an optimizer step that is not complete yet; who steps by hand may need them any time."""
        if pl_module.automatic_optimization and not trainer.fit_loop.epoch_loop._should_accumulate():
            return {}
        named = pl_module.named_parameters()
        return {name: p.grad.detach().cpu() for name, p in named if p.grad is not None}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the state of this process."""
        if KEY not in checkpoint or trainer.state.fn != "fit":
            return
        processes = checkpoint[KEY]["processes"]
        # Of as many processes as before each goes on as it was; of others, none can.
        self._restored = processes[trainer.global_rank] if len(processes) == trainer.world_size else None
        self._adopt(checkpoint[KEY]["written"])

    @rank_zero_only
    def _adopt(self, names: list[str]) -> None:
        """Take over the files of the run that goes on; those later than the checkpoint are the first to go."""
        self._names = names = [name for name in names if (self._folder / name).is_file()]
        if not names:
            return  # they were moved
        since = self._folder / names[-1]
        found = [path for path in self._folder.glob("epoch=*-step=*") if path.name not in names]
        later = [path for path in found if path.stat().st_mtime >= since.stat().st_mtime]
        self._names = [path.name for path in later if path.suffix == SUFFIX] + names
        for path in later:
            if path.suffix == UNFINISHED:  # of a run that was killed while it wrote
                path.unlink()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the random numbers, the metrics and the gradients; see to what follows each batch."""
        # Lightning calls the module's own hook after those of all callbacks, and it may change weights.
        hook = pl_module.on_train_batch_end

        @functools.wraps(hook)
        def then_save(*args: Any, **kwargs: Any) -> None:
            hook(*args, **kwargs)
            self._after_batch(trainer)

        pl_module.on_train_batch_end = then_save  # type: ignore[method-assign]
        begin_epoch(trainer)
        self._saved_step = trainer.global_step
        if world_size() > 1:
            # Lightning's processes would talk about it in the middle of what they are saying.
            self._listen(signal.SIGTERM)
        if self._restored is None:
            return
        self._logged = self._restored["logged"]
        set_metrics(pl_module, self._restored["metrics"])
        for name, gradient in self._restored["gradients"].items():
            pl_module.get_parameter(name).grad = gradient.to(pl_module.device)
        set_random_state(self._restored["random"], pl_module.device)
        self._restored = None


def _folder(trainer: Trainer) -> str:
    """Where Lightning's own checkpoints go."""
    if not trainer.loggers:
        return os.path.join(trainer.default_root_dir, "checkpoints")
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version, "checkpoints")
