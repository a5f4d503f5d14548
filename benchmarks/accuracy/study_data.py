"""The images of the accuracy study: small parts of public data sets, with a validation split of their own.

``split=validation`` holds images out of the training set, on which everything is chosen; ``split=test`` holds out
the published test set, and trains on the very same images. Splits are the same for every seed.
"""

from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from adadim_lightning.data import (
    ImageData,
    MemoryImages,
    TwoViews,
    digits,
    huggingface,
    medmnist,
    torchvision_images,
)
from adadim_lightning.data.splits import hold_out

Split = Literal["validation", "test"]
Parts = tuple[MemoryImages, MemoryImages, MemoryImages]  # training, validation, test


def _parts(data: ImageData, validation: int | ImageData, train: int | None = None) -> Parts:
    """Training images, as many of them as wanted, and what is held out for validation and for the test."""
    images, test = data.train, data.test
    assert isinstance(images, MemoryImages)
    assert isinstance(test, MemoryImages)
    if isinstance(validation, int):
        images, held_out = hold_out(images, validation)
    else:
        held_out = validation.test
    if train is not None:
        _, images = hold_out(images, train)
    assert isinstance(images, MemoryImages)
    assert isinstance(held_out, MemoryImages)
    return images, held_out, test


HELD_OUT = 5000  # of the large sets, for validation

# Decoding takes longer than reading a run's few images again: once in each process.


@cache
def _cifar10(root: str, size: int, train: int | None) -> Parts:
    arrays = sorted(Path(root).glob("*.npz"))  # what benchmarks/gpu/prepare.py unpacked
    if not arrays:
        return _parts(huggingface(root, image_size=size, **_unused(3)), HELD_OUT, train)
    images, test = (
        _read([file for file in arrays if file.name.startswith(split)]).resized(size, 3)
        for split in ("train", "test")
    )
    return _parts(ImageData(images, test, **_unused(3)), HELD_OUT, train)


def _read(files: list[Path]) -> MemoryImages:
    parts = [np.load(file) for file in files]
    images = torch.from_numpy(np.concatenate([part["images"] for part in parts])).permute(0, 3, 1, 2).contiguous()
    return MemoryImages(images, torch.from_numpy(np.concatenate([part["labels"] for part in parts])))


@cache
def _fashion_mnist(root: str, size: int, train: int | None) -> Parts:
    options: dict[str, Any] = {"train": {"train": True}, "test": {"train": False}, "channels": 1}
    return _parts(
        torchvision_images("FashionMNIST", root=root, image_size=size, **options, **_unused(1)), 5000, train
    )


@cache
def _medmnist(name: str, root: str, size: int, channels: int) -> Parts:
    test, validation = (
        medmnist(name, root=root, image_size=size, channels=channels, test_split=split, **_unused(channels))
        for split in ("test", "val")
    )
    return _parts(test, validation)


@cache
def _digits() -> Parts:
    return _parts(digits(**_unused(1)), 300)


def _unused(channels: int) -> dict[str, Any]:
    """Views that a data module wants and nobody asks for."""
    return {"views": TwoViews({"flip": {"p": 0.0}}, mean=[0.5] * channels, std=[0.5] * channels), "batch_size": 2}


def study(
    name: str,
    *,
    split: Split,
    views: TwoViews,
    batch_size: int,
    image_size: int | None = None,
    channels: int = 1,
    root: str = "data",
    images: int | None = None,
) -> ImageData:
    """One data set of the study.

    Args:
        name: ``cifar10``, ``fashion_mnist``, ``pneumonia``, ``retina`` or ``digits``.
        split: what is held out.
        views: makes the views.
        batch_size: images a step.
        image_size: side that the images are scaled to.
        channels: 1 or 3.
        root: where the data set is; of CIFAR-10 its name on the hub, or a folder of parquet or npz files.
        images: training images to take, of the two large sets.
    """
    if name == "cifar10":
        parts = _cifar10(root, image_size, images)
    elif name == "fashion_mnist":
        parts = _fashion_mnist(root, image_size, images)
    elif name == "digits":
        parts = _digits()
    else:
        parts = _medmnist(name, root, image_size, channels)
    held_out = parts[1 if split == "validation" else 2]
    return ImageData(
        parts[0], held_out, views=views, batch_size=batch_size, num_workers=0, title=f"{name}, {split}"
    )
