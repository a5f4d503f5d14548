"""Probes on modules of other people: labels wherever their batches have them, or loaders of the probe's own."""

import random
import re
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from adadim_lightning import DimensionMonitor, OnlineKNN, OnlineLinearProbe
from adadim_lightning.callbacks.labels import LabelReader, count_classes
from adadim_lightning.evaluation import linear_accuracy
from tests.helpers import FixedPairs, Recorder, all_digits, assert_same_weights, every_epoch, fit

BATCH = 16
PROBES: dict[str, tuple[Callable[..., Any], str]] = {
    "linear": (OnlineLinearProbe, "probe/linear_top1"),
    "kNN": (OnlineKNN, "probe/knn_top1"),
}
BOTH = pytest.mark.parametrize(("make", "key"), PROBES.values(), ids=PROBES.keys())


def views_of(batch: Any) -> list[Tensor]:
    """Whoever wrote the module knows where its views are."""
    if isinstance(batch, dict):
        return batch["views"]
    if isinstance(batch[0], Tensor) and batch[0].ndim == 1:  # indices come first
        return batch[1]
    return batch[0] if isinstance(batch[0], list | tuple) else batch


class SimSiam(LightningModule):
    """Somebody else's module, without a validation loop."""

    def __init__(self, *, lr: float = 0.05, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(dropout)
        )
        self.projection_head = nn.Linear(48, 8)
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z1, z2 = (self.projection_head(self.backbone(view)) for view in views_of(batch))
        return -nn.functional.cosine_similarity(z1, z2.detach()).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class WithValidation(SimSiam):
    """And with one."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.backbone(batch["image"] if isinstance(batch, dict) else batch[0])


class Unlabeled(Dataset[tuple[Tensor, Tensor]]):
    """Two views, and nothing else."""

    def __init__(self, size: int) -> None:
        self.pairs = FixedPairs(size)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pairs[index][0]


def unlabeled(batches: int = 3, **options: Any) -> DataLoader[Any]:
    return DataLoader(Unlabeled(batches * BATCH), batch_size=BATCH, **options)


def pixels_and_labels(part: str, size: int) -> tuple[Tensor, Tensor]:
    images = getattr(all_digits(), part)
    return images.images[:size].float() / 255, images.labels[:size]


class Digits(Dataset[tuple[Tensor, Tensor]]):
    """Clean images with labels, which names no classes."""

    def __init__(self, part: str, size: int) -> None:
        self.rows = list(zip(*pixels_and_labels(part, size), strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.rows[index]


def labeled(size: int = 200, **options: Any) -> DataLoader[Any]:
    return DataLoader(Digits("train", size), batch_size=40, **options)


def held_out(size: int = 100) -> DataLoader[Any]:
    return DataLoader(Digits("test", size), batch_size=40)


def embedded(module: Any, part: str, size: int) -> tuple[Tensor, Tensor]:
    """R in evaluation mode, and labels."""
    images, labels = pixels_and_labels(part, size)
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    with torch.no_grad():
        r = module.backbone(images)
    for m, training in modes:
        m.training = training
    return r, labels


def knn_by_hand(r: Tensor, targets: Tensor, bank: Tensor, labels: Tensor, k: int) -> float:
    def unit(x: Tensor) -> np.ndarray:
        rows = x.double().numpy()
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    correct = 0
    for similarity, target in zip(unit(r) @ unit(bank).T, targets.tolist(), strict=True):
        votes = np.zeros(10)
        for i in np.argsort(-similarity)[:k]:
            votes[int(labels[i])] += np.exp(similarity[i] / 0.07)
        correct += int(votes.argmax() == target)
    return correct / len(targets)


def linear_by_hand(probe: Any, r: Tensor, targets: Tensor) -> float:
    norm, linear = probe.probe[0], probe.probe[1]
    standardized = (r - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    predicted = (standardized @ linear.weight.T + linear.bias).argmax(dim=1)
    return float((predicted == targets).float().mean())


# Loaders of the probe's own.


def test_without_labels_and_without_validation_the_probes_score_by_their_own_loaders() -> None:
    module, recorder = SimSiam(), Recorder()
    loaders = {"train_loader": labeled(), "val_loader": held_out()}
    linear, neighbors = OnlineLinearProbe(**loaders), OnlineKNN(k=5, **loaders)
    logged = fit(module, unlabeled(), linear, neighbors, recorder, max_epochs=2).callback_metrics
    r, targets = embedded(module, "test", 100)
    assert float(logged["probe/linear_top1"]) == pytest.approx(linear_by_hand(linear, r, targets))
    expected = knn_by_hand(r, targets, *embedded(module, "train", 200), k=5)
    assert float(logged["probe/knn_top1"]) == pytest.approx(expected, abs=0.011)  # ties
    assert all({"probe/linear_top1", "probe/knn_top1"} <= set(epoch) for epoch in recorder.logged)


def test_by_their_own_loaders_the_probes_learn_to_read_the_digits() -> None:
    loaders = {"train_loader": labeled(1297, shuffle=True), "val_loader": held_out(500)}
    module = SimSiam(lr=1e-3)
    used = fit(module, unlabeled(), OnlineLinearProbe(**loaders), OnlineKNN(**loaders), max_epochs=2)
    assert float(used.callback_metrics["probe/linear_top1"]) > 0.85
    assert float(used.callback_metrics["probe/knn_top1"]) > 0.85


class Pixels(WithValidation):
    """R are the pixels, which do not change."""

    def __init__(self) -> None:
        super().__init__(lr=1e-3)
        self.backbone = nn.Flatten()
        self.projection_head = nn.Linear(64, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = next(x for x in (batch if isinstance(batch, list | tuple) else [batch]) if x.ndim > 2)
        return self.projection_head(self.backbone(images)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.backbone(batch[0])


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.rand(40, 1, 8, 8))


class Scores(Callback):
    """Accuracy and weights after each epoch."""

    def __init__(self, probe: Any) -> None:
        self.probe = probe
        self.accuracies: list[float] = []
        self.weights: list[Tensor] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.accuracies.append(float(trainer.callback_metrics["probe/linear_top1"]))
        self.weights.append(self.probe.probe[1].weight.detach().clone())


LENGTHS: dict[str, dict[str, Any]] = {
    "1 epoch": {"max_epochs": 1},
    "2 epochs": {"max_epochs": 2},
    "4 epochs": {"max_epochs": 4},
    "1 step": {"max_steps": 1},
    "an epoch cut off": {"max_steps": 7, "max_epochs": -1},
    "few batches": {"max_epochs": 2, "limit_train_batches": 1},
    "no end but time": {"max_epochs": -1, "max_time": {"seconds": 1}},
    "accumulated": {"max_epochs": 2, "accumulate_grad_batches": 4},
    "validation within": {"max_epochs": 2, "val_check_interval": 2},
}


@pytest.mark.parametrize("kind", ["loader", "stream"])
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS.keys())
def test_linear_probe_on_its_own_loaders_reads_as_well_after_any_length_of_training(
    length: Any, kind: str
) -> None:
    train, val = pixels_and_labels("train", 1000), pixels_and_labels("test", 500)
    expected = linear_accuracy(*[(x.flatten(1), y) for x, y in (train, val)])
    loaders = [DataLoader(list(zip(*part, strict=True)), batch_size=250) for part in (train, val)]
    probe = OnlineLinearProbe("backbone", train_loader=loaders[0], val_loader=loaders[1])
    scores = Scores(probe)
    data = DataLoader(Stream(), batch_size=8) if kind == "stream" else DataLoader(torch.rand(40, 1, 8, 8), 8)
    fit(Pixels(), (data, held_out()), probe, scores, **length)
    assert expected > 0.9
    assert min(scores.accuracies) > expected - 0.04
    for before, after in zip(scores.weights, scores.weights[1:], strict=False):
        assert float((after - before).abs().max()) > 1e-3


def test_linear_probe_learns_in_a_second_fit_as_in_the_first() -> None:
    loaders = {"train_loader": labeled(1000), "val_loader": held_out(500)}
    probe, module = OnlineLinearProbe("backbone", **loaders), Pixels()
    scores = Scores(probe)
    fit(module, unlabeled(1), probe, scores)
    used = fit(module, unlabeled(1), probe, scores)  # with a new trainer
    used.fit_loop.max_epochs = 3  # and on with the same one
    used.fit(module, unlabeled(1))
    assert len(scores.accuracies) == 4
    assert min(scores.accuracies) > 0.9
    assert scores.accuracies[-1] >= scores.accuracies[0] - 0.01


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_linear_probe_reads_representations_of_any_scale(scale: float) -> None:
    module = Pixels()
    module.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 64, bias=False))
    module.backbone[1].weight = nn.Parameter(scale * torch.eye(64), requires_grad=False)
    own = OnlineLinearProbe("backbone", train_loader=labeled(1000), val_loader=held_out(500))
    beside = OnlineLinearProbe("backbone", num_classes=10, name="beside")
    used = fit(module, (DataLoader(Digits("train", 1000), 50), held_out(500)), own, beside)
    assert float(used.callback_metrics["probe/linear_top1"]) > 0.9
    assert float(used.callback_metrics["beside/probe/linear_top1"]) > 0.8


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_linear_probe_learns_in_every_step_of_a_short_training(steps: int) -> None:
    probe, data = OnlineLinearProbe(num_classes=10), DataLoader(Digits("train", steps * 32), 32)
    changes: list[float] = []

    class Watch(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: int
        ) -> None:
            self.before = None if probe.probe is None else probe.probe[1].weight.detach().clone()

        def on_train_batch_end(self, *_: Any) -> None:
            weight = probe.probe[1].weight.detach()
            changes.append(float((weight - (self.before if self.before is not None else 0)).abs().max()))

    used = fit(Pixels(), (data, held_out(500)), probe, Watch())
    assert len(changes) == steps
    assert min(changes) > 1e-4
    assert float(used.callback_metrics["probe/linear_top1"]) > 0.3


def test_the_probe_can_lead_a_checkpoint_without_labels_in_the_training(tmp_path) -> None:
    probe = OnlineKNN(train_loader=labeled(), val_loader=held_out())
    best = every_epoch(tmp_path)
    best.monitor, best.mode, best.save_top_k = "probe/knn_top1", "max", 1
    recorder = Recorder()
    fit(SimSiam(), unlabeled(), probe, recorder, best, max_epochs=3)
    scores = [logged["probe/knn_top1"] for logged in recorder.logged]
    assert float(best.best_model_score) == pytest.approx(max(scores))


@BOTH
def test_a_train_loader_alone_is_scored_on_the_modules_validation_batches(make: Any, key: str) -> None:
    module = WithValidation()
    probe = make(train_loader=labeled())
    used = fit(module, (unlabeled(), held_out()), probe, max_epochs=2, num_sanity_val_steps=2)
    # The validation follows the last training step, so that these are its weights.
    r, targets = embedded(module, "test", 100)
    if make is OnlineKNN:
        expected = knn_by_hand(r, targets, *embedded(module, "train", 200), k=20)
    else:
        expected = linear_by_hand(probe, r, targets)
    assert float(used.callback_metrics[key]) == pytest.approx(expected, abs=0.011)


@BOTH
def test_a_val_loader_alone_is_scored_by_what_the_training_batches_taught(make: Any, key: str) -> None:
    module, recorder = SimSiam(), Recorder()
    data = DataLoader(FixedPairs(3 * BATCH), batch_size=BATCH)
    probe = make(val_loader=held_out())
    used = fit(module, data, probe, recorder, max_epochs=1)
    r, targets = embedded(module, "test", 100)
    if make is OnlineKNN:
        bank, labels = recorder.rows(0, [0, 1, 2]), torch.cat([torch.cat([y, y]) for _, y in data])
        expected = knn_by_hand(r, targets, bank, labels, k=20)
    else:
        expected = linear_by_hand(probe, r, targets)
    assert float(used.callback_metrics[key]) == pytest.approx(expected, abs=0.011)


# Where the labels are.


def solo(index: int, views: tuple[Tensor, Tensor], label: Tensor) -> Any:
    return index, list(views), label


def lightly(index: int, views: tuple[Tensor, Tensor], label: Tensor) -> Any:
    return views, label, f"digit-{index}.png"


def dictionary(index: int, views: tuple[Tensor, Tensor], label: Tensor) -> Any:
    return {"views": list(views), "label": label}


def odd(index: int, views: tuple[Tensor, Tensor], label: Tensor) -> Any:
    return {"views": list(views), "label": torch.tensor(7), "kind of digit": label}


def swapped(index: int, views: tuple[Tensor, Tensor], label: Tensor) -> Any:
    return views, torch.tensor(7), label


class Formatted(FixedPairs):
    def __init__(self, size: int, form: Callable[..., Any]) -> None:
        super().__init__(size)
        self.form = form

    def __getitem__(self, index: int) -> Any:
        views, label = super().__getitem__(index)
        return self.form(index, views, label)


@pytest.mark.parametrize(
    ("form", "labels"),
    [
        (solo, None),
        (lightly, None),
        (dictionary, None),
        (dictionary, "label"),
        (odd, "kind of digit"),
        (swapped, 2),
        (swapped, -1),
        (odd, lambda batch: batch["kind of digit"]),
        (solo, lambda batch: batch[2][:, None]),
    ],
    ids=[
        "solo-learn",
        "lightly",
        "dictionary",
        "key",
        "odd key",
        "position",
        "from the end",
        "function",
        "column",
    ],
)
@pytest.mark.filterwarnings("ignore:.*has nothing to score on")
def test_the_labels_of_a_batch_are_found_or_named(form: Callable[..., Any], labels: Any) -> None:
    data = DataLoader(Formatted(3 * BATCH, form), batch_size=BATCH)
    neighbors, linear = (make(labels=labels) for make in (OnlineKNN, OnlineLinearProbe))
    recorder, module = Recorder(), SimSiam()
    fit(module, data, neighbors, linear, recorder)
    r, kept = (torch.cat(x) for x in zip(*neighbors.state_dict()["bank"], strict=True))
    expected = [FixedPairs(3 * BATCH).labels[i : i + BATCH] for i in range(0, 3 * BATCH, BATCH)]
    assert torch.equal(kept, torch.cat([torch.cat([y, y]) for y in expected]))
    assert torch.equal(r, recorder.rows(0, [0, 1, 2]))
    assert linear.probe[1].out_features == 10


def test_the_labels_of_the_probes_own_loader_can_be_named_too() -> None:
    rows = [{"picture": x, "kind of digit": y} for x, y in Digits("train", 80).rows]
    loader = DataLoader(rows, batch_size=40)
    probe = OnlineKNN(labels="kind of digit", train_loader=loader, val_loader=loader)
    fit(SimSiam(), unlabeled(), probe)
    [(r, labels)] = probe._bank
    assert torch.equal(labels, pixels_and_labels("train", 80)[1])
    assert r.shape == (80, 48)


class Pair(NamedTuple):
    picture: Any
    number: Any
    kind: Any


RIGHT: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "image, label": lambda x, y, i: (x, y),
    "image, label, index": lambda x, y, i: (x, y, i),
    "image, index, label": lambda x, y, i: (x, i, y),
    "index, image, label": lambda x, y, i: (i, x, y),
    "label, image": lambda x, y, i: (y, x),
    "label, image, index": lambda x, y, i: (y, x, i),
    "column": lambda x, y, i: (x, y[:, None]),
    "index, column": lambda x, y, i: (x, i[:, None], y[:, None]),
    "views, label, names": lambda x, y, i: ([x, x], y, [str(k) for k in i.tolist()]),
    "index, views, label": lambda x, y, i: (i, [x, x], y),
    "nested": lambda x, y, i: (x, (i, y)),
    "dictionary": lambda x, y, i: {"index": i, "image": x, "target": y},
    "dictionaries of views": lambda x, y, i: [{"image": x, "label": y}, {"image": x, "label": y}],
    "dictionary of meta data": lambda x, y, i: {"image": x, "meta": {"patient": i % 3, "label": y}},
    "named tuple": lambda x, y, i: Pair(x, i, y),
    "named label": lambda x, y, i: namedtuple("Named", "target image id")(y, x, i % 3),
    "named index": lambda x, y, i: namedtuple("Named", "image idx kind")(x, i % 3, y),
    "list of numbers": lambda x, y, i: (x, y.tolist()),
    "array": lambda x, y, i: (x, y.numpy()),
    "small integers": lambda x, y, i: (x, y.to(torch.uint8)),
    "floats beside": lambda x, y, i: (x, y, torch.rand(len(y))),
    "attributes beside": lambda x, y, i: (x, y, torch.stack([i, y, i], dim=1)),
    "some unlabeled": lambda x, y, i: (x, torch.where(i % 2 == 0, y, -1), i),
    "none labeled": lambda x, y, i: (x, torch.full_like(y, -1), i),
}
REFUSED: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "image": lambda x, y, i: x,
    "images": lambda x, y, i: (x, x),
    "index, image": lambda x, y, i: (i, x),
    "two of them": lambda x, y, i: (x, y, i % 3),
    "three of them": lambda x, y, i: (x, i, y, i % 3),
    "before and behind": lambda x, y, i: (i % 3, x, y),
    "one-hot": lambda x, y, i: (x, nn.functional.one_hot(y, 10)),
    "one-hot, index": lambda x, y, i: (x, nn.functional.one_hot(y, 10).float(), i),
    "several findings": lambda x, y, i: (x, torch.stack([y, y], dim=1)),
    "floats": lambda x, y, i: (x, y.float()),
    "floats, index": lambda x, y, i: (x, y.float(), i),
    "words": lambda x, y, i: (x, [f"class {k}" for k in y.tolist()]),
    "one number": lambda x, y, i: (x, y[0]),
    "other names": lambda x, y, i: {"image": x, "species": y},
    "two usual names": lambda x, y, i: {"image": x, "label": y, "target": i},
    "views that differ": lambda x, y, i: [{"image": x, "label": y}, {"image": x, "label": i}],
    "too few": lambda x, y, i: (x, y[:5]),
}


def rows_of_a_batch(shuffled: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(500, generator=generator)[:64] if shuffled else torch.arange(64)
    return torch.rand(64, 1, 8, 8), torch.randint(10, (64,), generator=generator), index


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("form", RIGHT.values(), ids=RIGHT.keys())
def test_labels_are_found_in_layouts_that_leave_no_doubt(form: Any, shuffled: bool) -> None:
    x, y, i = rows_of_a_batch(shuffled)
    batch = form(x, y, i)
    expected = {
        RIGHT["some unlabeled"]: torch.where(i % 2 == 0, y, -1),
        RIGHT["none labeled"]: torch.full_like(y, -1),
    }
    reader = LabelReader(None, "OnlineKNN")
    for classes in (None, 10):
        for source in ("train", "held-out"):
            labels = reader.read(batch, 128, (source, classes), lambda classes=classes: classes)
            assert torch.equal(labels, expected.get(form, y).repeat(2))
    reader.check()


@pytest.mark.parametrize("form", REFUSED.values(), ids=REFUSED.keys())
def test_labels_that_are_in_doubt_are_an_error_that_lists_the_batch(form: Any) -> None:
    x, y, i = rows_of_a_batch(True)
    batch = form(x, y, i)
    with pytest.raises(ValueError, match=r"labels=\.\.\., a key, a position or a function") as error:
        LabelReader(None, "OnlineKNN").read(batch, 64, "train", lambda: None)
    line = str(error.value)
    assert "float32 (64, 1, 8, 8)" in line
    assert "\n" not in line
    entries = batch.items() if isinstance(batch, dict) else enumerate(batch) if isinstance(batch, tuple) else []
    assert all(f"batch[{place!r}]: " in line for place, _ in entries)


@pytest.mark.parametrize(("form", "remedy"), [("one-hot", "batch[1].argmax(1)"), ("floats", "batch[1].long()")])
def test_the_remedy_in_the_message_is_one(form: str, remedy: str) -> None:
    x, y, i = rows_of_a_batch(True)
    batch = REFUSED[form](x, y, i)
    with pytest.raises(ValueError, match=re.escape(f"such as lambda batch: {remedy}, give")):
        LabelReader(None, "OnlineKNN").read(batch, 64, "train", lambda: None)
    found = LabelReader(eval(f"lambda batch: {remedy}"), "OnlineKNN").read(batch, 64, "train", lambda: None)
    assert torch.equal(found, y)


def test_an_index_that_repeats_after_all_is_an_error_before_anything_is_logged() -> None:
    """The first batch had labels that all differ beside a domain that repeats."""
    batches = [
        (torch.rand(4, 1, 8, 8), torch.tensor(y), torch.tensor([0, 0, 1, 1])) for y in ([1, 2, 3, 4], [5, 5, 6, 7])
    ]
    recorder = Recorder()
    with pytest.raises(ValueError, match="not clear which of these are the labels"):
        fit(Pixels(), (DataLoader(batches, batch_size=None), held_out()), OnlineKNN(), recorder)
    assert not recorder.logged


@pytest.mark.parametrize("own", [False, True])
def test_an_index_alone_is_not_taken_for_the_labels(own: bool) -> None:
    images, _ = pixels_and_labels("train", 64)
    indexed = DataLoader([(x, i) for i, x in enumerate(images)], batch_size=16, shuffle=True)
    for probe in (OnlineKNN, OnlineLinearProbe):
        made = probe(train_loader=indexed) if own else probe(**({} if probe is OnlineKNN else {"num_classes": 10}))
        with pytest.raises(ValueError, match=r"no two of 64 images share a label|a label is"):
            fit(Pixels(), (indexed, held_out()), made)


def test_training_and_held_out_batches_may_be_laid_out_differently() -> None:
    images, labels = pixels_and_labels("train", 256)
    train = DataLoader([(x, i, y) for i, (x, y) in enumerate(zip(images, labels, strict=True))], batch_size=64)
    val = DataLoader([(x, y, i) for i, (x, y) in enumerate(held_out().dataset)], batch_size=50)
    plain = DataLoader(list(zip(images, labels, strict=True)), batch_size=64)
    found = [fit(Pixels(), data, OnlineKNN()).callback_metrics for data in ((train, val), (plain, held_out()))]
    assert found[0]["probe/knn_top1"] == found[1]["probe/knn_top1"] > 0.8


def test_labels_of_a_named_place_must_be_class_numbers() -> None:
    x, y, i = rows_of_a_batch(True)
    with pytest.raises(ValueError, match=r"labels=1 gives int64 \(64, 10\): batch\[0\].*argmax"):
        LabelReader(1, "OnlineKNN").read((x, nn.functional.one_hot(y, 10)), 64, "train", lambda: None)
    with pytest.raises(ValueError, match=r"have no 'kind', given by labels=; they hold batch\['image'\]"):
        LabelReader("kind", "OnlineKNN").read({"image": x}, 64, "train", lambda: None)
    assert torch.equal(LabelReader("kind", "OnlineKNN").read(Pair(x, i, y), 64, "train", lambda: None), y)


# How many classes there are.


class Named(Digits):
    classes = tuple("abcdefghijklm")


class WithTargets(Digits):
    def __init__(self, part: str, size: int) -> None:
        super().__init__(part, size)
        self.targets = [*(int(y) for _, y in self.rows), 14]


class HuggingFace(Digits):
    features = {"image": SimpleNamespace(), "label": SimpleNamespace(num_classes=12)}  # noqa: RUF012


class Numbered(Digits):
    num_classes = 17


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("num_classes", np.int64(10)),
        ("num_classes", torch.tensor(10)),
        ("classes", 10),
        ("classes", np.int32(10)),
        ("classes", [str(i) for i in range(10)]),
        ("classes", {str(i): i for i in range(10)}),
        ("targets", np.arange(10)),
        ("labels", list(range(10))),
    ],
)
def test_the_number_of_classes_may_be_of_any_kind(attribute: str, value: Any) -> None:
    assert count_classes(SimpleNamespace(**{attribute: value})) == 10


@pytest.mark.parametrize("value", [True, None, "ten", 10.5, lambda: 10])
def test_what_is_no_number_of_classes_is_not_taken_for_one(value: Any) -> None:
    assert count_classes(SimpleNamespace(num_classes=value, classes=None)) is None


@pytest.mark.parametrize("how", ["given", "named", "own", "held out"])
def test_a_label_beyond_the_classes_is_an_error_that_names_both(how: str) -> None:
    data = Digits("train", 64)
    probe = OnlineLinearProbe(num_classes=None if how == "named" else 9)
    if how == "named":
        data.num_classes = 9  # type: ignore[attr-defined]
    elif how == "own":
        probe = OnlineLinearProbe(num_classes=9, train_loader=DataLoader(data, 32))
    elif how == "held out":
        data.rows = [(x, y) for x, y in data.rows if y < 9]
    with pytest.raises(ValueError, match=r"a label is 9, but OnlineLinearProbe has 9 classes.*num_classes=10"):
        fit(Pixels(), (DataLoader(data, 64), held_out()), probe)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (Named("train", 40), 13),
        (WithTargets("train", 40), 15),
        (Subset(WithTargets("train", 40), range(20)), 15),
        (Subset(Subset(Named("train", 40), range(20)), range(10)), 13),
        (HuggingFace("train", 40), 12),
        (Numbered("train", 40), 17),
        (Digits("train", 40), 10),
        ([(x, y + 5) for x, y in Digits("train", 40).rows], 15),
    ],
    ids=["classes", "targets", "subset", "subset of a subset", "features", "num_classes", "labels", "rows"],
)
def test_the_number_of_classes_comes_from_the_probes_own_loader(dataset: Any, expected: int) -> None:
    probe = OnlineLinearProbe(train_loader=DataLoader(dataset, batch_size=20), val_loader=held_out(20))
    fit(SimSiam(), unlabeled(1), probe)
    assert probe.probe[1].out_features == expected
    given = OnlineLinearProbe(
        num_classes=30, train_loader=DataLoader(dataset, batch_size=20), val_loader=held_out(20)
    )
    fit(SimSiam(), unlabeled(1), given)
    assert given.probe[1].out_features == 30


class NamedPairs(Formatted):
    """A training set of a foreign module that names its classes the way Hugging Face does."""

    features = {"label": SimpleNamespace(num_classes=12)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(2 * BATCH, lightly)
        self.hidden, self.labels = self.labels, None

    def __len__(self) -> int:
        return 2 * BATCH

    def __getitem__(self, index: int) -> Any:
        return (self.view1[index], self.view2[index]), self.hidden[index], str(index)


@pytest.mark.filterwarnings("ignore:.*has nothing to score on")
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: Subset(x, range(BATCH))], ids=["whole", "subset"])
def test_the_number_of_classes_comes_from_the_modules_training_set(wrap: Callable[..., Any]) -> None:
    probe = OnlineLinearProbe()
    fit(SimSiam(), DataLoader(wrap(NamedPairs()), batch_size=BATCH), probe)
    assert probe.probe[1].out_features == 12


# Nothing of the module is touched.


class Restless(Digits):
    """Draws from every source of random numbers."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(index)
        return image + random.random() + np.random.rand() + torch.rand(1), label


class Witness(Callback):
    """Modes and gradients as the module's own training meets them."""

    def __init__(self) -> None:
        self.modes: list[list[bool]] = []
        self.gradients: list[list[Tensor]] = []

    def note(self, pl_module: LightningModule) -> None:
        self.modes.append([module.training for module in pl_module.modules()])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: int) -> None:
        self.note(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.gradients.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note(pl_module)


def whole_state(*probes: Callback, module: LightningModule, data: Any, **options: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    witness = Witness()
    used = fit(module, data, *probes, witness, max_epochs=3, **options)
    numbers = np.random.get_state()
    return {
        "weights": module.state_dict(),
        "optimizer": used.optimizers[0].state_dict()["state"],
        "gradients": witness.gradients,
        "last gradients": [p.grad for p in module.parameters()],
        "torch": torch.get_rng_state(),
        "numpy": (numbers[1].tolist(), numbers[2]),
        "python": random.getstate(),
        "modes": witness.modes,
        "requires grad": [p.requires_grad for p in module.parameters()],
    }


@pytest.mark.parametrize("validates", [False, True], ids=["no validation", "validation"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_with_probes_on_their_own_loaders_is_bit_for_bit_the_run_without(
    validates: bool, accumulate: int
) -> None:
    def module() -> LightningModule:
        made = (WithValidation if validates else SimSiam)(dropout=0.3)
        made.backbone[1].eval()  # a part that is frozen, and stays so
        made.backbone[1].weight.requires_grad_(False)
        return made

    class Shuffled(Unlabeled):
        def __getitem__(self, index: int) -> Any:
            return [view + random.random() + np.random.rand() for view in super().__getitem__(index)]

    def data() -> Any:
        train = DataLoader(Shuffled(4 * BATCH), batch_size=BATCH, shuffle=True)
        return (train, held_out()) if validates else train

    def own() -> dict[str, Any]:
        loader = DataLoader(Restless("train", 60), batch_size=20, shuffle=True)
        return {"train_loader": loader} | ({} if validates else {"val_loader": loader})

    without = whole_state(module=module(), data=data(), accumulate_grad_batches=accumulate)
    probes = [OnlineLinearProbe(**own()), OnlineKNN(**own())]
    steps = {"accumulate_grad_batches": accumulate}
    with_probes = whole_state(*probes, module=module(), data=data(), **steps)
    for key, expected in without.items():
        torch.testing.assert_close(with_probes[key], expected, rtol=0, atol=0, msg=key)
    assert probes[0].probe is not None
    assert len(without["gradients"]) == 12 // accumulate


def test_labels_of_the_training_batches_leave_the_module_as_it_is_too() -> None:
    modules = []
    for probes in ([], [OnlineLinearProbe(val_loader=held_out()), OnlineKNN(val_loader=held_out())]):
        modules.append(SimSiam(dropout=0.3))
        fit(modules[-1], DataLoader(Formatted(64, solo), batch_size=BATCH, shuffle=True), *probes, max_epochs=2)
    assert_same_weights(*modules)
    assert not any(module._forward_hooks for module in modules[1].modules())


def test_the_loaders_of_a_probe_are_no_part_of_what_a_monitor_measures() -> None:
    def dynamics(*probes: Callback) -> dict[str, float]:
        used = fit(SimSiam(), unlabeled(), DimensionMonitor(), *probes, max_epochs=2)
        return {key: float(x) for key, x in used.callback_metrics.items() if key.startswith("dynamics/")}

    loaders = {"train_loader": labeled(), "val_loader": held_out()}
    alone = dynamics()
    assert len(alone) == 5
    assert dynamics(OnlineKNN(**loaders), OnlineLinearProbe(**loaders)) == alone


# What is missing.


@BOTH
def test_nothing_to_score_on_is_said_at_the_beginning(make: Any, key: str) -> None:
    data = DataLoader(Formatted(2 * BATCH, lightly), batch_size=BATCH)
    with pytest.warns(UserWarning, match=rf"{make.__name__} has nothing to score on.*val_loader="):
        used = fit(SimSiam(), data, make())
    assert key not in used.callback_metrics


@BOTH
def test_with_something_to_score_on_nothing_is_said(make: Any, key: str) -> None:
    data = DataLoader(Formatted(2 * BATCH, lightly), batch_size=BATCH)
    for module, val, options in (
        (SimSiam(), None, {"val_loader": held_out()}),
        (WithValidation(), held_out(), {}),
    ):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*nothing to score on")
            used = fit(module, (data, val), make(**options))
        assert key in used.callback_metrics


@BOTH
def test_training_batches_without_labels_are_an_error_that_names_the_ways_out(make: Any, key: str) -> None:
    options = {"val_loader": held_out()} | ({"num_classes": 10} if make is OnlineLinearProbe else {})
    with pytest.raises(ValueError, match=r"labels=\.\.\., .*train_loader=\.\.\., or leave the probe out"):
        fit(SimSiam(), unlabeled(), make(**options))


@BOTH
def test_a_loader_of_the_probes_own_without_labels_is_an_error(make: Any, key: str) -> None:
    images = DataLoader([x for x, _ in Digits("train", 40).rows], batch_size=20)
    with pytest.raises(ValueError, match="needs batches"):
        fit(SimSiam(), unlabeled(), make(train_loader=images, val_loader=held_out()))
    with pytest.raises(ValueError, match="needs batches"):
        fit(SimSiam(), unlabeled(), make(train_loader=labeled(), val_loader=images))


@BOTH
@pytest.mark.parametrize("where", ["absent", 5])
def test_labels_that_are_not_where_they_were_said_to_be_are_an_error(where: Any, make: Any, key: str) -> None:
    form = dictionary if where == "absent" else lightly
    data = DataLoader(Formatted(2 * BATCH, form), batch_size=BATCH)
    options = {"num_classes": 10} if make is OnlineLinearProbe else {}
    with pytest.raises(ValueError, match=rf"{where!r}.*labels="):
        fit(SimSiam(), data, make(labels=where, val_loader=held_out(), **options))


@BOTH
def test_a_loader_without_images_or_without_a_batch_is_an_error(make: Any, key: str) -> None:
    numbers = DataLoader(list(range(40)), batch_size=20)
    with pytest.raises(ValueError, match="no images were found in a batch of the probe's loader"):
        fit(SimSiam(), unlabeled(), make(train_loader=numbers, val_loader=held_out()))
    with pytest.raises(ValueError, match="the train_loader of a probe has no batch"):
        fit(SimSiam(), unlabeled(), make(train_loader=[], val_loader=held_out()))
    with pytest.raises(ValueError, match="the val_loader of a probe has no batch"):
        fit(SimSiam(), unlabeled(), make(train_loader=labeled(), val_loader=[]))


@BOTH
@pytest.mark.parametrize(
    "source", ["features", lambda module, batch, outputs: outputs["features"]], ids=["output", "function"]
)
def test_loaders_need_a_submodule_that_makes_r_of_images(source: Any, make: Any, key: str) -> None:
    class WithFeatures(SimSiam):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "features": self.backbone(batch[0]).detach()}

    with pytest.raises(ValueError, match="is no submodule of WithFeatures, but a probe with a loader of its own"):
        fit(WithFeatures(), unlabeled(), make(source, train_loader=labeled(), val_loader=held_out()))


def test_held_out_classes_that_the_probe_has_not_seen_are_wrong_and_no_error() -> None:
    few = [(x, y) for x, y in Digits("train", 80).rows if y < 3]
    probe = OnlineLinearProbe(train_loader=DataLoader(few, batch_size=20), val_loader=held_out())
    used = fit(SimSiam(), unlabeled(), probe)
    share = float((pixels_and_labels("test", 100)[1] < 3).float().mean())
    assert 0 < float(used.callback_metrics["probe/linear_top1"]) <= share
