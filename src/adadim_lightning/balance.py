"""How alpha and beta move: schedules of the progress of training and of what was measured."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from adadim_lightning.functional._numeric import check_bool, check_integer, check_number
from adadim_lightning.functional.spectrum import Spectrum
from adadim_lightning.guard import COLLAPSED_RANK


@dataclass(frozen=True)
class Statistics:
    """What was measured of R and Z over the last window of training steps.

    Attributes:
        er_z: effective rank of the embedding Z, smoothed as the :class:`Balance` says.
        er_r: effective rank of the representation R.
        i_rz: I_2(R;Z) in nats, mean over the measured batches of the epoch so far.
        rows: number of rows of Z behind ``er_z``.
        dim_r: number of dimensions of R.
        dim_z: number of dimensions of Z.
    """

    er_z: float
    er_r: float
    i_rz: float
    rows: int
    dim_r: int
    dim_z: int

    @property
    def h_r(self) -> float:
        """H(R) = ln ER(R), nats."""
        return math.log(self.er_r)


Schedule = Callable[[float, Statistics | None], float]
"""``(progress, statistics) -> value``: progress runs from 0 to 1; no statistics before the first estimate."""

Views = Literal["both", "first"]


def _check_progress(progress: float, schedule: object) -> None:
    if math.isnan(progress):
        raise ValueError(
            f"{type(schedule).__name__} needs the length of the training: "
            "set trainer.max_epochs or trainer.max_steps"
        )


@dataclass(frozen=True)
class ConstantSchedule:
    """The same value throughout.

    Args:
        value: in ``[0, 1]``.

    Example:
        >>> ConstantSchedule(0.5)(0.3, None)
        0.5
    """

    value: float

    def __post_init__(self) -> None:
        check_number("value", self.value, low=0, high=1)

    def __call__(self, progress: float, statistics: Statistics | None) -> float:
        """The value."""
        return self.value


@dataclass(frozen=True)
class LinearSchedule:
    """In a straight line from ``start`` to ``end``.

    Args:
        start: value at the beginning, in ``[0, 1]``.
        end: value at the end of training, in ``[0, 1]``.

    Example:
        >>> LinearSchedule(0.0, 1.0)(0.25, None)
        0.25
    """

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        check_number("start", self.start, low=0, high=1)
        check_number("end", self.end, low=0, high=1)

    def __call__(self, progress: float, statistics: Statistics | None) -> float:
        """The value at this progress."""
        _check_progress(progress, self)
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class CosineSchedule(LinearSchedule):
    """Along half a cosine from ``start`` to ``end``: slow at both ends.

    Args:
        start: value at the beginning, in ``[0, 1]``.
        end: value at the end of training, in ``[0, 1]``.

    Example:
        >>> round(CosineSchedule(0.0, 1.0)(0.25, None), 4)
        0.1464
    """

    def __call__(self, progress: float, statistics: Statistics | None) -> float:
        """The value at this progress."""
        _check_progress(progress, self)
        return super().__call__((1 - math.cos(math.pi * progress)) / 2, statistics)


@dataclass(frozen=True)
class StepSchedule:
    """Constant between milestones.

    Args:
        values: one more than milestones, each in ``[0, 1]``.
        milestones: progress at which the next value begins, rising, in ``(0, 1)``.

    Example:
        >>> StepSchedule([0.0, 1.0], [0.5])(0.5, None)
        1.0
    """

    values: Sequence[float] = (0.0, 1.0)
    milestones: Sequence[float] = (0.5,)

    def __post_init__(self) -> None:
        for value in self.values:
            check_number("each of values", value, low=0, high=1)
        for milestone in self.milestones:
            check_number("each of milestones", milestone, low=0, high=1)
        if len(self.values) != len(self.milestones) + 1 or list(self.milestones) != sorted(self.milestones):
            raise ValueError("StepSchedule needs rising milestones and one more value than milestones")

    def __call__(self, progress: float, statistics: Statistics | None) -> float:
        """The value at this progress."""
        _check_progress(progress, self)
        return self.values[sum(progress >= milestone for milestone in self.milestones)]


@dataclass(frozen=True)
class EffectiveRankSchedule:
    r"""AdaDim's rule: alpha follows the effective rank of the embedding.

    .. math:: \alpha = \operatorname{clip}\big(\operatorname{ER}(Z) / \text{normalizer},
        \alpha_\text{min}, \alpha_\text{max}\big)

    Args:
        normalizer: ``"dim"`` for d_Z (the paper; with fewer rows than dimensions it cannot reach 1: at most
            0.125 for a batch of 256 and d_Z = 2048), ``"min"`` for min(rows of the window, d_Z), or a number.
        start: value before the first estimate, in ``[0, 1]``.
        alpha_min: lower cap.
        alpha_max: upper cap.
        fallback: schedule to follow instead, within the caps, while ER(Z) says nothing: below 1.5, where Z is
            collapsed and the rule would give next to 0, or not finite. None follows the rule all the same.

    Raises:
        ValueError: a value outside its range.

    Source: Kokilepersaud et al., "AdaDim", arXiv 2505.12576; ``"min"``, the caps and the fallback are ours.

    Example:
        >>> measured = Statistics(er_z=64.0, er_r=20.0, i_rz=0.5, rows=4096, dim_r=256, dim_z=128)
        >>> EffectiveRankSchedule()(0.3, measured)
        0.5
    """

    normalizer: Literal["dim", "min"] | float = "min"
    start: float = 0.5
    alpha_min: float = 0.0
    alpha_max: float = 1.0
    fallback: Schedule | None = None

    def __post_init__(self) -> None:
        if not (self.fallback is None or callable(self.fallback)):
            raise ValueError(f"fallback must be a schedule, got {self.fallback!r}")
        for name in ("start", "alpha_min", "alpha_max"):
            check_number(name, getattr(self, name), low=0, high=1)
        if self.alpha_min > self.alpha_max:
            raise ValueError(f"alpha_min {self.alpha_min} lies above alpha_max {self.alpha_max}")
        if self.normalizer not in ("dim", "min") and not (
            isinstance(self.normalizer, int | float) and self.normalizer > 0
        ):
            raise ValueError(f'normalizer must be "dim", "min" or a number > 0, got {self.normalizer!r}')

    def __call__(self, progress: float, statistics: Statistics | None) -> float:
        """Alpha for what was last measured."""
        if statistics is None:
            return self.start
        if self.fallback is not None and not COLLAPSED_RANK <= statistics.er_z < math.inf:
            return self._cap(self.fallback(progress, statistics))
        if self.normalizer == "dim":
            most = float(statistics.dim_z)
        elif self.normalizer == "min":
            most = float(min(statistics.rows, statistics.dim_z))
        else:
            most = float(self.normalizer)
        return self._cap(statistics.er_z / most)

    def _cap(self, alpha: float) -> float:
        return min(max(alpha, self.alpha_min), self.alpha_max)


class Balance:
    """Turns progress and statistics into alpha and the phase of beta, and says how Z is measured for it.

    Args:
        alpha: schedule of alpha.
        beta: schedule of the phase by which gamma is multiplied; by default alpha itself (the paper's
            coupling).
        lag_epochs: let the coupled phase follow alpha so many epochs later; 0 until then.
        every_n_steps: how often the statistics are renewed; None means at the end of each epoch (the paper).
        window: rows of Z behind an estimate of its effective rank, or more; 1 means one batch (the paper).
        views: rows of both views, or of the first alone (the paper).
        spectrum: of the effective rank.
        center: of the effective rank.
        ema: weight of the past in the running mean of the effective rank, in ``[0, 1)``; 0 means none.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> Balance(LinearSchedule())(progress=0.5, epoch=3)
        (0.5, 0.5)
    """

    def __init__(
        self,
        alpha: Schedule,
        beta: Schedule | None = None,
        *,
        lag_epochs: int = 0,
        every_n_steps: int | None = 50,
        window: int = 4096,
        views: Views = "both",
        spectrum: Spectrum = "singular",
        center: bool = False,
        ema: float = 0.9,
    ) -> None:
        if not callable(alpha) or not (beta is None or callable(beta)):
            raise ValueError(f"alpha and beta must be schedules, got {alpha!r} and {beta!r}")
        check_integer("lag_epochs", lag_epochs, low=0)
        if lag_epochs and beta is not None:
            raise ValueError("lag_epochs needs the coupled beta; leave out the schedule of beta")
        if every_n_steps is not None:
            check_integer("every_n_steps", every_n_steps, low=1)
        check_integer("window", window, low=1)
        check_bool("center", center)
        if spectrum not in ("singular", "eigen"):
            raise ValueError(f'spectrum must be "singular" or "eigen", got {spectrum!r}')
        if views not in ("both", "first"):
            raise ValueError(f'views must be "both" or "first", got {views!r}')
        check_number("ema", ema, low=0, high=1)
        if ema == 1:
            raise ValueError("ema must be below 1: at 1 no estimate after the first would count")
        self.alpha = alpha
        self.beta = beta
        self.lag_epochs = lag_epochs
        self.every_n_steps = every_n_steps
        self.window = window
        self.views: Views = views
        self.spectrum: Spectrum = spectrum
        self.center = center
        self.ema = ema
        self.statistics: Statistics | None = None
        self._alpha_of_epoch: list[float] = []

    def observe(self, statistics: Statistics) -> None:
        """Take new statistics; their ``er_z`` enters the running mean."""
        if self.statistics is not None and math.isfinite(self.statistics.er_z):
            er_z = self.ema * self.statistics.er_z + (1 - self.ema) * statistics.er_z
            statistics = replace(statistics, er_z=er_z)
        self.statistics = statistics

    def __call__(self, progress: float, epoch: int) -> tuple[float, float]:
        """Alpha and the phase of beta for the next step.

        Args:
            progress: share of the training that is done, in ``[0, 1]``; NaN where its length is unknown.
            epoch: number of epochs that are done.

        Returns:
            Alpha in ``[0, 1]``, and the phase.

        Raises:
            ValueError: the schedule gave an alpha outside ``[0, 1]``.
        """
        alpha = float(self.alpha(progress, self.statistics))
        if not 0 <= alpha <= 1:
            raise ValueError(f"the schedule {self.alpha!r} gave alpha = {alpha}; it must lie in [0, 1]")
        if self.lag_epochs:
            # The value that closed each epoch; a run that starts late has no past to follow.
            del self._alpha_of_epoch[epoch:]
            self._alpha_of_epoch += [alpha] * (epoch + 1 - len(self._alpha_of_epoch))
            phase = self._alpha_of_epoch[epoch - self.lag_epochs] if epoch >= self.lag_epochs else 0.0
        elif self.beta is not None:
            phase = float(self.beta(progress, self.statistics))
        else:
            phase = alpha
        return alpha, phase

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on from here, in plain types."""
        return {
            "statistics": None if self.statistics is None else vars(self.statistics).copy(),
            "alpha_of_epoch": list(self._alpha_of_epoch),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        statistics = state["statistics"]
        self.statistics = None if statistics is None else Statistics(**statistics)
        self._alpha_of_epoch = list(state["alpha_of_epoch"])
