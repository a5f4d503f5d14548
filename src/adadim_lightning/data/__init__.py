"""Data modules, and the views that they hand to the model."""

from adadim_lightning.data.digits import digits
from adadim_lightning.data.folder import image_folder
from adadim_lightning.data.huggingface import huggingface
from adadim_lightning.data.images import ImageFiles, ImageSet, MemoryImages, UnreadableImagesError
from adadim_lightning.data.medmnist import medmnist
from adadim_lightning.data.module import ImageData
from adadim_lightning.data.torchvision import torchvision_images
from adadim_lightning.data.views import TwoViews

__all__ = [
    "ImageData",
    "ImageFiles",
    "ImageSet",
    "MemoryImages",
    "TwoViews",
    "UnreadableImagesError",
    "digits",
    "huggingface",
    "image_folder",
    "medmnist",
    "torchvision_images",
]
