"""A tiny model, a few digits, a trainer that prints nothing, and a callback that notes what really happened."""

import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from adadim_lightning import AdaDimModule
from adadim_lightning.data import ImageData, MemoryImages, TwoViews, digits

DIM_R, DIM_Z = 12, 8


class Noise(nn.Module):
    """The cheapest augmentation."""

    def forward(self, images: Tensor) -> Tensor:
        return images + 0.2 * torch.randn_like(images)


def two_noisy_views() -> TwoViews:
    return TwoViews([Noise()], mean=[0.5], std=[0.5])


@cache
def all_digits() -> ImageData:
    return digits(views=two_noisy_views())


def some_digits(train: int = 96, test: int = 40, batch_size: int = 32) -> ImageData:
    """The first digits, with random views."""
    images = all_digits()
    return ImageData(
        MemoryImages(images.train.images[:train], images.train.labels[:train]),
        MemoryImages(images.test.images[:test], images.test.labels[:test]),
        views=two_noisy_views(),
        batch_size=batch_size,
    )


class FixedPairs(Dataset[tuple[tuple[Tensor, Tensor], Tensor]]):
    """Two fixed views of each digit: every run sees the same."""

    def __init__(self, size: int) -> None:
        images = all_digits().train
        pixels = images.images[:size].float() / 255
        noise = torch.randn(2, *pixels.shape, generator=torch.Generator().manual_seed(1))
        self.view1, self.view2 = pixels + 0.2 * noise
        self.labels = images.labels[:size]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return (self.view1[index], self.view2[index]), self.labels[index]


def fixed_batches(batches: int, batch_size: int = 16) -> DataLoader[Any]:
    """The same batches in the same order in every epoch and every run; each has 2 x batch_size rows."""
    return DataLoader(FixedPairs(batches * batch_size), batch_size=batch_size)


def held_out(size: int = 40, batch_size: int = 20) -> DataLoader[Any]:
    """Clean images and labels for validation."""
    images = all_digits().test
    pairs = [(images.images[i].float() / 255, images.labels[i]) for i in range(size)]
    return DataLoader(pairs, batch_size=batch_size)  # type: ignore[arg-type]


def backbone() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, DIM_R))


def head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(DIM_R, 16), nn.ReLU(), nn.Linear(16, DIM_Z))


def tiny_module(**options: Any) -> AdaDimModule:
    """The same weights at every call."""
    torch.manual_seed(0)
    parts = {"backbone": backbone(), "projection_head": head()}
    return AdaDimModule(**(parts | options))


class OneCallPerView(LightningModule):
    """Somebody else's module: a pass for each view, other names, a loss of its own if none is given."""

    def __init__(self, loss: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = backbone()
        self.projector = head()
        self.criterion = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (view1, view2), _ = batch
        r1, r2 = self.encoder(view1), self.encoder(view2)
        z1, z2 = self.projector(r1), self.projector(r2)
        return self.criterion(r1, r2, z1, z2).total if self.criterion else (z1 - z2).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """On the CPU, silent, writing nothing unless a callback does."""
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        "max_epochs": 1,
    }
    return Trainer(callbacks=list(callbacks), **(quiet | options))


def fit(module: LightningModule, data: Any, *callbacks: Callback, **options: Any) -> Trainer:
    """Fit on a data module, a loader, or a pair of loaders; ``ckpt_path`` resumes."""
    path = options.pop("ckpt_path", None)
    used = trainer(*callbacks, **options)
    loaders: dict[str, Any] = {"datamodule": data}
    if not isinstance(data, ImageData):
        train, val = data if isinstance(data, tuple) else (data, None)
        loaders = {"train_dataloaders": train, "val_dataloaders": val}
    if path is not None and "weights_only" in inspect.signature(used.fit).parameters:
        loaders["weights_only"] = True
    used.fit(module, ckpt_path=path, **loaders)
    return used


def every_epoch(folder: Path) -> ModelCheckpoint:
    """Keeps the checkpoint of each epoch, as ``0.ckpt``, ``1.ckpt`` ..."""
    return ModelCheckpoint(folder, filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1)


class Recorder(Callback):
    """Notes R, Z and alpha of every training step by hooks of its own, and what each epoch logged."""

    def __init__(self, representation: str = "backbone", embedding: str = "projection_head") -> None:
        self.names = (representation, embedding)
        self.epochs: list[list[tuple[Tensor, Tensor]]] = []
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.logged: list[dict[str, float]] = []
        self._now: tuple[list[Tensor], list[Tensor]] | None = None
        self._handles: list[Any] = []

    @property
    def steps(self) -> list[tuple[Tensor, Tensor]]:
        return [step for epoch in self.epochs for step in epoch]

    def rows(self, which: int, steps: list[int]) -> Tensor:
        """R (0) or Z (1) of some steps, stacked."""
        return torch.cat([self.steps[i][which] for i in steps])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for which, name in enumerate(self.names):

            def note(_: nn.Module, __: Any, output: Tensor, which: int = which) -> None:
                if self._now is not None:
                    self._now[which].append(output.detach().clone())

            self._handles.append(pl_module.get_submodule(name).register_forward_hook(note))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append([])

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._now = ([], [])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._now is not None
        self.epochs[-1].append((torch.cat(self._now[0]), torch.cat(self._now[1])))
        self._now = None
        for module in pl_module.modules():
            if hasattr(module, "set_balance"):
                self.alphas.append(float(module.alpha))
                self.betas.append(float(module.beta))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def endless(batches: DataLoader[Any]) -> "DataLoader[Any]":
    """A stream without a length."""

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield from batches

    return DataLoader(Stream(), batch_size=None)


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    """Bit for bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key
