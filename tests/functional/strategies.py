"""Input for property tests: matrices of any shape, content, layout and dtype."""

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MOST = 40

CONTENTS = {
    "Gaussian": lambda n, d: torch.randn(n, d),
    "off center": lambda n, d: torch.randn(n, d) + 3,
    "decaying": lambda n, d: torch.randn(n, d) * torch.logspace(0, -2, d),
    "constant": lambda n, d: torch.randn(d).repeat(n, 1),
    "zero": lambda n, d: torch.zeros(n, d),
    "some rows zero": lambda n, d: torch.randn(n, d) * (torch.arange(n) % 2)[:, None],
    "some columns zero": lambda n, d: torch.randn(n, d) * (torch.arange(d) % 3 > 0),
    "rows twice": lambda n, d: torch.randn(n, d)[torch.arange(n) // 2],
    "rank one": lambda n, d: torch.outer(torch.randn(n), torch.randn(d)),
    "one hot": lambda n, d: torch.eye(d)[torch.arange(n) % d],
}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.T.contiguous().T,
    "every other column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "inner block": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1), value=9.0)[3:-1, 1:-2],
}
# A second view of the same images.
SECOND = {
    "near": lambda x: x + 0.3 * torch.randn(x.shape),
    "equal": lambda x: x.clone(),
    "opposite": lambda x: -x,
    "unrelated": lambda x: torch.randn(x.shape),
    "zero": lambda x: torch.zeros(x.shape),
}

seeds = st.integers(0, 2**16)
dtypes = st.sampled_from(DTYPES)


@st.composite
def matrices(
    draw: st.DrawFn,
    *,
    rows: tuple[int, int] = (1, MOST),
    columns: tuple[int, int] = (1, MOST),
    dtype: st.SearchStrategy[torch.dtype] = dtypes,
) -> Tensor:
    """One matrix ``(N, d)``."""
    n, d = draw(st.integers(*rows)), draw(st.integers(*columns))
    torch.manual_seed(draw(seeds))
    x = CONTENTS[draw(st.sampled_from(sorted(CONTENTS)))](n, d).to(draw(dtype))
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x)


@st.composite
def views(draw: st.DrawFn, *, dtype: st.SearchStrategy[torch.dtype] = dtypes) -> tuple[Tensor, Tensor]:
    """Two views of N >= 2 images, shape ``(N, d)``, perhaps of different dtypes."""
    x = draw(matrices(rows=(2, MOST), dtype=dtype))
    y = SECOND[draw(st.sampled_from(sorted(SECOND)))](x.float())
    return x, LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](y.to(draw(dtype)))


def no_matrices() -> st.SearchStrategy:
    """What is no floating-point matrix."""
    shapes = st.sampled_from([(), (3,), (2, 3, 4), (0, 3), (3, 0)])
    integers = st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64])
    return st.one_of(
        shapes.map(torch.ones),
        integers.map(lambda dtype: torch.ones(3, 3, dtype=dtype)),
        st.sampled_from([None, 1.0, "x", [[1.0, 2.0]], torch.ones(3, 3).numpy()]),
    )


@st.composite
def not_finite(
    draw: st.DrawFn, *, rows: tuple[int, int] = (2, MOST), columns: tuple[int, int] = (1, MOST)
) -> Tensor:
    """A matrix with a NaN or an infinity somewhere."""
    x = draw(matrices(rows=(2, MOST))).clone()
    i, j = draw(st.integers(0, len(x) - 1)), draw(st.integers(0, x.shape[1] - 1))
    x[i, j] = draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    return x


def refused(call, *args, **kwargs) -> str:
    """The one line with which a call refuses its input."""
    with pytest.raises((ValueError, TypeError)) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message
