"""alpha-ReQ: how fast the eigenvalues of the covariance decay."""

import math

import torch
from torch import Tensor

from adadim_lightning.functional._numeric import check_integer, like, no_autocast
from adadim_lightning.functional.spectrum import eigenvalue_spectrum


@torch.no_grad()
def alpha_req(x: Tensor, *, first: int = 11, last: int = 50) -> Tensor:
    r"""Exponent of the power law that the eigenvalues of the centered covariance follow.

    .. math:: \lambda_k \propto k^{-\alpha}

    A straight line is fitted to :math:`\ln \lambda_k` over :math:`\ln k` for the ranks k from ``first`` to
    ``last``, both included and counted from 1, by least squares weighted with 1/k, as Stringer et al. do: in
    the logarithm high ranks lie dense and would outweigh the others.

    Only eigenvalues above rounding enter. Where fewer than two of them have a rank within the range, the fit
    starts at rank 1; where there are fewer than two at all, the input is collapsed and the exponent infinite.

    Args:
        x: vectors, shape ``(N, d)``, any floating dtype; computed in float64.
        first: first rank of the fit, >= 1; the leading eigenvalues often follow no power law.
        last: last rank of the fit, > ``first``.

    Returns:
        Scalar >= 0: 0 for an isotropic input, infinity for a collapsed one. Representations near 1 are
        reported to generalize best.

    Raises:
        ValueError: ``x`` is not two-dimensional, is empty, or holds a NaN or infinity; ``first`` < 1 or
            ``last`` <= ``first``.

    Source: Agrawal et al., "alpha-ReQ: assessing representation quality in self-supervised learning by
    measuring eigenspectrum decay", NeurIPS 2022; the fit: Stringer et al., "High-dimensional geometry of
    population responses in visual cortex", Nature 2019.

    Example:
        >>> scale = torch.arange(1, 9).pow(-0.5)
        >>> alpha_req(torch.cat([torch.diag(scale), -torch.diag(scale)]), first=2, last=8)
        tensor(1.0000)
    """
    check_integer("first", first, low=1)
    check_integer("last", last, low=first + 1)
    eigenvalues = eigenvalue_spectrum(x, center=True)
    last = min(last, int(eigenvalues.count_nonzero()))
    if last <= first:
        first = 1
    if last <= first:
        return like(eigenvalues.new_tensor(math.inf), x)
    with no_autocast(eigenvalues):
        rank = torch.arange(first, last + 1, dtype=eigenvalues.dtype, device=eigenvalues.device)
        weight = 1 / rank
        log_rank = rank.log() - torch.dot(weight, rank.log()) / weight.sum()
        slope = torch.dot(weight * log_rank, eigenvalues[first - 1 : last].log())
        slope = slope / torch.dot(weight * log_rank, log_rank)
        # A descending spectrum has no rising line but by rounding.
        return like((-slope).clamp_min(0.0), x)
