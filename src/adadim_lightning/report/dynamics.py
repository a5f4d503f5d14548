"""One picture of how a run's dimensionality moved."""

from collections.abc import Mapping
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Array = np.ndarray[Any, Any]
Curve = tuple[str, str, str]

# Okabe & Ito's colors, which most color-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#666666"
TIME = colormaps["viridis"]


def draw_dynamics(history: Mapping[str, Array], spectra: Mapping[str, Array]) -> Figure:
    """Draw alpha, H(R), I(R;Z), losses and probes over epochs, the spectrum of R, and the H(R)-I(R;Z) plane.

    Args:
        history: a column for each log name, and ``epoch``; NaN where a value is missing.
        spectra: ``epoch`` ``(E,)`` and ``R`` ``(E, d_R)``, eigenvalues in descending order.

    Returns:
        The figure, without a display.
    """
    figure = Figure(figsize=(13.5, 7.6), layout="constrained")
    axes = figure.subplots(2, 3)
    epoch = np.asarray(history["epoch"]) + 1
    _curves(
        axes[0, 0],
        "Balance",
        epoch,
        history,
        [
            ("balance/alpha", "alpha, share of uniformity", BLUE),
            ("balance/beta", "beta, weight of I(R;Z)", ORANGE),
        ],
    )
    low, high = axes[0, 0].get_ylim() if axes[0, 0].has_data() else (0.0, 1.0)
    axes[0, 0].set_ylim(min(low, -0.02), max(high, 1.02))
    _twin_curves(
        axes[0, 1],
        "H(R) and I(R;Z)",
        epoch,
        history,
        [("dynamics/H_R", "H(R) = ln ER(R) [nats]", GREEN), ("dynamics/I_RZ", "I(R;Z) [nats]", RED)],
    )
    _curves(
        axes[0, 2],
        "Share of the loss",
        epoch,
        history,
        [
            ("loss_weighted/decorrelation", "decorrelation", GREEN),
            ("loss_weighted/uniformity", "uniformity", BLUE),
            ("loss_weighted/information", "information", ORANGE),
        ],
    )
    _spectrum(axes[1, 0], figure, np.asarray(spectra["epoch"]) + 1, np.asarray(spectra["R"]))
    _plane(axes[1, 1], figure, epoch, history)
    probes: list[Curve] = [("probe/linear_top1", "linear probe", BLUE), ("probe/knn_top1", "kNN", ORANGE)]
    if any(key in history for key, _, _ in probes):
        _curves(axes[1, 2], "Held-out accuracy", epoch, history, probes)
    else:
        ranks: list[Curve] = [("dynamics/ER_R", "ER(R)", GREEN), ("dynamics/ER_Z", "ER(Z)", PURPLE)]
        _curves(axes[1, 2], "Effective rank", epoch, history, ranks)
    return figure


def _curves(axes: Axes, title: str, epoch: Array, history: Mapping[str, Array], curves: list[Curve]) -> None:
    if title:
        axes.set_title(title, loc="left", fontweight="bold")
    # A dashed line shows the one that it runs over, as beta over alpha where gamma is 1.
    for (key, label, color), line in zip(curves, cycle(("-", "--", ":")), strict=False):
        if key in history:
            values = np.asarray(history[key])
            known = np.isfinite(values)  # an epoch without a reading does not cut the line
            marker = "o" if known.sum() == 1 else None
            axes.plot(epoch[known], values[known], line, label=label, color=color, marker=marker, linewidth=1.8)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    if axes.has_data():
        axes.legend(frameon=False)


def _twin_curves(axes: Axes, title: str, epoch: Array, history: Mapping[str, Array], curves: list[Curve]) -> None:
    """Two curves, each on a scale of its own, in the color of its axis."""
    _curves(axes, title, epoch, history, curves[:1])
    right = axes.twinx()
    _curves(right, "", epoch, history, curves[1:])
    right.grid(visible=False)
    for side, (_, label, color) in zip((axes, right), curves, strict=True):
        side.set_ylabel(label, color=color)
        side.tick_params(axis="y", labelcolor=color)
        if (legend := side.get_legend()) is not None:
            legend.remove()


def _time_scale(axes: Axes, figure: Figure, epoch: Array) -> Normalize:
    scale = Normalize(float(epoch.min()), max(float(epoch.max()), float(epoch.min()) + 1))
    bar = figure.colorbar(ScalarMappable(scale, TIME), ax=axes, label="epoch", pad=0.02)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return scale


def _spectrum(axes: Axes, figure: Figure, epoch: Array, eigenvalues: Array) -> None:
    """Normalized spectrum of R, a line for each of at most 12 epochs."""
    axes.set_title("Spectrum of R", loc="left", fontweight="bold")
    scale = _time_scale(axes, figure, epoch)
    share = eigenvalues / np.maximum(eigenvalues.sum(axis=1, keepdims=True), np.finfo(float).tiny)
    for i in np.unique(np.linspace(0, len(epoch) - 1, 12).round().astype(int)):
        positive = share[i][share[i] > 0]
        axes.plot(np.arange(1, len(positive) + 1), positive, color=TIME(scale(float(epoch[i]))), linewidth=1.2)
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(share.max() * 1e-9, float(share[share > 0].min(initial=1.0)) / 2))
    axes.set_xlabel("rank of the eigenvalue")
    axes.set_ylabel("share of the trace")
    axes.grid(alpha=0.25)


def _plane(axes: Axes, figure: Figure, epoch: Array, history: Mapping[str, Array]) -> None:
    """The run's path: what the paper looks at."""
    axes.set_title("Path through H(R) and I(R;Z)", loc="left", fontweight="bold")
    missing = np.full(len(epoch), np.nan)
    h, i = (np.asarray(history.get(key, missing)) for key in ("dynamics/H_R", "dynamics/I_RZ"))
    scale = _time_scale(axes, figure, epoch)
    known = np.isfinite(h) & np.isfinite(i)
    h, i = h[known], i[known]
    points = np.stack([h, i], axis=1)
    if len(points) > 1:
        segments = np.stack([points[:-1], points[1:]], axis=1)
        path = LineCollection(list(segments), cmap=TIME, norm=scale, linewidth=2)
        path.set_array(epoch[known][1:])
        axes.add_collection(path)
        axes.plot(h, i, linestyle="none")  # so that the legend keeps clear of the path
    axes.scatter(h[:1], i[:1], marker="o", s=45, color=GREY, zorder=3, label="start")
    axes.scatter(h[-1:], i[-1:], marker="*", s=150, color=RED, zorder=3, label="end")
    axes.margins(0.08)
    axes.autoscale_view()
    axes.set_xlabel("H(R) [nats]")
    axes.set_ylabel("I(R;Z) [nats]")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
