"""One training run: from a composed configuration to a run folder."""

import copy
import csv
import json
import logging
import math
import os
import time
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from adadim_lightning.cli.app import one_line
from adadim_lightning.cli.versions import versions
from adadim_lightning.data import InMemoryImages
from adadim_lightning.evaluation import embed, knn_accuracy, linear_accuracy
from adadim_lightning.models import representation_dim
from adadim_lightning.module import AdaDimModule

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


def train(config: DictConfig, *, folder: str | Path, overrides: Iterable[str] = ()) -> float | None:
    """Train as configured, evaluate, and leave everything in the run folder.

    Args:
        config: what ``conf/train.yaml`` composes to.
        folder: where to write; made if it does not exist.
        overrides: command line that led to the configuration, for the summary.

    Returns:
        Value of ``config.optimized_metric``, which a sweeper optimizes; None if it was not logged.

    Raises:
        ValueError: something in the configuration does not fit.
        NonFiniteError: training met a NaN or infinity.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    summary: dict[str, Any] = {
        "status": "stopped",
        "error": None,
        "seed": config.seed,
        "epochs": 0,
        "seconds": 0.0,
        "overrides": list(overrides),
        "config": OmegaConf.to_container(config, resolve=True),
        "run_id": uuid.uuid4().hex[:8],
        "versions": versions(),
        "optimized_metric": config.optimized_metric,
    }
    start = time.perf_counter()
    run = Run(config, folder)
    try:
        run.fit()
        run.evaluate()
        summary["status"] = "ok"
    except Exception as error:
        summary |= {"status": "failed", "error": one_line(error)}
        raise
    finally:
        first, last = read_metrics(folder / "metrics.csv")
        summary |= {"epochs": run.epochs, "seconds": round(time.perf_counter() - start, 2)}
        write_summary(folder / "summary.json", summary | last | run.evaluation)
    print_report(folder, first, last, run.evaluation)
    return (last | run.evaluation).get(config.optimized_metric)


class Run:
    """The objects of one run, made from its configuration."""

    def __init__(self, config: DictConfig, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.evaluation: Figures = {}
        self.trainer: Trainer | None = None

    @property
    def epochs(self) -> int:
        """Number of epochs that were finished."""
        return 0 if self.trainer is None else self.trainer.current_epoch

    def fit(self) -> None:
        """Make all objects and train."""
        config = self.config
        _quieten()
        seed_everything(config.seed, workers=True, verbose=False)
        self.data: LightningDataModule = instantiate(config.data, _convert_="all")
        self.backbone: nn.Module = instantiate(config.backbone, _convert_="all")
        self.untrained = copy.deepcopy(self.backbone)
        head = instantiate(config.head, _convert_="all")(representation_dim(self.backbone, self._image()))
        module = AdaDimModule(
            self.backbone,
            head,
            instantiate(config.objective, _convert_="all"),
            instantiate(config.optimizer, _convert_="all"),
            instantiate(config.get("lr_schedule"), _convert_="all"),
        )
        # Always first: its folder is the run folder, where the checkpoints go too.
        loggers = [CSVLogger(str(self.folder), name="", version="")]
        loggers += instantiate(config.logger, _convert_="all").values()
        callbacks = list(instantiate(config.callbacks, _convert_="all").values())
        self.trainer = instantiate(
            config.trainer,
            logger=loggers,
            callbacks=callbacks,
            default_root_dir=str(self.folder),
            # Left alone, Lightning adds a bar of its own beside our plain lines.
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
            _convert_="all",
        )
        self.trainer.fit(module, datamodule=self.data)

    def _image(self) -> torch.Tensor:
        assert isinstance(self.data, InMemoryImages)
        return self.data.views.clean(self.data.train.images[:1])[0]

    def evaluate(self) -> None:
        """Score the frozen backbone on the held-out images, beside raw pixels and the untrained one."""
        assert isinstance(self.data, InMemoryImages)
        splits = [(split.images, split.labels) for split in (self.data.train, self.data.test)]
        for name, backbone in (
            ("raw", nn.Flatten()),
            ("untrained", self.untrained),
            ("trained", self.backbone),
        ):
            train, test = (
                embed(
                    backbone,
                    zip(torch.split(images, 512), torch.split(labels, 512), strict=True),
                    self.data.views.clean,
                )
                for images, labels in splits
            )
            self.evaluation[f"evaluation/{name}_linear_top1"] = linear_accuracy(train, test)
            self.evaluation[f"evaluation/{name}_knn_top1"] = knn_accuracy(train, test)


def _quieten() -> None:
    """Leave the terminal to what the user needs to see."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*treespec, LeafSpec.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*The number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)


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
def print_report(folder: Path, first: Figures, last: Figures, evaluation: Figures) -> None:
    """Print what the run did, on one screen."""
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
        for column in ("raw pixels", "untrained backbone", "trained backbone"):
            table.add_column(column, justify="right")
        for key, label in (("linear_top1", "linear probe"), ("knn_top1", "kNN")):
            scores = (evaluation[f"evaluation/{name}_{key}"] for name in ("raw", "untrained", "trained"))
            table.add_row(label, *(f"{score:.3f}" for score in scores))
        console.print()
        console.print(table)
    console.print(f"\nEverything is in {os.path.relpath(folder)}", soft_wrap=True)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"
