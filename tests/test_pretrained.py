"""Weights back from a file: our own runs, and what other programs leave."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from adadim_lightning.cli.train import main as train
from adadim_lightning.models import SmallConvNet, timm_backbone, torchvision_backbone
from adadim_lightning.pretrained import (
    CheckpointError,
    find_checkpoint,
    load_backbone,
    load_pretrained,
    load_transform,
    load_weights,
)
from adadim_lightning.trust import UntrustedTargetError
from tests.helpers import assert_same_weights

DIGITS = {"_target_": "adadim_lightning.models.SmallConvNet", "in_channels": 1, "channels": [4, 8]}


def train_tiny(folder: Path) -> Path:
    """A real run of a tiny backbone, whose views are smaller than its images."""
    with pytest.MonkeyPatch.context() as patch:
        steps = ["trainer.max_epochs=1", "trainer.limit_train_batches=3", "trainer.limit_val_batches=1"]
        small = ["backbone.channels=[4,8]", "data.image_size=12", "views.size=8", "balance=constant"]
        patch.setattr(sys, "argv", ["adadim-train", *steps, *small, f"run_dir={folder}"])
        train()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("runs") / "tiny")


def raw(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def altered(run: Path, path: Path, **config: Any) -> Path:
    """The checkpoint of a run with another configuration."""
    checkpoint = raw(find_checkpoint(run))
    checkpoint["adadim"]["config"] |= config
    torch.save(checkpoint, path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_pretrained(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# Our own runs.


def test_backbone_of_a_run_has_its_weights_and_is_ready_to_fine_tune(run: Path) -> None:
    state = raw(run / "checkpoints" / "last.ckpt")["state_dict"]
    backbone = load_backbone(run)
    assert not any(module.training for module in backbone.modules())
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, state[f"backbone.{key}"]), key
    assert not torch.equal(next(backbone.parameters()), next(SmallConvNet(1, (4, 8)).parameters()))

    classifier = nn.Sequential(backbone, nn.Linear(8, 10)).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
    classifier(torch.rand(4, 1, 8, 8)).logsumexp(1).sum().backward()
    optimizer.step()
    assert all(not torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_fresh_process_computes_what_the_trained_module_computes(run: Path, tmp_path: Path) -> None:
    """The module is put together by hand here, and from the checkpoint alone there."""
    state = raw(find_checkpoint(run))["state_dict"]
    backbone = SmallConvNet(1, (4, 8)).eval()
    backbone.load_state_dict(
        {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    )
    head = nn.Sequential(
        nn.Linear(8, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 128, bias=False)
    )
    head.load_state_dict(
        {k.removeprefix("projection_head."): v for k, v in state.items() if k.startswith("projection_head.")}
    )
    images = torch.rand(5, 1, 8, 8)
    torch.save(images, tmp_path / "images.pt")
    moved = (find_checkpoint(run)).read_bytes()
    (tmp_path / "moved.ckpt").write_bytes(moved)  # nothing of the run folder is needed
    code = """
import torch
from adadim_lightning.pretrained import load_pretrained
found = load_pretrained("moved.ckpt")
assert found.name == "moved" and found.image_shape == (1, 8, 8), found
with torch.no_grad():
    r = found.backbone.eval()(torch.load("images.pt"))
    torch.save((r, found.projection_head.eval()(r)), "found.pt")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = (backbone(images), head.eval()(backbone(images)))
    for ours, theirs in zip(torch.load(tmp_path / "found.pt"), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_transform_makes_of_a_file_what_training_made_of_the_image(run: Path, tmp_path: Path) -> None:
    square = torch.randint(256, (1, 12, 12), dtype=torch.uint8)
    Image.fromarray(square[0].numpy()).save(tmp_path / "square.png")
    transform = load_transform(run)
    expected = (square[:, 2:10, 2:10] / 255 - 0.3053) / 0.3758
    torch.testing.assert_close(transform(tmp_path / "square.png"), expected)
    torch.testing.assert_close(transform(Image.open(tmp_path / "square.png").convert("RGB")), expected)
    assert transform(Image.new("RGB", (50, 31))).shape == (1, 8, 8)
    assert pickle.loads(pickle.dumps(transform)).channels == 1  # loaders send it to their workers


@pytest.mark.filterwarnings("ignore:.* has pixels from 0 to 3000")
def test_transform_scales_an_image_as_its_set_was_scaled(tmp_path: Path) -> None:
    (files := tmp_path / "files").mkdir()
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for i in range(6):
        Image.fromarray((ramp * (65000 if i else 3000)).astype(np.uint16)).save(files / f"{i}.tif")
    data = ["data=folder", f"data.root={files}", "data.image_size=8", "data.channels=1", "data.held_out=0"]
    model = ["backbone=small_convnet", "backbone.channels=[4,8]", "views=digits", "data.batch_size=4"]
    with pytest.MonkeyPatch.context() as patch:
        options = [*data, *model, "trainer.max_epochs=1", f"run_dir={tmp_path / 'run'}"]
        patch.setattr(sys, "argv", ["adadim-train", *options])
        train()
    views = load_pretrained(tmp_path / "run").views
    dark = torch.from_numpy(ramp * 3000 * (255 / 65535)).round().to(torch.uint8)
    transformed = load_transform(tmp_path / "run")(files / "0.tif")
    torch.testing.assert_close(transformed, views.clean(dark[None, None])[0])


def test_last_checkpoint_of_a_run_is_found(run: Path, tmp_path: Path) -> None:
    assert find_checkpoint(run) == find_checkpoint(run / "checkpoints") == run / "checkpoints" / "last.ckpt"
    assert load_pretrained(run).name == "tiny"
    for age, name in ((2, "b.ckpt"), (1, "a.ckpt")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (10 - age, 10 - age))
    assert find_checkpoint(str(tmp_path)).name == "a.ckpt"
    (tmp_path / "last.ckpt").symlink_to("gone.ckpt")
    assert find_checkpoint(tmp_path).name == "a.ckpt"
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path / "other")
    (tmp_path / "other" / "c.ckpt").touch()
    with pytest.raises(CheckpointError, match="holds 2 runs"):
        find_checkpoint(tmp_path)


def test_head_of_zero_layers_and_pretrained_backbone_are_rebuilt_without_a_download(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("tried to download")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    config = {
        "_target_": "adadim_lightning.models.torchvision_backbone",
        "name": "squeezenet1_1",
        "in_channels": 1,
    }
    trained = torchvision_backbone("squeezenet1_1", in_channels=1)
    checkpoint = raw(find_checkpoint(run))
    checkpoint["adadim"]["config"] |= {
        "backbone": config | {"weights": "DEFAULT"},
        "head": checkpoint["adadim"]["config"]["head"] | {"layers": 0},
    }
    checkpoint["adadim"]["image_shape"] = [1, 32, 32]
    # As torch.compile names them.
    checkpoint["state_dict"] = {f"backbone._orig_mod.{k}": v for k, v in trained.state_dict().items()}
    torch.save(checkpoint, tmp_path / "x.ckpt")
    found = load_pretrained(tmp_path / "x.ckpt")
    assert_same_weights(found.backbone, trained)
    assert isinstance(found.projection_head, nn.Identity)


# What a file may not do.


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(run: Path, tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "evil.ckpt"
    checkpoint = raw(find_checkpoint(run)) | {"hyper_parameters": Evil(mark)}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    for load in (load_backbone, load_transform, lambda x: load_weights(SmallConvNet(1, (4, 8)), x)):
        with pytest.raises(CheckpointError, match="may run code, and is refused"):
            load(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # it would have


@pytest.mark.parametrize("part", ["backbone", "head", "views"])
def test_configuration_that_names_other_code_is_refused(run: Path, tmp_path: Path, part: str) -> None:
    mark = tmp_path / "mark"
    config = {part: {"_target_": "os.system", "command": f"touch {mark}"}}
    with pytest.raises(UntrustedTargetError, match=r"os\.system is not trusted"):
        load_pretrained(altered(run, tmp_path / "x.ckpt", **config))
    assert not mark.exists()


def test_configuration_that_reads_the_environment_is_refused(run: Path, tmp_path: Path) -> None:
    for config in ({"backbone": DIGITS | {"channels": ["${oc.env:HOME}"]}}, {"data": {"${oc.env:HOME}": 1}}):
        assert "interpolation" in refusal(altered(run, tmp_path / "x.ckpt", **config))


@pytest.mark.parametrize(
    "model",
    [
        {"_target_": "adadim_lightning.models.timm_backbone", "name": "resnet18", "in_channels": 1},
        {"_target_": "timm.create_model", "model_name": "resnet18", "num_classes": 0, "in_chans": 1},
    ],
)
def test_configuration_that_names_another_file_of_weights_does_not_open_it(
    run: Path, tmp_path: Path, model: dict[str, Any]
) -> None:
    mark = tmp_path / "mark"
    torch.save({"x": Evil(mark)}, tmp_path / "evil.pth")
    hidden = {"checkpoint_path": str(tmp_path / "evil.pth")}
    nested = {"_target_": "torch.nn.Sequential", "_args_": [model | hidden]}
    for part in ("backbone", "head"):
        with pytest.raises(CheckpointError, match=r"do not fit|lacks"):
            load_pretrained(altered(run, tmp_path / "x.ckpt", **{part: nested}))
    positional = {"_target_": "timm.create_model", "_args_": ["resnet18", False, None, None, *hidden.values()]}
    assert "without their names" in refusal(altered(run, tmp_path / "x.ckpt", backbone=positional))
    assert not mark.exists()


def test_damaged_and_foreign_files_are_named(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    whole = find_checkpoint(run).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"{path} cannot be read: " in refusal(path)
    path.write_text("no checkpoint at all")
    assert "was not written by PyTorch" in refusal(path)
    path.write_bytes(b"")
    assert "was not written by PyTorch" in refusal(path)
    torch.save(torch.zeros(3), path)
    assert "holds no weights but Tensor" in refusal(path)
    torch.save(SmallConvNet(1).state_dict(), path)
    assert f"weights={path}" in refusal(path)
    assert "lacks a part" in refusal(save({"adadim": {"config": {}}, "state_dict": {}}, path))
    assert "there is no checkpoint" in refusal(tmp_path / "none.ckpt")
    wider = altered(run, path, backbone=DIGITS | {"channels": [4, 16]})
    assert "has 6.weight of shape (8, 4, 3, 3), but SmallConvNet needs (16, 4, 3, 3)" in refusal(wider)
    assert "cannot be made: channels" in refusal(altered(run, path, backbone=DIGITS | {"channels": []}))


# Weights of other programs.


def save(found: Any, path: Path) -> Path:
    torch.save(found, path)
    return path


def outputs(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return module.eval()(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32))  # type: ignore[no-any-return]


def resnet() -> nn.Module:
    return torchvision_backbone("resnet18")


@pytest.fixture(scope="module")
def teacher() -> models.ResNet:
    """Torchvision's own, with a classifier."""
    torch.manual_seed(5)
    return models.resnet18()


@pytest.fixture(scope="module")
def expected(teacher: models.ResNet) -> Tensor:
    features = nn.Sequential(*list(teacher.children())[:-1], nn.Flatten())
    return outputs(features)


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def test_state_dict_of_torchvision_with_its_classifier_is_loaded(
    teacher: models.ResNet, expected: Tensor, tmp_path: Path
) -> None:
    backbone = resnet()
    assert load_weights(backbone, save(teacher.state_dict(), tmp_path / "x.pth")) == ""
    assert torch.equal(outputs(backbone), expected)
    save_file(prefixed(teacher.state_dict(), "module."), tmp_path / "x.safetensors")
    backbone = resnet()
    assert load_weights(backbone, tmp_path / "x.safetensors") == "module."
    assert torch.equal(outputs(backbone), expected)


@pytest.mark.parametrize(
    ("student", "follower"),
    [
        ("backbone.", "backbone_momentum."),  # lightly
        ("backbone.", "momentum_backbone."),  # solo-learn
        ("module.encoder_q.", "module.encoder_k."),  # MoCo
        ("online_encoder.net.", "target_encoder.net."),  # BYOL
        ("student_backbone.", "teacher_backbone."),
        ("model.backbone._orig_mod.", "ema.module."),
    ],
)
def test_student_is_chosen_before_the_network_that_follows_it(tmp_path: Path, student: str, follower: str) -> None:
    trained, found = SmallConvNet(3, (4, 8)), SmallConvNet(3, (4, 8))
    right = prefixed(trained.state_dict(), student)
    wrong = prefixed(SmallConvNet(3, (4, 8)).state_dict(), follower)
    head = {"projection_head.layers.0.weight": torch.zeros(3, 3), "epoch": torch.tensor(3)}
    for state in ({**right, **wrong, **head}, {**head, **wrong, **right}):
        path = save({"epoch": 3, "state_dict": state, "optimizer": {"state": {0: head}}}, tmp_path / "x.ckpt")
        assert load_weights(found, path) == f"state_dict.{student.replace('_orig_mod.', '')}"
        assert_same_weights(found, trained)


@pytest.mark.parametrize(
    ("student", "follower"), [("student", "teacher"), ("state_dict", "state_dict_ema"), ("model", "model_ema")]
)
def test_entries_of_a_checkpoint_follow_the_same_rule(tmp_path: Path, student: str, follower: str) -> None:
    trained, found = SmallConvNet(3, (4, 8)), SmallConvNet(3, (4, 8))
    path = save({follower: found.state_dict(), student: trained.state_dict()}, tmp_path / "x.pth")
    assert load_weights(found, path) == f"{student}."
    assert_same_weights(found, trained)


def test_weights_are_chosen_by_shape_where_names_are_numbers(tmp_path: Path) -> None:
    """The layers of a head and of a backbone have the same names."""

    def layers(width: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    right, wrong = layers(8), layers(4)
    state = {**prefixed(wrong.state_dict(), "a."), **prefixed(right.state_dict(), "the_backbone.")}
    found = layers(8)
    assert load_weights(found, save(state, tmp_path / "x.pth")) == "the_backbone."
    assert_same_weights(found, right)


def test_checkpoint_of_timm_and_half_precision_are_loaded(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("test_vit", num_classes=7, img_size=32)
    backbone = timm_backbone("test_vit", image_size=32)
    load_weights(backbone, save({"state_dict": theirs.half().state_dict(), "epoch": 3}, tmp_path / "x.pth.tar"))
    theirs.float().reset_classifier(0)
    assert torch.equal(outputs(backbone), outputs(theirs))


def test_own_checkpoint_gives_its_backbone(run: Path) -> None:
    backbone = SmallConvNet(1, (4, 8))
    assert load_weights(backbone, find_checkpoint(run)) == "state_dict.backbone."
    assert_same_weights(backbone, load_backbone(run))


def test_missing_and_misshapen_weights_are_named_and_leave_the_backbone(
    teacher: models.ResNet, tmp_path: Path
) -> None:
    backbone = resnet()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    state = prefixed(teacher.state_dict(), "module.")
    del state["module.layer1.0.conv1.weight"]
    with pytest.raises(
        CheckpointError, match=r"lacks 1 of 100 weights of ResNet, such as layer1\.0\.conv1\.weight"
    ):
        load_weights(backbone, save(state, tmp_path / "x.pth"))
    state["module.layer1.0.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    with pytest.raises(
        CheckpointError, match=r"layer1\.0\.conv1\.weight of shape \(64, 64, 1, 1\).*\(64, 64, 3, 3\)"
    ):
        load_weights(backbone, save(state, tmp_path / "x.pth"))
    with pytest.raises(CheckpointError, match="lacks 100 of 100 weights"):
        load_weights(backbone, save({"x": np.float64(3).item()}, tmp_path / "x.pth"))
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
