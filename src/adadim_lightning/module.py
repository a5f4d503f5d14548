"""The LightningModule: a backbone, a projection head and the AdaDim objective."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adadim_lightning.distributed import check_strategy, training_steps
from adadim_lightning.epoch_means import EpochMeans
from adadim_lightning.guard import FiniteGuard, Snapshot
from adadim_lightning.objective import AdaDimLoss, ObjectiveOutput

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]
ScheduleFactory = Callable[[Optimizer, int], LRScheduler]

HALF_EPS = 1e-4


class AdaDimModule(LightningModule):
    """Trains a backbone by two views of each image.

    Both views go through the backbone in one call, below each other. A training batch is ``((view1, view2),
    labels)``, each view of shape ``(N, C, H, W)``; a validation batch is ``(images, labels)``. Labels are left
    to callbacks. The submodules to tap are ``backbone`` and ``projection_head``. Of several processes (DDP) each
    takes its part of the batch, and all get the gradient of the whole; strategies that cut the model are refused.

    At the first NaN or infinity the weights freeze, no checkpoint is written any more, and the run stops with
    a :class:`~adadim_lightning.guard.NonFiniteError`: at once on a CPU, at the next step that logs or measures
    on other devices, which are not made to wait for every step.

    Args:
        backbone: images ``(B, C, H, W)`` to representations R ``(B, d_R)``.
        projection_head: representations to embeddings Z ``(B, d_Z)``.
        objective: the loss, of which a copy is kept; AdaDim's by default.
        optimizer: takes parameter groups; AdamW by default. Biases and norms are in a group without weight
            decay.
        lr_schedule: takes the optimizer and the number of steps, and is stepped after each; none by default.
        channels_last: keep images and weights of the backbone in the memory format in which most convolutions are
            faster.

    Example:
        >>> module = AdaDimModule(torch.nn.Flatten(), torch.nn.Linear(12, 8))
        >>> module(torch.zeros(2, 3, 2, 2)).shape
        torch.Size([2, 12])
    """

    def __init__(
        self,
        backbone: nn.Module,
        projection_head: nn.Module,
        objective: AdaDimLoss | None = None,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        lr_schedule: ScheduleFactory | None = None,
        *,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self._channels_last = channels_last  # the memory format itself cannot be pickled
        self.backbone = backbone.to(memory_format=torch.channels_last) if channels_last else backbone
        self.projection_head = projection_head
        # A copy: alpha and kappa of one module are nothing to another that is given the same loss.
        self.objective = deepcopy(objective) if objective is not None else AdaDimLoss()
        self.guard = FiniteGuard()
        self._means = EpochMeans()
        self.origin: dict[str, Any] | None = None  # what it was made of, for the checkpoint
        self._optimizer = optimizer
        self._lr_schedule = lr_schedule

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "AdaDimModule":
        """Load the weights of a checkpoint into a module of the given parts, as every LightningModule does.

        Args:
            checkpoint_path: the checkpoint.
            args: as in ``LightningModule.load_from_checkpoint``.
            kwargs: ``backbone`` and ``projection_head``, and whatever else the module was made with.

        Raises:
            ValueError: a part is missing: a checkpoint holds weights, no classes.
        """
        missing = [name for name in ("backbone", "projection_head") if name not in kwargs]
        if missing:
            raise ValueError(
                f"a checkpoint holds weights but no modules: give load_from_checkpoint {' and '.join(missing)}, "
                "or use adadim_lightning.load_backbone(RUN) for a run of adadim-train"
            )
        # As a classmethod of Lightning's own it refuses to be called on an instance.
        load: Any = super().load_from_checkpoint
        module: AdaDimModule = load(checkpoint_path, *args, **kwargs)
        return module

    def forward(self, images: Tensor) -> Tensor:
        """Representation R of images.

        Args:
            images: shape ``(B, C, H, W)``, normalized as in training.

        Returns:
            Shape ``(B, d_R)``.
        """
        memory_format = torch.channels_last if self._channels_last else torch.preserve_format
        representation: Tensor = self.backbone(images.to(self.dtype, memory_format=memory_format))
        return representation

    def setup(self, stage: str) -> None:
        """Refuse a strategy that would cut the model into parts."""
        if stage == "fit":
            check_strategy(self.trainer, self)
            self.objective.step = None  # an earlier fit may have been cut off in a step

    def training_step(self, batch: tuple[tuple[Tensor, Tensor], Any], batch_idx: int) -> Tensor:
        """Loss of one batch; logs its parts."""
        (view1, view2), _ = batch
        if view1.shape != view2.shape:
            raise ValueError(
                f"both views must have the same shape, got {tuple(view1.shape)} and {tuple(view2.shape)}"
            )
        r1, r2 = self(torch.cat([view1, view2])).chunk(2)
        z1, z2 = self.projection_head(torch.cat([r1, r2])).chunk(2)
        output: ObjectiveOutput = self.objective(r1, r2, z1, z2)
        total, parts, weighted = output
        self.guard.watch(total, self.global_step)
        if total.device.type == "cpu":
            self.guard.check()
        values = {"loss/total": total.detach()}
        values |= {f"loss/{name}": value for name, value in parts.items()}
        values |= {f"loss_weighted/{name}": value for name, value in weighted.items()}
        self._means.add(self, values, weight=len(view1))
        return total

    def validation_step(self, batch: tuple[Tensor, Any], batch_idx: int) -> None:
        """Compute R, for the callbacks that read it."""
        self(batch[0])

    def configure_optimizers(self) -> Any:
        """The optimizer over backbone and head, and its schedule."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = self._optimizer([group for group in groups if group["params"]])
        _keep_eps(optimizer)
        if self._lr_schedule is None:
            return optimizer
        steps = training_steps(self.trainer)
        if not math.isfinite(steps):
            raise ValueError(
                "the learning-rate schedule needs the length of the training: "
                "set trainer.max_epochs or trainer.max_steps"
            )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._lr_schedule(optimizer, int(steps)), "interval": "step"},
        }

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Watch the gradients too, but where a scaler skips such steps by itself."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            if gradients:
                norm = torch.nn.utils.get_total_norm(gradients)
                self.guard.watch(norm, self.global_step)
                if norm.device.type == "cpu":
                    self.guard.check()

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step the optimizer, but leave the weights alone from the first non-finite loss on."""
        if self.device.type == "cpu":
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            self._step_unless_tripped(
                lambda: super(AdaDimModule, self).optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            )

    @torch.no_grad()
    def _step_unless_tripped(self, step: Callable[[], None]) -> None:
        """Take a step and undo it where the guard has tripped, all on the device: nothing waits for the flag."""
        before = Snapshot(p for p in self.parameters() if p.requires_grad)
        with torch.enable_grad():
            step()
        before.restore_where(self.guard.tripped)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Tell the objective that a step begins: an optimizer may run it several times."""
        self.objective.step = object()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read the guard when the trainer logs."""
        self.objective.step = None
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.global_step % every == 0:
            self.guard.check()

    def on_validation_start(self) -> None:
        """Read the guard before anything is scored."""
        self.guard.check()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to write a checkpoint that is not good; put in what the model was made of."""
        self.guard.check()
        if self.origin is not None:
            checkpoint["adadim"] = self.origin


def _keep_eps(optimizer: Optimizer) -> None:
    """Replace an ``eps`` that is 0 in the precision of its parameters, where it would divide by 0."""
    said = False
    for group in optimizer.param_groups:
        eps = group.get("eps")
        if not isinstance(eps, float) or eps <= 0:
            continue
        dtypes = {p.dtype for p in group["params"]}
        lost = next((dtype for dtype in dtypes if float(torch.tensor(eps, dtype=dtype)) == 0), None)
        if lost is not None:
            group["eps"] = HALF_EPS
            if not said:
                rank_zero_warn(
                    f"eps={eps:g} of {type(optimizer).__name__} is 0 in {lost}, which ends in NaN; it is set to "
                    f"{HALF_EPS:g}: give another by optimizer.eps"
                )
            said = True
