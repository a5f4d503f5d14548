"""Modules of other people, measured and steered on two processes as on one."""

from functools import cache
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from adadim_lightning import (
    AdaDim,
    AdaDimLoss,
    Balance,
    DimensionMonitor,
    EffectiveRankSchedule,
    OnlineKNN,
    OnlineLinearProbe,
)
from adadim_lightning.distributed import gather_uneven_rows, world_size
from tests.helpers import Recorder, fit, fixed_batches, held_out, tiny_module
from tests.metrics.conftest import two_processes  # noqa: F401
from tests.metrics.distributed import Processes
from tests.test_distributed import BATCH, EPOCHS, STEPS, ddp_trainer, own_share

lightly_loss = pytest.importorskip("lightly.loss")


def negative_cosine(z1: Tensor, z2: Tensor) -> Tensor:
    """A mean over images, whose mean over processes is that of all images."""
    return -F.cosine_similarity(z1, z2).mean()


def native_loss(kind: str) -> Any:
    """The loss that stands for each kind."""
    if kind == "sample_contrastive":
        return lightly_loss.NTXentLoss(temperature=0.5, gather_distributed=True)
    return negative_cosine if kind == "other" else nn.MSELoss()


KINDS = ["sample_contrastive", "dimension_contrastive", "other"]


class Foreign(LightningModule):
    """Knows nothing of AdaDim; its normalization sees one image at a time, so that processes need not share it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.GroupNorm(4, 24), nn.ReLU(), nn.Linear(24, 12)
        )
        self.projection_head = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
        self.criterion = native_loss(kind)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (view1, view2), _ = batch
        z1, z2 = (self.projection_head(self.backbone(view)) for view in (view1, view2))
        return self.criterion(z1, z2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Gradients(Callback):
    """As the optimizer is about to use them: after the processes have shared them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        assert all(p.grad is not None for p in pl_module.parameters())
        self.steps.append({name: p.grad.clone() for name, p in pl_module.named_parameters()})


def steering(kind: str, kappa: Any) -> AdaDim:
    objective = AdaDimLoss(gamma=0.3, kappa=kappa).double()  # what kappa is rounded by grows from step to step
    balance = Balance(EffectiveRankSchedule(start=0.4), every_n_steps=2, window=10_000)
    return AdaDim(native_loss=kind, objective=objective, balance=balance, window=10_000)


def results(kind: str, kappa: Any) -> dict[str, Any]:
    """One fit, on the whole of each batch or on this process's half; rounding would grow from step to step."""
    steer, gradients, recorder = steering(kind, kappa), Gradients(), Recorder()
    used, module = [steer, gradients, recorder], Foreign(kind)
    if world_size() > 1:
        batches = own_share(fixed_batches(STEPS * 2, BATCH))
        ddp_trainer(used, use_distributed_sampler=False, precision="64-true").fit(module, batches)
    else:
        fit(module, fixed_batches(STEPS, 2 * BATCH), *used, max_epochs=EPOCHS, precision="64-true")
    return {
        "gradients": gradients.steps,
        "logged": recorder.logged,
        "kappa": float(steer.objective.kappa),
        "weights": {name: x.detach().clone() for name, x in module.state_dict().items()},
    }


def gradients_of_lightly(x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 6)).double()
    forward = DistributedDataParallel(model) if world_size() > 1 else model
    share = len(x1) // world_size()
    rank = distributed.get_rank() if world_size() > 1 else 0
    own = slice(rank * share, (rank + 1) * share)
    z1, z2 = forward(torch.cat([x1[own], x2[own]])).chunk(2)
    native_loss("sample_contrastive")(z1, z2).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_the_gradient_of_lightlys_gathered_loss_is_that_of_one_process(
    two_processes: Processes,  # noqa: F811
) -> None:
    """Its own convention, on which the sum with our terms rests: the mean over processes is the whole gradient."""
    x1 = torch.randn(16, 7, dtype=torch.float64)
    x2 = x1 + 0.3 * torch.randn_like(x1)
    alone = gradients_of_lightly(x1, x2)
    assert min(float(gradient.norm()) for gradient in alone.values()) > 1e-4
    for found in two_processes.run(gradients_of_lightly, x1, x2):
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-12)


@cache
def alone(kind: str, kappa: Any) -> dict[str, Any]:
    return results(kind, kappa)


@pytest.mark.parametrize("kappa", [1.0, "match"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_steer_somebody_elses_loss_as_one_does(
    kind: str,
    kappa: Any,
    two_processes: Processes,  # noqa: F811
) -> None:
    first, second = two_processes.run(results, kind, kappa)
    one = alone(kind, kappa)
    assert first["logged"] == second["logged"]
    assert first["kappa"] == second["kappa"] == pytest.approx(one["kappa"], rel=1e-3)
    assert (one["kappa"] != 1.0) == (kappa == "match")
    assert len(one["gradients"]) == STEPS * EPOCHS
    for step, (ours, theirs, expected) in enumerate(
        zip(first["gradients"], second["gradients"], one["gradients"], strict=True)
    ):
        largest = max(float(gradient.norm()) for gradient in expected.values())
        for name, gradient in expected.items():
            assert torch.equal(ours[name], theirs[name]), (step, name)
            error = float((ours[name] - gradient).norm())
            # Alpha and kappa are float32; what they are rounded by grows with the epochs.
            most = 1e-4 if step < STEPS else 1e-3
            assert error < most * max(float(gradient.norm()), 1e-2 * largest), (step, name)
    alphas = [logged["balance/alpha"] for logged in one["logged"]]
    assert len({0.4, *alphas}) == 1 + EPOCHS
    for together, logged in zip(first["logged"], one["logged"], strict=True):
        assert together.keys() == logged.keys()
        assert together == pytest.approx(logged, rel=1e-3, abs=1e-5)
    for name, weights in one["weights"].items():
        torch.testing.assert_close(first["weights"][name], weights, rtol=1e-3, atol=1e-5)


def test_the_terms_that_are_added_change_what_is_trained() -> None:
    """The comparison above would not see it if steering did nothing at all."""
    native = Foreign("other")
    fit(native, fixed_batches(STEPS, 2 * BATCH), max_epochs=EPOCHS)
    steered = alone("other", 1.0)["weights"]
    assert float((native.backbone[1].weight - steered["backbone.1.weight"]).norm()) > 0.05


def measured() -> dict[str, float]:
    """A monitor, and probes with loaders of their own, which every process reads as a whole."""
    bank, held = fixed_batches(8), held_out()
    loaders = {"train_loader": bank, "val_loader": held}
    used = [
        DimensionMonitor(window=10_000),
        OnlineKNN(k=5, **loaders),
        OnlineLinearProbe(num_classes=10, **loaders),
        Recorder(),
    ]
    module = Foreign("other")
    if world_size() > 1:
        ddp_trainer(used, use_distributed_sampler=False).fit(module, own_share(fixed_batches(STEPS * 2, BATCH)))
    else:
        fit(module, fixed_batches(STEPS, 2 * BATCH), *used, max_epochs=EPOCHS)
    return used[-1].logged[-1]


def test_two_processes_measure_and_probe_as_one_does(two_processes: Processes) -> None:  # noqa: F811
    first, second = two_processes.run(measured)
    assert first == second
    one = measured()
    assert {"dynamics/ER_R", "dynamics/I_RZ", "probe/knn_top1", "probe/linear_top1"} <= set(one)
    assert first == pytest.approx(one, rel=2e-3, abs=1e-4)


class Validated(Foreign):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.backbone(batch[0])


def pieces(sizes: list[list[int]]) -> list[list[Any]]:
    """Batches of each process."""
    data = fixed_batches(1, 64).dataset
    batches, start = [], 0
    for step in sizes:
        own = []
        for size in step:
            rows = [data[i] for i in range(start, start + size)]
            x1, x2 = (torch.stack([views[k] for views, _ in rows]) for k in range(2))
            own.append(((x1, x2), torch.stack([label for _, label in rows])))
            start += size
        batches.append(own)
    return batches


SIZES = [[6, 3], [5, 9], [1, 4], [7, 2]]  # of each step, on each process


def probed() -> dict[str, Any]:
    """Probes of a model that stands still, on batches that differ in size between processes."""
    linear, neighbors = OnlineLinearProbe(num_classes=10), OnlineKNN(k=3)
    module, held = Validated("other"), held_out(40, 7)
    module.requires_grad_(False)
    module.projection_head.requires_grad_(True)
    batches = pieces(SIZES)
    options = {"max_epochs": 1, "num_sanity_val_steps": 0}
    if world_size() > 1:
        own = [step[distributed.get_rank()] for step in batches]
        used = ddp_trainer([linear, neighbors], use_distributed_sampler=False, **options)
        # Fewer held-out batches on the second process.
        share = list(held)[:4] if distributed.get_rank() == 0 else list(held)[4:]
        used.fit(module, *(DataLoader(x, batch_size=None) for x in (own, share)))
    else:
        whole = [
            (tuple(torch.cat([views[k] for views, _ in step]) for k in range(2)), torch.cat([y for _, y in step]))
            for step in batches
        ]
        used = fit(module, (DataLoader(whole, batch_size=None), held), linear, neighbors, **options)
    bank = [torch.cat(x) for x in zip(*neighbors.state_dict()["bank"], strict=True)]
    return {
        "logged": {key: float(x) for key, x in used.callback_metrics.items()},
        "weights": {key: x.clone() for key, x in linear.probe.state_dict().items()},
        "rows": sorted(zip(bank[1].tolist(), bank[0].sum(1).tolist(), strict=True)),
    }


def test_two_processes_probe_batches_of_different_sizes_as_one_does(two_processes: Processes) -> None:  # noqa: F811
    first, second = two_processes.run(probed)
    one = probed()
    assert {"probe/knn_top1", "probe/linear_top1"} <= set(one["logged"])
    assert first["logged"] == second["logged"]
    assert first["logged"] == pytest.approx(one["logged"])
    assert len(one["rows"]) == 2 * sum(map(sum, SIZES))
    for found in (first, second):
        torch.testing.assert_close(found["weights"], one["weights"], rtol=1e-3, atol=1e-4)
        assert torch.tensor(found["rows"]).allclose(torch.tensor(one["rows"]), atol=1e-4)


def gathered_unevenly() -> list[Tensor]:
    rank = distributed.get_rank()
    rows = [torch.arange(2.0 * n).view(n, 2) + 10 * rank for n in ((3, 1)[rank], (0, 2)[rank])]
    found = [gather_uneven_rows(x)[0] for x in rows]
    return found


def test_uneven_rows_are_gathered_in_the_order_of_the_processes(two_processes: Processes) -> None:  # noqa: F811
    for found in two_processes.run(gathered_unevenly):
        assert found[0].tolist() == [[0, 1], [2, 3], [4, 5], [10, 11]]
        assert found[1].tolist() == [[10, 11], [12, 13]]


class Watched(Foreign):
    """Skips the head in a step on one process, as a module may."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2 and world_size() > 1 and distributed.get_rank() == 1:
            return sum(self.backbone(x).square().mean() for x in batch[0])
        return super().training_step(batch, batch_idx)


def watched(kind: str, sizes: list[list[int]] = SIZES) -> dict[str, float]:
    """What is logged of a model that stands still, on batches that differ in size between processes."""
    make = {
        "monitor": lambda: DimensionMonitor(every_n_steps=3, window=10_000),
        "observing": lambda: AdaDim(native_loss="other", observe=True, every_n_steps=3),
    }[kind]
    module = Watched("other")
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    batches, options = pieces(sizes), {"max_epochs": 1}
    if world_size() > 1:
        own = [step[distributed.get_rank()] for step in batches]
        strategy = DDPStrategy(
            cluster_environment=TorchElasticEnvironment(),
            process_group_backend="gloo",
            find_unused_parameters=True,
        )
        used = ddp_trainer([make()], use_distributed_sampler=False, strategy=strategy, **options)
        used.fit(module, DataLoader(own, batch_size=None))
    else:
        del batches[2]  # not read by all, so by none
        whole = [
            (tuple(torch.cat([views[k] for views, _ in step]) for k in range(2)), torch.cat([y for _, y in step]))
            for step in batches
        ]
        used = fit(module, DataLoader(whole, batch_size=None), make(), **options)
    return {key: float(value) for key, value in used.callback_metrics.items()}


@pytest.mark.parametrize("kind", ["monitor", "observing"])
def test_two_processes_measure_batches_of_different_sizes_as_one_does(
    kind: str,
    two_processes: Processes,  # noqa: F811
) -> None:
    first, second = two_processes.run(watched, kind)
    one = watched(kind)
    assert first == second
    expected = {"dynamics/ER_R", "dynamics/I_RZ", "dynamics/log_n"}
    assert expected | ({"loss/information"} if kind == "observing" else set()) <= set(one)
    own = {"loss/native", "loss/total", "loss_weighted/native"}  # the mean of each process's own
    for key in set(one) - own:
        assert first[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key
    if kind == "observing":  # where a process has one image the terms are not defined, but R and Z are
        few = two_processes.run(watched, kind, [*SIZES, [1, 5]])[0]
        assert few["loss/information"] == pytest.approx(first["loss/information"])
        assert few["dynamics/I_RZ"] != pytest.approx(first["dynamics/I_RZ"])


def steered(sizes: list[list[int]], native: bool) -> str:
    batches = [step[distributed.get_rank()] for step in pieces(sizes)]
    module = Foreign("other") if native else tiny_module()
    used = ddp_trainer(
        [AdaDim(native_loss="other") if native else AdaDim()], use_distributed_sampler=False, max_epochs=1
    )
    try:
        used.fit(module, DataLoader(batches, batch_size=None))
    except ValueError as error:
        return str(error)
    return f"{used.global_step} steps"


@pytest.mark.parametrize("native", [True, False], ids=["native", "own"])
@pytest.mark.parametrize(("sizes", "said"), [
    ([[4, 4], [4, 4], [4, 3]], "4 and 3 images; give the data loader drop_last=True"),
    ([[4, 4], [2, 3]], "2 and 3 images"),
    ([[4, 4], [6, 4]], "6 and 4 images"),
    ([[2, 5]], "2 and 5 images"),
    ([[4, 4], [2, 2], [6, 6], [4, 4]], "4 steps"),
])  # fmt: skip
def test_a_loss_of_all_processes_says_in_one_line_that_their_batches_differ(
    native: bool,
    sizes: list[list[int]],
    said: str,
    two_processes: Processes,  # noqa: F811
) -> None:
    for found in two_processes.run(steered, sizes, native):
        assert said in found
        assert "\n" not in found
