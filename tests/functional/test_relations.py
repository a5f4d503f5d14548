"""NT-Xent and the information with gradients written out, against autograd through the functions of each."""

import pytest
import torch
from torch import Tensor

from adadim_lightning.functional import matrix_mutual_information, nt_xent_loss
from adadim_lightning.functional._relations import nt_xent_and_information

WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (0.7, -1.3)]


def rows(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    r, z = torch.randn(12, 7, dtype=dtype), torch.randn(12, 5, dtype=dtype)
    if kind == "zero rows":
        r[3], z[2], z[7] = 0, 0, 0
    elif kind == "all zero":
        z.zero_()
    elif kind == "collapsed":
        r, z = r[:1].repeat(12, 1), z[:1].repeat(12, 1)
    elif kind == "long and short":
        r, z = r * torch.logspace(-150, 150, 12, dtype=dtype)[:, None], z * 1e-200
    return r.requires_grad_(), z.requires_grad_()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", ["ordinary", "zero rows", "all zero", "collapsed", "long and short"])
def test_values_and_gradients_are_those_of_both_functions(kind: str, weights: tuple[float, float]) -> None:
    r, z = rows(kind)
    ours = nt_xent_and_information(r, z, 0.3)
    theirs = nt_xent_loss(*z.chunk(2), temperature=0.3), matrix_mutual_information(r, z)
    torch.testing.assert_close(ours, theirs)
    total, reference = (weights[0] * u + weights[1] * i for u, i in (ours, theirs))
    for mine, other in zip(*(torch.autograd.grad(x, (r, z)) for x in (total, reference)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12 * float(other.abs().max()) + 1e-15)


def test_gradients_are_those_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda r, z: nt_xent_and_information(r, z, 0.5), rows("ordinary"))


def test_what_nobody_differentiates_gets_no_gradient() -> None:
    r, z = rows("ordinary")
    uniformity, information = nt_xent_and_information(r, z, 0.3)
    assert torch.autograd.grad(uniformity, (r, z), retain_graph=True, allow_unused=True)[0] is None
    (alone,) = torch.autograd.grad(information, z, retain_graph=True)
    other = nt_xent_and_information(r.detach(), z, 0.3)[1]
    torch.testing.assert_close(torch.autograd.grad(other, z)[0], alone)
    (alone,) = torch.autograd.grad(information, r)
    other = nt_xent_and_information(r, z.detach(), 0.3)[1]
    torch.testing.assert_close(torch.autograd.grad(other, r)[0], alone)


def test_mixed_precision_stays_out_of_the_backward_pass() -> None:
    r, z = rows("ordinary", torch.float32)
    plain = torch.autograd.grad(sum(nt_xent_and_information(r, z, 0.3)), (r, z))
    total = sum(nt_xent_and_information(r, z, 0.3))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = torch.autograd.grad(total, (r, z))
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradients_that_can_be_differentiated_are_the_same(weights: tuple[float, float]) -> None:
    r, z = rows("ordinary")
    uniformity, information = nt_xent_and_information(r, z, 0.3)
    total = (weights[0] * uniformity if weights[0] else 0) + (weights[1] * information if weights[1] else 0)
    first, again = (
        torch.autograd.grad(total, (r, z), create_graph=whether, allow_unused=True, retain_graph=True)
        for whether in (False, True)
    )
    torch.testing.assert_close(again[1], first[1])
    if weights[1]:
        torch.testing.assert_close(again[0], first[0])
    else:
        assert again[0] is first[0] is None


@pytest.mark.parametrize("which", [0, 1])
def test_second_derivatives_are_right_too(which: int) -> None:
    r, z = rows("ordinary")
    assert torch.autograd.gradgradcheck(lambda r, z: nt_xent_and_information(r, z, 0.5)[which], (r[:6], z[:6]))
    assert torch.autograd.gradgradcheck(lambda z: nt_xent_and_information(r.detach(), z, 0.5)[which], z)
