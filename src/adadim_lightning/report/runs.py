"""What runs left behind, whoever wrote it: run folders, and offline files of Weights & Biases."""

import csv
import json
import math
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adadim_lightning.run_folder import read_summary, run_folders

Array = np.ndarray[Any, Any]

# What a damaged or half-written file may raise; it costs that file, not the report.
DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, csv.Error, zipfile.BadZipFile, zlib.error)
UNREADABLE = "unreadable"
SEEDS = ("seed", "random_seed", "seed_everything")  # keys under which people note it
ABOUT = ("seed", "epochs", "seconds")  # numbers in a summary that are no metrics


@dataclass(eq=False)
class RunRecord:
    """One run, as far as it came.

    Attributes:
        name: short name of its folder, or what its user called it; unique in the report.
        folder: where it lies.
        status: ``ok``, ``failed``, ``stopped``, ``running`` or ``unreadable``.
        error: why it ended early, in one line.
        seed: its seed.
        overrides: what its command line changed; None where nobody noted that.
        config: its configuration, nested.
        values: last value under each log name.
        history: a column for each log name, and ``epoch``; NaN where an epoch has no value.
        spectra: ``epoch`` ``(E,)``, eigenvalues ``R`` ``(E, d_R)`` and ``Z`` ``(E, d_Z)``; may be empty.
        seconds: how long it took.
        title: what its user called it, where a logger noted that.
    """

    name: str
    folder: Path
    status: str = "ok"
    error: str | None = None
    seed: int | None = None
    overrides: list[str] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    history: dict[str, Array] = field(default_factory=dict)
    spectra: dict[str, Array] = field(default_factory=dict)
    seconds: float | None = None
    title: str | None = None

    @property
    def finished(self) -> bool:
        """Whether its last values count: only of runs that came to their end."""
        return self.status == "ok"

    def curve(self, key: str) -> tuple[Array, Array]:
        """Epochs that have a finite value under a log name, counted from 1, and the values."""
        if key not in self.history:
            return np.empty(0), np.empty(0)
        known = np.isfinite(self.history[key])
        return self.history["epoch"][known] + 1, self.history[key][known]


def read_runs(paths: Iterable[str | Path]) -> tuple[list[RunRecord], list[str]]:
    """All runs at and below the paths, each once, and a line for everything that could not be read.

    Args:
        paths: run folders, multirun folders, folders of W&B offline runs, or ``run-ID.wandb`` files.

    Raises:
        ValueError: a path does not exist, or there is no run at all.
    """
    roots = [Path(path).expanduser() for path in paths]
    runs: dict[Path, RunRecord] = {}
    warnings: list[str] = []
    for root in roots:
        if not root.exists():
            raise ValueError(f"there is no folder {root}")
        before = len(runs)
        for place in _places(root):
            if place.resolve() not in runs:
                name = place.stem if place.is_file() else _name(place, root, alone=len(roots) == 1)
                read = _read_wandb if place.is_file() else _read_folder
                runs[place.resolve()] = read(place, name, warnings)
        if len(runs) == before and len(roots) > 1:
            warnings.append(f"{root} holds no run that is not listed already")
    if not runs:
        raise ValueError(f"no run found in {', '.join(map(str, roots))}: a run folder holds a summary.json")
    _tell_apart(list(runs.values()))
    return list(runs.values()), warnings


def _places(root: Path) -> Iterator[Path]:
    """Run folders, then W&B files of runs that have no folder of ours."""
    if root.is_file():
        yield root
        return
    folders = list(run_folders(root))
    yield from folders
    ours = {folder.resolve() for folder in folders}
    for file in sorted(root.rglob("run-*.wandb")):
        if ours.isdisjoint(file.resolve().parents):
            yield file


def _name(folder: Path, root: Path, *, alone: bool) -> str:
    inside = folder.relative_to(root)
    return root.resolve().name if inside == Path() else str(inside if alone else root.resolve().name / inside)


def _tell_apart(runs: list[RunRecord]) -> None:
    names = Counter(run.title or run.name for run in runs)
    for run in runs:
        if run.title is not None:
            run.name = run.title if names[run.title] == 1 else f"{run.title} ({run.name})"
        elif names[run.name] > 1:
            run.name = str(run.folder)


def _read_folder(folder: Path, name: str, warnings: list[str]) -> RunRecord:
    run = RunRecord(name, folder)
    try:
        summary = read_summary(folder) or {}
        run.status = str(summary["status"])
        run.error = None if summary.get("error") is None else str(summary["error"])
        run.seed = _integer(summary.get("seed"))
        overrides = summary.get("overrides")
        run.overrides = [str(text) for text in overrides] if isinstance(overrides, list) else None
        config = summary.get("config")
        run.config = config if isinstance(config, dict) else {}
        run.seconds = _number(summary.get("seconds"))
        run.values = _numbers({key: value for key, value in summary.items() if key not in ABOUT})
    except DAMAGE as error:
        run.status, run.error = UNREADABLE, _line(error)
        warnings.append(f"{name}: {run.error}")
    for file, read in (("metrics.csv", _read_metrics), ("spectra.npz", _read_spectra)):
        if (folder / file).exists():
            try:
                read(folder / file, run)
            except DAMAGE as error:
                warnings.append(f"{name}: {file} cannot be read: {_line(error)}")
    return run


def _read_metrics(path: Path, run: RunRecord) -> None:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if "epoch" not in (reader.fieldnames or ()):
            raise ValueError("it has no column epoch")
        rows = [{key: _cell(text) for key, text in row.items() if key and text} for row in reader]
    run.history = by_epoch(rows)
    run.values = _last(run.history) | run.values  # a run that still runs has no values in its summary


def _cell(text: str) -> float:
    """A number; NaN for what is none, such as the end of a line that was being written."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def by_epoch(rows: Iterable[Mapping[str, float]]) -> dict[str, Array]:
    """Columns with one value an epoch, the last, of sparse rows that each name their ``epoch``."""
    epochs: dict[float, dict[str, float]] = {}
    for row in rows:
        epoch = row.get("epoch", math.nan)
        if math.isfinite(epoch):
            epochs.setdefault(epoch, {}).update(row)
    keys = sorted({key for row in epochs.values() for key in row} - {"epoch", "step"})
    ordered = sorted(epochs)
    columns = {key: np.array([epochs[epoch].get(key, math.nan) for epoch in ordered]) for key in keys}
    return {"epoch": np.array(ordered)} | columns if ordered else {}


def _last(history: Mapping[str, Array]) -> dict[str, float]:
    finite = {key: column[np.isfinite(column)] for key, column in history.items() if key != "epoch"}
    return {key: float(column[-1]) for key, column in finite.items() if len(column)}


def _read_spectra(path: Path, run: RunRecord) -> None:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no npz file")
    with np.load(path, allow_pickle=False) as file:
        spectra = {key: np.asarray(file[key], dtype=float) for key in ("epoch", "R", "Z") if key in file}
    for key, rows in spectra.items():
        if key != "epoch" and (rows.ndim != 2 or not np.isfinite(rows).all()):
            raise ValueError(f"{key} is no table of eigenvalues")
    run.spectra = spectra


def _read_wandb(path: Path, name: str, warnings: list[str]) -> RunRecord:
    from adadim_lightning.report.wandb_file import read_wandb_file

    run = RunRecord(name, path.parent)
    try:
        found = read_wandb_file(path)
    except DAMAGE as error:
        run.status, run.error = UNREADABLE, f"it is no file of W&B: {_line(error)}"
        warnings.append(f"{name}: {run.error}")
        return run
    if found.cut:
        warnings.append(f"{name}: {path.name} is damaged; what follows byte {found.cut} is left out")
    run.config, run.title = found.config, found.name or None
    overrides = run.config.pop("overrides", None)
    run.overrides = [str(text) for text in overrides] if isinstance(overrides, list) else None
    run.seed, run.seconds = seed_of(run.config), found.seconds
    rows = [_numbers(row) for row in found.rows]
    if not any("epoch" in row for row in rows):  # not logged by Lightning: its own counter orders the rows
        rows = [{"epoch": row.get("_step", math.nan), **row} for row in rows]
    history = by_epoch(rows)
    run.history = {key: column for key, column in history.items() if _is_metric(key) or key == "epoch"}
    summary = {key: value for key, value in _numbers(found.summary).items() if _is_metric(key)}
    run.values = _last(run.history) | summary
    if found.exit_code is None:
        run.status, run.error = "running", "its file has no end: it runs still, or was killed"
    elif found.exit_code:
        run.status, run.error = "failed", f"exit code {found.exit_code}"
    return run


def _is_metric(key: str) -> bool:
    return not key.startswith("_") and key not in ("epoch", "trainer/global_step")


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {key: number for key, value in values.items() if (number := _number(value)) is not None}


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def seed_of(config: Mapping[str, Any]) -> int | None:
    """The seed of a configuration; None if there is none, or several below its top that differ."""
    if (own := _integer(config.get("seed"))) is not None:
        return own
    noted = {value for key, value in flattened(config).items() if key.rpartition(".")[2] in SEEDS}
    return int(noted.pop()) if len(noted) == 1 and min(noted).isdecimal() else None


def _line(error: Exception) -> str:
    message = " ".join(str(error).split())
    return message or type(error).__name__


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of dotted keys as a tree; one that is a tree stays as it is.

    Example:
        >>> nested({"objective.gamma": 0.1, "seed": 1})
        {'objective': {'gamma': 0.1}, 'seed': 1}
    """
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *above, name = str(key).split(".")
        node = tree
        for part in above:
            below = node.setdefault(part, {})
            if not isinstance(below, dict):  # a value and a branch of the same name: the key stays whole
                node, name = tree, str(key)
                break
            node = below
        node[name] = value
    return tree


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A configuration as dotted keys, and each value as JSON.

    Example:
        >>> flattened({"objective": {"gamma": 0.1}, "trust": []})
        {'objective.gamma': '0.1', 'trust': '[]'}
    """
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat
