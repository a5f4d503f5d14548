"""What the commands make of their configurations."""

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from adadim_lightning.callbacks.progress import carry_on_without_output
from adadim_lightning.data import ImageData, TwoViews

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
    except MissingMandatoryValue as error:
        raise ValueError(f"{key}: {error}") from None
    if not isinstance(data, ImageData):
        raise ValueError(
            f"{key} must make an ImageData, got {type(data).__name__}; with other data modules use AdaDimModule in a "
            "program of your own"
        )
    return data
