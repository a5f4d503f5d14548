"""Backbones: images in, representations out."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adadim_lightning.extras import require
from adadim_lightning.functional._numeric import check_integer


class SmallConvNet(nn.Sequential):
    """Small convolutional backbone for small images, fast enough to train on a laptop.

    Each stage has two 3 x 3 convolutions with batch norm and ReLU; every stage but the first halves the image.
    The representation is the mean over positions.

    Args:
        in_channels: channels of the images.
        channels: width of each stage; the last is d_R.

    Example:
        >>> SmallConvNet(1, (8, 16))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 16])
    """

    def __init__(self, in_channels: int = 3, channels: Sequence[int] = (32, 64, 128)) -> None:
        check_integer("in_channels", in_channels, low=1)
        if not isinstance(channels, Sequence) or not channels:
            raise ValueError(f"channels must list the width of at least one stage, got {channels!r}")
        for width in channels:
            check_integer("each of channels", width, low=1)
        layers: list[nn.Module] = []
        previous = in_channels
        for stage, width in enumerate(channels):
            for stride in (1 if stage == 0 else 2, 1):
                layers += [
                    nn.Conv2d(previous, width, 3, stride, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                previous = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def torchvision_backbone(
    name: str,
    *,
    weights: str | None = None,
    in_channels: int = 3,
    cifar_stem: bool = False,
    **options: Any,
) -> nn.Module:
    """Any classification model of torchvision, without its last layer.

    The last layer becomes an identity, and so does a dropout right before it, which would blur R while training.
    All other layers keep their names, so that state dicts of torchvision fit but for the last layer.

    Args:
        name: as in ``torchvision.models.list_models(torchvision.models)``.
        weights: name of pretrained weights, such as ``"DEFAULT"``; random by default.
        in_channels: channels of the images. Unless it is 3, the first convolution changes: random weights are
            drawn anew with the same spread; pretrained ones are averaged over their channels and scaled, so that
            a gray image with equal channels gets the same response as before.
        cifar_stem: for images of about 32 pixels: a 3 x 3 convolution of stride 1 with random weights instead of
            the first one, and no max-pool. ResNets only.
        options: passed on to torchvision.

    Returns:
        Module from ``(B, in_channels, H, W)`` to ``(B, d_R)``.

    Raises:
        ValueError: torchvision has no such model or weights, it is not for classification, or ``cifar_stem`` is
            asked of another model than a ResNet.

    Source: the stem for small images: Chen et al., "A simple framework for contrastive learning of visual
    representations", ICML 2020, appendix B.9.

    Example:
        >>> torchvision_backbone("resnet18", in_channels=1, cifar_stem=True)(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 512])
    """
    from torchvision import models  # takes a second to import

    check_integer("in_channels", in_channels, low=1)
    classifiers = models.list_models(module=models)
    if name not in classifiers:
        if name in models.list_models():
            raise ValueError(f"torchvision's model {name!r} is not for the classification of images")
        raise ValueError(f"torchvision has no model {name!r}{_did_you_mean(name, classifiers)}")
    if weights is not None:
        known = models.get_model_weights(name).__members__
        if weights.rpartition(".")[2] not in known:
            raise ValueError(f"torchvision's {name} has no weights {weights!r}; it has {', '.join(known)}")
    if name in ("googlenet", "inception_v3"):
        options["aux_logits"] = False  # else training mode puts out a tuple
        if weights is None:
            options.setdefault("init_weights", True)  # the default, but it warns
    model: nn.Module = models.get_model(name, weights=weights, **options)
    if cifar_stem:
        if not isinstance(model, models.ResNet):
            raise ValueError(f"cifar_stem is for ResNets, not for {name}")
        model.conv1 = nn.Conv2d(in_channels, model.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    elif in_channels != 3:
        stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        old = stem.weight.detach()
        new = (old.sum(1, keepdim=True) / in_channels).repeat(1, in_channels, 1, 1)
        stem.weight = nn.Parameter(new if weights is not None else new.normal_(std=float(old.std())))
        stem.in_channels = in_channels
        if getattr(model, "transform_input", False):
            model.transform_input = False  # type: ignore[assignment] # it normalizes red, green and blue anew
    layers = [(path, module) for path, module in model.named_modules() if not any(module.children())]
    # The last layer of SqueezeNet is a convolution.
    last = max(i for i, (_, module) in enumerate(layers) if isinstance(module, nn.Linear | nn.Conv2d))
    for i in (last - 1, last):
        path, module = layers[i]
        if i == last or isinstance(module, nn.Dropout):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
    return model


def timm_backbone(
    name: str,
    *,
    pretrained: bool = False,
    in_channels: int = 3,
    image_size: int | None = None,
    **options: Any,
) -> nn.Module:
    """Any model of timm, without its classifier.

    Args:
        name: as in ``timm.list_models()``, or a place that timm knows, such as ``hf-hub:owner/name``.
        pretrained: load timm's weights.
        in_channels: channels of the images; timm fits pretrained weights to them.
        image_size: height and width of the images, for models that are built for one size, such as vision
            transformers; others ignore it. The model's own size by default.
        options: passed on to timm.

    Returns:
        Module from ``(B, in_channels, H, W)`` to pooled features ``(B, d_R)``.

    Raises:
        MissingExtraError: timm is not installed.
        ValueError: timm has no such model.

    Example:
        >>> timm_backbone("test_vit", in_channels=1, image_size=32)(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 64])
    """
    check_integer("in_channels", in_channels, low=1)
    timm = require("timm", "timm")
    if ":" not in name and not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}{_did_you_mean(name, timm.list_models())}")
    options |= {"pretrained": pretrained, "in_chans": in_channels, "num_classes": 0}
    model: nn.Module
    if image_size is not None:
        check_integer("image_size", image_size, low=1)
        try:
            model = timm.create_model(name, img_size=image_size, **options)
            return model
        except TypeError as error:
            if "unexpected keyword argument 'img_size'" not in str(error):
                raise
    model = timm.create_model(name, **options)
    return model


def _did_you_mean(wrong: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(wrong, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; frozen parts are in it before and after."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@torch.no_grad()
def representation_dim(backbone: nn.Module, image: Tensor) -> int:
    """d_R of a backbone, found by one forward pass in evaluation mode.

    Args:
        backbone: images ``(B, C, H, W)`` to representations ``(B, d_R)``.
        image: one image, shape ``(C, H, W)``.

    Returns:
        d_R.

    Raises:
        ValueError: the backbone's output is not ``(B, d_R)``.
    """
    with evaluating(backbone):
        output = backbone(image[None])
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"the backbone must put out one tensor (B, d_R), got {found}")
    return output.shape[1]
