"""What the commands make of their configurations."""

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from adadim_lightning.callbacks.progress import carry_on_without_output
from adadim_lightning.data import ImageData, TwoViews
from adadim_lightning.models import representation_dim
from adadim_lightning.pretrained import CheckpointError, find_checkpoint, load_pretrained, load_weights
from adadim_lightning.trust import check_targets

READ_BY_VIEWS = ("mean", "std")
PRETRAINED = ("weights", "pretrained")
# What the backbone was trained with, and no command line changes.
DECIDED = ("backbone", "views", "data.image_size", "data.channels", "data.mean", "data.std")


@rank_zero_only
def say(line: str) -> None:
    """Print a line, once for all processes."""
    with carry_on_without_output():
        print(line, flush=True)


def make_data(config: DictConfig, key: str, views: TwoViews, **fixed: Any) -> ImageData:
    """The data module of a configuration.

    Args:
        config: of the group ``data``.
        key: where it stands, for messages.
        views: makes the views.
        fixed: what replaces arguments in it.

    Raises:
        ValueError: it makes no :class:`ImageData`.
    """
    missing = sorted(str(name) for name in config if OmegaConf.is_missing(config, name))
    if missing:
        raise ValueError(f"{key}.{missing[0]} is not given; set {key}.{missing[0]}=...")
    arguments = OmegaConf.create({name: value for name, value in config.items() if name not in READ_BY_VIEWS})
    try:
        data = instantiate(arguments, views=views, _convert_="all", **fixed)
    except InstantiationException as error:
        # Made apart from the rest, it would be named without its place.
        raise InstantiationException(f"{error}\nfull_key: {key}") from error.__cause__
    except Exception as error:
        error.add_note(f"full_key: {key}")  # Hydra 1.4 raises the error itself
        raise
    if not isinstance(data, ImageData):
        raise ValueError(
            f"{key} must make an ImageData, got {type(data).__name__}; with other data modules use AdaDimModule "
            "in a program of your own"
        )
    return data


@dataclass
class Subject:
    """A model to look at, and images to look at it with.

    Attributes:
        name: short name for tables.
        source: where its weights come from.
        backbone: images to representations, on the device.
        projection_head: representations to embeddings; None where there is none.
        data: the images, as the backbone wants them.
        trained_on: data set that it was trained on, where that is known.
    """

    name: str
    source: str
    backbone: nn.Module
    projection_head: nn.Module | None
    data: ImageData
    trained_on: str | None = None


def subjects(config: DictConfig) -> Iterator[Subject]:
    """The models that ``ckpt``, or ``backbone`` and ``weights``, mean, one after another.

    Raises:
        ValueError: none is meant, or one cannot be loaded (at once), or there are no images for it.
    """
    trust = list(config.get("trust") or ())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.get("ckpt") is None:
        backbone = config.get("backbone") or {}
        # A data set chooses a backbone too; nobody means that one, untrained.
        chosen = _given("backbone") or any(backbone.get(key) for key in PRETRAINED)
        if not backbone or (config.get("weights") is None and not chosen):
            raise ValueError("nothing to look at: give ckpt=RUN, or backbone=... and weights=FILE")
        if config.get("data") is None:
            raise ValueError("a backbone of its own needs images: give data=...")
        return _foreign(config, trust, device)
    if config.get("weights") is not None or _given("backbone"):
        raise ValueError("give either ckpt=..., or backbone=... and weights=..., not both")
    decided = next(filter(_given, DECIDED), None)
    if decided is not None:
        raise ValueError(f"the checkpoint decides {decided}, as it was trained; leave {decided} out")
    paths = find_checkpoints(config.ckpt)
    if len(paths) > 1:
        for path in paths:  # the last is no surprise after minutes of work on the first
            load_pretrained(path, trust=trust)
    return _trained(paths, config, trust, device)


def _given(key: str) -> bool:
    """Whether the command line names a key or a part of it: a data set chooses views and a backbone by itself."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    names = [name.lstrip("+~") for name, _, value in (x.partition("=") for x in overrides) if value != "null"]
    return any(name == key or name.startswith((f"{key}.", f"{key}@")) for name in names)


def _trained(
    paths: Sequence[Path], config: DictConfig, trust: list[str], device: torch.device
) -> Iterator[Subject]:
    for path, name in zip(paths, short_names(paths), strict=True):
        model = load_pretrained(path, trust=trust)
        own = OmegaConf.create(dict(model.config["data"]))
        if config.get("data") is None:
            try:
                data = _make_evaluated(own, model.views, trust)
            except (ValueError, InstantiationException) as error:
                reason = " ".join(str(error.__cause__ or error).split())
                raise ValueError(
                    f"the images that {name} was trained on cannot be loaded ({reason}); say where they are, or "
                    "give others, by data=... data.root=..."
                ) from error
        else:
            # Other images are shown as those of the training were.
            channels, height, _ = model.image_shape
            data = _make_evaluated(
                config.data, model.views, trust, image_size=own.get("image_size") or height, channels=channels
            )
        backbone = model.backbone.to(device)
        head = None if model.projection_head is None else model.projection_head.to(device)
        yield Subject(name, str(path), backbone, head, data, _title(own))


def _make_evaluated(config: DictConfig, views: TwoViews, trust: list[str], **fixed: Any) -> ImageData:
    check_targets(OmegaConf.to_container(config), trust)
    # A set may be smaller than the batches of a training.
    fixed = {key: value for key, value in {"batch_size": 2, **fixed}.items() if key in config}
    data = make_data(config, "data", views, **fixed)
    data.batch_size = config.get("batch_size") or data.batch_size
    return data


def _title(data: Mapping[str, Any]) -> str:
    """What data of a configuration are called, without loading them."""
    named = next((data[key] for key in ("title", "path", "name") if data.get(key)), None)
    root = data.get("root")
    title = str(named or (Path(root).name if root else data["_target_"].rpartition(".")[2]))
    return Path(title).name if len(Path(title).parts) > 2 else title  # a path, not a name of the hub


def _foreign(config: DictConfig, trust: list[str], device: torch.device) -> Iterator[Subject]:
    check_targets(OmegaConf.to_container(config, resolve=True), trust)
    backbone = instantiate(config.backbone, _convert_="all")
    weights = config.get("weights")
    if weights is not None:
        prefix = load_weights(backbone, weights)
        say(f"weights    {weights}" + (f", behind {prefix!r}" if prefix else ""))
    elif not any(config.backbone.get(key) for key in PRETRAINED):
        say("weights    none given: the backbone is untrained")
    data = _make_evaluated(config.data, instantiate(config.views, _convert_="all"), trust)
    representation_dim(backbone, data.views.clean(data.sample(1)[0])[0])  # whether they fit is known at once
    name = str(config.backbone.get("name") or type(backbone).__name__)
    yield Subject(name, str(weights or "none"), backbone.to(device), None, data)


def find_checkpoints(ckpt: Any) -> list[Path]:
    """The checkpoints that names, folders and patterns with ``*`` mean, each once.

    What a pattern finds beside them, such as a run without a checkpoint, is left out with a line.

    Raises:
        ValueError: there is none.
    """
    found: list[Path] = []
    for name in [ckpt] if isinstance(ckpt, str | Path) else list(ckpt):
        if "*" not in str(name):
            found.append(find_checkpoint(name))
            continue
        before = len(found)
        for match in sorted(glob.glob(str(Path(name).expanduser()))):
            try:
                if Path(match).is_dir() or match.endswith(".ckpt"):
                    found.append(find_checkpoint(match))
            except CheckpointError as error:
                say(f"left out   {error}")
        if len(found) == before:
            raise ValueError(f"no run or checkpoint matches {name}")
    if not found:
        raise ValueError("nothing to look at: ckpt is an empty list")
    return list({path.resolve(): path for path in found}.values())


def short_names(paths: Sequence[Path]) -> list[str]:
    """The folder of each run, or the file of a checkpoint elsewhere, and as much more as tells them apart.

    Example:
        >>> short_names([Path("a/run/checkpoints/last.ckpt"), Path("b/run/checkpoints/last.ckpt")])
        ['a/run', 'b/run']
    """
    files = [path.absolute() for path in paths]
    folders = [x.parent.parent if x.parent.name == "checkpoints" else x.with_suffix("") for x in files]

    def name(folder: Path) -> str:
        size = 1
        while sum(other.parts[-size:] == folder.parts[-size:] for other in set(folders)) > 1:
            size += 1
        return "/".join(folder.parts[-size:])

    return [
        name(folder) + (f"/{file.stem}" if folders.count(folder) > 1 else "")
        for folder, file in zip(folders, files, strict=True)
    ]
