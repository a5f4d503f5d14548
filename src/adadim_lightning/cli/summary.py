"""What a run leaves behind: its summary, as a file and on the screen."""

import csv
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.markup import escape
from rich.table import Table

from adadim_lightning.cli.sweep_report import next_commands, screen, shown_path

Figures = dict[str, float]

ROWS = {
    "balance/alpha": "alpha",
    "balance/beta": "beta",
    "dynamics/ER_Z": "ER(Z)",
    "dynamics/ER_R": "ER(R)",
    "dynamics/H_R": "H(R) [nats]",
    "dynamics/I_RZ": "I(R;Z) [nats]",
    "loss/total": "loss",
    "loss/decorrelation": "  decorrelation",
    "loss/uniformity": "  uniformity",
    "loss/information": "  information",
    "probe/linear_top1": "online linear probe",
    "probe/knn_top1": "online kNN",
    "throughput/images_per_second": "images/s",
}


@dataclass(frozen=True)
class Logged:
    """What a run logged.

    Attributes:
        epochs: values of each epoch by log name, in the order of the epochs.
        last: last value under each log name; of those without an epoch too, such as learning rates of Lightning's
            monitor.
    """

    epochs: dict[int, Figures]
    last: Figures

    @classmethod
    def read(cls, path: Path) -> "Logged":
        """Read a ``metrics.csv``; where there is no such file, nothing was logged."""
        epochs: dict[int, Figures] = {}
        last: Figures = {}
        if path.exists():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    values = {key: float(x) for key, x in row.items() if x and key not in ("epoch", "step")}
                    last |= values
                    if row.get("epoch"):
                        epochs.setdefault(int(row["epoch"]), {}).update(values)
        return cls(dict(sorted(epochs.items())), last)


@rank_zero_only
def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write ``summary.json`` whole or not at all; JSON has no NaN, so that becomes null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in summary.items()
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(finite, indent=2) + "\n")
    os.replace(temporary, path)


@rank_zero_only
def print_report(folder: Path, logged: Logged, evaluation: Figures, *, missing: str | None = None) -> None:
    """Print what the run did, on one screen of 80 x 24, and what to do next.

    Args:
        folder: of the run.
        logged: by the run.
        evaluation: scores of the closing evaluation.
        missing: an optimized metric that was not logged.
    """
    tables = [_training(logged)] if set(ROWS) & set().union(*logged.epochs.values()) else []
    if evaluation:
        tables.append(_evaluation(evaluation))
    with screen() as console:
        console.print()
        console.print(Columns(tables, padding=(0, 3)))
        if missing is not None:
            console.print(f"\noptimized_metric {missing} was not logged", markup=False)
        console.print(f"\nEverything is in {shown_path(folder)}", markup=False, soft_wrap=True)
        for command in next_commands(folder):
            console.print(f"  {command}", markup=False, soft_wrap=True)


def _training(logged: Logged) -> Table:
    table = Table("", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("first epoch", justify="right")
    table.add_column("last epoch", justify="right")
    first, last = min(logged.epochs), max(logged.epochs)
    for key, label in ROWS.items():
        having = [epoch for epoch, values in logged.epochs.items() if key in values]
        if having:
            begin = _figure(logged.epochs[first][key]) if having[0] == first else "-"
            end = _figure(logged.epochs[having[-1]][key]) + (
                "" if having[-1] == last else f" (epoch {having[-1] + 1})"
            )
            table.add_row(escape(label), begin, end)
    return table


def _evaluation(scores: Figures) -> Table:
    """Frozen features on the held-out images."""
    table = Table("held-out top-1", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    probes = {"linear": "linear", "knn": "kNN", "few_shot_1pct": "1 %", "few_shot_10pct": "10 %"}
    shown = {key: label for key, label in probes.items() if any(name.endswith(f"_{key}_top1") for name in scores)}
    for label in shown.values():
        table.add_column(label, justify="right")
    for name in ("raw", "untrained", "trained"):
        found = [scores.get(f"evaluation/{name}_{key}_top1") for key in shown]
        if any(score is not None for score in found):
            row = ("-" if score is None else f"{score:.3f}" for score in found)
            table.add_row("raw pixels" if name == "raw" else name, *row)
    return table


def _figure(value: float) -> str:
    size = abs(value)
    return f"{value:.3g}" if size >= 1e6 else f"{value:,.0f}" if size >= 100 else f"{value:.3f}"
