"""Pixel values of more than 8 bits: one scale to black and white for all images of a set."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

WHITES = {
    "16-bit": (65535,),
    "signed 8-bit": (127,),
    "signed 16-bit": (255, 32767),
    "integer": (255, 65535),
    "float": (1, 255, 65535),
}
"""Usual values of white, by how the pixels are stored; black is 0."""

OVERSHOOT = 0.05  # of the range, by floats; resizing leaves such
LEAST_USED = 0.25  # of the range, by the middle 99 % of an image's pixels; most images use more
SAMPLED = 64  # images of each part of a set


class DataError(ValueError):
    """Something is wrong with the data; one line says what, also on its way out of a loader's worker."""

    def __init__(self, message: str) -> None:
        # A loader raises anew what a worker raised, with the worker's whole traceback for a message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def printable(name: object) -> str:
    """A name without line breaks, and without what would move the cursor or color the terminal."""
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in str(name))


class DeepImage(NamedTuple):
    """An image of more than 8 bits.

    Attributes:
        name: for messages.
        pixels: as they are stored.
        upper_bits: only the upper eight of 16 bits can be read, and no scale applies.
    """

    name: str
    pixels: np.ndarray[Any, Any]
    upper_bits: bool = False


class _Extent(NamedTuple):
    """Finite pixel values of an image: extremes, middle 99 %, and that of what is neither extreme."""

    name: str
    low: float
    high: float
    bulk_low: float
    bulk_high: float
    inner_low: float
    inner_high: float


@dataclass(frozen=True)
class PixelScale:
    """Scale from the pixel values of a set to 8 bits; the same for all its images.

    Attributes:
        given: values of black and white, whatever the images hold; values beyond are cut off.
        whites: else the value of white, by how the pixels are stored.
    """

    given: tuple[float, float] | None = None
    whites: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, images: Iterable[DeepImage], given: Sequence[float] | None = None) -> "PixelScale":
        """Find the scale of a set from some of its images.

        White is the first usual value that no image exceeds: 65535 for 16-bit images, 127 for signed 8-bit ones,
        255 or 32767 for signed 16-bit ones, 255 or 65535 for wider integers, and 1, 255 or 65535 for floats.
        Pixels that are not finite do not count.

        Args:
            images: some images, those of more than 8 bits.
            given: values of black and white; None finds them.

        Raises:
            DataError: the images fit no usual range, differ in it, or most use less than a quarter of it; the
                message names a file, its range, and the setting.
        """
        extents: dict[str, list[_Extent]] = {}
        upper: list[_Extent] = []
        for image in images:
            if image.upper_bits:
                upper.append(_extent(image))
            elif np.isfinite(image.pixels).any():
                extents.setdefault(_kind(image.pixels), []).append(_extent(image))
        _check_upper_bits(upper)
        if given is not None:
            black, white = check_pixel_range(given)
            _check_not_flat([x for several in extents.values() for x in several], black, white)
            return cls((black, white))
        return cls(whites={kind: _white(kind, several) for kind, several in extents.items()})

    def to_bytes(self, pixels: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
        """Scale an image to 8 bits; pixels that are not finite are black.

        Args:
            pixels: of any shape, of more than 8 bits.
            name: of the image, for messages.

        Raises:
            DataError: the image does not fit the scale.
            ValueError: no pixel is finite.
        """
        if self.given is None:
            black, white = 0.0, float(self._white_of(pixels, name))
        else:
            black, white = self.given
        values = np.asarray(pixels, np.float64)
        finite = np.isfinite(values)
        if not finite.any():
            raise ValueError("no pixel is a finite number")
        with np.errstate(all="ignore"):
            levels = np.clip((values - black) * (255 / (white - black)), 0, 255)
        return np.where(finite, np.rint(levels), 0).astype(np.uint8)

    def _white_of(self, pixels: np.ndarray[Any, Any], name: str) -> int:
        kind = _kind(pixels)
        white = self.whites.get(kind)
        if kind == "16-bit" and white is not None:
            return white  # nothing of 16 bits exceeds it
        extent = _extent(DeepImage(name, pixels))
        if white is not None:
            _check_alike(kind, extent, white)
            return white
        if kind == "16-bit":
            return _white(kind, [extent])
        raise DataError(f"{_range(extent)}, of type {kind}, unlike those looked at first; {_advice(extent)}")


def check_pixel_range(given: Sequence[float]) -> tuple[float, float]:
    """Return the values of black and white; raise ValueError unless they are two numbers, the smaller first."""
    numbers = [x for x in given if isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)]
    if len(given) != 2 or len(numbers) != 2 or not given[0] < given[1]:
        raise ValueError(f"pixel_range must be the values of black and white, such as [0,4095], got {given!r}")
    return float(given[0]), float(given[1])


def _kind(pixels: np.ndarray[Any, Any]) -> str:
    if pixels.dtype.kind == "f":
        return "float"
    bits = 8 * pixels.dtype.itemsize
    if bits > 16:
        return "integer"
    return f"{bits}-bit" if pixels.dtype.kind == "u" else f"signed {bits}-bit"


def _extent(image: DeepImage) -> _Extent:
    values = np.asarray(image.pixels, np.float64).ravel()
    values = values[np.isfinite(values)]
    if not len(values):
        raise ValueError("no pixel is a finite number")
    low, high = float(values.min()), float(values.max())
    some = values[:: max(1, len(values) // 2**18)]
    inner = some[(some > low) & (some < high)]
    return _Extent(image.name, low, high, *_middle(some), *_middle(inner if len(inner) else some))


def _middle(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    low, high = np.percentile(values, (0.5, 99.5), method="nearest")
    return float(low), float(high)


def _fits(kind: str, extent: _Extent, white: float) -> bool:
    beyond = OVERSHOOT * white if kind == "float" else 0
    return -beyond <= extent.low and extent.high <= white + beyond


def _white(kind: str, extents: Sequence[_Extent]) -> int:
    """The value of white that suits some images of one kind."""
    whites = WHITES[kind]
    fitting = [next((white for white in whites if _fits(kind, extent, white)), None) for extent in extents]
    for extent, white in zip(extents, fitting, strict=True):
        if white is None:
            raise DataError(
                f"{_range(extent)}, which is none of the ranges of {kind} images "
                f"({', '.join(f'0 to {x}' for x in whites)}); {_advice(extent)}"
            )
    white = max(x for x in fitting if x is not None)
    varied = [x for x in extents if x.low < x.high]
    dark = [x for x in varied if x.bulk_high - x.bulk_low < LEAST_USED * white]
    if 2 * len(dark) > len(varied):
        named = max(dark, key=lambda x: x.inner_high)
        raise DataError(
            f"{_range(named)}, and most {kind} images use less than a quarter of the range 0 to {white} and "
            f"would look dark or flat; {_advice(named)} ([0,{white}] takes them as they are)"
        )
    for extent in extents:
        _check_alike(kind, extent, white)
    if dark:  # a night among days, or images of fewer bits: they alone can tell
        named = min(dark, key=lambda x: x.bulk_high - x.bulk_low)
        rank_zero_warn(
            f"{_range(named)}, and {len(dark)} of {len(varied)} {kind} images looked at use less than a quarter "
            f"of the range 0 to {white}, so they stay dark or flat; if they have fewer bits than the others, "
            "scale the files alike (data.pixel_range holds for all of them)"
        )
    return white


def _check_alike(kind: str, extent: _Extent, white: int) -> None:
    """Raise DataError unless an image fits the range of the others, and nearly all of it in no smaller one."""
    bulk = extent._replace(low=extent.bulk_low, high=extent.bulk_high)
    smaller = any(_fits(kind, bulk, x) for x in WHITES[kind] if x < white) and bulk.low < bulk.high
    if smaller or not _fits(kind, extent, white):
        raise DataError(
            f"{_range(extent)}, 99 % of them from {bulk.low:g} to {bulk.high:g}, but the range of the {kind} "
            f"images of the set is 0 to {white}; {_advice(extent)}"
        )


def _check_upper_bits(extents: Sequence[_Extent]) -> None:
    """Raise DataError if most images, of which the upper eight bits alone are read, would be dark or black."""
    dark = [x for x in extents if x.bulk_high < LEAST_USED * 65535]  # of what is below 256 nothing is left
    if 2 * len(dark) > len(extents):
        named = max(dark, key=lambda x: x.bulk_high)
        raise DataError(
            f"{printable(named.name)} has colors of 16 bits that use only 0 to {int(named.bulk_high) | 255} of "
            "65535, as in most such images, and only their upper eight bits are read; save such images with 8 "
            "bits, or scaled to 65535"
        )


def _check_not_flat(extents: Sequence[_Extent], black: float, white: float) -> None:
    """Raise DataError if most images that are not of one value would be nearly of one level."""
    varied = [x for x in extents if x.bulk_low < x.bulk_high]
    ends = [[min(max(x, black), white) for x in (extent.bulk_low, extent.bulk_high)] for extent in varied]
    flat = [x for x, (low, high) in zip(varied, ends, strict=True) if (high - low) * 255 < 2 * (white - black)]
    if 2 * len(flat) > len(varied):
        raise DataError(
            f"{_range(flat[0])}, which data.pixel_range=[{black:g},{white:g}] makes one level, as in most "
            f"images; {_advice(flat[0])}"
        )


def _range(extent: _Extent) -> str:
    return f"{printable(extent.name)} has pixels from {extent.low:g} to {extent.high:g}"


def _advice(extent: _Extent) -> str:
    low, high = extent.inner_low, extent.inner_high
    if extent.high - extent.low <= 1.5 * (high - low):  # no value lies far from the others
        low, high = extent.low, extent.high
    if 0 <= low <= high - low:
        usual = (1, *(2**bits - 1 for bits in (8, 10, 12, 14, 16)))
        used = extent.bulk_high - extent.bulk_low  # what `_white` looks at, or the advice would not help
        low, high = 0, next((x for x in usual if LEAST_USED * x <= used and high <= x), high)
    return f"set data.pixel_range to the values of black and white, such as [{low:g},{high:g}]"
