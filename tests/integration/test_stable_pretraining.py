"""Modules of stable-pretraining: manual optimization, views as dictionaries, callbacks in every trainer.

The package adds its callbacks to every Trainer of its environment, so it is kept out of the usual one; these tests
run in one of its own (dependency group ``stable-pretraining``).
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

spt = pytest.importorskip("stable_pretraining")

from lightning.pytorch import Callback, Trainer  # noqa: E402
from stable_pretraining import forward  # noqa: E402

from adadim_lightning import (  # noqa: E402
    AdaDim,
    AdaDimLoss,
    Balance,
    ConstantSchedule,
    DimensionMonitor,
    EffectiveRankSchedule,
    OnlineKNN,
    OnlineLinearProbe,
)
from tests.helpers import FixedPairs, Recorder, all_digits, assert_same_weights, backbone, head  # noqa: E402

EPOCHS, STEPS, IMAGES = 2, 3, 16
DYNAMICS = {f"dynamics/{key}" for key in ("H_R", "ER_R", "ER_Z", "I_RZ", "log_n")}


@pytest.fixture(autouse=True)
def _leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    spt.set(cache_dir=str(tmp_path), verbose="error", progress_bar="none")
    yield
    spt.get_config().reset()


class Views(Dataset[dict[str, Any]]):
    """Two fixed views of each digit, each with its label, as the package's multi-view transform gives them."""

    def __init__(self, size: int) -> None:
        self.pairs = FixedPairs(size)
        self.classes = list(range(10))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        views, label = self.pairs[index]
        return {"views": [{"image": view, "label": label} for view in views]}


def training(steps: int = STEPS, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(Views(steps * IMAGES), batch_size=IMAGES, shuffle=shuffle)


def validation(size: int = 40) -> DataLoader[Any]:
    images = all_digits().test
    rows = [{"image": images.images[i].float() / 255, "label": images.labels[i]} for i in range(size)]
    return DataLoader(rows, batch_size=20)  # type: ignore[arg-type]


SGD = {"optimizer": {"type": "SGD", "lr": 0.05}}


def simclr(**parts: nn.Module) -> Any:
    """The same weights at every call."""
    torch.manual_seed(0)
    given = {"backbone": backbone(), "projector": head()} | parts
    loss = spt.losses.NTXEntLoss(temperature=0.2)
    return spt.Module(forward=forward.simclr, simclr_loss=loss, optim=SGD, **given)


def byol() -> Any:
    torch.manual_seed(0)
    return spt.Module(
        forward=forward.byol,
        backbone=spt.TeacherStudentWrapper(backbone()),
        projector=spt.TeacherStudentWrapper(head()),
        predictor=nn.Linear(8, 8),
        byol_loss=spt.losses.BYOLLoss(),
        optim=SGD,
    )


def fit(module: Any, *callbacks: Callback, val: Any = None, train: Any = None, **options: Any) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    used = Trainer(callbacks=list(callbacks), max_epochs=EPOCHS, **(quiet | options))
    used.fit(module, training() if train is None else train, val)
    return used


class Losses(Callback):
    """The module's own loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


# References in numpy.


def rank_by_hand(rows: Tensor) -> float:
    sigma = np.linalg.svd(rows.double().numpy(), compute_uv=False)
    p = sigma / sigma.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def information_by_hand(r: Tensor, z: Tensor) -> float:
    def squared_cosines(x: Tensor) -> np.ndarray:
        rows = x.double().numpy()
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return (rows @ rows.T) ** 2

    k_r, k_z = squared_cosines(r), squared_cosines(z)
    return float(np.log(len(r) ** 2 * (k_r * k_z).sum() / (k_r.sum() * k_z.sum())))


def vicreg_by_hand(z: Tensor) -> float:
    views = [view.double().numpy() for view in z.chunk(2)]
    total = 25 * float(((views[0] - views[1]) ** 2).mean())
    for view in views:
        covariance = np.cov(view, rowvar=False)
        variances = np.diag(covariance)
        total += 25 * float(np.maximum(0, 1 - np.sqrt(variances + 1e-4)).mean())
        total += float((covariance**2).sum() - (variances**2).sum()) / view.shape[1]
    return total


def assert_dynamics(logged: dict[str, float], recorder: Recorder, epoch: int) -> None:
    """Ranks are those of all rows so far, information is the mean over this epoch's steps."""
    so_far = list(range((epoch + 1) * STEPS))
    er_r, er_z = (rank_by_hand(recorder.rows(which, so_far)) for which in (0, 1))
    assert logged["dynamics/ER_R"] == pytest.approx(er_r, rel=1e-4)
    assert logged["dynamics/H_R"] == pytest.approx(math.log(er_r), rel=1e-4)
    assert logged["dynamics/ER_Z"] == pytest.approx(er_z, rel=1e-4)
    information = np.mean([information_by_hand(*step) for step in recorder.epochs[epoch]])
    assert logged["dynamics/I_RZ"] == pytest.approx(information, rel=1e-4, abs=1e-6)
    assert logged["dynamics/log_n"] == pytest.approx(math.log(2 * IMAGES))


@pytest.mark.parametrize("source", [None, "embedding", "backbone"], ids=["by name", "by output", "named"])
def test_the_monitor_logs_what_simclr_put_out(source: str | None) -> None:
    recorder, module = Recorder("backbone", "projector"), simclr()
    used = fit(module, DimensionMonitor(source), recorder)
    assert not module.automatic_optimization
    assert [len(r) for r, _ in recorder.steps] == [2 * IMAGES] * EPOCHS * STEPS
    assert used.global_step == EPOCHS * STEPS
    for epoch in range(EPOCHS):
        assert_dynamics(recorder.logged[epoch], recorder, epoch)


def test_of_byol_the_student_is_found_and_measured() -> None:
    module = byol()
    monitor = DimensionMonitor()
    assert monitor.feed.names(module) == ["backbone.student", "projector.student"]
    recorder = Recorder("backbone.student", "projector.student")
    fit(module, monitor, recorder, spt.TeacherStudentCallback())
    for epoch in range(EPOCHS):
        assert_dynamics(recorder.logged[epoch], recorder, epoch)


def test_the_entry_of_the_outputs_of_byol_is_the_teacher() -> None:
    module = byol()
    teacher, student = (Recorder(f"backbone.{name}", "projector.student") for name in ("teacher", "student"))
    used = fit(module, DimensionMonitor("embedding"), teacher, student, spt.TeacherStudentCallback())
    assert_dynamics(dict(used.callback_metrics), teacher, EPOCHS - 1)
    of_student = rank_by_hand(student.rows(0, list(range(EPOCHS * STEPS))))
    assert float(used.callback_metrics["dynamics/ER_R"]) != pytest.approx(of_student, rel=1e-6)


def test_steering_a_module_that_optimizes_by_hand_is_an_error_that_says_what_works() -> None:
    module = simclr()
    with pytest.raises(ValueError, match=r"optimizes by hand \(automatic_optimization = False\).*observe=True"):
        fit(module, AdaDim(native_loss="sample_contrastive"))
    assert "training_step" not in vars(module)
    assert not any(submodule._forward_hooks for submodule in module.modules())
    fit(module)


@pytest.mark.parametrize("representation", [None, "embedding"])
def test_observing_logs_what_steering_would_do_and_changes_nothing(representation: str | None) -> None:
    alpha, gamma = 0.3, 0.1
    untouched, module = simclr(), simclr()
    fit(untouched)
    recorder, losses = Recorder("backbone", "projector"), Losses()
    watching = AdaDim(
        representation,
        observe=True,
        native_loss="sample_contrastive",
        objective=AdaDimLoss(gamma=gamma, kappa=1, information_floor=None),
        balance=Balance(ConstantSchedule(alpha)),
    )
    fit(module, watching, recorder, losses)
    assert_same_weights(module, untouched)
    for epoch, logged in enumerate(recorder.logged):
        steps = recorder.epochs[epoch]
        native = np.mean(losses.values[epoch * STEPS : (epoch + 1) * STEPS])
        vicreg = np.mean([vicreg_by_hand(z) for _, z in steps])
        information = np.mean([information_by_hand(*step) for step in steps])
        expected = {
            "balance/alpha": alpha,
            "balance/beta": gamma * alpha,
            "loss/native": native,
            "loss/decorrelation": vicreg,
            "loss/information": information,
            "loss_weighted/native": alpha * native,
            "loss_weighted/decorrelation": (1 - alpha) * vicreg,
            "loss_weighted/information": gamma * alpha * information,
            "loss/total": alpha * native + (1 - alpha) * vicreg + gamma * alpha * information,
        }
        assert {key: logged[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert_dynamics(logged, recorder, epoch)


def test_observing_logs_the_alpha_that_the_rank_of_z_asks_for() -> None:
    recorder = Recorder("backbone", "projector")
    balance = Balance(EffectiveRankSchedule(start=0.25), every_n_steps=STEPS)
    fit(simclr(), AdaDim(observe=True, native_loss="sample_contrastive", balance=balance), recorder)
    first_epoch = rank_by_hand(torch.cat([z for _, z in recorder.epochs[0]]))
    alphas = [logged["balance/alpha"] for logged in recorder.logged]
    assert alphas == pytest.approx([0.25, first_epoch / 8], rel=1e-4)


@pytest.mark.parametrize("representation", [None, "embedding"])
def test_the_probes_find_the_labels_within_the_views(representation: str | None) -> None:
    recorder, module = Recorder("backbone", "projector"), simclr()
    neighbors, linear = OnlineKNN(representation, k=5, bank_size=STEPS * 32), OnlineLinearProbe(representation)
    used = fit(module, neighbors, linear, recorder, val=validation())
    labels = torch.cat([torch.cat([view["label"] for view in batch["views"]]) for batch in training()])
    kept_r, kept_labels = (torch.cat(x) for x in zip(*neighbors.state_dict()["bank"], strict=True))
    assert torch.equal(kept_labels, labels)
    assert torch.equal(kept_r, torch.cat([r for r, _ in recorder.epochs[-1]]))
    assert linear.probe[1].out_features == 10
    module.eval()
    with torch.no_grad():
        held = [(module.backbone(batch["image"]), batch["label"]) for batch in validation()]
        r, targets = torch.cat([r for r, _ in held]), torch.cat([y for _, y in held])
        predicted = linear.probe.eval()(r).argmax(1)
    logged = used.callback_metrics
    assert float(logged["probe/linear_top1"]) == pytest.approx(float((predicted == targets).float().mean()))
    assert float(logged["probe/knn_top1"]) == pytest.approx(knn_by_hand(kept_r, labels, r, targets))


def knn_by_hand(bank: Tensor, labels: Tensor, r: Tensor, targets: Tensor, k: int = 5) -> float:
    def unit(x: Tensor) -> np.ndarray:
        rows = x.double().numpy()
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    correct = 0
    for similarity, target in zip(unit(r) @ unit(bank).T, targets.tolist(), strict=True):
        votes = np.zeros(10)
        for i in np.argsort(-similarity)[:k]:
            votes[int(labels[i])] += np.exp(similarity[i] / 0.07)
        correct += int(votes.argmax() == target)
    return correct / len(targets)


def test_the_probes_learn_to_read_the_digits() -> None:
    module = simclr(backbone=nn.Flatten(), projector=nn.Linear(64, 8))
    used = fit(module, OnlineKNN(), OnlineLinearProbe(), train=training(40), val=validation(200))
    assert float(used.callback_metrics["probe/linear_top1"]) > 0.8
    assert float(used.callback_metrics["probe/knn_top1"]) > 0.8


def test_probes_of_byol_read_the_teacher_which_alone_validates() -> None:
    module = byol()
    probes = [OnlineKNN("embedding", k=5, bank_size=STEPS * 32), OnlineLinearProbe("embedding")]
    recorder = Recorder("backbone.teacher", "projector.student")
    used = fit(module, *probes, recorder, spt.TeacherStudentCallback(), val=validation())
    kept = torch.cat([r for r, _ in probes[0].state_dict()["bank"]])
    assert torch.equal(kept, torch.cat([r for r, _ in recorder.epochs[-1]]))
    assert {"probe/knn_top1", "probe/linear_top1"} <= set(used.callback_metrics)


def test_a_run_with_the_callbacks_is_bit_for_bit_the_run_without() -> None:
    modules, states = [], []
    for callbacks in (
        [],
        [DimensionMonitor(every_n_steps=2, window=32), DimensionMonitor("embedding", name="by output")],
        [AdaDim(observe=True, native_loss="sample_contrastive"), OnlineKNN(), OnlineLinearProbe()],
    ):
        module = simclr()
        torch.manual_seed(3)
        np.random.seed(3)
        fit(module, *callbacks, train=training(shuffle=True), val=validation())
        modules.append(module)
        states.append((torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64))))
    for module, state in zip(modules[1:], states[1:], strict=True):
        assert_same_weights(modules[0], module)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(state, states[0], strict=True))


def test_it_works_beside_the_packages_own_callbacks_and_probes(tmp_path: Path) -> None:
    recorder, module = Recorder("backbone", "projector"), simclr()
    theirs = spt.callbacks.OnlineProbe(
        module,
        name="their_probe",
        input="embedding",
        target="label",
        probe=nn.Linear(12, 10),
        loss=nn.CrossEntropyLoss(),
        optimizer={"type": "SGD", "lr": 0.1},
        metrics=MulticlassAccuracy(10),
    )
    ours = [DimensionMonitor(), OnlineKNN(k=5)]
    used = fit(module, *ours, theirs, recorder, val=validation(), enable_checkpointing=True)
    added = [c for c in used.callbacks if type(c).__module__.startswith("stable_pretraining")]
    assert len(added) > 10
    assert DYNAMICS | {"probe/knn_top1"} <= set(used.callback_metrics)
    assert_dynamics(dict(used.callback_metrics), recorder, EPOCHS - 1)
    [checkpoint] = tmp_path.rglob("*.ckpt")
    assert "DimensionMonitor{}" in torch.load(checkpoint, weights_only=False)["callbacks"]
