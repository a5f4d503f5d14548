"""Logs how many dimensions R and Z span, and how much of R the head lets through."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from adadim_lightning.callbacks.tapping import TappingCallback
from adadim_lightning.distributed import parts_of_all_processes
from adadim_lightning.feed import Feed, Pool, Source
from adadim_lightning.functional._numeric import check_bool, check_integer, full_precision
from adadim_lightning.functional.information import matrix_mutual_information
from adadim_lightning.functional.spectrum import (
    Spectrum,
    _effective_rank_of_entropy,
    _spectral_entropy_of_eigenvalues,
)
from adadim_lightning.guard import FiniteGuard, NonFiniteError
from adadim_lightning.metrics.window import Measured, PendingSteps, RecentRows, Step, size_and_spread
from adadim_lightning.tap import NotCalledError

MOST_SNAPSHOTS = 256


def _information(steps: Sequence[Measured]) -> Tensor:
    """Sum over steps of I_2(R;Z) of the rows of all processes, nats."""
    joined = [torch.cat([full_precision(x) for x in (m.step.r, m.step.z)], dim=1) for m in steps]
    totals = [sum(counts) for counts in zip(*(m.counts for m in steps), strict=True)]  # of each process
    width = steps[0].step.r.shape[1]
    processes = [
        torch.split(part, [m.counts[i] for m in steps])
        for i, part in enumerate(parts_of_all_processes(torch.cat(joined), totals))
    ]
    return torch.stack(
        [
            matrix_mutual_information(rows[:, :width], rows[:, width:])
            for rows in (torch.cat(parts) for parts in zip(*processes, strict=True))
        ]
    ).sum()


def rank_of_eigenvalues(eigenvalues: Tensor, spectrum: Spectrum) -> float:
    """Effective rank of squared singular values."""
    entropy = _spectral_entropy_of_eigenvalues(eigenvalues, spectrum)
    return float(_effective_rank_of_entropy(entropy, len(eigenvalues)))


@dataclass(frozen=True)
class Reading:
    """What a monitor read after a training step.

    Attributes:
        step: number of optimizer steps before it.
        er_r: effective rank of the last rows of R.
        er_z: effective rank of the last rows of Z.
        i_rz: I_2(R;Z) in nats, mean over the batches measured since the reading before.
        size_z: root mean square of the entries of the last rows of Z.
        spread_z: root mean square of their deviations from the mean row.
    """

    step: int
    er_r: float
    er_z: float
    i_rz: float
    size_z: float
    spread_z: float


class DimensionMonitor(TappingCallback):
    r"""Measures R and Z while the model trains, from its own forward pass, without labels or validation.

    Beside an :class:`~adadim_lightning.AdaDim` on the same submodules, which measures too, it stays silent.
    It changes neither the model nor its random state, whoever wrote the model; hooks come and go with the fit. Of
    a model with a momentum branch it reads the student, of crops of several sizes the largest.

    Logged at the end of each epoch, in nats where they are logarithms: ``dynamics/H_R`` and ``dynamics/ER_R``,
    entropy and effective rank of the representation; ``dynamics/ER_Z``, that of the embedding;
    ``dynamics/I_RZ``, mean over the epoch's measured steps of the order-2 mutual information of the batch's
    rows (all views); ``dynamics/log_n``, the logarithm of their largest number, which bounds it. Effective ranks
    are those of the last ``window`` rows of all views. Values are equal on every process.

    Args:
        representation: where R comes from: the dotted name of the submodule that puts it out, ``name[key]`` for
            one entry of what it puts out, the key of an entry of what ``training_step`` returns, or a function
            ``(module, batch, outputs)`` that gives the rows, or a list with those of each view. By default the
            backbone is found by its name.
        embedding: where Z comes from, in the same way; by default the projection head is found by its name.
        pool: makes rows of tokens ``(N, T, d)``: ``"class"``, the first, or ``"mean"``; and of maps
            ``(N, d, H, W)``: ``"mean"``.
        every_n_steps: longest time between readings; the end of an epoch is always one.
        window: rows behind a reading; the steps right before it are measured until they are that many.
        spectrum: of the effective ranks: singular values, or their squares.
        center: subtract the mean of the rows first.
        name: prefix of the log names and of the state in the checkpoint, for several monitors on one model.

    Raises:
        ValueError: R or Z is not found, or is no ``(N, d)``; the message lists the submodules and their shapes.
        NonFiniteError: R or Z of an :class:`~adadim_lightning.AdaDimModule` holds a NaN or infinity; of other
            modules such a step is left out, with a warning.

    Example:
        >>> monitor = DimensionMonitor("backbone", "head", every_n_steps=100)
    """

    steers = False

    @property
    def alters_loss(self) -> bool:
        """Whether what is measured enters the loss that is trained."""
        return False

    def __init__(
        self,
        representation: Source | None = None,
        embedding: Source | None = None,
        *,
        pool: Pool | None = None,
        every_n_steps: int = 50,
        window: int = 4096,
        spectrum: Spectrum = "singular",
        center: bool = False,
        name: str | None = None,
    ) -> None:
        check_integer("every_n_steps", every_n_steps, low=1)
        check_integer("window", window, low=1)
        check_bool("center", center)
        if spectrum not in ("singular", "eigen"):
            raise ValueError(f'spectrum must be "singular" or "eigen", got {spectrum!r}')
        super().__init__(name)
        self.representation = representation
        self.embedding = embedding
        self.feed = Feed(representation, embedding, pool)
        self.spectrum: Spectrum = spectrum
        self.center = center
        self.every_n_steps = every_n_steps
        self.pending = PendingSteps(window)
        self.recent_r = RecentRows(window, center=center)
        self.recent_z = RecentRows(window, center=center)
        self.spectra: list[tuple[int, Tensor, Tensor]] = []
        self._step = 0
        self._global_step = 0
        self._silent = False
        self._has_read = False
        self._first_z: Tensor | None = None  # until its size and spread are asked of all processes
        self._information = torch.zeros(())  # sum over the epoch's measured steps, nats
        self._measured = 0
        self._log_n = 0.0
        self._keep_every = 1
        self.guard = FiniteGuard()
        self.finite = True  # R and Z of the steps before the last reading
        self._since = (torch.zeros(()), 0)  # as the two above, since the last reading
        self.first_z = (0.0, 0.0)  # size and spread of Z in the first step that was read
        self._due: tuple[int, Tensor, int] | None = None  # a reading nobody asked for yet
        self._reading: Reading | None = None

    @property
    def last_reading(self) -> Reading | None:
        """The last reading, of every ``every_n_steps`` and the end of each epoch; None before the first.

        Its spectra are taken when somebody asks, so that a run without such callbacks does not pay for them; all
        processes have to ask together.
        """
        if self._due is not None:
            step, information, measured = self._due
            er_r, er_z = (
                rank_of_eigenvalues(rows.read()[0], self.spectrum) for rows in (self.recent_r, self.recent_z)
            )
            size_z, spread_z = self.recent_z.size_and_spread()
            self._reading = Reading(step, er_r, er_z, float(information) / measured, size_z, spread_z)
            self._due = None
        return self._reading

    def _close_reading(self, step: int) -> None:
        """Make what was measured since the last reading the next one."""
        information, measured = self._since
        if measured:
            self._due = (step, information, measured)
            self._since = (torch.zeros(()), 0)

    def _logs_as(self, other: "DimensionMonitor", module: LightningModule) -> bool:
        """Whether another monitor logs the same values under the same names."""
        try:
            same = self.feed.names(module) == other.feed.names(module)
        except LookupError:
            same = (self.representation, self.embedding) == (other.representation, other.embedding)
        settings = [(x.feed.pool, x.spectrum, x.center, x.name) for x in (self, other)]
        return same and settings[0] == settings[1]

    def _refuse_namesakes(self, others: list["DimensionMonitor"], module: LightningModule) -> None:
        """Two monitors under one name would log the mean of their values."""
        for other in others:
            if other.name == self.name and not self._logs_as(other, module):
                raise ValueError(
                    "two monitors log under the same names, but differ in what they read or how they measure; "
                    'give one of them name="..."'
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place the taps."""
        others = [
            other
            for other in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(other, DimensionMonitor) and other is not self
        ]
        self._silent = not self.steers and any(
            other.steers and other._logs_as(self, pl_module) for other in others
        )
        if not self._silent:
            self._refuse_namesakes(others, pl_module)
        self.feed.open(pl_module)

    def _feeds(self) -> list[Feed]:
        return [self.feed]

    def _close(self) -> None:
        self.feed.close()

    # One training step.

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ask for R and Z."""
        self._global_step = trainer.global_step
        self._record()

    def _record(self) -> None:
        self.feed.record(not self._silent)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in R and Z; they are measured if a reading follows soon enough."""
        if not self._silent:
            # Any step may be the last of its epoch: of a stream, by a limit of time, where somebody stops it.
            self._hold(self._step_of(pl_module, batch, outputs))
            if (self._step + 1) % self.every_n_steps == 0:
                self._measure(pl_module)
                self.recent_r.close()
                self.recent_z.close()
                self._close_reading(trainer.global_step)
        self.feed.release()
        self._step += 1

    def _may_go_on(self, module: LightningModule) -> bool:
        """Whether a NaN or infinity is left out, since the model is somebody else's business."""
        return not (self.alters_loss or isinstance(getattr(module, "guard", None), FiniteGuard))

    def _step_of(self, module: LightningModule, batch: Any, outputs: Any) -> Step:
        """R and Z of the step, none where it has none."""
        none = torch.zeros(0, 0, device=module.device)
        nothing = Step(self._global_step, none, none, first=0)
        if module.automatic_optimization and not outputs:
            return nothing  # training_step returned None
        try:
            r_views, z_views = self._read(batch, outputs)
        except NotCalledError:
            # Once it has been read, a submodule may rest in some steps.
            if not self._has_read or not self._may_go_on(module):
                raise
            return nothing
        step = Step.of(self._global_step, r_views, z_views, *self._more(len(r_views), batch, outputs))
        if not self._has_read:
            self._has_read, self._first_z = True, step.z
        return step

    def _read(self, batch: Any, outputs: Any) -> list[list[Tensor]]:
        """Views of R and of Z, detached."""
        return [[x.detach() for x in views.rows] for views in self.feed.read(batch, outputs)]

    def _more(self, views: int, batch: Any, outputs: Any) -> tuple[Tensor, ...]:
        """What else to know of a step once it is measured."""
        return ()

    def _hold(self, step: Step) -> None:
        """Keep the step until the next reading."""
        self.pending.add(step)

    @torch.no_grad()
    def _measure(self, module: LightningModule) -> list[Measured]:
        """Measure the steps that are due, on all processes together."""
        guard = getattr(module, "guard", None)
        if isinstance(guard, FiniteGuard):
            guard.check()
        steps, bad = self.pending.take(module.device)
        if bad is not None and self.guard.raises:
            if not self._may_go_on(module):
                raise NonFiniteError(bad)
            if self.finite:
                rank_zero_warn(f"R or Z holds a NaN or infinity at step {bad}; such steps are not measured")
        if steps or bad is not None:
            self.finite = bad is None
        if not steps:
            return steps
        self._look_at_first_z()
        rows = sum(sum(measured.counts) for measured in steps)
        self.recent_r.update(torch.cat([measured.step.r for measured in steps]), rows)
        self.recent_z.update(torch.cat([measured.step.z for measured in steps]), rows)
        self._log_n = max(self._log_n, *(math.log(sum(measured.counts)) for measured in steps))
        information = _information(steps)
        self._information = self._information.to(module.device) + information
        self._since = (self._since[0].to(module.device) + information, self._since[1] + len(steps))
        self._measured += len(steps)
        return steps

    def _look_at_first_z(self) -> None:
        if self._first_z is not None:
            size, spread = size_and_spread(self._first_z)
            if math.isfinite(size):
                self.first_z = (size, spread)
            self._first_z = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch's mean."""
        self._information, self._measured, self._log_n = torch.zeros(()), 0, 0.0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was measured in this epoch."""
        self.feed.release()  # a step that was begun and left out
        if self._silent:
            return
        self._measure(pl_module)
        if not self._measured:
            return
        self._close_reading(trainer.global_step)
        eigenvalues_r = self.recent_r.read()[0]
        eigenvalues_z = self.recent_z.read()[0]
        er_r = rank_of_eigenvalues(eigenvalues_r, self.spectrum)
        values = {
            "dynamics/H_R": math.log(er_r),
            "dynamics/ER_R": er_r,
            "dynamics/ER_Z": rank_of_eigenvalues(eigenvalues_z, self.spectrum),
            "dynamics/I_RZ": self._mean_information(),
            "dynamics/log_n": self._log_n,
        }
        self._log(pl_module, values)
        self._keep_spectra(trainer.current_epoch, eigenvalues_r, eigenvalues_z)

    def _mean_information(self) -> float:
        """Mean over the epoch's measured batches so far, nats."""
        return float(self._information) / self._measured

    def _log(self, pl_module: LightningModule, values: Mapping[str, float | Tensor]) -> None:
        pl_module.log_dict(
            {self._key(key): value for key, value in values.items()},
            on_step=False,
            on_epoch=True,
            batch_size=1,
            sync_dist=True,
        )

    def _keep_spectra(self, epoch: int, *eigenvalues: Tensor) -> None:
        """Keep the spectra of this epoch; of a long run, of every second, fourth ... epoch."""
        # The last one is always kept, to be replaced by the next if it is not one of those.
        if self.spectra and self.spectra[-1][0] % self._keep_every:
            self.spectra.pop()
        if len(self.spectra) >= MOST_SNAPSHOTS:
            self._keep_every *= 2
            self.spectra = [snapshot for snapshot in self.spectra if snapshot[0] % self._keep_every == 0]
        r, z = (x.to(torch.float32).cpu() for x in eigenvalues)
        self.spectra.append((epoch, r, z))

    # Checkpoint.

    def state_dict(self) -> dict[str, Any]:
        """Step, recent rows and spectra; all processes must ask together."""
        self._look_at_first_z()
        return {
            "step": self._step,
            "information": float(self._information),
            "measured": self._measured,
            "log_n": self._log_n,
            "since": [float(self._since[0]), self._since[1]],
            "has_read": self._has_read,
            "first_z": list(self.first_z),
            "pending": self.pending.state_dict(),
            "recent_r": self.recent_r.state_dict(),
            "recent_z": self.recent_z.state_dict(),
            "spectra": self.spectra,
            "keep_every": self._keep_every,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._step = state_dict["step"]
        self._information = torch.tensor(state_dict["information"])
        self._measured = state_dict["measured"]
        self._log_n = state_dict["log_n"]
        information, measured = state_dict.get("since", (0.0, 0))
        self._since = (torch.tensor(information), measured)
        self._due = self._reading = None
        self._has_read = bool(state_dict.get("has_read", state_dict.get("rows_per_step")))
        size, spread = state_dict.get("first_z", (0.0, 0.0))
        self.first_z = (size, spread)
        self._first_z = None
        self.pending.load_state_dict(state_dict.get("pending", []))
        self.recent_r.load_state_dict(state_dict["recent_r"])
        self.recent_z.load_state_dict(state_dict["recent_z"])
        self.spectra = state_dict["spectra"]
        self._keep_every = state_dict["keep_every"]
