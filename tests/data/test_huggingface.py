"""Data sets in the formats of the Hugging Face hub, from local files; nothing here needs a network."""

import io
import logging
import pickle
import socket
import sys
import tarfile
import zipfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from huggingface_hub import constants
from PIL import Image as Pillow
from torch.utils.data import DataLoader

from adadim_lightning.data import ImageData, UnreadableImagesError, huggingface
from adadim_lightning.data.huggingface import _encoded
from adadim_lightning.data.pixels import DataError
from tests.data.pictures import DATASETS, encode, pixels, views
from tests.helpers import fit, tiny_module


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # After each pass over a stream the library waits five seconds for its threads.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)


def load(path: Any, **options) -> ImageData:
    return huggingface(str(path), **{"views": views(), "batch_size": 2, "num_workers": 0, **options})


def rows(count: int, start: int = 0, classes: int = 2) -> dict[str, list]:
    images = [{"bytes": encode(pixels(i)), "path": None} for i in range(start, start + count)]
    return {"image": images, "label": [i % classes for i in range(start, start + count)]}


FEATURES = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})


def table(count: int, start: int = 0) -> Dataset:
    return Dataset.from_dict(rows(count, start), features=FEATURES)


def splits(folder: Path, *, train: int = 12, test: int = 4, shards: int = 2, test_name: str = "test") -> Path:
    """Parquet files as the hub has them."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = table(train)
    for i in range(shards):
        whole.shard(shards, i, contiguous=True).to_parquet(folder / f"train-{i:05d}-of-{shards:05d}.parquet")
    if test:
        table(test, 100).to_parquet(folder / f"{test_name}-00000-of-00001.parquet")
    return folder


def write(path: Path, columns: dict[str, list], **types: pa.DataType) -> Path:
    """A parquet file without a word of Hugging Face in it."""
    arrays = {name: pa.array(values, types.get(name)) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path)
    return path


def check(images, seeds: list[int], labels: list[int]) -> None:
    assert images.labels.tolist() == labels
    for i, seed in enumerate(seeds):
        assert np.array_equal(images[i][0].permute(1, 2, 0).numpy(), pixels(seed)), i


def test_a_folder_of_parquet_files_has_its_splits_in_their_names(tmp_path) -> None:
    data = load(splits(tmp_path / "data"))
    assert data.test is not None
    check(data.train, list(range(12)), [0, 1] * 6)
    check(data.test, [100, 101, 102, 103], [0, 1, 0, 1])
    assert data.train.classes == ["cat", "dog"]


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_the_held_out_split_goes_by_several_names(name: str, tmp_path) -> None:
    data = load(splits(tmp_path / "data", test_name=name))
    assert data.test is not None
    assert len(data.test) == 4
    assert len(data.train) == 12


def test_splits_may_be_folders(tmp_path) -> None:
    for split, count in (("train", 6), ("test", 4)):
        (tmp_path / "default" / split).mkdir(parents=True)
        table(count).to_parquet(tmp_path / "default" / split / "0000.parquet")
    data = load(tmp_path / "default")
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (6, 4)


def test_a_file_and_a_pattern(tmp_path) -> None:
    splits(tmp_path / "data", test=0)
    data = load(tmp_path / "data" / "train-00001-of-00002.parquet", held_out=0.0)
    check(data.train, list(range(6, 12)), [0, 1] * 3)
    assert data.test is None
    assert len(load(tmp_path / "data" / "train-*.parquet", held_out=0.0).train) == 12
    data = load(tmp_path / "data", held_out=0.5)
    assert data.test is not None
    assert data.test.labels.bincount().tolist() == [3, 3]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_save_to_disk_wrote_is_read(streaming: bool, tmp_path) -> None:
    table(6).save_to_disk(tmp_path / "one")
    DatasetDict({"train": table(6), "validation": table(2, 50)}).save_to_disk(tmp_path / "two")
    data = load(tmp_path / "two", streaming=streaming)
    assert data.test is not None
    check(data.test, [50, 51], [0, 1])
    if not streaming:
        check(data.train, list(range(6)), [0, 1] * 3)
        assert len(load(tmp_path / "one", held_out=0.0).train) == 6


def test_images_are_found_by_their_type_without_metadata(tmp_path) -> None:
    encoded = [encode(pixels(i)) for i in range(4)]
    struct = [{"bytes": x, "path": f"{i}.png"} for i, x in enumerate(encoded)]
    for column in (struct, encoded):
        path = write(tmp_path / "x.parquet", {"id": [1, 2, 3, 4], "picture": column, "label": [3, 0, 1, 2]})
        check(load(path, held_out=0.0).train, [0, 1, 2, 3], [3, 0, 1, 2])
    write(tmp_path / "x.parquet", {"picture": encoded}, picture=pa.large_binary())
    check(load(tmp_path / "x.parquet").train, [0, 1, 2, 3], [-1] * 4)


def test_images_may_be_files_that_a_table_names(tmp_path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encode(pixels(i)))
    struct = [{"bytes": None, "path": str(tmp_path / f"{i}.png")} for i in range(4)]
    write(tmp_path / "x.parquet", {"image": struct, "y": [0, 1, 0, 1]})
    check(load(tmp_path / "x.parquet", held_out=0.0).train, [0, 1, 2, 3], [0, 1, 0, 1])
    names = "\n".join(f"{tmp_path}/{i}.png,{i % 2}" for i in range(4))
    (tmp_path / "list.csv").write_text(f"file,label\n{names}\n")
    data = load(tmp_path / "list.csv", image_column="file", held_out=0.0)
    check(data.train, [0, 1, 2, 3], [0, 1, 0, 1])


def test_an_image_within_an_archive_is_read(tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/b.png", encode(pixels(7)))
    data = _encoded({"bytes": None, "path": f"zip://a/b.png::{tmp_path}/x.zip"})
    assert np.array_equal(np.asarray(Pillow.open(io.BytesIO(data))), pixels(7))


def labels_of(folder: Path, columns: dict[str, list], **options) -> tuple[list[int], list[str] | None]:
    images = [encode(pixels(i)) for i in range(4)]
    data = load(write(folder / "x.parquet", {"image": images, **columns}), held_out=0.0, **options)
    return data.train.labels.tolist(), data.train.classes


def test_labels_are_found_by_type_or_name(tmp_path) -> None:
    assert labels_of(tmp_path, {"label": ["b", "a", "b", "c"]}) == ([1, 0, 1, 2], ["a", "b", "c"])
    assert labels_of(tmp_path, {"label": [True, False, False, True]}) == ([1, 0, 0, 1], None)
    with pytest.warns(
        UserWarning, match=r"1 of 4 training images have no label \(none, or -1\); probes leave them out"
    ):
        assert labels_of(tmp_path, {"label": [1, None, 0, 1]}) == ([1, -1, 0, 1], None)
    with pytest.warns(UserWarning, match=r"1 of 4 training images"):
        assert labels_of(tmp_path, {"label": ["b", None, "a", "a"]}) == ([1, -1, 0, 0], ["a", "b"])
    with pytest.warns(UserWarning, match=r"1 of 4 training images"):
        assert labels_of(tmp_path, {"label": [None, 1, 0, 1]}) == ([-1, 1, 0, 1], None)
    with pytest.warns(UserWarning, match=r"1 of 4 training images"):
        assert labels_of(tmp_path, {"label": [-1, 0, 1, 0]}) == ([-1, 0, 1, 0], None)
    with pytest.warns(
        UserWarning, match=r"no column is taken for labels \(there are caption\); data.label_column="
    ):
        assert labels_of(tmp_path, {"caption": ["x", "y", "z", "w"]}) == ([-1] * 4, None)
    assert labels_of(tmp_path, {"kind": ["y", "x", "x", "y"]}, label_column="kind") == ([1, 0, 0, 1], ["x", "y"])
    assert labels_of(tmp_path, {"label": [0, 1, 0, 1]}, labeled=False) == ([-1] * 4, None)
    assert labels_of(tmp_path, {"label": [1, 2, 1, 0], "y": [0, 0, 0, 0]})[0] == [1, 2, 1, 0]


def test_of_fine_and_coarse_labels_the_fine_ones_are_taken(tmp_path) -> None:
    columns = {"img": rows(4)["image"], "coarse_label": [0, 0, 1, 1], "fine_label": [3, 2, 1, 0]}
    features = {
        "img": Image(),
        "coarse_label": ClassLabel(names=["a", "b"]),
        "fine_label": ClassLabel(names=["p", "q", "r", "s"]),
    }
    Dataset.from_dict(columns, features=Features(features)).to_parquet(tmp_path / "x.parquet")
    assert load(tmp_path / "x.parquet", held_out=0.0).train.labels.tolist() == [3, 2, 1, 0]
    coarse = load(tmp_path / "x.parquet", held_out=0.0, label_column="coarse_label").train
    assert (coarse.labels.tolist(), coarse.classes) == ([0, 0, 1, 1], ["a", "b"])
    del features["fine_label"]
    other = {**features, "shape_label": ClassLabel(names=["u", "v"])}
    columns["shape_label"] = columns.pop("fine_label")
    columns["shape_label"] = [0, 1, 1, 0]
    Dataset.from_dict(columns, features=Features(other)).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(
        ValueError, match=r"label column is not clear.*coarse_label, shape_label.*data.label_column="
    ):
        load(tmp_path / "x.parquet")


def test_a_class_keeps_its_number_in_the_held_out_split(tmp_path) -> None:
    (tmp_path / "d").mkdir()
    write(
        tmp_path / "d" / "train.parquet", {"image": [encode(pixels(i)) for i in range(4)], "label": list("bcab")}
    )
    write(tmp_path / "d" / "test.parquet", {"image": [encode(pixels(i)) for i in range(3)], "label": list("czb")})
    with pytest.warns(UserWarning, match="classes") as caught:
        data = load(tmp_path / "d")
    assert data.test is not None
    assert data.train.labels.tolist() == [1, 2, 0, 1]
    assert data.test.labels.tolist() == [2, 3, 1]
    assert data.train.classes == data.test.classes == ["a", "b", "c", "z"]
    assert [str(x.message) for x in caught] == [
        "1 of 4 classes (z) have no training image, so probes cannot know them",
        "1 of 4 classes (a) have no held-out image, so they are not scored",
    ]


def test_the_held_out_split_is_the_one_that_has_labels(tmp_path) -> None:
    names = ClassLabel(names=["cat", "dog"])
    hidden = Dataset.from_dict(
        rows(2) | {"label": [-1, -1]}, features=Features({"image": Image(), "label": names})
    )
    DatasetDict({"train": table(6), "test": hidden, "validation": table(4, 20)}).save_to_disk(tmp_path / "d")
    data = load(tmp_path / "d")
    assert data.test is not None
    check(data.test, [20, 21, 22, 23], [0, 1, 0, 1])
    assert load(tmp_path / "d", test_split="test").is_labeled is False


def test_damaged_images_are_left_out(tmp_path) -> None:
    images = [encode(pixels(i)) for i in range(6)]
    images[2], images[4] = b"oops", None
    write(tmp_path / "x.parquet", {"image": images, "label": [0, 1, 2, 3, 4, 5]})
    with pytest.warns(UserWarning, match=r"2 of 6 images cannot be read: number 2, number 4; left out"):
        data = load(tmp_path / "x.parquet", held_out=0.0)
    check(data.train, [0, 1, 3, 5], [0, 1, 3, 5])
    with pytest.raises(UnreadableImagesError, match=r"max_unreadable=1"):
        load(tmp_path / "x.parquet", held_out=0.0, max_unreadable=1)


def test_workers_read_rows(tmp_path) -> None:
    data = load(splits(tmp_path / "d"), in_memory=False, num_workers=2)
    labels = torch.cat([labels for _, labels in data.train_dataloader()])
    assert labels.bincount().tolist() == [6, 6]


def test_images_in_a_tar_of_webdataset_are_found(tmp_path) -> None:
    with tarfile.open(tmp_path / "train-0000.tar", "w") as archive:
        for i in range(4):
            for ending, content in (("png", encode(pixels(i))), ("cls", str(i % 2).encode())):
                entry = tarfile.TarInfo(f"{i:04d}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    check(load(tmp_path, held_out=0.0).train, [0, 1, 2, 3], [0, 1, 0, 1])


@pytest.mark.skipif(not DATASETS.exists(), reason=f"the real files are not at {DATASETS}")
def test_a_real_shard_of_cifar_10() -> None:
    path = DATASETS / "cifar10" / "test-00000-of-00001.parquet"
    data = load(path, held_out=0.0, in_memory=False)
    written = pq.read_table(path).to_pydict()
    assert data.train.labels.tolist() == written["label"]
    assert len(data.train) == 10_000
    for i in (0, 17, 9_999):
        read = np.asarray(Pillow.open(io.BytesIO(written["img"][i]["bytes"])))
        assert np.array_equal(data.train[i][0].permute(1, 2, 0).numpy(), read)


# Mistakes.


def test_mistakes_are_one_line_that_names_the_fix(tmp_path) -> None:
    folder = splits(tmp_path / "d")
    with pytest.raises(
        ValueError, match=r"has no split 'all'; it has test, train|has no split 'all'; it has train, test"
    ):
        load(folder, train_split="all")
    with pytest.raises(ValueError, match=r"has no split 'dev'"):
        load(folder, test_split="dev")
    with pytest.raises(ValueError, match=r"data.image_column: there is no column 'img'; there are image, label"):
        load(folder, image_column="img")
    with pytest.raises(ValueError, match=r"data.label_column: there is no column 'class'"):
        load(folder, label_column="class")
    with pytest.raises(ValueError, match=r"held_out must lie in"):
        load(splits(tmp_path / "whole", test=0), held_out=1.5)
    words = write(tmp_path / "words.parquet", {"text": ["a", "b"], "n": [1, 2]})
    with pytest.raises(
        ValueError, match=r"image column is not clear from the types \(none of text, n\); name it by"
    ):
        load(words)
    both = write(tmp_path / "both.parquet", {"left": [encode(pixels(0))], "right": [encode(pixels(0))]})
    with pytest.raises(ValueError, match=r"image column is not clear from the types \(left, right of"):
        load(both)
    many = write(tmp_path / "many.parquet", {"image": [encode(pixels(0))] * 2, "label": [[1, 2], [3]]})
    with pytest.raises(ValueError, match=r"data.label_column: label has several values for one image; labels are"):
        load(many, label_column="label")
    with pytest.warns(UserWarning, match=r"no labels: the column label has several values for one image"):
        assert load(many).num_classes is None
    for column in ("text", "nested"):
        odd = {"image": [encode(pixels(0))] * 2, "nested": [{"a": 1}, {"a": 2}], "text": ["a", "b"]}
        with pytest.raises(ValueError, match=r"data.(label|image)_column: (nested|image) holds neither"):
            load(
                write(tmp_path / "odd.parquet", odd | {"n": [1, 2]}),
                **({"label_column": "nested"} if column == "text" else {"image_column": "nested"}),
            )
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere", tmp_path / "d" / "*.arrow"):
        with pytest.raises(
            ValueError, match=r"no file at .* ends in parquet.*; folders of images are for data=folder"
        ):
            load(path)
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"^the data set .*bad.parquet cannot be loaded: [^\n]*$"):
        load(tmp_path / "bad.parquet")
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x.zip is none of parquet, arrow"):
        load(tmp_path / "x.zip")


def test_a_name_of_the_hub_without_a_network_is_one_line_at_once(monkeypatch) -> None:
    def unknown(*args: Any, **options: Any) -> Any:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it tries again"))
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    with pytest.raises(
        ValueError, match=r"^the data set nobody/nothing cannot be loaded: [^\n]*; a local copy[^\n]*$"
    ):
        load("nobody/nothing")
    assert before == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)


def test_a_missing_package_is_named_with_its_install_line(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'adadim-lightning\[hf\]'"):
        load("x")


def test_loading_is_silent_and_leaves_the_library_as_it_was(tmp_path, capfd) -> None:
    splits(tmp_path / "d")
    datasets.enable_progress_bars()
    level = datasets.logging.get_verbosity()
    capfd.readouterr()
    load(tmp_path / "d")
    assert capfd.readouterr() == ("", "")
    assert datasets.is_progress_bar_enabled()
    assert datasets.logging.get_verbosity() == level
    assert logging.getLogger("huggingface_hub").level != logging.CRITICAL


# Streams.


def stream(folder: Path, **options) -> ImageData:
    return load(folder, **{"streaming": True, "shuffle_buffer": 4, **options})


def seeds_of(loader: DataLoader) -> list[int]:
    """Which images an epoch brings, by their pixels."""
    known = {pixels(i).tobytes(): i for i in range(200)}
    return [known[x.permute(1, 2, 0).contiguous().numpy().tobytes()] for images, _ in loader for x in images]


def test_a_stream_brings_each_image_once_in_another_order_each_epoch(tmp_path) -> None:
    data = stream(splits(tmp_path / "d", train=16, shards=4))
    loader = data.train_dataloader()
    epochs = [seeds_of(loader) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(16))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != list(range(16))


def test_workers_of_a_stream_read_different_rows_in_every_epoch(tmp_path) -> None:
    data = stream(splits(tmp_path / "d", train=16, shards=4), num_workers=2)
    assert data.train_dataloader().num_workers == 2
    loader = DataLoader(data.train, 2, num_workers=2, persistent_workers=True)
    epochs = [seeds_of(loader) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(16))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_stream_has_no_more_workers_than_files(tmp_path) -> None:
    assert stream(splits(tmp_path / "d", shards=1), num_workers=4).num_workers == 1


def test_the_held_out_split_of_a_stream_is_kept_up_to_a_limit(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["adadim_lightning.data.huggingface"], "MOST_OF_A_STREAM", 3)
    data = stream(splits(tmp_path / "d", test=8))
    assert data.test is not None
    check(data.test, [100, 101, 102], [0, 1, 0])
    assert data.is_labeled
    assert "a stream of images" in str(data)
    assert torch.equal(data.sample(2)[0], data.test.__getitems__([0, 1])[0])


def test_a_stream_without_a_held_out_split_can_be_looked_at(tmp_path) -> None:
    with pytest.warns(
        UserWarning, match=r"no probes: .* has no split to hold out, and a stream is not split; data"
    ):
        data = stream(splits(tmp_path / "d", test=0), shuffle_buffer=1)
    assert data.test is None
    assert not data.is_labeled
    images, labels = data.sample(3)
    assert np.array_equal(images[2].permute(1, 2, 0).numpy(), pixels(2))
    assert labels.tolist() == [0, 1, 0]
    assert data.image_shape == (3, 12, 12)
    assert data.val_dataloader() == []


def test_words_for_labels_of_a_stream_are_numbered_by_the_held_out_images(tmp_path) -> None:
    (tmp_path / "d").mkdir()
    images = [encode(pixels(i)) for i in range(4)]
    write(tmp_path / "d" / "train.parquet", {"image": images, "label": ["b", "c", "a", None]})
    write(tmp_path / "d" / "test.parquet", {"image": images, "label": list("bbaa")})
    data = stream(tmp_path / "d", shuffle_buffer=1)
    with pytest.warns(
        UserWarning, match=r"labels of the stream that no held-out image has, such as c, count as mis"
    ):
        assert [label for _, label in data.train] == [1, -1, 0, -1]
    assert data.test is not None
    assert data.test.labels.tolist() == [1, 1, 0, 0]


@pytest.mark.filterwarnings("default:images of the stream")
@pytest.mark.filterwarnings("default:no probes")
def test_damaged_images_of_a_stream_are_counted_in_each_epoch(tmp_path) -> None:
    images = [encode(pixels(i)) for i in range(6)]
    images[2], images[4] = b"oops", None
    write(tmp_path / "train.parquet", {"image": images, "label": [0, 1, 2, 3, 4, 5]})
    data = stream(tmp_path, shuffle_buffer=1, max_unreadable=2)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"images of the stream cannot be read: 2; left out"):
            assert [label for _, label in data.train] == [0, 1, 3, 5]
    tight = stream(tmp_path, shuffle_buffer=1, max_unreadable=1, num_workers=1)
    with pytest.raises(UnreadableImagesError, match=r"^2 images of the stream cannot be read, more than .*=1"):
        list(tight.train_dataloader())


@pytest.mark.filterwarnings("ignore:images of the stream")
@pytest.mark.filterwarnings("ignore:no probes")
def test_a_stream_without_any_readable_image_is_named(tmp_path) -> None:
    write(tmp_path / "train.parquet", {"image": [b"oops", None, b""], "label": [0, 1, 2]})
    with pytest.raises(DataError, match=r"^the stream has no image that can be read$"):
        stream(tmp_path, max_unreadable=9).sample(2)


def test_ids_of_64_bits_of_a_stream_are_classes(tmp_path) -> None:
    for split in ("train", "test"):
        columns = {"image": [encode(pixels(i)) for i in range(6)], "label": [2**63 + i % 3 for i in range(6)]}
        write(tmp_path / f"{split}.parquet", columns, label=pa.uint64())
    data = stream(tmp_path, shuffle_buffer=1)
    assert data.test is not None
    assert data.test.labels.tolist() == [label for _, label in data.train] == [0, 1, 2] * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_a_set_can_be_sent_to_a_worker(streaming: bool, tmp_path) -> None:
    data = load(splits(tmp_path / "d"), streaming=streaming, shuffle_buffer=1, in_memory=False)
    loader = data.train_dataloader()
    train, collate = pickle.loads(ForkingPickler.dumps((loader.dataset, loader.collate_fn)))
    images, labels = next(iter(train)) if streaming else collate(train.__getitems__([0, 1, 2]))
    expected = next(iter(loader.dataset)) if streaming else loader.dataset.__getitems__([0, 1, 2])
    assert torch.equal(images, expected[0])
    assert torch.equal(labels, expected[1])
    assert images.shape[1:] == (3, 12, 12)


def test_a_stream_trains(tmp_path) -> None:
    write(
        tmp_path / "train.parquet", {"image": [encode(pixels(i, 8, 8, 1)) for i in range(12)], "label": [0, 1] * 6}
    )
    write(
        tmp_path / "test.parquet", {"image": [encode(pixels(i, 8, 8, 1)) for i in range(4)], "label": [0, 1] * 2}
    )
    data = stream(tmp_path, channels=1, views=views(1), batch_size=4)
    trainer = fit(tiny_module(), data, max_steps=5, max_epochs=-1)
    assert trainer.global_step == 5
