"""Feature decorrelation: VICReg and its three parts, and Barlow Twins."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from adadim_lightning.functional._numeric import (
    check_matrix,
    check_number,
    check_positive,
    check_views,
    full_precision,
    no_autocast,
)

Reduction = Literal["mean", "sum"]


def invariance_loss(z1: Tensor, z2: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Mean squared distance of the two views, the invariance part of VICReg.

    Args:
        z1: embeddings of the first view, shape ``(N, d)``, N >= 2.
        z2: embeddings of the second view, the same shape.
        reduction: over the d dimensions; ``"mean"`` is the form of the published code, ``"sum"`` that of the
            paper's text.

    Returns:
        Differentiable scalar.

    Raises:
        ValueError: the views differ in shape or have fewer than 2 rows; unknown ``reduction``.

    Source: Bardes, Ponce, LeCun, "VICReg", ICLR 2022.

    Example:
        >>> invariance_loss(torch.zeros(2, 3), torch.ones(2, 3), reduction="sum")
        tensor(3.)
    """
    check_views(z1, z2)
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    with no_autocast(z1):
        loss = (full_precision(z1) - z2).square().mean()
        return loss * z1.shape[1] if reduction == "sum" else loss


def _centered(z: Tensor) -> tuple[Tensor, Tensor]:
    """The centered rows and the unbiased variance of each dimension: both parts below start from them.

    This and what follows takes views ``(N, d)``, or several of them ``(V, N, d)``, and gives a value for each.
    """
    n = z.shape[-2]
    if n < 2:
        raise ValueError(f"a batch needs at least 2 images, got {n}; raise the batch size")
    z = full_precision(z)
    z = z - z.mean(dim=-2, keepdim=True)
    return z, z.square().sum(dim=-2) / (n - 1)


def _hinge(variance: Tensor, eps: float) -> Tensor:
    return torch.relu(1 - torch.sqrt(variance + eps)).mean(dim=-1)


def _off_diagonal(centered: Tensor, variance: Tensor) -> Tensor:
    """Sum of the squared off-diagonal covariances over d, from whichever product is smaller.

    The squared Frobenius norm of Z^T Z equals that of Z Z^T, so for N < d no d x d matrix is needed. What is
    subtracted there is smaller than what it is subtracted from, since a covariance of rank < d cannot be
    diagonal, unless single dimensions dominate: then both are nearly equal and float32 loses digits.
    """
    n, d = centered.shape[-2:]
    if n < d:
        products = (centered @ centered.mT).square().sum(dim=(-2, -1))
        total = (products / (n - 1) ** 2 - variance.square().sum(dim=-1)).clamp_min(0.0)
    else:
        total = 2 * (centered.mT @ centered / (n - 1)).tril(-1).square().sum(dim=(-2, -1))
    return total / d


def variance_loss(z: Tensor, *, eps: float = 1e-4) -> Tensor:
    r"""Hinge that keeps the standard deviation of each dimension above one.

    .. math:: v(Z) = \frac{1}{d} \sum_j \max\big(0, 1 - \sqrt{\operatorname{var}_j + \epsilon}\big)

    Args:
        z: embeddings, shape ``(N, d)``, N >= 2.
        eps: keeps the square root differentiable at zero variance, > 0.

    Returns:
        Differentiable scalar in ``[0, 1)``.

    Raises:
        ValueError: ``z`` is not two-dimensional or has fewer than 2 rows; ``eps`` <= 0.

    Source: Bardes, Ponce, LeCun, "VICReg", ICLR 2022.

    Example:
        >>> variance_loss(torch.zeros(4, 2))
        tensor(0.9900)
    """
    check_matrix(z, "z", finite=False)
    check_positive("eps", eps)
    with no_autocast(z):
        return _hinge(_centered(z)[1], eps)


def covariance_loss(z: Tensor) -> Tensor:
    r"""Sum of the squared off-diagonal covariances, the decorrelation part of VICReg.

    .. math:: c(Z) = \frac{1}{d} \sum_{i \ne j} \operatorname{cov}(Z)_{ij}^2

    Args:
        z: embeddings, shape ``(N, d)``, N >= 2.

    Returns:
        Differentiable scalar >= 0.

    Raises:
        ValueError: ``z`` is not two-dimensional or has fewer than 2 rows.

    Source: Bardes, Ponce, LeCun, "VICReg", ICLR 2022.

    Example:
        >>> covariance_loss(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        tensor(4.)
    """
    check_matrix(z, "z", finite=False)
    with no_autocast(z):
        return _off_diagonal(*_centered(z))


class VICRegParts(NamedTuple):
    """The three unweighted parts of VICReg, each summed over the two views."""

    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def _vicreg_parts(
    z1: Tensor, z2: Tensor, *, eps: float, halve_variance: bool, invariance_reduction: Reduction
) -> VICRegParts:
    """The parts of :func:`vicreg_loss`, with the centering shared between variance and covariance."""
    invariance = invariance_loss(z1, z2, reduction=invariance_reduction)
    with no_autocast(z1):
        centered, variances = _centered(torch.stack([z1, z2]))
        variance = _hinge(variances, eps).sum()
        covariance = _off_diagonal(centered, variances).sum()
    return VICRegParts(invariance, variance / 2 if halve_variance else variance, covariance)


def vicreg_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    eps: float = 1e-4,
    halve_variance: bool = False,
    invariance_reduction: Reduction = "mean",
) -> Tensor:
    r"""VICReg: variance, invariance and covariance regularization.

    .. math:: \lambda \operatorname{mse}(Z_1, Z_2) + \mu\,[v(Z_1) + v(Z_2)] + \nu\,[c(Z_1) + c(Z_2)]

    Args:
        z1: embeddings of the first view, shape ``(N, d)``, N >= 2; computed in float32 or wider.
        z2: embeddings of the second view, the same shape.
        invariance_weight: :math:`\lambda`.
        variance_weight: :math:`\mu`.
        covariance_weight: :math:`\nu`.
        eps: see :func:`variance_loss`.
        halve_variance: average the variance part over the two views, as the authors' code and lightly do,
            instead of summing it, as the paper and solo-learn do.
        invariance_reduction: see :func:`invariance_loss`.

    Returns:
        Differentiable scalar.

    Raises:
        ValueError: the views differ in shape or have fewer than 2 rows; ``eps`` <= 0.

    Source: Bardes, Ponce, LeCun, "VICReg", ICLR 2022.

    Example:
        >>> vicreg_loss(torch.zeros(4, 2), torch.zeros(4, 2), halve_variance=True)
        tensor(24.7500)
    """
    check_positive("eps", eps)
    parts = _vicreg_parts(
        z1, z2, eps=eps, halve_variance=halve_variance, invariance_reduction=invariance_reduction
    )
    return (
        invariance_weight * parts.invariance
        + variance_weight * parts.variance
        + covariance_weight * parts.covariance
    )


class BarlowTwinsParts(NamedTuple):
    """The two unweighted parts of Barlow Twins."""

    invariance: Tensor
    redundancy: Tensor


def _barlow_twins_parts(z1: Tensor, z2: Tensor) -> BarlowTwinsParts:
    """The parts of :func:`barlow_twins_loss`, from whichever product of matrices is smaller."""
    n, d = z1.shape
    dtype = torch.promote_types(z1.dtype, z2.dtype)
    with no_autocast(z1):
        # Batch normalization as the authors have it: biased variance, and an epsilon for constant dimensions.
        x1, x2 = (
            centered / torch.sqrt(variance * ((n - 1) / n) + 1e-5)
            for centered, variance in (_centered(z.to(dtype)) for z in (z1, z2))
        )
        diagonal = (x1 * x2).mean(dim=0)
        if n < d:
            # The squared Frobenius norm of X1^T X2 is the inner product of the Gram matrices of the rows.
            redundancy = ((x1 @ x1.T) * (x2 @ x2.T)).sum() / n**2 - diagonal.square().sum()
            redundancy = redundancy.clamp_min(0.0)
        else:
            redundancy = (x1.T @ x2 / n).fill_diagonal_(0.0).square().sum()
        return BarlowTwinsParts((1 - diagonal).square().sum(), redundancy)


def barlow_twins_loss(z1: Tensor, z2: Tensor, *, redundancy_weight: float = 0.005) -> Tensor:
    r"""Barlow Twins: the cross-correlation of the views is to be the identity.

    .. math:: \sum_i (1 - C_{ii})^2 + \lambda \sum_{i \ne j} C_{ij}^2, \qquad C = \hat Z_1^\top \hat Z_2 / N

    with dimensions standardized over the batch.

    Args:
        z1: embeddings of the first view, shape ``(N, d)``, N >= 2; computed in float32 or wider.
        z2: embeddings of the second view, the same shape.
        redundancy_weight: :math:`\lambda` >= 0.

    Returns:
        Differentiable scalar >= 0.

    Raises:
        ValueError: the views differ in shape or have fewer than 2 rows; ``redundancy_weight`` < 0.

    Source: Zbontar et al., "Barlow Twins: self-supervised learning via redundancy reduction", ICML 2021.

    Example:
        >>> z = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
        >>> round(barlow_twins_loss(z, -z).item(), 3)
        8.0
    """
    check_views(z1, z2)
    check_number("redundancy_weight", redundancy_weight, low=0)
    parts = _barlow_twins_parts(z1, z2)
    return parts.invariance + redundancy_weight * parts.redundancy
