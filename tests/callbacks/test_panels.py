"""What wandb is told by the callback, read back from the file that it writes."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger
from matplotlib.image import imread

from adadim_lightning import AdaDim, DimensionMonitor, OnlineKNN, WandbPanels
from adadim_lightning.callbacks.panels import _histogram
from tests.callbacks.test_plots import FailIn, assert_drawn
from tests.callbacks.wandb_files import Found, wandb_runs
from tests.helpers import (
    DIM_R,
    DIM_Z,
    Recorder,
    assert_same_weights,
    every_epoch,
    fit,
    fixed_batches,
    held_out,
    some_digits,
    tiny_module,
)


@pytest.fixture(autouse=True)
def _finished() -> Iterator[None]:
    yield
    if wandb.run is not None:
        wandb.finish()


def offline(folder: Path, **options: Any) -> WandbLogger:
    quiet = wandb.Settings(silent=True, console="off")
    return WandbLogger(save_dir=folder, project="tests", mode="offline", settings=quiet, **options)


def fit_logged(folder: Path, data: Any, *callbacks: Callback, **options: Any) -> Found:
    """Fit with wandb, and read what it was told, also when the fit fails."""
    try:
        fit(tiny_module(), data, *callbacks, logger=offline(folder), log_every_n_steps=1, **options)
    finally:
        wandb.finish()
    return wandb_runs(folder)[-1]


def table(found: Found, key: str = "plane_table") -> dict[str, Any]:
    return json.loads((found.folder / "files" / found.summary[f"{key}.path"]).read_text())


class Run:
    """Three epochs with a callback of each kind, one of them under a name."""

    def __init__(self, folder: Path) -> None:
        self.recorder = Recorder()
        self.adadim = AdaDim(window=4 * 32)
        self.named = DimensionMonitor("backbone.1", "projection_head", name="mine")
        self.found = fit_logged(
            folder,
            some_digits(),
            *(self.adadim, self.named, OnlineKNN(k=5), self.recorder, WandbPanels()),
            max_epochs=3,
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("wandb"))


def test_every_value_that_is_logged_has_the_epoch_as_its_axis(run: Run) -> None:
    logged = {key for epoch in run.recorder.logged for key in epoch}
    assert {"dynamics/H_R", "mine/dynamics/H_R", "loss/total", "balance/alpha", "probe/knn_top1"} <= logged
    for key in [*logged, "spectra/R", "mine/spectra/Z", "evaluation/trained_knn_top1"]:
        assert run.found.metrics[key].step_metric == "epoch", key
        if key in logged:
            assert run.found.epochs(key) == [0, 1, 2]
            assert run.found.values(key) == pytest.approx([epoch[key] for epoch in run.recorder.logged])


def test_values_of_others_keep_the_axis_that_lightning_gives_them(run: Run) -> None:
    assert run.found.metrics["*"].step_metric == "trainer/global_step"


def test_the_summary_has_the_best_value_beside_the_last(run: Run) -> None:
    accuracies, losses = (run.found.values(key) for key in ("probe/knn_top1", "loss/total"))
    assert run.found.summary["probe/knn_top1"] == {"max": max(accuracies), "last": accuracies[-1]}
    assert run.found.summary["loss/total"] == {"min": min(losses), "last": losses[-1]}
    assert run.found.summary["dynamics/H_R"] == run.found.values("dynamics/H_R")[-1]


def test_a_histogram_counts_the_eigenvalues_of_its_epoch_by_their_share(run: Run) -> None:
    for monitor, prefix, dims in ((run.adadim, "", (DIM_R, DIM_Z)), (run.named, "mine/", (16, DIM_Z))):
        for which, dim in enumerate(dims):
            key = f"{prefix}spectra/{'RZ'[which]}"
            assert run.found.epochs(f"{key}.values") == [0, 1, 2]
            for epoch in range(3):
                values = np.asarray(run.found.values(f"{key}.values")[epoch])
                edges = np.asarray(run.found.values(f"{key}.bins")[epoch])
                eigenvalues = monitor.spectra[epoch][which + 1].double().numpy()
                shares = np.log10(np.maximum(eigenvalues / eigenvalues.sum(), 1e-9))
                assert values.sum() == dim
                # Each bin holds as many as lie between its edges, but for one that rounding moves over an edge.
                expected = [((low <= shares) & (shares < high)).sum() for low, high in pairwise(edges)]
                assert np.abs(np.cumsum(values - np.asarray(expected))).max() <= 1
                assert (edges[0], edges[-1]) == (-9, 0)


def test_collapsed_dimensions_pile_up_at_the_lower_end() -> None:
    counts, edges = _histogram(torch.tensor([1.0, 1.0, 1e-20, 0.0, 0.0]))
    assert counts[0] == 3
    assert counts[np.searchsorted(edges, np.log10(0.5)) - 1] == 2
    assert counts.sum() == 5
    assert _histogram(torch.zeros(4))[0][0] == 4


def test_the_plane_has_a_row_for_each_epoch(run: Run) -> None:
    found = table(run.found)
    assert found["columns"] == ["epoch", "H_R", "I_RZ", "ER_R", "ER_Z", "alpha", "beta"]
    names = ["dynamics/H_R", "dynamics/I_RZ", "dynamics/ER_R", "dynamics/ER_Z", "balance/alpha", "balance/beta"]
    expected = [[epoch, *(logged[name] for name in names)] for epoch, logged in enumerate(run.recorder.logged)]
    np.testing.assert_allclose(found["data"], expected)
    chart = run.found.config["_wandb.visualize.plane"]
    assert chart["panel_type"] == "Vega2"
    assert chart["panel_config"]["panelDefId"] == "wandb/scatter/v0"
    assert chart["panel_config"]["fieldSettings"] == {"x": "H_R", "y": "I_RZ"}
    assert "plane_table" in json.dumps(chart["panel_config"]["userQuery"])


def test_a_monitor_with_a_name_has_a_plane_of_its_own(run: Run) -> None:
    found = table(run.found, "mine/plane_table")
    assert found["columns"][:3] == ["epoch", "H_R", "I_RZ"]
    mine = [logged["mine/dynamics/H_R"] for logged in run.recorder.logged]
    assert [row[1] for row in found["data"]] == pytest.approx(mine)
    assert mine != pytest.approx([logged["dynamics/H_R"] for logged in run.recorder.logged])


def test_the_views_and_the_dynamics_are_pictures(run: Run) -> None:
    assert_drawn(run.found.folder / "files" / run.found.summary["pictures/dynamics.path"])
    views = imread(run.found.folder / "files" / run.found.values("pictures/views.path")[0])
    assert views.std() > 0.1
    assert run.found.epochs("pictures/views.path") == [0]
    assert run.found.epochs("pictures/dynamics.path") == run.found.epochs("mine/pictures/dynamics.path") == [2]


def test_a_run_with_wandb_is_bit_for_bit_one_without(tmp_path: Path) -> None:
    with_panels, without = tiny_module(), tiny_module()
    torch.manual_seed(1)
    fit(with_panels, some_digits(), AdaDim(), WandbPanels(), logger=offline(tmp_path), max_epochs=2)
    wandb.finish()
    after = torch.rand(1)
    torch.manual_seed(1)
    fit(without, some_digits(), AdaDim(), max_epochs=2)
    assert torch.equal(torch.rand(1), after)
    assert_same_weights(with_panels, without)
    assert len(wandb_runs(tmp_path)[0].values("pictures/views.path")) == 1


def test_a_failed_fit_leaves_the_plane_of_its_whole_epochs(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="disk is full"):
        fit_logged(tmp_path, fixed_batches(2), AdaDim(), WandbPanels(), FailIn(2), max_epochs=4)
    [found] = wandb_runs(tmp_path)
    assert [row[0] for row in table(found)["data"]] == [0, 1]
    assert_drawn(found.folder / "files" / found.summary["pictures/dynamics.path"])


class FinishAndFailIn(FailIn):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.current_epoch == self.epoch:
            wandb.finish()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def test_a_trouble_with_wandb_does_not_hide_why_the_fit_failed(tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="did not take the pictures of the run: .* is finished"),
        pytest.raises(KeyError, match="disk is full"),
    ):
        fit_logged(tmp_path, fixed_batches(2), AdaDim(), WandbPanels(), FinishAndFailIn(1), max_epochs=2)


def test_a_resumed_run_shows_all_its_epochs(tmp_path: Path) -> None:
    first = (DimensionMonitor(), WandbPanels(), every_epoch(tmp_path))
    fit_logged(tmp_path / "1", fixed_batches(2), *first, max_epochs=2)
    again = (DimensionMonitor(), WandbPanels(), every_epoch(tmp_path / "again"))
    found = fit_logged(tmp_path / "2", fixed_batches(2), *again, max_epochs=3, ckpt_path=tmp_path / "1.ckpt")
    assert table(found)["columns"] == ["epoch", "H_R", "I_RZ", "ER_R", "ER_Z"]  # no alpha without AdaDim
    assert [row[0] for row in table(found)["data"]] == [0, 1, 2]


def test_data_of_another_kind_have_no_views(tmp_path: Path) -> None:
    found = fit_logged(tmp_path, (fixed_batches(2), held_out()), DimensionMonitor(), WandbPanels())
    assert not found.values("pictures/views.path")
    assert found.values("spectra/R.values")


def test_without_a_wandb_logger_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(tiny_module(), fixed_batches(2), AdaDim(), WandbPanels(), default_root_dir=tmp_path)
    assert wandb.run is None
    assert list(tmp_path.iterdir()) == []
