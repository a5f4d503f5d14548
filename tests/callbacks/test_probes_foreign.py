"""Probes on modules of other people: labels wherever their batches have them, or loaders of the probe's own."""

import random
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from adadim_lightning import DimensionMonitor, OnlineKNN, OnlineLinearProbe
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
