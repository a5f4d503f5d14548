"""The picture and the spectra that a run leaves behind."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback
from matplotlib.image import imread

from adadim_lightning import AdaDim, DimensionMonitor, DynamicsPlot, OnlineKNN, OnlineLinearProbe
from adadim_lightning.callbacks import RunCheckpoints
from adadim_lightning.functional import eigenvalue_spectrum
from adadim_lightning.report.dynamics import draw_dynamics
from tests.helpers import (
    DIM_R,
    DIM_Z,
    Recorder,
    assert_same_weights,
    every_epoch,
    fit,
    fixed_batches,
    held_out,
    tiny_module,
)

PNG = b"\x89PNG\r\n\x1a\n"


def assert_drawn(path: Path) -> None:
    assert path.read_bytes().startswith(PNG)
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 500
    assert float(pixels[..., :3].std()) > 0.02


def spectra(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "spectra.npz", allow_pickle=False) as file:
        return dict(file)


def test_a_run_leaves_a_picture_and_the_spectra_of_each_epoch(tmp_path: Path) -> None:
    recorder = Recorder()
    callbacks = [AdaDim(window=4 * 32), OnlineLinearProbe(num_classes=10), OnlineKNN(k=5), recorder]
    plot = DynamicsPlot(tmp_path / "new" / "folder")
    fit(tiny_module(), (fixed_batches(4), held_out()), *callbacks, plot, max_epochs=3)
    folder = tmp_path / "new" / "folder"
    assert_drawn(folder / "dynamics.png")
    saved = spectra(folder)
    assert saved["epoch"].tolist() == [0, 1, 2]
    assert (saved["R"].shape, saved["Z"].shape) == ((3, DIM_R), (3, DIM_Z))
    for epoch in range(3):
        for which, name in enumerate("RZ"):
            expected = eigenvalue_spectrum(recorder.rows(which, list(range(4 * epoch, 4 * epoch + 4)))).numpy()
            np.testing.assert_allclose(saved[name][epoch], expected, rtol=1e-4, atol=1e-6 * expected[0])


def test_the_history_is_what_was_logged(tmp_path: Path) -> None:
    recorder, plot = Recorder(), DynamicsPlot(tmp_path)
    fit(tiny_module(), fixed_batches(2), AdaDim(), recorder, plot, max_epochs=3)
    assert plot.history["epoch"] == [0.0, 1.0, 2.0]
    for key in ("loss/total", "balance/alpha", "dynamics/H_R", "loss_weighted/uniformity"):
        assert plot.history[key] == [logged[key] for logged in recorder.logged]


def test_by_default_the_files_are_in_the_root_folder_of_the_run(tmp_path: Path) -> None:
    fit(tiny_module(), fixed_batches(1), DimensionMonitor(), DynamicsPlot(), default_root_dir=tmp_path)
    assert_drawn(tmp_path / "dynamics.png")
    assert (tmp_path / "spectra.npz").exists()


class FailIn(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.current_epoch == self.epoch:
            raise KeyError("the disk is full")


def test_a_failed_run_leaves_what_there_was(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="disk is full"):
        fit(tiny_module(), fixed_batches(2), AdaDim(), DynamicsPlot(tmp_path), FailIn(2), max_epochs=4)
    assert_drawn(tmp_path / "dynamics.png")
    assert spectra(tmp_path)["epoch"].tolist() == [0, 1]


def test_a_run_that_fails_before_its_first_epoch_is_over_fails_with_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="disk is full"):
        fit(tiny_module(), fixed_batches(2), AdaDim(), DynamicsPlot(tmp_path), FailIn(0))
    assert list(tmp_path.iterdir()) == []


def test_spectra_of_fewer_rows_than_dimensions_are_padded_with_zeros(tmp_path: Path) -> None:
    monitor = DimensionMonitor(window=8)
    fit(tiny_module(), fixed_batches(2, batch_size=2), monitor, DynamicsPlot(tmp_path), max_epochs=2)
    widths = {len(r) for _, r, _ in monitor.spectra}
    assert spectra(tmp_path)["R"].shape == (2, max(widths))
    assert widths == {8}


def test_a_monitor_with_a_name_is_drawn_too(tmp_path: Path) -> None:
    fit(tiny_module(), fixed_batches(2), DimensionMonitor(name="mine"), DynamicsPlot(tmp_path), max_epochs=2)
    assert_drawn(tmp_path / "dynamics.png")


def test_without_a_monitor_nothing_is_written_and_that_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="DynamicsPlot draws nothing: there is no DimensionMonitor or AdaDim"):
        fit(tiny_module(), fixed_batches(1), DynamicsPlot(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [DynamicsPlot, RunCheckpoints])
@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below"])
def test_a_folder_that_cannot_be_written_to_is_known_before_the_first_step(
    make: Any, place: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    module = tiny_module()
    with pytest.raises(OSError, match="Not a directory") as caught:
        fit(module, fixed_batches(1), DimensionMonitor(), make(tmp_path / place))
    assert caught.value.filename == str(tmp_path / place)
    assert_same_weights(module, tiny_module())
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


def test_a_disk_too_full_for_a_checkpoint_is_known_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny_module()
    size = sum(x.numel() * x.element_size() for x in module.state_dict().values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
    with pytest.warns(UserWarning, match=r"has 0.0 MB left, less than a checkpoint takes, 0.0 MB at least"):
        fit(module, fixed_batches(1), RunCheckpoints(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*MB left")
        fit(module, fixed_batches(1), RunCheckpoints(tmp_path))


def test_a_resumed_run_draws_all_its_epochs(tmp_path: Path) -> None:
    def callbacks(folder: Path) -> list[Callback]:
        return [AdaDim(), DynamicsPlot(folder), every_epoch(folder)]

    fit(tiny_module(), fixed_batches(2), *callbacks(tmp_path), max_epochs=2)
    again = callbacks(tmp_path / "again")
    fit(tiny_module(), fixed_batches(2), *again, max_epochs=4, ckpt_path=tmp_path / "1.ckpt")
    assert again[1].history["epoch"] == [0.0, 1.0, 2.0, 3.0]
    assert spectra(tmp_path / "again")["epoch"].tolist() == [0, 1, 2, 3]


def test_a_run_resumed_without_a_callback_still_draws_what_that_one_had_logged(tmp_path: Path) -> None:
    data = (fixed_batches(2), held_out())
    fit(tiny_module(), data, AdaDim(), OnlineKNN(k=5), DynamicsPlot(tmp_path), every_epoch(tmp_path), max_epochs=2)
    folder = tmp_path / "again"
    fit(
        tiny_module(),
        data,
        AdaDim(),
        DynamicsPlot(folder),
        every_epoch(folder),
        max_epochs=3,
        ckpt_path=tmp_path / "1.ckpt",
    )
    assert_drawn(folder / "dynamics.png")


def test_a_run_stopped_within_an_epoch_is_drawn_without_an_error(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            trainer.should_stop = trainer.global_step == 5

    fit(tiny_module(), fixed_batches(4), DimensionMonitor(window=32), DynamicsPlot(tmp_path), Stop(), max_epochs=3)
    assert_drawn(tmp_path / "dynamics.png")


def test_picture_joins_readings_over_epochs_without_one() -> None:
    nan = float("nan")
    history = {
        "epoch": np.arange(5.0),
        "dynamics/H_R": np.array([nan, 1.0, nan, 3.0, nan]),
        "dynamics/I_RZ": np.array([nan, 2.0, nan, 4.0, nan]),
        "probe/linear_top1": np.array([nan, 0.5, nan, 0.75, nan]),
    }
    figure = draw_dynamics(history, {"epoch": np.arange(2), "R": np.ones((2, 3))})
    drawn = {axes.get_title("left"): axes for axes in figure.axes}
    line = drawn["Held-out accuracy"].lines[0].get_xydata()
    assert np.asarray(line).tolist() == [[2, 0.5], [4, 0.75]]
    ends = [np.asarray(x.get_offsets()) for x in drawn["Path through H(R) and I(R;Z)"].collections[-2:]]
    assert [x.tolist() for x in ends] == [[[1, 2]], [[3, 4]]]
