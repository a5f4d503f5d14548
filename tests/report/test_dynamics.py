"""The picture of a run's dynamics."""

import io

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from adadim_lightning.report.dynamics import draw_dynamics

TITLES = ["Balance", "H(R) and I(R;Z)", "Share of the loss", "Spectrum of R", "Path through H(R) and I(R;Z)"]


def history(epochs: int, *, probes: bool = True, steered: bool = True) -> dict[str, np.ndarray]:
    keys = ["dynamics/H_R", "dynamics/I_RZ", "dynamics/ER_R", "dynamics/ER_Z"]
    keys += [f"loss_weighted/{part}" for part in ("decorrelation", "uniformity", "information")]
    if steered:
        keys += ["balance/alpha", "balance/beta"]
    if probes:
        keys += ["probe/linear_top1", "probe/knn_top1"]
    columns = {key: np.linspace(0.1 * i, 0.1 * i + 0.5, epochs) for i, key in enumerate(keys)}
    return {"epoch": np.arange(epochs, dtype=float)} | columns


def spectra(epochs: int, dim: int = 6) -> dict[str, np.ndarray]:
    decay = np.exp(-np.arange(dim)[None] * np.linspace(1, 0.2, epochs)[:, None])
    return {"epoch": np.arange(epochs), "R": 5 * decay, "Z": decay}


def pixels(figure: Figure, dpi: int = 40) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, dpi=dpi)
    file.seek(0)
    return imread(file)


def panels(figure: Figure) -> dict[str, object]:
    return {title: axes for axes in figure.axes if (title := axes.get_title(loc="left"))}


@pytest.mark.parametrize(
    ("epochs", "probes", "steered"), [(1, False, False), (1, True, True), (2, True, False), (40, False, True)]
)
def test_a_run_of_any_length_is_drawn(epochs: int, probes: bool, steered: bool) -> None:
    figure = draw_dynamics(history(epochs, probes=probes, steered=steered), spectra(epochs))
    last = "Held-out accuracy" if probes else "Effective rank"
    assert list(panels(figure)) == [*TITLES, last]
    assert float(pixels(figure)[..., :3].std()) > 0.02


def test_the_curves_carry_the_numbers_over_epochs_counted_from_one() -> None:
    columns = history(5)
    axes = panels(draw_dynamics(columns, spectra(5)))
    for panel, key, line in (
        ("Balance", "balance/alpha", 0),
        ("H(R) and I(R;Z)", "dynamics/H_R", 0),
        ("Share of the loss", "loss_weighted/uniformity", 1),
        ("Held-out accuracy", "probe/knn_top1", 1),
    ):
        drawn = axes[panel].lines[line]
        np.testing.assert_array_equal(drawn.get_xdata(), [1, 2, 3, 4, 5])
        np.testing.assert_allclose(drawn.get_ydata(), columns[key])


def test_the_spectrum_is_a_share_of_the_trace_for_at_most_twelve_epochs() -> None:
    axes = panels(draw_dynamics(history(40), spectra(40)))["Spectrum of R"]
    assert len(axes.lines) == 12
    for line in axes.lines:
        assert float(np.sum(line.get_ydata())) == pytest.approx(1)
    last = spectra(40)["R"][-1]
    np.testing.assert_allclose(axes.lines[-1].get_ydata(), last / last.sum())


def test_missing_values_and_collapsed_spectra_are_drawn_around() -> None:
    columns = history(4)
    columns["probe/knn_top1"][:2] = np.nan
    collapsed = {"epoch": np.arange(4), "R": np.zeros((4, 6)), "Z": np.zeros((4, 6))}
    assert float(pixels(draw_dynamics(columns, collapsed)).std()) > 0.02


def test_a_negative_beta_is_inside_the_picture() -> None:
    columns = history(4)
    columns["balance/beta"] = np.array([0.0, -0.1, -0.3, -0.5])
    low, high = panels(draw_dynamics(columns, spectra(4)))["Balance"].get_ylim()
    assert low <= -0.5
    assert high >= 1.0


def test_alpha_is_seen_where_beta_equals_it() -> None:
    columns = history(40)
    columns["balance/beta"] = columns["balance/alpha"]
    axes = panels(draw_dynamics(columns, spectra(40)))["Balance"]
    alpha, beta = axes.lines
    figure = axes.get_figure()
    assert isinstance(figure, Figure)

    def blue() -> int:
        """Points of alpha's color in the picture."""
        return int(
            (np.abs(pixels(figure, dpi=120)[..., :3] - to_rgb(alpha.get_color())).max(axis=-1) < 0.15).sum()
        )

    axes.get_legend().set_visible(False)
    seen = blue()
    beta.set_linestyle("-")
    assert seen > blue() + 20
