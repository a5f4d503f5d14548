"""Checkpoints from which a run goes on as if nothing had happened."""

import math
import os
import re
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from weakref import proxy, ref

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from adadim_lightning.callbacks.continuing import (
    add_logged,
    begin_epoch,
    conclude_epoch,
    logged_so_far,
    metrics_so_far,
    note_epoch,
    random_state,
    row_of_epoch,
    set_metrics,
    set_random_state,
)
from adadim_lightning.distributed import of_all_processes, world_size
from adadim_lightning.epochs import forget_cut_epoch, within_epoch
from adadim_lightning.files import check_writable
from adadim_lightning.functional._numeric import check_integer, check_number
from adadim_lightning.guard import NonFiniteError
from adadim_lightning.pretrained import CheckpointError, read_state

KEY = "adadim_run"
SUFFIX = ".ckpt"
UNFINISHED = ".tmp"
OWN_NAME = re.compile(r"epoch=\d{4,}-step=\d{6,}(-v\d+)?\.ckpt")
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
        self._put_off = False
        self._module: ref[LightningModule] | None = None
        self._names: list[str] = []
        self._run = ""

    # When.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder.

        Raises:
            ValueError: a plugin of the trainer writes files later than it says.
            OSError: nothing can be written to the folder.
        """
        if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
            raise ValueError(
                "RunCheckpoints has to see a file whole before it counts; leave out AsyncCheckpointIO"
            )
        self._folder = self.dirpath or Path(trainer.strategy.broadcast(_folder(trainer)))
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._check_disk(pl_module)
        self._restored, self._logged = None, []
        if stage == "fit" and (self._module is None or self._module() is not pl_module):
            self._module, self._names, self._run = ref(pl_module), [], uuid.uuid4().hex[:8]

    @rank_zero_only
    def _check_disk(self, pl_module: LightningModule) -> None:
        """Raise OSError where nothing can be written, and warn where the disk is too full for a checkpoint."""
        check_writable(self._folder)
        place = next(path for path in (self._folder.absolute(), *self._folder.absolute().parents) if path.exists())
        # Of the weights alone: what the optimizer adds is not there yet.
        stored = (x.untyped_storage() for x in pl_module.state_dict().values() if isinstance(x, Tensor))
        size = sum({x.data_ptr(): x.nbytes() for x in stored}.values())  # shared weights are written once
        free = shutil.disk_usage(place).free
        if free < size:
            rank_zero_warn(
                f"the disk of {self._folder} has {free / 1e6:,.1f} MB left, less than a checkpoint takes, "
                f"{size / 1e6:,.1f} MB at least: the first one will end the run"
            )

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_module": None}  # a reference of this process

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the signals, and start the clock."""
        forget_cut_epoch(trainer)
        self._saved_at = time.monotonic()
        self._signal, self._put_off = None, False
        self._listen(*SIGNALS)

    def _listen(self, *numbers: int) -> None:
        if threading.current_thread() is threading.main_thread():
            self._handlers |= {number: signal.signal(number, self._on_signal) for number in numbers}

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = number

    def _leave(self, trainer: Trainer) -> None:
        vars(trainer._logger_connector).pop("on_batch_end", None)
        # What Lightning found when the fit began, and goes back to at its end, was ours already.
        found = trainer._signal_connector._original_handlers
        for number, handler in self._handlers.items():
            before = signal.SIG_DFL if handler is None else handler
            signal.signal(number, before)
            if found.get(number) == self._on_signal:
                found[number] = before
        self._handlers = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the signals to Lightning, before it leaves them to who listened before the fit."""
        self._leave(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the signals and the trainer to others, also where there was nothing to train."""
        self._leave(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        if self.every_n_steps is not None and step - self._saved_step >= self.every_n_steps:
            return True
        due = self._signal is not None or time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        if world_size() == 1:
            return due
        # All processes have to agree, which takes a message.
        looks = step % CLOCK_STEPS == 0 or self._put_off
        return looks and trainer.strategy.reduce_boolean_decision(due, all=False)

    def _after_batch(self, trainer: Trainer) -> None:
        """Go on with the figures of the epoch; write a checkpoint if it is time."""
        add_logged(trainer, self._logged)
        self._logged = []
        if trainer.is_last_batch:
            return  # what follows ends with a checkpoint of its own
        if not self._put_off and _validates_next(trainer):
            self._put_off = True  # once: the validation would be lost
            return
        if self._is_due(trainer):
            signals = self._signals()
            if signal.SIGTERM not in signals:
                self._save(trainer)
            self._hand_on(trainer, signals)
        self._put_off = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the epoch's values from those before it."""
        note_epoch(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint."""
        add_logged(trainer, self._logged)  # there was no batch any more
        self._logged = []
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
        self._leave(trainer)
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

    # What loggers read of ModelCheckpoint to upload a checkpoint: none is best here, the last is the newest.
    monitor = None
    best_model_path = ""
    best_model_score = current_score = None

    @property
    def save_top_k(self) -> int:
        """Number of checkpoints that are kept."""
        return self.keep

    @property
    def best_k_models(self) -> dict[str, Tensor]:
        """Nothing: they are not ranked."""
        return {}

    @property
    def last_model_path(self) -> str:
        """Newest checkpoint; empty before the first."""
        return str(paths[-1]) if (paths := self.written()) else ""

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
        temporary = self._folder / f"{name}.{self._run}{UNFINISHED}"
        before = self._names
        self._names = [x for x in before if x != name] + [name]
        try:
            trainer.save_checkpoint(temporary)
        except BaseException:
            self._names = before
            temporary.unlink(missing_ok=True)
            raise
        self._publish(temporary, name)
        if trainer.is_global_zero:
            for logger in trainer.loggers:  # log_model=... uploads it
                logger.after_save_checkpoint(proxy(self))
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
        files = {"run": self._run, "written": self._names[-self.keep - 1 :]}
        row = None if within else row_of_epoch(trainer)  # the loggers get it after this
        checkpoint[KEY] = {"processes": of_all_processes(own), "files": files, "row": row}
        loops = checkpoint["loops"]["fit_loop"]
        if not within:
            conclude_epoch(loops)
        loop = trainer.fit_loop.epoch_loop
        batches: Any = loop.batch_progress.current
        after_batch = within and trainer.training and batches.completed == batches.processed
        if after_batch and _validates_next(trainer) and not loop._should_accumulate():
            # Lightning leaves out the validation that was done, but counts its step again.
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1

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
        self._adopt(**checkpoint[KEY]["files"])

    @rank_zero_only
    def _adopt(self, run: str, written: list[str]) -> None:
        """Take over the files of the run that goes on; those later than the checkpoint are the first to go."""
        self._run = run
        known = [name for name in written if (self._folder / name).is_file()]
        others = (path for path in sorted(self._folder.glob(f"epoch=*{SUFFIX}")) if path.name not in known)
        self._names = [path.name for path in others if _is_of(path, run)] + known
        for path in self._folder.glob(f"*.{run}{UNFINISHED}"):  # it was killed while it wrote
            path.unlink()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the random numbers, the metrics and the gradients; see to what follows each batch."""
        # Lightning calls the module's own hook after those of all callbacks, and it may change weights; then this.
        trainer._logger_connector.on_batch_end = _SaveBefore(self, trainer)  # type: ignore[method-assign]
        begin_epoch(trainer)
        self._saved_step = trainer.global_step
        if world_size() > 1:
            # Lightning's processes would talk about it in the middle of what they are saying.
            self._listen(signal.SIGTERM)
        if self._restored is None:
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(x.stopped_epoch or x.wait_count >= x.patience for x in callbacks if isinstance(x, EarlyStopping)):
            trainer.should_stop = True
        self._logged = self._restored["logged"]
        set_metrics(pl_module, self._restored["metrics"])
        for name, gradient in self._restored["gradients"].items():
            pl_module.get_parameter(name).grad = gradient.to(pl_module.device)
        set_random_state(self._restored["random"], pl_module.device)
        self._restored = None


class _SaveBefore:
    """The end of a batch, before which a checkpoint may be written.

    Pickled or copied with its trainer, it is Lightning's own.
    """

    def __init__(self, checkpoints: RunCheckpoints, trainer: Trainer) -> None:
        self._checkpoints, self._trainer = checkpoints, trainer
        self._own = trainer._logger_connector.on_batch_end

    def __call__(self) -> None:
        if self._trainer.training:
            self._checkpoints._after_batch(self._trainer)
        self._own()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._trainer._logger_connector, "on_batch_end")  # the class's: a copy has no other yet


def _validates_next(trainer: Trainer) -> bool:
    """Whether a validation follows the batch."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def _is_of(path: Path, run: str) -> bool:
    """Whether a run's ``RunCheckpoints`` wrote a file, as far as can be told of a broken one."""
    if OWN_NAME.fullmatch(path.name) is None:
        return False
    try:
        checkpoint = read_state(path)
    except CheckpointError:
        return True
    return bool(checkpoint.get(KEY, {}).get("files", {}).get("run") == run)


def _folder(trainer: Trainer) -> str:
    """Where Lightning's own checkpoints go."""
    if not trainer.loggers:
        return os.path.join(trainer.default_root_dir, "checkpoints")
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version, "checkpoints")
