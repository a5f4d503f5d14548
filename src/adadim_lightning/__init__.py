"""AdaDim for PyTorch Lightning: self-supervised learning steered by its own dimensionality."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adadim_lightning.balance import Balance as Balance
    from adadim_lightning.balance import ConstantSchedule as ConstantSchedule
    from adadim_lightning.balance import CosineSchedule as CosineSchedule
    from adadim_lightning.balance import EffectiveRankSchedule as EffectiveRankSchedule
    from adadim_lightning.balance import LinearSchedule as LinearSchedule
    from adadim_lightning.balance import Statistics as Statistics
    from adadim_lightning.balance import StepSchedule as StepSchedule
    from adadim_lightning.callbacks import AdaDim as AdaDim
    from adadim_lightning.callbacks import CollapseGuard as CollapseGuard
    from adadim_lightning.callbacks import DimensionMonitor as DimensionMonitor
    from adadim_lightning.callbacks import DynamicsPlot as DynamicsPlot
    from adadim_lightning.callbacks import OnlineKNN as OnlineKNN
    from adadim_lightning.callbacks import OnlineLinearProbe as OnlineLinearProbe
    from adadim_lightning.callbacks import WandbPanels as WandbPanels
    from adadim_lightning.guard import CollapseError as CollapseError
    from adadim_lightning.guard import NonFiniteError as NonFiniteError
    from adadim_lightning.module import AdaDimModule as AdaDimModule
    from adadim_lightning.objective import AdaDimLoss as AdaDimLoss
    from adadim_lightning.objective import ObjectiveOutput as ObjectiveOutput
    from adadim_lightning.pretrained import load_backbone as load_backbone
    from adadim_lightning.pretrained import load_transform as load_transform

__version__ = "0.1.0"

# Loaded on first use: `adadim-train --help` must not wait for torch.
_HOMES = {
    "AdaDim": "callbacks",
    "AdaDimLoss": "objective",
    "AdaDimModule": "module",
    "Balance": "balance",
    "CollapseError": "guard",
    "CollapseGuard": "callbacks",
    "ConstantSchedule": "balance",
    "CosineSchedule": "balance",
    "DimensionMonitor": "callbacks",
    "DynamicsPlot": "callbacks",
    "EffectiveRankSchedule": "balance",
    "LinearSchedule": "balance",
    "NonFiniteError": "guard",
    "ObjectiveOutput": "objective",
    "OnlineKNN": "callbacks",
    "OnlineLinearProbe": "callbacks",
    "Statistics": "balance",
    "StepSchedule": "balance",
    "WandbPanels": "callbacks",
    "load_backbone": "pretrained",
    "load_transform": "pretrained",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
