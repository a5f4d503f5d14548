"""A search by Optuna that is killed, and goes on to the number of trials that was asked for."""

import signal
from pathlib import Path

import pytest

from adadim_lightning.run_folder import run_folders
from tests.cli.test_sweep import start, summary, wait_for

optuna = pytest.importorskip("optuna", reason="the extra optuna is not installed")
pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra optuna is not installed")


def test_killed_study_ends_with_the_trials_that_were_asked_for(tmp_path: Path) -> None:
    command = (
        *("-m", "sweep=optuna", "hydra.sweeper.n_trials=5", "trainer.max_epochs=2", "~callbacks.dynamics_plot"),
        f"run_dir={tmp_path}",
    )
    for killed in (2, 3):  # twice, in the middle of a trial each time
        process = start(*command, *(["resume=true"] if killed > 2 else []))
        wait_for((tmp_path / str(killed) / "checkpoints" / "last.ckpt").exists, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = start(*command, "resume=true")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output

    study = optuna.load_study(study_name="adadim", storage=f"sqlite:///{tmp_path}/study.db")
    complete = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    assert len(complete) == 5
    assert not study.get_trials(states=[optuna.trial.TrialState.RUNNING])
    # Each is another proposal, has a folder, and its value is that run's.
    assert len({tuple(trial.params.values()) for trial in complete}) == 5
    folders = {tuple(summary(folder)["overrides"][:3]): folder for folder in run_folders(tmp_path)}  # type: ignore[index]
    assert len(folders) == 5
    for trial in complete:
        found = summary(folders[tuple(f"{key}={value}" for key, value in trial.params.items())])
        assert found["status"] == "ok"
        assert found["probe/linear_top1"] == trial.value
    assert "5 jobs: 5 ok" in output


def test_failed_trial_takes_no_other_down(tmp_path: Path) -> None:
    process = start(
        *("-m", "sweep=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.params=null"),
        *("optimizer.lr=choice(0.001,-1)", "hydra/sweeper/sampler=grid"),
        *("trainer.max_epochs=1", "~callbacks.dynamics_plot", f"run_dir={tmp_path}"),
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert sorted(str(summary(folder)["status"]) for folder in run_folders(tmp_path)) == ["failed", "ok"]
    assert "2 jobs: 1 ok, 1 failed" in output
