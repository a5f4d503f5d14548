"""Warns of a collapse or a divergence, ends the run, or takes it back to the last good checkpoint."""

import math
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from adadim_lightning.balance import EffectiveRankSchedule
from adadim_lightning.callbacks.adadim import AdaDim
from adadim_lightning.callbacks.checkpoints import RunCheckpoints
from adadim_lightning.callbacks.monitor import DimensionMonitor, Reading
from adadim_lightning.callbacks.tapping import TappingCallback
from adadim_lightning.distributed import world_size
from adadim_lightning.functional._numeric import check_integer, check_number
from adadim_lightning.guard import COLLAPSED_RANK, CollapseError, FiniteGuard, NonFiniteError
from adadim_lightning.optim import lower_learning_rate
from adadim_lightning.pretrained import CheckpointError, read_state
from adadim_lightning.steering import loss_of

Policy = Literal["warn", "stop", "rollback"]

NEGATIVE_NATS = -0.1  # I_2 of good runs scatters around 0 by less
FALLEN = 0.75  # share of the highest ER(R), below which it has fallen
SHRUNK = 0.05  # share of the largest spread of Z, below which it has shrunk; in good runs it stays above 0.4
ALIGNED = 0.9  # cosine of Z's rows, above which they point the same way; in good runs it stays below 0.81
APART = 0.75  # a cosine below it before: R as Z may begin above 0.98
ALPHA_PATIENCE = 4  # times the other: a bound may be right for a while
ALPHA_MARGIN = 0.005  # alpha = ER / d is never 0, nor often 1

REMEDY = {
    "rank_r": "lower the learning rate, or look at what the views leave of an image",
    "rank_z": "lower the learning rate, or raise the objective's variance_weight",
    "scale": "Z shrinks to a point: raise the objective's variance_weight, or lower the weight decay",
    "direction": "raise the objective's variance_weight; a loss without negatives needs a predictor",
    "information": "lower gamma, or give I(R;Z) a floor: much of it rewards a collapse",
    "non_finite": "lower the learning rate, or set gradient_clip_val",
    "alpha": "the bound leads, not ER(Z): look at its normalizer, alpha_min and alpha_max",
}


@dataclass
class Watch:
    """What was seen of one monitor.

    Attributes:
        step: of the last reading.
        highest: ER(R) of all readings.
        spread: largest of Z, of all readings and the first step.
        cosine: lowest of Z's rows, of the same.
        streaks: number of the last readings that were bad, of each kind.
        told: kinds that last, and that a warning told of.
    """

    step: int = -1
    highest: float = 0.0
    spread: float = 0.0
    cosine: float = 1.0
    streaks: dict[str, int] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    def take(self, kind: str, bad: bool) -> int:
        """Number of bad looks in a row, with this one."""
        self.streaks[kind] = self.streaks.get(kind, 0) + 1 if bad else 0
        if not bad and kind in self.told:
            self.told.remove(kind)
        return self.streaks[kind]

    def measure(self, er_r: float, size_z: float, spread_z: float) -> None:
        """Keep what is furthest from a collapse."""
        self.highest = max(self.highest, er_r)
        self.spread = max(self.spread, spread_z)
        self.cosine = min(self.cosine, _cosine(size_z, spread_z))

    def bad(self) -> list[str]:
        """Kinds that last; alpha's is no harm."""
        return [kind for kind, streak in self.streaks.items() if streak and kind != "alpha"]


class CollapseGuard(TappingCallback):
    """Watches ranks, the scale and direction of Z, I(R;Z), alpha, loss and gradients, and acts when they go wrong.

    It reads the :class:`~adadim_lightning.DimensionMonitor` and :class:`~adadim_lightning.AdaDim` callbacks before
    it, whose readings it has taken (two spectra each; an ``AdaDim`` takes them anyway), and knows these events:

    - ``rank_r``, ``rank_z``: an effective rank near 1 at ``patience`` readings in a row.
    - ``scale``: the spread of Z, the root mean square of its entries' deviations from the mean row, is below a
      twentieth of its largest (of 1, if that is larger) as often in a row: Z shrinks to a point, in all dimensions
      alike, which its rank does not show.
    - ``direction``: the cosine between rows of Z, their mean's share of the mean square, is above 0.9 as often in
      a row, and was below 0.75 before: all point the same way.
    - ``information``: ER(R) is a quarter below its highest while I_2 is clearly negative, as often in a row: the
      end of a large gamma.
    - ``non_finite``: a NaN or infinity in the loss, the gradients, R or Z. An
      :class:`~adadim_lightning.AdaDimModule` or a loss that ``AdaDim`` steers cannot go on after it, so it ends
      such a run with a :class:`~adadim_lightning.NonFiniteError` where the policy is to warn, too.
    - ``alpha``: that of an :class:`~adadim_lightning.EffectiveRankSchedule` stays at a bound; never more than a
      warning.

    Each is a dict in ``events``, with ``step``, ``epoch``, ``kind``, ``message`` and ``action``; their number is
    logged as ``guard/events`` when one happens. While readings are bad and ``patience`` is not over,
    :class:`~adadim_lightning.callbacks.RunCheckpoints` writes nothing, so that the good ones stay.

    A rollback brings back the weights, the state of the optimizers and what callbacks of this package measured, as
    they are in the newest good checkpoint of ``RunCheckpoints`` or Lightning's ``ModelCheckpoint``, and multiplies
    all learning rates by ``lr_factor``. Time goes on: steps, epochs, data and learning-rate schedules do not go
    back. It happens once; the next event ends the run.

    Args:
        policy: ``"warn"``: one line when something begins; ``"stop"``: the run ends with a
            :class:`~adadim_lightning.CollapseError`; ``"rollback"``.
        patience: number of readings in a row.
        min_rank: effective ranks below it are near 1.
        lr_factor: of a rollback, in ``(0, 1]``.

    Raises:
        ValueError: a monitor comes after the guard in the trainer's callbacks.
        CollapseError: the run is to stop.
        NonFiniteError: it is to stop, for a NaN or infinity.

    Example:
        >>> guard = CollapseGuard("rollback", patience=3)
    """

    def __init__(
        self,
        policy: Policy = "warn",
        *,
        patience: int = 5,
        min_rank: float = COLLAPSED_RANK,
        lr_factor: float = 0.1,
    ) -> None:
        if policy not in get_args(Policy):
            raise ValueError(f'policy must be "warn", "stop" or "rollback", got {policy!r}')
        check_integer("patience", patience, low=1)
        check_number("min_rank", min_rank, low=1)
        check_number("lr_factor", lr_factor, low=0, high=1)
        if lr_factor == 0:
            raise ValueError("lr_factor must be above 0: at 0 nothing would be trained any more")
        super().__init__(name=None)
        self.policy: Policy = policy
        self.patience = patience
        self.min_rank = min_rank
        self.lr_factor = lr_factor
        self.events: list[dict[str, Any]] = []
        self._rolled_back = False
        self._watches: dict[str, Watch] = {}
        self._monitors: list[DimensionMonitor] = []
        self._guards: list[FiniteGuard] = []
        self._own: FiniteGuard | None = None  # of a model that has none
        self._step = 0
        self._began = 0.0

    # When to look.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what to watch."""
        self._began = time.time()
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._monitors = [callback for callback in callbacks if isinstance(callback, DimensionMonitor)]
        if any(callbacks.index(monitor) > callbacks.index(self) for monitor in self._monitors):
            raise ValueError(
                "CollapseGuard must come after AdaDim and DimensionMonitor in the trainer's callbacks"
            )
        if not self._monitors:
            rank_zero_warn(
                "CollapseGuard sees no DimensionMonitor or AdaDim, so it looks for NaN and infinity alone"
            )
        guard = getattr(pl_module, "guard", None)
        self._own = None if isinstance(guard, FiniteGuard) else FiniteGuard()
        self._guards = [self._own or guard, *(monitor.guard for monitor in self._monitors)]  # type: ignore[list-item]
        for guard in self._guards:
            guard.to(pl_module.device)
            guard.raises = self.policy != "rollback" or self._rolled_back

    def _close(self) -> None:
        for guard in self._guards:
            guard.raises = True
        self._monitors, self._guards, self._own = [], [], None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the step."""
        self._step = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Watch the gradients, but where a scaler skips bad steps by itself."""
        if self._own is not None and getattr(trainer.precision_plugin, "scaler", None) is None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if gradients:
                self._own.watch(torch.stack(torch._foreach_norm(gradients)).sum(), self._step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Watch the loss; look at the flags when the trainer logs, and at each new reading."""
        loss = loss_of(outputs)
        if self._own is not None and loss is not None:
            self._own.watch(loss, self._step)
        every: int = trainer.log_every_n_steps or 50  # type: ignore[attr-defined]
        free = world_size() == 1 and pl_module.device.type == "cpu"
        if free or trainer.global_step % every == 0:
            self._look_at_flags(trainer, pl_module)
        self._look_at_readings(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the flags, before anything is made of bad weights."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look_at_flags(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at everything, before a checkpoint is written."""
        self._look_at_flags(trainer, pl_module)
        self._look_at_readings(trainer, pl_module)

    # What to see.

    def _look_at_flags(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = [step for guard in self._guards if (step := guard.share()) >= 0]
        watch = self._watches.setdefault("", Watch())
        if not watch.take("non_finite", bool(steps) or not all(monitor.finite for monitor in self._monitors)):
            return
        step = min(steps, default=self._step)
        if self.policy != "warn" or any(bool(guard.tripped) for guard in self._guards if guard is not self._own):
            path = self._way_back(trainer)
            if path is None:
                raise NonFiniteError(step)
            seen = f"a NaN or infinity appeared in R, Z, the loss or its gradient at step {step}"
            self._go_back(trainer, pl_module, "non_finite", seen, path)
        else:
            seen = f"a NaN or infinity is in R, Z, the loss or its gradient since step {step}"
            self._warn(trainer, watch, "non_finite", seen)
            for guard in self._guards:
                guard.reset()

    def _look_at_readings(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for monitor in self._monitors:
            reading = monitor.last_reading
            watch = self._watches.setdefault(monitor.state_key, Watch())
            if reading is None or reading.step == watch.step:
                continue
            watch.step = reading.step
            watch.measure(0.0, *monitor.first_z)
            watch.measure(reading.er_r, reading.size_z, reading.spread_z)
            for kind, seen in self._seen(monitor, reading, watch).items():
                streak = watch.take(kind, bool(seen))
                if not seen or streak < self.patience * (ALPHA_PATIENCE if kind == "alpha" else 1):
                    continue
                seen += (f" of {monitor.name}" if monitor.name else "") + f" at {streak} readings in a row"
                if kind == "alpha" or self.policy == "warn":
                    self._warn(trainer, watch, kind, seen)
                elif (path := self._way_back(trainer)) is not None:
                    self._go_back(trainer, pl_module, kind, seen, path)
                    return  # the readings are of weights that are gone
                else:
                    message = f"{seen}; {REMEDY[kind]}{self._advice(trainer)}"
                    self._note(trainer, kind, message, "stop")
                    raise CollapseError(message)

    def _seen(self, monitor: DimensionMonitor, reading: Reading, watch: Watch) -> dict[str, str]:
        """What is bad about a reading, by the kind of event; empty where nothing is."""
        er_r, er_z, i_rz = reading.er_r, reading.er_z, reading.i_rz
        fallen = i_rz < NEGATIVE_NATS and er_r < FALLEN * watch.highest
        cosine = _cosine(reading.size_z, reading.spread_z)
        aligned = cosine > ALIGNED and watch.cosine < APART
        # At most 1, which VICReg asks for: an untrained Z may be far too large.
        shrunk = reading.spread_z < SHRUNK * min(watch.spread, 1)
        return {
            "rank_r": f"ER(R) = {er_r:.2f}" if er_r < self.min_rank else "",
            "rank_z": f"ER(Z) = {er_z:.2f}" if er_z < self.min_rank else "",
            "scale": f"the spread of Z fell from {watch.spread:.2g} to {reading.spread_z:.2g}" if shrunk else "",
            "direction": f"all rows of Z point the same way, at a cosine of {cosine:.3f}" if aligned else "",
            "information": f"ER(R) fell from {watch.highest:.1f} to {er_r:.1f} and I(R;Z) to {i_rz:.2f} nats"
            if fallen
            else "",
            "alpha": _bound(monitor),
        }

    def suspects(self) -> bool:
        """Whether what is seen is bad, and nothing was done about it yet; all processes have to ask together."""
        tripped = [guard.share() >= 0 for guard in self._guards]
        # Where the user goes on after a warning checkpoints are written again, but none is of use with a NaN.
        told = [set(watch.told) - {"non_finite"} for watch in self._watches.values()]
        bad = [set(watch.bad()) for watch in self._watches.values()]
        return any(tripped) or any(x - y for x, y in zip(bad, told, strict=True))

    # What to do.

    def _warn(self, trainer: Trainer, watch: Watch, kind: str, seen: str) -> None:
        """One line, once while it lasts; no other sign of a collapse that the rank of Z has shown."""
        if kind not in watch.told:
            watch.told.append(kind)
            if kind in ("scale", "direction") and "rank_z" in watch.told:
                return
            message = f"{seen}; {REMEDY[kind]}"
            self._note(trainer, kind, message, "warn")
            rank_zero_warn(message)

    def _go_back(self, trainer: Trainer, pl_module: LightningModule, kind: str, seen: str, path: str) -> None:
        self._roll_back(trainer, pl_module, path)
        message = f"{seen}; went back to {path}, with {self.lr_factor:g} times the learning rate"
        self._note(trainer, kind, message, "rollback")
        rank_zero_warn(message)

    def _note(self, trainer: Trainer, kind: str, message: str, action: str) -> None:
        step, epoch = trainer.global_step, trainer.current_epoch
        self.events.append({"step": step, "epoch": epoch, "kind": kind, "message": message, "action": action})
        for logger in trainer.loggers:  # with the number that Lightning gives to the step that is over
            logger.log_metrics({"guard/events": float(len(self.events)), "epoch": epoch}, step=max(step - 1, 0))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Note a NaN or infinity that ends the run."""
        if isinstance(exception, NonFiniteError):
            exception.args = (f"{exception}{self._advice(trainer)}",)
            self._note(trainer, "non_finite", str(exception), "stop")
        super().on_exception(trainer, pl_module, exception)

    def _advice(self, trainer: Trainer) -> str:
        """From where to go on after a stop."""
        path = next(self._good_checkpoints(trainer), None)
        again = "; it was rolled back once already" if self._rolled_back else ""
        return again + (
            "; there is no good checkpoint yet" if path is None else f"; the last good checkpoint is {path}"
        )

    def _way_back(self, trainer: Trainer) -> str | None:
        """Checkpoint to roll back to, the same on all processes; None where there is none, or it must not be."""
        if self.policy != "rollback" or self._rolled_back:
            return None
        found = next(self._good_checkpoints(trainer), None) if trainer.is_global_zero else None
        path: str | None = trainer.strategy.broadcast(found)
        return path

    def _good_checkpoints(self, trainer: Trainer) -> Iterator[str]:
        """Those of this run, the newest first, that were not written in bad times and hold finite weights."""
        paths: set[Path] = set()
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, RunCheckpoints):
                paths |= set(callback.written())
            elif isinstance(callback, ModelCheckpoint):
                # It does not know all that it keeps; its folder may hold those of other runs.
                named = set(map(Path, {callback.best_model_path, callback.last_model_path} - {""}))
                beside = (path for one in named for path in one.parent.glob(f"*{callback.FILE_EXTENSION}"))
                paths |= named | {path for path in beside if path.stat().st_mtime >= self._began}
        present = [path for path in paths if path.is_file()]
        for path in sorted(present, key=lambda path: (path.stat().st_mtime, path.name), reverse=True):
            try:
                checkpoint = read_state(path)
            except CheckpointError:
                continue
            own = checkpoint.get("callbacks", {}).get(self.state_key, {})
            weights = checkpoint["state_dict"].values()
            whole = "optimizer_states" in checkpoint
            if whole and not own.get("bad") and all(bool(torch.isfinite(x).all()) for x in weights):
                yield str(path)

    def _roll_back(self, trainer: Trainer, pl_module: LightningModule, path: str) -> None:
        checkpoint = trainer.strategy.load_checkpoint(path)
        pl_module.on_load_checkpoint(checkpoint)
        trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)
        for optimizer, state in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
            # Rates are those of now, as their schedules go on.
            optimizer.load_state_dict(state | {"param_groups": optimizer.state_dict()["param_groups"]})
        nn.Module.zero_grad(pl_module)  # what was accumulated may be bad
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = checkpoint["callbacks"].get(callback.state_key)
            if isinstance(callback, TappingCallback) and callback is not self and state is not None:
                callback.load_state_dict(deepcopy(state))
                if isinstance(callback, DimensionMonitor):
                    callback.on_train_epoch_start(trainer, pl_module)
                    callback.finite = True
        trainer.fit_loop.epoch_loop._results.reset()  # means with a NaN in them
        lower_learning_rate(trainer, self.lr_factor)
        self._rolled_back = True
        for watch in self._watches.values():
            watch.streaks, watch.told = {}, []
        for guard in self._guards:
            guard.reset()
            guard.raises = True

    # Checkpoint.

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Mark a checkpoint with a NaN in it as bad, or end a run that is to stop."""
        steps = [step for guard in self._guards if (step := guard.share()) >= 0]
        if steps and (self.policy == "stop" or self._rolled_back):
            raise NonFiniteError(min(steps))
        checkpoint["callbacks"][self.state_key]["bad"] |= bool(steps)

    def state_dict(self) -> dict[str, Any]:
        """The events, whether the run was rolled back, and the bad readings so far."""
        return {
            "events": [dict(event) for event in self.events],
            "rolled_back": self._rolled_back,
            "watches": {key: asdict(watch) for key, watch in self._watches.items()},
            "bad": any(watch.bad() for watch in self._watches.values()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.events = [dict(event) for event in state_dict["events"]]
        self._rolled_back = state_dict["rolled_back"]
        self._watches = {key: Watch(**values) for key, values in deepcopy(state_dict["watches"]).items()}


def _cosine(size: float, spread: float) -> float:
    """Mean cosine between rows that are equally long: their mean's share of the mean square."""
    return 1 - (spread / size) ** 2 if size else 1.0


def _bound(monitor: DimensionMonitor) -> str:
    """The bound that alpha is at; empty where it is at none, or was given no room."""
    if not isinstance(monitor, AdaDim) or monitor.alpha is None or monitor.balance.statistics is None:
        return ""
    schedule = monitor.balance.alpha
    if not isinstance(schedule, EffectiveRankSchedule) or schedule.alpha_min == schedule.alpha_max:
        return ""
    bounds = (schedule.alpha_min, schedule.alpha_max)
    at = [bound for bound in bounds if math.isclose(monitor.alpha, bound, rel_tol=0, abs_tol=ALPHA_MARGIN)]
    return f"alpha = {monitor.alpha:.3g} stayed at its bound {at[0]:g}" if at else ""
