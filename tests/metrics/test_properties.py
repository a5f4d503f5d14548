"""What holds for every metric and any stream: its functional twin, any split, merging, copies, refusals."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import Metric

from adadim_lightning.functional import (
    alignment,
    effective_rank,
    knn_predict,
    matrix_entropy,
    matrix_mutual_information,
    uniformity,
)
from adadim_lightning.metrics import (
    Alignment,
    EffectiveRank,
    KNNAccuracy,
    MatrixEntropy,
    MatrixMutualInformation,
    Uniformity,
)
from adadim_lightning.metrics._base import RowSampleMetric

from ..functional.strategies import DTYPES, no_matrices, not_finite, refused, views

pytestmark = pytest.mark.filterwarnings("ignore:.*was called before the ``update``")
BANK = torch.randn(30, 40, generator=torch.Generator().manual_seed(3)), torch.arange(30) % 4


class Twins(NamedTuple):
    """A metric, how many views it takes, and the function that gives its value for all rows at once."""

    make: Callable[[], Metric]
    views: int
    function: Callable[..., Tensor]


def twins(metric, function, views: int = 1, **options) -> Twins:
    return Twins(partial(metric, **options), views, partial(function, **options))


TWINS = {
    **{
        f"EffectiveRank, {spectrum}, {'centered' if center else 'as is'}": twins(
            EffectiveRank, effective_rank, spectrum=spectrum, center=center
        )
        for spectrum in ("singular", "eigen")
        for center in (False, True)
    },
    "EffectiveRank, sampled": Twins(partial(EffectiveRank, max_dim=1), 1, effective_rank),
    **{f"MatrixEntropy, {q}": twins(MatrixEntropy, matrix_entropy, order=q) for q in (0.5, 1, 2)},
    **{
        f"MatrixMutualInformation, {q}": twins(MatrixMutualInformation, matrix_mutual_information, 2, order=q)
        for q in (1, 2)
    },
    "Uniformity": twins(Uniformity, uniformity, t=3.0),
    "Alignment": twins(Alignment, alignment, 2, alpha=1.0),
}
SAMPLED = {
    "EffectiveRank": (partial(EffectiveRank, max_dim=0), effective_rank),
    "MatrixEntropy": (MatrixEntropy, matrix_entropy),
    "Uniformity": (Uniformity, uniformity),
}


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Two views of images cut into batches, perhaps of one row, and a place between batches."""
    x, y = draw(views())
    places = sorted(draw(st.sets(st.integers(1, len(x) - 1), max_size=4)))
    batches = list(zip(x.tensor_split(places), y.tensor_split(places), strict=True))
    return batches, draw(st.integers(0, len(batches)))


def seen(twin: Twins, batches: list[tuple[Tensor, Tensor]], metric: Metric | None = None) -> Metric:
    metric = metric or twin.make()
    for batch in batches:
        metric.update(*batch[: twin.views])
    return metric


def assert_same(name: str, metric: Metric, expected: Tensor) -> None:
    torch.testing.assert_close(
        metric.compute().double(),
        expected.double(),
        rtol=1e-4,
        atol=2e-5,
        msg=lambda message: f"{name}: {message}",
    )


@given(streams())
def test_however_the_rows_are_split_the_metric_is_its_function_of_all_rows(stream) -> None:
    batches, _ = stream
    whole = [torch.cat(view) for view in zip(*batches, strict=True)]
    for name, twin in TWINS.items():
        assert_same(name, seen(twin, batches), twin.function(*whole[: twin.views]))
        assert_same(name, seen(twin, batches[::-1]), twin.function(*whole[: twin.views]))


@given(streams())
def test_two_merged_metrics_are_one_that_has_seen_all_rows(stream) -> None:
    batches, place = stream
    for name, twin in TWINS.items():
        first, second = seen(twin, batches[:place]), seen(twin, batches[place:])
        kept = copy.deepcopy(second)
        first.merge_state(second)
        assert_same(name, first, seen(twin, batches).compute())
        torch.testing.assert_close(second.metric_state, kept.metric_state, rtol=0, atol=0)


@given(streams())
def test_a_copy_in_the_middle_of_a_stream_ends_where_the_original_does(stream) -> None:
    batches, place = stream
    for name, twin in TWINS.items():
        metric = seen(twin, batches[:place])
        for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.clone()):
            assert torch.equal(seen(twin, batches[place:], other).compute(), seen(twin, batches).compute()), name
        metric.reset()
        assert torch.equal(seen(twin, batches, metric).compute(), seen(twin, batches).compute()), name


@given(streams())
def test_a_state_dict_brings_a_metric_back(stream) -> None:
    batches, _ = stream
    for name, twin in TWINS.items():
        metric = seen(twin, batches)
        metric.persistent(True)
        restored = twin.make()
        restored.persistent(True)
        restored.load_state_dict(metric.state_dict())
        assert torch.equal(restored.compute(), metric.compute()), name


@given(streams(), st.integers(2, 20))
def test_beyond_its_size_a_sample_is_that_many_of_the_rows_and_the_value_is_theirs(stream, size: int) -> None:
    batches, _ = stream
    rows = {tuple(row.tolist()) for x, _ in batches for row in x}
    count = sum(len(x) for x, _ in batches)
    for name, (make, function) in SAMPLED.items():
        metric = make(max_rows=size)
        assert isinstance(metric, RowSampleMetric)
        for x, _ in batches:
            metric.update(x)
        sample = metric.sample()
        assert len(sample) == min(size, count), name
        assert {tuple(row.tolist()) for row in sample} <= rows, name
        assert_same(name, metric, function(sample))


@given(streams(), no_matrices())
def test_a_refused_update_leaves_the_metric_as_it_was(stream, bad) -> None:
    batches, place = stream
    for name, twin in TWINS.items():
        metric = seen(twin, batches[:place])
        refused(metric.update, *[bad] * twin.views)
        assert torch.equal(seen(twin, batches[place:], metric).compute(), seen(twin, batches).compute()), name


@given(streams(), not_finite())
def test_an_update_with_a_nan_or_infinity_is_an_error_of_compute(stream, bad) -> None:
    batches, _ = stream
    for name, twin in TWINS.items():
        metric = seen(twin, [(bad, bad)])
        refused(metric.compute)
        metric.reset()
        assert torch.equal(seen(twin, batches, metric).compute(), seen(twin, batches).compute()), name


@given(streams(), st.integers(1, 20), st.sampled_from(DTYPES))
def test_accuracy_is_the_share_of_right_votes_of_all_rows(stream, k: int, dtype: torch.dtype) -> None:
    batches, place = stream
    d = batches[0][0].shape[1]
    bank, labels = BANK[0][:, :d].to(dtype), BANK[1]
    metrics = [KNNAccuracy(k=k), KNNAccuracy(k=k)]
    hits = total = 0
    for metric, part in zip(metrics, (batches[:place], batches[place:]), strict=True):
        metric.set_bank(bank, labels)
        for x, _ in part:
            target = torch.arange(len(x)) % 4
            metric.update(x, target)
            hits += int((knn_predict(x, bank, labels, k=k) == target).sum())
            total += len(x)
    metrics[0].merge_state(metrics[1])
    for metric in (metrics[0], pickle.loads(pickle.dumps(metrics[0])), copy.deepcopy(metrics[0])):
        assert metric.compute().item() == pytest.approx(hits / total)
