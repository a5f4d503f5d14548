"""Streaming accuracy of the nearest-neighbor vote against its functional twin."""

import math

import pytest
import torch
from torch import Tensor

from adadim_lightning.functional import knn_predict
from adadim_lightning.metrics import KNNAccuracy

from .cases import DIM, joined, knn_accuracy, labeled, seen


@pytest.mark.parametrize("options", [{"k": 1}, {"k": 5, "temperature": 1.0}, {"k": 1000}, {"chunk_size": 3}])
def test_accuracy_equals_the_share_of_right_votes(options: dict) -> None:
    bank, labels = labeled(80)
    batches = [labeled(n) for n in (1, 30, 70)]
    metric = KNNAccuracy(**options)
    metric.set_bank(bank, labels)
    x, target = joined(batches)
    expected = (knn_predict(x, bank, labels, **options) == target).double().mean().item()
    assert seen(metric, batches).compute().item() == pytest.approx(expected)
    assert 0.3 < expected < 0.99


def test_reset_keeps_the_bank_and_a_new_bank_replaces_it() -> None:
    metric = KNNAccuracy(k=1)
    metric.set_bank(torch.eye(2), torch.tensor([0, 1]))
    batch = (torch.eye(2), torch.tensor([0, 1]))
    assert seen(metric, [batch]).compute() == 1
    metric.reset()
    assert seen(metric, [batch]).compute() == 1
    metric.reset()
    metric.set_bank(torch.eye(2), torch.tensor([1, 0]))
    assert seen(metric, [batch]).compute() == 0


def test_merged_accuracies_have_seen_the_rows_of_both() -> None:
    batches = [labeled(n) for n in (40, 9)]
    metric, other = (seen(knn_accuracy(), [batch]) for batch in batches)
    metric.merge_state(other)
    torch.testing.assert_close(metric.compute(), seen(knn_accuracy(), [joined(batches)]).compute())


def test_an_update_without_a_bank_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"call set_bank\(x, target\) first"):
        KNNAccuracy().update(*labeled(3))


@pytest.mark.parametrize(
    ("x", "target", "cause"),
    [
        (torch.ones(3, DIM), torch.zeros(4, dtype=torch.int64), r"target \(4,\) do not fit together"),
        (torch.ones(3, DIM), torch.zeros(3, 1, dtype=torch.int64), "do not fit together"),
        (torch.ones(3, DIM + 1), torch.zeros(3, dtype=torch.int64), "do not fit together"),
    ],
    ids=["rows", "axes", "columns"],
)
def test_input_that_does_not_fit_is_an_error(x: Tensor, target: Tensor, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        knn_accuracy().update(x, target)


@pytest.mark.parametrize(
    ("bank", "labels", "cause"),
    [
        (torch.full((3, DIM), math.nan), torch.zeros(3, dtype=torch.int64), "bank holds a NaN or an infinity"),
        (torch.ones(3, DIM), torch.tensor([0, 1, -1]), "bank_labels must be integers >= 0"),
        (torch.ones(3, DIM), torch.zeros(3), "bank_labels must be integers >= 0"),
        (torch.ones(3, DIM), torch.zeros(4, dtype=torch.int64), r"bank_labels \(4,\) do not fit together"),
    ],
)
def test_a_bank_that_cannot_be_compared_with_is_an_error_at_once(bank: Tensor, labels: Tensor, cause: str) -> None:
    metric = knn_accuracy()
    with pytest.raises(ValueError, match=cause):
        metric.set_bank(bank, labels)
    assert len(metric.bank) == 50
