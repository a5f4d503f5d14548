"""Schedules at their fixed points, and what the balance remembers."""

import math

import pytest

from adadim_lightning import (
    Balance,
    ConstantSchedule,
    CosineSchedule,
    EffectiveRankSchedule,
    LinearSchedule,
    Statistics,
    StepSchedule,
)


def measured(er_z: float = 16.0, rows: int = 4096, dim_z: int = 64) -> Statistics:
    return Statistics(er_z=er_z, er_r=20.0, i_rz=0.5, rows=rows, dim_r=32, dim_z=dim_z)


@pytest.mark.parametrize(
    ("schedule", "start", "half", "end"),
    [
        (ConstantSchedule(0.3), 0.3, 0.3, 0.3),
        (LinearSchedule(), 0.0, 0.5, 1.0),
        (LinearSchedule(0.8, 0.2), 0.8, 0.5, 0.2),
        (CosineSchedule(), 0.0, 0.5, 1.0),
        (CosineSchedule(1.0, 0.4), 1.0, 0.7, 0.4),
        (StepSchedule(), 0.0, 1.0, 1.0),
        (StepSchedule([0.1, 0.6, 0.9], [0.4, 0.8]), 0.1, 0.6, 0.9),
    ],
    ids=repr,
)
def test_schedules_pass_through_their_start_middle_and_end(schedule, start, half, end) -> None:
    for progress, value in ((0.0, start), (0.5, half), (1.0, end)):
        assert schedule(progress, None) == pytest.approx(value, abs=1e-12)
        assert schedule(progress, measured()) == pytest.approx(value, abs=1e-12)


def test_the_cosine_is_slow_at_both_ends_and_the_line_is_straight() -> None:
    assert CosineSchedule()(0.25, None) == pytest.approx(math.sin(math.pi / 8) ** 2)
    assert CosineSchedule()(0.1, None) + CosineSchedule()(0.9, None) == pytest.approx(1)
    assert LinearSchedule()(0.1, None) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule(), StepSchedule()], ids=repr)
def test_a_schedule_over_the_training_needs_its_length(schedule) -> None:
    with pytest.raises(ValueError, match=rf"{type(schedule).__name__} needs the length .*max_epochs"):
        schedule(math.nan, None)


@pytest.mark.parametrize("schedule", [ConstantSchedule(0.5), EffectiveRankSchedule()], ids=repr)
def test_a_schedule_that_ignores_progress_works_without_a_length(schedule) -> None:
    assert 0 <= schedule(math.nan, measured()) <= 1


@pytest.mark.parametrize(
    ("normalizer", "rows", "alpha"),
    [("dim", 4096, 0.25), ("dim", 32, 0.25), ("min", 4096, 0.25), ("min", 32, 0.5), (20, 32, 0.8), (8.0, 32, 1.0)],
)
def test_alpha_is_the_effective_rank_over_the_normalizer(normalizer, rows: int, alpha: float) -> None:
    assert EffectiveRankSchedule(normalizer)(0.0, measured(rows=rows)) == pytest.approx(alpha)


def test_the_papers_batch_of_256_cannot_lift_alpha_above_one_eighth() -> None:
    paper = EffectiveRankSchedule("dim")
    assert paper(0.5, measured(er_z=256.0, rows=256, dim_z=2048)) == 0.125


def test_alpha_is_kept_between_its_caps_and_starts_where_it_is_told() -> None:
    schedule = EffectiveRankSchedule(start=0.4, alpha_min=0.3, alpha_max=0.6)
    assert schedule(0.9, None) == 0.4
    assert schedule(0.0, measured(er_z=1.0)) == 0.3
    assert schedule(0.0, measured(er_z=64.0)) == 0.6


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ConstantSchedule(1.2), "value"),
        (lambda: LinearSchedule(-0.1, 1.0), "start"),
        (lambda: CosineSchedule(0.0, 2.0), "end"),
        (lambda: StepSchedule([0.0, 3.0], [0.5]), "values"),
        (lambda: StepSchedule([0.0, 1.0], []), "milestones"),
        (lambda: StepSchedule([0.0, 0.5, 1.0], [0.6, 0.4]), "rising milestones"),
        (lambda: EffectiveRankSchedule("rows"), "normalizer"),
        (lambda: EffectiveRankSchedule(0), "normalizer"),
        (lambda: EffectiveRankSchedule(start=2), "start"),
        (lambda: EffectiveRankSchedule(alpha_min=0.6, alpha_max=0.5), "alpha_min"),
        (lambda: EffectiveRankSchedule(fallback=0.5), "fallback"),
        (lambda: Balance(LinearSchedule(), lag_epochs=-1), "lag_epochs"),
        (lambda: Balance(LinearSchedule(), LinearSchedule(), lag_epochs=1), "coupled beta"),
        (lambda: Balance(LinearSchedule(), every_n_steps=0), "every_n_steps"),
        (lambda: Balance(LinearSchedule(), window=0), "window"),
        (lambda: Balance(LinearSchedule(), views="second"), "views"),
        (lambda: Balance(LinearSchedule(), ema=1.0), "ema"),
    ],
)
def test_a_setting_outside_its_range_is_named(make, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize("er_z", [1.0, 1.49, math.nan, math.inf])
def test_while_z_is_collapsed_alpha_follows_the_fallback_within_the_caps(er_z: float) -> None:
    schedule = EffectiveRankSchedule(start=0.1, alpha_max=0.6, fallback=LinearSchedule())
    assert [schedule(progress, measured(er_z=er_z)) for progress in (0.25, 0.5, 1.0)] == [0.25, 0.5, 0.6]
    assert schedule(0.25, None) == 0.1


def test_a_rank_that_is_well_is_followed_whether_there_is_a_fallback_or_not() -> None:
    for er_z in (1.5, 3.0, 40.0):
        with_one = EffectiveRankSchedule(fallback=ConstantSchedule(0.5))(0.3, measured(er_z=er_z))
        assert with_one == EffectiveRankSchedule()(0.3, measured(er_z=er_z)) == er_z / 64


def test_without_a_fallback_a_collapsed_z_takes_alpha_down() -> None:
    assert EffectiveRankSchedule()(0.9, measured(er_z=1.0)) == 1 / 64


def test_an_estimate_that_is_not_finite_does_not_stay_in_the_running_mean() -> None:
    balance = Balance(EffectiveRankSchedule(fallback=ConstantSchedule(0.5)), ema=0.9)
    alphas = []
    for er_z in (32.0, math.nan, 16.0):
        balance.observe(measured(er_z=er_z))
        alphas.append(balance(0.5, 0)[0])
    assert alphas == [0.5, 0.5, 0.25]


def test_the_first_estimate_starts_the_running_mean_and_later_ones_enter_it() -> None:
    balance = Balance(EffectiveRankSchedule(64.0, start=0.1), ema=0.9)
    assert balance(0.0, 0) == (0.1, 0.1)
    balance.observe(measured(er_z=32.0))
    assert balance(0.0, 0)[0] == pytest.approx(0.5)
    balance.observe(measured(er_z=16.0, rows=99))
    assert balance(0.0, 0)[0] == pytest.approx((0.9 * 32 + 0.1 * 16) / 64)
    balance.observe(measured(er_z=8.0))
    assert balance.statistics is not None
    assert balance.statistics.er_z == pytest.approx(0.9 * (0.9 * 32 + 0.1 * 16) + 0.1 * 8)


def test_without_a_running_mean_the_last_estimate_counts() -> None:
    balance = Balance(EffectiveRankSchedule(64.0), ema=0.0)
    for er_z in (32.0, 16.0):
        balance.observe(measured(er_z=er_z))
        assert balance(0.0, 0)[0] == pytest.approx(er_z / 64)


def test_beta_follows_alpha_by_default_and_a_schedule_of_its_own_if_given() -> None:
    assert Balance(LinearSchedule())(0.3, 1) == pytest.approx((0.3, 0.3))
    assert Balance(LinearSchedule(), ConstantSchedule(1.0))(0.3, 1) == pytest.approx((0.3, 1.0))
    assert Balance(LinearSchedule(), lambda progress, _: -2 * progress)(0.3, 1) == pytest.approx((0.3, -0.6))


def test_a_lagged_phase_is_the_alpha_that_closed_the_epoch_k_before() -> None:
    steps, lag = 4, 2
    balance = Balance(LinearSchedule(), lag_epochs=lag)
    for epoch in range(6):
        for step in range(steps):
            progress = (epoch * steps + step) / (6 * steps)
            alpha, phase = balance(progress, epoch)
            assert alpha == pytest.approx(progress)
            last = ((epoch - lag) * steps + steps - 1) / (6 * steps)
            assert phase == pytest.approx(last if epoch >= lag else 0.0)


def test_a_schedule_may_be_any_callable_of_progress_and_statistics() -> None:
    balance = Balance(lambda progress, statistics: 0.1 if statistics is None else statistics.i_rz * progress)
    assert balance(0.5, 0)[0] == 0.1
    balance.observe(measured())
    assert balance(0.5, 0)[0] == pytest.approx(0.25)
    assert measured().h_r == pytest.approx(math.log(20))


@pytest.mark.parametrize("wrong", [-0.5, 1.5, math.nan])
def test_a_callable_that_leaves_the_unit_interval_is_named(wrong: float) -> None:
    def runaway(progress: float, statistics: Statistics | None) -> float:
        return wrong

    with pytest.raises(ValueError, match=r"runaway.*\[0, 1\]"):
        Balance(runaway)(0.5, 0)


def sequence(balance: Balance, epochs: range) -> list[tuple[float, float]]:
    """What six epochs of three steps give, with an estimate in each."""
    values = []
    for epoch in epochs:
        for step in range(3):
            values.append(balance(epoch / 6, epoch))
            if step == 1:
                balance.observe(measured(er_z=5.0 + 7 * epoch))
    return values


def test_a_balance_goes_on_from_its_state_as_if_nothing_had_happened() -> None:
    def make() -> Balance:
        return Balance(EffectiveRankSchedule(), lag_epochs=1, ema=0.7)

    whole = sequence(make(), range(6))
    first, second = make(), make()
    begun = sequence(first, range(3))
    state = first.state_dict()
    sequence(first, range(3, 6))  # the state is a copy
    second.load_state_dict(state)
    assert begun + sequence(second, range(3, 6)) == whole
    assert len(set(whole)) > 6
    fresh = make()
    fresh.load_state_dict(make().state_dict())
    assert sequence(fresh, range(6)) == whole


def test_a_lagged_beta_goes_on_from_a_checkpoint() -> None:
    balance = Balance(LinearSchedule(), lag_epochs=1)
    balance(0.1, 0)
    resumed = Balance(LinearSchedule(), lag_epochs=1)
    resumed.load_state_dict(balance.state_dict())
    assert resumed(0.6, 1) == (0.6, 0.1)


def test_a_lagged_beta_that_starts_late_has_the_present_for_a_past() -> None:
    assert Balance(LinearSchedule(), lag_epochs=2)(0.5, 5) == (0.5, 0.5)


def test_a_beta_schedule_sees_what_was_measured() -> None:
    balance = Balance(ConstantSchedule(0.2), beta=lambda progress, statistics: statistics.er_z)  # type: ignore[union-attr]
    balance.observe(Statistics(er_z=7.0, er_r=2.0, i_rz=0.1, rows=10, dim_r=4, dim_z=8))
    assert balance(0.0, 0) == (0.2, 7.0)
