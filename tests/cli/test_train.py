"""`adadim-train` from the command line to the run folder, in this process."""

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from omegaconf import OmegaConf

from adadim_lightning.cli.app import config_dir
from adadim_lightning.cli.train import main
from adadim_lightning.run_folder import LOCK

# The picture takes longer than the rest.
PLAIN = "~callbacks.dynamics_plot"
ONE_STEP = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1", PLAIN]
TIMINGS = {"seconds", "run_id", "throughput/images_per_second", "overrides", "config"}


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str) -> int:
    """Run the command as a shell would; its exit code."""
    monkeypatch.setattr(sys, "argv", ["adadim-train", *overrides, f"run_dir={folder}"])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def summary(folder: Path) -> dict[str, object]:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs that the tests below look at."""
    folder = tmp_path_factory.mktemp("run") / "of two epochs"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(monkeypatch, folder, "trainer.max_epochs=2", "seed=3", "balance.every_n_steps=5") == 0
    return folder


def test_run_folder_holds_what_the_contract_promises(two_epochs: Path) -> None:
    config = OmegaConf.load(two_epochs / "config.yaml")
    assert config.seed == 3
    assert config.callbacks.adadim.balance.every_n_steps == 5  # resolved
    assert OmegaConf.load(two_epochs / ".hydra" / "overrides.yaml")[1] == "seed=3"
    assert {path.name for path in (two_epochs / "checkpoints").iterdir()} == {
        "epoch=0000-step=000010.ckpt",
        "epoch=0001-step=000020.ckpt",
        "last.ckpt",
    }
    picture = imread(two_epochs / "dynamics.png")
    assert picture.shape[0] > 600
    assert picture.std() > 0.05
    spectra = np.load(two_epochs / "spectra.npz")
    assert spectra["R"].shape == (2, 128)
    assert spectra["Z"].shape == (2, 128)
    assert list(spectra["epoch"]) == [0, 1]


def test_summary_holds_the_last_value_of_every_log_name(two_epochs: Path) -> None:
    found = summary(two_epochs)
    assert found["status"] == "ok"
    assert found["error"] is None
    assert (found["seed"], found["epochs"], found["optimized_metric"]) == (3, 2, "probe/linear_top1")
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]  # type: ignore[index]
    with (two_epochs / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = set(rows[0]) - {"epoch", "step"}
    assert names == {
        "balance/alpha", "balance/beta",
        "dynamics/H_R", "dynamics/ER_R", "dynamics/ER_Z", "dynamics/I_RZ", "dynamics/log_n",
        "loss/total", "loss/decorrelation", "loss/invariance", "loss/variance", "loss/covariance",
        "loss/uniformity", "loss/information",
        "loss_weighted/decorrelation", "loss_weighted/uniformity", "loss_weighted/information",
        "probe/linear_top1", "probe/knn_top1", "throughput/images_per_second",
    }  # fmt: skip
    for name in names:
        assert found[name] == float([row[name] for row in rows if row[name]][-1])
    # The parts add up to the total, epoch means included.
    weighted = sum(found[f"loss_weighted/{part}"] for part in ("decorrelation", "uniformity", "information"))  # type: ignore[misc]
    assert weighted == pytest.approx(found["loss/total"], rel=1e-5)
    assert found["dynamics/log_n"] == pytest.approx(np.log(256))
    assert found["dynamics/H_R"] == pytest.approx(np.log(found["dynamics/ER_R"]))


def test_metrics_csv_has_each_value_of_each_epoch_once_in_two_rows(two_epochs: Path) -> None:
    with (two_epochs / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "0", "1", "1"]
    for epoch in "01":
        for name in set(rows[0]) - {"epoch", "step"}:
            (row,) = (row for row in rows if row["epoch"] == epoch and row[name])
            probes = {key for key in row if row[key]} - {"epoch", "step"} == {
                "probe/linear_top1",
                "probe/knn_top1",
            }
            assert probes is name.startswith("probe/")


def test_alpha_leaves_its_start_at_the_first_estimate(two_epochs: Path) -> None:
    found = summary(two_epochs)
    assert 0 < found["balance/alpha"] <= 1  # type: ignore[operator]
    assert abs(found["balance/alpha"] - 0.5) > 0.01  # type: ignore[operator]
    assert found["balance/beta"] == pytest.approx(found["balance/alpha"])


def test_checkpoint_is_read_without_running_code(two_epochs: Path) -> None:
    checkpoint = torch.load(two_epochs / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 20
    assert checkpoint["callbacks"]["AdaDim{}"]["balance"]["statistics"]["dim_z"] == 128


def test_same_seed_gives_the_same_figures_bit_for_bit(
    two_epochs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("trainer.max_epochs=2", "balance.every_n_steps=5")
    assert run(monkeypatch, tmp_path / "again", *overrides, "seed=3") == 0
    assert run(monkeypatch, tmp_path / "other", *overrides, "seed=4") == 0
    first, again, other = (
        {key: value for key, value in summary(folder).items() if key not in TIMINGS}
        for folder in (two_epochs, tmp_path / "again", tmp_path / "other")
    )
    assert again == first
    assert other["loss/total"] != first["loss/total"]


def test_closing_report_fits_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    # Other packages import it, and it takes over the messages of the trainer.
    for name in ("lightning.pytorch", "pytorch_lightning"):
        importlib.import_module(name)

    assert run(monkeypatch, tmp_path / "run", *ONE_STEP) == 0
    lines = capsys.readouterr().out.splitlines()
    for word in (
        "epoch 1/1",
        "alpha",
        "ER(Z)",
        "H(R) [nats]",
        "I(R;Z) [nats]",
        "uniformity",
        "images/s",
        "raw pixels",
    ):
        assert any(word in line for line in lines), word
    # Those that name the folder are as long as its path.
    assert max(len(line) for line in lines if tmp_path.name not in line) <= 80


def options(*groups: str) -> list[str]:
    """Every option of the groups, as overrides."""
    return [
        f"{group}={path.stem}"
        for group in groups
        for path in sorted((config_dir() / group).glob("*.yaml"))
        if not path.stem.startswith("_")
    ]


@pytest.mark.parametrize(
    "override",
    [
        *options("objective", "balance", "logger", "experiment"),
        "objective.kappa=match",
        "objective.order=1",
        "balance.lag_epochs=1",
        "~callbacks.knn",
        "~lr_schedule",
    ],
)
def test_every_option_trains_a_step(override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, tmp_path / "run", override, *ONE_STEP) == 0
    found = summary(tmp_path / "run")
    assert found["status"] == "ok"
    assert np.isfinite(found["loss/total"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("override", "alpha", "beta"),
    [("objective=simclr", 1.0, 0.0), ("objective=vicreg", 0.0, 0.0), ("objective=adadim_paper", 0.0, 0.0)],
)
def test_baselines_are_configurations_of_the_same_objective(
    override: str, alpha: float, beta: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, tmp_path / "run", override, *ONE_STEP) == 0
    found = summary(tmp_path / "run")
    assert (found["balance/alpha"], found["balance/beta"]) == (alpha, beta)
    part = "uniformity" if alpha else "decorrelation"
    assert found["loss/total"] == found[f"loss_weighted/{part}"] == found[f"loss/{part}"]


def test_a_balance_on_the_command_line_wins_over_that_of_the_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, tmp_path / "run", "objective=simclr", "balance=step", *ONE_STEP) == 0
    assert summary(tmp_path / "run")["balance/alpha"] == 0.0


def test_wandb_logger_writes_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, tmp_path / "run", "logger=wandb", *ONE_STEP) == 0
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_own_groups_are_found_by_config_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine" / "experiment" / "x.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# @package _global_\nseed: 11\nobjective:\n  gamma: 0.5\n")
    arguments = ["--config-dir", str(tmp_path / "mine"), "experiment=x"]
    assert run(monkeypatch, tmp_path / "run", *arguments, *ONE_STEP) == 0
    found = summary(tmp_path / "run")
    assert found["seed"] == 11
    assert found["config"]["objective"]["gamma"] == 0.5  # type: ignore[index]


def test_a_sweep_gives_each_job_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, tmp_path / "sweep", "-m", "seed=0,1", *ONE_STEP) == 0
    assert [summary(tmp_path / "sweep" / job)["seed"] for job in ("0", "1")] == [0, 1]


BAD_INPUT = {
    "objective.gama=0.5": "objective has no key 'gama'; did you mean 'gamma'?",
    "objectiv=simclr": "did you mean 'objective'?",
    "objective=simclrr": "objective has no option 'simclrr'; did you mean 'simclr'?",
    "trainer.max_epoch=3": "trainer has no key 'max_epoch'; did you mean 'max_epochs'?",
    "objective.gamma=[": "no viable alternative at input '['",
    "data.batch_size=1": "data: batch_size must be an integer >= 2, got 1",
    "data.batch_size=1298": "data: batch_size must not exceed the number of training images, 1297; got 1298",
    "objective.temperature=0": "objective: temperature must be > 0, got 0",
    "objective.alpha=1.5": "objective: alpha must lie in [0, 1], got 1.5",
    "balance.alpha.normalizer=most": 'normalizer must be "dim", "min" or a number > 0, got \'most\'',
    "optimizer.lr=1e30": "a NaN or infinity appeared in R, Z, the loss or its gradient at step 1",
    "+trainer.max_epoch=1": "trainer: there is no key 'max_epoch'; did you mean 'max_epochs'?",
    "+objectiv.gamma=1": "the configuration has no key 'objectiv'; did you mean 'objective'?",
    "foo=1": "seed, show_views, trainer, trust, views; add a new one by +foo=...",
    "data=medmnist/pneumonai": "data/medmnist has no option 'pneumonai'; did you mean 'pneumonia'?",
    "eval_data=medmnist/zzz": "eval_data/medmnist has no option 'zzz'; it has blood, breast, chest, derma, oct, ",
    "seed=x": "seed must be an integer >= 0, got 'x'",
    "trainer.max_epochs=abc": "trainer.max_epochs must be an integer >= 1, got 'abc'",
    "trainer.max_epochs=0": "trainer.max_epochs must be an integer >= 1, got 0",
    "trainer.limit_train_batches=0": "nothing would be trained: trainer.limit_train_batches is 0",
    "trainer.max_time=00:00:00:00": "nothing was trained",
    "+trainer.enable_checkpointing=false": "enable_checkpointing",
    "objective.gamma=foo": "objective: gamma must be a finite number, got 'foo'",
    "objective.halve_variance=maybe": "halve_variance must be true or false, got 'maybe'",
    "balance.spectrum=foo": 'spectrum must be "singular" or "eigen", got \'foo\'',
    "balance.alpha=null": "alpha and beta must be schedules, got None and None",
    "backbone.channels=[]": "backbone: channels must list the width of at least one stage, got []",
    "~objective": "the configuration needs objective, which was removed or null",
    "balance=linear trainer.max_epochs=-1": "needs the length of the training",
}


@pytest.mark.parametrize("override", BAD_INPUT)
def test_bad_input_gets_one_line_that_names_the_cause(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(monkeypatch, tmp_path / "run", "trainer.max_epochs=1", *override.split())
    error = capsys.readouterr().err.strip()
    assert code == 1
    assert error.startswith("adadim-train: error: ")
    assert BAD_INPUT[override] in error
    assert len(error.splitlines()) == 1


def test_unwritable_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert run(monkeypatch, tmp_path / "file" / "run", *ONE_STEP) == 1
    error = capsys.readouterr().err.strip()
    assert error == (
        f"adadim-train: error: cannot use {tmp_path / 'file' / 'run'}: Not a directory; "
        "name another output folder by run_dir=FOLDER"
    )


def test_a_failed_run_writes_its_summary_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The learning rate rises through the warm-up: the first epoch of ten steps is fine, then the weights explode.
    overrides = ("optimizer=sgd", "optimizer.lr=3", "lr_schedule.warmup=0.99", "trainer.max_epochs=40")
    assert run(monkeypatch, tmp_path / "run", *overrides, "objective=vicreg") == 1
    found = summary(tmp_path / "run")
    assert found["status"] == "failed"
    assert "NaN or infinity" in found["error"]  # type: ignore[operator]
    step = int(found["error"].split("at step ")[1].split(";")[0])  # type: ignore[union-attr]
    (last,) = (tmp_path / "run" / "checkpoints").glob("epoch=*.ckpt")
    checkpoint = torch.load(last, weights_only=True)
    assert 10 <= checkpoint["global_step"] <= step
    assert all(bool(torch.isfinite(x).all()) for x in checkpoint["state_dict"].values())


def test_full_error_brings_the_traceback_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="temperature must be > 0"):
        run(monkeypatch, tmp_path / "run", "objective.temperature=0")
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(
    two_epochs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = (
        x for x in two_epochs.iterdir() if x.is_file() and x.name != LOCK
    )  # which is touched when it is taken
    before = {path: path.stat().st_mtime_ns for path in files}
    assert run(monkeypatch, two_epochs, *ONE_STEP) == 1
    assert "holds a run already; resume=true goes on with it" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


def test_trainer_runs_no_code_in_a_checkpoint_that_was_replaced_after_it_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, mark = tmp_path / "replaced.ckpt", tmp_path / "mark"
    torch.save({"state_dict": {}, "callbacks": Code(mark)}, path)
    command = importlib.import_module("adadim_lightning.cli.run")
    monkeypatch.setattr(command, "find_past", lambda *_: command.Past(path))
    assert run(monkeypatch, tmp_path / "run", *ONE_STEP, "resume=true") == 1
    assert "Weights only load failed" in capsys.readouterr().err
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # it would have


CUT = """
from adadim_lightning.callbacks import RunCheckpoints
from adadim_lightning.cli.train import main
from adadim_lightning.run_folder import LOCK

def end_after_second_epoch(checkpoints, trainer, signals):
    if trainer.current_epoch == 1:
        raise SystemExit(5)

RunCheckpoints._hand_on = end_after_second_epoch
main()
"""


def test_the_row_of_an_epoch_that_was_stopped_between_its_checkpoint_and_its_log_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Slurm's signal does it, which ends the run once the checkpoint is there; the trainer logs after that."""
    few = [*ONE_STEP[1:], "trainer.max_epochs=3"]
    assert run(monkeypatch, tmp_path / "whole", *few) == 0
    cut = subprocess.run([sys.executable, "-c", CUT, *few, f"run_dir={tmp_path / 'cut'}"], check=False)
    assert cut.returncode == 130
    assert run(monkeypatch, tmp_path / "cut", *few, "resume=true") == 0
    tables = []
    for name in ("whole", "cut"):
        with (tmp_path / name / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        found = {(row["epoch"], key): text for row in rows for key, text in row.items() if text}
        tables.append({key: text for key, text in found.items() if key[1] not in (*TIMINGS, "step")})
    assert tables[0] == tables[1]
    assert {epoch for epoch, _ in tables[1]} == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# @package _global_\ntrainr:\n  max_epochs: 3\n", "has no key 'trainr'; did you mean 'trainer'?"),
        (
            "# @package _global_\nobjective:\n  gama: 1\n",
            "objective: there is no key 'gama'; did you mean 'gamma'?",
        ),
        ("objective:\n  gamma: 1\n", 'lacks its first line, "# @package _global_"'),
    ],
)
def test_mistakes_in_an_experiment_file_are_named(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine" / "experiment" / "x.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text(text)
    arguments = ["--config-dir", str(tmp_path / "mine"), "experiment=x"]
    assert run(monkeypatch, tmp_path / "run", *arguments, *ONE_STEP) == 1
    assert message in capsys.readouterr().err
    assert summary(tmp_path / "run")["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_interrupted_says_so_and_leaves_a_summary(
    sent: signal.Signals, code: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "adadim_lightning.cli.train", "trainer.max_epochs=5000", "run_dir=run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}

    def heed_interrupts() -> None:  # what a shell starts in the background ignores them
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, cwd=tmp_path, env=environment, preexec_fn=heed_interrupts, **pipes) as process:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "run" / "checkpoints").glob("epoch=*[1-9]-*")) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(sent)
        try:
            error = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == code, error
    assert "everything so far is in run" in error.splitlines()[-1]
    found = summary(tmp_path / "run")
    assert found["status"] == "stopped"
    assert found["epochs"] >= 1  # type: ignore[operator]
    assert (tmp_path / "run" / "dynamics.png").exists()


@pytest.mark.slow
def test_a_run_outlives_the_reader_of_its_output(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "adadim_lightning.cli.train", "trainer.max_epochs=3", "run_dir=run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
    assert process.returncode == 0
    assert summary(tmp_path / "run")["epochs"] == 3


def test_a_finished_run_is_trained_further_where_more_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A schedule follows the length; of a constant rate, a longer run is the shorter one and what follows it. The
    # linear probe keeps a schedule of its own.
    options = [
        "trainer.limit_train_batches=3",
        "trainer.limit_val_batches=1",
        "lr_schedule.final=1",
        "lr_schedule.warmup=0",
        PLAIN,
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(monkeypatch, whole, "trainer.max_epochs=3", *options) == 0
    assert run(monkeypatch, parts, "trainer.max_epochs=2", *options) == 0
    capsys.readouterr()
    for epochs in (1, 2):
        assert run(monkeypatch, parts, f"trainer.max_epochs={epochs}", *options, "resume=true") == 0
        assert (
            "holds a finished run of 2 epochs: nothing to do; a larger trainer.max_epochs"
            in capsys.readouterr().out
        )
    assert run(monkeypatch, parts, "trainer.max_epochs=3", *options, "resume=true") == 0
    assert "a finished run, trained further: trainer.max_epochs 2 -> 3" in capsys.readouterr().out
    found, expected = summary(parts), summary(whole)
    changes = {*TIMINGS, "probe/linear_top1"}
    assert {k: v for k, v in found.items() if k not in changes} == {
        k: v for k, v in expected.items() if k not in changes
    }
    with open(parts / "metrics.csv") as file:
        assert sorted({row["epoch"] for row in csv.DictReader(file)}) == ["0", "1", "2"]
    weights = [
        torch.load(x / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for x in (whole, parts)
    ]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    steps = ["trainer.max_epochs=-1", *options, "resume=true"]
    for limit, said in ((9, "nothing to do"), (12, "trained further: trainer.max_epochs 3 -> -1")):
        assert run(monkeypatch, parts, f"trainer.max_steps={limit}", *steps) == 0
        assert said in capsys.readouterr().out
    assert summary(parts)["epochs"] == 4
