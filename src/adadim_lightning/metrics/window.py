"""Effective rank of the most recent rows."""

from typing import Any

from torch import Tensor

from adadim_lightning.distributed import world_size
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
        self._open: EffectiveRank | None = None
        self._last_read: tuple[Tensor, int, int] | None = None

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
        self._open = None
        rows = [chunk.num_rows * world_size() for chunk in self._chunks]
        while sum(rows[1:]) >= self.window:
            rows.pop(0)
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
        self._last_read = (*union.spectrum_and_rows(), union.dim)
        return self._last_read

    def state_dict(self) -> dict[str, Any]:
        """The chunks, for a checkpoint."""
        chunks = [{name: getattr(chunk, name) for name in STATES} for chunk in self._chunks]
        return {"opened": self._opened, "chunks": chunks, "open": self._open is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._opened = state["opened"]
        self._chunks, self._open, self._last_read = [], None, None
        if world_size() > 1:
            return  # a checkpoint holds the rows of one process only; of several, each begins its window anew
        for values in state["chunks"]:
            chunk = EffectiveRank(center=self.center)
            for name in STATES:
                setattr(chunk, name, values[name])
            self._chunks.append(chunk)
        self._open = self._chunks[-1] if state["open"] else None
