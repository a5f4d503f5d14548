"""Steers the loss of somebody else's module: AdaDim's terms beside it, or an alpha that it has."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adadim_lightning.functional._numeric import no_autocast
from adadim_lightning.objective import (
    KAPPA_LIMIT,
    MATCH_WEIGHT,
    AdaDimLoss,
    ObjectiveOutput,
    StepCount,
    gradient_norms,
)

NativeLoss = Literal["sample_contrastive", "dimension_contrastive", "other"]

# Which part of the objective the module's own loss takes the place of.
NATIVE_LOSSES = {"sample_contrastive": "uniformity", "dimension_contrastive": "decorrelation", "other": None}


class NativeScale(StepCount, nn.Module):
    """Running ratio of gradient norms at Z: a module's own loss over AdaDim's decorrelation.

    It brings AdaDim's terms to the size of the module's own loss, so that a tuned learning rate still fits.
    """

    scale: Tensor
    norms: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("norms", torch.zeros(2))
        self.register_buffer("calls", torch.tensor(0))
        self.register_load_state_dict_post_hook(_read_calls)  # type: ignore[no-untyped-call]

    def forward(self, native: Tensor, decorrelation: Callable[[], Tensor], embeddings: Sequence[Tensor]) -> Tensor:
        """Return the ratio, renewed in every tenth step.

        Args:
            native: the module's own loss.
            decorrelation: called for AdaDim's decorrelation when the ratio is renewed.
            embeddings: where the gradients are compared.

        Raises:
            ValueError: a loss does not depend on the embeddings.
        """
        if native.requires_grad and torch.is_grad_enabled() and self._is_due():
            self._renew(gradient_norms((native, decorrelation()), embeddings))
        return self.scale

    def _renew(self, norms: Tensor) -> None:
        moved = self.norms.lerp(norms.to(self.norms.dtype), MATCH_WEIGHT)
        usable = moved.isfinite().all()  # an overflow must not stay in the running norms
        self.norms.copy_(torch.where(usable, moved, self.norms))
        ratio = self.norms[0] / self.norms[1].clamp_min(torch.finfo(self.norms.dtype).tiny)
        self.scale.copy_(torch.where(usable, ratio.clamp_max(KAPPA_LIMIT), self.scale))


def _read_calls(scale: NativeScale, _: object) -> None:
    scale._calls = int(scale.calls)


def steered_loss(
    kind: NativeLoss,
    native: Tensor,
    r: Sequence[Tensor],
    z: Sequence[Tensor],
    objective: AdaDimLoss,
    *,
    weight: float = 1.0,
    embeddings: Sequence[Tensor] | None = None,
    native_scale: NativeScale | None = None,
) -> ObjectiveOutput:
    """Compute a module's own loss within the AdaDim objective.

    The module's own loss keeps its size; AdaDim's terms are scaled to it.

    Args:
        kind: the part of the objective that it is; an ``"other"`` loss stands beside the whole of it.
        native: the module's own loss, a scalar.
        r: representations ``(N, d_R)`` of each view.
        z: embeddings ``(N, d_Z)`` of each view.
        objective: the added terms; of more than two views they are the mean over all pairs, of one (``"other"``
            alone) they are those of the view with itself.
        weight: of the added terms beside an ``"other"`` loss.
        embeddings: where ``kappa="match"`` compares the gradients: Z as it entered the module's own loss.
        native_scale: running scale of the added terms, with ``kappa="match"``; a new one by default.

    Returns:
        The total and its parts; ``native`` is named in the place of what it replaces.

    Raises:
        ValueError: a single view, where the loss is not ``"other"``; fewer than 2 images.
    """
    place = NATIVE_LOSSES[kind]
    if len(z[0]) < 2:
        raise ValueError("AdaDim's terms need batches of 2 images or more; give the data loader drop_last=True")
    if len(r) == 1 and place is not None:
        raise ValueError(
            f"the student sees one view of each image, but beside a {kind} loss the added terms need two; "
            "name the sources of the momentum branch's R and Z, in the student's order, by momentum=(...), or "
            "give functions that return the rows of each view"
        )
    pairs = list(combinations(range(len(r)), 2)) or [(0, 0)]
    replaced = {} if place is None else {place: native}
    each = [objective.parts(r[i], r[j], z[i], z[j], **replaced) for i, j in pairs]
    means = {name: torch.stack([values[name] for values in each]).mean() for name in each[0]}
    embeddings = z if embeddings is None else embeddings
    with _without_hooks(embeddings):
        output = objective.mix(means, embeddings)
    scale: Tensor | float = 1.0
    if kind == "sample_contrastive":
        # The objective has kappa times this loss: divided by kappa, the loss is as large as it was.
        scale = 1 / objective.kappa.clamp_min(1 / KAPPA_LIMIT)
    elif objective.match_gradients and objective.training:

        def decorrelation() -> Tensor:
            if place is None:
                return means["decorrelation"]
            return torch.stack([objective.decorrelation_loss(z[i], z[j]) for i, j in pairs]).mean()

        with no_autocast(native), _without_hooks(embeddings):
            scale = (NativeScale().to(native.device) if native_scale is None else native_scale)(
                native, decorrelation, embeddings
            )
    parts, weighted = dict(output.parts), dict(output.weighted)
    if kind == "dimension_contrastive":
        # Kappa has brought uniformity to the size of this loss; what is left is the information.
        information = objective.beta * objective.floored(means["information"])
        total = output.total + (scale - 1) * information
        weighted["information"] = weighted["information"] * scale
    else:
        factor = weight * scale if place is None else scale
        total = output.total * factor
        weighted = {name: value * factor for name, value in weighted.items()}
    if place is None:
        total = native + total
        parts["native"] = weighted["native"] = native.detach()
    else:
        parts["native"], weighted["native"] = parts.pop(place), weighted.pop(place)
    return ObjectiveOutput(total, parts, weighted)


@contextmanager
def _without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Suspend the hooks on tensors: they are for the user's backward pass, and may change the gradient."""
    # A view, as in AdaDimLoss.forward, does not help here: the module's own loss was computed from Z itself.
    found = [(hooks, dict(hooks)) for x in tensors if (hooks := x._backward_hooks)]
    for hooks, _ in found:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in found:
            hooks.update(kept)


def loss_of(outputs: Any) -> Tensor | None:
    """The loss among what ``training_step`` returned; None where there is none."""
    if isinstance(outputs, Mapping):
        outputs = outputs.get("loss")
    return outputs if isinstance(outputs, Tensor) else None


class _SteeredStep:
    """A ``training_step`` that returns another loss; pickled or copied with its module, it is the module's own."""

    steered_by_adadim = True

    def __init__(
        self,
        module: Any,
        own: Any,
        native_step: Callable[..., Any],
        total: Callable[[Tensor, Any], Tensor],
        begin: Callable[[], None],
    ) -> None:
        functools.update_wrapper(self, native_step)
        # Lightning looks behind one decorator for the arguments: behind the module's own, if it has one.
        self.__wrapped__ = getattr(native_step, "__wrapped__", native_step)
        self._module, self._own = module, own
        self._native_step, self._total, self._begin = native_step, total, begin

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._begin()
        outputs = self._native_step(*args, **kwargs)
        native = loss_of(outputs)
        if native is None:
            return outputs
        steered = self._total(native, outputs)
        if not isinstance(outputs, Mapping):
            return steered
        outputs = copy(outputs)
        outputs["loss"] = steered  # type: ignore[index]
        return outputs

    def __reduce__(self) -> tuple[Any, ...]:
        if self._own is not None:
            return _same, (self._own,)
        return getattr, (self._module, "training_step")  # of a copy that has no such attribute yet: its method


def _same(x: Any) -> Any:
    return x


def replace_loss(
    module: Any, total: Callable[[Tensor, Any], Tensor], begin: Callable[[], None]
) -> Callable[[], None]:
    """Let a module's ``training_step`` return another loss, and all else as before.

    Args:
        module: the LightningModule; only this instance is changed.
        total: the loss to return, from the module's own and all that its step returned.
        begin: called before each step.

    Returns:
        Call it to undo.

    Raises:
        ValueError: the loss is replaced already.
    """
    native_step = module.training_step
    if hasattr(native_step, "steered_by_adadim"):
        raise ValueError(f"the loss of {type(module).__name__} is steered by another AdaDim already")
    own = vars(module).get("training_step")
    module.training_step = _SteeredStep(module, own, native_step, total, begin)

    def undo() -> None:
        if own is None:
            vars(module).pop("training_step", None)
        else:
            module.training_step = own

    return undo


class Target:
    """An attribute of a module that takes alpha: a number, or a tensor of one.

    Args:
        module: the model.
        path: dotted name of the attribute.

    Raises:
        ValueError: there is no such attribute, or it is no number, or a parameter that is trained.
    """

    def __init__(self, module: nn.Module, path: str) -> None:
        owner, _, self._name = path.rpartition(".")
        try:
            self._owner: Any = functools.reduce(getattr, owner.split("."), module) if owner else module
            value = getattr(self._owner, self._name)
        except AttributeError as error:
            raise ValueError(f"the target {path!r} is not found: {error}") from None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number and not (isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()):
            raise ValueError(f"the target {path!r} must be a number or a tensor of one, got {value!r}")
        if isinstance(value, nn.Parameter) and value.requires_grad:
            raise ValueError(f"the target {path!r} is a parameter that the model itself trains")

    @torch.no_grad()
    def write(self, alpha: float) -> None:
        """Set it."""
        value = getattr(self._owner, self._name)
        if isinstance(value, Tensor):
            value.fill_(alpha)
        else:
            setattr(self._owner, self._name, alpha)
