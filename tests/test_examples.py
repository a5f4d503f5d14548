"""Every example runs as a user would run it."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_train_digits_prints_what_it_measured() -> None:
    command = [sys.executable, str(EXAMPLES / "train_digits.py"), "--epochs", "8"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    values = {line.split()[0]: float(line.split()[1]) for line in output.splitlines()[-4:]}
    assert 0 < values["balance/alpha"] <= 0.9
    assert values["probe/linear_top1"] > 0.8
