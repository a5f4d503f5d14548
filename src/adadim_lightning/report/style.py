"""How arms are told apart, on the page and in the pictures."""

from dataclasses import dataclass
from typing import Literal

from adadim_lightning.report.dynamics import BLUE, GREEN, GREY, ORANGE, PURPLE, RED

SKY = "#56B4E9"
COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)
Line = Literal["-", "--", ":", "-."]
DASHES: tuple[tuple[str, Line, str], ...] = (
    ("solid", "-", ""),
    ("dash", "--", "6 3"),
    ("dot", ":", "2 2"),
    ("dashdot", "-.", "6 2 2 2"),
)
SYMBOLS = (
    ("circle", "o", "M18 8a4 4 0 1 1-8 0a4 4 0 1 1 8 0z"),
    ("square", "s", "M10 4h8v8h-8z"),
    ("diamond", "D", "M14 3l5 5l-5 5l-5-5z"),
    ("triangle-up", "^", "M14 3l5 9h-10z"),
    ("cross", "P", "M12.5 3h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z"),
    ("triangle-down", "v", "M14 13l5-9h-10z"),
    ("pentagon", "p", "M14 3l5 4l-2 6h-6l-2-6z"),
    ("hexagon", "h", "M14 3l4.5 2.5v5l-4.5 2.5l-4.5-2.5v-5z"),
)


@dataclass(frozen=True)
class Style:
    """Color, line and symbol of an arm: in Plotly's words, in matplotlib's, and as SVG."""

    color: str
    dash: str
    line: Line
    dasharray: str
    symbol: str
    marker: str
    path: str


def style_of(index: int) -> Style:
    """The style of the arm at a place: all three change from one to the next, so that no two of 28 look alike.

    A dashed line shows the one that it runs over, too.
    """
    dash, line, dasharray = DASHES[index % len(DASHES)]
    symbol, marker, path = SYMBOLS[index % len(SYMBOLS)]
    return Style(COLORS[index % len(COLORS)], dash, line, dasharray, symbol, marker, path)


# Titles of the curves, in their order on the page; what nobody logged is left out.
CURVES = {
    "balance/alpha": "alpha",
    "balance/beta": "beta",
    "dynamics/H_R": "H(R) [nats]",
    "dynamics/I_RZ": "I(R;Z) [nats]",
    "dynamics/ER_R": "ER(R)",
    "dynamics/ER_Z": "ER(Z)",
    "probe/linear_top1": "linear probe, accuracy",
    "probe/knn_top1": "kNN, accuracy",
    "loss/total": "loss, total",
    "loss/native": "loss of the module itself",
    "loss_weighted/decorrelation": "decorrelation, weighted",
    "loss_weighted/uniformity": "uniformity, weighted",
    "loss_weighted/information": "information, weighted",
    "loss/decorrelation": "decorrelation",
    "loss/uniformity": "uniformity",
    "loss/invariance": "decorrelation: invariance",
    "loss/variance": "decorrelation: variance",
    "loss/covariance": "decorrelation: covariance",
}  # loss/information is I(R;Z)

SMALLEST_SHARE = 1e-9  # eigenvalues below this part of the trace are rounding
