"""`--version` is that of this package, by every command."""

import importlib
import sys
from contextlib import suppress
from importlib.metadata import version

import pytest


@pytest.mark.parametrize("command", ["train", "evaluate", "embed", "export", "report", "dashboard"])
def test_version_is_that_of_this_package(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"adadim-{command}", "--version"])
    with suppress(SystemExit):  # of argparse, which ends there
        importlib.import_module(f"adadim_lightning.cli.{command}").main()
    assert capsys.readouterr().out == f"adadim-lightning {version('adadim-lightning')}\n"
