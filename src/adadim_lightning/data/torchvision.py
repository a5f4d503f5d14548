"""Data sets of torchvision, by name, downloaded where they are missing."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.datasets

from adadim_lightning.data.decoding import check_channels
from adadim_lightning.data.images import ImageFiles, ImageSet, MemoryImages
from adadim_lightning.data.module import ImageData
from adadim_lightning.data.splits import hold_out, image_data, load_or_download


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
        near = difflib.get_close_matches(name, torchvision.datasets.__all__, n=1)
        raise ValueError(f"torchvision has no data set {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    make: Callable[..., Any] = kind
    root = Path(root).expanduser()
    parameters = inspect.signature(kind).parameters

    def load(arguments: Mapping[str, Any], key: str) -> ImageSet:
        for argument in arguments:
            if argument not in parameters:
                raise ValueError(
                    f"data.{key}: {name} has no argument {argument!r}; it has {', '.join(parameters)}"
                )
        found = load_or_download(
            lambda missing: make(str(root), **arguments, **({"download": True} if missing else {})),
            name=name,
            root=root,
            download=download and "download" in parameters,
        )
        return _as_images(found, name, image_size, channels, max_unreadable)

    training = load(train or {}, "train")
    testing: ImageSet | None
    training, testing = hold_out(training, held_out) if test is None else (training, load(test, "test"))
    return image_data(training, testing, in_memory=in_memory, title=name, **options)


def _as_images(found: Any, name: str, image_size: int | None, channels: int, max_unreadable: int) -> ImageSet:
    def first(*attributes: str) -> Any:
        return next((getattr(found, x) for x in attributes if getattr(found, x, None) is not None), None)

    classes = first("classes")
    if classes is not None:
        classes = [x if isinstance(x, str) else x[0] for x in classes]  # Imagenette has several names for each
    pixels, labels = first("data"), first("targets", "labels", "_labels")
    if pixels is not None and labels is not None:
        images = torch.as_tensor(np.asarray(pixels))
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[-1] == 3:
            images = images.permute(0, 3, 1, 2)
        known = torch.as_tensor(np.asarray(labels).astype(np.int64))  # -1 where STL-10 has no label
        return MemoryImages(images.contiguous(), known, classes=classes).resized(image_size, channels)
    files, samples = first("_image_files", "_images"), first("samples", "_samples", "imgs")
    if samples is not None:
        files, labels = zip(*samples, strict=True)
    if files is None or labels is None or len(files) != len(labels):
        raise ValueError(f"{name} of torchvision does not list its images with their classes; use data=folder")
    return ImageFiles(
        [str(file) for file in files],
        torch.tensor(labels),
        image_size=image_size,
        channels=channels,
        classes=classes,
        max_unreadable=max_unreadable,
    )
