"""NT-Xent against its formula and against lightly."""

import math

import numpy as np
import pytest
import torch
from lightly.loss import NTXentLoss
from torch import Tensor

from adadim_lightning.functional import nt_xent_loss

temperatures = pytest.mark.parametrize("temperature", [0.05, 0.2, 0.5, 1.0, 10.0])
shapes = pytest.mark.parametrize("shape", [(2, 3), (16, 8), (8, 64)])


def two_views(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    z1 = torch.randn(shape, dtype=dtype)
    return z1, z1 + 0.5 * torch.randn(shape, dtype=dtype)


def reference_loss(z1: Tensor, z2: Tensor, temperature: float) -> float:
    n = len(z1)
    rows = torch.cat([z1, z2]).double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = np.exp(rows @ rows.T / temperature)
    terms = [
        -math.log(similarity[i, (i + n) % (2 * n)] / (similarity[i].sum() - similarity[i, i]))
        for i in range(2 * n)
    ]
    return sum(terms) / (2 * n)


@temperatures
@shapes
def test_nt_xent_equals_its_formula(shape: tuple[int, int], temperature: float) -> None:
    z1, z2 = two_views(shape)
    assert nt_xent_loss(z1, z2, temperature=temperature).item() == pytest.approx(
        reference_loss(z1, z2, temperature), rel=1e-4, abs=1e-6
    )


@temperatures
@shapes
def test_nt_xent_and_its_gradients_equal_those_of_lightly(shape: tuple[int, int], temperature: float) -> None:
    views = [view.requires_grad_() for view in two_views(shape, torch.float64)]
    ours, theirs = nt_xent_loss(*views, temperature=temperature), NTXentLoss(temperature)(*views)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for gradient, expected in zip(
        torch.autograd.grad(ours, views), torch.autograd.grad(theirs, views), strict=True
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)


def test_nt_xent_has_the_right_gradient() -> None:
    views = tuple(view.requires_grad_() for view in two_views((4, 5), torch.float64))
    assert torch.autograd.gradcheck(lambda z1, z2: nt_xent_loss(z1, z2, temperature=0.5), views)


def test_the_default_temperature_is_one_fifth() -> None:
    views = two_views((8, 4))
    assert nt_xent_loss(*views) == nt_xent_loss(*views, temperature=0.2)


def test_nt_xent_ignores_the_order_of_the_views_and_the_length_of_rows() -> None:
    z1, z2 = two_views((8, 4))
    torch.testing.assert_close(nt_xent_loss(z2 * 7, z1 * torch.rand(8, 1)), nt_xent_loss(z1, z2))


def test_nt_xent_of_collapsed_views_is_the_logarithm_of_the_number_of_other_rows() -> None:
    assert nt_xent_loss(torch.ones(8, 4), torch.ones(8, 4)).item() == pytest.approx(math.log(15), rel=1e-5)


def test_nt_xent_of_zero_rows_has_finite_value_and_gradient() -> None:
    z1 = torch.zeros(4, 3, requires_grad=True)
    loss = nt_xent_loss(z1, torch.zeros(4, 3))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(7), rel=1e-5)
    assert z1.grad is not None
    assert torch.isfinite(z1.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nt_xent_ignores_autocast(dtype: torch.dtype) -> None:
    z1, z2 = (view.to(dtype) for view in two_views((16, 32)))
    with torch.autocast("cpu", torch.bfloat16):
        inside = nt_xent_loss(z1, z2)
    assert inside.dtype == torch.float32
    assert inside == nt_xent_loss(z1.float(), z2.float())


@pytest.mark.parametrize("temperature", [0, -0.1, math.nan])
def test_a_temperature_that_is_not_positive_is_an_error(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be"):
        nt_xent_loss(torch.eye(2), torch.eye(2), temperature=temperature)


@pytest.mark.parametrize(
    ("z1", "z2", "cause"),
    [
        (torch.ones(3), torch.ones(3), r"z1 must have shape \(N, d\)"),
        (torch.ones(4, 3), torch.ones(3), r"z2 must have shape \(N, d\)"),
        (torch.ones(4, 3), torch.ones(4, 2), r"same shape, got z1 \(4, 3\) and z2 \(4, 2\)"),
        (torch.ones(4, 3), torch.ones(5, 3), "same shape"),
        (torch.ones(1, 3), torch.ones(1, 3), "at least 2 images, got 1"),
        (torch.ones(4, 3).int(), torch.ones(4, 3).int(), "floating-point"),
    ],
    ids=["vectors", "vector", "columns", "rows", "one image", "integers"],
)
def test_views_that_do_not_fit_are_an_error(z1: Tensor, z2: Tensor, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        nt_xent_loss(z1, z2)
