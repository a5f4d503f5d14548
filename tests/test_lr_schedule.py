"""Warm-up and cosine at their fixed points."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from adadim_lightning.lr_schedule import warmup_cosine


def rates(steps: int, **options: float) -> list[float]:
    """Learning rate at each step, and after the last."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_cosine(optimizer, steps, **options)
    values = []
    for _ in range(steps + 1):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


def test_it_warms_up_in_a_line_and_falls_along_half_a_cosine() -> None:
    values = rates(100, warmup=0.1)
    assert values[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert values[10] == pytest.approx(2.0)
    assert values[55] == pytest.approx(1.0)
    assert values[100] == pytest.approx(0.0, abs=1e-12)
    assert all(later < earlier for earlier, later in pairwise(values[10:]))


def test_a_final_share_is_left_at_the_end_and_after_it() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_cosine(optimizer, 10, warmup=0.0, final=0.25)
    values = rates(10, warmup=0.0, final=0.25)
    assert values[0] == pytest.approx(2.0)
    assert values[5] == pytest.approx((2.0 + 0.5) / 2)
    assert values[10] == pytest.approx(0.5)
    for _ in range(15):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)


@pytest.mark.parametrize("warmup", [-0.1, 1.1])
def test_a_warmup_that_is_no_share_is_an_error(warmup: float) -> None:
    with pytest.raises(ValueError, match="warmup"):
        rates(10, warmup=warmup)


def test_a_single_step_is_taken_at_the_full_rate() -> None:
    assert rates(1)[0] == pytest.approx(2.0)
