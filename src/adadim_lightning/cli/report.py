"""``adadim-report``: one page about any number of runs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from adadim_lightning.cli.plain import OneLineParser, run_plain

if TYPE_CHECKING:
    from adadim_lightning.report.arms import Arm
    from adadim_lightning.report.study import Study

WIDTH = 80
MOST_PRINTED = 20  # arms; the page has them all
LABEL = 22  # columns of the terminal for an arm


def main() -> None:
    """Entry point of the command."""
    run_plain(_parser(), _report)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="adadim-report",
        description="Write one HTML page about runs, and its pictures as PNG files beside it.",
        epilog="example: adadim-report outputs/2026-01-31/12-00-00 --baseline objective=vicreg",
        allow_abbrev=False,
    )
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="folder of a run, of a sweep, or of W&B offline runs; all runs below it are taken",
    )
    parser.add_argument(
        "--out", metavar="FILE.html", help="where to write (default: report.html in the first PATH)"
    )
    parser.add_argument(
        "--metric", metavar="NAME", help="log name that ranks the runs (default: an accuracy that was logged)"
    )
    parser.add_argument(
        "--baseline", metavar="ARM", help="arm to compare with: its overrides, such as objective=vicreg"
    )
    return parser


def _report(arguments: argparse.Namespace) -> None:
    # Imported here: the help needs none of it.
    from adadim_lightning.report.page import check_extra, write_page
    from adadim_lightning.report.pictures import write_pictures
    from adadim_lightning.report.runs import read_runs
    from adadim_lightning.report.study import Study

    check_extra()
    out = _out(arguments)
    runs, warnings = read_runs(arguments.paths)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    study = Study(runs, arguments.metric, warnings)
    _check_metric(study)
    baseline = _baseline(study, arguments.baseline)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        pictures = write_pictures(study, out)
        write_page(study, baseline, out, pictures)
    except OSError as error:
        raise ValueError(
            f"cannot write {error.filename or out}: {error.strerror}; name a place by --out"
        ) from error
    _print(study, baseline)
    print(f"The report is in {os.path.relpath(out)}")
    if pictures:
        print(f"  beside it: {', '.join(picture.name for picture in pictures)}")


def _out(arguments: argparse.Namespace) -> Path:
    if arguments.out is None:
        first = Path(arguments.paths[0]).expanduser()
        return (first.parent if first.is_file() else first) / "report.html"
    out = Path(arguments.out).expanduser()
    if out.suffix not in (".html", ".htm") or out.is_dir():
        raise ValueError(f"--out must be an HTML file, such as {out.with_suffix('.html').name}, got {out}")
    return out


def _check_metric(study: Study) -> None:
    if study.metric is None or study.metric in study.logged:
        return
    from adadim_lightning.cli.app import nearest

    meant = nearest(study.metric, study.logged)
    hint = f"did you mean {meant!r}?" if meant else f"there are {', '.join(sorted(study.logged)) or 'none'}"
    raise ValueError(f"no run has logged {study.metric!r}; {hint}")


def _baseline(study: Study, text: str | None) -> Arm | None:
    """The arm that is named, else the first."""
    if text is None:
        return study.arms[0] if study.arms else None
    try:
        found = study.find_arm(text)
    except ValueError as error:
        raise ValueError(f"--baseline {error}") from None
    if found is None:
        from adadim_lightning.cli.app import nearest

        labels = [arm.label for arm in study.arms]
        meant = nearest(text, labels)
        hint = f"did you mean {meant!r}?" if meant else f"there are {'; '.join(labels) or 'none'}"
        raise ValueError(f"--baseline {text!r} is no arm; {hint}")
    return found


def _print(study: Study, baseline: Arm | None) -> None:
    """The result on one screen."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from adadim_lightning.report.page import arm_columns, arm_rows

    rows = arm_rows(study, baseline)
    console = Console(highlight=False)
    console.width = min(console.width, WIDTH)
    table = Table(show_edge=False)
    table.add_column("arm", max_width=LABEL, overflow="fold")
    shown = [0, 1, 2] if study.metric else [0, 4, 5, 6]  # columns of the page's table
    for title in (arm_columns(study)[i] for i in shown):
        table.add_column(escape(title), justify="right")
    for row in rows[:MOST_PRINTED]:
        cells = (row.cells[i].text.partition(", n =")[0] for i in shown)
        table.add_row(escape(row.arm.label), *cells)
    console.print(table)
    if len(rows) > MOST_PRINTED:
        print(f"and {len(rows) - MOST_PRINTED} arms more")
    if study.metric:
        print(f"{study.title}: {study.metric}")
        print("difference: to the baseline, paired by seed, with its 95 % interval")
    missing = [run for run in study.runs if not run.finished]
    if missing:
        print(f"{len(missing)} of {len(study.runs)} runs are not finished; the page says why")


if __name__ == "__main__":
    main()
