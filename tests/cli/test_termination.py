"""SIGTERM ends a run in every state."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adadim_lightning.cli.termination import TERMINATED, ends_at_sigterm
from tests.reliability import runs

# The second process never joins the others in its fifth step.
STUCK = """
import time
from adadim_lightning.cli import termination, train
from adadim_lightning.module import AdaDimModule
termination.GRACE_S = 2.0
step = AdaDimModule.training_step
def training_step(self, batch, batch_idx):
    if self.trainer.global_step == 4:
        open(f"stuck{self.trainer.global_rank}", "w").close()
        while self.trainer.global_rank == 1:
            time.sleep(60)
    return step(self, batch, batch_idx)
AdaDimModule.training_step = training_step
if __name__ == "__main__":
    train.main()
"""


@pytest.mark.parametrize("who", ["the first", pytest.param("the second", marks=pytest.mark.slow)])
def test_sigterm_ends_processes_of_which_one_waits_for_another(who: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(STUCK)
    command = [sys.executable, "program.py", *runs.DIGITS, "trainer.devices=2", "trainer.strategy=ddp"]
    with (tmp_path / "said.txt").open("a") as said:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=said, stderr=subprocess.STDOUT)
    while not all((tmp_path / f"stuck{rank}").exists() for rank in (0, 1)):
        assert process.poll() is None, runs.said(tmp_path)
        time.sleep(0.05)
    time.sleep(1)
    (other,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid if who == "the first" else int(other), signal.SIGTERM)
    assert process.wait(20) == TERMINATED, runs.said(tmp_path)
    line = runs.said(tmp_path).strip().splitlines()[-1]
    assert line.startswith("stopped: no reaction to SIGTERM for 2 s, perhaps as it waits for another process; ")
    deadline = time.monotonic() + 10
    while Path(f"/proc/{other}").exists():
        assert time.monotonic() < deadline, "the other process goes on"
        time.sleep(0.05)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("stopped", "interrupted by SIGTERM")
    assert "step=000003" in runs.newest(tmp_path / "run").name


def test_sigterm_outside_of_a_training_ends_the_process_with_its_code() -> None:
    pid = os.fork()
    if not pid:
        try:
            with ends_at_sigterm(lambda: None, lambda: None):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(20)
        except SystemExit as end:
            os._exit(int(end.code or 0))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == TERMINATED


def test_sigterm_leaves_a_process_that_reacts_alone_and_its_handlers_as_they_were(monkeypatch) -> None:
    monkeypatch.setattr("adadim_lightning.cli.termination.GRACE_S", 0.5)
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with ends_at_sigterm(lambda: None, lambda: None):
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 1.5
            while (now := time.monotonic()) < deadline:  # a checkpoint that takes its time
                sum(range(1_000_000))
        assert now
        assert heard == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGTERM, before)
