"""MedMNIST's files, the real ones where they are, else made to their layout."""

import sys
from pathlib import Path

import numpy as np
import pytest
from medmnist import INFO

from adadim_lightning.data import ImageData, medmnist
from tests.data.pictures import DATASETS, views


def load(name: str, root: Path, channels: int = 1, **options) -> ImageData:
    options = {"views": views(channels), "batch_size": 2, "download": False, **options}
    return medmnist(name, root=root, channels=channels, **options)


def write(root: Path, flag: str, size: int = 28, counts=(6, 2, 3)) -> dict[str, np.ndarray]:
    info = INFO[flag]
    draw = np.random.default_rng(0)
    columns = len(info["label"]) if info["task"].startswith("multi-label") else 1
    most = 2 if columns > 1 else len(info["label"])
    arrays = {}
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        shape = (count, size, size) + ((3,) if info["n_channels"] == 3 else ())
        arrays[f"{split}_images"] = draw.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{split}_labels"] = draw.integers(0, most, (count, columns)).astype(np.uint8)
    np.savez(root / f"{flag}{'' if size == 28 else f'_{size}'}.npz", **arrays)
    return arrays


FLAT = [flag for flag in INFO if not flag.endswith("3d")]


@pytest.mark.parametrize("flag", FLAT)
def test_every_flat_set_is_read(flag: str, tmp_path) -> None:
    arrays = write(tmp_path, flag)
    channels = INFO[flag]["n_channels"]
    data = load(flag.removesuffix("mnist"), tmp_path, channels)
    assert data.test is not None
    for split, images in (("train", data.train), ("test", data.test)):
        read = images.images[:, 0] if channels == 1 else images.images.permute(0, 2, 3, 1)
        assert np.array_equal(read.numpy(), arrays[f"{split}_images"])
        if flag != "chestmnist":
            assert images.labels.tolist() == arrays[f"{split}_labels"][:, 0].tolist()
    assert data.num_classes == (None if flag == "chestmnist" else len(INFO[flag]["label"]))
    assert str(data).startswith(INFO[flag]["python_class"])


def test_the_validation_split_can_be_held_out_in_place_of_the_test_split(tmp_path) -> None:
    arrays = write(tmp_path, "bloodmnist")
    data = load("blood", tmp_path, 3, test_split="val")
    assert np.array_equal(data.test.images.permute(0, 2, 3, 1).numpy(), arrays["val_images"])
    assert np.array_equal(data.train.images.permute(0, 2, 3, 1).numpy(), arrays["train_images"])
    with pytest.raises(ValueError, match='test_split must be "test" or "val", got \'train\''):
        load("blood", tmp_path, 3, test_split="train")


def test_images_with_several_labels_count_as_unlabeled(tmp_path) -> None:
    write(tmp_path, "chestmnist")
    data = load("chest", tmp_path)
    assert not data.is_labeled
    assert data.val_dataloader() == []
    assert data.train.labels.unique().tolist() == [-1]


def test_larger_images_have_files_of_their_own(tmp_path) -> None:
    arrays = write(tmp_path, "bloodmnist", 64)
    data = load("bloodmnist", tmp_path, 3, size=64)
    assert np.array_equal(data.train.images.permute(0, 2, 3, 1).numpy(), arrays["train_images"])
    with pytest.raises(ValueError, match="bloodmnist of size 28 is not in"):
        load("blood", tmp_path, 3)


def test_grey_sets_serve_as_rgb_and_the_other_way_round(tmp_path) -> None:
    write(tmp_path, "breastmnist")
    write(tmp_path, "dermamnist")
    assert load("breast", tmp_path, 3).train.images.shape == (6, 3, 28, 28)
    assert load("derma", tmp_path, 1, image_size=32).train.images.shape == (6, 1, 32, 32)


@pytest.mark.skipif(not DATASETS.exists(), reason=f"the real files are not at {DATASETS}")
@pytest.mark.parametrize(
    ("name", "channels", "counts"), [("pneumonia", 1, (4708, 624)), ("retina", 3, (1080, 400))]
)
def test_the_real_files(name: str, channels: int, counts: tuple[int, int]) -> None:
    data = load(name, DATASETS / "medmnist", channels)
    assert data.test is not None
    assert (len(data.train), len(data.test)) == counts
    raw = np.load(DATASETS / "medmnist" / f"{name}mnist.npz")
    for split, images in (("train", data.train), ("test", data.test)):
        assert np.array_equal(images.images.permute(0, 2, 3, 1).squeeze(-1).numpy(), raw[f"{split}_images"])
        assert np.array_equal(images.labels.numpy(), raw[f"{split}_labels"][:, 0])


def test_mistakes_are_one_line(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"MedMNIST has no data set 'hearts'; it has path, chest, derma"):
        load("hearts", tmp_path)
    with pytest.raises(ValueError, match="organmnist3d holds volumes"):
        load("organmnist3d", tmp_path)
    with pytest.raises(ValueError, match="images of size 28, 64, 128, 224, got 32"):
        load("blood", tmp_path, size=32)
    with pytest.raises(
        ValueError, match=r"^pneumoniamnist of size 28 is not in [^\n]*set data.download=true[^\n]*$"
    ):
        load("pneumonia", tmp_path)
    monkeypatch.setitem(INFO["pneumoniamnist"], "url", "http://127.0.0.1:9/x.npz")
    with pytest.raises(
        ValueError, match=r"^pneumoniamnist of size 28 could not be downloaded to [^\n]*by hand[^\n]*$"
    ):
        load("pneumonia", tmp_path, download=True)
    (tmp_path / "pneumoniamnist.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match=r"^pneumoniamnist of size 28 is not in [^\n]*, or damaged"):
        load("pneumonia", tmp_path)


def test_a_missing_package_is_named_with_its_install_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "medmnist", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'adadim-lightning\[medmnist\]'"):
        load("blood", tmp_path)
