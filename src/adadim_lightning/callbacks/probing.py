"""What probes have in common: where R and its labels come from, and how the hits are counted."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DistributedSampler

from adadim_lightning.callbacks.labels import LabelReader, Labels, count_classes, find_num_classes
from adadim_lightning.callbacks.tapping import TappingCallback
from adadim_lightning.distributed import world_size
from adadim_lightning.feed import Feed, Pool, Source, batch_size_of, images_of
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
        self._labels = LabelReader(labels, type(self).__name__)
        self._feed = Feed(representation, pool=pool)
        self._seen = 0  # held-out images of the loader that is being read
        self._hits = torch.zeros(2, dtype=torch.long)  # rows that were classified right, and all
        self._scores = False  # whether it knows enough to score the validation that runs
        self._missing = ""  # reason why no accuracy was logged

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place the tap."""
        self._hits = torch.zeros(2, dtype=torch.long)
        self._labels.forget()
        self._missing = ""
        self._feed.open(pl_module)

    def _feeds(self) -> list[Feed]:
        return [self._feed]

    def _close(self) -> None:
        self._feed.close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the loaders of its own, and say so if there is nothing to score on."""
        self._missing = "the training ended before a validation"
        self._try_loaders(pl_module)
        if self.val_loader is not None:
            return
        reason = None if trainer.enable_validation else "the model has no validation loop"
        if trainer.limit_val_batches == 0:
            reason = "limit_val_batches is 0"
        reason = reason or why_unvalidated(trainer)
        if reason:
            self._missing = ""  # said once
            rank_zero_warn(f"{type(self).__name__} has nothing to score on: {reason}; give it val_loader=...")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if there was something to score on, and yet no accuracy."""
        self._say_missing()

    def _say_missing(self) -> None:
        if self._missing:
            rank_zero_warn(f"{type(self).__name__} has logged no {self._key(self.key)}: {self._missing}")
        self._missing = ""

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
        if self.train_loader is None:
            self._learn(trainer, None if skipped else self._read(trainer, batch, outputs, "train"))
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
                r, labels = self._read(trainer, batch, outputs, dataloader_idx)
            except NotCalledError as error:
                raise NotCalledError(
                    f"{error}; name what the model calls in validation too, or give {type(self).__name__} "
                    "a val_loader"
                ) from None
            loaders = CombinedLoader(trainer.val_dataloaders, "sequential").flattened
            self._score(loaders[dataloader_idx], batch, batch_idx, r, labels)
        self._feed.release()

    def _score(self, loader: Any, batch: Any, batch_idx: int, r: Tensor, labels: Tensor) -> None:
        """Count the hits among the rows of a held-out batch."""
        images = batch_size_of(batch) or len(labels)
        self._seen = 0 if batch_idx == 0 else self._seen
        places = self._seen + torch.arange(len(labels), device=labels.device) % images
        self._seen += images
        # A negative label marks an image without one, which is never hit.
        labels = labels.masked_fill(are_repeated(places, loader), -1)
        known = labels >= 0
        right = self._predict(r) == labels
        self._hits = self._hits.to(r.device) + torch.stack([(right & known).sum(), known.sum()])

    def _scores_steps(self, trainer: Trainer) -> bool:
        return self.val_loader is None and self._scores and trainer.state.fn == "fit"

    def _read(self, trainer: Trainer, batch: Any, outputs: Any, source: int | str) -> tuple[Tensor, Tensor]:
        [views] = self._feed.read(batch, outputs)
        r = torch.cat(views.rows).detach().float()
        labels = self._labels.read(batch, len(r), source, partial(self._classes, trainer))
        return r, labels.to(r.device)

    # Loaders of the probe's own.

    def _try_loaders(self, pl_module: LightningModule) -> None:
        """Read one batch of each as later: what is wrong with them is known before the training."""
        for loader, source in ((self.train_loader, "own"), (self.val_loader, "own held-out")):
            if loader is None or isinstance(loader, Iterator):  # what can be read but once is not tried
                continue
            with isolate_rng():  # making an iterator draws a number
                first = list(islice(loader, 1))
            if not list(self._embed(pl_module, first, source)):
                raise ValueError(f"the {'train' if source == 'own' else 'val'}_loader of a probe has no batch")
        self._labels.forget()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn from the probe's own data before the validation batches are scored."""
        if self.val_loader is None and trainer.state.fn == "fit":
            if not trainer.sanity_checking:
                self._learn_from_loader(trainer, pl_module)
            self._prepare(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy on the validation batches."""
        if self.val_loader is None and trainer.state.fn == "fit":
            self._log_accuracy(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn from and score on the probe's own data, and log the accuracy."""
        self._feed.release()  # a step that was begun and left out
        if self.val_loader is not None:
            self._learn_from_loader(trainer, pl_module)
            self._prepare(pl_module)
            if self._scores:
                self._score_loader(pl_module, self.val_loader)
            self._log_accuracy(pl_module)

    def _prepare(self, pl_module: LightningModule) -> None:
        self._labels.check()
        self._scores = self._prepare_to_score(pl_module.device)
        if self._missing:
            self._missing = f"no {'held-out image' if self._scores else 'image to learn from'} had a label"

    @torch.no_grad()
    def _score_loader(self, pl_module: LightningModule, loader: Iterable[Any]) -> None:
        index = -1
        for index, (batch, r, labels) in enumerate(self._embed(pl_module, loader, "own held-out")):
            self._score(loader, batch, index, r, labels)
        if index < 0:
            raise ValueError("the val_loader of a probe has no batch")

    def _learn_from_loader(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.train_loader is not None:
            rows = [(r, labels) for _, r, labels in self._embed(pl_module, self.train_loader, "own")]
            if not rows:
                raise ValueError("the train_loader of a probe has no batch")
            r, labels = (torch.cat(x) for x in zip(*rows, strict=True))
            self._labels.check_shared(labels[labels >= 0], 1)
            self._learn_all(trainer, r, labels)

    @torch.no_grad()
    def _embed(
        self, pl_module: LightningModule, loader: Iterable[Any], source: str
    ) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Each batch, its R and its labels, by the tapped submodule in evaluation mode; the random state stays."""
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
                rows = self._read(pl_module.trainer, batch, None, source)
                self._feed.release()
                yield batch, *rows

    def _log_accuracy(self, pl_module: LightningModule) -> None:
        """Log the share of hits among the held-out rows of all processes, which all must call this."""
        self._labels.check()
        hits = self._hits.to(pl_module.device)
        self._hits = torch.zeros_like(hits)
        if world_size() > 1:
            dist.all_reduce(hits)
        right, rows = hits.tolist()
        if rows:
            self._missing = ""
            pl_module.log(
                self._key(self.key), right / rows, on_step=False, on_epoch=True, batch_size=1, sync_dist=True
            )
        elif not pl_module.trainer.sanity_checking:
            self._say_missing()

    # What each probe does.

    key: str

    @abstractmethod
    def _learn(self, trainer: Trainer, rows: tuple[Tensor, Tensor] | None) -> None:
        """Learn from the rows of a training step and their labels, shapes ``(N, d)`` and ``(N,)``.

        All processes call this in each step; the rows are None where the step was skipped.
        """

    @abstractmethod
    def _learn_all(self, trainer: Trainer, r: Tensor, labels: Tensor) -> None:
        """Learn from all rows of the probe's own loader."""

    @abstractmethod
    def _prepare_to_score(self, device: torch.device) -> bool:
        """Prepare to score rows on a device; False if nothing was learned yet. All processes call this."""

    def _classes(self, trainer: Trainer) -> int | None:
        """Number of classes, where it is known."""
        if self.train_loader is None:
            return find_num_classes(trainer)
        return count_classes(getattr(self.train_loader, "dataset", None))

    @abstractmethod
    def _predict(self, r: Tensor) -> Tensor:
        """Classes of held-out rows, shapes ``(N, d)`` and ``(N,)``."""


def why_unvalidated(trainer: Trainer) -> str | None:
    """Why the trainer will not validate, as it starts to train; None if it will, or that cannot be known."""
    batches = float(trainer.num_training_batches)
    every, epoch = trainer.check_val_every_n_epoch, trainer.current_epoch
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    if every and epochs // every == epoch // every:
        return f"the trainer validates every {every} epochs and trains {epochs:g}"
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready  # of an epoch that goes on
    first = math.inf if trainer.val_check_batch is None else float(trainer.val_check_batch)
    if every and every > 1 and (skipped := every - 1 - epoch % every):
        first += skipped * batches
    left = trainer.max_steps - trainer.global_step if trainer.max_steps >= 0 else math.inf
    last = min(left * trainer.accumulate_grad_batches + done, math.inf if every else (epochs - epoch) * batches)
    if math.isfinite(first) and last < first:
        return f"the training ends after {last:g} batches, before the first validation after {first:g}"
    return None


def are_repeated(places: Tensor, loader: Any) -> Tensor:
    """Which images another process counts: a distributed sampler gives all as many, by repeating some.

    Args:
        places: of images among those that this process reads.
        loader: that reads them.
    """
    sampler = getattr(getattr(loader, "batch_sampler", None) or loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return torch.zeros_like(places, dtype=torch.bool)
    repeated: Tensor = places * sampler.num_replicas + sampler.rank >= len(sampler.dataset)  # type: ignore[arg-type]
    return repeated
