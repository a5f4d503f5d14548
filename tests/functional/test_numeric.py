"""The house rules: precision, unit rows, and one clear line for bad input."""

import math
import re

import pytest
import torch

from adadim_lightning.functional._numeric import (
    check_bool,
    check_integer,
    check_matrix,
    check_number,
    check_positive,
    check_tensor,
    check_views,
    float64_device,
    full_precision,
    like,
    no_autocast,
    to_float64,
    unit_rows,
    unit_rows_and_lengths,
)


@pytest.mark.parametrize(
    ("dtype", "full"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_full_precision_is_float32_or_what_is_wider(dtype: torch.dtype, full: torch.dtype) -> None:
    x = torch.tensor([[0.5, -3.0]], dtype=dtype)
    assert full_precision(x).dtype == full
    assert full_precision(x).tolist() == x.tolist()
    assert (full_precision(x) is x) == (dtype == full)
    assert to_float64(x).dtype == torch.float64
    assert to_float64(x).tolist() == x.tolist()
    assert like(to_float64(x), x).dtype == full


def test_only_a_device_without_float64_leaves_its_work_to_the_cpu() -> None:
    assert float64_device(torch.device("mps")) == torch.device("cpu")
    for device in (torch.device("cpu"), torch.device("cuda", 1), torch.device("meta")):
        assert float64_device(device) == device
    meta = torch.ones(2, device="meta")
    assert to_float64(meta).device == meta.device
    assert like(torch.ones(2), meta).device == meta.device


def test_unit_rows_have_length_1_at_any_scale_and_zero_rows_stay_zero() -> None:
    x = torch.tensor([[3.0, -4.0], [3e-30, -4e-30], [3e30, -4e30], [0.0, 0.0], [0.0, -0.01]])
    expected = torch.tensor([[0.6, -0.8]] * 3 + [[0.0, 0.0], [0.0, -1.0]])
    rows, lengths = unit_rows_and_lengths(x)
    torch.testing.assert_close(rows, expected)
    assert torch.equal(unit_rows(x), rows)
    divisors = torch.tensor([5.0, 5e-30, 5e30, 1.0, 0.01])[:, None]
    torch.testing.assert_close(lengths, divisors, rtol=1e-6, atol=0.0)
    assert unit_rows(x.half()[:1]).dtype == torch.float32


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_unit_rows_have_the_right_gradient(scale: float) -> None:
    x = (scale * torch.randn(4, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(unit_rows, x, eps=1e-6 * scale)


def test_mixed_precision_does_not_narrow_where_it_is_switched_off() -> None:
    x = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with no_autocast(x):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_a_device_that_knows_no_mixed_precision_needs_none_switched_off() -> None:
    with no_autocast(torch.ones(2, device="meta")) as nothing:
        assert nothing is None


@pytest.mark.parametrize(
    ("value", "limits"),
    [
        (0, {}),
        (-1e9, {}),
        (0, {"low": 0}),
        (7, {"low": 0}),
        (2, {"low": 1, "high": 2}),
        (1.0, {"low": 1, "high": 2}),
    ],
)
def test_a_number_within_its_limits_passes(value: float, limits: dict) -> None:
    check_number("lr", value, **limits)


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (math.nan, {}, "lr must be a finite number, got nan"),
        (math.inf, {}, "lr must be a finite number, got inf"),
        ("1", {}, "lr must be a finite number, got '1'"),
        (True, {}, "lr must be a finite number, got True"),
        (-math.inf, {"low": 0}, "lr must be a finite number >= 0, got -inf"),
        (-0.5, {"low": 0}, "lr must be a finite number >= 0, got -0.5"),
        (2.5, {"low": 0, "high": 2}, "lr must lie in [0, 2], got 2.5"),
        (-1, {"low": 0, "high": 2}, "lr must lie in [0, 2], got -1"),
        (None, {"low": 0, "high": 2}, "lr must lie in [0, 2], got None"),
    ],
)
def test_a_number_outside_its_limits_is_refused_in_one_line(value: object, limits: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_number("lr", value, **limits)


@pytest.mark.parametrize("value", [5e-324, 0.5, 1, 1e300])
def test_a_positive_number_passes(value: float) -> None:
    check_positive("t", value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "t must be > 0, got 0"),
        (-0.5, "t must be > 0, got -0.5"),
        (math.nan, "t must be a finite number, got nan"),
        (math.inf, "t must be a finite number, got inf"),
        ("1", "t must be a finite number, got '1'"),
    ],
)
def test_what_is_no_positive_number_is_refused_in_one_line(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_positive("t", value)


def test_an_integer_is_neither_a_float_nor_true_nor_too_small() -> None:
    check_integer("k", 1, low=1)
    check_integer("k", 9, low=1)
    for value in (0, -1, 1.0, "1", True, None):
        with pytest.raises(ValueError, match=f"k must be an integer >= 1, got {value!r}"):
            check_integer("k", value, low=1)


def test_only_true_and_false_are_true_or_false() -> None:
    check_bool("center", True)
    check_bool("center", False)
    for value in (0, 1, "true", None):
        with pytest.raises(ValueError, match=f"center must be true or false, got {value!r}"):
            check_bool("center", value)


def test_only_a_tensor_is_a_tensor() -> None:
    check_tensor(torch.ones(()))
    with pytest.raises(TypeError, match="labels must be a tensor, got list"):
        check_tensor([1], "labels")


def test_a_matrix_may_be_of_one_entry_and_infinite_where_nobody_minds() -> None:
    check_matrix(torch.ones(1, 1))
    check_matrix(torch.tensor([[math.nan, math.inf]]), finite=False)
    for shape in [(0, 3), (3, 0), (3,), (1, 1, 1)]:
        with pytest.raises(ValueError, match=re.escape(f"shape (N, d) with N, d >= 1, got {shape}")):
            check_matrix(torch.ones(shape))
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="x holds a NaN or an infinity"):
            check_matrix(torch.tensor([[1.0, bad], [1.0, 1.0]]))


def test_two_views_are_two_images_or_more_and_may_hold_anything() -> None:
    check_views(torch.full((2, 1), math.nan), torch.full((2, 1), math.inf))
    with pytest.raises(ValueError, match=r"same shape, got r1 \(2, 1\) and r2 \(2, 2\)"):
        check_views(torch.ones(2, 1), torch.ones(2, 2), ("r1", "r2"))
    with pytest.raises(ValueError, match="at least 2 images, got 1; raise the batch size"):
        check_views(torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"z2 must have shape \(N, d\)"):
        check_views(torch.ones(2, 2), torch.ones(2))
    with pytest.raises(ValueError, match=r"z1 must have shape \(N, d\)"):
        check_views(torch.ones(2), torch.ones(2, 2))
