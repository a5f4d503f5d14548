"""How many dimensions a set of vectors spans: effective rank and spectral entropy."""

from typing import Literal

import torch
from torch import Tensor

from adadim_lightning.functional._numeric import check_matrix, like, no_autocast, to_float64

Spectrum = Literal["singular", "eigen"]
RANKME_GUARD = 1e-7


@torch.no_grad()
def eigenvalue_spectrum(x: Tensor, *, center: bool = False) -> Tensor:
    r"""Eigenvalues of :math:`X^\top X`, the squared singular values of ``x``.

    They are taken from the smaller of the two Gram matrices, in float64: the Gram squares the condition
    number, which float32 cannot afford (a rank-1 input would read an effective rank of 1.08).

    Args:
        x: vectors, shape ``(N, d)``, any floating dtype.
        center: subtract the mean first.

    Returns:
        Shape ``(min(N, d),)``, float64, descending, none negative; rounding noise counts as zero.

    Raises:
        ValueError: ``x`` is not two-dimensional, is empty, or holds a NaN or infinity.

    Example:
        >>> eigenvalue_spectrum(torch.diag(torch.tensor([1.0, 2.0])))
        tensor([4., 1.], dtype=torch.float64)
    """
    check_matrix(x)
    n, d = x.shape
    with no_autocast(x):
        x = to_float64(x)
        mean = x.mean(dim=0) if center else x.new_zeros(())
        x = x - mean
        gram = x @ x.T if n < d else x.T @ x
        return _eigenvalues(gram, max(n, d), n * mean.square().sum())


def _eigenvalues(gram: Tensor, size: int, subtracted: Tensor) -> Tensor:
    """Descending eigenvalues of a float64 Gram matrix, without those that are rounding.

    Rounding is relative to the trace of the matrix; and where a mean was subtracted from the rows, to the
    square of that subtraction's own rounding, which is relative to the sum of the squares that it took away.
    """
    eigenvalues = torch.linalg.eigvalsh(gram).flip(0)
    eps = size * torch.finfo(torch.float64).eps
    noise = eps * gram.trace() + eps**2 * subtracted
    return torch.where(eigenvalues > noise, eigenvalues, 0.0)


def _spectral_entropy_of_eigenvalues(eigenvalues: Tensor, spectrum: Spectrum) -> Tensor:
    """Entropy in nats of the normalized spectrum; an all-zero spectrum is full collapse and has none."""
    if spectrum not in ("singular", "eigen"):
        raise ValueError(f'spectrum must be "singular" or "eigen", got {spectrum!r}')
    values = eigenvalues.sqrt() if spectrum == "singular" else eigenvalues
    p = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return -torch.xlogy(p, p).sum()


@torch.no_grad()
def spectral_entropy(x: Tensor, *, spectrum: Spectrum = "singular", center: bool = False) -> Tensor:
    r"""Entropy of the spectrum of a set of vectors, H(R) in nats: the logarithm of the effective rank.

    .. math:: H = -\sum_k p_k \ln p_k, \qquad p_k = \sigma_k / \sum_j \sigma_j

    Args:
        x: vectors, shape ``(N, d)``, any floating dtype; computed in float64.
        spectrum: normalize the singular values, or their squares (the covariance spectrum).
        center: subtract the mean first.

    Returns:
        Scalar in ``[0, ln min(N, d)]``, nats; 0 for a fully collapsed input.

    Raises:
        ValueError: ``x`` is not two-dimensional, is empty, or holds a NaN or infinity.

    Source: Roy & Vetterli, "The effective rank", EUSIPCO 2007.

    Example:
        >>> spectral_entropy(torch.eye(4))
        tensor(1.3863)
    """
    entropy = _spectral_entropy_of_eigenvalues(eigenvalue_spectrum(x, center=center), spectrum)
    return like(entropy, x)


@torch.no_grad()
def effective_rank(x: Tensor, *, spectrum: Spectrum = "singular", center: bool = False) -> Tensor:
    r"""Effective rank of a set of vectors: how many dimensions they really use.

    .. math:: \exp\Big(-\sum_k p_k \ln p_k\Big), \qquad p_k = \sigma_k / \sum_j \sigma_j

    The two spectra give very different ranks for the same input (71 against 5 is not unusual); compare only
    values with the same choice. It measures and carries no gradient.

    Args:
        x: vectors, shape ``(N, d)``, any floating dtype; computed in float64.
        spectrum: normalize the singular values, or their squares (the covariance spectrum).
        center: subtract the mean first; a constant input then has rank 1.

    Returns:
        Scalar in ``[1, min(N, d)]``.

    Raises:
        ValueError: ``x`` is not two-dimensional, is empty, or holds a NaN or infinity.

    Source: Roy & Vetterli, "The effective rank", EUSIPCO 2007; un-centered and on singular values it is
    RankMe (Garrido et al., ICML 2023) without the guard; :func:`rankme` has it.

    Example:
        >>> effective_rank(torch.eye(4))
        tensor(4.)
    """
    entropy = _spectral_entropy_of_eigenvalues(eigenvalue_spectrum(x, center=center), spectrum)
    return like(_effective_rank_of_entropy(entropy, min(x.shape)), x)


def _effective_rank_of_entropy(entropy: Tensor, most: int) -> Tensor:
    """``exp(entropy)``, kept from exceeding ``most`` by a rounding error."""
    return entropy.exp().clamp_max(float(most))


@torch.no_grad()
def rankme(x: Tensor) -> Tensor:
    r"""RankMe: the effective rank with the guard of its paper, for numbers that compare with published ones.

    .. math:: \exp\Big(-\sum_k p_k \ln p_k\Big), \qquad p_k = \sigma_k / \sum_j \sigma_j + 10^{-7}

    over all ``min(N, d)`` singular values, un-centered. The guard lifts the value by about one in a thousand at
    2048 dimensions, also above their number; :func:`effective_rank` is the same without it.

    Args:
        x: vectors, shape ``(N, d)``, any floating dtype; computed in float64.

    Returns:
        Scalar, at least 1 up to the guard.

    Raises:
        ValueError: ``x`` is not two-dimensional, is empty, or holds a NaN or infinity.

    Source: Garrido et al., "RankMe: assessing the downstream performance of pretrained self-supervised
    representations by their rank", ICML 2023.

    Example:
        >>> rankme(torch.eye(4))
        tensor(4.0000)
    """
    values = eigenvalue_spectrum(x).sqrt()
    p = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + RANKME_GUARD
    return like((-torch.xlogy(p, p).sum()).exp(), x)
