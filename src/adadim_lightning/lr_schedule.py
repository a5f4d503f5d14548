"""Learning-rate schedules."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from adadim_lightning.functional._numeric import check_number


def warmup_cosine(optimizer: Optimizer, total_steps: int, *, warmup: float = 0.1, final: float = 0.0) -> LambdaLR:
    """Linear warm-up, then half a cosine down.

    Args:
        optimizer: whose learning rates are scheduled.
        total_steps: number of optimizer steps of the whole training.
        warmup: share of the steps spent warming up, in ``[0, 1]``.
        final: share of the full learning rate that is left at the end.

    Returns:
        Scheduler to step after each optimizer step.

    Raises:
        ValueError: ``warmup`` or ``final`` is outside ``[0, 1]``.
    """
    check_number("warmup", warmup, low=0, high=1)
    check_number("final", final, low=0, high=1)
    warmup_steps = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        return final + (1 - final) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2

    return LambdaLR(optimizer, factor)
