"""torchmetrics classes over :mod:`adadim_lightning.functional`: streaming, and exact across processes."""

from adadim_lightning.metrics.effective_rank import EffectiveRank
from adadim_lightning.metrics.hypersphere import Alignment, Uniformity
from adadim_lightning.metrics.information import MatrixEntropy, MatrixMutualInformation
from adadim_lightning.metrics.neighbors import KNNAccuracy

__all__ = [
    "Alignment",
    "EffectiveRank",
    "KNNAccuracy",
    "MatrixEntropy",
    "MatrixMutualInformation",
    "Uniformity",
]
