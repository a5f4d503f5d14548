"""Optimizers and learning rates for large batches."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from adadim_lightning.extras import require
from adadim_lightning.functional._numeric import check_integer, check_number

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def lars(
    params: Iterable[Tensor | dict[str, Any]],
    lr: float = 0.3,
    *,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    trust_coefficient: float = 0.02,
) -> Optimizer:
    r"""SGD with momentum whose step on each weight is proportional to that weight's norm; timm's LARS.

    .. math:: u = \frac{\eta \|w\|}{\|g\| + \lambda \|w\|} (g + \lambda w), \qquad m \gets \mu m + u, \qquad
        w \gets w - \mathrm{lr} \cdot m

    Args:
        params: parameters or groups of them. A group with a ``weight_decay`` of 0 of its own, as
            :class:`~adadim_lightning.AdaDimModule` makes one of biases and norms, takes plain steps,
            :math:`u = g`; all others are adapted.
        lr: learning rate.
        momentum: :math:`\mu`.
        weight_decay: :math:`\lambda`.
        trust_coefficient: :math:`\eta`.

    Raises:
        MissingExtraError: timm is not installed.

    Source: You, Gitman & Ginsburg, "Large batch training of convolutional networks", arXiv 1708.03888; the
    defaults are those of solo-learn.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = lars([{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}])
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.0001, 0.0]
    """
    groups = [dict(group) if isinstance(group, dict) else {"params": [group]} for group in params]
    # Left to itself, timm adapts nothing any more once the weight decay of all is 0.
    groups = [{"always_adapt": group.get("weight_decay") != 0, **group} for group in groups]
    optimizer: Optimizer = require("timm.optim", "timm").Lars(
        groups, lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coeff=trust_coefficient
    )
    return optimizer


def scale_learning_rate(lr: float, global_batch_size: int, rule: str) -> float:
    """Learning rate for a batch size, from the one for a batch of 256.

    Args:
        lr: learning rate for a batch of 256 images.
        global_batch_size: images of one optimizer step, over all processes and accumulated batches.
        rule: ``"none"`` leaves the rate, ``"linear"`` multiplies it by batch / 256, ``"sqrt"`` by its root.

    Raises:
        ValueError: another rule, a learning rate below 0, or a batch size below 1.

    Source: linear: Goyal et al., "Accurate, large minibatch SGD", arXiv 1706.02677; root: Krizhevsky, "One weird
    trick for parallelizing convolutional neural networks", arXiv 1404.5997.

    Example:
        >>> scale_learning_rate(0.3, 1024, "linear"), scale_learning_rate(0.3, 1024, "sqrt")
        (1.2, 0.6)
    """
    check_number("lr", lr, low=0)
    check_integer("global_batch_size", global_batch_size, low=1)
    ratio = global_batch_size / 256
    factors = {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}
    if rule not in factors:
        raise ValueError(f"the learning-rate rule must be one of {', '.join(factors)}, got {rule!r}")
    return lr * factors[rule]


def lower_learning_rate(trainer: "Trainer", factor: float) -> None:
    """Multiply the learning rates of all optimizers and of the schedules that set them."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for key in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():
                group[key] = group[key] * factor
    schedulers: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
    for scheduler in schedulers:
        for name in {"base_lrs", "max_lrs"} & vars(scheduler).keys():
            setattr(scheduler, name, [lr * factor for lr in getattr(scheduler, name)])
        schedulers += getattr(scheduler, "_schedulers", ())  # one that is made of others
