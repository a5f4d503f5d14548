"""The most recent training steps, and the spectrum of their rows."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from adadim_lightning.distributed import rank
from adadim_lightning.functional import eigenvalue_spectrum
from adadim_lightning.metrics.window import PendingSteps, RecentRows, Step, size_and_spread

from .distributed import Processes

centered_and_not = pytest.mark.parametrize("center", [False, True])


def drifting(n: int, d: int = 8) -> Tensor:
    """Rows whose spectrum changes on the way."""
    return torch.randn(n, d) * torch.linspace(0.1, 3, n)[:, None] ** torch.arange(d) + 0.5


def assert_spectrum_of(reading: tuple[Tensor, int, int], x: Tensor, *, center: bool) -> None:
    eigenvalues, rows, dim = reading
    assert (rows, dim) == x.shape
    expected = eigenvalue_spectrum(x, center=center)
    torch.testing.assert_close(eigenvalues, expected, rtol=1e-6, atol=1e-11 * expected.sum().item())


def read_by_steps(window: RecentRows, x: Tensor, *, step: int, steps_per_read: int) -> tuple[Tensor, int, int]:
    for i, batch in enumerate(x.split(step), start=1):
        window.update(batch)
        if i % steps_per_read == 0:
            window.read()
    return window.read()


@centered_and_not
@pytest.mark.parametrize(("size", "kept"), [(1000, 240), (240, 240), (120, 120), (100, 120), (1, 60)])
def test_the_window_holds_the_last_chunks_with_enough_rows(size: int, kept: int, center: bool) -> None:
    x = drifting(240)
    reading = read_by_steps(RecentRows(size, center=center), x, step=20, steps_per_read=3)
    assert_spectrum_of(reading, x[-kept:], center=center)


@centered_and_not
@pytest.mark.parametrize("step", [2, 20])
def test_a_window_with_fewer_rows_than_dimensions_a_step_is_exact(step: int, center: bool) -> None:
    x = drifting(6 * step)
    reading = read_by_steps(RecentRows(10_000, center=center), x, step=step, steps_per_read=1)
    assert_spectrum_of(reading, x, center=center)


@centered_and_not
@pytest.mark.parametrize(("rows", "d"), [(5, 8), (60, 8), (5, 4097), (1, 8)])
def test_size_and_spread_are_those_of_the_rows(rows: int, d: int, center: bool) -> None:
    x = torch.randn(rows, d) * 0.01 + 3
    window = RecentRows(10_000, center=center)
    for batch in x.split(2):
        window.update(batch)
        window.close()
    wide = x.double()
    size, spread = wide.square().mean().sqrt().item(), (wide - wide.mean(dim=0)).square().mean().sqrt().item()
    assert window.size_and_spread() == pytest.approx((size, spread), rel=1e-5, abs=1e-7)
    assert size_and_spread(x) == pytest.approx((size, spread), rel=1e-5, abs=1e-7)


def of_both(parts: list[Tensor]) -> list[tuple[float, float]]:
    window = RecentRows(10_000)
    window.update(parts[rank()])
    return [window.size_and_spread(), size_and_spread(parts[rank()])]


@pytest.mark.parametrize("counts", [(3, 5), (40, 9)])
def test_two_processes_see_size_and_spread_of_all_rows(counts: tuple[int, int], two_processes: Processes) -> None:
    x = drifting(sum(counts)).double()
    first, second = two_processes.run(of_both, list(x.float().split(list(counts))))
    assert first == second
    expected = x.square().mean().sqrt().item(), (x - x.mean(dim=0)).square().mean().sqrt().item()
    for found in first:
        assert found == pytest.approx(expected, rel=1e-5)


def test_reading_twice_changes_nothing() -> None:
    x = drifting(40)
    window = RecentRows(10)
    window.update(x)
    assert window.read() is window.read()
    window.update(x[:20])
    assert_spectrum_of(window.read(), x[:20], center=False)


@centered_and_not
def test_a_window_goes_on_from_its_checkpoint(center: bool) -> None:
    x = drifting(160)
    window = RecentRows(80, center=center)
    read_by_steps(window, x[:100], step=20, steps_per_read=2)
    resumed = RecentRows(80, center=center)
    resumed.load_state_dict(pickle.loads(pickle.dumps(window.state_dict())))
    for each in (window, resumed):
        assert_spectrum_of(read_by_steps(each, x[100:], step=20, steps_per_read=2), x[80:], center=center)


def test_a_checkpoint_is_a_snapshot() -> None:
    x = drifting(60)
    window = RecentRows(1000)
    window.update(x[:40])
    state = window.state_dict()
    window.update(x[40:])
    resumed = RecentRows(1000)
    resumed.load_state_dict(state)
    assert_spectrum_of(resumed.read(), x[:40], center=False)


def read_own_rows(window: RecentRows, rows: list[Tensor]) -> tuple[Tensor, int, int]:
    return read_by_steps(window, rows[rank()], step=20, steps_per_read=2)


@centered_and_not
def test_two_processes_read_the_same_spectrum_of_all_their_rows(center: bool, two_processes: Processes) -> None:
    rows = [drifting(80), drifting(80) + 1]
    first, second = two_processes.run(read_own_rows, RecentRows(1000, center=center), rows)
    assert torch.equal(first[0], second[0])
    assert_spectrum_of(first, torch.cat(rows), center=center)


def state_after(window: RecentRows, rows: list[Tensor]) -> dict[str, Any]:
    read_own_rows(window, rows)
    return window.state_dict()


def resumed(window: RecentRows, state: dict[str, Any], rows: list[Tensor]) -> list[tuple[Tensor, int, int]]:
    """What is read at once, and after more rows."""
    window.load_state_dict(state)
    return [window.read(), read_own_rows(window, rows)]


@pytest.mark.parametrize("dim", [8, 5000])
@pytest.mark.parametrize("window", [1000, 120])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2)])
def test_window_of_other_processes_goes_on_with_each_row_counted_once(
    before: int, after: int, window: int, dim: int, two_processes: Processes
) -> None:
    def on(count: int, function: Any, *args: Any) -> Any:
        return two_processes.run(function, *args)[0] if count == 2 else function(*args)

    early, late = torch.randn(160, dim), torch.randn(160, dim)
    state = on(before, state_after, RecentRows(window), list(early.chunk(before)))
    at_once, later = on(after, resumed, RecentRows(window), state, list(late.chunk(after)))
    # A chunk ends after two steps of twenty rows in each process.
    kept = early.chunk(before)
    chunks = [torch.cat([x[i : i + 40] for x in kept]) for i in range(0, len(kept[0]), 40)]
    assert_spectrum_of(at_once, last(chunks, window), center=False)
    parts = late.chunk(after)
    chunks += [torch.cat([x[i : i + 40] for x in parts]) for i in range(0, len(parts[0]), 40)]
    assert_spectrum_of(later, last(chunks, window), center=False)


def last(chunks: list[Tensor], window: int) -> Tensor:
    """The rows of the last chunks that are enough."""
    kept: list[Tensor] = []
    while chunks[len(kept) :] and sum(map(len, kept)) < window:
        kept.insert(0, chunks[-1 - len(kept)])
    return torch.cat(kept)


def test_reading_before_any_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="no row has arrived yet"):
        RecentRows(10).read()


CPU = torch.device("cpu")


def step(number: int, images: int = 16, value: float = 0.0) -> Step:
    """Two views whose entries tell the step."""
    views = [torch.full((images, d), number + value) for d in (3, 3, 2, 2)]
    return Step.of(number, views[:2], views[2:])


def nothing(number: int) -> Step:
    return Step(number, torch.zeros(0, 0), torch.zeros(0, 0), first=0)


def numbers(found: list[Any]) -> list[int]:
    return [measured.step.number for measured in found]


@pytest.mark.parametrize(
    ("window", "first_view", "kept"),
    [
        (96, False, [7, 8, 9]),
        (97, False, [6, 7, 8, 9]),
        (1, False, [9]),
        (33, True, [7, 8, 9]),
        (10**6, False, list(range(10))),
    ],
)
def test_the_newest_steps_that_fill_the_window_are_taken(window: int, first_view: bool, kept: list[int]) -> None:
    pending = PendingSteps(window, first_view=first_view)
    for number in range(10):
        pending.add(step(number))
    found, bad = pending.take(CPU)
    assert numbers(found) == kept
    assert (found[0].counts, found[0].images, bad) == ([32], [16], None)
    assert pending.take(CPU) == ([], None)  # each step once


def test_steps_without_rows_or_with_a_nan_are_left_out() -> None:
    pending = PendingSteps(1000)
    steps = [step(0), nothing(1), step(2, value=float("nan")), step(3), step(4, value=float("inf")), step(5)]
    for each in steps:
        pending.add(each)
    found, bad = pending.take(CPU)
    assert (numbers(found), bad) == ([0, 3, 5], 2)


def test_a_step_holds_its_rows_and_no_more() -> None:
    whole = torch.randn(8, 5)
    tokens = torch.randn(8, 100, 5)
    held = Step.of(0, list(whole.chunk(2)), [tokens[:4, 0], tokens[4:, 0]])
    assert held.r.data_ptr() == whole.data_ptr()  # no copy
    assert torch.equal(held.r, whole)
    assert held.z.untyped_storage().nbytes() == held.z.nbytes  # of the tokens, nothing else
    assert torch.equal(held.z, tokens[:, 0])
    for apart in (whole[:6].chunk(2), whole.chunk(2)[::-1], (whole[::2], whole[1::2])):
        r = Step.of(0, list(apart), list(apart)).r
        assert torch.equal(r, torch.cat(list(apart)))
        assert r.untyped_storage().nbytes() == r.nbytes
    views = held.views()
    assert torch.equal(views[0][1], whole[4:])
    assert torch.equal(views[1][0], tokens[:4, 0])


def taken(sizes: list[list[int]], window: int, first_view: bool) -> list[tuple[int, list[int]]]:
    """What is taken of steps that have so many images on this process; of none, the step cannot be read."""
    pending = PendingSteps(window, first_view=first_view)
    for number, images in enumerate(sizes):
        own = images[rank()]
        pending.add(step(number, abs(own), float("nan") if own < 0 else 0.0) if own else nothing(number))
    found, bad = pending.take(CPU)
    return [(measured.step.number, measured.counts) for measured in found] + [(-1, [bad])]


@pytest.mark.parametrize("first_view", [False, True])
def test_processes_take_the_same_steps_whatever_their_sizes(first_view: bool, two_processes: Processes) -> None:
    sizes = [[4, 4], [2, 9], [0, 4], [3, -3], [8, 1], [5, 5]]
    views = 1 if first_view else 2
    for window, kept in ((10**6, [0, 1, 4, 5]), (views * 19, [4, 5]), (views * 10, [5])):
        first, second = two_processes.run(taken, sizes, window, first_view)
        assert first == second
        assert first[:-1] == [(i, [2 * n for n in sizes[i]]) for i in kept]
        assert first[-1] == (-1, [3 if window > 100 else None]) or window < 100


def pending_state(sizes: list[int]) -> Any:
    pending = PendingSteps(1000)
    for number, images in enumerate(sizes):
        pending.add(step(number, images, value=rank() / 4) if images else nothing(number))
    return pickle.loads(pickle.dumps(pending.state_dict()))


def pending_resumed(state: Any) -> list[tuple[int, list[int], list[float], list[float]]]:
    pending = PendingSteps(1000)
    pending.load_state_dict(state)
    found, _ = pending.take(CPU)
    return [(m.step.number, m.counts, m.step.r[:, 0].tolist(), m.step.z[:, 0].tolist()) for m in found]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2), (1, 1)])
def test_steps_go_on_from_a_checkpoint_of_any_number_of_processes(
    before: int, after: int, two_processes: Processes
) -> None:
    sizes = [4, 0, 6]
    state = two_processes.run(pending_state, sizes)[0] if before == 2 else pending_state(sizes)
    found = two_processes.run(pending_resumed, state) if after == 2 else [pending_resumed(state)]
    for i, (number, images) in enumerate(((0, 4), (2, 6))):
        of_step = [process[i] for process in found]
        assert all(x[0] == number and x[1] == [2 * before * images // after] * after for x in of_step)
        # Each row once, and R and Z of one row on the same process; a view lies in a row with its images in order.
        rows = sorted(value for x in of_step for value in x[2])
        assert rows == sorted([number + process / 4 for process in range(before)] * 2 * images)
        assert all(x[2] == x[3] for x in of_step)


def read_uneven(window: int, sizes: list[list[int]], rows: list[Tensor]) -> tuple[Tensor, int, int]:
    recent = RecentRows(window)
    start = 0
    for step in sizes:
        total = sum(step)
        begin = start + sum(step[: rank()])
        recent.update(rows[0][begin : begin + step[rank()]], total)
        recent.close()
        start += total
    return recent.read()


def test_chunks_of_different_sizes_count_as_many_rows_as_they_have(two_processes: Processes) -> None:
    sizes = [[30, 2], [3, 20], [1, 40], [9, 9]]
    x = drifting(sum(map(sum, sizes)))
    for window, kept in ((1000, len(x)), (59, 59), (60, 82), (18, 18)):
        first, second = two_processes.run(read_uneven, window, sizes, [x])
        assert torch.equal(first[0], second[0])
        assert_spectrum_of(first, x[-kept:], center=False)
