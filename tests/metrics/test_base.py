"""What all metrics have in common: torchmetrics' habits, processes, and the random sample of rows."""

import math
import pickle

import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric, MetricCollection, MetricTracker

from adadim_lightning.metrics import (
    Alignment,
    EffectiveRank,
    KNNAccuracy,
    MatrixEntropy,
    MatrixMutualInformation,
    Uniformity,
)
from adadim_lightning.metrics._base import RowSampleMetric

from .cases import CASES, DIM, Case, every_metric, joined, knn_accuracy, seen, stream
from .distributed import Processes, update_and_compute

SAMPLED = {
    "EffectiveRank": lambda max_rows, seed=0: EffectiveRank(max_rows=max_rows, seed=seed, max_dim=1),
    "MatrixEntropy": lambda max_rows, seed=0: MatrixEntropy(max_rows=max_rows, seed=seed),
    "Uniformity": lambda max_rows, seed=0: Uniformity(max_rows=max_rows, seed=seed),
}
every_sampled_metric = pytest.mark.parametrize("make", SAMPLED.values(), ids=SAMPLED.keys())
before_update = pytest.mark.filterwarnings("ignore:.*was called before the ``update``")


def numbered_rows(start: int, stop: int) -> Tensor:
    """Rows that carry their own number."""
    return torch.stack([torch.arange(start, stop), torch.ones(stop - start)], dim=1)


def numbers(sample: Tensor) -> list[int]:
    return sorted(int(row[0]) for row in sample)


@every_metric
def test_batches_give_what_one_pass_over_all_rows_gives(case: Case) -> None:
    batches = stream(case, [1, 30, 7, 2, 40])
    expected = seen(case.make(), [joined(batches)]).compute()
    torch.testing.assert_close(seen(case.make(), batches).compute(), expected, rtol=1e-4, atol=1e-6)


@every_metric
def test_the_result_is_a_finite_float32_scalar(case: Case) -> None:
    result = seen(case.make(), stream(case, [20])).compute()
    assert result.shape == ()
    assert result.dtype == torch.float32
    assert torch.isfinite(result)


@every_metric
def test_forward_returns_the_value_of_the_batch_and_accumulates(case: Case) -> None:
    batches = stream(case, [20, 5, 30])
    metric = case.make()
    for batch in batches:
        torch.testing.assert_close(metric(*batch), seen(case.make(), [batch]).compute())
    torch.testing.assert_close(metric.compute(), seen(case.make(), batches).compute())


@every_metric
def test_reset_forgets_all_rows(case: Case) -> None:
    first, second = stream(case, [20, 30])
    metric = seen(case.make(), [first])
    metric.compute()
    metric.reset()
    assert torch.equal(seen(metric, [second]).compute(), seen(case.make(), [second]).compute())


@every_metric
def test_a_result_is_not_a_stale_one(case: Case) -> None:
    batches = stream(case, [20, 30])
    metric = seen(case.make(), batches[:1])
    metric.compute()
    torch.testing.assert_close(seen(metric, batches[1:]).compute(), seen(case.make(), batches).compute())


@every_metric
@pytest.mark.parametrize("copy", [lambda metric: pickle.loads(pickle.dumps(metric)), Metric.clone])
def test_a_copy_holds_the_same_rows_and_goes_its_own_way(case: Case, copy) -> None:
    first, second = stream(case, [20, 9])
    metric = seen(case.make(), [first])
    copied = copy(metric)
    expected = metric.compute()
    assert torch.equal(copied.compute(), expected)
    seen(copied, [second])
    torch.testing.assert_close(copied.compute(), seen(case.make(), [first, second]).compute())
    metric._computed = None
    assert torch.equal(metric.compute(), expected)


@before_update
@every_metric
def test_a_persistent_metric_comes_back_from_its_state_dict(case: Case) -> None:
    metric = seen(case.make(), stream(case, [20, 9]))
    metric.persistent(True)
    restored = case.make()
    restored.persistent(True)
    restored.load_state_dict(metric.state_dict())
    assert torch.equal(restored.compute(), metric.compute())


@every_metric
def test_states_stay_out_of_the_state_dict_by_default(case: Case) -> None:
    assert not seen(case.make(), stream(case, [20])).state_dict()


@every_metric
def test_half_keeps_the_accuracy(case: Case) -> None:
    batches = stream(case, [20, 9, 30])
    metric = seen(case.make().half(), batches[:1])
    metric.half().to("cpu")
    assert torch.equal(seen(metric, batches[1:]).compute(), seen(case.make(), batches).compute())


@every_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_computed_in_full_precision(case: Case, dtype: torch.dtype) -> None:
    (batch,) = stream(case, [30])
    narrow = tuple(x.to(dtype) if x.is_floating_point() else x for x in batch)
    wide = tuple(x.float() if x.is_floating_point() else x for x in narrow)
    torch.testing.assert_close(
        seen(case.make(), [narrow]).compute(), seen(case.make(), [wide]).compute(), rtol=1e-5, atol=1e-6
    )


@every_metric
def test_autocast_does_not_change_the_result(case: Case) -> None:
    batches = stream(case, [20, 9])
    metric = case.make()
    with torch.autocast("cpu", torch.bfloat16):
        inside = seen(metric, batches).compute()
    assert torch.equal(inside, seen(case.make(), batches).compute())


@every_metric
def test_a_metric_moves_to_a_device_without_float64(case: Case) -> None:
    def refuse_float64(x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return x.clone()

    batches = stream(case, [20, 9])
    metric = seen(case.make()._apply(refuse_float64), batches[:1])
    metric._apply(refuse_float64)
    torch.testing.assert_close(seen(metric, batches[1:]).compute(), seen(case.make(), batches).compute())


@every_metric
def test_rows_carry_no_gradient(case: Case) -> None:
    batch = tuple(x.requires_grad_() if x.is_floating_point() else x for x in case.batch(20))
    metric = case.make()
    assert not metric(*batch).requires_grad
    assert not seen(metric, [batch]).compute().requires_grad


@every_metric
def test_a_later_change_of_the_batch_does_not_change_what_was_seen(case: Case) -> None:
    batch = case.batch(DIM - 1)
    metric = seen(case.make(), [batch])
    expected = seen(case.make(), [tuple(x.clone() for x in batch)])
    for x in batch:
        x.zero_()  # as a rectifier that works in place does
    torch.testing.assert_close(metric.compute(), expected.compute())


@every_metric
@pytest.mark.parametrize("action", ["update", "reset", "forward"])
def test_a_metric_used_in_inference_mode_goes_on_outside_it(case: Case, action: str) -> None:
    first, second = stream(case, [20, 30])
    metric = case.make()
    with torch.inference_mode():
        metric.update(*first) if action != "forward" else metric(*first)
        if action == "reset":
            metric.reset()
    before = [first] if action != "reset" else []
    torch.testing.assert_close(seen(metric, [second]).compute(), seen(case.make(), [*before, second]).compute())


@every_metric
def test_plot_draws_the_value_and_a_series_of_values(case: Case) -> None:
    metric = seen(case.make(), stream(case, [20]))
    for figure, axis in (metric.plot(), metric.plot([metric.compute(), metric.compute()])):
        assert isinstance(figure, plt.Figure)
        assert axis.lines
        plt.close(figure)


@before_update
@every_metric
def test_computing_before_any_update_is_an_error_that_says_so(case: Case) -> None:
    with pytest.raises(ValueError, match=r"needs at least one update\(\)"):
        case.make().compute()


def with_a_bad_entry(batch: tuple[Tensor, ...], value: float, which: int = 0) -> tuple[Tensor, ...]:
    batch[which][3, 2] = value
    return batch


@every_metric
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nan_or_infinity_is_an_error_of_compute_until_reset(case: Case, value: float) -> None:
    first, second, good = stream(case, [20, 20, 20])
    metric = seen(case.make(), [first, with_a_bad_entry(second, value), good])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"was updated with a NaN or an infinity; call reset\(\)"):
            metric.compute()
    metric.reset()
    assert torch.equal(seen(metric, [good]).compute(), seen(case.make(), [good]).compute())


@pytest.mark.parametrize("name", ["MatrixMutualInformation", "Alignment"])
def test_a_nan_in_the_second_input_is_an_error_too(name: str) -> None:
    metric = seen(CASES[name].make(), [with_a_bad_entry(CASES[name].batch(20), math.nan, which=1)])
    with pytest.raises(ValueError, match="NaN or an infinity"):
        metric.compute()


@every_metric
def test_forward_of_a_batch_with_a_nan_is_an_error_and_leaves_the_metric_as_it_was(case: Case) -> None:
    first, bad, last = stream(case, [20, 20, 9])
    metric = seen(case.make(), [first])
    with pytest.raises(ValueError, match="NaN or an infinity"):
        metric(*with_a_bad_entry(bad, math.nan))
    metric(*last)
    torch.testing.assert_close(metric.compute(), seen(case.make(), [first, last]).compute())


def test_forward_of_a_batch_without_a_value_leaves_the_rows_before_it() -> None:
    first, single = stream(CASES["Uniformity"], [20, 1])
    metric = seen(Uniformity(), [first])
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        metric(*single)
    assert torch.equal(metric.compute(), seen(Uniformity(), [first]).compute())


class HostReads(TorchDispatchMode):
    """Notes each operation for which the host waits for the value of a tensor."""

    WAITS = ("local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "allclose")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.host: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0].lstrip("_")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        # A count that is always on the CPU is read without a wait.
        if name in self.WAITS and not all(any(x is count for count in self.host) for x in tensors):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))

    def update(self, metric: Metric, batch: tuple[Tensor, ...]) -> None:
        self.host = [getattr(metric, name) for name in metric.host_states]
        metric.update(*batch)


@every_metric
def test_updates_read_nothing_from_the_device(case: Case) -> None:
    metric, batches = case.make(), stream(case, [3, 20, 5, 30])
    with HostReads() as reads:
        for batch in batches:
            reads.update(metric, batch)
    assert reads.seen == []
    with HostReads() as reads:  # what compute() reads is seen
        metric.compute()
    assert reads.seen


@pytest.mark.parametrize("make", [lambda: Uniformity(max_rows=4), lambda: EffectiveRank(max_dim=1, max_rows=4)])
def test_updates_of_a_full_sample_read_nothing_from_the_device(make) -> None:
    metric = make()
    with HostReads() as reads:
        for batch in stream(CASES["EffectiveRank"], [3, 20, 5]):
            reads.update(metric, batch)
    assert reads.seen == []


@every_sampled_metric
def test_forward_draws_the_sample_that_update_draws(make) -> None:
    batches = [(batch,) for batch in numbered_rows(0, 200).split(30)]
    called, updated = make(20), seen(make(20), batches)
    assert called.full_state_update is False
    for batch in batches:
        called(*batch)
    assert numbers(called.sample()) == numbers(updated.sample())
    assert int(called.seen) == int(updated.seen) == 200


@every_metric
def test_forward_synchronized_on_each_step_accumulates_as_well(case: Case) -> None:
    batches = stream(case, [20, 9])
    metric = case.make()
    metric.dist_sync_on_step = True
    for batch in batches:
        torch.testing.assert_close(metric(*batch), seen(case.make(), [batch]).compute())
    torch.testing.assert_close(metric.compute(), seen(case.make(), batches).compute())


@every_metric
def test_states_merge_as_metrics_do(case: Case) -> None:
    first, second = stream(case, [20, 9])
    metric, other = seen(case.make(), [first]), seen(case.make(), [second])
    metric.merge_state(dict(other.metric_state))
    torch.testing.assert_close(metric.compute(), seen(case.make(), [first, second]).compute())
    torch.testing.assert_close(other.compute(), seen(case.make(), [second]).compute())


def test_copies_of_an_accuracy_with_other_banks_share_no_counts() -> None:
    first = knn_accuracy(1)
    second, third = pickle.loads(pickle.dumps(first)), first.clone()
    (batch,) = stream(CASES["KNNAccuracy"], [40])
    second.set_bank(batch[0], batch[1])
    third.set_bank(batch[0], (batch[1] + 1) % 4)
    assert_alone_and_together_agree([first, second, third], [batch, batch])


def test_a_tracker_follows_the_best_of_metrics_with_a_direction() -> None:
    tracker = MetricTracker(knn_accuracy(1))
    for _ in range(3):
        tracker.increment()
        tracker.update(*CASES["KNNAccuracy"].batch(20))
    values = tracker.compute_all()
    best, step = tracker.best_metric(return_step=True)
    assert (best, step) == (pytest.approx(float(values.max())), int(values.argmax()))


COLLECTIONS = {
    "both spectra": lambda: [EffectiveRank(), EffectiveRank(spectrum="eigen"), EffectiveRank(center=True)],
    "all metrics of rows": lambda: [EffectiveRank(), MatrixEntropy(), Uniformity()],
    "orders": lambda: [MatrixEntropy(order=1), MatrixEntropy(order=3)],
    "sample sizes": lambda: [MatrixEntropy(max_rows=4), Uniformity(max_rows=40), MatrixEntropy(max_rows=5)],
    "sample sizes of wide rows": lambda: [EffectiveRank(max_dim=2, max_rows=n) for n in (5, 50)],
}


def assert_alone_and_together_agree(metrics: list[Metric], batches: list[tuple[Tensor, ...]]) -> None:
    named = {f"metric {i}": metric for i, metric in enumerate(metrics)}
    alone = {name: seen(metric.clone(), batches).compute() for name, metric in named.items()}
    collection = MetricCollection(named)
    for batch in batches:
        collection.update(*batch)
    torch.testing.assert_close(collection.compute(), alone)


@pytest.mark.parametrize("make", COLLECTIONS.values(), ids=COLLECTIONS.keys())
def test_metrics_in_a_collection_give_what_they_give_alone(make) -> None:
    assert_alone_and_together_agree(make(), stream(CASES["EffectiveRank"], [3, 30, 20]))


def test_informations_of_two_orders_share_a_collection() -> None:
    metrics = [MatrixMutualInformation(order=order) for order in (1, 2)]
    assert_alone_and_together_agree(metrics, stream(CASES["MatrixMutualInformation"], [3, 30, 20]))


def test_accuracies_of_different_numbers_of_neighbors_share_a_collection() -> None:
    assert_alone_and_together_agree([knn_accuracy(1), knn_accuracy(50)], stream(CASES["KNNAccuracy"], [1, 60, 50]))


def test_a_collection_can_be_called_reset_and_plotted() -> None:
    collection = MetricCollection([EffectiveRank(), Uniformity()], prefix="val/")
    (batch,) = CASES["EffectiveRank"].batch(20)
    values = collection(batch)
    assert values.keys() == {"val/EffectiveRank", "val/Uniformity"}
    torch.testing.assert_close(collection.compute(), values)
    plt.close(collection.plot(together=True)[0])
    collection.reset()
    torch.testing.assert_close(collection(batch), values)


@every_metric
@pytest.mark.parametrize(
    "sizes",
    [([3], [4]), ([30, 1], [5]), ([2], [20, 20, 9])],
    ids=["fewer rows than dimensions", "many and few", "few and many"],
)
def test_two_processes_give_what_one_gives_and_agree_bitwise(
    case: Case, sizes: tuple[list[int], list[int]], two_processes: Processes
) -> None:
    rounds = [[stream(case, by_rank) for by_rank in sizes] for _ in range(2)]
    results = two_processes.run(update_and_compute, case.make(), rounds)
    assert results[0] == results[1]
    alone = case.make()
    for result, (first, second) in zip(results[0], rounds, strict=True):
        torch.testing.assert_close(result, seen(alone, first + second).compute(), rtol=1e-4, atol=1e-5)


@every_metric
def test_a_process_without_any_row_leaves_the_result_to_the_other(case: Case, two_processes: Processes) -> None:
    batches = stream(case, [20, 9])
    for rounds in ([[batches, []]], [[[], batches]]):
        results = two_processes.run(update_and_compute, case.make(), rounds)
        assert results[0] == results[1]
        torch.testing.assert_close(results[0][0], seen(case.make(), batches).compute(), rtol=1e-4, atol=1e-5)


def sample_and_compute(metric: RowSampleMetric, rows_by_rank: list[Tensor]) -> tuple[Tensor, Tensor]:
    for batch in rows_by_rank[distributed.get_rank()].split(100):
        metric.update(batch)
    with metric.sync_context():
        sample = metric.sample()
    return sample, metric.compute()


@every_sampled_metric
def test_beyond_the_cap_all_processes_draw_the_same_sample_of_their_union(make, two_processes: Processes) -> None:
    results = two_processes.run(sample_and_compute, make(400), [numbered_rows(0, 3000), numbered_rows(3000, 4000)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    drawn = numbers(results[0][0])
    assert len(set(drawn)) == 400
    assert sum(number < 3000 for number in drawn) == pytest.approx(300, abs=40)
    assert pairs(results[0][0], apart=3000) == pytest.approx(1000 * (400 / 4000) ** 2, abs=15)


@every_sampled_metric
def test_the_sample_holds_every_row_until_it_is_full_and_never_more(make) -> None:
    metric = make(50)
    for start in range(0, 200, 10):
        metric.update(numbered_rows(start, start + 10))
        drawn = numbers(metric.sample())
        assert len(set(drawn)) == min(start + 10, 50)
        assert sum(map(len, metric.rows)) <= 50
    assert max(drawn) < 200


@every_sampled_metric
def test_a_batch_larger_than_the_sample_is_cut_to_it(make) -> None:
    assert len(set(numbers(seen(make(16), [(numbered_rows(0, 500),)]).sample()))) == 16


def test_every_row_is_as_likely_in_the_sample_as_any_other() -> None:
    rows, size, seeds = 500, 50, 300
    counts = torch.zeros(rows)
    for seed in range(seeds):
        metric = Uniformity(max_rows=size, seed=seed)
        for batch in numbered_rows(0, rows).split([3, 197, 40, 160, 100]):
            metric.update(batch)
        counts[numbers(metric.sample())] += 1
    share = size / rows
    chi_square = ((counts - seeds * share) ** 2).sum() / (seeds * share * (1 - share))
    assert chi_square.item() == pytest.approx(rows, abs=5 * math.sqrt(2 * rows))
    thirds = counts[:498].reshape(3, -1).sum(dim=1) / counts.sum()
    assert thirds.tolist() == pytest.approx([166 / rows] * 3, abs=0.02)


def pairs(sample: Tensor, apart: int) -> int:
    """How often both of two rows that lie so far apart were drawn."""
    drawn = set(numbers(sample))
    return sum(number + apart in drawn for number in drawn)


def test_batches_draw_their_rows_independently_of_each_other() -> None:
    together = 0
    for seed in range(50):
        metric = seen(Uniformity(max_rows=20, seed=seed), [(batch,) for batch in numbered_rows(0, 200).split(100)])
        together += pairs(metric.sample(), apart=100)
    assert together == pytest.approx(50 * 100 * (20 / 200) * (19 / 199), abs=35)


@every_sampled_metric
def test_the_sample_depends_on_the_seed_alone(make) -> None:
    samples = [numbers(seen(make(20, seed), [(numbered_rows(0, 200),)] * 2).sample()) for seed in (1, 1, 2)]
    assert samples[0] == samples[1]
    assert samples[0] != samples[2]


@every_sampled_metric
@pytest.mark.parametrize("max_rows", [1, 0, -5])
def test_a_sample_of_fewer_than_2_rows_is_an_error(make, max_rows: int) -> None:
    with pytest.raises(ValueError, match=f"max_rows must be >= 2, got {max_rows}"):
        make(max_rows)


@pytest.mark.parametrize("name", ["EffectiveRank", "EffectiveRank sampled", "MatrixEntropy", "Uniformity"])
@pytest.mark.parametrize(
    ("x", "cause"),
    [
        (torch.ones(3), r"x must have shape \(N, d\)"),
        (torch.ones(0, 12), r"x must have shape \(N, d\)"),
        (torch.ones(2, 12, dtype=torch.int64), "x must be a floating-point tensor"),
    ],
    ids=["vector", "no rows", "integers"],
)
def test_an_update_with_what_is_no_matrix_is_an_error(name: str, x: Tensor, cause: str) -> None:
    case = CASES[name]
    for metric in (case.make(), seen(case.make(), stream(case, [3])), seen(case.make(), stream(case, [30]))):
        with pytest.raises(ValueError, match=cause):
            metric.update(x)


@pytest.mark.parametrize("name", ["EffectiveRank", "EffectiveRank sampled", "MatrixEntropy", "Uniformity"])
@pytest.mark.parametrize("rows", [3, 30])
def test_an_update_of_another_width_is_an_error_until_reset(name: str, rows: int) -> None:
    metric = seen(CASES[name].make(), stream(CASES[name], [rows]))
    with pytest.raises(ValueError, match="x has 5 columns, but earlier updates had 12"):
        metric.update(torch.ones(2, 5))
    metric.reset()
    metric.update(torch.randn(4, 5))
    assert torch.isfinite(metric.compute())


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        (EffectiveRank, None),  # the best models have neither the highest rank
        (MatrixEntropy, None),
        (MatrixMutualInformation, None),  # nor the lowest information
        (Uniformity, False),
        (Alignment, False),
        (KNNAccuracy, True),
    ],
)
def test_metrics_say_in_which_direction_they_are_better(metric: type[Metric], direction: bool | None) -> None:
    assert metric.higher_is_better is direction
