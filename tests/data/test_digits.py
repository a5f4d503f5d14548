"""The digits and their batches."""

import pytest
import torch
from lightning.pytorch import Callback
from sklearn.datasets import load_digits
from torch import Tensor

from adadim_lightning.data import ImageData, MemoryImages, digits
from tests.helpers import all_digits, fit, some_digits, tiny_module, two_noisy_views


def test_the_split_is_stratified_and_complete() -> None:
    data = all_digits()
    assert (len(data.train), len(data.test)) == (1297, 500)
    counts = torch.bincount(torch.cat([data.train.labels, data.test.labels]))
    assert counts.tolist() == torch.bincount(torch.as_tensor(load_digits().target)).tolist()
    for images, size in ((data.train, 1297), (data.test, 500)):
        share = torch.bincount(images.labels, minlength=10) / size
        assert float((share - counts / 1797).abs().max()) < 1 / size


def test_train_and_test_share_no_image_of_the_source() -> None:
    data = all_digits()
    source = (torch.as_tensor(load_digits().data) * 255 / 16).round().to(torch.uint8)
    both = torch.cat([data.train.images, data.test.images]).flatten(1)
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, source.tolist()))


def test_images_are_bytes_of_the_full_range_with_their_labels() -> None:
    data = all_digits()
    assert data.train.images.shape == (1297, 1, 8, 8)
    assert data.train.images.dtype == torch.uint8
    assert (int(data.train.images.min()), int(data.train.images.max())) == (0, 255)
    labels = {tuple(x): int(y) for x, y in zip(*load_digits(return_X_y=True), strict=True)}
    for image, label in zip(data.test.images, data.test.labels, strict=True):
        assert labels[tuple((image.flatten().double() * 16 / 255).round().tolist())] == int(label)
    assert data.num_classes == 10


def test_the_split_is_the_same_whatever_the_seed_of_the_run() -> None:
    splits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        splits.append(digits(views=two_noisy_views()))
    assert torch.equal(splits[0].train.images, splits[1].train.images)
    assert torch.equal(splits[0].test.labels, splits[1].test.labels)


@pytest.mark.parametrize("batch_size", [0, 1, 1298])
def test_a_batch_size_that_cannot_be_is_an_error(batch_size: int) -> None:
    limit = "an integer >= 2" if batch_size < 2 else "not exceed the number of training images, 1297"
    with pytest.raises(ValueError, match=f"batch_size must .*{limit}.* got {batch_size}"):
        digits(views=two_noisy_views(), batch_size=batch_size)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(3, 1, 8, 8), torch.zeros(3)),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(3)),
        (torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(2)),
    ],
    ids=["floats", "no channels", "too few labels"],
)
def test_images_that_do_not_fit_are_an_error(images: Tensor, labels: Tensor) -> None:
    with pytest.raises(ValueError, match="images must be uint8"):
        MemoryImages(images, labels)


def numbered(size: int) -> MemoryImages:
    """Every image is filled with its own label."""
    labels = torch.arange(size)
    return MemoryImages(labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone(), labels)


def test_labels_stay_with_their_images_through_the_loaders() -> None:
    data = ImageData(numbered(50), numbered(20), views=two_noisy_views(), batch_size=8)
    seen = []
    for images, labels in data.train_dataloader():
        assert torch.equal(images[:, 0, 0, 0].long(), labels)
        seen += labels.tolist()
    assert len(seen) == len(set(seen)) == 48  # the incomplete batch is left out
    assert seen != sorted(seen)
    (images, labels), *rest = data.val_dataloader()
    assert rest == []
    assert labels.tolist() == images[:, 0, 0, 0].tolist() == list(range(20))
    image, label = data.train[7]
    assert int(image[0, 0, 0]) == int(label) == 7


def test_a_trainer_hands_out_two_views_to_train_on_and_clean_images_to_validate() -> None:
    batches: dict[str, list] = {"train": [], "val": []}

    class Keep(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            batches["train"].append(batch)

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
            batches["val"].append(batch)

    data = some_digits()
    fit(tiny_module(), data, Keep(), num_sanity_val_steps=0)
    assert len(batches["train"]) == 3
    for (view1, view2), labels in batches["train"]:
        assert view1.shape == view2.shape == (32, 1, 8, 8)
        assert labels.shape == (32,)
        assert not torch.equal(view1, view2)
    ((images, labels),) = batches["val"]
    assert torch.equal(images, data.views.clean(data.test.images))
    assert torch.equal(labels, data.test.labels)
