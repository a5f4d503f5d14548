"""LARS and the scaling of learning rates."""

import sys
from pathlib import Path
from typing import Any

import hydra.utils
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from adadim_lightning import AdaDimModule
from adadim_lightning.optim import lars, scale_learning_rate

LR, MOMENTUM, DECAY, TRUST = 0.3, 0.9, 1e-2, 0.02


def tiny_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)).double()


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    loss = model(x).square().sum() + sum(p.sum() for p in model.parameters())
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("weight_decay", [DECAY, 0.0])
def test_weights_take_adapted_steps_and_biases_and_norms_plain_ones(weight_decay: float) -> None:
    model = tiny_model()

    def factory(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return lars(groups, LR, momentum=MOMENTUM, weight_decay=weight_decay, trust_coefficient=TRUST)

    optimizer = AdaDimModule(model, nn.Identity(), optimizer=factory).configure_optimizers()
    expected = [p.detach().clone() for p in model.parameters()]
    momenta = [torch.zeros_like(p) for p in expected]
    for step in range(4):
        steps = gradients(model, step)
        for p, g in zip(model.parameters(), steps, strict=True):
            p.grad = g.clone()
        for w, m, update in zip(expected, momenta, steps, strict=True):
            if w.ndim > 1:
                rate = TRUST * w.norm() / (update.norm() + weight_decay * w.norm())
                update.add_(weight_decay * w).mul_(rate)
            m.mul_(MOMENTUM).add_(update)
            w.sub_(LR * m)
        optimizer.step()
        for w, p in zip(expected, model.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-7, atol=1e-10)  # timm adds 1e-8 to the norm


def test_plain_parameters_are_all_adapted() -> None:
    weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = lars([weight], 1.0, momentum=0.0, weight_decay=0.0, trust_coefficient=0.1)
    weight.grad = torch.tensor([0.0, 2.0], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([3.0, 4 - 0.1 * 5], dtype=torch.float64))


def test_making_the_optimizer_leaves_the_given_groups_alone() -> None:
    group = {"params": [nn.Parameter(torch.ones(2))]}
    lars([group])
    assert list(group) == ["params"]


def test_lars_without_timm_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"^timm is not installed; pip install 'adadim-lightning\[timm\]'$"):
        lars([nn.Parameter(torch.ones(2))])


def test_the_shipped_configuration_is_the_recipe_of_solo_learn() -> None:
    config = OmegaConf.load(Path(__file__).parents[1] / "conf" / "optimizer" / "lars.yaml")
    optimizer = hydra.utils.instantiate(config)([nn.Parameter(torch.ones(2))])
    wanted = {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-4, "trust_coeff": 0.02, "nesterov": False}
    assert wanted.items() <= optimizer.param_groups[0].items()


@pytest.mark.parametrize(
    ("rule", "batch", "expected"),
    [
        ("none", 4096, 0.3),
        ("linear", 256, 0.3),
        ("linear", 4096, 4.8),
        ("linear", 64, 0.075),
        ("sqrt", 4096, 1.2),
        ("sqrt", 64, 0.15),
    ],
)
def test_the_learning_rate_follows_the_batch_by_its_rule(rule: str, batch: int, expected: float) -> None:
    assert scale_learning_rate(0.3, batch, rule) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.3, 256, "cubic"), "the learning-rate rule must be one of none, linear, sqrt, got 'cubic'"),
        ((0.3, 0, "none"), "global_batch_size must be an integer >= 1, got 0"),
        ((-1.0, 256, "none"), "lr must be a finite number >= 0, got -1.0"),
    ],
)
def test_a_wrong_scaling_is_one_line(arguments: tuple[float, int, str], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        scale_learning_rate(*arguments)
    assert str(error.value) == message
