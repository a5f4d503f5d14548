"""What Weights & Biases shows of a run beside its curves: spectra, the H-I plane, and pictures."""

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from adadim_lightning.callbacks.monitor import DimensionMonitor
from adadim_lightning.callbacks.plots import DynamicsPlot, stack_spectra
from adadim_lightning.callbacks.tapping import TappingCallback

AXIS = "epoch"
METRICS = (
    *("dynamics/H_R", "dynamics/ER_R", "dynamics/ER_Z", "dynamics/I_RZ", "dynamics/log_n"),
    *("balance/alpha", "balance/beta"),
    *(f"loss/{part}" for part in ("total", "native", "decorrelation", "uniformity", "information")),
    *(f"loss/{part}" for part in ("invariance", "variance", "covariance", "redundancy")),
    *(f"loss_weighted/{part}" for part in ("native", "decorrelation", "uniformity", "information")),
    *("probe/linear_top1", "probe/knn_top1", "throughput/images_per_second"),
    *("spectra/R", "spectra/Z", "pictures/views", "pictures/dynamics"),
    *(
        f"evaluation/{of}_{probe}"
        for of in ("raw", "untrained", "trained")
        for probe in ("linear_top1", "linear_balanced", "knn_top1", "few_shot_1pct_top1", "few_shot_10pct_top1")
    ),
)
SECTIONS = {name.partition("/")[0] for name in METRICS}
BEST = {"loss/total": "min,last", "probe/linear_top1": "max,last", "probe/knn_top1": "max,last"}
PLANE = {
    "H_R": "dynamics/H_R",
    "I_RZ": "dynamics/I_RZ",
    "ER_R": "dynamics/ER_R",
    "ER_Z": "dynamics/ER_Z",
    "alpha": "balance/alpha",
    "beta": "balance/beta",
}
SMALLEST = -9  # log10 of a share of the trace; what is below piles up there
IMAGES = 8


class WandbPanels(DynamicsPlot):
    """Fills the panels of Weights & Biases; without a ``WandbLogger`` among the trainer's loggers it does nothing.

    The project's log names get ``epoch`` as their axis, and the summary the best value beside the last one:
    ``probe/linear_top1.max``, ``loss/total.min``. Logged beyond them: each epoch ``spectra/R`` and ``spectra/Z``,
    histograms of log10 of the eigenvalues as shares of their sum, where dimensions that have collapsed pile up at
    -9; at the start ``pictures/views``, what the model sees, if the data are an
    :class:`~adadim_lightning.data.ImageData`; and at the end, also of a fit that fails, ``pictures/dynamics`` and
    ``plane``, a scatter chart of I(R;Z) over H(R) fed by a table with a row for each epoch.

    It changes neither the model nor its random state. Needs a :class:`DimensionMonitor` (an :class:`AdaDim` is
    one) among the callbacks before it; the logged names of one with a ``name`` are prefixed by it, as its own are.

    Example:
        >>> callback = WandbPanels()
    """

    def __init__(self) -> None:
        super().__init__()
        self._defined: set[str] = set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the axes, and show the views."""
        self._defined = set()
        prefixes = {c.name for c in trainer.callbacks if isinstance(c, TappingCallback)} | {None}  # type: ignore[attr-defined]
        self._define(trainer, (_key(prefix, name) for prefix in prefixes for name in METRICS))
        self._log_views(trainer)

    @rank_zero_only
    def _draws(self, trainer: Trainer) -> bool:
        return any(isinstance(logger, WandbLogger) for logger in trainer.loggers)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the spectra of the epoch, and note its values."""
        super().on_train_epoch_end(trainer, pl_module)
        self._define(trainer, (key for key in trainer.callback_metrics if not SECTIONS.isdisjoint(key.split("/"))))
        self._log_spectra(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log what there is."""
        try:
            self._write(trainer)
        except Exception as error:  # the exception that ended the fit matters more
            rank_zero_warn(f"wandb did not take the pictures of the run: {error}")

    @rank_zero_only
    def _define(self, trainer: Trainer, names: Iterable[str]) -> None:
        """Give metrics their axis; Lightning's own is the step, for all that is not named."""
        runs = _runs(trainer)
        for name in sorted(set(names) - self._defined) if runs else ():
            best = next((value for key, value in BEST.items() if name == key or name.endswith(f"/{key}")), None)
            for run in runs:
                run.define_metric(name, step_metric=AXIS, summary=best)
            self._defined.add(name)

    @rank_zero_only
    def _log_views(self, trainer: Trainer) -> None:
        from adadim_lightning.data import ImageData

        data = getattr(trainer, "datamodule", None)
        if not _runs(trainer) or not isinstance(data, ImageData):
            return
        import wandb

        from adadim_lightning.report.views import draw_views

        with isolate_rng():
            # The views follow the images that they are given from device to device; these stay.
            figure = draw_views(copy.deepcopy(data.views).cpu(), data.sample(IMAGES)[0])
        _log(trainer, {"pictures/views": wandb.Image(figure)}, trainer.current_epoch)

    @rank_zero_only
    def _log_spectra(self, trainer: Trainer) -> None:
        if not _runs(trainer):
            return
        import wandb

        epoch = trainer.current_epoch
        for monitor in _monitors(trainer):
            measured, r, z = monitor.spectra[-1]
            if measured == epoch:
                values = {
                    _key(monitor.name, f"spectra/{which}"): wandb.Histogram(np_histogram=_histogram(eigenvalues))
                    for which, eigenvalues in (("R", r), ("Z", z))
                }
                _log(trainer, values, epoch)

    @rank_zero_only
    def _write(self, trainer: Trainer) -> None:
        monitors = _monitors(trainer)
        if not _runs(trainer) or not monitors or not self.history:
            return
        import wandb

        from adadim_lightning.report.dynamics import draw_dynamics

        epoch = int(self.history["epoch"][-1])
        for monitor in monitors:
            history = self._history_of(monitor)
            columns = {AXIS: history["epoch"].astype(int)}
            columns |= {name: history[key] for name, key in PLANE.items() if key in history}
            rows = [[x.item() for x in row] for row in zip(*columns.values(), strict=True)]
            table = wandb.Table(columns=list(columns), data=rows)
            plane = wandb.plot.scatter(table, x="H_R", y="I_RZ", title="Path through H(R) and I(R;Z), nats")
            picture = wandb.Image(draw_dynamics(history, stack_spectra(monitor)))
            values = {_key(monitor.name, "plane"): plane, _key(monitor.name, "pictures/dynamics"): picture}
            _log(trainer, values, epoch)


def _key(prefix: str | None, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name


def _runs(trainer: Trainer) -> list[Any]:
    """The wandb runs that the trainer logs to."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _monitors(trainer: Trainer) -> list[DimensionMonitor]:
    """Those that have measured."""
    return [c for c in trainer.callbacks if isinstance(c, DimensionMonitor) and c.spectra]  # type: ignore[attr-defined]


def _log(trainer: Trainer, values: dict[str, Any], epoch: int) -> None:
    for run in _runs(trainer):
        run.log(values | {AXIS: epoch})


def _histogram(eigenvalues: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Counts and edges of log10 of the shares of the trace, in bins that are the same for all epochs."""
    share = (eigenvalues / eigenvalues.sum().clamp_min(1e-30)).clamp_min(10.0**SMALLEST).log10()
    return np.histogram(share.clamp(SMALLEST, 0).numpy(), bins=6 * -SMALLEST, range=(SMALLEST, 0))
