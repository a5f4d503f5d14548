"""Runs of ``adadim-train`` as processes of their own, and all that two of them have to have in common."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What a run is told about itself, and what the clock says.
OF_ITS_OWN = ("throughput/images_per_second", "seconds", "run_id", "overrides", "resume")
DIGITS = (
    "trainer.accelerator=cpu",
    "trainer.max_epochs=4",
    "data.batch_size=64",
    "callbacks.adadim.every_n_steps=7",
    "callbacks.checkpoint.every_n_steps=3",
    "run_dir=run",
)


def start(folder: Path, *overrides: str) -> "subprocess.Popen[str]":
    """``adadim-train`` in a folder; what it says goes to ``said.txt`` there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "said.txt").open("a") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "adadim_lightning.cli.train", *overrides],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=said,
            stderr=subprocess.STDOUT,
            text=True,
        )


def said(folder: Path) -> str:
    return (folder / "said.txt").read_text()


def newest(run: Path) -> Path:
    """The last checkpoint of a run."""
    return (run / "checkpoints" / "last.ckpt").resolve()


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested containers, with its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in OF_ITS_OWN:
                yield from flat(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        yield f"{name}#", len(value)
        for i, inner in enumerate(value):
            yield from flat(inner, f"{name}[{i}]")
    else:
        yield name, value


def left_by(run: Path) -> dict[str, Any]:
    """All values of the last checkpoint, the log, the summary and the spectra of a run."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    checkpoint = torch.load(newest(run), weights_only=True)
    del checkpoint["adadim_run"]["files"]  # one that was told to stop has written one more
    kinds = {
        "checkpoint": checkpoint,
        "metrics": [{key: text for key, text in row.items() if text} for row in rows],
        "summary": json.loads((run / "summary.json").read_text()),
        "spectra": dict(np.load(run / "spectra.npz")),
    }
    return dict(flat(kinds))


def differences(run: Path, other: Path) -> list[str]:
    """Paths of the values that two runs do not have in common, to the bit."""
    one, two = left_by(run), left_by(other)
    return sorted(key for key in one.keys() | two.keys() if not same(one.get(key), two.get(key)))


def same(x: Any, y: Any) -> bool:
    """Whether two values are equal to the bit, NaN too."""
    if isinstance(x, Tensor | np.ndarray) and type(x) is type(y):
        x, y = (np.asarray(z) for z in (x, y))
        return (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
    return type(x) is type(y) and (x == y or (x != x and y != y))
