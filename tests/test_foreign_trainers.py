"""Other trainers, compilers, precisions and optimizers around modules of other people."""

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adadim_lightning import (
    AdaDim,
    AdaDimLoss,
    Balance,
    ConstantSchedule,
    DimensionMonitor,
    EffectiveRankSchedule,
    OnlineKNN,
    OnlineLinearProbe,
)
from adadim_lightning.functional import effective_rank
from tests.helpers import DIM_Z, assert_same_weights, backbone, fixed_batches, head, held_out

pytorch_lightning = pytest.importorskip("pytorch_lightning")

PACKAGES = pytest.mark.parametrize(
    "package", [lightning.pytorch, pytorch_lightning], ids=["lightning", "pytorch_lightning"]
)
ALPHA, GAMMA, IMAGES = 0.3, 0.5, 16
DYNAMICS = {f"dynamics/{key}" for key in ("H_R", "ER_R", "ER_Z", "I_RZ", "log_n")}


# The formulas, written out.


def contrastive(z1: Tensor, z2: Tensor) -> Tensor:
    """A module's own loss: cross entropy over the cosines of one view with the other."""
    cosines = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / 0.5
    return F.cross_entropy(cosines, torch.arange(len(z1)))


def vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    total = 25 * ((z1 - z2) ** 2).mean()
    for z in (z1, z2):
        covariance = torch.cov(z.T)
        variances = covariance.diagonal()
        total = total + 25 * torch.relu(1 - (variances + 1e-4).sqrt()).mean()
        total = total + (covariance - covariance.diag().diag()).square().sum() / z.shape[1]
    return total


def information(r: Tensor, z: Tensor) -> Tensor:
    k_r, k_z = ((F.normalize(x, dim=1) @ F.normalize(x, dim=1).T).square() for x in (r, z))
    return torch.log(len(r) ** 2 * (k_r * k_z).sum() / (k_r.sum() * k_z.sum()))


def steered(native: Tensor, r1: Tensor, r2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """What the total is with ``native_loss="sample_contrastive"`` at a constant alpha."""
    i_rz = information(torch.cat([r1, r2]), torch.cat([z1, z2]))
    return ALPHA * native + (1 - ALPHA) * vicreg(z1, z2) + GAMMA * ALPHA * i_rz


def module_of(package: Any = lightning.pytorch, optimizer: Any = None, **parts: nn.Module) -> Any:
    """A SimCLR of one package or the other; the same weights at every call."""

    class SimCLR(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.backbone = backbone()
            self.projection_head = head()
            for name, part in parts.items():
                setattr(self, name, part)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (view1, view2), _ = batch
            z1, z2 = (self.projection_head(self.backbone(view)) for view in (view1, view2))
            return contrastive(z1.float(), z2.float())

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.backbone(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.05))
            return make(self.parameters())

    return SimCLR()


def formula_of(module: Any, batch: Any) -> Tensor:
    (view1, view2), _ = batch
    r1, r2 = module.backbone(view1), module.backbone(view2)
    z1, z2 = module.projection_head(r1), module.projection_head(r2)
    return steered(contrastive(z1, z2), r1, r2, z1, z2)


def steering(**options: Any) -> AdaDim:
    objective = AdaDimLoss(gamma=GAMMA, kappa=options.pop("kappa", 1.0))
    balance = Balance(ConstantSchedule(ALPHA))
    return AdaDim(native_loss="sample_contrastive", objective=objective, balance=balance, **options)


def moving() -> AdaDim:
    """Alpha follows the rank of every second step."""
    balance = Balance(EffectiveRankSchedule(), every_n_steps=2, window=64)
    return AdaDim(native_loss="sample_contrastive", objective=AdaDimLoss(kappa=1), balance=balance, window=64)


def fit(module: Any, data: Any, *callbacks: Any, package: Any = lightning.pytorch, **options: Any) -> Any:
    checkpointing = any(isinstance(c, package.callbacks.ModelCheckpoint) for c in callbacks)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    path = options.pop("ckpt_path", None)
    options = {"max_epochs": 2, "enable_checkpointing": checkpointing} | options
    used = package.Trainer(callbacks=list(callbacks), **(quiet | options))
    train, val = data if isinstance(data, tuple) else (data, None)
    used.fit(module, train, val, ckpt_path=path)
    return used


def figures(used: Any) -> dict[str, float]:
    return {key: float(value) for key, value in used.callback_metrics.items()}


class Rows(lightning.pytorch.Callback):
    """R and Z of each call in training, by hooks of the test's own."""

    def __init__(self, representation: str = "backbone", embedding: str = "projection_head") -> None:
        self.names = (representation, embedding)
        self.calls: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.batches: list[int] = []
        self._handles: list[Any] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for calls, name in zip(self.calls, self.names, strict=True):
            # The default keeps the list of this name.
            def note(part: nn.Module, _: Any, output: Tensor, calls: list[Tensor] = calls) -> None:
                if part.training:
                    calls.append(output.detach().clone())

            self._handles.append(pl_module.get_submodule(name).register_forward_hook(note))

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches.append(len(self.calls[0]))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        for handle in self._handles:
            handle.remove()


class Gradients(lightning.pytorch.Callback):
    """Gradients as the optimizer is about to use them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        found = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        self.steps.append(found)


def assert_untouched(module: Any) -> None:
    """No hook and no replaced step is left."""
    assert "training_step" not in vars(module)
    assert not any(submodule._forward_hooks for submodule in module.modules())


# Both packages.


@PACKAGES
def test_the_monitor_and_the_probes_work_in_both_packages(package: Any) -> None:
    rows, module = Rows(), module_of(package)
    callbacks = [DimensionMonitor(), OnlineKNN(k=5), OnlineLinearProbe(num_classes=10), rows]
    logged = figures(fit(module, (fixed_batches(3), held_out()), *callbacks, package=package))
    er_r, er_z = (float(effective_rank(torch.cat(calls))) for calls in rows.calls)
    assert logged["dynamics/ER_R"] == pytest.approx(er_r, rel=1e-4)
    assert logged["dynamics/ER_Z"] == pytest.approx(er_z, rel=1e-4)
    assert logged["dynamics/log_n"] == pytest.approx(math.log(2 * IMAGES))
    assert set(logged) >= DYNAMICS | {"probe/knn_top1", "probe/linear_top1"}
    assert_untouched(module)


@PACKAGES
def test_steered_steps_are_those_of_the_formula_in_both_packages(package: Any) -> None:
    module, by_hand = module_of(package), module_of(package)
    used = fit(module, fixed_batches(3), steering(), package=package)
    optimizer, totals = torch.optim.SGD(by_hand.parameters(), lr=0.05), []
    for _ in range(2):
        totals = []
        for batch in fixed_batches(3):
            total = formula_of(by_hand, batch)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            totals.append(total.item())
    torch.testing.assert_close(module.state_dict(), by_hand.state_dict(), rtol=1e-4, atol=1e-5)
    assert float((by_hand.backbone[1].weight - module_of().backbone[1].weight).norm()) > 0.05
    logged = figures(used)
    assert logged["loss/total"] == pytest.approx(sum(totals) / 3, rel=1e-4)
    assert logged["balance/alpha"] == pytest.approx(ALPHA)
    assert logged["balance/beta"] == pytest.approx(GAMMA * ALPHA)
    assert_untouched(module)


@PACKAGES
def test_checkpoints_and_early_stopping_follow_it_in_both_packages(package: Any, tmp_path: Path) -> None:
    best = package.callbacks.ModelCheckpoint(tmp_path, monitor="dynamics/ER_R", mode="max", filename="{epoch}")
    stop = package.callbacks.EarlyStopping("dynamics/ER_R", patience=1, mode="max", min_delta=100.0)
    used = fit(module_of(package), fixed_batches(2), DimensionMonitor(), best, stop, package=package, max_epochs=9)
    assert used.current_epoch == 2
    assert float(best.best_model_score) >= figures(used)["dynamics/ER_R"]
    assert Path(best.best_model_path).exists()


@PACKAGES
def test_a_resumed_run_goes_on_with_its_alpha_in_both_packages(package: Any, tmp_path: Path) -> None:
    def each_epoch(folder: Path) -> Any:
        return package.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)

    module = module_of(package)
    data = fixed_batches(3)
    logged = figures(fit(module, data, moving(), each_epoch(tmp_path), package=package, max_epochs=3))
    again, resumed = module_of(package), moving()
    options = {"package": package, "max_epochs": 3, "ckpt_path": tmp_path / "epoch=1.ckpt"}
    used = fit(again, data, resumed, each_epoch(tmp_path / "again"), **options)
    state = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"]["AdaDim{}"]
    assert state["balance"]["statistics"]["er_z"] > 1
    assert 0 < logged["balance/alpha"] < 1
    assert figures(used) == pytest.approx(logged, rel=1e-4)
    torch.testing.assert_close(again.state_dict(), module.state_dict(), rtol=1e-4, atol=1e-5)


def test_an_error_lists_the_submodules_of_a_lightning_module_and_their_shapes() -> None:
    with pytest.raises(ValueError, match=r"no submodule named 'absent'") as error:
        fit(module_of(), fixed_batches(1), DimensionMonitor("absent"))
    assert f"backbone: ({IMAGES}, 12), 2 calls" in str(error.value)
    assert f"projection_head: ({IMAGES}, {DIM_Z}), 2 calls" in str(error.value)


# Compilers. What is compiled is traced, but not lowered: the figures are then those of the eager module.


def compiled(how: str) -> tuple[Any, Any]:
    """The module, and what is given to the trainer."""
    torch.compiler.reset()
    module = module_of()
    if how == "submodules":
        module.backbone = torch.compile(module.backbone, backend="aot_eager")
        module.projection_head = torch.compile(module.projection_head, backend="aot_eager")
    elif how == "in place":
        module.backbone.compile(backend="aot_eager")
        module.projection_head.compile(backend="aot_eager")
    elif how != "not":
        return module, torch.compile(module, backend="aot_eager", fullgraph=how == "in one graph")
    return module, module


COMPILED = pytest.mark.parametrize("how", ["submodules", "in place", "whole", "in one graph"])
CALLBACKS: dict[str, Callable[[], Any]] = {
    "measured": lambda: DimensionMonitor(every_n_steps=2, window=64),
    "steered": moving,
}


@COMPILED
@pytest.mark.parametrize("what", CALLBACKS)
def test_a_compiled_module_gives_the_figures_of_the_eager_one(how: str, what: str) -> None:
    eager, _ = compiled("not")
    expected = figures(fit(eager, fixed_batches(4), CALLBACKS[what]()))
    module, given = compiled(how)
    assert figures(fit(given, fixed_batches(4), CALLBACKS[what]())) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert set(expected) >= DYNAMICS
    for ours, theirs in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["submodules", "in place"])
def test_kappa_matches_the_gradients_of_a_module_with_compiled_submodules(how: str) -> None:
    kappas = []
    for module in (compiled("not")[0], compiled(how)[0]):
        steer = steering(kappa="match")
        fit(module, fixed_batches(3), steer)
        kappas.append(float(steer.objective.kappa))
    assert kappas[0] == pytest.approx(kappas[1], rel=1e-4)
    assert kappas[0] > 1.5


def test_kappa_cannot_match_the_gradients_of_a_whole_compiled_module_and_says_why() -> None:
    with pytest.raises(ValueError, match=r'kappa="match".*compile'):
        fit(compiled("whole")[1], fixed_batches(3), steering(kappa="match"))


class Crops(lightning.pytorch.LightningModule):
    """Two large and three small crops of each image, a call for each size."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.backbone = torch.compile(layers, backend="aot_eager") if compiled else layers
        self.projector = nn.Linear(12, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (view1, view2), _ = batch
        large = torch.cat([view1, view2])
        small = torch.cat([view1[..., :5, :5], view1[..., 2:7, 3:8], view2[..., 1:6, :5]])
        r = torch.cat([self.backbone(large), self.backbone(small)])
        z = self.projector(r)
        return (z[: len(large)] - 1).square().mean() + z.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_of_crops_of_several_sizes_a_compiled_backbone_is_read_at_the_largest(is_compiled: bool) -> None:
    torch.compiler.reset()
    rows = Rows("backbone", "projector")
    steer = AdaDim(native_loss="other", balance=Balance(ConstantSchedule(ALPHA)))
    logged = figures(fit(Crops(is_compiled), fixed_batches(3), steer, rows))
    large = torch.cat([r for r in rows.calls[0] if len(r) == 2 * IMAGES])
    assert len(large) == 6 * 2 * IMAGES
    assert logged["dynamics/ER_R"] == pytest.approx(float(effective_rank(large)), rel=1e-4)
    assert logged["dynamics/ER_Z"] == pytest.approx(
        float(effective_rank(torch.cat([z[: 2 * IMAGES] for z in rows.calls[1]]))), rel=1e-4
    )
    decorrelation = [vicreg(*z[: 2 * IMAGES].chunk(2)).item() for z in rows.calls[1][3:]]
    assert logged["loss/decorrelation"] == pytest.approx(sum(decorrelation) / 3, rel=1e-4)


@pytest.mark.parametrize("how", ["submodules", "in place"])
def test_submodules_that_were_compiled_and_run_before_the_fit_are_read(how: str) -> None:
    expected = figures(fit(compiled("not")[0], fixed_batches(4), moving()))
    module, _ = compiled(how)
    [((view, _), _)] = fixed_batches(1)
    module.projection_head(module.backbone(view)).sum().backward()
    module.zero_grad()
    assert figures(fit(module, fixed_batches(4), moving())) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_whole_module_that_was_compiled_and_run_before_says_what_to_do() -> None:
    _, given = compiled("whole")
    fit(given, fixed_batches(2))
    with pytest.raises(RuntimeError, match=r"'backbone' was not called in this step.*torch\.compiler\.reset"):
        fit(given, fixed_batches(2), DimensionMonitor())
    torch.compiler.reset()
    assert set(figures(fit(given, fixed_batches(2), DimensionMonitor()))) >= DYNAMICS


@COMPILED
def test_a_compiled_module_is_steered_in_one_fit_after_the_other(how: str) -> None:
    logged = []
    for _, given in (compiled("not"), compiled(how)):
        fit(given, fixed_batches(4), moving())
        logged.append(figures(fit(given, fixed_batches(4), moving(), max_epochs=1)))
    assert logged[1] == pytest.approx(logged[0], rel=1e-4, abs=1e-5)


# Accumulation, precision, closures.


def test_gradients_accumulated_over_two_batches_are_the_mean_of_the_formulas() -> None:
    noted, module = Gradients(), module_of()
    fit(module, fixed_batches(4), steering(), noted, accumulate_grad_batches=2, max_epochs=1)
    assert len(noted.steps) == 2
    batches, by_hand = list(fixed_batches(4)), module_of()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    for step, found in enumerate(noted.steps):
        optimizer.zero_grad()
        torch.stack([formula_of(by_hand, batch) for batch in batches[2 * step : 2 * step + 2]]).mean().backward()
        for name, p in by_hand.named_parameters():
            torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-5)
        optimizer.step()


def test_in_bfloat16_the_added_terms_are_those_of_the_formula_in_float32() -> None:
    rows, module = Rows(), module_of()
    logged = figures(fit(module, fixed_batches(3), steering(), rows, precision="bf16-mixed", max_epochs=1))
    assert {x.dtype for calls in rows.calls for x in calls} == {torch.bfloat16}
    (r, z), totals = ([x.float() for x in calls] for calls in rows.calls), []
    for i in (0, 2, 4):
        parts = vicreg(z[i], z[i + 1]), information(torch.cat(r[i : i + 2]), torch.cat(z[i : i + 2]))
        totals.append([*parts, steered(contrastive(z[i], z[i + 1]), *r[i : i + 2], *z[i : i + 2])])
    for key, values in zip(("decorrelation", "information", "total"), zip(*totals, strict=True), strict=True):
        expected = float(torch.stack(values).mean())
        assert logged[f"loss/{key}"] == pytest.approx(expected, rel=1e-5, abs=2e-6), key
    full = figures(fit(module_of(), fixed_batches(3), steering(), max_epochs=1))
    for key in ("loss/total", "loss/native", "loss/decorrelation", "dynamics/ER_R", "dynamics/ER_Z"):
        assert logged[key] == pytest.approx(full[key], rel=0.03), key


def half_precision(scale: float) -> Any:
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    return MixedPrecision("16-mixed", device="cpu", scaler=scaler)


@pytest.mark.parametrize("kappa", [1.0, "match"])
def test_in_float16_the_gradients_are_unscaled_to_those_of_the_formula(kappa: Any) -> None:
    gradients, module, rows = Gradients(), module_of(), Rows()
    steer = steering(kappa=kappa)
    fit(module, fixed_batches(1), steer, gradients, rows, plugins=[half_precision(256.0)], max_epochs=1)
    assert {x.dtype for calls in rows.calls for x in calls} == {torch.float16}
    by_hand = module_of()
    [((view1, view2), _)] = fixed_batches(1)
    r1, r2 = by_hand.backbone(view1), by_hand.backbone(view2)
    z1, z2 = by_hand.projection_head(r1), by_hand.projection_head(r2)
    native, decorrelation = contrastive(z1, z2), vicreg(z1, z2)
    factor = 1.0
    if kappa == "match":
        norms = [
            torch.cat(torch.autograd.grad(part, (z1, z2), retain_graph=True)).norm()
            for part in (decorrelation, native)
        ]
        factor = float(norms[0] / norms[1])
        assert float(steer.objective.kappa) == pytest.approx(factor, rel=0.02)
    # The native loss keeps its size, so the added terms are divided by kappa.
    (steered(factor * native, r1, r2, z1, z2) / factor).backward()
    for name, p in by_hand.named_parameters():
        error = (gradients.steps[0][name] - p.grad).norm()
        assert float(error) < 0.02 * max(float(p.grad.norm()), 0.1), name


def test_a_float16_step_that_overflows_is_skipped_by_the_scaler_and_the_run_goes_on() -> None:
    module, plugin = module_of(), half_precision(2.0**40)
    logged = figures(fit(module, fixed_batches(3), steering(), plugins=[plugin], max_epochs=1))
    assert_same_weights(module, module_of())
    assert plugin.scaler.get_scale() == 2.0**37
    assert math.isfinite(logged["loss/total"])


def test_a_closure_that_is_called_several_times_a_batch_sees_the_formula_each_time() -> None:
    def lbfgs(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)

    rows, module, by_hand = Rows(), module_of(optimizer=lbfgs), module_of()
    logged = figures(fit(module, fixed_batches(2), steering(), rows, max_epochs=1))
    optimizer = lbfgs(by_hand.parameters())
    for batch in fixed_batches(2):

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            total = formula_of(by_hand, batch)
            total.backward()
            return total

        optimizer.step(closure)
    torch.testing.assert_close(module.state_dict(), by_hand.state_dict(), rtol=1e-3, atol=1e-4)
    assert rows.batches[0] > 2  # calls of the backbone so far, two a closure
    last = torch.cat([r for calls in rows.batches for r in rows.calls[0][calls - 2 : calls]])
    assert logged["dynamics/ER_R"] == pytest.approx(float(effective_rank(last)), rel=1e-4)
    assert logged["dynamics/log_n"] == pytest.approx(math.log(2 * IMAGES))


# Copies, and several callbacks on one module.


@pytest.mark.parametrize("what", ["measured", "steered"])
def test_a_copy_made_during_the_fit_is_not_tapped(what: str) -> None:
    class WithTeacher(lightning.pytorch.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            teacher = copy.deepcopy(pl_module.backbone).requires_grad_(False)
            self.whole = copy.deepcopy(pl_module.projection_head)
            object.__setattr__(pl_module, "teacher", teacher)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                self.whole(pl_module.teacher(torch.cat(batch[0])))

    expected = figures(fit(module_of(), fixed_batches(2), CALLBACKS[what]()))
    module, teacher = module_of(), WithTeacher()
    assert figures(fit(module, fixed_batches(2), CALLBACKS[what](), teacher)) == pytest.approx(expected)
    assert_untouched(module)
    assert pickle.loads(pickle.dumps(module.teacher))(torch.zeros(2, 64)).shape == (2, 12)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("second", ValueError, "the loss of SimCLR is steered by another AdaDim already"),
        (None, RuntimeError, "more than one stateful callback of type `AdaDim`"),  # Lightning's own
    ],
    ids=["two names", "one name"],
)
def test_two_that_steer_one_loss_are_an_error_that_leaves_nothing_behind(
    name: str | None, error: type[Exception], message: str
) -> None:
    module = module_of()
    with pytest.raises(error, match=message):
        fit(module, fixed_batches(2), steering(), steering(name=name))
    assert_untouched(module)
    assert_same_weights(module, module_of())
    assert figures(fit(module, fixed_batches(2), steering()))["balance/alpha"] == pytest.approx(ALPHA)


@pytest.mark.parametrize("names", [(), ("backbone", "projection_head")], ids=["discovered", "named"])
def test_a_monitor_of_the_same_sources_beside_adadim_logs_nothing_itself(names: tuple[str, ...]) -> None:
    def pair() -> list[Any]:
        other = ("backbone", "projection_head") if not names else ()
        steer = AdaDim(*other, native_loss="other", balance=Balance(ConstantSchedule(ALPHA)))
        return [DimensionMonitor(*names, window=32), steer]

    alone = figures(fit(module_of(), fixed_batches(3), pair()[1]))
    for order in (1, -1):
        silent, steer = pair()
        assert figures(fit(module_of(), fixed_batches(3), *[silent, steer][::order])) == alone
        assert silent.spectra == []
        assert len(steer.spectra) == 2


def test_one_callback_steers_one_fit_after_the_other() -> None:
    steer, rows, module = steering(), Rows(), module_of()
    fit(module, fixed_batches(2), steer)
    assert_untouched(module)
    logged = figures(fit(module, fixed_batches(2), steer, rows, max_epochs=1))
    native = [contrastive(*rows.calls[1][i : i + 2]).item() for i in (0, 2)]
    assert logged["loss/native"] == pytest.approx(sum(native) / 2, rel=1e-4)
    assert logged["loss_weighted/native"] == pytest.approx(ALPHA * sum(native) / 2, rel=1e-4)
    assert_untouched(module)
