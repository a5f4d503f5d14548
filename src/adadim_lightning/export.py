"""Backbones in formats that other programs read, each read back and compared before it is kept."""

import copy
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adadim_lightning.extras import require
from adadim_lightning.pretrained import FETCHED, Pretrained

ENDINGS = {
    "torchvision": ".torchvision.pt",
    "timm": ".timm.pt",
    "safetensors": ".safetensors",
    "torchscript": ".torchscript.pt",
    "torch_export": ".pt2",
    "onnx": ".onnx",
}
# Of the largest |R|. Weights are copied; graphs are other kernels, which round otherwise.
TOLERANCES = {"torchscript": 1e-4, "torch_export": 1e-4, "onnx": 1e-4}
TOLERANCE_OF_WEIGHTS = 1e-6
_OF_LIBRARIES = ("torchvision", "timm")
_LOAD = {
    "torchvision": 'model.load_state_dict(torch.load("{name}"))',
    "timm": 'model.load_state_dict(torch.load("{name}"))',
    "safetensors": 'backbone.load_state_dict(safetensors.torch.load_file("{name}"))',
    "torchscript": 'torch.jit.load("{name}")(images)',
    "torch_export": 'torch.export.load("{name}").module()(images)',
    "onnx": 'onnxruntime.InferenceSession("{name}").run(None, {{"images": images}})',
}

Run = Callable[[Tensor], Tensor]


class ExportError(ValueError):
    """A backbone cannot be exported, or what was read back is not the same backbone."""


@dataclass(frozen=True)
class Export:
    """A file that was written, read back and found right.

    Attributes:
        path: the file; ``NAME.json`` beside it tells what its images have to look like.
        format: one of ``ENDINGS``.
        size: in bytes.
        difference: the largest between its representations and the backbone's own.
        images: number of images that were compared.
        load: lines of Python that read it.
    """

    path: Path
    format: str
    size: int
    difference: float
    images: int
    load: tuple[str, ...]


def describe(pretrained: Pretrained) -> dict[str, Any]:
    """What the user of an exported backbone needs to know of its images and its origin.

    Args:
        pretrained: as :func:`~adadim_lightning.pretrained.load_pretrained` gives it.

    Returns:
        Plain values: ``channels``, ``image_size``, ``mean`` and ``std`` (of pixels in ``[0, 1]``), ``resize``
        (side of the square before its middle is cut out), ``backbone`` (its configuration), ``checkpoint``.
    """
    channels, height, width = pretrained.image_shape
    size = height if height == width else [height, width]
    mean, std = (x.flatten().tolist() for x in (pretrained.views.mean, pretrained.views.std))
    return {
        "channels": channels,
        "image_size": size,
        "resize": pretrained.config["data"].get("image_size") or size,
        "mean": [round(x, 6) for x in mean],
        "std": [round(x, 6) for x in std],
        "backbone": pretrained.config["backbone"],
        # Without the folders above, which are nobody else's business.
        "checkpoint": "/".join(pretrained.path.resolve().parts[-3:]),
    }


def export_backbone(
    backbone: nn.Module,
    path: str | Path,
    *,
    format: str,
    example: Tensor,
    metadata: Mapping[str, Any] | None = None,
) -> Export:
    """Write a backbone in a format that other programs read, and check it.

    The file is read back as its user would and run in evaluation mode on one image and on all of ``example``; only
    if it does what the backbone does is it put in its place, where a failure leaves an older file as it was. The
    backbone itself, its mode and gradients, and the global random state stay untouched.

    ========================  =========================================================================
    ``torchvision, timm``     state dict under the library's own names, without the classifier's weights
    ``safetensors``           state dict, the metadata in its header
    ``torchscript``           traced program, any batch size
    ``torch_export``          exported program, any batch size
    ``onnx``                  graph from ``images`` to ``representations``, any batch size
    ========================  =========================================================================

    Args:
        backbone: images ``(B, C, H, W)`` to representations ``(B, d_R)``.
        path: file to write.
        format: one of the above.
        example: real images as the backbone wants them, shape ``(N, C, H, W)``, N at least 2.
        metadata: plain values for ``NAME.json`` beside the file, as :func:`describe` gives them; its entry
            ``backbone``, a configuration, names the model of torchvision or timm.

    Returns:
        The file, and how near it comes to the backbone.

    Raises:
        ExportError: the format is not known or cannot hold the backbone, or what was read back differs by more
            than 1e-4 (weights alone: 1e-6) of the largest ``|R|``.
        MissingExtraError: ``onnx`` or ``timm`` is asked for and not installed.

    Example:
        >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
        >>> folder = tempfile.TemporaryDirectory()
        >>> export_backbone(
        ...     backbone, f"{folder.name}/b.safetensors", format="safetensors", example=torch.rand(4, 1, 8, 8)
        ... ).difference
        0.0
    """
    check_format(format)
    if example.ndim != 4 or len(example) < 2:
        raise ExportError(f"example must be at least 2 images (N, C, H, W), got {tuple(example.shape)}")
    path = Path(path).expanduser()
    described = dict(metadata or {})
    model = (
        copy.deepcopy(getattr(backbone, "_orig_mod", backbone)).cpu().float().eval()
    )  # of a compiled one, itself
    example = example.detach().cpu().float()
    batches = (example[:1], example)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of the exporters: what they fear for is compared below
        expected = _run(model, batches)
        reader, lines = model, list[str]()
        if format in _OF_LIBRARIES:
            reader, lines = _from_library(format, described.get("backbone"), model)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place, to be moved there in one step, and under its own name, which some formats note.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            file, beside = Path(folder) / path.name, Path(folder) / f"{path.name}.json"
            described |= {"format": format, "representation_dim": expected.shape[1]}
            try:
                _write(model, file, format, example[:2], described)
                difference = float((_run(_read(file, format, reader), batches) - expected).abs().max())
            except OSError:
                raise
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ExportError(f"{format} does not work with this backbone: {reason}") from error
            allowed = TOLERANCES.get(format, TOLERANCE_OF_WEIGHTS) * float(expected.abs().max())
            if not difference <= allowed:
                raise ExportError(
                    f"{path.name} was not kept: read back, its representations differ by {difference:.2g}, more "
                    f"than {allowed:.2g}"
                )
            load = (*lines, _LOAD[format].format(name=path.name))
            described |= {"largest_difference": difference, "images_compared": len(example), "load": load}
            beside.write_text(json.dumps(described, indent=2) + "\n")
            size = file.stat().st_size
            for written in (file, beside):
                os.replace(written, path.with_name(written.name))
    return Export(path, format, size, difference, len(example), load)


def check_format(format: str) -> None:
    """Raise ExportError for a format that is not known, MissingExtraError for one whose package is not there."""
    if format not in ENDINGS:
        raise ExportError(f"there is no format {format!r}; there are {', '.join(ENDINGS)}")
    if format == "timm":
        require("timm", "timm")
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package, "onnx")


def check_library(format: str, config: Any, backbone: nn.Module) -> None:
    """Raise ExportError unless a backbone may be written in a format: those of a library hold its own alone.

    Args:
        format: one of ``ENDINGS``.
        config: of the backbone, which names its class.
        backbone: the backbone itself.
    """
    if format not in _OF_LIBRARIES:
        return
    target = str(config.get("_target_")) if isinstance(config, Mapping) else ""
    if not _is_ours(target, format) and not target.startswith(f"{format}."):
        what = target or type(backbone).__name__
        raise ExportError(f"{format} is for backbones that {format} made, not for {what}; use safetensors")


def _is_ours(target: str, library: str) -> bool:
    return target.startswith("adadim_lightning.") and target.endswith(f".{library}_backbone")


@torch.no_grad()
def _run(model: Run, batches: Sequence[Tensor]) -> Tensor:
    """Representations of the batches, one batch after another."""
    parts = [model(batch) for batch in batches]
    if not all(isinstance(part, Tensor) and part.ndim == 2 for part in parts):
        last = parts[-1]
        got = tuple(last.shape) if isinstance(last, Tensor) else type(last).__name__
        raise ExportError(f"representations must have the shape (B, d_R), got {got}")
    found = torch.cat(parts)
    if not bool(found.isfinite().all()):
        raise ExportError("the representations of these images hold a NaN or infinity")
    return found


def _write(model: nn.Module, path: Path, format: str, pair: Tensor, metadata: Mapping[str, Any]) -> None:
    # Copies: safetensors refuses tensors that share memory.
    state = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
    batch = ({0: torch.export.Dim("batch")},)
    if format in _OF_LIBRARIES:
        torch.save(state, path)
    elif format == "safetensors":
        from safetensors.torch import save

        # Other readers look for the entry format. Its own writer would hide the file from other users.
        path.write_bytes(save(state, {"format": "pt", "adadim": json.dumps(metadata)}))
    elif format == "torchscript":
        torch.jit.trace(model, pair, check_trace=False).save(path)  # type: ignore[no-untyped-call]
    elif format == "torch_export":
        torch.export.save(torch.export.export(model, (pair,), dynamic_shapes=batch), path)
    else:
        names = {"input_names": ["images"], "output_names": ["representations"]}
        options: dict[str, Any] = {"dynamo": True, "dynamic_shapes": batch, "verbose": False, **names}
        torch.onnx.export(model, (pair,), path, external_data=False, **options)


def _read(path: Path, format: str, reader: nn.Module) -> Run:
    """What a user makes of a file; ``reader`` lends bare weights its architecture."""
    if format == "torchscript":
        return torch.jit.load(path)  # type: ignore[no-any-return, no-untyped-call]
    if format == "torch_export":
        return torch.export.load(path).module()
    if format == "onnx":
        session = require("onnxruntime", "onnx").InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    from safetensors.torch import load_file

    filled = copy.deepcopy(reader)
    filled.load_state_dict(load_file(path) if format == "safetensors" else torch.load(path, weights_only=True))
    return filled.eval()


def _from_library(library: str, config: Any, backbone: nn.Module) -> tuple[nn.Module, list[str]]:
    """The model as its library makes it by name, changed as the backbone was, and the lines that do so."""
    check_library(library, config, backbone)
    target = str(config["_target_"])
    is_ours = _is_ours(target, library)
    without = (*FETCHED, "pretrained", "cifar_stem", "_target_")
    options = {key: value for key, value in config.items() if key not in without}
    name = options.pop("name", None) or options.pop("model_name", None) or target.rpartition(".")[2]
    channels, image_size = options.pop("in_channels", 3), options.pop("image_size", None)
    if library == "timm":
        import timm

        make, call = timm.create_model, "timm.create_model"
        if is_ours:
            options |= {"num_classes": 0, "in_chans": channels}
            try:  # models for any size do not take one
                make(name, **options, img_size=image_size)
                options |= {} if image_size is None else {"img_size": image_size}
            except TypeError:
                pass
    else:
        from torchvision import models

        make, call = models.get_model, "torchvision.models.get_model"
        if name in ("googlenet", "inception_v3"):
            transforms = bool(getattr(backbone, "transform_input", False))
            options |= {"aux_logits": False, "init_weights": False, "transform_input": transforms}
    model: nn.Module = make(name, **options)
    lines = [f"model = {call}({', '.join([repr(name), *(f'{key}={value!r}' for key, value in options.items())])})"]
    for place, module in backbone.named_modules():
        if not any(module.children()) and repr(module) != repr(model.get_submodule(place)):
            parent, _, child = place.rpartition(".")
            setattr(model.get_submodule(parent), child, copy.deepcopy(module))
            lines.append(re.sub(r"\.(\d+)", r"[\1]", f"model.{place}") + f" = torch.nn.{module!r}")
    return model, lines
