"""Two random views of each image: batched on the device, or one image at a time on the host."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import RandomApply
from torchvision.transforms.v2.functional import center_crop, resize

from adadim_lightning.data.augmentations import AUGMENTATIONS, Size
from adadim_lightning.functional._numeric import check_integer

Recipe = Mapping[str, Mapping[str, Any] | nn.Module | None]


class TwoViews(nn.Module):
    """Augments a batch twice: every image and every view draws its own transformation.

    A recipe names its augmentations in their order: ``crop`` (scale, ratio), ``flip`` (p), ``vertical_flip`` (p),
    ``affine`` (degrees, translate, scale, shear, p), ``color_jitter`` (brightness, contrast, saturation, hue, p),
    ``grayscale`` (p), ``blur`` (sigma, p), ``solarize`` (threshold, p), ``noise`` (std, p); under any other name a
    module of one's own, of float images in ``[0, 1]``, batched for kornia and single for torchvision.

    Args:
        augmentations: the recipe, parameters by name; or modules in their order.
        mean: mean of each channel in ``[0, 1]``, subtracted after them.
        std: standard deviation of each channel, divided by after that.
        channels: of the images, 1 or 3; mean and std of RGB are then turned into those of grey, and back. The
            std of grey is nearly the mean of theirs, since colors of photographs rise and fall together.
        size: side of the views; None is that of the images.
        second: what the second view does otherwise: parameters that replace those of the recipe, name by name;
            null for what it leaves out.
        backend: ``"kornia"``: whole batches, on the device; ``"torchvision"``: one image at a time, in the
            processes that load, from the image as it was before it was scaled.

    Raises:
        ValueError: an augmentation or a parameter is not known.

    Example:
        >>> views = TwoViews({"flip": {"p": 0.5}, "noise": {"std": 0.1}}, mean=[0.5], std=[0.5])
        >>> view1, view2 = views(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
        >>> view1.shape
        torch.Size([4, 1, 8, 8])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        augmentations: Recipe | Sequence[nn.Module],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size: int | None = None,
        second: Recipe | None = None,
        backend: Literal["kornia", "torchvision"] = "kornia",
        channels: int | None = None,
    ) -> None:
        super().__init__()
        if backend not in ("kornia", "torchvision"):
            raise ValueError(f'backend must be "kornia" or "torchvision", got {backend!r}')
        if size is not None:
            check_integer("size", size, low=1)
        if not isinstance(augmentations, Mapping):
            augmentations = {str(i): module for i, module in enumerate(augmentations)}
        self.size = size
        self.on_host = backend == "torchvision"
        self._recipes = _recipe_of_each_view(augmentations, second or {})
        # Modules of one's own move with this one; kornia's have nothing that could move.
        self.own = nn.ModuleList(
            x for recipe in self._recipes for x in recipe.values() if isinstance(x, nn.Module)
        )
        # One's own may cut too.
        self._crops = any(key == "crop" or isinstance(x, nn.Module) for key, x in self._recipes[0].items())
        self._built: dict[Size, list[tuple[nn.Module, nn.Module]]] = {}
        self.register_buffer("mean", _of_channels(mean, channels).view(-1, 1, 1))
        self.register_buffer("std", _of_channels(std, channels).view(-1, 1, 1))
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean and std must have one entry a channel, got {len(self.mean)} and {len(self.std)}"
            )
        self.pipelines((8, 8))  # mistakes in the recipe are found here

    def pipelines(self, size: Size) -> list[tuple[nn.Module, nn.Module]]:
        """The module of each step for the first and for the second view; the same one where they agree.

        Args:
            size: height and width of the views.
        """
        if size not in self._built:
            first, second = self._recipes
            steps = []
            for name in first:
                module = _build(name, first[name], size, self.on_host)
                same = first[name] is second[name] or first[name] == second[name]
                steps.append((module, module if same else _build(name, second[name], size, self.on_host)))
            self._built[size] = steps
        return self._built[size]

    def _size_of(self, images: Tensor) -> Size:
        return (self.size, self.size) if self.size is not None else (images.shape[-2], images.shape[-1])

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Two views of a batch.

        Args:
            images: shape ``(N, C, H, W)``, uint8.

        Returns:
            Two tensors ``(N, C, S, S)``, float32, normalized.
        """
        if self.on_host:
            views = [self.of_one(image) for image in images]
            return torch.stack([view1 for view1, _ in views]), torch.stack([view2 for _, view2 in views])
        self._follow(images)
        pixels = self._fit(images).float() / 255
        both = torch.cat([pixels, pixels])
        for module1, module2 in self.pipelines(self._size_of(images)):
            if module1 is module2:
                both = module1(both)
            else:
                view1, view2 = both.chunk(2)
                both = torch.cat([module1(view1), module2(view2)])
        view1, view2 = self._normalize(both).chunk(2)
        return view1, view2

    @torch.no_grad()
    def of_one(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Two views of one image, by torchvision.

        Args:
            image: shape ``(C, H, W)``, uint8, of any size.

        Returns:
            Two tensors ``(C, S, S)``, float32, normalized.
        """
        image = self._fit(image)
        views = [image, image]
        for step in self.pipelines(self._size_of(image)):
            views = [
                module(view / 255 if view.dtype == torch.uint8 and _needs_floats(module) else view)
                for module, view in zip(step, views, strict=True)
            ]
        # Not clamped: on the device noise goes beyond black and white too.
        view1, view2 = (self._normalize(view / 255 if view.dtype == torch.uint8 else view) for view in views)
        return view1, view2

    @torch.no_grad()
    def clean(self, images: Tensor) -> Tensor:
        """The images as they are, normalized; the middle of those that are larger than a view.

        Args:
            images: shape ``(N, C, H, W)``, uint8.

        Returns:
            Shape ``(N, C, S, S)``, float32.
        """
        size = self._size_of(images)
        if images.shape[-2:] != size:
            if min(images.shape[-2:]) < size[0]:
                images = resize(images, [size[0]], antialias=True)
            images = center_crop(images, list(size))
        return self._normalize(images.float() / 255)

    def _fit(self, images: Tensor) -> Tensor:
        """The images at the size of the views, where no step of the recipe sees to that."""
        if self.size is None or self._crops or images.shape[-2:] == (self.size, self.size):
            return images
        square: Tensor = center_crop(resize(images, [self.size], antialias=True), [self.size, self.size])
        return square

    def _follow(self, images: Tensor) -> None:
        if self.mean.device != images.device:
            self.to(images.device)

    def _normalize(self, pixels: Tensor) -> Tensor:
        self._follow(pixels)
        if len(self.mean) not in (1, pixels.shape[-3]):
            raise ValueError(
                f"mean and std have {len(self.mean)} channels but the images {pixels.shape[-3]}: set "
                "data.channels, or data.mean and data.std"
            )
        return (pixels - self.mean) / self.std


def _of_channels(values: Sequence[float], channels: int | None) -> Tensor:
    """A value for each channel, of values for each of RGB or for grey."""
    given = torch.tensor(list(values))
    if channels == 1 and len(given) == 3:
        return (given * torch.tensor([0.299, 0.587, 0.114])).sum(0, keepdim=True)
    return given.expand(3) if channels == 3 and len(given) == 1 else given


def _recipe_of_each_view(first: Recipe, changes: Recipe) -> tuple[Recipe, Recipe]:
    first = {name: value for name, value in first.items() if value is not None}
    for name in changes:
        if name not in first:
            raise ValueError(f"second changes {name!r}, which is not in the recipe: {', '.join(first)}")
    second = {}
    for name, value in first.items():
        change = changes.get(name, value)
        both = isinstance(value, Mapping) and isinstance(change, Mapping)
        second[name] = {**value, **change} if both else nn.Identity() if change is None else change  # type: ignore[dict-item]
    return first, second


def _build(name: str, value: Any, size: Size, on_host: bool) -> nn.Module:
    if isinstance(value, nn.Module):
        return value
    make = AUGMENTATIONS.get(name)
    if make is None:
        raise ValueError(f"there is no augmentation {name!r}{_nearest(name, AUGMENTATIONS)}")
    known = [x for x in inspect.signature(make).parameters if x != "size"]
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must give its parameters by name ({', '.join(known)}), got {value!r}")
    for parameter in value:
        if parameter not in known:
            raise ValueError(f"{name} has no parameter {parameter!r}{_nearest(parameter, known)}")
    try:
        return make(size, **value)[on_host]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _nearest(wrong: str, names: Any) -> str:
    near = difflib.get_close_matches(str(wrong), list(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(names)}"


def _needs_floats(module: nn.Module) -> bool:
    """Whether a step of torchvision's works on floats in ``[0, 1]``: noise, solarization, and one's own."""
    inner = module.transforms[0] if isinstance(module, RandomApply) else module
    return type(inner).__name__ in ("GaussianNoise", "RandomSolarize") or not type(inner).__module__.startswith(
        "torchvision."
    )
