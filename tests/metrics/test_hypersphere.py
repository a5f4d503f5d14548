"""Streaming alignment and uniformity against their functional twins."""

import pytest
import torch
from torch import Tensor

from adadim_lightning.functional import alignment, uniformity
from adadim_lightning.metrics import Alignment, Uniformity

from .cases import joined, rows, seen, two_views


@pytest.mark.parametrize("t", [0.5, 2.0])
def test_uniformity_equals_its_functional_twin(t: float) -> None:
    batches = [rows(n) for n in (1, 30, 8)]
    torch.testing.assert_close(seen(Uniformity(t=t), batches).compute(), uniformity(*joined(batches), t=t))


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_alignment_equals_its_functional_twin(alpha: float) -> None:
    batches = [two_views(n) for n in (1, 30, 8)]
    expected = alignment(*joined(batches), alpha=alpha)
    torch.testing.assert_close(seen(Alignment(alpha=alpha), batches).compute(), expected)


def test_beyond_the_cap_uniformity_is_that_of_the_sample() -> None:
    metric = seen(Uniformity(max_rows=16), [rows(100), rows(50)])
    torch.testing.assert_close(metric.compute(), uniformity(metric.sample()))


def test_alignment_keeps_its_accuracy_over_many_updates() -> None:
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    metric = seen(
        Alignment(), [(torch.eye(2).repeat(50_000, 1), -torch.eye(2).repeat(50_000, 1)), *[(x, y)] * 1000]
    )
    assert metric.compute().item() == pytest.approx((4 * 100_000 + 0.8 * 1000) / 101_000, rel=1e-6)


def test_merged_alignments_have_seen_the_rows_of_both() -> None:
    batches = [two_views(n) for n in (4, 9)]
    metric, other = (seen(Alignment(), [batch]) for batch in batches)
    metric.merge_state(other)
    torch.testing.assert_close(metric.compute(), alignment(*joined(batches)))


def test_the_uniformity_of_a_single_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        seen(Uniformity(), [rows(1)]).compute()


@pytest.mark.parametrize(
    ("x", "y", "cause"),
    [
        (torch.ones(3), torch.ones(3), r"x must have shape \(N, d\)"),
        (torch.ones(0, 3), torch.ones(0, 3), r"x must have shape \(N, d\)"),
        (torch.ones(3, 2), torch.ones(3, 4), r"same shape, got \(3, 2\) and \(3, 4\)"),
        (torch.ones(3, 2), torch.ones(4, 2), "same shape"),
    ],
    ids=["vectors", "empty", "columns", "rows"],
)
def test_views_that_do_not_fit_are_an_error(x: Tensor, y: Tensor, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        Alignment().update(x, y)
