"""Accuracy of the weighted nearest-neighbor vote."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from adadim_lightning.functional._numeric import check_integer, check_matrix, check_positive
from adadim_lightning.functional.neighbors import _knn_predict, number_classes
from adadim_lightning.metrics._base import BaseMetric

_instances = itertools.count()


class KNNAccuracy(BaseMetric):
    r"""Top-1 accuracy of a vote among nearest neighbors, each weighted :math:`\exp(\cos / \tau)`.

    The neighbors come from a bank of labeled vectors, set with :meth:`set_bank` (the whole bank on every
    process); the rows to classify are streamed.

    As input: ``x``, shape ``(N, d)``, any floating dtype, and ``target``, shape ``(N,)``, integers. As output:
    scalar in ``[0, 1]``.

    Args:
        k: number of neighbors.
        temperature: :math:`\tau` > 0; a large one makes the vote plain.
        chunk_size: rows compared with the bank at a time.
        kwargs: see ``torchmetrics.Metric``.

    Raises:
        ValueError: an update before :meth:`set_bank`; shapes that do not match; a bank with a NaN or infinity, or
            with labels that are no integers >= 0; computed before any update, or after one with a NaN or infinity.

    Source: Wu et al., CVPR 2018.

    Example:
        >>> metric = KNNAccuracy(k=1)
        >>> metric.set_bank(torch.eye(2), torch.tensor([3, 5]))
        >>> metric.update(torch.tensor([[1.0, 0.1], [0.9, 0.0]]), torch.tensor([3, 5]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    bank: Tensor | None
    bank_classes: Tensor | None
    classes: Tensor | None
    settings: Tensor
    correct: Tensor
    total: Tensor

    def __init__(self, *, k: int = 20, temperature: float = 0.07, chunk_size: int = 1024, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_integer("k", k, low=1)
        if temperature != math.inf:
            check_positive("temperature", temperature)
        check_integer("chunk_size", chunk_size, low=1)
        self.k = k
        self.temperature = temperature
        self.chunk_size = chunk_size
        self.register_buffer("bank", None, persistent=False)
        self.register_buffer("bank_classes", None, persistent=False)
        self.register_buffer("classes", None, persistent=False)
        if k < 1 or not temperature > 0:
            raise ValueError(f"k must be >= 1 and temperature > 0, got {k} and {temperature}")
        # Each has a bank of its own, so no two of them may share their counts.
        self._add_settings(next(_instances))
        self.add_state("correct", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for states in (self.__dict__, self._defaults):  # of a copy too
            states["settings"] = torch.full_like(self.settings, next(_instances))

    def set_bank(self, x: Tensor, target: Tensor) -> None:
        """Give the labeled vectors among which neighbors are sought; ``reset`` keeps them.

        Args:
            x: vectors, shape ``(M, d)``.
            target: their classes, shape ``(M,)``.
        """
        self.classes, self.bank_classes = number_classes(x, target.detach())
        self.bank = x.detach()

    def update(self, x: Tensor, target: Tensor) -> None:
        """Classify rows and count the hits.

        Args:
            x: vectors, shape ``(N, d)``.
            target: their classes, shape ``(N,)``.
        """
        if self.bank is None or self.bank_classes is None or self.classes is None:
            raise ValueError("KNNAccuracy has no labeled vectors to compare with; call set_bank(x, target) first")
        if target.shape != x.shape[:1]:
            raise ValueError(f"x {tuple(x.shape)} and target {tuple(target.shape)} do not fit together")
        check_matrix(x, finite=False)
        if x.shape[1] != self.bank.shape[1]:
            raise ValueError(f"x {tuple(x.shape)} and bank {tuple(self.bank.shape)} do not fit together")
        self._watch(x)
        predicted = _knn_predict(
            x.detach(),
            self.bank,
            self.bank_classes,
            self.classes,
            k=self.k,
            temperature=self.temperature,
            chunk_size=self.chunk_size,
        )
        self.correct = self.correct + (predicted == target).sum()
        self.total = self.total + len(target)

    def compute(self) -> Tensor:
        """Share of the rows that were classified right."""
        if self.total == 0:
            raise ValueError("KNNAccuracy.compute() needs at least one update() before it")
        self._check_finite()
        return self.correct.float() / self.total
