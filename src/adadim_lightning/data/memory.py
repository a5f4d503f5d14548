"""Small data sets that live in memory as uint8 tensors: an epoch costs no decoding."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from adadim_lightning.data.views import TwoViews
from adadim_lightning.functional._numeric import check_integer

Batch = tuple[Tensor, Tensor]


class LabeledImages(Dataset[Batch]):
    """Images and their classes as two tensors; a batch is one indexing, not N of them.

    Args:
        images: shape ``(N, C, H, W)``, uint8.
        labels: shape ``(N,)``, int64.

    Raises:
        ValueError: shapes or types do not fit.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.ndim != 4 or images.dtype != torch.uint8 or labels.shape != images.shape[:1]:
            raise ValueError(
                "images must be uint8 of shape (N, C, H, W) and labels of shape (N,), got "
                f"{images.dtype} {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        """One image and its label."""
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """One batch, as the data loader asks for it."""
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.labels[chosen]


def _as_it_is(batch: Any) -> Any:
    return batch


class InMemoryImages(LightningDataModule):
    """Two views of each training image for training, clean held-out images for validation.

    Views are made on the device, from the uint8 batch.

    Args:
        train: training images.
        test: held-out images.
        views: makes the two views, and the clean image.
        batch_size: images per step and process; the last, incomplete batch of an epoch is left out.

    Raises:
        ValueError: ``batch_size`` is below 2 or above the number of training images.
    """

    def __init__(
        self, train: LabeledImages, test: LabeledImages, *, views: TwoViews, batch_size: int = 256
    ) -> None:
        super().__init__()
        check_integer("batch_size", batch_size, low=2)
        if batch_size > len(train):
            raise ValueError(
                f"batch_size must not exceed the number of training images, {len(train)}; got {batch_size}"
            )
        self.train = train
        self.test = test
        self.views = views
        self.batch_size = batch_size

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.train.labels.max()) + 1

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled training batches."""
        return DataLoader(
            self.train, batch_size=self.batch_size, shuffle=True, drop_last=True, collate_fn=_as_it_is
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Held-out batches."""
        return DataLoader(self.test, batch_size=max(self.batch_size, 512), collate_fn=_as_it_is)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Any:
        """Make the views, or the clean images, on the device."""
        images, labels = batch
        assert self.trainer is not None
        if self.trainer.training:
            return self.views(images), labels
        return self.views.clean(images), labels
