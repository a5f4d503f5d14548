"""Run folders as the contract has them, made without training."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def history(epochs: int, *, level: float = 0.0, seed: int = 0, probes: bool = True) -> dict[str, list[float]]:
    """Curves that end at known places: H(R) = 4 - level, I(R;Z) = 0.5 + level."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, epochs) if epochs > 1 else np.ones(1)
    noise = 0.02 * rng.normal(size=epochs) * (1 - t)
    h = 4 - level * t + noise
    columns = {
        "balance/alpha": 0.3 * t,
        "balance/beta": 0.03 * t,
        "dynamics/H_R": h,
        "dynamics/ER_R": np.exp(h),
        "dynamics/ER_Z": 60 - 20 * t,
        "dynamics/I_RZ": 0.5 * t + level * t + noise,
        "dynamics/log_n": np.full(epochs, math.log(256)),
    }
    parts = ("total", "decorrelation", "uniformity", "invariance", "variance", "covariance", "information")
    columns |= {f"loss/{part}": 5 + i - 2 * t for i, part in enumerate(parts)}
    columns |= {f"loss_weighted/{part}": 2 + i - t for i, part in enumerate(parts[1:3])}
    if probes:
        columns |= {"probe/linear_top1": 0.5 + 0.4 * t - 0.1 * level, "probe/knn_top1": 0.5 + 0.3 * t}
    return {key: column.tolist() for key, column in columns.items()}


def write_run(
    folder: Path,
    *overrides: str,
    seed: int | None = 0,
    epochs: int = 4,
    status: str = "ok",
    error: str | None = None,
    values: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    columns: Mapping[str, Sequence[float]] | None = None,
    level: float = 0.0,
    probes: bool = True,
    width: int = 16,
) -> Path:
    """Write a run folder; ``values`` go into its summary, over the last value of each column."""
    folder.mkdir(parents=True)
    columns = history(epochs, level=level, seed=seed or 0, probes=probes) if columns is None else columns
    if columns:
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["epoch", "step", *columns])
            writer.writeheader()
            for epoch in range(epochs):  # two sparse rows an epoch, as Lightning writes them
                for probe in (True, False):
                    row = {k: v[epoch] for k, v in columns.items() if k.startswith("probe/") == probe}
                    if row:
                        writer.writerow({"epoch": epoch, "step": 10 * epoch + 9, **row})
        decay = np.exp(-np.arange(width) / (2 + level))[None].repeat(epochs, 0)
        np.savez(folder / "spectra.npz", epoch=np.arange(epochs), R=5 * decay, Z=decay)
    chosen = dict(text.lstrip("+").split("=", 1) for text in overrides if "=" in text)
    last = {key: column[-1] for key, column in columns.items() if len(column)}
    summary = {
        "status": status,
        "error": error,
        "seed": seed,
        "overrides": [*overrides, f"seed={seed}", f"run_dir={folder.parent}"],
        "config": {**(chosen if config is None else config), "seed": seed, "run_dir": str(folder.parent)},
        "run_id": "abcd1234",
        "optimized_metric": "probe/linear_top1",
        "epochs": epochs,
        "seconds": 12.5,
        **last,
        **(values or {}),
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_sweep(root: Path, arms: Sequence[str], seeds: Sequence[int], **settings: Any) -> Path:
    """A multirun folder: each arm, a little apart in the plane, with each seed."""
    for i, arm in enumerate(arms):
        for j, seed in enumerate(seeds):
            number = i * len(seeds) + j
            write_run(root / str(number), arm, seed=seed, level=0.2 * i + 0.01 * seed, **settings)
    return root
