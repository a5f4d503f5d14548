"""``adadim-dashboard``: a Weights & Biases workspace of the panels that matter here."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from adadim_lightning.cli.plain import OneLineParser, run_plain
from adadim_lightning.extras import require

COLORS = ("#440154", "#31688e", "#35b779", "#fde725")  # low to high accuracy


def main() -> None:
    """Entry point of the command."""
    run_plain(_parser(), _run)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="adadim-dashboard",
        description="Save a workspace of AdaDim's panels in a Weights & Biases project.",
        epilog="example: adadim-dashboard my-team/adadim",
        allow_abbrev=False,
    )
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="where the runs are; entity is a user or a team")
    parser.add_argument("--name", default="AdaDim", help="name of the workspace (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print it as JSON, without the network")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    entity, _, project = arguments.project.partition("/")
    if not entity or not project or "/" in project:
        raise ValueError(f"give ENTITY/PROJECT, such as my-team/adadim, not {arguments.project!r}")
    os.environ["WANDB_SILENT"] = "true"
    workspace = make_workspace(entity, project, arguments.name)
    if arguments.dry_run:
        print(json.dumps(workspace._spec, indent=2))
        return
    from adadim_lightning.cli.credentials import logged_in

    if not logged_in():
        raise ValueError("wandb is not logged in: run `wandb login`, or set WANDB_API_KEY")
    workspace.save()
    print(f"the workspace is at {workspace.url}")


def make_workspace(entity: str, project: str, name: str = "AdaDim") -> Any:
    """The workspace, as an object of ``wandb_workspaces``, not yet saved; needs no network.

    Raises:
        MissingExtraError: ``wandb_workspaces`` is not installed.
    """
    ws: Any = require("wandb_workspaces.workspaces", "dashboard")
    wr: Any = require("wandb_workspaces.reports.v2", "dashboard")

    def lines(title: str, *names: str, **options: Any) -> Any:
        return wr.LinePlot(title=title, x="epoch", y=list(names), title_x="epoch", **options)

    accuracy = wr.SummaryMetric("evaluation/trained_linear_top1")
    plane = wr.ScatterPlot(
        title="Where runs end, by held-out accuracy",
        x=wr.SummaryMetric("dynamics/H_R"),
        y=wr.SummaryMetric("dynamics/I_RZ"),
        z=accuracy,
        gradient=[
            wr.GradientPoint(color=color, offset=100 * i / (len(COLORS) - 1)) for i, color in enumerate(COLORS)
        ],
    )
    path = wr.CustomChart(
        query={"summaryTable": {"tableKey": "plane_table"}},
        chart_name="wandb/scatter/v0",
        chart_fields={"x": "H_R", "y": "I_RZ"},
        chart_strings={"title": "Path through H(R) and I(R;Z), nats"},
    )
    sections = {
        "Dynamics": [
            lines("H(R), nats", "dynamics/H_R"),
            lines("I(R;Z), nats", "dynamics/I_RZ"),
            lines("Effective rank", "dynamics/ER_R", "dynamics/ER_Z"),
            plane,
            path,
            wr.ScatterPlot(title="Accuracy by H(R)", x=wr.SummaryMetric("dynamics/H_R"), y=accuracy),
        ],
        "Balance": [
            lines("alpha, share of uniformity", "balance/alpha"),
            lines("beta, weight of I(R;Z)", "balance/beta"),
        ],
        "Accuracy": [
            lines("Online linear probe", "probe/linear_top1"),
            lines("Online kNN", "probe/knn_top1"),
            wr.BarPlot(
                title="Frozen features, linear probe",
                metrics=[f"evaluation/{of}_linear_top1" for of in ("trained", "untrained", "raw")],
            ),
        ],
        "Loss": [
            lines("Total", "loss/total"),
            lines(
                "What enters the total",
                *(f"loss_weighted/{part}" for part in ("decorrelation", "uniformity", "information")),
            ),
            lines(
                "Parts, unweighted", *(f"loss/{part}" for part in ("decorrelation", "uniformity", "information"))
            ),
            lines(
                "Parts of decorrelation", *(f"loss/{part}" for part in ("invariance", "variance", "covariance"))
            ),
        ],
        "Spectra and pictures": [
            wr.LinePlot(title="Spectrum of R, log10 of shares", x="epoch", y=["spectra/R"]),
            wr.LinePlot(title="Spectrum of Z, log10 of shares", x="epoch", y=["spectra/Z"]),
            wr.MediaBrowser(title="Dynamics", media_keys=["pictures/dynamics"], num_columns=1),
            wr.MediaBrowser(title="What the model sees", media_keys=["pictures/views"], num_columns=1),
        ],
        "Throughput": [lines("Images per second", "throughput/images_per_second")],
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(name=title, panels=panels, is_open=title != "Throughput")
            for title, panels in sections.items()
        ],
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=50),
        runset_settings=ws.RunsetSettings(
            pinned_columns=[
                "run:displayName",
                "summary:evaluation/trained_linear_top1",
                "summary:probe/linear_top1.max",
                "summary:dynamics/ER_R",
            ]
        ),
    )
