"""Sweeps on a real Slurm: their jobs are pre-empted, run out of time, and still end well."""

import csv
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .cluster import GRACE_S, Cluster, wait_until

PATIENCE_S = 240  # imports alone take up to 20 s on a busy machine
BRIEF = (
    "hydra/launcher=slurm",
    "hydra.launcher.partition=low",
    "hydra.launcher.gpus_per_node=null",
    "trainer.accelerator=cpu",
    "trainer.limit_train_batches=1",
    "data.batch_size=32",
    "~callbacks.dynamics_plot",
)


@contextmanager
def sweep(cluster: Cluster, folder: Path, epochs: int, *overrides: str) -> Iterator["subprocess.Popen[str]"]:
    """``adadim-train -m`` in a folder, ended with the test."""
    command = [
        sys.executable,
        "-m",
        "adadim_lightning.cli.train",
        "-m",
        *BRIEF,
        f"trainer.max_epochs={epochs}",
        *overrides,
    ]
    with (folder / "sweep.out").open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=cluster.environment, stdout=output, stderr=subprocess.STDOUT, text=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for job in cluster.jobs():
            cluster.call("scancel", job)


def wait_for_checkpoints(process: "subprocess.Popen[str]", folder: Path, count: int) -> dict[int, Path]:
    """The run folders of the sweep below a folder, by number of their jobs, once all have a checkpoint."""

    def found() -> dict[int, Path]:
        runs = [path.parents[1] for path in folder.glob("outputs/*/*/*/checkpoints/last.ckpt")]
        return {int(run.name): run for run in runs}

    wait_until(lambda: len(found()) == count or process.poll() is not None, PATIENCE_S)
    assert process.poll() is None, output(folder)
    return found()


def restarts(cluster: Cluster, jobs: dict[int, str]) -> dict[int, int]:
    """How often each job was started again."""
    return {number: int(cluster.describe(job)["Restarts"]) for number, job in jobs.items()}


def epochs_logged(run: Path) -> list[int]:
    """The epoch of each row with a loss."""
    with (run / "metrics.csv").open(newline="") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file) if row["loss/total"]]


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def assert_finished(run: Path, epochs: int) -> None:
    """A run ended well, and has each of its epochs once."""
    found = summary(run)
    assert (found["status"], found["error"], found["epochs"]) == ("ok", None, epochs)
    assert epochs_logged(run) == list(range(epochs))


def output(folder: Path) -> str:
    """What the sweep and its jobs said, for a test that fails."""
    paths = (folder / "sweep.out", *folder.rglob("*_log.*"))
    return "\n".join(f"--- {path}\n{path.read_text()}" for path in paths)


@pytest.mark.slow
def test_preempted_job_of_a_sweep_resumes_and_the_other_is_left_alone(cluster: Cluster, tmp_path: Path) -> None:
    epochs = 80
    with sweep(cluster, tmp_path, epochs, "objective=simclr,vicreg", "hydra.launcher.cpus_per_task=1") as process:
        runs = wait_for_checkpoints(process, tmp_path, 2)
        before = {number: summary(run)["run_id"] for number, run in runs.items()}
        jobs = {number: next(job for job in cluster.jobs() if job.endswith(f"_{number}")) for number in runs}

        cluster.submit(f"sleep {GRACE_S}", "--partition=high")
        wait_until(lambda: any(restarts(cluster, jobs).values()) or process.poll() is not None, 60)
        assert process.poll() is None, output(tmp_path)
        victim = max(jobs, key=restarts(cluster, jobs).__getitem__)
        left = epochs_logged(runs[victim])

        assert process.wait(PATIENCE_S) == 0, output(tmp_path)
        assert restarts(cluster, jobs) == {victim: 1, 1 - victim: 0}
    assert 1 <= len(left) < epochs
    assert {number: summary(run)["run_id"] for number, run in runs.items()} == before
    for run in runs.values():
        assert_finished(run, epochs)
    resumed = [path.name for path in tmp_path.rglob("*_log.out") if "\nresume " in path.read_text()]
    assert resumed == [f"{jobs[victim]}_0_log.out"]


@pytest.mark.slow
def test_job_whose_time_is_up_is_requeued_and_goes_on_with_all_its_cores(cluster: Cluster, tmp_path: Path) -> None:
    epochs = 30
    with sweep(cluster, tmp_path, epochs, "hydra.launcher.cpus_per_task=2") as process:
        run = wait_for_checkpoints(process, tmp_path, 1)[0]
        before = summary(run)["run_id"]
        (job,) = cluster.jobs()
        assert "CPUs=2" in cluster.call("scontrol", "show", "step", f"{job}.0").split()

        # What Slurm sends a job when little of its time is left.
        cluster.call("scancel", "--signal=USR2", job)
        assert process.wait(PATIENCE_S) == 0, output(tmp_path)
        assert restarts(cluster, {0: job}) == {0: 1}
    assert summary(run)["run_id"] == before
    assert_finished(run, epochs)


@pytest.mark.slow
def test_job_without_submitit_is_requeued_at_usr1_and_goes_on_after_its_last_step(
    cluster: Cluster, tmp_path: Path
) -> None:
    run, log, steps_per_epoch, epochs = tmp_path / "run", tmp_path / "log.txt", 81, 4
    train = f"srun {sys.executable} -m adadim_lightning.cli.train run_dir={run} data.batch_size=16"
    job = cluster.submit(
        f"{train} trainer.accelerator=cpu trainer.max_epochs={epochs} ~callbacks.dynamics_plot",
        *("--partition=low", "--cpus-per-task=2", "--requeue", "--open-mode=append", f"--output={log}"),
    )
    try:
        wait_until((run / "checkpoints" / "last.ckpt").exists, PATIENCE_S)
        time.sleep(0.5)
        cluster.call("scancel", "--signal=USR1", job)
        wait_until(lambda: restarts(cluster, {0: job}) == {0: 1}, 60)
        wait_until(lambda: job not in cluster.jobs(), PATIENCE_S)
    finally:
        if job in cluster.jobs():
            cluster.call("scancel", job)
    assert_finished(run, epochs)
    step = int(log.read_text().partition("\nresume ")[2].splitlines()[0].rpartition("step ")[2])
    assert step % steps_per_epoch
    assert "Traceback" not in log.read_text()
