"""What real training code does beside the plain case."""

import functools
import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from adadim_lightning import (
    AdaDim,
    AdaDimLoss,
    Balance,
    ConstantSchedule,
    DimensionMonitor,
    EffectiveRankSchedule,
    NonFiniteError,
    OnlineKNN,
    OnlineLinearProbe,
)
from adadim_lightning.functional import effective_rank
from adadim_lightning.steering import steered_loss
from tests.helpers import OneCallPerView, Recorder, every_epoch, fit, fixed_batches


class FromPixels(LightningModule):
    """Two noisy views of what the batch calls ``unlabeled``, or of the whole of it."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(6, width)
        self.projector = nn.Linear(width, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch["unlabeled"][0] if isinstance(batch, dict) else batch[0]
        noise = 0.1 * torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(batch_idx))
        z1, z2 = (self.projector(self.backbone(x + noise[i])) for i in range(2))
        return (z1 - z2).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def pixels(rows: int, batch_size: int, labels: Tensor | None = None) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 6, generator=generator)
    return DataLoader(TensorDataset(*([x] if labels is None else [x, labels])), batch_size=batch_size)


def test_a_smaller_tensor_beside_the_images_does_not_cut_their_views() -> None:
    loaders = {"labeled": pixels(8, 4), "unlabeled": pixels(32, 16)}
    parts = []
    for data in (loaders, loaders["unlabeled"]):
        torch.manual_seed(3)
        recorder = Recorder("backbone", "projector")
        steering = AdaDim(native_loss="other", balance=Balance(ConstantSchedule(0.5)))
        fit(FromPixels(), data, steering, recorder)
        parts.append({key: value for key, value in recorder.logged[0].items() if key.startswith("loss")})
    assert parts[0] == pytest.approx(parts[1], rel=1e-6)
    assert parts[0]["loss/invariance"] < 0.1  # views of the same images


class BadFifthStep(OneCallPerView):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if batch_idx == 5 else loss


def test_a_native_loss_that_is_not_finite_is_named_by_its_step_and_reaches_no_checkpoint(tmp_path) -> None:
    plan: dict[str, Any] = {"every_n_steps": 20, "window": 32}
    steering = AdaDim(native_loss="other", balance=Balance(ConstantSchedule(0.5), **plan), **plan)
    with pytest.raises(NonFiniteError, match="at step 5;"):
        fit(BadFifthStep(), fixed_batches(10), steering, every_epoch(tmp_path), max_epochs=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", ["sample_contrastive", "dimension_contrastive"])
def test_matched_kappa_holds_for_the_mean_over_all_pairs_of_views(kind: str, count: int) -> None:
    r = [torch.randn(6, 5, requires_grad=True) for _ in range(count)]
    z = [torch.randn(6, 4, requires_grad=True) for _ in range(count)]
    native = torch.stack(z).square().sum()
    objective = AdaDimLoss(kappa="match", gamma=0.0)
    norms = []
    for alpha in (0.0, 1.0):
        objective.set_balance(alpha)
        total = steered_loss(kind, native, r, z, objective).total  # type: ignore[arg-type]
        norms.append(torch.cat(torch.autograd.grad(total, z, retain_graph=True)).norm())
    assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-4)


def test_a_scripted_submodule_is_left_alone() -> None:
    module = FromPixels()
    module.frozen_teacher = torch.jit.trace(nn.Linear(6, 2), torch.zeros(1, 6)).requires_grad_(False)
    recorder = Recorder("backbone", "projector")
    fit(module, pixels(32, 16), DimensionMonitor(), recorder)
    assert recorder.logged[0]["dynamics/ER_R"] > 1


class Skips(FromPixels):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.backbone(batch[0])


def test_probes_pass_over_a_step_that_the_module_skips() -> None:
    data = pixels(64, 16, torch.arange(64) % 3)
    probes = OnlineKNN(k=3), OnlineLinearProbe(num_classes=3)
    fit(Skips(), (data, data), *probes)
    assert sum(len(labels) for _, labels in probes[0]._bank) == 3 * 32


def test_images_without_a_label_teach_and_score_nothing() -> None:
    labels = torch.arange(64) % 3
    hidden = torch.where(torch.arange(64) % 2 == 0, labels, -1)
    accuracies = []
    for marked, images in ((hidden, slice(None)), (labels[::2], slice(None, None, 2))):
        x, _ = pixels(64, 64, labels).dataset.tensors  # type: ignore[attr-defined]
        loader = DataLoader(TensorDataset(x[images], marked), batch_size=64)
        probes = (
            OnlineKNN(k=3, train_loader=loader, val_loader=loader),
            OnlineLinearProbe(num_classes=3, train_loader=loader, val_loader=loader),
        )
        used = fit(FromPixels(), pixels(32, 16), *probes)
        accuracies.append(float(used.callback_metrics["probe/knn_top1"]))
        assert torch.isfinite(used.callback_metrics["probe/linear_top1"])
    assert accuracies[0] == accuracies[1]
    # Also as batches of the model itself, one of them without any label.
    hidden[:16] = -1
    module = Skips()
    module.training_step = lambda batch, batch_idx: FromPixels.training_step(module, batch, batch_idx)
    both = pixels(64, 16, hidden), pixels(64, 16, hidden)
    knn, scored = OnlineKNN(k=3), []
    score = knn._score
    knn._score = lambda *args: (scored.append(args[-1]), score(*args))  # type: ignore[method-assign,assignment,func-returns-value]
    fit(module, both, OnlineLinearProbe(num_classes=3), knn, num_sanity_val_steps=0)
    seen = torch.cat(scored)
    assert torch.equal(seen[seen >= 0], hidden[hidden >= 0])


def test_nothing_is_held_after_the_steps_and_the_probes_own_batches() -> None:
    module = FromPixels()
    data = pixels(64, 16, torch.arange(64) % 3)
    callbacks: list[Callback] = [
        DimensionMonitor(),
        AdaDim(native_loss="other", name="steering"),
        OnlineKNN(k=3, train_loader=data, val_loader=data),
        OnlineLinearProbe(num_classes=3, train_loader=data, val_loader=data),
    ]
    held: list[int] = []

    class Held(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
            feeds = [getattr(c, "feed", getattr(c, "_feed", None)) for c in callbacks]
            pl_module.backbone(torch.zeros(3, 6))
            held.extend(len(tap._calls) for feed in feeds for tap, _ in feed._taps)

    fit(module, pixels(64, 16), *callbacks, Held())
    assert held == [0] * 6


def test_neighbors_that_are_made_anew_do_not_fill_the_checkpoint(tmp_path) -> None:
    data = pixels(64, 16, torch.arange(64) % 3)
    fit(FromPixels(), data, OnlineKNN(k=3, train_loader=data, val_loader=data), every_epoch(tmp_path))
    state = torch.load(tmp_path / "0.ckpt", weights_only=True)["callbacks"]["OnlineKNN{}"]
    assert state == {"bank": []}


class TwoOptimizerSteps(FromPixels):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for _ in range(2):
            self.optimizers().step()  # type: ignore[union-attr]
        return loss


@pytest.mark.filterwarnings("ignore:.*has nothing to score on")
def test_the_rate_of_the_linear_probe_falls_to_zero_at_the_end_of_the_training_by_hand() -> None:
    probe, rates = OnlineLinearProbe(num_classes=3), []

    class Rates(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            rates.append(probe._optimizer.param_groups[0]["lr"] / probe.lr)  # type: ignore[union-attr]

    fit(TwoOptimizerSteps(), pixels(64, 16, torch.arange(64) % 3), probe, Rates(), max_epochs=2)
    assert rates == pytest.approx([(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)])


def test_callbacks_forget_the_model_of_an_earlier_fit() -> None:
    data = pixels(64, 16, torch.arange(64) % 3)

    def callbacks() -> list[Any]:
        balance = Balance(EffectiveRankSchedule(start=0.25), every_n_steps=2, window=64)
        steering = AdaDim(native_loss="sample_contrastive", objective=AdaDimLoss(kappa="match"), balance=balance)
        return [
            DimensionMonitor(name="watch"),
            steering,
            OnlineKNN(k=3, val_loader=data),
            OnlineLinearProbe(num_classes=3, val_loader=data),
        ]

    def logged(used: list[Any], width: int) -> dict[str, float]:
        torch.manual_seed(5)
        recorder = Recorder("backbone", "projector")
        fit(FromPixels(width), data, *used, recorder)
        return recorder.logged[0]

    for width in (12, 20):
        used = callbacks()
        logged(used, 12)
        assert logged(used, width) == logged(callbacks(), width)


def test_a_second_fit_of_the_same_model_goes_on() -> None:
    module, monitor = FromPixels(), DimensionMonitor(window=64)
    recorder = Recorder("backbone", "projector")
    fit(module, pixels(32, 16), monitor, recorder)
    fit(module, pixels(32, 16), monitor, recorder)
    rank = float(effective_rank(recorder.rows(0, [2, 3])))
    assert recorder.logged[1]["dynamics/ER_R"] == pytest.approx(rank, rel=1e-4)
    assert len(monitor.spectra) == 2


def test_a_last_batch_of_one_image_is_an_error_when_steering_and_passed_over_when_observing() -> None:
    data = pixels(33, 16, torch.arange(33) % 3)
    with pytest.raises(ValueError, match="batches of 2 images or more; give the data loader drop_last=True"):
        fit(FromPixels(), data, AdaDim(native_loss="other"))
    used = fit(FromPixels(), data, AdaDim(native_loss="other", observe=True))
    assert math.isfinite(float(used.callback_metrics["loss/total"]))
    fit(FromPixels(), data, OnlineLinearProbe(num_classes=3, train_loader=data, val_loader=data))


def test_the_survey_lists_the_training_step_not_the_validation_before_it() -> None:
    class Validated(FromPixels):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.backbone(torch.zeros(3, 6))

    module = Validated()
    module.mlp = module.projector
    module.projector = None
    module.training_step = lambda batch, batch_idx: module.mlp(module.backbone(batch[0])).square().mean()
    with pytest.raises(ValueError, match="projection head") as error:
        fit(module, (pixels(32, 16), pixels(32, 16)), DimensionMonitor())
    assert str(error.value).endswith("\n  backbone: (16, 12)\n  mlp: (16, 8)")


class Checkpointed(FromPixels):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].requires_grad_()
        r1, r2 = (checkpoint(self.backbone, x + noise, use_reentrant=True) for noise in (0.0, 0.1))
        return (self.projector(r1) - self.projector(r2)).square().mean()


def test_a_representation_that_reentrant_checkpointing_cut_from_its_graph_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"R has no gradient.*use_reentrant=False"):
        fit(Checkpointed(), pixels(32, 16), AdaDim(native_loss="other"))
    recorder = Recorder("backbone", "projector")
    fit(Checkpointed(), pixels(32, 16), DimensionMonitor(), recorder)
    assert recorder.logged[0]["dynamics/log_n"] == pytest.approx(math.log(32))


def test_a_frozen_backbone_may_be_steered() -> None:
    module = FromPixels()
    module.backbone.requires_grad_(False)
    used = fit(module, pixels(32, 16), AdaDim("backbone", native_loss="other"))
    assert math.isfinite(float(used.callback_metrics["loss/total"]))


def test_monitors_that_differ_and_log_under_one_name_are_refused() -> None:
    for other in ({"spectrum": "eigen"}, {"center": True}, {"pool": "mean"}, {"embedding": "backbone"}):
        with pytest.raises(ValueError, match="two monitors log under the same names"):
            fit(FromPixels(), pixels(32, 16), AdaDim(native_loss="other"), DimensionMonitor(**other))  # type: ignore[arg-type]
    used = fit(
        FromPixels(), pixels(32, 16), AdaDim(native_loss="other"), DimensionMonitor(center=True, name="mine")
    )
    assert {"mine/dynamics/H_R", "dynamics/H_R"} <= set(used.callback_metrics)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": ("backbone",), "native_loss": "other"}, "names two sources"),
        ({"momentum": ("a", "b")}, "momentum goes with native_loss"),
        ({"representation": nn.Linear(2, 2)}, "must be the dotted name of a submodule, not the submodule itself"),
    ],
)
def test_sources_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaDim(**options)


def test_a_momentum_branch_beside_two_views_of_the_student_is_an_error() -> None:
    with pytest.raises(ValueError, match="for a student that sees one view; this one sees 2"):
        fit(FromPixels(), pixels(32, 16), AdaDim(native_loss="other", momentum=("backbone", "projector")))


def test_a_function_that_gives_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="got an empty list"):
        fit(FromPixels(), pixels(32, 16), DimensionMonitor(lambda module, batch, outputs: []))


class Stacked(LightningModule):
    """Batches ``(V, N, d)`` with N labels, a call for each view."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.projector = nn.Linear(6, 12), nn.Linear(12, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z1, z2 = (self.projector(self.backbone(view)) for view in batch[0])
        return (z1 - z2).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_views_in_the_first_dimension_are_told_by_the_labels() -> None:
    x = torch.randn(2, 16, 6)
    recorder = Recorder("backbone", "projector")
    fit(Stacked(), DataLoader([(x, torch.arange(16))], batch_size=None), AdaDim(native_loss="other"), recorder)
    z1, z2 = recorder.steps[0][1].chunk(2)
    assert recorder.logged[0]["loss/invariance"] == pytest.approx(float((z1 - z2).square().mean()), rel=1e-5)


def decorated(step: Any) -> Any:
    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    return wrapper


class Decorated(FromPixels):
    @decorated
    def training_step(self, batch: Any) -> Tensor:
        return FromPixels.training_step(self, batch, 0)


def test_a_decorated_step_is_called_with_the_arguments_it_takes() -> None:
    used = fit(Decorated(), pixels(32, 16), AdaDim(native_loss="other"))
    assert "loss/native" in used.callback_metrics


@pytest.mark.filterwarnings("ignore:.*has nothing to score on")
def test_labels_of_one_of_several_data_sets_in_a_batch_are_not_taken_for_the_others() -> None:
    loaders = {"labeled": pixels(16, 8, torch.arange(16) % 3), "unlabeled": pixels(32, 16)}
    with pytest.raises(ValueError, match="say where they are by labels="):
        fit(FromPixels(), loaders, OnlineKNN(k=3))


def test_kappa_is_a_setting_that_a_checkpoint_does_not_override(tmp_path) -> None:
    def steering(kappa: Any, every_n_steps: int) -> AdaDim:
        balance = Balance(ConstantSchedule(0.5), every_n_steps=every_n_steps, window=64)
        return AdaDim(native_loss="sample_contrastive", objective=AdaDimLoss(kappa=kappa), balance=balance)

    fit(FromPixels(), pixels(32, 16), steering("match", 50), every_epoch(tmp_path))
    for kappa in (4.0, 1.0):
        resumed = steering(kappa, 7)  # also with other rows behind alpha
        fit(FromPixels(), pixels(32, 16), resumed, max_epochs=2, ckpt_path=tmp_path / "0.ckpt")
        assert float(resumed.objective.kappa) == kappa
    matched = steering("match", 50)
    fit(FromPixels(), pixels(32, 16), matched, max_epochs=1, ckpt_path=tmp_path / "0.ckpt")
    assert float(matched.objective.kappa) == pytest.approx(
        float(torch.load(tmp_path / "0.ckpt", weights_only=True)["callbacks"]["AdaDim{}"]["objective"]["kappa"])
    )
    assert float(matched.objective.kappa) != 1


def test_a_frozen_backbone_is_found_where_no_other_is() -> None:
    module = FromPixels()
    module.backbone.requires_grad_(False)
    assert "dynamics/ER_R" in fit(module, pixels(32, 16), DimensionMonitor()).callback_metrics


def test_views_of_different_dimensions_are_an_error() -> None:
    def towers(module: Any, batch: Any, outputs: Any) -> list[Tensor]:
        return [torch.randn(16, 4), torch.randn(16, 5)]

    with pytest.raises(ValueError, match=r"views of different dimensions, \(16, 4\), \(16, 5\)"):
        fit(FromPixels(), pixels(32, 16), DimensionMonitor(towers, towers))


def test_the_bound_of_the_information_is_that_of_the_largest_batch() -> None:
    used = fit(FromPixels(), pixels(33, 16), DimensionMonitor())
    assert float(used.callback_metrics["dynamics/log_n"]) == pytest.approx(math.log(32))


class RestsSometimes(FromPixels):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 1:
            return self.backbone(batch[0]).square().mean()
        return super().training_step(batch, batch_idx)


def test_a_head_that_rests_in_some_steps_is_measured_in_the_others() -> None:
    used = fit(RestsSometimes(), pixels(64, 16), DimensionMonitor())
    assert float(used.callback_metrics["dynamics/ER_Z"]) > 1
    with pytest.raises(RuntimeError, match="'projector' was not called in this step"):
        fit(RestsSometimes(), pixels(64, 16), AdaDim(native_loss="other"))


def test_matched_kappa_meets_the_native_loss_however_the_parts_are_called() -> None:
    class HeadAtOnce(FromPixels):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            r = [self.backbone(batch[0] + noise) for noise in (0.0, 0.1)]
            z1, z2 = self.projector(torch.cat(r)).chunk(2)
            return (z1 * z2).sum().square()

    class HeadByView(HeadAtOnce):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            r1, r2 = self.backbone(torch.cat([batch[0], batch[0] + 0.1])).chunk(2)
            return (self.projector(r1) * self.projector(r2)).sum().square()

    kappas = []
    for module in (HeadAtOnce(), HeadByView()):
        steering = AdaDim(native_loss="sample_contrastive", objective=AdaDimLoss(kappa="match"))
        fit(module, pixels(16, 16), steering)
        kappas.append(float(steering.objective.kappa))
    assert kappas[0] == pytest.approx(kappas[1], rel=1e-4)
    assert kappas[0] != 1


def test_logged_beta_is_gamma_times_the_phase() -> None:
    balance = Balance(ConstantSchedule(0.5), beta=ConstantSchedule(0.25))
    steering = AdaDim(native_loss="other", objective=AdaDimLoss(gamma=0.4), balance=balance)
    used = fit(FromPixels(), pixels(32, 16), steering)
    assert float(used.callback_metrics["balance/beta"]) == pytest.approx(0.1)
    assert float(steering.objective.beta) == pytest.approx(0.1)


def test_one_warning_for_all_bad_steps_in_a_row() -> None:
    class Bad(FromPixels):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            scale = math.nan if batch_idx in (1, 2) else 1.0
            return super().training_step([batch[0] * scale], batch_idx).nan_to_num() * 0.0

    with pytest.warns(UserWarning, match="NaN or infinity") as warned:
        fit(Bad(), pixels(64, 16), DimensionMonitor())
    assert sum("NaN or infinity" in str(w.message) for w in warned) == 1


def test_validation_after_a_fit_and_probes_in_bfloat16_leave_no_error() -> None:
    data = pixels(64, 16, torch.arange(64) % 3)
    knn = OnlineKNN(k=3)
    used = fit(Skips(), (data, data), knn, OnlineLinearProbe(num_classes=3), DimensionMonitor())
    before = float(used.callback_metrics["probe/knn_top1"])
    used.validate(Skips(), data, verbose=False)
    assert "probe/knn_top1" not in used.callback_metrics
    assert before > 0
    used = fit(
        FromPixels(), pixels(64, 16), OnlineKNN(k=3, train_loader=data, val_loader=data), precision="bf16-true"
    )
    assert float(used.callback_metrics["probe/knn_top1"]) > 0


def test_a_crash_leaves_no_hook_of_a_probe() -> None:
    class Crashes(FromPixels):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 1:
                raise KeyError("crash")
            return super().training_step(batch, batch_idx)

    module, data = Crashes(), pixels(64, 16, torch.arange(64) % 3)
    with pytest.raises(KeyError):
        fit(module, data, OnlineKNN(k=3, val_loader=data), OnlineLinearProbe(num_classes=3, val_loader=data))
    assert not any(submodule._forward_hooks for submodule in module.modules())


class HeadTwice(FromPixels):
    """The head is called by ``forward`` and again by the step, as some methods do."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        r = [self.backbone(batch[0] + noise) for noise in (0.0, 0.1)]
        for x in r:
            self.projector(x)
        z1, z2 = (self.projector(x) for x in r)
        return (z1 * z2).sum().square()


class HeadOnOthersToo(FromPixels):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        r = [self.backbone(batch[0] + noise) for noise in (0.0, 0.1)]
        z1, z2 = (self.projector(x) for x in r)
        return (z1 * z2).sum().square() + 0 * self.projector(r[0].detach().flip(0)).sum()


class HeadOnNormalized(FromPixels):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        r = [self.backbone(batch[0] + noise) for noise in (0.0, 0.1)]
        z = [self.projector(nn.functional.normalize(x)) for x in (*r, *r)]
        return (z[0] * z[1]).sum().square()


class HeadOnce(FromPixels):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        r = [self.backbone(batch[0] + noise) for noise in (0.0, 0.1)]
        z1, z2 = (self.projector(x) for x in r)
        return (z1 * z2).sum().square()


@pytest.mark.parametrize("kind", [HeadTwice, HeadOnOthersToo])
def test_of_a_head_that_is_called_more_often_the_calls_on_r_are_read(kind: Any) -> None:
    found = []
    for make in (HeadOnce, kind):
        torch.manual_seed(3)
        module, recorder = make(), Recorder("backbone", "projector")
        fit(module, pixels(32, 16), AdaDim(native_loss="sample_contrastive"), recorder)
        found.append({k: v for k, v in recorder.logged[0].items() if k.startswith(("dynamics", "loss"))})
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_head_whose_calls_cannot_be_told_apart_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"32 rows.*64.*had 16, 16, 16, 16 rows, and a function"):
        fit(HeadOnNormalized(), pixels(32, 16), DimensionMonitor())
