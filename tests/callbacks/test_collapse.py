"""Trainings that collapse or diverge are warned of, stopped, or taken back; those that are well are left alone."""

import csv
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, distributed, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from adadim_lightning import (
    AdaDim,
    AdaDimLoss,
    AdaDimModule,
    Balance,
    CollapseError,
    CollapseGuard,
    ConstantSchedule,
    DimensionMonitor,
    EffectiveRankSchedule,
    NonFiniteError,
    OnlineKNN,
)
from adadim_lightning.callbacks import RunCheckpoints
from adadim_lightning.cli.metrics_log import METRICS
from adadim_lightning.functional import effective_rank, matrix_mutual_information
from adadim_lightning.optim import lower_learning_rate
from tests.helpers import (
    OneCallPerView,
    Recorder,
    assert_same_weights,
    fit,
    fixed_batches,
    held_out,
    tiny_module,
)
from tests.integration.modules import BYOL, BarlowTwins, SimCLR, SimSiam, VICReg
from tests.metrics.conftest import two_processes  # noqa: F401
from tests.metrics.distributed import Processes
from tests.test_distributed import ddp_trainer

READ_EVERY = 5


def steered(alpha: float | None = None, **options: Any) -> AdaDim:
    """Readings of 512 rows each 5 steps; alpha fixed or led by the rank."""
    schedule = EffectiveRankSchedule() if alpha is None else ConstantSchedule(alpha)
    balance = options.pop("balance", None) or Balance(schedule, every_n_steps=READ_EVERY, window=512)
    return AdaDim("backbone", "projection_head", balance=balance, every_n_steps=READ_EVERY, window=512, **options)


def digits_module(*, alpha: float = 0.0, gamma: float = 0.1, lr: float = 3e-3, **options: Any) -> AdaDimModule:
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(128), nn.BatchNorm1d(128)]
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), norms[0], nn.ReLU(), nn.Linear(128, 64))
    head = nn.Sequential(nn.Linear(64, 128), norms[1], nn.ReLU(), nn.Linear(128, 64))
    optimizer = partial(torch.optim.AdamW, lr=lr)
    objective = AdaDimLoss(alpha=alpha, gamma=gamma, kappa=1, information_floor=None)
    return AdaDimModule(backbone, head, objective, optimizer, **options)


def at_hand(batches: int, batch_size: int) -> DataLoader[Any]:
    """Put together beforehand."""
    return DataLoader(list(fixed_batches(batches, batch_size)), batch_size=None)  # type: ignore[arg-type]


def kinds(guard: CollapseGuard) -> list[tuple[str, str]]:
    return [(event["kind"], event["action"]) for event in guard.events]


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.stem.split("step=")[1]) for path in folder.glob("epoch=*.ckpt"))


class AtEachStep(Callback):
    """Calls a function after each step."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.call(trainer, pl_module)


# What it reads.


def test_a_reading_is_the_rank_of_the_window_and_the_mean_information_since_the_one_before() -> None:
    monitor, recorder, readings = DimensionMonitor("backbone", "projection_head", every_n_steps=3), Recorder(), []
    note = AtEachStep(lambda *_: readings.append(monitor.last_reading))
    fit(tiny_module(), fixed_batches(7), monitor, recorder, note, max_epochs=2)
    assert readings[:2] == [None, None]
    assert [reading.step for reading in readings[2:]] == [3, 3, 3, 6, 6, 7, 9, 9, 9, 12, 12, 12]
    assert monitor.last_reading.step == 14
    for step, begin in ((3, 0), (6, 3), (9, 7), (12, 9)):  # the end of the epoch is a reading too
        reading = readings[step - 1]
        for rank, which in ((reading.er_r, 0), (reading.er_z, 1)):
            assert rank == pytest.approx(float(effective_rank(recorder.rows(which, [*range(step)]))), rel=1e-6)
        information = [matrix_mutual_information(*recorder.steps[i]) for i in range(begin, step)]
        assert reading.i_rz == pytest.approx(float(torch.stack(information).mean()), rel=1e-4)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("batch_size", [2, 16], ids=["fewer rows than dimensions", "more"])
def test_a_reading_has_size_and_spread_of_the_last_rows_of_z(center: bool, batch_size: int) -> None:
    recorder = Recorder()
    monitor = DimensionMonitor("backbone", "projection_head", every_n_steps=1, window=4, center=center)
    fit(tiny_module(), fixed_batches(3, batch_size), monitor, recorder)
    for (size, spread), step in (
        ((monitor.last_reading.size_z, monitor.last_reading.spread_z), 2),
        (monitor.first_z, 0),
    ):
        z = recorder.rows(1, [step]).double()
        assert size == pytest.approx(float(z.square().mean().sqrt()), rel=1e-6)
        assert spread == pytest.approx(float((z - z.mean(dim=0)).square().mean().sqrt()), rel=1e-6)


# Trainings that are well.


@pytest.mark.parametrize("alpha", [None, 0.0, 1.0], ids=["adadim", "vicreg", "simclr"])
def test_a_good_training_has_no_event(alpha: float | None) -> None:
    guard = CollapseGuard("stop", patience=2)
    gamma = 0.1 if alpha is None else 0.0
    module = digits_module(alpha=alpha or 0.0, gamma=gamma)
    fit(module, at_hand(10, 128), steered(alpha), guard, max_epochs=5)
    assert guard.events == []
    assert not guard.suspects()


# Collapse.


def fit_with_large_gamma(guard: CollapseGuard, *callbacks: Callback, **options: Any) -> None:
    """Sends I(R;Z) below -0.2 nats within 60 steps, and ER(R) from 20 to 10."""
    module = digits_module(alpha=1.0, gamma=10.0, lr=1e-2)
    fit(module, at_hand(10, 128), steered(1.0), guard, *callbacks, **options)


def test_a_large_gamma_that_takes_i_rz_below_zero_and_er_r_down_is_told_once(tmp_path: Path) -> None:
    guard, log = CollapseGuard(patience=3), CSVLogger(tmp_path, name="", version="")
    with pytest.warns(
        UserWarning, match=r"ER\(R\) fell from .*I\(R;Z\) to -.*nats at 3 readings.*lower gamma"
    ) as seen:
        fit_with_large_gamma(guard, max_epochs=9, logger=log)
    assert kinds(guard) == [("information", "warn")]
    assert [str(w.message) for w in seen if "ER(R)" in str(w.message)] == [guard.events[0]["message"]]
    assert set(guard.events[0]) == {"step", "epoch", "kind", "message", "action"}
    rows = (tmp_path / METRICS).read_text().splitlines()
    column = rows[0].split(",").index("guard/events")
    assert [row.split(",")[column] for row in rows[1:] if row.split(",")[column]] == ["1.0"]


def collapsing_z(lr: float = 0.3) -> AdaDimModule:
    """Without norms and with a learning rate this high, all Z is one point for the first 60 steps."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    head = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9)
    objective = AdaDimLoss(alpha=1.0, gamma=3.0, kappa=1, information_floor=None)
    return AdaDimModule(backbone, head, objective, optimizer)


def test_an_embedding_that_recovers_and_collapses_again_is_told_of_twice() -> None:
    guard, module, batches = CollapseGuard(patience=3), collapsing_z(), at_hand(20, 64)
    with pytest.warns(UserWarning, match=r"ER\(Z\) = 1\.\d\d at 3 readings in a row") as seen:
        fit(module, batches, steered(1.0), guard, max_epochs=-1, max_steps=74)  # later it depends on rounding
    assert kinds(guard) == [("rank_z", "warn")]
    assert not guard._watches[steered().state_key].told  # it recovered
    nn.init.zeros_(module.projection_head[-1].weight)
    module._optimizer = partial(torch.optim.SGD, lr=0.0)
    with pytest.warns(UserWarning, match=r"ER\(Z\) = 1\.00") as seen:
        fit(module, batches, steered(1.0), guard, max_epochs=3)
    assert kinds(guard) == [("rank_z", "warn")] * 2
    assert len([w for w in seen if "ER(Z)" in str(w.message)]) == 1


def vicreg_without(*terms: str, lr: float = 3e-3) -> AdaDimModule:
    module = digits_module(lr=lr, gamma=0.0)
    module.objective = AdaDimLoss(alpha=0, gamma=0, kappa=1, **{f"{term}_weight": 0.0 for term in terms})
    return module


@pytest.mark.parametrize("terms", [("variance",), ("variance", "covariance")], ids="+".join)
def test_a_z_that_shrinks_to_a_point_is_stopped_though_its_rank_is_high(terms: tuple[str, ...]) -> None:
    guard, monitor = CollapseGuard("stop", patience=3), steered(0.0)
    with pytest.raises(CollapseError, match=r"spread of Z fell from 0\.\d+ to 0\.0\d+ at 3 .*variance_weight"):
        fit(vicreg_without(*terms), at_hand(10, 128), monitor, guard, max_epochs=30)
    assert kinds(guard) == [("scale", "stop")]
    assert monitor.last_reading.er_z > 5


def test_a_z_that_shrinks_to_a_point_is_rolled_back(tmp_path: Path) -> None:
    guard = CollapseGuard("rollback", patience=2)
    checkpoints = RunCheckpoints(tmp_path, every_n_steps=5)
    with pytest.warns(UserWarning, match="the spread of Z fell .* went back to"):
        fit(vicreg_without("variance"), at_hand(10, 128), steered(0.0), guard, checkpoints, max_epochs=10)
    assert kinds(guard)[0] == ("scale", "rollback")


def test_all_terms_but_the_variance_may_be_left_out() -> None:
    guard = CollapseGuard("stop", patience=1)
    fit(vicreg_without("invariance", "covariance"), at_hand(10, 128), steered(0.0), guard, max_epochs=5)
    assert guard.events == []


class Moved(nn.Module):
    """Rows of spread 1 around 0, times a factor, plus a common offset; both by the step, the last ones stay."""

    def __init__(self, factors: list[float], offsets: list[float]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(64, affine=False)
        self.factors, self.offsets, self.calls = factors, offsets, 0

    def forward(self, x: Tensor) -> Tensor:
        factor, offset = (x[min(self.calls, len(x) - 1)] for x in (self.factors, self.offsets))
        self.calls += 1
        output: Tensor = self.norm(x) * factor + offset
        return output


@pytest.mark.parametrize(
    ("factors", "offsets", "kind"),
    [
        ([1, 0.049], [0], "scale"),
        ([1, 0.051], [0], None),
        ([0.02, 0.00098], [0], "scale"),  # a Z of another scale, such as one of unit length in many dimensions
        ([0.02, 0.00102], [0], None),
        ([50, 1, 0.9], [0], None),  # untrained, it was far too large
        ([50, 1, 0.04], [0], "scale"),
        ([1], [0, 3.1], "direction"),  # the cosine is 0.906
        ([1], [0, 2.9], None),  # 0.894
        ([1], [3.1], None),  # it began so
        ([1, 0.04], [0, 1], "scale"),  # the cosine is 0.998, and rank_z does not see it either
    ],
)
def test_scale_and_direction_are_told_from_their_limits_on(
    factors: list[float], offsets: list[float], kind: str | None
) -> None:
    module = digits_module(gamma=0.0, lr=0.0)
    module.projection_head = nn.Sequential(module.projection_head, Moved(factors, offsets))
    monitor = DimensionMonitor("backbone", "projection_head", every_n_steps=1, window=1)
    guard = CollapseGuard("warn", patience=3)
    with pytest.warns(UserWarning, match="3 readings in a row") if kind else nullcontext():
        fit(module, at_hand(8, 64), monitor, guard)
    assert kinds(guard)[:1] == ([(kind, "warn")] if kind else [])
    assert {"rank_r", "rank_z"}.isdisjoint(dict(kinds(guard)))


@pytest.mark.parametrize("policy", ["warn", "stop"])
def test_a_constant_z_is_told_once_by_its_rank(policy: Literal["warn", "stop"]) -> None:
    module, guard = digits_module(gamma=0.0, lr=0.0), CollapseGuard(policy, patience=3)
    module.projection_head = nn.Sequential(module.projection_head, Moved([1, 1e-9], [0, 1]))
    monitor = DimensionMonitor("backbone", "projection_head", every_n_steps=1, window=1)
    told = pytest.warns(UserWarning, match="ER") if policy == "warn" else pytest.raises(CollapseError, match="ER")
    with told:
        fit(module, at_hand(8, 64), monitor, guard)
    assert kinds(guard) == [("rank_z", policy)]
    assert guard.suspects() == (policy == "stop")


def test_what_z_was_before_a_resume_counts_and_an_older_checkpoint_need_not_tell(tmp_path: Path) -> None:
    monitor = DimensionMonitor("backbone", "projection_head", every_n_steps=1, window=1)
    path = tmp_path / "a.ckpt"

    def told(factor: float, **options: Any) -> list[tuple[str, str]]:
        module, guard = digits_module(gamma=0.0, lr=0.0), CollapseGuard("warn", patience=3)
        module.projection_head = nn.Sequential(module.projection_head, Moved([factor], [0]))
        keeps = ModelCheckpoint(tmp_path, filename="a")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(module, at_hand(4, 64), monitor, guard, *([] if options else [keeps]), **options)
        return kinds(guard)

    assert told(1.0) == []
    assert told(0.04, max_epochs=2, ckpt_path=path) == [("scale", "warn")]
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["callbacks"][monitor.state_key]["first_z"]
    watch = checkpoint["callbacks"][CollapseGuard().state_key]["watches"][monitor.state_key]
    del watch["spread"], watch["cosine"]
    torch.save(checkpoint, path)
    assert told(0.04, max_epochs=2, ckpt_path=path) == []


@pytest.mark.parametrize("kind", [SimCLR, BYOL, SimSiam, BarlowTwins, VICReg])
def test_a_foreign_module_that_is_well_has_no_event(kind: type[LightningModule]) -> None:
    torch.manual_seed(0)
    guard = CollapseGuard("stop", patience=1)
    monitor = DimensionMonitor("backbone", "projection_head", every_n_steps=READ_EVERY, window=512)
    batches = [([x.repeat(1, 3, 2, 2) for x in views], labels, []) for views, labels in fixed_batches(10, 128)]
    fit(kind(), DataLoader(batches, batch_size=None), monitor, guard, max_epochs=3)  # type: ignore[arg-type]
    assert guard.events == []
    assert monitor.last_reading.spread_z > 0.4 * monitor.first_z[1]


def test_a_stopped_run_names_the_last_good_checkpoint_and_writes_none_once_it_suspects(tmp_path: Path) -> None:
    guard, suspected = CollapseGuard("stop", patience=4), []
    note = AtEachStep(lambda trainer, _: suspected.append(trainer.global_step) if guard.suspects() else None)
    with pytest.raises(CollapseError, match=r"lower gamma.*the last good checkpoint is .*\.ckpt$") as error:
        fit_with_large_gamma(guard, note, RunCheckpoints(tmp_path, every_n_steps=1, keep=1000), max_epochs=20)
    assert kinds(guard) == [("information", "stop")]
    assert guard.events[0]["message"] == str(error.value)
    last = steps_in(tmp_path)[-1]
    assert f"step={last:06d}.ckpt" in str(error.value)
    # Bad at 4 readings in a row: 3 times 5 steps of suspicion, and the step that ended the run.
    assert last == suspected[0] - 1
    assert guard.events[0]["step"] - suspected[0] == 3 * READ_EVERY


# Rolling back.


class Poisoned(nn.Module):
    """In its k-th training calls the output holds a NaN."""

    def __init__(self, inner: nn.Module, *calls: int) -> None:
        super().__init__()
        self.inner, self.bad, self.calls = inner, calls, 0

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x)
        self.calls += self.training
        return output * torch.nan if self.training and self.calls in self.bad else output


def decay(optimizer: Any, steps: int) -> lr_scheduler.LRScheduler:
    return lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)


def poisoned(*calls: int) -> AdaDimModule:
    sgd = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
    module = tiny_module(optimizer=sgd, lr_schedule=decay)
    module.projection_head = Poisoned(module.projection_head, *calls)
    return module


def rolled_back(module: LightningModule, folder: Path, *callbacks: Callback, **options: Any) -> dict[str, Any]:
    """Fit, and what the weights, the optimizer and the rates were right after each step."""
    found: dict[str, Any] = {"weights": [], "optimizer": [], "rates": []}

    def note(trainer: Trainer, module: LightningModule) -> None:
        found["weights"].append({key: x.clone() for key, x in module.state_dict().items()})
        state = trainer.optimizers[0].state_dict()
        found["optimizer"].append({k: {n: x.clone() for n, x in v.items()} for k, v in state["state"].items()})
        found["rates"].append(state["param_groups"][0]["lr"])

    options = {"max_epochs": 2} | options
    checkpoints = RunCheckpoints(folder, every_n_steps=2, keep=1000)
    found["trainer"] = fit(module, fixed_batches(10), *callbacks, AtEachStep(note), checkpoints, **options)
    return found


def test_a_rollback_brings_the_checkpoint_back_to_the_bit_and_goes_on_with_a_lower_rate(tmp_path: Path) -> None:
    module, guard = poisoned(8), CollapseGuard("rollback", lr_factor=0.25)
    monitor = AdaDim(every_n_steps=1, window=64)
    windows: list[Any] = []
    look = AtEachStep(lambda *_: windows.append(monitor.recent_z.state_dict()))
    with pytest.warns(UserWarning, match=r"at step 7; went back to .*step=000006\.ckpt, with 0\.25 times"):
        found = rolled_back(module, tmp_path, monitor, guard, look)
    assert kinds(guard) == [("non_finite", "rollback")]
    saved = torch.load(tmp_path / "epoch=0000-step=000006.ckpt", weights_only=True)
    for key, value in saved["state_dict"].items():
        assert torch.equal(found["weights"][7][key], value), key
    for key, state in saved["optimizer_states"][0]["state"].items():
        assert torch.equal(found["optimizer"][7][key]["momentum_buffer"], state["momentum_buffer"])
    held = saved["callbacks"][monitor.state_key]["recent_z"]
    torch.testing.assert_close(windows[7], held, rtol=0, atol=0)
    # The schedule goes on with the steps: after the n-th the rate is 1 - n / 20 of what it was, now of a quarter.
    factors = [1.0] * 7 + [0.25] * 13
    rates = [0.02 * factor * (1 - (n + 1) / 20) for n, factor in enumerate(factors)]
    rates[7] = 0.02 * 0.25 * (1 - 8 / 20)
    assert found["rates"][:7] == pytest.approx(rates[:7])
    assert found["rates"][8:] == pytest.approx(rates[8:])
    assert found["trainer"].global_step == 20
    assert not torch.equal(found["weights"][8]["backbone.1.weight"], found["weights"][7]["backbone.1.weight"])
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


def test_the_means_of_the_epoch_leave_out_the_bad_step(tmp_path: Path) -> None:
    logged = Recorder()
    with pytest.warns(UserWarning, match="went back"):
        rolled_back(poisoned(8), tmp_path, AdaDim(every_n_steps=5), CollapseGuard("rollback"), logged)
    assert all(abs(epoch["loss/total"]) < 1e4 for epoch in logged.logged)  # no NaN is


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_second_time_the_run_stops(accumulated: int, tmp_path: Path) -> None:
    guard, module = CollapseGuard("rollback"), poisoned(8, 13)
    with pytest.warns(UserWarning, match="went back"), pytest.raises(NonFiniteError) as error:
        rolled_back(module, tmp_path, AdaDim(every_n_steps=5), guard, accumulate_grad_batches=accumulated)
    assert kinds(guard) == [("non_finite", "rollback"), ("non_finite", "stop")]
    last = steps_in(tmp_path)[-1]
    assert f"rolled back once already; the last good checkpoint is {tmp_path}" in str(error.value)
    assert str(error.value).endswith(f"step={last:06d}.ckpt")
    fit(tiny_module(), fixed_batches(1))  # a guard that is gone leaves nothing behind
    assert module.guard.raises


def test_a_rollback_passes_over_files_of_weights_alone_and_marks_bad_ones(tmp_path: Path) -> None:
    weights = ModelCheckpoint(tmp_path / "weights", every_n_train_steps=1, save_top_k=-1, save_weights_only=True)
    with pytest.warns(UserWarning, match=r"went back to .*run/epoch=0000-step=000006\.ckpt"):
        rolled_back(poisoned(8), tmp_path / "run", AdaDim(every_n_steps=5), CollapseGuard("rollback"), weights)


def test_an_event_has_the_step_of_its_row_in_the_log(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path), "", "")
    options = {"logger": logger, "log_every_n_steps": 1}
    with pytest.warns(UserWarning, match="went back"):
        rolled_back(poisoned(8), tmp_path / "run", AdaDim(every_n_steps=5), CollapseGuard("rollback"), **options)
    with (tmp_path / METRICS).open() as file:
        rows = [row for row in csv.DictReader(file) if row["guard/events"]]
    assert [(row["step"], row["guard/events"]) for row in rows] == [("7", "1.0")]  # counted from 0


def test_a_rollback_needs_a_checkpoint(tmp_path: Path) -> None:
    guard = CollapseGuard("rollback")
    with pytest.raises(NonFiniteError, match="there is no good checkpoint yet"):
        rolled_back(poisoned(2), tmp_path, AdaDim(every_n_steps=5), guard)
    assert kinds(guard) == [("non_finite", "stop")]


def test_a_learning_rate_that_blows_up_is_mended_by_a_lower_one(tmp_path: Path) -> None:
    def jump(optimizer: Any, steps: int) -> lr_scheduler.LRScheduler:
        return lr_scheduler.LambdaLR(optimizer, lambda step: 1e9 if step >= 6 else 1.0)

    def module() -> AdaDimModule:
        return tiny_module(optimizer=partial(torch.optim.SGD, lr=0.02), lr_schedule=jump)

    with pytest.raises(NonFiniteError):
        rolled_back(module(), tmp_path / "stop", AdaDim(every_n_steps=5), CollapseGuard("stop"))
    guard = CollapseGuard("rollback", lr_factor=1e-10)
    with pytest.warns(UserWarning, match="went back"):
        found = rolled_back(module(), tmp_path / "rollback", AdaDim(every_n_steps=5), guard)
    assert found["trainer"].global_step == 20
    assert found["rates"][-1] == pytest.approx(0.002)


def test_a_collapse_is_rolled_back_too_and_ends_the_run_when_it_comes_again(tmp_path: Path) -> None:
    guard = CollapseGuard("rollback", patience=2, lr_factor=1.0)
    with (
        pytest.warns(UserWarning, match="went back"),
        pytest.raises(CollapseError, match="rolled back once already"),
    ):
        fit_with_large_gamma(guard, RunCheckpoints(tmp_path, every_n_steps=5), max_epochs=20)
    assert kinds(guard) == [("information", "rollback"), ("information", "stop")]
    steps = [event["step"] for event in guard.events]
    assert steps[1] > steps[0]  # time goes on


@pytest.mark.parametrize("name", ["lambda", "cosine", "one_cycle", "sequential", "step"])
def test_a_lowered_rate_stays_so_whatever_schedule_sets_it(name: str) -> None:
    schedules: dict[str, Any] = {
        "lambda": lambda o: decay(o, 20),
        "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
        "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
        "sequential": lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 5), lr_scheduler.CosineAnnealingLR(o, 15)], [5]
        ),
        "step": lambda o: lr_scheduler.StepLR(o, 4, 0.5),
    }

    class Scheduled(OneCallPerView):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [{"scheduler": schedules[name](optimizer), "interval": "step"}]

    def rates(lowered_after: int) -> list[float]:
        found = []

        def note(trainer: Trainer, _: LightningModule) -> None:
            if trainer.global_step == lowered_after:
                lower_learning_rate(trainer, 0.25)
            found.append(trainer.optimizers[0].param_groups[0]["lr"])

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*lr_scheduler.step.*")  # SequentialLR's own
            fit(Scheduled(), fixed_batches(20), AtEachStep(note))
        return found

    usual, lowered = rates(0), rates(7)
    assert lowered[:6] == usual[:6]
    assert lowered[6:] == pytest.approx([0.25 * rate for rate in usual[6:]], rel=1e-6, abs=1e-12)


# What a checkpoint holds.


def test_events_and_that_it_was_rolled_back_survive_a_resume(tmp_path: Path) -> None:
    guard, again = CollapseGuard("rollback"), CollapseGuard("rollback")
    with pytest.warns(UserWarning, match="went back"):
        rolled_back(poisoned(8), tmp_path, AdaDim(every_n_steps=5), guard, max_epochs=1)
    last = tmp_path / "last.ckpt"
    resumed = rolled_back(poisoned(), tmp_path / "more", AdaDim(every_n_steps=5), again, ckpt_path=last)
    assert again.events == guard.events != []
    assert resumed["rates"][-2] == pytest.approx(0.02 * 0.1 * 1 / 20)
    with pytest.raises(NonFiniteError, match="rolled back once already"):
        rolled_back(
            poisoned(3), tmp_path / "bad", AdaDim(every_n_steps=5), CollapseGuard("rollback"), ckpt_path=last
        )


def test_another_model_begins_without_the_events_of_the_last() -> None:
    guard = CollapseGuard()
    with pytest.raises(NonFiniteError):
        fit(poisoned(3), fixed_batches(6), AdaDim(), guard)
    assert kinds(guard) == [("non_finite", "stop")]
    fit(poisoned(), fixed_batches(6), AdaDim(), guard)
    assert guard.events == []


# Somebody else's module.


class Shrinking(OneCallPerView):
    """Its loss pulls both views together and nothing pushes them apart."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def test_a_foreign_module_that_collapses_is_stopped(tmp_path: Path) -> None:
    monitor = DimensionMonitor("encoder", "projector", every_n_steps=READ_EVERY, window=512)
    guard = CollapseGuard("stop", patience=3)
    every = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    with pytest.raises(CollapseError, match=r"ER\(Z\) = 1\.\d\d at 3 readings in a row") as error:
        fit(Shrinking(), at_hand(20, 64), monitor, guard, every, max_epochs=20)
    assert kinds(guard) == [("rank_z", "stop")]
    # Lightning's own goes on writing; those of bad times are told from the good ones by what they hold.
    named = torch.load(str(error.value).rpartition(" is ")[2], weights_only=True)
    assert named["global_step"] < guard.events[0]["step"] - 2 * READ_EVERY <= every._last_global_step_saved


def foreign(*calls: int) -> OneCallPerView:
    module = OneCallPerView(AdaDimLoss(gamma=0))
    module.projector = Poisoned(module.projector, *calls)  # type: ignore[assignment]
    return module


def test_a_foreign_module_with_a_nan_goes_on_after_a_warning(tmp_path: Path) -> None:
    monitor, guard = DimensionMonitor("encoder", "projector", every_n_steps=2), CollapseGuard("warn")
    with pytest.warns(UserWarning, match="a NaN or infinity is in R, Z, the loss or its gradient since step 4"):
        found = rolled_back(foreign(10), tmp_path, monitor, guard)  # two calls a step
    assert kinds(guard) == [("non_finite", "warn")]
    assert found["trainer"].global_step == 20
    assert steps_in(tmp_path) == [2, 4]  # none is written any more


def test_a_foreign_module_with_a_nan_is_stopped(tmp_path: Path) -> None:
    monitor, guard = DimensionMonitor("encoder", "projector", every_n_steps=2), CollapseGuard("stop")
    with pytest.raises(NonFiniteError, match=r"at step 4;.*step=000004\.ckpt"):
        rolled_back(foreign(10), tmp_path, monitor, guard)


@pytest.mark.parametrize("steered_too", [False, True])
def test_a_foreign_module_with_a_nan_is_rolled_back(steered_too: bool, tmp_path: Path) -> None:
    module, guard = foreign(10), CollapseGuard("rollback")
    monitor: DimensionMonitor = DimensionMonitor("encoder", "projector", every_n_steps=2)
    if steered_too:
        module.criterion = None
        monitor = AdaDim("encoder", "projector", native_loss="other", every_n_steps=1)
    with pytest.warns(UserWarning, match=r"at step 4; went back to .*step=000004\.ckpt"):
        found = rolled_back(module, tmp_path, monitor, guard)
    saved = torch.load(tmp_path / "epoch=0000-step=000004.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(found["weights"][4][key], value) for key, value in saved.items())
    assert found["trainer"].global_step == 20
    assert found["rates"][-1] == pytest.approx(1e-3)


def test_a_bad_gradient_of_a_good_loss_is_seen_in_a_foreign_module(tmp_path: Path) -> None:
    module, calls = foreign(), []

    def spoil(gradient: Tensor) -> Tensor:
        calls.append(1)
        return gradient * torch.nan if len(calls) == 9 else gradient

    module.encoder[1].weight.register_hook(spoil)
    with pytest.raises(NonFiniteError, match="at step 8;"):
        rolled_back(module, tmp_path, DimensionMonitor("encoder", "projector"), CollapseGuard("stop"))
    assert steps_in(tmp_path)[-1] == 8


def roll_back_on_two(folder: str) -> tuple[list[dict[str, Any]], dict[str, Tensor], list[int]]:
    rank = distributed.get_rank()
    module = foreign(*[10] * rank)  # one of them alone
    module.criterion = None
    monitor, guard = DimensionMonitor("encoder", "projector", every_n_steps=2), CollapseGuard("rollback")
    checkpoints = RunCheckpoints(folder, every_n_steps=2, keep=1000)
    used = ddp_trainer([monitor, guard, checkpoints], max_epochs=2, log_every_n_steps=4)
    with pytest.warns(UserWarning, match="went back") if rank == 0 else nullcontext():
        used.fit(module, fixed_batches(20))
    return guard.events, module.state_dict(), steps_in(Path(folder))


@pytest.mark.slow
def test_two_processes_go_back_together_when_one_has_a_nan(two_processes: Processes, tmp_path: Path) -> None:  # noqa: F811
    (events, weights, steps), second = two_processes.run(roll_back_on_two, str(tmp_path))
    assert events == second[0]
    assert [(event["step"], event["kind"], event["action"]) for event in events] == [(8, "non_finite", "rollback")]
    assert "step=000004.ckpt" in events[0]["message"]
    assert all(torch.equal(value, second[1][key]) and value.isfinite().all() for key, value in weights.items())
    assert steps == [2, 4, 8, 10, 12, 14, 16, 18, 20]  # none while one of them had a NaN


def roll_back_before_validation(folder: str) -> tuple[list[dict[str, Any]], list[tuple[int, bool]]]:
    module, guard = poisoned(*[10] * distributed.get_rank()), CollapseGuard("rollback")
    theirs = ModelCheckpoint(f"{folder}/theirs", every_n_train_steps=1, save_top_k=-1)
    callbacks = [AdaDim(every_n_steps=100), OnlineKNN(k=5), guard, RunCheckpoints(folder, every_n_steps=2), theirs]
    used = ddp_trainer(callbacks, max_epochs=1, log_every_n_steps=100, val_check_interval=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        used.fit(module, fixed_batches(40), held_out())
    files = [torch.load(path, weights_only=True) for path in Path(folder, "theirs").glob("*.ckpt")]
    return guard.events, [(x["global_step"], x["callbacks"][guard.state_key]["bad"]) for x in files]


@pytest.mark.slow
def test_processes_that_seldom_look_do_so_before_a_validation(two_processes: Processes, tmp_path: Path) -> None:  # noqa: F811
    (events, marked), second = two_processes.run(roll_back_before_validation, str(tmp_path))
    assert events == second[0]
    assert [(event["step"], event["action"]) for event in events] == [(12, "rollback")]
    assert sorted(step for step, bad in marked if bad) == [10, 11, 12]
    assert len(marked) == 20


# Alpha at a bound, and how it is set up.


def test_an_alpha_that_stays_at_its_cap_is_a_warning_whatever_the_policy() -> None:
    balance = Balance(EffectiveRankSchedule(alpha_max=0.05), every_n_steps=1, window=64)
    guard = CollapseGuard("stop", patience=2)
    with pytest.warns(UserWarning, match=r"alpha = 0\.05 stayed at its bound 0\.05 at 8 readings in a row"):
        fit(tiny_module(), fixed_batches(12), AdaDim(balance=balance, every_n_steps=1), guard)
    assert kinds(guard) == [("alpha", "warn")]
    assert not guard.suspects()


@pytest.mark.parametrize(
    "balance",
    [
        Balance(EffectiveRankSchedule(alpha_max=0.05), every_n_steps=None),  # alpha is 0 before the first estimate
        Balance(EffectiveRankSchedule(alpha_min=0.3, alpha_max=0.3), every_n_steps=1),
        Balance(ConstantSchedule(0.0), every_n_steps=1),
        Balance(EffectiveRankSchedule(), every_n_steps=1),
    ],
    ids=["no estimate", "no room", "constant", "inside"],
)
def test_an_alpha_that_is_meant_to_be_there_is_none(balance: Balance) -> None:
    guard = CollapseGuard(patience=1)
    fit(tiny_module(), fixed_batches(12), AdaDim(balance=balance, every_n_steps=1), guard)
    assert "alpha" not in [event["kind"] for event in guard.events]


def test_a_guard_before_its_monitor_is_refused() -> None:
    with pytest.raises(ValueError, match="CollapseGuard must come after AdaDim and DimensionMonitor"):
        fit(tiny_module(), fixed_batches(1), CollapseGuard(), AdaDim())


def test_a_guard_without_a_monitor_says_what_it_looks_for() -> None:
    with pytest.warns(UserWarning, match="looks for NaN and infinity alone"), pytest.raises(NonFiniteError):
        fit(foreign(5), fixed_batches(6), CollapseGuard("stop"))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"policy": "panic"}, "policy"),
        ({"patience": 0}, "patience"),
        ({"min_rank": 0.5}, "min_rank"),
        ({"lr_factor": 0}, "lr_factor"),
    ],
)
def test_a_wrong_setting_is_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        CollapseGuard(**options)


def test_it_changes_no_training(tmp_path: Path) -> None:
    modules = [tiny_module(), tiny_module()]
    for module, guards in zip(modules, ([], [CollapseGuard("rollback")]), strict=True):
        fit(module, fixed_batches(8), AdaDim(every_n_steps=2), *guards, max_epochs=2)
    assert_same_weights(*modules)
