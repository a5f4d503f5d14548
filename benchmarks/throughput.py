"""End-to-end training rate against lightly, and where the time goes.

Run it by ``uv run python benchmarks/throughput.py [--backbone NAME] [--json FILE]``.

All sides train the same backbone and head on the same uint8 images, 32 x 32, in memory, with the same batch size,
the same augmentation operations and probabilities, the same optimizer, through Lightning's Trainer:

- lightly: its VICRegTransform on Pillow images in a DataLoader with workers, its VICRegLoss;
- ours: batches of uint8, kornia's views in whole batches, no workers, channels_last as adadim-train has it,
  AdaDimLoss with all its parts (VICReg, NT-Xent, I(R;Z));
- host: the same with torchvision's views, one image at a time in the workers.

They take turns, and the rate is the median over the rounds; the ratio is what counts, machines differ. On a GPU
the bare forward and backward pass without data is measured too.
"""

import argparse
import itertools
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import lightly
import lightning
import torch
from lightly.loss import VICRegLoss
from lightly.transforms import VICRegTransform
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import to_pil_image

from adadim_lightning import AdaDimLoss, AdaDimModule
from adadim_lightning.data import ImageData, MemoryImages, TwoViews
from adadim_lightning.models import projection_head, torchvision_backbone

SIZE = 32
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# What lightly's VICRegTransform does by default, in its order; a test holds the two against each other.
RECIPE: dict[str, dict[str, Any]] = {
    "crop": {"scale": (0.08, 1.0)},
    "flip": {"p": 0.5},
    "color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "p": 0.8},
    "grayscale": {"p": 0.2},
    "solarize": {"threshold": 0.5, "p": 0.1},
    "blur": {"sigma": (0.1, 2.0), "p": 0.5},
}
GOALS = {"small": 3.0, "resnet18": 1.1}
WARM_UP = 8  # batches; more than the workers have ready when training begins


def small_backbone() -> nn.Module:
    """Three strided convolutions: what is left to do is to make views."""
    layers: list[nn.Module] = []
    widths = (3, 16, 32, 64)
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


BACKBONES: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "small": lambda: (small_backbone(), 64),
    "resnet18": lambda: (torchvision_backbone("resnet18"), 512),
    "resnet18_cifar": lambda: (torchvision_backbone("resnet18", cifar_stem=True), 512),
}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


class LightlyVICReg(LightningModule):
    """VICReg as lightly's documentation writes it."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = head
        self.criterion = VICRegLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x0, x1), _ = batch
        z0, z1 = (self.projection_head(self.backbone(x)) for x in (x0, x1))
        loss: Tensor = self.criterion(z0, z1)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.parameters())


class PillowImages(Dataset[Any]):
    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.transform = VICRegTransform(input_size=SIZE)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        return self.transform(to_pil_image(self.images[index])), 0


class Clock(Callback):
    """Seconds from the end of the warm-up to the end of the epoch."""

    def now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == WARM_UP:
            self.start = self.now()
        elif batch_idx + 1 == trainer.num_training_batches:
            self.seconds = self.now() - self.start


def rate(module: LightningModule, batch_size: int, steps: int, precision: str, **data: Any) -> float:
    """Images a second, without the warm-up."""
    clock = Clock()
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=steps + WARM_UP,
        limit_val_batches=0,
        precision=precision,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, **data)
    return batch_size * steps / clock.seconds


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        generator = torch.Generator().manual_seed(0)
        count = options.batch_size * (options.steps + WARM_UP)
        # Smooth noise: as little like white noise as photographs are.
        coarse = torch.rand(count, 3, 8, 8, generator=generator)
        smooth = torch.cat([nn.functional.interpolate(x, SIZE, mode="bicubic") for x in coarse.split(1024)])
        self.images = (smooth.clamp(0, 1) * 255).byte()

    def model(self) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        backbone, width = BACKBONES[self.options.backbone]()
        return backbone, projection_head(width, hidden_dim=512, out_dim=512, layers=3)

    def views(self, backend: Any) -> TwoViews:
        return TwoViews(RECIPE, mean=MEAN, std=STD, backend=backend)

    def _rate(self, module: LightningModule, **data: Any) -> float:
        options = self.options
        return rate(module, options.batch_size, options.steps, options.precision, **data)

    def lightly(self) -> float:
        loader = DataLoader(
            PillowImages(self.images),
            batch_size=self.options.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=self.options.workers,
            persistent_workers=True,
            pin_memory=torch.cuda.is_available(),
        )
        return self._rate(LightlyVICReg(*self.model()), train_dataloaders=loader)

    def _adadim(self, backend: str) -> float:
        data = ImageData(
            MemoryImages(self.images),
            None,
            views=self.views(backend),
            batch_size=self.options.batch_size,
            # Left alone, images in memory need no workers.
            num_workers=self.options.workers if backend == "torchvision" else None,
        )
        module = AdaDimModule(
            *self.model(),
            AdaDimLoss(alpha=0.5, gamma=0.1, kappa=1),
            sgd,
            channels_last=True,
        )
        return self._rate(module, datamodule=data)

    def ours(self) -> float:
        return self._adadim("kornia")

    def host(self) -> float:
        return self._adadim("torchvision")

    def bare(self) -> float:
        """Forward, objective and backward on one batch that lies on the device."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        backbone, head = (x.to(device) for x in self.model())
        module = AdaDimModule(backbone, head, AdaDimLoss(alpha=0.5, gamma=0.1, kappa=1), channels_last=True)
        optimizer = sgd(module.parameters())
        views = torch.randn(2 * self.options.batch_size, 3, SIZE, SIZE, device=device)
        clock = Clock()
        with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in self.options.precision):
            for step in range(self.options.steps + WARM_UP):
                if step == WARM_UP:
                    start = clock.now()
                r1, r2 = module(views).chunk(2)
                z1, z2 = module.projection_head(torch.cat([r1, r2])).chunk(2)
                module.objective(r1, r2, z1, z2).total.backward()
                optimizer.step()
                optimizer.zero_grad()
        return self.options.batch_size * self.options.steps / (clock.now() - start)

    def stages(self) -> dict[str, float]:
        """Milliseconds of each stage for one batch, one after another, in this process."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        backbone, head = (x.to(device) for x in self.model())
        module = AdaDimModule(backbone, head, AdaDimLoss(alpha=0.5, gamma=0.1, kappa=1), channels_last=True).to(
            device
        )
        source, size = MemoryImages(self.images.to(device)), self.options.batch_size
        two_views, clock = self.views("kornia"), Clock()
        names = ("load", "views", "forward", "objective", "backward")
        spent: dict[str, list[float]] = {name: [] for name in names}
        for step in range(10):
            times = [clock.now()]
            images, _ = source.__getitems__(torch.randint(len(source), (size,)).tolist())
            times.append(clock.now())
            view1, view2 = two_views(images)
            times.append(clock.now())
            r1, r2 = module(torch.cat([view1, view2])).chunk(2)
            z1, z2 = module.projection_head(torch.cat([r1, r2])).chunk(2)
            times.append(clock.now())
            total = module.objective(r1, r2, z1, z2).total
            times.append(clock.now())
            total.backward()
            times.append(clock.now())
            if step >= 3:
                for name, (start, end) in zip(names, itertools.pairwise(times), strict=True):
                    spent[name].append(1000 * (end - start))
        return {name: median(values) for name, values in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=BACKBONES, default="small")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40, help="timed batches of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes that load, for lightly and host")
    parser.add_argument("--precision", default="bf16-mixed" if torch.cuda.is_available() else "32-true")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    bench = Bench(options)
    sides = ["lightly", "ours", "host"] + (["bare"] if torch.cuda.is_available() else [])
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side in sides:
            rates[side].append(getattr(bench, side)())
    typical = {side: median(values) for side, values in rates.items()}
    stages = bench.stages()
    ratio = typical["ours"] / typical["lightly"]
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    goal = 3.0 if torch.cuda.is_available() else GOALS.get(options.backbone)

    console = Console(width=80)
    console.print(
        f"{options.backbone}, batches of {options.batch_size} images of {SIZE} x {SIZE}, "
        f"{options.workers} workers, {options.precision}, on {device}"
    )
    table = Table(show_edge=False)
    for column in ("", "images/s", "of lightly's"):
        table.add_column(column, justify="right" if column else "left")
    for side, value in typical.items():
        table.add_row(side, f"{value:,.0f}", f"{value / typical['lightly']:.2f}")
    console.print(table)
    console.print(f"goal: at least {goal} of lightly's" if goal else "")
    whole = sum(stages.values())
    for name, milliseconds in stages.items():
        console.print(f"  {name:10} {milliseconds:8.1f} ms a batch  {milliseconds / whole:5.0%}")
    if options.json:
        result = {
            "command": shlex.join(["python", "benchmarks/throughput.py", *sys.argv[1:]]),
            "device": device,
            "machine": platform.machine(),
            "versions": {x.__name__: x.__version__ for x in (torch, lightning, lightly)},
            "options": {key: value for key, value in vars(options).items() if key != "json"},
            "images_per_second": rates,
            "median": typical,
            "ratio_to_lightly": ratio,
            "stages_ms": stages,
            "goal": goal,
            "met": None if goal is None else ratio >= goal,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
