"""Streaming alignment and uniformity on the unit hypersphere."""

from typing import Any

import torch
from torch import Tensor

from adadim_lightning.functional._numeric import check_matrix, check_number, check_positive, to_float64
from adadim_lightning.functional.hypersphere import _row_alignment, uniformity
from adadim_lightning.metrics._base import BaseMetric, RowSampleMetric


class Uniformity(RowSampleMetric):
    r"""Log of the mean Gaussian potential over all pairs of a uniform sample of the rows seen, in nats.

    .. math:: \ln \operatorname*{mean}_{i < j} \exp\big(-t \lVert x_i - x_j \rVert^2\big)

    As input: ``x``, shape ``(N, d)``, any floating dtype. As output: scalar in ``[-4t, 0]``, lower is more
    uniform.

    Args:
        t: sharpness of the potential, > 0.
        max_rows: size of the sample, the same rows on every process.
        seed: of the sample.
        kwargs: see ``torchmetrics.Metric``.

    Raises:
        ValueError: an update that is not two-dimensional, is empty, or changes the number of dimensions; computed
            before any update, after one with a NaN or infinity, or on a single row.

    Source: Wang & Isola, ICML 2020.

    Example:
        >>> metric = Uniformity()
        >>> metric.update(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> metric.compute()
        tensor(-8.)
    """

    higher_is_better = False
    plot_upper_bound = 0.0

    def __init__(self, *, t: float = 2.0, max_rows: int = 4096, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(max_rows=max_rows, seed=seed, **kwargs)
        check_positive("t", t)
        self.t = t

    def update(self, x: Tensor) -> None:
        """Add rows.

        Args:
            x: vectors, shape ``(N, d)``.
        """
        self._check_rows(x)
        self._sample(x)

    def compute(self) -> Tensor:
        """Uniformity of the sampled rows."""
        return uniformity(self.sample(), t=self.t)


class Alignment(BaseMetric):
    r"""Mean distance between the two views of the same image, on the unit sphere; exact over all rows seen.

    .. math:: \operatorname*{mean}_i \lVert x_i - y_i \rVert^\alpha

    As input: ``x`` and ``y``, both of shape ``(N, d)``, any floating dtype. As output: scalar >= 0.

    Args:
        alpha: power of the distance, >= 1.
        kwargs: see ``torchmetrics.Metric``.

    Raises:
        ValueError: an update whose views differ in shape or are empty; computed before any update, or after one
            with a NaN or infinity.

    Source: Wang & Isola, ICML 2020.

    Example:
        >>> metric = Alignment()
        >>> metric.update(torch.eye(2), -torch.eye(2))
        >>> metric.compute()
        tensor(4.)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    float64_states = ("total",)

    total: Tensor
    count: Tensor

    def __init__(self, *, alpha: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("alpha", alpha, low=1)
        self.alpha = alpha
        self._add_settings(alpha)
        self.add_state("total", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add pairs of views.

        Args:
            x: vectors of the first view, shape ``(N, d)``.
            y: vectors of the second view, the same shape.
        """
        check_matrix(x, "x", finite=False)
        check_matrix(y, "y", finite=False)
        if x.shape != y.shape:
            raise ValueError(f"both views must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}")
        self._watch(x, y)
        self.total = self.total + to_float64(_row_alignment(x.detach(), y.detach(), self.alpha)).sum()
        self.count = self.count + len(x)

    def compute(self) -> Tensor:
        """Mean over all pairs seen."""
        if self.count == 0:
            raise ValueError("Alignment.compute() needs at least one update() before it")
        self._check_finite()
        return (self.total / self.count).to(torch.float32).to(self.device)
