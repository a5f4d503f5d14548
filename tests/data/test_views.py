"""Two random views of each image."""

import kornia.augmentation as K
import pytest
import torch
from torch import Tensor

from adadim_lightning.data import TwoViews
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
