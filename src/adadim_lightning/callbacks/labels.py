"""Finds the labels of a batch, and the number of classes of a data set."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from adadim_lightning.feed import batch_size_of, images_of

LABEL_KEYS = ("label", "labels", "target", "targets", "y")

Labels = str | int | Callable[[Any], Tensor]
"""Where the labels of a batch are: a key or a position in it, or a function of it."""


def _are_labels(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_floating_point() and x.ndim > 0 and x.shape[1:].numel() == 1


def _find_labels(batch: Any) -> Any:
    """The labels behind the images, as in ``(indices, views, labels)``, or under a name."""
    if isinstance(batch, Mapping):
        named = next((batch[key] for key in LABEL_KEYS if key in batch), None)
        inner: Iterable[Any] = batch.values()
    elif isinstance(batch, list | tuple):
        images = next((i for i, x in enumerate(batch) if batch_size_of(x) is not None), len(batch))
        named = next(filter(_are_labels, batch[images + 1 :]), None)
        inner = batch
    else:
        return None
    # Views that are dictionaries hold the labels themselves.
    return named if named is not None else next((y for x in inner if (y := _find_labels(x)) is not None), None)


def labels_of(batch: Any, rows: int, where: Labels | None = None) -> Tensor:
    """Labels of a batch, repeated for each of the views stacked in its rows.

    Raises:
        ValueError: the batch has no labels, or not one for each image.
    """
    labels: Any
    if where is None:
        # Of several data sets in one batch it is not known whose rows these are.
        several = len({len(images) for images in images_of(batch)}) > 1
        labels = None if several else _find_labels(batch)
    elif callable(where):
        labels = where(batch)
    else:
        try:
            labels = batch[where]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"the batches ({type(batch).__name__}) have no {where!r}, given by labels=") from None
    if not _are_labels(labels) or not len(labels) or rows % len(labels):
        raise ValueError(
            "a probe needs batches (images, labels) with one class number for each image; say where they are by "
            "labels=..., give it labeled data of its own by train_loader=..., or leave the probe out to train "
            "without labels"
        )
    found: Tensor = labels.flatten().long().repeat(rows // len(labels))
    return found


def count_classes(source: Any) -> int | None:
    """Number of classes that a data module or a data set names."""
    count = getattr(source, "num_classes", None)
    if isinstance(count, int):
        return count
    if (names := getattr(source, "classes", None)) is not None:
        return len(names)
    features = getattr(source, "features", None)  # a Hugging Face data set
    if isinstance(features, Mapping):
        for key in LABEL_KEYS:
            if isinstance(count := getattr(features.get(key), "num_classes", None), int):
                return count
    for name in ("labels", "targets"):
        labels = getattr(source, name, None)
        if isinstance(labels, Tensor | np.ndarray | list) and len(labels) and not isinstance(labels[0], str):
            return int(torch.as_tensor(labels).max()) + 1
    inner = getattr(source, "dataset", None)  # a subset, or a data set with transforms around another
    return None if inner is None else count_classes(inner)


def infer_num_classes(trainer: Trainer) -> int:
    """Number of classes that the data module or the training set names.

    Raises:
        ValueError: neither names it.
    """
    for source in (getattr(trainer, "datamodule", None), getattr(trainer.train_dataloader, "dataset", None)):
        if (count := count_classes(source)) is not None:
            return count
    raise ValueError("the number of classes is not known from the data; give OnlineLinearProbe num_classes=...")
