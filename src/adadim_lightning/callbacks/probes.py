"""Probes that follow the representation while the model trains, and never touch the model."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from adadim_lightning.callbacks.labels import Labels, count_classes, infer_num_classes
from adadim_lightning.callbacks.probing import OnlineProbe
from adadim_lightning.distributed import (
    gather_rows,
    of_all_processes,
    rank,
    training_progress,
    training_steps,
    world_size,
)
from adadim_lightning.feed import Pool, Source
from adadim_lightning.functional._numeric import no_autocast
from adadim_lightning.functional.neighbors import knn_predict

PASSES = 10
BATCH_SIZE = 256


class OnlineLinearProbe(OnlineProbe):
    """A linear classifier on R, trained beside the model by an optimizer of its own.

    It sees R of the training views, detached and standardized by the running statistics of a batch norm
    without parameters, and logs ``probe/linear_top1``, its accuracy on the validation batches. Its own random
    numbers leave the model's random state alone. Where the training set has no labels, ``train_loader`` brings
    labeled images: at the end of each epoch it learns from them in ten passes.

    Args:
        representation: where R comes from, as for :class:`DimensionMonitor`; with loaders of its own the name of
            a submodule that takes images.
        num_classes: number of classes; by default what the data module or the training set says (its
            ``num_classes``, ``classes``, ``labels`` or ``targets``), or the labels of ``train_loader``.
        train_loader: labeled batches to learn from; by default the model's training batches.
        val_loader: labeled batches to score on; by default the model's validation batches.
        labels: where the labels of a batch are: a key or position in it, or a function of it; by default
            behind the images, or under a usual name.
        pool: makes rows of tokens or maps, as for :class:`DimensionMonitor`.
        lr: learning rate of its AdamW; it falls to zero along half a cosine where the length of the training
            is known.
        weight_decay: of its AdamW.
        name: prefix of the log name and of the state in the checkpoint.

    Raises:
        ValueError: R is not found, or the batches hold no labels.

    Example:
        >>> probe = OnlineLinearProbe("backbone", num_classes=10)
    """

    key = "probe/linear_top1"

    def __init__(
        self,
        representation: Source | None = None,
        *,
        num_classes: int | None = None,
        train_loader: Iterable[Any] | None = None,
        val_loader: Iterable[Any] | None = None,
        labels: Labels | None = None,
        pool: Pool | None = None,
        lr: float = 1e-2,
        weight_decay: float = 1e-4,
        name: str | None = None,
    ) -> None:
        super().__init__(
            representation, train_loader=train_loader, val_loader=val_loader, labels=labels, pool=pool, name=name
        )
        self.num_classes = num_classes
        self.lr = lr
        self.weight_decay = weight_decay
        self.probe: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._state: dict[str, Any] = {}
        self._steps: float = math.inf

    def _build(self, classes: int, r: Tensor) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the same probe on every process
            probe = nn.Sequential(nn.BatchNorm1d(r.shape[1], affine=False), nn.Linear(r.shape[1], classes))
        self.probe = probe.to(r.device)
        self._optimizer = torch.optim.AdamW(probe.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        if self._state:
            self.probe.load_state_dict(self._state["probe"])
            self._optimizer.load_state_dict(self._state["optimizer"])
            self._state = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn how long the training is."""
        super().on_train_start(trainer, pl_module)
        self._steps = training_steps(trainer)

    def _learn(self, trainer: Trainer, r: Tensor, labels: Tensor) -> None:
        if self.probe is None:
            self._build(self.num_classes or infer_num_classes(trainer), r)
        self._step(trainer, *gather_labeled(r, labels))

    def _learn_all(self, trainer: Trainer, r: Tensor, labels: Tensor) -> None:
        if self.probe is None:
            named = count_classes(getattr(self.train_loader, "dataset", None))
            self._build(self.num_classes or named or int(labels.max()) + 1, r)
        generator = torch.Generator().manual_seed(trainer.current_epoch)
        for _ in range(PASSES):
            for rows in torch.split(torch.randperm(len(r), generator=generator).to(r.device), BATCH_SIZE):
                self._step(trainer, r[rows], labels[rows])

    def _step(self, trainer: Trainer, r: Tensor, labels: Tensor) -> None:
        assert self.probe is not None
        assert self._optimizer is not None
        if len(r) < 2:
            return  # batch norm needs two
        progress = training_progress(trainer, self._steps)
        progress = 0.0 if math.isnan(progress) else progress
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr * (1 + math.cos(math.pi * progress)) / 2
        with torch.enable_grad(), no_autocast(r):
            # A negative label marks an image without one.
            known = labels.clamp_min(-1)
            loss = nn.functional.cross_entropy(self.probe.train()(r), known, ignore_index=-1, reduction="sum")
            loss = loss / (known >= 0).sum().clamp_min(1)
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def _ready(self) -> bool:
        return self.probe is not None

    @torch.no_grad()
    def _predict(self, r: Tensor) -> Tensor:
        assert self.probe is not None
        classes: Tensor = self.probe.eval()(r).argmax(dim=1)
        return classes

    def state_dict(self) -> dict[str, Any]:
        """The probe and its optimizer."""
        if self.probe is None or self._optimizer is None:
            return self._state
        return {"probe": self.probe.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` at the next training step."""
        self.probe = None
        self._state = state_dict


class OnlineKNN(OnlineProbe):
    """Weighted nearest-neighbor vote on R among the most recent training rows.

    The neighbors are R of the training views of the last ``bank_size`` rows, as they were when they were
    trained on; so it costs no forward pass. Logs ``probe/knn_top1``, the accuracy on the validation batches.
    Where the training set has no labels, ``train_loader`` brings labeled images: at the end of each epoch they
    are the neighbors, all of them.

    Args:
        representation: where R comes from, as for :class:`DimensionMonitor`; with loaders of its own the name of
            a submodule that takes images.
        k: number of neighbors.
        temperature: of the vote's weights.
        bank_size: number of training rows kept, over all processes together.
        train_loader: labeled batches of neighbors; by default the model's training batches.
        val_loader: labeled batches to score on; by default the model's validation batches.
        labels: where the labels of a batch are, as for :class:`OnlineLinearProbe`.
        pool: makes rows of tokens or maps, as for :class:`DimensionMonitor`.
        name: prefix of the log name and of the state in the checkpoint.

    Raises:
        ValueError: R is not found, or the batches hold no labels.

    Example:
        >>> probe = OnlineKNN(k=20)
    """

    key = "probe/knn_top1"

    def __init__(
        self,
        representation: Source | None = None,
        *,
        k: int = 20,
        temperature: float = 0.07,
        bank_size: int = 16384,
        train_loader: Iterable[Any] | None = None,
        val_loader: Iterable[Any] | None = None,
        labels: Labels | None = None,
        pool: Pool | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            representation, train_loader=train_loader, val_loader=val_loader, labels=labels, pool=pool, name=name
        )
        if k < 1 or not temperature > 0:
            raise ValueError(f"k must be >= 1 and temperature > 0, got {k} and {temperature}")
        self.bank_size = bank_size
        self._vote = partial(knn_predict, k=k, temperature=temperature)
        self._bank: list[tuple[Tensor, Tensor]] = []
        self._neighbors: tuple[Tensor, Tensor] | None = None  # of all processes, those with a label

    def _learn(self, trainer: Trainer, r: Tensor, labels: Tensor) -> None:
        """Keep the rows of this step, and let go of the oldest."""
        if self._bank and self._bank[0][0].device != r.device:  # a checkpoint is read on the CPU
            self._bank = [(x.to(r.device), y.to(r.device)) for x, y in self._bank]
        self._bank.append((r, labels))
        most = self.bank_size / world_size()
        while sum(len(labels) for _, labels in self._bank[1:]) >= most:
            self._bank.pop(0)

    def _learn_all(self, trainer: Trainer, r: Tensor, labels: Tensor) -> None:
        self._bank = [(r, labels)]

    def _before_scoring(self, device: torch.device) -> None:
        if self._bank:
            r, labels = (torch.cat(x).to(device) for x in zip(*self._bank, strict=True))
            if self.train_loader is None:  # each process has seen rows of its own
                r, labels = gather_labeled(r, labels)
            known = labels >= 0
            self._neighbors = r[known], labels[known]

    def _ready(self) -> bool:
        return self._neighbors is not None and len(self._neighbors[0]) > 0

    def _predict(self, r: Tensor) -> Tensor:
        assert self._neighbors is not None
        return self._vote(r, *self._neighbors)

    def state_dict(self) -> dict[str, Any]:
        """The bank of all processes, which all must call this; the rows of a loader of its own are made anew."""
        bank = [] if self.train_loader is not None else [(r.cpu(), labels.cpu()) for r, labels in self._bank]
        steps = zip(*of_all_processes(bank), strict=True)
        return {"bank": [tuple(torch.cat(x) for x in zip(*step, strict=True)) for step in steps]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, with as many processes or others: each takes its share."""
        self._neighbors = None
        self._bank = []
        for r, labels in state_dict["bank"]:
            share = len(labels) // world_size()
            own = slice(rank() * share, (rank() + 1) * share)
            self._bank.append((r[own], labels[own]))


def gather_labeled(r: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of all processes and their labels."""
    rows, column = gather_rows(r, labels[:, None].to(r.dtype))
    return rows, column[:, 0].long()
