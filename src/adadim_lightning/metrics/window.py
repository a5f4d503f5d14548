"""Effective rank of the most recent rows."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adadim_lightning.distributed import of_all_processes, rank, world_size
from adadim_lightning.functional._numeric import to_float64
from adadim_lightning.metrics.effective_rank import EffectiveRank

STATES = ("rows", "keys", "seen", "count", "mean", "scatter")


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
        self._open: EffectiveRank | None = None
        self._last_read: tuple[Tensor, int, int] | None = None
        self._mean: Tensor | None = None  # of the rows that were last read

    def update(self, x: Tensor) -> None:
        """Add the rows of one step, shape ``(N, d)``."""
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

    @property
    def empty(self) -> bool:
        """Whether no row has arrived yet."""
        return not self._chunks

    def close(self) -> None:
        """End the chunk, and let go of those that the younger ones make superfluous."""
        if self._open is not None:
            self._rows.append(self._open.num_rows * world_size())
            self._open = None
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
        self._open = None
        if state["open"] and len(processes) == world_size():
            self._rows.pop()
            self._open = self._chunks[-1]

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
