"""What each of many processes does, with its share of every global batch; alone, a process has the whole.

Under torchrun it is a program: ``-m tests.reliability.worker FOLDER`` leaves the results there, by rank.
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader

from adadim_lightning import (
    AdaDim,
    AdaDimLoss,
    AdaDimModule,
    Balance,
    EffectiveRankSchedule,
    OnlineKNN,
    OnlineLinearProbe,
)
from adadim_lightning.data.order import ShuffledOrder
from adadim_lightning.distributed import rank, world_size
from tests.helpers import FixedPairs, Recorder, held_out, trainer
from tests.test_distributed import PARTS, ddp_trainer
from tests.test_distributed_dropin import Foreign, Gradients

BATCH, STEPS, LEFT_OUT = 24, 2, 7
ACCUMULATED = ("total", "total with matched kappa", "drop-in")
HELD_OUT = 41  # no multiple of 2 or 4
Steps = list[dict[str, Tensor]]


class Endless(FixedPairs):
    """The same images in each epoch, at the positions that go on from epoch to epoch."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index % len(self))


def share_of(batches: int) -> DataLoader[Any]:
    """This process's part of global batches that are the same for any number; a few images fill none."""
    images = Endless(batches * BATCH + LEFT_OUT)
    size = BATCH // world_size()
    return DataLoader(images, size, sampler=ShuffledOrder(len(images), size, world_size(), rank()))


class Shares(LightningDataModule):
    """Shares of processes that are started after it was made."""

    def train_dataloader(self) -> DataLoader[Any]:
        return share_of(STEPS)


def make_trainer(*used: Callback, **options: Any) -> Trainer:
    """A trainer for as many processes as there are."""
    if "TORCHELASTIC_USE_AGENT_STORE" in os.environ:  # started by torchrun
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        strategy = DDPStrategy(process_group_backend="gloo")
        nodes = {"strategy": strategy, "devices": here, "num_nodes": world_size() // here}
        return trainer(*used, **({"num_sanity_val_steps": 0} | nodes | options))
    return ddp_trainer(list(used), **options) if world_size() > 1 else trainer(*used, **options)


def module_of(objective: AdaDimLoss, lr: float, *, batch_norm: bool = False) -> AdaDimModule:
    """By default its normalization sees one image at a time, so that processes need not share it."""

    def norm(width: int) -> nn.Module:
        return nn.BatchNorm1d(width) if batch_norm else nn.GroupNorm(4, width)

    torch.manual_seed(0)
    backbone = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(288, 12), norm(12), nn.GELU(), nn.Linear(12, 12))
    )
    head = nn.Sequential(nn.Linear(12, 16), norm(16), nn.GELU(), nn.Linear(16, 8))
    return AdaDimModule(backbone, head, objective, partial(torch.optim.SGD, lr=lr))


def gradients_of(module: LightningModule, *callbacks: Callback, **options: Any) -> Steps:
    """Gradients before each step of an optimizer."""
    gradients = Gradients()
    fixed = {"precision": "64-true", "max_epochs": 1, "use_distributed_sampler": False}
    make_trainer(*callbacks, gradients, **fixed, **options).fit(module, share_of(STEPS))
    return gradients.steps


def gradients_of_part(part: str, accumulated: int) -> Steps:
    settings, alpha, phase = PARTS[part]
    objective = AdaDimLoss(**settings)
    objective.set_balance(alpha, phase)
    return gradients_of(module_of(objective, lr=0.0), accumulate_grad_batches=accumulated)


def gradients_of_dropin(accumulated: int) -> Steps:
    """Of somebody else's loss with the terms that are added to it."""
    module = Foreign("other")
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    balance = Balance(EffectiveRankSchedule(start=0.4), window=10_000)
    steering = AdaDim(native_loss="other", objective=AdaDimLoss(gamma=0.3, kappa=1), balance=balance)
    return gradients_of(module, steering, accumulate_grad_batches=accumulated)


def all_gradients() -> dict[str, dict[int, Steps]]:
    """Of each part and number of accumulated batches; the learning rate is zero, so every batch meets the same."""
    runs = {part: partial(gradients_of_part, part) for part in PARTS} | {"drop-in": gradients_of_dropin}
    return {name: {n: run(n) for n in ((1, STEPS) if name in ACCUMULATED else (1,))} for name, run in runs.items()}


def weights_of(used: Trainer, *, batch_norm: bool = False) -> dict[str, Tensor]:
    """Those that a trainer leads to."""
    module = module_of(AdaDimLoss(alpha=0.3, kappa=1), lr=0.05, batch_norm=batch_norm)
    used.fit(module, Shares())
    return {name: x.detach().cpu() for name, x in module.state_dict().items()}


def weights(*, find_unused_parameters: bool = False) -> dict[str, Tensor]:
    strategy = DDPStrategy(
        cluster_environment=TorchElasticEnvironment(),
        process_group_backend="gloo",
        find_unused_parameters=find_unused_parameters,
    )
    several = {"strategy": strategy, "max_epochs": 1} if world_size() > 1 else {}
    return weights_of(make_trainer(AdaDim(), **several))


def launch(path: str, *, batch_norm: bool = False, **options: Any) -> None:
    """Leave the weights in a file."""
    torch.save(weights_of(trainer(AdaDim(), **options), batch_norm=batch_norm), path)


def refusal(*callbacks: Callback) -> str:
    """What a real strategy that cuts models into parts is told."""
    module = Foreign("other") if callbacks else module_of(AdaDimLoss(), lr=0.05)
    strategy = ModelParallelStrategy(process_group_backend="gloo")
    strategy.cluster_environment = TorchElasticEnvironment()
    with pytest.raises(ValueError, match="needs the whole model") as error:
        make_trainer(*callbacks, strategy=strategy).fit(module, share_of(STEPS))
    return str(error.value)


def bank_of(state: dict[str, Any]) -> dict[str, Any]:
    """The rows of nearest neighbors that the processes hold together after they have loaded a state."""
    probe = OnlineKNN()
    probe.load_state_dict(state)
    return probe.state_dict()


def steered(images: int = HELD_OUT) -> dict[str, Any]:
    """A training with everything, scored on held-out images that cannot be dealt out evenly."""
    balance = Balance(EffectiveRankSchedule(), every_n_steps=2, window=64)
    steering, recorder = AdaDim(balance=balance, window=96), Recorder()
    used = [steering, OnlineLinearProbe(num_classes=10), OnlineKNN(k=5, bank_size=100), recorder]
    module = module_of(AdaDimLoss(gamma=0.3, kappa="match"), lr=0.05)
    make_trainer(*used, max_epochs=2).fit(module, share_of(3), held_out(images, 10))
    return {
        "alphas": recorder.alphas,
        "betas": recorder.betas,
        "statistics": balance.state_dict(),
        "kappa": module.objective.kappa.clone(),
        "logged": recorder.logged,
        "weights": {name: x.clone() for name, x in module.state_dict().items()},
    }


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    results = {"gradients": all_gradients(), "steered": steered()}
    torch.save(results, Path(sys.argv[1]) / f"{rank()}.pt")
    distributed.destroy_process_group()
