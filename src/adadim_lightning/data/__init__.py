"""Data modules, and the views that they hand to the model."""

from adadim_lightning.data.digits import digits
from adadim_lightning.data.memory import InMemoryImages, LabeledImages
from adadim_lightning.data.views import TwoViews

__all__ = ["InMemoryImages", "LabeledImages", "TwoViews", "digits"]
