"""Exported backbones, read by the programs that they are for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torchvision import models

from adadim_lightning import export
from adadim_lightning.data import medmnist
from adadim_lightning.data.views import TwoViews
from adadim_lightning.export import ENDINGS, ExportError, export_backbone
from adadim_lightning.extras import MissingExtraError
from adadim_lightning.models import SmallConvNet, timm_backbone, torchvision_backbone
from tests.helpers import all_digits

MEDMNIST = Path(__file__).parents[2] / "shared" / "datasets" / "medmnist"
GRAPHS = ("torchscript", "torch_export", "onnx")


def digit_images(count: int = 6) -> Tensor:
    images = all_digits()
    return images.views.clean(images.test.images[:count])


def rgb_images(count: int = 4) -> Tensor:
    """Fundus photographs where there are some; else digits in RGB."""
    if not (MEDMNIST / "retinamnist.npz").exists():
        return nn.functional.interpolate(digit_images(count), 28).expand(-1, 3, -1, -1)
    views = TwoViews({}, mean=[0.5] * 3, std=[0.5] * 3)
    return views.clean(medmnist("retina", root=MEDMNIST, download=False, views=views).sample(count)[0])


def trained_a_little(backbone: nn.Module, images: Tensor) -> nn.Module:
    """Statistics of batch norm that are not those it starts with."""
    for _ in range(3):
        backbone.train()(images)
    return backbone


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return trained_a_little(SmallConvNet(1, (4, 8)), digit_images())


def answer(backbone: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.no_grad():
        return backbone(images)


def read(path: Path, format: str) -> Callable[[Tensor], Tensor]:
    if format == "torchscript":
        return torch.jit.load(path)  # type: ignore[no-any-return]
    if format == "torch_export":
        return torch.export.load(path).module()
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.mark.parametrize("format", GRAPHS)
def test_graphs_compute_what_the_backbone_computes_at_any_batch_size(
    small: nn.Module, tmp_path: Path, format: str
) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
    path = tmp_path / f"b{ENDINGS[format]}"
    done = export_backbone(small, path, format=format, example=digit_images())
    assert {x.name for x in tmp_path.iterdir()} == {path.name, f"{path.name}.json"}  # one file, weights and all
    assert done.size == path.stat().st_size > 1000
    assert done.images == 6
    assert done.difference < 1e-5
    assert small.training
    program = read(path, format)
    for count in (1, 3, 11):
        images = digit_images(count)
        expected = answer(small.eval(), images)
        small.train()
        assert expected.std() > 1e-3
        torch.testing.assert_close(answer(program, images), expected, rtol=1e-4, atol=1e-6)


def test_safetensors_hold_the_weights_and_what_images_have_to_look_like(tmp_path: Path) -> None:
    small = torch.compile(trained_a_little(SmallConvNet(1, (4, 8)), digit_images()))
    path = tmp_path / "b.safetensors"
    metadata = {"mean": [0.3], "std": [0.4], "backbone": {"_target_": "x"}}
    done = export_backbone(small, path, format="safetensors", example=digit_images(), metadata=metadata)  # type: ignore[arg-type]
    assert done.difference == 0
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert header["format"] == "pt"
    assert json.loads(header["adadim"]) == metadata | {"format": "safetensors", "representation_dim": 8}
    beside = json.loads((tmp_path / "b.safetensors.json").read_text())
    assert beside["representation_dim"] == 8
    assert beside["images_compared"] == 6
    assert beside["mean"] == [0.3]
    fresh = SmallConvNet(1, (4, 8))
    fresh.load_state_dict(state)
    original = small._orig_mod.eval()  # type: ignore[attr-defined]
    assert torch.equal(answer(fresh.eval(), digit_images()), answer(original, digit_images()))
    assert path.stat().st_mode == (tmp_path / "b.safetensors.json").stat().st_mode


def config_of(library: str, name: str, **options: Any) -> dict[str, Any]:
    return {"_target_": f"adadim_lightning.models.{library}_backbone", "name": name, **options}


def test_resnet_is_loaded_by_torchvision_with_the_same_penultimate_features(tmp_path: Path) -> None:
    images = rgb_images()
    backbone = trained_a_little(torchvision_backbone("resnet18"), images)
    path = tmp_path / "resnet.pt"
    config = config_of("torchvision", "resnet18", weights="DEFAULT", in_channels=3, cifar_stem=False)
    export_backbone(backbone, path, format="torchvision", example=images, metadata={"backbone": config})
    theirs = models.resnet18()
    found = theirs.load_state_dict(torch.load(path), strict=False)
    assert found.unexpected_keys == []
    assert found.missing_keys == ["fc.weight", "fc.bias"]
    features = nn.Sequential(*list(theirs.eval().children())[:-1], nn.Flatten())
    assert torch.equal(answer(features, images), answer(backbone.eval(), images))


@pytest.mark.parametrize(
    ("library", "name", "options"),
    [
        ("torchvision", "resnet18", {"in_channels": 1, "cifar_stem": True}),
        ("torchvision", "squeezenet1_1", {"in_channels": 1}),
        ("torchvision", "mobilenet_v3_small", {"in_channels": 1}),
        ("timm", "test_vit", {"in_channels": 1, "image_size": 32}),
        ("timm", "test_byobnet", {"in_channels": 1, "image_size": 32}),
    ],
)
def test_lines_that_come_with_the_file_load_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, name: str, options: dict[str, Any]
) -> None:
    module = pytest.importorskip(library)
    images = nn.functional.interpolate(digit_images(4), 32)
    backbone = {"torchvision": torchvision_backbone, "timm": timm_backbone}[library](name, **options)
    trained_a_little(backbone, images)
    metadata = {"backbone": config_of(library, name, **options)}
    done = export_backbone(backbone, tmp_path / "b.pt", format=library, example=images, metadata=metadata)
    assert json.loads((tmp_path / "b.pt.json").read_text())["load"] == list(done.load)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"torch": torch, library: module}
    exec("\n".join(done.load), names)
    assert torch.equal(answer(names["model"].eval(), images), answer(backbone.eval(), images))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_model_of_another_library_is_refused_in_one_line(small: nn.Module, tmp_path: Path, library: str) -> None:
    for metadata in ({}, {"backbone": {"_target_": "adadim_lightning.models.SmallConvNet"}}):
        with pytest.raises(ExportError, match=rf"{library} made, not for .*SmallConvNet; use safetensors"):
            export_backbone(small, tmp_path / "b.pt", format=library, example=digit_images(), metadata=metadata)
    assert not list(tmp_path.iterdir())


def corrupt(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module.get_submodule("3").weight[0] += 0.05  # type: ignore[index,operator]
    return module


def test_wrong_graph_is_found_and_an_older_file_stays(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = torch.jit.trace
    monkeypatch.setattr(
        torch.jit, "trace", lambda model, *args, **options: trace(corrupt(model), *args, **options)
    )
    path = tmp_path / "b.pt"
    with pytest.raises(ExportError, match=r"b\.pt was not kept: read back, its representations differ by"):
        export_backbone(small, path, format="torchscript", example=digit_images())
    assert not list(tmp_path.iterdir())
    path.write_text("older")
    with pytest.raises(ExportError, match="was not kept"):
        export_backbone(small, path, format="torchscript", example=digit_images())
    assert [x.read_text() for x in tmp_path.iterdir()] == ["older"]


@pytest.mark.parametrize("format", ["safetensors", "timm"])
def test_wrong_weights_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    """One weight of thousands, by a thousandth."""
    import safetensors.torch

    def changed(write: Any) -> Any:
        def write_changed(state: dict[str, Tensor], *args: Any) -> Any:
            key = next(key for key, value in state.items() if value.ndim == 4)
            return write(state | {key: state[key] * 1.001}, *args)

        return write_changed

    monkeypatch.setattr(safetensors.torch, "save", changed(safetensors.torch.save))
    monkeypatch.setattr(torch, "save", changed(torch.save))
    backbone = timm_backbone("test_vit", image_size=32)
    images = nn.functional.interpolate(rgb_images(), 32)
    metadata = {"backbone": config_of("timm", "test_vit", image_size=32)}
    with pytest.raises(ExportError, match="was not kept"):
        export_backbone(backbone, tmp_path / "b.x", format=format, example=images, metadata=metadata)
    assert not list(tmp_path.iterdir())


def test_file_without_all_weights_or_cut_off_is_refused(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = export._write

    def cut_off(model: nn.Module, path: Path, *args: Any) -> None:
        write(model, path, *args)
        path.write_bytes(path.read_bytes()[:-100])

    monkeypatch.setattr(export, "_write", cut_off)
    for format in ("safetensors", "torchscript"):
        with pytest.raises(ExportError, match=f"{format} does not work with this backbone: "):
            export_backbone(small, tmp_path / "b", format=format, example=digit_images())
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    """Does something else with a single image, which no trace can know."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 8)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.layer(images.flatten(1))
        return rows * 2 if len(images) == 1 else rows


def test_backbone_that_depends_on_the_batch_size_is_refused(tmp_path: Path) -> None:
    for format, reason in (("torchscript", "was not kept"), ("torch_export", "does not work with this backbone")):
        with pytest.raises(ExportError, match=reason) as error:
            export_backbone(Branching(), tmp_path / "b", format=format, example=digit_images())
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_export_leaves_backbone_and_random_state_alone(small: nn.Module, tmp_path: Path) -> None:
    small[1].eval()  # type: ignore[index] # a frozen part
    small[0].requires_grad_(False)  # type: ignore[index]
    small(digit_images()).sum().backward()

    def state() -> list[Any]:
        modules = [module.training for module in small.modules()]
        tensors = [x.clone() for p in small.parameters() for x in (p, p.grad) if x is not None]
        tensors += [*small.state_dict().values(), torch.get_rng_state()]
        return [modules, [p.requires_grad for p in small.parameters()], [x.tolist() for x in tensors]]

    before = state()
    for format in ("torchscript", "safetensors"):
        export_backbone(small, tmp_path / "b", format=format, example=digit_images())
    assert state() == before
    small.train().requires_grad_(True)


def test_arguments_that_do_not_fit_are_named(small: nn.Module, tmp_path: Path) -> None:
    for options, message in (
        ({"format": "tensorflow"}, "there is no format 'tensorflow'; there are torchvision, "),
        ({"example": digit_images()[:1]}, r"at least 2 images \(N, C, H, W\), got \(1, 1, 8, 8\)"),
        ({"example": digit_images() * torch.nan}, "NaN"),
    ):
        arguments: dict[str, Any] = {"format": "safetensors", "example": digit_images(), **options}
        with pytest.raises(ExportError, match=message):
            export_backbone(small, tmp_path / "b", **arguments)
    with pytest.raises(ExportError, match=r"shape \(B, d_R\), got \(6, 1, 8, 8\)"):
        export_backbone(nn.Identity(), tmp_path / "b", format="safetensors", example=digit_images())


def test_missing_onnx_gives_the_line_that_installs_it(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'adadim-lightning\[onnx\]'"):
        export_backbone(small, tmp_path / "b.onnx", format="onnx", example=digit_images())
