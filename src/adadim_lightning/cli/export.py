"""``adadim-export``: the backbone of a run in a format that other programs read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from adadim_lightning.cli.app import one_line, run_app

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

    from adadim_lightning.pretrained import Pretrained

IMAGES = 64  # that each file is compared on


def main() -> None:
    """Entry point of the command."""
    run_app(_task, "adadim-export", "export")


def _task(config: DictConfig) -> None:
    # Imported here: the help needs neither torch nor lightning.
    from adadim_lightning.cli.build import say
    from adadim_lightning.export import check_format, check_library, describe, export_backbone
    from adadim_lightning.pretrained import load_pretrained

    for name in ("onnxscript", "onnx_ir", "torch.onnx", "torch.export"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell of every step
    if config.ckpt is None:
        raise ValueError("there is nothing to export: give ckpt=RUN_OR_CHECKPOINT")
    formats = [config.format] if isinstance(config.format, str) else list(dict.fromkeys(config.format or ()))
    if not formats:
        raise ValueError("there is nothing to export: give format=...")
    for format in formats:
        check_format(format)
    pretrained = load_pretrained(config.ckpt, trust=list(config.trust or ()))
    files = _files(config.out, formats, pretrained.path)
    for format, file in files.items():  # before the first is written
        check_library(format, pretrained.config["backbone"], pretrained.backbone)
        _check_writable(file)
    images = _images(config, pretrained)
    say(f"backbone   {pretrained.name}, compared on {len(images)} of its images")
    load = []
    for format, file in files.items():
        try:
            done = export_backbone(
                pretrained.backbone, file, format=format, example=images, metadata=describe(pretrained)
            )
        except OSError as error:
            raise ValueError(f"cannot write {file}: {error.strerror or error}") from error
        size, difference = f"{done.size / 1e6:.2f} MB", f"largest difference {done.difference:.1e}"
        say(f"{format:<12} {size:>10}   {difference}   {file.name}")
        more = f'  # first the lines of "load" in {file.name}.json' if len(done.load) > 1 else ""
        load.append(f"  {done.load[-1]}{more}")
    say("\nload it by\n" + "\n".join(load))
    say(f"\nimages: x in [0, 1], minus mean, by std; sizes in NAME.json\nEverything is in {file.parent}")


def _files(out: str | None, formats: list[str], checkpoint: Path) -> dict[str, Path]:
    """Where each format goes."""
    from adadim_lightning.export import ENDINGS

    if out is None:
        folder = checkpoint.absolute().parent
        path = (folder.parent if folder.name == "checkpoints" else folder) / "export"
    else:
        path = Path(out).expanduser()
        if path.suffix and not path.is_dir():
            if len(formats) > 1:
                raise ValueError(f"out must be a folder for several formats, got {out}")
            other = next((x for x, end in ENDINGS.items() if path.name.endswith(end) and x != formats[0]), None)
            if other is not None and not ENDINGS[formats[0]].endswith(ENDINGS[other]):
                raise ValueError(
                    f"out={out} is named like {other}, but the format is {formats[0]}: give format={other}"
                )
            return {formats[0]: path}
    return {format: path / f"backbone{ENDINGS[format]}" for format in formats}


def _check_writable(file: Path) -> None:
    from adadim_lightning.files import check_writable

    try:
        for path in (file, file.with_name(f"{file.name}.json")):
            if path.is_dir():
                raise IsADirectoryError(None, "it is a folder")
        check_writable(file.parent)
    except OSError as error:
        raise ValueError(f"cannot write {file}: {error.strerror}; name another place by out=...") from error


def _images(config: DictConfig, pretrained: Pretrained) -> Tensor:
    """Some images as the backbone wants them: of the run's own data, or of ``data=...``."""
    from hydra.errors import InstantiationException
    from omegaconf import OmegaConf

    from adadim_lightning.cli.build import make_data
    from adadim_lightning.trust import check_targets

    given = config.get("data")
    own = OmegaConf.create(dict(pretrained.config["data"]))
    chosen = own if given is None else given
    # No loader is made, and a few images need no whole batch; others are brought to the size of the run's.
    wanted = {"batch_size": 2, "num_workers": 0, "channels": pretrained.image_shape[0]}
    if given is not None:
        wanted |= {"image_size": own.get("image_size") or pretrained.image_shape[1]}
    check_targets(OmegaConf.to_container(chosen), list(config.trust or ()))
    try:
        data = make_data(chosen, "data", pretrained.views, **{k: v for k, v in wanted.items() if k in chosen})
        images = pretrained.views.clean(data.sample(IMAGES)[0])
    except (ValueError, OSError, InstantiationException) as error:
        if given is not None:
            raise
        raise ValueError(
            f"the run's own images cannot be loaded ({one_line(error)}); give others by data=..., such as "
            "data=folder data.root=FOLDER"
        ) from error
    if tuple(images.shape[1:]) != pretrained.image_shape:
        raise ValueError(
            f"the backbone wants images {pretrained.image_shape}, but data has {tuple(images.shape[1:])}"
        )
    return images
