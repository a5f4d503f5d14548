"""Labels are categories: distinct values, whatever their type, are numbered in a fixed order."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

UNLABELED = -1
MOST_CLASSES = 50_000
FEW = 100  # so many classes may have an image each


@dataclass(frozen=True)
class Categories:
    """Numbers of the distinct labels of a set.

    Attributes:
        numbers: number of each label.
        names: name of each number; None where labels are such numbers already.
    """

    numbers: Mapping[Any, int]
    names: Sequence[str] | None

    @classmethod
    def of(cls, labels: Iterable[Any]) -> "Categories":
        """Number the distinct labels: 0, 1, ... stay as they are, others are numbered in their order.

        Integers, words, bytes, booleans, dates, decimals, and floats; what is missing (None, NaN, an empty
        word, and -1 beside labels of 0 and above) has no number.

        Raises:
            ValueError: there are too many distinct labels for categories; the message begins with a verb.

        Example:
            >>> Categories.of([2_480_137, 2_480_000, None, 2_480_137]).names
            ['2480000', '2480137']
        """
        counts = Counter(_value(label) for label in labels)
        for empty in [x for x in counts if _is_empty(x)]:
            del counts[empty]
        if UNLABELED in counts and set(counts) != {-1, 1} and all(_is_count(x) for x in counts if x != UNLABELED):
            del counts[UNLABELED]
        _check_few(counts)
        distinct = sorted(counts, key=lambda x: (isinstance(x, str), x) if _is_plain(x) else (True, str(x)))
        same = distinct == list(range(len(distinct)))
        return cls({x: i for i, x in enumerate(distinct)}, None if same else [str(x) for x in distinct])

    def number(self, label: Any) -> int:
        """The number of a label; -1 for one that is missing or not known."""
        return self.numbers.get(_value(label), UNLABELED)

    def tensor(self, labels: Iterable[Any]) -> Tensor:
        """The numbers of labels, int64."""
        return torch.tensor([self.number(label) for label in labels], dtype=torch.int64)


def is_missing(label: Any) -> bool:
    """Whether an entry of a column says that there is no label; -1 says so, whatever stands beside it."""
    try:
        value = _value(label)
    except ValueError:  # several values
        return False
    return _is_empty(value) or bool(value == UNLABELED)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _is_plain(label: Any) -> bool:
    return isinstance(label, int | float | str)


def _is_count(label: Any) -> bool:
    return isinstance(label, int) and label >= 0


def _value(label: Any) -> Any:
    """A label as one hashable value, equal for equal categories; None where it is missing."""
    if isinstance(label, list | tuple):
        if len(label) > 1:
            raise ValueError("has several values for one image; labels are categories, one an image")
        label = label[0] if label else None
    if hasattr(label, "item"):  # of NumPy and PyTorch
        label = label.item()
    if isinstance(label, bool):
        return int(label)
    if isinstance(label, bytes):
        return label.decode(errors="backslashreplace")
    if isinstance(label, float | Decimal):
        if math.isnan(label):
            return None
        return int(label) if math.isfinite(label) and label == int(label) else float(label)
    return label if label == label else None  # a date that is missing differs from itself


def _check_few(counts: Counter[Any]) -> None:
    """Raise ValueError if there are too many distinct labels."""
    classes, images = len(counts), counts.total()
    broken = next((x for x in counts if isinstance(x, float)), None)
    if classes > MOST_CLASSES or (2 * classes > images and (classes > FEW or broken is not None)):
        such = "" if broken is None else f", such as {broken:g}"
        raise ValueError(f"has {classes:,} different values{such} in {images:,} images; labels are categories")
