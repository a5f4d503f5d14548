"""Backbones and heads."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from adadim_lightning.models import SmallConvNet, projection_head, representation_dim


@pytest.mark.parametrize(("channels", "size"), [((8,), 8), ((4, 8), 8), ((4, 6, 10), 9)])
def test_the_small_backbone_puts_out_its_last_width_whatever_the_image(
    channels: tuple[int, ...], size: int
) -> None:
    backbone = SmallConvNet(2, channels)
    assert backbone(torch.randn(3, 2, size, size)).shape == (3, channels[-1])
    assert representation_dim(backbone, torch.randn(2, size, size)) == channels[-1]
    halvings = [module for module in backbone if isinstance(module, nn.Conv2d) and module.stride == (2, 2)]
    assert len(halvings) == len(channels) - 1


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_a_head_has_as_many_linear_layers_as_asked_for(layers: int) -> None:
    head = projection_head(6, hidden_dim=10, out_dim=4, layers=layers)
    linear = [module for module in head.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == layers
    r = torch.randn(5, 6)
    if layers == 0:
        assert torch.equal(head(r), r)
    else:
        assert head(r).shape == (5, 4)
        widths = [6] + [10] * (layers - 1) + [4]
        assert [(module.in_features, module.out_features) for module in linear] == list(pairwise(widths))
    norms = [module for module in head.modules() if isinstance(module, nn.BatchNorm1d)]
    assert len(norms) == max(layers - 1, 0)


def test_a_head_of_fewer_than_no_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="layers must be an integer >= 0, got -1"):
        projection_head(6, layers=-1)


@pytest.mark.parametrize("training", [True, False])
def test_asking_for_the_dimension_changes_nothing(training: bool) -> None:
    backbone = nn.Sequential(SmallConvNet(1, (4, 8)), nn.Dropout()).train(training)
    state = {key: value.clone() for key, value in backbone.state_dict().items()}
    random_state = torch.get_rng_state()
    assert representation_dim(backbone, torch.randn(1, 8, 8, generator=torch.Generator())) == 8
    assert backbone.training == training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(state[key], value) for key, value in backbone.state_dict().items())


def test_asking_for_the_dimension_leaves_frozen_parts_in_evaluation_mode() -> None:
    backbone = SmallConvNet(1, (4,))
    backbone[1].eval()
    representation_dim(backbone, torch.zeros(1, 8, 8))
    assert backbone.training
    assert not backbone[1].training


@pytest.mark.parametrize(
    ("backbone", "found"),
    [(nn.Conv2d(1, 3, 3), r"\(1, 3, 6, 6\)"), (nn.LSTM(8, 2), "tuple")],
    ids=["feature map", "tuple"],
)
def test_a_backbone_that_puts_out_no_matrix_is_an_error(backbone: nn.Module, found: str) -> None:
    image = torch.zeros(1, 8, 8) if isinstance(backbone, nn.Conv2d) else torch.zeros(8, 8)
    with pytest.raises(ValueError, match=rf"must put out one tensor \(B, d_R\), got {found}"):
        representation_dim(backbone, image)
