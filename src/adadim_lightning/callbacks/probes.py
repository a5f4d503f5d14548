"""Probes that follow the representation while the model trains, and never touch the model."""

import math
from collections.abc import Iterable
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch import distributed as dist

from adadim_lightning.callbacks.labels import Labels
from adadim_lightning.callbacks.probing import OnlineProbe
from adadim_lightning.distributed import (
    gather_uneven_rows,
    of_all_processes,
    rank,
    rows_of_all_processes,
    training_progress,
    training_steps,
    world_size,
)
from adadim_lightning.feed import Pool, Source
from adadim_lightning.functional._numeric import check_integer, check_number, check_positive, no_autocast
from adadim_lightning.functional.neighbors import knn_predict

PASSES = 10
STEPS = 200
BATCH_SIZE = 256
MOST_CLASSES = 100_000


class OnlineLinearProbe(OnlineProbe):
    """A linear classifier on R, trained beside the model by an optimizer of its own.

    It sees R of the training views, detached and standardized by the running statistics of a batch norm
    without parameters, and logs ``probe/linear_top1``, its accuracy on the validation batches. Where the training
    set has no labels, ``train_loader`` brings labeled images: at the end of each epoch it learns from them in ten
    passes or more, 200 steps at least, with a learning-rate schedule of their own, whatever the length of the
    training. Without a single label it logs nothing.

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
        lr: learning rate of its AdamW; it falls to zero along half a cosine, over the training where its length
            is known, or over each epoch's passes through ``train_loader``.
        weight_decay: of its AdamW.
        name: prefix of the log name and of the state in the checkpoint.

    Raises:
        ValueError: R is not found, the batches hold no labels or several columns that could be them, or a label
            reaches the number of classes.

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
        if num_classes is not None:
            check_integer("num_classes", num_classes, low=1)
        check_positive("lr", lr)
        check_number("weight_decay", weight_decay, low=0)
        self.num_classes = num_classes
        self.lr = lr
        self.weight_decay = weight_decay
        self.probe: Any = None  # norm and linear layer
        self._optimizer: torch.optim.Optimizer | None = None
        self._state: dict[str, Any] = {}
        self._labeled = torch.zeros(())  # rows with a label that it has learned from
        self._largest = torch.tensor(-1.0)  # label, of this fit
        self._steps: float = math.inf
        self._progress = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place the tap."""
        super().on_fit_start(trainer, pl_module)
        self._largest = torch.tensor(-1.0)

    def _build(self, classes: int, width: int, device: torch.device) -> None:
        if self.num_classes is None and classes > MOST_CLASSES:
            raise ValueError(
                f"labels reach {classes - 1:,}, too many for classes of OnlineLinearProbe: number them from 0, by "
                "the data or by a function labels=..., or give num_classes=..."
            )
        # The scale of R is the model's choice: one of 0.003 is no noise.
        norm = nn.BatchNorm1d(width, eps=1e-10, affine=False)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the same probe on every process
            linear = nn.Linear(width, max(classes, 1))
        # Small, so that a short training need not undo it first; not zero, where AdamW would step by the rounding
        # errors of gradients that cancel.
        for parameter in linear.parameters():
            parameter.data.mul_(0.01)
        probe = nn.Sequential(norm, linear)
        self.probe = probe.to(device)
        self._optimizer = torch.optim.AdamW(probe.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        if self._state:
            self.probe.load_state_dict(self._state["probe"])
            self._optimizer.load_state_dict(self._state["optimizer"])
            # Absent from older checkpoints.
            self._labeled = self._state.get("labeled", torch.ones(()))
            self._state = {}

    def _classes(self, trainer: Trainer) -> int | None:
        return self.num_classes or super()._classes(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn how long the training is."""
        super().on_train_start(trainer, pl_module)
        self._steps = training_steps(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ask for R of this step."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        progress = training_progress(trainer, self._steps)  # before the step: the last one learns too
        self._progress = 0.0 if math.isnan(progress) else progress

    def _learn(self, trainer: Trainer, rows: tuple[Tensor, Tensor] | None) -> None:
        if self.probe is None:
            width = shared_width(rows)
            if not width:
                return
            if (classes := self._classes(trainer)) is None:
                raise ValueError(
                    "the number of classes is not known from the data; give OnlineLinearProbe num_classes=..."
                )
            self._build(classes, width, trainer.lightning_module.device)
        assert self.probe is not None
        norm, linear = self.probe
        if rows is None:
            if world_size() == 1:
                return
            rows = (linear.weight.new_empty(0, linear.in_features), torch.empty(0, device=linear.weight.device))
        r, labels = rows
        if world_size() == 1 and len(r) < 2:
            return  # no standard deviation
        known = labels >= 0
        # Of fixed size, so that processes need not have equally many rows, nor wait for each other's numbers.
        mean = r.sum(0) / max(len(r), 1)
        parts = (
            mean,
            (r - mean).square().sum(0),
            r.new_full((1,), len(r)),
            known.sum().to(r.dtype)[None],
            labels.max().to(r.dtype)[None] if len(labels) else r.new_full((1,), -1),
        )
        everyone = rows_of_all_processes(torch.cat(parts))
        means, squares, counts, labeled, largest = torch.split(everyone, [len(x) for x in parts], dim=1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        square = (squares + counts * (means - mean).square()).sum(0)
        norm.num_batches_tracked += 1
        # The mean of all batches at first: a short training would else be scored by half of the start values.
        momentum = (1 / norm.num_batches_tracked).clamp_min(norm.momentum) * (total > 1)
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(square / (total - 1).clamp_min(1), momentum)
        standardized = (r - mean) / (square / total + norm.eps).sqrt()
        self._see(labeled.sum(), largest.max())
        self._step(self._progress, standardized, labels, labeled.sum(), shared=True)

    def _learn_all(self, trainer: Trainer, r: Tensor, labels: Tensor) -> None:
        known = labels >= 0
        r, labels = r[known], labels[known]
        if not len(r):
            return
        if self.probe is None:
            self._build(self._classes(trainer) or int(labels.max()) + 1, r.shape[1], r.device)
        assert self.probe is not None
        norm = self.probe[0].eval()
        norm.running_mean.copy_(r.mean(0))
        variance = r.var(0, correction=0)
        norm.running_var.copy_(torch.where(variance > 0, variance, 1.0))  # what is constant tells nothing
        self._see(labels.new_full((), len(labels)), labels.max())
        self._check_range()
        r = norm(r)
        generator = torch.Generator().manual_seed(trainer.current_epoch)
        batches = math.ceil(len(r) / BATCH_SIZE)
        passes = max(PASSES, math.ceil(STEPS / batches))
        for i in range(passes):
            order = torch.randperm(len(r), generator=generator).to(r.device)
            for j, rows in enumerate(torch.split(order, BATCH_SIZE)):
                count = r.new_tensor(len(rows))
                self._step((i + j / batches) / passes, r[rows], labels[rows], count, shared=False)

    def _see(self, labeled: Tensor, largest: Tensor) -> None:
        """Note labels, and refuse those that reach the number of classes as soon as they can be looked at."""
        self._labeled = self._labeled.to(labeled.device) + labeled
        self._largest = torch.maximum(self._largest.to(largest.device), largest)
        if largest.device.type == "cpu":
            self._check_range()

    def _check_range(self) -> None:
        assert self.probe is not None
        classes, largest = self.probe[1].out_features, int(self._largest)
        if largest >= classes:
            raise ValueError(
                f"a label is {largest}, but OnlineLinearProbe has {classes} classes, numbered from 0: give "
                f"num_classes={largest + 1} or more, or say where else the labels are by labels=..."
            )

    def _score(self, loader: Any, batch: Any, batch_idx: int, r: Tensor, labels: Tensor) -> None:
        super()._score(loader, batch, batch_idx, r, labels)
        if self.num_classes is not None:  # else classes that are new are wrong, and no mistake
            self._see(labels.new_zeros(()), labels.max())

    def _log_accuracy(self, pl_module: LightningModule) -> None:
        if self.probe is not None:
            self._check_range()
        super()._log_accuracy(pl_module)

    def _step(self, progress: float, x: Tensor, labels: Tensor, labeled: Tensor, *, shared: bool) -> None:
        """Take a step on standardized rows, whose loss is the mean over all that have a label."""
        assert self.probe is not None
        assert self._optimizer is not None
        linear = self.probe[1]
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr * (1 + math.cos(math.pi * progress)) / 2
        with torch.enable_grad(), no_autocast(x):
            # A label out of range is refused later: looking at it would make the device wait.
            valid = torch.where((labels >= 0) & (labels < linear.out_features), labels, -1).long()
            loss = nn.functional.cross_entropy(linear(x), valid, ignore_index=-1, reduction="sum")
            self._optimizer.zero_grad()
            (loss / labeled.clamp_min(1)).backward()  # type: ignore[no-untyped-call]
        if shared and world_size() > 1:
            for parameter in linear.parameters():
                dist.all_reduce(parameter.grad)
        self._optimizer.step()

    def _prepare_to_score(self, device: torch.device) -> bool:
        if self.probe is None:
            return False
        self._check_range()
        return bool(self._labeled > 0)

    @torch.no_grad()
    def _predict(self, r: Tensor) -> Tensor:
        assert self.probe is not None
        classes: Tensor = self.probe.eval()(r).argmax(dim=1)
        return classes

    def state_dict(self) -> dict[str, Any]:
        """The probe and its optimizer."""
        if self.probe is None or self._optimizer is None:
            return self._state
        return {
            "probe": self.probe.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "labeled": self._labeled,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` at the next training step."""
        self.probe = None
        self._labeled = torch.zeros(())
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
        check_integer("k", k, low=1)
        if temperature != math.inf:  # which makes the vote plain
            check_positive("temperature", temperature)
        check_integer("bank_size", bank_size, low=1)
        if bank_size < k:
            raise ValueError(f"bank_size must hold the k = {k} neighbors, got {bank_size}")
        self.bank_size = bank_size
        self._vote = partial(knn_predict, k=k, temperature=temperature)
        self._bank: list[tuple[Tensor, Tensor]] = []
        self._neighbors: tuple[Tensor, Tensor] | None = None  # of all processes, those with a label

    def _learn(self, trainer: Trainer, rows: tuple[Tensor, Tensor] | None) -> None:
        """Keep the rows of this step, and let go of the oldest."""
        if rows is None:
            return
        device = rows[0].device
        if self._bank and self._bank[0][0].device != device:  # a checkpoint is read on the CPU
            self._bank = [(x.to(device), y.to(device)) for x, y in self._bank]
        self._bank.append(rows)
        most = self.bank_size / world_size()
        while sum(len(labels) for _, labels in self._bank[1:]) >= most:
            self._bank.pop(0)

    def _learn_all(self, trainer: Trainer, r: Tensor, labels: Tensor) -> None:
        self._bank = [(r, labels)]

    def _prepare_to_score(self, device: torch.device) -> bool:
        own: Any = [torch.cat(x).to(device) for x in zip(*self._bank, strict=True)] if self._bank else None
        width = shared_width(own)
        if not width:
            return False
        r, labels = own or (torch.empty(0, width, device=device), torch.empty(0, dtype=torch.long, device=device))
        if self.train_loader is None:  # each process has seen rows of its own
            # Labels may be ids that a float32 cannot hold: their bits travel as two of them.
            r, bits = gather_uneven_rows(r, labels.view(torch.float32).view(-1, 2))
            labels = bits.contiguous().view(torch.long).flatten()
        known = labels >= 0
        self._neighbors = r[known], labels[known]
        if self.train_loader is None:
            self._labels.check_shared(labels[known], self._labels.views)
        return bool(known.any())

    def _predict(self, r: Tensor) -> Tensor:
        assert self._neighbors is not None
        return self._vote(r, *self._neighbors)

    def state_dict(self) -> dict[str, Any]:
        """The bank of all processes, which all must call this; the rows of a loader of its own are made anew."""
        bank = [] if self.train_loader is not None else [(r.cpu(), labels.cpu()) for r, labels in self._bank]
        # A process that has left out a step holds fewer.
        steps = ([x for x in step if x is not None] for step in zip_longest(*of_all_processes(bank)))
        return {"bank": [tuple(torch.cat(x) for x in zip(*step, strict=True)) for step in steps]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, with as many processes or others: each takes its share."""
        self._neighbors = None
        self._bank = []
        for r, labels in state_dict["bank"]:
            first, last = (len(labels) * i // world_size() for i in (rank(), rank() + 1))
            own = slice(first, last)
            self._bank.append((r[own], labels[own]))


def shared_width(rows: tuple[Tensor, Tensor] | None) -> int:
    """Width of the rows, if any process has some, else 0; all processes call this."""
    return max(of_all_processes(0 if rows is None else rows[0].shape[1]))
