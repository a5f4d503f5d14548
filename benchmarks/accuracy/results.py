"""Writes docs/results.md and its pictures from the JSON files of benchmarks/results; no number in it is typed.

Run it by ``uv run python benchmarks/accuracy/results.py``.
"""

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from adadim_lightning.report.dynamics import BLUE, GREEN, GREY, ORANGE
from adadim_lightning.report.statistics import Difference, paired_difference, spread
from adadim_lightning.report.style import style_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"

Run = Mapping[str, Any]

BALANCED = "evaluation/trained_linear_balanced"
FIGURES = {
    BALANCED: "linear probe",
    "evaluation/trained_knn_top1": "kNN with k = 20",
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
GAIN = "gain of AdaDim over the better of SimCLR and VICReg"
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
    "adadim_gamma_0": "shipped, gamma 0: no information term",
    "adadim_gamma_2": "shipped, gamma 2",
    "adadim_gamma_4": "shipped, gamma 4",
    "adadim_fixed_50": "shipped, but alpha fixed at 0.5",
    "adadim_barlow_twins": "shipped, Barlow Twins as decorrelation",
    "adadim_paper": "AdaDim, the paper's form",
    "adadim_paper_gamma_0": "paper's form, gamma 0",
    "adadim_paper_gamma_1": "paper's form, gamma 1",
    "one_batch_min": "paper's form, gamma 1, normalizer min(N, d_Z)",
    "streaming_gamma_0": "streaming rank, gamma 0",
    "streaming_gamma_0_1": "streaming rank, gamma 0.1",
    "streaming_gamma_1": "streaming rank, gamma 1",
    "streaming_gamma_minus_1": "streaming rank, gamma \N{MINUS SIGN}1",
    "kappa_match": "streaming rank, gamma 1, kappa matched, floor 0",
    "floor": "streaming rank, gamma 1, floor 0.3",
    "order_1": "streaming rank, gamma 1, I of order 1",
    "lagged": "streaming rank, gamma 1, beta of 4 epochs ago",
    "reversed": "streaming rank, gamma 1, alpha reversed",
    "simclr_information": "SimCLR and the information term, gamma 1",
    "vicreg_information": "VICReg and the information term, gamma 1",
}


# Arms that differ in one thing, each with the learning rate of its kind: what it is, the arm with it, without it.
PIECES = (
    ("balance of both losses, no information term", "adadim_gamma_0", None),
    ("information term, gamma 1, on that balance", "adadim", "adadim_gamma_0"),
    ("information term, gamma 1, on SimCLR alone", "simclr_information", "simclr"),
    ("information term, gamma 1, on VICReg alone", "vicreg_information", "vicreg"),
    ("alpha from the effective rank, not fixed at 0.5", "adadim", "adadim_fixed_50"),
    ("alpha from the effective rank, not from one minus it", "streaming_gamma_1", "reversed"),
    ("gradients matched by kappa, floor 0", "kappa_match", "streaming_gamma_1"),
    ("streaming rank, not that of one batch", "streaming_gamma_1", "one_batch_min"),
    ("normalizer min(N, d_Z), not d_Z", "one_batch_min", "adadim_paper_gamma_1"),
    ("beta lagged by 4 epochs, not of the moment", "lagged", "streaming_gamma_1"),
    ("I of order 2, not of order 1", "streaming_gamma_1", "order_1"),
    ("I(R;Z) lowered, not raised", "streaming_gamma_1", "streaming_gamma_minus_1"),
    ("VICReg as decorrelation, not Barlow Twins", "adadim", "adadim_barlow_twins"),
)


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
    if baseline is None or baseline == arm:
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
    mean, low, high = (f"{x:+.1f}" for x in (difference.mean, difference.low, difference.high))
    text = f"{mean} [{low}, {high}]".replace("-", "\N{MINUS SIGN}")
    return f"**{text}**" if difference.low > 0 or difference.high < 0 else text


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
        lines.append(f"| {GAIN} | " + " | ".join(gains) + " |")
    return "\n".join(lines)


def verdict(runs: Sequence[Run], metric: str = BALANCED) -> str:
    """On how many data sets the shipped form is above the better baseline, how surely, and by how much at most."""
    sets = _present(runs, "data")
    gains = {data: found for data in sets if (found := gain(runs, data, SHIPPED, metric)) is not None}
    above, sure = sum(x.mean > 0 for x in gains.values()), sum(x.low > 0 for x in gains.values())
    text = f"AdaDim as shipped is above the better of SimCLR and VICReg on {above} of {len(gains)} data sets"
    text += f", on {sure or 'none'} of them by an interval that leaves out zero" if above else ""
    worse = sum(x.high < 0 for x in gains.values())
    text += f", and below it on {worse} by such an interval." if worse else "."
    if above:
        most = max(gains, key=lambda data: gains[data].mean)
        text += f" The largest gain is {gains[most].mean:.1f} points, on {DATA[most]}."
    return text


def table_of_gains(runs: Sequence[Run]) -> str:
    """Every arm with its gain over the better baseline, the highest accuracy on the first data set first."""
    sets = _present(runs, "data", list(DATA))
    arms = _present(runs, "arm", list(NAMES))

    def accuracy(arm: str) -> float:
        return fmean([x for _, x in values(runs, sets[0], arm)] or [0.0])

    head = " | ".join(f"{DATA[x]} | gain" for x in sets)
    lines = [f"| arm | {head} |", "| --- |" + " --- | --- |" * len(sets)]
    for arm in sorted(arms, key=accuracy, reverse=True):
        cells = [f"{_score(runs, data, arm, BALANCED)} | {_gain(gain(runs, data, arm))}" for data in sets]
        lines.append(f"| {_name(arm)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_of_pieces(runs: Sequence[Run]) -> str:
    """What each piece of the method gains, by two arms that differ in it alone, paired by seed."""
    sets = _present(runs, "data", list(DATA))
    lines = ["| piece | " + " | ".join(DATA[x] for x in sets) + " |", "| --- |" + " --- |" * len(sets)]
    for name, arm, other in PIECES:
        cells = [
            _gain(
                gain(runs, data, arm)
                if other is None
                else paired_difference(values(runs, data, arm), values(runs, data, other))
            )
            for data in sets
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_of_budgets(runs: Sequence[Run]) -> str:
    """Accuracy by number of steps and batch size; of arms that were trained with each."""
    budgets = sorted({(x["steps"], x["batch_size"]) for x in runs})
    groups = [[x for x in runs if (x["steps"], x["batch_size"]) == budget] for budget in budgets]
    arms = _present(runs, "arm", list(NAMES))
    data = runs[0]["data"]
    lines = ["| | " + " | ".join(f"{steps:,} steps of {size:,} images" for steps, size in budgets) + " |"]
    lines.append("| --- |" + " --- |" * len(budgets))
    rows = {_name(arm): [_score(x, data, arm, BALANCED) for x in groups] for arm in arms}
    rows[GAIN] = [_gain(gain(x, data, SHIPPED)) for x in groups]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
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
    """Steps of the readings of a logged value, and its mean over seeds."""
    curves = [x["curves"] for x in runs if x["data"] == data and x["arm"] == arm]
    return np.array(curves[0]["step"]), np.array([curve[key] for curve in curves], dtype=float).mean(axis=0)


H_R, I_RZ = "dynamics/H_R", "dynamics/I_RZ"
EARLY, LATE = 1 / 3, 2 / 3  # of the steps


def changes(runs: Sequence[Run], data: str, arm: str) -> dict[str, float]:
    """By how much H(R) and I(R;Z) move from the first reading to a third of the steps, and over the last third."""
    found = {}
    for name, key in (("H", H_R), ("I", I_RZ)):
        step, value = mean_curve(runs, data, arm, key)
        early, late = (float(np.interp(share * step[-1], step, value)) for share in (EARLY, LATE))
        found |= {f"{name}_early": early - value[0], f"{name}_late": value[-1] - late}
    return found


def rise_together(runs: Sequence[Run], data: str) -> bool:
    """Claim (a): under decorrelation H(R) and I(R;Z) both rise early."""
    found = changes(runs, data, "vicreg")
    return found["H_early"] > 0 and found["I_early"] > 0


def flattens(runs: Sequence[Run], data: str) -> bool:
    """Claim (b): under uniformity I(R;Z) falls late, or rises by less than a tenth of its early change."""
    found = changes(runs, data, "simclr")
    return found["I_late"] < 0.1 * abs(found["I_early"])


def places(runs: Sequence[Run], data: str) -> dict[str, tuple[int, int]]:
    """Place of the most accurate arm by H(R) and by I(R;Z), 1 being the highest, and the number of arms."""
    arms = [arm for arm in _present(runs, "arm") if values(runs, data, arm)]
    best = max(arms, key=lambda arm: fmean(x for _, x in values(runs, data, arm)))
    found = {}
    for name, key in (("H", H_R), ("I", I_RZ)):
        ends = {arm: mean_curve(runs, data, arm, key)[1][-1] for arm in arms}
        found[name] = (1 + sum(end > ends[best] for end in ends.values()), len(arms))
    return found


def neither_extreme(runs: Sequence[Run], data: str) -> bool:
    """Claim (c): the most accurate arm has neither the highest nor the lowest H(R) and I(R;Z)."""
    return all(1 < place < count for place, count in places(runs, data).values())


def draw_dynamics(runs: Sequence[Run]) -> Figure:
    """H(R) and I(R;Z) over the steps under decorrelation, uniformity and AdaDim, and where the arms end."""
    sets = [x for x in _present(runs, "data", list(DATA)) if values(runs, x, SHIPPED)]
    figure = Figure(figsize=(3.1 * len(sets), 7.4), layout="constrained")
    panels = figure.subplots(3, len(sets), squeeze=False)
    shown = {"vicreg": (ORANGE, "--"), "simclr": (GREEN, ":"), SHIPPED: (BLUE, "-")}
    for column, data in enumerate(sets):
        for row, (key, label) in enumerate(((H_R, "H(R) [nats]"), (I_RZ, "I(R;Z) [nats]"))):
            axes = panels[row, column]
            for arm, (color, line) in shown.items():
                axes.plot(*mean_curve(runs, data, arm, key), color=color, linestyle=line)
            axes.set_xlabel("step", fontsize=9)
            axes.set_ylabel(label if column == 0 else "", fontsize=9)
        panels[0, column].set_title(DATA[data], loc="left", fontsize=10, fontweight="bold")
        axes = panels[2, column]
        arms = [arm for arm in _present(runs, "arm") if values(runs, data, arm)]
        ends = [[mean_curve(runs, data, arm, key)[1][-1] for key in (H_R, I_RZ)] for arm in arms]
        accuracy = [fmean(x for _, x in values(runs, data, arm)) for arm in arms]
        points = axes.scatter(*zip(*ends, strict=True), c=accuracy, cmap="viridis", s=36, edgecolor="white")
        best = ends[accuracy.index(max(accuracy))]
        axes.plot(*best, "o", color="none", markeredgecolor="black", markersize=12)
        axes.set_xlabel("H(R) at the end", fontsize=9)
        axes.set_ylabel("I(R;Z) at the end" if column == 0 else "", fontsize=9)
        figure.colorbar(points, ax=axes, location="bottom", label="accuracy [%]", aspect=30)
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
    handles = [
        panels[0, 0].plot([], [], color=color, linestyle=line, label=_name(arm).strip("*"))[0]
        for arm, (color, line) in shown.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def _dynamics(runs: Sequence[Run]) -> str:
    sets = [x for x in _present(runs, "data", list(DATA)) if values(runs, x, SHIPPED)]
    lines = [
        "| | (a) VICReg, early: change of H(R), I(R;Z) | holds | (b) SimCLR: change of I(R;Z) early, late "
        "| holds | (c) place of the best arm by H(R), I(R;Z) | holds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for data in sets:
        a, b, c = changes(runs, data, "vicreg"), changes(runs, data, "simclr"), places(runs, data)
        cells = [
            f"{a['H_early']:+.2f}, {a['I_early']:+.2f}",
            f"{b['I_early']:+.2f}, {b['I_late']:+.2f}",
            ", ".join(f"{place} of {count}" for place, count in c.values()),
        ]
        verdicts = ["yes" if claim(runs, data) else "no" for claim in (rise_together, flattens, neither_extreme)]
        pairs = " | ".join(x for pair in zip(cells, verdicts, strict=True) for x in pair)
        lines.append(f"| {DATA[data]} | {pairs} |")
    return "\n".join(lines)


def _module(name: str) -> ModuleType:
    """A benchmark script beside this folder."""
    path = ROOT / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _protocol(runs: Sequence[Run]) -> str:
    one, seconds = runs[0], fmean(x["seconds"] for x in runs)
    seeds = ", ".join(str(x) for x in sorted({x["seed"] for x in runs}))
    devices = " and ".join(sorted({x["device"] for x in runs}))
    versions = "; ".join(
        sorted(
            {", ".join(f"{name} {x['versions'][name]}" for name in ("python", "torch", "lightning")) for x in runs}
        )
    )
    return (
        f"{one['steps']} steps of {one['batch_size']} images for every arm, with the same augmentations, "
        f"backbone, head, optimizer and schedule; seeds {seeds}; {seconds:.0f} s a run, on {devices} ({versions})."
    )


def _searched_before(searched: Sequence[Run], final: Sequence[Run]) -> str:
    """What was chosen after the shipped form's learning rate, which was searched without it."""
    then, now = ({x["objective"]["gamma"] for x in runs if x["arm"] == SHIPPED} for runs in (searched, final))
    if then == now or not then:
        return ""
    text = f" AdaDim's was searched with gamma {max(then):g}, before gamma {max(now):g} was chosen"
    return f"{text} from the arms below."


FROZEN = "78db0d9"  # the commit before the first look at a test image
FINAL = """
{verdict}

Accuracy of a linear probe on the test images, in percent, balanced over the classes, mean ± standard
deviation over seeds; the last row is paired by seed, with its 95 % interval, bold where that leaves out zero:

{table}

![gain over the better of SimCLR and VICReg on each data set](images/results.png)

{protocol}

Each arm has the learning rate and weight decay that were best for it on validation images, in a search that is the
same for all ([chosen.yaml](../benchmarks/accuracy/conf/tuned/chosen.yaml), from
[search.json](../benchmarks/results/accuracy/search.json)).{before} Arms, rates and seeds were frozen in commit
`{frozen}`, before the first look at a test image, and none of them was changed after it. The figures of each run
are in [final.json](../benchmarks/results/accuracy/final.json), by
`uv run python benchmarks/accuracy/study.py final`.

## Other probes

{probes}
"""
EXPLORED = """
## All arms, on validation images

The most accurate on CIFAR-10 first; each with the gain over the better of SimCLR and VICReg, paired by seed, and
its 95 % interval. A dash is what was not trained. Everything was chosen on these; the test images were looked at
once, after that.

{table}

{protocol} `uv run python benchmarks/accuracy/study.py explore` trains them;
[explore.json](../benchmarks/results/accuracy/explore.json) has the figures, and
[benchmarks/accuracy/conf/arm](../benchmarks/accuracy/conf/arm) what each arm is.

## Whose gain is it?

Points that each piece of the method gains, by two arms that differ in it alone, paired by seed, with the 95 %
interval, bold where it leaves out zero; a dash where one of the two was not trained. Each arm has the learning
rate that was searched for its kind. The first line is over the better of SimCLR and VICReg.

{pieces}

## The dynamics

Three claims of the paper, on these runs: (a) under decorrelation H(R) and I(R;Z) rise together early; (b) under
uniformity I(R;Z) levels off or falls late; (c) the most accurate arm is at neither extreme. Early is up to a
third of the steps, late is the last third.

{dynamics}

![H(R) and I(R;Z) over the steps, and where the arms end](images/results_dynamics.png)
"""
BUDGETS = """
## Shorter, longer, with smaller and larger batches

CIFAR-10, validation images, each arm with the learning rate and weight decay that were chosen for it at {steps}
steps of {size} images:

{table}

`uv run python benchmarks/accuracy/study.py budgets` trains them;
[budgets.json](../benchmarks/results/accuracy/budgets.json) has the figures.
"""
NO_GPU = """
All of CIFAR-10 with ResNet-18 in mixed precision: `benchmarks/gpu/run.sh` prepares, trains, evaluates and writes
the figures in pieces of a few minutes. It has not run on a GPU yet, only at toy size on a CPU, in the tests.
"""


def page() -> tuple[str, dict[str, Figure]]:
    """The text of docs/results.md, and its pictures by name."""
    final, explored, budgets, gpu = (load(stage) for stage in ("final", "explore", "budgets", "gpu"))
    parts, pictures = ["# Results"], {}
    if final:
        pictures["results"] = draw_gains(final)
        others = {metric: name for metric, name in FIGURES.items() if metric != BALANCED}
        probes = "\n\n".join(
            f"**{name}.** {verdict(final, metric)}\n\n{table(final, metric)}" for metric, name in others.items()
        )
        parts.append(
            FINAL.format(
                verdict=verdict(final),
                table=table(final),
                protocol=_protocol(final),
                frozen=FROZEN,
                before=_searched_before(load("search"), final),
                probes=probes,
            )
        )
    if explored:
        pictures["results_dynamics"] = draw_dynamics(explored)
        found = {
            "table": table_of_gains(explored),
            "dynamics": _dynamics(explored),
            "pieces": table_of_pieces(explored),
        }
        parts.append(EXPLORED.format(protocol=_protocol(explored), **found))
    if budgets:
        arms = {x["arm"] for x in budgets}
        chosen = [x for x in explored if x["data"] == budgets[0]["data"] and x["arm"] in arms]
        usual = {"steps": chosen[0]["steps"], "size": chosen[0]["batch_size"]}
        parts.append(BUDGETS.format(table=table_of_budgets([*chosen, *budgets]), **usual))
    parts.append("## One GPU\n\n" + (f"{table(gpu)}\n\n{_protocol(gpu)}" if gpu else NO_GPU.strip()))
    for name in ("estimator_study", "cost"):
        path = RESULTS / f"{name}.json"
        if path.exists():
            module, measured = _module(name), json.loads(path.read_text())
            parts.append(module.markdown(measured))
            pictures |= module.pictures(measured)
    gpu_cost = RESULTS / "cost_gpu.json"
    if gpu_cost.exists():
        parts.append(
            _module("cost").markdown_of_gpu(json.loads(gpu_cost.read_text()), "benchmarks/results/cost_gpu.json")
        )
    return "\n\n".join(part.strip() for part in parts) + "\n", pictures


def main() -> None:
    text, pictures = page()
    (DOCS / "results.md").write_text(text)
    for name, figure in pictures.items():
        figure.savefig(DOCS / "images" / f"{name}.png", dpi=100)
    print(f"wrote {DOCS / 'results.md'} and {', '.join(pictures)}")


if __name__ == "__main__":
    main()
