"""Progress in the terminal, and the rate of training."""

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.data import extract_batch_size
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from adadim_lightning.distributed import world_size

SHOWN = {
    "balance/alpha": "alpha",
    "dynamics/H_R": "H(R)",
    "dynamics/I_RZ": "I(R;Z)",
    "throughput/images_per_second": "images/s",
}


def shown_values(trainer: Trainer) -> dict[str, str]:
    """The epoch's figures under the names that people read."""
    values = trainer.callback_metrics
    return {
        short: f"{float(values[key]):{',.0f' if '/s' in short else '.3f'}}"
        for key, short in SHOWN.items()
        if key in values
    }


class Throughput(Callback):
    """Logs ``throughput/images_per_second``: images (not views) trained on per second, over all processes.

    What happens after the epoch's last batch, such as validation, is not counted.
    """

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
        rate = self._images * world_size() / self._seconds
        pl_module.log(
            "throughput/images_per_second", rate, on_step=False, on_epoch=True, batch_size=1, sync_dist=True
        )


class EpochBar(RichProgressBar):
    """Rich progress bar with the epoch's alpha, H(R) and I(R;Z), on one line of 80 columns."""

    _shown: dict[str, str] = {}  # noqa: RUF012 -- replaced, never changed

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Epoch, a short bar, batches, time left."""
        return [
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
        ]

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The epoch's figures under the names that people read."""
        return dict(self._shown)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the figures, once an epoch: on a device each reading waits for it."""
        self._shown = shown_values(trainer)
        self._shown.pop("images/s", None)
        super().on_train_epoch_end(trainer, pl_module)


@contextmanager
def carry_on_without_output() -> Iterator[None]:
    """Let a run outlive a reader that went away (``| head``), or a full disk behind its output."""
    try:
        yield
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- for the rest of the process


class EpochLines(Callback):
    """A line of figures for each epoch, for output that is not a terminal; about thirty for the whole run."""

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line."""
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs
        if epochs is not None and epochs > 0 and epoch % max(1, round(epochs / 30)) and epoch != epochs:
            return
        figures = "  ".join(f"{name} {value}" for name, value in shown_values(trainer).items())
        of = f"/{epochs}" if epochs is not None and epochs > 0 else ""
        with carry_on_without_output():
            print(f"epoch {epoch}{of}  {figures}", flush=True)


def progress_callback() -> Callback:
    """A progress bar in a terminal, plain lines elsewhere."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return EpochBar() if terminal else EpochLines()
