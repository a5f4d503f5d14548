"""Completion in a real bash, installed as the README says."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="no bash")

INSTALL = 'eval "$(adadim-train -sc install=bash)"'
# What bash sets before it calls the function of a command.
ASK = """
ask() {
    COMP_LINE="$1" COMP_POINT=${#1} COMP_WORDS=($1) COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )) COMPREPLY=()
    hydra_bash_completion
    echo "${COMPREPLY[*]}"
}
"""
QUESTIONS = {
    "objective=": "objective=adadim objective=adadim_paper objective=barlow_twins objective=simclr "
    "objective=vicreg",
    "objective=ad": "objective=adadim objective=adadim_paper",
    "balance.al": "balance.alpha.",
    "balance.alpha.norm": "balance.alpha.normalizer=",
    "seed=1 trainer.max_e": "trainer.max_epochs=",
    "-m logger=w": "logger=wandb",
    "data=cifar": "data=cifar10 data=cifar100",
    "eval_data=cif": "eval_data=cifar10 eval_data=cifar100",
    "res": "resume=",
}


def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """What bash offers for each question."""
    assert BASH is not None
    script = "\n".join([INSTALL, ASK, *(f"ask 'adadim-train {question}'" for question in QUESTIONS)])
    done = subprocess.run([BASH, "--norc", "-c", script], env=environment(), capture_output=True, text=True)
    assert done.stderr == ""
    return dict(zip(QUESTIONS, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("question", QUESTIONS)
def test_bash_completes_groups_options_and_keys(answers: dict[str, str], question: str) -> None:
    assert answers[question] == QUESTIONS[question]


def test_the_tab_key_completes_an_option() -> None:
    assert BASH is not None
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [BASH, "--norc", "--noprofile", "-i"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment() | {"TERM": "dumb", "PS1": "$ ", "INPUTRC": "/dev/null"},
        start_new_session=True,
    )
    os.close(slave)
    try:
        os.write(master, f"{INSTALL}; echo rea''dy\n".encode())
        assert "ready" in read_until(master, "ready")
        os.write(master, b"adadim-train objective=sim\t")
        assert "objective=simclr" in read_until(master, "objective=simclr")
    finally:
        process.kill()
        process.wait()
        os.close(master)


def read_until(terminal: int, text: str, seconds: float = 30) -> str:
    """What the terminal shows until a text appears, or the time is up."""
    seen, end = "", time.monotonic() + seconds
    while text not in seen and time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 4096).decode()
    return seen


def test_a_completion_loads_neither_torch_nor_lightning() -> None:
    code = (
        "import sys; sys.argv = ['adadim-train', '-sc', 'query=bash']\n"
        "from adadim_lightning.cli.train import main\n"
        "main()\n"
        "print([name for name in ('torch', 'lightning', 'wandb', 'matplotlib') if name in sys.modules])"
    )
    asked = environment() | {"COMP_LINE": "adadim-train objective=v"}
    done = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["objective=vicreg", "[]"]
