"""The online probes against accuracies recomputed from what the model put out."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from adadim_lightning import OnlineKNN, OnlineLinearProbe
from tests.helpers import (
    DIM_R,
    FixedPairs,
    OneCallPerView,
    Recorder,
    assert_same_weights,
    every_epoch,
    fit,
    fixed_batches,
    held_out,
    some_digits,
    tiny_module,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*has nothing to score on")


def clean_rows(module: Any, loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    """R and labels of the held-out images, in evaluation mode."""
    module.eval()
    with torch.no_grad():
        pairs = [(module(images), labels) for images, labels in loader]
    return torch.cat([r for r, _ in pairs]), torch.cat([labels for _, labels in pairs])


def vote(r: Tensor, bank: Tensor, labels: Tensor, k: int, temperature: float) -> list[int]:
    """Weighted nearest-neighbor vote, image by image."""
    predicted = []
    for row in r:
        similarity = nn.functional.cosine_similarity(row[None], bank)
        scores = torch.zeros(10, dtype=torch.float64)
        for i in similarity.argsort(descending=True)[:k]:
            scores[labels[i]] += torch.exp(similarity[i].double() / temperature)
        predicted.append(int(scores.argmax()))
    return predicted


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_nearest_neighbors_are_the_last_training_rows(epochs: int) -> None:
    recorder, module = Recorder(), tiny_module()
    data, val = fixed_batches(5), held_out()
    probe = OnlineKNN(k=7, temperature=0.2, bank_size=5 * 32)
    used = fit(module, (data, val), probe, recorder, max_epochs=epochs)
    bank = torch.cat([r for r, _ in recorder.epochs[-1]])
    labels = torch.cat([torch.cat([y, y]) for _, y in data])
    r, targets = clean_rows(module, val)
    correct = [p == int(y) for p, y in zip(vote(r, bank, labels, 7, 0.2), targets, strict=True)]
    assert float(used.callback_metrics["probe/knn_top1"]) == pytest.approx(sum(correct) / len(correct))
    assert recorder.logged[-1]["probe/knn_top1"] == pytest.approx(sum(correct) / len(correct))


def test_the_linear_probe_scores_held_out_images_by_its_running_standardization() -> None:
    module, val = tiny_module(), held_out()
    probe = OnlineLinearProbe(num_classes=10)
    used = fit(module, (fixed_batches(5), val), probe, max_epochs=2)
    r, targets = clean_rows(module, val)
    norm, linear = probe.probe[0], probe.probe[1]
    standardized = (r - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    predicted = (standardized @ linear.weight.T + linear.bias).argmax(dim=1)
    accuracy = float((predicted == targets).float().mean())
    assert float(used.callback_metrics["probe/linear_top1"]) == pytest.approx(accuracy)


def test_the_linear_probe_takes_the_steps_of_adamw_on_detached_rows() -> None:
    recorder = Recorder()
    probe = OnlineLinearProbe(num_classes=10, lr=0.05, weight_decay=0.01)
    data = fixed_batches(4)
    fit(tiny_module(), data, probe, recorder)
    # The running mean of the first ten batches is that of all.
    norm = nn.BatchNorm1d(DIM_R, eps=1e-10, affine=False, momentum=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = nn.Sequential(norm, nn.Linear(DIM_R, 10))
    for parameter in reference[1].parameters():
        parameter.data.mul_(0.01)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.05, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for (r, _), (_, labels) in zip(recorder.steps, data, strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(r), torch.cat([labels, labels])).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(probe.probe.state_dict(), reference.state_dict(), rtol=1e-3, atol=5e-5)


def test_both_probes_learn_to_read_the_digits() -> None:
    module = tiny_module(backbone=nn.Flatten(), projection_head=nn.Linear(64, 8))
    used = fit(
        module, some_digits(train=1297, test=500), OnlineLinearProbe(), OnlineKNN(), max_epochs=2, max_steps=80
    )
    assert float(used.callback_metrics["probe/linear_top1"]) > 0.85
    assert float(used.callback_metrics["probe/knn_top1"]) > 0.85


def test_a_run_with_the_probes_is_bit_for_bit_the_run_without() -> None:
    modules, states = [], []
    for callbacks in ([], [OnlineLinearProbe(), OnlineKNN()]):
        module = tiny_module()
        torch.manual_seed(3)
        fit(module, some_digits(batch_size=16), *callbacks, max_epochs=2)
        modules.append(module)
        states.append(torch.get_rng_state())
    assert_same_weights(*modules)
    assert torch.equal(*states)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_probe_leaves_the_random_state_of_the_gpu_alone() -> None:
    states = []
    for callbacks in ([], [OnlineLinearProbe(num_classes=10)]):
        torch.manual_seed(3)
        fit(tiny_module(), fixed_batches(2), *callbacks, accelerator="gpu", devices=1)
        states.append(torch.cuda.get_rng_state())
    assert torch.equal(*states)


class NamedClasses(FixedPairs):
    classes = tuple("abcdefghijkl")


class WithTargets(FixedPairs):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.targets = [*range(14), *self.labels.tolist()]
        del self.labels

    def __len__(self) -> int:
        return len(self.targets) - 14

    def __getitem__(self, index: int):
        return (self.view1[index], self.view2[index]), self.targets[14 + index]


def test_the_number_of_classes_comes_from_the_data() -> None:
    def classes(data: Any) -> int:
        probe = OnlineLinearProbe()
        fit(tiny_module(), data, probe)
        return probe.probe[1].out_features

    assert classes(some_digits()) == 10
    assert classes(DataLoader(NamedClasses(32), batch_size=16)) == 12
    assert classes(DataLoader(WithTargets(32), batch_size=16)) == 14
    assert classes(fixed_batches(2)) == 10


def test_data_that_do_not_name_their_classes_are_an_error() -> None:
    pairs = [FixedPairs(4)[i] for i in range(4)]
    with pytest.raises(ValueError, match="give OnlineLinearProbe num_classes="):
        fit(tiny_module(), DataLoader(pairs, batch_size=4), OnlineLinearProbe())
    probe = OnlineLinearProbe(num_classes=11)
    fit(tiny_module(), DataLoader(pairs, batch_size=4), probe)
    assert probe.probe[1].out_features == 11


@pytest.mark.parametrize("make", [lambda: OnlineLinearProbe(num_classes=10), OnlineKNN], ids=["linear", "kNN"])
@pytest.mark.parametrize("label", ["cat", torch.zeros(3)], ids=["text", "several"])
def test_batches_without_labels_are_an_error_that_says_what_to_do(make, label) -> None:
    pairs = [(FixedPairs(4)[i][0], label) for i in range(4)]
    with pytest.raises(ValueError, match=r"needs batches \(images, labels\).*leave the probe out"):
        fit(tiny_module(), DataLoader(pairs, batch_size=4), make())


@pytest.mark.parametrize(
    ("make", "key"),
    [(lambda **options: OnlineLinearProbe(num_classes=10, **options), "linear_top1"), (OnlineKNN, "knn_top1")],
    ids=["linear", "kNN"],
)
def test_a_name_prefixes_the_log_name_and_keeps_the_states_apart(make, key: str, tmp_path) -> None:
    probes = [make(), make(representation="backbone.1", name="early")]
    used = fit(tiny_module(), (fixed_batches(2), held_out()), *probes, every_epoch(tmp_path))
    assert {f"probe/{key}", f"early/probe/{key}"} <= set(used.callback_metrics)
    state = torch.load(tmp_path / "0.ckpt", weights_only=True)["callbacks"]
    name = type(probes[0]).__name__
    assert {f"{name}{{}}", f"{name}{{early}}"} <= set(state)


def test_resumed_probes_score_as_those_of_the_uninterrupted_run(tmp_path) -> None:
    def probes() -> list[Callback]:
        return [OnlineLinearProbe(num_classes=10), OnlineKNN(k=5, bank_size=6 * 32)]

    data = (fixed_batches(4), held_out())
    whole, through = Recorder(), probes()
    fit(tiny_module(), data, *through, whole, every_epoch(tmp_path), max_epochs=4)
    resumed, again = Recorder(), probes()
    path = tmp_path / "1.ckpt"
    fit(tiny_module(), data, *again, resumed, every_epoch(tmp_path / "again"), max_epochs=4, ckpt_path=path)
    for ours, theirs in zip(resumed.logged, whole.logged[2:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    torch.testing.assert_close(again[0].probe.state_dict(), through[0].probe.state_dict(), rtol=1e-3, atol=1e-5)


def test_the_bank_holds_no_more_than_its_size_and_one_step() -> None:
    probe = OnlineKNN(bank_size=70)
    fit(tiny_module(), (fixed_batches(6), held_out()), probe)
    assert sum(len(labels) for _, labels in probe.state_dict()["bank"]) == 96


def test_labels_follow_the_views_where_each_view_has_a_call_of_its_own() -> None:
    class WithValidation(OneCallPerView):
        def validation_step(self, batch, batch_idx) -> None:
            self.encoder(batch[0])

    data = fixed_batches(2)
    probe = OnlineKNN("encoder", bank_size=64)
    used = fit(WithValidation(), (data, held_out()), probe)
    kept = torch.cat([labels for _, labels in probe.state_dict()["bank"]])
    assert torch.equal(kept, torch.cat([torch.cat([y, y]) for _, y in data]))
    assert 0 <= float(used.callback_metrics["probe/knn_top1"]) <= 1


def test_without_a_labeled_row_among_the_recent_ones_the_knn_probe_waits() -> None:
    batches = fixed_batches(2)
    batches.dataset.labels = torch.full((32,), -1)  # type: ignore[attr-defined]
    recorder = Recorder()
    with pytest.warns(UserWarning, match="has logged no probe/knn_top1: no image to learn from had a label"):
        fit(tiny_module(), (batches, held_out()), OnlineKNN("backbone"), recorder)
    assert "probe/knn_top1" not in recorder.logged[-1]
    assert "loss/total" in recorder.logged[-1]


# Labels.


def unlabeled(batches: int) -> DataLoader[Any]:
    loader = fixed_batches(batches)
    loader.dataset.labels = torch.full((len(loader.dataset),), -1)  # type: ignore[attr-defined,arg-type]
    return loader


@pytest.mark.parametrize("num_classes", [10, None])
@pytest.mark.parametrize("own", [False, True])
def test_without_a_single_label_the_linear_probe_logs_nothing_and_says_so(num_classes, own: bool) -> None:
    loader = DataLoader([(image, -1) for image, _ in held_out(40).dataset], batch_size=20)
    options = {"train_loader": loader, "val_loader": held_out()} if own else {}
    probe = OnlineLinearProbe("backbone", num_classes=num_classes, **options)
    with pytest.warns(UserWarning, match="has logged no probe/linear_top1: no image to learn from had a label"):
        used = fit(tiny_module(), (unlabeled(2), held_out()), probe, max_epochs=2)
    assert "probe/linear_top1" not in used.callback_metrics


@pytest.mark.parametrize("make", [OnlineLinearProbe, OnlineKNN])
def test_without_a_held_out_label_the_probes_log_nothing_and_say_so(make) -> None:
    loader = DataLoader([(image, -1) for image, _ in held_out(40).dataset], batch_size=20)
    with pytest.warns(UserWarning, match="has logged no probe/.*: no held-out image had a label"):
        used = fit(tiny_module(), (fixed_batches(2), loader), make("backbone"))
    assert not [key for key in used.callback_metrics if key.startswith("probe/")]


class Starts(Callback):
    """Notes which warnings there were when the first step began."""

    def __init__(self, caught: list[Any]) -> None:
        self.caught, self.before = caught, []

    def on_train_batch_start(self, *_: Any) -> None:
        self.before = self.before or [str(x.message) for x in self.caught]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_steps": 2, "max_epochs": -1}, "ends after 2 batches, before the first validation after 4"),
        (
            {"max_steps": 5, "max_epochs": 2, "val_check_interval": 6, "check_val_every_n_epoch": None},
            "5 batches, before",
        ),
        ({"max_epochs": 2, "val_check_interval": 9, "check_val_every_n_epoch": None}, "after 8 batches, before"),
        (
            {"max_steps": 2, "max_epochs": 9, "accumulate_grad_batches": 2, "check_val_every_n_epoch": 2},
            "after 4 bat",
        ),
        ({"max_epochs": 2, "check_val_every_n_epoch": 3}, "the trainer validates every 3 epochs and trains 2"),
        ({"max_epochs": 2, "limit_val_batches": 0}, "limit_val_batches is 0"),
    ],
    ids=str,
)
def test_a_training_without_a_validation_is_said_before_its_first_step(options, reason: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        starts = Starts(caught)
        used = fit(tiny_module(), (fixed_batches(4), held_out()), OnlineKNN(), starts, **options)
    (told,) = [x for x in starts.before if "OnlineKNN" in x]
    assert told.startswith("OnlineKNN has nothing to score on: ")
    assert reason in told
    assert [str(x.message) for x in caught if "OnlineKNN" in str(x.message)] == [told]  # not again at the end
    assert "probe/knn_top1" not in used.callback_metrics


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 4, "max_epochs": -1},
        {"max_steps": 2, "max_epochs": -1, "accumulate_grad_batches": 2},
        {"max_epochs": 2, "check_val_every_n_epoch": 2},
        {"max_steps": 2, "max_epochs": 9, "val_check_interval": 2},
        {"max_epochs": 2, "val_check_interval": 7, "check_val_every_n_epoch": None},
    ],
    ids=str,
)
def test_a_training_with_a_validation_is_not_warned_of(options) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*nothing to score on")
        used = fit(tiny_module(), (fixed_batches(4), held_out()), OnlineKNN(), **options)
    assert "probe/knn_top1" in used.callback_metrics


@pytest.mark.parametrize("make", [OnlineLinearProbe, OnlineKNN])
@pytest.mark.parametrize("which", ["train_loader", "val_loader"])
@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([torch.zeros(4, 1, 8, 8)], "but there are no labels"),
        ([(torch.zeros(4), torch.zeros(4).long())], "no images were found in a batch"),
        ([], "of a probe has no batch"),
    ],
)
def test_loaders_of_a_probe_are_looked_at_before_the_first_step(make, which: str, batches, words: str) -> None:
    loaders = {"train_loader": held_out(), "val_loader": held_out()} | {which: batches}
    module = tiny_module()
    with pytest.raises(ValueError, match=words):
        fit(module, fixed_batches(2), make("backbone", **loaders), max_epochs=1)
    assert_same_weights(module, tiny_module())


def test_what_was_not_scored_is_said_once_and_at_the_first_validation() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        class Second(Starts):
            def on_train_epoch_start(self, trainer: Any, _: Any) -> None:
                self.before = [str(x.message) for x in self.caught] if trainer.current_epoch == 1 else []

            def on_train_batch_start(self, *_: Any) -> None:
                pass

        second = Second(caught)
        fit(tiny_module(), (unlabeled(2), held_out()), OnlineKNN(), second, max_epochs=2)
    (told,) = [str(x.message) for x in caught if "has logged no" in str(x.message)]
    assert "has logged no probe/knn_top1: no image to learn from had a label" in told
    assert told in second.before


def test_knn_probe_refuses_a_bank_of_fewer_rows_than_neighbors() -> None:
    with pytest.raises(ValueError, match="bank_size must hold the k = 20 neighbors, got 10"):
        OnlineKNN(bank_size=10)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (OnlineKNN, {"k": "abc"}, "k must be an integer >= 1, got 'abc'"),
        (OnlineKNN, {"k": 2.5}, "k must be an integer"),
        (OnlineKNN, {"temperature": "warm"}, "temperature must be a finite number, got 'warm'"),
        (OnlineKNN, {"temperature": 0}, "temperature must be > 0"),
        (OnlineKNN, {"bank_size": None}, "bank_size must be an integer >= 1, got None"),
        (OnlineLinearProbe, {"lr": "fast"}, "lr must be a finite number, got 'fast'"),
        (OnlineLinearProbe, {"lr": 0}, "lr must be > 0"),
        (OnlineLinearProbe, {"weight_decay": -1}, "weight_decay must be"),
        (OnlineLinearProbe, {"num_classes": 0}, "num_classes must be an integer >= 1, got 0"),
        (OnlineLinearProbe, {"num_classes": "ten"}, "num_classes must be an integer"),
    ],
)
def test_probes_name_an_argument_of_the_wrong_kind(make, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**options)


def test_probes_take_the_numbers_of_numpy() -> None:
    probe = OnlineLinearProbe(num_classes=np.int64(10), lr=np.float32(0.01))
    used = fit(tiny_module(), (fixed_batches(2), held_out()), probe, OnlineKNN(k=np.int32(5)))
    assert probe.probe[1].out_features == 10
    assert {"probe/linear_top1", "probe/knn_top1"} <= set(used.callback_metrics)


def test_knn_probe_counts_ids_of_any_size_as_classes() -> None:
    def accuracy(ids: Tensor) -> float:
        train, val = fixed_batches(5), held_out()
        train.dataset.labels = ids[train.dataset.labels]  # type: ignore[attr-defined]
        val = DataLoader([(image, ids[label]) for image, label in val.dataset], batch_size=20)
        return float(fit(tiny_module(), (train, val), OnlineKNN(k=5)).callback_metrics["probe/knn_top1"])

    expected = accuracy(torch.arange(10))
    assert expected > 0.2
    assert accuracy(torch.arange(10) * 37 + 2_481_234) == expected
    assert accuracy(torch.arange(10) + 2**60) == expected


def test_linear_probe_refuses_ids_as_classes() -> None:
    loader = DataLoader([(image, int(label) + 2_481_234) for image, label in held_out().dataset], batch_size=20)
    with pytest.raises(ValueError, match="labels reach 2,481,243, too many for classes"):
        fit(tiny_module(), fixed_batches(1), OnlineLinearProbe("backbone", train_loader=loader, val_loader=loader))
