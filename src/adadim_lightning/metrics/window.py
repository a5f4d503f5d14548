"""The most recent training steps, and the effective rank of their rows."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adadim_lightning.distributed import (
    of_all_processes,
    rank,
    rows_of_all_processes,
    world_size,
)
from adadim_lightning.functional._numeric import to_float64
from adadim_lightning.metrics.effective_rank import EffectiveRank

STATES = ("rows", "keys", "seen", "count", "mean", "scatter")


class Step(NamedTuple):
    """What this process has of one training step; no rows where the step had none that could be read.

    Attributes:
        number: of optimizer steps before it.
        r: rows of R, shape ``(V * N, d_R)`` for V views.
        z: rows of Z, shape ``(V * N, d_Z)``.
        first: rows of the first view, N.
        more: what else its reader wants to know of the step.
    """

    number: int
    r: Tensor
    z: Tensor
    first: int
    more: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, number: int, r: Sequence[Tensor], z: Sequence[Tensor], *more: Tensor) -> "Step":
        """That of detached rows ``(N, d)`` of each view, which nobody else changes."""
        return cls(number, _stacked(r), _stacked(z), len(z[0]), more)

    def views(self) -> tuple[list[Tensor], list[Tensor]]:
        """R and Z of each view."""
        return list(torch.split(self.r, self.first)), list(torch.split(self.z, self.first))

    def to(self, device: torch.device) -> "Step":
        """The same on a device."""
        more = tuple(x.to(device) for x in self.more)
        return self._replace(r=self.r.to(device), z=self.z.to(device), more=more)


def _stacked(views: Sequence[Tensor]) -> Tensor:
    """The views one below the other; without a copy where they are the whole of one piece of memory."""
    storage, width, begin = views[0].untyped_storage(), views[0].shape[1], 0
    for x in views:
        if not x.is_contiguous() or x.data_ptr() != storage.data_ptr() + begin:
            return torch.cat(list(views))
        begin += x.nbytes
    if begin != storage.nbytes():
        return torch.cat(list(views))
    return views[0].as_strided((sum(map(len, views)), width), (width, 1))


@dataclass(frozen=True)
class Measured:
    """A step that all processes can read.

    Attributes:
        step: what this process has of it.
        counts: rows of each process.
    """

    step: Step
    counts: list[int]

    @property
    def images(self) -> list[int]:
        """Images of each process."""
        return [n * self.step.first // len(self.step.z) for n in self.counts]


class PendingSteps:
    """The steps since the last reading, the newest that fill a window: nobody knows when an epoch ends.

    Args:
        window: number of rows, over all processes together.
        first_view: count, and want, the rows of the first view alone.
    """

    def __init__(self, window: int, *, first_view: bool = False) -> None:
        self.window = window
        self.first_view = first_view
        self._steps: deque[Step] = deque()
        self._rows = 0  # of this process

    def _rows_of(self, step: Step) -> int:
        return step.first if self.first_view else len(step.z)

    def add(self, step: Step) -> None:
        """Add a step, and let go of those that the younger ones make superfluous."""
        self._steps.append(step)
        self._rows += self._rows_of(step)
        # If processes have different numbers of rows, all of them let go of what one does not have any more.
        while (self._rows - self._rows_of(self._steps[0])) * world_size() >= self.window:
            self._rows -= self._rows_of(self._steps.popleft())

    def take(self, device: torch.device) -> tuple[list[Measured], int | None]:
        """The steps that a reading is made of, the oldest first; all processes must call this together.

        Args:
            device: of the training; after a resume, the steps are on the CPU.

        Returns:
            Those that every process has, with finite rows; and the number of the first with a NaN or an infinity.
        """
        steps = [step.to(device) for step in self._steps]
        self._steps.clear()
        self._rows = 0
        if world_size() > 1:
            lengths = rows_of_all_processes(torch.tensor(len(steps), device=device))
            steps = steps[len(steps) - int(lengths.min()) :]
        if not steps:
            return [], None
        finite = torch.stack([torch.isfinite(x).all() for step in steps for x in (step.r, step.z)])
        counts = torch.tensor([len(step.z) for step in steps], device=device)
        told = torch.stack([counts, finite.view(-1, 2).all(dim=1).long()], dim=1)
        everyone = rows_of_all_processes(told).transpose(0, 1).tolist()
        found: list[Measured] = []
        rows, bad = 0, None
        for step, of_step in zip(reversed(steps), reversed(everyone), strict=True):
            counts_of_step = [n for n, _ in of_step]
            if not all(is_finite for _, is_finite in of_step):
                bad = step.number
            elif all(counts_of_step) and rows < self.window:
                found.insert(0, Measured(step, counts_of_step))
                rows += sum(found[0].images if self.first_view else counts_of_step)
        return found, bad

    def state_dict(self) -> list[list[tuple[Any, ...]]]:
        """The steps of all processes, for a checkpoint; every process must call this."""
        return of_all_processes([tuple(step.to(torch.device("cpu"))) for step in self._steps])

    def load_state_dict(self, state: Sequence[Sequence[Sequence[Any]]]) -> None:
        """Go on from :meth:`state_dict`, with as many processes or others."""
        self._steps.clear()
        self._rows = 0
        processes = [[Step(*step) for step in steps] for steps in state]
        own = [] if not processes else processes[rank()] if len(processes) == world_size() else _dealt(processes)
        for step in own:
            self.add(step)


def _dealt(processes: Sequence[Sequence[Step]]) -> list[Step]:
    """What this process takes of steps that other numbers of processes had: of each view its share of the rows."""
    shortest = min(map(len, processes))
    steps = []
    for parts in zip(*(steps[len(steps) - shortest :] for steps in processes), strict=True):
        if not all(len(step.z) for step in parts):
            steps.append(parts[0]._replace(r=parts[0].r[:0], z=parts[0].z[:0], first=0, more=()))
            continue
        views = [step.views() for step in parts]
        r, z = (
            [_share(torch.cat(of_view)) for of_view in zip(*(x[i] for x in views), strict=True)] for i in (0, 1)
        )
        more = tuple(
            torch.stack(found).mean() if found[0].ndim == 0 else _share(torch.cat(found))
            for found in zip(*(step.more for step in parts), strict=True)
        )
        steps.append(Step(parts[0].number, torch.cat(r), torch.cat(z), len(z[0]), more))
    return steps


def _share(rows: Tensor) -> Tensor:
    return rows.tensor_split(world_size())[rank()]


class RecentRows:
    """The last ``window`` rows or a little more, in chunks, ready for their spectrum.

    Rows arrive step by step; a chunk ends at each reading. Old chunks leave as soon as the younger ones hold
    enough rows.

    Args:
        window: number of rows, over all processes together.
        center: subtract their mean before the spectrum is taken.
    """

    def __init__(self, window: int, *, center: bool = False) -> None:
        self.window = window
        self.center = center
        self._opened = 0
        self._chunks: list[EffectiveRank] = []
        self._rows: list[int] = []  # of all processes, in each chunk that has ended
        self._open_rows = 0  # likewise, in the chunk that has not
        self._open: EffectiveRank | None = None
        self._last_read: tuple[Tensor, int, int] | None = None
        self._mean: Tensor | None = None  # of the rows that were last read

    def update(self, x: Tensor, rows: int | None = None) -> None:
        """Add rows.

        Args:
            x: those of this process, shape ``(N, d)``.
            rows: their number over all processes; by default each has as many.
        """
        self._last_read = None
        for chunk in self._chunks:
            if chunk.device != x.device:  # a checkpoint is read on the CPU
                chunk.to(x.device)
        if self._open is None:
            # Where rows are sampled, chunks must draw them independently.
            self._open = EffectiveRank(center=self.center, seed=self._opened).to(x.device)
            self._opened += 1
            self._chunks.append(self._open)
        self._open.update(x)
        self._open_rows += len(x) * world_size() if rows is None else rows

    @property
    def empty(self) -> bool:
        """Whether no row has arrived yet."""
        return not self._chunks

    def close(self) -> None:
        """End the chunk, and let go of those that the younger ones make superfluous."""
        if self._open is not None:
            self._rows.append(self._open_rows)
            self._open, self._open_rows = None, 0
        while sum(self._rows[1:]) >= self.window:
            self._rows.pop(0)
            self._chunks.pop(0)

    def read(self) -> tuple[Tensor, int, int]:
        """End the chunk and take the spectrum over all processes.

        Returns:
            Eigenvalues (squared singular values, descending, float64), number of rows behind them, number of
            dimensions.

        Raises:
            ValueError: no row has arrived yet.
        """
        if not self._chunks:
            raise ValueError("no row has arrived yet")
        if self._last_read is not None:
            return self._last_read
        self.close()
        union = self._chunks[0]
        if len(self._chunks) > 1:
            union = EffectiveRank(center=self.center).to(union.device)
            for chunk in self._chunks:
                union.merge_state(chunk)
        assert union.dim is not None
        eigenvalues, rows, self._mean = union.spectrum_and_rows()
        self._last_read = eigenvalues, rows, union.dim
        return self._last_read

    def size_and_spread(self) -> tuple[float, float]:
        """Root mean square of the entries, and of their deviations from the mean row.

        All processes have to ask together, as for :meth:`read`.
        """
        eigenvalues, rows, dim = self.read()
        assert self._mean is not None
        common = float(self._mean.square().sum()) / dim
        total = float(eigenvalues.sum()) / (rows * dim)
        return _size_and_spread(total + common if self.center else total, common)

    def state_dict(self) -> dict[str, Any]:
        """The chunks of all processes, for a checkpoint; every process must call this."""
        chunks = [{name: _on_cpu(getattr(chunk, name)) for name in STATES} for chunk in self._chunks]
        return {"opened": self._opened, "open": self._open is not None, "processes": of_all_processes(chunks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, with as many processes or others: each row stays in one of them."""
        processes = state["processes"]
        chunks = list(zip(*processes, strict=True))
        self._opened, self._last_read = state["opened"], None
        first = self._opened - len(chunks)
        self._chunks = [self._restore(seed, parts) for seed, parts in enumerate(chunks, start=first)]
        self._rows = [sum(int(values["seen"]) for values in parts) for parts in chunks]
        self._open, self._open_rows = None, 0
        if state["open"] and len(processes) == world_size():
            self._open, self._open_rows = self._chunks[-1], self._rows.pop()

    def _restore(self, seed: int, parts: Sequence[dict[str, Any]]) -> EffectiveRank:
        """A chunk with what this process takes of the parts that the processes had."""
        whole = []
        for values in parts:
            chunk = EffectiveRank(center=self.center, seed=seed)
            for name in STATES:
                setattr(chunk, name, values[name])
            whole.append(chunk)
        own = whole[rank() :: world_size()]
        if not own:  # there were fewer processes
            own = [EffectiveRank(center=self.center, seed=seed)]
            assert whole[0].dim is not None
            own[0]._hold_nothing(whole[0].dim)
        for other in own[1:]:
            own[0].merge_state(other)
        return own[0]


def size_and_spread(x: Tensor) -> tuple[float, float]:
    """:meth:`RecentRows.size_and_spread` of the rows of all processes, without their spectrum."""
    x = to_float64(x)
    sums = torch.cat([x.sum(dim=0), x.square().sum()[None], x.new_tensor([float(len(x))])])
    if world_size() > 1:
        torch.distributed.all_reduce(sums)
    common = (sums[:-2] / sums[-1]).square().mean()
    return _size_and_spread(float(sums[-2] / sums[-1]) / x.shape[1], float(common))


def _size_and_spread(total: float, common: float) -> tuple[float, float]:
    return math.sqrt(total), math.sqrt(max(total - common, 0.0))


def _on_cpu(state: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return state.cpu() if isinstance(state, Tensor) else [x.cpu() for x in state]
