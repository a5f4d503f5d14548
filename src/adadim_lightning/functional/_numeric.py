"""Numerical house rules that every function here follows: full precision, checked input."""

import math
import numbers
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """``x`` itself if it is float32 or wider, otherwise its float32 copy."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def float64_device(device: torch.device) -> torch.device:
    """Where float64 work on tensors of ``device`` runs: Apple's MPS has none, so there the CPU does it."""
    return torch.device("cpu") if device.type == "mps" else device


def to_float64(x: Tensor) -> Tensor:
    """Float64 copy of ``x``, on its own device where that is possible."""
    # Moved first, then widened: a device without float64 cannot widen on the way.
    return x.to(float64_device(x.device)).to(torch.float64)


def like(value: Tensor, x: Tensor) -> Tensor:
    """A result computed in float64, in the dtype that results on ``x`` have and on the device of ``x``."""
    return value.to(full_precision(x).dtype).to(x.device)


def unit_rows(x: Tensor) -> Tensor:
    """Rows of unit length, in float32 or wider; a zero row has no direction and stays zero."""
    return unit_rows_and_lengths(x)[0]


def unit_rows_and_lengths(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit length, and what they were divided by, shape ``(N, 1)``: 1 for a zero row, which stays zero."""
    x = full_precision(x)
    # Divided by its largest entry first: the squares of a very long or short row would leave the range of float32.
    largest = x.detach().abs().amax(dim=1, keepdim=True)
    largest = largest + (largest == 0)
    x = x / largest
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    norm = norm + (norm == 0)
    return x / norm, largest * norm


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Context in which mixed precision does not narrow the arithmetic on ``x``."""
    # Where a device knows no mixed precision, there is none to switch off (MPS before torch 2.5).
    known = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if known else nullcontext()


def check_number(name: str, value: object, *, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise ValueError unless ``value`` is a finite number in ``[low, high]``."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and low <= value <= high):  # type: ignore[arg-type,operator]
        wanted = (
            f"lie in [{low:g}, {high:g}]"
            if high < math.inf
            else "be a finite number" + (f" >= {low:g}" if low > -math.inf else "")
        )
        raise ValueError(f"{name} must {wanted}, got {value!r}")


def check_positive(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a finite number above zero."""
    check_number(name, value)
    if not value > 0:  # type: ignore[operator]
        raise ValueError(f"{name} must be > 0, got {value!r}")


def check_integer(name: str, value: object, *, low: int) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``low``."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")


def check_bool(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


def check_tensor(x: object, name: str = "x") -> None:
    """Raise TypeError unless ``x`` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def check_matrix(x: Tensor, name: str = "x", *, finite: bool = True) -> None:
    """Raise ValueError unless ``x`` is a non-empty ``(N, d)`` floating tensor (without NaN and infinity)."""
    check_tensor(x, name)
    if x.ndim != 2 or x.numel() == 0:
        raise ValueError(f"{name} must have shape (N, d) with N, d >= 1, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if finite and not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} holds a NaN or an infinity")


def check_views(x1: Tensor, x2: Tensor, names: tuple[str, str] = ("z1", "z2")) -> None:
    """Raise ValueError unless both views are ``(N, d)`` with the same N >= 2 and d; forces no device sync."""
    check_matrix(x1, names[0], finite=False)
    check_matrix(x2, names[1], finite=False)
    if x1.shape != x2.shape:
        raise ValueError(
            f"both views must have the same shape, got {names[0]} {tuple(x1.shape)} "
            f"and {names[1]} {tuple(x2.shape)}"
        )
    if len(x1) < 2:
        raise ValueError(f"a batch needs at least 2 images, got {len(x1)}; raise the batch size")
