"""Decoding of sound and broken files, and sets of images in memory and on disk."""

import multiprocessing
import pickle
import struct
import warnings
import zlib
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from adadim_lightning.data import ImageFiles, MemoryImages, UnreadableImagesError
from adadim_lightning.data.decoding import decode, fit_square, is_broken
from tests.data.pictures import encode, pixels, write


def array(source, **options) -> np.ndarray:
    return np.asarray(decode(source, **options))


def png_with_wrong_checksum() -> bytes:
    data = bytearray(encode(pixels(0)))
    data[data.index(b"IDAT") + 10] ^= 255
    return bytes(data)


JPEG = encode(pixels(0, 40, 50), "JPEG")
BROKEN = {
    "truncated JPEG": JPEG[: len(JPEG) // 2],
    "truncated PNG": encode(pixels(0))[:-100],
    "no bytes": b"",
    "text": b"not an image",
    "wrong checksum": png_with_wrong_checksum(),
    "web page": b"<html>404</html>" * 100,
    "huge": None,
}


@pytest.mark.parametrize("name", [name for name in BROKEN if name != "huge"])
def test_broken_files_raise_what_counts_as_broken(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(BROKEN[name])
    for source in (BROKEN[name], str(tmp_path / "x.jpg"), tmp_path / "x.jpg"):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            decode(source)
        assert is_broken(caught.value)


def test_errors_of_a_program_do_not_count_as_broken_images() -> None:
    assert not is_broken(TypeError())
    assert not is_broken(ZeroDivisionError())
    assert is_broken(struct.error())
    assert is_broken(zlib.error())


def test_a_decompression_bomb_counts_as_unreadable_without_a_flood(monkeypatch, tmp_path) -> None:
    files = [str(write(tmp_path / f"{i}.png", i, height=size)) for i, size in enumerate((12, 40, 12))]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    images = ImageFiles(files, image_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(images.decode_all()) == 2
    assert images.unreadable.tolist() == [False, True, False]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # large, but no bomb: Pillow only warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(array(files[0]), pixels(0))


def test_a_single_pixel_is_an_image() -> None:
    assert array(encode(Image.new("RGB", (1, 1), (9, 8, 7)))).tolist() == [[[9, 8, 7]]]
    assert fit_square(decode(encode(Image.new("L", (1, 1), 5))), 4).size == (4, 4)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_grey_is_scaled_not_clipped(kind: str, channels: int) -> None:
    deep = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    shown = array(encode(deep, kind), channels=channels)
    shown = shown if channels == 1 else shown[..., 1]
    assert np.abs(shown - deep / 257).max() <= 1


@pytest.mark.parametrize("top", [1, 255, 65535])
def test_floats_count_up_to_the_next_usual_limit(top: int) -> None:
    values = np.linspace(0, top, 600, dtype=np.float32).reshape(20, 30)
    assert np.abs(array(encode(values, "TIFF"), channels=1) - values * (255 / top)).max() <= 1


def test_an_image_without_a_number_is_broken() -> None:
    with pytest.raises(ValueError, match="no pixel is a finite number") as caught:
        array(encode(np.full((4, 4), np.nan, np.float32), "TIFF"), channels=1)
    assert is_broken(caught.value)


def test_cmyk_becomes_rgb() -> None:
    red = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert np.abs(array(red).astype(int) - [255, 0, 0]).max() < 8


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    moving = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(array(moving).astype(int) - [255, 0, 0]).max() < 8


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "TIFF"])
def test_turned_photographs_are_upright(kind: str) -> None:
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, :16, 0] = 255  # left half red; turned clockwise it is on top
    exif = Image.Exif()
    exif[0x112] = 6
    options = {"tiffinfo": {0x112: 6}} if kind == "TIFF" else {"exif": exif}
    shown = array(encode(image, kind, **options))
    assert shown.shape == (32, 16, 3)
    assert shown[4, 8, 0] > 200
    assert shown[28, 8, 0] < 50


def test_what_is_transparent_is_white() -> None:
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0] + [0] * 762)
    clear = {
        "palette": encode(palette, transparency=0),
        "palette, by bytes": encode(palette, transparency=bytes([0, 255])),
        "GIF": encode(palette, "GIF", transparency=0),
        "RGBA": encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0))),
        "grey and alpha": encode(Image.new("LA", (4, 4), (10, 0))),
        "a color": encode(Image.new("RGB", (4, 4), (7, 8, 9)), transparency=(7, 8, 9)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, data in clear.items():
            assert array(data).min() == 255, name
        half = array(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 128))))
        assert np.abs(half[0, 0].astype(int) - [255, 127, 127]).max() <= 1
        assert array(encode(palette)).tolist()[0][0] == [255, 0, 0]


def test_16_bits_with_a_transparent_value_can_be_read() -> None:
    deep = np.array([[0, 40000], [40000, 65535]], np.uint16)
    assert np.abs(array(encode(deep, transparency=40000), channels=1) - deep / 257).max() <= 1


def test_pixels_of_a_lossless_file_are_those_that_were_written() -> None:
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        assert np.array_equal(array(encode(pixels(3, 9, 14), kind)), pixels(3, 9, 14)), kind
    assert np.array_equal(array(encode(pixels(3, channels=1)), channels=1), pixels(3, channels=1))


@pytest.mark.parametrize("at_least", [1, 37, 38, 75, 76, 150, 151, 299, 300, 301, 1000])
def test_a_draft_makes_no_side_shorter_than_asked(at_least: int) -> None:
    data = encode(pixels(1, 300, 401), "JPEG")
    width, height = decode(data, at_least=at_least).size
    assert min(width, height) >= min(at_least, 300)
    if at_least <= 75:
        assert height < 300  # it saves work


def test_the_middle_is_cut_out_of_what_is_not_square() -> None:
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255
    assert np.asarray(fit_square(Image.fromarray(image), 10)).min() == 255
    assert np.array_equal(np.asarray(fit_square(Image.fromarray(pixels(2)), 12)), pixels(2))


# Sets.


def some_files(folder: Path, count: int, broken: tuple[int, ...] = ()) -> list[str]:
    files = [str(write(folder / f"{i:03d}.png", i)) for i in range(count)]
    for i in broken:
        Path(files[i]).write_bytes(b"broken")
    return files


def test_files_give_their_pixels_and_labels_in_order(tmp_path) -> None:
    images = ImageFiles(some_files(tmp_path, 6), torch.tensor([0, 1, 2, 0, -1, 2]), image_size=12)
    batch, labels = images.__getitems__([4, 0, 3])
    assert labels.tolist() == [-1, 0, 0]
    for shown, i in zip(batch, (4, 0, 3), strict=True):
        assert np.array_equal(shown.permute(1, 2, 0).numpy(), pixels(i))
    assert images.num_classes == 3
    assert np.array_equal(images[5][0].permute(1, 2, 0).numpy(), pixels(5))


def test_a_subset_keeps_pixels_labels_and_names_together(tmp_path) -> None:
    files = some_files(tmp_path, 6)
    images = ImageFiles(files, torch.arange(6), image_size=12)
    for part in (
        images.subset([5, 1]),
        ImageFiles(files.__getitem__, torch.arange(6), image_size=12).subset([5, 1]),
    ):
        assert part.labels.tolist() == [5, 1]
        assert np.array_equal(part.pixels(1)[0].permute(1, 2, 0).numpy(), pixels(1))
    assert images.subset([5, 1]).names == [files[5], files[1]]
    assert images.subset([5, 1]).subset([1]).names == [files[1]]


def test_the_next_image_stands_in_for_one_that_cannot_be_read_without_a_label(tmp_path) -> None:
    images = ImageFiles(some_files(tmp_path, 4, broken=(1, 3)), torch.arange(4), image_size=12)
    batch, labels = images.__getitems__([0, 1, 2, 3])
    assert labels.tolist() == [0, -1, 2, -1]
    assert torch.equal(batch[1], batch[2])
    assert torch.equal(batch[3], batch[0])
    news = images.news_of_unreadable()
    assert news is not None
    assert "2 of 4 images cannot be read" in news
    assert "001.png" in news
    assert images.news_of_unreadable() is None


def test_images_that_cannot_be_read_are_left_out_of_memory(tmp_path) -> None:
    images = ImageFiles(some_files(tmp_path, 5, broken=(0, 3)), torch.arange(5), image_size=12)
    kept = images.decode_all()
    assert kept.labels.tolist() == [1, 2, 4]
    assert [Path(name).name for name in kept.names] == ["001.png", "002.png", "004.png"]
    for shown, i in zip(kept.images, (1, 2, 4), strict=True):
        assert np.array_equal(shown.permute(1, 2, 0).numpy(), pixels(i))


def test_warnings_work_as_before_after_decoding_in_threads(tmp_path) -> None:
    before = list(warnings.filters)
    ImageFiles(some_files(tmp_path, 200), image_size=12).decode_all()
    assert warnings.filters == before


def test_too_many_unreadable_images_are_an_error_that_names_them_and_the_cause(tmp_path) -> None:
    images = ImageFiles(some_files(tmp_path, 9, broken=(1, 2, 3)), image_size=12, max_unreadable=2)
    with pytest.raises(
        UnreadableImagesError, match=r"3 of 9 images cannot be read.*001.png.*003.png.*no image.*=2"
    ):
        images.decode_all()
    whole = ImageFiles(some_files(tmp_path, 30, broken=tuple(range(20))), image_size=12, max_unreadable=15)
    with pytest.raises(UnreadableImagesError, match=r"and \d+ more"):
        whole.__getitems__(range(30))


def test_a_limit_of_zero_allows_none(tmp_path) -> None:
    images = ImageFiles(some_files(tmp_path, 3, broken=(1,)), image_size=12, max_unreadable=0)
    assert images[0][0].shape == (3, 12, 12)
    with pytest.raises(UnreadableImagesError, match=r"001.png"):
        images[1]


def test_where_no_image_can_be_read_the_error_says_so(tmp_path) -> None:
    images = ImageFiles(some_files(tmp_path, 3, broken=(0, 1, 2)), image_size=12)
    for use in (lambda: images[0], images.decode_all):
        with pytest.raises(UnreadableImagesError, match=r"none of the 3 images can be read"):
            use()


def test_a_missing_file_is_unreadable_and_named(tmp_path) -> None:
    files = some_files(tmp_path, 3)
    Path(files[1]).unlink()
    images = ImageFiles(files, image_size=12)
    assert len(images.decode_all()) == 2


def test_no_image_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"there is no image"):
        ImageFiles([], image_size=8)


def test_images_that_differ_in_size_name_the_setting(tmp_path) -> None:
    files = [str(write(tmp_path / "a.png", 1)), str(write(tmp_path / "b.png", 2, width=20))]
    images = ImageFiles(files, image_size=None)
    for use in (lambda: images.__getitems__([0, 1]), images.decode_all):
        with pytest.raises(ValueError, match=r"differ in size \(12 x 12 and 12 x 20\); set data.image_size=224"):
            use()
    assert images.pixels(1)[0].shape == (3, 12, 20)


def together(batch):
    return batch


def loader(images: ImageFiles, context: str | None = None, **options) -> DataLoader:
    options = {"num_workers": 2, **options}
    return DataLoader(images, 4, collate_fn=together, multiprocessing_context=context, **options)


def test_workers_count_together_what_they_cannot_read(tmp_path) -> None:
    images = ImageFiles(some_files(tmp_path, 16, broken=(1, 6, 14)), torch.arange(16), image_size=12)
    labels = torch.cat([labels for _, labels in loader(images)])
    assert labels.tolist() == [-1 if i in (1, 6, 14) else i for i in range(16)]
    assert "3 of 16" in str(images.news_of_unreadable())


@pytest.mark.parametrize(
    ("context", "workers"),
    [("fork", 2), pytest.param("spawn", 1, marks=pytest.mark.slow)],  # a spawned one imports all anew
)
def test_the_limit_in_a_worker_comes_through_as_one_line(context: str, workers: int, tmp_path) -> None:
    if context not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {context} here")
    images = ImageFiles(some_files(tmp_path, 16, broken=(1, 6)), image_size=12, max_unreadable=1)
    with pytest.raises(UnreadableImagesError) as caught:
        list(loader(images, context, num_workers=workers))
    message = str(caught.value)
    assert message.startswith("2 of 16 images cannot be read: ")
    assert "001.png" in message
    assert "006.png" in message
    assert "\n" not in message
    assert int(images.unreadable.sum()) == 2  # the process that asked knows


def test_a_set_that_is_sent_to_a_worker_counts_in_the_memory_of_the_first(tmp_path) -> None:
    files = some_files(tmp_path, 4, broken=(2,))
    for images in (
        ImageFiles(files, image_size=12),
        ImageFiles(files.__getitem__, torch.arange(4), image_size=12),
    ):
        part = images.subset([3, 2])
        sent = pickle.loads(ForkingPickler.dumps(part))  # as a spawned worker gets it
        assert np.array_equal(sent[0][0].permute(1, 2, 0).numpy(), pixels(3))
        assert sent[1][1] == -1
        assert part.unreadable.tolist() == [False, True]


def test_sizes_that_differ_come_out_of_a_worker_as_one_line(tmp_path) -> None:
    files = [str(write(tmp_path / f"{i}.png", i, width=12 + i)) for i in range(8)]
    with pytest.raises(
        ValueError, match=r"^the images differ in size \(.*\); set data.image_size=224, or another"
    ):
        list(loader(ImageFiles(files, image_size=None)))


def test_memory_images_are_resized_and_recolored() -> None:
    raw = torch.as_tensor(np.stack([pixels(i, 20, 30) for i in range(3)])).permute(0, 3, 1, 2)
    images = MemoryImages(raw, torch.arange(3), classes=["a", "b", "c"])
    assert images.resized(None, 3) is images
    grey = images.resized(None, 1)
    expected = np.stack([np.asarray(Image.fromarray(pixels(i, 20, 30)).convert("L")) for i in range(3)])
    assert np.abs(grey.images[:, 0].numpy().astype(int) - expected).max() <= 1
    assert torch.equal(grey.resized(None, 3).images, grey.images.expand(-1, 3, -1, -1))
    ramp = np.linspace(0, 255, 30).astype(np.uint8)[None, :, None].repeat(20, 0).repeat(3, 2)
    small = MemoryImages(torch.as_tensor(ramp).permute(2, 0, 1)[None]).resized(10, 3).images[0]
    assert small.shape == (3, 10, 10)
    cut = np.asarray(fit_square(Image.fromarray(ramp), 10))
    assert np.abs(small.permute(1, 2, 0).numpy().astype(int) - cut).max() <= 10  # half a pixel
    small = images.resized(10, 3)
    assert (small.labels.tolist(), small.classes) == ([0, 1, 2], ["a", "b", "c"])


def test_classes_without_any_label_do_not_count() -> None:
    images = MemoryImages(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), classes=["a", "b"])
    assert images.num_classes is None
    assert not images.is_labeled
