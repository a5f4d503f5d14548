"""What is looked at before a run begins: its configuration, and whether its folder is free."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from adadim_lightning.cli.app import nearest
from adadim_lightning.cli.closing import check_evaluation
from adadim_lightning.functional._numeric import check_bool, check_integer
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
