"""MedMNIST: twelve medical data sets of small images; its six of volumes are left out."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from adadim_lightning.data.decoding import check_channels
from adadim_lightning.data.images import MemoryImages
from adadim_lightning.data.module import ImageData
from adadim_lightning.data.splits import load_or_download
from adadim_lightning.extras import require


def medmnist(
    name: str,
    *,
    root: str | Path = "data/medmnist",
    size: int = 28,
    test_split: str = "test",
    download: bool = True,
    image_size: int | None = None,
    channels: int = 3,
    **options: Any,
) -> ImageData:
    """A two-dimensional data set of MedMNIST, its training images and those of a split to hold out.

    Where an image may have several labels (ChestMNIST) it counts as one without. All images are kept in memory.

    Args:
        name: such as ``"pneumonia"`` or ``"pneumoniamnist"``.
        root: folder of the files.
        size: of the published images: 28, 64, 128 or 224.
        test_split: split to hold out: ``"test"``, or ``"val"``, on which to choose.
        download: fetch what is missing.
        image_size: side of the images; None is their own.
        channels: 1 or 3.
        options: of :class:`ImageData`: ``views``, ``batch_size``, ``num_workers``.

    Returns:
        The data module.

    Raises:
        ValueError: there is no such data set or split, it holds volumes, or it could not be downloaded.
        ModuleNotFoundError: the package ``medmnist`` is missing; the message has its install line.

    Source: Yang et al., "MedMNIST v2", Scientific Data 2023.
    """
    check_channels(channels)
    package = require("medmnist", "medmnist")
    flag = name if name.endswith(("mnist", "mnist3d")) else f"{name}mnist"
    if flag not in package.INFO:
        flat = ", ".join(key.removesuffix("mnist") for key in package.INFO if not key.endswith("3d"))
        raise ValueError(f"MedMNIST has no data set {name!r}; it has {flat}")
    if flag.endswith("3d"):
        raise ValueError(f"{flag} holds volumes; this package trains on images")
    info = package.INFO[flag]
    kind = getattr(package, info["python_class"])
    if size not in kind.available_sizes:
        raise ValueError(f"MedMNIST has images of size {', '.join(map(str, kind.available_sizes))}, got {size!r}")
    if test_split not in ("test", "val"):
        raise ValueError(f'test_split must be "test" or "val", got {test_split!r}')
    root = Path(root).expanduser()
    several = info["task"].startswith("multi-label")
    classes = None if several else [info["label"][str(i)] for i in range(len(info["label"]))]

    def load(split: str) -> MemoryImages:
        found = load_or_download(
            lambda missing: kind(split=split, root=str(root), size=size, download=missing),
            name=f"{flag} of size {size}",
            root=root,
            download=download,
        )
        images = torch.as_tensor(found.imgs)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        labels = None if several else torch.as_tensor(found.labels.astype(np.int64)).flatten()
        return MemoryImages(images, labels, classes=classes).resized(image_size, channels)

    return ImageData(load("train"), load(test_split), title=info["python_class"], **options)
