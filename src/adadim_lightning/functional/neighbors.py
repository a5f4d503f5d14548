"""Weighted nearest-neighbor classification of frozen representations."""

import math

import torch
from torch import Tensor

from adadim_lightning.functional._numeric import (
    check_integer,
    check_matrix,
    check_positive,
    check_tensor,
    no_autocast,
    unit_rows,
)


@torch.no_grad()
def knn_predict(
    x: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 1024,
) -> Tensor:
    r"""Label of each row by the vote of its nearest neighbors, each weighted :math:`\exp(\cos / \tau)`.

    Args:
        x: vectors to classify, shape ``(N, d)``, any floating dtype.
        bank: vectors with known labels, shape ``(M, d)``.
        bank_labels: their classes, shape ``(M,)``, integers >= 0.
        k: number of neighbors; never more than M are used.
        temperature: :math:`\tau` > 0; a large one makes the vote plain.
        chunk_size: rows compared at a time; bounds the memory at ``chunk_size * M`` similarities.

    Returns:
        Predicted classes, shape ``(N,)``, int64.

    Raises:
        ValueError: shapes do not match, an input is empty or not finite, a label is no integer >= 0, or ``k`` < 1,
            ``chunk_size`` < 1 or ``temperature`` <= 0.

    Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018.

    Example:
        >>> knn_predict(torch.tensor([[1.0, 0.1]]), torch.eye(2), torch.tensor([3, 5]), k=1)
        tensor([3])
    """
    check_matrix(x)
    check_matrix(bank, "bank")
    if x.shape[1] != bank.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and bank {tuple(bank.shape)} do not fit together")
    classes, bank_classes = number_classes(bank, bank_labels)
    check_integer("k", k, low=1)
    check_integer("chunk_size", chunk_size, low=1)
    if temperature != math.inf:  # which makes the vote plain
        check_positive("temperature", temperature)
    return _knn_predict(x, bank, bank_classes, classes, k=k, temperature=temperature, chunk_size=chunk_size)


def number_classes(bank: Tensor, bank_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct labels, and the place of each label among them.

    Numbered, since class numbers may be as large as the ids of a database.

    Raises:
        ValueError: bank and labels do not fit :func:`knn_predict`.
    """
    check_matrix(bank, "bank")
    check_tensor(bank_labels, "bank_labels")
    if bank_labels.shape != bank.shape[:1]:
        raise ValueError(
            f"bank {tuple(bank.shape)} and bank_labels {tuple(bank_labels.shape)} do not fit together"
        )
    if bank_labels.is_floating_point() or bank_labels.is_complex() or bool((bank_labels < 0).any()):
        raise ValueError("bank_labels must be integers >= 0")
    classes, bank_classes = torch.unique(bank_labels, return_inverse=True)
    return classes.long(), bank_classes


@torch.no_grad()
def _knn_predict(
    x: Tensor,
    bank: Tensor,
    bank_classes: Tensor,
    classes: Tensor,
    *,
    k: int,
    temperature: float,
    chunk_size: int,
) -> Tensor:
    """:func:`knn_predict` without its checks; forces no device sync."""
    with no_autocast(x):
        bank = unit_rows(bank)
        x = unit_rows(x).to(bank.dtype)
        predictions = []
        for chunk in torch.split(x, chunk_size):
            similarity, neighbor = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)
            votes = similarity.new_zeros(len(chunk), len(classes))
            # Relative to the nearest, so that no temperature over- or underflows.
            weight = ((similarity - similarity[:, :1]) / temperature).exp()
            votes.scatter_add_(1, bank_classes[neighbor], weight)
            predictions.append(classes[votes.argmax(dim=1)])
        return torch.cat(predictions)
