"""Writes docs/results.md and its pictures from the JSON files of benchmarks/results; no number in it is typed.

Run it by ``uv run python benchmarks/accuracy/results.py``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from adadim_lightning.report.dynamics import BLUE, GREY, ORANGE
from adadim_lightning.report.statistics import Difference, digits, paired_difference, spread
from adadim_lightning.report.style import style_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"

Run = Mapping[str, Any]

BALANCED = "evaluation/trained_linear_balanced"
FIGURES = {
    BALANCED: "linear probe",
    "evaluation/trained_knn_top1": "kNN, k = 20",
    "evaluation/trained_few_shot_10pct_top1": "10 % of the labels",
    "evaluation/trained_few_shot_1pct_top1": "1 % of the labels",
}
DATA = {
    "cifar10": "CIFAR-10",
    "fashion_mnist": "Fashion-MNIST",
    "pneumonia": "PneumoniaMNIST",
    "retina": "RetinaMNIST",
    "digits": "digits",
}
BASELINES = ("simclr", "vicreg")
SHIPPED = "adadim"
NAMES = {
    "simclr": "SimCLR",
    "vicreg": "VICReg",
    "barlow_twins": "Barlow Twins",
    "fixed_25": "fixed alpha 0.25",
    "fixed_50": "fixed alpha 0.5",
    "fixed_75": "fixed alpha 0.75",
    "linear": "linear schedule",
    "cosine": "cosine schedule",
    "adadim": "**AdaDim, shipped**",
    "adadim_paper": "AdaDim, the paper's form",
}


def load(stage: str) -> list[Run]:
    """Runs of a stage; none where it has not run."""
    path = RESULTS / "accuracy" / f"{stage}.json"
    return json.loads(path.read_text())["runs"] if path.exists() else []


def values(runs: Sequence[Run], data: str, arm: str, metric: str = BALANCED) -> list[tuple[int | None, float]]:
    """Seed and accuracy in per cent of each run of an arm."""
    return [(x["seed"], 100 * x["values"][metric]) for x in runs if x["data"] == data and x["arm"] == arm]


def better_baseline(runs: Sequence[Run], data: str, metric: str = BALANCED) -> str | None:
    """SimCLR or VICReg, whichever has the higher mean."""
    means = {arm: fmean(x for _, x in found) for arm in BASELINES if (found := values(runs, data, arm, metric))}
    return max(means, key=means.__getitem__) if len(means) == len(BASELINES) else None


def gain(runs: Sequence[Run], data: str, arm: str, metric: str = BALANCED) -> Difference | None:
    """Points over the better baseline, paired by seed, with the 95 % interval."""
    baseline = better_baseline(runs, data, metric)
    if baseline is None:
        return None
    return paired_difference(values(runs, data, arm, metric), values(runs, data, baseline, metric))


def _present(runs: Sequence[Run], key: str, order: Sequence[str] = ()) -> list[str]:
    found = {x[key] for x in runs}
    return [x for x in order if x in found] + sorted(found - set(order))


def _name(arm: str) -> str:
    return NAMES.get(arm, f"`{arm}`")


def _score(runs: Sequence[Run], data: str, arm: str, metric: str) -> str:
    found = spread([x for _, x in values(runs, data, arm, metric)])
    if found is None:
        return "-"
    return f"{found.mean:.1f}" + ("" if found.sd is None else f" ± {found.sd:.1f}")


def _gain(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    low, high = (digits(x, decimals=1, sign=True) for x in (difference.low, difference.high))
    text = f"{digits(difference.mean, decimals=1, sign=True)} [{low}, {high}]"
    return f"**{text}**" if difference.low > 0 else text


def table(runs: Sequence[Run], metric: str = BALANCED) -> str:
    """Arms by data sets, the best mean of each in bold, and what the shipped form gains."""
    sets, arms = _present(runs, "data", list(DATA)), _present(runs, "arm", list(NAMES))
    lines = ["| | " + " | ".join(DATA[x] for x in sets) + " |", "| --- |" + " --- |" * len(sets)]
    best = {
        data: max(arms, key=lambda arm: fmean([x for _, x in values(runs, data, arm, metric)] or [-1.0]))
        for data in sets
    }
    for arm in arms:
        cells = [_score(runs, data, arm, metric) for data in sets]
        cells = [f"**{cell}**" if best[data] == arm else cell for data, cell in zip(sets, cells, strict=True)]
        lines.append(f"| {_name(arm)} | " + " | ".join(cells) + " |")
    if SHIPPED in arms:
        gains = [_gain(gain(runs, data, SHIPPED, metric)) for data in sets]
        lines.append("| gain of AdaDim over the better of SimCLR and VICReg | " + " | ".join(gains) + " |")
    return "\n".join(lines)


def table_of_gains(runs: Sequence[Run]) -> str:
    """Every arm with its gain over the better baseline, the highest mean gain first."""
    sets = _present(runs, "data", list(DATA))
    arms = _present(runs, "arm", list(NAMES))

    def mean_gain(arm: str) -> float:
        found = [gain(runs, data, arm) for data in sets]
        return fmean([x.mean for x in found if x is not None] or [-100.0])

    head = " | ".join(f"{DATA[x]} | gain" for x in sets)
    lines = [f"| arm | {head} |", "| --- |" + " --- | --- |" * len(sets)]
    for arm in sorted(arms, key=mean_gain, reverse=True):
        cells = [f"{_score(runs, data, arm, BALANCED)} | {_gain(gain(runs, data, arm))}" for data in sets]
        lines.append(f"| {_name(arm)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_gains(runs: Sequence[Run]) -> Figure:
    """Gains over the better of SimCLR and VICReg on each data set, with their intervals."""
    sets = _present(runs, "data", list(DATA))
    arms = [arm for arm in _present(runs, "arm", list(NAMES)) if arm not in BASELINES]
    arms = [arm for arm in arms if arm != SHIPPED] + [arm for arm in arms if arm == SHIPPED]
    figure = Figure(figsize=(9, 1.1 + 0.7 * len(sets)), layout="constrained")
    axes = figure.subplots()
    for row, data in enumerate(sets):
        for place, arm in enumerate(arms):
            found = gain(runs, data, arm)
            if found is None:
                continue
            shipped, y = arm == SHIPPED, -row - 0.15 * (len(arms) - 1 - place)
            color = BLUE if shipped else ORANGE if arm == "adadim_paper" else GREY
            axes.plot([found.low, found.high], [y, y], color=color, linewidth=3 if shipped else 1.6)
            axes.plot(found.mean, y, style_of(place).marker, color=color, markersize=9 if shipped else 6)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks([-row - 0.15 * (len(arms) - 1) / 2 for row in range(len(sets))], [DATA[x] for x in sets])
    axes.set_xlabel("points of accuracy over the better of SimCLR and VICReg, with the 95 % interval over seeds")
    handles = [
        axes.plot([], [], style_of(place).marker + "-", color=color, label=_name(arm).strip("*"))[0]
        for place, arm in enumerate(arms)
        for color in [BLUE if arm == SHIPPED else ORANGE if arm == "adadim_paper" else GREY]
    ]
    figure.legend(handles=handles[::-1], loc="outside upper center", ncols=len(arms), frameon=False, fontsize=9)
    axes.grid(axis="x", alpha=0.25)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def mean_curve(runs: Sequence[Run], data: str, arm: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds of a logged value, and the steps of its readings."""
    curves = [x["curves"] for x in runs if x["data"] == data and x["arm"] == arm]
    rows = np.array([curve[key] for curve in curves], dtype=float)
    return np.array(curves[0]["step"]), rows.mean(axis=0)
