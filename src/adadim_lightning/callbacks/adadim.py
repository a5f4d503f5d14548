"""Steers the objective by what is measured."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from adadim_lightning.balance import Balance, EffectiveRankSchedule, Statistics
from adadim_lightning.callbacks.monitor import DimensionMonitor, rank_of_eigenvalues
from adadim_lightning.distributed import training_progress, training_steps
from adadim_lightning.epoch_means import EpochMeans
from adadim_lightning.feed import Feed, Pool, Source
from adadim_lightning.functional._numeric import check_bool, check_number
from adadim_lightning.functional.spectrum import Spectrum
from adadim_lightning.metrics.window import Measured, PendingSteps, RecentRows, Step
from adadim_lightning.objective import AdaDimLoss, ObjectiveOutput
from adadim_lightning.steering import (
    NATIVE_LOSSES,
    NativeLoss,
    NativeScale,
    Target,
    loss_of,
    replace_loss,
    steered_loss,
)


class AdaDim(DimensionMonitor):
    r"""Steers a model's loss between decorrelation and uniformity by the measured effective rank of Z.

    What it steers, :math:`L_\text{native}` being the model's own loss:

    - Without ``native_loss`` and ``target``: alpha and beta of the :class:`~adadim_lightning.AdaDimLoss` that is
      found in the model.
    - ``native_loss="sample_contrastive"`` (SimCLR, MoCo, DCL, NNCLR ...):
      :math:`\alpha L_\text{native} + s \big((1 - \alpha) L_\text{VICReg} + \beta I_2(R; Z)\big)`.
    - ``native_loss="dimension_contrastive"`` (VICReg, Barlow Twins, W-MSE ...):
      :math:`(1 - \alpha) L_\text{native} + s \big(\alpha \kappa L_\text{NT-Xent} + \beta I_2(R; Z)\big)`.
    - ``native_loss="other"`` (BYOL, DINO, MAE ...): :math:`L_\text{native}` + ``weight`` :math:`s` times the
      whole of :class:`~adadim_lightning.AdaDimLoss`; of a single view, that of the view with itself.
    - ``target="criterion.alpha"``: writes alpha to this attribute of the model, and leaves its loss alone.

    The native loss keeps its size, so that a tuned learning rate fits as before; with ``kappa="match"`` :math:`s`,
    the ratio of the gradients of the native loss and of VICReg at Z, scales the added terms to it.

    The model needs no change: the loss that its ``training_step`` returns is replaced while the fit lasts, from R
    and Z of the same forward pass, so accumulation and the scale of mixed precision apply to the added terms too.
    Of more than two views the added terms are the mean over all pairs.

    It is a :class:`DimensionMonitor` too, and logs what that logs; beside it, ``balance/alpha`` and
    ``balance/beta``, as they were at the end of the epoch, and with ``native_loss`` the epoch's means of
    ``loss/native``, ``loss/total`` and the parts, ``loss_weighted/...`` being what enters the total.

    Args:
        representation: where R comes from, as for :class:`DimensionMonitor`.
        embedding: where Z comes from.
        native_loss: what kind of loss the model has, if it has no ``AdaDimLoss``.
        target: dotted name of a number or a one-element tensor of the model that takes alpha.
        observe: change nothing, but log what it would do; the parts of the loss then are means over the measured
            steps, and ``kappa="match"`` stays at 1. The only way with a model that optimizes by hand.
        objective: the added terms and gamma, with ``native_loss`` or ``observe``; a copy is kept.
        weight: of the added objective with ``native_loss="other"``.
        momentum: sources of R and Z of the momentum branch, for a model whose student sees one view of each image
            (MoCo): they are the second view. Their rows must be in the order of the student's.
        pool: makes rows of tokens or maps, as for :class:`DimensionMonitor`.
        balance: how alpha and beta move, and how Z is measured for it, AdaDim's rule by default; a copy is kept.
        every_n_steps: longest time between the readings that are logged.
        window: rows behind a reading that is logged.
        spectrum: of the effective ranks that are logged.
        center: of the effective ranks that are logged.
        name: prefix of the log names and of the state in the checkpoint.

    Raises:
        ValueError: there is no ``AdaDimLoss``, or more than one, and nothing else to steer is named; the target is
            no number; the model optimizes by hand and its loss were to be steered; the student sees one view.
        NonFiniteError: R or Z holds a NaN or infinity while the loss is steered.

    Source: Kokilepersaud et al., "AdaDim", arXiv 2505.12576; ``native_loss`` and ``target`` are ours.

    Example:
        >>> callback = AdaDim("backbone", "projection_head", native_loss="sample_contrastive")
    """

    steers = True

    def __init__(
        self,
        representation: Source | None = None,
        embedding: Source | None = None,
        *,
        native_loss: NativeLoss | None = None,
        target: str | None = None,
        observe: bool = False,
        objective: AdaDimLoss | None = None,
        weight: float = 1.0,
        momentum: tuple[Source, Source] | None = None,
        pool: Pool | None = None,
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
            pool=pool,
            every_n_steps=every_n_steps,
            window=window,
            spectrum=spectrum,
            center=center,
            name=name,
        )
        check_bool("observe", observe)
        check_number("weight", weight, low=0)
        if native_loss is not None and native_loss not in NATIVE_LOSSES:
            raise ValueError(f"native_loss must be one of {', '.join(NATIVE_LOSSES)}, got {native_loss!r}")
        if native_loss is not None and target is not None:
            raise ValueError("native_loss changes the loss and target leaves it alone; give one of them")
        if momentum is not None and (native_loss is None or len(momentum) != 2):
            raise ValueError("momentum goes with native_loss and names two sources, those of R and of Z")
        if objective is not None and native_loss is None and not observe:
            raise ValueError("objective goes with native_loss or observe; the model's own AdaDimLoss is found")
        self.native_loss = native_loss
        self.target = target
        self.observe = observe
        self.weight = weight
        self.momentum = None if momentum is None else Feed(*momentum, pool=pool)
        # Copies, so that what is given to several callbacks carries nothing from one fit to another.
        self._given = _copied(
            objective if objective is not None else AdaDimLoss(),
            balance if balance is not None else Balance(EffectiveRankSchedule()),
        )
        self.objective, self.balance = _copied(*self._given)
        self.native_scale = NativeScale()
        # What alpha is read from: the rows that are logged, or others where the balance asks for them.
        self.balance_pending = PendingSteps(self.balance.window, first_view=self.balance.views == "first")
        asked = (self.balance.window, self.balance.views, self.balance.center, self.balance.every_n_steps)
        self.shares_rows = asked == (window, "both", center, every_n_steps)
        self.balance_z = (
            self.recent_z if self.shares_rows else RecentRows(self.balance.window, center=self.balance.center)
        )
        self._balanced: AdaDimLoss | None = None  # alpha and beta are set in this one
        self._target: Target | None = None
        self._steps: float = math.inf
        self._loss_means = EpochMeans()
        self._values: tuple[float, float] | None = None
        self._batch: Any = None
        self._views: list[list[Tensor]] | None = None
        self._undo: Callable[[], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        of_a_fit = ("_balanced", "_target", "_batch", "_views", "_undo")
        return super().__getstate__() | dict.fromkeys(of_a_fit)

    @property
    def alters_loss(self) -> bool:
        """Whether what is measured enters the loss that is trained."""
        return not self.observe and self.target is None

    @property
    def alpha(self) -> float | None:
        """Alpha as it was last set; None before the first step."""
        return None if self._values is None else self._values[0]

    @property
    def _adds_terms(self) -> bool:
        return self.native_loss is not None and not self.observe

    def _find_objective(self, pl_module: LightningModule) -> AdaDimLoss | None:
        """The objective that alpha and beta belong to; None where only a target takes alpha."""
        owner = type(pl_module).__name__
        own = [module for module in pl_module.modules() if isinstance(module, AdaDimLoss)]
        if self.native_loss is not None:
            if own:
                raise ValueError(f"the loss of {owner} is an AdaDimLoss, which AdaDim steers without native_loss")
            if self._adds_terms and not pl_module.automatic_optimization:
                raise ValueError(
                    f"{owner} optimizes by hand (automatic_optimization = False), so its loss cannot be changed "
                    "from outside; use observe=True, or target=... if it has an alpha, or make AdaDimLoss its loss"
                )
            return self.objective
        if self.target is not None:
            return None
        if len(own) == 1:
            return own[0]
        if self.observe:
            return self.objective
        raise ValueError(
            f"AdaDim steers one AdaDimLoss, but {owner} has {len(own)}; say what its own loss is by native_loss="
            f"{', '.join(map(repr, NATIVE_LOSSES))}, name an alpha that it has by target=..., or use "
            "DimensionMonitor to observe"
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what is steered, and place the taps."""
        self._balanced = self._find_objective(pl_module)
        self._target = None if self.target is None else Target(pl_module, self.target)
        self._values = None
        self.guard.to(pl_module.device).reset()
        super().on_fit_start(trainer, pl_module)
        if self.momentum is not None:
            self.momentum.open(pl_module)
        if self._adds_terms:
            self._undo = replace_loss(pl_module, partial(self._total, pl_module), self._record)

    def _feeds(self) -> list[Feed]:
        return super()._feeds() + ([] if self.momentum is None else [self.momentum])

    def _close(self) -> None:
        super()._close()
        if self.momentum is not None:
            self.momentum.close()
        if self._undo is not None:
            self._undo()
        self._undo = self._batch = self._views = None
        self._tell_step(None)

    def _tell_step(self, step: object | None) -> None:
        """Tell what counts training steps which one this is."""
        self.native_scale.step = step
        if self._balanced is not None:
            self._balanced.step = step

    def _forget(self) -> None:
        """Begin with the objective and the balance as they were given: a schedule may have a state of its own."""
        self.objective, self.balance = _copied(*self._given)
        self.native_scale = NativeScale()
        super()._forget()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn how long the training is."""
        self._steps = training_steps(trainer)
        self.objective.to(pl_module.device)
        self.native_scale.to(pl_module.device)
        self.guard.to(pl_module.device)

    # The loss of a module that has its own.

    def _record(self) -> None:
        self.feed.record(True, graph=self._adds_terms)
        if self.momentum is not None:
            self.momentum.record(True)

    def _momentum_rows(self, views: int, batch: Any, outputs: Any) -> list[Tensor]:
        """R and Z of the second view, where another branch sees it; none elsewhere."""
        if self.momentum is None:
            return []
        if views > 1:
            raise ValueError(f"momentum=... is for a student that sees one view; this one sees {views}")
        return [x.rows[-1] for x in self.momentum.read(batch, outputs)]

    def _steered(self, native: Tensor, batch: Any, outputs: Any) -> ObjectiveOutput:
        r, z = self.feed.read(batch, outputs)
        if native.requires_grad and not any(x.requires_grad for x in z.rows):
            raise ValueError(
                "Z has no gradient, so the added terms would train nothing; let training_step return it without "
                "detach(), or name the submodule that puts it out"
            )
        if native.requires_grad and not any(x.requires_grad for x in r.rows) and self.feed.is_trained():
            raise ValueError(
                "R has no gradient though its submodule is trained: checkpoint activations by use_reentrant=False"
            )
        self._views = [[x.detach() for x in views.rows] for views in (r, z)]
        momentum = self._momentum_rows(len(r.rows), batch, outputs)
        return self._objective_of(native, r.rows, z.rows, momentum, z.originals)

    def _objective_of(
        self,
        native: Tensor,
        r: Sequence[Tensor],
        z: Sequence[Tensor],
        momentum: Sequence[Tensor],
        embeddings: Sequence[Tensor] | None = None,
    ) -> ObjectiveOutput:
        assert self.native_loss is not None
        if momentum:
            r, z = [*r, momentum[0]], [*z, momentum[1]]
        return steered_loss(
            self.native_loss,
            native,
            r,
            z,
            self.objective,
            weight=self.weight,
            embeddings=embeddings,
            native_scale=self.native_scale,
        )

    def _total(self, pl_module: LightningModule, native: Tensor, outputs: Any) -> Tensor:
        output = self._steered(native, self._batch, outputs)
        self.guard.watch(output.total, self._global_step)
        self._log_loss(pl_module, output)
        return output.total

    def _log_loss(self, pl_module: LightningModule, output: ObjectiveOutput, step: object = None) -> None:
        values = {"loss/total": output.total.detach()}
        values |= {f"loss/{name}": value for name, value in output.parts.items()}
        values |= {f"loss_weighted/{name}": value for name, value in output.weighted.items()}
        values = {self._key(key): value for key, value in values.items()}
        self._loss_means.add(pl_module, values, weight=1, step=step)

    def _read(self, batch: Any, outputs: Any) -> list[list[Tensor]]:
        return self._views if self._views is not None else super()._read(batch, outputs)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set alpha and beta for this step."""
        values = self.balance(training_progress(trainer, self._steps), trainer.current_epoch)
        if values != self._values:
            # An objective of the model itself is left alone when observing.
            if self._balanced is not None and not (self.observe and self._balanced is not self.objective):
                self._balanced.set_balance(*values)
            if self._target is not None and not self.observe:
                self._target.write(values[0])
            self._values = values
        self._batch = batch
        if pl_module.automatic_optimization:  # by hand, one step may take the loss of several parts
            self._tell_step(object())
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in the step, and renew the statistics when it is time."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.momentum is not None:
            self.momentum.release()
        self._batch = self._views = None
        self._tell_step(None)
        if self.balance.every_n_steps is not None and self._step % self.balance.every_n_steps == 0:
            self._measure(pl_module)
            self._renew_statistics(trainer)

    def _more(self, views: int, batch: Any, outputs: Any) -> tuple[Tensor, ...]:
        native = loss_of(outputs) if self.observe and self.native_loss is not None else None
        if native is None:
            return ()
        momentum = self._momentum_rows(views, batch, outputs)
        return (native.detach(), *(x.detach().clone() for x in momentum))

    def _hold(self, step: Step) -> None:
        super()._hold(step)
        if not self.shares_rows:
            self.balance_pending.add(step)

    def _measure(self, module: LightningModule) -> list[Measured]:
        self.guard.check_all()
        steps = super()._measure(module)
        for measured in steps:
            # Of one image, the terms are not defined.
            if measured.step.more and min(measured.images) > 1:
                native, *momentum = measured.step.more
                if module.automatic_optimization:
                    native = native * module.trainer.accumulate_grad_batches
                with torch.no_grad():
                    output = self._objective_of(native, *measured.step.views(), momentum)
                    self._log_loss(module, output, step=object())
        return steps

    def _take_in_balance(self, steps: list[Measured], _: int | None) -> None:
        """Add what the balance reads, which are other rows than those that are logged."""
        first = self.balance.views == "first"
        if steps:
            own = [m.step.z[: m.step.first] if first else m.step.z for m in steps]
            self.balance_z.update(torch.cat(own), sum(sum(m.images if first else m.counts) for m in steps))

    def _renew_statistics(self, trainer: Trainer) -> None:
        if not self.shares_rows:
            self._take_in_balance(*self.balance_pending.take(trainer.lightning_module.device))
        if self.balance_z.empty or not self._measured:
            return  # every step so far had a NaN or infinity
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
        if self._values is not None:
            alpha, phase = self._values
            values = {"balance/alpha": alpha}
            if self._balanced is not None:
                values["balance/beta"] = self._balanced.gamma * phase
            self._log(pl_module, values)
        if self.balance.every_n_steps is None:
            self._renew_statistics(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to write a checkpoint that is not good."""
        self.guard.check_all()

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state, and that of the balance."""
        state = super().state_dict() | {
            "balance": self.balance.state_dict(),
            "objective": self.objective.state_dict(),
            "native_scale": self.native_scale.state_dict(),
        }
        if self.shares_rows:
            return state
        return state | {
            "balance_pending": self.balance_pending.state_dict(),
            "balance_z": self.balance_z.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self._values = None
        self.balance.load_state_dict(state_dict["balance"])
        objective = dict(state_dict["objective"])
        if not self.objective.match_gradients:
            objective["kappa"] = self.objective.kappa  # a setting, no state
        self.objective.load_state_dict(objective)
        if "native_scale" in state_dict:
            self.native_scale.load_state_dict(state_dict["native_scale"])
        if not self.shares_rows and "balance_z" in state_dict:  # else the balance had other settings
            self.balance_pending.load_state_dict(state_dict.get("balance_pending", []))
            self.balance_z.load_state_dict(state_dict["balance_z"])


def _copied(objective: AdaDimLoss, balance: Balance) -> tuple[AdaDimLoss, Balance]:
    try:
        return deepcopy((objective, balance))
    except Exception as error:
        raise ValueError(
            f"AdaDim works on copies of objective and balance, but one of them cannot be copied ({error}); leave "
            "out what copy.deepcopy refuses, such as a generator or a lock in a schedule"
        ) from error
