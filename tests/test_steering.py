"""The loss of somebody else's module, steered: against the written formula."""

import io
import math
import pickle
import threading
from copy import deepcopy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from adadim_lightning import (
    AdaDim,
    AdaDimLoss,
    AdaDimModule,
    Balance,
    ConstantSchedule,
    DimensionMonitor,
    EffectiveRankSchedule,
)
from adadim_lightning.functional import matrix_mutual_information, nt_xent_loss, vicreg_loss
from adadim_lightning.steering import NativeScale, Target, loss_of, replace_loss, steered_loss
from tests.helpers import OneCallPerView, Recorder, assert_same_weights, every_epoch, fit, fixed_batches, held_out

ALPHA, GAMMA, KAPPA, WEIGHT = 0.3, 0.5, 2.0, 0.7


def objective(**options: Any) -> AdaDimLoss:
    loss = AdaDimLoss(**({"gamma": GAMMA, "kappa": KAPPA} | options))
    loss.set_balance(ALPHA)
    return loss


def views(count: int) -> tuple[list[Tensor], list[Tensor]]:
    return (
        [torch.randn(6, 5, requires_grad=True) for _ in range(count)],
        [torch.randn(6, 4, requires_grad=True) for _ in range(count)],
    )


def added(r: list[Tensor], z: list[Tensor], i: int, j: int) -> tuple[Tensor, Tensor, Tensor]:
    """VICReg, NT-Xent and the information of two views."""
    information = matrix_mutual_information(torch.cat([r[i], r[j]]), torch.cat([z[i], z[j]]))
    return vicreg_loss(z[i], z[j]), nt_xent_loss(z[i], z[j], temperature=0.2), information


FORMULAS = {
    "sample_contrastive": lambda native, dec, uni, info: (
        ALPHA * native + ((1 - ALPHA) * dec + GAMMA * ALPHA * info) / KAPPA
    ),
    "dimension_contrastive": lambda native, dec, uni, info: (
        (1 - ALPHA) * native + ALPHA * KAPPA * uni + GAMMA * ALPHA * info
    ),
    "other": lambda native, dec, uni, info: (
        native + WEIGHT * ((1 - ALPHA) * dec + ALPHA * KAPPA * uni + GAMMA * ALPHA * info)
    ),
}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", FORMULAS)
def test_value_and_gradient_are_those_of_the_formula_over_all_pairs(kind: str, count: int) -> None:
    r, z = views(count)
    native = (z[0] - z[1]).square().sum() + r[0].sum()
    output = steered_loss(kind, native, r, z, objective(), weight=WEIGHT)
    pairs = [(i, j) for i in range(count) for j in range(i)]
    expected = sum(FORMULAS[kind](native, *added(r, z, i, j)) for i, j in pairs) / len(pairs)
    torch.testing.assert_close(output.total, expected)
    ours = torch.autograd.grad(output.total, [*r, *z], retain_graph=True)
    theirs = torch.autograd.grad(expected, [*r, *z])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(sum(output.weighted.values()), output.total.detach())
    assert output.parts["native"] == native
    place = {"sample_contrastive": "uniformity", "dimension_contrastive": "decorrelation"}.get(kind)
    assert set(output.weighted) == {"native", "decorrelation", "uniformity", "information"} - {place}


def test_beside_another_loss_one_view_is_its_own_partner() -> None:
    [r], [z] = views(1)
    native = z.square().sum()
    output = steered_loss("other", native, [r], [z], objective(), weight=WEIGHT)
    vicreg, nt_xent, _ = added([r], [z], 0, 0)
    # The rows of one view say as much about each other as those of both.
    information = matrix_mutual_information(r, z)
    torch.testing.assert_close(output.parts["information"], information.detach())
    assert output.parts["invariance"] == 0
    torch.testing.assert_close(output.total, FORMULAS["other"](native, vicreg, nt_xent, information))


@pytest.mark.parametrize("kind", ["sample_contrastive", "dimension_contrastive"])
def test_one_view_in_the_place_of_a_part_is_an_error_that_names_the_momentum_branch(kind: str) -> None:
    [r], [z] = views(1)
    with pytest.raises(ValueError, match=rf"sees one view.*{kind} loss.*momentum="):
        steered_loss(kind, z.sum(), [r], [z], objective())


@pytest.mark.parametrize("kind", ["sample_contrastive", "dimension_contrastive"])
def test_matched_kappa_compares_the_native_loss_where_it_met_z(kind: str) -> None:
    r, z = views(2)
    copies = [x.clone() for x in z]
    native = (z[0] * z[1]).sum().square()
    loss = objective(kappa="match")
    output = steered_loss(kind, native, r, copies, loss, embeddings=z)
    dec, uni, _ = added(r, z, 0, 1)
    over, under = (dec, native) if kind == "sample_contrastive" else (native, uni)
    norms = [torch.cat(torch.autograd.grad(x, z, retain_graph=True)).norm() for x in (over, under)]
    torch.testing.assert_close(loss.kappa, norms[0] / norms[1])
    expected = (1 - ALPHA) * dec / loss.kappa if kind == "sample_contrastive" else ALPHA * loss.kappa * uni
    key = "decorrelation" if kind == "sample_contrastive" else "uniformity"
    torch.testing.assert_close(output.weighted[key], expected.detach())
    share = ALPHA if kind == "sample_contrastive" else 1 - ALPHA
    torch.testing.assert_close(output.weighted["native"], share * native.detach())
    with pytest.raises(ValueError, match="one of them does not depend on it"):
        steered_loss(kind, r[0].sum(), r, copies, objective(kappa="match"), embeddings=z)


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("kind", FORMULAS)
def test_steered_loss_scales_the_added_terms_to_the_native_loss(kind: str, size: float) -> None:
    """A tuned learning rate fits as before: the native loss keeps its size, and the others take it."""
    r, z = views(2)
    native = size * (z[0] - z[1]).square().sum()
    output = steered_loss(kind, native, r, z, objective(kappa="match"), weight=WEIGHT)
    dec, uni, info = added(r, z, 0, 1)
    norms = {x: torch.cat(torch.autograd.grad(x, z, retain_graph=True)).norm() for x in (native, dec, uni)}
    to_native = norms[native] / norms[dec]
    information = GAMMA * ALPHA * info.clamp_min(0)
    expected = {
        "sample_contrastive": ALPHA * native + to_native * ((1 - ALPHA) * dec + information),
        "dimension_contrastive": (1 - ALPHA) * native
        + ALPHA * norms[native] / norms[uni] * uni
        + to_native * information,
        "other": native
        + WEIGHT * to_native * ((1 - ALPHA) * dec + ALPHA * norms[dec] / norms[uni] * uni + information),
    }[kind]
    torch.testing.assert_close(output.total, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(sum(output.weighted.values()), output.total.detach(), rtol=1e-4, atol=0)


def test_native_scale_follows_a_running_mean_of_every_tenth_step() -> None:
    scale, running = NativeScale(), torch.zeros(2)
    for step in range(21):
        z = torch.randn(6, 4, requires_grad=True)
        losses = z.pow(3).sum(), z.square().sum()
        if step % 10 == 0:
            norms = torch.stack([torch.autograd.grad(x, z, retain_graph=True)[0].norm() for x in losses])
            running = running.lerp(norms, 0.3)
        found = scale(losses[0], lambda losses=losses: losses[1], [z])
        assert float(found) == pytest.approx(float(running[0] / running[1]), rel=1e-4)
    resumed = NativeScale()
    resumed.load_state_dict(scale.state_dict())
    z = torch.randn(6, 4, requires_grad=True)
    assert float(resumed(z.sum(), z.sum, [z])) == float(scale.scale)  # due in nine steps, as in the other


class Returns(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        """A step."""
        return self.make(batch)


def test_a_replaced_loss_leaves_all_else_that_the_step_returned() -> None:
    extra = torch.ones(3)
    given = {"loss": torch.tensor(2.0), "extra": extra}
    for make, read in (
        (lambda x: x.sum(), lambda y: y),
        (lambda x: given, lambda y: y["loss"]),
        (lambda x: None, lambda y: y),
    ):
        module, begun, seen = Returns(make), [], []
        native = module.training_step(torch.ones(2), 0)

        def total(loss: Tensor, outputs: Any, seen: list[Any] = seen) -> Tensor:
            seen.append(outputs)
            return 10 * loss

        undo = replace_loss(module, total, lambda begun=begun: begun.append(1))
        assert module.training_step.__doc__ == "A step."
        outputs = module.training_step(torch.ones(2), batch_idx=0)
        assert begun == [1]
        if native is None:
            assert outputs is None
            assert seen == []
        else:
            assert read(outputs) == 20
            assert seen[0] is native or read(seen[0]) == 2
            assert loss_of(outputs) == 20
        with pytest.raises(ValueError, match="steered by another AdaDim already"):
            replace_loss(module, total, list)
        undo()
        undo()
        assert "training_step" not in vars(module)
    assert outputs is None
    assert given["loss"] == 2  # the module's own dictionary is not written to


def test_a_step_that_was_the_instances_own_is_put_back() -> None:
    module = Returns(lambda x: x.sum())

    def own(batch: Tensor, batch_idx: int) -> Tensor:
        return batch.prod()

    module.training_step = own
    replace_loss(module, lambda loss, outputs: loss, list)()
    assert module.training_step is own


class Criterion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = 0.25
        self.count = 1
        self.flag = True
        self.text = "0.5"
        self.register_buffer("share", torch.zeros(()))
        self.register_buffer("several", torch.zeros(2))
        self.learned = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)


def test_a_target_takes_alpha_whatever_number_it_is() -> None:
    module = nn.Module()
    module.criterion = Criterion()
    for name in ("alpha", "count", "share", "frozen"):
        buffer = getattr(module.criterion, name)
        Target(module, f"criterion.{name}").write(0.75)
        assert float(getattr(module.criterion, name)) == 0.75
        if isinstance(buffer, Tensor):
            assert getattr(module.criterion, name) is buffer
    module.own = 0
    Target(module, "own").write(0.5)
    assert module.own == 0.5


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("criterion.alfa", "'criterion.alfa' is not found"),
        ("loss.alpha", "'loss.alpha' is not found"),
        ("criterion.flag", "must be a number or a tensor of one, got True"),
        ("criterion.text", "must be a number or a tensor of one, got '0.5'"),
        ("criterion.several", "must be a number or a tensor of one"),
        ("criterion.learned", "is a parameter that the model itself trains"),
    ],
)
def test_a_target_that_is_no_number_is_an_error(path: str, message: str) -> None:
    module = nn.Module()
    module.criterion = Criterion()
    with pytest.raises(ValueError, match=message):
        Target(module, path)


# The callback.


def constant(alpha: float = ALPHA) -> Balance:
    return Balance(ConstantSchedule(alpha))


class WithAlpha(OneCallPerView):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = 0.9
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(self.alpha)
        return (1 - self.alpha) * super().training_step(batch, batch_idx)


def test_a_target_is_driven_and_the_loss_left_alone() -> None:
    module, recorder = WithAlpha(), Recorder("encoder", "projector")
    steering = AdaDim(target="alpha", every_n_steps=2, balance=Balance(ConstantSchedule(0.25)))
    fit(module, fixed_batches(3), steering, recorder)
    assert module.seen == [0.25] * 3
    assert recorder.logged[0]["balance/alpha"] == 0.25
    assert not {"balance/beta", "loss/native", "loss/total"} & set(recorder.logged[0])
    alone = WithAlpha()
    alone.alpha = 0.25
    fit(alone, fixed_batches(3))
    assert_same_weights(module, alone)


def test_a_target_follows_the_measured_rank() -> None:
    module = WithAlpha()
    fit(
        module,
        fixed_batches(6),
        AdaDim(target="alpha", balance=Balance(lambda _, s: 0.125 if s else 0.5, every_n_steps=3)),
    )
    assert module.seen == [0.5] * 3 + [0.125] * 3


def test_observing_logs_what_steering_would_do_and_does_nothing() -> None:
    logged = {}
    for observe in (True, False):
        module, recorder = OneCallPerView(), Recorder("encoder", "projector")
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=0.0)
        steering = AdaDim(
            native_loss="dimension_contrastive",
            observe=observe,
            objective=AdaDimLoss(gamma=GAMMA, kappa=1),  # which does not move while it only observes
            balance=constant(),
            momentum=None,
        )
        fit(module, fixed_batches(4), steering, recorder, accumulate_grad_batches=2)
        logged[observe] = recorder.logged[0]
    assert logged[True].keys() == logged[False].keys()
    assert {"loss/native", "loss/uniformity", "loss_weighted/native", "balance/beta"} <= set(logged[True])
    assert logged[True] == pytest.approx(logged[False], rel=1e-5)
    assert logged[True]["balance/beta"] == pytest.approx(GAMMA * ALPHA)
    observed, alone = WithAlpha(), WithAlpha()
    fit(observed, fixed_batches(4), AdaDim(observe=True))
    fit(observed, fixed_batches(4), AdaDim(observe=True, target="alpha", balance=constant()))
    for _ in range(2):
        fit(alone, fixed_batches(4))
    assert set(observed.seen) == {0.9}
    assert_same_weights(observed, alone)


def test_observing_leaves_an_objective_of_the_model_alone() -> None:
    module, recorder = OneCallPerView(AdaDimLoss(alpha=0.6)), Recorder("encoder", "projector")
    fit(module, fixed_batches(2), AdaDim(observe=True, balance=constant(0.2)), recorder)
    assert recorder.alphas == pytest.approx([0.6, 0.6])
    assert recorder.logged[0]["balance/alpha"] == pytest.approx(0.2)


def test_a_resumed_run_steers_the_native_loss_as_the_uninterrupted_run_does(tmp_path) -> None:
    def steering() -> AdaDim:
        return AdaDim(
            native_loss="sample_contrastive",
            objective=AdaDimLoss(gamma=GAMMA, kappa="match"),
            balance=Balance(lambda _, s: 0.1 if s is None else s.er_z / 8, every_n_steps=3, ema=0.5),
        )

    whole, first, second = OneCallPerView(), OneCallPerView(), OneCallPerView()
    recorders = Recorder("encoder", "projector"), Recorder("encoder", "projector")
    fit(whole, fixed_batches(4), steering(), recorders[0], max_epochs=4)
    fit(first, fixed_batches(4), steering(), every_epoch(tmp_path), max_epochs=2)
    fit(second, fixed_batches(4), steering(), recorders[1], max_epochs=4, ckpt_path=tmp_path / "1.ckpt")
    assert recorders[1].logged == recorders[0].logged[2:]
    assert_same_weights(whole, second)


def test_the_state_of_a_steered_model_is_that_of_the_model_alone(tmp_path) -> None:
    fit(OneCallPerView(), fixed_batches(2), AdaDim(native_loss="other", name="mine"), every_epoch(tmp_path))
    checkpoint = torch.load(tmp_path / "0.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == OneCallPerView().state_dict().keys()
    assert {"balance", "objective", "recent_z"} <= set(checkpoint["callbacks"]["AdaDim{mine}"])


def test_a_name_prefixes_the_parts_of_the_loss_too() -> None:
    recorder = Recorder("encoder", "projector")
    fit(OneCallPerView(), fixed_batches(2), AdaDim(native_loss="other", name="mine"), recorder)
    assert {"mine/loss/native", "mine/loss/total", "mine/balance/alpha", "mine/dynamics/H_R"} <= set(
        recorder.logged[0]
    )


class ByHand(OneCallPerView):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (
            OneCallPerView,
            {},
            r"has 0; say what its own loss is by native_loss='sample_contrastive'.*target=.*DimensionMon",
        ),
        (ByHand, {"native_loss": "other"}, r"ByHand optimizes by hand.*observe=True"),
        (
            lambda: OneCallPerView(AdaDimLoss()),
            {"native_loss": "other"},
            "is an AdaDimLoss, which AdaDim steers without",
        ),
        (OneCallPerView, {"target": "criterion.alpha"}, "target 'criterion.alpha' is not found"),
    ],
)
def test_what_cannot_be_steered_is_an_error_that_says_what_to_do(module, options: dict, message: str) -> None:
    model = module()
    with pytest.raises(ValueError, match=message):
        fit(model, fixed_batches(1), AdaDim(**options))
    assert "training_step" not in vars(model)
    assert not any(submodule._forward_hooks for submodule in model.modules())


@pytest.mark.parametrize(
    "options",
    [
        {"native_loss": "contrastive"},
        {"native_loss": "other", "target": "alpha"},
        {"objective": AdaDimLoss()},
        {"weight": -1.0},
        {"observe": 1},
        {"pool": "max"},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"must be|give one of them|objective goes with"):
        AdaDim(**options)


class ReturnsDictionary(OneCallPerView):
    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.detach = detach

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        r = torch.cat([self.encoder(view) for view in batch[0]])
        z = self.projector(r)
        z1, z2 = z.chunk(2)
        return {"loss": (z1 - z2).square().mean(), "r": r.detach(), "z": z.detach() if self.detach else z}


def test_an_embedding_without_its_graph_is_an_error_when_steering() -> None:
    sources = {"representation": "r", "embedding": "z"}
    with pytest.raises(ValueError, match=r"Z has no gradient.*without detach\(\)"):
        fit(ReturnsDictionary(detach=True), fixed_batches(1), AdaDim(**sources, native_loss="other"))
    fit(ReturnsDictionary(detach=True), fixed_batches(1), AdaDim(**sources, native_loss="other", observe=True))
    fit(ReturnsDictionary(detach=False), fixed_batches(1), AdaDim(**sources, native_loss="other"))


def test_two_that_steer_one_loss_are_refused() -> None:
    module = OneCallPerView()
    with pytest.raises(ValueError, match="steered by another AdaDim already"):
        fit(module, fixed_batches(1), AdaDim(native_loss="other"), AdaDim(native_loss="other", name="second"))
    assert "training_step" not in vars(module)


def test_progress_by_hand_counts_batches_not_optimizer_steps() -> None:
    class TwoSteps(ByHand):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            super().training_step(batch, batch_idx)

    seen: list[float] = []

    def note(progress: float, statistics: Any) -> float:
        seen.append(progress)
        return 0.5

    fit(TwoSteps(), fixed_batches(4), AdaDim(observe=True, balance=Balance(note)), max_epochs=2)
    assert seen == pytest.approx([i / 8 for i in range(8)])
    recorder = Recorder("encoder", "projector")
    fit(TwoSteps(), fixed_batches(8), DimensionMonitor(window=16, every_n_steps=100), recorder, max_steps=8)
    assert math.isfinite(recorder.logged[0]["dynamics/I_RZ"])  # max_steps ends the epoch after four batches


def test_a_model_with_a_validation_loop_is_steered_in_training_only() -> None:
    class Validated(OneCallPerView):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.projector(self.encoder(batch[0]))

    recorder = Recorder("encoder", "projector")
    fit(Validated(), (fixed_batches(2), held_out()), AdaDim(native_loss="sample_contrastive"), recorder)
    assert recorder.logged[0]["dynamics/log_n"] == pytest.approx(math.log(32))


class Counting:
    """A schedule with a state of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, progress: float, statistics: Any) -> float:
        self.calls += 1
        return min(1.0, 0.05 * self.calls)


class Kept(Recorder):
    """Alpha and kappa of each step."""

    def __init__(self, steering: AdaDim) -> None:
        super().__init__("encoder", "projector")
        self.steering, self.seen = steering, []

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append((self.steering.alpha, float(self.steering.objective.kappa)))


@pytest.mark.parametrize("schedule", [Counting, EffectiveRankSchedule])
def test_what_is_given_to_several_callbacks_carries_nothing_from_fit_to_fit(schedule: Any) -> None:
    def fold(steering: AdaDim) -> list[Any]:
        torch.manual_seed(0)
        kept = Kept(steering)
        fit(OneCallPerView(), fixed_batches(6), steering, kept)
        return kept.seen

    def given() -> dict[str, Any]:
        return {"balance": Balance(schedule(), every_n_steps=2, window=16), "objective": AdaDimLoss()}

    new = fold(AdaDim(native_loss="sample_contrastive", **given()))
    shared = given()
    before = deepcopy(vars(shared["balance"].alpha)), float(shared["objective"].kappa)
    callbacks = [AdaDim(native_loss="sample_contrastive", **shared) for _ in range(2)]
    assert fold(callbacks[0]) == fold(callbacks[1]) == new
    assert fold(callbacks[0]) == new  # one callback for several models
    assert (vars(shared["balance"].alpha), float(shared["objective"].kappa)) == before
    assert shared["balance"].statistics is None
    assert len({alpha for alpha, _ in new}) > 1
    assert new[0][1] != 1  # kappa has moved, too


def test_an_objective_that_is_given_to_several_modules_stays_as_it_is() -> None:
    loss = AdaDimLoss(alpha=0.25)
    modules = [AdaDimModule(nn.Linear(6, 5), nn.Linear(5, 4), loss) for _ in range(2)]
    modules[0].objective.set_balance(0.75)
    assert [float(x.alpha) for x in (loss, modules[1].objective, modules[0].objective)] == [0.25, 0.25, 0.75]


def test_a_schedule_that_cannot_be_copied_is_an_error_that_says_so() -> None:
    class Locked(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    with pytest.raises(ValueError, match="works on copies of objective and balance"):
        AdaDim(native_loss="other", balance=Balance(Locked()))


class Saved(Callback):
    """Backbone and module as they are saved and copied while they are tapped and steered."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.sizes, self.loaded = [], []
        for x in (pl_module.encoder, pl_module):
            file = io.BytesIO()
            torch.save(x, file)
            self.sizes.append(file.tell())
            file.seek(0)
            self.loaded.append(torch.load(file, weights_only=False))
        self.loaded.append(deepcopy(pl_module))
        self.callbacks = pickle.loads(
            pickle.dumps([x for x in trainer.callbacks if isinstance(x, DimensionMonitor)])
        )


@pytest.mark.parametrize(
    "watching",
    [
        [DimensionMonitor()],
        [AdaDim(native_loss="other")],
        [AdaDim(native_loss="other"), DimensionMonitor(name="x")],
    ],
    ids=["observed", "steered", "both"],
)
def test_what_is_saved_in_a_fit_is_neither_tapped_nor_steered(watching: list[Any]) -> None:
    plain, saved = Saved(), Saved()
    fit(OneCallPerView(), fixed_batches(2), plain)
    fit(OneCallPerView(), fixed_batches(2), *watching, saved)
    for size, bare in zip(saved.sizes, plain.sizes, strict=True):
        assert size < bare + 1000
    modules = saved.loaded[1:]
    for module in modules:
        assert module.training_step.__func__ is OneCallPerView.training_step
    batch = next(iter(fixed_batches(1)))
    for module, bare in zip(modules, (OneCallPerView(), OneCallPerView()), strict=True):
        bare.load_state_dict(module.state_dict())
        assert float(module.training_step(batch, 0)) == float(bare.training_step(batch, 0))
    assert len(saved.callbacks) == len(watching)
    fit(OneCallPerView(), fixed_batches(2), *saved.callbacks)  # a copy of a callback follows another model


@pytest.mark.parametrize("kind", FORMULAS)
def test_steered_loss_compares_gradients_past_the_hooks_of_z(kind: Any) -> None:
    r, leaves = views(2)
    scales = []
    for hooked in (False, True):
        loss, scale = objective(kappa="match"), NativeScale()
        z = [x.clone() for x in leaves]
        calls: list[int] = []
        for i, x in enumerate(z if hooked else ()):
            # Not linear: it would change the ratio of two gradients.
            x.register_hook(lambda gradient: gradient / gradient.norm())
            x.register_hook(lambda _, i=i, calls=calls: calls.append(i))
        native = (z[0] - z[1]).pow(2).mean() + z[0].exp().mean()
        total = steered_loss(kind, native, r, z, loss, native_scale=scale).total
        assert not calls
        total.backward()
        assert sorted(calls) == ([0, 1] if hooked else [])  # the user's own backward pass calls each once
        scales.append(torch.stack([loss.kappa, scale.scale]))
    assert torch.equal(*scales)
    assert int(loss.calls) == 1


def test_steered_fit_calls_the_hooks_of_z_once_a_step() -> None:
    module = OneCallPerView()
    calls: list[Tensor] = []
    module.projector.register_forward_hook(
        lambda _module, _inputs, z: z.register_hook(calls.append) and None, prepend=True
    )
    fit(module, fixed_batches(3), AdaDim("encoder", "projector", native_loss="other"))
    assert len(calls) == 2 * 3  # two views, three steps
