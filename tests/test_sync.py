"""Steps that neither measure nor log read nothing back from the device."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adadim_lightning import AdaDim, AdaDimLoss, Balance, DimensionMonitor, LinearSchedule
from tests.helpers import OneCallPerView, fit, fixed_batches

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select", "aten::equal"}
MEASURED = {19}  # where a reading follows


class Reads(TorchDispatchMode):
    """Counts operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().partition(".")[0] in READS
        return func(*args, **(kwargs or {}))


class Watched(OneCallPerView):
    """Watches from the start of its step, so with what steers it, to the next step of the loop."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.gpu = device == "cuda"
        self.reads: dict[int, int] = {}
        self.watch: Reads | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.watch = Reads()
        self.watch.__enter__()
        if self.gpu and batch_idx not in MEASURED:
            torch.cuda.set_sync_debug_mode("error")
        return super().training_step(batch, batch_idx)

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        self.stop(len(self.reads))

    def stop(self, step: int) -> None:
        if self.watch is not None:
            self.watch.__exit__(None, None, None)
            self.reads[step] = self.watch.count
            self.watch = None
        if self.gpu:
            torch.cuda.set_sync_debug_mode("default")


def watched(callback: DimensionMonitor, device: str) -> tuple[dict[int, int], dict[int, int]]:
    """Reads in each training step, and in each of the callback's own hooks at the beginning and end of a batch."""
    hooks: dict[int, int] = {}
    for name in ("on_train_batch_start", "on_train_batch_end"):
        hook = getattr(callback, name)

        def count(trainer: Any, *args: Any, hook: Any = hook) -> None:
            step = args[-1]
            if device == "cuda" and step not in MEASURED:
                torch.cuda.set_sync_debug_mode("error")
            with Reads() as reads:
                hook(trainer, *args)
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            hooks[step] = hooks.get(step, 0) + reads.count

        setattr(callback, name, count)
    module = Watched(device)

    class Tidy(Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            module.stop(-1)

    accelerator = "gpu" if device == "cuda" else "cpu"
    fit(module, fixed_batches(20), callback, Tidy(), accelerator=accelerator, devices=1)
    return module.reads, hooks


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["monitor", "steering", "matched kappa"])
def test_plain_steps_read_nothing_back(kind: str, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    plan: dict[str, Any] = {"every_n_steps": 20, "window": 64}
    if kind == "monitor":
        callback = DimensionMonitor(**plan)
    else:
        balance = Balance(LinearSchedule(0.2, 0.8), every_n_steps=20, window=64)  # another alpha at every step
        kappa: Any = "match" if kind == "matched kappa" else 1.0
        objective = AdaDimLoss(kappa=kappa)
        callback = AdaDim(native_loss="sample_contrastive", objective=objective, balance=balance, **plan)
    steps, hooks = watched(callback, device)
    assert set(steps) == set(hooks) == set(range(20))
    assert all(count == 0 for count in steps.values())
    assert {step for step, count in hooks.items() if count} == MEASURED
