"""Alignment and uniformity against closed forms and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from torch import Tensor
from torch.nn.functional import normalize

from adadim_lightning.functional import alignment, uniformity

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])


@dtypes
@pytest.mark.parametrize("t", [0.5, 2.0, 10.0])
@pytest.mark.parametrize("shape", [(2, 3), (50, 4), (20, 100)])
def test_uniformity_equals_the_mean_potential_over_the_distances_of_scipy(
    shape: tuple[int, int], t: float, dtype: torch.dtype
) -> None:
    x = (torch.randn(shape) + 0.5).to(dtype)
    distances = pdist(normalize(x.double(), dim=1).numpy())
    expected = math.log(np.exp(-t * distances**2).mean())
    assert uniformity(x, t=t).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@dtypes
@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_alignment_equals_the_mean_power_of_the_distances(alpha: float, dtype: torch.dtype) -> None:
    x = torch.randn(30, 8).to(dtype)
    y = (x + 0.3 * torch.randn(30, 8)).to(dtype)
    unit = [
        view.double().numpy() / np.linalg.norm(view.double().numpy(), axis=1, keepdims=True) for view in (x, y)
    ]
    expected = (np.linalg.norm(unit[0] - unit[1], axis=1) ** alpha).mean()
    assert alignment(x, y, alpha=alpha).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("x", "squared_distance"),
    [
        (torch.ones(7, 3), 0.0),
        (torch.zeros(7, 3), 0.0),
        (torch.eye(5), 2.0),
        (torch.eye(3) - 1 / 3, 3.0),
        (torch.tensor([[2.0, 0.0], [-9.0, 0.0]]), 4.0),
    ],
    ids=["equal", "zero", "orthogonal", "simplex", "opposite"],
)
@pytest.mark.parametrize("t", [1.0, 2.0])
def test_uniformity_of_equally_distant_rows_is_minus_t_times_their_squared_distance(
    x: Tensor, squared_distance: float, t: float
) -> None:
    assert uniformity(x, t=t).item() == pytest.approx(-t * squared_distance, abs=1e-5)


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.0), (5.0, 0.0), (-1.0, 4.0), (-0.1, 4.0)])
def test_alignment_depends_on_directions_only(factor: float, expected: float) -> None:
    x = torch.randn(10, 4)
    assert alignment(x, factor * x).item() == pytest.approx(expected, abs=1e-6)


def test_alignment_of_orthogonal_pairs_is_2() -> None:
    assert alignment(torch.eye(4), torch.eye(4).roll(1, dims=1)).item() == pytest.approx(2)


def test_uniformity_has_the_right_gradient() -> None:
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(uniformity, x)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_alignment_has_the_right_gradient(alpha: float) -> None:
    x, y = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, y: alignment(x, y, alpha=alpha), (x, y))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_alignment_of_equal_views_has_a_finite_gradient(alpha: float) -> None:
    x = torch.randn(5, 4, requires_grad=True)
    alignment(x, x.detach(), alpha=alpha).backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alignment_and_uniformity_ignore_autocast(dtype: torch.dtype) -> None:
    x, y = torch.randn(10, 16).to(dtype), torch.randn(10, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        inside = alignment(x, y), uniformity(x)
    assert inside == (alignment(x.float(), y.float()), uniformity(x.float()))


BAD_MATRICES = [
    pytest.param(torch.ones(3), r"must have shape \(N, d\)", id="vector"),
    pytest.param(torch.tensor([[1.0, math.nan], [0.0, 1.0]]), "holds a NaN or an infinity", id="NaN"),
    pytest.param(torch.tensor([[1.0, math.inf], [0.0, 1.0]]), "holds a NaN or an infinity", id="infinity"),
]


@pytest.mark.parametrize(("x", "cause"), [*BAD_MATRICES, pytest.param(torch.ones(1, 3), "at least 2 rows, got 1")])
def test_uniformity_rejects_what_has_no_finite_pairs(x: Tensor, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        uniformity(x)


@pytest.mark.parametrize(
    ("y", "cause"), [*BAD_MATRICES, pytest.param(torch.ones(2, 3), r"same shape, got x \(2, 2\) and y \(2, 3\)")]
)
def test_alignment_rejects_views_that_do_not_fit(y: Tensor, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        alignment(torch.eye(2), y)


def test_alignment_of_one_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        alignment(torch.ones(1, 3), torch.ones(1, 3))
