"""One image from a file or its bytes, whatever its format, depth, colors and orientation."""

import io
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLEFORMAT, TiffImageFile

from adadim_lightning.data.pixels import DataError, DeepImage, PixelScale, printable

Encoded = str | Path | bytes | Image.Image | np.ndarray[Any, Any]
"""An image as a file, the bytes of one, what Pillow made of it, or its pixels."""

MODES = {1: "L", 3: "RGB"}
# What Pillow raises for files that are cut off, damaged, too large, or no images at all.
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, zlib.error, Image.DecompressionBombError, MemoryError)


def is_broken(error: Exception) -> bool:
    """Whether an error of decoding speaks of the image, not of the program."""
    if isinstance(error, DataError):
        return False  # it speaks of a setting
    return isinstance(error, _BROKEN) or type(error).__module__ == "struct"


def check_channels(channels: int) -> None:
    """Raise ValueError unless images of so many channels are known."""
    if channels not in MODES:
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels!r}")


@contextmanager
def no_warnings() -> Iterator[None]:
    """Keep Pillow from warning of palettes, damaged EXIF and large images, one by one; not for use in threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@no_warnings()
def decode(
    source: Encoded, *, channels: int = 3, at_least: int | None = None, scale: PixelScale | None = None
) -> Image.Image:
    """Decode an image: the first frame, upright, in grey or RGB.

    Args:
        source: a file, its bytes, an opened image, or pixels: ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)``.
        channels: 1 or 3.
        at_least: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as its sides stay
            this long.
        scale: of the set, for images of more than 8 bits; None finds that of this image.

    Returns:
        Image of mode ``L`` or ``RGB``; transparency is shown on white, and pixels that are not finite are black.

    Raises:
        OSError, ValueError, SyntaxError: it is no image, or damaged.
        DataError: its pixels do not fit the scale, or no usual one.
    """
    name = printable(source) if isinstance(source, str | Path) else "the image"
    return decode_in_thread(source, channels, at_least, scale, name)


def decode_in_thread(
    source: Encoded, channels: int, at_least: int | None, scale: PixelScale | None, name: str
) -> Image.Image:
    """:func:`decode` where other threads do so too: the caller keeps warnings away, by :func:`no_warnings`."""
    image = _opened(source)
    if isinstance(image, Image.Image):
        deep = _deep_type(image)
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        if "exif" in image.info or image.format in ("TIFF", "PNG"):
            image = ImageOps.exif_transpose(image)
        if deep is not None:  # Pillow's own conversion would clip them
            image = _pixels(image, deep)
    if not isinstance(image, Image.Image):
        if scale is None:
            scale = PixelScale.of([DeepImage(name, image)])
        image = Image.fromarray(scale.to_bytes(image, name))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[channels])


def deep_image(source: Encoded, name: str) -> DeepImage | None:
    """The pixels of an image of more than 8 bits; None for others, which are not decoded."""
    image = _opened(source)
    if not isinstance(image, Image.Image):
        return DeepImage(name, image)
    deep = _deep_type(image)
    if deep is not None:
        return DeepImage(name, _pixels(image, deep))
    if image.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile) for tile in getattr(image, "tile", ())):
        upper = np.asarray(image.convert("RGB"))  # Pillow reads no more of them
        return DeepImage(name, upper.astype(np.uint16) * 257, upper_bits=True)
    return None


def _deep_type(image: Image.Image) -> np.dtype[Any] | None:
    """The type of the stored pixels if they have more than 8 bits, or a sign; else None."""
    if image.mode.startswith("F"):
        return np.dtype(np.float32)
    if isinstance(image, TiffImageFile) and image.mode in ("I", "L"):
        # Pillow reads bytes with a sign as if they had none, and unsigned 32 bits as if they had one.
        signed = image.tag_v2.get(SAMPLEFORMAT, (1,))[0] == 2
        if image.mode == "L":
            return np.dtype(np.int8) if signed else None
        return np.dtype(f"{'' if signed else 'u'}int{image.tag_v2[BITSPERSAMPLE][0]}")
    if image.mode == "I" and image.format is None:
        return np.dtype(np.int32)
    # Pillow opens 16 bits of some formats, such as PGM, as 32.
    return np.dtype(np.uint16) if image.mode.startswith("I") else None


def _pixels(image: Image.Image, deep: np.dtype[Any]) -> np.ndarray[Any, Any]:
    pixels = np.asarray(image)
    if pixels.itemsize == deep.itemsize and pixels.dtype.kind != deep.kind:
        return pixels.view(deep)
    return pixels.astype(deep, copy=False)


def _opened(source: Encoded) -> Image.Image | np.ndarray[Any, Any]:
    """An image of Pillow, or pixels of more than 8 bits."""
    if isinstance(source, np.ndarray):
        return _of_array(source)
    if isinstance(source, bytes):
        source = io.BytesIO(source)  # type: ignore[assignment]
    return source if isinstance(source, Image.Image) else Image.open(source)


def _of_array(pixels: np.ndarray[Any, Any]) -> Image.Image | np.ndarray[Any, Any]:
    if pixels.dtype.kind not in "biuf" or pixels.size == 0:
        raise ValueError(f"an array of {pixels.dtype} and shape {pixels.shape} is no image")
    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[-1] not in (3, 4)):
        raise ValueError(f"an array of shape {pixels.shape} is no image of 1, 3 or 4 channels")
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    return Image.fromarray(np.ascontiguousarray(pixels)) if pixels.dtype == np.uint8 else pixels


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to ``size`` and cut out the middle."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
