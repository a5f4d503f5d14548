"""Sweeps: many runs of one command line, what becomes of them, and how one goes on."""

import csv
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from adadim_lightning.cli.app import config_dir, offer_eval_data
from adadim_lightning.cli.check import hold
from adadim_lightning.cli.sweep import Sweep, job_key
from adadim_lightning.run_folder import DIED, is_running, read_summary, run_folders, run_lock
from tests.callbacks.wandb_files import wandb_runs
from tests.cli.test_train import ONE_STEP, run, summary
from tests.data.pictures import write

QUICK = ONE_STEP


def start(*overrides: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    program = "from adadim_lightning.cli.train import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", program, *overrides],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("option", "count", "axis"),
    [
        ("schedules", 18, "balance"),
        ("gamma", 21, "objective.gamma"),
        ("normalizer", 12, "balance.alpha.normalizer"),
        ("estimator", 36, "objective.order"),
    ],
)
def test_each_sweep_makes_its_jobs_and_every_job_composes(option: str, count: int, axis: str) -> None:
    offer_eval_data()
    parser = OverridesParser.create()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("train", [f"sweep={option}", "run_dir=x"], return_hydra_config=True)
        params = [f"{key}={value}" for key, value in config.hydra.sweeper.params.items()]
        [jobs] = BasicSweeper.split_arguments(parser.parse_overrides(params), None)
        assert len({job_key(job) for job in jobs}) == count
        values = set()
        for job in jobs:
            if "seed=0" in job:
                assert compose("train", job).seed == 0
                values.add(next(override for override in job if override.startswith(axis)))
    assert len(values) > 1


def test_schedules_sweep_fixed_shares_reach_the_objective() -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        alphas = [compose("train", [f"balance=fixed_{x}"]).balance.alpha.value for x in (25, 50, 75)]
    assert alphas == [0.25, 0.5, 0.75]


def test_a_sweep_file_without_multirun_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path / "run", "sweep=gamma") == 1
    assert "adadim-train -m sweep=gamma" in capsys.readouterr().err


def test_job_is_told_by_its_overrides_in_any_order() -> None:
    assert job_key(["seed=1", "objective=simclr", "run_dir=a"]) == job_key(["objective=simclr", "seed=1"])
    assert job_key(["seed=1", "resume=True", "hydra.launcher.n_jobs=2"]) == job_key(["seed=1"])
    assert job_key(["seed=1"]) != job_key(["seed=2"])
    assert job_key(["+trainer.profiler=simple"]) != job_key([])


def fake_runs(folder: Path, *jobs: list[str]) -> None:
    for i, overrides in enumerate(jobs):
        (folder / str(i)).mkdir(parents=True)
        text = json.dumps({"status": "ok", "overrides": overrides, "optimized_metric": "x", "x": i})
        (folder / str(i) / "summary.json").write_text(text)


def sweep_of(folder: Path, *overrides: str) -> Sweep:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("train", [f"run_dir='{folder}'", "resume=true", *overrides], return_hydra_config=True)
    return Sweep(config)


def test_resumed_jobs_keep_their_folders_and_new_ones_get_free_numbers(tmp_path: Path) -> None:
    fake_runs(tmp_path, ["seed=0"], ["seed=1"])
    sweep = sweep_of(tmp_path)
    # The command now has another seed in front: what was job 0 is now job 1.
    placed = [sweep.place([f"seed={seed}"], number) for number, seed in enumerate((7, 0, 1, 8))]
    assert [folder and folder.name for folder, _ in placed] == ["2", "0", "1", "3"]
    assert placed[1][1] == ["seed=0", "hydra.sweep.subdir='0'"]


@pytest.mark.parametrize(
    ("before", "given", "asked", "expected"),
    [
        (["trainer.max_epochs=10"], ["trainer.max_epochs=20"], ["trainer.max_epochs=20"], ["0"]),
        ([], ["trainer.max_epochs=20"], ["trainer.max_epochs=20"], ["0"]),
        (["trainer.max_epochs=10"], [], [], ["0"]),
        (["+trainer.max_steps=10"], ["+trainer.max_steps=20"], ["+trainer.max_steps=20"], ["0"]),
        # Length is what is swept: in this command, or by a file.
        (
            ["trainer.max_epochs=10"],
            ["trainer.max_epochs=10,20,40"],
            ["trainer.max_epochs=20", "trainer.max_epochs=10", "trainer.max_epochs=40"],
            ["1", "0", "2"],
        ),
        (["trainer.max_epochs=10"], [], ["trainer.max_epochs=20"], ["1"]),
        # Anything else makes another job.
        (["head=vicreg"], ["trainer.max_epochs=20"], ["trainer.max_epochs=20"], ["1"]),
    ],
)
def test_sweep_continues_jobs_that_differ_in_length_alone(
    tmp_path: Path, before: list[str], given: list[str], asked: list[str], expected: list[str]
) -> None:
    fake_runs(tmp_path, ["seed=0", *before])
    sweep = sweep_of(tmp_path)
    sweep.given = frozenset(given)  # axes are parsed only in a real multirun
    jobs = [["seed=0", override] for override in asked] or [["seed=0"]]
    placed = [sweep.place(job, number)[0] for number, job in enumerate(jobs)]
    assert [folder and folder.name for folder in placed] == expected


def test_sweep_that_held_several_lengths_starts_another(tmp_path: Path) -> None:
    fake_runs(tmp_path, ["seed=0", "trainer.max_epochs=10"], ["seed=0", "trainer.max_epochs=20"])
    sweep = sweep_of(tmp_path, "trainer.max_epochs=40")
    folders = [sweep.place(["seed=0", f"trainer.max_epochs={n}"], i)[0] for i, n in enumerate((40, 20))]
    assert [folder and folder.name for folder in folders] == ["2", "1"]


def test_sweep_resumed_with_more_epochs_trains_its_jobs_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [x for x in QUICK if "max_epochs" not in x]
    command = ("-m", "seed=0,1", *others, "evaluation=null")
    assert run(monkeypatch, tmp_path, *command, "trainer.max_epochs=1") == 0
    ids = [summary(tmp_path / name)["run_id"] for name in "01"]
    capsys.readouterr()
    assert run(monkeypatch, tmp_path, *command, "trainer.max_epochs=2", "resume=true") == 0
    printed = capsys.readouterr().out
    assert printed.count("trained further: trainer.max_epochs 1 -> 2") == 2
    assert "2 jobs: 2 ok" in printed
    assert [folder.name for folder in run_folders(tmp_path)] == ["0", "1"]
    after = [summary(tmp_path / name) for name in "01"]
    assert [(x["run_id"], x["epochs"]) for x in after] == [(i, 2) for i in ids]
    # Fewer: nothing to do, and the command says so of each.
    assert run(monkeypatch, tmp_path, *command, "trainer.max_epochs=1", "resume=true") == 0
    assert capsys.readouterr().out.count("holds a finished run of 2 epochs: nothing to do") == 2
    assert [summary(tmp_path / name) for name in "01"] == after


def test_folders_that_the_user_names_are_left_to_hydra(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, "hydra.sweep.subdir=${hydra.job.override_dirname}")
    assert sweep.place(["seed=0"], 0) == (None, ["seed=0"])
    (tmp_path / "it's=a").mkdir()
    (tmp_path / "it's=a" / "summary.json").write_text('{"status": "failed", "overrides": ["seed=0"]}')
    folder, overrides = sweep_of(tmp_path, "hydra.sweep.subdir=${hydra.job.override_dirname}").place(["seed=0"], 0)
    assert folder == tmp_path / "it's=a"
    parsed = OverridesParser.create().parse_overrides([overrides[-1]])[0].value()
    assert str(parsed) == "it's=a"


def test_folder_that_holds_runs_is_not_swept_into_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_runs(tmp_path, ["seed=0"])
    before = (tmp_path / "0" / "summary.json").read_text()
    assert run(monkeypatch, tmp_path, "-m", "seed=0,1") == 1
    assert "resume=true goes on with them" in capsys.readouterr().err
    assert (tmp_path / "0" / "summary.json").read_text() == before
    assert not (tmp_path / "1").exists()


def test_resume_needs_a_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from adadim_lightning.cli.train import main

    for arguments in (["resume=true"], ["-m", "seed=0,1", "resume=true"]):
        monkeypatch.setattr(sys, "argv", ["adadim-train", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 1
        assert "resume=true needs run_dir=FOLDER" in capsys.readouterr().err


def test_failed_job_takes_no_other_down_and_resume_reruns_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    for i in range(6):
        write(good / f"{i}.png", i)
    bad.mkdir()
    command = ("-m", "data=folder", f"data.root={bad},{good}", "data.image_size=32", "data.batch_size=4", *QUICK)
    sweep = tmp_path / "sweep"
    assert run(monkeypatch, sweep, *command) == 1
    printed = capsys.readouterr()
    assert "2 jobs: 1 ok, 1 failed" in printed.out
    assert "epochs     each leaves out 2 of 6 images that fill no batch, others each time\n" in printed.out
    assert printed.err.count("adadim-train: error:") == 1
    assert "Error executing job" not in printed.err
    long = [line for line in printed.out.splitlines() if len(line) > 80 and tmp_path.name not in line]
    assert not long
    failed, ok = (summary(sweep / name) for name in "01")
    assert failed["status"] == "failed"
    assert str(bad) in str(failed["error"])
    assert (ok["status"], ok["optimized_metric"]) == ("ok", "dynamics/ER_R")  # no labels
    assert ok["dynamics/ER_R"] > 1  # type: ignore[operator]

    for i in range(6):
        write(bad / f"{i}.png", i)
    assert run(monkeypatch, sweep, *command, "resume=true") == 0
    assert "2 jobs: 2 ok" in capsys.readouterr().out
    assert summary(sweep / "0")["status"] == "ok"
    assert summary(sweep / "0")["run_id"] == failed["run_id"]
    assert summary(sweep / "1") == ok
    assert [folder.name for folder in run_folders(sweep)] == ["0", "1"]


def test_folder_in_use_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_runs(tmp_path, ["seed=0"])
    running = {"status": "running", "overrides": ["seed=0"]}
    (tmp_path / "0" / "summary.json").write_text(json.dumps(running))
    with run_lock(tmp_path / "0"):
        assert read_summary(tmp_path / "0") == running
        assert run(monkeypatch, tmp_path / "0", "resume=true", *QUICK) == 1
        assert "in use by a run" in capsys.readouterr().err
    died = read_summary(tmp_path / "0")
    assert died is not None
    assert (died["status"], died["error"]) == ("failed", DIED)


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_disk_without_locks_tells_a_living_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert not is_running(tmp_path)
    with hold(tmp_path):
        assert is_running(tmp_path)
        with pytest.raises(ValueError, match="is in use"), hold(tmp_path):
            pass
    assert not is_running(tmp_path)


def test_finished_run_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path / "run", "resume=true", *QUICK) == 0  # nothing there yet: it begins
    first = summary(tmp_path / "run")
    assert first["optimized_metric"] == "probe/linear_top1"
    assert run(monkeypatch, tmp_path / "run", "resume=true", *QUICK) == 0
    assert "holds a finished run" in capsys.readouterr().out
    assert summary(tmp_path / "run") == first


@pytest.mark.slow
def test_killed_sweep_goes_on_where_it_was_also_in_wandb(tmp_path: Path) -> None:
    sweep = tmp_path / "runs"
    command = ("-m", f"--config-dir={tmp_path}", "sweep=mine", "trainer.max_epochs=6", f"run_dir={sweep}")
    command += ("logger=wandb", "logger.wandb.mode=offline")
    # A program that starts runs may share its wandb service with them, and that outlives the run that is killed.
    wandb.teardown()
    wandb.setup()
    assert "WANDB_SERVICE" in os.environ
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text(
        "# @package _global_\nhydra: {sweeper: {params: {seed: '0,1'}}}\n"
    )
    process = start(*command)
    wait_for(lambda: (sweep / "1" / "metrics.csv").exists() and len(rows(sweep / "1")) >= 4, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    statuses = [read_summary(folder) for folder in run_folders(sweep)]
    assert [(found["status"], found["error"]) for found in statuses if found] == [("ok", None), ("failed", DIED)]
    before = [summary(sweep / "0"), summary(sweep / "1")]
    written = rows(sweep / "1")

    process = start(*command, "resume=true")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "2 jobs: 2 ok" in output
    assert "resume     " in output
    assert summary(sweep / "0") == before[0]
    after = summary(sweep / "1")
    assert (after["status"], after["epochs"], after["run_id"]) == ("ok", 6, before[1]["run_id"])
    found = rows(sweep / "1")
    # The rows of finished epochs are those from before the kill, and each epoch is there once.
    assert [row["loss/total"] for row in found[:4]] == [row["loss/total"] for row in written[:4]]
    assert [row["epoch"] for row in found if row["loss/total"]] == [str(epoch) for epoch in range(6)]

    # Each job is a run of its own; the killed one has two parts under one id, the first without an end.
    parts = {name: wandb_runs(sweep / name, finished=False) for name in "01"}
    assert {name: [part.exit_code for part in found] for name, found in parts.items()} == {
        "0": [0],
        "1": [None, 0],
    }
    for name, found in parts.items():
        assert {part.folder.name.rpartition("-")[2] for part in found} == {summary(sweep / name)["run_id"]}
        last = found[-1].run
        assert (last.run_id, last.run_group, last.job_type) == (summary(sweep / name)["run_id"], "runs", "mine")
        assert last.display_name == f"seed={name},trainer.max_epochs=6"
    assert parts["1"][-1].epochs("loss/total")[-1] == 5


def workers(parent: int) -> list[int]:
    """Worker processes of joblib below a process."""
    found = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(parent)], capture_output=True, text=True
    )
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "popen_loky" in line]


@pytest.mark.slow
def test_worker_that_dies_ends_a_joblib_sweep_which_can_go_on(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = tmp_path / "sweep"
    command = (
        *("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1,2", "trainer.max_epochs=6"),
        f"run_dir={sweep}",
    )
    process = start(*command)
    wait_for(lambda: all((sweep / name / "checkpoints" / "last.ckpt").exists() for name in "01"), process)
    os.kill(workers(process.pid)[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "adadim-train: error: " in output
    assert "failed" in output
    assert "resume=true" in output
    assert DIED in " ".join(output.split())

    process = start(*command, "resume=true")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert [summary(sweep / name)["epochs"] for name in "012"] == [6, 6, 6]
    assert "3 jobs: 3 ok" in output


def test_checkpoint_that_was_cut_off_is_passed_over_and_no_epoch_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(monkeypatch, folder, "trainer.max_epochs=1") == 0
    found = summary(folder)
    (folder / "summary.json").write_text(json.dumps(found | {"status": "running"}))
    whole = (folder / "checkpoints" / "last.ckpt").read_bytes()
    (folder / "checkpoints" / "epoch=0001-step=000020.ckpt").write_bytes(whole[: len(whole) // 2])
    # And it was cut off before the epoch was logged, whose values are in the checkpoint.
    before = rows(folder)
    lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    (folder / "metrics.csv").write_text("".join(lines[:-1]))
    capsys.readouterr()
    assert run(monkeypatch, folder, "trainer.max_epochs=2", "resume=true") == 0
    output = capsys.readouterr().out
    assert "epoch=0001-step=000020.ckpt cannot be read" in output
    assert "step 10" in output
    assert summary(folder)["epochs"] == 2
    assert [row["epoch"] for row in rows(folder) if row["loss/total"]] == ["0", "1"]
    assert rows(folder)[: len(before)] == before
    assert list(np.load(folder / "spectra.npz")["epoch"]) == [0, 1]
