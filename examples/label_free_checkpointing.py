"""Keep the best checkpoint and stop early without a label: by the effective rank of the representation.

``DimensionMonitor`` changes nothing of the run. It logs ``dynamics/ER_R`` at the end of each epoch, and
Lightning's own ``ModelCheckpoint`` and ``EarlyStopping`` follow it: no labels, no validation loop. The images are
the handwritten digits of scikit-learn.

A warning: noise has a high rank too. An untrained backbone with batch norm may start above all that follows, and
the best epoch would be the first; look at the curve in metrics.csv before you trust its maximum.

Run it by ``uv run python examples/label_free_checkpointing.py``.
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from adadim_lightning import DimensionMonitor


def random_view(images: Tensor) -> Tensor:
    shift = torch.randint(-1, 2, (2,)).tolist()
    return images.roll(shift, dims=(2, 3)) + 0.1 * torch.randn_like(images)


class Contrastive(LightningModule):
    """Tells the views of one image from those of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 128, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.projection_head = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of finding the second view by the first."""
        [images] = batch
        z1, z2 = (F.normalize(self.projection_head(self.backbone(random_view(images)))) for _ in range(2))
        return F.cross_entropy(z1 @ z2.T / 0.2, torch.arange(len(images), device=self.device))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--patience", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("outputs/label_free"))
    arguments = parser.parse_args()
    seed_everything(0)

    images = torch.as_tensor(load_digits().images).float()[:, None] / 16
    loader = DataLoader(TensorDataset(images), batch_size=64, shuffle=True, drop_last=True)

    best = ModelCheckpoint(arguments.folder, monitor="dynamics/ER_R", mode="max", filename="{epoch}")
    logger = CSVLogger(arguments.folder, name="", version="")
    trainer = Trainer(
        max_epochs=arguments.epochs,
        callbacks=[
            DimensionMonitor(),
            best,
            EarlyStopping("dynamics/ER_R", mode="max", patience=arguments.patience),
        ],
        logger=logger,
        log_every_n_steps=len(loader),
    )
    trainer.fit(Contrastive(), loader)

    print(f"epochs trained      {trainer.current_epoch}")
    print(f"best checkpoint     {best.best_model_path}")
    print(f"its effective rank  {float(best.best_model_score):.3f}")
    print(f"all epochs          {Path(logger.log_dir, 'metrics.csv')}")


if __name__ == "__main__":
    main()
