"""Backbones: images in, representations out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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
