"""A picture of what the model sees."""

from typing import Any

import torch
from torch import Tensor

from adadim_lightning.data.views import TwoViews

PAIRS = 3
GAP = 0.12  # of a picture, before each pair


def draw_views(views: TwoViews, images: Tensor) -> Any:
    """Each image beside pairs of its views.

    Args:
        views: what makes them.
        images: shape ``(N, C, H, W)``, uint8.

    Returns:
        A matplotlib figure: a row for each image; its columns are the image and three pairs of views.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns: list[tuple[str, Tensor]] = [("image", views.clean(images))]
    for pair in range(1, PAIRS + 1):
        first, second = views(images)
        columns += [(f"pair {pair}\nview 1", first), (f"pair {pair}\nview 2", second)]
    widths = [1.0] + [GAP, 1.0, 1.0] * PAIRS
    figure = Figure(figsize=(1.15 * sum(widths), 1.1 * len(images) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(images), len(widths), squeeze=False, width_ratios=widths)
    for gap in (axes[row][column] for row in range(len(images)) for column in range(1, len(widths), 3)):
        gap.set_axis_off()
    places = [column for column in range(len(widths)) if widths[column] == 1]
    for column, (title, pictures) in zip(places, columns, strict=True):
        for row, picture in enumerate(pictures):
            cell = axes[row][column]
            pixels = (picture.cpu() * views.std.cpu() + views.mean.cpu()).clamp(0, 1)
            shown = pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels
            cell.imshow(torch.movedim(shown, 0, -1).numpy(), interpolation="nearest")
            cell.set_axis_off()
            if row == 0:
                cell.set_title(title, fontsize=9)
    return figure
