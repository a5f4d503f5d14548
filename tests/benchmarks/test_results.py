"""The page of results: its figures are those of the JSON files, and what it concludes follows from them."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "benchmarks" / "accuracy"
METRIC = "evaluation/trained_linear_balanced"


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(STUDY))
    return importlib.import_module("results")


def run(
    data: str, arm: str, seed: int, accuracy: float, h: Sequence[float] = (1, 2), i: Sequence[float] = (1, 2)
) -> dict[str, Any]:
    curves = {"step": list(range(1, len(h) + 1)), "dynamics/H_R": list(h), "dynamics/I_RZ": list(i)}
    return {"data": data, "arm": arm, "seed": seed, "values": {METRIC: accuracy}, "curves": curves}


def test_a_gain_is_the_paired_t_interval_over_the_better_baseline(results: Any) -> None:
    draw = np.random.default_rng(0)
    simclr, vicreg, adadim = draw.normal([[0.5], [0.6], [0.62]], 0.02, (3, 7))
    runs = [
        run("retina", arm, seed, value)
        for arm, found in (("simclr", simclr), ("vicreg", vicreg), ("adadim", adadim))
        for seed, value in reversed(list(enumerate(found)))
    ]
    found = results.gain(runs, "retina", "adadim")
    expected = stats.ttest_rel(100 * adadim, 100 * vicreg)
    interval = expected.confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((100 * (adadim - vicreg).mean(), *interval))
    assert results.better_baseline(runs, "retina") == "vicreg"
    assert results.gain(runs, "retina", "vicreg") is None
    assert results.gain(runs, "cifar10", "adadim") is None


def test_the_verdict_counts_what_is_above_and_what_is_sure(results: Any) -> None:
    def data(name: str, gains: Sequence[float]) -> list[dict[str, Any]]:
        baselines = [run(name, arm, seed, 0.5) for arm in ("simclr", "vicreg") for seed in range(len(gains))]
        return baselines + [run(name, "adadim", seed, 0.5 + x) for seed, x in enumerate(gains)]

    sure, maybe, worse = (
        data("cifar10", [0.01, 0.011]),
        data("retina", [0.3, -0.1]),
        data("digits", [-0.01, -0.011]),
    )
    start = "AdaDim as shipped is above the better of SimCLR and VICReg on "
    zero, below = "on 1 of them by an interval that leaves out zero", "and below it on 1 by such an interval."
    most = " The largest gain is 10.0 points, on RetinaMNIST."
    assert results.verdict(sure + maybe) == f"{start}2 of 2 data sets, {zero}.{most}"
    assert results.verdict(sure + maybe + worse) == f"{start}2 of 3 data sets, {zero}, {below}{most}"
    assert results.verdict(worse) == f"{start}0 of 1 data sets, {below}"


def test_the_table_has_the_mean_and_deviation_of_each_arm_and_marks_the_best(results: Any) -> None:
    runs = [run("cifar10", "simclr", seed, x) for seed, x in enumerate((0.4, 0.5))]
    runs += [run("cifar10", "vicreg", seed, x) for seed, x in enumerate((0.3, 0.3))]
    runs += [run("digits", "vicreg", 0, 0.25)]
    lines = results.table(runs).splitlines()
    assert lines[0] == "| | CIFAR-10 | digits |"
    assert lines[2:] == ["| SimCLR | **45.0 ± 7.1** | - |", "| VICReg | 30.0 ± 0.0 | **25.0** |"]


def test_a_claim_holds_where_the_curves_show_it(results: Any) -> None:
    up, flat, down = [1, 2, 3, 4, 5, 6, 7], [1, 4, 5, 5, 5, 5, 5], [7, 6, 5, 4, 3, 2, 1]
    for h, i, holds in ((up, up, True), (up, down, False), (down, up, False)):
        assert results.rise_together([run("digits", "vicreg", 0, 0.5, h, i)], "digits") == holds
    for i, holds in ((flat, True), (down, True), (up, False)):
        assert results.flattens([run("digits", "simclr", 0, 0.5, up, i)], "digits") == holds
    ends = {"simclr": (1, 1), "adadim": (2, 2), "vicreg": (3, 3)}
    for best in ends:
        runs = [run("digits", arm, 0, 0.5 + (arm == best), *([0, x] for x in end)) for arm, end in ends.items()]
        assert results.neither_extreme(runs, "digits") == (best == "adadim")


def test_changes_are_those_of_the_mean_over_seeds(results: Any) -> None:
    curves = [[1.0, 2.0, 4.0, 4.0], [3.0, 4.0, 4.0, 8.0]]
    runs = [run("digits", "vicreg", seed, 0.5, x, x) for seed, x in enumerate(curves)]
    mean = [fmean(x) for x in zip(*curves, strict=True)]  # at steps 1 to 4; a third of them is step 4/3
    found = results.changes(runs, "digits", "vicreg")
    assert found["H_early"] == pytest.approx((mean[1] - mean[0]) / 3)
    assert found["I_late"] == pytest.approx(mean[3] - (mean[1] + 2 * mean[2]) / 3)


def test_a_search_with_another_gamma_is_told(results: Any) -> None:
    then, now = ([run("digits", "adadim", 0, 0.5) | {"objective": {"gamma": x}}] for x in (2.0, 1.0))
    assert "searched with gamma 2, before gamma 1 was chosen" in results._searched_before(then, now)
    assert results._searched_before(now, now) == results._searched_before([], now) == ""


def test_a_piece_gains_what_two_arms_differ_by_that_differ_in_it_alone(results: Any) -> None:
    draw = np.random.default_rng(0)
    with_it, without = draw.normal(0.5, 0.02, (2, 5))
    runs = [run("cifar10", "adadim", seed, x) for seed, x in enumerate(with_it)]
    runs += [run("cifar10", "adadim_gamma_0", seed, x) for seed, x in reversed(list(enumerate(without)))]
    expected = stats.ttest_rel(100 * with_it, 100 * without).confidence_interval(0.95)
    row = next(x for x in results.table_of_pieces(runs).splitlines() if "gamma 1, on that balance" in x)
    numbers = (100 * (with_it - without).mean(), *expected)
    text = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*numbers).replace("-", "\N{MINUS SIGN}")
    assert row.split("|")[2].strip(" *") == text
    assert ("**" in row) == (numbers[1] > 0 or numbers[2] < 0)
    assert results.table_of_pieces(runs).count("| - |") == len(results.PIECES) - 1


def test_budgets_are_compared_each_with_its_own_baselines(results: Any) -> None:
    runs = [
        run("cifar10", arm, seed, accuracy + seed / 100) | {"steps": steps, "batch_size": size}
        for (steps, size), accuracies in {(80, 256): (0.2, 0.3, 0.5), (320, 64): (0.4, 0.3, 0.3)}.items()
        for arm, accuracy in zip(("simclr", "vicreg", "adadim"), accuracies, strict=True)
        for seed in range(2)
    ]
    lines = results.table_of_budgets(runs).splitlines()
    assert lines[0] == "| | 80 steps of 256 images | 320 steps of 64 images |"
    assert lines[2] == "| SimCLR | 20.5 ± 0.7 | 40.5 ± 0.7 |"
    assert lines[-1].count("**") == 4
    assert (
        lines[-1]
        .replace("\N{MINUS SIGN}", "-")
        .endswith("| **+20.0 [+20.0, +20.0]** | **-10.0 [-10.0, -10.0]** |")
    )


def test_every_explored_arm_has_a_name_and_every_piece_two_arms(results: Any) -> None:
    import study

    assert set(results.NAMES) == set(study.ARMS)
    assert {arm for _, *pair in results.PIECES for arm in pair if arm} <= set(study.ARMS)


def test_the_final_runs_are_those_that_were_frozen(results: Any) -> None:
    """Each at the rate that was chosen for it, on the test images, with every arm for every seed."""
    import study
    from omegaconf import OmegaConf

    runs = results.load("final")
    chosen = OmegaConf.load(STUDY / "conf" / "tuned" / "chosen.yaml").tuned
    for x in runs:
        assert x["split"] == "test"
        assert {key: x[key] for key in ("lr", "weight_decay")} == chosen[x["data"]][x["arm"]]
    done = {(x["data"], x["seed"]) for x in runs}
    assert {(x["data"], x["seed"], x["arm"]) for x in runs} == {
        (*y, arm) for y in done for arm in study.FINAL_ARMS
    }
    assert len(runs) == len(done) * len(study.FINAL_ARMS)


def test_the_page_and_the_readme_say_what_the_figures_say(results: Any) -> None:
    text, pictures = results.page()
    assert (ROOT / "docs" / "results.md").read_text() == text
    assert results.verdict(results.load("final")) in " ".join((ROOT / "README.md").read_text().split())
    for name in pictures:
        assert f"images/{name}.png" in text
        assert (ROOT / "docs" / "images" / f"{name}.png").exists()


# On which data sets each claim of the paper about the dynamics holds, in the committed runs.
HOLDS: dict[str, set[str]] = {
    "rise_together": set(),
    "flattens": {"fashion_mnist", "pneumonia", "retina"},
    "neither_extreme": {"cifar10", "fashion_mnist", "pneumonia", "retina"},
}


@pytest.mark.parametrize("claim", HOLDS)
def test_a_claim_about_the_dynamics_holds_where_it_is_said_to(results: Any, claim: str) -> None:
    runs = results.load("explore")
    sets = {x["data"] for x in runs}
    assert sets == {"cifar10", "fashion_mnist", "pneumonia", "retina"}
    assert {data for data in sets if getattr(results, claim)(runs, data)} == HOLDS[claim]
