"""Pure tensor functions: losses, and estimators of dimensionality and information in nats."""

from adadim_lightning.functional.alpha_req import alpha_req
from adadim_lightning.functional.contrastive import nt_xent_loss
from adadim_lightning.functional.decorrelation import (
    barlow_twins_loss,
    covariance_loss,
    invariance_loss,
    variance_loss,
    vicreg_loss,
)
from adadim_lightning.functional.hypersphere import alignment, uniformity
from adadim_lightning.functional.information import cosine_gram, matrix_entropy, matrix_mutual_information
from adadim_lightning.functional.lidar import lidar
from adadim_lightning.functional.neighbors import knn_predict
from adadim_lightning.functional.spectrum import effective_rank, eigenvalue_spectrum, rankme, spectral_entropy

__all__ = [
    "alignment",
    "alpha_req",
    "barlow_twins_loss",
    "cosine_gram",
    "covariance_loss",
    "effective_rank",
    "eigenvalue_spectrum",
    "invariance_loss",
    "knn_predict",
    "lidar",
    "matrix_entropy",
    "matrix_mutual_information",
    "nt_xent_loss",
    "rankme",
    "spectral_entropy",
    "uniformity",
    "variance_loss",
    "vicreg_loss",
]
