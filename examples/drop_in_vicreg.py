"""AdaDim in a VICReg of one's own, trained without labels, and probes that bring labeled images of their own.

The model's batches are pairs of views and nothing else, and it has no validation loop. AdaDim adds NT-Xent in the
share alpha to the model's VICReg. ``OnlineKNN`` and ``OnlineLinearProbe`` read the same backbone on clean, labeled
images at the end of each epoch, and never touch the model. The images are the handwritten digits of scikit-learn.

Run it by ``uv run python examples/drop_in_vicreg.py``.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2 as transforms

from adadim_lightning import AdaDim, OnlineKNN, OnlineLinearProbe


class TwoViews(Dataset):
    """Two random views of each image, without a label."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.augment = transforms.Compose(
            [
                transforms.RandomAffine(degrees=15, translate=(0.1, 0.1), scale=(0.85, 1.15)),
                transforms.ColorJitter(brightness=0.3, contrast=0.3),
                transforms.Lambda(lambda image: image + 0.1 * torch.randn_like(image)),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.augment(self.images[index]), self.augment(self.images[index])


def off_diagonal_squares(covariance: Tensor) -> Tensor:
    return covariance.square().sum() - covariance.diagonal().square().sum()


def vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    invariance = nn.functional.mse_loss(z1, z2)
    variance = covariance = torch.zeros((), device=z1.device)
    for z in (z1, z2):
        variance = variance + torch.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean()
        covariance = covariance + off_diagonal_squares(z.T.cov()) / z.shape[1]
    return 25 * invariance + 25 * variance + covariance


class VICReg(LightningModule):
    """As without AdaDim."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 128, kernel_size=3, stride=2, padding=1),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.projector = nn.Sequential(
            nn.Linear(128, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 256, bias=False)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """VICReg of the two views."""
        view1, view2 = batch
        return vicreg(self.projector(self.backbone(view1)), self.projector(self.backbone(view2)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    arguments = parser.parse_args()
    seed_everything(0)

    pixels, labels = (torch.as_tensor(x) for x in load_digits(return_X_y=True))
    images = pixels.float().reshape(-1, 1, 8, 8) / 16
    train, held_out = slice(0, 1297), slice(1297, None)
    loader = DataLoader(TwoViews(images[train]), batch_size=arguments.batch_size, shuffle=True, drop_last=True)
    labeled = DataLoader(TensorDataset(images[train], labels[train]), batch_size=256)
    scored = DataLoader(TensorDataset(images[held_out], labels[held_out]), batch_size=256)

    trainer = Trainer(
        max_epochs=arguments.epochs,
        callbacks=[
            AdaDim(native_loss="dimension_contrastive"),
            OnlineKNN(train_loader=labeled, val_loader=scored),
            OnlineLinearProbe(train_loader=labeled, val_loader=scored),
        ],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(VICReg(), loader)

    for name in (
        "balance/alpha",
        "dynamics/ER_R",
        "dynamics/ER_Z",
        "loss_weighted/native",
        "loss_weighted/uniformity",
        "loss_weighted/information",
        "loss/total",
        "probe/knn_top1",
        "probe/linear_top1",
    ):
        print(f"{name:28} {float(trainer.callback_metrics[name]):8.3f}")


if __name__ == "__main__":
    main()
