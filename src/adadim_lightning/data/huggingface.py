"""Data sets of the Hugging Face hub, or local files of that layout."""

import glob
import logging
import os
import re
import socket
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import IterableDataset
from torchvision.transforms.v2.functional import pil_to_tensor

from adadim_lightning.data.decoding import Encoded, check_channels, decode, deep_image, fit_square, is_broken
from adadim_lightning.data.images import ImageFiles, UnreadableImagesError
from adadim_lightning.data.labels import MOST_CLASSES, UNLABELED, Categories, is_missing
from adadim_lightning.data.module import ImageData
from adadim_lightning.data.pixels import SAMPLED, DeepImage, PixelScale, printable
from adadim_lightning.data.splits import first_few, hold_out, image_data
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
    pixel_range: Sequence[float] | None = None,
    in_memory: bool | None = None,
    **options: Any,
) -> ImageData:
    """A data set of the hub by its name, or local files: parquet, arrow, webdataset, or of ``save_to_disk``.

    The columns are found by their types: the one that holds images or pixels, and the one of class labels. Labels
    without names are categories whatever their type: the distinct ones of the training and held-out images are
    numbered in their order; of a stream, those of its held-out images, and others count as missing.

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
            split to hold out the first 10,000 images are kept. Several processes each read the whole stream and
            decode their share.
        shuffle_buffer: of a stream, images among which the next is drawn.
        image_size: side of the square that the images are scaled and cut to; None leaves them.
        channels: 1 or 3.
        max_unreadable: number of training images that may be left out because they cannot be read, and of
            held-out images.
        pixel_range: values of black and white in images of more than 8 bits; None finds them.
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
            "pixel_range": pixel_range,
        }

        def read(split: str) -> _Split:
            found = splits[split]
            found = found._resolve_features() if found.features is None else found  # a stream that does not say
            image = _image_column(datasets, found.features, image_column, label_column)
            label = _label_column(datasets, found.features, label_column, image) if labeled else None
            if not _pixel_type(found.features[image]):
                found = found.cast_column(image, datasets.Image(decode=False))
            return _Split(found.select_columns([image] + ([] if label is None else [label])), image, label)

        def whole(split: str) -> _Split:
            part = read(split)
            if streaming:
                # In Arrow's own types: through Python, ids of 64 bits without a sign are too large.
                rows = list(part.table.with_format("arrow").take(MOST_OF_A_STREAM))
                if not rows:
                    raise ValueError(f"the split {split!r} of {path} is empty")
                part = part._replace(table=datasets.concatenate_datasets([datasets.Dataset(x) for x in rows]))
            return part.with_labels()

        def images(part: _Split, categories: Categories | None) -> ImageFiles:
            unlabeled = torch.full((len(part.table),), UNLABELED)
            labels = unlabeled if categories is None or part.label is None else categories.tensor(part.labels)
            names = None if categories is None else categories.names
            return ImageFiles(_Rows(part.table, part.image), labels, classes=names, **fitting)

        choices = [test_split] if test_split else [x for x in TEST_SPLITS if x in splits and x != train_split]
        training = read(train_split) if streaming else whole(train_split)
        testing: _Split | None = None
        if streaming or test_split or training.is_labeled:
            testing = _first_labeled(map(whole, choices))
        categories = _categories(
            [training] if testing is None else [training, testing], named=label_column is not None
        )
        test = None if testing is None else images(testing, categories)
        train: ImageFiles | ImageStream
        if streaming:
            scale = _scale_of_stream(training, test, fitting.pop("pixel_range"))
            categories = _of_rows(training, categories)
            train = ImageStream(
                training.table,
                training.image,
                None if categories is None and testing is not None else training.label,
                categories,
                shuffle_buffer,
                scale=scale,
                **fitting,
            )
            if training.label is not None and testing is None:
                rank_zero_warn(
                    f"no probes: {path} has no split to hold out, and a stream is not split; data.test_split=... "
                    "names one, eval_data=... brings labeled images"
                )
            # More workers than parts of the stream would have nothing to read.
            workers = options.get("num_workers")
            options["num_workers"] = min(
                8 if workers is None else workers, os.cpu_count() or 1, training.table.num_shards
            )
        else:
            train = images(training, categories)
            if test is None:
                train, test = hold_out(train, held_out)
    title = Path(path).name if len(Path(path).parts) > 2 else path
    return image_data(train, test, in_memory=in_memory, title=title, **options)


class _Split(NamedTuple):
    """A split: its rows, its columns of images and of labels, and the labels, where they can be read at once."""

    table: Any
    image: str
    label: str | None
    labels: Sequence[Any] = ()

    @property
    def is_labeled(self) -> bool:
        """Whether any image has a label."""
        return not all(map(is_missing, self.labels))

    @property
    def names(self) -> list[str] | None:
        """Names of the classes, where their column has them."""
        return None if self.label is None else getattr(self.table.features[self.label], "names", None)

    def with_labels(self) -> "_Split":
        """The split and its labels; those of named classes by their names, whose order may differ."""
        if self.label is None:
            return self
        labels, names = list(self.table[self.label]), self.names
        if names is not None:
            beyond = max((x for x in labels if x is not None), default=UNLABELED)
            if beyond >= len(names):
                raise ValueError(
                    f"data.label_column: {self.label} has the class {beyond}, but names of {len(names)} classes, "
                    "from 0; mend its features, or set data.labeled=false"
                )
            labels = [None if x is None or x < 0 else names[x] for x in labels]
        return self._replace(labels=labels)


def _categories(parts: Sequence[_Split], *, named: bool) -> Categories | None:
    """The classes of all parts together; None where there are no labels, or none that can be classes."""
    names = list(dict.fromkeys(name for part in parts for name in part.names or ()))
    if names:
        return Categories({name: i for i, name in enumerate(names)}, names)
    column = next((part.label for part in parts if part.label is not None), None)
    labels = [label for part in parts for label in part.labels]
    if column is None or not labels:
        return None
    try:
        found = Categories.of(labels)
    except ValueError as error:
        if named:
            raise ValueError(
                f"data.label_column: {column} {error}; name another column, or set data.labeled=false"
            ) from None
        rank_zero_warn(f"no labels: the column {column} {error}; data.label_column=... names another")
        return None
    if named and not found.numbers:
        raise ValueError(f"data.label_column: {column} is empty; name another column, or set data.labeled=false")
    return found


def _first_labeled(splits: Iterable[_Split]) -> _Split | None:
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


def _image_column(datasets: Any, features: Any, name: str | None, label: str | None) -> str:
    def is_encoded(feature: Any) -> bool:
        raw = isinstance(feature, dict) and "bytes" in feature
        return isinstance(feature, datasets.Image) or raw or getattr(feature, "dtype", "") in BINARY

    encoded = [key for key, x in features.items() if is_encoded(x) and key != label]
    arrays = [key for key, x in features.items() if _pixel_type(x) and not _inner(x)]
    column = _one_column("image", name, features, encoded or arrays)
    feature = features[column]
    if not (is_encoded(feature) or _pixel_type(feature) or getattr(feature, "dtype", "") in WORDS):
        raise ValueError(f"data.image_column: {column} holds neither images, nor their files, nor pixels")
    return column


def _inner(feature: Any) -> Any:
    """The feature of a list's entries; None of what is no list."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


def _pixel_type(feature: Any) -> str | None:
    """The type of the numbers of arrays and of lists of lists; None of other columns."""
    depth = 0
    while _inner(feature) is not None:
        feature, depth = _inner(feature), depth + 1
    shape = getattr(feature, "shape", None)
    dtype = str(getattr(feature, "dtype", ""))
    return dtype if (depth > 1 or shape is not None) and PIXELS.fullmatch(dtype) else None


def _label_column(datasets: Any, features: Any, name: str | None, image: str) -> str | None:
    def can_be_labels(key: str) -> bool:
        feature = features[key]
        one = _inner(feature) or feature
        plain = not hasattr(one, "shape") and _inner(one) is None
        return key != image and plain and str(getattr(one, "dtype", "")).startswith(LABEL_TYPES)

    classes = [key for key, x in features.items() if isinstance(x, datasets.ClassLabel)]
    usual = [key for key in LABELS if key in features]
    plain = [key for key in usual if can_be_labels(key)]
    if name is None and len(classes) != 1:
        classes = [key for key in LABELS if key in classes][:1] or classes or plain[:1]
        if not classes:
            others = [key for key in features if key != image]
            if others:
                rank_zero_warn(
                    f"no column is taken for labels (there are {first_few([printable(x) for x in others])}); "
                    "data.label_column=... names one, data.labeled=false wants none"
                )
            return None
    column = _one_column("label", name, features, classes)
    if column not in classes and not can_be_labels(column):
        raise ValueError(
            f"data.label_column: {column} holds neither classes, nor numbers, words or dates that could be such"
        )
    return column


BINARY = {"binary", "large_binary"}
WORDS = {"string", "large_string"}
LABEL_TYPES = (
    *("int", "uint", "bool", "float", "double", "decimal", "string", "large_string", "binary", "large_binary"),
    *("date", "timestamp", "null"),
)
PIXELS = re.compile(r"u?int(8|16|32|64)|float(16|32|64)|double|bool")


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


def _of_rows(part: _Split, categories: Categories | None) -> Categories | None:
    """The categories by the labels that are in the rows: named classes are written as numbers there."""
    if categories is None or part.names is None:
        return categories
    numbers = {i: categories.numbers[name] for i, name in enumerate(part.names)}
    return Categories(numbers, categories.names)


def _scale_of_stream(training: _Split, test: ImageFiles | None, pixel_range: Sequence[float] | None) -> PixelScale:
    """The scale of a stream's pixels, of its held-out images and its first rows."""
    first: list[DeepImage] = [] if test is None else list(test.deep_sample())
    dtype = _pixel_type(training.table.features[training.image])
    for row in training.table.take(SAMPLED):
        with suppress(Exception):  # counted where it is decoded
            image = deep_image(_encoded(row[training.image], dtype), "an image of the stream")
            first += [] if image is None else [image]
    return PixelScale.of(first, pixel_range)


class _Rows:
    """Encoded image or pixels of a row; can be sent to another process."""

    def __init__(self, table: Any, column: str) -> None:
        self.dtype = _pixel_type(table.features[column])
        self.table = table.with_format("arrow")
        self.column = column

    def __call__(self, index: int) -> Encoded:
        return _encoded(self.table[index].column(self.column)[0].as_py(), self.dtype)


def _is_empty(value: Any) -> bool:
    """Whether a row's entry holds no picture."""
    return value is None or (isinstance(value, dict) and value.get("bytes") is None and value.get("path") is None)


def _encoded(value: Any, dtype: str | None = None) -> Encoded:
    """What can be decoded of a row's entry; pixels of a type, if it holds such."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if value is None:
        raise ValueError("the row holds no image")
    if dtype is not None:
        try:
            return np.asarray(value, dtype)
        except TypeError:  # integers cannot be NaN
            raise ValueError("some of its pixels are missing") from None
    if isinstance(value, str) and "://" in value:  # within an archive, or on the hub
        from datasets.utils.file_utils import xopen

        with xopen(value, "rb") as file:
            return file.read()  # type: ignore[no-any-return]
    return value  # type: ignore[no-any-return]


class ImageStream(IterableDataset[Any]):
    """Images that arrive one after another, shuffled within a buffer, each with a label or -1.

    Every loader worker reads files of its own. Every process reads all of them and takes one of as many rows as
    there are processes, so that all get equally many, however the rows are spread over the files. Each counts in
    each epoch what it cannot read.
    """

    def __init__(
        self,
        table: Any,
        image: str,
        label: str | None,
        categories: Categories | None,
        shuffle_buffer: int,
        *,
        scale: PixelScale,
        image_size: int | None,
        channels: int,
        max_unreadable: int,
    ) -> None:
        self.table = table
        self.shuffle_buffer = shuffle_buffer
        self.image = image
        self.label = label
        self.categories = categories
        self.scale = scale
        self.image_size = image_size
        self.channels = channels
        self.max_unreadable = max_unreadable
        # Each worker counts for itself: all have to agree on the order in which the parts are dealt out.
        self.epoch = 0
        self.share = 0, 1  # rank, and number of processes; workers that were spawned cannot ask for it
        self.unreadable = 0
        self._warned = False

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
        self.epoch += 1
        self.unreadable = 0
        return self._decoded(self._dealt(table))

    def _dealt(self, rows: Iterable[Any]) -> Iterator[Any]:
        """This process's rows, of those with a picture; the last, incomplete round is left out."""
        rank, processes = self.share
        dealt: list[Any] = []
        for row in rows:
            if _is_empty(row[self.image]):
                self._leave_out()
                continue
            dealt.append(row)
            if len(dealt) == processes:
                yield dealt[rank]
                # Whoever is first is last in the next round: faults may lie at every second row.
                rank = (rank + 1) % processes
                dealt = []

    def _leave_out(self) -> None:
        self.unreadable += 1
        if self.unreadable > self.max_unreadable:
            raise UnreadableImagesError(
                f"{self.unreadable} images of the stream cannot be read, more than max_unreadable="
                f"{self.max_unreadable}; raise data.max_unreadable, or leave the stream"
            )
        if self.unreadable & (self.unreadable - 1) == 0:  # the first, the second, the fourth ...
            warnings.warn(f"images of the stream cannot be read: {self.unreadable}; left out", stacklevel=1)

    def _decoded(self, rows: Iterable[Any]) -> Iterator[tuple[Tensor, int]]:
        dtype = _pixel_type(self.table.features[self.image])
        for row in rows:
            try:
                source = _encoded(row[self.image], dtype)
                image = decode(source, channels=self.channels, scale=self.scale)
            except Exception as error:
                if not is_broken(error):
                    raise
                image = None
            if image is None:  # outside of the handler, or the error would be part of the next
                self._leave_out()
                continue
            square = image if self.image_size is None else fit_square(image, self.image_size)
            yield pil_to_tensor(square), self._number(row)

    def _number(self, row: Any) -> int:
        label = None if self.label is None else row[self.label]
        if self.categories is None:  # nothing is scored
            return label if isinstance(label, int) and 0 <= label < MOST_CLASSES else UNLABELED
        number = self.categories.number(label)
        if number == UNLABELED and not is_missing(label) and not self._warned:
            self._warned = True
            warnings.warn(
                f"labels of the stream that no held-out image has, such as {printable(label)}, count as missing",
                stacklevel=1,
            )
        return number
