"""What a sweep leaves on the screen: a line for each job, a table at the end, and what to do next."""

import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from adadim_lightning.cli.sweep import job_key
from adadim_lightning.files import shell_word

Summary = Mapping[str, Any]

MOST_ROWS = 20  # jobs of which all are shown
BEST = 10  # of more jobs, these
MOST_ERRORS = 5
WITH_VALUE = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn")
# The first of each that a run has is on its line.
ON_THE_LINE = (("evaluation/trained_linear_top1", "probe/linear_top1"), ("dynamics/H_R",))
LABELS = {"evaluation/trained_linear_top1": "linear", "probe/linear_top1": "linear", "dynamics/H_R": "H(R)"}


@contextmanager
def screen() -> Iterator[Console]:
    """A console whose output goes out in one piece; a reader that went away (``| head``) is no error.

    Rich itself would end the process then, and with it a sweep.
    """
    console = Console(highlight=False)
    with console.capture() as captured:
        yield console
    try:
        print(captured.get(), end="", flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- for the rest of the process


def shown_path(folder: Path) -> str:
    """A path as short as it can be from here."""
    return min(os.path.relpath(folder), os.path.abspath(folder), key=len)


def hydra_argument(key: str, folder: Path) -> str:
    """``KEY=FOLDER`` as a shell and then Hydra read it."""
    path = shown_path(folder)
    if os.sep not in path:
        path = os.path.join(os.curdir, path)  # else a folder "0" would be a number
    if re.search(r"[^\w ./:+@%-]", path, re.ASCII) or path.endswith(" "):
        # Backslashes count only before a quote.
        path = "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), path) + "'"
    return shell_word(f"{key}={path}")


def next_commands(folder: Path) -> list[str]:
    """What to try with the folder of a run."""
    return [
        f"adadim-evaluate {hydra_argument('ckpt', folder)}",
        f"adadim-report {shell_word(shown_path(folder))}",
        f"adadim-embed {hydra_argument('ckpt', folder)}",
    ]


def print_line(folder: Path, summary: Summary) -> None:
    """Print one line of 80 columns about a job of a sweep that has ended.

    Args:
        folder: of the job.
        summary: what its ``summary.json`` holds.
    """
    texts = [str(summary["status"])]
    for keys in ON_THE_LINE:
        texts += [f"{LABELS[key]} {summary[key]:.3f}" for key in keys if summary.get(key) is not None][:1]
    if summary.get("seconds") is not None:
        texts.append(f"{summary['seconds']:,.0f} s")
    end = "  ".join(("", *texts))
    start = f"#{folder.name} "
    overrides = job_overrides([summary])[0]
    with screen() as console:
        console.print(start + _fitted(overrides, console.width - len(start) - len(end)) + end, markup=False)


def print_sweep(jobs: Sequence[tuple[Path, Summary]], folder: Path, command: Sequence[str] | None = None) -> None:
    """Print what became of a sweep, within 80 columns: its jobs, why some failed, and what to do next.

    Of many jobs the best are shown, and how many there are of each status.

    Args:
        jobs: folder and summary of each.
        folder: of the sweep.
        command: that started it; by default this process's own.
    """
    if not jobs:
        return
    summaries = [summary for _, summary in jobs]
    overrides = dict(zip((path for path, _ in jobs), job_overrides(summaries), strict=True))
    count = Counter(str(summary["status"]) for summary in summaries)
    metric = next((str(x["optimized_metric"]) for x in summaries if x.get("optimized_metric")), None)
    shown = jobs if len(jobs) <= MOST_ROWS else _best(jobs, metric)
    title = f"{len(jobs)} job{'' if len(jobs) == 1 else 's'}: "
    title += ", ".join(f"{count[status]} {status}" for status in sorted(count, key=_rank))
    if 0 < len(shown) < len(jobs):
        title += f"; the best {len(shown)} by {metric}"
    commands = [f"adadim-report {shell_word(shown_path(folder))}"]
    if set(count) - {"ok"}:
        commands.append(_resume(folder, sys.argv if command is None else command))
    with screen() as console:
        console.print(f"\n{title}", markup=False)
        if shown:
            console.print(_table(shown, overrides, metric, console.width))
        _print_errors(console, jobs, overrides)
        console.print("\nNext")
        for line in commands:
            console.print(f"  {line}", markup=False, soft_wrap=True)


def _table(
    jobs: Iterable[tuple[Path, Summary]], overrides: Mapping[Path, list[str]], metric: str | None, width: int
) -> Table:
    rows = []
    for path, summary in jobs:
        value = summary.get(metric) if metric else None
        text = "" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
        rows.append((path, str(summary["status"]), text))
    head = metric.rpartition("/")[2] if metric else ""
    heads = ["job", "overrides", "status", *([head] if head else [])]
    used = max((len(path.name) for path, *_ in rows), default=0), max((len(row[1]) for row in rows), default=0)
    room = width - max(used[0], 3) - max(used[1], 6) - (max(len(head), 8) + 3 if head else 0) - 8
    table = Table(show_edge=False)
    for head, right in zip(heads, (True, False, False, True), strict=False):
        table.add_column(Text(head), justify="right" if right else "left", no_wrap=True)
    for path, status, value in rows:
        cells = [path.name, _fitted(overrides[path], max(room, 10)), status, *([value] if head else [])]
        table.add_row(*map(Text, cells), style="" if status == "ok" else "red")
    return table


def _rank(status: str) -> int:
    """What went well comes first."""
    order = ("ok", "running", "stopped", "failed", "missing")
    return order.index(status) if status in order else len(order)


def _best(jobs: Sequence[tuple[Path, Summary]], metric: str | None) -> list[tuple[Path, Summary]]:
    """The jobs with the best values: of a loss the lowest, else the highest."""
    found = [job for job in jobs if metric is not None and job[1].get(metric) is not None]
    sign = 1 if (metric or "").startswith("loss") else -1
    return sorted(found, key=lambda job: sign * float(job[1][str(metric)]))[:BEST]


def _print_errors(
    console: Console, jobs: Sequence[tuple[Path, Summary]], overrides: Mapping[Path, list[str]]
) -> None:
    """Each error once, with the jobs that it ended."""
    errors: dict[str, list[Path]] = {}
    for path, summary in jobs:
        if summary.get("error"):
            errors.setdefault(str(summary["error"]), []).append(path)
    for error, paths in list(errors.items())[:MOST_ERRORS]:
        named = ", ".join(f"#{path.name}" for path in paths[:3])
        if len(paths) > 3:
            named += f" and {len(paths) - 3} more"
        console.print(
            f"\n{named} {_fitted(overrides[paths[0]], 50) if len(paths) == 1 else ''}".rstrip(), markup=False
        )
        console.print(Padding(Text(error), (0, 0, 0, 2)))
    if len(errors) > MOST_ERRORS:
        console.print(f"\nand {len(errors) - MOST_ERRORS} other errors, in the summary.json of the jobs")


def _resume(folder: Path, command: Sequence[str]) -> str:
    """The command that does what is left of the sweep."""
    options: list[str] = []
    overrides: list[str] = []
    for before, argument in pairwise(command):
        if argument.startswith("-") or before in WITH_VALUE:
            options.append(shell_word(argument))
        elif not argument.startswith(("run_dir=", "resume=")):
            overrides.append(shell_word(argument))
    # Hydra takes its overrides in one piece.
    return " ".join(["adadim-train", *options, *overrides, hydra_argument("run_dir", folder), "resume=true"])


def job_overrides(summaries: Sequence[Summary]) -> list[list[str]]:
    """The overrides of each job that are not those of all."""
    each = [list(map(str, summary.get("overrides") or ())) for summary in summaries]
    keys = [job_key(overrides) for overrides in each]
    common = frozenset.intersection(*keys) if len(keys) > 1 else frozenset()
    return [
        [x for x in overrides if x in key and x not in common] for overrides, key in zip(each, keys, strict=True)
    ]


def _fitted(overrides: Sequence[str], width: int) -> str:
    """Overrides on a line: as they are, or by the last part of their keys, or cut off."""
    parts = [override.partition("=")[::2] for override in overrides]
    parts = [(key, _number(value)) for key, value in parts]
    last = [key.rpartition(".")[2] for key, _ in parts]
    short = [key if last.count(name) > 1 else name for name, (key, _) in zip(last, parts, strict=True)]
    text = " ".join(f"{key}={value}" for key, value in parts)
    if len(text) > width:
        text = " ".join(f"{name}={value}" for name, (_, value) in zip(short, parts, strict=True))
    return text if len(text) <= width else text[: width - 3] + "..."


def _number(text: str) -> str:
    """A long number with four digits, as samplers draw them."""
    try:
        value = float(text)
    except ValueError:
        return text
    return f"{value:.4g}" if len(text) > 8 and math.isfinite(value) else text
