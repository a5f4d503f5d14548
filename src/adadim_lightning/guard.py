"""What ends a run: the first NaN or infinity, found without a device sync on every step, or a collapse."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch import distributed as dist

from adadim_lightning.distributed import world_size

COLLAPSED_RANK = 1.5  # an effective rank below it is near 1


class NonFiniteError(RuntimeError):
    """R, Z, the loss or the gradients hold a NaN or an infinity."""

    def __init__(self, step: int) -> None:
        advice = (
            "nothing was trained before it, so look at the images and how the views normalize them"
            if step == 0
            else "lower the learning rate or set trainer.gradient_clip_val; any checkpoint is from before it"
        )
        super().__init__(f"a NaN or infinity appeared in R, Z, the loss or its gradient at step {step}; {advice}")
        self.step = step


class CollapseError(RuntimeError):
    """R or Z collapses; the message says what was seen, from where to go on, and what helps."""


class FiniteGuard(nn.Module):
    """Remembers, on the device, the first step whose loss was not finite.

    The loss reads every entry of R and Z, so a NaN or infinity in either reaches it.

    Attributes:
        raises: whether the checks raise; not while somebody else reads the flag and can mend what happened.
    """

    first_bad_step: Tensor
    raises: bool

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first_bad_step", torch.tensor(-1), persistent=False)
        self.raises = True

    @property
    def tripped(self) -> Tensor:
        """Whether a bad step was seen: a boolean on the device."""
        return self.first_bad_step >= 0

    def watch(self, loss: Tensor, step: int) -> None:
        """Note the step if the loss is not finite and none was noted before; forces no device sync."""
        bad = ~torch.isfinite(loss.detach()) & ~self.tripped
        self.first_bad_step.masked_fill_(bad, step)

    def check(self) -> None:
        """Read the flag.

        Raises:
            NonFiniteError: a step was noted; it names the step.
        """
        if not self.raises:
            return
        step = int(self.first_bad_step)
        if step >= 0:
            raise NonFiniteError(step)

    def check_all(self) -> None:
        """Read the flags of all processes, which must call this together.

        Raises:
            NonFiniteError: one of them noted a step; it names the first.
        """
        self.share()
        self.check()

    def reset(self) -> None:
        """Forget the step."""
        self.first_bad_step.fill_(-1)

    def share(self) -> int:
        """Tell all processes, which must call this together, of the first step that one of them noted.

        Returns:
            The step; -1 if there is none.
        """
        if world_size() > 1:
            step = torch.where(self.tripped, self.first_bad_step, torch.iinfo(torch.int64).max)
            dist.all_reduce(step, dist.ReduceOp.MIN)
            self.first_bad_step.copy_(torch.where(step == torch.iinfo(torch.int64).max, -1, step))
        return int(self.first_bad_step)


class Snapshot:
    """Weights as they are now.

    Copied in one piece for each kind of them: a kernel for each weight would take longer than the step of a GPU.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for x in weights:
            self._kinds.setdefault((x.device, x.dtype), []).append(_in_a_row(x.detach()))
        self._copies = [torch.cat([x.reshape(-1) for x in kind]) for kind in self._kinds.values()]

    def restore_where(self, condition: Tensor) -> None:
        """Set the weights back where the condition, a boolean on the device, holds; forces no device sync."""
        for kind, copy in zip(self._kinds.values(), self._copies, strict=True):
            wanted = torch.where(condition.to(copy.device), copy, torch.cat([x.reshape(-1) for x in kind]))
            parts = torch.split(wanted, [x.numel() for x in kind])
            torch._foreach_copy_(kind, [part.view(x.shape) for part, x in zip(parts, kind, strict=True)])


def _is_dense(x: Tensor) -> bool:
    """Whether the entries fill a piece of memory, in whatever order."""
    if x.is_contiguous():
        return True
    filled = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != filled:
            return False
        filled *= size
    return True


def _in_a_row(x: Tensor) -> Tensor:
    """The same memory as a row, for which copies need not mind the order of dimensions; if that is possible."""
    return x.as_strided((x.numel(),), (1,)) if _is_dense(x) else x
