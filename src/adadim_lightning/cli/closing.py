"""The evaluation that closes a run: frozen backbones on held-out images."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adadim_lightning.cli.summary import Figures
from adadim_lightning.data import ImageData, ImageSet
from adadim_lightning.evaluation import embed, few_shot_accuracy, knn_accuracy, linear_accuracies
from adadim_lightning.functional._numeric import check_integer

BACKBONES = ("raw", "untrained", "trained")
PROBES = ("linear", "knn", "few_shot")
FEW_SHOT = "few_shot_{:g}pct_top1"
SHARES = (0.01, 0.1)  # of the labels
MOST_RAW_PIXELS = 1024


def check_evaluation(settings: Any) -> None:
    """Raise ValueError unless the settings ``evaluation`` say what there is."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"evaluation must be null or have the keys of, probes and images, got {settings!r}")
    for key, known in (("of", BACKBONES), ("probes", PROBES)):
        chosen = settings.get(key)
        if not isinstance(chosen, Sequence) or isinstance(chosen, str):
            raise ValueError(f"evaluation.{key} must be a list such as [{', '.join(known)}], got {chosen!r}")
        unknown = [x for x in chosen if x not in known]
        if unknown:
            raise ValueError(f"evaluation.{key} has no option {unknown[0]!r}; there are {', '.join(known)}")
    check_integer("evaluation.images", settings.get("images"), low=2)


def why_unscored(data: ImageData) -> str | None:
    """Why no probe can learn from the labels of data and be scored on them; None if one can."""
    if data.test is None and getattr(data.train, "is_labeled", True):
        return "none held out"
    if not data.is_labeled:
        trained, held = (getattr(x, "is_labeled", False) for x in (data.train, data.test))
        return "none on the held-out images" if trained else "none on the training images" if held else "none"
    if isinstance(data.train, ImageSet) and len(torch.unique(data.train.labels[data.train.labels >= 0])) < 2:
        return "all of one class"
    return None


def why_unevaluated(data: ImageData, settings: Mapping[str, Any] | None) -> str | None:
    """Why the closing evaluation will measure nothing, where that is not wanted; None if it will."""
    if settings is None:
        return None
    if not isinstance(data.train, ImageSet):
        return "a stream of images has no fixed rows; data.streaming=false or eval_data=... brings some"
    return why_unscored(data)


def is_left_out(name: str, data: ImageData) -> bool:
    """Whether a kind of backbone is not evaluated on such images: raw pixels that are too many."""
    return name == "raw" and math.prod(data.image_shape) > MOST_RAW_PIXELS


def unseen_classes(train: torch.Tensor, test: torch.Tensor) -> int:
    """Number of labels to score whose class no label to learn from has: none of them can be right."""
    return int(((test >= 0) & ~torch.isin(test, train[train >= 0])).sum())


def evaluation_names(settings: Mapping[str, Any], data: ImageData) -> set[str]:
    """Log names of what :func:`evaluate_backbones` will measure."""
    probes = {"linear": ["linear_top1", "linear_balanced"], "knn": ["knn_top1"]}
    probes["few_shot"] = [FEW_SHOT.format(100 * share) for share in SHARES]
    kinds = [name for name in settings["of"] if not is_left_out(name, data)]
    return {f"evaluation/{name}_{probe}" for name in kinds for x in settings["probes"] for probe in probes[x]}


def evaluate_backbones(
    backbones: Mapping[str, nn.Module], data: ImageData, settings: Mapping[str, Any] | None
) -> Figures:
    """Accuracies of frozen backbones on held-out images.

    Args:
        backbones: by name, ``raw``, ``untrained`` and ``trained``; raw pixels of images with more than 1,024 are
            left out.
        data: labeled images; where :func:`why_unevaluated` has a reason nothing is measured.
        settings: of the key ``evaluation``: ``of``, ``probes``, ``images``; None measures nothing.

    Returns:
        Shares in ``[0, 1]`` by log name.
    """
    if settings is None or why_unevaluated(data, settings):
        return {}
    assert isinstance(data.train, ImageSet)
    assert data.test is not None
    splits = [_some_labeled(images, settings["images"]) for images in (data.train, data.test)]
    found: Figures = {}
    for name in settings["of"]:
        if is_left_out(name, data):
            continue
        train, test = (embed(backbones[name], data.loader(x), data.views.clean) for x in splits)
        if "linear" in settings["probes"]:
            linear = linear_accuracies(train, test)
            found[f"evaluation/{name}_linear_top1"] = linear.top1
            found[f"evaluation/{name}_linear_balanced"] = linear.balanced
        if "knn" in settings["probes"]:
            found[f"evaluation/{name}_knn_top1"] = knn_accuracy(train, test)
        if "few_shot" in settings["probes"]:
            for share in SHARES:
                mean, _ = few_shot_accuracy(train, test, share)
                found[f"evaluation/{name}_{FEW_SHOT.format(100 * share)}"] = mean
    return found


def _some_labeled(images: ImageSet, most: int) -> ImageSet:
    """The images that have a label; of many, a fixed random part."""
    labeled = (images.labels >= 0).nonzero().flatten()
    if len(labeled) > most:
        labeled = labeled[torch.randperm(len(labeled), generator=torch.Generator().manual_seed(0))[:most]]
    return images if len(labeled) == len(images) else images.subset(labeled.sort().values.tolist())
