"""Every option of every group trains a step, on small data made to its shapes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from hydra import compose, initialize_config_dir

from adadim_lightning.cli.app import config_dir, offer_eval_data
from tests.cli.test_train import ONE_STEP, options, run, summary
from tests.data import test_huggingface, test_medmnist, test_torchvision
from tests.data.pictures import write
from tests.data.test_folder import SYNSETS, fill, tiny_imagenet

SMALL = [*ONE_STEP, "data.batch_size=2"]


def class_folders(root: Path, *splits: str) -> None:
    """Four small pictures of each class, in folders."""
    for split in splits or ("",):
        fill(root / split, SYNSETS, 4)


def cifar(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    test_torchvision.cifar(root, getattr(torchvision.datasets, name), monkeypatch)


# How each data set lies on disk.
LAYOUTS: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "digits": lambda root, patch: None,
    "fashion_mnist": lambda root, patch: test_torchvision.fashion_mnist(root / "FashionMNIST" / "raw"),
    "cifar10": lambda root, patch: cifar(root, patch, "CIFAR10"),
    "cifar100": lambda root, patch: cifar(root, patch, "CIFAR100"),
    "stl10": test_torchvision.stl10,
    "svhn": test_torchvision.svhn,
    "eurosat": lambda root, patch: test_torchvision.eurosat(root / "eurosat"),
    "imagenette": lambda root, patch: test_torchvision.imagenette(root),
    "tiny_imagenet": lambda root, patch: tiny_imagenet(root),
    "imagenet100": lambda root, patch: class_folders(root, "train", "val"),
    "imagenet": lambda root, patch: class_folders(root, "train", "val"),
    "cinic10": lambda root, patch: class_folders(root, "train", "valid", "test"),
    "folder": lambda root, patch: class_folders(root),
    "huggingface": lambda root, patch: test_huggingface.splits(root),
}


def lay_out(option: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write a data set, and say where it is."""
    if option.startswith("medmnist/"):
        test_medmnist.write(root, f"{option.removeprefix('medmnist/')}mnist", counts=(12, 2, 6))
    else:
        LAYOUTS[option](root, monkeypatch)
    where = {"digits": [], "huggingface": [f"data.path={root}"]}.get(option, [f"data.root={root}"])
    # Half a gigapixel for a step is more than a test needs.
    small = ["data.image_size=64"] if option in ("imagenet", "imagenet100", "folder") else []
    return [*where, *small, "data.num_workers=0"]


ALL_DATA = sorted(
    str(path.relative_to(config_dir() / "data").with_suffix(""))
    for path in (config_dir() / "data").rglob("*.yaml")
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


# Of a few images in place of thousands, some classes have none on one side.
@pytest.mark.filterwarnings("ignore:.*(no held-out image|no training image|have no label)")
@pytest.mark.parametrize("option", ALL_DATA)
def test_every_data_set_trains_a_step_with_the_views_and_the_backbone_that_it_chooses(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    where = lay_out(option, root, monkeypatch)
    assert run(monkeypatch, tmp_path / "run", f"data={option}", *where, *SMALL) == 0
    found = summary(tmp_path / "run")
    assert found["status"] == "ok"
    assert np.isfinite(found["loss/total"])  # type: ignore[arg-type]
    assert ("probe/linear_top1" in found) == (option != "medmnist/chest")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve small pictures in color."""
    root = tmp_path_factory.mktemp("pictures")
    for name in SYNSETS:
        for i in range(4):
            write(root / name / f"{i}.png", i, height=32, width=32)
    return root


@pytest.mark.parametrize(
    "override", options("backbone", "views", "head", "optimizer", "lr_schedule", "trainer", "guard")
)
def test_every_option_trains_a_step_on_pictures(
    override: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [] if override.startswith("backbone") else ["backbone=small_convnet"]
    if override in ("backbone=timm", "backbone=torchvision"):
        small = [f"backbone.name={'test_vit' if override.endswith('timm') else 'shufflenet_v2_x0_5'}"]
    where = [f"data.root={pictures}", "data.image_size=32", "data.num_workers=0"]
    assert run(monkeypatch, tmp_path / "run", "data=folder", override, *small, *where, *SMALL) == 0
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["status"] == "ok"
    assert np.isfinite(found["loss/total"])


@pytest.mark.parametrize("option", ALL_DATA)
def test_every_data_set_serves_the_probes_and_the_other_commands(option: str) -> None:
    offer_eval_data()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("train", [f"eval_data={option}", "data.image_size=40"])
        assert config.eval_data.image_size == 40
        assert config.eval_data.channels == config.data.channels == 1
        assert config.eval_data._target_ == compose("train", [f"data={option}"]).data._target_
        for command in ("evaluate", "embed", "export"):
            assert compose(command, [f"data={option}"]).data._target_ == config.eval_data._target_
