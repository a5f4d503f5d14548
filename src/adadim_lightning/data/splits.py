"""What all data sets share: a held-out part, images in memory where they fit, one download at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from adadim_lightning.data.images import ImageFiles, ImageSet
from adadim_lightning.data.module import ImageData
from adadim_lightning.functional._numeric import check_number

SPLIT_SEED = 0
MOST_IN_MEMORY = 2 * 2**30

Set = TypeVar("Set", bound=ImageSet)


def hold_out(images: Set, share: float | int) -> tuple[Set, Set]:
    """Split a set in two, stratified by its labels; the split is the same for everyone.

    Args:
        images: the whole set.
        share: of the images to hold out, or their number.

    Returns:
        The part to train on, and the part held out.
    """
    from sklearn.model_selection import train_test_split

    if isinstance(share, float):
        check_number("held_out", share, low=0.0, high=1.0)
    labels = images.labels
    counts = torch.bincount(labels.clamp_min(0)) if images.is_labeled else torch.zeros(1)
    stratify = labels.numpy() if int(counts[counts > 0].min()) > 1 else None if len(counts) else None
    train, test = train_test_split(range(len(images)), test_size=share, stratify=stratify, random_state=SPLIT_SEED)
    return images.subset(train), images.subset(test)  # type: ignore[return-value]


def image_data(train: Any, test: ImageSet | None, *, in_memory: bool | None = None, **options: Any) -> ImageData:
    """The data module, with images in memory where that is wanted.

    Args:
        train: training images.
        test: held-out images.
        in_memory: decode all images once; None does so if they take no more than 2 GiB.
        options: of :class:`ImageData`.
    """
    kept = [_in_memory(images, in_memory) for images in (train, test)]
    data = ImageData(kept[0], kept[1], **options)
    for images in (train, test):
        news = images.news_of_unreadable() if isinstance(images, ImageFiles) else None
        if news is not None:
            from lightning.pytorch.utilities import rank_zero_warn

            rank_zero_warn(news)
    return data


def _in_memory(images: Any, in_memory: bool | None) -> Any:
    if not isinstance(images, ImageFiles) or in_memory is False:
        return images
    if in_memory is None and len(images) * images[0][0].numel() > MOST_IN_MEMORY:
        return images
    return images.decode_all()


@contextmanager
def one_at_a_time(root: str | Path) -> Iterator[None]:
    """Of several processes that would download to a folder, one does and the others wait.

    Raises:
        ValueError: the download failed; the message names the folder, and what to do.
    """
    from filelock import FileLock

    root = Path(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".download.lock")
        lock.acquire()
    except OSError:  # a folder that cannot be written to is not downloaded to
        yield
        return
    try:
        yield
    finally:
        lock.release()


def class_indices(names: Sequence[str], classes: Sequence[str]) -> Tensor:
    """The number of each name among the classes; -1 for one that is none."""
    index = {name: i for i, name in enumerate(classes)}
    return torch.tensor([index.get(name, -1) for name in names])
