"""Two random views of each image, made in one batched call on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TwoViews(nn.Module):
    """Augments a batch twice: every image and every view draws its own transformation.

    Args:
        augmentations: kornia augmentations (or any modules) on float images in ``[0, 1]``, applied in order.
        mean: mean of each channel in ``[0, 1]``, subtracted after them.
        std: standard deviation of each channel, divided by after that.

    Example:
        >>> view1, view2 = TwoViews([], mean=[0.5], std=[0.5])(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
        >>> view1.shape, view1.max()
        (torch.Size([4, 1, 8, 8]), tensor(-1.))
    """

    mean: Tensor
    std: Tensor

    def __init__(self, augmentations: Sequence[nn.Module], *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.augmentations = nn.Sequential(*augmentations)
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1))

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Two views.

        Args:
            images: shape ``(N, C, H, W)``, uint8.

        Returns:
            Two tensors ``(N, C, H, W)``, float32, normalized.
        """
        pixels = images.float() / 255
        view1, view2 = self._normalize(self.augmentations(torch.cat([pixels, pixels]))).chunk(2)
        return view1, view2

    @torch.no_grad()
    def clean(self, images: Tensor) -> Tensor:
        """The images as they are, normalized.

        Args:
            images: shape ``(N, C, H, W)``, uint8.

        Returns:
            Shape ``(N, C, H, W)``, float32.
        """
        return self._normalize(images.float() / 255)

    def _normalize(self, pixels: Tensor) -> Tensor:
        if self.mean.device != pixels.device:
            self.to(pixels.device)
        return (pixels - self.mean) / self.std
