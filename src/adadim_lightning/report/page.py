"""The report: one HTML file that needs nothing beside it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adadim_lightning.extras import require
from adadim_lightning.files import shell_word
from adadim_lightning.report.arms import Arm
from adadim_lightning.report.figures import plots
from adadim_lightning.report.runs import RunRecord
from adadim_lightning.report.statistics import DASH, Difference, Spread, digits
from adadim_lightning.report.study import ER_R, H_R, I_RZ, Study
from adadim_lightning.report.style import Style, style_of

TEMPLATE = "page.html.jinja"
OWN_FOLDER = ("run_dir", "resume")  # of a command line that is to be repeated


@dataclass(frozen=True)
class Cell:
    """What a table shows, and what it sorts by."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class ArmRow:
    """A line of the table of arms."""

    arm: Arm
    index: int
    style: Style
    cells: list[Cell]


def check_extra() -> None:
    """Raise MissingExtraError with the line that installs it, where the extra is missing."""
    for package in ("plotly", "jinja2"):
        require(package, "report")


def write_page(study: Study, baseline: Arm | None, path: Path, pictures: list[Path]) -> None:
    """Write the page.

    Args:
        study: the runs.
        baseline: arm that the differences are taken from at first.
        path: the HTML file.
        pictures: PNG files beside it, to be linked.
    """
    check_extra()
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("adadim_lightning.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    drawn = plots(study)
    text = environment.get_template(TEMPLATE).render(
        study=study,
        plots=drawn,
        # Read by the page's script; tojson escapes what could end the element.
        data={"plots": drawn, "differences": _differences(study)},
        plotly=get_plotlyjs(),
        arms=arm_rows(study, baseline),
        columns=arm_columns(study),
        styles=style_of,
        baseline=baseline,
        runs=[_run_row(study, run) for run in study.runs],
        count=_count,
        common=_common(study),
        verdict=_verdict(study),
        best=study.best or (study.runs[0] if len(study.runs) == 1 else None),
        command=command_line,
        to_yaml=lambda config: yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        digits=digits,
        pictures=[picture.name for picture in pictures],
    )
    path.write_text(text, encoding="utf-8")


def arm_columns(study: Study) -> list[str]:
    """Headers of the table of arms, but for the arm itself; the difference is the third."""
    return ["runs", study.title, "difference", "kNN", "H(R)", "ER(R)", "I(R;Z)", "alpha", "seconds"]


def arm_rows(study: Study, baseline: Arm | None) -> list[ArmRow]:
    """Lines of the table of arms, the best accuracy first."""
    rows = []
    for index, arm in enumerate(study.arms):
        accuracy = study.spread(arm, study.value)
        n = len(arm.finished)
        runs = Cell(f"{n}" if n == len(arm.runs) else f"{n} of {len(arm.runs)}", n)
        cells = [runs, spread_cell(accuracy, decimals=4), difference_cell(study, arm, baseline)]
        cells += [spread_cell(study.spread(arm, study.knn), decimals=4)]
        cells += [spread_cell(study.spread(arm, key)) for key in (H_R, ER_R, I_RZ, "balance/alpha")]
        cells += [spread_cell(study.spread(arm, lambda run: run.seconds), with_sd=False, decimals=1)]
        rows.append(ArmRow(arm, index, style_of(index), cells))
    sign = 1 if study.lower_is_better else -1
    return sorted(rows, key=lambda row: (row.cells[1].value is None, sign * (row.cells[1].value or 0)))


def spread_cell(found: Spread | None, *, decimals: int = 3, with_sd: bool = True) -> Cell:
    """Mean and standard deviation, both to the same decimal place."""
    if found is None:
        return Cell(DASH)
    mean = digits(found.mean, decimals=decimals)
    if not with_sd or found.sd is None:
        return Cell(mean, found.mean)
    places = len(mean.partition(".")[2])
    sd = digits(found.sd, decimals=decimals) if "e" in mean else f"{found.sd:,.{places}f}"
    return Cell(f"{mean} ± {sd}", found.mean)


def difference_cell(study: Study, arm: Arm, baseline: Arm | None) -> Cell:
    """Mean difference with its confidence interval."""
    if arm is baseline:
        return Cell("baseline", 0.0)
    found = None if baseline is None else study.difference(arm, baseline)
    return Cell(DASH) if found is None else Cell(_interval(found), found.mean)


def _interval(found: Difference) -> str:
    mean, low, high = (digits(x, decimals=4, sign=True) for x in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}], n = {found.n}"


def _differences(study: Study) -> list[list[list[Any]]]:
    """Text and value for each baseline and each arm."""
    cells = [[difference_cell(study, arm, baseline) for arm in study.arms] for baseline in study.arms]
    return [[[cell.text, cell.value] for cell in row] for row in cells]


def _run_row(study: Study, run: RunRecord) -> dict[str, Any]:
    labels = [arm.label for arm in study.arms if run in arm.runs]
    return {
        "run": run,
        "arm": labels[0] if labels else DASH,
        "seed": Cell(DASH if run.seed is None else str(run.seed), run.seed),
        "accuracy": Cell(digits(study.value(run), decimals=4), study.value(run)),
        "seconds": Cell(digits(run.seconds, decimals=1), run.seconds),
        "epochs": Cell(str(epochs), epochs) if (epochs := len(run.history.get("epoch", ()))) else Cell(DASH),
    }


def _count(study: Study) -> str:
    """How many runs there are, in words."""
    statuses = [run.status for run in study.runs]
    told = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    arms = f"{len(study.arms)} arm" + ("" if len(study.arms) == 1 else "s")
    return f"{len(statuses)} run" + ("" if len(statuses) == 1 else "s") + f" in {arms}: {told}"


def _common(study: Study) -> str:
    """Overrides that all arms share, which no label shows."""
    if len(study.arms) < 2:
        return ""
    return " ".join(x for x in study.arms[0].overrides if all(x in arm.overrides for arm in study.arms[1:]))


def _verdict(study: Study) -> str:
    """Where the best run lies in the plane."""
    best = study.best
    if best is None:
        return ""
    value = digits(study.value(best), decimals=4)
    label = next(arm.label for arm in study.arms if best in arm.runs)
    text = f"Best: {label}" + (f", seed {best.seed}" if best.seed is not None else "") + f", with {value}"
    text += f" (and {study.ties} more as good)" if study.ties else ""
    h, i = study.place(H_R, highest=True), study.place(I_RZ, highest=False)
    if h and i and h[1] > 1:
        text += f". Of {h[1]} finished runs it takes place {h[0]} by high H(R) and place {i[0]} by low I(R;Z)"
    return text + "."


def command_line(run: RunRecord) -> str:
    """What to type for this run again, in a new folder."""
    words = ["adadim-train", *_config_dir(run.folder)]
    words += [text for text in run.overrides or () if text.lstrip("+").partition("=")[0] not in OWN_FOLDER]
    return " ".join(map(shell_word, words))


def _config_dir(folder: Path) -> list[str]:
    """The option ``--config-dir``, which is no override, from what Hydra noted."""
    try:
        noted = yaml.safe_load((folder / ".hydra" / "hydra.yaml").read_text(encoding="utf-8"))
        sources = noted["hydra"]["runtime"]["config_sources"]
        return [x for s in sources if s["provider"] == "command-line" for x in ("--config-dir", str(s["path"]))]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return []
