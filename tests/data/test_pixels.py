"""Pixels of more than 8 bits: one scale for a set, or an error that names a file, its range and the setting."""

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Array2D, Array3D, Dataset, Features, Value
from PIL import Image

from adadim_lightning.data import ImageFiles, huggingface, image_folder
from adadim_lightning.data.decoding import decode
from adadim_lightning.data.huggingface import _encoded
from adadim_lightning.data.pixels import DataError, PixelScale
from tests.data.pictures import encode, views

RAMP = np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)
EIGHT = np.rint(RAMP * 255).astype(np.uint8)  # the same picture in 8 bits


def spoilt(pixels: np.ndarray, value: float, *, at: int = 165) -> np.ndarray:
    """The pixels, and one of another value among them."""
    changed = pixels.copy()
    changed.flat[at] = value
    return changed


def folder(root: Path, *images: np.ndarray) -> Path:
    root.mkdir(exist_ok=True)
    for i, pixels in enumerate(images):
        (root / f"{i}.tif").write_bytes(encode(pixels, "TIFF"))
    return root


def load(root: Path, **options: Any) -> Any:
    options = {"views": views(1), "image_size": None, "channels": 1, "batch_size": 2, **options}
    return image_folder(root, **options).train


def worst(image: torch.Tensor, spared: int | None = None) -> int:
    """Largest difference from the picture in 8 bits."""
    off = np.abs(image[0].numpy().astype(int) - EIGHT).ravel()
    return int((off if spared is None else np.delete(off, spared)).max())


SAFE = {
    "floats to 1": RAMP,
    "floats to 255": RAMP * 255,
    "floats to 65535": RAMP * 65535,
    "NaN first": spoilt(RAMP, np.nan, at=0),
    "NaN": spoilt(RAMP, np.nan),
    "infinity": spoilt(RAMP, np.inf),
    "minus infinity": spoilt(RAMP, -np.inf),
    "one pixel of 1.01": spoilt(RAMP, 1.01),
    "int32 to 255": np.rint(RAMP * 255).astype(np.int32),
    "int32 to 65535": np.rint(RAMP * 65535).astype(np.int32),
    "16 bits": np.rint(RAMP * 65535).astype(np.uint16),
}

SIGNED = {  # bits, as Pillow saves them, and the sample format that makes them signed or unsigned
    "int8": (np.rint(RAMP * 127).astype(np.uint8), 2),
    "int16": (np.rint(RAMP * 32767).astype(np.uint16), 2),
    "int16 of 8 bits": (EIGHT.astype(np.uint16), 2),
    "uint32": (np.rint(RAMP * 65535).astype(np.int32), 1),
}


def with_sample_format(pixels: np.ndarray, sample_format: int) -> bytes:
    """A TIFF file whose tag 339 says 1, unsigned, or 2, signed."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "TIFF", tiffinfo={339: sample_format})
    signed, wanted = (struct.pack("<HHLL", 339, 3, 1, x) for x in (2, sample_format))
    data = file.getvalue().replace(signed, wanted)
    assert wanted in data
    return data


@pytest.mark.parametrize("name", SIGNED)
def test_tiff_files_with_and_without_a_sign_keep_the_levels(name: str, tmp_path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.tif").write_bytes(with_sample_format(*SIGNED[name]))
    for in_memory in (True, False):
        assert worst(load(tmp_path, in_memory=in_memory)[0][0]) <= 1


@pytest.mark.parametrize(
    ("pixels", "sample_format", "shown"),
    [
        (EIGHT, 2, "-128 to 127"),
        (np.rint(RAMP * 4000 - 1000).astype(np.int16).view(np.uint16), 2, "-1000 to 3000"),
        ((RAMP * np.float64(2**32 - 1)).astype(np.uint32).view(np.int32), 1, "0 to 4.29497e\\+09"),
    ],
)
def test_a_tiff_file_beyond_the_usual_range_shows_its_own_numbers(pixels, sample_format, shown, tmp_path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.tif").write_bytes(with_sample_format(pixels, sample_format))
    with pytest.raises(DataError, match=rf"0\.tif has pixels from {shown}.*data\.pixel_range"):
        load(tmp_path)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("name", SAFE)
def test_deep_images_keep_the_levels_of_8_bits(name: str, in_memory: bool, tmp_path) -> None:
    images = load(folder(tmp_path / "x", *[SAFE[name]] * 3), in_memory=in_memory)
    batch, _ = images.__getitems__([0, 1, 2])
    assert max(worst(x, 165 if name != "NaN first" else None) for x in batch) <= 1


UNSAFE = {
    "nodata 3.4e38": (spoilt(RAMP, 3.4e38), "0 to 3.4e+38", [0, 1]),
    "nodata -9999": (spoilt(RAMP, -9999), "-9999 to 1", [0, 1]),
    "one pixel of 2": (spoilt(RAMP, 2), "0 to 2", [0, 1]),
    "one pixel of 200": (spoilt(RAMP, 200), "0 to 200", [0, 1]),
    "12 bits in 16": (np.rint(RAMP * 4095).astype(np.uint16), "0 to 4095", [0, 4095]),
    "12 bits in 32": (np.rint(RAMP * 4095).astype(np.int32), "0 to 4095", [0, 4095]),
    "14 bits in 16, nodata": (spoilt(np.rint(RAMP * 16383).astype(np.uint16), 65535), "0 to 65535", [0, 16383]),
    "Hounsfield units": (np.rint(RAMP * 4000 - 1000).astype(np.int32), "-1000 to 3000", [-1000, 3000]),
    "Hounsfield units in 16 bits": (
        np.rint(RAMP * 4000 + 31768).astype(np.uint16),
        "31768 to 35768",
        [31768, 35768],
    ),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_a_range_that_is_not_safe_names_the_file_the_range_and_a_setting_that_mends_it(name, tmp_path) -> None:
    pixels, shown, mended = UNSAFE[name]
    folder(tmp_path / "x", *[pixels] * 3)
    for in_memory in (True, False):
        with pytest.raises(DataError) as caught:
            load(tmp_path / "x", in_memory=in_memory)
        message = str(caught.value)
        assert "x/0.tif has pixels from " + shown in message
        assert (
            f"set data.pixel_range to the values of black and white, such as [{mended[0]},{mended[1]}]" in message
        )
        assert message.isprintable()
    images = load(tmp_path / "x", pixel_range=mended)
    assert worst(images[0][0], 165) <= 1


def test_one_scale_holds_for_all_images_of_a_set(tmp_path) -> None:
    dim = (RAMP * 100).astype(np.float32)
    images = load(folder(tmp_path / "x", dim, RAMP * 255, RAMP * 200), in_memory=False)
    assert images[0][0].max() == 100  # as in the others, not stretched to white
    with pytest.raises(DataError, match=r"1\.tif has pixels from 0 to 1, 99 % .* images of the set is 0 to 255"):
        load(folder(tmp_path / "y", RAMP * 255, RAMP, RAMP * 255))
    with pytest.raises(DataError, match=r"0\.tif has pixels from 0 to 4095, and most 16-bit images"):
        load(folder(tmp_path / "z", *[(RAMP * 4095).astype(np.uint16)] * 3, (RAMP * 65535).astype(np.uint16)))


def test_training_and_held_out_images_share_a_scale(tmp_path) -> None:
    for part, factor in (("train", 255), ("val", 1)):
        for name in "ab":
            (tmp_path / part).mkdir(exist_ok=True)
            folder(tmp_path / part / name, *[(RAMP * factor).astype(np.float32)] * 3)
    with pytest.raises(DataError, match=r"val/a/0\.tif has pixels from 0 to 1, "):
        load(tmp_path)


def test_an_image_beyond_the_sample_that_does_not_fit_is_named_when_it_is_read(tmp_path) -> None:
    files = folder(tmp_path / "x", *[RAMP] * 200, RAMP)
    images = ImageFiles([str(files / f"{i}.tif") for i in range(201)], image_size=32, channels=1)
    assert worst(images[0][0]) <= 1
    (files / "1.tif").write_bytes(encode(RAMP * 300, "TIFF"))
    with pytest.raises(DataError, match=r"x/1\.tif has pixels from 0 to 300, .*data\.pixel_range"):
        images[1]
    assert not images.unreadable.any()


def test_a_given_range_is_checked_and_said_to_be_ignored_by_8_bits(tmp_path) -> None:
    for wrong in ([1, 0], [0], [0, 1, 2], [0, float("nan")], ["a", 1], [True, 5]):
        with pytest.raises(ValueError, match=r"pixel_range must be the values of black and white, such as"):
            load(folder(tmp_path / "x", RAMP, RAMP), pixel_range=wrong)
    with pytest.raises(DataError, match=r"which data.pixel_range=\[0,4095\] makes one level, as in most images"):
        load(tmp_path / "x", pixel_range=[0, 4095])
    with pytest.warns(UserWarning, match=r"data.pixel_range=\[0, 4095\] is ignored: the images have 8 bits"):
        images = load(folder(tmp_path / "y", EIGHT, EIGHT), pixel_range=[0, 4095])
    assert worst(images[0][0]) == 0


def test_an_image_of_nan_alone_is_counted_as_unreadable(tmp_path) -> None:
    with pytest.warns(UserWarning, match=r"1 of 3 images cannot be read: .*1\.tif; left out"):
        assert len(load(folder(tmp_path / "x", RAMP, RAMP * np.nan, RAMP))) == 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I;16B"])
def test_modes_of_pillow_keep_the_levels(mode: str) -> None:
    grey = Image.fromarray(EIGHT)
    if mode.startswith("I;16"):
        image = Image.frombytes(
            mode, (32, 32), (EIGHT.astype(">u2" if mode == "I;16B" else "<u2") * 257).tobytes()
        )
    else:
        image = grey.convert("RGB").convert(mode) if mode in ("YCbCr", "HSV", "CMYK") else grey.convert(mode)
    off = np.abs(
        np.asarray(decode(image, channels=1)).astype(int) - np.asarray(image.convert("L") if mode == "1" else grey)
    )
    assert off.max() <= (3 if mode in ("YCbCr", "HSV", "CMYK") else 1)


def test_a_grey_map_of_12_bits_says_so_itself() -> None:
    deep = np.rint(RAMP * 4095).astype(">u2")
    data = b"P5 32 32 4095\n" + deep.tobytes()
    assert worst(torch.as_tensor(np.array(decode(data, channels=1)))[None]) <= 1


COLORS = np.stack([EIGHT, EIGHT[::-1], EIGHT.T], -1)
L2 = [list(map(int, row)) for row in EIGHT]
ARRAYS = {
    "H W": (EIGHT, Array2D((32, 32), "uint8")),
    "H W 1": (EIGHT[..., None], Array3D((32, 32, 1), "uint8")),
    "1 H W": (EIGHT[None], Array3D((1, 32, 32), "uint8")),
    "H W 3": (COLORS, Array3D((32, 32, 3), "uint8")),
    "3 H W": (COLORS.transpose(2, 0, 1), Array3D((3, 32, 32), "uint8")),
    "float": (COLORS.astype(np.float32) / 255, Array3D((32, 32, 3), "float32")),
    "double": (EIGHT / 255, Array2D((32, 32), "float64")),
    "NaN": (spoilt(RAMP, np.nan, at=0), Array2D((32, 32), "float32")),
    "16 bits": (EIGHT.astype(np.uint16) * 257, Array2D((32, 32), "uint16")),
    "int64": (EIGHT.astype(np.int64), Array2D((32, 32), "int64")),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ARRAYS)
def test_columns_of_pixels_are_images(name: str, streaming: bool, tmp_path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
    pixels, kind = ARRAYS[name]
    features = Features({"image": kind, "label": Value("int64")})
    rows = {"image": [pixels.tolist()] * 4, "label": [0, 1] * 2}
    for split in ("train", "test"):
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    options = {"views": views(), "batch_size": 2, "num_workers": 0, "streaming": streaming}
    data = huggingface(str(tmp_path), **options)
    expected = (COLORS if 3 in pixels.shape else np.stack([EIGHT] * 3, -1)).astype(int)
    assert data.test is not None
    for image in (next(iter(data.train))[0] if streaming else data.train[0][0], data.test[0][0]):
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 1


def test_lists_of_pixels_and_files_within_a_table_are_scaled(tmp_path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    nested = pa.list_(pa.list_(pa.uint8()))
    deep = encode(EIGHT.astype(np.uint16) * 257)
    for i, column in enumerate(
        (
            pa.array([L2] * 3, nested),
            pa.array([L2] * 3, pa.list_(pa.list_(pa.int64()))),
            pa.array([deep] * 3),
            pa.array([{"bytes": deep, "path": None}] * 3),
            pa.array([encode(RAMP, "TIFF")] * 3),
        )
    ):
        pq.write_table(pa.table({"image": column}), tmp_path / f"{i}.parquet")
        data = huggingface(str(tmp_path / f"{i}.parquet"), image_column="image", views=views(), batch_size=2)
        assert worst(data.train[0][0]) <= 1, i
    twelve = {"image": pa.array([encode(EIGHT.astype(np.uint16) * 16)] * 3)}
    pq.write_table(pa.table(twelve), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"number 0 has pixels from 0 to 4080, .*\[0,4095\]"):
        huggingface(str(tmp_path / "x.parquet"), views=views(), batch_size=2)
    data = huggingface(str(tmp_path / "x.parquet"), views=views(), batch_size=2, pixel_range=[0, 4080])
    assert worst(data.train[0][0]) <= 1


def test_a_range_that_begins_above_black_gets_an_advice_that_uses_it(tmp_path) -> None:
    pixels = (RAMP * 0.2 + 0.1).astype(np.float32)
    with pytest.raises(DataError, match=r"from 0\.1 to 0\.3, .* such as \[0,0\.3\]"):
        load(folder(tmp_path / "x", *[pixels] * 3))


def test_pixels_of_integers_that_are_missing_are_counted_as_unreadable() -> None:
    with pytest.raises(ValueError, match="some of its pixels are missing"):
        _encoded([[0, None]], "uint8")


def test_shapes_that_are_no_image_are_broken() -> None:
    for shape in ((5, 32, 32), (2, 2, 2, 3), (7,), (0, 4)):
        with pytest.raises(ValueError, match="is no image"):
            decode(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="is no image"):
        decode(np.zeros((4, 4), complex))


def test_the_scale_minds_neither_nan_nor_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scale = PixelScale(whites={"float": 1})
        assert scale.to_bytes(np.array([[np.nan, np.inf], [0, 1]], np.float32), "x").tolist() == [[0, 0], [0, 255]]


@pytest.mark.parametrize("dark", [1, 4])
def test_a_few_images_of_fewer_bits_are_named(dark: int, tmp_path) -> None:
    full, few = ((RAMP * top).astype(np.uint16) for top in (65535, 4095))
    with pytest.warns(UserWarning, match=rf"0\.tif has pixels from 0 to 4095, and {dark} of 8 16-bit"):
        load(folder(tmp_path / "x", *[few] * dark, *[full] * (8 - dark)), held_out=0)


def test_a_stream_is_looked_at_beside_its_held_out_images(tmp_path) -> None:
    for split, top in (("train", 4095), ("test", 65535)):
        image = encode((RAMP * top).astype(np.uint16), "TIFF")
        pq.write_table(pa.table({"image": [image] * 8, "label": [0, 1] * 4}), tmp_path / f"{split}-0.parquet")
    with pytest.warns(UserWarning, match=r"of the stream has pixels from 0 to 4095, and 8 of 16 16-bit"):
        huggingface(str(tmp_path), image_size=32, channels=1, batch_size=2, views=views(1), streaming=True)


def test_the_range_that_is_advised_is_not_the_one_that_is_refused(tmp_path) -> None:
    quarter = (RAMP * 16384 + 16384).astype(np.uint16)
    with pytest.raises(DataError, match=r"such as \[0,32768\] "):
        load(folder(tmp_path / "x", *[quarter] * 3))
