"""Steers the loss of somebody else's module: AdaDim's terms beside it, or an alpha that it has."""

import functools
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adadim_lightning.objective import AdaDimLoss, ObjectiveOutput

NativeLoss = Literal["sample_contrastive", "dimension_contrastive", "other"]

# Which part of the objective the module's own loss takes the place of.
NATIVE_LOSSES = {"sample_contrastive": "uniformity", "dimension_contrastive": "decorrelation", "other": None}


def steered_loss(
    kind: NativeLoss,
    native: Tensor,
    r: Sequence[Tensor],
    z: Sequence[Tensor],
    objective: AdaDimLoss,
    *,
    weight: float = 1.0,
    embeddings: Sequence[Tensor] | None = None,
) -> ObjectiveOutput:
    """A module's own loss within the AdaDim objective.

    Args:
        kind: the part of the objective that it is; an ``"other"`` loss stands beside the whole of it.
        native: the module's own loss, a scalar.
        r: representations ``(N, d_R)`` of each view.
        z: embeddings ``(N, d_Z)`` of each view.
        objective: the added terms; of more than two views they are the mean over all pairs, of one (``"other"``
            alone) they are those of the view with itself.
        weight: of the added terms beside an ``"other"`` loss.
        embeddings: where ``kappa="match"`` compares the gradients: Z as it entered the module's own loss.

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
    total, parts, weighted = objective.mix(means, z if embeddings is None else embeddings)
    if place is None:
        total = native + weight * total
        weighted = {name: weight * value for name, value in weighted.items()}
        parts["native"] = weighted["native"] = native.detach()
    else:
        parts["native"], weighted["native"] = parts.pop(place), weighted.pop(place)
    return ObjectiveOutput(total, parts, weighted)


def loss_of(outputs: Any) -> Tensor | None:
    """The loss among what ``training_step`` returned; None where there is none."""
    if isinstance(outputs, Mapping):
        outputs = outputs.get("loss")
    return outputs if isinstance(outputs, Tensor) else None


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

    @functools.wraps(native_step)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        begin()
        outputs = native_step(*args, **kwargs)
        native = loss_of(outputs)
        if native is None:
            return outputs
        steered = total(native, outputs)
        if not isinstance(outputs, Mapping):
            return steered
        outputs = copy(outputs)
        outputs["loss"] = steered  # type: ignore[index]
        return outputs

    # Lightning looks behind one decorator for the arguments: behind the module's own, if it has one.
    training_step.__wrapped__ = getattr(native_step, "__wrapped__", native_step)
    training_step.steered_by_adadim = True  # type: ignore[attr-defined]
    module.training_step = training_step

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
