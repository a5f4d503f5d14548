"""``metrics.csv``, also of a run that goes on."""

import csv
import math
import os
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

METRICS = "metrics.csv"


def metrics_log(folder: Path, steps: int = 0, last: Mapping[str, float] | None = None) -> CSVLogger:
    """The logger that writes a run's ``metrics.csv``.

    Args:
        folder: of the run.
        steps: number of steps that are kept of an earlier part of the run; what it logged later is dropped.
        last: values of the last of the kept epochs, with its ``epoch``. A checkpoint is written before the trainer
            logs the epoch, so a run that was stopped between the two has them there alone.
    """
    logger = CSVLogger(str(folder), name="", version="")
    if steps:
        _keep(logger, folder / METRICS, steps, dict(last or {}))
    return logger


@rank_zero_only
def _keep(logger: CSVLogger, path: Path, steps: int, last: dict[str, float]) -> None:
    rows: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("step") and int(row["step"]) < steps]
    if last:
        epoch = str(int(last.pop("epoch")))
        there = {key for row in rows if row["epoch"] == epoch for key, text in row.items() if text}
        missing = {key: str(value) for key, value in last.items() if key not in there and not math.isnan(value)}
        if missing:
            rows.append({"epoch": epoch, "step": str(steps - 1), **missing})
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
