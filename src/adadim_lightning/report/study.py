"""Runs put in order: arms, the accuracy that compares them, the best run, and what goes with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from adadim_lightning.report.arms import Arm, make_arms
from adadim_lightning.report.runs import RunRecord
from adadim_lightning.report.statistics import (
    Correlation,
    Difference,
    Spread,
    paired_difference,
    rank_correlation,
    spread,
)

ACCURACIES = (
    "evaluation/trained_linear_top1",
    "probe/linear_top1",
    "evaluation/trained_knn_top1",
    "probe/knn_top1",
)
KNN = ("evaluation/trained_knn_top1", "probe/knn_top1")
H_R, I_RZ, ER_R, LOG_N = "dynamics/H_R", "dynamics/I_RZ", "dynamics/ER_R", "dynamics/log_n"
LABEL_FREE = ("dynamics/", "balance/", "loss/", "loss_weighted/", "label_free/", "evaluation/label_free")


@dataclass
class Study:
    """Runs, compared by one metric.

    Args:
        runs: what was read.
        metric: log name that ranks the runs; by default the first accuracy that one of them has.
        warnings: lines about what could not be read.
    """

    runs: list[RunRecord]
    metric: str | None = None
    warnings: list[str] = field(default_factory=list)
    arms: list[Arm] = field(init=False)

    def __post_init__(self) -> None:
        self.arms = make_arms(self.runs)
        if self.metric is None:
            self.metric = self.first_logged(ACCURACIES)

    @property
    def logged(self) -> set[str]:
        """Every log name that some run has a value for."""
        return {key for run in self.runs for key in run.values}

    def first_logged(self, names: Sequence[str]) -> str | None:
        """The first of the names that some run has a value for."""
        logged = self.logged
        return next((name for name in names if name in logged), None)

    @property
    def knn(self) -> str | None:
        """Log name of the kNN accuracy."""
        return self.first_logged(KNN)

    @property
    def color(self) -> str:
        """What colors the plane: the metric, or the effective rank of R where there are no labels."""
        return self.metric or ER_R

    @property
    def title(self) -> str:
        """What the metric is called at the head of a column."""
        return "accuracy" if self.metric is None or self.metric in ACCURACIES else self.metric.rpartition("/")[2]

    @property
    def lower_is_better(self) -> bool:
        """Whether the metric is a loss."""
        return "loss" in (self.metric or "")

    def value(self, run: RunRecord) -> float | None:
        """The run's value of the metric."""
        return None if self.metric is None else run.values.get(self.metric)

    @property
    def ranked(self) -> list[RunRecord]:
        """Finished runs that have the metric, best first."""
        found = [(value, run) for run in self.runs if run.finished and (value := self.value(run)) is not None]
        return [run for _, run in sorted(found, key=lambda x: x[0], reverse=not self.lower_is_better)]

    @property
    def best(self) -> RunRecord | None:
        """The run with the best value, the first of several."""
        return next(iter(self.ranked), None)

    @property
    def ties(self) -> int:
        """How many other runs are as good as the best."""
        values = [self.value(run) for run in self.ranked]
        return values.count(values[0]) - 1 if values else 0

    def place(self, key: str, *, highest: bool) -> tuple[int, int] | None:
        """Which place the best run takes by another value, among how many finished runs; ties share the better."""
        if self.best is None or key not in self.best.values:
            return None
        mine = self.best.values[key]
        others = [run.values[key] for run in self.runs if run.finished and key in run.values]
        return 1 + sum(value > mine if highest else value < mine for value in others), len(others)

    def spread(self, arm: Arm, value: str | Callable[[RunRecord], float | None] | None) -> Spread | None:
        """Mean of a value over the finished runs of an arm."""
        get = value if callable(value) else lambda run: run.values.get(str(value))
        return spread([found for run in arm.finished if (found := get(run)) is not None])

    def difference(self, arm: Arm, baseline: Arm) -> Difference | None:
        """What an arm gains over another, by pairs of finished runs of the same seed."""
        if arm is baseline:
            return None
        ours, theirs = (
            [(run.seed, value) for run in side.finished if (value := self.value(run)) is not None]
            for side in (arm, baseline)
        )
        return paired_difference(ours, theirs)

    @property
    def correlations(self) -> list[Correlation]:
        """How values that need no labels rank the finished runs, as the metric does; the closest first."""
        names = sorted(name for name in self.logged if name.startswith(LABEL_FREE) and name != self.metric)
        runs = self.ranked
        found = []
        for name in names:
            pairs = [(run.values[name], self.value(run) or 0.0) for run in runs if name in run.values]
            if (correlation := rank_correlation(name, pairs)) is not None:
                found.append(correlation)
        return sorted(found, key=lambda x: -abs(x.spearman))

    @property
    def log_ns(self) -> list[float]:
        """The different ln n that I(R;Z) was taken at; more than one forbids to compare it."""
        return sorted({round(run.values[LOG_N], 3) for run in self.runs if LOG_N in run.values})

    def find_arm(self, text: str) -> Arm | None:
        """The one arm that a label, or some of its overrides, name.

        Raises:
            ValueError: they name several.
        """
        for arm in self.arms:
            if arm.label == text:
                return arm
        wanted = set(text.split())
        found = [arm for arm in self.arms if wanted and wanted <= {*arm.overrides, *arm.label.split()}]
        if len(found) > 1:
            raise ValueError(f"{text!r} fits {len(found)} arms: {'; '.join(arm.label for arm in found)}")
        return found[0] if found else None
