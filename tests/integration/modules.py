"""Small Lightning modules of other people: those that lightly documents, and what timm and Hugging Face add.

Names of attributes, losses, heads and momentum updates are lightly's; sizes are tiny. None of them knows of
adadim_lightning. A batch is ``(views, labels, file names)``.
"""

import copy
from typing import Any

import torch
import torchvision
from lightly.loss import BarlowTwinsLoss, DINOLoss, MSNLoss, NegativeCosineSimilarity, NTXentLoss, VICRegLoss
from lightly.models import utils
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM, heads
from lightning.pytorch import LightningModule
from timm import create_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

DIM_R, DIM_Z = 16, 12
PATCH = 8


def tiny_convnet() -> nn.Sequential:
    """Ends, as lightly's ResNets do, in ``(N, d, 1, 1)``."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, DIM_R, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
    )


def tiny_vit(**options: Any) -> VisionTransformer:
    """A timm ViT for images of any size that the patches divide."""
    size = {"img_size": 32, "patch_size": PATCH, "embed_dim": DIM_R, "depth": 1, "num_heads": 2, "num_classes": 0}
    return VisionTransformer(**(size | options))


class Module(LightningModule):
    """All parameters, momentum branches too, are handed to one optimizer, as lightly's examples do."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06)


class SimCLR(Module):
    def __init__(self, backbone: nn.Module | None = None, dim: int = DIM_R) -> None:
        super().__init__()
        self.backbone = tiny_convnet() if backbone is None else backbone
        self.projection_head = heads.SimCLRProjectionHead(dim, dim, DIM_Z)
        self.criterion = NTXentLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x0, x1), _, _ = batch
        return self.criterion(self.forward(x0), self.forward(x1))


def simclr_resnet18() -> SimCLR:
    return SimCLR(nn.Sequential(*list(torchvision.models.resnet18().children())[:-1]), dim=512)


class MoCo(Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny_convnet()
        self.projection_head = heads.MoCoProjectionHead(DIM_R, DIM_R, DIM_Z)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        utils.deactivate_requires_grad(self.backbone_momentum)
        utils.deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NTXentLoss(memory_bank_size=(64, DIM_Z))

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def forward_momentum(self, x: Tensor) -> Tensor:
        key = self.backbone_momentum(x).flatten(start_dim=1)
        return self.projection_head_momentum(key).detach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        utils.update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        utils.update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
        (x_query, x_key), _, _ = batch
        return self.criterion(self.forward(x_query), self.forward_momentum(x_key))


class BYOL(Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny_convnet()
        self.projection_head = heads.BYOLProjectionHead(DIM_R, 24, DIM_Z)
        self.prediction_head = heads.BYOLPredictionHead(DIM_Z, 24, DIM_Z)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        utils.deactivate_requires_grad(self.backbone_momentum)
        utils.deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x: Tensor) -> Tensor:
        return self.prediction_head(self.projection_head(self.backbone(x).flatten(start_dim=1)))

    def forward_momentum(self, x: Tensor) -> Tensor:
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1)).detach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        utils.update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        utils.update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
        (x0, x1), _, _ = batch
        p0, z0 = self.forward(x0), self.forward_momentum(x0)
        p1, z1 = self.forward(x1), self.forward_momentum(x1)
        return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))


class BarlowTwins(Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny_convnet()
        self.projection_head = heads.BarlowTwinsProjectionHead(DIM_R, 24, DIM_Z)
        self.criterion = BarlowTwinsLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x0, x1), _, _ = batch
        return self.criterion(self.forward(x0), self.forward(x1))


class VICReg(Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny_convnet()
        self.projection_head = heads.VICRegProjectionHead(DIM_R, 24, DIM_Z, num_layers=2)
        self.criterion = VICRegLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x0, x1), _, _ = batch
        return self.criterion(self.forward(x0), self.forward(x1))


class SimSiam(Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny_convnet()
        self.projection_head = heads.SimSiamProjectionHead(DIM_R, 24, DIM_Z)
        self.prediction_head = heads.SimSiamPredictionHead(DIM_Z, 6, DIM_Z)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.projection_head(self.backbone(x).flatten(start_dim=1))
        return z.detach(), self.prediction_head(z)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x0, x1), _, _ = batch
        z0, p0 = self.forward(x0)
        z1, p1 = self.forward(x1)
        return 0.5 * (self.criterion(z0, p1) + self.criterion(z1, p0))


class DINO(Module):
    """Two global views and several local ones, one call for each."""

    def __init__(self) -> None:
        super().__init__()
        backbone = tiny_convnet()
        self.student_backbone = backbone
        self.student_head = heads.DINOProjectionHead(DIM_R, 24, 8, DIM_Z, freeze_last_layer=1)
        self.teacher_backbone = copy.deepcopy(backbone)
        self.teacher_head = heads.DINOProjectionHead(DIM_R, 24, 8, DIM_Z)
        utils.deactivate_requires_grad(self.teacher_backbone)
        utils.deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(output_dim=DIM_Z, warmup_teacher_temp_epochs=5)

    def forward(self, x: Tensor) -> Tensor:
        return self.student_head(self.student_backbone(x).flatten(start_dim=1))

    def forward_teacher(self, x: Tensor) -> Tensor:
        return self.teacher_head(self.teacher_backbone(x).flatten(start_dim=1))

    def forward_student(self, views: list[Tensor]) -> list[Tensor]:
        return [self.forward(view) for view in views]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        utils.update_momentum(self.student_backbone, self.teacher_backbone, m=0.9)
        utils.update_momentum(self.student_head, self.teacher_head, m=0.9)
        views, _, _ = batch
        teacher_out = [self.forward_teacher(view) for view in views[:2]]
        return self.criterion(teacher_out, self.forward_student(views), epoch=self.current_epoch)

    def on_after_backward(self) -> None:
        self.student_head.cancel_last_layer_gradients(current_epoch=self.current_epoch)


class GroupedDINO(DINO):
    """The backbone is called once for each size of crop, local ones first, and the head once for all crops."""

    def forward_student(self, views: list[Tensor]) -> list[Tensor]:
        r = [self.student_backbone(torch.cat(group)).flatten(start_dim=1) for group in (views[2:], views[:2])]
        z = self.student_head(torch.cat(r)).split(len(views[0]))
        return [*z[-2:], *z[:-2]]


class MSN(Module):
    """The anchor network is trained and the target follows; a masked view of full size, several focal ones."""

    def __init__(self) -> None:
        super().__init__()
        self.mask_ratio = 0.25
        self.backbone = MaskedVisionTransformerTIMM(vit=tiny_vit(dynamic_img_size=True))
        self.projection_head = heads.MSNProjectionHead(DIM_R, 24, DIM_Z)
        self.anchor_backbone = copy.deepcopy(self.backbone)
        self.anchor_projection_head = copy.deepcopy(self.projection_head)
        utils.deactivate_requires_grad(self.backbone)
        utils.deactivate_requires_grad(self.projection_head)
        self.prototypes = nn.Linear(DIM_Z, 10, bias=False).weight
        self.criterion = MSNLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        utils.update_momentum(self.anchor_backbone, self.backbone, 0.9)
        utils.update_momentum(self.anchor_projection_head, self.projection_head, 0.9)
        targets, anchors, *focal = batch[0]
        targets_out = self.projection_head(self.backbone(images=targets))
        anchors_out = self.encode_masked(anchors)
        anchors_focal_out = self.encode_masked(torch.concat(focal, dim=0))
        return self.criterion(torch.cat([anchors_out, anchors_focal_out]), targets_out, self.prototypes.data)

    def encode_masked(self, anchors: Tensor) -> Tensor:
        batch_size, _, _, width = anchors.shape
        idx_keep, _ = utils.random_token_mask(
            size=(batch_size, (width // PATCH) ** 2 + 1), mask_ratio=self.mask_ratio, device=self.device
        )
        return self.anchor_projection_head(self.anchor_backbone(images=anchors, idx_keep=idx_keep))


class MAE(Module):
    """One view; the backbone is called by ``encode``, so that only modules within it are."""

    def __init__(self) -> None:
        super().__init__()
        vit = tiny_vit()
        self.mask_ratio = 0.5
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.sequence_length = self.backbone.sequence_length
        self.decoder_embed = nn.Linear(DIM_R, DIM_Z)
        self.decoder = MaskedVisionTransformerDecoderTIMM(vit.patch_embed.num_patches, DIM_Z, depth=1, num_heads=2)
        self.prediction_head = nn.Linear(DIM_Z, 3 * PATCH**2)
        self.criterion = nn.MSELoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (images,), _, _ = batch
        idx_keep, idx_mask = utils.random_token_mask(
            size=(len(images), self.sequence_length), mask_ratio=self.mask_ratio, device=images.device
        )
        encoded = self.decoder_embed(self.backbone.encode(images=images, idx_keep=idx_keep))
        masked = utils.repeat_token(self.decoder.mask_token, (len(images), self.sequence_length))
        decoded = self.decoder(utils.set_at_index(masked, idx_keep, encoded))
        predicted = self.prediction_head(utils.get_at_index(decoded, idx_mask))
        target = utils.get_at_index(utils.patchify(images, PATCH), idx_mask - 1)
        return self.criterion(predicted, target)


class ViT(Module):
    """SimCLR on a Vision Transformer of timm that pools by itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.backbone = create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=PATCH,
            embed_dim=DIM_R,
            depth=1,
            num_heads=2,
            num_classes=0,
            **options,
        )
        self.projection_head = heads.SimCLRProjectionHead(DIM_R, DIM_R, DIM_Z)
        self.criterion = NTXentLoss()

    def represent(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x0, x1), _, _ = batch
        return self.criterion(*(self.projection_head(self.represent(x)) for x in (x0, x1)))


class ViTOfTokens(ViT):
    """The backbone puts out tokens."""

    def __init__(self) -> None:
        super().__init__(global_pool="")

    def represent(self, x: Tensor) -> Tensor:
        return self.backbone(x)[:, 0]


class ViTByFeatures(ViT):
    """The backbone is not called, but its method that makes tokens."""

    def represent(self, x: Tensor) -> Tensor:
        return self.backbone.forward_features(x).mean(dim=1)


class HuggingFaceViT(ViT):
    """The backbone takes images by keyword and puts out an object."""

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(
            hidden_size=DIM_R,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=32,
            patch_size=PATCH,
        )
        self.backbone = ViTModel(config)

    def represent(self, x: Tensor) -> Tensor:
        return self.backbone(pixel_values=x).pooler_output


class ReturnsDictionary(SimCLR):
    """One call for both views; what is of interest is returned beside the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        (x0, x1), _, _ = batch
        r = self.backbone(torch.cat([x0, x1])).flatten(start_dim=1)
        z = self.projection_head(r)
        return {"loss": self.criterion(*z.chunk(2)), "embedding": r, "projection": z}


class ByHand(SimCLR):
    """Manual optimization: one optimizer for the backbone, one for the head; may return nothing."""

    def __init__(self, silent: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.silent = silent

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return None if self.silent else loss.detach()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=0.06) for part in (self.backbone, self.projection_head)]


class TwoTowers(Module):
    """Two backbones, of which each may be meant."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleDict({"backbone": tiny_convnet(), "head": nn.Linear(DIM_R, DIM_Z)})
        self.right = nn.ModuleDict({"backbone": tiny_convnet(), "head": nn.Linear(DIM_R, DIM_Z)})
        self.criterion = NTXentLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x0, x1), _, _ = batch
        towers = ((self.left, x0), (self.right, x1))
        return self.criterion(*(tower["head"](tower["backbone"](x).flatten(start_dim=1)) for tower, x in towers))
