"""One image from a file or its bytes, whatever its format, depth, colors and orientation."""

import io
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps

Encoded = str | Path | bytes | Image.Image
"""An image as a file, the bytes of one, or what Pillow made of it."""

MODES = {1: "L", 3: "RGB"}
# What Pillow raises for files that are cut off, damaged, too large, or no images at all.
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, zlib.error, Image.DecompressionBombError, MemoryError)


def is_broken(error: Exception) -> bool:
    """Whether an error of decoding speaks of the image, not of the program."""
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
def decode(source: Encoded, *, channels: int = 3, at_least: int | None = None) -> Image.Image:
    """Decode an image: the first frame, upright, in grey or RGB.

    Args:
        source: a file, its bytes, or an opened image.
        channels: 1 or 3.
        at_least: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as its sides stay
            this long.

    Returns:
        Image of mode ``L`` or ``RGB``; 16-bit grey is scaled to 8 bits, transparency shown on white. Floats
        count from 0 to 1, or to 255 or 65535 where one exceeds that.

    Raises:
        OSError, ValueError, SyntaxError: it is no image, or damaged.
    """
    return decode_in_thread(source, channels, at_least)


def decode_in_thread(source: Encoded, channels: int, at_least: int | None) -> Image.Image:
    """:func:`decode` where other threads do so too: the caller keeps warnings away, by :func:`no_warnings`."""
    if isinstance(source, bytes):
        source = io.BytesIO(source)  # type: ignore[assignment]
    image = source if isinstance(source, Image.Image) else Image.open(source)
    if at_least is not None:
        image.draft(None, (at_least, at_least))
    if "exif" in image.info or image.format in ("TIFF", "PNG"):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion would clip them
        top = 65535
        if image.mode == "F":
            top = next((x for x in (1, 255) if image.getextrema()[1] <= x), top)  # type: ignore[operator]
        image = image.convert("F").point(lambda x: x * (255 / top)).convert("L")
        image.info.pop("transparency", None)  # counted in 16 bits
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[channels])


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to ``size`` and cut out the middle."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
