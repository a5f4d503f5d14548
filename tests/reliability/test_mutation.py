"""No change of a formula of ``functional/`` goes unnoticed."""

import re
import subprocess
import sys

import pytest

LEAST = {
    "_numeric": 40,
    "_relations": 80,
    "alpha_req": 40,
    "contrastive": 15,
    "decorrelation": 100,
    "hypersphere": 25,
    "information": 120,
    "lidar": 60,
    "neighbors": 40,
    "spectrum": 60,
}


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("name", LEAST)
def test_every_change_of_a_formula_makes_a_test_fail(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.mutate", name], capture_output=True, text=True, check=False
    )
    print(done.stdout)  # the number of changes of each kind
    summary = re.search(r"(\d+) changes, (\d+) not noticed, \d+ equivalent", done.stdout)
    assert summary, done.stdout + done.stderr
    tried, survivors = map(int, summary.groups())
    assert tried >= LEAST[name]
    assert survivors == 0, done.stdout
    assert done.returncode == 0
