"""Progress in the terminal, and the rate of training."""

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.data import extract_batch_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table

from adadim_lightning.callbacks.adadim import AdaDim
from adadim_lightning.callbacks.continuing import figures_of_epoch, note_epoch
from adadim_lightning.distributed import training_progress, training_steps, world_size

SHOWN = {"balance/alpha": "alpha", "dynamics/H_R": "H(R)", "dynamics/I_RZ": "I(R;Z)"}
RATE = "throughput/images_per_second"
FOLLOWED = ("balance/alpha", RATE)  # step by step, the others at the end of each epoch
GAP = 2  # columns between two figures


class Throughput(Callback):
    """Logs ``throughput/images_per_second``: images (not views) trained on per second, over all processes.

    What happens after the epoch's last batch, such as validation, is not counted.
    """

    _images = 0
    _seconds = math.inf

    @property
    def images_per_second(self) -> float:
        """The rate since the epoch began."""
        return self._images * world_size() / self._seconds

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock where the fit goes on within an epoch, which is not announced."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()
        self._seconds = math.inf
        self._images = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images, and note the time."""
        self._images += extract_batch_size(batch)
        if batch_idx + 1 == trainer.num_training_batches and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._seconds = time.perf_counter() - self._start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the rate."""
        pl_module.log(RATE, self.images_per_second, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)


class TimeLeft:
    """Seconds that the rest of a fit will take, at the pace since it was started or resumed.

    The clock starts after the first batch, which takes longer than the others. A fit over a stream has no length
    before the stream ended once.

    Args:
        trainer: of a fit that starts.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._steps = training_steps(trainer)
        self._batches = 0  # of an epoch, once one was seen whole
        self._begin: tuple[float, float] | None = None
        self.seconds = math.nan

    def _progress(self, trainer: Trainer, batches: int) -> float:
        progress = training_progress(trainer, self._steps)
        epochs = trainer.max_epochs or -1
        if math.isnan(progress) and self._batches and epochs > 0:
            share = min(batches / self._batches, 1.0)
            progress = min((trainer.current_epoch + share) / epochs, 1.0)
        return progress

    def batch_ended(self, trainer: Trainer, batches: int) -> None:
        """Take in a step, given the number of batches of the epoch so far."""
        now, progress = time.perf_counter(), self._progress(trainer, batches)
        if self._begin is None or math.isnan(self._begin[1]):
            self._begin = now, progress
        elif progress > self._begin[1]:
            self.seconds = (1 - progress) * (now - self._begin[0]) / (progress - self._begin[1])

    def epoch_ended(self, batches: int) -> None:
        """Learn how long an epoch is."""
        self._batches = batches


def _duration(seconds: float) -> str:
    """At most 5 characters for up to 100 days."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    for large, small, units in ((days, hour, "dh"), (hours, minute, "hm"), (minutes, second, "ms")):
        if large >= 10:
            return f"{large}{units[0]}"
        if large:
            return f"{large}{units[0]}{small:02d}{units[1]}"
    return f"{second}s"


def _rate(value: float) -> str:
    """At most 5 characters."""
    if value < 9_999.5:
        return f"{value:,.0f}"
    if value < 999_500:
        return f"{value / 1e3:.1f}k" if value < 99_950 else f"{value / 1e3:.0f}k"
    return f"{value / 1e6:.1f}M"


def _figure(name: str, value: float, digits: int) -> str:
    """A figure under its name; those that can be negative keep a place for the sign, so that nothing jumps."""
    if name == RATE:
        return f"{_rate(value):>5} {'images/s' if digits > 2 else 'img/s'}"
    return f"{SHOWN[name]} {value:{digits + 3 if name == 'dynamics/I_RZ' else 0}.{digits}f}"


def _read(trainer: Trainer) -> dict[str, float]:
    """The epoch's figures; on a device each reading waits for it."""
    values = figures_of_epoch(trainer)
    return {key: float(values[key]) for key in (*SHOWN, RATE) if key in values}


def _epoch(trainer: Trainer) -> str:
    epochs = trainer.max_epochs or -1
    number = trainer.current_epoch + 1
    return f"epoch {number:>{len(str(epochs))}}/{epochs}" if epochs > 0 else f"epoch {number}"


class EpochBar(ProgressBar):
    """Progress bar with alpha, H(R), I(R;Z), images/s and the time that is left of the whole fit, on one line.

    The bar is that of the epoch. A narrow terminal shows less: first the counted batches go, then the third
    decimal, the bar, and the figures from the last to the first. Nothing in it waits for the device but the
    reading of the figures at the end of an epoch.
    """

    _live: Live | None = None
    _enabled = True

    def __init__(self) -> None:
        super().__init__()
        self._figures: dict[str, float] = {}
        self._label = self._end = ""
        self._done = 0
        self._batches: float = math.inf

    def disable(self) -> None:
        """Draw nothing, as on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Draw again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the line."""
        self._left = TimeLeft(trainer)
        self._adadim = next((x for x in trainer.callbacks if isinstance(x, AdaDim)), None)  # type: ignore[attr-defined]
        self._throughput = next((x for x in trainer.callbacks if isinstance(x, Throughput)), None)  # type: ignore[attr-defined]
        self._start = time.perf_counter()
        if self._enabled:
            self._live = Live(self, console=Console(highlight=False), refresh_per_second=4)
            self._live.start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar anew."""
        note_epoch(trainer)
        self._label, self._done, self._batches = _epoch(trainer), 0, trainer.num_training_batches

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on, with those figures that the host knows anyway."""
        self._done = batch_idx + 1
        self._left.batch_ended(trainer, self._done)
        self._end = "" if math.isnan(self._left.seconds) else f"{_duration(self._left.seconds)} left"
        if self._adadim is not None and self._adadim._values is not None:
            self._figures["balance/alpha"] = self._adadim._values[0]
        if self._throughput is not None:
            self._figures[RATE] = self._throughput.images_per_second

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the figures."""
        self._left.epoch_ended(self._done)
        self._figures = {key: x for key, x in self._figures.items() if key in FOLLOWED} | _read(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the line, with the time that it took."""
        self._end = f"in {_duration(time.perf_counter() - self._start)}"
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the line as it is."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the terminal back."""
        self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            with carry_on_without_output():
                self._live.stop()
            self._live = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The line, as much of it as fits."""
        figures = [(key, self._figures[key]) for key in (*SHOWN, RATE) if key in self._figures]
        known = math.isfinite(self._batches)
        batch = f"batch {self._done}"
        if known:
            batch = f"batch {self._done:>{len(str(self._batches))}}/{self._batches}"
        full = [(3, 10, [batch]), (3, 10, []), (2, 5, []), (2, 0, [])]
        layouts = [(*layout, len(figures)) for layout in full]
        layouts += [(2, 0, [], count) for count in reversed(range(len(figures)))]
        for digits, shortest, batches, count in layouts:
            texts = [_figure(key, value, digits) for key, value in figures[:count]]
            texts = [self._label, *batches, *texts, f"{self._end:>10}"]
            room = options.max_width - sum(map(len, texts)) - GAP * (len(texts) - 1)
            if room >= (shortest + GAP if shortest else 0):
                break
        line = Table.grid(*[""] * (len(texts) + bool(shortest)), padding=(0, GAP, 0, 0), pad_edge=False)
        for column in line.columns:
            column.no_wrap = True
        total = self._batches if known else None
        bar = Bar(total, self._done, width=min(room - GAP, 30), pulse=not known, animation_time=time.monotonic())
        line.add_row(*texts[:1], *[bar] * bool(shortest), *texts[1:])
        yield line


@contextmanager
def carry_on_without_output() -> Iterator[None]:
    """Let a run outlive a reader that went away (``| head``), or a full disk behind its output."""
    try:
        yield
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- for the rest of the process


class EpochLines(Callback):
    """A line of figures for each epoch, for output that is not a terminal; about thirty for the whole run.

    Args:
        label: begins each line, where several runs share the output.
    """

    def __init__(self, label: str = "") -> None:
        self.label = label
        self._batches = 0  # a resumed epoch may have none left

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._left = TimeLeft(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the epoch's figures from those before it."""
        note_epoch(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count."""
        self._batches = batch_idx + 1
        self._left.batch_ended(trainer, self._batches)

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line."""
        self._left.epoch_ended(self._batches)
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or -1
        if epochs > 0 and epoch % max(1, round(epochs / 30)) and epoch != epochs:
            return
        texts = [self.label] if self.label else []
        texts += [_epoch(trainer)]
        texts += [_figure(key, value, 3).replace("images", "img") for key, value in _read(trainer).items()]
        if not math.isnan(self._left.seconds):
            texts.append(f"{_duration(self._left.seconds)} left")
        with carry_on_without_output():
            print(*texts, sep=" " * GAP, flush=True)


def progress_callback() -> Callback:
    """A progress bar in a terminal, plain lines elsewhere, and in the worker processes that share a terminal."""
    terminal = sys.stdout is not None and sys.stdout.isatty() and not Console().is_dumb_terminal
    return EpochBar() if terminal and in_main_process() else EpochLines()


def in_main_process() -> bool:
    """Whether this process was started by the user, not as a worker of joblib or multiprocessing."""
    return multiprocessing.current_process().name == "MainProcess"
