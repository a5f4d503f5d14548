"""The loggers of a run besides ``metrics.csv``, and how they end: a failed run is shown as failed."""

import importlib.util
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from adadim_lightning.cli.build import say
from adadim_lightning.cli.credentials import logged_in
from adadim_lightning.extras import require

MODES = ("auto", "online", "offline")
WANDB_KEYS = ("mode", "log_code", "log_config")  # ours; all others go to wandb.init
# Set by `wandb agent`, or by hand; there it is known better than here.
WANDB_ENVIRONMENT = {
    "id": "WANDB_RUN_ID",
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
    "name": "WANDB_NAME",
}
PATIENCE_S = 30  # for the servers of wandb
WANDB_LABEL = 128  # characters that wandb allows
MLFLOW_RUN_ID = "adadim.run_id"

_open: list[Logger] = []  # those of the run in this process, as wandb.run is


def make_loggers(
    config: Mapping[str, Any] | None,
    *,
    folder: Path,
    run_id: str,
    group: str | None = None,
    job_type: str | None = None,
    name: str | None = None,
) -> list[Logger]:
    """Make the loggers of a configuration, and give each the run's settings under flat, searchable keys.

    Args:
        config: of the group ``logger``: a logger by its ``_target_`` under each key.
        folder: of the run; its ``config.yaml`` and ``.hydra/overrides.yaml`` hold the settings.
        run_id: of the run, the same when it is resumed.
        group: what the jobs of a sweep have in common.
        job_type: kind of the sweep.
        name: of the run, for people.

    Raises:
        MissingExtraError: the package of a logger is not installed.
        ValueError: a setting of a logger is not good.
    """
    labels = {"id": run_id, "group": group, "job_type": job_type, "name": name}
    made: list[Logger] = []
    for key, node in (config or {}).items():
        kind = str(node["_target_"]).rpartition(".")[2]
        if kind == "WandbLogger":
            logger = _wandb(key, node, labels, folder)
        elif kind == "MLFlowLogger":
            logger = _mlflow(node, labels, folder)
        else:
            if kind == "TensorBoardLogger":
                require("tensorboard", "tensorboard")
            logger = instantiate(node, _convert_="all")
            _log_settings(logger, folder)
        made.append(logger)
        _open.append(logger)  # at once: the next may fail
    return made


@rank_zero_only
def finish_loggers(*, exit_code: int) -> None:
    """End what :func:`make_loggers` began; each job of a sweep is a run of its own.

    Args:
        exit_code: 0 for a run that is shown as finished; any other is shown as failed.
    """
    loggers, _open[:] = list(_open), []
    for logger in loggers:
        logger.finalize("failed" if exit_code else "success")
        if type(logger).__name__ == "WandbLogger":
            logger.experiment.finish(exit_code=exit_code)  # type: ignore[attr-defined]


@rank_zero_only
def _log_settings(logger: Logger, folder: Path) -> None:
    """The configuration, a dotted key for each value, such as ``objective.gamma``, and the ``overrides``."""
    overrides = folder / ".hydra" / "overrides.yaml"
    given = OmegaConf.to_container(OmegaConf.load(overrides)) if overrides.exists() else []
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    logger.log_hyperparams({**_flat(config), "overrides": given})


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


# Weights & Biases.


def _wandb(key: str, node: Mapping[str, Any], labels: Mapping[str, Any], folder: Path) -> Logger:
    import wandb

    # Left alone, wandb talks at length, takes hold of stdout, and waits for a network for a minute and a half.
    patience = os.environ.get("WANDB_INIT_TIMEOUT", PATIENCE_S)
    quiet = wandb.Settings(silent=True, console="off", init_timeout=float(patience))
    # With a service of its own: that of a parent process may still hold this run, if an earlier part was killed.
    os.environ.pop("WANDB_SERVICE", None)
    wandb.setup(settings=quiet)
    mode, reason = _wandb_mode(key, node.get("mode") or "auto")
    wanted = {
        name: node.get(name) or os.environ.get(WANDB_ENVIRONMENT[name]) or (label and label[:WANDB_LABEL])
        for name, label in labels.items()
    }
    rest = {name: value for name, value in node.items() if name not in (*WANDB_KEYS, *wanted)}
    make = instantiate(rest, _partial_=True, _convert_="all")
    logger = make(**wanted, mode=mode, settings=quiet)
    if mode == "online" and not _is_reached(logger):
        mode, reason = "offline", "no network"
        wandb.teardown()  # its service still holds the run
        wandb.setup(settings=quiet)
        logger = make(**wanted, mode=mode, settings=quiet)
    _begin_wandb(logger, node, folder, mode, reason)
    return logger  # type: ignore[no-any-return]


def _is_reached(logger: Any) -> bool:
    """Whether the run could begin online; a training is not given up for want of a network."""
    from wandb.errors import AuthenticationError, CommError

    try:
        _ = logger.experiment  # in other processes than the first, nothing
    except AuthenticationError:
        raise
    except CommError:
        return False
    return True


@rank_zero_only
def _begin_wandb(logger: Any, node: Mapping[str, Any], folder: Path, mode: str, reason: str) -> None:
    """Begin the run, say where it is, and log what led to it."""
    run = logger.experiment
    if mode == "offline":
        files = os.path.relpath(Path(run.dir).parents[1])
        say(f"wandb      offline ({reason}); to upload it:\n{'':11}wandb sync {files}/offline-run-*")
    elif mode == "online":
        say(f"wandb      online ({reason}):\n{'':11}{run.url}")
    _log_settings(logger, folder)
    if node.get("log_config"):
        paths = [folder / "config.yaml", *(folder / ".hydra").glob("*.yaml")]
        _log_artifact(run, "config", {str(path.relative_to(folder)): path for path in paths})
    if node.get("log_code"):
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        trust = config.get("trust") if isinstance(config, dict) else None
        _log_artifact(run, "code", dict(_sources(["adadim_lightning", *(trust or ())])))


def _wandb_mode(key: str, wanted: str) -> tuple[str, str]:
    """The mode and the reason for it: online where somebody is logged in, if nobody says otherwise."""
    if wanted not in MODES:
        raise ValueError(f"logger.{key}.mode must be one of {', '.join(MODES)}, got {wanted!r}")
    if wanted != "auto":
        return wanted, f"logger.{key}.mode"
    if given := os.environ.get("WANDB_MODE"):
        return {"dryrun": "offline", "run": "online"}.get(given, given), "WANDB_MODE"
    return ("online", "logged in") if logged_in() else ("offline", "not logged in")


def _log_artifact(run: Any, kind: str, files: Mapping[str, Path]) -> None:
    import wandb

    artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
    for name, path in sorted(files.items()):
        artifact.add_file(str(path), name=name)
    run.log_artifact(artifact)


def _sources(packages: Iterable[str]) -> Iterable[tuple[str, Path]]:
    """The source files of packages."""
    for package in {str(name).partition(".")[0] for name in packages}:
        spec = importlib.util.find_spec(package)
        for root in map(Path, (spec and spec.submodule_search_locations) or ()):
            for path in root.rglob("*.py"):
                yield f"{package}/{path.relative_to(root)}", path


# MLflow.


def _mlflow(node: Mapping[str, Any], labels: Mapping[str, Any], folder: Path) -> Logger:
    """A run of MLflow; that of an earlier start of the same run goes on."""
    # A folder of files needs no server and no database; MLflow wants to be told that this is meant.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    client = require("mlflow.tracking", "mlflow").MlflowClient(node["tracking_uri"])
    errors = require("mlflow.exceptions", "mlflow")
    name = node["experiment_name"]
    if client.get_experiment_by_name(name) is None:
        with suppress(errors.MlflowException):  # another job was faster
            client.create_experiment(name)
    experiment = client.get_experiment_by_name(name)
    query = f"tags.`{MLFLOW_RUN_ID}` = '{labels['id']}'"
    earlier = client.search_runs([experiment.experiment_id], query, max_results=1)
    if earlier:
        run_id = earlier[0].info.run_id
        client.update_run(run_id, status="RUNNING")
        continued: Logger = instantiate(node, run_id=run_id, _convert_="all")
        _ = continued.experiment  # type: ignore[attr-defined]  # else it would not end what it never looked at
        return continued
    tags = {"group": labels["group"], "job_type": labels["job_type"], MLFLOW_RUN_ID: labels["id"]}
    tags = {key: value for key, value in tags.items() if value is not None}
    logger: Logger = instantiate(node, run_name=labels["name"], tags=tags, _convert_="all")
    _log_settings(logger, folder)  # once: what MLflow has noted cannot be changed
    return logger
