"""Streaming effective rank."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from adadim_lightning.functional._numeric import float64_device, to_float64
from adadim_lightning.functional.spectrum import (
    Spectrum,
    _effective_rank_of_entropy,
    _eigenvalues,
    _spectral_entropy_of_eigenvalues,
    eigenvalue_spectrum,
)
from adadim_lightning.metrics._base import RowSampleMetric


class EffectiveRank(RowSampleMetric):
    r"""Effective rank of all rows seen, in O(d^2) memory whatever their number.

    .. math:: \exp\Big(-\sum_k p_k \ln p_k\Big), \qquad p_k = \sigma_k / \sum_j \sigma_j

    with :math:`\sigma` the singular values of all rows stacked, over all processes. Fewer rows than dimensions
    are kept as they are; from d rows on they are folded into their mean and scatter matrix in float64, merged
    by Chan's update, so that the result equals one pass over all rows. For d above ``max_dim`` a random sample
    of ``max_rows`` rows takes the place of the moments.

    As input: ``x``, shape ``(N, d)``, any floating dtype. As output: scalar in ``[1, min(N, d)]``.

    Args:
        spectrum: normalize the singular values, or their squares (the covariance spectrum).
        center: subtract the mean first; a constant input then has rank 1.
        max_dim: widest input for which a d x d matrix is kept.
        max_rows: size of the random sample for wider input.
        seed: of that sample.
        kwargs: see ``torchmetrics.Metric``.

    Raises:
        ValueError: unknown ``spectrum``; an update that is not two-dimensional, is empty, or changes the number
            of dimensions; computed before any update, or after one with a NaN or infinity.

    Source: Roy & Vetterli, "The effective rank", EUSIPCO 2007.

    Example:
        >>> metric = EffectiveRank()
        >>> for row in torch.eye(4):
        ...     metric.update(row[None])
        >>> metric.compute()
        tensor(4.)
    """

    float64_states = ("count", "mean", "scatter")
    plot_lower_bound = 1.0

    count: Tensor
    mean: Tensor
    scatter: Tensor

    def __init__(
        self,
        *,
        spectrum: Spectrum = "singular",
        center: bool = False,
        max_dim: int = 4096,
        max_rows: int = 4096,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_rows=max_rows, seed=seed, **kwargs)
        if spectrum not in ("singular", "eigen"):
            raise ValueError(f'spectrum must be "singular" or "eigen", got {spectrum!r}')
        self.spectrum: Spectrum = spectrum
        self.center = center
        self.max_dim = max_dim
        self._add_settings(max_rows, seed, max_dim)
        # Moments of the rows that were folded; the scatter is about their mean. Scatters add over processes, but
        # the means stay apart: the scatter of the union needs each of them.
        self.add_state("count", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx=None)
        self.add_state("mean", default=torch.zeros(0, dtype=torch.float64), dist_reduce_fx=None)
        self.add_state("scatter", default=torch.zeros(0, 0, dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def dim(self) -> int | None:
        """Number of dimensions d of the rows seen; None before the first update."""
        return self._dim_of(self.metric_state)

    @staticmethod
    def _dim_of(state: Mapping[str, Any]) -> int | None:
        return state["scatter"].shape[0] or RowSampleMetric._dim_of(state)

    @property
    def num_rows(self) -> int:
        """Number of rows seen by this process."""
        return int(self.seen)

    def update(self, x: Tensor) -> None:
        """Add rows.

        Args:
            x: vectors, shape ``(N, d)``.
        """
        self._check_rows(x)
        if x.shape[1] > self.max_dim:
            self._sample(x)
            return
        if self.dim is None:
            self._allocate(x.shape[1], x.device)
        self.seen = self.seen + len(x)
        self._keep(x.detach().clone())  # the model may go on to change the tensor in place

    def _allocate(self, dim: int, device: torch.device) -> None:
        device = float64_device(device)
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def _keep(self, x: Tensor) -> None:
        """Keep rows as they are until there are as many as dimensions: then their moments are smaller."""
        self.rows = [*self.rows, x]
        if sum(map(len, self.rows)) >= x.shape[1]:
            self._fold()

    def _fold(self) -> None:
        """Move the kept rows into the moments."""
        if len(self.rows):
            x = to_float64(dim_zero_cat(self.rows))
            self.rows = []
            mean = x.mean(dim=0)
            x = x - mean
            self._merge(x.new_full((), len(x)), mean, x.T @ x)

    def _merge(self, count: Tensor, mean: Tensor, scatter: Tensor) -> None:
        """Chan's update: the moments of the union of two sets of rows."""
        total = self.count + count
        share = count / total.clamp_min(1)  # one of them may be empty, or both
        shift = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(shift, shift) * (self.count * share)
        self.mean = self.mean + shift * share
        self.count = total

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add all rows that another effective rank metric has seen.

        Args:
            incoming_state: that metric, or its ``metric_state``; it stays as it is.

        Raises:
            ValueError: it is no ``EffectiveRank``, or has another ``max_dim`` or number of dimensions.
        """
        other = incoming_state
        if isinstance(other, EffectiveRank) and other.max_dim != self.max_dim:
            raise ValueError(f"cannot merge rows kept with max_dim {other.max_dim} and with {self.max_dim}")
        super().merge_state(other)

    def _add_rows_of(self, state: Mapping[str, Any]) -> None:
        scatter = state["scatter"]
        if not scatter.numel():
            super()._add_rows_of(state)
            return
        if self.dim is None:
            self._allocate(scatter.shape[0], scatter.device)
        self._merge(state["count"], state["mean"], scatter)
        for rows in state["rows"]:
            self._keep(rows)

    def _hold_nothing(self, dim: int) -> None:
        if dim > self.max_dim:
            super()._hold_nothing(dim)
        else:
            self._allocate(dim, self.device)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # Processes may hold different numbers of rows; folded, their states have the same shape.
        if self.scatter.numel():
            self._fold()
        super()._sync_dist(*args, **kwargs)

    def eigenvalues(self) -> Tensor:
        """Squared singular values of all rows of all processes (of the centered rows, with ``center``).

        Returns:
            Shape ``(d,)``, or ``(N,)`` for fewer rows than dimensions; float64, descending, none negative.

        Raises:
            ValueError: there was no update yet.
        """
        return self.spectrum_and_rows()[0]

    def spectrum_and_rows(self) -> tuple[Tensor, int, Tensor]:
        """:meth:`eigenvalues`, and the number and the mean of the rows of all processes behind them.

        Raises:
            ValueError: there was no update yet.
        """
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            rows = self.num_rows if self.scatter.numel() else min(self.num_rows, self.max_rows)
            eigenvalues, mean = self._spectrum()
            return eigenvalues, rows, mean

    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, and the mean of the rows."""
        if self.dim is None:
            raise ValueError("EffectiveRank needs at least one update() before its spectrum is computed")
        self._check_finite()
        if not self.scatter.numel():
            return self._spectrum_of(self.sample())
        count, mean, scatter = self.count, self.mean, self.scatter
        if count.ndim == 0:
            if count == 0:
                return self._spectrum_of(dim_zero_cat(self.rows))
            self._fold()
            count, mean, scatter = self.count, self.mean, self.scatter
        count, mean = count.reshape(-1, 1), mean.reshape(-1, len(scatter))
        grand_mean = (count * mean).sum(dim=0) / count.sum()
        shift = mean - grand_mean
        scatter = scatter + (count * shift).T @ shift
        subtracted = count.sum() * grand_mean.square().sum()
        if not self.center:
            scatter = scatter + count.sum() * torch.outer(grand_mean, grand_mean)
        size = max(int(count.sum()), len(scatter))
        return _eigenvalues(scatter, size, subtracted)[: int(count.sum())], grand_mean

    def _spectrum_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return eigenvalue_spectrum(rows, center=self.center), to_float64(rows).mean(dim=0)

    def compute(self) -> Tensor:
        """Effective rank of all rows seen."""
        eigenvalues, _ = self._spectrum()
        entropy = _spectral_entropy_of_eigenvalues(eigenvalues, self.spectrum)
        return _effective_rank_of_entropy(entropy, len(eigenvalues)).to(torch.float32).to(self.device)
