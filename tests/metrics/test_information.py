"""Matrix entropy and mutual information of a stream against their functional twins."""

import math

import pytest
import torch
from torch import Tensor

from adadim_lightning.functional import matrix_entropy, matrix_mutual_information
from adadim_lightning.metrics import MatrixEntropy, MatrixMutualInformation

from .cases import joined, representation_and_embedding, rows, seen

orders = pytest.mark.parametrize("order", [0.5, 1, 2, 3])


@orders
def test_matrix_entropy_equals_its_functional_twin(order: float) -> None:
    batches = [rows(n) for n in (5, 30, 1)]
    expected = matrix_entropy(*joined(batches), order=order)
    torch.testing.assert_close(seen(MatrixEntropy(order=order), batches).compute(), expected)


@orders
def test_matrix_mutual_information_equals_its_functional_twin(order: float) -> None:
    batches = [representation_and_embedding(n) for n in (5, 30, 1)]
    expected = matrix_mutual_information(*joined(batches), order=order)
    torch.testing.assert_close(seen(MatrixMutualInformation(order=order), batches).compute(), expected)


def test_beyond_the_cap_entropy_is_that_of_the_sample() -> None:
    metric = seen(MatrixEntropy(max_rows=16), [rows(100), rows(50)])
    torch.testing.assert_close(metric.compute(), matrix_entropy(metric.sample()))
    assert metric.compute() <= math.log(16)


def test_beyond_the_cap_representation_and_embedding_stay_together() -> None:
    x = torch.eye(8)[torch.arange(200) % 8] + 0.01 * torch.randn(200, 8)
    metric = seen(MatrixMutualInformation(max_rows=32), [(batch, -batch) for batch in x.split(30)])
    r, z = metric.sample().split([8, 8], dim=1)
    assert torch.equal(z, -r)
    assert len(r) == 32
    torch.testing.assert_close(metric.compute(), matrix_mutual_information(r, z))


def test_information_may_be_negative_and_is_not_clamped() -> None:
    a = torch.cat([torch.zeros(10, dtype=torch.int64), torch.arange(1, 10)])
    b = torch.cat([torch.arange(10), torch.zeros(9, dtype=torch.int64)])
    metric = seen(MatrixMutualInformation(), [(torch.eye(10)[a], torch.eye(10)[b])])
    assert metric.compute().item() == pytest.approx(-0.55, abs=0.005)


@pytest.mark.parametrize("make", [MatrixEntropy, MatrixMutualInformation])
@pytest.mark.parametrize("order", [0, -1, math.nan, math.inf])
def test_an_order_that_is_not_finite_and_positive_is_an_error(make, order: float) -> None:
    with pytest.raises(ValueError, match="order must be"):
        make(order=order)


@pytest.mark.parametrize(
    ("r", "z", "cause"),
    [
        (torch.ones(3), torch.ones(3, 5), r"r must have shape \(N, d\)"),
        (torch.ones(3, 12), torch.ones(3), r"z must have shape \(N, d\)"),
        (torch.ones(3, 12), torch.ones(4, 5), "same number of rows, got 3 and 4"),
    ],
    ids=["r vector", "z vector", "rows"],
)
def test_input_that_does_not_fit_together_is_an_error(r: Tensor, z: Tensor, cause: str) -> None:
    for metric in (
        MatrixMutualInformation(),
        seen(MatrixMutualInformation(), [representation_and_embedding(4)]),
    ):
        with pytest.raises(ValueError, match=cause):
            metric.update(r, z)


def test_a_rejected_first_update_leaves_no_trace() -> None:
    metric = MatrixMutualInformation()
    with pytest.raises(ValueError, match="same number of rows"):
        metric.update(torch.ones(3, 7), torch.ones(4, 7))
    batch = representation_and_embedding(9)
    torch.testing.assert_close(seen(metric, [batch]).compute(), matrix_mutual_information(*batch))


@pytest.mark.parametrize(
    ("r", "z", "cause"),
    [
        (torch.ones(3, 11), torch.ones(3, 6), "r has 11 columns, but earlier updates had 12"),
        (torch.ones(3, 12), torch.ones(3, 6), "z has 6 columns, but earlier updates had 5"),
    ],
)
def test_an_update_of_other_widths_is_an_error_until_reset(r: Tensor, z: Tensor, cause: str) -> None:
    metric = seen(MatrixMutualInformation(), [representation_and_embedding(4)])
    with pytest.raises(ValueError, match=cause):
        metric.update(r, z)
    metric.reset()
    assert seen(metric, [(r, z)]).compute().item() == pytest.approx(0, abs=1e-5)
