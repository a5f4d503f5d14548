"""Two random views of each image."""

import copy
import pickle
from typing import Any

import kornia.augmentation as K
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from adadim_lightning.data import TwoViews
from adadim_lightning.report.views import draw_views
from tests.helpers import all_digits, two_noisy_views


def images(size: int = 16) -> Tensor:
    return all_digits().train.images[:size]


def same_images(size: int = 16) -> Tensor:
    return images(1).expand(size, -1, -1, -1).contiguous()


def by_kornia() -> TwoViews:
    return TwoViews([K.RandomAffine(degrees=30, translate=(0.2, 0.2), p=1.0)], mean=[0.5], std=[0.25])


@pytest.mark.parametrize("make", [two_noisy_views, by_kornia], ids=["noise", "kornia"])
def test_every_image_and_every_view_draws_its_own_transformation(make) -> None:
    view1, view2 = make()(same_images())
    assert view1.shape == view2.shape == (16, 1, 8, 8)
    assert view1.dtype == torch.float32
    assert len({tuple(x.flatten().tolist()) for x in torch.cat([view1, view2])}) == 32


@pytest.mark.parametrize("make", [two_noisy_views, by_kornia], ids=["noise", "kornia"])
def test_the_same_seed_gives_the_same_views_and_the_next_call_others(make) -> None:
    views = make()
    torch.manual_seed(5)
    first = views(images())
    second = views(images())
    torch.manual_seed(5)
    again = views(images())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], second[0])


def test_both_views_show_the_image_that_they_are_made_from() -> None:
    views = TwoViews([], mean=[0.5], std=[0.25])
    view1, view2 = views(images())
    assert torch.equal(view1, views.clean(images()))
    assert torch.equal(view2, view1)


def test_clean_images_are_scaled_to_one_and_normalized_channel_by_channel() -> None:
    raw = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    mean, std = [0.1, 0.4, 0.7], [0.5, 0.25, 0.2]
    clean = TwoViews([], mean=mean, std=std).clean(raw)
    for channel in range(3):
        expected = (raw[:, channel] / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(clean[:, channel], expected)


def test_augmentations_see_values_between_zero_and_one() -> None:
    seen: list[Tensor] = []

    class Watch(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x

    TwoViews([Watch()], mean=[0.5], std=[0.5])(images())
    assert (float(seen[0].min()), float(seen[0].max())) == (0.0, 1.0)


def test_views_carry_no_gradient() -> None:
    assert not any(view.requires_grad for view in by_kornia()(images()))


# Recipes.


def recipe_views(recipe: Any, **options: Any) -> TwoViews:
    return TwoViews(recipe, **({"mean": [0.0], "std": [1.0]} | options))


def photos(size: int = 4, height: int = 16, width: int = 16) -> Tensor:
    return torch.randint(0, 256, (size, 3, height, width), dtype=torch.uint8)


class Shift(torch.nn.Module):
    """An augmentation of one's own, with a state that has to lie where the images do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("by", torch.tensor(0.25))

    def forward(self, images: Tensor) -> Tensor:
        return images + self.by


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "augmentation": ({"augmentations": {"flipp": {}}}, "there is no augmentation 'flipp'; did you mean 'flip'?"),
    "nothing near": ({"augmentations": {"zzz": {}}}, "no augmentation 'zzz'; it has crop, flip, vertical_flip"),
    "parameter": (
        {"augmentations": {"blur": {"sigm": [1, 2]}}},
        "blur has no parameter 'sigm'; did you mean 'sigma'?",
    ),
    "size": ({"augmentations": {"crop": {"size": 3}}}, "crop has no parameter 'size'; it has scale, ratio"),
    "bare number": ({"augmentations": {"flip": 0.5}}, "flip must give its parameters by name (p), got 0.5"),
    "no range": ({"augmentations": {"crop": {"scale": 0.5}}}, "crop: 'float' object is not iterable"),
    "probability": ({"augmentations": {"flip": {"p": 2}}}, "flip: p must lie in [0, 1], got 2"),
    "hue": ({"augmentations": {"color_jitter": {"hue": 0.6}}}, "color_jitter: hue must lie in [0, 0.5], got 0.6"),
    "noise": ({"augmentations": {"noise": {"std": -1}}}, "noise: std must be a finite number >= 0, got -1"),
    "second": (
        {"augmentations": {"flip": {}}, "second": {"blur": {"p": 0.1}}},
        "second changes 'blur', which is not in the recipe: flip",
    ),
    "second of a removed step": (
        {"augmentations": {"flip": {}, "blur": None}, "second": {"blur": {"p": 0.1}}},
        "second changes 'blur'",
    ),
    "parameter in second": (
        {"augmentations": {"flip": {}}, "second": {"flip": {"pp": 0.1}}},
        "flip has no parameter 'pp'",
    ),
    "backend": (
        {"augmentations": {}, "backend": "cornia"},
        'backend must be "kornia" or "torchvision", got \'cornia\'',
    ),
    "mean and std": (
        {"augmentations": {}, "mean": [0.5], "std": [0.5] * 3},
        "mean and std must have one entry a channel, got 1 and 3",
    ),
    "side": ({"augmentations": {}, "size": 0}, "size must be an integer >= 1, got 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_named_when_the_views_are_made(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        TwoViews(**({"mean": [0.5], "std": [0.5]} | options))
    assert message in str(error.value)


def test_mean_and_std_that_do_not_fit_the_images_are_named() -> None:
    views = recipe_views({}, mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(ValueError, match="have 3 channels but the images 1: set data"):
        views(images())
    assert recipe_views({})(photos())[0].shape == (4, 3, 16, 16)  # one for all channels


@pytest.mark.parametrize("backend", ["kornia", "torchvision"])
def test_second_changes_the_named_step_of_the_second_view_only(backend: Any) -> None:
    recipe = {"flip": {"p": 0.0}, "blur": {"sigma": [3, 3], "p": 1.0}, "solarize": {"threshold": 0.5, "p": 0.0}}
    views = recipe_views(recipe, second={"blur": {"p": 0.0}, "solarize": {"p": 1.0}}, backend=backend)
    pictures = photos()
    view1, view2 = views(pictures)
    plain = pictures / 255
    torch.testing.assert_close(view2, torch.where(plain < 0.5, plain, 1 - plain))
    blurred = torch.stack([gaussian_blur(x, [3, 3], [3.0, 3.0]) for x in plain])
    torch.testing.assert_close(view1, blurred, rtol=0, atol=0.003)  # torchvision rounds to bytes
    assert [a is b for a, b in views.pipelines((16, 16))] == [True, False, False]


@pytest.mark.parametrize("backend", ["kornia", "torchvision"])
def test_null_in_second_leaves_a_step_out_there(backend: Any) -> None:
    views = recipe_views({"solarize": {"p": 1.0, "threshold": 0.0}}, second={"solarize": None}, backend=backend)
    view1, view2 = views(photos(1))
    torch.testing.assert_close(view1, 1 - view2)


@pytest.mark.parametrize("backend", ["kornia", "torchvision"])
def test_views_with_a_second_recipe_share_nothing_random(backend: Any) -> None:
    recipe = {
        "crop": {},
        "color_jitter": {"brightness": 0.4, "p": 1.0},
        "blur": {"p": 1.0},
        "solarize": {"p": 0.0},
    }
    views = recipe_views(recipe, second={"blur": {"p": 0.1}, "solarize": {"p": 0.2}}, backend=backend)
    pictures = photos(1, 32, 32).expand(400, -1, -1, -1).contiguous()
    brightness = [view.mean(dim=(1, 2, 3)) for view in views(pictures)]
    assert abs(float(torch.corrcoef(torch.stack(brightness))[0, 1])) < 4 / 20
    assert len({round(float(x), 6) for x in torch.cat(brightness)}) > 790


@pytest.mark.parametrize("backend", ["kornia", "torchvision"])
@pytest.mark.parametrize("shape", [(16, 16), (40, 40), (20, 36), (36, 20), (7, 50)])
@pytest.mark.parametrize("recipe", [{"crop": {}, "blur": {}}, {"flip": {}, "noise": {}}], ids=["crop", "no crop"])
def test_views_have_the_size_that_is_asked_for_whatever_the_images_have(
    recipe: Any, shape: tuple[int, int], backend: Any
) -> None:
    views = recipe_views(recipe, size=24, backend=backend)
    for view in (*views(photos(3, *shape)), views.clean(photos(3, *shape))):
        assert view.shape == (3, 3, 24, 24)
    same = recipe_views(recipe, backend=backend)
    for view in (*same(photos(3, *shape)), same.clean(photos(3, *shape))):
        assert view.shape == (3, 3, *shape)


def test_clean_images_are_the_middle_of_larger_ones_and_small_ones_keep_their_proportions() -> None:
    views = recipe_views({}, size=8)
    larger = photos(2, 12, 10)
    assert torch.equal(views.clean(larger), larger[:, :, 2:10, 1:9] / 255)
    flat = torch.zeros(1, 1, 4, 8, dtype=torch.uint8)
    flat[..., 2:6] = 255  # a square of four by four in the middle, which fills the middle of the height
    scaled = views.clean(flat)
    assert scaled.shape == (1, 1, 8, 8)
    assert float(scaled.mean()) > 0.9


def test_own_modules_move_with_the_views_and_follow_the_images() -> None:
    views = recipe_views({"shift": Shift(), "flip": {"p": 0.5}})
    assert float(views(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))[0].max()) == 0.25
    assert views.to("meta").own[0].by.device.type == "meta"
    fresh = recipe_views({"shift": Shift()})
    view1, _ = fresh(torch.zeros(2, 1, 4, 4, dtype=torch.uint8, device="meta"))  # as images on a GPU would
    assert view1.device.type == "meta"


def test_own_modules_of_the_host_get_floats() -> None:
    recipe = {"flip": {"p": 0.0}, "shift": Shift(), "noise": {"std": 0.0}}
    view1, view2 = recipe_views(recipe, backend="torchvision")(torch.full((2, 1, 4, 4), 51, dtype=torch.uint8))
    assert torch.equal(view1, view2)
    torch.testing.assert_close(view1, torch.full((2, 1, 4, 4), 0.45))


FULL: dict[str, dict[str, Any]] = {
    "crop": {},
    "flip": {},
    "vertical_flip": {},
    "affine": {"degrees": 10},
    "color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
    "grayscale": {},
    "blur": {},
    "solarize": {},
    "noise": {},
}


@pytest.mark.parametrize("backend", ["kornia", "torchvision"])
def test_a_seed_decides_all_of_a_recipe_and_nothing_carries_a_gradient(backend: Any) -> None:
    views = recipe_views(FULL, backend=backend)
    pictures = photos(8)
    kept = pictures.clone()
    runs = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        runs.append(torch.stack(views(pictures)))
    assert torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], runs[1])
    assert not runs[0].requires_grad
    assert torch.equal(pictures, kept)
    assert len({tuple(x.flatten().tolist()) for x in runs[0].flatten(0, 1)}) == 16


@pytest.mark.parametrize("backend", ["kornia", "torchvision"])
def test_views_can_be_copied_and_sent_to_another_process_after_use(backend: Any) -> None:
    views = recipe_views(FULL, backend=backend, second={"blur": {"p": 0.1}})
    pictures = photos()
    results = []
    for same in (views, copy.deepcopy(views), pickle.loads(pickle.dumps(views))):
        torch.manual_seed(1)
        results.append(torch.stack(same(pictures)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_drawn_views_are_the_image_and_three_pairs_in_its_colors() -> None:
    views = recipe_views({"solarize": {"p": 1.0, "threshold": 0.0}}, mean=[0.3] * 3, std=[0.2] * 3)
    pictures = photos(2)
    figure = draw_views(views, pictures)
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(shown) == 2 * 7
    for row in range(2):
        image = pictures[row].movedim(0, -1).numpy() / 255
        for column in range(7):
            expected = image if column == 0 else 1 - image
            assert abs(shown[7 * row + column] - expected).max() < 1e-5


def test_mean_and_std_of_rgb_become_those_of_grey_and_back() -> None:
    options = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    grey = TwoViews({"flip": {}}, channels=1, **options)
    assert grey.mean.flatten().tolist() == pytest.approx([0.299 * 0.485 + 0.587 * 0.456 + 0.114 * 0.406])
    assert grey.std.flatten().tolist() == pytest.approx([0.299 * 0.229 + 0.587 * 0.224 + 0.114 * 0.225])
    assert grey.clean(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, 1, 8, 8)
    color = TwoViews({"flip": {}}, mean=[0.3], std=[0.4], channels=3)
    assert color.mean.flatten().tolist() == pytest.approx([0.3] * 3)
    assert TwoViews({"flip": {}}, channels=3, **options).std.flatten().tolist() == pytest.approx(options["std"])
