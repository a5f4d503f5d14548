"""Lightning callbacks that measure, steer, probe and draw."""

from adadim_lightning.callbacks.adadim import AdaDim
from adadim_lightning.callbacks.checkpoints import RunCheckpoints
from adadim_lightning.callbacks.collapse import CollapseGuard
from adadim_lightning.callbacks.monitor import DimensionMonitor
from adadim_lightning.callbacks.panels import WandbPanels
from adadim_lightning.callbacks.plots import DynamicsPlot
from adadim_lightning.callbacks.probes import OnlineKNN, OnlineLinearProbe
from adadim_lightning.callbacks.progress import Throughput, progress_callback

__all__ = [
    "AdaDim",
    "CollapseGuard",
    "DimensionMonitor",
    "DynamicsPlot",
    "OnlineKNN",
    "OnlineLinearProbe",
    "RunCheckpoints",
    "Throughput",
    "WandbPanels",
    "progress_callback",
]
