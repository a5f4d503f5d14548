"""Draws the dynamics of the run when it ends."""

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from adadim_lightning.callbacks.continuing import figures_of_epoch, note_epoch
from adadim_lightning.callbacks.monitor import DimensionMonitor
from adadim_lightning.files import check_writable


class DynamicsPlot(Callback):
    """Writes ``dynamics.png`` and ``spectra.npz`` at the end of the fit, also of one that fails.

    The picture shows alpha and beta, H(R), I(R;Z), the loss parts and the probes over the epochs, the spectrum
    of R over time, and the run's path in the plane of H(R) and I(R;Z). ``spectra.npz`` holds ``epoch`` ``(E,)``
    and the eigenvalues (squared singular values of the recent rows, descending) ``R`` ``(E, d_R)`` and ``Z``
    ``(E, d_Z)``, padded with zeros where there were fewer rows than dimensions.

    Needs a :class:`DimensionMonitor` (an :class:`AdaDim` is one) among the callbacks before it.

    Args:
        dirpath: folder to write to; by default the trainer's ``default_root_dir``.

    Example:
        >>> callback = DynamicsPlot("runs/first")
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        self.dirpath = dirpath
        self.history: dict[str, list[float]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say so if there will be nothing to draw.

        Raises:
            OSError: nothing can be written to the folder.
        """
        if stage != "fit" or not self._draws(trainer):
            return
        if not any(isinstance(callback, DimensionMonitor) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            rank_zero_warn(
                f"{type(self).__name__} draws nothing: there is no DimensionMonitor or AdaDim among the callbacks"
            )

    @rank_zero_only
    def _draws(self, trainer: Trainer) -> bool:
        """Whether files are wanted, which can then be written."""
        check_writable(self._folder(trainer))
        return True

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.dirpath if self.dirpath is not None else trainer.default_root_dir)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the epoch's values from those before it."""
        note_epoch(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the epoch's logged values."""
        epochs = len(self.history.setdefault("epoch", []))
        values = {key: float(value) for key, value in figures_of_epoch(trainer).items()}
        values |= {"epoch": float(trainer.current_epoch), "step": float(trainer.global_step - 1)}
        for key, value in values.items():
            column = self.history.setdefault(key, [])
            column += [float("nan")] * (epochs - len(column)) + [value]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files."""
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what there is."""
        try:
            self._write(trainer)
        except OSError as error:  # the exception that ended the fit matters more
            rank_zero_warn(f"dynamics.png and spectra.npz could not be written: {error}")

    @rank_zero_only
    def _write(self, trainer: Trainer) -> None:
        monitors = [c for c in trainer.callbacks if isinstance(c, DimensionMonitor) and c.spectra]  # type: ignore[attr-defined]
        if not monitors or not self.history:
            return
        from adadim_lightning.report.dynamics import draw_dynamics

        folder = self._folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        spectra = stack_spectra(monitors[0])
        with (folder / "spectra.npz").open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **spectra)
        draw_dynamics(self._history_of(monitors[0]), spectra).savefig(folder / "dynamics.png", dpi=120)

    def _history_of(self, monitor: DimensionMonitor) -> dict[str, np.ndarray[Any, Any]]:
        """The columns of one monitor, under names without its prefix."""
        prefix = f"{monitor.name}/" if monitor.name else ""
        epochs = len(self.history["epoch"])
        return {
            key.removeprefix(prefix): np.asarray(values + [float("nan")] * (epochs - len(values)))
            for key, values in self.history.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The history."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.history = state_dict["history"]


def stack_spectra(monitor: DimensionMonitor) -> dict[str, np.ndarray[Any, Any]]:
    """Spectra of a monitor as arrays ``epoch`` ``(E,)``, ``R`` ``(E, d_R)`` and ``Z`` ``(E, d_Z)``."""
    epochs, r, z = zip(*monitor.spectra, strict=True)
    stacked = {"epoch": np.asarray(epochs)}
    for name, rows in (("R", r), ("Z", z)):
        width = max(len(row) for row in rows)
        stacked[name] = np.stack([np.pad(row.numpy(), (0, width - len(row))) for row in rows])
    return stacked
