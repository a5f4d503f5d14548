"""AdaDim in a model that is written with lightly: SimCLR as it was, and one line in the Trainer.

Nothing of the model knows of AdaDim. It finds ``backbone`` and ``projection_head`` by their names, reads R and Z
from the model's own forward pass, and trains alpha times the model's loss beside (1 - alpha) times VICReg, scaled
to it. Alpha is led by the measured effective rank of Z, and the gradients of both at Z are equally long. The
images are the handwritten digits of scikit-learn.

Run it by ``uv run python examples/drop_in_lightly.py``; it needs lightly.
"""

import argparse
from collections.abc import Callable

import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from lightning.pytorch import LightningModule, Trainer, seed_everything
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from adadim_lightning import AdaDim


class Digits(Dataset):
    """The digits as RGB images of 32 x 32 pixels, with their labels."""

    def __init__(self, count: int) -> None:
        digits = load_digits()
        self.pixels, self.labels = digits.images[:count], digits.target[:count]
        self.transform: Callable = lambda image: image

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple:
        grey = (self.pixels[index] * (255 / 16)).astype("uint8")
        image = Image.fromarray(grey).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
        return self.transform(image), int(self.labels[index])


class SimCLR(LightningModule):
    """As without AdaDim."""

    def __init__(self) -> None:
        super().__init__()
        resnet = torchvision.models.resnet18()
        self.backbone = nn.Sequential(*list(resnet.children())[:-1])
        self.projection_head = SimCLRProjectionHead(input_dim=512, hidden_dim=512, output_dim=128)
        self.criterion = NTXentLoss(temperature=0.2)

    def forward(self, x: Tensor) -> Tensor:
        """Z of a batch of images."""
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def training_step(self, batch: tuple, batch_idx: int) -> Tensor:
        """NT-Xent of two views; lightly's batches are (views, labels, names)."""
        (x0, x1), _, _ = batch
        return self.criterion(self(x0), self(x1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, default=1797)
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    seed_everything(0)

    # A mirrored digit is another character.
    views = SimCLRTransform(input_size=32, min_scale=0.5, hf_prob=0.0, gaussian_blur=0.0)
    dataset = LightlyDataset.from_torch_dataset(Digits(arguments.images), transform=views)
    loader = DataLoader(dataset, batch_size=arguments.batch_size, shuffle=True, drop_last=True)

    trainer = Trainer(
        max_epochs=arguments.epochs,
        callbacks=[AdaDim(native_loss="sample_contrastive")],  # the one line
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(SimCLR(), loader)

    for name in (
        "balance/alpha",
        "dynamics/ER_R",
        "dynamics/ER_Z",
        "loss/native",
        "loss/decorrelation",
        "loss_weighted/native",
        "loss_weighted/decorrelation",
        "loss_weighted/information",
        "loss/total",
    ):
        print(f"{name:28} {float(trainer.callback_metrics[name]):8.3f}")


if __name__ == "__main__":
    main()
