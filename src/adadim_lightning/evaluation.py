"""Probes of frozen representations on labeled images."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from adadim_lightning.functional.neighbors import knn_predict
from adadim_lightning.models.backbones import evaluating


@torch.no_grad()
def embed(
    backbone: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], prepare: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Representations of images, in evaluation mode, and their labels.

    Args:
        backbone: images ``(B, C, H, W)`` to representations ``(B, d_R)``.
        batches: pairs of images and labels.
        prepare: what turns such images into the backbone's input.

    Returns:
        Shapes ``(N, d_R)``, float32, and ``(N,)``, both on the CPU.
    """
    like = next(backbone.parameters(), torch.empty(0))
    rows, targets = [], []
    with evaluating(backbone):
        for images, labels in batches:
            rows.append(backbone(prepare(images.to(like.device)).to(like.dtype)).float().cpu())
            targets.append(labels.cpu())
    return torch.cat(rows), torch.cat(targets)


def linear_accuracy(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Top-1 accuracy of a logistic regression on standardized, frozen representations.

    Args:
        train: representations ``(N, d)`` and labels ``(N,)`` to fit.
        test: those to score.

    Returns:
        Share in ``[0, 1]``.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    classifier.fit(*(x.numpy() for x in train))
    return float(classifier.score(*(x.numpy() for x in test)))


def knn_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, k: int = 20, temperature: float = 0.07
) -> float:
    """Top-1 accuracy of the weighted nearest-neighbor vote.

    Args:
        train: representations ``(N, d)`` and labels ``(N,)`` among which neighbors are sought.
        test: those to score.
        k: number of neighbors.
        temperature: of the weights.

    Returns:
        Share in ``[0, 1]``.
    """
    predicted = knn_predict(test[0], *train, k=k, temperature=temperature)
    return float((predicted == test[1]).float().mean())
