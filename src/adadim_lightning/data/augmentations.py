"""The augmentations by their names: kornia's for batches on the device, torchvision's for one image on the host.

Both get the same parameters, so that a recipe means the same wherever it runs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import kornia.augmentation as kornia
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from adadim_lightning.functional._numeric import check_number

Range = Sequence[float]
Size = tuple[int, int]

CHUNK = 64 * 32 * 32  # pixels at a time, so that a CPU's cache holds what lies between
_OFFSETS = (5.0, 3.0, 1.0)


def _luminance(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(-3)
    return (red * 0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(-3)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply; shapes ``(N, C, H, W)`` and ``(N, 1, 1, 1)``."""
    return (images * factor).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Move away from the mean luminance of each image."""
    grey = images if images.shape[-3] == 1 else _luminance(images)
    return torch.lerp(grey.mean(dim=(-3, -2, -1), keepdim=True), images, factor).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Move away from the luminance of each pixel."""
    return images if images.shape[-3] == 1 else torch.lerp(_luminance(images), images, factor).clamp_(0, 1)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue, by value and chroma alone: the way over HSV images takes five times as long."""
    if images.shape[-3] == 1:
        return images
    red, green, blue = images.unbind(-3)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    divisor = chroma.clamp_min(1e-12)
    hue = torch.where(
        value == red,
        (green - blue).div_(divisor),
        torch.where(value == green, (blue - red).div_(divisor).add_(2.0), (red - green).div_(divisor).add_(4.0)),
    )
    sixths = hue.add_(turns[..., 0, :, :] * 6).unsqueeze(-3)
    # https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative
    k = (sixths + images.new_tensor(_OFFSETS).view(3, 1, 1)).remainder_(6)
    return torch.addcmul(value.unsqueeze(-3), chroma.unsqueeze(-3), torch.minimum(k, 4 - k).clamp_(0, 1), value=-1)


class ColorJitter(kornia.ColorJitter):
    """kornia's random parameters, and torchvision's arithmetic on whole batches.

    kornia's own arithmetic takes most of a view's time; this takes a fifth of it (benchmarks/throughput.py).
    """

    _steps = (
        (adjust_brightness, "brightness_factor"),
        (adjust_contrast, "contrast_factor"),
        (adjust_saturation, "saturation_factor"),
        (adjust_hue, "hue_factor"),
    )

    def apply_transform(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Apply the four adjustments in the random order of this batch."""
        steps = [
            (step, params[name].to(input).view(-1, 1, 1, 1))
            for step, name in (self._steps[i] for i in params["order"].tolist())
        ]
        size = len(input) if input.is_cuda else max(1, CHUNK // (input.shape[-1] * input.shape[-2]))
        chunks = []
        for start in range(0, len(input), size):
            chunk = input[start : start + size]
            for step, factor in steps:
                chunk = step(chunk, factor[start : start + size])
            chunks.append(chunk)
        return torch.cat(chunks) if len(chunks) != 1 else chunks[0]


class Grayscale(kornia.RandomGrayscale):
    """kornia's, and grey images stay as they are."""

    def apply_transform(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Remove the color."""
        return input if input.shape[-3] == 1 else super().apply_transform(input, params, flags, transform)


class Solarize(kornia.RandomSolarize):
    """kornia's random parameters, for whole batches: its own arithmetic goes image by image."""

    def apply_transform(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Invert what is brighter than the threshold of its image."""
        threshold = params["thresholds"].to(input).view(-1, 1, 1, 1)
        return torch.where(input < threshold, input, 1 - input)


class Sometimes(nn.Module):
    """Applies an augmentation of kornia to each image with a probability.

    On a CPU the chosen images alone are augmented, in place; kornia augments all and chooses afterwards. On a GPU
    that is the better way, since it waits for nothing, and is left to kornia.

    Args:
        make: makes the augmentation for a probability.
        p: the probability.
    """

    def __init__(self, make: Callable[[float], nn.Module], p: float) -> None:
        super().__init__()
        check_number("p", p, low=0, high=1)
        self.p = p
        self.always = make(1.0)
        self.by_kornia = make(p)

    def forward(self, images: Tensor) -> Tensor:
        """Augment a batch of floats, ``(N, C, H, W)``, which may be changed in place."""
        if images.device.type != "cpu":
            return self.by_kornia(images)  # type: ignore[no-any-return]
        if self.p == 1:
            return self.always(images)  # type: ignore[no-any-return]
        chosen = (torch.rand(len(images)) < self.p).nonzero().flatten()
        if len(chosen):
            images[chosen] = self.always(images[chosen])
        return images


def _sometimes_on_host(transform: nn.Module, p: float) -> nn.Module:
    sometimes: nn.Module = v2.RandomApply([transform], p=p)
    return sometimes


def _around_one(strength: float) -> tuple[float, float]:
    return max(0.0, 1 - strength), 1 + strength


def _odd(size: int) -> int:
    return max(3, size // 2 * 2 + 1)


# Each takes the size of the view, and the parameters that a recipe may give.


def crop(size: Size, *, scale: Range = (0.08, 1.0), ratio: Range = (3 / 4, 4 / 3)) -> tuple[nn.Module, nn.Module]:
    """Cut out a part of random area and shape, and scale it to the size of the view."""
    options: dict[str, Any] = {"scale": tuple(scale), "ratio": tuple(ratio)}
    return (
        # The other mode cuts image by image, and waits for the device.
        kornia.RandomResizedCrop(size, cropping_mode="resample", **options),
        v2.RandomResizedCrop(size, antialias=True, **options),
    )


def flip(size: Size, *, p: float = 0.5) -> tuple[nn.Module, nn.Module]:
    """Mirror left and right."""
    return Sometimes(lambda p: kornia.RandomHorizontalFlip(p=p), p), v2.RandomHorizontalFlip(p=p)


def vertical_flip(size: Size, *, p: float = 0.5) -> tuple[nn.Module, nn.Module]:
    """Mirror top and bottom."""
    return Sometimes(lambda p: kornia.RandomVerticalFlip(p=p), p), v2.RandomVerticalFlip(p=p)


def affine(
    size: Size,
    *,
    degrees: float = 0.0,
    translate: Range = (0.0, 0.0),
    scale: Range = (1.0, 1.0),
    shear: Range = (0.0, 0.0),
    p: float = 1.0,
) -> tuple[nn.Module, nn.Module]:
    """Rotate, move, scale and shear; black comes in at the edges."""
    options: dict[str, Any] = {
        "degrees": degrees,
        "translate": tuple(translate),
        "scale": tuple(scale),
        "shear": tuple(shear),
    }
    # With a number for fill, torchvision darkens the pixels at the edge twice.
    host = v2.RandomAffine(**options, interpolation=v2.InterpolationMode.BILINEAR, fill=None)
    return Sometimes(lambda p: kornia.RandomAffine(**options, p=p), p), _sometimes_on_host(host, p)


def color_jitter(
    size: Size,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    p: float = 0.8,
) -> tuple[nn.Module, nn.Module]:
    """Change brightness, contrast, saturation and hue, in random order."""
    check_number("hue", hue, low=0, high=0.5)
    ranges = [_around_one(strength) for strength in (brightness, contrast, saturation)]
    return (
        Sometimes(lambda p: ColorJitter(*ranges, (-hue, hue), p=p), p),
        _sometimes_on_host(v2.ColorJitter(brightness, contrast, saturation, hue), p),
    )


def grayscale(size: Size, *, p: float = 0.2) -> tuple[nn.Module, nn.Module]:
    """Remove the color."""
    return Sometimes(lambda p: Grayscale(p=p), p), v2.RandomGrayscale(p=p)


def blur(size: Size, *, sigma: Range = (0.1, 2.0), p: float = 0.5) -> tuple[nn.Module, nn.Module]:
    """Blur by a Gaussian whose kernel is a tenth of the view."""
    kernel = tuple(_odd(side // 10) for side in size)
    return (
        Sometimes(
            lambda p: kornia.RandomGaussianBlur(kernel, tuple(sigma), separable=max(kernel) > 5, p=p),
            p,
        ),
        _sometimes_on_host(v2.GaussianBlur(kernel[::-1], tuple(sigma)), p),
    )


def solarize(size: Size, *, threshold: float = 0.5, p: float = 0.1) -> tuple[nn.Module, nn.Module]:
    """Invert what is brighter than the threshold."""
    return (
        Sometimes(lambda p: Solarize((threshold, threshold), (0.0, 0.0), p=p), p),
        v2.RandomSolarize(threshold, p=p),
    )


def noise(size: Size, *, std: float = 0.1, p: float = 0.5) -> tuple[nn.Module, nn.Module]:
    """Add Gaussian noise."""
    check_number("std", std, low=0)
    return Sometimes(lambda p: kornia.RandomGaussianNoise(std=std, p=p), p), _sometimes_on_host(
        v2.GaussianNoise(sigma=std, clip=False), p
    )


AUGMENTATIONS: Mapping[str, Callable[..., tuple[nn.Module, nn.Module]]] = {
    x.__name__: x for x in (crop, flip, vertical_flip, affine, color_jitter, grayscale, blur, solarize, noise)
}
