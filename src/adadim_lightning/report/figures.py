"""The figures of the page, as Plotly's JSON; colors of text and lines come from the page, light or dark.

A trace belongs to the arm that its ``meta`` names, so that the page can switch arms on and off.
"""

import html
import math
import textwrap
from typing import Any

import numpy as np

from adadim_lightning.report.runs import RunRecord
from adadim_lightning.report.statistics import Array, band, digits, mean_spectrum, thinned
from adadim_lightning.report.study import H_R, I_RZ, Study
from adadim_lightning.report.style import CURVES, SMALLEST_SHARE, style_of

Trace = dict[str, Any]
Plot = dict[str, Any]

MANY = 12  # runs, beyond which their lines are fainter and their marks smaller
WIDEST_LINE = 40  # characters of a name beside the pointer, as many as a phone shows
WIDEST_TITLE = 30  # of the title of the scale of colors
MOST_POINTS = 200  # of a line; more cannot be seen, and make the page slow
TITLES = {H_R: "H(R) [nats]", I_RZ: "I(R;Z) [nats]"}


def plain(text: str) -> str:
    """Text that Plotly shows as it is: it would read tags."""
    return html.escape(text, quote=False).replace("\n", " ")


def _name(text: str) -> str:
    """A name in lines that a phone can show."""
    return "<br>".join(map(plain, textwrap.wrap(text, WIDEST_LINE)))


def _end(text: str) -> str:
    """The end of a log name, by which it differs from others."""
    return plain(text if len(text) <= WIDEST_TITLE else "\N{HORIZONTAL ELLIPSIS}" + text[1 - WIDEST_TITLE :])


def plots(study: Study) -> list[Plot]:
    """All figures in the order of the page; each has ``id``, ``title``, ``data`` and ``layout``."""
    found = [_plane(study)]
    keys = dict(CURVES) | ({study.metric: study.metric} if study.metric and study.metric not in CURVES else {})
    found += [_curves(study, key, title) for key, title in keys.items()]
    found += [_spectrum(study, key) for key in ("R", "Z")]
    return [plot for plot in found if plot["data"]]


def plane_path(run: RunRecord) -> tuple[Array, Array, Array]:
    """Epochs, H(R) and I(R;Z) of a run, where it has both."""
    (epochs, h), (others, i) = run.curve(H_R), run.curve(I_RZ)
    both = np.intersect1d(epochs, others)
    return both, h[np.isin(epochs, both)], i[np.isin(others, both)]


def _numbers(values: Array) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def _plane(study: Study) -> Plot:
    """Each run's path through H(R) and I(R;Z), its end colored by the metric."""
    paths: list[Trace] = []
    ends: list[Trace] = []
    rings: list[Trace] = []
    many = len(study.runs) > MANY
    for index, arm in enumerate(study.arms):
        style = style_of(index)
        # One trace for all runs of an arm, with a gap after each: a trace costs more than its points.
        x_path: list[float | None] = []
        y_path: list[float | None] = []
        about: list[list[Any]] = []
        last: list[tuple[float, float, float | None, str]] = []
        for run in arm.runs:
            epochs, h, i = plane_path(run)
            if not len(epochs):
                continue
            kept = thinned(len(epochs), MOST_POINTS)
            seed = "" if run.seed is None else f", seed {run.seed}"
            x_path += [*_numbers(h[kept]), None]
            y_path += [*_numbers(i[kept]), None]
            about += [[epoch, seed] for epoch in [*_numbers(epochs[kept]), None]]
            value = run.values.get(study.color)
            told = f"{_name(arm.label)}{seed}<br>{_name(run.name)}, {plain(run.status)}"
            told += f"<br>{plain(study.color)} {digits(value, decimals=4)}"
            told += f"<br>H(R) {digits(h[-1])}, I(R;Z) {digits(i[-1])}"
            last.append((h[-1], i[-1], value, told))
            if run is study.best:
                rings.append(_ring(index, h[-1], i[-1]))
        if last:
            paths.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "meta": {"arm": index},
                    "name": _name(arm.label),
                    "x": x_path,
                    "y": y_path,
                    "customdata": about,
                    "line": {"color": style.color, "dash": style.dash, "width": 1.5},
                    "opacity": 0.4 if many else 0.7,
                    "hovertemplate": "%{fullData.name}%{customdata[1]}<br>epoch %{customdata[0]}<br>"
                    "H(R) %{x:.3f}, I(R;Z) %{y:.3f}<extra></extra>",
                }
            )
            x, y, values, told_of = zip(*last, strict=True)
            known = [value for value in values if value is not None]
            marker = {
                "symbol": style.symbol,
                "size": 10 if many else 12,
                "line": {"color": style.color, "width": 2},
                # Runs that have no value yet are grey.
                **({"color": list(values), "coloraxis": "coloraxis"} if known else {"color": "#888888"}),
            }
            ends.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "meta": {"arm": index},
                    "name": _name(arm.label),
                    "x": _numbers(np.array(x)),
                    "y": _numbers(np.array(y)),
                    "marker": marker,
                    "hovertext": list(told_of),
                    "hovertemplate": "%{hovertext}<extra></extra>",
                }
            )
    shades = {value for run in study.runs if (value := run.values.get(study.color)) is not None}
    # Said here, since Plotly widens the scale by one where each trace has a single value.
    bounds = {"cmin": min(shades), "cmax": max(shades)} if len(shades) > 1 else {}
    layout = {
        "xaxis": {"title": {"text": TITLES[H_R]}, **_range(paths, "x")},
        "yaxis": {"title": {"text": TITLES[I_RZ]}, **_range(paths, "y")},
        "coloraxis": {
            "colorscale": "Viridis",
            **bounds,
            "showscale": len(shades) > 1,
            "colorbar": {
                "title": {"text": _end(study.color), "side": "top"},
                **{"orientation": "h", "x": 0, "xanchor": "left", "y": 1.01, "yanchor": "bottom"},
                **{"thickness": 10, "len": 0.6, "nticks": 5, "outlinewidth": 0},
            },
        },
        "margin": {"t": 50},
        "hovermode": "closest",
    }
    return {"id": "plane", "title": "H(R) and I(R;Z)", "data": paths + ends + rings, "layout": layout}


def _range(traces: list[Trace], key: str) -> dict[str, Any]:
    """An axis with some air around; Plotly leaves none at the ends of lines."""
    values = [value for trace in traces for value in trace[key] if value is not None]
    if not values:
        return {}
    air = 0.06 * (max(values) - min(values)) or 0.1
    return {"range": [min(values) - air, max(values) + air]}


def _ring(arm: int, x: float, y: float) -> Trace:
    """Marks the best run."""
    return {
        "type": "scatter",
        "mode": "markers+text",
        "meta": {"arm": arm, "ink": True},
        "x": _numbers(np.array([x])),
        "y": _numbers(np.array([y])),
        "text": ["best"],
        "textposition": "top center",
        "marker": {"symbol": "circle-open", "size": 24, "line": {"width": 2}},
        "hoverinfo": "skip",
        "cliponaxis": False,
    }


def _curves(study: Study, key: str, title: str) -> Plot:
    """A log name over epochs: mean of each arm, in a band of one standard deviation."""
    bands: list[Trace] = []
    lines: list[Trace] = []
    for index, arm in enumerate(study.arms):
        found = band([run.curve(key) for run in arm.runs])
        if not len(found.epoch):
            continue
        kept = thinned(len(found.epoch), MOST_POINTS)
        epoch, mean, sd = found.epoch[kept], found.mean[kept], found.sd[kept]
        style = style_of(index)
        wide = np.isfinite(sd)
        if wide.sum() > 1:
            bands.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "meta": {"arm": index},
                    "x": _numbers(np.concatenate([epoch[wide], epoch[wide][::-1]])),
                    "y": _numbers(np.concatenate([(mean - sd)[wide], (mean + sd)[wide][::-1]])),
                    "fill": "toself",
                    "fillcolor": style.color,
                    "opacity": 0.18,
                    "line": {"width": 0},
                    "hoverinfo": "skip",
                }
            )
        lines.append(
            {
                "type": "scatter",
                "mode": "lines" if len(epoch) > 1 else "markers",
                "meta": {"arm": index},
                "name": _name(arm.label),
                "x": _numbers(epoch),
                "y": _numbers(mean),
                "line": {"color": style.color, "dash": style.dash, "width": 2},
                "marker": {"color": style.color, "symbol": style.symbol, "size": 8},
                "hovertemplate": "%{fullData.name}<br>epoch %{x}: %{y:.4g}<extra></extra>",
            }
        )
    few = max((max(line["x"]) for line in lines), default=0) <= 8
    ticks = {"dtick": 1} if few else {}  # there is no epoch 1.5
    layout = {"xaxis": {"title": {"text": "epoch"}, **ticks}, "yaxis": {}, "hovermode": "closest"}
    return {"id": key, "title": title, "data": bands + lines, "layout": layout}


def _spectrum(study: Study, key: str) -> Plot:
    """Eigenvalues at the last epoch, mean over the runs of each arm."""
    lines: list[Trace] = []
    for index, arm in enumerate(study.arms):
        shares = mean_spectrum([run.spectra for run in arm.runs], key)
        shares = shares[shares > SMALLEST_SHARE]
        if not len(shares):
            continue
        kept = thinned(len(shares), MOST_POINTS)
        style = style_of(index)
        lines.append(
            {
                "type": "scatter",
                "mode": "lines",
                "meta": {"arm": index},
                "name": _name(arm.label),
                "x": (kept + 1).tolist(),
                "y": _numbers(shares[kept]),
                "line": {"color": style.color, "dash": style.dash, "width": 2},
                "hovertemplate": "%{fullData.name}<br>eigenvalue %{x}: %{y:.2e}<extra></extra>",
            }
        )
    layout = {
        "xaxis": {"title": {"text": "rank of the eigenvalue"}},
        "yaxis": {"title": {"text": "share of the trace"}, "type": "log", "exponentformat": "power"},
        "hovermode": "closest",
    }
    return {"id": f"spectrum/{key}", "title": f"Spectrum of {key}", "data": lines, "layout": layout}
