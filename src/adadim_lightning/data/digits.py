"""The handwritten digits that scikit-learn ships: real images without a download."""

import torch
from torch import Tensor

from adadim_lightning.data.memory import InMemoryImages, LabeledImages
from adadim_lightning.data.views import TwoViews

HELD_OUT = 500
SPLIT_SEED = 0


def digits(*, views: TwoViews, batch_size: int = 128) -> InMemoryImages:
    """1,797 handwritten digits, grey, 8 x 8, of 10 classes.

    The split is the same for everyone, whatever the seed of the run: 1,297 to train, 500 held out, stratified.

    Args:
        views: makes the two views.
        batch_size: images per step and process.

    Returns:
        The data module.

    Raises:
        ValueError: ``batch_size`` is below 2 or above 1,297.

    Source: E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI 1998.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=HELD_OUT, stratify=labels, random_state=SPLIT_SEED)
    train_images, test_images, train_labels, test_labels = split

    def to_uint8(x: Tensor) -> Tensor:
        return (x * (255 / 16)).round().to(torch.uint8).reshape(-1, 1, 8, 8)

    return InMemoryImages(
        LabeledImages(to_uint8(torch.as_tensor(train_images)), torch.as_tensor(train_labels)),
        LabeledImages(to_uint8(torch.as_tensor(test_images)), torch.as_tensor(test_labels)),
        views=views,
        batch_size=batch_size,
    )
