"""The monitor in real fits, against what the test's own hooks recorded."""

import math
from datetime import timedelta
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from torch.utils.data import DataLoader, IterableDataset

from adadim_lightning import AdaDim, DimensionMonitor, NonFiniteError, OnlineKNN
from adadim_lightning.functional import effective_rank, matrix_mutual_information
from tests.helpers import (
    DIM_R,
    DIM_Z,
    OneCallPerView,
    Recorder,
    assert_same_weights,
    endless,
    every_epoch,
    fit,
    fixed_batches,
    held_out,
    some_digits,
    tiny_module,
)

ROWS = 32  # of a step: both views of 16 images
KEYS = {f"dynamics/{key}" for key in ("H_R", "ER_R", "ER_Z", "I_RZ", "log_n")}


def information(recorder: Recorder, steps: list[int]) -> float:
    return sum(float(matrix_mutual_information(*recorder.steps[i])) for i in steps) / len(steps)


def assert_logged(
    logged: dict[str, float], recorder: Recorder, *, window: list[int], measured: list[int], **how
) -> None:
    """What was logged is what the recorded rows give: ranks of the window's steps, information of all measured."""
    er_r, er_z = (float(effective_rank(recorder.rows(which, window), **how)) for which in (0, 1))
    assert logged["dynamics/ER_R"] == pytest.approx(er_r, rel=1e-4)
    assert logged["dynamics/H_R"] == pytest.approx(math.log(er_r), rel=1e-4)
    assert logged["dynamics/ER_Z"] == pytest.approx(er_z, rel=1e-4)
    assert logged["dynamics/I_RZ"] == pytest.approx(information(recorder, measured), rel=1e-4)
    assert logged["dynamics/log_n"] == pytest.approx(math.log(ROWS))


@pytest.mark.parametrize("spectrum", ["singular", "eigen"])
@pytest.mark.parametrize("center", [False, True])
def test_it_logs_rank_and_information_of_what_the_model_put_out(spectrum: str, center: bool) -> None:
    recorder = Recorder()
    monitor = DimensionMonitor(window=4 * ROWS, spectrum=spectrum, center=center)
    fit(tiny_module(), fixed_batches(4), monitor, recorder, max_epochs=2)
    for epoch, steps in enumerate(([0, 1, 2, 3], [4, 5, 6, 7])):
        assert_logged(
            recorder.logged[epoch], recorder, window=steps, measured=steps, spectrum=spectrum, center=center
        )


def test_it_measures_random_views_from_a_data_module_without_a_second_pass() -> None:
    recorder = Recorder()
    fit(tiny_module(), some_digits(batch_size=16), DimensionMonitor(window=6 * ROWS), recorder)
    assert [len(r) for r, _ in recorder.steps] == [ROWS] * 6
    assert_logged(recorder.logged[0], recorder, window=list(range(6)), measured=list(range(6)))


def test_a_window_larger_than_an_epoch_reaches_into_the_epochs_before() -> None:
    recorder = Recorder()
    fit(tiny_module(), fixed_batches(2), DimensionMonitor(window=4 * ROWS), recorder, max_epochs=3)
    assert_logged(recorder.logged[1], recorder, window=[0, 1, 2, 3], measured=[2, 3])
    assert_logged(recorder.logged[2], recorder, window=[2, 3, 4, 5], measured=[4, 5])


def test_only_the_steps_right_before_a_reading_that_fill_the_window_are_measured() -> None:
    recorder = Recorder()
    monitor = DimensionMonitor(every_n_steps=10, window=3 * ROWS)
    fit(tiny_module(), fixed_batches(25), monitor, recorder)
    measured = [7, 8, 9, 17, 18, 19, 22, 23, 24]
    assert recorder.logged[0]["dynamics/I_RZ"] == pytest.approx(information(recorder, measured), rel=1e-5)


def test_the_ranks_of_a_long_epoch_are_those_of_its_last_window() -> None:
    recorder = Recorder()
    monitor = DimensionMonitor(every_n_steps=10, window=3 * ROWS)
    fit(tiny_module(), fixed_batches(25), monitor, recorder)
    last = recorder.rows(0, [22, 23, 24])
    assert recorder.logged[0]["dynamics/ER_R"] == pytest.approx(float(effective_rank(last)), rel=1e-4)


def test_checkpoints_and_early_stopping_can_follow_it_without_validation(tmp_path) -> None:
    recorder = Recorder()
    best = ModelCheckpoint(tmp_path, monitor="dynamics/H_R", mode="min", filename="{epoch}")
    stop = EarlyStopping("dynamics/ER_Z", mode="max", patience=1, min_delta=100.0)
    used = fit(
        tiny_module(),
        fixed_batches(2),
        DimensionMonitor(),
        recorder,
        best,
        stop,
        max_epochs=9,
        limit_val_batches=0,
    )
    assert used.current_epoch == 2
    values = [logged["dynamics/H_R"] for logged in recorder.logged]
    assert float(best.best_model_score) == pytest.approx(min(values))
    assert best.best_model_path.endswith(f"epoch={values.index(min(values))}.ckpt")


def test_a_run_with_the_monitor_is_bit_for_bit_the_run_without() -> None:
    modules, states = [], []
    for callbacks in ([], [DimensionMonitor(every_n_steps=2, window=ROWS)]):
        module = tiny_module()
        torch.manual_seed(3)
        fit(module, some_digits(batch_size=16), *callbacks, max_epochs=2)
        modules.append(module)
        states.append(torch.get_rng_state())
    assert_same_weights(*modules)
    assert torch.equal(*states)


def test_a_name_prefixes_the_log_names_and_keeps_several_monitors_apart(tmp_path) -> None:
    recorder = Recorder()
    monitors = [
        DimensionMonitor(),
        DimensionMonitor(spectrum="eigen", name="eigen"),
        DimensionMonitor("backbone.1", "backbone", name="inside"),
    ]
    fit(tiny_module(), fixed_batches(2), *monitors, recorder, every_epoch(tmp_path))
    logged = recorder.logged[0]
    assert {key for key in logged if "dynamics" in key} == KEYS | {
        f"{name}/{key}" for name in ("eigen", "inside") for key in KEYS
    }
    assert logged["eigen/dynamics/ER_R"] < logged["dynamics/ER_R"]
    assert logged["inside/dynamics/ER_Z"] == logged["dynamics/ER_R"]
    state = torch.load(tmp_path / "0.ckpt", weights_only=True)["callbacks"]
    assert {"DimensionMonitor{}", "DimensionMonitor{eigen}", "DimensionMonitor{inside}"} <= set(state)


@pytest.mark.parametrize("first", [True, False], ids=["monitor first", "AdaDim first"])
def test_beside_adadim_on_the_same_submodules_it_is_silent(first: bool) -> None:
    recorder = Recorder()
    silent = DimensionMonitor(window=ROWS)
    pair = [silent, AdaDim(window=4 * ROWS)]
    fit(tiny_module(), fixed_batches(4), *(pair if first else pair[::-1]), recorder)
    steps = [0, 1, 2, 3]
    assert_logged(recorder.logged[0], recorder, window=steps, measured=steps)
    assert silent.spectra == []
    elsewhere = DimensionMonitor("backbone.1", name="early", window=ROWS)
    fit(tiny_module(), fixed_batches(4), elsewhere, AdaDim(window=4 * ROWS))
    assert len(elsewhere.spectra) == 1


def test_a_module_of_somebody_else_with_a_call_for_each_view_is_measured_on_both() -> None:
    recorder = Recorder("encoder", "projector")
    monitor = DimensionMonitor("encoder", "projector", window=2 * ROWS)
    fit(OneCallPerView(), fixed_batches(2), monitor, recorder)
    assert [len(r) for r, _ in recorder.steps] == [ROWS] * 2
    assert_logged(recorder.logged[0], recorder, window=[0, 1], measured=[0, 1])


def test_spectra_of_each_epoch_are_kept() -> None:
    recorder = Recorder()
    monitor = DimensionMonitor(window=2 * ROWS)
    fit(tiny_module(), fixed_batches(2), monitor, recorder, max_epochs=2)
    assert [epoch for epoch, _, _ in monitor.spectra] == [0, 1]
    for epoch, r, z in monitor.spectra:
        for which, eigenvalues, dim in ((0, r, DIM_R), (1, z, DIM_Z)):
            rows = recorder.rows(which, [2 * epoch, 2 * epoch + 1])
            expected = torch.linalg.svdvals(rows.double()).square().float()
            assert eigenvalues.shape == (dim,)
            torch.testing.assert_close(eigenvalues, expected, rtol=1e-4, atol=1e-5 * float(expected[0]))


def test_a_long_run_keeps_few_spectra_evenly_spaced() -> None:
    monitor = DimensionMonitor()
    for epoch in range(1000):
        monitor._keep_spectra(epoch, torch.ones(2), torch.ones(2))
    epochs = [epoch for epoch, _, _ in monitor.spectra]
    assert epochs == [*range(0, 1000, 4), 999]  # and always the last


@pytest.mark.parametrize("every_n_steps", [3, 50])
def test_a_resumed_run_logs_what_the_uninterrupted_run_does(every_n_steps: int, tmp_path) -> None:
    def monitor() -> DimensionMonitor:
        return DimensionMonitor(every_n_steps=every_n_steps, window=2 * ROWS)

    whole = Recorder()
    fit(tiny_module(), fixed_batches(5), monitor(), whole, every_epoch(tmp_path), max_epochs=4)
    resumed, again = Recorder(), monitor()
    fit(
        tiny_module(),
        fixed_batches(5),
        again,
        resumed,
        every_epoch(tmp_path / "again"),
        max_epochs=4,
        ckpt_path=tmp_path / "1.ckpt",
    )
    assert len(resumed.logged) == 2
    for ours, theirs in zip(resumed.logged, whole.logged[2:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert [epoch for epoch, _, _ in again.spectra] == [0, 1, 2, 3]


def test_a_run_resumes_from_a_checkpoint_of_the_middle_of_an_epoch(tmp_path) -> None:
    middle = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(tiny_module(), fixed_batches(5), DimensionMonitor(window=ROWS), middle, max_epochs=1)
    recorder = Recorder()
    fit(
        tiny_module(),
        fixed_batches(5),
        DimensionMonitor(window=ROWS),
        ModelCheckpoint(tmp_path / "again"),
        Follow(recorder),
        max_epochs=2,
        ckpt_path=tmp_path / "step=3.ckpt",
    )
    assert len(recorder.logged) == 2
    assert all(math.isfinite(logged["dynamics/I_RZ"]) for logged in recorder.logged)


def test_a_run_resumes_from_a_checkpoint_that_validation_wrote(tmp_path) -> None:
    def callbacks(folder) -> list[Callback]:
        at_validation = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
        return [DimensionMonitor(every_n_steps=3, window=2 * ROWS), at_validation]

    data = (fixed_batches(5), held_out())
    fit(tiny_module(), data, *callbacks(tmp_path), max_epochs=2)
    recorder = Recorder()
    used = fit(
        tiny_module(),
        data,
        *callbacks(tmp_path / "again"),
        Follow(recorder),
        max_epochs=3,
        ckpt_path=tmp_path / "epoch=0.ckpt",
    )
    assert used.current_epoch == 3
    assert recorder.logged
    assert all(math.isfinite(logged["dynamics/I_RZ"]) for logged in recorder.logged)


class Follow(Callback):
    """Notes what is logged, where the epoch may have begun in another run."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.recorder.on_train_epoch_end(trainer, pl_module)


@pytest.mark.parametrize("max_steps", [3, 7])
def test_a_run_that_max_steps_ends_within_an_epoch_is_logged_too(max_steps: int) -> None:
    recorder = Recorder()
    monitor = DimensionMonitor(window=2 * ROWS)
    fit(tiny_module(), fixed_batches(5), monitor, recorder, max_epochs=-1, max_steps=max_steps)
    steps = [max_steps - 2, max_steps - 1]
    assert_logged(recorder.logged[-1], recorder, window=steps, measured=steps)


def test_a_run_that_is_stopped_within_an_epoch_ends_without_an_error() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            trainer.should_stop = trainer.global_step == 7

    recorder = Recorder()
    used = fit(tiny_module(), fixed_batches(5), DimensionMonitor(window=2 * ROWS), recorder, Stop(), max_epochs=3)
    assert used.global_step == 7
    assert all(math.isfinite(logged["dynamics/H_R"]) for logged in recorder.logged)


def test_a_run_that_its_time_limit_ends_at_once_ends_without_an_error() -> None:
    fit(
        tiny_module(),
        fixed_batches(5),
        DimensionMonitor(window=ROWS),
        Timer(timedelta(microseconds=1), interval="step"),
    )


@pytest.mark.parametrize("every_n_steps", [4, 50])
def test_data_without_a_length_are_measured_too(every_n_steps: int) -> None:
    recorder = Recorder()
    monitor = DimensionMonitor(every_n_steps=every_n_steps, window=2 * ROWS)
    fit(tiny_module(), endless(fixed_batches(3)), monitor, recorder, max_epochs=-1, max_steps=8)
    if every_n_steps == 4:
        assert_logged(recorder.logged[0], recorder, window=[6, 7], measured=[2, 3, 6, 7])
    assert set(recorder.logged[0]) >= KEYS


class BadThirdBatch(OneCallPerView):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            batch[0][1][3] = math.nan
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_a_bad_value_in_somebody_elses_module_is_left_out_with_a_warning_that_names_the_step() -> None:
    module, recorder = BadThirdBatch(), Recorder("encoder", "projector")
    module.on_before_optimizer_step = lambda _: module.zero_grad()
    with pytest.warns(UserWarning, match="NaN or infinity at step 2; such steps are not measured"):
        fit(module, fixed_batches(4), DimensionMonitor("encoder", "projector"), recorder)
    assert_logged(recorder.logged[0], recorder, window=[0, 1, 3], measured=[0, 1, 3])


def test_a_bad_value_stops_the_fit_whose_loss_is_steered_and_is_named_with_its_step() -> None:
    with pytest.raises(NonFiniteError) as error:
        fit(BadThirdBatch(), fixed_batches(4), AdaDim("encoder", "projector", native_loss="other"))
    assert error.value.step == 2


def test_a_step_that_the_module_skips_is_not_measured() -> None:
    class SkipsTheSecond(OneCallPerView):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    class Forgiving(Recorder):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if outputs:
                super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    for callback in (
        DimensionMonitor("encoder", "projector"),
        AdaDim("encoder", "projector", native_loss="other"),
    ):
        recorder = Forgiving("encoder", "projector")
        fit(SkipsTheSecond(), fixed_batches(4), callback, recorder)
        assert_logged(recorder.logged[0], recorder, window=[0, 1, 2], measured=[0, 1, 2])


def test_submodules_that_see_different_rows_are_an_error() -> None:
    class FirstViewOnly(OneCallPerView):
        def training_step(self, batch, batch_idx):
            (view1, view2), _ = batch
            self.encoder(view2)
            return self.projector(self.encoder(view1)).square().mean()

    with pytest.raises(ValueError, match="'encoder' put out 32 rows in this step but 'projector' 16"):
        fit(FirstViewOnly(), fixed_batches(1), DimensionMonitor("encoder", "projector"))


def test_names_that_are_not_found_are_an_error_that_lists_the_submodules_of_the_step() -> None:
    class Unusual(OneCallPerView):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.mlp = self.encoder, self.projector
            del self.encoder, self.projector

        def training_step(self, batch, batch_idx):
            z1, z2 = (self.mlp(self.net(view)) for view in batch[0])
            return (z1 - z2).square().mean()

    for callback in (DimensionMonitor(), AdaDim(native_loss="other"), DimensionMonitor("nett", "mlp")):
        module = Unusual()
        with pytest.raises(ValueError, match=r"backbone\? none was found|no submodule named 'nett'") as error:
            fit(module, fixed_batches(1), callback)
        assert "\n  net: (16, 12), 2 calls\n" in str(error.value)
        assert str(error.value).endswith("\n  mlp: (16, 8), 2 calls")
        assert not any(submodule._forward_hooks for submodule in module.modules())
    recorder = Recorder("net", "mlp")
    fit(Unusual(), fixed_batches(2), DimensionMonitor("net", "mlp"), recorder)
    assert_logged(recorder.logged[0], recorder, window=[0, 1], measured=[0, 1])


def test_a_submodule_that_is_not_called_is_an_error() -> None:
    class NoHead(OneCallPerView):
        def training_step(self, batch, batch_idx):
            return self.encoder(batch[0][0]).square().mean()

    with pytest.raises(RuntimeError, match="'projector' was not called in this step"):
        fit(NoHead(), fixed_batches(1), DimensionMonitor("encoder", "projector"))


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"window": 0}], ids=str)
def test_a_setting_outside_its_range_is_an_error(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be an integer >= 1, got 0"):
        DimensionMonitor(**options)


class SAM(torch.optim.SGD):
    """Takes the gradient at a perturbed point (Foret et al., arXiv 2010.01412): two runs of the step."""

    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        old = [p.data.clone() for p in parameters]
        for p in parameters:
            p.data.add_(0.05 * p.grad / (p.grad.norm() + 1e-9))
        with torch.enable_grad():
            closure()
        for p, before in zip(parameters, old, strict=True):
            p.data.copy_(before)
        super().step()
        return loss


class RunsSeveralTimes(OneCallPerView):
    optimizer: type[torch.optim.Optimizer] = SAM

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=1e-3)


@pytest.mark.filterwarnings("ignore:OnlineKNN has nothing to score on")
@pytest.mark.parametrize("optimizer", [SAM, torch.optim.LBFGS])
@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_of_an_optimizer_that_runs_the_step_several_times_the_last_run_counts_once(
    optimizer: type[torch.optim.Optimizer], steered: bool, accumulated: int
) -> None:
    module, recorder = RunsSeveralTimes(), Recorder("encoder", "projector")
    module.optimizer = optimizer
    options = {"native_loss": "other"} if steered else {}
    monitor = (AdaDim if steered else DimensionMonitor)("encoder", "projector", window=10_000, **options)
    probe = OnlineKNN("encoder")
    native: dict[int, list[float]] = {}
    step = module.training_step

    def noted(batch: Any, batch_idx: int) -> Any:
        loss = step(batch, batch_idx)
        native.setdefault(batch_idx, []).append(float(loss))
        return loss

    module.training_step = noted
    fit(module, fixed_batches(4), monitor, probe, recorder, accumulate_grad_batches=accumulated)
    if steered:
        assert any(len(losses) > 1 for losses in native.values())
        mean = sum(losses[-1] for losses in native.values()) / 4
        assert recorder.logged[0]["loss/native"] == pytest.approx(mean, rel=1e-4)
    last = [(r[-ROWS:], z[-ROWS:]) for r, z in recorder.steps]
    assert any(len(r) > ROWS for r, _ in recorder.steps)  # the step did run several times
    logged = recorder.logged[0]
    assert monitor.recent_r.read()[1] == sum(len(labels) for _, labels in probe._bank) == 4 * ROWS
    assert logged["dynamics/log_n"] == pytest.approx(math.log(ROWS))
    expected = sum(float(matrix_mutual_information(r, z)) for r, z in last) / len(last)
    assert logged["dynamics/I_RZ"] == pytest.approx(expected, rel=1e-4)
    assert logged["dynamics/ER_R"] == pytest.approx(
        float(effective_rank(torch.cat([r for r, _ in last]))), rel=1e-4
    )


class Stream(IterableDataset):
    """Batches whose number nobody knows, another in each epoch."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.epoch = lengths, 0

    def __iter__(self):
        batches = list(fixed_batches(max(self.lengths)))
        yield from batches[: self.lengths[self.epoch]]
        self.epoch += 1


class Readings(Callback):
    def __init__(self, monitor: DimensionMonitor) -> None:
        self.monitor, self.found = monitor, []

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.found.append((trainer.global_step, self.monitor.last_reading.step))


@pytest.mark.parametrize("make", [DimensionMonitor, lambda *x, **how: AdaDim(*x, native_loss="other", **how)])
def test_every_epoch_of_a_stream_ends_with_a_reading_of_its_last_rows(make: Any) -> None:
    lengths = [5, 3, 1, 4]
    monitor = make("encoder", "projector", window=2 * ROWS)
    recorder, readings = Recorder("encoder", "projector"), Readings(monitor)
    stream = DataLoader(Stream(lengths), batch_size=None)
    stopping = EarlyStopping("dynamics/ER_R", mode="max", patience=9)
    fit(OneCallPerView(), stream, monitor, recorder, readings, stopping, max_epochs=4)
    ends = [sum(lengths[: i + 1]) for i in range(4)]
    assert readings.found == [(end, end) for end in ends]
    assert [epoch for epoch, *_ in monitor.spectra] == [0, 1, 2, 3]
    # To the one step of the third epoch belong those that were read together before it.
    windows = [[3, 4], [6, 7], [6, 7, 8], [11, 12]]
    for logged, window, measured in zip(recorder.logged, windows, [[3, 4], [6, 7], [8], [11, 12]], strict=True):
        assert_logged(logged, recorder, window=window, measured=measured)


class StopAt(Callback):
    def __init__(self, step: int, how: str) -> None:
        self.step, self.how = step, how

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step and self.how == "should_stop":
            trainer.should_stop = True
        if trainer.global_step == self.step and self.how == "timer":
            (timer,) = (x for x in trainer.callbacks if isinstance(x, Timer))
            timer._offset = 10**6  # its time is up

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.global_step == self.step and self.how == "validation":
            trainer.should_stop = True  # as early stopping does


@pytest.mark.parametrize("how", ["should_stop", "timer", "validation", "max_steps"])
def test_an_epoch_that_is_cut_ends_with_a_reading_of_its_last_rows(how: str) -> None:
    recorder, monitor = Recorder(), DimensionMonitor(window=2 * ROWS)
    options: dict[str, Any] = {"max_epochs": 9, "val_check_interval": 3}
    if how == "max_steps":
        options |= {"max_epochs": -1, "max_steps": 9}
    timer = Timer(timedelta(hours=1), interval="step")
    module = tiny_module()
    fit(module, (fixed_batches(20), held_out()), StopAt(9, how), timer, monitor, recorder, **options)
    assert len(recorder.steps) == 9
    assert monitor.last_reading.step == 9
    assert_logged(recorder.logged[-1], recorder, window=[7, 8], measured=[7, 8])


def test_a_run_that_was_cut_between_two_readings_goes_on_with_what_it_had(tmp_path) -> None:
    whole = Recorder()
    data = fixed_batches(6)
    middle = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    fit(tiny_module(), data, DimensionMonitor(window=5 * ROWS), middle, whole, max_epochs=1)
    again, monitor = Recorder(), DimensionMonitor(window=5 * ROWS)

    class LastTwo(torch.utils.data.Sampler):
        def __iter__(self):
            return iter(range(4 * 16, 6 * 16))

        def __len__(self) -> int:
            return 6 * 16

    rest = DataLoader(data.dataset, batch_size=16, sampler=LastTwo())
    fit(
        tiny_module(), rest, monitor, Follow(again), max_epochs=1, ckpt_path=tmp_path / "step=4.ckpt", logger=False
    )
    assert again.logged[0]["dynamics/ER_R"] == pytest.approx(whole.logged[0]["dynamics/ER_R"], rel=1e-5)
    assert again.logged[0]["dynamics/I_RZ"] == pytest.approx(whole.logged[0]["dynamics/I_RZ"], rel=1e-5)


def test_a_checkpoint_of_before_steps_were_kept_for_a_reading_is_gone_on_with(tmp_path) -> None:
    fit(tiny_module(), fixed_batches(5), DimensionMonitor(window=2 * ROWS), every_epoch(tmp_path))
    old = torch.load(tmp_path / "0.ckpt", weights_only=True)
    state = old["callbacks"]["DimensionMonitor{}"]
    del state["pending"], state["has_read"]
    state["rows_per_step"] = ROWS
    torch.save(old, tmp_path / "old.ckpt")
    recorder, monitor = Recorder(), DimensionMonitor(window=2 * ROWS)
    fit(tiny_module(), fixed_batches(1), monitor, recorder, max_epochs=2, ckpt_path=tmp_path / "old.ckpt")
    assert monitor.recent_r.read()[1] == 3 * ROWS  # the two that were read before, and the one step since
