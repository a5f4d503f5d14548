"""The handwritten digits that scikit-learn ships: real images without a download."""

from typing import Any

import torch

from adadim_lightning.data.decoding import check_channels
from adadim_lightning.data.images import MemoryImages
from adadim_lightning.data.module import ImageData
from adadim_lightning.data.splits import hold_out

HELD_OUT = 500


def digits(*, image_size: int | None = None, channels: int = 1, **options: Any) -> ImageData:
    """1,797 handwritten digits, grey, 8 x 8, of 10 classes.

    The split is the same for everyone, whatever the seed of the run: 1,297 to train, 500 held out, stratified.

    Args:
        image_size: side of the images; None is their own.
        channels: 1 or 3.
        options: of :class:`ImageData`: ``views``, ``batch_size``, ``num_workers``.

    Returns:
        The data module.

    Raises:
        ValueError: ``batch_size`` is below 2 or above 1,297.

    Source: E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI 1998.
    """
    from sklearn.datasets import load_digits

    check_channels(channels)
    rows, labels = load_digits(return_X_y=True)
    images = (torch.as_tensor(rows) * (255 / 16)).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    whole = MemoryImages(images, torch.as_tensor(labels), classes=[str(i) for i in range(10)])
    train, test = hold_out(whole.resized(image_size, channels), HELD_OUT)
    return ImageData(train, test, title="digits", **{"batch_size": 128, **options})
