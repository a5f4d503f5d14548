"""What all data sets share: a held-out part, images in memory where they fit, one download at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from tarfile import TarError
from typing import Any, TypeVar
from zipfile import BadZipFile

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from adadim_lightning.data.images import ImageFiles, ImageSet
from adadim_lightning.data.module import ImageData
from adadim_lightning.data.pixels import DeepImage, PixelScale, printable
from adadim_lightning.functional._numeric import check_integer, check_number

SPLIT_SEED = 0
MOST_IN_MEMORY = 2 * 2**30

Set = TypeVar("Set", bound=ImageSet)
Loaded = TypeVar("Loaded")


def hold_out(images: Set, share: float | int) -> tuple[Set, Set | None]:
    """Split a set in two, stratified by its labels; the split is the same for everyone.

    Images that have no label, or the only one of their class, are all for training.

    Args:
        images: the whole set.
        share: of the labeled images to hold out, or their number.

    Returns:
        The part to train on, and the part held out; None where nothing is to be or can be held out.

    Raises:
        ValueError: no such part can be held out.
    """
    from sklearn.model_selection import train_test_split

    if isinstance(share, float):
        check_number("held_out", share, low=0.0, high=1.0)
    else:
        check_integer("held_out", share, low=0)
    labels = images.labels
    _, number, counts = labels.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    splittable = (counts > 1)[number] & (labels >= 0)
    candidates = splittable.nonzero().flatten()
    if share == 0 or not len(candidates):
        if share and images.is_labeled:
            rank_zero_warn("each class has one image, so none is held out and nothing can be scored")
        return images, None
    classes = len(torch.unique(labels[candidates]))
    count = share if isinstance(share, int) else max(classes, math.ceil(share * len(candidates)))
    if not classes <= count <= len(candidates) - classes:
        raise ValueError(
            f"held_out={share} cannot leave an image of each of {classes} classes on both sides of "
            f"{len(candidates):,} images"
        )
    train, test = train_test_split(
        candidates.tolist(), test_size=count, stratify=labels[candidates].numpy(), random_state=SPLIT_SEED
    )
    rest = (~splittable).nonzero().flatten().tolist()
    return images.subset(train + rest), images.subset(test)  # type: ignore[return-value]


def image_data(train: Any, test: ImageSet | None, *, in_memory: bool | None = None, **options: Any) -> ImageData:
    """The data module, with images in memory where that is wanted.

    Args:
        train: training images.
        test: held-out images.
        in_memory: decode all images once; None does so if they take no more than 2 GiB, and views of the
            torchvision backend do not want them as they are on disk.
        options: of :class:`ImageData`.
    """
    if in_memory is None and options["views"].on_host:
        in_memory = False  # these views want the images as they are on disk
    scale = _share_scale([images for images in (train, test) if isinstance(images, ImageFiles)])
    kept = [_in_memory(images, in_memory) for images in (train, test)]
    for images in (train, test):
        news = images.news_of_unreadable() if isinstance(images, ImageFiles) else None
        if news is not None:
            rank_zero_warn(news)
    _report_labels(kept[0], kept[1])
    data = ImageData(kept[0], kept[1], **options)
    if isinstance(train, ImageFiles):
        data.scale = scale  # also of images that are in memory by now
    return data


def _share_scale(sets: Sequence[ImageFiles]) -> PixelScale:
    """Give all parts of a set one scale of pixels of more than 8 bits, and return it."""
    given = next((images.pixel_range for images in sets), None)
    scaled = False

    def sample() -> Iterator[DeepImage]:
        nonlocal scaled
        for image in chain.from_iterable(images.deep_sample() for images in sets):
            scaled = scaled or not image.upper_bits
            yield image

    scale = PixelScale.of(sample(), given)
    if given is not None and not scaled:
        rank_zero_warn(
            f"data.pixel_range={list(given)} is ignored: the images have 8 bits, which count from 0 to 255, or "
            "colors of 16 bits, of which the upper eight are read"
        )
    for images in sets:
        images.scale = scale
    return scale


def _report_labels(train: Any, test: ImageSet | None) -> None:
    """Warn of images without a label among others, and of classes that one part lacks."""
    if not isinstance(train, ImageSet):
        return
    for part, images in (("training", train), ("held-out", test)):
        missing = 0 if images is None else int((images.labels < 0).sum())
        if images is not None and images.is_labeled and missing:
            rank_zero_warn(
                f"{missing:,} of {len(images):,} {part} images have no label (none, or -1); probes leave them out"
            )
    if test is None or not (train.is_labeled and test.is_labeled):
        return
    learnt, scored = (set(x.labels[x.labels >= 0].tolist()) for x in (train, test))
    for classes, what in (
        (scored - learnt, "no training image, so probes cannot know them"),
        (learnt - scored, "no held-out image, so they are not scored"),
    ):
        if classes:
            names = [printable(train.classes[i] if train.classes else i) for i in sorted(classes)]
            rank_zero_warn(f"{len(names):,} of {len(learnt | scored):,} classes ({first_few(names)}) have {what}")


def first_few(names: Sequence[str], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def _in_memory(images: Any, in_memory: bool | None) -> Any:
    if not isinstance(images, ImageFiles) or in_memory is False:
        return images
    if in_memory is None and len(images) * images[0][0].numel() > MOST_IN_MEMORY:
        return images
    return images.decode_all()


def load_or_download(load: Callable[[bool], Loaded], *, name: str, root: Path, download: bool) -> Loaded:
    """Load a data set, and download it first if it is missing; of several processes one does, the others wait.

    Args:
        load: loads it, and before that downloads it if its argument is true.
        name: of the data set, for messages.
        root: folder of the data set.
        download: whether it may be downloaded.

    Raises:
        ValueError: it is not there, or damaged, or could not be downloaded; one line says what to do.
    """
    lock = root / ".download.lock"
    missing: Exception | None = None
    if not (download and lock.exists()):  # then somebody may be unpacking it
        try:
            return load(False)
        except _FAILED as error:
            missing = error
    if not download:
        raise ValueError(
            f"{name} is not in {root}, or damaged: set data.download=true, or data.root to the folder that holds "
            f"it ({_reason(missing)})"
        ) from missing
    with _one_at_a_time(lock):
        with suppress(*_FAILED):
            return load(False)
        try:
            return load(True)
        except _FAILED as error:
            raise ValueError(
                f"{name} could not be downloaded to {root}; put it there by hand, or set data.root to the folder "
                f"that holds it ({_reason(error)})"
            ) from error


# What a missing or damaged file, a broken archive or a lost connection raises; a wrong setting is a ValueError.
_FAILED = (OSError, RuntimeError, EOFError, BadZipFile, TarError, HTTPException, UnpicklingError)


def _reason(error: BaseException | None) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    from filelock import FileLock

    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock)
        held.acquire()
    except OSError:  # who cannot write there cannot download either; the attempt says so
        yield
        return
    try:
        yield
    finally:
        held.release()


def class_indices(names: Sequence[str], classes: Sequence[str]) -> Tensor:
    """The number of each name among the classes; -1 for one that is none."""
    index = {name: i for i, name in enumerate(classes)}
    return torch.tensor([index.get(name, -1) for name in names])
