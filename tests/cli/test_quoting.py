"""Overrides as people type them, through Hydra's own parser and in real runs."""

import os
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from adadim_lightning.cli.app import quoted
from adadim_lightning.cli.train import main
from tests.data.pictures import write

ODD = [
    "bilder für alle",
    "画像",
    "Photos (2023)",
    "it's mine",
    "a#1",
    "epoch=1-step=2.ckpt",
    'he "said"',
    "x[1]",
    "x{1}",
    "a!b;c&d",
    "ü\\",
    '\\"ü',
    "~x/ü",
    "<a>",
]
# Overrides with a meaning of their own.
GRAMMAR = [
    *("seed=1", "data.classes=[a,b]", "seed=range(0,3)", "seed=choice(1,2)", "a={x:1}", "~callbacks.knn", "-m"),
    *(
        "a='b c'",
        'a="ü"',
        "a=null",
        "a=",
        "+a.b=1e-3",
        "++a=${b}",
        "--config-dir",
        "a=1,2",
        "data=medmnist/retina",
    ),
    *("a=[1,2", "a='x", "~logger=csv", "ü=1"),
]


def value_of(argument: str) -> object:
    return OverridesParser.create().parse_override(argument).value()


@pytest.mark.parametrize("value", ODD)
def test_quoted_gives_hydra_the_value_that_was_typed(value: str) -> None:
    for multirun in ([], ["-m"]):
        [*_, argument] = quoted([*multirun, f"data.root={value}"])
        assert value_of(argument) == value
        assert quoted([*multirun, argument])[-1] == argument  # a second process may read the command line again


@pytest.mark.parametrize("argument", GRAMMAR)
def test_quoted_leaves_alone_what_hydra_understands(argument: str) -> None:
    assert quoted([argument]) == [argument]


def test_a_comma_is_part_of_an_existing_path_and_else_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a,b").mkdir()
    assert value_of(quoted([f"data.root={tmp_path}/a,b"])[0]) == f"{tmp_path}/a,b"
    assert quoted(["-m", "data.root=a,c"])[1] == "data.root=a,c"
    assert quoted(["-m", "data.root=ü,b,(c)"])[1] == 'data.root="ü",b,"(c)"'
    monkeypatch.setenv("HOME", str(tmp_path))
    assert value_of(quoted(["data.root=~/x"])[0]) == f"{tmp_path}/x"


@pytest.mark.parametrize("name", ["Photos (2023), für 画像 #1", "it's=mine"])
def test_images_are_found_below_a_folder_of_any_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        write(tmp_path / name / "x" / f"{i}.png", i, height=16, width=16)
    options = [
        "data=folder",
        f"data.root={tmp_path / name}",
        "data.image_size=16",
        "data.batch_size=2",
        "show_views=true",
    ]
    monkeypatch.setattr(sys, "argv", ["adadim-train", *options, f"run_dir={tmp_path / ('run of ' + name)}"])
    main()
    assert os.path.getsize(tmp_path / f"run of {name}" / "views.png") > 0
