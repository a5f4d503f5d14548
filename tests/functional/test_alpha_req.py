"""The decay exponent of the spectrum against numpy's weighted line and exact power laws."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from adadim_lightning.functional import alpha_req

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def with_spectrum(eigenvalues: Tensor) -> Tensor:
    """Centered rows, off the origin, whose covariance has these eigenvalues up to a factor, in a random basis."""
    d = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
    rows = torch.diag(eigenvalues.double().sqrt()) @ basis
    return torch.cat([rows, -rows]) + 3


def power_law(d: int, alpha: float) -> Tensor:
    return torch.arange(1, d + 1, dtype=torch.float64).pow(-alpha)


def reference_alpha(x: Tensor, first: int, last: int) -> float:
    rows = x.double().numpy()
    eigenvalues = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
    rank = np.arange(first, last + 1)
    # numpy's weights multiply residuals, not their squares.
    slope, _ = np.polyfit(np.log(rank), np.log(eigenvalues[first - 1 : last]), 1, w=rank**-0.5)
    return float(-slope)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.3])
@pytest.mark.parametrize(("first", "last"), [(11, 50), (1, 60), (3, 4), (11, 1000)])
def test_alpha_of_a_power_law_is_its_exponent(alpha: float, first: int, last: int) -> None:
    x = with_spectrum(power_law(60, alpha))
    assert alpha_req(x, first=first, last=last).item() == pytest.approx(alpha, abs=1e-6)
    assert alpha_req(1e-3 * x, first=first, last=last).item() == pytest.approx(alpha, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "last"), [(11, 50), (1, 30), (5, 64)])
def test_alpha_equals_the_line_weighted_with_one_over_rank(first: int, last: int, dtype: torch.dtype) -> None:
    x = (torch.randn(300, 64) * torch.linspace(3, 0.2, 64) + 1).to(dtype)
    alpha = alpha_req(x, first=first, last=last)
    assert alpha.item() == pytest.approx(reference_alpha(x, first, last), rel=1e-5)
    assert alpha.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_ranks_outside_the_range_do_not_matter() -> None:
    eigenvalues = power_law(60, 1.5)
    eigenvalues[:10] = 50.0
    eigenvalues[50:] = 1e-6
    assert alpha_req(with_spectrum(eigenvalues)).item() == pytest.approx(1.5, abs=1e-6)


def test_with_fewer_rows_than_dimensions_the_range_ends_at_the_last_nonzero_eigenvalue() -> None:
    x = torch.randn(31, 200)
    rows = (x - x.mean(dim=0)).double().numpy()
    eigenvalues = np.linalg.svd(rows, compute_uv=False)[:30] ** 2
    rank = np.arange(11, 31)
    slope, _ = np.polyfit(np.log(rank), np.log(eigenvalues[10:]), 1, w=rank**-0.5)
    assert alpha_req(x).item() == pytest.approx(-slope, rel=1e-5)


@pytest.mark.parametrize("d", [2, 8, 11])
def test_with_fewer_than_two_eigenvalues_in_the_range_the_fit_starts_at_rank_1(d: int) -> None:
    eigenvalues = power_law(d, 0.7)
    eigenvalues[-1] /= 2
    x = with_spectrum(eigenvalues)
    assert alpha_req(x).item() == pytest.approx(reference_alpha(x, 1, d), rel=1e-6)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(5, 20),
        torch.full((40, 20), 0.1),
        torch.ones(1, 20),
        torch.arange(40.0)[:, None],
        torch.outer(torch.arange(40.0), torch.arange(20.0)),
    ],
    ids=["zero", "constant", "one row", "one dimension", "rank 1"],
)
def test_alpha_of_a_collapsed_input_is_infinite(x: Tensor) -> None:
    for dtype in DTYPES[:2]:
        alpha = alpha_req(x.to(dtype))
        assert alpha.item() == math.inf
        assert alpha.dtype == dtype


def test_rounding_makes_no_exponent_negative() -> None:
    for d in range(2, 60):
        for scale in (0.3, 7.0):
            isotropic = scale * torch.cat([torch.eye(d), -torch.eye(d)]).double()
            assert 0 <= alpha_req(isotropic, first=1, last=d).item() < 1e-12


def test_alpha_carries_no_gradient_and_ignores_autocast() -> None:
    x = torch.randn(80, 60, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = alpha_req(x)
    assert not inside.requires_grad
    assert torch.equal(inside, alpha_req(x))


@pytest.mark.parametrize(
    ("x", "options", "cause"),
    [
        (torch.ones(3), {}, r"shape \(N, d\)"),
        (torch.ones(0, 3), {}, r"shape \(N, d\)"),
        (torch.ones(3, 3, dtype=torch.int64), {}, "floating-point"),
        (torch.full((3, 3), math.inf), {}, "NaN or an infinity"),
        (torch.eye(3), {"first": 0}, "first must be an integer >= 1"),
        (torch.eye(3), {"first": 50}, "last must be an integer >= 51"),
        (torch.eye(3), {"last": 20.5}, "last must be an integer"),
    ],
)
def test_alpha_rejects_what_it_cannot_fit(x: Tensor, options: dict, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        alpha_req(x, **options)
