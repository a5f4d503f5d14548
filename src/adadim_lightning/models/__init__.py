"""Backbones and projection heads."""

from adadim_lightning.models.backbones import SmallConvNet, representation_dim
from adadim_lightning.models.heads import projection_head

__all__ = ["SmallConvNet", "projection_head", "representation_dim"]
