"""AdaDim drives a number that the model has: torch and Lightning, and nothing else.

The model mixes two losses by ``self.alpha``. ``AdaDim(target="alpha")`` writes the measured effective rank of Z,
as a share of its dimensions, into this number while the model trains, and leaves the loss alone.

Run it by ``uv run python examples/drop_in_plain.py --epochs 30``.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from adadim_lightning import AdaDim


class MixedLoss(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64))
        self.projector = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64))
        self.alpha = 0.0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        [pixels] = batch
        z1, z2 = (self.projector(self.encoder(pixels + 0.2 * torch.randn_like(pixels))) for _ in range(2))
        similarity = F.normalize(z1) @ F.normalize(z2).T
        contrastive = F.cross_entropy(similarity / 0.2, torch.arange(len(pixels), device=self.device))
        scaled1, scaled2 = ((z - z.mean(dim=0)) / z.std(dim=0) for z in (z1, z2))
        correlation = scaled1.T @ scaled2 / len(pixels)
        decorrelation = (correlation - torch.eye(len(correlation), device=self.device)).square().mean(dim=0).sum()
        return (1 - self.alpha) * decorrelation + self.alpha * contrastive

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=30)
seed_everything(0)
pixels = torch.as_tensor(load_digits().data).float() / 16
loader = DataLoader(TensorDataset(pixels), batch_size=64, shuffle=True, drop_last=True)

module = MixedLoss()
trainer = Trainer(
    max_epochs=parser.parse_args().epochs,
    callbacks=[AdaDim(target="alpha")],  # the one line
    logger=False,
    enable_checkpointing=False,
)
trainer.fit(module, loader)

print(f"{'alpha of the model':20} {module.alpha:8.3f}")
for name in ("balance/alpha", "dynamics/ER_Z", "dynamics/ER_R", "dynamics/H_R", "dynamics/I_RZ"):
    print(f"{name:20} {float(trainer.callback_metrics[name]):8.3f}")
