"""Steers the objective by what is measured."""

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from adadim_lightning.balance import Balance, EffectiveRankSchedule, Statistics
from adadim_lightning.callbacks.monitor import DimensionMonitor, MeasuringPlan, rank_of_eigenvalues
from adadim_lightning.distributed import training_steps
from adadim_lightning.functional.spectrum import Spectrum
from adadim_lightning.metrics.window import RecentRows
from adadim_lightning.objective import AdaDimLoss


class AdaDim(DimensionMonitor):
    """Moves alpha and beta of the model's :class:`~adadim_lightning.AdaDimLoss` during training.

    It is a :class:`DimensionMonitor` too, and logs what that logs; beside it, ``balance/alpha`` and
    ``balance/beta``, as they were at the end of the epoch.

    Args:
        representation: dotted name of the submodule that puts out R, shape ``(N, d_R)``.
        embedding: dotted name of the submodule that puts out Z, shape ``(N, d_Z)``.
        balance: how alpha and beta move, and how Z is measured for it; AdaDim's rule by default.
        every_n_steps: longest time between the readings that are logged.
        window: rows behind a reading that is logged.
        spectrum: of the effective ranks that are logged.
        center: of the effective ranks that are logged.
        name: prefix of the log names and of the state in the checkpoint.

    Raises:
        ValueError: the model has no ``AdaDimLoss``, or more than one.

    Source: Kokilepersaud et al., "AdaDim", arXiv 2505.12576.

    Example:
        >>> callback = AdaDim("backbone", "head", balance=Balance(EffectiveRankSchedule("dim")))
    """

    steers = True

    def __init__(
        self,
        representation: str = "backbone",
        embedding: str = "projection_head",
        *,
        balance: Balance | None = None,
        every_n_steps: int = 50,
        window: int = 4096,
        spectrum: Spectrum = "singular",
        center: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(
            representation,
            embedding,
            every_n_steps=every_n_steps,
            window=window,
            spectrum=spectrum,
            center=center,
            name=name,
        )
        self.balance = balance if balance is not None else Balance(EffectiveRankSchedule())
        # What alpha is read from: the rows that are logged, or others where the balance asks for them.
        self.balance_plan = MeasuringPlan(
            self.balance.window, self.balance.every_n_steps, epoch_end=self.balance.every_n_steps is None
        )
        asked = (self.balance.window, self.balance.views, self.balance.center, self.balance.every_n_steps)
        self.shares_rows = asked == (window, "both", center, every_n_steps)
        self.balance_z = (
            self.recent_z if self.shares_rows else RecentRows(self.balance.window, center=self.balance.center)
        )
        self._objective: AdaDimLoss | None = None
        self._steps: float = math.inf
        self._values: tuple[float, float] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the objective, and place the taps."""
        objectives = [module for module in pl_module.modules() if isinstance(module, AdaDimLoss)]
        if len(objectives) != 1:
            raise ValueError(
                f"AdaDim steers one AdaDimLoss, but {type(pl_module).__name__} has {len(objectives)}; "
                "make AdaDimLoss the loss of the module, or use DimensionMonitor to observe"
            )
        self._objective = objectives[0]
        self._values = None
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn how long the training is."""
        self._steps = training_steps(trainer)

    def _plans(self) -> list[MeasuringPlan]:
        return [self.plan, self.balance_plan]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set alpha and beta for this step."""
        progress = min(trainer.global_step / self._steps, 1.0) if math.isfinite(self._steps) else math.nan
        values = self.balance(progress, trainer.current_epoch)
        if values != self._values:
            assert self._objective is not None
            self._objective.set_balance(*values)
            self._values = values
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def _measure(self, r_views: list[Tensor], z_views: list[Tensor]) -> None:
        super()._measure(r_views, z_views)
        if not self.shares_rows and self.balance_plan.measures(self._step, self._left, self._rows_per_step):
            if self.balance.views == "first":
                # One call a view, or one call with the views below each other.
                self.balance_z.update(z_views[0] if len(z_views) > 1 else z_views[0].chunk(2)[0])
            else:
                for z in z_views:
                    self.balance_z.update(z)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in a measured step, and renew the statistics when it is time."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.balance_plan.reads_after(self._step - 1):
            self._renew_statistics(trainer)

    def _renew_statistics(self, trainer: Trainer) -> None:
        eigenvalues_z, rows, dim_z = self.balance_z.read()
        eigenvalues_r, _, dim_r = self.recent_r.read()
        statistics = Statistics(
            er_z=rank_of_eigenvalues(eigenvalues_z, self.balance.spectrum),
            er_r=rank_of_eigenvalues(eigenvalues_r, self.spectrum),
            i_rz=self._mean_information(),
            rows=rows,
            dim_r=dim_r,
            dim_z=dim_z,
        )
        # The same sums give the same spectrum on every process of one kind; this holds for mixed machines too.
        self.balance.observe(trainer.strategy.broadcast(statistics))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch, and renew the statistics if that is when it is done."""
        super().on_train_epoch_end(trainer, pl_module)
        assert self._objective is not None
        self._log(
            pl_module,
            {"balance/alpha": float(self._objective.alpha), "balance/beta": float(self._objective.beta)},
        )
        if self.balance_plan.epoch_end and self._information and not self.balance_z.empty:
            self._renew_statistics(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state, and that of the balance."""
        state = super().state_dict() | {"balance": self.balance.state_dict()}
        return state if self.shares_rows else state | {"balance_z": self.balance_z.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self.balance.load_state_dict(state_dict["balance"])
        if not self.shares_rows:
            self.balance_z.load_state_dict(state_dict["balance_z"])
