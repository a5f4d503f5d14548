"""What frozen representations are worth: probes that need labels, and values that need none.

A row with a negative label has none: every probe leaves it out, to fit and to score.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adadim_lightning.functional._numeric import check_integer, check_number
from adadim_lightning.functional.alpha_req import alpha_req
from adadim_lightning.functional.hypersphere import alignment, uniformity
from adadim_lightning.functional.information import matrix_mutual_information
from adadim_lightning.functional.lidar import lidar
from adadim_lightning.functional.neighbors import knn_predict
from adadim_lightning.functional.spectrum import effective_rank, rankme, spectral_entropy
from adadim_lightning.models.backbones import evaluating

MOMENTUM = 0.9
INFORMATION_ROWS = 512
UNIFORMITY_ROWS = 4096


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


def _labeled(rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The rows that have a label."""
    x, labels = rows
    known = labels >= 0
    if not bool(known.any()):
        raise ValueError(f"none of the {len(labels)} rows has a label >= 0")
    return x[known], labels[known].long()


class Accuracies(NamedTuple):
    """Share of the rows that are predicted right, and its mean over classes, whatever their sizes."""

    top1: float
    balanced: float


def linear_accuracies(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Accuracies:
    """Accuracies of a logistic regression on standardized, frozen representations.

    Args:
        train: representations ``(N, d)`` and labels ``(N,)`` to fit.
        test: those to score.

    Returns:
        Shares in ``[0, 1]``; the balanced one is the mean recall of the classes that ``test`` holds.

    Raises:
        ValueError: no row has a label, or those to fit are all of one class.

    Example:
        >>> rows = (torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([0, 1, -1]))
        >>> linear_accuracies(rows, rows)
        Accuracies(top1=1.0, balanced=1.0)
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    classifier.fit(*(x.numpy() for x in _labeled(train)))
    x, labels = _labeled(test)
    right = torch.from_numpy(classifier.predict(x.numpy())) == labels
    recalls = [right[labels == c].double().mean() for c in torch.unique(labels)]
    return Accuracies(float(right.double().mean()), float(torch.stack(recalls).mean()))


def linear_accuracy(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Top-1 accuracy of :func:`linear_accuracies`."""
    return linear_accuracies(train, test).top1


@torch.no_grad()
def sgd_linear_accuracy(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    epochs: int = 100,
    batch_size: int = 256,
    lr: float = 0.1,
    seed: int = 0,
) -> float:
    """Top-1 accuracy of the field's linear probe: one linear layer trained by SGD on frozen representations.

    Representations are standardized by the mean and deviation of ``train``. Momentum 0.9, no weight decay, a
    learning rate that falls to zero along half a cosine, weights that start at zero. The result depends on
    ``seed`` alone, and the global random state stays.

    Args:
        train: representations ``(N, d)`` and labels ``(N,)`` to fit.
        test: those to score.
        epochs: passes over ``train``.
        batch_size: rows per step; an epoch's last batch may be smaller.
        lr: learning rate at a batch of 256; it is scaled by ``batch_size / 256``.
        seed: of the order of the rows.

    Returns:
        Share in ``[0, 1]``.

    Raises:
        ValueError: no row has a label; ``epochs`` or ``batch_size`` < 1, ``seed`` or ``lr`` < 0.

    Example:
        >>> rows = (torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([0, 1, -1]))
        >>> sgd_linear_accuracy(rows, rows)
        1.0
    """
    from sklearn.preprocessing import StandardScaler

    for name, value, low in (("epochs", epochs, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        check_integer(name, value, low=low)
    check_number("lr", lr, low=0)
    (x, labels), (test_x, test_labels) = _labeled(train), _labeled(test)
    scaler = StandardScaler().fit(x.numpy())

    def standardized(rows: Tensor) -> Tensor:
        scaled = torch.from_numpy(scaler.transform(rows.numpy()))
        return torch.cat([scaled, scaled.new_ones(len(rows), 1)], dim=1)  # the last column carries the bias

    x = standardized(x)
    target = nn.functional.one_hot(labels).to(x.dtype)
    weight = x.new_zeros(target.shape[1], x.shape[1])
    velocity = torch.zeros_like(weight)
    generator = torch.Generator().manual_seed(seed)
    steps, step = epochs * math.ceil(len(x) / batch_size), 0
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(x), generator=generator), batch_size):
            batch = x.index_select(0, rows)
            # The gradient of the mean cross entropy, written out: a tenth of a millisecond a step counts here.
            # Classes come first, since a product with few columns is several times slower.
            error = (weight @ batch.T).softmax(dim=0) - target.index_select(0, rows).T
            gradient = error @ batch / len(rows)
            velocity.mul_(MOMENTUM).add_(gradient)
            rate = lr * batch_size / 256 * (1 + math.cos(math.pi * step / steps)) / 2
            weight.sub_(velocity, alpha=rate)
            step += 1
    predicted = (standardized(test_x) @ weight.T).argmax(dim=1)
    return float((predicted == test_labels).double().mean())


def few_shot_accuracy(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    fraction: float,
    *,
    draws: int = 3,
    seed: int = 0,
) -> tuple[float, float]:
    """Top-1 accuracy of a logistic regression that sees the labels of few training rows.

    Each draw takes the same fraction of every class, rounded up, so at least one row.

    Args:
        train: representations ``(N, d)`` and labels ``(N,)`` to draw from.
        test: those to score.
        fraction: share of the labeled training rows, in ``(0, 1]``.
        draws: number of independent draws.
        seed: of the draws; the global random state stays.

    Returns:
        Mean and sample standard deviation over the draws, shares in ``[0, 1]``; the deviation of one draw is 0.

    Raises:
        ValueError: no row has a label, or those to draw from are all of one class; ``fraction`` lies outside
            ``(0, 1]``, ``draws`` < 1 or ``seed`` < 0.

    Example:
        >>> rows = (torch.tensor([[0.0], [0.1], [0.9], [1.0]]), torch.tensor([0, 0, 1, 1]))
        >>> few_shot_accuracy(rows, rows, 0.5)
        (1.0, 0.0)
    """
    check_number("fraction", fraction, low=0, high=1)
    if fraction == 0:
        raise ValueError("fraction must be > 0")
    check_integer("draws", draws, low=1)
    check_integer("seed", seed, low=0)
    x, labels = _labeled(train)
    classes = [(labels == c).nonzero().flatten() for c in torch.unique(labels)]
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(draws):
        chosen = torch.cat(
            [
                # A tenth of 30 is 3, though 0.1 * 30 is a little more.
                rows[torch.randperm(len(rows), generator=generator)[: math.ceil(fraction * len(rows) - 1e-9)]]
                for rows in classes
            ]
        )
        scores.append(linear_accuracy((x[chosen], labels[chosen]), test))
    return statistics.fmean(scores), statistics.stdev(scores) if draws > 1 else 0.0


def knn_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, k: int = 20, temperature: float = 0.07
) -> float:
    """Top-1 accuracy of the weighted nearest-neighbor vote.

    Args:
        train: representations ``(N, d)`` and labels ``(N,)`` among which neighbors are sought.
        test: those to score.
        k: number of neighbors.
        temperature: of the weights, > 0; ``math.inf`` gives each neighbor the same, the plain vote.

    Returns:
        Share in ``[0, 1]``.

    Raises:
        ValueError: no row has a label, ``k`` < 1 or ``temperature`` <= 0.

    Example:
        >>> rows = (torch.eye(2), torch.tensor([0, 1]))
        >>> knn_accuracy(rows, rows, k=1, temperature=math.inf)
        1.0
    """
    x, labels = _labeled(test)
    predicted = knn_predict(x, *_labeled(train), k=k, temperature=temperature)
    return float((predicted == labels).double().mean())


@torch.no_grad()
def label_free_values(r: Tensor, z: Tensor | None, r_views: Tensor) -> dict[str, float]:
    """What can be said of frozen representations without a label.

    Args:
        r: representations of the clean images, shape ``(N, d_R)``, N >= 2.
        z: embeddings of the same images, shape ``(N, d_Z)``; ``None`` where the projection head is gone.
        r_views: representations of q augmented views of M images, shape ``(M, q, d_R)``, M, q >= 2.

    Returns:
        ``H_R`` (nats) and ``ER_R``, un-centered and on singular values; ``rankme``; ``lidar`` of the views;
        ``alpha_req``; with ``z`` also ``I_RZ`` (order 2, nats), the mean over groups of 512 rows, or of all
        where there are fewer, since it depends on their number, ``log_n``, the logarithm of that number, and
        ``ER_Z``; ``uniformity`` of at most 4,096 rows; ``alignment`` of the first two views. Groups are taken
        at even distances across ``r``, as data sets are often sorted by class; what fills no group is left out.

    Raises:
        ValueError: a shape does not fit, or an input holds a NaN or infinity.

    Example:
        >>> values = label_free_values(torch.eye(4), torch.eye(4), torch.eye(4)[:, None].expand(4, 2, 4))
        >>> round(values["ER_R"], 3), round(values["I_RZ"], 3), round(values["lidar"], 3)
        (4.0, 1.386, 3.0)
    """
    values = {
        "H_R": spectral_entropy(r),
        "ER_R": effective_rank(r),
        "rankme": rankme(r),
        "lidar": lidar(r_views),
        "alpha_req": alpha_req(r),
    }
    if z is not None:
        if len(z) != len(r):
            raise ValueError(f"r and z must have the same number of rows, got {len(r)} and {len(z)}")
        groups = max(1, len(r) // INFORMATION_ROWS)
        pairs = [(r[i::groups][:INFORMATION_ROWS], z[i::groups][:INFORMATION_ROWS]) for i in range(groups)]
        values["I_RZ"] = torch.stack([matrix_mutual_information(*pair) for pair in pairs]).mean()
        values["log_n"] = torch.tensor(float(len(pairs[0][0]))).log()
        values["ER_Z"] = effective_rank(z)
    values["uniformity"] = uniformity(r[:: math.ceil(len(r) / UNIFORMITY_ROWS)])
    values["alignment"] = alignment(r_views[:, 0], r_views[:, 1])
    return {name: float(value) for name, value in values.items()}
