"""What DimensionMonitor costs, as a share of the training step.

Run it by ``uv run python benchmarks/overhead.py [--json FILE] [--blocks N]``.

One fit of SimCLR (torchvision's ResNet-18 with its own stem, 32 x 32 pixels, two views of 256 images) alternates
blocks of 50 steps with the monitor and without. A block with the monitor ends with a reading: spectra of R and Z
over the last 4,096 rows, logged. Two figures come of it:

- inside: the time spent in the monitor's own code, hooks included, over that of the same blocks. On a GPU, where
  the code only queues work, this is the host's share.
- blocks: the median block with the monitor over the median block without, minus one; it sees everything, and the
  noise of the machine too.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from adadim_lightning import DimensionMonitor
from adadim_lightning.tap import Tap

STEPS, BATCH = 50, 256


class SimCLR(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        resnet = torchvision.models.resnet18()
        self.backbone = nn.Sequential(*list(resnet.children())[:-1])
        self.projection_head = SimCLRProjectionHead(512, 512, 128)
        self.criterion = NTXentLoss()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        z1, z2 = (self.projection_head(self.backbone(x).flatten(1)) for x in batch)
        return self.criterion(z1, z2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06)


class Images(Dataset[Any]):
    """Eight batches of noise, in memory: the pixels do not matter here."""

    def __init__(self) -> None:
        self.batches = torch.randn(8, 2, BATCH, 3, 32, 32)

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return tuple(self.batches[index % len(self.batches)])  # type: ignore[return-value]


class Stopwatch:
    """Seconds spent in some methods."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(owner, name, timed)


class Alternating(Callback):
    """Hands every second epoch to the monitor, and times them all."""

    def __init__(self, monitor: DimensionMonitor) -> None:
        self.monitor = monitor
        self.watch = Stopwatch()
        for name in ("on_train_batch_start", "on_train_batch_end", "on_train_epoch_start", "on_train_epoch_end"):
            self.watch.wrap(monitor, name)
        # Taps are made by the monitor, so their hook is timed where it is defined.
        original, watch = Tap._on_forward, self.watch

        def on_forward(tap: Tap, *args: Any) -> None:
            start = time.perf_counter()
            original(tap, *args)
            watch.seconds += time.perf_counter() - start

        Tap._on_forward = on_forward  # type: ignore[method-assign]
        self.blocks: dict[bool, list[float]] = {True: [], False: []}
        self.on = False
        self.start = 0.0

    def now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on = trainer.current_epoch % 2 == 1
        if self.on:
            self.monitor.on_fit_start(trainer, pl_module)
        if trainer.current_epoch == 2:  # two epochs to warm up
            self.watch.seconds = 0.0
        self.start = self.now()
        if self.on:
            self.monitor.on_train_epoch_start(trainer, pl_module)

    def on_train_batch_start(self, *args: Any) -> None:
        if self.on:
            self.monitor.on_train_batch_start(*args)

    def on_train_batch_end(self, *args: Any) -> None:
        if self.on:
            self.monitor.on_train_batch_end(*args)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.on:
            self.monitor.on_train_epoch_end(trainer, pl_module)
        if trainer.current_epoch >= 2:
            self.blocks[self.on].append(self.now() - self.start)
        if self.on:
            self.monitor.teardown(trainer, pl_module, "fit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of each kind, after one of each to warm up")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    alternating = Alternating(DimensionMonitor("backbone", "projection_head", every_n_steps=STEPS))
    trainer = Trainer(
        max_epochs=2 * arguments.blocks + 2,
        callbacks=[alternating],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = SimCLR()
    trainer.fit(module, DataLoader(Images(), batch_size=None))

    with_monitor, without = alternating.blocks[True], alternating.blocks[False]
    inside = alternating.watch.seconds / sum(with_monitor)
    goal = 0.02 if module.device.type == "cuda" or torch.cuda.is_available() else 0.01
    result = {
        "command": "python benchmarks/overhead.py",
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads",
        "machine": platform.machine(),
        "torch": torch.__version__,
        "steps_per_block": STEPS,
        "step_ms": 1000 * median(without) / STEPS,
        "inside": inside,
        "blocks": median(with_monitor) / median(without) - 1,
        "seconds_with": with_monitor,
        "seconds_without": without,
        "goal": goal,
        "met": inside <= goal,
    }
    console = Console(width=80)
    console.print(
        f"ResNet-18, 2 x {BATCH} images of 32 x 32, on {result['device']}: {result['step_ms']:.0f} ms a step"
    )
    console.print(f"DimensionMonitor, a reading every {STEPS} steps, takes of it")
    console.print(f"  in its own code            {inside:8.2%}   (goal: at most {goal:.0%})")
    console.print(f"  block against block        {result['blocks']:8.2%}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
