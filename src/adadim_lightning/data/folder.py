"""Folders of images, in the layouts that people have on disk."""

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adadim_lightning.data.images import ImageFiles, check_channels
from adadim_lightning.data.module import ImageData
from adadim_lightning.data.splits import class_indices, hold_out, image_data

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}
TRAIN = ("train", "training", "ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", "train.X*")
TEST = (
    "val",
    "valid",
    "validation",
    "test",
    "testing",
    "ILSVRC/Data/CLS-LOC/val",
    "Data/CLS-LOC/val",
    "val.X*",
)


def image_folder(
    root: str | Path,
    *,
    train_folder: str | None = None,
    test_folder: str | None = None,
    labeled: bool | None = None,
    classes: str | Path | Sequence[str] | None = None,
    held_out: float = 0.1,
    image_size: int | None = 224,
    channels: int = 3,
    max_unreadable: int = 100,
    in_memory: bool | None = None,
    title: str | None = None,
    **options: Any,
) -> ImageData:
    """Images below a folder, with or without classes.

    Training and held-out images are looked for in ``train`` and ``val`` (``valid``, ``validation``, ``test``), in
    ``ILSVRC/Data/CLS-LOC/...`` and in ``train.X1`` and the like; else the images below ``root`` are all there is. Class
    folders tell the classes. The classes of a held-out folder without class folders come from
    ``val_annotations.txt`` (Tiny-ImageNet), ``LOC_val_solution.csv`` or the development kit (ImageNet). Hidden
    files, and those whose names do not end as images do, do not count.

    Args:
        root: the folder.
        train_folder: of the training images below ``root``, where it has another name.
        test_folder: of the held-out images.
        labeled: whether the folders with the images are classes; None means so if there are two or more, and no
            image beside them.
        classes: keep only these: their names, or a file with a name a line.
        held_out: the share of images with classes that is held out where there is no folder of such.
        image_size: side of the square that the images are scaled and cut to; None leaves them.
        channels: 1 or 3.
        max_unreadable: number of images that may be left out because they cannot be read.
        in_memory: decode all images once; None does so if they take no more than 2 GiB.
        title: name of the data set, for messages.
        options: of :class:`ImageData`: ``views``, ``batch_size``, ``num_workers``.

    Returns:
        The data module.

    Raises:
        ValueError: there is no such folder, no image in it, or a class that is not known.
    """
    check_channels(channels)
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; set data.root to the folder of your images")
    train_roots = _choose(root, train_folder, TRAIN) or [root]
    test_roots = [] if train_roots == [root] and test_folder is None else _choose(root, test_folder, TEST)
    wanted = _names_of(classes)

    def files_of(
        roots: list[Path], known: Sequence[str] | None
    ) -> tuple[list[str], list[str] | None, list[str] | None]:
        files, names = _list(roots, labeled)
        if not files:
            raise ValueError(
                f"no image is in {', '.join(map(str, roots))}; names of images end in {' '.join(sorted(ENDINGS))}"
            )
        if names is None and known is not None:
            names = _annotated(root, roots[0], files)
        if names is not None and wanted is not None:
            pairs = [(file, name) for file, name in zip(files, names, strict=True) if name in wanted]
            missing = sorted(set(wanted) - {name for _, name in pairs})
            if missing:
                raise ValueError(f"{roots[0]} has no image of class {missing[0]!r}, and {len(missing) - 1} others")
            files, names = [file for file, _ in pairs], [name for _, name in pairs]
        if wanted is not None and names is None:
            raise ValueError(f"classes are given, but {roots[0]} has no class folders")
        return files, names, sorted(set(names)) if names is not None else None

    def images(files: list[str], names: list[str] | None, known: Sequence[str] | None) -> ImageFiles:
        return ImageFiles(
            files,
            None if names is None or known is None else class_indices(names, known),
            image_size=image_size,
            channels=channels,
            classes=known,
            max_unreadable=max_unreadable,
        )

    files, names, known = files_of(train_roots, None)
    train = images(files, names, known)
    test = None
    if test_roots and known is not None:
        files, names, found = files_of(test_roots, known)
        strange = sorted(set(found or ()) - set(known))
        if strange:
            raise ValueError(f"{test_roots[0]} has the class {strange[0]!r}, which {train_roots[0]} has not")
        test = images(files, names, known) if names is not None else None
    elif known is not None and held_out > 0:
        train, test = hold_out(train, held_out)
    return image_data(train, test, in_memory=in_memory, title=title or root.name, **options)


def _names_of(classes: str | Path | Sequence[str] | None) -> set[str] | None:
    if classes is None:
        return None
    if isinstance(classes, str | Path):
        try:
            lines = Path(classes).read_text().splitlines()
        except OSError as error:
            raise ValueError(f"the list of classes cannot be read: {error}") from None
        # A name first, whatever follows it.
        return {re.split(r"[\s,]", line.strip(), maxsplit=1)[0] for line in lines if line.strip()}
    return set(classes)


def _choose(root: Path, name: str | None, usual: Sequence[str]) -> list[Path]:
    """The first of the usual folders that exist, or the one that was named."""
    for pattern in (name,) if name is not None else usual:
        found = sorted(path for path in root.glob(pattern) if path.is_dir())
        if found:
            return found
    if name is not None:
        raise ValueError(f"there is no folder {root / name}")
    return []


def _walk(folder: Path) -> list[str]:
    """All images below a folder, in a fixed order."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(x for x in folders if not x.startswith("."))
        found += [
            os.path.join(parent, name)
            for name in sorted(files)
            if os.path.splitext(name)[1].lower() in ENDINGS and not name.startswith(".")
        ]
    return found


def _list(roots: list[Path], labeled: bool | None) -> tuple[list[str], list[str] | None]:
    """Images below some folders, and the class of each; None where there are no classes."""
    files = [(root, file) for root in roots for file in _walk(root)]
    parts = [os.path.relpath(file, root).split(os.sep) for root, file in files]
    by_folder = all(len(x) > 1 for x in parts)
    if labeled is None:
        labeled = by_folder and len({x[0] for x in parts}) > 1
    if labeled and not by_folder:
        loose = next(file for (_, file), x in zip(files, parts, strict=True) if len(x) == 1)
        raise ValueError(f"with labeled=true each image lies in the folder of its class, but {loose} does not")
    return [file for _, file in files], [x[0] for x in parts] if labeled else None


def _annotated(root: Path, folder: Path, files: list[str]) -> list[str] | None:
    """Classes of held-out images that lie all in one folder, from the file that lists them."""
    stems = [Path(file).stem for file in files]
    table: dict[str, str] = {}
    annotations = folder / "val_annotations.txt"
    solution = next((x / "LOC_val_solution.csv" for x in (root, folder) if (x / "LOC_val_solution.csv").exists()), None)
    truth = next(root.glob("**/ILSVRC2012_validation_ground_truth.txt"), None) if not annotations.exists() else None
    if annotations.exists():
        rows = (line.split() for line in annotations.read_text().splitlines())
        table = {Path(row[0]).stem: row[1] for row in rows if len(row) > 1}
    elif solution is not None:
        with solution.open(newline="") as file:
            table = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    elif truth is not None:
        table = _devkit(truth)
    missing = next((stem for stem in stems if stem not in table), None)
    if table and missing is not None:
        raise ValueError(f"{missing} in {folder} is in no list of classes")
    return [table[stem] for stem in stems] if table else None


def _devkit(truth: Path) -> dict[str, str]:
    """Classes of ImageNet's validation images, from the development kit."""
    from scipy.io import loadmat

    synsets = loadmat(truth.with_name("meta.mat"), squeeze_me=True)["synsets"]
    names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    numbers = map(int, truth.read_text().split())
    return {f"ILSVRC2012_val_{i:08d}": names[number] for i, number in enumerate(numbers, start=1)}
