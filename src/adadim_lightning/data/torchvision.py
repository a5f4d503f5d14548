"""Data sets of torchvision, by name, downloaded where they are missing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.datasets

from adadim_lightning.data.images import ImageFiles, ImageSet, MemoryImages, check_channels
from adadim_lightning.data.module import ImageData
from adadim_lightning.data.splits import hold_out, image_data, one_at_a_time


def torchvision_images(
    name: str,
    *,
    root: str | Path = "data",
    train: Mapping[str, Any] | None = None,
    test: Mapping[str, Any] | None = None,
    held_out: float = 0.1,
    download: bool = True,
    image_size: int | None = None,
    channels: int = 3,
    max_unreadable: int = 100,
    in_memory: bool | None = None,
    **options: Any,
) -> ImageData:
    """A classification data set of torchvision.

    Args:
        name: of the class in ``torchvision.datasets``, such as ``"CIFAR10"``.
        root: folder of the data sets.
        train: its arguments for the training images, such as ``{"split": "train+unlabeled"}``.
        test: those for the held-out images; None holds a part of the training images out.
        held_out: the share that is then held out.
        download: fetch what is missing.
        image_size: side of the images; None is their own.
        channels: 1 or 3.
        max_unreadable: number of images that may be left out because they cannot be read.
        in_memory: decode all images once; None does so if they take no more than 2 GiB.
        options: of :class:`ImageData`: ``views``, ``batch_size``, ``num_workers``.

    Returns:
        The data module.

    Raises:
        ValueError: the data set is not known, not there, or not such a one.
    """
    check_channels(channels)
    kind = getattr(torchvision.datasets, name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.utils.data.Dataset)):
        raise ValueError(f"torchvision has no data set {name!r}")

    def load(arguments: Mapping[str, Any]) -> ImageSet:
        with one_at_a_time(root):
            found = _load(kind, name, Path(root), dict(arguments), download)
        return _as_images(found, name, image_size, channels, max_unreadable)

    training = load(train or {})
    if test is None:
        training, testing = hold_out(training, held_out)
    else:
        testing = load(test)
    return image_data(training, testing, in_memory=in_memory, title=name, **options)


def _load(kind: type, name: str, root: Path, arguments: dict[str, Any], download: bool) -> Any:
    try:
        return kind(str(root), **arguments)  # what is there needs no network
    except (RuntimeError, FileNotFoundError, OSError) as missing:
        if not download:
            raise ValueError(
                f"{name} is not in {root}: set data.download=true, or data.root to the folder that holds it ({missing})"
            ) from missing
    try:
        return kind(str(root), download=True, **arguments)
    except (OSError, RuntimeError) as failed:
        raise ValueError(
            f"{name} could not be downloaded to {root} ({failed}); put it there by hand, or set data.root to the "
            "folder that holds it"
        ) from failed


def _as_images(found: Any, name: str, image_size: int | None, channels: int, max_unreadable: int) -> ImageSet:
    labels = next((getattr(found, key) for key in ("targets", "labels", "_labels") if hasattr(found, key)), None)
    classes = getattr(found, "classes", None)
    if classes is not None:
        classes = [x if isinstance(x, str) else x[0] for x in classes]
    pixels = getattr(found, "data", None)
    if pixels is not None and labels is not None:
        images = torch.as_tensor(np.asarray(pixels))
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[-1] == 3:
            images = images.permute(0, 3, 1, 2)
        # STL-10 writes 255, a -1 of its unsigned bytes, or -1 behind the images without a class.
        known = torch.as_tensor(np.asarray(labels).astype(np.int64))
        known = torch.where(known > 254, -1, known)
        return MemoryImages(images.contiguous(), known, classes=classes).resized(image_size, channels)
    samples = getattr(found, "samples", None) or getattr(found, "_samples", None)
    if samples is None:
        raise ValueError(f"{name} of torchvision does not list its images with their classes; use data=folder")
    files, numbers = zip(*samples, strict=True)
    return ImageFiles(
        [str(file) for file in files],
        torch.tensor(numbers),
        image_size=image_size,
        channels=channels,
        classes=classes,
        max_unreadable=max_unreadable,
    )
