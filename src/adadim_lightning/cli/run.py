"""One training run: from a composed configuration to a run folder."""

import copy
import csv
import json
import logging
import math
import os
import sys
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
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from adadim_lightning.callbacks.progress import carry_on_without_output
from adadim_lightning.cli.app import INTERRUPTED, nearest, one_line
from adadim_lightning.cli.versions import versions
from adadim_lightning.data import InMemoryImages
from adadim_lightning.evaluation import embed, knn_accuracy, linear_accuracy
from adadim_lightning.functional._numeric import check_integer
from adadim_lightning.models import representation_dim
from adadim_lightning.module import AdaDimModule

Figures = dict[str, float]

TERMINATED = 143  # as shells number a SIGTERM

REQUIRED = ("data", "views", "backbone", "head", "optimizer", "balance", "objective", "trainer", "seed", "run_dir")
KEYS = {*REQUIRED, "lr_schedule", "callbacks", "logger", "optimized_metric"}
TRAINER_INTEGERS = {
    "max_epochs": 1,
    "max_steps": 1,
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 1,
}

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
    check_unused(folder)
    summary: dict[str, Any] = {
        "status": "ok",
        "error": None,
        "seed": config.get("seed"),
        "overrides": list(overrides),
        "config": OmegaConf.to_container(config),
        "run_id": uuid.uuid4().hex[:8],
        "versions": versions(),
        "optimized_metric": config.get("optimized_metric"),
    }
    start = time.perf_counter()
    run = Run(config, folder)
    try:
        check_config(config)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
        summary["config"] = OmegaConf.to_container(config, resolve=True)
        run.fit()
        run.evaluate()
    except Exception as error:
        summary |= {"status": "failed", "error": one_line(error)}
        raise
    except (KeyboardInterrupt, SystemExit) as stop:
        terminated = isinstance(stop, SIGTERMException)
        summary |= {"status": "stopped", "error": f"interrupted by {'SIGTERM' if terminated else 'Ctrl-C'}"}
        say_stopped(folder, run.epochs)
        sys.exit(TERMINATED if terminated else INTERRUPTED)
    finally:
        first, last = read_metrics(folder / "metrics.csv")
        summary |= {"epochs": run.epochs, "seconds": round(time.perf_counter() - start, 2)}
        write_summary(folder / "summary.json", summary | last | run.evaluation)
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            # Each job of a sweep is a run of its own, and a failed one is shown as failed.
            wandb.finish(exit_code=0 if summary["status"] == "ok" else 1)
    values = last | run.evaluation
    missing = None if config.optimized_metric in values else str(config.optimized_metric)
    with carry_on_without_output():
        print_report(folder, first, last, run.evaluation, missing=missing)
    return values.get(config.optimized_metric)


@rank_zero_only
def check_unused(folder: Path) -> None:
    """Raise ValueError if the folder holds a run already: their files would mix."""
    if any((folder / name).exists() for name in ("metrics.csv", "checkpoints")):
        raise ValueError(f"{folder} holds a run already; name another folder by run_dir=FOLDER, or delete it")


def check_config(config: DictConfig) -> None:
    """Raise ValueError for what would only fail later, in words that do not name the key, or not at all."""
    for key in REQUIRED:
        if config.get(key) is None:
            raise ValueError(f"the configuration needs {key}, which was removed or null")
    for key in map(str, config):
        meant = nearest(key, KEYS, cutoff=0.7)
        if key == "experiment":
            raise ValueError('the experiment file lacks its first line, "# @package _global_"')
        if key not in KEYS and meant is not None:
            raise ValueError(f"the configuration has no key {key!r}; did you mean {meant!r}?")
    check_integer("seed", config.seed, low=0)
    for key, low in TRAINER_INTEGERS.items():
        value = config.trainer.get(key)
        if value is not None and value != -1:
            check_integer(f"trainer.{key}", value, low=low)
    if config.trainer.get("limit_train_batches") == 0:
        raise ValueError("nothing would be trained: trainer.limit_train_batches is 0")
    if config.trainer.max_epochs is None and config.trainer.max_steps in (None, -1):
        raise ValueError("trainer.max_epochs must be a number of epochs; null would mean Lightning's 1000")


@rank_zero_only
def say_stopped(folder: Path, epochs: int) -> None:
    """One line where the summary would have been."""
    plural = "" if epochs == 1 else "s"
    print(
        f"stopped after {epochs} epoch{plural}; everything so far is in {os.path.relpath(folder)}", file=sys.stderr
    )


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
        loggers += instantiate(config.get("logger") or {}, _convert_="all").values()
        callbacks = list(instantiate(config.get("callbacks") or {}, _convert_="all").values())
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
        if self.trainer.global_step == 0:
            raise ValueError("nothing was trained: the limits of the trainer leave no step")

    def _image(self) -> torch.Tensor:
        if not isinstance(self.data, InMemoryImages):
            raise ValueError(
                f"data must be made as InMemoryImages, got {type(self.data).__name__}; "
                "with other data modules use AdaDimModule in a program of your own"
            )
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
    # Once something has imported pytorch_lightning, lightning speaks through that package's logger.
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*treespec, LeafSpec.*",
        ".*Initializing zero-element tensors.*",
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
        for column in ("raw pixels", "untrained backbone", "trained backbone"):
            table.add_column(column, justify="right")
        for key, label in (("linear_top1", "linear probe"), ("knn_top1", "kNN")):
            scores = (evaluation[f"evaluation/{name}_{key}"] for name in ("raw", "untrained", "trained"))
            table.add_row(label, *(f"{score:.3f}" for score in scores))
        console.print()
        console.print(table)
    if missing is not None:
        console.print(f"\noptimized_metric {missing} was not logged", markup=False)
    console.print(f"\nEverything is in {os.path.relpath(folder)}", soft_wrap=True)


def _figure(value: float) -> str:
    size = abs(value)
    return f"{value:.3g}" if size >= 1e6 else f"{value:,.0f}" if size >= 100 else f"{value:.3f}"
