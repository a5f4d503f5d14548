"""What several processes that train together have in common."""

import math
from collections.abc import Sequence
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
        rows, counts = _exchange(x, len(x))
        uneven = (counts != len(x)).any()
        if x.device.type == "cpu":
            if uneven:
                raise UnevenRowsError(counts)
        else:
            # To ask would be to wait for the device. A process with another number of rows has raised by now; what
            # the others make of its rows must not be trained.
            rows = rows.masked_fill(uneven, math.nan)
        ctx.rows = slice(rank() * len(x), (rank() + 1) * len(x))
        return rows

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        # Every process computes the same loss of the same global batch, so the sum over processes of the
        # gradients of its own rows is that of one process times their number. Distributed data parallel
        # divides by that number: parameters get the one-process gradient, without another collective.
        return grad_outputs[0][ctx.rows] * dist.get_world_size()


class UnevenRowsError(ValueError):
    """Processes that compute one loss of their batches together have batches of different sizes."""

    def __init__(self, counts: Tensor) -> None:
        sizes = " and ".join(str(int(n)) for n in counts)
        super().__init__(
            "AdaDim's loss is that of the batches of all processes together, which must be of one size but have "
            f"{sizes} images; give the data loader drop_last=True, and where bad images are left out, put others "
            "in their place"
        )


def _exchange(x: Tensor, expected: int) -> tuple[Tensor, Tensor]:
    """The first ``expected`` rows of each process, one below the other, and how many each has.

    Every process sends equally much, whatever it has: a collective of unequal sizes aborts or never ends.
    """
    sent = x.new_zeros(expected + 1, x.shape[1])
    kept = x[:expected]
    sent[: len(kept)] = kept
    sent[-1, 0] = len(x)
    received = x.new_empty(world_size(), *sent.shape)
    dist.all_gather(list(received), sent)
    return received[:, :-1].flatten(end_dim=1), received[:, -1, 0]


def _agree_on_rows(x: Tensor) -> None:
    """Make sure that all processes expect as many rows of each other as this one has.

    Only a process whose number has changed waits for the device. The others notice it in what comes next.

    Raises:
        UnevenRowsError: another process has a different number.
    """
    group, expected = _expected_rows
    if group is not dist.group.WORLD:
        expected = 0  # another set of processes
    if expected != len(x):
        counts = _exchange(x, expected)[1]
        if (counts != len(x)).any():
            raise UnevenRowsError(counts)
        _expected_rows[:] = [dist.group.WORLD, len(x)]


_expected_rows: list[Any] = [None, 0]  # the processes that have agreed, and on what


def gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows of all processes, in the order of their ranks, differentiable.

    For a loss that every process computes on the result, distributed data parallel then yields the gradient
    that one process would compute on the global batch.

    Args:
        tensors: each of shape ``(N, d_i)``, in float32 or wider, with the same device and dtype on every process,
            and the same N where gradients are on.

    Returns:
        Each of shape ``(W * N, d_i)`` for W processes; the tensors themselves when there is only one.

    Raises:
        UnevenRowsError: the processes have different N where gradients are on.
    """
    if world_size() == 1:
        return tensors
    if not torch.is_grad_enabled():
        return gather_uneven_rows(*tensors)
    widths = [x.shape[1] for x in tensors]
    joined = torch.cat(tensors, dim=1)
    _agree_on_rows(joined.detach())
    gathered: Tensor = _GatherRows.apply(joined)
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
    lengths = rows_of_all_processes(torch.tensor([len(tensors[0])], device=tensors[0].device))
    return tuple(torch.cat(parts_of_all_processes(x.detach(), [int(n) for n in lengths])) for x in tensors)


def rows_of_all_processes(x: Tensor) -> Tensor:
    """What each process has, shape ``(W, ...)`` for W processes, of a tensor that has one shape on all of them."""
    received = x.new_empty(world_size(), *x.shape)
    if world_size() == 1:
        return received.copy_(x)
    dist.all_gather(list(received), x.contiguous())
    return received


def parts_of_all_processes(x: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The rows of each process.

    Args:
        x: those of this process, shape ``(N, ...)``, detached.
        lengths: N of each process.
    """
    if world_size() == 1:
        return [x]
    padded = x.new_zeros(max(lengths), *x.shape[1:])
    padded[: len(x)] = x
    return [rows[:n] for rows, n in zip(rows_of_all_processes(padded), lengths, strict=True)]
