"""What a run leaves behind: its summary, as a file and on the screen."""

import csv
import json
import math
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
    "loss/invariance": "    invariance",
    "loss/variance": "    variance",
    "loss/covariance": "    covariance",
    "loss/uniformity": "  uniformity",
    "loss/information": "  information",
    "probe/linear_top1": "online linear probe",
    "probe/knn_top1": "online kNN",
    "throughput/images_per_second": "images/s",
}


def read_metrics(path: Path) -> tuple[Figures, Figures]:
    """First and last value of each column of a ``metrics.csv``; both empty where there is no such file."""
    first: Figures = {}
    last: Figures = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for key, text in row.items():
                    if text and key not in ("epoch", "step"):
                        first.setdefault(key, float(text))
                        last[key] = float(text)
    return first, last


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
def print_report(
    folder: Path, first: Figures, last: Figures, evaluation: Figures, *, missing: str | None = None
) -> None:
    """Print what the run did, on one screen, and name an optimized metric that was not logged."""
    console = Console(highlight=False)
    table = Table(title="Training", title_justify="left", show_edge=False)
    table.add_column("")
    table.add_column("first epoch", justify="right")
    table.add_column("last epoch", justify="right")
    for key, label in ROWS.items():
        if key in last:
            table.add_row(escape(label), _figure(first[key]), _figure(last[key]))
    console.print(table)
    if evaluation:
        table = Table(title="Held-out accuracy of frozen features", title_justify="left", show_edge=False)
        table.add_column("")
        columns = {"raw": "raw pixels", "untrained": "untrained backbone", "trained": "trained backbone"}
        names = [name for name in columns if f"evaluation/{name}_knn_top1" in evaluation]
        for name in names:
            table.add_column(columns[name], justify="right")
        for key, label in (("linear_top1", "linear probe"), ("knn_top1", "kNN")):
            scores = (evaluation[f"evaluation/{name}_{key}"] for name in names)
            table.add_row(label, *(f"{score:.3f}" for score in scores))
        console.print()
        console.print(table)
    if missing is not None:
        console.print(f"\noptimized_metric {missing} was not logged", markup=False)
    console.print(f"\nEverything is in {os.path.relpath(folder)}", soft_wrap=True)


def _figure(value: float) -> str:
    size = abs(value)
    return f"{value:.3g}" if size >= 1e6 else f"{value:,.0f}" if size >= 100 else f"{value:.3f}"
