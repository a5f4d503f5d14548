"""What is looked at before a run begins: its configuration, and whether its folder is free."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import DeviceStatsMonitor, LearningRateMonitor
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from adadim_lightning.callbacks.adadim import AdaDim
from adadim_lightning.callbacks.monitor import DimensionMonitor
from adadim_lightning.callbacks.probing import OnlineProbe
from adadim_lightning.callbacks.progress import RATE, Throughput
from adadim_lightning.callbacks.tapping import TappingCallback
from adadim_lightning.cli.app import nearest
from adadim_lightning.cli.closing import check_evaluation
from adadim_lightning.functional._numeric import check_bool, check_integer
from adadim_lightning.objective import AdaDimLoss
from adadim_lightning.run_folder import run_lock

REQUIRED = ("data", "views", "backbone", "head", "optimizer", "balance", "objective", "trainer", "seed", "run_dir")
SWITCHES = ("channels_last", "compile", "show_views", "resume")
KEYS = {
    *REQUIRED,
    *SWITCHES,
    *(
        "eval_data",
        "lr_schedule",
        "lr_scaling",
        "callbacks",
        "guard",
        "logger",
        "evaluation",
        "optimized_metric",
        "trust",
    ),
}
DYNAMICS = [f"dynamics/{name}" for name in ("H_R", "ER_R", "ER_Z", "I_RZ", "log_n")]
BALANCE = ["balance/alpha", "balance/beta"]
TERMS = ("decorrelation", "uniformity", "information")
TRAINER_INTEGERS = {
    "max_epochs": 1,
    "max_steps": 1,
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 1,
}


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes off a run folder while this one lives.

    Raises:
        ValueError: another process holds it.
    """
    lock = run_lock(folder)
    try:
        if getattr(rank_zero_only, "rank", 0) == 0:
            lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{folder} is in use by a run that is going on; name another folder by run_dir=FOLDER"
        ) from None
    try:
        yield
    finally:
        lock.release()


@rank_zero_only
def check_unused(folder: Path) -> None:
    """Raise ValueError if the folder holds a run already: their files would mix."""
    if any((folder / name).exists() for name in ("metrics.csv", "checkpoints")):
        raise ValueError(
            f"{folder} holds a run already; resume=true goes on with it, or name another folder by run_dir=FOLDER"
        )


def check_config(config: DictConfig) -> None:
    """Raise ValueError for what would only fail later, in words that do not name the key, or not at all."""
    for key in REQUIRED:
        if config.get(key) is None:
            raise ValueError(f"the configuration needs {key}, which was removed or null")
    for key in map(str, config):
        meant = nearest(key, KEYS, cutoff=0.7)
        if key in ("experiment", "sweep"):
            raise ValueError(f'the {key} file lacks its first line, "# @package _global_"')
        if key not in KEYS and meant is not None:
            raise ValueError(f"the configuration has no key {key!r}; did you mean {meant!r}?")
    check_integer("seed", config.seed, low=0)
    if config.get("evaluation") is not None:
        check_evaluation(config.evaluation)
    for key, low in TRAINER_INTEGERS.items():
        value = config.trainer.get(key)
        if value is not None and value != -1:
            check_integer(f"trainer.{key}", value, low=low)
    for key in SWITCHES:
        check_bool(key, config.get(key, False))
    if config.trainer.get("limit_train_batches") == 0:
        raise ValueError("nothing would be trained: trainer.limit_train_batches is 0")
    if config.trainer.max_epochs is None and config.trainer.max_steps in (None, -1):
        raise ValueError("trainer.max_epochs must be a number of epochs; null would mean Lightning's 1000")


def why_not_validated(trainer: DictConfig) -> str | None:
    """Say why a trainer will never validate, as far as its settings tell; None if it may."""
    every, epochs = trainer.get("check_val_every_n_epoch"), trainer.get("max_epochs")
    if trainer.get("limit_val_batches") == 0:
        return "trainer.limit_val_batches is 0"
    if every and epochs and 0 < epochs < every:
        return f"trainer.check_val_every_n_epoch={every} is more than trainer.max_epochs={epochs}"
    return None


def check_logged(
    config: DictConfig,
    objective: Any,
    callbacks: Sequence[Callback],
    *,
    evaluated: set[str],
    validates: bool,
    labels: str | None = None,
) -> set[str]:
    """Raise ValueError for a metric that is waited for and that nothing will log; a sweep, say, would end without.

    Args:
        config: of the run.
        objective: its objective.
        callbacks: its callbacks.
        evaluated: log names of the closing evaluation.
        validates: whether the probes will be scored.
        labels: what is wrong with the labels, if anything is.

    Returns:
        The names that will be logged, but for those of classes that are not known here.
    """
    known = isinstance(objective, AdaDimLoss)
    logged = {"loss/total"}
    if isinstance(objective, AdaDimLoss):
        logged |= {f"loss/{name}" for name in (*TERMS, *objective.weights)}
        logged |= {f"loss_weighted/{name}" for name in TERMS}
    for callback in callbacks:
        names: list[str] = []
        if isinstance(callback, DimensionMonitor):
            names = DYNAMICS + (BALANCE if isinstance(callback, AdaDim) else [])
        elif isinstance(callback, OnlineProbe):
            names = [callback.key] if validates or callback.val_loader is not None else []
        elif isinstance(callback, Throughput):
            names = [RATE]
        elif isinstance(callback, LearningRateMonitor | DeviceStatsMonitor) or _is_foreign(callback):
            known = False
        prefix = f"{callback.name}/" if isinstance(callback, TappingCallback) and callback.name else ""
        logged |= {prefix + name for name in names}
    monitors = ((type(callback).__name__, getattr(callback, "monitor", None)) for callback in callbacks)
    waiting = [
        ("optimized_metric", config.get("optimized_metric"), logged | evaluated),
        *((f"the monitor of {owner}", monitor, logged | {"epoch", "step"}) for owner, monitor in monitors),
    ]
    for where, name, there in waiting:
        if name is None or name in there or (not known and not str(name).startswith("evaluation/")):
            continue
        if name in evaluated:
            raise ValueError(f"{where} is {name!r}, which is measured after the training: nothing can wait for it")
        reason = _why_not_logged(config, str(name), there, labels)
        raise ValueError(f"{where} is {name!r}, which nothing in this run logs{reason}")
    return logged | evaluated


def _is_foreign(callback: Callback) -> bool:
    return type(callback).__module__.partition(".")[0] not in ("adadim_lightning", "lightning")


def _why_not_logged(config: DictConfig, name: str, there: set[str], labels: str | None) -> str:
    of_labels = name.startswith("evaluation/") or "probe/" in name
    if of_labels and labels is not None:
        return f": the labels are {labels}" if labels != "none" else ": the images have no labels"
    if name.startswith("evaluation/") and config.get("evaluation") is None:
        return ": evaluation is null"
    if "probe/" in name and name not in there and (reason := why_not_validated(config.trainer)):
        return f": {reason}"
    if (meant := nearest(name, there, cutoff=0.8)) is not None:
        return f"; did you mean {meant!r}?"
    return f"; it logs {', '.join(sorted(there))}"
