"""`adadim-dashboard`, as far as it goes without an account."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adadim_lightning.callbacks.panels import METRICS
from adadim_lightning.cli.dashboard import main

OFF = """
import os, socket, subprocess, sys
def refuse(*_, **__): raise AssertionError("the network, or another process")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import wandb  # which looks for the C library by a program of the system
subprocess.Popen.__init__ = os.fork = os.posix_spawn = refuse
from adadim_lightning.cli.dashboard import main
sys.argv = ["adadim-dashboard", *sys.argv[1:]]
main()
"""


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["adadim-dashboard", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def printed() -> dict[str, Any]:
    """What a dry run prints, in a process that can reach neither a host nor another program."""
    command = [sys.executable, "-c", OFF, "my-team/adadim", "--dry-run"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def panels(printed: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    sections = printed["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections}


def test_a_dry_run_needs_no_network(printed: dict[str, Any]) -> None:
    assert (printed["entity"], printed["project"], printed["displayName"]) == ("my-team", "adadim", "AdaDim")
    found = panels(printed)
    assert list(found) == ["Dynamics", "Balance", "Accuracy", "Loss", "Spectra and pictures", "Throughput"]
    assert all(found.values())


def test_the_panels_show_what_a_run_logs_over_epochs(printed: dict[str, Any]) -> None:
    lines = [
        p["config"] for ps in panels(printed).values() for p in ps if p["viewType"] == "Run History Line Plot"
    ]
    shown = {name for line in lines for name in line["metrics"]}
    assert shown <= set(METRICS)
    assert {"balance/alpha", "dynamics/H_R", "dynamics/I_RZ", "loss/total", "probe/knn_top1", "spectra/R"} <= shown
    assert {line["xAxis"] for line in lines} == {"epoch"}
    media = [
        p["config"]["mediaKeys"]
        for p in panels(printed)["Spectra and pictures"]
        if p["viewType"] == "Media Browser"
    ]
    assert media == [["pictures/dynamics"], ["pictures/views"]]


def test_the_plane_of_the_runs_is_colored_by_accuracy(printed: dict[str, Any]) -> None:
    plane, *_ = [p["config"] for p in panels(printed)["Dynamics"] if p["viewType"] == "Scatter Plot"]
    axes = [plane[axis] for axis in ("xAxis", "yAxis", "zAxis")]
    assert axes == [f"summary:{x}" for x in ("dynamics/H_R", "dynamics/I_RZ", "evaluation/trained_linear_top1")]
    assert [point["offset"] for point in plane["customGradient"]] == pytest.approx([0, 100 / 3, 200 / 3, 100])
    [path] = [p["config"] for p in panels(printed)["Dynamics"] if p["viewType"] == "Vega2"]
    assert path["fieldSettings"] == {"x": "H_R", "y": "I_RZ"}
    assert "plane_table" in json.dumps(path["userQuery"])


@pytest.mark.parametrize("project", ["adadim", "a/b/c", "/adadim", "team/"])
def test_a_project_needs_its_entity(
    project: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, project) == 1
    error = f"adadim-dashboard: error: give ENTITY/PROJECT, such as my-team/adadim, not {project!r}\n"
    assert capsys.readouterr().err == error


def test_without_an_account_it_says_how_to_get_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    code = "import sys; from adadim_lightning.cli.dashboard import main; sys.argv[1:] = ['a/b']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    expected = "adadim-dashboard: error: wandb is not logged in: run `wandb login`, or set WANDB_API_KEY\n"
    assert done.stderr == expected


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert run(monkeypatch, "a/b", "--dry-run") == 1
    expected = (
        "adadim-dashboard: error: wandb_workspaces is not installed; pip install 'adadim-lightning[dashboard]'\n"
    )
    assert capsys.readouterr().err == expected


def test_a_wrong_option_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "a/b", "--dry") == 1
    error = capsys.readouterr().err
    assert (
        error
        == "adadim-dashboard: error: unrecognized arguments: --dry; adadim-dashboard --help shows the usage\n"
    )
