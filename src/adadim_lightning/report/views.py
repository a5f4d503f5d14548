"""A picture of what the model sees."""

from typing import Any

import torch
from torch import Tensor

from adadim_lightning.data.views import TwoViews

PAIRS = 3


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
    figure = Figure(figsize=(1.15 * len(columns), 1.1 * len(images) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for column, (title, pictures) in enumerate(columns):
        for row, picture in enumerate(pictures):
            cell = axes[row][column]
            pixels = (picture.cpu() * views.std.cpu() + views.mean.cpu()).clamp(0, 1)
            shown = pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels
            cell.imshow(torch.movedim(shown, 0, -1).numpy(), interpolation="nearest")
            cell.set_axis_off()
            if row == 0:
                cell.set_title(title, fontsize=9)
    return figure
