"""A run that is cut off at any moment and resumed ends as one that was never cut off, to the bit."""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from .runs import DIGITS, differences, newest, said, start

KILLS = 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that was never cut off, and the seconds from its first file to its end."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, *DIGITS)
    seconds = -wait_for_start(folder)
    assert process.wait(300) == 0, said(folder)
    return folder / "run", seconds + time.monotonic()


def wait_for_start(folder: Path) -> float:
    """The moment in which the run begins; imports are behind it then."""
    while not (folder / "run" / "config.yaml").exists():
        time.sleep(0.01)
    return time.monotonic()


def kill_and_resume(folder: Path, after: float) -> None:
    process = start(folder, *DIGITS)
    wait_for_start(folder)
    time.sleep(after)
    process.kill()
    code = process.wait()
    if code == 0:  # it had ended: the machine was busier when the whole run was timed
        shutil.rmtree(folder)
        kill_and_resume(folder, 0.7 * after)
        return
    assert code == -signal.SIGKILL, said(folder)
    assert start(folder, *DIGITS, "resume=true").wait(300) == 0, said(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_run_ends_as_if_it_had_not_been(kill: int, whole: tuple[Path, float], tmp_path: Path) -> None:
    uncut, seconds = whole
    kill_and_resume(tmp_path, random.Random(kill).uniform(0, 0.95 * seconds))
    assert differences(uncut, tmp_path / "run") == []


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_within_five_seconds(whole: tuple[Path, float], tmp_path: Path) -> None:
    uncut, _ = whole
    rare = "callbacks.checkpoint.every_n_steps=null"
    process = start(tmp_path, *DIGITS, rare)
    run = tmp_path / "run"
    while not (run / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.01)
    before, sent = newest(run), time.time()
    time.sleep(0.3)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM, said(tmp_path)
    left = newest(run)
    assert left != before
    assert left.stat().st_mtime - sent < 5
    assert start(tmp_path, *DIGITS, rare, "resume=true").wait(300) == 0, said(tmp_path)
    assert "Traceback" not in said(tmp_path)
    assert [key for key in differences(uncut, run) if "every_n_steps" not in key] == []
