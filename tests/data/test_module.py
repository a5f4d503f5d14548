"""The data module: who makes the views, what reaches the model, how it speaks of its data."""

import os
import pickle
import subprocess
import sys
import warnings
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from adadim_lightning.data import ImageData, ImageFiles, MemoryImages, TwoViews
from adadim_lightning.data.splits import hold_out, image_data
from tests.data.pictures import pixels, views, write
from tests.helpers import all_digits, fit, tiny_module, two_noisy_views

RECIPE: dict[str, Any] = {"crop": {"scale": [0.5, 1.0]}, "flip": {}, "noise": {"std": 0.1}}


def memory(count: int = 12, labels: Tensor | None = None, size: int = 12) -> MemoryImages:
    images = np.stack([pixels(i, size, size) for i in range(count)])
    return MemoryImages(torch.as_tensor(images).permute(0, 3, 1, 2).contiguous(), labels)


def files(folder: Path, count: int = 12, *, image_size: int | None = 12, **options) -> ImageFiles:
    paths = [str(write(folder / f"{i}.png", i, **options)) for i in range(count)]
    return ImageFiles(paths, torch.arange(count), image_size=image_size)


def grey_files(folder: Path, count: int) -> ImageFiles:
    paths = [str(write(folder / f"{i}.png", i, height=8, width=8)) for i in range(count)]
    return ImageFiles(paths, torch.arange(count) % 2, image_size=8, channels=1)


class Seen(Callback):
    """Notes the training batches as the model gets them."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batches.append(batch)


# Who loads, and who makes the views.


def test_images_on_disk_are_loaded_by_workers_and_those_in_memory_are_not(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)), raising=False)
    assert ImageData(files(tmp_path), None, views=views(), batch_size=2).num_workers == 5
    assert ImageData(memory(), None, views=views(), batch_size=2).num_workers == 0
    host = TwoViews(RECIPE, mean=[0.5], std=[0.5], backend="torchvision")
    assert ImageData(memory(), None, views=host, batch_size=2).num_workers == 5
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert ImageData(files(tmp_path), None, views=views(), batch_size=2).num_workers == 8
    assert ImageData(files(tmp_path), None, views=views(), batch_size=2, num_workers=3).num_workers == 3


def epoch(data: ImageData, seed: int) -> list[Any]:
    torch.manual_seed(seed)
    return list(data.train_dataloader())


def test_views_from_workers_differ_by_image_view_and_epoch_and_repeat_with_the_seed() -> None:
    grid = TwoViews(RECIPE, mean=[0.5] * 3, std=[0.5] * 3)
    same = MemoryImages(torch.as_tensor(pixels(0)).permute(2, 0, 1).expand(16, -1, -1, -1).contiguous())
    data = ImageData(same, None, views=grid, batch_size=4, num_workers=2)
    first, again, other = epoch(data, 1), epoch(data, 1), epoch(data, 2)
    shown = torch.cat([torch.cat(both) for both, _ in first])
    assert len({x.numpy().tobytes() for x in shown}) == 32  # no worker repeats what another drew
    for (a, _), (b, _) in zip(first, again, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    assert not torch.equal(first[0][0][0], other[0][0][0])


def test_views_from_workers_are_distributed_as_those_of_the_device() -> None:
    raw = MemoryImages(torch.full((256, 1, 4, 4), 128, dtype=torch.uint8))
    noisy = two_noisy_views()
    data = ImageData(raw, None, views=noisy, batch_size=64, num_workers=2)
    from_workers = torch.cat([torch.cat(both) for both, _ in epoch(data, 0)])
    on_device = torch.cat(noisy(raw.images))
    assert from_workers.shape == on_device.shape
    for statistic in (torch.mean, torch.std):
        assert abs(float(statistic(from_workers) - statistic(on_device))) < 0.02


@pytest.mark.parametrize("size", [None, 8])
def test_views_of_torchvision_come_from_workers_whatever_the_size_of_the_files(size: int | None, tmp_path) -> None:
    paths = [str(write(tmp_path / f"{i}.png", i, height=20 + i, width=30 - i)) for i in range(8)]
    images = ImageFiles(paths, torch.arange(8), image_size=10)
    host = TwoViews(RECIPE, mean=[0.5] * 3, std=[0.5] * 3, size=size, backend="torchvision")
    data = ImageData(images, None, views=host, batch_size=4, num_workers=2)
    labels = []
    for (view1, view2), batch_labels in data.train_dataloader():
        assert view1.shape == view2.shape == (4, 3, size or 10, size or 10)
        assert not torch.equal(view1, view2)
        labels += batch_labels.tolist()
    assert sorted(labels) == list(range(8))


def test_views_of_torchvision_see_the_image_as_it_was_before_it_was_scaled(tmp_path) -> None:
    seen: list[torch.Size] = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.shape)
            return x[..., :8, :8]

    host = TwoViews([Watch()], mean=[0.5] * 3, std=[0.5] * 3, size=8, backend="torchvision")
    data = image_data(files(tmp_path, height=30, width=20), None, views=host, batch_size=4, num_workers=0)
    next(iter(data.train_dataloader()))
    assert set(seen) == {torch.Size([3, 30, 20])}


@pytest.mark.parametrize("backend", ["kornia", "torchvision"])
def test_a_fit_on_files_through_workers(backend: str, tmp_path) -> None:
    seen = Seen()
    host = TwoViews({"flip": {}}, mean=[0.5], std=[0.5], backend=backend)
    train, test = grey_files(tmp_path / "a", 12), grey_files(tmp_path / "b", 4)
    (tmp_path / "a" / "3.png").write_bytes(b"oops")
    data = ImageData(train, test, views=host, batch_size=4, num_workers=2)
    with pytest.warns(UserWarning, match=r"1 of 12 images cannot be read: .*3.png; left out") as caught:
        trainer = fit(tiny_module(), data, seen, max_epochs=2)
    assert sum("cannot be read" in str(x.message) for x in caught) == 1
    assert trainer.global_step == 6
    (view1, view2), _ = seen.batches[0]
    assert view1.shape == view2.shape == (4, 1, 8, 8)
    assert view1.dtype == torch.float32
    every = torch.cat([labels for _, labels in seen.batches])
    assert sorted(every.tolist()) == [-1] * 2 + [0] * 12 + [1] * 10


def test_a_process_ends_that_still_reads_from_its_workers() -> None:
    script = """
from adadim_lightning.data import digits
from tests.data.pictures import views
batches = iter(digits(views=views(1), batch_size=32, num_workers=1).train_dataloader())
print(len(next(batches)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2]
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


@pytest.mark.parametrize("backend", ["kornia", "torchvision"])
def test_views_can_be_sent_to_a_worker(backend: str) -> None:
    host = TwoViews(RECIPE, mean=[0.5] * 3, std=[0.5] * 3, backend=backend)
    loader = ImageData(memory(), None, views=host, batch_size=4, num_workers=1).train_dataloader()
    train, collate = pickle.loads(ForkingPickler.dumps((loader.dataset, loader.collate_fn)))
    (view1, view2), _ = collate(train.__getitems__([0, 1]))
    assert view1.shape == view2.shape == (2, 3, 12, 12)


def test_a_fit_without_labels_has_no_validation() -> None:
    class NoValidation(Callback):
        def on_validation_start(self, trainer, pl_module) -> None:
            raise AssertionError

    images = all_digits().train.images[:32]
    data = ImageData(MemoryImages(images), None, views=two_noisy_views(), batch_size=16)
    assert fit(tiny_module(), data, NoValidation()).global_step == 2


class Stream(IterableDataset):
    """Somebody's own."""

    def __iter__(self):
        for i in range(10):
            yield torch.full((1, 8, 8), i, dtype=torch.uint8), i % 2


@pytest.mark.parametrize("backend", ["kornia", "torchvision"])
def test_a_stream_of_ones_own_trains(backend: str) -> None:
    seen = Seen()
    host = TwoViews({"flip": {}}, mean=[0.5], std=[0.5], backend=backend)
    data = ImageData(Stream(), all_digits().test.subset([0, 1, 2]), views=host, batch_size=4, num_workers=0)
    assert data.is_labeled
    assert fit(tiny_module(), data, seen, max_steps=3, max_epochs=-1).global_step == 3
    (view1, _), labels = seen.batches[0]
    assert view1.shape == (4, 1, 8, 8)
    assert labels.tolist() == [0, 1, 0, 1]
    alone = ImageData(Stream(), None, views=host, batch_size=4)
    assert alone.sample(3)[0][:, 0, 0, 0].tolist() == [0, 1, 2]
    assert "a stream of images, grey, 8 x 8, no labels" in str(alone)


# In memory or not.


@pytest.mark.parametrize(("in_memory", "kind"), [(None, MemoryImages), (True, MemoryImages), (False, ImageFiles)])
def test_images_are_kept_in_memory_as_asked(in_memory: bool | None, kind: type, tmp_path) -> None:
    data = image_data(files(tmp_path), None, in_memory=in_memory, views=views(), batch_size=2)
    assert type(data.train) is kind


def test_images_that_take_too_much_memory_stay_on_disk(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("adadim_lightning.data.splits.MOST_IN_MEMORY", 12 * 3 * 12 * 12 - 1)
    assert type(image_data(files(tmp_path), None, views=views(), batch_size=2).train) is ImageFiles
    assert (
        type(image_data(files(tmp_path), None, in_memory=True, views=views(), batch_size=2).train) is MemoryImages
    )


def test_images_that_cannot_be_read_are_told_once(tmp_path) -> None:
    images = files(tmp_path)
    Path(images.names[2]).write_bytes(b"oops")
    with pytest.warns(UserWarning, match=r"1 of 12 images cannot be read"):
        data = image_data(images, None, views=views(), batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.teardown("fit")
    lazy = ImageData(files(tmp_path / "b"), None, views=views(), batch_size=2, num_workers=0)
    Path(lazy.train.names[2]).write_bytes(b"oops")
    list(lazy.train_dataloader())
    with pytest.warns(UserWarning, match=r"1 of 12 images cannot be read"):
        lazy.teardown("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lazy.teardown("fit")


# What it says.


def test_one_line_describes_the_data(tmp_path) -> None:
    labeled = memory(12, torch.arange(12) % 3)
    data = ImageData(labeled, labeled.subset([0, 1]), views=views(size=8), batch_size=2, title="pets")
    assert str(data) == "pets: 12 images, RGB, 8 x 8, 3 classes; 2 held out; in memory"
    assert data.image_shape == (3, 8, 8)
    lazy = ImageData(
        ImageFiles(files(tmp_path).sources, image_size=10), None, views=views(), batch_size=2, num_workers=3
    )
    assert str(lazy) == "images: 12 images, RGB, 10 x 10, no labels; decoded by 3 workers"


def test_a_sample_is_the_first_images_as_they_are() -> None:
    data = ImageData(memory(5, torch.arange(5)), None, views=views(), batch_size=2)
    images, labels = data.sample(3)
    assert torch.equal(images, data.train.images[:3])
    assert labels.tolist() == [0, 1, 2]
    assert len(data.sample(99)[0]) == 5


def test_settings_that_cannot_be_are_errors() -> None:
    with pytest.raises(ValueError, match=r"batch_size must not exceed the number of training images, 12; got 13"):
        ImageData(memory(), None, views=views(), batch_size=13)
    with pytest.raises(ValueError, match=r"num_workers must be an integer >= 0"):
        ImageData(memory(), None, views=views(), batch_size=2, num_workers=-1)
    grey = ImageData(memory(), None, views=TwoViews([], mean=[0.5] * 2, std=[0.5] * 2), batch_size=2)
    with pytest.raises(ValueError, match=r"mean and std have 2 channels but the images 3: set data.channels"):
        str(grey)


# The held-out part.


def split(labels: list[int], share: float | int) -> tuple[list[int], list[int] | None]:
    """Labels of both parts; no image is in both, none is lost, and each keeps its label."""
    images = memory(len(labels), torch.tensor(labels), size=4)
    train, test = hold_out(images, share)
    parts = [train] if test is None else [train, test]
    known = {x.numpy().tobytes(): label for x, label in zip(images.images, labels, strict=True)}
    found = [known.pop(x.numpy().tobytes()) for part in parts for x in part.images]
    assert not known
    assert found == torch.cat([part.labels for part in parts]).tolist()
    return sorted(train.labels.tolist()), None if test is None else sorted(test.labels.tolist())


def test_the_held_out_part_is_stratified() -> None:
    train, test = split([0] * 20 + [1] * 10 + [2] * 30, 0.2)
    assert test == [0] * 4 + [1] * 2 + [2] * 6
    assert len(train) == 48
    assert split([0] * 20 + [1] * 10 + [2] * 30, 6)[1] == [0, 0, 1, 2, 2, 2]


def test_images_without_a_label_and_the_only_ones_of_a_class_are_trained_on() -> None:
    train, test = split([-1] * 10 + [0] * 10 + [1] * 10 + [5], 0.2)
    assert test == [0, 0, 1, 1]
    assert train == [-1] * 10 + [0] * 8 + [1] * 8 + [5]


def test_each_class_has_an_image_in_both_parts_however_small_the_share() -> None:
    assert split([0, 0, 1, 1, 2, 2, 2], 0.1)[1] == [0, 1, 2]


def test_nothing_is_held_out_where_that_is_wanted_or_there_is_nothing_to_score() -> None:
    for labels, share in (([0, 0, 1, 1], 0), ([0, 0, 1, 1], 0.0), ([-1] * 5, 0.2)):
        assert split(labels, share) == (labels, None)
    with pytest.warns(UserWarning, match=r"each class has one image, so none is held out"):
        assert split([0, 1, 2], 0.2) == ([0, 1, 2], None)


@pytest.mark.parametrize("share", [1.0, 4, 1, -1, 1.5, True, "a"])
def test_a_share_that_cannot_be_is_an_error(share: Any) -> None:
    with pytest.raises(ValueError, match=r"held_out"):
        split([0, 0, 1, 1], share)


class Orders(Callback):
    """Notes the labels of each epoch's training batches."""

    def __init__(self) -> None:
        self.epochs: list[list[int]] = []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.epochs.append([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.epochs[-1] += batch[1].tolist()


def test_each_epoch_has_an_order_of_its_own_also_from_a_loader_that_is_made_anew() -> None:
    images = all_digits().train.images[:32]
    found = []
    for reload in (0, 1):
        data = ImageData(MemoryImages(images, torch.arange(32)), None, views=two_noisy_views(), batch_size=16)
        orders = Orders()
        fit(tiny_module(), data, orders, max_epochs=3, reload_dataloaders_every_n_epochs=reload)
        assert all(sorted(epoch) == list(range(32)) for epoch in orders.epochs)
        assert len({tuple(epoch) for epoch in orders.epochs}) == 3
        found.append(orders.epochs)
    assert found[0] == found[1]
