"""``metrics.csv``, also of a run that goes on."""

import csv
import os
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

METRICS = "metrics.csv"


def metrics_log(folder: Path, *, steps: int = 0) -> CSVLogger:
    """The logger that writes a run's ``metrics.csv``.

    Args:
        folder: of the run.
        steps: number of steps that are kept of an earlier part of the run; what it logged later is dropped.
    """
    logger = CSVLogger(str(folder), name="", version="")
    if steps:
        _keep(logger, folder / METRICS, steps)
    return logger


@rank_zero_only
def _keep(logger: CSVLogger, path: Path, steps: int) -> None:
    if not path.exists():
        return
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("step") and int(row["step"]) < steps]
    if not rows:
        return
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    experiment = logger.experiment  # clears the folder of an earlier file
    os.replace(temporary, path)
    experiment.metrics_keys = list(rows[0])
