"""The LightningModule in real fits."""

import io
import math
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader

from adadim_lightning import AdaDimLoss, AdaDimModule
from adadim_lightning.lr_schedule import warmup_cosine
from adadim_lightning.models import SmallConvNet, projection_head
from tests.helpers import (
    DIM_R,
    DIM_Z,
    Recorder,
    assert_same_weights,
    every_epoch,
    fit,
    fixed_batches,
    held_out,
    some_digits,
    tiny_module,
    trainer,
)

PARTS = {"decorrelation", "invariance", "variance", "covariance", "uniformity", "information"}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_training_on_digits_lowers_the_loss(alpha: float) -> None:
    module = tiny_module(objective=AdaDimLoss(alpha=alpha))
    recorder = Recorder()
    fit(module, some_digits(train=512), recorder, max_epochs=4)
    losses = [epoch["loss/total"] for epoch in recorder.logged]
    assert losses[-1] < 0.9 * losses[0]


def test_forward_returns_the_representation() -> None:
    module = tiny_module()
    images = torch.randn(5, 1, 8, 8)
    assert torch.equal(module(images), module.backbone(images))
    assert module(images).shape == (5, DIM_R)


def test_the_loss_parts_are_logged_under_the_agreed_names() -> None:
    recorder = Recorder()
    fit(tiny_module(objective=AdaDimLoss(alpha=0.4, kappa=2.0)), fixed_batches(3), recorder)
    logged = recorder.logged[0]
    weighted = {"decorrelation", "uniformity", "information"}
    assert set(logged) == (
        {"loss/total"} | {f"loss/{part}" for part in PARTS} | {f"loss_weighted/{part}" for part in weighted}
    )
    assert sum(logged[f"loss_weighted/{part}"] for part in weighted) == pytest.approx(logged["loss/total"])
    assert logged["loss_weighted/uniformity"] == pytest.approx(0.4 * 2 * logged["loss/uniformity"])


def test_the_logged_loss_is_the_mean_of_the_objective_over_the_steps() -> None:
    recorder = Recorder()
    module = tiny_module(objective=AdaDimLoss(alpha=0.4))
    fit(module, fixed_batches(3), recorder)
    objective = module.objective
    totals = [float(objective(*r.chunk(2), *z.chunk(2)).total) for r, z in recorder.steps]
    assert recorder.logged[0]["loss/total"] == pytest.approx(sum(totals) / 3, rel=1e-5)


def test_one_pass_through_backbone_and_head_serves_both_views() -> None:
    recorder = Recorder()
    fit(tiny_module(), fixed_batches(2, batch_size=16), recorder)
    assert [(r.shape, z.shape) for r, z in recorder.steps] == [((32, DIM_R), (32, DIM_Z))] * 2
    data = fixed_batches(2).dataset
    module = tiny_module()
    with torch.no_grad():
        expected = module(torch.cat([data.view1[:16], data.view2[:16]]))
    torch.testing.assert_close(recorder.steps[0][0], expected)


def test_biases_and_norms_have_no_weight_decay() -> None:
    module = AdaDimModule(SmallConvNet(1, (4, 8)), projection_head(8, hidden_dim=6, out_dim=4, layers=2))
    used = fit(module, fixed_batches(1))
    groups = used.optimizers[0].param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    free = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    for name, owner in module.named_modules():
        for p in owner.parameters(recurse=False):
            is_weight = isinstance(owner, nn.Linear | nn.Conv2d) and p is owner.weight
            assert id(p) in (decayed if is_weight else free), name
    assert len(decayed) + len(free) == len(list(module.parameters()))


def test_frozen_parameters_stay_out_of_the_optimizer() -> None:
    module = tiny_module()
    module.backbone.requires_grad_(False)
    before = module.backbone[1].weight.clone()
    used = fit(module, fixed_batches(2))
    assert sum(len(group["params"]) for group in used.optimizers[0].param_groups) == 4
    assert torch.equal(module.backbone[1].weight, before)


class Rates(Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_the_learning_rate_moves_with_every_step_over_the_whole_training() -> None:
    rates = Rates()
    module = tiny_module(lr_schedule=lambda optimizer, steps: warmup_cosine(optimizer, steps, warmup=0.25))
    fit(module, fixed_batches(4), rates, max_epochs=3)
    warm = [(i + 1) / 3 for i in range(3)]
    cosine = [(1 + math.cos(math.pi * i / 9)) / 2 for i in range(9)]
    assert rates.rates == pytest.approx([1e-3 * factor for factor in warm + cosine])


def test_a_learning_rate_schedule_needs_the_length_of_the_training() -> None:
    module = tiny_module(lr_schedule=warmup_cosine)
    with pytest.raises(
        ValueError, match=r"learning-rate schedule needs the length .*max_epochs or trainer\.max_steps"
    ):
        fit(module, fixed_batches(2), max_epochs=-1)


def test_without_a_learning_rate_schedule_the_rate_stays() -> None:
    rates = Rates()
    fit(tiny_module(), fixed_batches(2), rates, max_epochs=2)
    assert rates.rates == [1e-3] * 4


def test_views_of_different_shapes_are_an_error() -> None:
    pairs = [((torch.zeros(1, 8, 8), torch.zeros(1, 8, 4)), 0)] * 4
    with pytest.raises(ValueError, match=r"same shape, got \(2, 1, 8, 8\) and \(2, 1, 8, 4\)"):
        fit(tiny_module(), DataLoader(pairs, batch_size=2))


def test_each_module_has_an_objective_of_its_own() -> None:
    first, second = tiny_module(), tiny_module()
    first.objective.set_balance(1.0)
    assert float(second.objective.alpha) == 0.5


def test_validation_computes_r_of_clean_images_and_changes_nothing() -> None:
    module, untouched = tiny_module(), tiny_module()
    module.backbone.append(nn.BatchNorm1d(DIM_R))
    untouched.backbone.append(nn.BatchNorm1d(DIM_R))
    trainer().validate(module, held_out(), verbose=False)
    assert_same_weights(module, untouched)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_module_can_be_saved_whole(channels_last: bool) -> None:
    backbone = SmallConvNet(1, (4, 8))
    module = AdaDimModule(backbone, nn.Linear(8, 4), channels_last=channels_last)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded, images = torch.load(file, weights_only=False), torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(loaded.eval()(images), module.eval()(images))


def test_load_from_checkpoint_takes_the_parts_or_says_which_are_missing(tmp_path) -> None:
    module = tiny_module()
    fit(module, fixed_batches(2), every_epoch(tmp_path))
    fresh = tiny_module()
    loaded = AdaDimModule.load_from_checkpoint(
        tmp_path / "0.ckpt", backbone=fresh.backbone, projection_head=fresh.projection_head
    )
    assert_same_weights(loaded, module)
    with pytest.raises(ValueError, match=r"give load_from_checkpoint backbone and projection_head"):
        AdaDimModule.load_from_checkpoint(tmp_path / "0.ckpt")


def test_an_eps_that_is_zero_in_half_precision_is_replaced_with_a_line() -> None:
    for dtype, eps in ((torch.float16, 1e-4), (torch.bfloat16, 1e-8), (torch.float32, 1e-8)):
        module = tiny_module().to(dtype)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = module.configure_optimizers()
        assert [group["eps"] for group in optimizer.param_groups] == [eps, eps]
        assert [x for x in caught if "is 0 in torch.float16" in str(x.message)] == caught[: eps == 1e-4]
    trained = tiny_module()
    with pytest.warns(UserWarning, match="is 0 in torch.float16"):
        fit(trained, fixed_batches(6), precision="16-true")
    assert all(bool(p.isfinite().all()) for p in trained.parameters())
