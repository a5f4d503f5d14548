"""Projection heads: representations in, embeddings out."""

from torch import nn

from adadim_lightning.functional._numeric import check_integer


def projection_head(in_dim: int, *, hidden_dim: int = 2048, out_dim: int = 2048, layers: int = 3) -> nn.Module:
    """Multi-layer perceptron with batch norm and ReLU between its layers, as SimCLR and VICReg use it.

    Args:
        in_dim: d_R.
        hidden_dim: width of the hidden layers.
        out_dim: d_Z.
        layers: number of linear layers; 0 makes Z = R.

    Returns:
        Module from ``(B, d_R)`` to ``(B, d_Z)``.

    Raises:
        ValueError: ``layers`` is negative, or a width below 1.

    Example:
        >>> projection_head(8, hidden_dim=16, out_dim=4, layers=2)(torch.zeros(2, 8)).shape
        torch.Size([2, 4])
    """
    check_integer("layers", layers, low=0)
    check_integer("hidden_dim", hidden_dim, low=1)
    check_integer("out_dim", out_dim, low=1)
    if layers == 0:
        return nn.Identity()
    modules: list[nn.Module] = []
    for _ in range(layers - 1):
        modules += [nn.Linear(in_dim, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)]
        in_dim = hidden_dim
    return nn.Sequential(*modules, nn.Linear(in_dim, out_dim, bias=False))
