"""Data sets of the Hugging Face hub, or local files of that layout."""

import glob
import itertools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from torchvision.transforms.v2.functional import pil_to_tensor

from adadim_lightning.data.images import (
    UNLABELED,
    Encoded,
    ImageFiles,
    UnreadableImagesError,
    check_channels,
    decode,
    fit_square,
    is_broken,
)
from adadim_lightning.data.module import ImageData
from adadim_lightning.data.splits import hold_out, image_data
from adadim_lightning.distributed import world_size
from adadim_lightning.extras import require

LABELS = ("label", "labels", "fine_label", "target", "class", "y")
TEST_SPLITS = ("test", "validation", "valid", "val")
FORMATS = {"parquet": "parquet", "arrow": "arrow", "csv": "csv", "json": "json", "jsonl": "json", "tar": "webdataset"}
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
    """A data set of the hub by its name, or local files: parquet, arrow, webdataset, or what ``save_to_disk`` wrote.

    The columns are found by their types: the one that holds images, and the one of class labels.

    Args:
        path: name on the hub; or a file, a folder, or a pattern with ``*``, whose files are named after their
            splits (``train-00000.parquet``).
        name: configuration of the data set.
        train_split: split to train on.
        test_split: split to hold out; None takes ``test`` or ``validation``, or holds a part of the training
            images out.
        image_column: column of the images, where there are several.
        label_column: column of the labels, where there are several or they are plain numbers or words.
        labeled: False leaves labels alone.
        held_out: the share that is held out where there is no split for that.
        streaming: read while training, without a download of the whole; needs ``trainer.max_steps``.
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
    splits = _load(datasets, path, name, streaming)
    if train_split not in splits:
        raise ValueError(f"{path} has no split {train_split!r}; it has {', '.join(splits)}")
    if test_split is None:
        test_split = next((x for x in TEST_SPLITS if x in splits and x != train_split), None)
    elif test_split not in splits:
        raise ValueError(f"{path} has no split {test_split!r}; it has {', '.join(splits)}")
    fitting = {"image_size": image_size, "channels": channels, "max_unreadable": max_unreadable}

    def table(split: str, *, rows: int | None = None) -> tuple[Any, str, str | None, list[str] | None]:
        found = splits[split]
        features = found.features
        if features is None:  # a stream that does not say
            found = found._resolve_features()
            features = found.features
        image = _image_column(datasets, features, image_column)
        label = _label_column(datasets, features, label_column) if labeled else None
        found = found.cast_column(image, datasets.Image(decode=False))
        if rows is not None:
            found = datasets.Dataset.from_list(list(itertools.islice(found, rows)), features=found.features)
        names = None if label is None else getattr(features[label], "names", None)
        if label is not None and names is None and features[label].dtype == "string" and not streaming:
            names = sorted(set(splits[train_split][label]))
        return found.select_columns([image] + ([] if label is None else [label])), image, label, names

    def images(split: str, *, rows: int | None = None) -> ImageFiles:
        found, image, label, names = table(split, rows=rows)
        labels = None if label is None else _numbers(found[label], names)
        labels = torch.full((len(found),), UNLABELED) if labels is None else labels
        return ImageFiles(_Rows(found, image), labels, classes=names, **fitting)  # type: ignore[arg-type]

    title = Path(path).name if len(Path(path).parts) > 2 else path
    if streaming:
        found, image, label, names = table(train_split)
        train = ImageStream(found, image, label, names, shuffle_buffer, **fitting)
        test = None if test_split is None else images(test_split, rows=MOST_OF_A_STREAM)
        return image_data(train, test, in_memory=in_memory, title=title, **options)
    whole = images(train_split)
    if test_split is not None:
        return image_data(whole, images(test_split), in_memory=in_memory, title=title, **options)
    train, test = hold_out(whole, held_out) if whole.is_labeled and held_out > 0 else (whole, None)
    return image_data(train, test, in_memory=in_memory, title=title, **options)


def _load(datasets: Any, path: str, name: str | None, streaming: bool) -> dict[str, Any]:
    """The splits of a data set."""
    local = Path(path).expanduser()
    try:
        if (local / "dataset_dict.json").exists() or (local / "state.json").exists():
            found = datasets.load_from_disk(str(local))
            return dict(found) if isinstance(found, dict) else {"train": found}
        files = sorted(glob.glob(str(local))) if "*" in path else _files(local)
        if files:
            kind = FORMATS[Path(files[0]).suffix[1:]]
            found = datasets.load_dataset(kind, data_files=_by_split(files), streaming=streaming)
        elif "*" in path or local.exists() or path.startswith((".", "/", "~")):
            raise ValueError(f"no file at {path} ends in {', '.join(FORMATS)}; folders of images are for data=folder")
        else:
            found = datasets.load_dataset(path, name, streaming=streaming)
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the data set {path} cannot be loaded: {type(error).__name__}: {reason}") from error
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
    """Files by the split that begins their names; those that begin with none are to train on."""
    splits: dict[str, list[str]] = {}
    for file in files:
        start = Path(file).name.replace("_", "-").replace(".", "-").partition("-")[0]
        splits.setdefault(start if start in ("train", *TEST_SPLITS) else "train", []).append(file)
    return splits


def _image_column(datasets: Any, features: Any, name: str | None) -> str:
    def holds_images(feature: Any) -> bool:
        raw = isinstance(feature, dict) and "bytes" in feature
        return isinstance(feature, datasets.Image) or raw or getattr(feature, "dtype", None) == "binary"

    return _one_column("image", name, features, [key for key, x in features.items() if holds_images(x)])


def _label_column(datasets: Any, features: Any, name: str | None) -> str | None:
    classes = [key for key, x in features.items() if isinstance(x, datasets.ClassLabel)]
    plain = [key for key in LABELS if key in features and getattr(features[key], "dtype", "") in PLAIN_LABELS]
    if name is None and len(classes) != 1:
        classes = [key for key in LABELS if key in classes][:1] or classes or plain[:1]
        if not classes:
            return None
    return _one_column("label", name, features, classes)


PLAIN_LABELS = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "string"}


def _one_column(kind: str, name: str | None, features: Any, found: Sequence[str]) -> str:
    if name is not None and name not in features:
        raise ValueError(f"there is no column {name!r}; there are {', '.join(features)}")
    if name is None and len(found) != 1:
        which = ", ".join(found) if found else "none"
        raise ValueError(
            f"the {kind} column is not clear from the types ({which} of {', '.join(features)}); name it by "
            f"data.{kind}_column=..."
        )
    return name if name is not None else found[0]


def _numbers(labels: Any, names: Sequence[str] | None) -> Tensor:
    labels = list(labels)
    if labels and isinstance(labels[0], str):
        assert names is not None
        index = {name: i for i, name in enumerate(names)}
        return torch.tensor([index.get(x, UNLABELED) for x in labels])
    return torch.tensor([UNLABELED if x is None else int(x) for x in labels])


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
    return value  # type: ignore[no-any-return]


class ImageStream(IterableDataset[Any]):
    """Images that arrive one after another, shuffled within a buffer, each with a label or -1.

    Of several processes, and of their workers, each reads a part of its own.
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
        self.table = table.shuffle(seed=0, buffer_size=shuffle_buffer) if shuffle_buffer > 1 else table
        self.image = image
        self.label = label
        self.classes = classes
        self.image_size = image_size
        self.channels = channels
        self.max_unreadable = max_unreadable
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def is_labeled(self) -> bool:
        """Whether the images have labels."""
        return self.label is not None

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        table = self.table
        if world_size() > 1:
            from datasets.distributed import split_dataset_by_node

            table = split_dataset_by_node(table, torch.distributed.get_rank(), world_size())
        table.set_epoch(int(self.epoch))
        self.epoch += 1
        unreadable = 0
        for row in table:
            try:
                image = decode(_encoded(row[self.image]), channels=self.channels)
            except Exception as error:
                if not is_broken(error):
                    raise
                unreadable += 1
                if unreadable > self.max_unreadable:
                    raise UnreadableImagesError(
                        f"{unreadable} images of the stream cannot be read, more than "
                        f"max_unreadable={self.max_unreadable}"
                    ) from None
                warnings.warn(f"an image of the stream cannot be read; left out, {unreadable} so far", stacklevel=1)
                continue
            square = image if self.image_size is None else fit_square(image, self.image_size)
            label = None if self.label is None else row[self.label]
            if isinstance(label, str):
                label = None
            yield pil_to_tensor(square), UNLABELED if label is None else int(label)
