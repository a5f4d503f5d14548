"""What callbacks that read a model's R and Z have in common."""

from abc import abstractmethod
from copy import deepcopy
from typing import Any
from weakref import ref

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from adadim_lightning.distributed import check_strategy
from adadim_lightning.feed import Feed


class TappingCallback(Callback):
    """Taps that come and go with the fit, whatever ends it, and a state that belongs to one model.

    Args:
        name: prefix of the log names and of the state in the checkpoint.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name
        self._blank: dict[str, Any] | None = None
        self._followed: ref[LightningModule] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_followed": None}  # a reference of this process

    @property
    def state_key(self) -> str:
        """Key of the state in the checkpoint."""
        return f"{type(self).__qualname__}{{{self.name or ''}}}"

    def _key(self, key: str) -> str:
        return f"{self.name}/{key}" if self.name else key

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the model of an earlier fit, if this is another; refuse one that is cut into parts."""
        if stage == "fit":
            check_strategy(trainer, self)
            if self._blank is None:
                self._blank = deepcopy(self.state_dict())
            elif self._followed is None or self._followed() is not pl_module:
                self._forget()
            self._followed = ref(pl_module)

    def _forget(self) -> None:
        """Return to the state before the first fit."""
        self.load_state_dict(deepcopy(self._blank or {}))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the taps."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the taps."""
        self._close()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Tell where one run of the step ends: an optimizer may ask for several."""
        if pl_module.automatic_optimization:  # by hand, one run may go backward several times
            for feed in self._feeds():
                feed.end_run()

    def _feeds(self) -> list[Feed]:
        """What is read of each step; nothing by default."""
        return []

    @abstractmethod
    def _close(self) -> None:
        """Remove the taps."""
