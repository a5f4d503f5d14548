"""Every example runs as a user would run it."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(example: str, *arguments: str) -> dict[str, str]:
    """What an example prints at its end, by name: the lines of a name, two spaces or more, and a value."""
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    # Beside another test worker, two threads on one core would wait for each other.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line.rsplit(maxsplit=1) for line in done.stdout.splitlines()[-10:]]
    return {line[0]: line[1] for line in lines if len(line) == 2}


def numbers(printed: dict[str, str], *names: str) -> list[float]:
    return [float(printed[name]) for name in names]


def test_train_digits_prints_what_it_measured() -> None:
    printed = run("train_digits.py", "--epochs", "8")
    alpha, top1 = numbers(printed, "balance/alpha", "probe/linear_top1")
    assert 0 < alpha <= 0.9
    assert top1 > 0.8


@pytest.mark.slow
def test_drop_in_lightly_weighs_vicreg_beside_the_loss_of_the_model_by_alpha() -> None:
    printed = run("drop_in_lightly.py", "--epochs", "1", "--images", "224", "--batch-size", "4")
    alpha, er_r, er_z = numbers(printed, "balance/alpha", "dynamics/ER_R", "dynamics/ER_Z")
    assert 0 < alpha <= 1
    assert 1 < er_r < 512
    assert 1 < er_z < 128
    native, decorrelation, *weighted, total = numbers(
        printed,
        "loss/native",
        "loss/decorrelation",
        "loss_weighted/native",
        "loss_weighted/decorrelation",
        "loss_weighted/information",
        "loss/total",
    )
    assert total == pytest.approx(sum(weighted), abs=0.003)
    # Alpha is 0.5 in the 50 steps before the first reading, so 6 of 56 steps have the one that is read.
    mean = (50 * 0.5 + 6 * alpha) / 56
    assert weighted[0] == pytest.approx(mean * native, rel=0.1)
    assert 0 < weighted[1] < (1 - mean) * decorrelation  # VICReg is scaled down to NT-Xent


@pytest.mark.slow
def test_drop_in_vicreg_learns_features_that_the_probes_read_without_a_label_in_training() -> None:
    printed = run("drop_in_vicreg.py", "--epochs", "3", "--batch-size", "64")
    alpha, knn, linear = numbers(printed, "balance/alpha", "probe/knn_top1", "probe/linear_top1")
    assert 0 < alpha <= 1
    assert 0.8 < knn <= 1
    assert 0.8 < linear <= 1
    *weighted, total = numbers(
        printed, "loss_weighted/native", "loss_weighted/uniformity", "loss_weighted/information", "loss/total"
    )
    assert total == pytest.approx(sum(weighted), abs=0.003)
    assert weighted[1] > 0


@pytest.mark.slow
def test_drop_in_plain_writes_the_rank_of_z_as_a_share_of_its_dimensions_into_the_model() -> None:
    printed = run("drop_in_plain.py", "--epochs", "3")
    written, logged, er_z = numbers(printed, "alpha of the model", "balance/alpha", "dynamics/ER_Z")
    assert written == logged
    # Of the 84 steps, alpha was read after the first 50, the rank that is printed at the end.
    assert written == pytest.approx(er_z / 64, rel=0.1)
    er_r, h_r = numbers(printed, "dynamics/ER_R", "dynamics/H_R")
    assert h_r == pytest.approx(math.log(er_r), abs=0.001)


@pytest.mark.slow
def test_label_free_checkpointing_keeps_the_epoch_of_the_highest_rank_and_stops_when_it_falls(
    tmp_path: Path,
) -> None:
    printed = run(
        "label_free_checkpointing.py", "--epochs", "12", "--patience", "1", "--folder", str(tmp_path / "run")
    )
    with (tmp_path / "run" / "metrics.csv").open() as file:
        ranks = [float(row["dynamics/ER_R"]) for row in csv.DictReader(file)]
    falls = [epoch for epoch in range(1, len(ranks)) if ranks[epoch] <= max(ranks[:epoch])]
    assert falls == [len(ranks) - 1]
    assert 2 <= len(ranks) < 12
    assert int(printed["epochs trained"]) == len(ranks)

    kept = Path(printed["best checkpoint"])
    assert kept.name == f"epoch={ranks.index(max(ranks))}.ckpt"
    states = torch.load(kept, weights_only=True)["callbacks"]
    [checkpointing] = [state for key, state in states.items() if key.startswith("ModelCheckpoint")]
    assert float(checkpointing["best_model_score"]) == pytest.approx(max(ranks))
    assert float(printed["its effective rank"]) == pytest.approx(max(ranks), abs=0.001)
