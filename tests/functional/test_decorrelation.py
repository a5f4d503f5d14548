"""VICReg, its parts and Barlow Twins against their formulas and against lightly."""

import numpy as np
import pytest
import torch
from lightly.loss import BarlowTwinsLoss, VICRegLoss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adadim_lightning.functional import (
    barlow_twins_loss,
    covariance_loss,
    invariance_loss,
    variance_loss,
    vicreg_loss,
)
from adadim_lightning.functional.decorrelation import Reduction, _barlow_twins_parts, _vicreg_parts

shapes = pytest.mark.parametrize("shape", [(2, 3), (6, 20), (20, 6), (12, 12), (13, 12)])
halved_and_not = pytest.mark.parametrize("halve_variance", [True, False])
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


def two_views(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Correlated views with standard deviations on both sides of one and a mean far from zero."""
    z1 = torch.randn(shape, dtype=dtype) @ torch.randn(shape[1], shape[1], dtype=dtype) / shape[1] ** 0.5 + 3
    return z1, z1 + 0.3 * torch.randn(shape, dtype=dtype)


def reference_parts(z1: Tensor, z2: Tensor, *, eps: float = 1e-4) -> tuple[float, float, float]:
    """Mean squared difference, and variance and covariance summed over the views, from the paper's text."""
    views = [z.double().numpy() for z in (z1, z2)]
    n, d = views[0].shape
    invariance = ((views[0] - views[1]) ** 2).sum() / (n * d)
    variance = covariance = 0.0
    for z in views:
        covariances = (z - z.mean(0)).T @ (z - z.mean(0)) / (n - 1)
        variance += np.maximum(0, 1 - np.sqrt(np.diag(covariances) + eps)).mean()
        covariance += (covariances**2).sum() / d - (np.diag(covariances) ** 2).sum() / d
    return invariance, variance, covariance


@shapes
def test_vicreg_equals_the_formula_of_its_paper(shape: tuple[int, int]) -> None:
    z1, z2 = two_views(shape)
    invariance, variance, covariance = reference_parts(z1, z2)
    assert vicreg_loss(z1, z2).item() == pytest.approx(25 * invariance + 25 * variance + covariance, rel=1e-4)


@shapes
@pytest.mark.parametrize("eps", [1e-4, 0.1])
def test_weights_and_epsilon_enter_vicreg_as_named(shape: tuple[int, int], eps: float) -> None:
    z1, z2 = two_views(shape)
    weights = {"invariance_weight": 2.0, "variance_weight": 3.0, "covariance_weight": 5.0}
    expected = np.dot([2, 3, 5], reference_parts(z1, z2, eps=eps))
    assert vicreg_loss(z1, z2, eps=eps, **weights).item() == pytest.approx(expected, rel=1e-4)


@shapes
def test_the_parts_add_up_over_the_views(shape: tuple[int, int]) -> None:
    z1, z2 = two_views(shape)
    parts = (
        invariance_loss(z1, z2),
        variance_loss(z1) + variance_loss(z2),
        covariance_loss(z1) + covariance_loss(z2),
    )
    assert torch.stack(parts).tolist() == pytest.approx(reference_parts(z1, z2), rel=1e-4, abs=1e-7)
    shared = _vicreg_parts(z1, z2, eps=1e-4, halve_variance=False, invariance_reduction="mean")
    torch.testing.assert_close(torch.stack(shared), torch.stack(parts))


@shapes
def test_halved_vicreg_and_its_gradients_equal_those_of_lightly(shape: tuple[int, int]) -> None:
    views = [view.requires_grad_() for view in two_views(shape, torch.float64)]
    ours, theirs = vicreg_loss(*views, halve_variance=True), VICRegLoss()(*views)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for gradient, expected in zip(
        torch.autograd.grad(ours, views), torch.autograd.grad(theirs, views), strict=True
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)


def test_vicreg_equals_lightly_at_the_size_of_a_training_step() -> None:
    z1, z2 = two_views((128, 512))
    assert vicreg_loss(z1, z2, halve_variance=True).item() == pytest.approx(VICRegLoss()(z1, z2).item(), rel=1e-5)


@halved_and_not
@shapes
def test_vicreg_has_the_right_gradient(shape: tuple[int, int], halve_variance: bool) -> None:
    views = tuple(view.requires_grad_() for view in two_views(shape, torch.float64))
    assert torch.autograd.gradcheck(lambda z1, z2: vicreg_loss(z1, z2, halve_variance=halve_variance), views)


@shapes
@pytest.mark.parametrize("part", [variance_loss, covariance_loss])
def test_the_parts_of_one_view_have_the_right_gradient(part, shape: tuple[int, int]) -> None:
    assert torch.autograd.gradcheck(part, two_views(shape, torch.float64)[0].requires_grad_())


@reductions
def test_the_invariance_part_has_the_right_gradient(reduction: Reduction) -> None:
    views = tuple(view.requires_grad_() for view in two_views((4, 5), torch.float64))
    assert torch.autograd.gradcheck(lambda z1, z2: invariance_loss(z1, z2, reduction=reduction), views)


@shapes
def test_summed_invariance_is_d_times_the_mean(shape: tuple[int, int]) -> None:
    z1, z2 = two_views(shape)
    mean = invariance_loss(z1, z2)
    torch.testing.assert_close(invariance_loss(z1, z2, reduction="sum"), shape[1] * mean)
    only_invariance = {"variance_weight": 0.0, "covariance_weight": 0.0, "invariance_weight": 1.0}
    torch.testing.assert_close(vicreg_loss(z1, z2, invariance_reduction="sum", **only_invariance), shape[1] * mean)


@pytest.mark.parametrize("shape", [(16, 17), (16, 400)])
def test_the_covariance_part_from_the_gram_side_equals_its_definition(shape: tuple[int, int]) -> None:
    z, _ = two_views(shape)
    _, _, twice = reference_parts(z, z)
    assert covariance_loss(z).item() == pytest.approx(twice / 2, rel=1e-4)


class LargestResult(TorchDispatchMode):
    """How many numbers the largest tensor holds that was computed."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


@shapes
@pytest.mark.parametrize("weight", [0.0, 0.005, 1.0])
def test_barlow_twins_and_its_gradients_equal_those_of_lightly(shape: tuple[int, int], weight: float) -> None:
    views = [view.requires_grad_() for view in two_views(shape, torch.float64)]
    ours = barlow_twins_loss(*views, redundancy_weight=weight)
    theirs = BarlowTwinsLoss(lambda_param=weight)(*views)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for gradient, expected in zip(
        torch.autograd.grad(ours, views), torch.autograd.grad(theirs, views), strict=True
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)


def test_barlow_twins_of_equal_orthogonal_views_is_0_and_of_opposite_ones_4_a_dimension() -> None:
    z = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    assert barlow_twins_loss(z, 5 * z - 3).item() == pytest.approx(0, abs=1e-8)
    assert barlow_twins_loss(z, -z).item() == pytest.approx(8, rel=1e-4)


@shapes
def test_barlow_twins_has_the_right_gradient(shape: tuple[int, int]) -> None:
    views = tuple(view.requires_grad_() for view in two_views(shape, torch.float64))
    assert torch.autograd.gradcheck(barlow_twins_loss, views)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 30), (30, 8)])
def test_barlow_twins_ignores_autocast(shape: tuple[int, int], dtype: torch.dtype) -> None:
    z1, z2 = (view.to(dtype) for view in two_views(shape))
    with torch.autocast("cpu", torch.bfloat16):
        inside = barlow_twins_loss(z1, z2)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, barlow_twins_loss(z1.float(), z2.float()))


def test_a_negative_weight_of_the_redundancy_is_an_error() -> None:
    z = torch.eye(3)
    with pytest.raises(ValueError, match="redundancy_weight must be a finite number >= 0"):
        barlow_twins_loss(z, z, redundancy_weight=-0.1)


@pytest.mark.parametrize(
    "loss", [covariance_loss, lambda z: barlow_twins_loss(z, z)], ids=["VICReg", "Barlow Twins"]
)
@pytest.mark.parametrize("shape", [(8, 40), (40, 8)])
def test_the_covariance_part_never_builds_the_larger_of_both_products(shape: tuple[int, int], loss) -> None:
    with LargestResult() as largest:
        loss(torch.randn(shape))
    assert largest.numbers == shape[0] * shape[1]


@pytest.mark.parametrize("shape", [(40, 8), (8, 40)])
def test_the_covariance_part_is_never_negative(shape: tuple[int, int]) -> None:
    for scale in torch.logspace(-3, 3, 50):
        z = torch.zeros(shape)
        z[:, 0] = scale * torch.randn(len(z))
        assert covariance_loss(z).item() == pytest.approx(0, abs=1e-6 * scale.item() ** 4)
        assert covariance_loss(z).item() >= 0


@pytest.mark.parametrize("shape", [(40, 8), (8, 40)])
def test_the_redundancy_of_a_single_dimension_is_0_and_never_negative(shape: tuple[int, int]) -> None:
    for scale in torch.logspace(-3, 3, 50):
        z = torch.zeros(shape)
        z[:, 0] = scale * torch.randn(len(z))
        redundancy = _barlow_twins_parts(z, z).redundancy.item()
        assert redundancy == pytest.approx(0, abs=1e-5)
        assert redundancy >= 0


def test_a_collapsed_view_has_the_largest_variance_part_and_a_finite_gradient() -> None:
    z = torch.full((6, 4), 2.0, requires_grad=True)
    loss = variance_loss(z)
    loss.backward()
    assert loss.item() == pytest.approx(0.99, rel=1e-5)
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


def test_the_variance_part_is_0_once_every_standard_deviation_is_above_1() -> None:
    assert variance_loss(torch.tensor([[3.0, -5.0], [-3.0, 5.0]])).item() == 0


@halved_and_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 30), (30, 8)])
def test_vicreg_and_its_parts_ignore_autocast(
    shape: tuple[int, int], dtype: torch.dtype, halve_variance: bool
) -> None:
    z1, z2 = (view.to(dtype) for view in two_views(shape))

    def losses(z1: Tensor, z2: Tensor) -> Tensor:
        loss = vicreg_loss(z1, z2, halve_variance=halve_variance)
        return torch.stack([loss, invariance_loss(z1, z2), variance_loss(z1), covariance_loss(z1)])

    with torch.autocast("cpu", torch.bfloat16):
        inside = losses(z1, z2)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, losses(z1.float(), z2.float()))


@pytest.mark.parametrize("loss", [vicreg_loss, invariance_loss, barlow_twins_loss])
@pytest.mark.parametrize(
    ("z1", "z2", "cause"),
    [
        (torch.ones(3), torch.ones(3), r"z1 must have shape \(N, d\)"),
        (torch.ones(4, 3), torch.ones(4, 2), r"same shape, got z1 \(4, 3\) and z2 \(4, 2\)"),
        (torch.ones(1, 3), torch.ones(1, 3), "at least 2 images, got 1"),
    ],
    ids=["vectors", "columns", "one image"],
)
def test_views_that_do_not_fit_are_an_error(loss, z1: Tensor, z2: Tensor, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        loss(z1, z2)


@pytest.mark.parametrize("part", [variance_loss, covariance_loss])
@pytest.mark.parametrize(
    ("z", "cause"),
    [(torch.ones(3), r"z must have shape \(N, d\)"), (torch.ones(1, 3), "at least 2 images, got 1")],
    ids=["vector", "one image"],
)
def test_a_view_without_a_variance_is_an_error(part, z: Tensor, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        part(z)


def test_an_unknown_reduction_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"reduction must be.*'none'"):
        invariance_loss(torch.eye(2), torch.eye(2), reduction="none")
    with pytest.raises(ValueError, match=r"reduction must be.*'none'"):
        vicreg_loss(torch.eye(2), torch.eye(2), invariance_reduction="none")


def test_eps_lifts_the_hinge_of_a_constant() -> None:
    assert float(variance_loss(torch.zeros(4, 2), eps=0.25)) == 0.5
