"""Schedules of alpha that serve as controls."""

from dataclasses import dataclass

from adadim_lightning import EffectiveRankSchedule, Statistics


@dataclass(frozen=True)
class Reversed(EffectiveRankSchedule):
    """AdaDim's rule the wrong way round: the higher the effective rank of Z, the less uniformity."""

    def __call__(self, progress: float, statistics: Statistics | None) -> float:
        """One minus what the rule gives."""
        return 1.0 - super().__call__(progress, statistics)
