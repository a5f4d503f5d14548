"""What the commands make of their configurations."""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from adadim_lightning.callbacks.progress import carry_on_without_output
from adadim_lightning.data import ImageData, TwoViews
from adadim_lightning.pretrained import find_checkpoint, load_pretrained, load_weights
from adadim_lightning.trust import check_targets

READ_BY_VIEWS = ("mean", "std")


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
    missing = sorted(name for name in config if OmegaConf.is_missing(config, name))
    if missing:
        raise ValueError(f"{key}.{missing[0]} is not given; set {key}.{missing[0]}=...")
    arguments = OmegaConf.create({name: value for name, value in config.items() if name not in READ_BY_VIEWS})
    try:
        data = instantiate(arguments, views=views, _convert_="all", **fixed)
    except InstantiationException as error:
        # Made apart from the rest, it would be named without its place.
        raise InstantiationException(f"{error}\nfull_key: {key}") from error.__cause__
    if not isinstance(data, ImageData):
        raise ValueError(
            f"{key} must make an ImageData, got {type(data).__name__}; with other data modules use AdaDimModule in a "
            "program of your own"
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
        trained_on: data set that it was trained on, where that is known and another.
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
        ValueError: none is meant, or it cannot be loaded, or there are no images for it.
    """
    trust = list(config.get("trust") or ())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.get("ckpt") is None:
        yield _foreign(config, trust, device)
        return
    paths = find_checkpoints(config.ckpt)
    for path in paths:
        model = load_pretrained(path, trust=trust)
        own = OmegaConf.create(dict(model.config["data"]))
        chosen = config.data if config.get("data") is not None else own
        # Images of another data set are shown as those of the training were.
        size = own.get("image_size") or model.image_shape[1]
        data = _make_evaluated(chosen, model.views, size, model.image_shape[0], own=config.get("data") is None)
        backbone, head = (part if part is None else part.to(device) for part in (model.backbone, model.projection_head))
        assert backbone is not None
        trained_on = None if config.get("data") is None else str(own.get("name") or own["_target_"].rpartition(".")[2])
        name = model.name if sum(x.parent.parent.name == model.name for x in paths) < 2 else str(path)
        yield Subject(name, str(path), backbone, head, data, trained_on)


def _make_evaluated(
    config: DictConfig, views: TwoViews, image_size: int, channels: int, *, own: bool
) -> ImageData:
    check_targets(OmegaConf.to_container(config))
    try:
        return make_data(config, "data", views, image_size=image_size, channels=channels)
    except (ValueError, InstantiationException) as error:
        if not own:
            raise
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"the images that the run was trained on cannot be loaded ({reason}); give others by data=..."
        ) from error


def _foreign(config: DictConfig, trust: list[str], device: torch.device) -> Subject:
    if config.get("backbone") is None:
        raise ValueError("nothing to look at: give ckpt=RUN, or backbone=... and weights=FILE")
    if config.get("data") is None:
        raise ValueError("a backbone of its own needs images: give data=...")
    check_targets(OmegaConf.to_container(config, resolve=True), trust)
    backbone = instantiate(config.backbone, _convert_="all")
    weights = config.get("weights")
    if weights is not None:
        prefix = load_weights(backbone, weights)
        say(f"weights    {weights}" + (f", behind {prefix!r}" if prefix else ""))
    elif not (config.backbone.get("weights") or config.backbone.get("pretrained")):
        say("weights    none given: the backbone is untrained")
    views = instantiate(config.views, _convert_="all")
    data = make_data(config.data, "data", views)
    name = str(config.backbone.get("name") or type(backbone).__name__)
    return Subject(name, str(weights or "none"), backbone.to(device), None, data)


def find_checkpoints(ckpt: Any) -> list[Path]:
    """The checkpoints that names, folders and patterns with ``*`` mean.

    Raises:
        ValueError: there is none.
    """
    found: list[Path] = []
    for name in [ckpt] if isinstance(ckpt, str | Path) else list(ckpt):
        matches = sorted(glob.glob(str(Path(name).expanduser()))) if "*" in str(name) else [str(name)]
        if not matches:
            raise ValueError(f"no run or checkpoint matches {name}")
        found += [find_checkpoint(match) for match in matches]
    return list(dict.fromkeys(found))
