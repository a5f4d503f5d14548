"""Finds the labels of a batch, and the number of classes of a data set."""

import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from adadim_lightning.distributed import world_size
from adadim_lightning.feed import images_of

LABEL_KEYS = ("label", "labels", "target", "targets", "y")
INDEX_KEYS = ("i", "id", "ids", "idx", "idxs", "index", "indexes", "indices")

Labels = str | int | Callable[[Any], Tensor]
"""Where the labels of a batch are: a key or a position in it, or a function of it."""

Classes = Callable[[], int | None]

NEEDED = "a probe needs batches (images, labels) with one class number for each image"
NONE = "there are no labels"

Place = tuple[Hashable, ...]  # keys and positions, from the batch down


class _Leaf(NamedTuple):
    """One entry of a batch.

    Attributes:
        place: where it stands.
        value: the entry itself.
        keyed: whether it stands in a dictionary, where its position means nothing.
    """

    place: Place
    value: Any
    keyed: bool

    @property
    def name(self) -> str:
        """Its place, as in code."""
        return "batch" + "".join(f"[{part!r}]" for part in self.place)


def _kind(x: Any) -> str:
    if isinstance(x, Tensor | np.ndarray):
        return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
    if isinstance(x, list | tuple) and x:
        return f"{type(x).__name__} of {len(x)} {type(x[0]).__name__}"
    return type(x).__name__


def _leaves(batch: Any, place: Place = (), keyed: bool = False) -> Iterator[_Leaf]:
    entries: Any
    if isinstance(batch, Mapping):
        entries, keyed = batch.items(), True
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        entries, keyed = zip(batch._fields, batch, strict=True), False
    elif isinstance(batch, list | tuple) and not all(isinstance(x, str | int) for x in batch):
        entries, keyed = enumerate(batch), False
    else:
        yield _Leaf(place, batch, keyed)
        return
    for key, value in entries:
        yield from _leaves(value, (*place, key), keyed)


def _column(x: Any) -> Tensor | None:
    """Class numbers, shape ``(N,)``, if that is what an entry holds."""
    if isinstance(x, np.ndarray) and x.dtype.kind in "iub":
        x = torch.from_numpy(x.astype(np.int64))
    elif isinstance(x, list | tuple) and x and all(isinstance(y, int) for y in x):
        x = torch.tensor(x)
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex():
        return None
    return x.flatten().long() if x.ndim > 0 and len(x) and x.shape[1:].numel() == 1 else None


def _repeats(column: Tensor) -> Tensor:
    """Whether two images have the same value, without a look at it."""
    return (column.sort().values.diff() == 0).any()


class _Choice(NamedTuple):
    """Where the labels of a layout are.

    Attributes:
        place: of the labels.
        ignored: places of integers that are the index of the images, so that none may repeat within a batch.
        problem: message if one does.
    """

    place: Place
    ignored: list[Place]
    problem: str


class LabelReader:
    """Reads the labels of batches, of one layout or several, and refuses to guess.

    Labels are looked for under a usual name, else among the integers of the batch, one for each image. Which of
    several they are is decided by the first batch of its layout: no label reaches the number of classes, and
    while the index of an image never repeats within a batch, labels do. Later batches must bear that out.

    Args:
        where: place of the labels, if it is given.
        owner: name of the callback, for messages.
    """

    def __init__(self, where: Labels | None, owner: str) -> None:
        self.where = where
        self._owner = owner
        self.views = 1  # of each image, in the batch that was read last
        self.forget()

    def forget(self) -> None:
        """Forget what batches looked like, before others come."""
        self._choices: dict[Hashable, _Choice] = {}
        self._repeated: dict[Hashable, Tensor] = {}
        self._guessed = False

    def read(self, batch: Any, rows: int, source: Hashable, classes: Classes) -> Tensor:
        """Return the labels of a batch, repeated for each of the views stacked in its rows.

        Args:
            batch: the batch.
            rows: number of rows of R.
            source: where it comes from; batches of different sources may be laid out differently.
            classes: gives the number of classes, where it is known.

        Raises:
            ValueError: the batch has no labels, not one for each image, or several columns that could be them.
        """
        labels = self._named(batch) if self.where is not None else self._found(batch, rows, source, classes)
        if rows % len(labels):
            raise ValueError(self._problem(batch, f"there are {len(labels)} labels for {rows} rows of R"))
        self.views = rows // len(labels)
        return labels.repeat(self.views)

    def check(self) -> None:
        """Raise ValueError if what was taken for the index of the images has repeated within a batch."""
        for layout, repeated in self._repeated.items():
            if repeated:
                raise ValueError(self._choices[layout].problem)

    def check_shared(self, labels: Tensor, views: int) -> None:
        """Raise ValueError if labels whose place was guessed look like the index of the images: all differ."""
        images = len(labels) // views
        # A distributed sampler may repeat an image for each further process.
        if self._guessed and images > 32 and len(torch.unique(labels)) > images - world_size():
            raise ValueError(
                f"no two of {images} images share a label, so these look like the index of each image; say where "
                f"the labels are by labels=... of {self._owner}: a key, a position or a function"
            )

    def _named(self, batch: Any) -> Tensor:
        where = self.where
        if callable(where):
            found, label = where(batch), f"the function {getattr(where, '__name__', where)!r} of labels="
        else:
            label = f"labels={where!r}"
            try:
                field = isinstance(where, str) and hasattr(batch, "_fields")
                found = getattr(batch, str(where)) if field else batch[where]
            except (KeyError, IndexError, TypeError, AttributeError):
                raise ValueError(
                    f"the batches ({type(batch).__name__}) have no {where!r}, given by labels=; they hold "
                    f"{_listed(batch)}"
                ) from None
        if (labels := _column(found)) is None:
            raise ValueError(self._problem(batch, f"{label} gives {_kind(found)}"))
        return labels

    def _found(self, batch: Any, rows: int, source: Hashable, classes: Classes) -> Tensor:
        leaves = {x.place: x for x in _leaves(batch)}
        kinds = tuple(
            (place, str(getattr(x.value, "dtype", type(x.value))), getattr(x.value, "ndim", 0))
            for place, x in leaves.items()
        )
        layout = (source, kinds)
        if layout not in self._choices:
            self._choices[layout] = self._choose(batch, leaves, rows, classes)
        choice = self._choices[layout]
        for place in choice.ignored:
            if (column := _column(leaves[place].value)) is not None:
                repeats = _repeats(column)
                self._repeated[layout] = self._repeated.get(layout, repeats) | repeats
        labels = _column(leaves[choice.place].value)
        if labels is None:  # no entry at all
            raise ValueError(self._problem(batch, NONE))
        return labels

    def _choose(self, batch: Any, leaves: dict[Place, _Leaf], rows: int, classes: Classes) -> _Choice:
        # Of several data sets in one batch it is not known whose rows these are.
        if len({len(images) for images in images_of(batch)}) > 1:
            raise ValueError(self._problem(batch, "its tensors differ in length"))
        columns = {
            place: column
            for place, x in leaves.items()
            if (column := _column(x.value)) is not None and rows % len(column) == 0
        }
        unclear = self._problem(batch, "it is not clear which of these are the labels")
        found = [x for key in LABEL_KEYS for x in columns if x and x[-1] == key]
        ignored: list[Place] = []
        if not found:
            found = [x for x in columns if not (leaves[x].keyed or (x and str(x[-1]).lower() in INDEX_KEYS))]
            self._guessed |= bool(found)
            if len(found) > 1 and (count := classes()):
                found = [x for x in found if columns[x].max() < count] or found
            shared = [x for x in found if _repeats(columns[x])]
            if shared:
                found, ignored = shared, [x for x in found if x not in shared]
            elif found:
                # In small batches labels may be all different; what stands before the images is an index.
                order = list(leaves)
                images = [x for x in order if getattr(leaves[x].value, "ndim", 0) > 1 and x not in columns]
                found = [x for x in found if images and order.index(x) > order.index(images[0])]
                others = (x.value for place, x in leaves.items() if place not in columns)
                if not found or any(_remedy(x) for x in others):
                    raise ValueError(unclear)
        if not found:
            raise ValueError(self._problem(batch, NONE))
        if not all(torch.equal(columns[x], columns[found[0]]) for x in found):
            raise ValueError(unclear)
        return _Choice(found[0], ignored, unclear)

    def _problem(self, batch: Any, reason: str) -> str:
        remedies = ((x, _remedy(x.value)) for x in _leaves(batch))
        advice = next((f" such as lambda batch: {x.name}.{remedy}" for x, remedy in remedies if remedy), "")
        return (
            f"{NEEDED}, but {reason}: {_listed(batch)}; say where they are by labels=..., a key, a position or a "
            f"function{advice}, give {self._owner} labeled data of its own by train_loader=..., or leave the "
            "probe out to train without labels"
        )


def _remedy(x: Any) -> str | None:
    """Return what makes class numbers of floats or of one-hot rows."""
    if not isinstance(x, Tensor) or x.is_complex() or not x.numel():
        return None
    if x.ndim == 1 and x.is_floating_point():
        return "long()"
    one_hot = x.ndim == 2 and x.shape[1] > 1 and bool(((x == 0) | (x == 1)).all() & (x.sum(1) == 1).all())
    return "argmax(1)" if one_hot else None


def _listed(batch: Any) -> str:
    leaves = [f"{leaf.name}: {_kind(leaf.value)}" for leaf in _leaves(batch)]
    return ", ".join(leaves[:12]) + (f" and {len(leaves) - 12} more" if len(leaves) > 12 else "")


def _number(x: Any) -> int | None:
    """The integer that something is, of whatever library."""
    if isinstance(x, bool) or callable(x):
        return None
    try:
        return operator.index(x)
    except (TypeError, ValueError):
        return None


def count_classes(source: Any) -> int | None:
    """Number of classes that a data module or a data set names."""
    for name in ("num_classes", "classes"):
        value = getattr(source, name, None)
        if (count := _number(value)) is not None:
            return count
        if name == "classes" and isinstance(value, Sized):
            return len(value)
    features = getattr(source, "features", None)  # a Hugging Face data set
    if isinstance(features, Mapping):
        for key in LABEL_KEYS:
            if (count := _number(getattr(features.get(key), "num_classes", None))) is not None:
                return count
    for name in ("labels", "targets"):
        labels = getattr(source, name, None)
        if isinstance(labels, Tensor | np.ndarray | list) and len(labels) and not isinstance(labels[0], str):
            return int(torch.as_tensor(labels).max()) + 1
    inner = getattr(source, "dataset", None)  # a subset, or a data set with transforms around another
    return None if inner is None else count_classes(inner)


def find_num_classes(trainer: Trainer) -> int | None:
    """Number of classes that the data module or the training set names, if one of them does."""
    for source in (getattr(trainer, "datamodule", None), getattr(trainer.train_dataloader, "dataset", None)):
        if (count := count_classes(source)) is not None:
            return count
    return None
