"""The LightningDataModule: two views of each training image, clean held-out images."""

import math
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from adadim_lightning.data.images import Batch, ImageFiles, ImageSet, MemoryImages
from adadim_lightning.data.views import TwoViews
from adadim_lightning.functional._numeric import check_integer

MOST_ON_DEVICE = 8 * 2**30
EVALUATION_BATCH = 512
EVALUATION_PIXELS = 64 * 224**2  # of a batch; without gradients, yet on any machine


class ImageData(LightningDataModule):
    """Two views of each training image for training, clean held-out images for validation.

    The uint8 batch goes to the device, and the views are made there; on a CPU with ``num_workers`` the workers
    make them, and so they do for views of the torchvision backend, one image at a time. Images in memory are
    moved to the GPU once, where one is used. Without labels there is no validation.

    Args:
        train: training images, with or without labels; or a stream (``IterableDataset``) of pairs of a uint8
            image and a label.
        test: held-out images; None where there are none.
        views: makes the two views, and the clean image.
        batch_size: images per step and process; the last, incomplete batch of an epoch is left out.
        num_workers: processes that load; None takes what suits: none for images in memory, else one for each
            core, up to 8.
        title: name of the data set, for messages.

    Raises:
        ValueError: ``batch_size`` is below 2 or above the number of training images, or channels differ.
    """

    def __init__(
        self,
        train: ImageSet | IterableDataset[Any],
        test: ImageSet | None,
        *,
        views: TwoViews,
        batch_size: int = 256,
        num_workers: int | None = None,
        title: str = "images",
    ) -> None:
        super().__init__()
        check_integer("batch_size", batch_size, low=2)
        if num_workers is not None:
            check_integer("num_workers", num_workers, low=0)
        if isinstance(train, ImageSet) and batch_size > len(train):
            raise ValueError(
                f"batch_size must not exceed the number of training images, {len(train)}; got {batch_size}"
            )
        self.train = train
        self.test = test
        self.views = views
        self.batch_size = batch_size
        self.title = title
        decodes = views.on_host or not isinstance(train, MemoryImages)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.num_workers = (min(cores, 8) if decodes else 0) if num_workers is None else num_workers

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None without labels."""
        # Either part may lack an image of the last class.
        return (
            max((x.num_classes or 0 for x in (self.train, self.test) if isinstance(x, ImageSet)), default=0)
            or None
        )

    @property
    def is_labeled(self) -> bool:
        """Whether there are labels to learn from, and to score on."""
        labeled = bool(getattr(self.train, "is_labeled", True))  # of a stream it may not be known
        return labeled and self.test is not None and self.test.is_labeled

    def __str__(self) -> str:
        """One line on the data."""
        size = f"{len(self.train):,}" if isinstance(self.train, ImageSet) else "a stream of"
        channels, height, width = self.image_shape
        kind = "grey" if channels == 1 else "RGB"
        classes = f"{self.num_classes} classes" if self.num_classes else "no labels"
        held_out = f"; {len(self.test):,} held out" if self.test is not None else ""
        workers = f"by {self.num_workers} workers" if self.num_workers else "in this process"
        where = "in memory" if isinstance(self.train, MemoryImages) else f"decoded {workers}"
        return f"{self.title}: {size} images, {kind}, {height} x {width}, {classes}{held_out}; {where}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """What the model sees: channels, height, width."""
        return tuple(self.views.clean(self.sample(1)[0])[0].shape)  # type: ignore[return-value]

    def sample(self, count: int) -> Batch:
        """The first training images, uint8 ``(N, C, S, S)``, and their labels; of a stream, of its test split."""
        source = self.train if isinstance(self.train, ImageSet) else self.test
        if source is None:
            # Filling a buffer to shuffle would take long.
            in_order = cast(Iterable[Any], getattr(self.train, "in_order", self.train))
            images, labels = default_collate(list(islice(in_order, count)))
            return images, labels
        images, labels = source.__getitems__(range(min(count, len(source))))
        return images.cpu(), labels

    # Loaders.

    def _in_workers(self) -> bool:
        """Whether workers make the views of the batch: on a CPU they are what else would compute."""
        on_cpu = self.trainer is None or self.trainer.strategy.root_device.type == "cpu"
        return self.views.on_host or (self.num_workers > 0 and on_cpu)

    def setup(self, stage: str) -> None:
        """Move images in memory to the GPU that trains."""
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        if device.type == "cuda" and not self._in_workers():
            for images in (self.train, self.test):
                if isinstance(images, MemoryImages) and images.images.numel() <= MOST_ON_DEVICE:
                    images.images = images.images.to(device)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training batches."""
        in_workers = self._in_workers()
        source: Dataset[Any] = HostViews(self.train, self.views) if self.views.on_host else self.train
        if isinstance(self.train, IterableDataset):
            source = self.train if not self.views.on_host else StreamedHostViews(self.train, self.views)
        return self._loader(
            source,
            self.batch_size,
            collate_fn=_Collate(self.views if in_workers else None),
            shuffle=None if isinstance(self.train, IterableDataset) else True,
            drop_last=True,
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Held-out batches; none without labels."""
        if self.test is None or not self.is_labeled:
            return []
        return self.loader(self.test)

    def loader(self, images: ImageSet, *, clean: bool = False) -> DataLoader[Batch]:
        """Batches of a set in its order.

        Args:
            images: the training or the held-out set, or another.
            clean: normalized images instead of uint8.
        """
        return self._loader(
            images,
            max(1, min(EVALUATION_BATCH, EVALUATION_PIXELS // math.prod(self.image_shape[1:]))),
            collate_fn=_Collate(self.views.clean if clean else None),
        )

    def _loader(self, source: Dataset[Any], batch_size: int, **options: Any) -> DataLoader[Any]:
        # Images in memory are indexed faster than sent, and images on a GPU cannot be sent.
        views = isinstance(options["collate_fn"].prepare, TwoViews)
        workers = 0 if isinstance(source, MemoryImages) and not views else self.num_workers
        on_device = isinstance(source, MemoryImages) and source.images.is_cuda
        return DataLoader(
            source,
            batch_size=batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available() and not on_device,
            **options,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Make the views, or the clean images, on the device."""
        images, labels = batch
        if not isinstance(images, Tensor):
            return images, labels  # the workers have made the views
        assert self.trainer is not None
        if self.trainer.training:
            return self.views(images), labels
        return self.views.clean(images), labels

    def teardown(self, stage: str) -> None:
        """Say which images could not be read."""
        self.report_unreadable()

    def report_unreadable(self) -> None:
        """Warn of images that could not be read, once for each new count."""
        for images in (self.train, self.test):
            news = images.news_of_unreadable() if isinstance(images, ImageFiles) else None
            if news is not None:
                rank_zero_warn(news)


class _Collate:
    """Makes a batch of what a worker has read: stacked already, or items of a stream."""

    def __init__(self, prepare: Any) -> None:
        self.prepare = prepare

    def __call__(self, batch: Any) -> Any:
        if isinstance(batch, list):
            batch = default_collate(batch)
            if isinstance(batch[0], list):  # two views, one image at a time
                return tuple(batch[0]), batch[1]
        images, labels = batch
        return (images if self.prepare is None else self.prepare(images)), labels


class HostViews(Dataset[Any]):
    """Two views of each image, made one image at a time, from its own size where the views have one of theirs."""

    def __init__(self, images: ImageSet | Any, views: TwoViews) -> None:
        self.images = images
        self.views = views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], int]:
        """Two views of an image, and its label."""
        pixels, label = self.images[index] if self.views.size is None else self.images.pixels(index)
        return self.views.of_one(pixels), int(label)


class StreamedHostViews(IterableDataset[Any]):
    """Two views of each image of a stream."""

    def __init__(self, images: IterableDataset[Any], views: TwoViews) -> None:
        self.images = images
        self.views = views

    def __iter__(self) -> Iterator[Any]:
        for pixels, label in self.images:
            yield self.views.of_one(pixels), label
