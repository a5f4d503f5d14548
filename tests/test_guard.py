"""A run that meets a NaN or an infinity stops, names the step, and leaves good checkpoints."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from adadim_lightning import AdaDim, AdaDimLoss, AdaDimModule, NonFiniteError
from adadim_lightning.guard import FiniteGuard, Snapshot
from tests.helpers import assert_same_weights, backbone, fit, fixed_batches, head, held_out, tiny_module, trainer

BAD_STEP = 4


class Poisoned(nn.Module):
    """From its k-th training call on, one entry of the output is ``value``."""

    def __init__(self, inner: nn.Module, value: float, at: int = BAD_STEP) -> None:
        super().__init__()
        self.inner, self.value, self.at, self.calls = inner, value, at, 0

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x)
        if self.training:
            self.calls += 1
            if self.calls > self.at:
                output = output.clone()
                output[1, 2] = self.value
        return output


class NoNaN(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.nan_to_num(0.0, 0.0, 0.0)


def poisoned_module(where: str, value: float) -> AdaDimModule:
    torch.manual_seed(0)
    if where == "R":
        return tiny_module(backbone=Poisoned(backbone(), value))
    if where == "R, hidden from Z":
        return tiny_module(backbone=Poisoned(backbone(), value), projection_head=nn.Sequential(NoNaN(), head()))
    return tiny_module(projection_head=Poisoned(head(), value))


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def assert_checkpoints_are_good(folder: Path, last_step: int) -> dict:
    """All finite, and the newest is from right before the bad step; returns its weights."""
    steps = {}
    for path in folder.glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        steps[checkpoint["global_step"]] = checkpoint["state_dict"]
    for step, state in steps.items():
        assert all(bool(torch.isfinite(x).all()) for x in state.values()), f"checkpoint of step {step}"
    assert max(steps) == last_step
    return steps[last_step]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["R", "R, hidden from Z", "Z"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_bad_value_stops_the_run_at_its_step_and_the_last_checkpoint_is_from_before(
    where: str, value: float, alpha: float, tmp_path: Path
) -> None:
    module = poisoned_module(where, value)
    module.objective.set_balance(alpha)
    with pytest.raises(NonFiniteError, match=f"at step {BAD_STEP};") as error:
        fit(module, fixed_batches(8), every_step(tmp_path))
    assert error.value.step == BAD_STEP
    state = assert_checkpoints_are_good(tmp_path, last_step=BAD_STEP)
    module.load_state_dict(state)


def test_beside_a_callback_that_measures_it_is_the_same_error(tmp_path: Path) -> None:
    module = poisoned_module("Z", math.nan)
    with pytest.raises(NonFiniteError) as error:
        fit(module, fixed_batches(8), AdaDim(every_n_steps=1, window=1), every_step(tmp_path))
    assert error.value.step == BAD_STEP
    assert_checkpoints_are_good(tmp_path, last_step=BAD_STEP)


def test_a_bad_gradient_of_a_good_loss_reaches_no_checkpoint(tmp_path: Path) -> None:
    module = tiny_module()
    calls = []

    def spoil(gradient: Tensor) -> Tensor:
        calls.append(1)
        return gradient * math.nan if len(calls) == BAD_STEP + 1 else gradient

    module.backbone[1].weight.register_hook(spoil)
    with pytest.raises(NonFiniteError):
        fit(module, fixed_batches(8), every_step(tmp_path))
    assert_checkpoints_are_good(tmp_path, last_step=BAD_STEP)


def test_a_run_goes_on_from_the_last_checkpoint_before_the_bad_step(tmp_path: Path) -> None:
    module = poisoned_module("R", math.nan)
    with pytest.raises(NonFiniteError):
        fit(module, fixed_batches(8), every_step(tmp_path))
    healthy = tiny_module(backbone=Poisoned(backbone(), math.nan, at=1000))
    used = fit(healthy, fixed_batches(8), ckpt_path=tmp_path / f"step={BAD_STEP}.ckpt")
    assert used.global_step == 8
    assert all(bool(torch.isfinite(p).all()) for p in healthy.parameters())


def test_a_tripped_module_writes_no_checkpoint(tmp_path: Path) -> None:
    module = tiny_module()
    used = fit(module, fixed_batches(2), every_step(tmp_path / "good"))
    used.save_checkpoint(tmp_path / "before.ckpt")
    module.guard.watch(torch.tensor(math.nan), 7)
    with pytest.raises(NonFiniteError, match="at step 7;"):
        used.save_checkpoint(tmp_path / "after.ckpt")
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["before.ckpt"]


def test_validation_with_a_bad_value_in_evaluation_mode_does_not_trip_it() -> None:
    module = tiny_module()
    trainer().validate(module, held_out(), verbose=False)
    assert not bool(module.guard.tripped)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_guard_remembers_the_first_bad_step_alone(bad: float) -> None:
    guard = FiniteGuard()
    for step, loss in enumerate([1.0, 2.0, bad, 1.0, bad]):
        assert bool(guard.tripped) == (step > 2)
        guard.watch(torch.tensor(loss), step)
    with pytest.raises(NonFiniteError, match="at step 2;"):
        guard.check()


def test_the_guard_is_silent_over_good_losses_and_leaves_no_trace_in_the_state() -> None:
    guard = FiniteGuard()
    for step in range(5):
        guard.watch(torch.tensor(1e30), step)
    guard.check()
    assert guard.state_dict() == {}


# The way of other devices, which do not read the flag on each step, on the CPU.

OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "AdamW": partial(torch.optim.AdamW, lr=0.1),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def backward(module: AdaDimModule) -> None:
    (view1, view2), _ = next(iter(fixed_batches(1)))
    r1, r2 = module(view1), module(view2)
    module.objective(r1, r2, module.projection_head(r1), module.projection_head(r2)).total.backward()


@every_optimizer
@pytest.mark.parametrize("gradient", [1.0, math.nan])
def test_a_tripped_step_leaves_the_weights_bit_for_bit(make, gradient: float) -> None:
    module, untouched = (tiny_module(objective=AdaDimLoss(kappa=1)) for _ in range(2))
    optimizer = make(module.parameters())
    backward(module)
    for p in module.parameters():
        p.grad *= gradient
    module.guard.watch(torch.tensor(math.nan), 3)
    module._step_unless_tripped(optimizer.step)
    assert_same_weights(module, untouched)


@every_optimizer
def test_a_step_that_did_not_trip_is_an_ordinary_step(make) -> None:
    module, reference = tiny_module(), tiny_module()
    before = tiny_module()
    for model in (module, reference):
        optimizer = make(model.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            backward(model)
            if model is module:
                module._step_unless_tripped(optimizer.step)
            else:
                optimizer.step()
    assert_same_weights(module, reference)
    assert not torch.equal(module.backbone[1].weight, before.backbone[1].weight)


def test_a_step_whose_own_closure_trips_the_guard_is_undone() -> None:
    module, untouched = tiny_module(), tiny_module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def closure() -> Tensor:
        loss = sum(p.sum() for p in module.parameters()) * math.nan
        module.guard.watch(loss, 0)
        loss.backward()  # needs gradients to be enabled
        return loss

    module._step_unless_tripped(lambda: optimizer.step(closure))
    assert bool(module.guard.tripped)
    assert_same_weights(module, untouched)


@pytest.mark.parametrize("condition", [True, False])
def test_a_snapshot_restores_weights_of_every_kind_and_order(condition: bool) -> None:
    kinds = [
        torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(5, 7),
        torch.randn(7, 5).T,
        torch.randn(6, 9)[:, ::2],  # with gaps
        torch.randn(3, dtype=torch.float64),
        torch.tensor(2.5),
        torch.randn(0),
        torch.randn(6)[2:5],
    ]
    before = [x.clone() for x in kinds]
    snapshot = Snapshot(kinds)
    for x in kinds:
        x.fill_(math.nan)
    snapshot.restore_where(torch.tensor(condition))
    for x, old in zip(kinds, before, strict=True):
        assert torch.equal(x, old) if condition else bool(x.isnan().all())


def test_an_error_in_the_step_is_passed_on() -> None:
    module = tiny_module()

    def fail() -> None:
        raise KeyError("out of luck")

    with pytest.raises(KeyError, match="out of luck"):
        module._step_unless_tripped(fail)


def test_without_information_the_loss_still_reads_every_entry_of_r() -> None:
    r = torch.randn(2, 6, 4)
    z = torch.randn(2, 6, 4)
    loss = AdaDimLoss(alpha=0, gamma=0)
    assert math.isfinite(loss(*r, *z).total)
    for value in (math.nan, math.inf):
        r[1, 5, 3] = value
        assert not math.isfinite(loss(*r, *z).total)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_weights_freeze_at_the_bad_step_and_the_run_stops_when_it_logs(tmp_path: Path) -> None:
    module = poisoned_module("R", math.nan)
    with pytest.raises(NonFiniteError, match=f"at step {BAD_STEP};"):
        fit(module, fixed_batches(12), every_step(tmp_path), accelerator="gpu", devices=1, log_every_n_steps=10)
    assert_checkpoints_are_good(tmp_path, last_step=BAD_STEP)
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
