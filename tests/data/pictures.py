"""Images made for the tests, and an independent way to read them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adadim_lightning.data import TwoViews
from tests.helpers import Noise

DATASETS = Path(__file__).parents[3] / "shared" / "datasets"


def pixels(seed: int, height: int = 12, width: int = 12, channels: int = 3) -> np.ndarray:
    """Random pixels, ``(H, W, C)``, or ``(H, W)`` of one channel."""
    shape = (height, width, channels)[: 2 if channels == 1 else 3]
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    """An array or Pillow image as the bytes of a file."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, seed: int = 0, **options: Any) -> Path:
    """A PNG under any name, of the pixels of a seed; its folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(pixels(seed, **options)))
    return path


def views(channels: int = 3, **options: Any) -> TwoViews:
    return TwoViews([Noise()], mean=[0.5] * channels, std=[0.5] * channels, **options)
