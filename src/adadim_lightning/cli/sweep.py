"""Sweeps that can be gone on with: which jobs are done, which folder is whose, and what a study still owes."""

import copy
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf

from adadim_lightning.run_folder import SUMMARY, read_summary, run_folders

# What says where and how a job runs, not what it is.
NOT_THE_JOB = ("run_dir", "resume")
NOT_THE_NAME = ("sweep=", "logger")
LENGTH = ("trainer.max_epochs", "trainer.max_steps")

Key = frozenset[str]


def job_key(overrides: Iterable[str]) -> Key:
    """What tells the job of a sweep from all others: its overrides, in any order."""
    return frozenset(
        override
        for override in without_null(overrides)
        if (name := override.lstrip("+~").partition("=")[0]) not in NOT_THE_JOB and not name.startswith("hydra")
    )


def _is_length(override: str) -> bool:
    return override.lstrip("+~").partition("=")[0] in LENGTH


def without_null(overrides: Iterable[str]) -> list[str]:
    """Deletions as they were given: Hydra's sweepers make ``~key=null`` of ``~key``, which Hydra 1.4 refuses.

    Example:
        >>> without_null(["~callbacks.knn=null", "seed=null"])
        ['~callbacks.knn', 'seed=null']
    """
    return [re.sub(r"^(~[^=]+)=null$", r"\1", override) for override in overrides]


def wants_resume(config: DictConfig) -> bool:
    """Whether to go on with what the folder holds: when asked to, and when Slurm has started the job again.

    Raises:
        ValueError: asked to, without naming the folder.
    """
    if config.get("resume"):
        if "${now:" in str(OmegaConf.to_container(config, resolve=False)["run_dir"]):  # type: ignore[index,call-overload]
            raise ValueError("resume=true needs run_dir=FOLDER, the folder of the run or sweep to go on with")
        return True
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


@dataclass(frozen=True)
class Job:
    """A run's place in its sweep, for dashboards."""

    number: int
    group: str
    job_type: str
    name: str


def sweep_job(hydra_config: Any) -> Job | None:
    """The job that Hydra is running; None outside a sweep."""
    if hydra_config.mode != RunMode.MULTIRUN:
        return None
    folder = os.path.relpath(hydra_config.sweep.dir)
    return Job(
        number=int(hydra_config.job.num),
        group=Path(folder).name if folder.startswith("..") else folder,
        job_type=hydra_config.runtime.choices.get("sweep") or "sweep",
        name=",".join(sorted(x for x in job_key(hydra_config.overrides.task) if not x.startswith(NOT_THE_NAME))),
    )


class Sweep:
    """One multirun: its folder, and the jobs that it was asked for."""

    def __init__(self, config: DictConfig) -> None:
        self.folder = Path(config.hydra.sweep.dir)
        self.resume = wants_resume(config)
        self.jobs: dict[Path, list[str]] = {}
        self.known: dict[Key, Path] = {}
        self.given = frozenset(map(str, config.hydra.overrides.task))  # as typed: an axis is no job's override
        for folder in run_folders(self.folder) if self.folder.is_dir() else ():
            try:
                summary = read_summary(folder)
            except ValueError:  # cut off in the middle: that job starts anew
                summary = None
            if summary is not None:
                self.known[job_key(summary.get("overrides", ()))] = folder
        if self.known and not self.resume:
            raise ValueError(
                f"{self.folder} holds runs already; resume=true goes on with them, "
                "or name another folder by run_dir=FOLDER"
            )
        # Hydra numbers the folders of its jobs unless the user has asked for other names.
        self.numbered = OmegaConf.to_container(config.hydra.sweep)["subdir"] == "${hydra.job.num}"  # type: ignore[index,call-overload]

    def place(self, overrides: Sequence[str], number: int) -> tuple[Path | None, list[str]]:
        """Folder of a job, None where Hydra names it, and the overrides that lead to it."""
        key = job_key(overrides)
        folder = self.known.get(key) or self._of_another_length(key)
        if folder is None and self.numbered:
            taken = {path.name for path in self.known.values()}
            while str(number) in taken or (self.folder / str(number) / SUMMARY).exists():
                number += 1
            folder = self.folder / str(number)
        if folder is None:
            return None, list(overrides)
        self.known[key] = folder
        self.jobs[folder] = list(overrides)
        name = re.sub(r"(['\\])", r"\\\1", os.path.relpath(folder, self.folder))
        return folder, [*overrides, f"hydra.sweep.subdir='{name}'"]

    def _of_another_length(self, key: Key) -> Path | None:
        """Return the folder of the job that differs in its length alone, unless length is what is swept."""
        lengths = frozenset(filter(_is_length, key))
        if not lengths <= self.given:
            return None
        rest = key - lengths
        found = {path for known, path in self.known.items() if rest == {x for x in known if not _is_length(x)}}
        return found.pop() if len(found) == 1 else None

    def summaries(self) -> list[tuple[Path, dict[str, Any]]]:
        """What became of each job, also of those that an earlier part ran; one that never began is "missing"."""
        found = []
        for folder in dict.fromkeys((*self.known.values(), *self.jobs)):
            try:
                summary = read_summary(folder)
            except ValueError as error:
                summary = {"status": "failed", "error": str(error)}
            missing = {"overrides": self.jobs.get(folder, []), "status": "missing", "error": None}
            found.append((folder, missing | (summary or {})))
        return found


class SweepLauncher(Launcher):
    """Gives another launcher those jobs that are not done, each with a folder of its own.

    Args:
        launcher: runs the jobs: Hydra's basic one, joblib, submitit.
        sweep: the multirun.
    """

    def __init__(self, launcher: Launcher, sweep: Sweep) -> None:
        self.launcher = launcher
        self.sweep = sweep

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Nothing: the other launcher is set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs that are not done; results in the order of all."""
        results: list[JobReturn | None] = []
        waiting: list[list[str]] = []
        for i, overrides in enumerate(job_overrides):
            folder, overrides = self.sweep.place(without_null(overrides), initial_job_idx + i)
            results.append(_done(folder, overrides))
            if results[-1] is None:
                waiting.append(overrides)
        ran = iter(self.launcher.launch(waiting, initial_job_idx=initial_job_idx) if waiting else ())
        return [_QuietReturn(**vars(next(ran) if result is None else result)) for result in results]


class _QuietReturn(JobReturn):
    """A result that raises the error of its job without a word on stderr: the command says it all in the end."""

    @property
    def return_value(self) -> Any:
        if self.status == JobStatus.COMPLETED:
            return self._return_value
        raise self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def _done(folder: Path | None, overrides: Sequence[str]) -> JobReturn | None:
    """The result of a job that was finished earlier."""
    if folder is None:
        return None
    try:
        summary = read_summary(folder)
    except ValueError:
        return None
    if summary is None or summary["status"] != "ok":
        return None
    if job_key(summary.get("overrides", ())) != job_key(overrides):
        return None  # of another length: the run itself tells whether that is longer
    value = summary.get(str(summary.get("optimized_metric")))
    return JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=value)


@contextmanager
def sweeping() -> Iterator[list[Sweep]]:
    """While it lasts, multiruns of Hydra do only what is left to do; yields the list of sweeps that were started.

    Hydra has no hook around its launchers, and a plugin package of ours would run in every Hydra program on the
    machine; so two methods are replaced while this command runs.
    """
    sweeps: list[Sweep] = []
    make_launcher, make_sweeper = Plugins.instantiate_launcher, Plugins.instantiate_sweeper

    def instantiate_launcher(
        self: Plugins, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> Launcher:
        sweep = Sweep(config)
        sweeps.append(sweep)
        loader: Any = hydra_context.config_loader
        load = loader.load_sweep_config

        def load_sweep_config(master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
            found: DictConfig = load(master_config, without_null(sweep_overrides))
            return found

        loader.load_sweep_config = load_sweep_config
        return SweepLauncher(make_launcher(self, hydra_context, task_function, config), sweep)

    def instantiate_sweeper(
        self: Plugins, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> Sweeper:
        if config.hydra.sweeper.get("storage") is None:
            return make_sweeper(self, hydra_context=hydra_context, task_function=task_function, config=config)
        # The jobs' configurations are compared with this one, so it stays as it is.
        sweeper = self._instantiate(prepare_study(config))
        assert isinstance(sweeper, Sweeper)
        sweeper.setup(hydra_context=hydra_context, task_function=task_function, config=config)
        return sweeper

    Plugins.instantiate_launcher = instantiate_launcher  # type: ignore[method-assign]
    Plugins.instantiate_sweeper = instantiate_sweeper  # type: ignore[method-assign]
    try:
        yield sweeps
    finally:
        Plugins.instantiate_launcher = make_launcher  # type: ignore[method-assign]
        Plugins.instantiate_sweeper = make_sweeper  # type: ignore[method-assign]


def prepare_study(config: DictConfig) -> DictConfig:
    """Let an Optuna study end with the number of trials that was asked for, however often it was killed.

    Trials that failed or were cut off are put into the queue again, with the same parameters: their jobs are then
    matched with their folders, and go on.

    Returns:
        Settings of the sweeper, which ask for the trials that are missing.
    """
    Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)  # where the study's file goes
    settings: DictConfig = copy.deepcopy(config.hydra.sweeper)
    if not wants_resume(config):
        return settings
    import optuna

    try:
        study = optuna.load_study(study_name=settings.study_name, storage=settings.storage)
    except KeyError:
        return settings  # killed before it began
    states = optuna.trial.TrialState
    trials = study.get_trials()
    settled = [trial.params for trial in trials if trial.state in (states.COMPLETE, states.PRUNED)]
    done = len(settled)
    settled += [trial.system_attrs.get("fixed_params") for trial in trials if trial.state == states.WAITING]
    for trial in trials:
        if trial.state == states.RUNNING:
            study.tell(trial.number, state=states.FAIL)
        if trial.state in (states.RUNNING, states.FAIL) and trial.params and trial.params not in settled:
            study.enqueue_trial(trial.params)
            settled.append(trial.params)
    OmegaConf.set_readonly(settings, False)
    settings.n_trials = max(settings.n_trials - done, 0)
    if settings.get("sampler") is not None and settings.sampler.get("seed") is not None:
        settings.sampler.seed += len(trials)  # with its first seed it would propose its first trials again
    return settings
