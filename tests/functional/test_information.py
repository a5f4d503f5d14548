"""Matrix-based entropy and mutual information against numpy's eigh in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from adadim_lightning.functional import cosine_gram, matrix_entropy, matrix_mutual_information
from adadim_lightning.functional.information import _renyi_entropy

ORDERS = [0.5, 1 - 1e-6, 1, 1 + 1e-6, 1.05, 2, 3, 5, 100]
every_order = pytest.mark.parametrize("order", ORDERS)


def correlated(n: int, d: int) -> Tensor:
    return torch.randn(n, d) * torch.logspace(0, -1, d) + 0.5


def blocks(n: int, d: int) -> Tensor:
    """One of d orthogonal directions in each row: eigenvalues known, the rest of the spectrum zero."""
    return torch.eye(d)[torch.arange(n) % d]


INPUTS = {
    "fewer rows than dimensions": lambda: correlated(20, 50),
    "more rows than dimensions": lambda: correlated(60, 10),
    "nearly collapsed": lambda: torch.ones(30, 40) + 0.01 * torch.randn(30, 40),
    "orthogonal blocks": lambda: blocks(40, 8),
}
every_input = pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())


def reference_gram(x: Tensor) -> np.ndarray:
    rows = x.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def reference_entropy(gram: np.ndarray, order: float) -> float:
    p = np.linalg.eigvalsh(gram / np.trace(gram))
    p = p[p > 1e-14]
    if order == 1:
        return float(-(p * np.log(p)).sum())
    return float(np.log((p**order).sum()) / (1 - order))


def reference_information(r: Tensor, z: Tensor, order: float) -> float:
    gram_r, gram_z = reference_gram(r), reference_gram(z)
    return (
        reference_entropy(gram_r, order)
        + reference_entropy(gram_z, order)
        - reference_entropy(gram_r * gram_z, order)
    )


def l_shape(m: int) -> tuple[Tensor, Tensor]:
    """One-hot a and b over the points {a = 0, any b} and {b = 0, any a}."""
    a = torch.cat([torch.zeros(m, dtype=torch.int64), torch.arange(1, m)])
    b = torch.cat([torch.arange(m), torch.zeros(m - 1, dtype=torch.int64)])
    return torch.eye(m)[a], torch.eye(m)[b]


@every_order
@every_input
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_matrix_entropy_equals_its_definition(make, order: float, dtype: torch.dtype) -> None:
    x = make().to(dtype)
    entropy = matrix_entropy(x, order=order)
    assert entropy.item() == pytest.approx(reference_entropy(reference_gram(x), order), rel=1e-4, abs=1e-6)
    assert entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@every_order
@pytest.mark.parametrize("n", [1, 4, 50])
def test_matrix_entropy_of_orthonormal_rows_is_the_logarithm_of_their_number(n: int, order: float) -> None:
    assert matrix_entropy(torch.eye(n, 64), order=order).item() == pytest.approx(math.log(n), abs=1e-5)


@every_order
@pytest.mark.parametrize("row", [torch.ones(6), torch.arange(6.0), torch.zeros(6)], ids=["ones", "ramp", "zeros"])
def test_matrix_entropy_of_equal_rows_is_0(row: Tensor, order: float) -> None:
    assert matrix_entropy(row.expand(32, 6), order=order).item() == pytest.approx(0, abs=1e-5)


@every_order
def test_zero_rows_share_one_direction_of_their_own(order: float) -> None:
    with_zero_rows = torch.cat([torch.eye(4, 5), torch.zeros(3, 5)])
    with_a_direction = torch.cat([torch.eye(4, 5), torch.eye(5)[4].expand(3, 5)])
    assert matrix_entropy(with_zero_rows, order=order).item() == pytest.approx(
        matrix_entropy(with_a_direction, order=order).item(), abs=1e-6
    )


@every_order
@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_matrix_entropy_does_not_depend_on_the_length_of_rows(scale: float, order: float) -> None:
    x = correlated(20, 6)
    lengths = torch.rand(20, 1) + 0.1
    assert matrix_entropy(x * lengths * scale, order=order).item() == pytest.approx(
        matrix_entropy(x, order=order).item(), rel=1e-5
    )


def test_matrix_entropy_falls_with_its_order() -> None:
    x = correlated(40, 12)
    entropies = [matrix_entropy(x, order=order).item() for order in (0.5, 1, 1.05, 2, 3, 100)]
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[0] <= math.log(12)


@pytest.mark.parametrize(
    ("around", "step"), [(1.0, 1e-9), (1.0, 1e-6), (1.1, 1e-9), (0.9, 1e-9), (2.0, 1e-9)], ids=str
)
def test_matrix_entropy_is_continuous_in_its_order(around: float, step: float) -> None:
    x = correlated(30, 50).double()
    at = matrix_entropy(x, order=around).item()
    for order in (around - step, around + step):
        assert matrix_entropy(x, order=order).item() == pytest.approx(at, abs=10 * step)


@every_order
@pytest.mark.parametrize(("d_r", "d_z"), [(40, 30), (6, 4), (6, 40)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_matrix_mutual_information_equals_its_definition(
    d_r: int, d_z: int, order: float, dtype: torch.dtype
) -> None:
    r, z = correlated(24, d_r).to(dtype), correlated(24, d_z).to(dtype)
    information = matrix_mutual_information(r, z, order=order)
    assert information.item() == pytest.approx(reference_information(r, z, order), rel=1e-4, abs=1e-6)
    assert information.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@every_order
def test_matrix_mutual_information_is_symmetric(order: float) -> None:
    r, z = correlated(20, 30), correlated(20, 5)
    assert matrix_mutual_information(r, z, order=order).item() == pytest.approx(
        matrix_mutual_information(z, r, order=order).item(), rel=1e-5
    )


@pytest.mark.parametrize("d", [5, 60])
def test_the_closed_form_of_order_2_equals_the_eigenvalue_path(d: int) -> None:
    r, z = correlated(30, d).double(), correlated(30, d).double()
    assert matrix_mutual_information(r, z, order=2).item() == pytest.approx(
        matrix_mutual_information(r, z, order=2 + 1e-9).item(), abs=1e-7
    )


@pytest.mark.parametrize("d_r", [3, 20, 200])
@pytest.mark.parametrize("d_z", [3, 200])
def test_information_of_order_2_is_at_most_the_smaller_entropy_and_that_at_most_ln_n(d_r: int, d_z: int) -> None:
    r = correlated(40, d_r)
    z = torch.relu(r @ torch.randn(d_r, d_z))
    least = min(matrix_entropy(r).item(), matrix_entropy(z).item())
    assert matrix_mutual_information(r, z).item() <= least + 1e-5
    assert least <= math.log(40) + 1e-5


@every_order
def test_the_information_of_orthonormal_rows_with_themselves_is_ln_n(order: float) -> None:
    assert matrix_mutual_information(torch.eye(16), torch.eye(16), order=order).item() == pytest.approx(
        math.log(16), abs=1e-5
    )


@pytest.mark.parametrize(("m", "expected"), [(10, -0.55), (50, -1.90)])
def test_information_of_order_2_is_negative_on_the_l_shaped_set(m: int, expected: float) -> None:
    information = matrix_mutual_information(*l_shape(m), order=2).item()
    assert information == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("make", [lambda: l_shape(10), lambda: (correlated(30, 8), correlated(30, 50))])
def test_information_of_order_1_is_never_negative(make) -> None:
    assert matrix_mutual_information(*make(), order=1).item() > 0.01


@every_order
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_collapsed_representation_shares_no_information(value: float, order: float) -> None:
    r = torch.full((16, 8), value)
    assert matrix_mutual_information(r, correlated(16, 12), order=order).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("order", [0.5, 1, 1.05, 2, 3])
def test_matrix_entropy_has_the_right_gradient(order: float) -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: matrix_entropy(x, order=order), x)


@pytest.mark.parametrize("order", [0.5, 1, 1.05, 2, 3])
def test_matrix_mutual_information_has_the_right_gradient(order: float) -> None:
    r, z = (torch.randn(4, d, dtype=torch.float64, requires_grad=True) for d in (6, 5))
    assert torch.autograd.gradcheck(lambda r, z: matrix_mutual_information(r, z, order=order), (r, z))


@pytest.mark.parametrize("order", [1, 1.05, 2, 3])
@pytest.mark.parametrize(
    "r", [torch.ones(12, 4), torch.zeros(12, 4), blocks(12, 4)], ids=["equal", "zero", "rank 4"]
)
def test_gradients_stay_finite_where_eigenvalues_are_zero(r: Tensor, order: float) -> None:
    r, z = r.clone().requires_grad_(), correlated(12, 5).requires_grad_()
    matrix_mutual_information(r, z, order=order).backward()
    assert r.grad is not None
    assert z.grad is not None
    assert torch.isfinite(r.grad).all()
    assert torch.isfinite(z.grad).all()


@every_order
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_information_ignores_autocast(order: float, dtype: torch.dtype) -> None:
    r, z = correlated(16, 8).to(dtype), correlated(16, 30).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        inside = matrix_entropy(r, order=order), matrix_mutual_information(r, z, order=order)
    outside = matrix_entropy(r.float(), order=order), matrix_mutual_information(r.float(), z.float(), order=order)
    assert inside == outside


def test_cosine_gram_holds_the_cosines_of_all_pairs() -> None:
    x = correlated(20, 7)
    gram = cosine_gram(x)
    np.testing.assert_allclose(gram, reference_gram(x), atol=1e-6)
    np.testing.assert_allclose(gram.diagonal(), np.ones(20), atol=1e-6)


def test_cosine_gram_ignores_autocast() -> None:
    x = correlated(20, 7)
    with torch.autocast("cpu", torch.bfloat16):
        inside = cosine_gram(x)
    assert torch.equal(inside, cosine_gram(x))


def test_the_eigenvalues_of_a_float32_gram_are_taken_in_float64() -> None:
    entropy = _renyi_entropy(torch.ones(64, 64), 0.1)
    assert abs(entropy.item()) < 1e-6
    assert entropy.dtype == torch.float32


@pytest.mark.parametrize("order", [1, 1.5, 3])
def test_a_little_information_of_float32_rows_is_that_of_the_same_rows_in_float64(order: float) -> None:
    r, z = torch.randn(20, 5), 1 + 0.01 * torch.randn(20, 5)
    expected = matrix_mutual_information(r.double(), z.double(), order=order).item()
    assert 0 < expected < 1e-3
    assert matrix_mutual_information(r, z, order=order).item() == pytest.approx(expected, rel=1e-6)


def test_cosine_gram_has_a_unit_diagonal_for_zero_rows_too() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    torch.testing.assert_close(cosine_gram(x), expected)


@pytest.mark.parametrize("order", [0, -1, math.nan, math.inf])
def test_an_order_that_is_not_finite_and_positive_is_an_error(order: float) -> None:
    with pytest.raises(ValueError, match="order must be"):
        matrix_entropy(torch.eye(3), order=order)
    with pytest.raises(ValueError, match="order must be"):
        matrix_mutual_information(torch.eye(3), torch.eye(3), order=order)


@pytest.mark.parametrize(
    ("x", "cause"),
    [
        (torch.ones(3), r"must have shape \(N, d\)"),
        (torch.ones(0, 3), r"must have shape \(N, d\)"),
        (torch.full((3, 3), math.nan), "holds a NaN or an infinity"),
        (torch.full((3, 3), math.inf), "holds a NaN or an infinity"),
    ],
    ids=["vector", "empty", "NaN", "infinity"],
)
def test_information_rejects_what_is_no_finite_matrix(x: Tensor, cause: str) -> None:
    with pytest.raises(ValueError, match=f"x {cause}"):
        matrix_entropy(x)
    with pytest.raises(ValueError, match=f"r {cause}"):
        matrix_mutual_information(x, torch.eye(3))
    with pytest.raises(ValueError, match=f"z {cause}"):
        matrix_mutual_information(torch.eye(3), x)


def test_unequal_numbers_of_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match="same number of rows, got 3 and 4"):
        matrix_mutual_information(torch.eye(3), torch.eye(4))


@pytest.mark.parametrize("order", [0.1, 1, 3])
def test_rounding_is_no_eigenvalue_at_any_order_but_2(order: float) -> None:
    rank_one = torch.outer(torch.rand(64) + 0.5, torch.randn(16))
    assert abs(float(matrix_entropy(rank_one, order=order))) < 1e-9
    assert abs(float(matrix_mutual_information(rank_one, rank_one, order=order))) < 1e-9


def test_a_small_eigenvalue_is_not_taken_for_rounding() -> None:
    angle = 1e-5  # the second eigenvalue of the two rows' Gram is near angle^2 / 4
    x = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    p = np.array([1 + math.cos(angle), 2 * math.sin(angle / 2) ** 2]) / 2
    assert float(matrix_entropy(x, order=0.2)) == pytest.approx(np.log((p**0.2).sum()) / 0.8, rel=1e-4)


def test_an_eigenvalue_counts_once_it_exceeds_the_rounding_of_the_trace() -> None:
    rounding = 32 * np.finfo(float).eps * 64  # of 32 rows, with a trace of 64
    for eigenvalue, counted in ((0.9 * rounding, False), (1.1 * rounding, True)):
        eigenvalues = torch.full((32,), 64 / 31, dtype=torch.float64)
        eigenvalues[0] = eigenvalue
        p = np.array([1 / 31] * 31 + [eigenvalue / 64] * counted)
        expected = np.log((p**0.02).sum()) / 0.98
        assert _renyi_entropy(torch.diag(eigenvalues), 0.02).item() == pytest.approx(expected, abs=1e-6)
