"""The steering callback in real fits, against what the test's own hooks recorded."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from adadim_lightning import (
    AdaDim,
    AdaDimLoss,
    Balance,
    ConstantSchedule,
    EffectiveRankSchedule,
    LinearSchedule,
    OnlineKNN,
    OnlineLinearProbe,
    Statistics,
)
from adadim_lightning.functional import effective_rank
from tests.helpers import DIM_Z, OneCallPerView, Recorder, every_epoch, fit, fixed_batches, held_out, tiny_module

ROWS = 32


def rank(x: Tensor, **how) -> float:
    return float(effective_rank(x, **how))


def paper() -> Balance:
    return Balance(EffectiveRankSchedule("dim", start=0.0), every_n_steps=None, window=1, views="first", ema=0.0)


@pytest.mark.parametrize("shared", [True, False], ids=["rows shared with the log", "rows of its own"])
def test_alpha_is_a_half_before_the_first_estimate_and_then_the_running_mean_of_the_rank(shared: bool) -> None:
    recorder = Recorder()
    balance = Balance(EffectiveRankSchedule(), every_n_steps=3, window=3 * ROWS, ema=0.5)
    steering = AdaDim(balance=balance, every_n_steps=3, window=(3 if shared else 1) * ROWS)
    assert steering.shares_rows == shared
    fit(tiny_module(), fixed_batches(12), steering, recorder)
    estimate, expected = None, [0.5] * 3
    for begin in (0, 3, 6):
        new = rank(recorder.rows(1, [begin, begin + 1, begin + 2]))
        estimate = new if estimate is None else 0.5 * estimate + 0.5 * new
        expected += [estimate / DIM_Z] * 3
    assert recorder.alphas == pytest.approx(expected, rel=1e-4)
    assert recorder.betas == pytest.approx(expected, rel=1e-4)  # gamma is 1
    assert recorder.logged[0]["balance/alpha"] == pytest.approx(expected[-1], rel=1e-4)
    assert recorder.logged[0]["balance/beta"] == pytest.approx(expected[-1], rel=1e-4)


def test_only_the_window_before_a_reading_enters_alpha() -> None:
    recorder = Recorder()
    balance = Balance(EffectiveRankSchedule(), every_n_steps=5, window=2 * ROWS, ema=0.0)
    fit(tiny_module(), fixed_batches(15), AdaDim(balance=balance, every_n_steps=5, window=2 * ROWS), recorder)
    first, second = rank(recorder.rows(1, [3, 4])), rank(recorder.rows(1, [8, 9]))
    assert recorder.alphas[:5] == [0.5] * 5
    assert recorder.alphas[5:] == pytest.approx([first / DIM_Z] * 5 + [second / DIM_Z] * 5, rel=1e-4)


def test_with_fewer_rows_than_dimensions_the_rows_normalize() -> None:
    recorder = Recorder()
    balance = Balance(EffectiveRankSchedule(), every_n_steps=1, window=1, ema=0.0)
    fit(tiny_module(), fixed_batches(3, batch_size=2), AdaDim(balance=balance), recorder)
    expected = [rank(z) / 4 for _, z in recorder.steps]
    assert recorder.alphas == pytest.approx([0.5, *expected[:2]], rel=1e-4)


@pytest.mark.parametrize("how", [{"spectrum": "eigen"}, {"center": True}], ids=str)
def test_spectrum_and_center_of_the_balance_are_its_own(how: dict) -> None:
    recorder = Recorder()
    balance = Balance(EffectiveRankSchedule(), every_n_steps=2, window=2 * ROWS, **how)
    fit(tiny_module(), fixed_batches(4), AdaDim(balance=balance), recorder)
    rows = recorder.rows(1, [0, 1])
    assert recorder.alphas[2:] == pytest.approx([rank(rows, **how) / DIM_Z] * 2, rel=1e-4)
    every = recorder.rows(1, [0, 1, 2, 3])
    assert recorder.logged[0]["dynamics/ER_Z"] == pytest.approx(rank(every), rel=1e-4)


def test_the_papers_form_reads_the_first_view_of_the_last_batch_of_each_epoch() -> None:
    recorder = Recorder()
    fit(tiny_module(), fixed_batches(3), AdaDim(balance=paper()), recorder, max_epochs=3)
    expected = [0.0] * 3
    for epoch in (0, 1):
        _, z = recorder.epochs[epoch][-1]
        expected += [rank(z[:16]) / DIM_Z] * 3
    assert recorder.alphas == pytest.approx(expected, rel=1e-4)
    assert expected[3] != pytest.approx(rank(recorder.epochs[0][-1][1]) / DIM_Z, rel=1e-3)


def test_the_first_view_is_the_first_call_where_each_view_has_its_own() -> None:
    recorder = Recorder("encoder", "projector")
    steering = AdaDim("encoder", "projector", balance=paper())
    fit(OneCallPerView(AdaDimLoss()), fixed_batches(2), steering, recorder, max_epochs=2)
    _, z = recorder.epochs[0][-1]
    assert recorder.alphas[2:] == pytest.approx([rank(z[:16]) / DIM_Z] * 2, rel=1e-4)


def test_a_linear_schedule_follows_the_progress_of_the_steps() -> None:
    recorder = Recorder()
    fit(tiny_module(), fixed_batches(4), AdaDim(balance=Balance(LinearSchedule())), recorder, max_epochs=3)
    assert recorder.alphas == pytest.approx([step / 12 for step in range(12)])
    assert [logged["balance/alpha"] for logged in recorder.logged] == pytest.approx([3 / 12, 7 / 12, 11 / 12])


def test_progress_counts_optimizer_steps_when_gradients_are_accumulated() -> None:
    recorder = Recorder()
    steering = AdaDim(balance=Balance(LinearSchedule()))
    fit(tiny_module(), fixed_batches(4), steering, recorder, accumulate_grad_batches=2, max_epochs=2)
    assert recorder.alphas == pytest.approx([0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75])


def test_a_constant_leaves_alpha_and_beta_where_they_are() -> None:
    recorder = Recorder()
    steering = AdaDim(balance=Balance(ConstantSchedule(0.7), ConstantSchedule(0.2)))
    fit(tiny_module(objective=AdaDimLoss(gamma=0.3)), fixed_batches(3), steering, recorder, max_epochs=2)
    assert recorder.alphas == pytest.approx([0.7] * 6)
    assert recorder.betas == pytest.approx([0.3 * 0.2] * 6)


def test_a_schedule_is_handed_what_was_measured() -> None:
    seen: list[Statistics | None] = []

    def schedule(progress: float, statistics: Statistics | None) -> float:
        seen.append(statistics)
        return 0.5

    recorder = Recorder()
    balance = Balance(schedule, every_n_steps=2, window=2 * ROWS)
    fit(tiny_module(), fixed_batches(3), AdaDim(balance=balance), recorder)
    assert seen[:2] == [None, None]
    measured = seen[2]
    assert measured is not None
    assert (measured.rows, measured.dim_r, measured.dim_z) == (2 * ROWS, 12, DIM_Z)
    assert measured.er_z == pytest.approx(rank(recorder.rows(1, [0, 1])), rel=1e-4)
    assert measured.er_r == pytest.approx(rank(recorder.rows(0, [0, 1])), rel=1e-4)


def test_a_schedule_over_the_training_without_a_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="LinearSchedule needs the length of the training"):
        fit(tiny_module(), fixed_batches(2), AdaDim(balance=Balance(LinearSchedule())), max_epochs=-1)


def test_a_module_without_an_objective_or_with_two_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"steers one AdaDimLoss, but OneCallPerView has 0.*DimensionMonitor"):
        fit(OneCallPerView(), fixed_batches(1), AdaDim("encoder", "projector"))
    module = tiny_module()
    module.second = AdaDimLoss()
    with pytest.raises(ValueError, match="but AdaDimModule has 2"):
        fit(module, fixed_batches(1), AdaDim())


BALANCES = {
    "rows shared": (lambda: Balance(EffectiveRankSchedule(), every_n_steps=3, window=2 * ROWS), True),
    "rows of its own": (lambda: Balance(EffectiveRankSchedule(), every_n_steps=4, window=3 * ROWS), False),
    "paper": (paper, False),
    "lagged": (
        lambda: Balance(EffectiveRankSchedule(), every_n_steps=3, window=2 * ROWS, lag_epochs=1),
        True,
    ),
    "linear": (lambda: Balance(LinearSchedule()), False),
}


@pytest.mark.parametrize(("make", "shared"), BALANCES.values(), ids=BALANCES.keys())
def test_a_resumed_run_moves_alpha_as_the_uninterrupted_run_does(make, shared: bool, tmp_path) -> None:
    def steering() -> AdaDim:
        return AdaDim(balance=make(), every_n_steps=3, window=2 * ROWS)

    assert steering().shares_rows == shared
    whole, module = Recorder(), tiny_module()
    fit(module, fixed_batches(5), steering(), whole, every_epoch(tmp_path), max_epochs=4)
    resumed, again = Recorder(), tiny_module()
    fit(
        again,
        fixed_batches(5),
        steering(),
        resumed,
        every_epoch(tmp_path / "again"),
        max_epochs=4,
        ckpt_path=tmp_path / "1.ckpt",
    )
    assert len(set(whole.alphas)) > 3
    assert resumed.alphas == pytest.approx(whole.alphas[10:], rel=1e-5)
    assert resumed.betas == pytest.approx(whole.betas[10:], rel=1e-5)
    for ours, theirs in zip(resumed.logged, whole.logged[2:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    torch.testing.assert_close(again.state_dict(), module.state_dict(), rtol=1e-4, atol=1e-5)


def test_the_papers_form_ends_within_an_epoch_without_an_error() -> None:
    recorder = Recorder()
    fit(tiny_module(), fixed_batches(5), AdaDim(balance=paper()), recorder, max_epochs=-1, max_steps=3)
    assert recorder.alphas == [0.0] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_a_gpu_resumes_with_its_window_and_its_probes(tmp_path) -> None:
    def callbacks(folder):
        steering = AdaDim(balance=Balance(EffectiveRankSchedule(), every_n_steps=3, window=4 * ROWS))
        return [steering, OnlineLinearProbe(num_classes=10), OnlineKNN(k=5), every_epoch(folder)]

    data, whole, resumed = (fixed_batches(5), held_out()), Recorder(), Recorder()
    gpu = {"accelerator": "gpu", "devices": 1, "max_epochs": 4}
    fit(tiny_module(), data, *callbacks(tmp_path), whole, **gpu)
    path = tmp_path / "1.ckpt"
    fit(tiny_module(), data, *callbacks(tmp_path / "again"), resumed, **gpu, ckpt_path=path)
    assert resumed.alphas == pytest.approx(whole.alphas[10:], rel=1e-3)


class Repeated(torch.optim.SGD):
    """Runs each step three times at the same weights, as a line search that does not move: as SGD does once."""

    def step(self, closure: Any = None) -> Any:
        for _ in range(2):
            with torch.enable_grad():
                closure()
        return super().step(closure)


class Foreign(OneCallPerView):
    """Has the loss and the optimizer that it is given."""

    def __init__(self, optimizer: Any, loss: AdaDimLoss | None = None) -> None:
        super().__init__(loss)
        self.optimizer = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=1e-2)


def measured(kind: str, optimizer: Any) -> list[Tensor]:
    """State of what matches gradients after two fits, and the weights."""
    steering = AdaDim() if kind in ("module", "own loss") else AdaDim(native_loss=kind)  # type: ignore[arg-type]
    if kind == "module":
        module: Any = tiny_module(optimizer=partial(optimizer, lr=1e-2))
    else:
        module = Foreign(optimizer, AdaDimLoss() if kind == "own loss" else None)
    for _ in range(2):
        fit(module, fixed_batches(11), steering)
    losses = [x for x in module.modules() if isinstance(x, AdaDimLoss)] or [steering.objective]
    states = [*losses, steering.native_scale, module]
    return [value for state in states for value in state.state_dict().values()]


@pytest.mark.parametrize("kind", ["module", "own loss", "other", "sample_contrastive", "dimension_contrastive"])
def test_kappa_of_a_step_that_is_run_several_times_is_that_of_one_run_once(kind: str) -> None:
    once, often = (measured(kind, optimizer) for optimizer in (torch.optim.SGD, Repeated))
    assert all(torch.equal(a, b) for a, b in zip(once, often, strict=True))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, Repeated])
def test_kappa_counts_each_of_the_accumulated_batches_once(optimizer: Any) -> None:
    steering = AdaDim(native_loss="other")
    fit(Foreign(optimizer), fixed_batches(6), steering, accumulate_grad_batches=2)
    assert [int(x.calls) for x in (steering.objective, steering.native_scale)] == [6, 6]


@pytest.mark.parametrize("kind", ["module", "own loss", "other"])
def test_objective_counts_each_call_again_after_a_fit(kind: str) -> None:
    steering = AdaDim(native_loss="other") if kind == "other" else AdaDim()
    module: Any = tiny_module() if kind == "module" else Foreign(torch.optim.SGD, AdaDimLoss())
    module = OneCallPerView() if kind == "other" else module
    fit(module, fixed_batches(3), steering)
    objective = next((x for x in module.modules() if isinstance(x, AdaDimLoss)), steering.objective)
    assert int(objective.calls) == 3
    for _ in range(2):
        objective(*torch.randn(2, 4, 6, requires_grad=True), *torch.randn(2, 4, 5, requires_grad=True))
    assert int(objective.calls) == 5
