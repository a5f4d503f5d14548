"""Sample uniformity: the contrastive loss NT-Xent."""

import math

import torch
from torch import Tensor

from adadim_lightning.functional._numeric import check_positive, check_views, no_autocast
from adadim_lightning.functional.information import cosine_gram


def _nt_xent_of_gram(gram: Tensor, temperature: float) -> Tensor:
    """NT-Xent from the cosine similarities of the 2N stacked rows."""
    n = len(gram) // 2
    positives = torch.cat([gram.diagonal(n), gram.diagonal(-n)]) / temperature
    logits = (gram / temperature).fill_diagonal_(-math.inf)
    return (logits.logsumexp(dim=1) - positives).mean()


def nt_xent_loss(z1: Tensor, z2: Tensor, *, temperature: float = 0.2) -> Tensor:
    r"""Normalized temperature-scaled cross entropy, the loss of SimCLR.

    .. math:: -\frac{1}{2N} \sum_i \ln \frac{\exp(s_{i,i'} / \tau)}{\sum_{k \ne i} \exp(s_{i,k} / \tau)}

    with cosine similarities s over the 2N rows of both views and i' the other view of i.

    Args:
        z1: embeddings of the first view, shape ``(N, d)``, N >= 2; computed in float32 or wider.
        z2: embeddings of the second view, the same shape.
        temperature: :math:`\tau` > 0.

    Returns:
        Differentiable scalar, nats.

    Raises:
        ValueError: the views differ in shape or have fewer than 2 rows; ``temperature`` <= 0.

    Source: Chen et al., "A simple framework for contrastive learning of visual representations", ICML 2020.

    Example:
        >>> nt_xent_loss(torch.eye(2), torch.eye(2), temperature=1.0)
        tensor(0.5514)
    """
    check_views(z1, z2)
    check_positive("temperature", temperature)
    with no_autocast(z1):
        return _nt_xent_of_gram(cosine_gram(torch.cat([z1, z2])), temperature)
