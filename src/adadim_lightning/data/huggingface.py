"""Data sets of the Hugging Face hub, or local files of that layout."""

import glob
import logging
import os
import re
import socket
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from torchvision.transforms.v2.functional import pil_to_tensor

from adadim_lightning.data.decoding import Encoded, check_channels, decode, fit_square, is_broken
from adadim_lightning.data.images import UNLABELED, ImageFiles, UnreadableImagesError
from adadim_lightning.data.module import ImageData
from adadim_lightning.data.splits import hold_out, image_data
from adadim_lightning.distributed import world_size
from adadim_lightning.extras import require

LABELS = ("label", "labels", "fine_label", "target", "class", "cls", "y")
TEST_SPLITS = ("test", "validation", "valid", "val", "dev")
FORMATS = {
    **{"parquet": "parquet", "arrow": "arrow", "csv": "csv", "json": "json", "jsonl": "json"},
    "tar": "webdataset",
}
MOST_OF_A_STREAM = 10_000  # held-out images that are kept of a stream


def huggingface(
    path: str,
    *,
    name: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    labeled: bool = True,
    held_out: float = 0.1,
    streaming: bool = False,
    shuffle_buffer: int = 10_000,
    image_size: int | None = None,
    channels: int = 3,
    max_unreadable: int = 100,
    in_memory: bool | None = None,
    **options: Any,
) -> ImageData:
    """A data set of the hub by its name, or local files: parquet, arrow, webdataset, or of ``save_to_disk``.

    The columns are found by their types: the one that holds images, and the one of class labels. Labels that are
    words are numbered in the order of the alphabet; those of a stream, in that of its held-out images.

    Args:
        path: name on the hub; or a file, a folder, or a pattern with ``*``, whose files are named after their
            splits (``train-00000.parquet``), or whose folders are.
        name: configuration of the data set.
        train_split: split to train on.
        test_split: split to hold out; None takes ``test`` or ``validation``, whichever has labels, or holds a part
            of the training images out.
        image_column: column of the images, where there are several.
        label_column: column of the labels, where there are several or they are plain numbers or words.
        labeled: False leaves labels alone.
        held_out: the share that is held out where there is no split for that, but not of a stream.
        streaming: read while training, without a download of the whole; needs ``trainer.max_steps``. Of the
            split to hold out the first 10,000 images are kept.
        shuffle_buffer: of a stream, images among which the next is drawn.
        image_size: side of the square that the images are scaled and cut to; None leaves them.
        channels: 1 or 3.
        max_unreadable: number of images that may be left out because they cannot be read.
        in_memory: decode all images once; None does so if they take no more than 2 GiB.
        options: of :class:`ImageData`: ``views``, ``batch_size``, ``num_workers``.

    Returns:
        The data module.

    Raises:
        ValueError: there is no such data set or split, or its columns are not clear.
        ModuleNotFoundError: the package ``datasets`` is missing; the message has its install line.
    """
    check_channels(channels)
    datasets = require("datasets", "hf")
    with _quiet(datasets):
        splits = _load(datasets, path, name, streaming)
        for split in (train_split, test_split):
            if split is not None and split not in splits:
                raise ValueError(f"{path} has no split {split!r}; it has {', '.join(splits)}")
        fitting: dict[str, Any] = {
            "image_size": image_size,
            "channels": channels,
            "max_unreadable": max_unreadable,
        }

        def table(split: str) -> tuple[Any, str, str | None]:
            found = splits[split]
            found = found._resolve_features() if found.features is None else found  # a stream that does not say
            image = _image_column(datasets, found.features, image_column)
            label = _label_column(datasets, found.features, label_column) if labeled else None
            found = found.cast_column(image, datasets.Image(decode=False))
            return found.select_columns([image] + ([] if label is None else [label])), image, label

        def images(split: str, classes: Sequence[str] | None = None) -> ImageFiles:
            found, image, label = table(split)
            if streaming:
                rows = list(found.take(MOST_OF_A_STREAM))
                if not rows:
                    raise ValueError(f"the split {split!r} of {path} is empty")
                found = datasets.Dataset.from_list(rows, features=found.features)
            labels = torch.full((len(found),), UNLABELED)
            if label is not None:
                written = list(found[label])
                classes = _class_names(found.features[label], written) if classes is None else classes
                labels = _numbers(written, classes)
            return ImageFiles(_Rows(found, image), labels, classes=classes, **fitting)

        choices = [test_split] if test_split else [x for x in TEST_SPLITS if x in splits and x != train_split]
        train: ImageFiles | ImageStream
        test: ImageFiles | None = None
        if streaming:
            test = _first_labeled(map(images, choices))
            stream, image, label = table(train_split)
            train = ImageStream(stream, image, label, test.classes if test else None, shuffle_buffer, **fitting)
            # More workers than parts of the stream would have nothing to read.
            workers = options.get("num_workers")
            options["num_workers"] = min(8 if workers is None else workers, os.cpu_count() or 1, stream.num_shards)
        else:
            train = images(train_split)
            if train.is_labeled or test_split:
                test = _first_labeled(images(x, train.classes) for x in choices)
            if test is None:
                train, test = hold_out(train, held_out)
    title = Path(path).name if len(Path(path).parts) > 2 else path
    return image_data(train, test, in_memory=in_memory, title=title, **options)


def _first_labeled(splits: Iterable[ImageFiles]) -> ImageFiles | None:
    """The first split with labels, which those of a contest may lack; else the first."""
    first = None
    for split in splits:
        if split.is_labeled:
            return split
        first = first or split
    return first


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No bars and notes of the library; what goes wrong is raised."""
    bars, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    try:
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)
        hub.setLevel(logging.CRITICAL)
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()
        datasets.logging.set_verbosity(level)
        hub.setLevel(hub_level)


@contextmanager
def _offline_if_unreachable(datasets: Any) -> Iterator[None]:
    """Without a network take what is in the cache at once, not after half a minute of attempts."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not getproxies():
        try:
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
        except OSError:
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _load(datasets: Any, path: str, name: str | None, streaming: bool) -> dict[str, Any]:
    """The splits of a data set."""
    local = Path(path).expanduser()
    saved = any((local / file).exists() for file in ("dataset_dict.json", "state.json"))
    files = [] if saved else sorted(glob.glob(str(local), recursive=True)) if "*" in path else _files(local)
    if not saved and not files and ("*" in path or local.exists() or path.startswith((".", "/", "~"))):
        raise ValueError(f"no file at {path} ends in {', '.join(FORMATS)}; folders of images are for data=folder")
    kind = FORMATS.get(Path(files[0]).suffix[1:]) if files else None
    if files and kind is None:
        raise ValueError(f"{files[0]} is none of {', '.join(FORMATS)}")
    try:
        if saved:
            found = datasets.load_from_disk(str(local))
            found = found if isinstance(found, dict) else {"train": found}
            if streaming:
                found = {x: table.to_iterable_dataset(num_shards=min(8, len(table))) for x, table in found.items()}
        elif files:
            found = datasets.load_dataset(
                kind, data_files=_by_split(files) if len(files) > 1 else {"train": files}, streaming=streaming
            )
        else:
            with _offline_if_unreachable(datasets):
                found = datasets.load_dataset(path, name, streaming=streaming)
    except Exception as error:  # the library raises what its many parts raise
        reason = " ".join(str(error).split())
        where = "" if files or saved else "; a local copy is given by its folder, a configuration by data.name"
        raise ValueError(
            f"the data set {path} cannot be loaded: {type(error).__name__}: {reason}{where}"
        ) from error
    return dict(found)


def _files(local: Path) -> list[str]:
    if local.is_file():
        return [str(local)]
    for ending in FORMATS:
        found = sorted(map(str, local.rglob(f"*.{ending}"))) if local.is_dir() else []
        if found:
            return found
    return []


def _by_split(files: Sequence[str]) -> dict[str, list[str]]:
    """Files by the split that begins their names or is that of their folder; those of none are to train on."""
    splits: dict[str, list[str]] = {}
    for file in files:
        starts = re.split(r"[-_.]", Path(file).name)[0], Path(file).parent.name
        split = next((start for start in starts if start in ("train", *TEST_SPLITS)), "train")
        splits.setdefault(split, []).append(file)
    return splits


def _image_column(datasets: Any, features: Any, name: str | None) -> str:
    def holds_images(feature: Any) -> bool:
        raw = isinstance(feature, dict) and "bytes" in feature
        return isinstance(feature, datasets.Image) or raw or getattr(feature, "dtype", "") in BINARY

    return _one_column("image", name, features, [key for key, x in features.items() if holds_images(x)])


def _label_column(datasets: Any, features: Any, name: str | None) -> str | None:
    classes = [key for key, x in features.items() if isinstance(x, datasets.ClassLabel)]
    plain = [key for key in LABELS if key in features and getattr(features[key], "dtype", "") in PLAIN_LABELS]
    if name is None and len(classes) != 1:
        classes = [key for key in LABELS if key in classes][:1] or classes or plain[:1]
        if not classes:
            return None
    column = _one_column("label", name, features, classes)
    if column not in classes and getattr(features[column], "dtype", "") not in PLAIN_LABELS:
        raise ValueError(f"data.label_column: {column} holds neither classes nor whole numbers nor words")
    return column


BINARY = {"binary", "large_binary"}
WORDS = {"string", "large_string"}
PLAIN_LABELS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)} | WORDS | {"bool"}


def _one_column(kind: str, name: str | None, features: Any, found: Sequence[str]) -> str:
    if name is not None and name not in features:
        raise ValueError(f"data.{kind}_column: there is no column {name!r}; there are {', '.join(features)}")
    if name is None and len(found) != 1:
        which = ", ".join(found) if found else "none"
        raise ValueError(
            f"the {kind} column is not clear from the types ({which} of {', '.join(features)}); name it by "
            f"data.{kind}_column=..."
        )
    return name if name is not None else found[0]


def _class_names(feature: Any, labels: Sequence[Any]) -> list[str] | None:
    if feature.dtype in WORDS:
        return sorted({x for x in labels if x is not None})
    return getattr(feature, "names", None)


def _numbers(labels: Sequence[Any], classes: Sequence[str] | None) -> Tensor:
    return torch.tensor([_number(label, classes) for label in labels])


def _number(label: Any, classes: Sequence[str] | None) -> int:
    if isinstance(label, str):
        return classes.index(label) if classes is not None and label in classes else UNLABELED
    return UNLABELED if label is None or label < 0 else int(label)


class _Rows:
    """Encoded image of a row; can be sent to another process."""

    def __init__(self, table: Any, column: str) -> None:
        self.table = table.with_format("arrow")
        self.column = column

    def __call__(self, index: int) -> Encoded:
        return _encoded(self.table[index].column(self.column)[0].as_py())


def _encoded(value: Any) -> Encoded:
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if value is None:
        raise ValueError("the row holds no image")
    if isinstance(value, str) and "://" in value:  # within an archive, or on the hub
        from datasets.utils.file_utils import xopen

        with xopen(value, "rb") as file:
            return file.read()  # type: ignore[no-any-return]
    return value  # type: ignore[no-any-return]


class ImageStream(IterableDataset[Any]):
    """Images that arrive one after another, shuffled within a buffer, each with a label or -1.

    Of several processes, and of their workers, each reads a part of its own, and counts in each epoch what it
    cannot read.
    """

    def __init__(
        self,
        table: Any,
        image: str,
        label: str | None,
        classes: Sequence[str] | None,
        shuffle_buffer: int,
        *,
        image_size: int | None,
        channels: int,
        max_unreadable: int,
    ) -> None:
        self.table = table
        self.shuffle_buffer = shuffle_buffer
        self.image = image
        self.label = label
        self.classes = classes
        self.image_size = image_size
        self.channels = channels
        self.max_unreadable = max_unreadable
        # Each worker counts for itself: all have to agree on the order in which the parts are dealt out.
        self.epoch = 0
        self.unreadable = 0

    @property
    def is_labeled(self) -> bool:
        """Whether the images have labels."""
        return self.label is not None

    @property
    def in_order(self) -> Iterator[tuple[Tensor, int]]:
        """The images from the first, not shuffled."""
        return self._decoded(self.table)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        table = self.table
        if self.shuffle_buffer > 1:
            # Not by set_epoch: workers share that number, and adding to it at once makes it wrong.
            table = table.shuffle(seed=self.epoch, buffer_size=self.shuffle_buffer)
        if world_size() > 1:
            from datasets.distributed import split_dataset_by_node

            table = split_dataset_by_node(table, torch.distributed.get_rank(), world_size())
        self.epoch += 1
        self.unreadable = 0
        return self._decoded(table)

    def _decoded(self, table: Any) -> Iterator[tuple[Tensor, int]]:
        for row in table:
            try:
                image = decode(_encoded(row[self.image]), channels=self.channels)
            except Exception as error:
                if not is_broken(error):
                    raise
                self.unreadable += 1
                if self.unreadable > self.max_unreadable:
                    raise UnreadableImagesError(
                        f"{self.unreadable} images of the stream cannot be read, more than max_unreadable="
                        f"{self.max_unreadable}; raise data.max_unreadable, or leave the stream"
                    ) from None
                if self.unreadable & (self.unreadable - 1) == 0:  # the first, the second, the fourth ...
                    warnings.warn(
                        f"images of the stream cannot be read: {self.unreadable}; left out", stacklevel=1
                    )
                continue
            square = image if self.image_size is None else fit_square(image, self.image_size)
            label = None if self.label is None else row[self.label]
            yield pil_to_tensor(square), _number(label, self.classes)
