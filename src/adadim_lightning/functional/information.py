"""Matrix-based Renyi entropy and mutual information: what the projection head lets through."""

import math

import torch
from torch import Tensor

from adadim_lightning.functional._numeric import (
    check_matrix,
    check_positive,
    full_precision,
    like,
    no_autocast,
    to_float64,
    unit_rows,
)


def cosine_gram(x: Tensor) -> Tensor:
    """Cosine similarities of all pairs of rows.

    A zero row has no direction; all zero rows share one further direction of their own, so that a
    representation collapsed to zero is as similar to itself as any other collapsed one.

    Args:
        x: vectors, shape ``(N, d)``.

    Returns:
        Shape ``(N, N)``, in float32 or wider, differentiable, with unit diagonal.

    Example:
        >>> cosine_gram(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    with no_autocast(x):
        return _gram_of_units(unit_rows(x))


def _gram_of_units(x: Tensor) -> Tensor:
    """:func:`cosine_gram` of rows of unit length and zero rows."""
    zero = ~x.any(dim=1, keepdim=True)
    gram: Tensor = x @ x.T + (zero & zero.T)
    return gram


def _renyi_entropy(gram: Tensor, order: float) -> Tensor:
    """Renyi entropy in nats of a positive semi-definite matrix, normalized to trace one."""
    if order == 2:
        return 2 * gram.diagonal().sum().log() - gram.square().sum().log()
    eigenvalues = torch.linalg.eigvalsh(to_float64(gram))
    noise = len(gram) * torch.finfo(torch.float64).eps * eigenvalues.sum()
    # Inside the where, so that a zero eigenvalue, whose logarithm has no slope, gets the gradient zero.
    p = torch.where(eigenvalues > noise, eigenvalues, 0.0)
    p = p / p.sum()
    positive = p > 0
    log_p = torch.where(positive, p, 1.0).log()
    if order == 1:
        entropy = -(p * log_p).sum()
    elif abs(order - 1) < 0.1:
        # sum p^q - 1 by expm1: next to q = 1 the plain sum cancels away.
        entropy = torch.log1p((p * torch.expm1((order - 1) * log_p)).sum()) / (1 - order)
    else:
        entropy = torch.logsumexp((order * log_p).masked_fill(~positive, -math.inf), dim=0) / (1 - order)
    return like(entropy, gram)


def matrix_entropy(x: Tensor, *, order: float = 2.0) -> Tensor:
    r"""Matrix-based Renyi entropy of a set of vectors, in nats.

    .. math:: S_q(A) = \frac{1}{1-q} \ln \operatorname{tr} A^q, \qquad A = K / \operatorname{tr} K

    with K the cosine Gram matrix of the rows; order 1 is the limit, the von Neumann entropy
    :math:`-\operatorname{tr} A \ln A`. Order 2 needs no eigen-decomposition.

    Args:
        x: vectors, shape ``(N, d)``, any floating dtype; computed in float32 or wider, in float64 where
            eigenvalues are needed.
        order: Renyi order q > 0.

    Returns:
        Differentiable scalar in ``[0, ln N]``, nats: ``ln N`` for orthogonal rows, 0 when all rows are equal.

    Raises:
        ValueError: ``x`` is not two-dimensional, is empty, or holds a NaN or infinity; ``order`` <= 0.

    Source: Giraldo, Rao, Principe, "Measures of entropy from data using infinitely divisible kernels",
    IEEE Trans. Information Theory 2015.

    Example:
        >>> matrix_entropy(torch.eye(4))
        tensor(1.3863)
    """
    check_matrix(x)
    check_positive("order", order)
    with no_autocast(x):
        wide = x if order == 2 else to_float64(x)
        return like(_renyi_entropy(cosine_gram(wide), order), x)


def _renyi_information(gram_r: Tensor, gram_z: Tensor, order: float) -> Tensor:
    """Renyi mutual information in nats from the two cosine Gram matrices (unit diagonals)."""
    if order == 2:
        square_r, square_z = gram_r.square(), gram_z.square()
        joint = torch.dot(square_r.flatten(), square_z.flatten())
        return 2 * math.log(len(gram_r)) + joint.log() - square_r.sum().log() - square_z.sum().log()
    return _renyi_entropy(gram_r, order) + _renyi_entropy(gram_z, order) - _renyi_entropy(gram_r * gram_z, order)


def matrix_mutual_information(r: Tensor, z: Tensor, *, order: float = 2.0) -> Tensor:
    r"""Matrix-based Renyi mutual information of two sets of vectors that belong together row by row, in nats.

    .. math:: I_q(R; Z) = S_q(A_R) + S_q(A_Z) - S_q(A_{R,Z})

    with :math:`A_{R,Z}` the elementwise product of both Gram matrices, normalized to trace one. For order 2

    .. math:: I_2 = \ln \frac{n^2 \sum K_R^2 K_Z^2}{\sum K_R^2 \sum K_Z^2}

    with elementwise squares. The value depends on N: compare at equal N only. For orders other than 1 it may
    be negative, because Renyi entropy is not subadditive, and it is not clamped. A collapsed ``r`` gives 0,
    so a low value alone is no sign of health.

    Args:
        r: representations, shape ``(N, d_R)``, any floating dtype.
        z: embeddings of the same N images, shape ``(N, d_Z)``.
        order: Renyi order q > 0.

    Returns:
        Differentiable scalar, nats, at most ``min(S_q(A_R), S_q(A_Z)) <= ln N``.

    Raises:
        ValueError: an input is not two-dimensional, is empty, or holds a NaN or infinity; the numbers of rows
            differ; ``order`` <= 0.

    Source: Giraldo, Rao, Principe, "Measures of entropy from data using infinitely divisible kernels",
    IEEE Trans. Information Theory 2015.

    Example:
        >>> matrix_mutual_information(torch.eye(4), torch.eye(4))
        tensor(1.3863)
    """
    check_matrix(r, "r")
    check_matrix(z, "z")
    if len(r) != len(z):
        raise ValueError(f"r and z must have the same number of rows, got {len(r)} and {len(z)}")
    check_positive("order", order)
    dtype = torch.promote_types(full_precision(r).dtype, z.dtype)
    with no_autocast(r):
        wide_r, wide_z = (r.to(dtype), z.to(dtype)) if order == 2 else (to_float64(r), to_float64(z))
        information = _renyi_information(cosine_gram(wide_r), cosine_gram(wide_z), order)
        return information.to(dtype).to(r.device)
