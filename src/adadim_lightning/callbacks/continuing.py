"""What a run needs to go on exactly and Lightning's own checkpoints leave out, in plain values and tensors."""

import random
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric

from adadim_lightning.epochs import epochs_ended

LOGGED = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx")
JOIN: dict[str, Any] = {"mean": torch.add, "sum": torch.add, "max": torch.maximum, "min": torch.minimum}


def begin_epoch(trainer: Trainer) -> None:
    """Have a run that ended an epoch begin the next; under ``max_steps``, Lightning would end the last again."""
    loop = trainer.fit_loop
    if loop.epoch_progress.current.completed == loop.epoch_progress.current.ready:
        loop._restarting = loop.epoch_loop._restarting = False


def conclude_epoch(loop: dict[str, Any]) -> None:
    """Have the state of a trainer's loop say that the epoch is over; that comes after the hooks that save it."""
    for count in loop["epoch_progress"].values():
        count["completed"] = count["processed"]


_at_start: WeakKeyDictionary[Trainer, dict[str, Tensor]] = WeakKeyDictionary()


def note_epoch(trainer: Trainer) -> None:
    """Note at the start of an epoch what is there already: Lightning keeps values until newer ones come."""
    _at_start[trainer] = dict(trainer.callback_metrics)


def figures_of_epoch(trainer: Trainer) -> dict[str, Tensor]:
    """Return what was logged since :func:`note_epoch`; an epoch without a value has not that of another."""
    before = _at_start.get(trainer, {})
    return {key: value for key, value in trainer.callback_metrics.items() if value is not before.get(key)}


def row_of_epoch(trainer: Trainer) -> dict[str, float]:
    """Return what the epoch that has just ended logged, with its ``epoch`` and ``step``."""
    values = {key: float(value) for key, value in figures_of_epoch(trainer).items()}
    return values | {"epoch": epochs_ended(trainer) - 1, "step": trainer.global_step - 1}


def logged_so_far(trainer: Trainer) -> list[dict[str, Any]]:
    """What the end of the epoch is to log: how the trainer was told to, and the sums behind it."""
    found = []
    for metric in trainer.fit_loop.epoch_loop._results.values():
        meta = metric.meta
        if metric.is_tensor and meta.on_epoch and not metric.has_reset:
            options = {name: getattr(meta, name) for name in LOGGED}
            options |= {"reduce_fx": meta.reduce_fx.__name__}
            options |= {"sync_dist": meta.sync.should, "rank_zero_only": meta.sync.rank_zero_only}
            found.append(
                {"options": options, "sums": _on(metric.metric_state), "last": _on(metric._forward_cache)}
            )
    return found


def add_logged(trainer: Trainer, logged: Sequence[Mapping[str, Any]]) -> None:
    """Put what :func:`logged_so_far` found before what the epoch has logged since."""
    results, device = trainer.fit_loop.epoch_loop._results, trainer.strategy.root_device
    for entry in logged:
        options, sums = entry["options"], _on(entry["sums"], device)
        key = f"{options['fx']}.{options['name']}"
        if key in results:
            join = JOIN[options["reduce_fx"]]
            sums = {name: join(value, getattr(results[key], name)) for name, value in sums.items()}
        else:
            results.log(value=sums["value"], batch_size=1, sync_dist_fn=trainer.strategy.reduce, **options)
            results[key]._forward_cache = _on(entry["last"], device)
        for name, value in sums.items():
            setattr(results[key], name, value)


def metrics_so_far(pl_module: LightningModule) -> dict[str, dict[str, Any]]:
    """The metrics of torchmetrics that a model holds, by their names."""
    found = {name: module for name, module in pl_module.named_modules() if isinstance(module, Metric)}
    return {name: {"updates": x.update_count, "state": _on(x.metric_state)} for name, x in found.items()}


def set_metrics(pl_module: LightningModule, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Go on from :func:`metrics_so_far`."""
    modules: dict[str, Any] = dict(pl_module.named_modules())
    for path, found in metrics.items():
        if (metric := modules.get(path)) is None:
            continue  # it is measured no more
        for name, value in _on(found["state"], pl_module.device).items():
            setattr(metric, name, value)
        metric._update_count, metric._computed = found["updates"], None


def _on(values: Any, device: torch.device | str = "cpu") -> Any:
    """The same values, tensors among them on a device."""
    return apply_to_collection(values, Tensor, lambda x: x.detach().to(device))


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of the random numbers of Python, NumPy and torch."""
    numpy: Any = np.random.get_state()
    kind, keys, *rest = numpy
    state = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Go on from :func:`random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
