"""The report's figures as matplotlib pictures, for papers and slides."""

import math
import warnings
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from adadim_lightning.report.dynamics import GREY
from adadim_lightning.report.figures import MANY, plane_path
from adadim_lightning.report.statistics import band, mean_spectrum
from adadim_lightning.report.study import Study
from adadim_lightning.report.style import CURVES, SMALLEST_SHARE, style_of

SCALE = colormaps["viridis"]
MOST_NAMED = 16  # arms in a legend
WIDEST = 60  # characters of a name


def write_pictures(study: Study, page: Path) -> list[Path]:
    """Write the plane, the dynamics and the spectra beside the page, those that there is something to draw for."""
    written = []
    for name, draw in (("plane", draw_plane), ("dynamics", draw_dynamics_of_arms), ("spectra", draw_spectra)):
        figure = draw(study)
        if figure is not None:
            path = page.with_name(f"{page.stem}_{name}.png")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*[Gg]lyph.*")  # a name may hold any letter
                figure.savefig(path, dpi=130)
            written.append(path)
    return written


def draw_plane(study: Study) -> Figure | None:
    """Each run's path through H(R) and I(R;Z), its end colored by the accuracy."""
    ends = [value for run in study.runs if (value := run.values.get(study.color)) is not None]
    paths = [(i, run, *plane_path(run)) for i, arm in enumerate(study.arms) for run in arm.runs]
    paths = [path for path in paths if len(path[2])]
    if not paths:
        return None
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    scale = Normalize(low, high if high > low else low + 1e-9)
    many = len(paths) > MANY
    for index, run, _, h, i in paths:
        style = style_of(index)
        axes.plot(h, i, color=style.color, linestyle=style.line, linewidth=1.3, alpha=0.4 if many else 0.7)
        value = run.values.get(study.color)
        face = GREY if value is None else SCALE(scale(value))
        size = 64 if many else 100
        axes.scatter(
            h[-1:], i[-1:], s=size, marker=style.marker, color=face, edgecolor=style.color, linewidth=1.6, zorder=3
        )
        if run is study.best:
            axes.plot(h[-1:], i[-1:], "o", color="none", markeredgecolor="black", markersize=19, zorder=4)
            axes.annotate(
                "best", (h[-1], i[-1]), xytext=(0, 12), textcoords="offset points", ha="center", zorder=5
            )
    if high > low and ends:
        figure.colorbar(ScalarMappable(scale, SCALE), ax=axes, label=_name(study.color), pad=0.02)
    axes.set_xlabel("H(R) [nats]")
    axes.set_ylabel("I(R;Z) [nats]")
    axes.margins(0.08)
    axes.grid(alpha=0.25)
    _legend(figure, study, symbols=True)
    return figure


def draw_dynamics_of_arms(study: Study) -> Figure | None:
    """What moved over the epochs: mean of each arm, in a band of one standard deviation."""
    logged = {key for run in study.runs for key in run.history if len(run.curve(key)[0])}
    keys = [key for key in CURVES if key in logged]
    if not keys:
        return None
    columns = min(4, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.5 * rows + 0.5), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, key in zip(panels, keys, strict=False):
        for index, arm in enumerate(study.arms):
            style = style_of(index)
            found = band([run.curve(key) for run in arm.runs])
            alone = style.marker if len(found.epoch) == 1 else None
            axes.plot(found.epoch, found.mean, color=style.color, linestyle=style.line, marker=alone)
            low, high = found.mean - found.sd, found.mean + found.sd
            axes.fill_between(found.epoch, low, high, color=style.color, alpha=0.18, linewidth=0)
        _finish(axes, CURVES[key], "epoch")
    for axes in panels[len(keys) :]:
        axes.set_axis_off()
    _legend(figure, study)
    return figure


def draw_spectra(study: Study) -> Figure | None:
    """Eigenvalues of R and Z at the last epoch, mean over the runs of each arm."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    drawn = False
    for axes, key in zip(figure.subplots(1, 2), ("R", "Z"), strict=True):
        for index, arm in enumerate(study.arms):
            shares = mean_spectrum([run.spectra for run in arm.runs], key)
            shares = shares[shares > SMALLEST_SHARE]
            if len(shares):
                style = style_of(index)
                axes.semilogy(np.arange(1, len(shares) + 1), shares, color=style.color, linestyle=style.line)
                drawn = True
        _finish(axes, f"Spectrum of {key}", "rank of the eigenvalue")
        axes.set_ylabel("share of the trace")
    _legend(figure, study)
    return figure if drawn else None


def _finish(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(below, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


def _name(text: str) -> str:
    """Text that matplotlib shows as it is: it would read mathematics between dollars."""
    text = " ".join(text.split())
    short = text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."
    return short.replace("$", r"\$")


def _legend(figure: Figure, study: Study, *, symbols: bool = False) -> None:
    """Names of the arms below the panels."""
    styles = [style_of(index) for index in range(min(len(study.arms), MOST_NAMED))]
    handles = [Line2D([], [], color=s.color, ls=s.line, marker=s.marker if symbols else None) for s in styles]
    names = [_name(arm.label) for arm in study.arms[:MOST_NAMED]]
    if len(study.arms) > MOST_NAMED:
        handles.append(Line2D([], [], color="none"))
        names.append(f"and {len(study.arms) - MOST_NAMED} more")
    if handles:
        columns = max(1, min(len(names), int(110 / (max(map(len, names)) + 8))))
        # A name that begins with an underscore would be left out.
        names = [f" {name}" if name.startswith("_") else name for name in names]
        figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
