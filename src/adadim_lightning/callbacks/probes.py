"""Probes that follow the representation while the model trains, and never touch the model."""

import math
from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch import distributed as dist
from torchmetrics.classification import MulticlassAccuracy

from adadim_lightning.distributed import gather_rows, training_steps, world_size
from adadim_lightning.functional._numeric import no_autocast
from adadim_lightning.metrics import KNNAccuracy
from adadim_lightning.tap import Tap


def labels_of(batch: Any, rows: int) -> Tensor:
    """Labels of a batch ``(images or views, labels)``, repeated for each of the views stacked in its rows.

    Raises:
        ValueError: the batch has no labels, or not one for each image.
    """
    labels = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    if not isinstance(labels, Tensor) or labels.ndim != 1 or rows % len(labels):
        raise ValueError(
            "a probe needs batches (images, labels) with one class number for each image; "
            "leave the probe out to train without labels"
        )
    return labels.repeat(rows // len(labels))


def infer_num_classes(trainer: Trainer) -> int:
    """Number of classes that the data module or the training set names.

    Raises:
        ValueError: neither names it.
    """
    datamodule = getattr(trainer, "datamodule", None)
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    for source in (datamodule, dataset):
        count = getattr(source, "num_classes", None)
        if isinstance(count, int):
            return count
        if (names := getattr(source, "classes", None)) is not None:
            return len(names)
        for name in ("labels", "targets"):
            if (labels := getattr(source, name, None)) is not None:
                return int(torch.as_tensor(labels).max()) + 1
    raise ValueError("the number of classes is not known from the data; give OnlineLinearProbe num_classes=...")


class OnlineProbe(Callback):
    """What both probes do: read R of every training and validation step, and log the held-out accuracy."""

    def __init__(self, representation: str, name: str | None) -> None:
        self.representation = representation
        self.name = name
        self._tap: Tap | None = None

    @property
    def state_key(self) -> str:
        """Key of the state in the checkpoint."""
        return f"{type(self).__qualname__}{{{self.name or ''}}}"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place the tap."""
        self._tap = Tap.open(pl_module, self.representation, self)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the tap."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the tap."""
        self._close()

    def _close(self) -> None:
        if self._tap is not None:
            self._tap.close(self)
            self._tap = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ask for R of this step."""
        assert self._tap is not None
        self._tap.record(self, True)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Ask for R of this step."""
        if self._tap is not None:
            self._tap.record(self, True)

    def _read(self, batch: Any) -> tuple[Tensor, Tensor]:
        assert self._tap is not None
        r = torch.cat(self._tap.read()).float()
        self._tap.release(self)
        return r, labels_of(batch, len(r))

    def _log(self, pl_module: LightningModule, key: str, value: Tensor) -> None:
        pl_module.log(
            f"{self.name}/{key}" if self.name else key,
            value,
            on_step=False,
            on_epoch=True,
            batch_size=1,
            sync_dist=True,
        )

    @abstractmethod
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Learn from a training step."""


class OnlineLinearProbe(OnlineProbe):
    """A linear classifier on R, trained beside the model by an optimizer of its own.

    It sees R of the training views, detached and standardized by the running statistics of a batch norm
    without parameters, and logs ``probe/linear_top1``, its accuracy on the validation batches. Its own random
    numbers leave the model's random state alone.

    Args:
        representation: dotted name of the submodule that puts out R, shape ``(N, d_R)``.
        num_classes: number of classes; by default what the data module or the training set says (its
            ``num_classes``, ``classes``, ``labels`` or ``targets``).
        lr: learning rate of its AdamW; it falls to zero along half a cosine where the length of the training
            is known.
        weight_decay: of its AdamW.
        name: prefix of the log name and of the state in the checkpoint.

    Raises:
        ValueError: the submodule does not exist, or the batches hold no labels.

    Example:
        >>> probe = OnlineLinearProbe("backbone", num_classes=10)
    """

    def __init__(
        self,
        representation: str = "backbone",
        *,
        num_classes: int | None = None,
        lr: float = 1e-2,
        weight_decay: float = 1e-4,
        name: str | None = None,
    ) -> None:
        super().__init__(representation, name)
        self.num_classes = num_classes
        self.lr = lr
        self.weight_decay = weight_decay
        self.accuracy: MulticlassAccuracy | None = None
        self.probe: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._state: dict[str, Any] = {}
        self._steps: float = math.inf

    def _build(self, trainer: Trainer, r: Tensor) -> None:
        classes = self.num_classes or infer_num_classes(trainer)
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
        self._steps = training_steps(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step of the probe."""
        r, labels = self._read(batch)
        if self.probe is None:
            self._build(trainer, r)
        assert self.probe is not None
        assert self._optimizer is not None
        progress = min(trainer.global_step / self._steps, 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr * (1 + math.cos(math.pi * progress)) / 2
        with torch.enable_grad(), no_autocast(r):
            loss = nn.functional.cross_entropy(self.probe(r), labels)
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        if world_size() > 1:
            for p in self.probe.parameters():
                assert p.grad is not None
                dist.all_reduce(p.grad)
                p.grad /= world_size()
        self._optimizer.step()

    @torch.no_grad()
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
        if self.probe is not None and self._tap is not None:
            assert self.accuracy is not None
            r, labels = self._read(batch)
            self.accuracy.update(self.probe.eval()(r), labels)
            self.probe.train()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy."""
        if self.accuracy is not None and self.accuracy.update_called:
            self._log(pl_module, "probe/linear_top1", self.accuracy.compute())
            self.accuracy.reset()

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

    Args:
        representation: dotted name of the submodule that puts out R, shape ``(N, d_R)``.
        k: number of neighbors.
        temperature: of the vote's weights.
        bank_size: number of training rows kept, over all processes together.
        name: prefix of the log name and of the state in the checkpoint.

    Raises:
        ValueError: the submodule does not exist, or the batches hold no labels.

    Example:
        >>> probe = OnlineKNN(k=20)
    """

    def __init__(
        self,
        representation: str = "backbone",
        *,
        k: int = 20,
        temperature: float = 0.07,
        bank_size: int = 16384,
        name: str | None = None,
    ) -> None:
        super().__init__(representation, name)
        self.bank_size = bank_size
        self.accuracy = KNNAccuracy(k=k, temperature=temperature)
        self._bank: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the rows of this step, and let go of the oldest."""
        r, labels = self._read(batch)
        if self._bank and self._bank[0][0].device != r.device:  # a checkpoint is read on the CPU
            self._bank = [(x.to(r.device), y.to(r.device)) for x, y in self._bank]
        self._bank.append((r, labels))
        most = self.bank_size / world_size()
        while sum(len(labels) for _, labels in self._bank[1:]) >= most:
            self._bank.pop(0)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the bank from all processes."""
        if self._bank:
            r, labels = (torch.cat(x) for x in zip(*self._bank, strict=True))
            r, column = gather_rows(r, labels[:, None].to(r.dtype))
            self.accuracy = self.accuracy.to(r.device)
            self.accuracy.set_bank(r, column[:, 0].long())

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
        if self._bank and self._tap is not None:
            self.accuracy.update(*self._read(batch))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy."""
        if self.accuracy.update_called:
            self._log(pl_module, "probe/knn_top1", self.accuracy.compute())
            self.accuracy.reset()

    def state_dict(self) -> dict[str, Any]:
        """The bank."""
        return {"bank": self._bank}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        # A checkpoint holds the rows of one process only; of several, each begins its bank anew.
        self._bank = state_dict["bank"] if world_size() == 1 else []
