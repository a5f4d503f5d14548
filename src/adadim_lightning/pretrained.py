"""Backbones that were trained before: by this package, or by anybody."""

import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adadim_lightning.models.backbones import representation_dim
from adadim_lightning.trust import check_targets

if TYPE_CHECKING:
    from adadim_lightning.data.views import TwoViews

KEY = "adadim"
NEEDED = ("backbone", "head", "views", "data")
COMPILED = "_orig_mod."  # what torch.compile puts before the names of weights
FETCHED = ("weights", "weights_backbone", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")
MAGIC = (b"PK\x03\x04", b"\x80")  # of zip archives and of pickles
# Networks that follow the trained one: averages of it, or what it is compared with.
FOLLOWER = re.compile(r"(^|[._])(momentum|teacher|target|ema|averaged?|shadow|key|k)([._]|$)")


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
        whites: values of white in its images of more than 8 bits, by how the pixels are stored.
    """

    name: str
    path: Path
    backbone: nn.Module
    projection_head: nn.Module | None
    views: "TwoViews"
    image_shape: tuple[int, int, int]
    config: dict[str, Any]
    whites: Mapping[str, int]


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means.

    Args:
        path: a checkpoint, or the folder of a run, whose last one is meant.

    Raises:
        CheckpointError: there is none, or the folder holds several runs.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    if not path.is_dir():
        return path
    for candidate in (path / "checkpoints" / "last.ckpt", path / "last.ckpt"):
        if candidate.exists():
            return candidate
    # A link may lead nowhere.
    found = sorted((x for x in path.rglob("*.ckpt") if x.exists()), key=lambda x: (x.stat().st_mtime, x))
    if not found:
        raise CheckpointError(f"{path} holds no checkpoint; name a run's folder or a .ckpt file")
    folders = sorted({str(x.parent) for x in found})
    if len(folders) > 1:
        raise CheckpointError(f"{path} holds {len(folders)} runs; name one of them, such as {folders[0]}")
    return found[-1]


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
        with path.open("rb") as file:
            if not file.read(4).startswith(MAGIC):
                raise ValueError("it was not written by PyTorch")
        if zipfile.is_zipfile(path):
            _check_sums(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "weights only load failed" in str(error).lower():
            cause = (
                "it holds more than weights, which may run code, and is refused; where it was made, save the "
                "state_dict() alone"
            )
        raise CheckpointError(f"{path} cannot be read: {cause}") from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds no weights but {type(found).__name__}")
    return dict(found)


def _check_sums(path: Path) -> None:
    """Raise ValueError if a file is not, to the bit, what was written; PyTorch would not notice."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"it is damaged, in {damaged}")


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
            f"{path} was not written by adadim-train; for weights of other models give backbone=... and "
            f"weights={path}"
        )
    try:
        config = dict(origin["config"])
        parts = {key: config[key] for key in NEEDED}
        state = {key.replace(COMPILED, ""): value for key, value in checkpoint["state_dict"].items()}
        channels, height, width = (int(x) for x in origin["image_shape"])
        # Checkpoints of before do not say.
        whites = {str(kind): int(white) for kind, white in origin.get("pixel_whites", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} lacks a part of what adadim-train writes: {error}") from error
    _check_plain(config, path)
    parts = {key: _without_weights(part, path) for key, part in parts.items()}
    config["data"] = parts.pop("data")  # its classes need trust only where the images are loaded
    check_targets(parts, trust)
    backbone = _make("backbone", parts["backbone"], path)
    _load(backbone, _below(state, "backbone."), path)
    try:
        head = _make("head", parts["head"], path)(
            representation_dim(backbone, torch.zeros(channels, height, width))
        )
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(f"backbone and head of {path} do not fit: {str(error).splitlines()[0]}") from error
    _load(head, _below(state, "projection_head."), path)
    name = path.absolute().parent.parent.name if path.absolute().parent.name == "checkpoints" else path.stem
    views = _make("views", parts["views"], path)
    return Pretrained(name, path, backbone, head, views, (channels, height, width), config, whites)


def load_backbone(path: str | Path, *, trust: Sequence[str] = ()) -> nn.Module:
    """The backbone of a run as a plain module, ready to fine-tune.

    Args:
        path: a checkpoint, or the folder of a run.
        trust: packages of one's own whose classes may be made.

    Returns:
        Images ``(B, C, H, W)``, normalized as :func:`load_transform` does it, to representations ``(B, d_R)``; in
        evaluation mode, so that a forward pass changes nothing: call ``train()`` to fine-tune.

    Raises:
        CheckpointError: it is no checkpoint of :command:`adadim-train`.
        UntrustedTargetError: it names a class that is not trusted.

    Example:
        >>> load_backbone("no/such/run")
        Traceback (most recent call last):
        adadim_lightning.pretrained.CheckpointError: there is no checkpoint no/such/run
    """
    return load_pretrained(path, trust=trust).backbone.eval().requires_grad_(True)


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
        self.channels, *size = pretrained.image_shape
        # Where data.image_size cut a square that the views cut again, so it is here.
        canvas = int(pretrained.config["data"].get("image_size") or 0)
        self.pixel_range = pretrained.config["data"].get("pixel_range")
        self.whites = pretrained.whites
        self.height, self.width = (max(canvas, side) for side in size)

    def __call__(self, image: Any) -> Tensor:
        """Shape ``(C, H, W)`` of a Pillow image or a file."""
        from PIL import Image, ImageOps
        from torchvision.transforms.v2.functional import pil_to_tensor

        from adadim_lightning.data.decoding import decode
        from adadim_lightning.data.pixels import PixelScale

        size = (self.width, self.height)
        # An image alone does not tell the scale of its set: it may be a dark one.
        scale = PixelScale(whites=self.whites) if self.whites else None
        if self.pixel_range is not None:
            scale = PixelScale.of([], self.pixel_range)
        decoded = decode(image, channels=self.channels, at_least=2 * max(size), scale=scale)
        if decoded.size != size:
            decoded = ImageOps.fit(decoded, size, Image.Resampling.BILINEAR)
        return self.views.clean(pil_to_tensor(decoded)[None])[0]


def load_weights(backbone: nn.Module, path: str | Path) -> str:
    """Fill a backbone with weights from a file of any training program.

    The weights are looked for in every entry of a checkpoint and behind every prefix (``state_dict.module.``,
    ``model.encoder.`` ...): those are taken of which the most fit by name and shape. Among equals it is the
    network that was trained, not one that follows it (``momentum``, ``teacher``, ``target``, ``ema``, ``key``),
    and then the shortest prefix. What the file has beside them, such as a projection head, is left out.

    Args:
        backbone: to be filled, in place; left as it is if that fails.
        path: a checkpoint or state dict of PyTorch, or a safetensors file.

    Returns:
        The prefix that the weights had.

    Raises:
        CheckpointError: the file cannot be read, or lacks some of the weights, or they have other shapes.
    """
    tensors = {key.replace(COMPILED, ""): value for key, value in _flat(read_state(path))}
    wanted = {key.replace(COMPILED, ""): value.shape for key, value in backbone.state_dict().items()}
    named: Counter[str] = Counter({"": 0})
    fitting: Counter[str] = Counter()
    for key, value in tensors.items():
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", key))):
            if key[start:] in wanted:
                named[key[:start]] += 1
                fitting[key[:start]] += value.shape == wanted[key[start:]]

    def rank(prefix: str) -> tuple[Any, ...]:
        return -fitting[prefix], -named[prefix], FOLLOWER.search(prefix) is not None, len(prefix), prefix

    best = min(named, key=rank)
    _load(backbone, {name: tensors[best + name] for name in wanted if best + name in tensors}, Path(path))
    return best


def _flat(state: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts, by dotted names."""
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield str(key), value
        elif isinstance(value, Mapping):
            yield from ((f"{key}.{name}", tensor) for name, tensor in _flat(value))


def _make(part: str, config: Any, path: Path) -> Any:
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate  # a second way to make objects of configurations would be one too many

    try:
        return instantiate(config, _convert_="all")
    except InstantiationException as error:
        raise CheckpointError(f"the {part} of {path} cannot be made: {error.__cause__ or error}") from error


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _load(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    own = {key.replace(COMPILED, ""): key for key in module.state_dict()}
    wanted = {name: module.state_dict()[key].shape for name, key in own.items()}
    needed = [name for name in wanted if not name.endswith("num_batches_tracked")]
    missing = [name for name in needed if name not in state]
    if missing:
        what = f"{len(missing)} of {len(needed)} weights of {type(module).__name__}"
        raise CheckpointError(f"{path} lacks {what}, such as {missing[0]}")
    for name, value in state.items():
        if name in wanted and value.shape != wanted[name]:
            raise CheckpointError(
                f"{path} has {name} of shape {tuple(value.shape)}, but {type(module).__name__} needs "
                f"{tuple(wanted[name])}"
            )
    module.load_state_dict({own[name]: value for name, value in state.items() if name in own}, strict=False)


def _without_weights(config: Any, path: Path) -> Any:
    """The configuration without what reads weights: the checkpoint has them, and other files may run code."""
    if isinstance(config, list | tuple):
        return [_without_weights(value, path) for value in config]
    if not isinstance(config, Mapping):
        return config
    if "_args_" in config and str(config.get("_target_")).startswith("timm."):
        raise CheckpointError(
            f"{path} gives arguments of {config['_target_']} without their names, and is refused"
        )
    kept = {key: _without_weights(value, path) for key, value in config.items()}
    kept |= {key: None for key in FETCHED if isinstance(kept.get(key), str | Mapping)}
    return kept | ({"pretrained": False} if kept.get("pretrained") else {})


def _check_plain(config: Any, path: Path) -> None:
    """Refuse text that Hydra would fill in, such as an environment variable."""
    if isinstance(config, Mapping):
        config = [*config, *config.values()]
    if isinstance(config, str) and "${" in config:
        raise CheckpointError(f"{path} holds an interpolation in its configuration, {config}, and is refused")
    if isinstance(config, list | tuple):
        for value in config:
            _check_plain(value, path)
