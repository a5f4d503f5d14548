"""``metrics.csv``, also of a run that goes on."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

METRICS = "metrics.csv"


def metrics_log(folder: Path, steps: int = 0, row: Mapping[str, float] | None = None) -> CSVLogger:
    """The logger that writes a run's ``metrics.csv``.

    Args:
        folder: of the run.
        steps: number of steps that are kept of an earlier part of the run; what it logged later is dropped.
        row: what the last kept epoch logged, with its ``epoch`` and ``step``. A checkpoint is written before the
            trainer logs its epoch, so a run that was stopped between the two has it there alone.
    """
    logger = CSVLogger(str(folder), name="", version="")
    if steps:
        _keep(logger, folder / METRICS, steps, dict(row or {}))
    return logger


@rank_zero_only
def _keep(logger: CSVLogger, path: Path, steps: int, last: dict[str, float]) -> None:
    rows: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("step") and int(row["step"]) < steps]
    logged = {(row["epoch"], key) for row in rows for key, text in row.items() if text}
    if last:
        epoch, step = (str(int(last.pop(key))) for key in ("epoch", "step"))
        missing = {key: str(value) for key, value in last.items() if (epoch, key) not in logged}
        if missing:
            rows.append({"epoch": epoch, "step": step, **missing})
    rows.sort(key=lambda row: int(row["step"]))
    if not rows:
        return
    keys = sorted(set().union(*rows))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=keys)
        writer.writeheader()
        writer.writerows(rows)
    experiment = logger.experiment  # clears the folder of an earlier file
    os.replace(temporary, path)
    experiment.metrics_keys = keys
