"""Speed of the estimators and of the objective, as ratios within one run.

Run it by ``uv run python benchmarks/estimators.py [--json FILE]``.

Every pair of contestants is timed in alternation, so that a machine that slows down slows both; the ratio is
that of the medians.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from lightly.loss import NTXentLoss, VICRegLoss
from rich.console import Console
from rich.table import Table

from adadim_lightning import AdaDimLoss
from adadim_lightning.functional import effective_rank

Contestant = Callable[[], object]


def straightforward_effective_rank(x: torch.Tensor) -> torch.Tensor:
    """What one writes first: the singular values of the tall matrix, in its own precision."""
    singular = torch.linalg.svdvals(x)
    p = singular / singular.sum()
    return torch.exp(-(p * torch.log(p + 1e-7)).sum())


def race(ours: Contestant, theirs: Contestant, repeats: int) -> tuple[float, float]:
    """Median seconds of both, timed in turns after two rounds of warm-up."""
    seconds: dict[Contestant, list[float]] = {ours: [], theirs: []}
    for turn in range(repeats + 2):
        for contestant in (ours, theirs):
            start = time.perf_counter()
            contestant()
            if turn >= 2:
                seconds[contestant].append(time.perf_counter() - start)
    return median(seconds[ours]), median(seconds[theirs])


def rank_contestants(n: int, d: int) -> tuple[Contestant, Contestant]:
    x = torch.randn(n, d)
    assert abs(effective_rank(x) / straightforward_effective_rank(x) - 1) < 1e-2
    return lambda: effective_rank(x), lambda: straightforward_effective_rank(x)


def objective_contestants(n: int, d_r: int, d_z: int) -> tuple[Contestant, Contestant]:
    r = [torch.randn(n, d_r, requires_grad=True) for _ in range(2)]
    z = [torch.randn(n, d_z, requires_grad=True) for _ in range(2)]
    loss = AdaDimLoss(alpha=0.5, gamma=0.1, kappa=1, halve_variance=True)
    vicreg, nt_xent = VICRegLoss(), NTXentLoss(temperature=0.2)

    def ours() -> None:
        loss(*r, *z).total.backward()

    def theirs() -> None:
        (0.5 * vicreg(*z) + 0.5 * nt_xent(*z)).backward()

    weighted = loss(*r, *z).weighted
    mixed = weighted["decorrelation"] + weighted["uniformity"]
    assert torch.allclose(mixed, 0.5 * vicreg(*z) + 0.5 * nt_xent(*z), rtol=1e-5)
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    speed = "times as fast"
    time_share = "of their time"
    cases = [
        ("effective rank, 256 x 2048", "torch.linalg.svdvals", rank_contestants(256, 2048), speed, ">= 4"),
        ("effective rank, 4096 x 512", "torch.linalg.svdvals", rank_contestants(4096, 512), speed, ">= 1.1"),
        (
            "objective, R 256 x 512, Z 256 x 2048",
            "lightly VICReg + NT-Xent",
            objective_contestants(256, 512, 2048),
            time_share,
            "<= 0.25",
        ),
    ]
    table = Table(title=f"{torch.get_num_threads()} threads, torch {torch.__version__}", title_justify="left")
    for column in ("ours", "against", "ours, ms", "theirs, ms", "ratio", "goal"):
        table.add_column(column, justify="right" if "ms" in column else "left")
    results = []
    for name, against, (ours, theirs), kind, goal in cases:
        our_time, their_time = race(ours, theirs, arguments.repeats)
        ratio = their_time / our_time if kind == speed else our_time / their_time
        met = ratio >= float(goal[3:]) if goal.startswith(">=") else ratio <= float(goal[3:])
        table.add_row(
            name, against, f"{our_time * 1e3:.1f}", f"{their_time * 1e3:.1f}", f"{ratio:.2f} {kind}", goal
        )
        results.append(
            {
                "case": name,
                "against": against,
                "ours_ms": our_time * 1e3,
                "theirs_ms": their_time * 1e3,
                "ratio": ratio,
                "kind": kind,
                "goal": goal,
                "met": met,
            }
        )
    Console(width=124).print(table)
    if arguments.json:
        record = {
            "command": "python benchmarks/estimators.py",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "results": results,
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
