"""Backbone and projection head are found by the names that the field gives them."""

import pytest
import torch
from torch import nn

from adadim_lightning.discovery import Survey, find_embedding, find_representation


def tree(*names: str, frozen: tuple[str, ...] = ()) -> nn.Module:
    """A module with a linear layer under each dotted name."""
    root = nn.Module()
    for name in names:
        *parents, last = name.split(".")
        owner = root
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        owner.add_module(last, nn.Linear(2, 2).requires_grad_(name not in frozen))
    return root


@pytest.mark.parametrize(
    ("names", "frozen", "expected"),
    [
        (["backbone", "projection_head"], [], ("backbone", "projection_head")),
        (["encoder", "projector", "predictor"], [], ("encoder", "projector")),
        (["model.backbone", "model.projection_head"], [], ("model.backbone", "model.projection_head")),
        (["backbone", "projector", "momentum_backbone", "momentum_projector"], [], ("backbone", "projector")),
        (
            ["backbone", "projection_head", "backbone_momentum", "projection_head_momentum", "prediction_head"],
            ["backbone_momentum", "projection_head_momentum"],
            ("backbone", "projection_head"),
        ),
        (
            ["student_backbone", "student_head", "teacher_backbone", "teacher_head"],
            ["teacher_backbone", "teacher_head"],
            ("student_backbone", "student_head"),
        ),
        # MSN names its student after the anchors; the plain names are those of the frozen target.
        (
            ["backbone", "projection_head", "anchor_backbone", "anchor_projection_head"],
            ["backbone", "projection_head"],
            ("anchor_backbone", "anchor_projection_head"),
        ),
        (["encoder_q", "encoder_k", "projector"], [], ("encoder_q", "projector")),
        (
            ["backbone.student", "backbone.teacher", "projector"],
            ["backbone.teacher"],
            ("backbone.student", "projector"),
        ),
        # Parts of a backbone do not stand beside it.
        (["backbone.encoder", "backbone.head", "projector"], [], ("backbone", "projector")),
        (["backbone.head", "head"], [], ("backbone", "head")),
        # A momentum branch goes by its name where it is not frozen.
        (
            ["student.backbone", "student.head", "teacher.backbone", "teacher.head"],
            [],
            ("student.backbone", "student.head"),
        ),
        # A transformer projects its patches.
        (
            ["backbone.embeddings.patches.projection", "backbone.encoder.layer", "projection_head"],
            [],
            ("backbone", "projection_head"),
        ),
        # An encoder that holds the head too puts out Z.
        (["encoder.backbone", "encoder.projection_head"], [], ("encoder.backbone", "encoder.projection_head")),
    ],
    ids=str,
)
def test_the_student_is_found_by_its_names(names: list[str], frozen: list[str], expected: tuple[str, str]) -> None:
    module = tree(*names, frozen=tuple(frozen))
    representation = find_representation(module)
    assert (representation, find_embedding(module, representation)) == expected


def test_a_head_without_parameters_is_a_head() -> None:
    module = tree("backbone")
    module.projection_head = nn.Identity()
    assert find_embedding(module, "backbone") == "projection_head"


def test_the_head_is_looked_for_outside_of_a_backbone_that_was_named() -> None:
    module = tree("vit.projection", "projector")
    for name in ("vit", "vit[last_hidden_state]"):
        assert find_embedding(module, name) == "projector"
    assert find_embedding(tree("backbone.projection", "projector"), None) == "projector"


def test_none_or_several_is_an_error_that_says_so() -> None:
    with pytest.raises(LookupError, match=r"which submodule is the backbone\? none was found by its name"):
        find_representation(tree("net", "projector"))
    with pytest.raises(LookupError, match=r"backbone\? 2 were found: image_x.encoder, text_x.encoder; give repr"):
        find_representation(tree("image_x.encoder", "text_x.encoder"))
    with pytest.raises(LookupError, match=r"projection head\? none was found by its name; give embedding="):
        find_embedding(tree("backbone", "predictor"), "backbone")


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.recurrent = nn.LSTM(3, 2, batch_first=True)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.recurrent(self.pool(self.stem(x)).flatten(1)[:, None])


def test_the_survey_lists_what_could_be_rows_with_shape_and_number_of_calls() -> None:
    module = nn.Module()
    module.trunk = Conv()
    survey = Survey(module)
    for _ in range(2):
        module.trunk(torch.zeros(4, 1, 5, 5))
    survey.close()
    lines = survey.table().splitlines()
    assert lines[1] == "Submodules of this step and what they put out:"
    assert lines[2:] == [
        "  trunk.pool: (4, 3, 1, 1), 2 calls",
        "  trunk.recurrent: [0] (4, 1, 2), 2 calls",
        "  trunk: [0] (4, 1, 2), 2 calls",
    ]
    module.trunk(torch.zeros(4, 1, 5, 5))
    assert survey.table().splitlines() == lines
    assert not any(submodule._forward_hooks for submodule in module.modules())


def test_a_long_survey_keeps_the_outer_modules() -> None:
    module = nn.Module()
    module.deep = nn.Sequential(*[nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)]) for _ in range(12)])
    survey = Survey(module)
    module.deep(torch.zeros(3, 2))
    survey.close()
    table = survey.table()
    assert "\n  deep: (3, 2)" in table
    assert all(f"\n  deep.{i}: (3, 2)" in table for i in range(12))
    assert table.endswith("\n  and 31 more within these")


def test_a_compiled_module_is_not_surveyed_within() -> None:
    module = nn.Module()
    module.backbone = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")
    module.head = nn.Linear(2, 2)
    survey = Survey(module)
    assert not any(x._forward_hooks for x in module.backbone._orig_mod.modules())
    assert len(module.head._forward_hooks) == 1
    survey.close()
    assert survey.table() == ""
