"""Alignment and uniformity on the unit hypersphere."""

import math

import torch
from torch import Tensor

from adadim_lightning.functional._numeric import (
    check_matrix,
    check_number,
    check_positive,
    check_views,
    no_autocast,
    unit_rows,
)
from adadim_lightning.functional.information import cosine_gram


def uniformity(x: Tensor, *, t: float = 2.0) -> Tensor:
    r"""How evenly the directions of vectors cover the sphere: the log of the mean Gaussian potential.

    .. math:: \ln \operatorname*{mean}_{i < j} \exp\big(-t \lVert x_i - x_j \rVert^2\big)

    Args:
        x: vectors, shape ``(N, d)``, N >= 2, any floating dtype; rows are L2-normalized here.
        t: sharpness of the potential, > 0.

    Returns:
        Differentiable scalar in ``[-4t, 0]``, nats; lower is more uniform, 0 is full collapse.

    Raises:
        ValueError: ``x`` is not two-dimensional, has fewer than 2 rows, or holds a NaN or infinity; ``t`` <= 0.

    Source: Wang & Isola, "Understanding contrastive representation learning through alignment and uniformity
    on the hypersphere", ICML 2020.

    Example:
        >>> uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        tensor(-8.)
    """
    check_matrix(x)
    check_positive("t", t)
    if len(x) < 2:
        raise ValueError(f"uniformity needs at least 2 rows, got {len(x)}")
    with no_autocast(x):
        n = len(x)
        exponent = (2 * t * (cosine_gram(x) - 1)).fill_diagonal_(-math.inf)
        return exponent.flatten().logsumexp(dim=0) - math.log(n * (n - 1))


def _row_alignment(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    """Distance to the power ``alpha`` between matching rows, after L2 normalization; shape ``(N,)``."""
    return torch.pow(torch.linalg.vector_norm(unit_rows(x) - unit_rows(y), dim=1), alpha)


def alignment(x: Tensor, y: Tensor, *, alpha: float = 2.0) -> Tensor:
    r"""Mean distance between the two views of the same image, on the unit sphere.

    .. math:: \operatorname*{mean}_i \lVert x_i - y_i \rVert^\alpha

    Args:
        x: vectors of the first view, shape ``(N, d)``, N >= 2, any floating dtype; rows are L2-normalized
            here.
        y: vectors of the second view, the same shape.
        alpha: power of the distance, >= 1 (below, equal views would have an infinite gradient).

    Returns:
        Differentiable scalar >= 0; 0 when both views agree.

    Raises:
        ValueError: the views differ in shape, have fewer than 2 rows, or hold a NaN or infinity; ``alpha`` < 1.

    Source: Wang & Isola, "Understanding contrastive representation learning through alignment and uniformity
    on the hypersphere", ICML 2020.

    Example:
        >>> alignment(torch.eye(2), -torch.eye(2))
        tensor(4.)
    """
    check_views(x, y, ("x", "y"))
    check_matrix(x, "x")
    check_matrix(y, "y")
    check_number("alpha", alpha, low=1)
    with no_autocast(x):
        return _row_alignment(x, y, alpha).mean()
