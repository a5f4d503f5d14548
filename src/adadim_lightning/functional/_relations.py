"""NT-Xent and I_2(R;Z) in one go, with their gradients written out.

Both are made of the cosine Gram matrix of Z. Step by step, autograd would start some eighty small operations, for
which a GPU has to wait; here they are a third of that.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adadim_lightning.functional._numeric import no_autocast, unit_rows_and_lengths
from adadim_lightning.functional.contrastive import _nt_xent_of_gram
from adadim_lightning.functional.information import _gram_of_units, _renyi_information, cosine_gram


def nt_xent_and_information(r: Tensor, z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """NT-Xent of Z and I_2(R;Z) of 2N rows, the second view below the first.

    Args:
        r: representations, shape ``(2N, d_R)``, in float32 or wider.
        z: embeddings, shape ``(2N, d_Z)``, of the same dtype.
        temperature: of NT-Xent, > 0.

    Returns:
        Both in nats, differentiable; equal to :func:`nt_xent_loss` and :func:`matrix_mutual_information`.
    """
    uniformity, information = _Relations.apply(r, z, temperature)
    return uniformity, information


def _gradient(of_gram: Tensor, unit: Tensor, length: Tensor) -> Tensor:
    """Gradient at the rows, given a symmetric one at the Gram matrix, each entry of which counts once."""
    at_unit = 2 * of_gram @ unit
    along = torch.linalg.vecdot(at_unit, unit).unsqueeze(1)
    return torch.addcmul(at_unit, along, unit, value=-1).div_(length)


def _differentiable(
    r: Tensor, z: Tensor, temperature: float, of_uniformity: Tensor | None, of_information: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients at both inputs, by autograd."""
    gram_z, total = cosine_gram(z), z.new_zeros(())
    if of_uniformity is not None:
        total = total + of_uniformity * _nt_xent_of_gram(gram_z, temperature)
    if of_information is not None:
        total = total + of_information * _renyi_information(cosine_gram(r), gram_z, 2)
    return tuple(
        torch.autograd.grad(total, x, create_graph=True, allow_unused=True)[0] if x.requires_grad else None
        for x in (r, z)
    )


class _Saved(NamedTuple):
    """What the gradients are made of."""

    gram_r: Tensor
    unit_r: Tensor
    length_r: Tensor
    square_r: Tensor
    gram_z: Tensor
    unit_z: Tensor
    length_z: Tensor
    square_z: Tensor
    log_p: Tensor
    sums: Tensor


def _values(r: Tensor, z: Tensor, temperature: float) -> tuple[Tensor, Tensor, _Saved]:
    """NT-Xent and the information."""
    rows = len(z)
    unit_r, length_r = unit_rows_and_lengths(r)
    unit_z, length_z = unit_rows_and_lengths(z)
    gram_r, gram_z = _gram_of_units(unit_r), _gram_of_units(unit_z)
    log_p = (gram_z / temperature).fill_diagonal_(-math.inf).log_softmax(dim=1)
    positives = log_p.diagonal(rows // 2).sum() + log_p.diagonal(-(rows // 2)).sum()
    square_r, square_z = gram_r * gram_r, gram_z * gram_z
    joint = torch.dot(square_r.flatten(), square_z.flatten())
    sums = torch.stack([joint, square_r.sum(), square_z.sum()])
    logs = sums.log()
    saved = _Saved(gram_r, unit_r, length_r, square_r, gram_z, unit_z, length_z, square_z, log_p, sums)
    return -positives / rows, logs[0] - logs[1] - logs[2] + 2 * math.log(rows), saved


def _at_gram_r(saved: _Saved, of_information: Tensor) -> Tensor:
    """Gradient of the information at the Gram matrix of R, each of two equal entries having half of it."""
    joint, sum_r, _ = (2 * of_information / saved.sums).unbind()
    return (saved.square_z * joint - sum_r).mul_(saved.gram_r)


def _at_gram_z(
    saved: _Saved, temperature: float, of_uniformity: Tensor | None, of_information: Tensor | None
) -> Tensor | None:
    """Gradient of both at the Gram matrix of Z, likewise; made symmetric."""
    found = None
    if of_information is not None:
        joint, _, sum_z = (2 * of_information / saved.sums).unbind()
        found = (saved.square_r * joint - sum_z).mul_(saved.gram_z)
    if of_uniformity is not None:
        rows = len(saved.gram_z)
        p = saved.log_p.exp()
        p.diagonal(rows // 2).sub_(2)  # for both of a pair, which the next line tells the other
        p = (p + p.T).mul_(of_uniformity / (2 * rows * temperature))
        found = p if found is None else found.add_(p)
    return found


class _Relations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, r: Tensor, z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        uniformity, information, saved = _values(r, z, temperature)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(r, z, *saved)
        return uniformity, information

    @staticmethod
    def backward(ctx: Any, of_uniformity: Tensor | None, of_information: Tensor | None) -> Any:
        r, z, *rest = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants a second derivative
            return *_differentiable(r, z, ctx.temperature, of_uniformity, of_information), None
        saved, of_r, of_z = _Saved(*rest), None, None
        with no_autocast(z):
            if ctx.needs_input_grad[0] and of_information is not None:
                of_r = _gradient(_at_gram_r(saved, of_information), saved.unit_r, saved.length_r)
            if ctx.needs_input_grad[1]:
                at_gram = _at_gram_z(saved, ctx.temperature, of_uniformity, of_information)
                of_z = None if at_gram is None else _gradient(at_gram, saved.unit_z, saved.length_z)
        return of_r, of_z, None
