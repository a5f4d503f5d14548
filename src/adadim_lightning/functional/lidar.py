"""LiDAR: how many directions tell images apart better than they tell views of one image apart."""

import torch
from torch import Tensor

from adadim_lightning.functional._numeric import (
    check_matrix,
    check_positive,
    check_tensor,
    like,
    no_autocast,
    to_float64,
)
from adadim_lightning.functional.spectrum import (
    _effective_rank_of_entropy,
    _eigenvalues,
    _spectral_entropy_of_eigenvalues,
)


@torch.no_grad()
def lidar(x: Tensor, *, delta: float = 1e-4) -> Tensor:
    r"""Effective rank of linear discriminant analysis where each image is a class and its views are the members.

    .. math:: \exp\Big(-\sum_k p_k \ln p_k\Big), \qquad p_k = \lambda_k / \sum_j \lambda_j

    with :math:`\lambda` the eigenvalues of :math:`S_w^{-1/2} S_b S_w^{-1/2}`, where

    .. math:: S_b = \operatorname*{mean}_i (\mu_i - \mu)(\mu_i - \mu)^\top, \qquad
        S_w = \operatorname*{mean}_{i,j} (x_{ij} - \mu_i)(x_{ij} - \mu_i)^\top + \delta I

    and :math:`\mu_i` is the mean over the views of image i. Directions that only augmentation moves count
    little. The value grows with N and depends, through :math:`\delta`, on the scale of ``x``: compare at equal
    N, q and :math:`\delta`. The paper's guard inside the logarithm is left out, since it lifts the rank above
    its bound.

    Args:
        x: q augmented views of each of N images, shape ``(N, q, d)``, N, q >= 2, any floating dtype; computed
            in float64.
        delta: :math:`\delta` > 0, what keeps :math:`S_w` invertible.

    Returns:
        Scalar in ``[1, min(N - 1, d)]``; 1 where all images look alike.

    Raises:
        ValueError: ``x`` is not three-dimensional, has fewer than 2 images or views, or holds a NaN or
            infinity; ``delta`` <= 0.

    Source: Thilak et al., "LiDAR: sensing linear probing performance in joint embedding SSL architectures",
    ICLR 2024 (arXiv 2312.04000).

    Example:
        >>> images = torch.cat([torch.eye(3), -torch.eye(3)])
        >>> lidar(torch.stack([0.9 * images, 1.1 * images], dim=1))
        tensor(3.)
    """
    check_tensor(x)
    if x.ndim != 3 or x.shape[0] < 2 or x.shape[1] < 2 or x.shape[2] < 1:
        raise ValueError(f"x must have shape (N, q, d) with N, q >= 2 and d >= 1, got {tuple(x.shape)}")
    check_matrix(x.flatten(0, 1))
    check_positive("delta", delta)
    n, q, d = x.shape
    with no_autocast(x):
        views = to_float64(x)
        means = views.mean(dim=1)
        within = means.new_zeros(d, d)
        for view in views.unbind(dim=1):
            residual = view - means
            within += residual.T @ residual / (n * q)
        # Clamped before delta is added, so that no rounding, however large the input, makes it indefinite.
        variance, axes = torch.linalg.eigh(within)
        scale = (variance.clamp_min(0.0) + delta).sqrt()
        center = means.mean(dim=0)
        white = (means - center) @ axes / scale
        gram = white @ white.T if n < d else white.T @ white
        # The subtraction's rounding may lie along the axis that whitening stretches most.
        subtracted = n * (center / scale.min()).square().sum()
        eigenvalues = _eigenvalues(gram, max(n, d), subtracted)
        entropy = _spectral_entropy_of_eigenvalues(eigenvalues, "eigen")
        return like(_effective_rank_of_entropy(entropy, min(n - 1, d)), x)
