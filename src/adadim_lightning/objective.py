"""The AdaDim objective: decorrelation, uniformity and information, mixed by alpha and beta."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

from adadim_lightning.distributed import gather_rows, world_size
from adadim_lightning.functional._numeric import (
    check_bool,
    check_number,
    check_positive,
    check_views,
    full_precision,
    no_autocast,
)
from adadim_lightning.functional._relations import nt_xent_and_information
from adadim_lightning.functional.contrastive import _nt_xent_of_gram
from adadim_lightning.functional.decorrelation import Reduction, _barlow_twins_parts, _vicreg_parts
from adadim_lightning.functional.information import _renyi_information, cosine_gram

_GRADIENT_SCALE = 1024.0
# Comparing the gradients takes as long as the losses' backward pass, and their ratio moves slowly.
MATCH_EVERY, MATCH_WEIGHT = 10, 0.3
KAPPA_LIMIT = 100.0  # where Z has collapsed, uniformity has next to no gradient, and the ratio would explode

Decorrelation = Literal["vicreg", "barlow_twins"]


class StepCount:
    """Count of training steps, every tenth of which compares gradients.

    Attributes:
        calls: the count, on the device.
        step: identity of the training step, which an optimizer such as SAM or L-BFGS runs several times: its runs
            count once, and all have the kappa of the first; None where nobody tells, and each call counts.
    """

    calls: Tensor
    step: object | None = None
    _counted: object | None = None
    _calls = 0  # the same, where it can be read without a sync

    def _is_due(self) -> bool:
        """Count the step, and return whether it compares gradients."""
        if self.step is not None and self.step is self._counted:
            return False
        self._counted = self.step
        due = self._calls % MATCH_EVERY == 0
        self._calls += 1
        self.calls.fill_(self._calls)
        return due


class ObjectiveOutput(NamedTuple):
    """What :class:`AdaDimLoss` returns.

    Attributes:
        total: differentiable scalar to minimize.
        parts: unweighted parts, detached: ``decorrelation`` and its ``invariance``, ``variance`` and
            ``covariance`` (of Barlow Twins ``invariance`` and ``redundancy``), ``uniformity``, ``information``
            (nats).
        weighted: what ``decorrelation``, ``uniformity`` and ``information`` contribute to the total, detached.
    """

    total: Tensor
    parts: dict[str, Tensor]
    weighted: dict[str, Tensor]


class AdaDimLoss(StepCount, nn.Module):
    r"""Feature decorrelation and sample uniformity in the proportion alpha, and an information regularizer.

    .. math::
        L = (1 - \alpha)\, L_\text{VICReg}(Z_1, Z_2) + \alpha \kappa\, L_\text{NT-Xent}(Z_1, Z_2)
            + \beta\, I_q(R; Z), \qquad \beta = \gamma\, \phi

    with phase :math:`\phi = \alpha` unless :meth:`set_balance` says otherwise. With alpha 0 and gamma 0 this is
    VICReg, with alpha 1, gamma 0 and kappa 1 it is SimCLR. The cosine Gram matrix of Z serves both NT-Xent and
    the information. Across processes every part is computed on the global batch.

    Args:
        alpha: share of uniformity to begin with, in ``[0, 1]``.
        gamma: scale of the information regularizer; positive minimizes I(R;Z), negative maximizes it.
        kappa: factor on NT-Xent that brings both losses to comparable size; ``"match"`` keeps the norms of
            their gradients at Z equal, by a running estimate of every tenth step, and at most 100; a step whose
            gradients overflow is left out.
        temperature: of NT-Xent, > 0.
        order: Renyi order q of the information; any but 2 costs three eigen-decompositions a step.
        information_floor: nats below which a positive gamma does not reward a lower information any more; None
            for no floor.
        decorrelation: ``"vicreg"``, or ``"barlow_twins"`` in its place.
        redundancy_weight: Barlow Twins' lambda.
        invariance_weight: VICReg's lambda.
        variance_weight: VICReg's mu.
        covariance_weight: VICReg's nu.
        eps: keeps VICReg's square root differentiable.
        halve_variance: average VICReg's variance part over the views, as its authors' code does, instead of
            summing it, as its paper does.
        invariance_reduction: over dimensions; ``"mean"`` as in VICReg's code or ``"sum"`` as in its paper.

    Raises:
        ValueError: alpha outside ``[0, 1]``; temperature, order, kappa or eps <= 0; a weight < 0; an unknown
            decorrelation; or anything that is not a finite number.

    Source: Kokilepersaud et al., "AdaDim", arXiv 2505.12576, whose form is ``AdaDimLoss(alpha=0, gamma=0.1,
    kappa=1, information_floor=None)``; the defaults are ours.

    Example:
        >>> loss = AdaDimLoss(alpha=0.5)
        >>> r, z = torch.randn(4, 8, 16), torch.randn(4, 8, 32)
        >>> sorted(loss(r[0], r[1], z[0], z[1]).weighted)
        ['decorrelation', 'information', 'uniformity']
    """

    alpha: Tensor
    beta: Tensor
    kappa: Tensor
    gradient_norms: Tensor

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        gamma: float = 1.0,
        kappa: float | Literal["match"] = "match",
        temperature: float = 0.2,
        order: float = 2.0,
        information_floor: float | None = 0.0,
        decorrelation: Decorrelation = "vicreg",
        redundancy_weight: float = 0.005,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        eps: float = 1e-4,
        halve_variance: bool = False,
        invariance_reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        check_positive("order", order)
        check_number("gamma", gamma)
        check_number("invariance_weight", invariance_weight, low=0)
        check_number("variance_weight", variance_weight, low=0)
        check_number("covariance_weight", covariance_weight, low=0)
        check_number("redundancy_weight", redundancy_weight, low=0)
        if information_floor is not None:
            check_number("information_floor", information_floor)
        check_bool("halve_variance", halve_variance)
        check_positive("eps", eps)
        if invariance_reduction not in ("mean", "sum"):
            raise ValueError(f'invariance_reduction must be "mean" or "sum", got {invariance_reduction!r}')
        if decorrelation not in ("vicreg", "barlow_twins"):
            raise ValueError(f'decorrelation must be "vicreg" or "barlow_twins", got {decorrelation!r}')
        self.match_gradients = kappa == "match"
        if kappa != "match" and not (isinstance(kappa, int | float) and 0 < kappa < math.inf):
            raise ValueError(f'kappa must be a finite number > 0 or "match", got {kappa!r}')
        self.gamma = gamma
        self.temperature = temperature
        self.order = order
        self.information_floor = information_floor
        self.decorrelation: Decorrelation = decorrelation
        self.weights = {
            "vicreg": {
                "invariance": invariance_weight,
                "variance": variance_weight,
                "covariance": covariance_weight,
            },
            "barlow_twins": {"invariance": 1.0, "redundancy": redundancy_weight},
        }[decorrelation]
        self.eps = eps
        self.halve_variance = halve_variance
        self.invariance_reduction: Reduction = invariance_reduction
        self.register_buffer("alpha", torch.tensor(0.0))
        self.register_buffer("beta", torch.tensor(0.0))
        self.register_buffer("kappa", torch.tensor(1.0 if kappa == "match" else float(kappa)))
        # Running norms at Z of the gradients of decorrelation and uniformity, for kappa="match".
        self.register_buffer("gradient_norms", torch.zeros(2))
        self.register_buffer("calls", torch.tensor(0))
        self.set_balance(alpha)
        self.register_load_state_dict_post_hook(_read_buffers)  # type: ignore[no-untyped-call]

    def set_balance(self, alpha: float, phase: float | None = None) -> None:
        """Set alpha, and beta = gamma * phase; forces no device sync.

        Args:
            alpha: share of uniformity, in ``[0, 1]``.
            phase: how far the information regularizer is phased in; alpha by default (the paper's coupling).

        Raises:
            ValueError: alpha is outside ``[0, 1]`` or the phase is not finite.
        """
        check_number("alpha", alpha, low=0, high=1)
        phase = alpha if phase is None else phase
        check_number("the phase of beta", phase)
        self.alpha.fill_(alpha)
        self.beta.fill_(self.gamma * phase)
        self._idle = _zero(decorrelation=1 - alpha, uniformity=alpha, information=self.gamma * phase)

    def forward(self, r1: Tensor, r2: Tensor, z1: Tensor, z2: Tensor) -> ObjectiveOutput:
        """Compute the objective of two views of N images.

        Args:
            r1: representation of the first view, shape ``(N, d_R)``, N >= 2, any floating dtype.
            r2: that of the second view, the same shape.
            z1: embedding of the first view, shape ``(N, d_Z)``.
            z2: that of the second view, the same shape.

        Returns:
            The total and its named parts, in float32 or wider.

        Raises:
            ValueError: views that differ in shape, or fewer than 2 images.
        """
        check_views(z1, z2)
        # The gradients are compared at views of Z, so that no hook on Z itself is called: that of Fabric refuses
        # all but its own backward pass, and others count or change what they see.
        z1, z2 = z1.view_as(z1), z2.view_as(z2)
        return self.mix(self.parts(r1, r2, z1, z2), (z1, z2))

    def parts(
        self,
        r1: Tensor,
        r2: Tensor,
        z1: Tensor,
        z2: Tensor,
        *,
        decorrelation: Tensor | None = None,
        uniformity: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The parts of the objective, unweighted and differentiable.

        Args:
            r1: as in :meth:`forward`.
            r2: likewise.
            z1: likewise.
            z2: likewise.
            decorrelation: another loss in VICReg's place, a differentiable scalar.
            uniformity: another loss in NT-Xent's place, a differentiable scalar.

        Raises:
            ValueError: views that differ in shape, or fewer than 2 images.
        """
        # What counts nothing is measured, but not differentiated, which takes twice as long again.
        idle = self._idle - ({"decorrelation", "uniformity"} if self.match_gradients else set())

        def wanted(*names: str) -> torch.set_grad_enabled:
            return torch.set_grad_enabled(torch.is_grad_enabled() and not idle.issuperset(names))

        check_views(r1, r2, ("r1", "r2"))
        check_views(z1, z2)
        if len(r1) != len(z1):
            raise ValueError(f"R and Z must have the same number of rows, got {len(r1)} and {len(z1)}")
        with no_autocast(z1):
            dtype = torch.promote_types(full_precision(r1).dtype, full_precision(z1).dtype)
            r1, r2, z1, z2 = gather_rows(*(x.to(dtype) for x in (r1, r2, z1, z2)))
            parts: dict[str, Tensor] = {}
            if decorrelation is None:
                with wanted("decorrelation"):
                    parts = self._decorrelation_parts(z1, z2)
                    decorrelation = self._weigh(parts)
            r, z = torch.cat([r1, r2]), torch.cat([z1, z2])
            if self.order == 2 and uniformity is None:
                with wanted("information", "uniformity"):
                    uniformity, information = nt_xent_and_information(r, z, self.temperature)
                information = information.detach() if "information" in idle else information
                uniformity = uniformity.detach() if "uniformity" in idle else uniformity
            else:
                with wanted("information", *(["uniformity"] if uniformity is None else [])):
                    gram_z = cosine_gram(z)
                if uniformity is None:
                    with wanted("uniformity"):
                        uniformity = _nt_xent_of_gram(gram_z, self.temperature)
                with wanted("information"):
                    information = _renyi_information(cosine_gram(r), gram_z, self.order)
        return parts | {"decorrelation": decorrelation, "uniformity": uniformity, "information": information}

    def decorrelation_loss(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Compute the decorrelation of two views alone, on the rows of all processes.

        Args:
            z1: as in :meth:`forward`.
            z2: likewise.
        """
        with no_autocast(z1):
            z1, z2 = gather_rows(full_precision(z1), full_precision(z2))
            return self._weigh(self._decorrelation_parts(z1, z2))

    def _weigh(self, parts: dict[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()

    def _decorrelation_parts(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        if self.decorrelation == "barlow_twins":
            return _barlow_twins_parts(z1, z2)._asdict()
        return _vicreg_parts(
            z1,
            z2,
            eps=self.eps,
            halve_variance=self.halve_variance,
            invariance_reduction=self.invariance_reduction,
        )._asdict()

    def mix(self, parts: dict[str, Tensor], embeddings: Sequence[Tensor]) -> ObjectiveOutput:
        """The objective of its parts.

        Args:
            parts: of :meth:`parts`, or their means over pairs of views.
            embeddings: where ``kappa="match"`` compares the gradients of decorrelation and uniformity.

        Returns:
            The total and its named parts.
        """
        decorrelation, uniformity = parts["decorrelation"], parts["uniformity"]
        with no_autocast(decorrelation):
            if self.match_gradients and self.training and decorrelation.requires_grad and self._is_due():
                self._match_gradients(decorrelation, uniformity, embeddings)
            information = self.floored(parts["information"])
            weighted = {
                "decorrelation": (1 - self.alpha) * decorrelation,
                "uniformity": self.alpha * self.kappa * uniformity,
                "information": self.beta * information,
            }
            total = weighted["decorrelation"] + weighted["uniformity"] + weighted["information"]
        return ObjectiveOutput(
            total,
            {name: value.detach() for name, value in parts.items()},
            {name: value.detach() for name, value in weighted.items()},
        )

    def floored(self, information: Tensor) -> Tensor:
        """Return the information that enters the total: none below the floor is rewarded."""
        if self.information_floor is None or self.gamma <= 0:
            return information
        return information.clamp_min(self.information_floor)

    @torch.no_grad()
    def _match_gradients(self, decorrelation: Tensor, uniformity: Tensor, embeddings: Sequence[Tensor]) -> None:
        """Move kappa to the ratio of the running gradient norms; their common start-up bias cancels in it."""
        norms = gradient_norms((decorrelation, uniformity), embeddings)
        moved = self.gradient_norms.lerp(norms.to(self.gradient_norms.dtype), MATCH_WEIGHT)
        # An overflow of one step must not stay in the running norms: such a comparison is left out.
        usable = moved.isfinite().all()
        self.gradient_norms.copy_(torch.where(usable, moved, self.gradient_norms))
        tiny = torch.finfo(self.gradient_norms.dtype).tiny
        ratio = self.gradient_norms[0] / self.gradient_norms[1].clamp_min(tiny)
        self.kappa.copy_(torch.where(usable, ratio.clamp_max(KAPPA_LIMIT), self.kappa))


@torch.no_grad()
def gradient_norms(losses: Sequence[Tensor], embeddings: Sequence[Tensor]) -> Tensor:
    """Compute the norm of the gradient of each loss at Z, over all processes.

    Args:
        losses: differentiable scalars.
        embeddings: where the gradients are taken.

    Returns:
        Norms, one for each loss.

    Raises:
        ValueError: a loss does not depend on the embeddings.
    """
    squares = []
    for loss in losses:
        # Half precision would round small gradients to zero.
        scale = torch.full_like(loss, _GRADIENT_SCALE)
        gradients = torch.autograd.grad(loss, embeddings, scale, retain_graph=True, allow_unused=True)
        used = [x for x in gradients if x is not None]
        if not used:
            raise ValueError(
                'kappa="match" needs losses of Z, but one of them does not depend on it; of a model that is '
                "compiled as a whole, compile the submodules instead, or give AdaDimLoss(kappa=1)"
            )
        squares.append(torch.stack([(full_precision(x) / _GRADIENT_SCALE).square().sum() for x in used]).sum())
    total = torch.stack(squares)
    if world_size() > 1:
        dist.all_reduce(total)
    # The gradients at the rows of one process are those of its mean with the others, times their number.
    return total.sqrt() / world_size()


def _zero(**weights: float) -> frozenset[str]:
    return frozenset(name for name, weight in weights.items() if weight == 0)


def _read_buffers(loss: AdaDimLoss, _: object) -> None:
    """After they came from elsewhere."""
    loss._calls = int(loss.calls)
    alpha, beta = loss.alpha.item(), loss.beta.item()
    loss._idle = _zero(decorrelation=1 - alpha, uniformity=alpha, information=beta)
