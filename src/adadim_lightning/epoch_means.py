"""Means over an epoch of what every step has, without the cost of logging each value at each step."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor


class EpochMeans:
    """Logs the mean of each value over the epoch, as ``log_dict(values, on_step=False, on_epoch=True)`` does.

    Lightning takes about half a millisecond for each value that a step logs, together more than a GPU needs for
    the whole objective. So only the first step of an epoch goes through it. The sums that it made then become
    entries of one vector, to which the further steps add theirs at once. Whoever takes the sums away, at the end
    of an epoch or to put back those of a checkpoint, is noticed, and the next step goes through Lightning again.

    An optimizer such as L-BFGS or SAM runs a step several times: the last run counts, in place of those before it.

    Example:
        >>> EpochMeans().add(LightningModule(), {}, weight=1)
    """

    def __init__(self) -> None:
        self._adopted: list[tuple[Any, Tensor, Tensor]] = []  # Lightning's metrics, with their sum and weight
        self._names: tuple[str, ...] = ()
        self._results: Any = None  # where Lightning keeps them
        self._sums = self._weights = torch.zeros(0)
        self._step: tuple[object, Tensor, Tensor] | None = None  # the last one; sums and weights before it

    def __getstate__(self) -> dict[str, Any]:
        return vars(EpochMeans())  # the sums are those of this process

    @torch.no_grad()
    def add(
        self, module: LightningModule, values: Mapping[str, Tensor], *, weight: int, step: object = None
    ) -> None:
        """Take in the values of a step; to be called where the module may log.

        Args:
            module: logs them.
            values: scalars by log name.
            weight: of the step, such as its number of images.
            step: tells one step from another; by default the number of the batch.
        """
        trainer = module._trainer
        if step is None and trainer is not None:
            step = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if trainer is not None and self._holds(trainer, tuple(values), step):
            if self._step is not None and self._step[0] == step:
                # Put back, not subtracted: a run that overshot would take the digits of all others with it.
                self._sums.copy_(self._step[1])
                self._weights.copy_(self._step[2])
            else:
                self._step = step, self._sums.clone(), self._weights.clone()
            self._sums += torch.stack([value.to(self._sums) for value in values.values()]) * weight
            self._weights += weight
            for metric, _, _ in self._adopted:
                metric._computed = None
        else:
            module.log_dict(values, on_step=False, on_epoch=True, batch_size=weight, sync_dist=True)
            self._adopt(module, tuple(values))
            if self._adopted:
                own = torch.stack([value.to(self._sums) for value in values.values()]) * weight
                self._step = step, self._sums - own, self._weights - weight

    def _holds(self, trainer: Any, names: tuple[str, ...], step: object) -> bool:
        """Whether this trainer still reads the sums from here."""
        return (
            bool(self._adopted)
            and names == self._names
            and trainer.fit_loop.epoch_loop._results is self._results
            # In the first step, Lightning forgets what an earlier fit left; its further runs find their own.
            and (not trainer._logger_connector._first_loop_iter or (self._step or (None,))[0] == step)
            and all(
                metric.value is value and metric.cumulated_batch_size is weight and not metric.has_reset
                for metric, value, weight in self._adopted
            )
        )

    def _adopt(self, module: LightningModule, names: tuple[str, ...]) -> None:
        """Make what Lightning has summed up so far entries of one vector."""
        self._adopted, self._names = [], names
        if module._trainer is None:
            return  # a step on its own, or one of Fabric
        self._results = module.trainer.fit_loop.epoch_loop._results
        found = self._results.values()
        logged = {metric.meta.name: metric for metric in found if metric.meta.fx == module._current_fx_name}
        metrics = [logged[name] for name in names if name in logged]
        if not metrics or len(metrics) < len(names):
            return  # a module that logs in a way of its own
        self._sums = torch.stack([metric.value for metric in metrics])
        self._weights = torch.stack([metric.cumulated_batch_size for metric in metrics])
        for metric, value, total in zip(metrics, self._sums, self._weights, strict=True):
            metric.value, metric.cumulated_batch_size = value, total
            self._adopted.append((metric, value, total))
