"""Spectrum, effective rank and spectral entropy against numpy's SVD in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from adadim_lightning.functional import effective_rank, eigenvalue_spectrum, rankme, spectral_entropy
from adadim_lightning.functional.spectrum import Spectrum

SPECTRA: tuple[Spectrum, ...] = ("singular", "eigen")
SMALL_SCALE = 1e-3

both_spectra = pytest.mark.parametrize("spectrum", SPECTRA)
centered_and_not = pytest.mark.parametrize("center", [False, True])
all_estimators = pytest.mark.parametrize(
    "estimator", [eigenvalue_spectrum, spectral_entropy, effective_rank, rankme]
)


def low_rank(n: int, d: int, rank: int) -> Tensor:
    return torch.randn(n, rank) @ torch.randn(rank, d)


def decaying(n: int, d: int) -> Tensor:
    return torch.randn(n, d) * torch.logspace(0, -2, d) + 0.5


def orthonormal(n: int, d: int) -> Tensor:
    """Orthonormal rows if there are fewer of them than dimensions, else orthonormal columns."""
    q = torch.linalg.qr(torch.randn(max(n, d), min(n, d), dtype=torch.float64))[0].float()
    return q if n >= d else q.T


INPUTS = {
    "fewer rows than dimensions": lambda: decaying(40, 100),
    "more rows than dimensions": lambda: decaying(150, 40),
    "as many rows as dimensions": lambda: decaying(50, 50),
    "one row": lambda: torch.randn(1, 8),
    "one dimension": lambda: torch.randn(8, 1),
    "rank 1, wide": lambda: low_rank(20, 80, 1),
    "rank 1, tall": lambda: low_rank(80, 20, 1),
    "rank 10": lambda: low_rank(64, 48, 10),
    "orthonormal columns": lambda: orthonormal(64, 16),
    "Gaussian": lambda: torch.randn(2000, 32),
}
every_input = pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())


def reference_eigenvalues(x: Tensor, *, center: bool) -> np.ndarray:
    rows = x.double().numpy()
    return np.linalg.svd(rows - rows.mean(axis=0) if center else rows, compute_uv=False) ** 2


def reference_entropy(x: Tensor, *, spectrum: str, center: bool) -> float:
    eigenvalues = reference_eigenvalues(x, center=center)
    values = np.sqrt(eigenvalues) if spectrum == "singular" else eigenvalues
    p = values[values > 1e-14 * values.sum()] / values.sum()
    return float(-(p * np.log(p)).sum())


@every_input
@centered_and_not
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_eigenvalues_are_the_squared_singular_values(make, center: bool, dtype: torch.dtype) -> None:
    x = make().to(dtype)
    eigenvalues = eigenvalue_spectrum(x, center=center)
    expected = reference_eigenvalues(x, center=center)
    assert eigenvalues.dtype == torch.float64
    assert eigenvalues.shape == (min(x.shape),)
    assert (eigenvalues >= 0).all()
    assert (eigenvalues.diff() <= 0).all()
    np.testing.assert_allclose(
        eigenvalues, expected, rtol=1e-6, atol=1e-12 * reference_eigenvalues(x, center=False).sum()
    )


@every_input
@both_spectra
@centered_and_not
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_effective_rank_equals_its_definition(make, spectrum: Spectrum, center: bool, dtype: torch.dtype) -> None:
    x = make().to(dtype)
    if center and len(x) == 1:
        pytest.skip("one centered row is zero")
    rank = effective_rank(x, spectrum=spectrum, center=center)
    assert rank.item() == pytest.approx(math.exp(reference_entropy(x, spectrum=spectrum, center=center)), rel=1e-4)
    assert 1 <= rank <= min(x.shape)
    assert rank.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@every_input
@both_spectra
@centered_and_not
def test_spectral_entropy_is_the_logarithm_of_the_effective_rank(make, spectrum: Spectrum, center: bool) -> None:
    x = make().double()
    entropy = spectral_entropy(x, spectrum=spectrum, center=center)
    assert entropy.item() == pytest.approx(
        effective_rank(x, spectrum=spectrum, center=center).log().item(), abs=1e-9
    )
    assert 0 <= entropy <= math.log(min(x.shape)) + 1e-12


@both_spectra
@pytest.mark.parametrize(("n", "d"), [(16, 64), (64, 16), (32, 32)])
def test_effective_rank_of_orthonormal_vectors_is_their_number(n: int, d: int, spectrum: Spectrum) -> None:
    assert effective_rank(orthonormal(n, d), spectrum=spectrum).item() == pytest.approx(min(n, d), rel=1e-6)


@both_spectra
def test_effective_rank_of_many_isotropic_gaussian_vectors_nears_their_dimension(spectrum: Spectrum) -> None:
    rank = effective_rank(torch.randn(50_000, 16), spectrum=spectrum).item()
    assert 15.9 < rank <= 16


def test_effective_rank_of_2048_isotropic_dimensions_is_never_above_2048() -> None:
    signs = torch.randint(0, 2, (2048,)) * 2.0 - 1
    x = torch.diag(signs)[torch.randperm(2048)] * SMALL_SCALE
    rank = effective_rank(x).item()
    assert rank == pytest.approx(2048, rel=1e-6)
    assert rank <= 2048


@both_spectra
@pytest.mark.parametrize("shape", [(512, 256), (256, 512), (1000, 8)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_rank_1_input_in_float32_has_effective_rank_1(
    shape: tuple[int, int], scale: float, spectrum: Spectrum
) -> None:
    assert effective_rank(low_rank(*shape, 1) * scale, spectrum=spectrum).item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("shape", [(30, 400), (400, 30)])
def test_rounding_noise_counts_as_zero(shape: tuple[int, int]) -> None:
    exactly_rank_1 = torch.outer(torch.arange(1.0, shape[0] + 1), torch.arange(1.0, shape[1] + 1))
    assert eigenvalue_spectrum(exactly_rank_1).count_nonzero() == 1
    constant = torch.rand(shape[1], dtype=torch.float64).expand(shape)
    assert eigenvalue_spectrum(constant, center=True).count_nonzero() == 0


def test_rank_10_input_in_float32_has_the_effective_rank_that_float64_gives() -> None:
    x = low_rank(400, 200, 10)
    assert effective_rank(x).item() == pytest.approx(
        math.exp(reference_entropy(x, spectrum="singular", center=False)), rel=1e-4
    )


@both_spectra
@centered_and_not
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (4, 7), (7, 4)])
def test_an_all_zero_input_has_effective_rank_1_and_entropy_0(
    shape: tuple[int, int], spectrum: Spectrum, center: bool
) -> None:
    x = torch.zeros(shape)
    assert effective_rank(x, spectrum=spectrum, center=center).item() == 1
    assert spectral_entropy(x, spectrum=spectrum, center=center).item() == 0


@both_spectra
@centered_and_not
@pytest.mark.parametrize("value", [0.1, 1e4, 1e-20])
@pytest.mark.parametrize("shape", [(100, 7), (7, 100)])
def test_a_constant_input_has_effective_rank_1(
    shape: tuple[int, int], value: float, spectrum: Spectrum, center: bool
) -> None:
    x = (value * torch.linspace(1, 2, shape[1])).expand(shape)
    assert effective_rank(x, spectrum=spectrum, center=center).item() == pytest.approx(1, abs=1e-6)
    assert spectral_entropy(x, spectrum=spectrum, center=center).item() == pytest.approx(0, abs=1e-6)


@both_spectra
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_effective_rank_does_not_depend_on_the_scale(scale: float, spectrum: Spectrum) -> None:
    x = decaying(50, 20)
    assert effective_rank(x * scale, spectrum=spectrum).item() == pytest.approx(
        effective_rank(x, spectrum=spectrum).item(), rel=1e-5
    )


def test_the_centered_effective_rank_of_n_points_is_at_most_n_minus_1() -> None:
    assert effective_rank(torch.eye(10), center=True).item() == pytest.approx(9, rel=1e-6)


def test_the_two_spectra_give_different_ranks() -> None:
    x = decaying(300, 64)
    assert effective_rank(x, spectrum="singular") > 1.5 * effective_rank(x, spectrum="eigen")


@every_input
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_rankme_equals_its_definition_with_the_guard(make, dtype: torch.dtype) -> None:
    x = make().to(dtype)
    values = np.sqrt(reference_eigenvalues(x, center=False))
    p = values / values.sum() + 1e-7
    assert rankme(x).item() == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert rankme(x).item() == pytest.approx(effective_rank(x).item(), rel=1e-3)


def test_the_guard_of_rankme_lifts_an_isotropic_input_above_its_dimension_but_hardly() -> None:
    assert 2048.5 < rankme(torch.eye(2048)).item() < 2052


@pytest.mark.parametrize("x", [torch.zeros(7, 4), torch.ones(7, 4), torch.zeros(1, 1)])
def test_rankme_of_a_collapsed_input_is_1(x: Tensor) -> None:
    assert rankme(x).item() == pytest.approx(1, abs=1e-4)


@all_estimators
def test_estimators_carry_no_gradient(estimator) -> None:
    assert not estimator(torch.randn(5, 3, requires_grad=True)).requires_grad


@all_estimators
def test_estimators_ignore_autocast(estimator) -> None:
    x = decaying(30, 20)
    with torch.autocast("cpu", torch.bfloat16):
        inside = estimator(x)
    assert torch.equal(inside, estimator(x))


@all_estimators
@pytest.mark.parametrize(
    ("x", "cause"),
    [
        (torch.ones(3), r"shape \(N, d\).*got \(3,\)"),
        (torch.ones(2, 3, 4), r"shape \(N, d\)"),
        (torch.ones(0, 3), r"shape \(N, d\)"),
        (torch.ones(3, 0), r"shape \(N, d\)"),
        (torch.ones(3, 3, dtype=torch.int64), "floating-point"),
        (torch.tensor([[1.0, math.nan]]), "NaN or an infinity"),
        (torch.tensor([[1.0, -math.inf]]), "NaN or an infinity"),
    ],
    ids=["vector", "three axes", "no rows", "no columns", "integers", "NaN", "infinity"],
)
def test_estimators_reject_what_is_no_finite_matrix(estimator, x: Tensor, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        estimator(x)


@pytest.mark.parametrize("estimator", [spectral_entropy, effective_rank])
def test_an_unknown_spectrum_is_an_error(estimator) -> None:
    with pytest.raises(ValueError, match=r"spectrum must be.*'both'"):
        estimator(torch.eye(2), spectrum="both")


@pytest.mark.parametrize("transposed", [False, True])
def test_an_eigenvalue_counts_once_it_exceeds_the_rounding_of_the_trace(transposed: bool) -> None:
    for factor, counted in ((0.9, 1), (1.1, 2)):
        eigenvalue = factor * 16 * np.finfo(float).eps  # of 16 rows or columns, with a trace of 1
        x = torch.zeros(16, 2, dtype=torch.float64)
        x[0, 0], x[1, 1] = 1.0, math.sqrt(eigenvalue)
        assert eigenvalue_spectrum(x.T if transposed else x).count_nonzero() == counted


def test_a_centered_eigenvalue_counts_once_it_exceeds_the_rounding_of_the_subtraction() -> None:
    mean = 2.0**30
    rounding = (16 * np.finfo(float).eps) ** 2 * 16 * (2 * mean**2)  # of 16 rows with two dimensions off center
    turns = torch.tensor([1.0, -1.0], dtype=torch.float64)
    for factor, counted in ((0.9, 1), (1.1, 2)):
        small = math.sqrt(factor * rounding / 16)
        x = torch.stack(
            [mean + turns.repeat(8), torch.full((16,), mean), small * turns.repeat_interleave(8)], dim=1
        )
        assert eigenvalue_spectrum(x.double(), center=True).count_nonzero() == counted
