"""Backbones of torchvision and timm, against the models as those libraries build them."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra.utils
import pytest
import timm
import torch
import torchvision
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model

from adadim_lightning.extras import MissingExtraError, require
from adadim_lightning.models import representation_dim, timm_backbone, torchvision_backbone

# The smallest of each family, with the smallest image that it takes.
FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "alexnet": (64, {}),
    "convnext_tiny": (32, {}),
    "densenet121": (32, {}),
    "efficientnet_b0": (32, {}),
    "efficientnet_v2_s": (32, {}),
    "googlenet": (32, {}),
    "inception_v3": (80, {}),
    "maxvit_t": (224, {}),
    "mnasnet0_5": (32, {}),
    "mobilenet_v2": (32, {}),
    "mobilenet_v3_small": (32, {}),
    "regnet_x_400mf": (32, {}),
    "resnet18": (32, {}),
    "resnext50_32x4d": (32, {}),
    "shufflenet_v2_x0_5": (32, {}),
    "squeezenet1_1": (32, {}),
    "swin_t": (32, {}),
    "swin_v2_t": (32, {}),
    "vgg11": (32, {}),
    "vit_b_32": (32, {"image_size": 32}),
    "wide_resnet50_2": (32, {}),
}


@pytest.fixture
def _constant_init(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large models draw a hundred million random numbers; a cheap sequence that depends on nothing is as good."""

    def fill(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        with torch.no_grad():
            period = min(tensor.numel(), 1009)
            wave = torch.cos(torch.arange(period) * 1.7) / max(tensor[0].numel(), 1) ** 0.5
            return tensor.copy_(wave.repeat(-(-tensor.numel() // period))[: tensor.numel()].view_as(tensor))

    for name in ("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "trunc_normal_", "normal_", "uniform_"):
        monkeypatch.setattr(nn.init, name, fill)


def input_of_last_layer(model: nn.Module, layer: type[nn.Module], images: Tensor) -> Tensor:
    """What a plain model hands to its classifier, seen by a hook."""
    seen: list[Tensor] = []
    last = [module for module in model.modules() if isinstance(module, layer)][-1]
    with last.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        model(images)
    return seen[0]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("_constant_init")
def test_a_backbone_puts_out_what_its_family_hands_to_the_classifier(name: str) -> None:
    size, options = FAMILIES[name]
    quiet = {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    ours = torchvision_backbone(name, **options).eval()
    torch.manual_seed(0)
    plain = get_model(name, **quiet, **options).eval()
    with torch.no_grad():
        r = ours(images)
        if name.startswith("squeezenet"):  # the input of its last convolution is pooled only afterwards
            expected = input_of_last_layer(plain, nn.Conv2d, images).mean((2, 3))
        else:
            expected = input_of_last_layer(plain, nn.Linear, images)
    assert r.ndim == 2
    assert r.std() > 0
    torch.testing.assert_close(r, expected, atol=1e-6, rtol=1e-5)
    state, plain_state = ours.state_dict(), plain.state_dict()
    missing = [key for key in plain_state if key not in state]
    assert set(state) < set(plain_state)
    assert {plain_state[key].shape[0] for key in missing} == {1000}


def test_every_family_of_classification_models_is_tested() -> None:
    known = torchvision.models.list_models(module=torchvision.models)
    assert {re.split(r"[\d_]", name)[0] for name in known} == {re.split(r"[\d_]", name)[0] for name in FAMILIES}


@pytest.mark.parametrize("cifar_stem", [False, True])
def test_a_resnet_has_the_parameters_of_its_parts(cifar_stem: bool) -> None:
    backbone = torchvision_backbone("resnet18", cifar_stem=cifar_stem)
    stem = 64 * 3 * (9 if cifar_stem else 49)
    blocks = 11_689_512 - 64 * 3 * 49 - (512 * 1000 + 1000)  # torchvision's published count, less stem and fc
    assert sum(p.numel() for p in backbone.parameters()) == stem + blocks


def test_the_stem_for_small_images_keeps_their_size_and_trains_everything() -> None:
    torch.manual_seed(0)
    backbone = torchvision_backbone("resnet18", cifar_stem=True)
    first_stage = backbone.get_submodule("layer1")
    with first_stage.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape))):
        shapes: list[tuple[int, ...]] = []
        r = backbone(torch.randn(4, 3, 32, 32))
    assert shapes == [(4, 64, 32, 32)]
    assert r.shape == (4, 512)
    r.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())
    # He's initialization over the fan out, as torchvision draws it.
    assert float(backbone.get_parameter("conv1.weight").detach().std()) == pytest.approx(
        (2 / (64 * 9)) ** 0.5, rel=0.05
    )


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
@pytest.mark.usefixtures("_constant_init")
@pytest.mark.filterwarnings("error")
def test_models_with_auxiliary_outputs_put_out_one_tensor_while_training(name: str) -> None:
    backbone = torchvision_backbone(name)
    assert backbone.training
    assert isinstance(backbone(torch.randn(2, 3, 80, 80)), Tensor)


@pytest.mark.usefixtures("_constant_init")
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1", "googlenet"])
def test_no_dropout_blurs_the_representation_while_training(name: str) -> None:
    backbone = torchvision_backbone(name)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(backbone(images), backbone(images))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "convnext_tiny"])
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.usefixtures("_constant_init")
def test_pretrained_weights_see_a_gray_image_the_same_whatever_its_channels(
    name: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    plain = torchvision_backbone(name).eval()
    weights = get_model(name).state_dict() | plain.state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: weights)
    backbone = torchvision_backbone(name, weights="DEFAULT", in_channels=channels).eval()
    gray = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        ours = backbone.double()(gray.expand(-1, channels, -1, -1))
        expected = plain.double()(gray.expand(-1, 3, -1, -1))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_random_weights_for_other_channels_keep_their_spread_and_differ_between_channels() -> None:
    torch.manual_seed(0)
    old = torchvision_backbone("resnet18").get_parameter("conv1.weight").detach()
    weight = torchvision_backbone("resnet18", in_channels=4).get_parameter("conv1.weight")
    new = weight.detach()
    assert new.shape == (64, 4, 7, 7)
    assert weight.requires_grad
    assert float(new.std()) == pytest.approx(float(old.std()), rel=0.05)
    assert not torch.equal(new[:, 0], new[:, 1])


def test_a_model_that_normalizes_color_again_takes_gray_images() -> None:
    backbone = torchvision_backbone("googlenet", in_channels=1, init_weights=False, transform_input=True)
    assert representation_dim(backbone, torch.randn(1, 32, 32)) == 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet81"}, "torchvision has no model 'resnet81'; did you mean 'resnet18'?"),
        ({"name": "zzzzz"}, "torchvision has no model 'zzzzz'"),
        ({"name": "fcn_resnet50"}, "torchvision's model 'fcn_resnet50' is not for the classification of images"),
        ({"name": "r3d_18"}, "torchvision's model 'r3d_18' is not for the classification of images"),
        (
            {"name": "fasterrcnn_resnet50_fpn"},
            "torchvision's model 'fasterrcnn_resnet50_fpn' is not for the classification of images",
        ),
        (
            {"name": "quantized_resnet18"},
            "torchvision's model 'quantized_resnet18' is not for the classification of images",
        ),
        (
            {"name": "resnet18", "weights": "IMAGENET"},
            "torchvision's resnet18 has no weights 'IMAGENET'; it has IMAGENET1K_V1, DEFAULT",
        ),
        ({"name": "mobilenet_v2", "cifar_stem": True}, "cifar_stem is for ResNets, not for mobilenet_v2"),
        ({"name": "resnet18", "in_channels": 0}, "in_channels must be an integer >= 1, got 0"),
    ],
)
def test_what_torchvision_does_not_have_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        torchvision_backbone(**options)
    assert str(error.value) == message


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_a_timm_backbone_puts_out_the_features_before_the_classifier(name: str, in_channels: int) -> None:
    torch.manual_seed(0)
    backbone = timm_backbone(name, in_channels=in_channels, image_size=32).eval()
    fixed_size: dict[str, Any] = {"img_size": 32} if "vit" in name else {}
    plain: Any = timm.create_model(name, in_chans=in_channels, **fixed_size).eval()
    missing, unexpected = plain.load_state_dict(backbone.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == {key for key, value in plain.state_dict().items() if value.shape[:1] == (1000,)}
    images = torch.randn(3, in_channels, 32, 32)
    with torch.no_grad():
        expected = plain.forward_head(plain.forward_features(images), pre_logits=True)
        torch.testing.assert_close(backbone(images), expected)
    assert representation_dim(backbone, images[0]) == plain.num_features


def test_a_timm_transformer_is_built_for_its_own_size_by_default() -> None:
    own: Any = timm.create_model("test_vit")
    assert timm_backbone("test_vit").get_parameter("pos_embed").shape == own.pos_embed.shape
    assert timm_backbone("test_vit", image_size=32).get_parameter("pos_embed").shape == (1, 1 + 2 * 2, 64)


def test_options_reach_timm() -> None:
    backbone = timm_backbone("test_vit", image_size=32, patch_size=8)
    assert backbone.get_parameter("pos_embed").shape == (1, 1 + 4 * 4, 64)
    with pytest.raises(TypeError, match="no_such_option"):
        timm_backbone("test_vit", image_size=32, no_such_option=1)


def test_a_name_that_timm_does_not_know_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^timm has no model 'test_vitt'; did you mean 'test_vit") as error:
        timm_backbone("test_vitt")
    assert "\n" not in str(error.value)


def test_without_timm_the_line_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"^timm is not installed; pip install 'adadim-lightning\[timm\]'$"):
        timm_backbone("test_vit")


def test_a_broken_package_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_extra.py").write_text("import a_package_it_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_it_needs") as error:
        require("broken_extra", "timm")
    assert not isinstance(error.value, MissingExtraError)


def test_importing_the_models_loads_neither_timm_nor_torchvision() -> None:
    code = "import sys, adadim_lightning.models; print({'timm', 'torchvision'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "set()"


CONFIGS = sorted((Path(__file__).parents[2] / "conf" / "backbone").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
@pytest.mark.usefixtures("_constant_init")
def test_each_shipped_configuration_has_the_dimension_that_its_first_line_names(path: Path) -> None:
    config = OmegaConf.merge({"data": {"channels": 1, "image_size": 32}}, {"backbone": OmegaConf.load(path)})
    dim = representation_dim(hydra.utils.instantiate(config.backbone), torch.randn(1, 32, 32))
    first_line = path.read_text().partition("\n")[0]
    assert first_line.startswith("# ")
    assert [int(found) for found in re.findall(r"d_R = (\d+)", first_line)] in ([dim], [])
