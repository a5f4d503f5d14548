"""What several processes that train together have in common."""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


def world_size() -> int:
    """Number of processes that train together; 1 outside distributed training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among those that train together; 0 outside distributed training."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def check_strategy(trainer: Any, user: Any) -> None:
    """Refuse a Lightning trainer that would cut the model into parts.

    Raises:
        ValueError: its strategy is FSDP, DeepSpeed or another that is not data parallel alone.
    """
    kind = type(trainer.strategy)
    # By name: pytorch_lightning has classes of its own.
    names = {base.__name__ for base in kind.__mro__}
    if "DeepSpeedStrategy" in names or ("ParallelStrategy" in names and "DDPStrategy" not in names):
        raise ValueError(
            f"{type(user).__name__} needs the whole model in every process, but {kind.__name__} cuts it into "
            'parts; use Trainer(strategy="ddp")'
        )


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


def of_all_processes(own: T) -> list[T]:
    """What each process has, in the order of their ranks; all of them must call this, with tensors on the CPU."""
    if world_size() == 1:
        return [own]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, own)
    return everyone


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, x.contiguous())
        ctx.rows = slice(rank() * len(x), (rank() + 1) * len(x))
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


def gather_uneven_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows of all processes, in the order of their ranks, detached; each process may have another number.

    Args:
        tensors: each of shape ``(N, d_i)``; N may be 0 and differ between processes, the widths may not.

    Returns:
        Each of shape ``(N_1 + ... + N_W, d_i)`` for W processes; the detached tensors when there is only one.
    """
    if world_size() == 1:
        return tuple(x.detach() for x in tensors)
    own = torch.tensor([len(tensors[0])], device=tensors[0].device)
    counts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(counts, own)
    lengths = [int(n) for n in counts]
    results = []
    for x in tensors:
        padded = x.new_zeros(max(lengths), *x.shape[1:])
        padded[: len(x)] = x.detach()
        gathered = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(gathered, padded)
        results.append(torch.cat([rows[:n] for rows, n in zip(gathered, lengths, strict=True)]))
    return tuple(results)
