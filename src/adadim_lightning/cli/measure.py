"""Evaluates and embeds with models that are trained already."""

import json
import logging
import math
import os
import time
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from adadim_lightning.cli.build import Subject, say, subjects
from adadim_lightning.cli.versions import versions
from adadim_lightning.data import ImageFiles, ImageSet
from adadim_lightning.evaluation import (
    embed,
    few_shot_accuracy,
    knn_accuracy,
    label_free_values,
    linear_accuracy,
    sgd_linear_accuracy,
)
from adadim_lightning.extras import require
from adadim_lightning.functional._numeric import check_integer, check_number
from adadim_lightning.models.backbones import evaluating

Rows = tuple[Tensor, Tensor]

PROBES = ("linear", "knn", "few_shot", "label_free")
# Rows times dimensions times classes for which a logistic regression takes a minute or so.
MOST_FOR_LOGISTIC = 3e8
MODELS_A_TABLE = 3
LABELS = {
    "linear_top1": "linear, logistic regression",
    "linear_sgd_top1": "linear, SGD, 100 epochs",
    "knn_top1": "kNN, k = 20, T = 0.07",
    "knn_plain_top1": "kNN, k = 20, plain vote",
    "H_R": "H(R) [nats]",
    "ER_R": "ER(R)",
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "alpha_req": "alpha-ReQ",
    "I_RZ": "I(R;Z) [nats]",
    "log_n": "  of at most",
    "ER_Z": "ER(Z)",
    "uniformity": "uniformity",
    "alignment": "alignment",
}


def evaluate(config: DictConfig) -> list[dict[str, Any]]:
    """Measure each model, print one table and write one JSON file.

    Args:
        config: what ``conf/evaluate.yaml`` composes to.

    Returns:
        What the file holds for each model: its name, source, data, and ``values``.

    Raises:
        ValueError: something in the configuration does not fit.
    """
    _check(config)
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    results = []
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for subject in subjects(config):
        seed_everything(config.seed, verbose=False)
        start = time.perf_counter()
        say(f"{subject.name}: {subject.data}")
        found = _measure(subject, config)
        found["seconds"] = round(time.perf_counter() - start, 2)
        results.append(found)
        with replacing(out) as file:  # after each model, so that the last failing loses none
            content = {"models": results, "settings": OmegaConf.to_container(config), "versions": versions()}
            file.write((json.dumps(_finite(content), indent=2) + "\n").encode())
    _print(results)
    say(f"\nAll figures are in {os.path.relpath(out)}")
    return results


def _check(config: DictConfig) -> None:
    check_integer("seed", config.seed, low=0)
    strange = [probe for probe in config.probes if probe not in PROBES]
    if strange or not config.probes:
        raise ValueError(f"probes must be some of {', '.join(PROBES)}, got {strange or 'none'}")
    for share in config.few_shot:
        check_number("each of few_shot", share, low=0, high=1)
    check_integer("label_free.images", config.label_free.images, low=2)
    check_integer("label_free.views", config.label_free.views, low=2)
    check_integer("label_free.rows", config.label_free.rows, low=2)


def _measure(subject: Subject, config: DictConfig) -> dict[str, Any]:
    data = subject.data
    if not isinstance(data.train, ImageSet):
        raise ValueError("a stream cannot be evaluated; set data.streaming=false")
    probes = [probe for probe in config.probes if data.is_labeled or probe == "label_free"]
    if not data.is_labeled and probes != list(config.probes):
        say("  no labels: label-free values alone")
    values: dict[str, float] = {}
    sizes = {}
    if set(probes) - {"label_free"}:
        assert data.test is not None
        train, test = (embed(subject.backbone, data.loader(x), data.views.clean) for x in (data.train, data.test))
        sizes = {"train": int((train[1] >= 0).sum()), "test": int((test[1] >= 0).sum())}
        values |= _probe(train, test, probes, config)
    if "label_free" in probes:
        values |= _label_free(subject, config)
    data.report_unreadable()
    return {
        "name": subject.name,
        "source": subject.source,
        "data": data.title,
        "trained_on": subject.trained_on,
        "labeled_images": sizes,
        "image_shape": list(data.image_shape),
        "values": values,
    }


def _probe(train: Rows, test: Rows, probes: Iterable[str], config: DictConfig) -> dict[str, float]:
    values: dict[str, float] = {}
    labels = train[1]
    size = len(labels) * train[0].shape[1] * (int(labels.max()) + 1)
    if "linear" in probes:
        if size <= MOST_FOR_LOGISTIC:
            values["linear_top1"] = linear_accuracy(train, test)
        values["linear_sgd_top1"] = sgd_linear_accuracy(train, test, seed=config.seed)
    if "knn" in probes:
        values["knn_top1"] = knn_accuracy(train, test)
        values["knn_plain_top1"] = knn_accuracy(train, test, temperature=math.inf)
    if "few_shot" in probes:
        for share in config.few_shot:
            name = f"few_shot_{100 * share:g}pct_top1"
            values[name], values[f"{name}_std"] = few_shot_accuracy(train, test, share, seed=config.seed)
    return values


def _label_free(subject: Subject, config: DictConfig) -> dict[str, float]:
    """Values of the held-out images, or of the training images where there are none."""
    data, settings = subject.data, config.label_free
    images = data.test if data.test is not None else data.train
    assert isinstance(images, ImageSet)
    some = _spread(images, settings.rows)
    r, _ = embed(subject.backbone, data.loader(some), data.views.clean)
    z = None if subject.projection_head is None else _apply(subject.projection_head, r)
    objects = _spread(images, settings.images)
    # Pairs of views, until there are enough of them.
    views: list[Tensor] = []
    while len(views) < settings.views:
        pair = [embed(subject.backbone, data.loader(objects), lambda x, i=i: data.views(x)[i])[0] for i in (0, 1)]
        views += pair
    return label_free_values(r, z, torch.stack(views[: settings.views], dim=1))


def _spread(images: ImageSet, most: int) -> ImageSet:
    """At most so many images, spread evenly over the set, which may be sorted by class."""
    if len(images) <= most:
        return images
    return images.subset(torch.linspace(0, len(images) - 1, most).long().tolist())


@torch.no_grad()
def _apply(head: nn.Module, r: Tensor) -> Tensor:
    device = next(head.parameters(), r).device
    with evaluating(head):
        return torch.cat([head(rows.to(device)).float().cpu() for rows in r.split(1024)])


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity; they become null."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _label(key: str) -> str:
    if key.startswith("few_shot_"):
        return f"{key.split('_')[2].replace('pct', ' %')} of the labels, logistic regression"
    return LABELS[key]


def _print(results: list[dict[str, Any]]) -> None:
    console = Console(highlight=False)
    keys = list(dict.fromkeys(key for x in results for key in x["values"] if not key.endswith("_std")))
    for start in range(0, len(results), MODELS_A_TABLE):
        shown = results[start : start + MODELS_A_TABLE]
        table = Table(show_edge=False)
        table.add_column("")
        for result in shown:
            moved = f"\n{result['trained_on']} -> {result['data']}" if result["trained_on"] else ""
            table.add_column(escape(result["name"] + moved), justify="right")
        for key in keys:
            table.add_row(escape(_label(key)), *(_figure(result["values"], key) for result in shown))
        console.print()
        console.print(table)


def _figure(values: dict[str, float], key: str) -> str:
    if key not in values:
        return "-"
    spread = f" +- {values[f'{key}_std']:.3f}" if f"{key}_std" in values else ""
    return f"{values[key]:.3f}{spread}"


@contextmanager
def replacing(path: Path) -> Any:
    """A file that takes the place of another once it is whole."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_embeddings(config: DictConfig) -> Path:
    """Write R and Z of all images with their labels, names and splits.

    Args:
        config: what ``conf/embed.yaml`` composes to.

    Returns:
        The file: npz or parquet, with ``representation`` ``(N, d_R)``, ``embedding`` ``(N, d_Z)`` where there is a
        head, ``label`` (-1 where there is none), ``path`` and ``split`` (``train`` or ``test``). Images that
        cannot be read have no row.

    Raises:
        ValueError: something in the configuration does not fit.
    """
    out = Path(config.out)
    if out.suffix not in (".npz", ".parquet"):
        raise ValueError(f"out must end in .npz or .parquet, got {out}")
    found = list(subjects(config))
    if len(found) != 1:
        raise ValueError(f"one model at a time, got {len(found)}")
    subject = found[0]
    data = subject.data
    say(f"{subject.name}: {data}")
    columns: dict[str, list[Any]] = {"representation": [], "label": [], "path": [], "split": []}
    for split, images in (("train", data.train), ("test", data.test)):
        if images is None:
            continue
        if not isinstance(images, ImageSet):
            raise ValueError("a stream cannot be embedded; set data.streaming=false")
        r, labels = embed(subject.backbone, data.loader(images), data.views.clean)
        kept = ~images.unreadable if isinstance(images, ImageFiles) else torch.ones(len(r), dtype=torch.bool)
        names = images.names if images.names is not None else [""] * len(images)
        columns["representation"].append(r[kept])
        columns["label"].append(labels[kept])
        columns["path"] += [name for name, keep in zip(names, kept.tolist(), strict=True) if keep]
        columns["split"] += [split] * int(kept.sum())
    data.report_unreadable()
    r, labels = torch.cat(columns["representation"]), torch.cat(columns["label"])
    arrays = {"representation": r.numpy()}
    if subject.projection_head is not None:
        arrays["embedding"] = _apply(subject.projection_head, r).numpy()
    arrays |= {"label": labels.numpy(), "path": np.asarray(columns["path"]), "split": np.asarray(columns["split"])}
    parquet = require("pyarrow", "hf") if out.suffix == ".parquet" else None
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        if parquet is None:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        else:
            _write_parquet(parquet, file, arrays)
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in arrays.items() if x.ndim == 2)
    say(f"{out}: {shapes}, label, path, split of {len(labels):,} images")
    return out


def _write_parquet(pyarrow: Any, file: IO[bytes], arrays: dict[str, Any]) -> None:
    from pyarrow import parquet

    table = pyarrow.table(
        {
            name: pyarrow.FixedSizeListArray.from_arrays(x.ravel(), x.shape[1]) if x.ndim == 2 else x
            for name, x in arrays.items()
        }
    )
    parquet.write_table(table, file)
