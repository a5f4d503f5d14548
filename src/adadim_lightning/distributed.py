"""Rows of all processes in one tensor, with and without gradients."""

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    """Number of processes that train together; 1 outside distributed training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def training_steps(trainer: Any) -> float:
    """Number of optimizer steps of a Lightning trainer's whole fit; infinity where it is not known."""
    steps = trainer.estimated_stepping_batches
    return steps if steps >= 0 else math.inf


def training_progress(trainer: Any, steps: float) -> float:
    """Share of a Lightning trainer's fit that is done, from 0 to 1; NaN where its length is not known.

    Args:
        trainer: in a training step.
        steps: :func:`training_steps` of the whole fit.
    """
    if trainer.lightning_module.automatic_optimization:
        return min(trainer.global_step / steps, 1.0) if math.isfinite(steps) else math.nan
    # By hand, a module may step several optimizers in one batch, and max_steps counts all their steps.
    parts = [trainer.global_step / trainer.max_steps] if trainer.max_steps > 0 else []
    batches = (trainer.max_epochs or -1) * trainer.num_training_batches
    if 0 < batches < math.inf:
        parts.append(trainer.fit_loop.total_batch_idx / batches)
    return min(max(parts), 1.0) if parts else math.nan


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, x.contiguous())
        ctx.rows = slice(dist.get_rank() * len(x), (dist.get_rank() + 1) * len(x))
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        # Every process computes the same loss of the same global batch, so the sum over processes of the
        # gradients of its own rows is that of one process times their number. Distributed data parallel
        # divides by that number: parameters get the one-process gradient, without another collective.
        return grad_outputs[0][ctx.rows] * dist.get_world_size()


def gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows of all processes, in the order of their ranks, differentiable.

    For a loss that every process computes on the result, distributed data parallel then yields the gradient
    that one process would compute on the global batch.

    Args:
        tensors: each of shape ``(N, d_i)``, with the same N, device and dtype on every process.

    Returns:
        Each of shape ``(W * N, d_i)`` for W processes; the tensors themselves when there is only one.
    """
    if world_size() == 1:
        return tensors
    widths = [x.shape[1] for x in tensors]
    gathered: Tensor = _GatherRows.apply(torch.cat(tensors, dim=1))
    return tuple(torch.split(gathered, widths, dim=1))
