"""Sets of images: in memory as uint8 tensors, or decoded file by file; labels are optional."""

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from adadim_lightning.data.decoding import (
    MODES,
    Encoded,
    check_channels,
    decode_in_thread,
    deep_image,
    fit_square,
    is_broken,
    no_warnings,
)
from adadim_lightning.data.labels import UNLABELED
from adadim_lightning.data.pixels import (
    SAMPLED,
    DataError,
    DeepImage,
    PixelScale,
    check_pixel_range,
    printable,
)
from adadim_lightning.functional._numeric import check_integer

Batch = tuple[Tensor, Tensor]
MOST_NAMED = 10


class UnreadableImagesError(DataError):
    """More images cannot be read than ``max_unreadable`` allows."""


class ImageSet(Dataset[Any]):
    """Images of one set, their labels, and their names.

    Attributes:
        labels: class of each image, shape ``(N,)``, int64; -1 where there is none.
        classes: names of the classes, or None.
        names: file or other name of each image, or None.
        channels: 1 or 3.
    """

    labels: Tensor
    classes: Sequence[str] | None
    names: Sequence[str] | None
    channels: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None where no image has a label."""
        if not self.is_labeled:
            return None
        return int(self.labels.max()) + 1 if self.classes is None else len(self.classes)

    @property
    def is_labeled(self) -> bool:
        """Whether any image has a label."""
        return bool((self.labels >= 0).any())

    @abstractmethod
    def pixels(self, index: int) -> tuple[Tensor, int]:
        """One image as a loader's worker sees it, uint8 ``(C, H, W)``, uncropped, and its label."""

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Images of one size, uint8 ``(B, C, S, S)``, and their labels."""

    def __getitem__(self, index: int) -> Batch:
        """One image and its label."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    @abstractmethod
    def subset(self, indices: Sequence[int]) -> "ImageSet":
        """Some of the images."""

    def _subset_names(self, indices: Sequence[int]) -> Sequence[str] | None:
        return None if self.names is None else [self.names[i] for i in indices]


class MemoryImages(ImageSet):
    """Images as one tensor: a batch is one indexing, not N of them, and an epoch costs no decoding.

    Args:
        images: shape ``(N, C, H, W)``, uint8, C 1 or 3.
        labels: shape ``(N,)``, integers, -1 where there is none; None if no image has one.
        classes: names of the classes.
        names: name of each image.

    Raises:
        ValueError: shapes or types do not fit.

    Example:
        >>> MemoryImages(torch.zeros(4, 1, 8, 8, dtype=torch.uint8)).is_labeled
        False
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        classes: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        labels = torch.full((len(images),), UNLABELED) if labels is None else labels
        if (
            images.ndim != 4
            or images.dtype != torch.uint8
            or images.shape[1] not in MODES
            or labels.shape != images.shape[:1]
        ):
            raise ValueError(
                "images must be uint8 of shape (N, C, H, W) with 1 or 3 channels and labels of shape (N,), got "
                f"{images.dtype} {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        self.images = images
        self.labels = labels.long()
        self.classes = classes
        self.names = names
        self.channels = images.shape[1]

    def pixels(self, index: int) -> tuple[Tensor, int]:
        """One image and its label."""
        return self.images[index], int(self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """One batch, as the data loader asks for it."""
        chosen = torch.as_tensor(indices)
        return self.images[chosen.to(self.images.device)], self.labels[chosen]

    def subset(self, indices: Sequence[int]) -> "MemoryImages":
        """Some of the images."""
        images, labels = self.__getitems__(indices)
        return MemoryImages(images, labels, classes=self.classes, names=self._subset_names(indices))

    def resized(self, size: int | None, channels: int) -> "MemoryImages":
        """The images at another size, the middle of those that are not square, in grey or RGB.

        Args:
            size: of the sides; None leaves them.
            channels: 1 or 3.
        """
        images = self.images
        if images.shape[1] != channels:
            weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
            images = (
                images.expand(-1, 3, -1, -1).contiguous()
                if channels == 3
                else torch.cat(
                    [(x * weights).sum(1, keepdim=True).round().byte() for x in torch.split(images, 1024)]
                )
            )
        if size is not None and images.shape[2:] != (size, size):
            images = torch.cat(
                [center_crop(resize(x, [size], antialias=True), [size, size]) for x in torch.split(images, 1024)]
            )
        if images is self.images:
            return self
        return MemoryImages(images, self.labels, classes=self.classes, names=self.names)


class ImageFiles(ImageSet):
    """Images that are decoded when they are asked for.

    One that cannot be read is left out: in a batch the next readable image stands in for it, without a label.
    They are counted over all worker processes; more than ``max_unreadable`` are an error that names them.

    Args:
        sources: file of each image, or a function that gives its file, bytes or Pillow image.
        labels: shape ``(N,)``, -1 where there is none; None if no image has one.
        image_size: side of the square that each is scaled and cut to; None leaves them, and then all of a
            batch must be equal.
        channels: 1 or 3.
        classes: names of the classes.
        names: name of each image; by default its file.
        max_unreadable: number of images of this set that may be left out.
        pixel_range: values of black and white in images of more than 8 bits; None finds them.

    Attributes:
        scale: from pixels of more than 8 bits to black and white; one for all images.

    Raises:
        ValueError: there is no image, or the arguments do not fit.
    """

    def __init__(
        self,
        sources: Sequence[str] | Callable[[int], Encoded],
        labels: Tensor | None = None,
        *,
        image_size: int | None,
        channels: int = 3,
        classes: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        max_unreadable: int = 100,
        pixel_range: Sequence[float] | None = None,
    ) -> None:
        if image_size is not None:
            check_integer("image_size", image_size, low=1)
        check_channels(channels)
        check_integer("max_unreadable", max_unreadable, low=0)
        if pixel_range is not None:
            check_pixel_range(pixel_range)
        if not callable(sources):
            names = sources if names is None else names
            labels = torch.full((len(sources),), UNLABELED) if labels is None else labels
        if labels is None or not len(labels):
            raise ValueError("there is no image")
        self.sources = sources
        self.labels = labels.long()
        self.image_size = image_size
        self.channels = channels
        self.classes = classes
        self.names = names
        self.max_unreadable = max_unreadable
        self.pixel_range = pixel_range
        self._scale: PixelScale | None = None
        self._reason = ""  # for which the last image could not be read
        # Shared, so that workers and the process that reports see the same count.
        self.unreadable = torch.zeros(len(labels), dtype=torch.bool)
        self.unreadable.share_memory_()  # type: ignore[no-untyped-call]
        self._reported = 0

    @property
    def scale(self) -> PixelScale:
        """The scale of pixels of more than 8 bits; unless set, that of a sample of these images."""
        if self._scale is None:
            self._scale = PixelScale.of(self.deep_sample(), self.pixel_range)
        return self._scale

    @scale.setter
    def scale(self, scale: PixelScale) -> None:
        self._scale = scale

    def deep_sample(self) -> Iterator[DeepImage]:
        """Those of more than 8 bits among some images, spread over the set."""
        for i in torch.linspace(0, len(self) - 1, min(len(self), SAMPLED)).long().tolist():
            try:
                with no_warnings():
                    image = deep_image(self._source(i), self._name(i))
            except Exception as error:
                if not is_broken(error):
                    raise
                continue  # counted where it is decoded
            if image is not None:
                yield image

    def _source(self, index: int) -> Encoded:
        return self.sources(index) if callable(self.sources) else self.sources[index]

    def _name(self, index: int) -> str:
        return f"number {index}" if self.names is None else self.names[index]

    def _open(self, index: int, at_least: int | None = None) -> Image.Image | None:
        try:
            return decode_in_thread(self._source(index), self.channels, at_least, self.scale, self._name(index))
        except Exception as error:
            if not is_broken(error):
                raise
            self.unreadable[index] = True
            no_image = isinstance(error, UnidentifiedImageError)
            self._reason = "it is no image" if no_image else printable(" ".join(str(error).split()))
            if int(self.unreadable.sum()) > self.max_unreadable:
                raise UnreadableImagesError(
                    f"{self._list_unreadable()} (the last: {self._reason}); that is more than max_unreadable="
                    f"{self.max_unreadable}, which holds for training and held-out images each: remove or mend "
                    "them, or raise data.max_unreadable"
                ) from None
            return None

    def _list_unreadable(self) -> str:
        bad = self.unreadable.nonzero().flatten().tolist()
        named = [printable(self._name(i)) for i in bad[:MOST_NAMED]]
        more = f" and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
        return f"{len(bad)} of {len(self):,} images cannot be read: {', '.join(named)}{more}"

    def news_of_unreadable(self) -> str | None:
        """A line on the images that were left out, if there are more than at the last call."""
        count = int(self.unreadable.sum())
        if count == self._reported:
            return None
        self._reported = count
        return f"{self._list_unreadable()}; left out"

    def _readable(self, index: int, at_least: int | None = None) -> tuple[Image.Image, int]:
        for i in range(index, index + len(self)):
            image = None if self.unreadable[i % len(self)] else self._open(i % len(self), at_least)
            if image is not None:
                return image, int(self.labels[i]) if i == index else UNLABELED
        last = f" (the last: {self._reason})" if self._reason else ""
        raise UnreadableImagesError(
            f"none of the {len(self):,} images can be read, {self._list_unreadable()}{last}"
        )

    @no_warnings()
    def pixels(self, index: int) -> tuple[Tensor, int]:
        """One image at its own size, and its label."""
        image, label = self._readable(index)
        return pil_to_tensor(image), label

    @property
    def _enough(self) -> int | None:
        return None if self.image_size is None else 2 * self.image_size

    def _square(self, image: Image.Image) -> Tensor:
        pixels: Tensor = pil_to_tensor(image if self.image_size is None else fit_square(image, self.image_size))
        return pixels

    @no_warnings()
    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """One batch, decoded."""
        images, labels = zip(*(self._readable(i, self._enough) for i in indices), strict=True)
        squares = [self._square(image) for image in images]
        for square in squares:
            _check_equal(square, squares[0])
        return torch.stack(squares), torch.tensor(labels)

    def subset(self, indices: Sequence[int]) -> "ImageFiles":
        """Some of the images."""
        sources = self.sources
        part = ImageFiles(
            _Chosen(sources, indices) if callable(sources) else [sources[i] for i in indices],
            self.labels[torch.as_tensor(indices)],
            image_size=self.image_size,
            channels=self.channels,
            classes=self.classes,
            names=self._subset_names(indices),
            max_unreadable=self.max_unreadable,
            pixel_range=self.pixel_range,
        )
        part._scale = self._scale
        return part

    @no_warnings()
    def decode_all(self) -> MemoryImages:
        """All readable images in memory."""
        first = self._square(self._readable(0, self._enough)[0])
        images = first.new_empty(len(self), *first.shape)

        def read(index: int) -> bool:
            image = self._open(index, self._enough)
            if image is not None:
                square = self._square(image)
                _check_equal(square, first)
                images[index] = square
            return image is not None

        # Pillow decodes without Python's lock.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            readable = torch.tensor(list(pool.map(read, range(len(self)))))
        if bool(readable.all()):
            return MemoryImages(images, self.labels, classes=self.classes, names=self.names)
        names = self._subset_names(readable.nonzero().flatten().tolist())
        return MemoryImages(images[readable], self.labels[readable], classes=self.classes, names=names)


class _Chosen:
    """Some of the images of a function; unlike a lambda, it can be sent to another process."""

    def __init__(self, sources: Callable[[int], Encoded], indices: Sequence[int]) -> None:
        self.sources = sources
        self.indices = indices

    def __call__(self, index: int) -> Encoded:
        return self.sources(self.indices[index])


def _check_equal(image: Tensor, first: Tensor) -> None:
    if image.shape != first.shape:
        shown = " and ".join(f"{x.shape[1]} x {x.shape[2]}" for x in (first, image))
        raise DataError(f"the images differ in size ({shown}); set data.image_size=224, or another size")
