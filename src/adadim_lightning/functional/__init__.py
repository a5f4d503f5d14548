"""Pure tensor functions: losses, and estimators of dimensionality and information in nats."""

from adadim_lightning.functional.contrastive import nt_xent_loss
from adadim_lightning.functional.decorrelation import (
    covariance_loss,
    invariance_loss,
    variance_loss,
    vicreg_loss,
)
from adadim_lightning.functional.hypersphere import alignment, uniformity
from adadim_lightning.functional.information import cosine_gram, matrix_entropy, matrix_mutual_information
from adadim_lightning.functional.neighbors import knn_predict
from adadim_lightning.functional.spectrum import effective_rank, eigenvalue_spectrum, spectral_entropy

__all__ = [
    "alignment",
    "cosine_gram",
    "covariance_loss",
    "effective_rank",
    "eigenvalue_spectrum",
    "invariance_loss",
    "knn_predict",
    "matrix_entropy",
    "matrix_mutual_information",
    "nt_xent_loss",
    "spectral_entropy",
    "uniformity",
    "variance_loss",
    "vicreg_loss",
]
