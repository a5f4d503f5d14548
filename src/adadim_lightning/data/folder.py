"""Folders of images, in the layouts that people have on disk."""

import csv
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from adadim_lightning.data.decoding import check_channels
from adadim_lightning.data.images import ImageFiles
from adadim_lightning.data.module import ImageData
from adadim_lightning.data.pixels import printable
from adadim_lightning.data.splits import class_indices, first_few, hold_out, image_data

ENDINGS = {
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
}
READ = " ".join(sorted(ENDINGS))
TRAIN = ("train", "training", "ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", "train.X*")
TEST = ("val", "valid", "validation", "test", "testing", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", "val.X*")
NOTES = {
    *(
        "",
        ".txt",
        ".csv",
        ".tsv",
        ".json",
        ".jsonl",
        ".xml",
        ".yaml",
        ".yml",
        ".md",
        ".rst",
        ".html",
        ".htm",
        ".pdf",
    ),
    *(".db", ".ini", ".log", ".py", ".ipynb", ".sh", ".md5", ".lock"),
}
"""Endings of files that lie beside images without being such."""
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


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
    pixel_range: Sequence[float] | None = None,
    in_memory: bool | None = None,
    title: str | None = None,
    **options: Any,
) -> ImageData:
    """Images below a folder, with or without classes.

    Training and held-out images are looked for in ``train`` and ``val`` (``valid``, ``validation``, ``test``), in
    ``ILSVRC/Data/CLS-LOC/...`` and in ``train.X1`` and the like; else the images below ``root`` are all there is.
    Class folders tell the classes. The classes of held-out images that do not lie in class folders come from
    ``val_annotations.txt`` (Tiny-ImageNet), ``LOC_val_solution.csv`` or the unpacked development kit (ImageNet);
    where nothing tells them, a part of the training images is held out. Hidden files and folders do not count, nor
    do files whose names do not end as images do; what else is left out is said in a warning.

    Args:
        root: the folder.
        train_folder: of the training images below ``root``, where it has another name.
        test_folder: of the held-out images.
        labeled: whether the folders with the images are classes; None means so if there are two or more, and no
            image beside them.
        classes: keep only these: their names, or a file with a name a line, whatever follows it there.
        held_out: the share of images with classes that is held out where there is no folder of such.
        image_size: side of the square that the images are scaled and cut to; None leaves them.
        channels: 1 or 3.
        max_unreadable: number of training images that may be left out because they cannot be read, and of
            held-out images.
        pixel_range: values of black and white in images of more than 8 bits; None finds them.
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
    wanted = _names_of(classes)
    train_roots = next(iter(_choose(root, train_folder, TRAIN)), [root])
    test_choices = [] if train_roots == [root] and test_folder is None else _choose(root, test_folder, TEST)
    if train_folder is None and train_roots != [root]:
        if not test_choices:
            _check_no_class(root, train_roots[0])
        _report_beside(root, [train_roots, *_choose(root, None, TEST), *test_choices])

    def images(files: list[str], names: list[str] | None, known: Sequence[str] | None) -> ImageFiles:
        return ImageFiles(
            files,
            None if names is None or known is None else class_indices(names, known),
            image_size=image_size,
            channels=channels,
            classes=known,
            max_unreadable=max_unreadable,
            pixel_range=pixel_range,
        )

    files, folders = _list(train_roots)
    names = _classes(files, folders, labeled)
    everything = set(names or ())
    if wanted is not None:
        if names is None:
            raise ValueError(f"data.classes is given, but {train_roots[0]} has no class folders")
        chosen = _among(wanted, everything, train_roots[0])
        files, names = _only(chosen, files, names)
    known = None if names is None else sorted(set(names))
    train = images(files, names, known)
    test = None
    if known is not None:
        for roots in test_choices:
            files, folders = _list(roots)
            # Where each lies in a folder of a class there is no need to look further.
            names = folders if set(folders) <= everything else _annotated(roots[0], files)
            names = _classes(files, folders, None) if names is None else names
            if names is None:
                rank_zero_warn(f"{printable(roots[0])} is left out: nothing tells the classes of its images")
                continue
            strange = sorted(set(names) - everything)
            if strange:
                raise ValueError(
                    f"{roots[0]} has images of the class {strange[0]!r}, of which {train_roots[0]} has none"
                )
            test = images(*_only(set(known), files, names), known)
            break
        if test is None and test_folder is not None:
            raise ValueError(
                f"nothing tells the classes of the images in {root / test_folder}; without data.test_folder a "
                "part of the training images is held out"
            )
        if test is None:
            train, test = hold_out(train, held_out)
    elif test_choices:
        left = first_few([printable(roots[0]) for roots in test_choices])
        rank_zero_warn(f"{left} is left out: without classes in {printable(train_roots[0])} nothing is scored")
    return image_data(train, test, in_memory=in_memory, title=title or root.resolve().name, **options)


def _names_of(classes: str | Path | Sequence[str] | None) -> list[str] | None:
    if classes is None or not isinstance(classes, str | Path):
        return None if classes is None else [str(name) for name in classes]
    try:
        lines = Path(classes).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.classes: the list of classes cannot be read: {error}") from None
    return [line.strip() for line in lines if line.strip()]


def _among(wanted: Sequence[str], there: set[str], folder: Path) -> set[str]:
    """The wanted classes, which may be followed by something else in their lines."""
    names = [line if line in there else re.split(r"[\s,:]", line, maxsplit=1)[0].strip("\"'") for line in wanted]
    missing = [name for name in names if name not in there]
    if missing:
        shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise ValueError(f"data.classes: {folder} has no image of {len(missing)} of the classes: {shown}")
    return set(names)


def _only(wanted: set[str], files: list[str], names: list[str]) -> tuple[list[str], list[str]]:
    kept = [i for i, name in enumerate(names) if name in wanted]
    return [files[i] for i in kept], [names[i] for i in kept]


def _choose(root: Path, name: str | None, usual: Sequence[str]) -> list[list[Path]]:
    """The folders that are there, of the usual ones or of the one that was named; several may be parts of one."""
    if name is not None:
        if not (root / name).is_dir():
            raise ValueError(f"there is no folder {root / name}")
        return [[root / name]]
    beside = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    found = ([beside[x]] if x in beside else sorted(path for path in root.glob(x) if path.is_dir()) for x in usual)
    return [paths for paths in found if paths]


def _check_no_class(root: Path, train: Path) -> None:
    """Raise ValueError if ``train`` may as well be a class: it holds images, and so does a folder beside it."""

    def holds_images(folder: Path) -> bool:
        return any(_is_image(name) for name in os.listdir(folder))

    beside = (x for x in root.iterdir() if x.is_dir() and x != train and not x.name.startswith("."))
    other = next((x for x in beside if holds_images(x)), None)
    if other is not None and holds_images(train):
        raise ValueError(
            f"{train} may hold the training images, or a class beside {other.name}: set data.train_folder="
            f"{train.name}, or data.train_folder=. for classes"
        )


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in ENDINGS and not name.startswith(".")


@dataclass
class _Tree:
    """What lies below a folder: its images in a fixed order, and what is not read."""

    images: list[str] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)
    twice: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)


def _walk(folder: Path) -> _Tree:
    """Walk through a folder; of one to which several links lead, the images count once."""
    tree = _Tree()
    seen: set[tuple[int, int]] = set()
    above: dict[str, frozenset[tuple[int, int]]] = {}
    walk = os.walk(folder, followlinks=True, onerror=lambda error: tree.closed.append(str(error.filename)))
    for parent, folders, files in walk:
        status = os.stat(parent)
        place = status.st_dev, status.st_ino
        if place in seen:  # a link that leads back up would never end
            folders.clear()
            if place not in above.get(os.path.dirname(parent), ()):
                tree.twice.append(parent)
            continue
        seen.add(place)
        above[parent] = above.get(os.path.dirname(parent), frozenset()) | {place}
        # Folders before links to them, whose images keep the folder's name then.
        folders[:] = sorted(
            (x for x in folders if not x.startswith(".")),
            key=lambda x: (os.path.islink(os.path.join(parent, x)), x),
        )
        tree.images += [os.path.join(parent, name) for name in sorted(files) if _is_image(name)]
        shown = [name for name in files if not name.startswith(".") and not _is_image(name)]
        tree.endings.update(os.path.splitext(name)[1].lower() for name in shown)
    return tree


def _report_tree(root: Path, tree: _Tree) -> None:
    """Warn of what lies below a folder of images and is not read."""
    other = {ending: count for ending, count in tree.endings.items() if ending not in NOTES}
    if other:
        shown = first_few([f"{count:,} {printable(ending)}" for ending, count in sorted(other.items())])
        rank_zero_warn(f"{printable(root)}: files that are not read: {shown}; images end in {READ}")
    if tree.twice:
        rank_zero_warn(f"folders that lead where another has led are left out: {_few(tree.twice)}")
    if tree.closed:
        rank_zero_warn(f"folders that cannot be opened are left out: {_few(tree.closed)}")
    holding = {Path(file).relative_to(root).parts[0] for file in tree.images}
    gone = {Path(path) for path in tree.twice + tree.closed}
    empty = [x for x in sorted(root.iterdir()) if x.is_dir() and x.name not in holding and x not in gone]
    empty = [x for x in empty if not x.name.startswith((".", "__"))]
    if empty:
        rank_zero_warn(f"folders without an image are left out: {_few(empty)}")


def _report_beside(root: Path, used: list[list[Path]]) -> None:
    """Warn of folders with images that lie beside those of training and held-out images."""
    known = [path.resolve() for roots in used for path in roots]
    beside = [x for x in sorted(root.iterdir()) if x.is_dir() and not x.name.startswith((".", "__"))]
    beside = [x for x in beside if not any(path.is_relative_to(x.resolve()) for path in known)]
    files = (any(map(_is_image, chain.from_iterable(names for *_, names in os.walk(x)))) for x in beside)
    left = [x for x, has_images in zip(beside, files, strict=True) if has_images]
    if left:
        rank_zero_warn(f"left out are images outside the folders for training and held-out ones: {_few(left)}")


def _few(names: Sequence[object]) -> str:
    return first_few([printable(name) for name in names])


def _list(roots: list[Path]) -> tuple[list[str], list[str]]:
    """Images below some folders, and for each the folder in these that it lies in; empty for one beside them."""
    trees = {root: _walk(root) for root in roots}
    files = [(root, file) for root, tree in trees.items() for file in tree.images]
    for root, tree in trees.items():
        _report_tree(root, tree)
    if not files:
        raise ValueError(f"no image is in {', '.join(map(str, roots))}; names of images end in {READ}")
    parts = [os.path.relpath(file, root).split(os.sep) for root, file in files]
    return [file for _, file in files], [x[0] if len(x) > 1 else "" for x in parts]


def _classes(files: list[str], folders: list[str], labeled: bool | None) -> list[str] | None:
    """The class of each image; None where there are no classes."""
    if labeled is None:
        labeled = "" not in folders and len(set(folders)) > 1
        if "" in folders and len(set(folders)) > 2:
            rank_zero_warn(
                f"no classes: images lie beside the folders, such as {printable(files[folders.index('')])}; move "
                "them into folders of classes, or set data.labeled=false"
            )
    if labeled and "" in folders:
        raise ValueError(
            "with data.labeled=true each image lies in the folder of its class, but "
            f"{printable(files[folders.index('')])} does not"
        )
    return folders if labeled else None


def _annotated(folder: Path, files: list[str]) -> list[str] | None:
    """Classes of held-out images that lie all in one folder, from a file that lists them."""
    around = (folder, *folder.absolute().parents[:4])  # of ImageNet as it is on Kaggle, four levels up
    kits = [above / kit for above in around[:2] for kit in (".", "data", "ILSVRC2012_devkit_t12/data")]
    annotations = folder / "val_annotations.txt"
    solution = next((x for x in (above / "LOC_val_solution.csv" for above in around) if x.exists()), None)
    truth = next((x for x in (kit / GROUND_TRUTH for kit in kits) if x.exists()), None)
    if annotations.exists():
        rows = (line.split() for line in annotations.read_text().splitlines())
        table = {Path(row[0]).stem: row[1] for row in rows if len(row) > 1}
    elif solution is not None:
        with solution.open(newline="") as file:
            table = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    elif truth is not None:
        table = _devkit(truth)
    else:
        return None
    stems = [Path(file).stem for file in files]
    missing = next((file for file, stem in zip(files, stems, strict=True) if stem not in table), None)
    if missing is not None:
        listed = annotations if annotations.exists() else solution or truth
        raise ValueError(f"{printable(missing)} is not in the list of classes, {listed}")
    return [table[stem] for stem in stems]


def _devkit(truth: Path) -> dict[str, str]:
    """Classes of ImageNet's validation images, from the development kit."""
    from scipy.io import loadmat

    synsets = loadmat(truth.with_name("meta.mat"), squeeze_me=True)["synsets"]
    names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    numbers = map(int, truth.read_text().split())
    return {f"ILSVRC2012_val_{i:08d}": names[number] for i, number in enumerate(numbers, start=1)}
