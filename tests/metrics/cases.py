"""Every metric with input that suits it."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from adadim_lightning.metrics import (
    Alignment,
    EffectiveRank,
    KNNAccuracy,
    MatrixEntropy,
    MatrixMutualInformation,
    Uniformity,
)

DIM = 12
CLASSES = 4
Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """How to make a metric, and a batch of n rows for it."""

    make: Callable[[], Metric]
    batch: Callable[[int], Batch]


def rows(n: int) -> Batch:
    return (torch.randn(n, DIM) * torch.linspace(2, 0.1, DIM) + 0.3,)


def two_views(n: int) -> Batch:
    (x,) = rows(n)
    return x, x + 0.5 * torch.randn(n, DIM)


def representation_and_embedding(n: int) -> Batch:
    (x,) = rows(n)
    return x, torch.relu(x @ torch.randn(DIM, 5, generator=torch.Generator().manual_seed(1)))


def labeled(n: int) -> Batch:
    target = torch.arange(n) % CLASSES
    return torch.eye(CLASSES, DIM)[target] + 0.6 * torch.randn(n, DIM), target


def knn_accuracy(k: int = 5) -> KNNAccuracy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        metric = KNNAccuracy(k=k)
        metric.set_bank(*labeled(50))
    return metric


CASES = {
    "EffectiveRank": Case(EffectiveRank, rows),
    "EffectiveRank centered": Case(lambda: EffectiveRank(center=True, spectrum="eigen"), rows),
    "EffectiveRank sampled": Case(lambda: EffectiveRank(max_dim=DIM - 1), rows),
    "MatrixEntropy": Case(MatrixEntropy, rows),
    "MatrixMutualInformation": Case(MatrixMutualInformation, representation_and_embedding),
    "Uniformity": Case(Uniformity, rows),
    "Alignment": Case(Alignment, two_views),
    "KNNAccuracy": Case(knn_accuracy, labeled),
}
every_metric = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def stream(case: Case, sizes: list[int]) -> list[Batch]:
    """Batches of the given numbers of rows."""
    return [case.batch(n) for n in sizes]


def seen(metric: Metric, batches: list[Batch]) -> Metric:
    """The metric after it has seen the batches."""
    for batch in batches:
        metric.update(*batch)
    return metric


def joined(batches: list[Batch]) -> Batch:
    """All batches as one."""
    return tuple(map(torch.cat, zip(*batches, strict=True)))
