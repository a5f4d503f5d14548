"""The augmentations by name: kornia's, torchvision's, and our own arithmetic in between."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision.transforms.v2.functional as F
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from torch import Tensor, nn
from torchvision.transforms import v2

from adadim_lightning.cli.app import config_dir
from adadim_lightning.data import TwoViews
from adadim_lightning.data import augmentations as ours
from adadim_lightning.data.augmentations import AUGMENTATIONS

RECIPES = sorted(path.stem for path in (config_dir() / "views").glob("*.yaml"))
ALSO_GREY = ("digits", "gray", "medical")
ADJUST = {
    "brightness": (ours.adjust_brightness, F.adjust_brightness, (0.0, 0.3, 1.0, 1.8, 5.0)),
    "contrast": (ours.adjust_contrast, F.adjust_contrast, (0.0, 0.3, 1.0, 1.8, 5.0)),
    "saturation": (ours.adjust_saturation, F.adjust_saturation, (0.0, 0.3, 1.0, 1.8, 5.0)),
    "hue": (ours.adjust_hue, F.adjust_hue, (-0.5, -0.2, 0.0, 0.1, 0.5)),
}


def colors(channels: int = 3) -> Tensor:
    """Five images: noise, black, white, grey, and the corners of the color cube, where hues have their ties."""
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).T.reshape(3, 2, 4).repeat(1, 4, 2)
    plain = [torch.full((3, 8, 8), value) for value in (0.0, 1.0, 0.5)]
    return torch.stack([torch.rand(3, 8, 8), *plain, corners])[:, :channels]


def photo(channels: int = 3, size: int = 32) -> Tensor:
    """A smooth uint8 image whose four quarters differ."""
    coarse = torch.rand(1, channels, 5, 5, generator=torch.Generator().manual_seed(3))
    return (nn.functional.interpolate(coarse, size, mode="bilinear")[0] * 255).byte()


# Arithmetic.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ADJUST)
def test_each_adjustment_is_that_of_torchvision_for_each_image(name: str, channels: int) -> None:
    mine, reference, factors = ADJUST[name]
    images = colors(channels)
    for shift in range(5):  # each image meets each factor
        chosen = [factors[(i + shift) % 5] for i in range(5)]
        before = images.clone()
        adjusted = mine(images, torch.tensor(chosen).view(-1, 1, 1, 1))
        expected = torch.stack([reference(x, factor) for x, factor in zip(images, chosen, strict=True)])
        # torchvision rounds the weight of red to 0.2989, and the luminance of white to 0.9999.
        torch.testing.assert_close(
            adjusted, expected, rtol=0, atol=6e-4 if name in ("contrast", "saturation") else 1e-5
        )
        assert torch.equal(images, before)


def jitter(**options: float) -> Any:
    module = AUGMENTATIONS["color_jitter"]((8, 8), **options)[0]
    return next(x for x in module.modules() if isinstance(x, ours.ColorJitter))


def test_color_jitter_applies_the_four_adjustments_in_the_order_of_the_batch() -> None:
    images = torch.rand(7, 3, 8, 8)
    module = jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2, p=1.0)
    orders = set()
    for _ in range(5):
        result = module(images)
        params = module._params
        orders.add(tuple(params["order"].tolist()))
        expected = images
        for i in params["order"].tolist():
            factor = params[f"{list(ADJUST)[i]}_factor"]
            expected = torch.stack(
                [list(ADJUST.values())[i][1](x, float(f)) for x, f in zip(expected, factor, strict=True)]
            )
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)
    assert len(orders) > 1
    assert len(set(params["brightness_factor"].tolist())) == 7  # each image its own


@pytest.mark.parametrize("channels", [1, 3])
def test_color_jitter_in_chunks_is_that_of_the_whole_batch(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(7, channels, 8, 6)
    results = []
    for chunk in (10**9, 3 * 8 * 6, 1):  # one chunk, three, one of each image
        monkeypatch.setattr(ours, "CHUNK", chunk)
        torch.manual_seed(2)
        results.append(jitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, p=0.7)(images))
    assert not torch.equal(results[0], images)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-6)


def test_color_jitter_is_finite_for_any_color() -> None:
    for _ in range(20):
        views = jitter(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.5, p=1.0)(colors())
        assert bool(torch.isfinite(views).all())
        assert float(views.min()) >= 0
        assert float(views.max()) <= 1


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
def test_solarization_is_that_of_torchvision(threshold: float) -> None:
    images = torch.cat([colors(), torch.full((1, 3, 8, 8), 0.3)])
    solarized = AUGMENTATIONS["solarize"]((8, 8), threshold=threshold, p=1.0)[0](images.clone())
    torch.testing.assert_close(solarized, F.solarize(images, threshold), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (100, 50), (50, 100)])
def test_blur_is_that_of_torchvision_also_where_images_are_not_square(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size)
    device, host = AUGMENTATIONS["blur"](size, sigma=(1.3, 1.3), p=1.0)
    torch.testing.assert_close(device(images.clone()), host(images), rtol=0, atol=1e-5)


# Parameters.

GIVEN: dict[str, dict[str, Any]] = {
    "crop": {"scale": (0.3, 0.9), "ratio": (0.7, 1.2)},
    "flip": {"p": 0.3},
    "vertical_flip": {"p": 0.3},
    "affine": {
        "degrees": 12.0, "translate": (0.1, 0.2), "scale": (0.8, 1.1), "shear": (-7.0, 7.0), "p": 0.3,
    },
    "color_jitter": {"brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1, "p": 0.3},
    "grayscale": {"p": 0.3},
    "blur": {"sigma": (0.2, 1.7), "p": 0.3},
    "solarize": {"threshold": 0.4, "p": 0.3},
    "noise": {"std": 0.07, "p": 0.3},
}  # fmt: skip


def numbers(values: Any) -> tuple[float, ...]:
    return tuple(float(x) for x in values)


def of_device(name: str, module: Any) -> dict[str, Any]:
    """Parameters as kornia will use them."""
    p = float(module.p)
    module = getattr(module, "by_kornia", module)
    assert (float(module.p), module.p_batch, module.same_on_batch) == (p, 1.0, False)
    generator = module._param_generator
    found: dict[str, Any] = {"p": p}
    if name == "crop":
        found |= {"size": generator.output_size, "scale": generator.scale, "ratio": generator.ratio}
    elif name == "affine":
        shear_x, shear_y = (
            (float(s.low), float(s.high)) for s in (generator.shear_x_sampler, generator.shear_y_sampler)
        )
        assert shear_y == (0.0, 0.0)
        low, high = float(generator.degree_sampler.low), float(generator.degree_sampler.high)
        found |= {
            "degrees": (low, high),
            "translate": generator.translate,
            "scale": generator.scale,
            "shear": shear_x,
        }
        assert module.flags["resample"].name == "BILINEAR"
        assert module.flags["padding_mode"].name == "ZEROS"
    elif name == "color_jitter":
        for key in ADJUST:
            sampler = getattr(generator, f"{key}_sampler")
            found[key] = (float(sampler.low), float(sampler.high))
    elif name == "blur":
        found |= {"kernel": module.flags["kernel_size"], "sigma": generator.sigma}
    elif name == "solarize":
        sampler, added = generator.sampler_dict["thresholds"], generator.sampler_dict["additions"]
        assert float(sampler.low) == float(sampler.high)
        assert float(added.low) == float(added.high) == 0
        found["threshold"] = float(sampler.low)
    elif name == "noise":
        given = module.flags if generator is None else vars(generator)  # before Kornia 0.9, and since
        assert given["mean"] == 0
        found["std"] = given["std"]
    return found


def of_host(name: str, module: Any) -> dict[str, Any]:
    """Parameters as torchvision will use them."""
    found: dict[str, Any] = {"p": float(getattr(module, "p", 1.0))}
    if isinstance(module, v2.RandomApply):
        (module,) = module.transforms
    if name == "crop":
        found |= {"size": tuple(module.size), "scale": module.scale, "ratio": module.ratio}
    elif name == "affine":
        assert module.interpolation.value == "bilinear"
        found |= {key: getattr(module, key) for key in ("degrees", "translate", "scale", "shear")}
    elif name == "color_jitter":
        found |= {key: getattr(module, key) for key in ADJUST}
    elif name == "blur":
        found |= {"kernel": tuple(module.kernel_size)[::-1], "sigma": module.sigma}
    elif name == "solarize":
        found["threshold"] = module.threshold
    elif name == "noise":
        assert module.mean == 0
        assert not module.clip
        found["std"] = module.sigma
    return found


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_kornia_and_torchvision_get_the_parameters_of_the_recipe(name: str) -> None:
    device, host = AUGMENTATIONS[name]((60, 40), **GIVEN[name])
    first, second = of_device(name, device), of_host(name, host)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value == pytest.approx(second[key], abs=1e-6), key
    for key, value in GIVEN[name].items():  # and not only equal ones
        if name == "color_jitter" and key != "p":
            center = 0 if key == "hue" else 1
            value = (center - value, center + value)
        elif key == "degrees":
            value = (-value, value)
        assert first[key] == pytest.approx(value, abs=1e-6), key


CHANCY = [name for name in AUGMENTATIONS if name != "crop"]


@pytest.mark.parametrize("backend", ["kornia", "torchvision"])
@pytest.mark.parametrize("name", CHANCY)
def test_the_probability_holds_for_each_image_alone(name: str, backend: Any) -> None:
    image = photo(size=8)
    views = TwoViews({name: GIVEN[name]}, mean=[0.0], std=[1.0], backend=backend)
    view1, view2 = views(image.expand(1000, -1, -1, -1).contiguous())
    changed = ((torch.cat([view1, view2]) - image / 255).abs().amax(dim=(1, 2, 3)) > 1e-6).float()
    spread = math.sqrt(2000 * 0.3 * 0.7)
    assert abs(float(changed.sum()) - 600) < 4 * spread
    # Neither neighbors nor the two views of an image are chosen together.
    first, second = changed.chunk(2)
    for a, b in ((first, second), (changed[1:], changed[:-1])):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 4 / math.sqrt(len(a))


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("name", CHANCY)
def test_never_and_always_are_taken_at_their_word(name: str, p: float) -> None:
    images = photo(size=8).expand(64, -1, -1, -1) / 255
    for module in AUGMENTATIONS[name]((8, 8), **(GIVEN[name] | {"p": p})):
        result = module(images.clone())
        changed = (result - images).abs().amax(dim=(1, 2, 3)) > 1e-6
        assert bool(changed.any()) == bool(p)
        if module._get_name() != "RandomApply":  # torchvision draws once for what it is given
            assert float(changed.float().mean()) == p


@pytest.mark.parametrize("level", [0, 255])
def test_noise_goes_beyond_black_and_white_on_both_backends(level: int) -> None:
    images = torch.full((64, 1, 8, 8), level, dtype=torch.uint8)
    for backend in ("kornia", "torchvision"):
        views = TwoViews({"noise": {"std": 0.1, "p": 1.0}}, mean=[0.0], std=[1.0], backend=backend)  # type: ignore[arg-type]
        for view in views(images):
            assert float(view.mean()) == pytest.approx(level / 255, abs=0.01)
            assert float(view.std()) == pytest.approx(0.1, rel=0.05)


# Whole recipes.


@pytest.fixture
def composed() -> Iterator[Any]:
    """The views of a name in ``conf/views``."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):

        def make(name: str, channels: int, backend: str = "kornia", *overrides: str) -> TwoViews:
            fixed = [f"data.channels={channels}", f"data.mean={[0.0] * channels}", f"data.std={[1.0] * channels}"]
            config = compose("train", [f"views={name}", f"views.backend={backend}", *fixed, *overrides])
            views = instantiate(config.views, _convert_="all")
            assert isinstance(views, TwoViews)
            return views

        yield make


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", RECIPES)
def test_both_backends_have_the_same_effect(name: str, channels: int, composed: Any) -> None:
    if channels == 1 and name not in ALSO_GREY:
        pytest.skip("meant for colors")
    size, count = 16, 300
    image = photo(channels, size)
    results = []
    for backend in ("kornia", "torchvision"):
        views = composed(name, channels, backend)
        results.append([view.double() for view in views(image.expand(count, -1, -1, -1).contiguous())])
    for device_view, host_view in zip(*results, strict=True):
        means = [view.mean(dim=(1, 2, 3)) for view in (device_view, host_view)]
        error = math.sqrt(sum(float(x.var()) / count for x in means))
        # Mean and spread of brightness among the views, up to sampling error and the border of a blur or a tilt.
        assert float(means[0].mean()) == pytest.approx(float(means[1].mean()), abs=4 * error + 0.005)
        assert float(means[0].std()) == pytest.approx(float(means[1].std()), rel=0.15)
        # Contrast within a view, and sharpness: differences of neighbors.
        contrast = [float(view.std(dim=(2, 3)).mean()) for view in (device_view, host_view)]
        assert contrast[0] == pytest.approx(contrast[1], rel=0.08)
        sharpness = [float(view.diff(dim=-1).abs().mean()) for view in (device_view, host_view)]
        assert sharpness[0] == pytest.approx(sharpness[1], rel=0.12)
        # The average picture: flips, crops and moves go the same way (kornia cuts half a pixel closer).
        mean_images = [view.mean(dim=0) for view in (device_view, host_view)]
        assert float((mean_images[0] - mean_images[1]).abs().max()) < 0.08


@pytest.mark.parametrize("backend", ["kornia", "torchvision"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_black_white_and_grey_images(name: str, backend: str, composed: Any) -> None:
    for channels in (1, 3):
        views = composed(name, channels, backend)
        images = (colors(channels) * 255).byte().repeat(4, 1, 1, 1)
        for view in views(images):
            assert view.shape == (20, channels, 8, 8)
            assert view.dtype == torch.float32
            assert bool(torch.isfinite(view).all())


def test_null_or_a_tilde_removes_a_step(composed: Any) -> None:
    for override in ("~views.augmentations.blur", "views.augmentations.blur=null"):
        views = composed("simclr", 3, "torchvision", override)
        kinds = [
            type(x.transforms[0] if isinstance(x, v2.RandomApply) else x).__name__
            for x, _ in views.pipelines((8, 8))
        ]
        assert kinds == ["RandomResizedCrop", "RandomHorizontalFlip", "ColorJitter", "RandomGrayscale"]
