"""Matrix-based entropy and mutual information over a sample of the rows."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adadim_lightning.functional._numeric import check_matrix, check_positive
from adadim_lightning.functional.information import matrix_entropy, matrix_mutual_information
from adadim_lightning.metrics._base import RowSampleMetric, check_width


class MatrixEntropy(RowSampleMetric):
    r"""Matrix-based Renyi entropy of a uniform sample of the rows seen, in nats.

    .. math:: S_q(A) = \frac{1}{1-q} \ln \operatorname{tr} A^q, \qquad A = K / \operatorname{tr} K

    with K the cosine Gram matrix of at most ``max_rows`` rows, the same rows on every process. The value is
    bounded by the logarithm of their number: compare at equal numbers only.

    As input: ``x``, shape ``(N, d)``, any floating dtype. As output: scalar in ``[0, ln n]``.

    Args:
        order: Renyi order q > 0; 1 is the von Neumann entropy.
        max_rows: size of the sample; an update costs O(max_rows d), the result O(max_rows^2 d).
        seed: of the sample.
        kwargs: see ``torchmetrics.Metric``.

    Raises:
        ValueError: ``order`` <= 0; an update that is not two-dimensional, is empty, or changes the number of
            dimensions; computed before any update, or after one with a NaN or infinity.

    Source: Giraldo, Rao, Principe, IEEE Trans. Information Theory 2015.

    Example:
        >>> metric = MatrixEntropy()
        >>> metric.update(torch.eye(4))
        >>> metric.compute()
        tensor(1.3863)
    """

    plot_lower_bound = 0.0

    def __init__(self, *, order: float = 2.0, max_rows: int = 4096, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(max_rows=max_rows, seed=seed, **kwargs)
        check_positive("order", order)
        self.order = order

    def update(self, x: Tensor) -> None:
        """Add rows.

        Args:
            x: vectors, shape ``(N, d)``.
        """
        self._check_rows(x)
        self._sample(x)

    def compute(self) -> Tensor:
        """Entropy of the sampled rows, in nats."""
        return matrix_entropy(self.sample(), order=self.order)


class MatrixMutualInformation(RowSampleMetric):
    r"""Matrix-based Renyi mutual information I(R;Z) of a uniform sample of the rows seen, in nats.

    .. math:: I_q(R; Z) = S_q(A_R) + S_q(A_Z) - S_q(A_{R,Z})

    over at most ``max_rows`` rows, the same rows on every process. It depends on their number n: compare at
    equal n only. It may be negative for orders other than 1, and is not clamped.

    As input: ``r``, shape ``(N, d_R)``, and ``z``, shape ``(N, d_Z)``, any floating dtype. As output: scalar of
    at most ``ln n``.

    Args:
        order: Renyi order q > 0.
        max_rows: size of the sample; an update costs O(max_rows d), the result O(max_rows^2 d).
        seed: of the sample.
        kwargs: see ``torchmetrics.Metric``.

    Raises:
        ValueError: ``order`` <= 0; an update whose inputs are not two-dimensional, are empty, differ in their
            number of rows or change their number of dimensions; computed before any update, or after one with a
            NaN or infinity.

    Source: Giraldo, Rao, Principe, IEEE Trans. Information Theory 2015.

    Example:
        >>> metric = MatrixMutualInformation()
        >>> metric.update(torch.eye(4), torch.eye(4))
        >>> metric.compute()
        tensor(1.3863)
    """

    host_states = (*RowSampleMetric.host_states, "dim_r")

    dim_r: Tensor

    def __init__(self, *, order: float = 2.0, max_rows: int = 4096, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(max_rows=max_rows, seed=seed, **kwargs)
        check_positive("order", order)
        self.order = order
        # A row is r and z side by side.
        self.add_state("dim_r", default=torch.tensor(0, device="cpu"), dist_reduce_fx="max")

    def update(self, r: Tensor, z: Tensor) -> None:
        """Add rows.

        Args:
            r: representations, shape ``(N, d_R)``.
            z: embeddings of the same images, shape ``(N, d_Z)``.
        """
        if self.dim is not None:
            dim_r = int(self.dim_r)
            check_width(r, dim_r, "r")
            check_width(z, self.dim - dim_r, "z")
        else:
            check_matrix(r, "r", finite=False)
            check_matrix(z, "z", finite=False)
        if len(r) != len(z):
            raise ValueError(f"r and z must have the same number of rows, got {len(r)} and {len(z)}")
        self._watch(r, z)
        self.dim_r = torch.full_like(self.dim_r, r.shape[1])
        self._sample(torch.cat([r, z], dim=1))

    def _add_rows_of(self, state: Mapping[str, Any]) -> None:
        dim_r = int(state["dim_r"])
        if self.dim is not None and int(self.dim_r) != dim_r:
            raise ValueError(f"cannot merge r of {dim_r} dimensions with r of {int(self.dim_r)}")
        self.dim_r = torch.full_like(self.dim_r, dim_r)
        super()._add_rows_of(state)

    def compute(self) -> Tensor:
        """Mutual information of the sampled rows, in nats."""
        r, z = self.sample().tensor_split([int(self.dim_r)], dim=1)
        return matrix_mutual_information(r, z, order=self.order)
