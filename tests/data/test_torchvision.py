"""Data sets of torchvision, written to disk as the real ones are, and read by torchvision's own classes."""

import functools
import gzip
import hashlib
import multiprocessing
import pickle
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from scipy.io import savemat

from adadim_lightning.data import ImageData, torchvision_images
from tests.data.pictures import DATASETS, encode, pixels, views

# Sets as small as these lack classes in one part, which is said.
pytestmark = pytest.mark.filterwarnings("ignore:.* (classes|images) .*have no:UserWarning")


def load(name: str, root: Path, *, grey: bool = False, **options) -> ImageData:
    options = {"views": views(1 if grey else 3), "batch_size": 2, "download": False, **options}
    return torchvision_images(name, root=root, channels=1 if grey else 3, **options)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def shown(images, index: int) -> np.ndarray:
    image = images[index][0].permute(1, 2, 0).numpy()
    return image[..., 0] if image.shape[-1] == 1 else image


def idx(array: np.ndarray) -> bytes:
    """The format of MNIST: type, number of dimensions, their sizes, bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def fashion_mnist(folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    arrays = {
        "train-images-idx3-ubyte": np.stack([pixels(i, 28, 28, 1) for i in range(6)]),
        "train-labels-idx1-ubyte": np.array([9, 0, 3, 3, 1, 7], np.uint8),
        "t10k-images-idx3-ubyte": np.stack([pixels(i, 28, 28, 1) for i in range(6, 9)]),
        "t10k-labels-idx1-ubyte": np.array([2, 9, 0], np.uint8),
    }
    for name, array in arrays.items():
        (folder / name).write_bytes(idx(array))
    return arrays


SPLITS = {"train": {"train": True}, "test": {"train": False}}


def test_fashion_mnist_from_its_files(tmp_path) -> None:
    arrays = fashion_mnist(tmp_path / "FashionMNIST" / "raw")
    data = load("FashionMNIST", tmp_path, grey=True, **SPLITS)
    assert data.test is not None
    assert np.array_equal(data.train.images[:, 0], arrays["train-images-idx3-ubyte"])
    assert data.train.labels.tolist() == [9, 0, 3, 3, 1, 7]
    assert data.test.labels.tolist() == [2, 9, 0]
    assert data.train.classes[9] == "Ankle boot"
    assert str(data).startswith("FashionMNIST: 6 images, grey, 28 x 28, 10 classes; 3 held out")


def test_a_damaged_file_is_one_line(tmp_path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    fashion_mnist(raw)
    (raw / "train-images-idx3-ubyte").write_bytes((raw / "train-images-idx3-ubyte").read_bytes()[:2000])
    with pytest.raises(
        ValueError, match=r"^FashionMNIST is not in .*, or damaged: set data.download=true, [^\n]*$"
    ):
        load("FashionMNIST", tmp_path, grey=True, **SPLITS)


@pytest.mark.skipif(not DATASETS.exists(), reason=f"the real files are not at {DATASETS}")
def test_the_real_fashion_mnist() -> None:
    data = load("FashionMNIST", DATASETS, grey=True, **SPLITS)
    assert data.test is not None
    raw = DATASETS / "FashionMNIST" / "raw"
    for split, images in (("train", data.train), ("t10k", data.test)):
        read = np.fromfile(raw / f"{split}-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 28, 28)
        labels = np.fromfile(raw / f"{split}-labels-idx1-ubyte", np.uint8)[8:]
        assert np.array_equal(images.images[:, 0].numpy(), read)
        assert np.array_equal(images.labels.numpy(), labels)
    assert (len(data.train), len(data.test), data.num_classes) == (60_000, 10_000, 10)
    mean, std = data.train.images.double().mean() / 255, data.train.images.double().std() / 255
    assert (round(float(mean), 4), round(float(std), 4)) == (0.2860, 0.3530)  # conf/data/fashion_mnist.yaml


def cifar(root: Path, kind: type, monkeypatch) -> list[np.ndarray]:
    """The pickles of CIFAR-10 or CIFAR-100, and their checksums."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    images = []
    key = kind.meta["key"]
    names = [f"class {i}" for i in range(100 if "fine" in key else 10)]

    def written(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return [name, md5(folder / name)]

    def batch(name: str) -> list[str]:
        several = [pixels(hash(name) % 1000 + i, 32, 32) for i in range(3)]
        if "test" not in name:
            images.extend(several)
        rows = np.stack([x.transpose(2, 0, 1).ravel() for x in several])
        labels = [len(images) % 10, 1, 2]
        return written(name, {"data": rows, "fine_labels" if "fine" in key else "labels": labels})

    monkeypatch.setattr(kind, "train_list", [batch(name) for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [batch(name) for name, _ in kind.test_list])
    name, digest = written(kind.meta["filename"], {key: names})
    monkeypatch.setattr(kind, "meta", {"filename": name, "key": key, "md5": digest})
    return images


@pytest.mark.parametrize(("name", "count", "classes"), [("CIFAR10", 15, 10), ("CIFAR100", 3, 100)])
def test_cifar_from_its_pickles(name: str, count: int, classes: int, tmp_path, monkeypatch) -> None:
    images = cifar(tmp_path, getattr(torchvision.datasets, name), monkeypatch)
    data = load(name, tmp_path, **SPLITS)
    assert data.test is not None
    assert (len(data.train), len(data.test), data.num_classes) == (count, 3, classes)
    assert all(np.array_equal(shown(data.train, i), image) for i, image in enumerate(images))
    assert data.train.labels.tolist() == [x for i in range(3, count + 3, 3) for x in (i % 10, 1, 2)]
    assert data.train.images.is_contiguous()


def svhn(root: Path, monkeypatch) -> dict[str, list[np.ndarray]]:
    """The matrices of Matlab, and their checksums."""
    images = {split: [pixels(i, 32, 32) for i in range(n)] for split, n in (("train", 5), ("test", 3))}
    listed = {}
    for split, several in images.items():
        path = root / f"{split}_32x32.mat"
        labels = np.arange(1, len(several) + 1, dtype=np.uint8)[:, None]
        labels[0] = 10  # a zero
        savemat(path, {"X": np.stack(several, axis=-1), "y": labels})
        listed[split] = ["unused", path.name, md5(path)]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", listed)
    return images


def test_svhn_from_its_matlab_files(tmp_path, monkeypatch) -> None:
    images = svhn(tmp_path, monkeypatch)
    data = load("SVHN", tmp_path, train={"split": "train"}, test={"split": "test"})
    assert data.test is not None
    assert data.train.labels.tolist() == [0, 2, 3, 4, 5]
    assert all(np.array_equal(shown(data.train, i), image) for i, image in enumerate(images["train"]))
    assert all(np.array_equal(shown(data.test, i), image) for i, image in enumerate(images["test"]))


def stl10(root: Path, monkeypatch, unlabeled: int = 4) -> dict[str, list[np.ndarray]]:
    """Binary files: pixels by columns, labels from 1 to 10, none for the unlabeled images."""
    folder = root / "stl10_binary"
    folder.mkdir()
    images = {
        split: [pixels(100 * len(split) + i, 96, 96) for i in range(n)]
        for split, n in (("train", 3), ("unlabeled", unlabeled), ("test", 3))
    }
    listed = {}
    for split, several in images.items():
        columns = [x.transpose(2, 1, 0) for x in several]
        (folder / f"{split}_X.bin").write_bytes(b"".join(x.tobytes() for x in columns))
        (folder / f"{split}_y.bin").write_bytes(bytes([1, 10, 4]))
        listed |= {f"{split}_{x}.bin": md5(folder / f"{split}_{x}.bin") for x in "Xy"}
    (folder / "unlabeled_y.bin").unlink()
    (folder / "class_names.txt").write_text("\n".join("abcdefghij") + "\n")
    for attribute in ("train_list", "test_list"):
        known = getattr(torchvision.datasets.STL10, attribute)
        monkeypatch.setattr(torchvision.datasets.STL10, attribute, [[name, listed[name]] for name, _ in known])
    return images


def test_stl10_with_its_unlabeled_images(tmp_path, monkeypatch) -> None:
    images = stl10(tmp_path, monkeypatch)
    data = load("STL10", tmp_path, train={"split": "train+unlabeled"}, test={"split": "test"})
    assert data.test is not None
    assert data.train.labels.tolist() == [0, 9, 3, -1, -1, -1, -1]
    assert data.train.labels.dtype == torch.int64
    assert data.test.labels.tolist() == [0, 9, 3]
    expected = images["train"] + images["unlabeled"]
    assert all(np.array_equal(shown(data.train, i), image) for i, image in enumerate(expected))
    assert (data.num_classes, data.is_labeled, data.train.classes[0]) == (10, True, "a")


def test_stl10_without_labels(tmp_path, monkeypatch) -> None:
    stl10(tmp_path, monkeypatch)
    data = load("STL10", tmp_path, train={"split": "unlabeled"}, test={"split": "test"})
    assert data.train.labels.tolist() == [-1] * 4
    assert not data.is_labeled
    assert data.val_dataloader() == []
    assert load("STL10", tmp_path, train={"split": "unlabeled"}).test is None


EUROSAT = ["AnnualCrop", "Forest", "SeaLake"]


def eurosat(folder: Path) -> None:
    for number, name in enumerate(EUROSAT):
        (folder / "2750" / name).mkdir(parents=True)
        for i in range(1, 11):
            image = pixels(100 * number + i, 64, 64)
            (folder / "2750" / name / f"{name}_{i}.jpg").write_bytes(encode(image, "JPEG", quality=95))


def test_eurosat_from_its_folders_a_tenth_held_out(tmp_path) -> None:
    eurosat(tmp_path / "eurosat")
    data = load("EuroSAT", tmp_path, train={}, test=None, image_size=64)
    assert data.test is not None
    assert data.train.classes == EUROSAT
    assert data.train.labels.bincount().tolist() == [9, 9, 9]
    assert data.test.labels.bincount().tolist() == [1, 1, 1]
    for i, name in enumerate(data.train.names):
        assert Path(name).parent.name == EUROSAT[data.train.labels[i]]
        assert np.array_equal(shown(data.train, i), np.asarray(Image.open(name)))


def imagenette(root: Path) -> None:
    for split, each in (("train", 3), ("val", 2)):
        for synset in ("n03000684", "n01440764"):
            folder = root / "imagenette2-160" / split / synset
            folder.mkdir(parents=True)
            for i in range(each):
                name = folder / f"ILSVRC2012_{split}_{i}.JPEG"
                name.write_bytes(encode(pixels(i, 160, 213), "JPEG"))


IMAGENETTE = {"train": {"split": "train", "size": "160px"}, "test": {"split": "val", "size": "160px"}}


def test_imagenette_from_its_folders(tmp_path) -> None:
    imagenette(tmp_path)
    data = load("Imagenette", tmp_path, image_size=64, **IMAGENETTE)
    assert data.test is not None
    assert data.train.classes == ["tench", "chain saw"]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.train.images.shape == (6, 3, 64, 64)


def test_a_set_that_keeps_files_and_labels_apart_is_read_too(tmp_path) -> None:
    folder = tmp_path / "flowers-102" / "jpg"
    folder.mkdir(parents=True)
    for i in range(1, 7):
        (folder / f"image_{i:05d}.jpg").write_bytes(encode(pixels(i), "JPEG"))
    savemat(folder.parent / "imagelabels.mat", {"labels": np.array([[5, 1, 5, 2, 1, 2]])})
    savemat(folder.parent / "setid.mat", {"trnid": [[1, 3, 4, 6]], "valid": [[2]], "tstid": [[2, 5]]})
    module_check = torchvision.datasets.Flowers102._check_integrity
    torchvision.datasets.Flowers102._check_integrity = lambda self: True
    try:
        data = load("Flowers102", tmp_path, train={"split": "train"}, test={"split": "test"}, image_size=12)
    finally:
        torchvision.datasets.Flowers102._check_integrity = module_check
    assert data.test is not None
    assert data.train.labels.tolist() == [4, 4, 1, 1]
    assert data.test.labels.tolist() == [0, 0]


# Downloads.


@pytest.fixture
def served(tmp_path) -> Iterator[tuple[Path, str, list[str]]]:
    """A folder, the address that serves it, and what was asked for."""
    folder = tmp_path / "served"
    folder.mkdir()
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None: ...

        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}/", asked
    server.shutdown()
    server.server_close()


def serve_fashion_mnist(folder: Path, address: str, monkeypatch) -> None:
    fashion_mnist(folder / "raw")
    listed = []
    for path in sorted((folder / "raw").iterdir()):
        packed = folder / f"{path.name}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        listed.append((packed.name, md5(packed)))
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [address])
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", listed)


def test_what_is_missing_is_downloaded_and_what_is_there_is_not(served, tmp_path, monkeypatch) -> None:
    folder, address, asked = served
    serve_fashion_mnist(folder, address, monkeypatch)
    root = tmp_path / "new" / "data"
    data = load("FashionMNIST", root, grey=True, download=True, **SPLITS)
    assert data.train.labels.tolist() == [9, 0, 3, 3, 1, 7]
    assert len(set(asked)) == 4
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    assert len(load("FashionMNIST", root, grey=True, download=True, **SPLITS).train) == 6


def _download(root: Path, results) -> None:
    data = load("FashionMNIST", root, grey=True, download=True, **SPLITS)
    results.put(data.train.labels.tolist())


def test_of_two_processes_one_downloads(served, tmp_path, monkeypatch) -> None:
    folder, address, asked = served
    serve_fashion_mnist(folder, address, monkeypatch)
    load("FashionMNIST", tmp_path / "alone", grey=True, download=True, **SPLITS)
    alone = len(asked)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    both = [context.Process(target=_download, args=(tmp_path / "data", results)) for _ in range(2)]
    for process in both:
        process.start()
    assert [results.get(timeout=120) for _ in both] == [[9, 0, 3, 3, 1, 7]] * 2
    for process in both:
        process.join()
    assert len(asked) == 2 * alone


def test_archives_are_downloaded_and_unpacked(served, tmp_path, monkeypatch) -> None:
    folder, address, _ = served
    imagenette(tmp_path / "made")
    with tarfile.open(folder / "imagenette2-160.tgz", "w:gz") as archive:
        archive.add(tmp_path / "made" / "imagenette2-160", "imagenette2-160")
    entry = (f"{address}imagenette2-160.tgz", md5(folder / "imagenette2-160.tgz"))
    monkeypatch.setattr(torchvision.datasets.Imagenette, "_ARCHIVES", {"160px": entry})
    data = load("Imagenette", tmp_path / "data", download=True, image_size=64, **IMAGENETTE)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("damage", ["checksum", "no archive"])
def test_a_damaged_download_is_one_line(damage: str, served, tmp_path, monkeypatch) -> None:
    folder, address, _ = served
    (folder / "imagenette2-160.tgz").write_bytes(b"<html>404</html>")
    digest = "0" * 32 if damage == "checksum" else md5(folder / "imagenette2-160.tgz")
    archives = {"160px": (f"{address}imagenette2-160.tgz", digest)}
    monkeypatch.setattr(torchvision.datasets.Imagenette, "_ARCHIVES", archives)
    with pytest.raises(
        ValueError, match=r"^Imagenette could not be downloaded to [^\n]*; put it there by hand[^\n]*$"
    ):
        load("Imagenette", tmp_path / "data", download=True, image_size=64, **IMAGENETTE)


def test_without_a_network_the_error_is_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/", "http://127.0.0.1:9/"]
    )
    with pytest.raises(
        ValueError, match=r"^FashionMNIST could not be downloaded to [^\n]*set data.root[^\n]*refused"
    ):
        load("FashionMNIST", tmp_path, grey=True, download=True, **SPLITS)


def test_without_a_download_nothing_is_written(tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r"^CIFAR10 is not in [^\n]*: set data.download=true, or data.root[^\n]*$"
    ):
        load("CIFAR10", tmp_path / "nowhere", **SPLITS)
    assert not (tmp_path / "nowhere").exists()


def test_data_that_is_there_needs_no_folder_that_can_be_written_to(tmp_path) -> None:
    fashion_mnist(tmp_path / "FashionMNIST" / "raw")
    load("FashionMNIST", tmp_path, grey=True, download=True, **SPLITS)
    assert [path.name for path in tmp_path.iterdir()] == ["FashionMNIST"]


def test_mistakes_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="torchvision has no data set 'CIFAR11'; did you mean 'CIFAR10'"):
        load("CIFAR11", tmp_path)
    with pytest.raises(ValueError, match="torchvision has no data set 'os'"):
        load("os", tmp_path)
    with pytest.raises(ValueError, match=r"data.train: FashionMNIST has no argument 'split'; it has .*train"):
        load("FashionMNIST", tmp_path, train={"split": "train"})
    with pytest.raises(ValueError, match="does not list its images with their classes; use data=folder"):
        load("FakeData", tmp_path)
    fashion_mnist(tmp_path / "FashionMNIST" / "raw")
    with pytest.raises(ValueError, match="batch_size must not exceed"):
        load("FashionMNIST", tmp_path, grey=True, batch_size=7, **SPLITS)


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fashion_mnist(tmp_path / "sets" / "FashionMNIST" / "raw")
    assert len(load("FashionMNIST", Path("~/sets"), grey=True, **SPLITS).train) == 6
