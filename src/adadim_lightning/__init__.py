"""AdaDim for PyTorch Lightning: self-supervised learning steered by its own dimensionality."""

__version__ = "0.1.0"
