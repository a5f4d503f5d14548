"""Every example runs as a user would run it."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_train_digits_prints_what_it_measured() -> None:
    command = [sys.executable, str(EXAMPLES / "train_digits.py"), "--epochs", "8"]
    # Beside another test worker, two threads on one core would wait for each other.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    values = {line.split()[0]: float(line.split()[1]) for line in output.splitlines()[-4:]}
    assert 0 < values["balance/alpha"] <= 0.9
    assert values["probe/linear_top1"] > 0.8
