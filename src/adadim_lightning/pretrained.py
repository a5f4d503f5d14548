"""Backbones that were trained before: by this package, or by anybody."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adadim_lightning.data.views import TwoViews
from adadim_lightning.trust import check_targets

KEY = "adadim"
STATES = ("state_dict", "model_state_dict", "model", "teacher", "student", "backbone", "encoder", "net")


class CheckpointError(ValueError):
    """A file is no checkpoint that can be used."""


@dataclass
class Pretrained:
    """A trained model and what its images have to look like.

    Attributes:
        name: short name for tables: the run's folder.
        path: the checkpoint.
        backbone: images ``(B, C, H, W)`` to representations ``(B, d_R)``.
        projection_head: representations to embeddings; None where there is none.
        views: its views, and by ``views.clean`` the normalized images.
        image_shape: channels, height, width of what the backbone sees.
        config: the configuration of its training.
    """

    name: str
    path: Path
    backbone: nn.Module
    projection_head: nn.Module | None
    views: TwoViews
    image_shape: tuple[int, int, int]
    config: dict[str, Any]


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means.

    Args:
        path: a checkpoint, or the folder of a run, whose last one is meant.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        for candidate in (path / "checkpoints" / "last.ckpt", path / "last.ckpt"):
            if candidate.exists():
                return candidate
        found = sorted(path.rglob("*.ckpt"), key=lambda x: x.stat().st_mtime)
        if not found:
            raise CheckpointError(f"{path} holds no checkpoint; name a run's folder or a .ckpt file")
        return found[-1]
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    return path


def read_state(path: str | Path) -> dict[str, Any]:
    """What a file of weights holds; no code in it runs.

    Args:
        path: a checkpoint or state dict of PyTorch, or a safetensors file.

    Raises:
        CheckpointError: it cannot be read, or holds more than tensors and plain values.
    """
    path = Path(path).expanduser()
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:1])
        unsafe = "weights only load failed" in str(error).lower()
        cause = "it holds more than weights, which may run code, and is refused" if unsafe else reason
        raise CheckpointError(f"{path} cannot be read: {cause}") from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds no weights but {type(found).__name__}")
    return dict(found)


def load_pretrained(path: str | Path, *, trust: Sequence[str] = ()) -> Pretrained:
    """Rebuild a model that :command:`adadim-train` trained.

    The checkpoint is read without running code in it, and its configuration may name only classes of this
    package, torchvision, timm, kornia and torch, or of the packages in ``trust``.

    Args:
        path: a checkpoint, or the folder of a run.
        trust: packages of one's own whose classes may be made.

    Raises:
        CheckpointError: it is no such checkpoint.
        UntrustedTargetError: it names a class that is not trusted.
    """
    path = find_checkpoint(path)
    checkpoint = read_state(path)
    origin = checkpoint.get(KEY)
    if not isinstance(origin, Mapping):
        raise CheckpointError(
            f"{path} was not written by adadim-train; for weights of other models give backbone=... and weights={path}"
        )
    config = {key: origin["config"][key] for key in ("backbone", "head", "views")}
    _check_plain(config, path)
    check_targets(config, trust)
    from hydra.utils import instantiate  # a second way to make objects of configurations would be one too many

    # What was pretrained before comes with the checkpoint: nothing is downloaded.
    backbone_config = {
        key: {"weights": None, "pretrained": False}.get(key, value) for key, value in config["backbone"].items()
    }
    backbone = instantiate(backbone_config, _convert_="all")
    state = checkpoint["state_dict"]
    _load(backbone, _below(state, "backbone."), path)
    widths = [x.shape[1] for x in _below(state, "projection_head.").values() if x.ndim == 2]
    from adadim_lightning.models import representation_dim

    shape = tuple(origin["image_shape"])
    head = instantiate(config["head"], _convert_="all")(
        widths[0] if widths else representation_dim(backbone, torch.zeros(shape))
    )
    _load(head, _below(state, "projection_head."), path)
    views = instantiate(config["views"], _convert_="all")
    name = path.parent.parent.name if path.parent.name == "checkpoints" else path.stem
    return Pretrained(name, path, backbone, head, views, shape, dict(origin["config"]))  # type: ignore[arg-type]


def load_backbone(path: str | Path, *, trust: Sequence[str] = ()) -> nn.Module:
    """The backbone of a run as a plain module, ready to fine-tune.

    Args:
        path: a checkpoint, or the folder of a run.
        trust: packages of one's own whose classes may be made.

    Returns:
        Images ``(B, C, H, W)``, normalized as :func:`load_transform` does it, to representations ``(B, d_R)``; in
        training mode, with gradients.

    Raises:
        CheckpointError: it is no checkpoint of :command:`adadim-train`.
        UntrustedTargetError: it names a class that is not trusted.

    Example:
        >>> load_backbone("no/such/run")
        Traceback (most recent call last):
        adadim_lightning.pretrained.CheckpointError: there is no checkpoint no/such/run
    """
    return load_pretrained(path, trust=trust).backbone.train().requires_grad_(True)


def load_transform(path: str | Path, *, trust: Sequence[str] = ()) -> Callable[[Any], Tensor]:
    """What makes the backbone's input of an image: scaled, cut to a square, normalized.

    Args:
        path: a checkpoint, or the folder of a run.
        trust: packages of one's own whose classes may be made.

    Returns:
        Function of a Pillow image, or of the file of one, to a tensor ``(C, H, W)``, float32.
    """
    return Transform(load_pretrained(path, trust=trust))


class Transform:
    """Makes the input of a backbone from an image."""

    def __init__(self, pretrained: Pretrained) -> None:
        self.views = pretrained.views
        self.channels, self.size, _ = pretrained.image_shape
        canvas = pretrained.config["data"].get("image_size")
        self.canvas = max(int(canvas or 0), self.size)

    def __call__(self, image: Any) -> Tensor:
        """Shape ``(C, H, W)`` of a Pillow image or a file."""
        from torchvision.transforms.v2.functional import pil_to_tensor

        from adadim_lightning.data.images import decode, fit_square

        square = fit_square(decode(image, channels=self.channels, at_least=2 * self.canvas), self.canvas)
        return self.views.clean(pil_to_tensor(square)[None])[0]


def load_weights(backbone: nn.Module, path: str | Path) -> str:
    """Fill a backbone with weights from a file of any training program.

    The weights are looked for under the usual entries of a checkpoint and behind the usual prefixes
    (``module.``, ``backbone.``, ``model.encoder.`` ...): those that fit the most parameters are taken. What the file
    has beside them, such as a projection head, is left out.

    Args:
        backbone: to be filled, in place.
        path: a checkpoint or state dict of PyTorch, or a safetensors file.

    Returns:
        The prefix that the weights had.

    Raises:
        CheckpointError: the file cannot be read, or lacks some of the weights, or they have other shapes.
    """
    state: Mapping[str, Any] = read_state(path)
    for key in STATES:
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    wanted = backbone.state_dict()
    prefixes = {""}
    for key in tensors:
        parts = re.split(r"(?<=\.)", key)
        prefixes |= {"".join(parts[:i]) for i in range(1, len(parts))}
    fit = {prefix: sum(prefix + name in tensors for name in wanted) for prefix in prefixes}
    best = max(sorted(fit, key=len), key=lambda prefix: fit[prefix])
    _load(backbone, {name: tensors[best + name] for name in wanted if best + name in tensors}, Path(path))
    return best


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _load(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(wanted)} weights of {type(module).__name__}, such as {missing[0]}"
        )
    other = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if other:
        key = other[0]
        raise CheckpointError(
            f"{path} has {key} of shape {tuple(state[key].shape)}, but {type(module).__name__} needs "
            f"{tuple(wanted[key].shape)}"
        )
    module.load_state_dict(state, strict=False)


def _check_plain(config: Any, path: Path) -> None:
    """Refuse text that Hydra would fill in, such as an environment variable."""
    if isinstance(config, Mapping):
        config = [*config, *config.values()]
    if isinstance(config, str) and "${" in config:
        raise CheckpointError(f"{path} holds an interpolation in its configuration, {config}, and is refused")
    if isinstance(config, list | tuple):
        for value in config:
            _check_plain(value, path)
