"""The weighted nearest-neighbor vote against a plain numpy reference and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from adadim_lightning.functional import knn_predict


def clusters(n: int, *, classes: int = 5, d: int = 8, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Noisy rows around one direction per class, overlapping enough for the vote to matter."""
    labels = torch.randint(classes, (n,))
    return torch.eye(classes, d)[labels] + spread * torch.randn(n, d), labels


def unit(x: Tensor) -> np.ndarray:
    rows = x.double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def reference_prediction(x: Tensor, bank: Tensor, labels: Tensor, *, k: int, temperature: float) -> list[int]:
    predictions = []
    for similarity in unit(x) @ unit(bank).T:
        nearest = np.argsort(-similarity)[:k]
        votes = np.bincount(
            labels.numpy()[nearest], np.exp((similarity[nearest] - similarity.max()) / temperature)
        )
        predictions.append(int(votes.argmax()))
    return predictions


@pytest.mark.parametrize("k", [1, 5, 20, 200, 1000])
@pytest.mark.parametrize("temperature", [0.001, 0.07, 1.0])
def test_the_vote_equals_its_definition_also_with_more_neighbors_than_rows(k: int, temperature: float) -> None:
    (x, _), (bank, labels) = clusters(100), clusters(200)
    predicted = knn_predict(x, bank, labels, k=k, temperature=temperature)
    assert predicted.tolist() == reference_prediction(x, bank, labels, k=k, temperature=temperature)
    assert predicted.dtype == torch.int64


@pytest.mark.parametrize("k", [1, 7])
def test_the_vote_equals_that_of_scikit_learn(k: int) -> None:
    (x, _), (bank, labels) = clusters(100), clusters(200)
    peer = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    expected = peer.fit(bank.double(), labels).predict(x.double())
    assert knn_predict(x, bank, labels, k=k).tolist() == expected.tolist()


@pytest.mark.parametrize("chunk_size", [1, 7, 99, 1000])
def test_the_prediction_does_not_depend_on_the_chunk_size(chunk_size: int) -> None:
    (x, _), (bank, labels) = clusters(99), clusters(200)
    assert torch.equal(knn_predict(x, bank, labels, chunk_size=chunk_size), knn_predict(x, bank, labels))


def test_a_large_temperature_makes_the_vote_plain_and_a_small_one_follows_the_nearest() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.5], [0.9, -0.5]])
    labels = torch.tensor([2, 1, 1])
    x = torch.tensor([[1.0, 0.0]])
    assert knn_predict(x, bank, labels, k=3, temperature=100.0).tolist() == [1]
    assert knn_predict(x, bank, labels, k=3, temperature=0.01).tolist() == [2]


def test_a_far_row_still_follows_its_nearest_neighbor_at_a_small_temperature() -> None:
    bank, labels = torch.tensor([[-1.0, 0.0], [0.1, 1.0]]), torch.tensor([0, 3])
    assert knn_predict(torch.tensor([[1.0, 0.0]]), bank, labels, k=2, temperature=0.005).tolist() == [3]


def test_a_well_separated_bank_classifies_without_error() -> None:
    (x, target), (bank, labels) = clusters(200, spread=0.05), clusters(100, spread=0.05)
    assert torch.equal(knn_predict(x, bank, labels), target)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_vote_takes_any_floating_dtype(dtype: torch.dtype) -> None:
    (x, _), (bank, labels) = clusters(50), clusters(100)
    x, bank = x.to(dtype), bank.to(dtype)
    assert knn_predict(x, bank, labels).tolist() == reference_prediction(x, bank, labels, k=20, temperature=0.07)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_labels_may_be_of_any_integer_dtype(dtype: torch.dtype) -> None:
    (x, _), (bank, labels) = clusters(50), clusters(100)
    assert torch.equal(knn_predict(x, bank, labels.to(dtype)), knn_predict(x, bank, labels))


def test_the_vote_ignores_autocast_and_carries_no_gradient() -> None:
    (x, _), (bank, labels) = clusters(200), clusters(400)
    with torch.autocast("cpu", torch.bfloat16):
        inside = knn_predict(x.requires_grad_(), bank, labels)
    assert torch.equal(inside, knn_predict(x, bank, labels))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"x": torch.ones(3)}, r"x must have shape \(N, d\)"),
        ({"x": torch.ones(0, 2)}, r"x must have shape \(N, d\)"),
        ({"bank": torch.ones(0, 2)}, r"bank must have shape \(N, d\)"),
        ({"x": torch.full((3, 2), math.nan)}, "x holds a NaN or an infinity"),
        ({"bank": torch.full((2, 2), math.inf)}, "bank holds a NaN or an infinity"),
        ({"x": torch.ones(3, 5)}, r"x \(3, 5\) and bank \(2, 2\) do not fit together"),
        ({"bank_labels": torch.zeros(3, dtype=torch.int64)}, r"bank_labels \(3,\) do not fit together"),
        ({"k": 0}, "k must be an integer >= 1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_input_that_does_not_fit_is_an_error(change: dict, cause: str) -> None:
    arguments = {"x": torch.ones(3, 2), "bank": torch.eye(2), "bank_labels": torch.tensor([0, 1]), **change}
    with pytest.raises(ValueError, match=cause):
        knn_predict(**arguments)
