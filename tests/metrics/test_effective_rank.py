"""Streaming effective rank against one pass over all rows."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, distributed

from adadim_lightning.functional import effective_rank, eigenvalue_spectrum
from adadim_lightning.functional.spectrum import Spectrum
from adadim_lightning.metrics import EffectiveRank, Uniformity

from .distributed import Processes

both_spectra = pytest.mark.parametrize("spectrum", ["singular", "eigen"])
centered_and_not = pytest.mark.parametrize("center", [False, True])


def decaying(n: int, d: int) -> Tensor:
    return torch.randn(n, d) * torch.logspace(0, -2, d) + 0.5


def uneven(x: Tensor, parts: int) -> list[Tensor]:
    """Batches of different numbers of rows, none empty."""
    cuts = torch.randperm(len(x) - 1)[: parts - 1].add(1).sort().values
    return list(x.tensor_split(cuts))


def after(batches: list[Tensor], **options) -> EffectiveRank:
    metric = EffectiveRank(**options)
    for batch in batches:
        metric.update(batch)
    return metric


def state_size(metric: EffectiveRank) -> int:
    return sum(
        state.numel() if isinstance(state, Tensor) else sum(x.numel() for x in state)
        for state in metric.metric_state.values()
    )


@both_spectra
@centered_and_not
@pytest.mark.parametrize("shape", [(40, 100), (500, 24), (64, 64), (11, 200)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_ten_uneven_batches_equal_one_pass_over_all_rows(
    shape: tuple[int, int], spectrum: Spectrum, center: bool, dtype: torch.dtype
) -> None:
    x = decaying(*shape).to(dtype)
    metric = after(uneven(x, 10), spectrum=spectrum, center=center)
    assert metric.compute().item() == pytest.approx(
        effective_rank(x, spectrum=spectrum, center=center).item(), rel=1e-4
    )
    torch.testing.assert_close(
        metric.eigenvalues(),
        eigenvalue_spectrum(x, center=center),
        rtol=1e-6,
        atol=1e-12 * x.double().square().sum(),
    )
    assert metric.num_rows == shape[0]
    assert metric.dim == shape[1]


@centered_and_not
def test_rows_fed_one_at_a_time_equal_one_pass(center: bool) -> None:
    x = decaying(100, 9)
    metric = after(list(x.split(1)), center=center)
    for _ in range(2):
        assert metric.compute().item() == pytest.approx(effective_rank(x, center=center).item(), rel=1e-4)


def test_computing_between_updates_changes_nothing() -> None:
    x = decaying(100, 16)
    metric = EffectiveRank()
    for stop, batch in zip(range(10, 101, 10), x.split(10), strict=True):
        metric.update(batch)
        assert metric.compute().item() == pytest.approx(effective_rank(x[:stop]).item(), rel=1e-4)


def test_the_state_does_not_grow_with_the_number_of_rows() -> None:
    d = 16
    metric = EffectiveRank()
    for _ in range(200):
        metric.update(torch.randn(7, d))
        assert state_size(metric) <= 2 * d * d + d + 16
    assert metric.num_rows == 1400


@both_spectra
@pytest.mark.parametrize("shape", [(3000, 32), (40, 64)])
def test_a_huge_mean_is_centered_away(shape: tuple[int, int], spectrum: Spectrum) -> None:
    x = torch.randn(shape, dtype=torch.float64) * torch.linspace(1, 0.3, shape[1]) + 1e4
    rows = x.numpy()
    values = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** (1 if spectrum == "singular" else 2)
    p = values[values > 1e-9 * values.sum()] / values.sum()
    metric = after(uneven(x, 10), spectrum=spectrum, center=True)
    assert metric.compute().item() == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-4)


@both_spectra
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
@pytest.mark.parametrize("shape", [(300, 16), (10, 64)])
def test_a_constant_stream_has_effective_rank_1(shape: tuple[int, int], value: float, spectrum: Spectrum) -> None:
    x = value * torch.linspace(1, 2, shape[1]).expand(shape)
    for center in (False, True):
        metric = after(uneven(x, 10), spectrum=spectrum, center=center)
        assert metric.compute().item() == pytest.approx(1, abs=1e-6)


def test_rank_1_rows_in_float32_have_effective_rank_1() -> None:
    x = torch.randn(1000, 1) @ torch.randn(1, 64)
    assert after(uneven(x, 10)).compute().item() == pytest.approx(1, abs=1e-4)


@both_spectra
def test_the_effective_rank_of_isotropic_rows_is_never_above_their_dimension(spectrum: Spectrum) -> None:
    metric = after([torch.eye(64)] * 10, spectrum=spectrum)
    assert metric.compute().item() == pytest.approx(64, rel=1e-6)
    assert metric.compute() <= 64


@centered_and_not
@pytest.mark.parametrize("left", [0, 3, 100])
@pytest.mark.parametrize("right", [0, 5, 60])
def test_a_merged_metric_has_seen_the_rows_of_both(left: int, right: int, center: bool) -> None:
    x = decaying(left + right + 4, 16)
    metric = after([x[:left]] if left else [], center=center)
    other = after([x[left : left + right]] if right else [], center=center)
    metric.merge_state(other)
    metric.update(x[left + right :])
    assert metric.compute().item() == pytest.approx(effective_rank(x, center=center).item(), rel=1e-4)
    assert metric.num_rows == len(x)
    assert other.num_rows == right
    if right:
        assert other.compute().item() == pytest.approx(
            effective_rank(x[left : left + right], center=center).item(), rel=1e-4
        )


def test_a_merge_renews_the_result() -> None:
    x = decaying(60, 16)
    metric = after([x[:30]])
    metric.compute()
    metric.merge_state(after([x[30:]]))
    assert metric.compute().item() == pytest.approx(effective_rank(x).item(), rel=1e-4)


def test_merged_samples_hold_all_rows_until_they_are_full() -> None:
    x = decaying(60, 16)
    metric, other = after([x[:30]], max_dim=8, max_rows=50), after([x[30:40]], max_dim=8, max_rows=50)
    metric.merge_state(other)
    assert metric.compute().item() == pytest.approx(effective_rank(x[:40]).item(), rel=1e-4)
    metric.merge_state(after([x[40:]], max_dim=8, max_rows=50))
    assert metric.num_rows == 60
    assert len(metric.sample()) == 50


def test_only_an_effective_rank_of_the_same_width_can_be_merged() -> None:
    metric = after([torch.eye(4)])
    with pytest.raises(ValueError, match="only another EffectiveRank can be merged, got Uniformity"):
        metric.merge_state(Uniformity())
    with pytest.raises(ValueError, match="rows of 5 dimensions with rows of 4"):
        metric.merge_state(after([torch.eye(5)]))


@pytest.mark.parametrize(("mine", "other"), [(8, 4096), (4096, 8)])
def test_moments_and_a_sample_cannot_be_merged_silently(mine: int, other: int) -> None:
    metric = after([decaying(30, 16)], max_dim=mine)
    with pytest.raises(ValueError, match="max_dim"):
        metric.merge_state(after([decaying(30, 16)], max_dim=other))


@both_spectra
@centered_and_not
def test_rows_wider_than_max_dim_are_exact_while_they_fit_the_sample(spectrum: Spectrum, center: bool) -> None:
    x = decaying(50, 64)
    metric = after(uneven(x, 10), max_dim=63, max_rows=50, spectrum=spectrum, center=center)
    assert not metric.scatter.numel()
    assert metric.compute().item() == pytest.approx(
        effective_rank(x, spectrum=spectrum, center=center).item(), rel=1e-4
    )


def test_rows_wider_than_max_dim_are_sampled_beyond_it() -> None:
    x = decaying(1000, 64)
    metric = after(uneven(x, 10), max_dim=63, max_rows=200)
    assert metric.num_rows == 1000
    assert state_size(metric) <= 200 * 65 + 16
    assert metric.compute().item() == pytest.approx(effective_rank(metric.sample()).item(), rel=1e-5)
    assert metric.compute().item() == pytest.approx(effective_rank(x).item(), rel=0.05)
    torch.testing.assert_close(metric.eigenvalues(), eigenvalue_spectrum(metric.sample()))


def test_rows_as_wide_as_max_dim_keep_moments() -> None:
    assert after([decaying(100, 16)], max_dim=16).scatter.shape == (16, 16)


def eigenvalues_and_compute(metric: EffectiveRank, rows: list[Tensor]) -> tuple[Tensor, Tensor, int, Tensor]:
    for batch in rows[distributed.get_rank()].split(7):
        metric.update(batch)
    local_rows = metric.num_rows
    eigenvalues, rank = metric.eigenvalues(), metric.compute()
    metric.update(torch.ones(1, rows[0].shape[1]))
    return eigenvalues, rank, local_rows, metric.compute()


@centered_and_not
@pytest.mark.parametrize("max_dim", [4096, 8])
@pytest.mark.parametrize("counts", [(3, 5), (2, 200), (100, 9), (50, 51)])
def test_two_processes_see_the_spectrum_of_all_rows(
    counts: tuple[int, int], max_dim: int, center: bool, two_processes: Processes
) -> None:
    rows = list(decaying(sum(counts), 16).split(list(counts)))
    metric = EffectiveRank(center=center, max_dim=max_dim)
    first, second = two_processes.run(eigenvalues_and_compute, metric, rows)
    x = torch.cat(rows)
    for mine, other in zip(first[:2], second[:2], strict=True):
        assert torch.equal(mine, other)
    torch.testing.assert_close(
        first[0], eigenvalue_spectrum(x, center=center), rtol=1e-6, atol=1e-12 * x.double().square().sum()
    )
    assert first[1].item() == pytest.approx(effective_rank(x, center=center).item(), rel=1e-4)
    assert (first[2], second[2]) == counts
    expected = effective_rank(torch.cat([x, torch.ones(2, 16)]), center=center).item()
    assert first[3].item() == second[3].item() == pytest.approx(expected, rel=1e-4)


def test_eigenvalues_before_any_update_are_an_error() -> None:
    metric = EffectiveRank()
    with pytest.raises(ValueError, match=r"needs at least one update\(\)"):
        metric.eigenvalues()
    assert metric.dim is None
    assert metric.num_rows == 0


def test_an_unknown_spectrum_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"spectrum must be.*'both'"):
        EffectiveRank(spectrum="both")
