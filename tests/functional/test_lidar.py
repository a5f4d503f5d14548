"""LiDAR against the generalized eigenproblem that scipy solves."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from adadim_lightning.functional import effective_rank, lidar

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def noisy_views(n: int, q: int, d: int, *, spread: float = 0.3) -> Tensor:
    """Images of unequal variance along each axis, with views around them; all off center."""
    images = torch.randn(n, 1, d) * torch.linspace(2, 0.1, d)
    return 1.5 + images + spread * torch.randn(n, q, d) @ torch.randn(d, d) / math.sqrt(d)


def reference_lidar(x: Tensor, *, delta: float) -> float:
    rows = x.double().numpy()
    n, q, d = rows.shape
    means = rows.mean(axis=1)
    between = np.cov(means.T, bias=True).reshape(d, d)
    within = delta * np.eye(d)
    for image, mean in zip(rows, means, strict=True):
        within += sum(np.outer(view - mean, view - mean) for view in image) / (n * q)
    values = scipy.linalg.eigh(between, within, eigvals_only=True)
    p = values[values > 1e-12 * values.sum()] / values.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", [1e-4, 0.1])
@pytest.mark.parametrize("shape", [(40, 5, 12), (12, 3, 40), (20, 2, 20), (2, 2, 6), (30, 4, 1)])
def test_lidar_equals_its_definition(shape: tuple[int, int, int], delta: float, dtype: torch.dtype) -> None:
    x = noisy_views(*shape).to(dtype)
    rank = lidar(x, delta=delta)
    assert rank.item() == pytest.approx(reference_lidar(x, delta=delta), rel=1e-5)
    assert 1 <= rank <= min(shape[0] - 1, shape[2])
    assert rank.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("directions", [1, 3, 8])
def test_lidar_of_isotropic_clusters_is_the_number_of_directions_that_separate_them(directions: int) -> None:
    images = torch.zeros(4000, 1, 8)
    images[..., :directions] = 10 * torch.randn(4000, 1, directions)
    assert lidar(images + 0.1 * torch.randn(4000, 10, 8)).item() == pytest.approx(directions, rel=0.01)


def test_directions_that_only_augmentation_moves_do_not_count() -> None:
    images = torch.zeros(2000, 1, 8)
    images[..., :3] = torch.randn(2000, 1, 3)
    moved = torch.tensor([0.01] * 3 + [10.0] * 5)
    x = images + moved * torch.randn(2000, 4, 8)
    assert lidar(x).item() == pytest.approx(3, rel=0.02)
    assert effective_rank(x.flatten(0, 1), spectrum="eigen", center=True) > 4.5


def test_lidar_of_equal_views_is_the_effective_rank_of_the_images() -> None:
    images = torch.randn(30, 1, 10).double() * torch.logspace(0, -2, 10)
    expected = effective_rank(images[:, 0], spectrum="eigen", center=True)
    torch.testing.assert_close(lidar(images.expand(-1, 3, -1)), expected)


def test_lidar_does_not_change_when_the_space_is_stretched_or_shifted() -> None:
    x = noisy_views(60, 4, 8).double()
    stretched = x @ (torch.randn(8, 8, dtype=torch.float64) + 3 * torch.eye(8)) + 7
    assert lidar(stretched, delta=1e-12).item() == pytest.approx(lidar(x, delta=1e-12).item(), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, 1e-20])
@pytest.mark.parametrize("shape", [(50, 3, 7), (7, 3, 50), (2, 2, 1)])
def test_lidar_of_equal_images_is_1(shape: tuple[int, int, int], value: float) -> None:
    same = value * torch.linspace(1, 2, shape[2])
    assert lidar(same.expand(shape)).item() == 1
    assert lidar(same.double().expand(shape)).item() == 1


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_lidar_is_finite_and_in_range_at_any_scale(scale: float) -> None:
    for shape in [(20, 3, 8), (8, 3, 20)]:
        assert 1 <= lidar(noisy_views(*shape) * scale) <= 8


def test_lidar_never_exceeds_the_number_of_directions_that_there_can_be() -> None:
    for k in range(2, 40):
        corners, crosses = torch.eye(k).double(), torch.cat([torch.eye(k), -torch.eye(k)]).double()
        assert k - 1 - 1e-9 < lidar(corners[:, None].expand(-1, 2, -1)) <= k - 1
        assert k - 1e-9 < lidar(crosses[:, None].expand(-1, 2, -1)) <= k


@pytest.mark.parametrize(("n", "d"), [(16, 4), (4, 16)])
def test_a_direction_counts_once_it_exceeds_the_rounding_of_the_trace(n: int, d: int) -> None:
    for factor, counted in ((0.9, False), (1.1, True)):
        images = torch.zeros(n, 1, d, dtype=torch.float64)
        images[:2, 0, 0] = torch.tensor([1.0, -1.0])
        images[2:4, 0, 1] = torch.tensor([1.0, -1.0]) * math.sqrt(factor * 16 * np.finfo(float).eps)
        assert (lidar(images.expand(-1, 2, -1)) > 1) == counted


def test_a_direction_counts_once_it_exceeds_the_rounding_of_the_subtraction() -> None:
    mean, delta = 2.0**30, 2.0**-4
    # Of 16 images, with two dimensions off center, where the views are all alike along one dimension.
    rounding = (16 * np.finfo(float).eps) ** 2 * 16 * (2 * mean**2) / delta
    turns = torch.tensor([1.0, -1.0], dtype=torch.float64)
    for factor, counted in ((0.9, False), (1.1, True)):
        small = math.sqrt(factor * rounding * delta / 16)
        images = torch.stack(
            [mean + turns.repeat(8), torch.full((16,), mean), small * turns.repeat_interleave(8)], dim=1
        )
        views = torch.zeros(2, 3)
        views[:, 1] = 3.0 * turns
        assert (lidar(images[:, None] + views, delta=delta) > 1) == counted


def test_lidar_with_a_constant_dimension_equals_lidar_without_it() -> None:
    x = noisy_views(40, 4, 6)
    constant = torch.full((40, 4, 1), 1e3 / 3)
    assert lidar(torch.cat([x, constant], dim=2)).item() == pytest.approx(lidar(x).item(), rel=1e-6)


def test_lidar_carries_no_gradient_and_ignores_autocast() -> None:
    x = noisy_views(20, 3, 6).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        inside = lidar(x)
    assert not inside.requires_grad
    assert torch.equal(inside, lidar(x))


@pytest.mark.parametrize(
    ("x", "delta", "cause"),
    [
        (torch.ones(4, 3), 1e-4, r"shape \(N, q, d\).*got \(4, 3\)"),
        (torch.ones(1, 3, 2), 1e-4, "N, q >= 2"),
        (torch.ones(3, 1, 2), 1e-4, "N, q >= 2"),
        (torch.ones(3, 2, 0), 1e-4, r"shape \(N, q, d\).*got \(3, 2, 0\)"),
        (torch.ones(3, 2, 2, dtype=torch.int64), 1e-4, "floating-point"),
        (torch.full((3, 2, 2), math.nan), 1e-4, "NaN or an infinity"),
        (torch.ones(3, 2, 2), 0.0, "delta must be > 0"),
        (torch.ones(3, 2, 2), -1.0, "delta must be > 0"),
        (torch.ones(3, 2, 2), math.nan, "delta must be a finite number"),
    ],
)
def test_lidar_rejects_what_it_cannot_measure(x: Tensor, delta: float, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        lidar(x, delta=delta)


@pytest.mark.parametrize("x", [None, [[[1.0, 2.0]]], np.ones((3, 2, 2))], ids=["None", "list", "array"])
def test_lidar_of_what_is_no_tensor_is_an_error(x) -> None:
    with pytest.raises(TypeError, match=f"x must be a tensor, got {type(x).__name__}"):
        lidar(x)
