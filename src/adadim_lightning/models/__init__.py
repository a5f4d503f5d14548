"""Backbones and projection heads."""

from adadim_lightning.models.backbones import (
    SmallConvNet,
    representation_dim,
    timm_backbone,
    torchvision_backbone,
)
from adadim_lightning.models.heads import projection_head

__all__ = ["SmallConvNet", "projection_head", "representation_dim", "timm_backbone", "torchvision_backbone"]
