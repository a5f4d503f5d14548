"""Two processes with half of the batch each do what one does with the whole."""

import os
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from adadim_lightning import AdaDim, AdaDimLoss, Balance, EffectiveRankSchedule, OnlineKNN, OnlineLinearProbe
from adadim_lightning.distributed import gather_rows, world_size
from tests.helpers import Recorder, fit, fixed_batches, held_out, some_digits, tiny_module, trainer
from tests.metrics.conftest import two_processes  # noqa: F401
from tests.metrics.distributed import Processes

OFF = {"invariance_weight": 0.0, "variance_weight": 0.0, "covariance_weight": 0.0, "gamma": 1.0, "kappa": 1.0}
# Settings of the loss, alpha, and the phase of beta.
PARTS: dict[str, tuple[dict[str, Any], float, float]] = {
    "invariance": (OFF | {"invariance_weight": 25.0}, 0.0, 0.0),
    "variance": (OFF | {"variance_weight": 25.0}, 0.0, 0.0),
    "covariance": (OFF | {"covariance_weight": 1.0}, 0.0, 0.0),
    "uniformity": (OFF, 1.0, 0.0),
    "information": (OFF, 0.0, 1.0),
    "information of order 1": (OFF | {"order": 1.0}, 0.0, 1.0),
    "total": ({"gamma": 0.3, "kappa": 1.0}, 0.4, 0.4),
    "total with matched kappa": ({"gamma": 0.3, "kappa": "match"}, 0.4, 0.4),
}


class Model(nn.Module):
    """A linear backbone and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(7, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = self.backbone(x)
        return r, self.head(r)


def gradients(part: str, x1: Tensor, x2: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the parameters, and the loss parts; with several processes each takes its share of the rows."""
    options, alpha, phase = PARTS[part]
    loss = AdaDimLoss(**options)
    loss.set_balance(alpha, phase)
    model = Model().double()
    forward = DistributedDataParallel(model) if world_size() > 1 else model
    share = len(x1) // world_size()
    rank = distributed.get_rank() if world_size() > 1 else 0
    own = slice(rank * share, (rank + 1) * share)
    r, z = forward(torch.cat([x1[own], x2[own]]))
    output = loss(*r.chunk(2), *z.chunk(2))
    output.total.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return found, output.parts | {"total": output.total.detach(), "kappa": loss.kappa}


def gradients_of_all_parts(*views: Tensor) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    return {part: gradients(part, *views) for part in PARTS}


def test_the_gradient_of_each_loss_part_on_two_processes_is_that_of_one_on_the_whole_batch(
    two_processes: Processes,  # noqa: F811
) -> None:
    x1 = torch.randn(16, 7, dtype=torch.float64)
    views = (x1, x1 + 0.3 * torch.randn_like(x1))
    alone = gradients_of_all_parts(*views)
    first, second = two_processes.run(gradients_of_all_parts, *views)
    for part, (expected, values) in alone.items():
        largest = max(float(gradient.norm()) for gradient in expected.values())
        assert largest > 1e-3, part
        for found, shared_values in (first[part], second[part]):
            torch.testing.assert_close(shared_values, values, rtol=1e-5, atol=1e-8)
            for name, gradient in expected.items():
                # A bias moves no distance and no variance: its gradient may be zero but for rounding.
                error = float((found[name] - gradient).norm())
                assert error < 1e-5 * max(float(gradient.norm()), 1e-6 * largest), (part, name)
        assert all(torch.equal(first[part][0][name], second[part][0][name]) for name in expected), part


def gathered(width: int) -> list[Tensor]:
    rank = distributed.get_rank()
    first = torch.full((3, width), float(rank))
    second = torch.arange(3.0)[:, None] + 10 * rank
    return list(gather_rows(first, second))


def test_rows_are_gathered_in_the_order_of_the_processes(two_processes: Processes) -> None:  # noqa: F811
    for first, second in two_processes.run(gathered, 2):
        assert first.tolist() == [[0.0, 0.0]] * 3 + [[1.0, 1.0]] * 3
        assert second.flatten().tolist() == [0.0, 1.0, 2.0, 10.0, 11.0, 12.0]


def test_one_process_gets_its_own_tensors_back() -> None:
    rows = (torch.randn(3, 2), torch.randn(3, 5))
    assert all(ours is theirs for ours, theirs in zip(gather_rows(*rows), rows, strict=True))
    assert world_size() == 1


STEPS, BATCH, EPOCHS = 4, 8, 3
SGD = partial(torch.optim.SGD, lr=0.01)  # Adam would turn the rounding of a zero gradient into a full step


def callbacks() -> list[Any]:
    steering = AdaDim(window=10_000, balance=Balance(EffectiveRankSchedule(), every_n_steps=2, window=10_000))
    return [steering, OnlineLinearProbe(num_classes=10), OnlineKNN(k=5), Recorder()]


def ddp_trainer(used: list[Any], **options: Any) -> Trainer:
    """A trainer in a process that exists already, as under torchrun."""
    rank, size = str(distributed.get_rank()), str(world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")
    fixed = {"strategy": strategy, "devices": world_size(), "num_sanity_val_steps": 0}
    return trainer(*used, **({"max_epochs": EPOCHS} | fixed | options))


def own_share(batches: DataLoader[Any]) -> DataLoader[Any]:
    """Every second image, in order: the batches of both processes together are those of one twice as large."""
    own = range(distributed.get_rank(), len(batches.dataset), 2)
    return DataLoader(batches.dataset, batch_size=batches.batch_size, sampler=own)


def fit_on_two() -> dict[str, Any]:
    used = callbacks()
    module = tiny_module(optimizer=SGD)
    loaders = own_share(fixed_batches(STEPS * 2, BATCH)), own_share(held_out())
    ddp_trainer(used, use_distributed_sampler=False).fit(module, *loaders)
    recorder = used[-1]
    return {"logged": recorder.logged, "alphas": recorder.alphas, "weights": module.state_dict()}


def test_lightning_on_two_processes_logs_and_steers_as_on_one(two_processes: Processes) -> None:  # noqa: F811
    results = two_processes.run(fit_on_two)
    assert results[0]["logged"] == results[1]["logged"]
    assert results[0]["alphas"] == results[1]["alphas"]
    recorder = Recorder()
    module = tiny_module(optimizer=SGD)
    alone = [*callbacks()[:-1], recorder]
    fit(module, (fixed_batches(STEPS, 2 * BATCH), held_out()), *alone, max_epochs=EPOCHS, num_sanity_val_steps=0)
    assert results[0]["alphas"] == pytest.approx(recorder.alphas, rel=1e-3)
    assert len(set(recorder.alphas)) == EPOCHS * STEPS // 2
    for together, one in zip(results[0]["logged"], recorder.logged, strict=True):
        assert together.keys() == one.keys()
        for key in one:
            assert together[key] == pytest.approx(one[key], rel=2e-3, abs=1e-4), key
    for name, weights in module.state_dict().items():
        for result in results:
            torch.testing.assert_close(result["weights"][name], weights, rtol=1e-2, atol=1e-4)


def fit_digits_on_two() -> list[dict[str, float]]:
    used = callbacks()
    ddp_trainer(used).fit(tiny_module(), datamodule=some_digits(batch_size=16))
    return used[-1].logged


def test_the_data_module_deals_its_images_out_to_both_processes(two_processes: Processes) -> None:  # noqa: F811
    first, second = two_processes.run(fit_digits_on_two)
    assert first == second
    assert len(first) == EPOCHS
    assert {"dynamics/I_RZ", "balance/alpha", "probe/knn_top1", "probe/linear_top1"} <= set(first[-1])
