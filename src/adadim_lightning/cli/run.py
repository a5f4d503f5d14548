"""One training run: from a composed configuration to a run folder."""

import copy
import logging
import math
import os
import re
import sys
import time
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from adadim_lightning.callbacks.collapse import CollapseGuard
from adadim_lightning.callbacks.probing import OnlineProbe
from adadim_lightning.callbacks.progress import EpochLines, carry_on_without_output, in_main_process
from adadim_lightning.cli import slurm
from adadim_lightning.cli.app import INTERRUPTED, one_line
from adadim_lightning.cli.build import make_data, say
from adadim_lightning.cli.check import check_config, check_logged, check_unused, hold, why_not_validated
from adadim_lightning.cli.closing import (
    MOST_RAW_PIXELS,
    evaluate_backbones,
    evaluation_names,
    is_left_out,
    unseen_classes,
    why_unevaluated,
    why_unscored,
)
from adadim_lightning.cli.loggers import finish_loggers, make_loggers
from adadim_lightning.cli.metrics_log import metrics_log
from adadim_lightning.cli.resume import Past, find_past
from adadim_lightning.cli.summary import Figures, Logged, print_report, write_summary
from adadim_lightning.cli.sweep import Job
from adadim_lightning.cli.sweep_report import print_line
from adadim_lightning.cli.termination import TERMINATED, ends_at_sigterm
from adadim_lightning.cli.versions import versions
from adadim_lightning.data import ImageData, ImageSet, TwoViews
from adadim_lightning.models import representation_dim
from adadim_lightning.module import AdaDimModule
from adadim_lightning.optim import scale_learning_rate
from adadim_lightning.run_folder import read_summary
from adadim_lightning.trust import check_targets


class DataOnlyCheckpointIO(TorchCheckpointIO):
    """Read checkpoints without running code in them.

    ``Trainer.fit`` has an argument for that since Lightning 2.6; before, it would unpickle whatever a file holds.
    """

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        """Load tensors and plain values to the CPU, whatever Lightning asks for."""
        return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def train(
    config: DictConfig,
    *,
    folder: str | Path,
    overrides: Iterable[str] = (),
    resume: bool = False,
    job: Job | None = None,
) -> float | None:
    """Train as configured, evaluate, and leave everything in the run folder.

    Args:
        config: what ``conf/train.yaml`` composes to.
        folder: where to write; made if it does not exist.
        overrides: command line that led to the configuration, for the summary.
        resume: go on with what the folder holds, from its last checkpoint; without one, begin.
        job: the run's place in a sweep.

    Returns:
        Value of ``config.optimized_metric``, which a sweeper optimizes; None if it was not logged.

    Raises:
        ValueError: something in the configuration does not fit.
        NonFiniteError: training met a NaN or infinity.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with hold(folder):
            return _train(config, folder, list(overrides), resume, job)
    except SystemExit as stop:
        if stop.code == TERMINATED:
            slurm.wait_for_the_end()
        raise


def _train(config: DictConfig, folder: Path, overrides: list[str], resume: bool, job: Job | None) -> float | None:
    earlier = (read_summary(folder) or {}) if resume else {}
    if earlier.get("status") == "ok":
        length = _longer(earlier, config, folder)
        if length is None:
            say(
                f"{os.path.relpath(folder)} holds a finished run of {earlier.get('epochs', 0)} epochs: nothing to "
                "do; a larger trainer.max_epochs or trainer.max_steps trains it further"
            )
            return earlier.get(str(earlier.get("optimized_metric")))
        say(f"resume     a finished run, trained further: {length}")
    if not resume:
        check_unused(folder)
    summary: dict[str, Any] = {
        "status": "running",
        "error": None,
        "seed": config.get("seed"),
        "epochs": earlier.get("epochs", 0),
        "seconds": earlier.get("seconds", 0.0),
        "events": earlier.get("events", []),
        "overrides": overrides,
        "config": OmegaConf.to_container(config),
        "run_id": earlier.get("run_id") or uuid.uuid4().hex[:8],
        "versions": versions(),
        "optimized_metric": config.get("optimized_metric"),
    }
    write_summary(folder / "summary.json", summary)
    start = time.perf_counter() - summary["seconds"]
    run = Run(config, folder, run_id=summary["run_id"], job=job)

    def last_words() -> None:
        stopped = {"status": "stopped", "error": "interrupted by SIGTERM", "epochs": run.epochs}
        write_summary(folder / "summary.json", summary | stopped | Logged.read(folder / "metrics.csv").last)

    with ends_at_sigterm(lambda: run.trainer, last_words):
        return _carry_out(run, summary, start, resume=resume)


def _carry_out(run: "Run", summary: dict[str, Any], start: float, *, resume: bool) -> float | None:
    config, folder, job = run.config, run.folder, run.job
    try:
        check_config(config)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
        summary["config"] = OmegaConf.to_container(config, resolve=True)
        write_summary(folder / "summary.json", summary)
        if not run.prepare(resume=resume):
            summary["status"] = "ok"
            return None
        summary["optimized_metric"] = run.optimized_metric
        run.fit()
        run.evaluate()
        summary["status"] = "ok"
    except Exception as error:
        summary |= {"status": "failed", "error": one_line(error)}
        raise
    except (KeyboardInterrupt, SystemExit) as stop:
        terminated = isinstance(stop, SIGTERMException) or stop.args == (slurm.REQUEUED,)
        summary |= {"status": "stopped", "error": f"interrupted by {'SIGTERM' if terminated else 'Ctrl-C'}"}
        say_stopped(folder, run.epochs)
        sys.exit(TERMINATED if terminated else INTERRUPTED)
    finally:
        logged = Logged.read(folder / "metrics.csv")
        values = logged.last | run.evaluation
        summary |= {
            "epochs": run.epochs or summary["epochs"],
            "seconds": round(time.perf_counter() - start, 2),
            "events": run.events,
        }
        write_summary(folder / "summary.json", summary | values)
        # Each job of a sweep is a run of its own, and one that did not end well is shown as failed.
        finish_loggers(exit_code=0 if summary["status"] == "ok" else 1)
    missing = None if run.optimized_metric in values else run.optimized_metric
    with carry_on_without_output():
        if job is None:
            print_report(folder, logged, run.evaluation, missing=missing)
        else:
            print_line(folder, summary | values)
    return values.get(run.optimized_metric)


@rank_zero_only
def say_stopped(folder: Path, epochs: int) -> None:
    """One line where the summary would have been."""
    plural = "" if epochs == 1 else "s"
    print(
        f"stopped after {epochs} epoch{plural}; everything so far is in {os.path.relpath(folder)}", file=sys.stderr
    )


class Run:
    """The objects of one run, made from its configuration."""

    def __init__(self, config: DictConfig, folder: Path, *, run_id: str, job: Job | None) -> None:
        self.config = config
        self.folder = folder
        self.run_id = run_id
        self.job = job
        self.past = Past()
        self.evaluation: Figures = {}
        self.logged: set[str] = set()
        self.views: TwoViews
        self.trainer: Trainer | None = None

    @property
    def epochs(self) -> int:
        """Number of epochs that were finished."""
        return 0 if self.trainer is None else self.trainer.current_epoch

    @property
    def events(self) -> list[dict[str, Any]]:
        """What the guard saw."""
        callbacks = [] if self.trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
        return [event for x in callbacks if isinstance(x, CollapseGuard) for event in x.events]

    @property
    def optimized_metric(self) -> str:
        """Log name of what a sweeper optimizes."""
        chosen = self.config.get("optimized_metric")
        default = "probe/linear_top1" if "probe/linear_top1" in self.logged else "dynamics/ER_R"
        return str(chosen or default)

    def prepare(self, *, resume: bool = False) -> bool:
        """Make all objects, to go on from the last checkpoint if wanted; False if only the views were wanted."""
        config = self.config
        _quieten()
        seed_everything(config.seed, workers=True, verbose=False)
        check_targets(OmegaConf.to_container(config, resolve=True), list(config.get("trust") or ()))
        self.views = instantiate(config.views, _convert_="all")
        self.data = make_data(config.data, "data", self.views)
        say(_two_lines("data", self.data))
        if config.get("show_views"):
            self._draw_views()
            return False
        chosen = config.get("eval_data")
        self.eval_data = make_data(chosen, "eval_data", self.views) if chosen else self.data
        self.backbone: nn.Module = instantiate(config.backbone, _convert_="all")
        self.untrained = copy.deepcopy(self.backbone)
        image = self.views.clean(self.data.sample(1)[0])[0]
        head = instantiate(config.head, _convert_="all")(representation_dim(self.backbone, image))
        if config.get("compile"):
            for part in (self.backbone, head):
                part.compile()
        objective = instantiate(config.objective, _convert_="all")
        callbacks = self._callbacks()
        self.logged = self._check_logged(objective, callbacks)
        if resume:
            self.past = find_past(self.folder, config.optimizer.get("_target_"))
        # Always first: its folder is the run folder, where the checkpoints go too.
        loggers = [
            metrics_log(self.folder, self.past.steps, self.past.row),
            *make_loggers(
                config.get("logger"),
                folder=self.folder,
                run_id=self.run_id,
                group=self.job.group if self.job else None,
                job_type=self.job.job_type if self.job else None,
                name=self.job.name if self.job else None,
            ),
        ]
        trainer = config.trainer
        self.trainer = instantiate(
            trainer,
            precision=trainer.get("precision") or best_precision(trainer.get("accelerator", "auto")),
            logger=loggers,
            callbacks=callbacks,
            plugins=[*slurm.plugins(), DataOnlyCheckpointIO()],
            default_root_dir=str(self.folder),
            # Left alone, Lightning adds a bar of its own beside our plain lines.
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
            _convert_="all",
        )
        self.module = AdaDimModule(
            self.backbone,
            head,
            objective,
            self._optimizer(),
            instantiate(config.get("lr_schedule"), _convert_="all"),
            channels_last=bool(config.get("channels_last")),
        )
        origin = OmegaConf.to_container(config, resolve=True)
        assert isinstance(origin, dict)
        del origin["resume"]  # how often a run was cut off leaves no trace
        self.module.origin = {
            "config": origin,
            "image_shape": list(image.shape),
            "pixel_whites": dict(self.data.scale.whites) if self.data.scale else {},
        }
        return True

    def _callbacks(self) -> list[Callback]:
        """The callbacks; probes read the labeled images of ``eval_data``, and without labels there are none."""
        callbacks = list(instantiate(self.config.get("callbacks") or {}, _convert_="all").values())
        guard = instantiate(self.config.get("guard") or None, _convert_="all")
        callbacks += [] if guard is None else [guard]  # after what it reads
        if not in_main_process():
            for lines in (callback for callback in callbacks if isinstance(callback, EpochLines)):
                lines.label = f"#{self.folder.name}"
        probes = [callback for callback in callbacks if isinstance(callback, OnlineProbe)]
        data = self.eval_data
        reason = why_unscored(data)
        if reason is not None:
            say(
                f"labels     {reason}, so no probes; H(R), I(R;Z) and the ranks need none\n"
                "           (eval_data=... brings labeled images)"
            )
            return [callback for callback in callbacks if callback not in probes]
        if data is not self.data:
            say(_two_lines("eval_data", data))
            train, test = data.train, data.test
            if not isinstance(train, ImageSet) or test is None:
                raise ValueError("probes cannot read a stream; set eval_data.streaming=false")
            for probe in probes:
                probe.train_loader = data.loader(train, clean=True)
                probe.val_loader = data.loader(test, clean=True)
        return callbacks

    def _check_logged(self, objective: Any, callbacks: Sequence[Callback]) -> set[str]:
        """Say what the evaluation leaves out, and refuse to wait for what nothing logs."""
        data, settings = self.eval_data, self.config.get("evaluation")
        reason = why_unevaluated(data, settings)
        if reason is not None and why_unscored(data) is None:  # else it was said
            say(f"evaluation none: {reason}")
        evaluated = set[str]()
        if settings is not None and reason is None:
            assert isinstance(data.train, ImageSet)
            assert data.test is not None
            evaluated = evaluation_names(settings, data)
            if any(is_left_out(name, data) for name in settings["of"]):
                pixels = math.prod(data.image_shape)
                say(f"evaluation without raw pixels: {pixels:,} of an image are more than {MOST_RAW_PIXELS:,}")
            if unseen := unseen_classes(data.train.labels, data.test.labels):
                held_out = int((data.test.labels >= 0).sum())
                say(
                    f"labels     {unseen:,} of {held_out:,} held out are of classes that no training image has:\n"
                    "           they always count as wrong"
                )
        validates = data is not self.data or why_not_validated(self.config.trainer) is None
        return check_logged(
            self.config, objective, callbacks, evaluated=evaluated, validates=validates, labels=why_unscored(data)
        )

    def _optimizer(self) -> Any:
        """The factory of the optimizer, its learning rate scaled by the global batch."""
        config = self.config
        assert self.trainer is not None
        processes, accumulated = self.trainer.world_size, self.trainer.accumulate_grad_batches
        batch = self.data.batch_size * processes * accumulated
        rule = str(config.get("lr_scaling") or "none")
        lr = config.optimizer.get("lr")
        if lr is None:
            return instantiate(config.optimizer, _convert_="all")
        scaled = scale_learning_rate(lr, batch, rule)
        parts = f"{self.data.batch_size}" + (f" x {processes} processes" if processes > 1 else "")
        parts += f" x {accumulated} accumulated" if accumulated > 1 else ""
        scaling = {"none": "not scaled", "linear": f"{lr:g} x {batch}/256", "sqrt": f"{lr:g} x sqrt({batch}/256)"}
        say(f"optimizer  learning rate {scaled:g} ({scaling[rule]}); global batch {batch} = {parts}")
        say(f"precision  {self.trainer.precision} on {self.trainer.strategy.root_device}")
        images = len(self.data.train) if isinstance(self.data.train, ImageSet) else 0
        left_out = images % (self.data.batch_size * processes)
        if 10 * left_out > images:
            say(f"epochs     each leaves out {left_out} of {images} images that fill no batch, others each time")
        return instantiate(config.optimizer, lr=scaled, _convert_="all")

    @rank_zero_only
    def _draw_views(self) -> None:
        from adadim_lightning.report.views import draw_views

        images, _ = self.data.sample(8)
        path = self.folder / "views.png"
        draw_views(self.views, images).savefig(path, dpi=120)
        say(f"What the model sees is in {os.path.relpath(path)}; without show_views=true it is trained on that")

    def fit(self) -> None:
        """Train."""
        assert self.trainer is not None
        slurm.requeue_when_told()
        try:
            self.trainer.fit(self.module, datamodule=self.data, ckpt_path=self.past.checkpoint)
        except Exception as error:
            # Slurm sends SIGTERM to all processes of a job: without its loader's workers, or submitit's call of
            # scontrol, the training fails, but that is no fault of its own.
            if self.trainer.received_sigterm:
                raise SIGTERMException from error
            raise
        if self.trainer.received_sigterm:  # in the last step
            raise SIGTERMException
        if self.trainer.global_step == 0:
            raise ValueError("nothing was trained: the limits of the trainer leave no step")

    def evaluate(self) -> None:
        """Score the frozen backbone on the held-out images."""
        assert self.trainer is not None
        backbones = {"raw": nn.Flatten(), "untrained": self.untrained, "trained": self.backbone}
        for backbone in backbones.values():
            backbone.to(self.trainer.strategy.root_device)
        self.evaluation = evaluate_backbones(backbones, self.eval_data, self.config.get("evaluation"))
        for logger in self.trainer.loggers[1:]:  # metrics.csv is about the training
            logger.log_metrics(self.evaluation, step=self.trainer.global_step)


def _longer(earlier: Mapping[str, Any], config: DictConfig, folder: Path) -> str | None:
    """Say by what a configuration is longer than a finished run; None if it is not."""
    was = (earlier.get("config") or {}).get("trainer") or {}
    newest = re.search(r"step=(\d+)", (folder / "checkpoints" / "last.ckpt").resolve().name)
    done = {"max_epochs": int(earlier.get("epochs") or 0), "max_steps": int(newest[1]) if newest else 0}
    changed = []
    for name, count in done.items():
        old, new = was.get(name, -1), config.trainer.get(name, -1)
        if isinstance(new, int) and 0 <= new <= count:
            return None
        if new != old:
            changed.append(f"trainer.{name} {old} -> {new}")
    return ", ".join(changed) or None


def _two_lines(key: str, data: ImageData) -> str:
    """What the data are, within 80 columns."""
    title, _, details = str(data).partition(": ")
    return f"{key:11}{title}\n{'':11}{details}"


def best_precision(accelerator: str) -> str:
    """Mixed bfloat16 on GPUs that have it, else full precision."""
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"


def _quieten() -> None:
    """Leave the terminal to what the user needs to see."""
    # Once something has imported pytorch_lightning, lightning speaks through that package's logger.
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*`srun` command is available.*",  # a sweep starts its jobs by submitit, not by srun
        ".*treespec, LeafSpec.*",
        ".*Initializing zero-element tensors.*",
        ".*Total length of `list` across ranks is zero.*",  # no labels, so nothing to validate on
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*The number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)
