"""The page of results: its figures are those of the JSON files, and what it concludes follows from them."""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import results
import study
import study_data
from omegaconf import OmegaConf
from scipy import stats

from tests.benchmarks.test_accuracy_study import composed, real_data
from tests.data.pictures import DATASETS

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "benchmarks" / "accuracy"
METRIC = "evaluation/trained_linear_balanced"


def run(
    data: str, arm: str, seed: int, accuracy: float, h: Sequence[float] = (1, 2), i: Sequence[float] = (1, 2)
) -> dict[str, Any]:
    curves = {"step": list(range(1, len(h) + 1)), "dynamics/H_R": list(h), "dynamics/I_RZ": list(i)}
    return {
        "data": data,
        "arm": arm,
        "seed": seed,
        "values": dict.fromkeys(results.FIGURES, accuracy),
        "curves": curves,
    }


def test_a_gain_is_the_paired_t_interval_over_the_better_baseline() -> None:
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


def pair(data: str, gains: Sequence[float], arm: str = "adadim") -> list[dict[str, Any]]:
    """An arm and two baselines that are alike."""
    baselines = [run(data, name, seed, 0.5) for name in ("simclr", "vicreg") for seed in range(len(gains))]
    return baselines + [run(data, arm, seed, 0.5 + x) for seed, x in enumerate(gains)]


def test_the_verdict_says_where_it_is_ahead_and_where_behind_and_where_nobody_knows() -> None:
    sure, surer = pair("cifar10", [0.01, 0.011]), pair("fashion_mnist", [0.02, 0.021])
    maybe, worse = pair("retina", [0.3, -0.1]), pair("digits", [-0.01, -0.011])
    ahead, behind = "ahead on CIFAR-10 (+1.05)", "behind on digits (\N{MINUS SIGN}1.05)"
    unclear = "no clear difference on RetinaMNIST"
    for runs, words in (
        (sure, ahead),
        (sure + surer, "ahead on Fashion-MNIST (+2.05) and CIFAR-10 (+1.05)"),
        (maybe, unclear),
        (sure + maybe + worse, f"{ahead}; {behind}; {unclear}"),
        (worse, behind),
    ):
        assert results.verdict(runs) == f"AdaDim as shipped against the better of SimCLR and VICReg: {words}."


def budget(runs: Sequence[dict[str, Any]], steps: int, size: int) -> list[dict[str, Any]]:
    return [x | {"steps": steps, "batch_size": size} for x in runs]


def test_the_findings_compare_with_a_fixed_alpha_and_the_paper_and_other_budgets() -> None:
    final = pair("cifar10", [0.01, 0.011])
    final += [run("cifar10", "fixed_50", seed, 0.52 + seed / 1000) for seed in range(2)]
    final += [run("cifar10", "adadim_paper", seed, 0.5 + (-1) ** seed / 100) for seed in range(2)]
    short = budget(pair("cifar10", [-0.02, -0.021]), 80, 256)
    found = results.findings(final, budget(pair("cifar10", [0.02, 0.021]), 320, 256), short)
    assert found[0] == results.verdict(final)
    minus = "\N{MINUS SIGN}"
    assert found[2] == f"Against fixed alpha 0.5, the simplest mixture: behind on CIFAR-10 ({minus}1.00)."
    assert found[3].endswith("the better of SimCLR and VICReg: no clear difference on CIFAR-10.")
    assert found[-1].endswith(
        f"ahead with 320 steps of 256 images (+2.05); behind with 80 steps of 256 images ({minus}2.05)."
    )


def test_a_correction_for_the_number_of_data_sets_is_holms() -> None:
    draw = np.random.default_rng(0)
    runs, p_values = [], {}
    for data, mean in {"cifar10": 0.012, "retina": 0.03, "digits": 0.005, "pneumonia": 0.0}.items():
        gains = draw.normal(mean, 0.01, 8)
        runs += pair(data, gains)
        p_values[data] = stats.ttest_1samp(gains, 0).pvalue
    ordered = sorted(p_values, key=p_values.__getitem__)
    adjusted = np.maximum.accumulate([(4 - i) * p_values[data] for i, data in enumerate(ordered)])
    ahead = [results.DATA[data] for data, p in zip(ordered, adjusted, strict=True) if p <= 0.05]
    assert 0 < len(ahead) < sum(p <= 0.05 for p in p_values.values())  # the correction takes one away
    assert results.corrected(runs) == ahead


def test_the_table_has_the_mean_and_deviation_of_each_arm_and_marks_the_best() -> None:
    runs = [run("cifar10", "simclr", seed, x) for seed, x in enumerate((0.4, 0.5))]
    runs += [run("cifar10", "vicreg", seed, x) for seed, x in enumerate((0.3, 0.3))]
    runs += [run("digits", "vicreg", 0, 0.25)]
    lines = results.table(runs).splitlines()
    assert lines[0] == "| | CIFAR-10 | digits |"
    assert lines[2:] == ["| SimCLR | **45.0 ± 7.1** | - |", "| VICReg | 30.0 ± 0.0 | **25.0** |"]
    runs += [run("cifar10", arm, seed, 0.45 + seed / 100) for arm in ("adadim", "fixed_50") for seed in range(2)]
    lines = results.table(runs).splitlines()
    assert lines[4].startswith("| fixed alpha 0.5 | **45.5 ± 0.7** |")
    assert lines[5].startswith("| AdaDim, shipped | **45.5 ± 0.7** |")  # who is level is bold too
    assert "+0.50 [" in lines[6]
    assert "] over SimCLR | - |" in lines[6]
    assert lines[7].startswith("| gain of AdaDim over fixed alpha 0.5 | +0.00 [+0.00, +0.00] |")


def test_runs_of_two_kinds_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    (tmp_path / "accuracy").mkdir()
    kind = {
        "split": "test",
        "steps": 320,
        "batch_size": 256,
        "lr": 0.1,
        "objective": {},
        "balance": {},
        "device": "a",
    }
    runs = [run("digits", "adadim", seed, 0.5) | kind for seed in range(2)]
    file = tmp_path / "accuracy" / "final.json"
    file.write_text(json.dumps({"runs": runs}))
    assert results.load("final") == runs
    for other in ({"steps": 4}, {"objective": {"gamma": 2}}, {"device": "b"}):
        file.write_text(json.dumps({"runs": [*runs, runs[0] | other]}))
        with pytest.raises(ValueError, match="2 kinds of adadim on digits"):
            results.load("final")


def test_a_claim_holds_where_the_curves_show_it() -> None:
    up, flat, down = [1, 2, 3, 4, 5, 6, 7], [1, 4, 5, 5, 5, 5, 5], [7, 6, 5, 4, 3, 2, 1]
    for h, i, holds in ((up, up, True), (up, down, False), (down, up, False)):
        assert results.rise_together([run("digits", "vicreg", 0, 0.5, h, i)], "digits") == holds
    for i, holds in ((flat, True), (down, True), (up, False)):
        assert results.flattens([run("digits", "simclr", 0, 0.5, up, i)], "digits") == holds
    ends = {"linear": (1, 1), "simclr": (2, 2), "adadim": (3, 3), "vicreg": (4, 4)}
    for best in ends:
        runs = [run("digits", arm, 0, 0.5 + (arm == best), *([0, x] for x in end)) for arm, end in ends.items()]
        assert results.ranking(runs, "digits")[0] == best
        assert results.neither_extreme(runs, "digits") == (best == "adadim")


def test_alpha_is_looked_at_after_the_first_reading() -> None:
    curves = {"step": [32, 64, 96], "balance/alpha": [0.5, 0.3, 0.25]}
    runs = [{"arm": "adadim", "curves": curves, "balance": {"every_n_steps": 50}}]
    assert results.alphas([*runs, {"arm": "simclr"}]) == [0.3, 0.25]


def test_changes_are_those_of_the_mean_over_seeds() -> None:
    curves = [[1.0, 2.0, 4.0, 4.0], [3.0, 4.0, 4.0, 8.0]]
    runs = [run("digits", "vicreg", seed, 0.5, x, x) for seed, x in enumerate(curves)]
    mean = [fmean(x) for x in zip(*curves, strict=True)]  # at steps 1 to 4; a third of them is step 4/3
    found = results.changes(runs, "digits", "vicreg")
    assert found["H_early"] == pytest.approx((mean[1] - mean[0]) / 3)
    assert found["I_late"] == pytest.approx(mean[3] - (mean[1] + 2 * mean[2]) / 3)


def test_a_search_with_another_gamma_is_told() -> None:
    then, now = ([run("digits", "adadim", 0, 0.5) | {"objective": {"gamma": x}}] for x in (2.0, 1.0))
    assert "searched with gamma 2, before gamma 1 was chosen" in results._searched_before(then, now)
    assert results._searched_before(now, now) == results._searched_before([], now) == ""


def test_a_piece_gains_what_its_two_arms_differ_by() -> None:
    draw = np.random.default_rng(0)
    with_it, without = draw.normal(0.5, 0.02, (2, 5))
    runs = [run("cifar10", "adadim", seed, x) for seed, x in enumerate(with_it)]
    runs += [run("cifar10", "adadim_gamma_0", seed, x) for seed, x in reversed(list(enumerate(without)))]
    expected = stats.ttest_rel(100 * with_it, 100 * without).confidence_interval(0.95)
    row = next(x for x in results.table_of_pieces(runs).splitlines() if "gamma 1, on the balance" in x)
    numbers = (100 * (with_it - without).mean(), *expected)
    text = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*numbers).replace("-", "\N{MINUS SIGN}")
    assert row.split("|")[2].strip(" *") == text
    assert ("**" in row) == (numbers[1] > 0 or numbers[2] < 0) == bool(results.sure_pieces(runs))
    assert results.table_of_pieces(runs).count("| - |") == len(results.PIECES) - 1
    apart = [x | {"values": {METRIC: x["values"][METRIC] + (x["arm"] == "adadim")}} for x in runs]
    assert results.sure_pieces(apart) == [results.PIECES[0][0]]


def test_budgets_are_compared_each_with_its_own_baselines() -> None:
    runs = [
        x
        for (steps, size), accuracies in {(320, 64): (0.4, 0.3, 0.3), (80, 256): (0.2, 0.3, 0.5)}.items()
        for arm, accuracy in zip(("simclr", "vicreg", "adadim"), accuracies, strict=True)
        for seed in range(2)
        for x in budget([run("cifar10", arm, seed, accuracy + seed / 100)], steps, size)
    ]
    explored = budget([run("cifar10", arm, 0, 0.6) for arm in ("linear", "simclr")], 320, 256)
    lines = results.table_of_budgets(results.by_budget(explored, runs)).splitlines()
    assert lines[0] == "| | 80 steps of 256 images | 320 steps of 64 images | 320 steps of 256 images |"
    assert [line.split(" |")[0] for line in lines[2:5]] == ["| SimCLR", "| VICReg", "| AdaDim, shipped"]
    assert lines[2] == "| SimCLR | 20.5 ± 0.7 | 40.5 ± 0.7 | 60.0 |"
    minus = "\N{MINUS SIGN}10.00"
    assert lines[-1].endswith(f"| **+20.00 [+20.00, +20.00]** | **{minus} [{minus}, {minus}]** | - |")


ALPHA, RANK = {"balance.alpha"}, {"balance.ema", "balance.every_n_steps", "balance.views", "balance.window"}
DIFFER = [
    {"objective.gamma"},
    {"objective.gamma"},
    {"objective.gamma", "balance.beta"},  # with alpha 0, beta has to be phased in by something else
    ALPHA,
    ALPHA,
    ALPHA,
    {"objective.kappa", "objective.information_floor"},
    RANK,
    ALPHA,  # the normalizer is one of the schedule
    {"balance.lag_epochs"},
    {"objective.order"},
    {"objective.gamma"},
    {"objective.decorrelation"},
]


@pytest.mark.parametrize(
    ("piece", "keys"), zip(results.PIECES, DIFFER, strict=True), ids=[name for name, *_ in results.PIECES]
)
def test_the_arms_of_a_piece_differ_in_what_is_said(piece: tuple[str, str, str], keys: set[str]) -> None:
    _, *arms = piece
    # alpha=0.5 of the objective is where a schedule begins, and is not read where that is fixed
    ours, theirs = (
        {
            f"{group}.{key}": value
            for group in ("objective", "balance")
            for key, value in OmegaConf.to_container(OmegaConf.create(composed(arm)), resolve=True)[group].items()
        }
        for arm in arms
    )
    assert {key for key in ours | theirs if ours.get(key) != theirs.get(key)} == keys


def test_every_explored_arm_has_a_name() -> None:
    assert set(results.NAMES) == set(study.ARMS)


def test_the_final_runs_are_those_that_were_frozen() -> None:
    """Each at the rate that was chosen for it, on the test images, with every arm for every seed."""
    runs = results.load("final")
    chosen = OmegaConf.load(STUDY / "conf" / "tuned" / "chosen.yaml").tuned
    for x in runs:
        assert x["split"] == "test"
        assert {key: x[key] for key in ("lr", "weight_decay")} == chosen[x["data"]][x["arm"]]
    wanted = itertools.product(study.LARGE + study.SMALL, range(10), study.FINAL_ARMS)
    assert Counter((x["data"], x["seed"], x["arm"]) for x in runs) == Counter(wanted)


@pytest.mark.parametrize("stage", ["explore", "final", "budgets"])
def test_the_committed_runs_are_of_what_the_configuration_says_today(stage: str) -> None:
    for x in results.load(stage):
        config = OmegaConf.to_container(composed(x["arm"], f"study_{x['data']}"), resolve=True)
        objective = {key: value for key, value in config["objective"].items() if key != "_target_"}
        assert (x["arm"], x["objective"]) == (x["arm"], objective)
        assert (x["arm"], x["balance"]) == (x["arm"], study._plain(config["balance"]))
        assert {key: x[key] for key in ("lr", "weight_decay")} == {
            key: config["optimizer"][key] for key in ("lr", "weight_decay")
        }


@real_data
def test_a_constant_answer_gets_what_is_said() -> None:
    options = {"channels": 1, "image_size": 16, "root": str(DATASETS / "medmnist")}
    for name, share in results.CONSTANT.items():
        views = study_data._unused(1)["views"]
        labels = study_data.study(name, split="test", views=views, batch_size=256, **options).test.labels
        most = max(Counter(labels.flatten().tolist()).values())
        assert share == pytest.approx(100 * most / len(labels), abs=0.05)


def test_runs_that_were_trained_again_are_the_same() -> None:
    again, final = ({(x["data"], x["arm"], x["seed"]): x for x in results.load(x)} for x in ("repeated", "final"))
    assert {(data, seed) for data, arm, seed in again} == set(itertools.product(study.LARGE + study.SMALL, (0, 1)))
    assert all(x["values"] == final[key]["values"] for key, x in again.items())


def test_the_page_and_the_readme_say_what_the_figures_say() -> None:
    text, pictures = results.page()
    assert (ROOT / "docs" / "results.md").read_text() == text
    readme = " ".join((ROOT / "README.md").read_text().split())
    for finding in results.findings(*map(results.load, ("final", "explore", "budgets"))):
        assert finding in readme
    cost = json.loads((ROOT / "benchmarks" / "results" / "cost.json").read_text())["race"]["mlp"]["arms"]["vicreg"]
    low, high = (f"{100 * cost[x]:.1f}".replace("-", "\N{MINUS SIGN}") for x in ("low", "high"))
    assert f"{100 * cost['overhead']:.1f} % longer (95 % interval {low} to {high} %)" in readme
    for name in pictures:
        assert f"images/{name}.png" in text
        assert (ROOT / "docs" / "images" / f"{name}.png").exists()


# On which data sets each claim of the paper about the dynamics holds, in the committed runs.
HOLDS: dict[str, set[str]] = {
    "rise_together": set(),
    "flattens": {"fashion_mnist", "pneumonia", "retina"},
    "neither_extreme": {"cifar10", "fashion_mnist", "retina"},
}


@pytest.mark.parametrize("claim", HOLDS)
def test_a_claim_about_the_dynamics_holds_where_it_is_said_to(claim: str) -> None:
    runs = results.load("explore")
    sets = {x["data"] for x in runs}
    assert sets == {"cifar10", "fashion_mnist", "pneumonia", "retina"}
    assert {data for data in sets if getattr(results, claim)(runs, data)} == HOLDS[claim]
