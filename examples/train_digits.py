"""AdaDim in plain Lightning code: backbone, head, loss, and one callback that measures and steers.

Run it by ``uv run python examples/train_digits.py --epochs 60``.
"""

import argparse

import kornia.augmentation as augment
import torch
from lightning.pytorch import Trainer, seed_everything

from adadim_lightning import AdaDim, AdaDimLoss, AdaDimModule, Balance, EffectiveRankSchedule, OnlineLinearProbe
from adadim_lightning.data import TwoViews, digits
from adadim_lightning.models import SmallConvNet, projection_head


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=60)
    arguments = parser.parse_args()
    seed_everything(0)

    views = TwoViews(
        [
            augment.RandomAffine(degrees=15.0, translate=(0.1, 0.1), scale=(0.85, 1.15), p=1.0),
            augment.RandomContrast((0.7, 1.3), p=0.8),
            augment.RandomGaussianNoise(std=0.1, p=0.5),
        ],
        mean=[0.3053],
        std=[0.3758],
    )
    module = AdaDimModule(
        backbone=SmallConvNet(in_channels=1, channels=(32, 64, 128)),
        projection_head=projection_head(128, hidden_dim=256, out_dim=128, layers=2),
        objective=AdaDimLoss(gamma=1.0, temperature=0.2),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=2e-3),
    )
    balance = Balance(EffectiveRankSchedule(normalizer="min", alpha_max=0.9), every_n_steps=50)
    trainer = Trainer(
        max_epochs=arguments.epochs,
        callbacks=[AdaDim("backbone", "projection_head", balance=balance), OnlineLinearProbe("backbone")],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=digits(views=views))

    for name in ("balance/alpha", "dynamics/H_R", "dynamics/I_RZ", "probe/linear_top1"):
        print(f"{name:20} {float(trainer.callback_metrics[name]):.3f}")


if __name__ == "__main__":
    main()
