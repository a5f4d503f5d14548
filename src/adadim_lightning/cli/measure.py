"""Evaluates and embeds with models that are trained already."""

import json
import math
import os
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from adadim_lightning.cli.app import nearest
from adadim_lightning.cli.build import Subject, find_checkpoints, say, subjects
from adadim_lightning.cli.closing import FEW_SHOT, unseen_classes, why_unscored
from adadim_lightning.cli.versions import versions
from adadim_lightning.data import ImageData, ImageFiles, ImageSet
from adadim_lightning.evaluation import (
    embed,
    few_shot_accuracy,
    knn_accuracy,
    label_free_values,
    linear_accuracies,
    sgd_linear_accuracy,
)
from adadim_lightning.extras import require
from adadim_lightning.functional._numeric import check_integer, check_number
from adadim_lightning.models import representation_dim
from adadim_lightning.models.backbones import evaluating

Rows = tuple[Tensor, Tensor]
Values = dict[str, float | None]

PROBES = ("linear", "knn", "few_shot", "label_free")
# Rows times dimensions times classes for which a logistic regression takes a minute or so.
MOST_FOR_LOGISTIC = 3e8
NEIGHBORS = 20  # the default of knn_accuracy
VIEWS_AT_ONCE = 512
GROUPS = {
    "Linear probe": {
        "linear_top1": "logistic regression",
        "linear_balanced": "  mean over classes",
        "linear_sgd_top1": "SGD, 100 epochs",
    },
    f"Nearest neighbors, k = {NEIGHBORS}": {"knn_top1": "weighted, T = 0.07", "knn_plain_top1": "plain vote"},
    "Few labels, mean of 3": {},  # a row for each of few_shot
    "Without labels": {
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
    },
}
LABEL_WIDTH, FIGURE_WIDTH = 27, 14  # three models fit into 80 columns


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
    seed_everything(config.seed, verbose=False)  # a backbone without weights is drawn
    models = subjects(config)
    out = _writable(config.out, ".json")
    results: list[dict[str, Any]] = []
    try:
        for subject in models:
            seed_everything(config.seed, verbose=False)  # no model sees what came before it
            start = time.perf_counter()
            say(f"{subject.name}\n  {subject.data}")
            if not results:
                _say_replaced(out)
            found = _measure(subject, config)
            found["seconds"] = round(time.perf_counter() - start, 2)
            results.append(found)
            content = {"models": results, "settings": OmegaConf.to_container(config), "versions": versions()}
            with _replacing(out) as file:
                file.write((json.dumps(_finite(content), indent=2) + "\n").encode())
    finally:  # what was measured before an error or a Ctrl-C is shown, too
        if results:
            _print(results)
            say(f"\nAll figures are in {os.path.relpath(out)}")
    return results


def _check(config: DictConfig) -> None:
    check_integer("seed", config.seed, low=0)
    probes = _listed(config.probes)
    for probe in probes:
        if probe not in PROBES:
            meant = nearest(str(probe), PROBES)
            hint = f"did you mean {meant!r}?" if meant else f"there are {', '.join(PROBES)}"
            raise ValueError(f"probes has no option {probe!r}; {hint}")
    if not probes:
        raise ValueError(f"probes is empty: name some of {', '.join(PROBES)}")
    for share in _listed(config.few_shot):
        check_number("each of few_shot", share, low=0, high=1)
        if share == 0:
            raise ValueError("each of few_shot must be > 0: it is a share of the labels")
    for key in ("images", "views", "rows"):
        check_integer(f"label_free.{key}", config.label_free[key], low=2)


def _listed(value: Any) -> list[Any]:
    """One thing may be given without brackets."""
    return list(value) if isinstance(value, list | ListConfig) else [] if value is None else [value]


def _writable(path: Any, *endings: str) -> Path:
    """Where the result will go; that it cannot must be known before the work."""
    out = Path(str(path)).expanduser()
    if out.suffix not in endings:
        raise ValueError(f"out must end in {' or '.join(endings)}, got {out}")
    try:
        if out.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        reason = "Not a directory" if isinstance(error, FileExistsError) else error.strerror
        raise ValueError(f"cannot write {out}: {reason}; name another file by out=FILE") from error
    return out


def _say_replaced(out: Path) -> None:
    if out.exists():
        say(f"  {os.path.relpath(out)} is there already: it will be replaced")


def _measure(subject: Subject, config: DictConfig) -> dict[str, Any]:
    data = subject.data
    _check_no_stream(data, "evaluated")
    probes = _listed(config.probes)
    if probes != ["label_free"] and (reason := why_unscored(data)) is not None:
        if "label_free" not in probes:
            raise ValueError(
                f"{data.title} cannot serve {', '.join(probes)} (labels: {reason}); set probes=[label_free]"
            )
        say(f"  labels: {reason}; only what needs none is measured")
        probes = ["label_free"]
    if "label_free" in probes and len(_unlabeled(data)) < 2:
        raise ValueError(
            f"label_free needs at least 2 images, and {data.title} has 1; leave it out of probes=[...]"
        )
    too_large = set[str]()
    if probes != ["label_free"]:
        too_large = _say_limits(subject, probes, config)
    values: Values = {}
    sizes = {}
    r = None
    if probes != ["label_free"]:
        assert isinstance(data.train, ImageSet)
        assert data.test is not None
        train, test = (embed(subject.backbone, data.loader(x), data.views.clean) for x in (data.train, data.test))
        sizes = {"train": int((train[1] >= 0).sum()), "test": int((test[1] >= 0).sum())}
        values |= _probe(train, test, probes, config, too_large)
        r = test[0]
    if "label_free" in probes:
        values |= _label_free(subject, r, config)
    data.report_unreadable()
    return {
        "name": subject.name,
        "source": subject.source,
        "trained_on": subject.trained_on,
        "data": data.title,
        "labeled_images": sizes,
        "image_shape": list(data.image_shape),
        "values": values,
    }


def _check_no_stream(data: ImageData, what: str) -> None:
    if not isinstance(data.train, ImageSet):
        raise ValueError(f"a stream cannot be {what}; set data.streaming=false")


def _say_limits(subject: Subject, probes: Iterable[str], config: DictConfig) -> set[str]:
    """Say what the probes will leave out or do otherwise; the names of the logistic regressions left out."""
    data = subject.data
    assert isinstance(data.train, ImageSet)
    assert data.test is not None
    labels, held_out = data.train.labels, data.test.labels
    rows = int((labels >= 0).sum())
    image = data.views.clean(data.sample(1)[0])[0]
    size = rows * (int(labels.max()) + 1) * representation_dim(subject.backbone, image)
    shares = {"linear_top1": 1.0} if "linear" in probes else {}
    if "few_shot" in probes:
        shares |= {FEW_SHOT.format(100 * share): share for share in _listed(config.few_shot)}
    left_out = {name: share for name, share in shares.items() if share * size > MOST_FOR_LOGISTIC}
    if left_out:
        names = (
            "all labels" if name == "linear_top1" else f"{100 * share:g} %" for name, share in left_out.items()
        )
        say(f"  logistic regression of so many images would take too long: no {', '.join(names)}")
    if "knn" in probes and rows < NEIGHBORS:
        say(f"  {rows} labeled images to learn from: all of them are neighbors, not k = {NEIGHBORS}")
    if unseen := unseen_classes(labels, held_out):
        say(
            f"  {unseen:,} of {int((held_out >= 0).sum()):,} held-out labels are of classes that no training "
            "image has: they always count as wrong"
        )
    return set(left_out)


def _probe(
    train: Rows, test: Rows, probes: Iterable[str], config: DictConfig, too_large: Collection[str]
) -> Values:
    values: Values = {}
    if "linear" in probes:
        values["linear_top1"] = values["linear_balanced"] = None
        if "linear_top1" not in too_large:
            values["linear_top1"], values["linear_balanced"] = linear_accuracies(train, test)
        values["linear_sgd_top1"] = sgd_linear_accuracy(train, test, seed=config.seed)
    if "knn" in probes:
        values["knn_top1"] = knn_accuracy(train, test, k=NEIGHBORS)
        values["knn_plain_top1"] = knn_accuracy(train, test, k=NEIGHBORS, temperature=math.inf)
    if "few_shot" in probes:
        for share in _listed(config.few_shot):
            name = FEW_SHOT.format(100 * share)
            values[name] = None
            if name not in too_large:
                values[name], values[f"{name}_std"] = few_shot_accuracy(train, test, share, seed=config.seed)
    return values


def _label_free(subject: Subject, r: Tensor | None, config: DictConfig) -> Values:
    """Values of the held-out images, of which R may be known, or of the training images if there are no others."""
    data, settings = subject.data, config.label_free
    images = _unlabeled(data)
    chosen = _spread(images, settings.rows)
    if r is None:
        some = images.subset(chosen.tolist())
        r, _ = embed(subject.backbone, data.loader(some), data.views.clean)
        readable = _readable(some)
    else:
        r, readable = r[chosen], _readable(images)[chosen]
    r = r[readable]
    z = None if subject.projection_head is None else _apply(subject.projection_head, r)
    return {**label_free_values(r, z, _embed_views(subject, images, settings))}


def _unlabeled(data: ImageData) -> ImageSet:
    """The images that are looked at without their labels."""
    images = data.test if data.test is not None else data.train
    assert isinstance(images, ImageSet)
    return images


def _embed_views(subject: Subject, images: ImageSet, settings: DictConfig) -> Tensor:
    """Representations ``(M, q, d_R)`` of q views of each of M images, which are read once."""
    data, count = subject.data, settings.views
    some = images.subset(_spread(images, settings.images).tolist())

    def views(batch: Tensor) -> Tensor:
        pairs = (view for _ in range(math.ceil(count / 2)) for view in data.views(batch))
        return torch.stack(list(pairs)[:count], dim=1).flatten(0, 1)

    # In small groups: all views of a loader's batch would need much memory.
    size = max(1, VIEWS_AT_ONCE // count)
    groups = (group for x, y in data.loader(some) for group in zip(x.split(size), y.split(size), strict=True))
    r, _ = embed(subject.backbone, groups, views)
    return r.reshape(-1, count, r.shape[1])[_readable(some)]


def _spread(images: ImageSet, most: int) -> Tensor:
    """Indices of at most so many images, spread evenly over the set, which may be sorted by class."""
    return torch.linspace(0, len(images) - 1, min(most, len(images)), dtype=torch.float64).long()


def _readable(images: ImageSet) -> Tensor:
    """Which images could be read, once all were asked for: others stand in for the rest."""
    return ~images.unreadable if isinstance(images, ImageFiles) else torch.ones(len(images), dtype=torch.bool)


@torch.no_grad()
def _apply(head: nn.Module, r: Tensor) -> Tensor:
    device = next(head.parameters(), r).device
    with evaluating(head):
        return torch.cat([head(rows.to(device)).float().cpu() for rows in torch.split(r, 1024)])


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity; they become null."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(results: list[dict[str, Any]]) -> None:
    """The table, in parts of as many models as fit side by side."""
    console = Console(highlight=False)
    fitting = max(1, (console.width - LABEL_WIDTH - 2) // (FIGURE_WIDTH + 3))
    parts = math.ceil(len(results) / fitting)
    size = math.ceil(len(results) / parts)
    for start in range(0, len(results), size):
        console.print()
        console.print(_table(results[start : start + size], console.width))


def _table(results: list[dict[str, Any]], width: int) -> Table:
    table = Table(show_edge=False)
    table.add_column("", no_wrap=True)
    most = max(FIGURE_WIDTH, (width - LABEL_WIDTH - 2) // len(results) - 3)
    for result in results:
        table.add_column(escape(result["name"]), justify="right", overflow="fold", max_width=most)
    known = {key: None for result in results for key in result["values"]}
    if any(result["trained_on"] for result in results):
        table.add_row("trained on", *(escape(result["trained_on"] or "-") for result in results))
    table.add_row("measured on", *(escape(result["data"]) for result in results))
    if any(result["labeled_images"] for result in results):
        sizes = (result["labeled_images"].values() for result in results)
        table.add_row("  labeled, train / test", *(" / ".join(f"{x:,}" for x in size) or "-" for size in sizes))
    for title, rows in GROUPS.items():
        if title.startswith("Few"):
            names = (key for key in known if key.startswith("few_shot") and not key.endswith("_std"))
            rows = {key: f"{key.split('_')[2].removesuffix('pct')} %" for key in names}
        shown = {key: label for key, label in rows.items() if key in known}
        if shown:
            table.add_section()
            table.add_row(title)
        for key, label in shown.items():
            table.add_row(escape(f"  {label}"), *(_figure(result["values"], key) for result in results))
    return table


def _figure(values: Values, key: str) -> str:
    value, spread = values.get(key), values.get(f"{key}_std")
    if value is None:
        return "-"
    return f"{value:.3f}" + ("" if spread is None else f" +- {spread:.3f}")


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of another once it is whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
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
        MissingExtraError: parquet is wanted but pyarrow is not installed.
    """
    if config.get("ckpt") is not None and len(found := find_checkpoints(config.ckpt)) > 1:
        raise ValueError(f"adadim-embed takes one model at a time, and ckpt means {len(found)}")
    seed_everything(0, verbose=False)  # a backbone without weights is drawn
    models = subjects(config)
    out = _writable(config.out, ".npz", ".parquet")
    parquet = require("pyarrow.parquet", "hf") if out.suffix == ".parquet" else None
    subject = next(models)
    data = subject.data
    _check_no_stream(data, "embedded")
    say(f"{subject.name}\n  {data}")
    _say_replaced(out)
    columns: dict[str, list[Any]] = {"representation": [], "label": [], "path": [], "split": []}
    for split, images in (("train", data.train), ("test", data.test)):
        if not isinstance(images, ImageSet):
            continue
        r, labels = embed(subject.backbone, data.loader(images), data.views.clean)
        kept = _readable(images)
        names = images.names if images.names is not None else [""] * len(images)
        columns["representation"].append(r[kept])
        columns["label"].append(labels[kept])
        columns["path"] += [name for name, keep in zip(names, kept.tolist(), strict=True) if keep]
        columns["split"] += [split] * int(kept.sum())
    data.report_unreadable()
    r = torch.cat(columns["representation"])
    arrays = {"representation": r.numpy()}
    if subject.projection_head is not None:
        arrays["embedding"] = _apply(subject.projection_head, r).numpy()
    arrays["label"] = torch.cat(columns["label"]).numpy()
    arrays |= {name: np.asarray(columns[name], dtype=str) for name in ("path", "split")}
    with _replacing(out) as file:
        if parquet is None:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        else:
            _write_parquet(parquet, file, arrays)
    shapes = ", ".join(name + (f" ({x.shape[1]})" if x.ndim == 2 else "") for name, x in arrays.items())
    say(f"  {shapes}\n\n{len(r):,} images are in {os.path.relpath(out)}")
    return out


def _write_parquet(parquet: Any, file: IO[bytes], arrays: dict[str, Any]) -> None:
    import pyarrow

    columns = {
        name: pyarrow.FixedSizeListArray.from_arrays(x.ravel(), x.shape[1]) if x.ndim == 2 else x
        for name, x in arrays.items()
    }
    parquet.write_table(pyarrow.table(columns), file)
