"""Probes that follow the representation while the model trains, and never touch the model."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch import distributed as dist
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from adadim_lightning.callbacks.labels import Labels, count_classes, infer_num_classes, labels_of
from adadim_lightning.callbacks.tapping import TappingCallback
from adadim_lightning.distributed import gather_rows, training_progress, training_steps, world_size
from adadim_lightning.feed import Feed, Pool, Source, images_of
from adadim_lightning.functional._numeric import no_autocast
from adadim_lightning.metrics import KNNAccuracy
from adadim_lightning.models.backbones import evaluating
from adadim_lightning.tap import NotCalledError


class OnlineProbe(TappingCallback):
    """What both probes do: read R of training and validation steps, or of loaders, and log the accuracy."""

    def __init__(
        self,
        representation: Source | None,
        *,
        train_loader: Iterable[Any] | None,
        val_loader: Iterable[Any] | None,
        labels: Labels | None,
        pool: Pool | None,
        name: str | None,
    ) -> None:
        super().__init__(name)
        self.representation = representation
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.labels = labels
        self._feed = Feed(representation, pool=pool)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place the tap."""
        self._feed.open(pl_module)

    def _close(self) -> None:
        self._feed.close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if there is nothing to score on."""
        if self.val_loader is None and not trainer.enable_validation:
            rank_zero_warn(
                f"{type(self).__name__} has nothing to score on: the model has no validation loop; give it "
                "val_loader=..."
            )

    # Steps of the model.

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ask for R of this step."""
        self._feed.record(self.train_loader is None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Learn from a training step."""
        skipped = pl_module.automatic_optimization and not outputs  # training_step returned None
        if self.train_loader is None and not skipped:
            self._learn(trainer, *self._read(batch, outputs))
        self._feed.release()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Ask for R of this step."""
        self._feed.record(self._scores_steps(trainer))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score a held-out batch."""
        if self._scores_steps(trainer):
            try:
                r, labels = self._read(batch, outputs)
            except NotCalledError as error:
                raise NotCalledError(
                    f"{error}; name what the model calls in validation too, or give {type(self).__name__} "
                    "a val_loader"
                ) from None
            self._score_known(r, labels)
        self._feed.release()

    def _score_known(self, r: Tensor, labels: Tensor) -> None:
        known = labels >= 0  # a negative label marks an image without one
        if known.any():
            self._score(r[known], labels[known])

    def _scores_steps(self, trainer: Trainer) -> bool:
        return self.val_loader is None and self._ready() and trainer.state.fn == "fit"

    def _read(self, batch: Any, outputs: Any) -> tuple[Tensor, Tensor]:
        [views] = self._feed.read(batch, outputs)
        r = torch.cat(views.rows).detach().float()
        return r, labels_of(batch, len(r), self.labels).to(r.device)

    # Loaders of the probe's own.

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn from the probe's own data before the validation batches are scored."""
        if self.val_loader is None and trainer.state.fn == "fit":
            if not trainer.sanity_checking:
                self._learn_from_loader(trainer, pl_module)
            self._before_scoring()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy on the validation batches."""
        self._log_accuracy(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn from and score on the probe's own data, and log the accuracy."""
        self._feed.release()  # a step that was begun and left out
        if self.val_loader is not None:
            self._learn_from_loader(trainer, pl_module)
            self._before_scoring()
            if self._ready():
                for r, labels in self._embed(pl_module, self.val_loader):
                    self._score_known(r, labels)
                if self.accuracy is None or not self.accuracy.update_called:
                    raise ValueError("the val_loader of a probe has no batch")
                self._log_accuracy(pl_module)

    def _learn_from_loader(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.train_loader is not None:
            batches = list(self._embed(pl_module, self.train_loader))
            if not batches:
                raise ValueError("the train_loader of a probe has no batch")
            r, labels = (torch.cat(x) for x in zip(*batches, strict=True))
            self._learn_all(trainer, r, labels)

    @torch.no_grad()
    def _embed(self, pl_module: LightningModule, loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """R and labels of each batch, by the tapped submodule in evaluation mode; the random state stays."""
        tapped = self._feed.submodule(pl_module)
        with isolate_rng(), evaluating(tapped):
            for batch in loader:
                batch = move_data_to_device(batch, pl_module.device)
                images = next(images_of(batch), None)
                if images is None:
                    raise ValueError(
                        f"no images were found in a batch of the probe's loader: {type(batch).__name__}"
                    )
                self._feed.record(True)
                pixels = images.is_floating_point() or images.dtype == torch.uint8
                tapped(images.to(pl_module.dtype) if pixels else images)
                rows = self._read(batch, None)
                self._feed.release()
                yield rows

    def _log_accuracy(self, pl_module: LightningModule) -> None:
        if self.accuracy is not None and self.accuracy.update_called:
            pl_module.log(
                self._key(self.key),
                self.accuracy.compute(),
                on_step=False,
                on_epoch=True,
                batch_size=1,
                sync_dist=True,
            )
            self.accuracy.reset()

    # What each probe does.

    key: str
    accuracy: Metric | None

    @abstractmethod
    def _learn(self, trainer: Trainer, r: Tensor, labels: Tensor) -> None:
        """Learn from the rows of a training step, shapes ``(N, d)`` and ``(N,)``."""

    @abstractmethod
    def _learn_all(self, trainer: Trainer, r: Tensor, labels: Tensor) -> None:
        """Learn from all rows of the probe's own loader."""

    def _before_scoring(self) -> None:
        """Prepare to score."""

    @abstractmethod
    def _ready(self) -> bool:
        """Whether it has learned anything yet."""

    @abstractmethod
    def _score(self, r: Tensor, labels: Tensor) -> None:
        """Score held-out rows."""


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
        self.accuracy: MulticlassAccuracy | None = None
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
        self.accuracy = MulticlassAccuracy(classes, average="micro").to(r.device)
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
        self._step(trainer, r, labels)

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
        if world_size() > 1:
            for p in self.probe.parameters():
                assert p.grad is not None
                dist.all_reduce(p.grad)
                p.grad /= world_size()
        self._optimizer.step()

    def _ready(self) -> bool:
        return self.probe is not None

    @torch.no_grad()
    def _score(self, r: Tensor, labels: Tensor) -> None:
        assert self.probe is not None
        assert self.accuracy is not None
        self.accuracy.update(self.probe.eval()(r), labels)

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
        self.bank_size = bank_size
        self.accuracy: KNNAccuracy = KNNAccuracy(k=k, temperature=temperature)
        self._bank: list[tuple[Tensor, Tensor]] = []
        self._has_neighbors = True  # False where no recent row has a label

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

    def _before_scoring(self) -> None:
        if self._bank:
            r, labels = (torch.cat(x) for x in zip(*self._bank, strict=True))
            if self.train_loader is None:  # each process has seen rows of its own
                r, column = gather_rows(r, labels[:, None].to(r.dtype))
                labels = column[:, 0].long()
            known = labels >= 0
            self._has_neighbors = bool(known.any())
            if self._has_neighbors:
                self.accuracy = self.accuracy.to(r.device)
                self.accuracy.set_bank(r[known], labels[known])

    def _ready(self) -> bool:
        return bool(self._bank) and self._has_neighbors

    def _score(self, r: Tensor, labels: Tensor) -> None:
        self.accuracy.update(r, labels)

    def state_dict(self) -> dict[str, Any]:
        """The bank; the rows of a loader of its own are made anew."""
        return {"bank": self._bank if self.train_loader is None else []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        # A checkpoint holds the rows of one process only; of several, each begins its bank anew.
        self._bank = state_dict["bank"] if world_size() == 1 else []
