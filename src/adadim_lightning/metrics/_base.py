"""What the metrics share: plotting, float64 states, and a random sample of rows that is the same everywhere."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from adadim_lightning.functional._numeric import check_matrix, float64_device, full_precision


class BaseMetric(Metric):
    """A scalar torchmetrics metric whose updates never wait for the device.

    A NaN or an infinity is counted on the device, and is an error of the next ``compute``. Float64 states stay on
    the CPU where the device has no float64.
    """

    is_differentiable: bool | None = False
    higher_is_better: bool | None = None
    full_state_update: bool | None = False

    float64_states: tuple[str, ...] = ()
    host_states: tuple[str, ...] = ()  # counts that an update reads, always on the CPU

    non_finite: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("non_finite", default=torch.tensor(0), dist_reduce_fx="sum")

    def _watch(self, *inputs: Tensor) -> None:
        """Count the entries that are not finite."""
        for x in inputs:
            self.non_finite = self.non_finite + (~torch.isfinite(x.detach())).sum()

    def _check_finite(self) -> None:
        """Raise ValueError if an update held a NaN or infinity, on any process."""
        if self.non_finite:
            raise ValueError(
                f"{type(self).__name__} was updated with a NaN or an infinity; call reset() to begin anew"
            )

    def _forward_reduce_state_update(self, *args: Any, **kwargs: Any) -> Any:
        before = {name: list(x) if isinstance(x, list) else x for name, x in self.metric_state.items()}
        count = self._update_count
        try:
            return super()._forward_reduce_state_update(*args, **kwargs)
        except Exception:
            # A batch without a value, such as one with a NaN, leaves the metric as it was.
            for name, x in before.items():
                setattr(self, name, x)
            self._update_count, self._computed = count, None
            self._is_synced, self._should_unsync, self._to_sync = False, True, self.sync_on_compute
            self._enable_grad = False
            raise

    def _add_settings(self, *settings: float) -> None:
        """Make the settings a state.

        A ``MetricCollection`` lets metrics share their updates once their states are equal; metrics that would
        treat later updates differently must not.
        """
        self.add_state("settings", default=torch.tensor(settings), dist_reduce_fx="max")

    def _apply(self, fn: Callable[..., Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        exclude_state = (*exclude_state, *self.float64_states, *self.host_states)
        module: nn.Module = super()._apply(fn, exclude_state=exclude_state)
        device = float64_device(self.device)
        for name in self.float64_states:
            state: Tensor = getattr(self, name)
            default = self._defaults[name]
            assert isinstance(default, Tensor)
            setattr(self, name, state.to(device))
            self._defaults[name] = default.to(device)
        return module

    def _sync_dist(self, dist_sync_fn: Any = gather_all_tensors, process_group: Any = None) -> None:
        for name in self.host_states:
            setattr(self, name, getattr(self, name).to(self.device))  # backends of a GPU gather nothing else
        super()._sync_dist(dist_sync_fn, process_group)
        for name in self.host_states:
            setattr(self, name, getattr(self, name).cpu())

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several; see ``torchmetrics.Metric.plot``.

        Args:
            val: results of ``forward`` or ``compute``; by default this metric is computed and plotted.
            ax: matplotlib axis to draw on.

        Returns:
            Figure and axis.
        """
        return self._plot(val, ax)


class RowSampleMetric(BaseMetric):
    """Keeps a uniform random sample of the rows it has seen, at most ``max_rows``.

    Every row draws a random key and the smallest keys stay. So the sample of several processes is the sample of
    their union, equal on all of them, and complete while the rows together do not exceed ``max_rows``.

    Args:
        max_rows: size of the sample.
        seed: of the keys.
        kwargs: see ``torchmetrics.Metric``.
    """

    host_states: tuple[str, ...] = ("seen",)

    rows: list[Tensor] | Tensor
    keys: list[Tensor] | Tensor
    seen: Tensor

    def __init__(self, *, max_rows: int = 4096, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if max_rows < 2:
            raise ValueError(f"max_rows must be >= 2, got {max_rows}")
        self.max_rows = max_rows
        self.seed = seed
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.add_state("keys", default=[], dist_reduce_fx="cat")
        self.add_state("seen", default=torch.tensor(0, device="cpu"), dist_reduce_fx="sum")
        self._seen_before = 0  # rows before the batch that forward() has set apart
        self._add_settings(max_rows, seed)

    @property
    def dim(self) -> int | None:
        """Number of dimensions d of the rows seen; None before the first update."""
        return self._dim_of(self.metric_state)

    @staticmethod
    def _dim_of(state: Mapping[str, Any]) -> int | None:
        return state["rows"][0].shape[-1] if len(state["rows"]) else None

    def _sample(self, rows: Tensor) -> None:
        """Add rows to the sample."""
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        seen = self._seen_before + int(self.seen)
        generator = torch.Generator().manual_seed(hash((self.seed, rank, seen)) % 2**63)
        # Pinned, so that the copy to a GPU does not wait for it.
        keys = torch.rand(
            len(rows), generator=generator, dtype=torch.float32, device="cpu", pin_memory=rows.is_cuda
        ).to(rows.device, non_blocking=True)
        self.seen = self.seen + len(rows)
        # A copy: the model may go on to change the tensor in place.
        self._extend([full_precision(rows.detach().clone())], [keys])

    def _forward_reduce_state_update(self, *args: Any, **kwargs: Any) -> Any:
        self._seen_before = int(self.seen)
        try:
            return super()._forward_reduce_state_update(*args, **kwargs)
        finally:
            self._seen_before = 0

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Put the rows of a batch behind those that were seen before it."""
        batch = self.metric_state
        for name, value in incoming_state.items():
            setattr(self, name, value)
        self._add_state(batch)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add all rows that another metric of the same class has seen.

        Metrics whose rows exceed ``max_rows`` should differ in ``seed``: equal seeds draw rows of equal places.

        Args:
            incoming_state: that metric, or its ``metric_state``; it stays as it is.

        Raises:
            ValueError: it is of another class, or has another number of dimensions.
        """
        updates = 1
        if not isinstance(incoming_state, dict):
            if not isinstance(incoming_state, type(self)):
                raise ValueError(
                    f"only another {type(self).__name__} can be merged, got {type(incoming_state).__name__}"
                )
            updates = incoming_state._update_count
            incoming_state = incoming_state.metric_state
        if self._dim_of(incoming_state) is not None:
            self._add_state(incoming_state)
            self._update_count += updates
            self._computed = None

    def _add_state(self, state: Mapping[str, Any]) -> None:
        dim = self._dim_of(state)
        if self.dim not in (None, dim):
            raise ValueError(f"cannot merge rows of {dim} dimensions with rows of {self.dim}")
        self._add_rows_of(state)
        self.seen = self.seen + state["seen"]
        self.non_finite = self.non_finite + state["non_finite"]

    def _add_rows_of(self, state: Mapping[str, Any]) -> None:
        self._extend(state["rows"], state["keys"])

    def _check_rows(self, x: Tensor) -> None:
        """Raise ValueError unless ``x`` is a matrix as wide as those before; watch for a NaN in it."""
        check_matrix(x, finite=False) if self.dim is None else check_width(x, self.dim)
        self._watch(x)

    def _sync_dist(self, dist_sync_fn: Any = gather_all_tensors, process_group: Any = None) -> None:
        # A process that has seen nothing must hold nothing in the same shape as the others hold something.
        own_dim = torch.tensor(self.dim or 0, device=self.device)
        dim = int(max(dist_sync_fn(own_dim, process_group or self.process_group)))
        if dim and self.dim is None:
            self._hold_nothing(dim)
        super()._sync_dist(dist_sync_fn, process_group)

    def _hold_nothing(self, dim: int) -> None:
        self.rows = [torch.zeros(0, dim, device=self.device)]
        self.keys = [torch.zeros(0, device=self.device)]

    def _extend(self, rows: Sequence[Tensor] | Tensor, keys: Sequence[Tensor] | Tensor) -> None:
        """Add rows with their keys, and drop those with the largest keys if there are too many."""
        self.rows, self.keys = [*self.rows, *rows], [*self.keys, *keys]
        if sum(map(len, self.keys)) > self.max_rows:
            kept_rows, kept_keys = self._smallest_keys()
            self.rows, self.keys = [kept_rows], [kept_keys]

    def _smallest_keys(self) -> tuple[Tensor, Tensor]:
        if len(self.keys) == 0:
            raise ValueError(f"{type(self).__name__}.compute() needs at least one update() before it")
        rows, keys = dim_zero_cat(self.rows), dim_zero_cat(self.keys)
        if len(keys) > self.max_rows:
            keep = keys.topk(self.max_rows, largest=False).indices
            rows, keys = rows[keep], keys[keep]
        return rows, keys

    def sample(self) -> Tensor:
        """The sampled rows, shape ``(n, d)`` with ``n <= max_rows``.

        Raises:
            ValueError: there was no update yet, or one with a NaN or infinity.
        """
        self._check_finite()
        return self._smallest_keys()[0]


def check_width(x: Tensor, width: int, name: str = "x") -> None:
    """Raise ValueError unless ``x`` is an ``(N, width)`` matrix; forces no device sync."""
    check_matrix(x, name, finite=False)
    if x.shape[1] != width:
        raise ValueError(f"{name} has {x.shape[1]} columns, but earlier updates had {width}")
