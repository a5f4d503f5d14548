"""The LightningDataModule: two views of each training image, clean held-out images."""

import atexit
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from adadim_lightning.data.images import Batch, ImageFiles, ImageSet, MemoryImages
from adadim_lightning.data.labels import MOST_CLASSES
from adadim_lightning.data.order import Place, Shuffled, ShuffledOrder, Streamed, TrainingLoader, seeded
from adadim_lightning.data.pixels import DataError, PixelScale
from adadim_lightning.data.views import TwoViews
from adadim_lightning.distributed import of_all_processes, world_size
from adadim_lightning.epochs import epochs_ended, forget_cut_epoch, within_epoch
from adadim_lightning.functional._numeric import check_integer

MOST_ON_DEVICE = 8 * 2**30
MOST_WORKERS = 1024
EVALUATION_BATCH = 512
EXIT_S = 1.0
EVALUATION_PIXELS = 64 * 224**2  # of a batch; without gradients, yet on any machine


class ImageData(LightningDataModule):
    """Two views of each training image for training, clean held-out images for validation.

    The uint8 batch goes to the device, and the views are made there; on a CPU with ``num_workers`` the workers
    make them, and so they do for views of the torchvision backend, one image at a time. Images in memory are
    moved to the GPU once, where one is used. Without labels there is no validation.

    Args:
        train: training images, with or without labels; or a stream (``IterableDataset``) of pairs of a uint8
            image and a label. Before each epoch ``epoch`` is set on it if it has that attribute, and
            ``share = rank, processes`` likewise; what it then yields is up to it. An epoch ends on all processes
            with the first that has no whole batch left.
        test: held-out images; None where there are none.
        views: makes the two views, and the clean image.
        batch_size: images per step and process; the last, incomplete batch of an epoch is left out.
        num_workers: processes that load; None takes what suits: none for images in memory, else one for each
            core, up to 8.
        title: name of the data set, for messages.

    Attributes:
        scale: of pixels of more than 8 bits; None where nothing tells it.

    Raises:
        ValueError: ``batch_size`` is below 2 or above the number of training images, channels differ, or labels
            are no numbers of classes.
    """

    def __init__(
        self,
        train: ImageSet | IterableDataset[Any],
        test: ImageSet | None,
        *,
        views: TwoViews,
        batch_size: int = 256,
        num_workers: int | None = None,
        title: str = "images",
    ) -> None:
        super().__init__()
        check_integer("batch_size", batch_size, low=2)
        if num_workers is not None:
            check_integer("num_workers", num_workers, low=0)
            if num_workers > MOST_WORKERS:
                raise ValueError(f"num_workers must be at most {MOST_WORKERS}, got {num_workers}")
        if isinstance(train, ImageSet) and batch_size > len(train):
            raise ValueError(
                f"batch_size must not exceed the number of training images, {len(train)}; got {batch_size}"
            )
        for images in (train, test):
            if (
                isinstance(images, ImageSet)
                and images.classes is None
                and (images.num_classes or 0) > MOST_CLASSES
            ):
                raise ValueError(
                    f"labels must number the classes from 0, at most {MOST_CLASSES:,} of them, got one of "
                    f"{int(images.labels.max())}: labels = labels.unique(return_inverse=True)[1] numbers them"
                )
        self.train = train
        self.test = test
        self.views = views
        self.batch_size = batch_size
        self.title = title
        self.scale: PixelScale | None = getattr(train, "scale", None)
        self._order_seed: int | None = None
        self._resumed: tuple[int, Place] | None = None
        self._group: Any = None  # of processes that read a stream
        decodes = views.on_host or not isinstance(train, MemoryImages)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.num_workers = (min(cores, 8) if decodes else 0) if num_workers is None else num_workers

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None without labels."""
        # Either part may lack an image of the last class.
        return (
            max((x.num_classes or 0 for x in (self.train, self.test) if isinstance(x, ImageSet)), default=0)
            or None
        )

    @property
    def is_labeled(self) -> bool:
        """Whether there are labels to learn from, and to score on."""
        labeled = bool(getattr(self.train, "is_labeled", True))  # of a stream it may not be known
        return labeled and self.test is not None and self.test.is_labeled

    def __str__(self) -> str:
        """One line on the data."""
        size = f"{len(self.train):,}" if isinstance(self.train, ImageSet) else "a stream of"
        channels, height, width = self.image_shape
        kind = "grey" if channels == 1 else "RGB"
        labeled = bool(getattr(self.train, "is_labeled", False))
        plural = "" if self.num_classes == 1 else "es"
        classes = f"{self.num_classes} class{plural}" if self.num_classes else "labels" if labeled else "no labels"
        held_out = f"; {len(self.test):,} held out" if self.test is not None else "; none held out" * labeled
        workers = f"by {self.num_workers} workers" if self.num_workers else "in this process"
        where = "in memory" if isinstance(self.train, MemoryImages) else f"decoded {workers}"
        return f"{self.title}: {size} images, {kind}, {height} x {width}, {classes}{held_out}; {where}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """What the model sees: channels, height, width."""
        return tuple(self.views.clean(self.sample(1)[0])[0].shape)  # type: ignore[return-value]

    def sample(self, count: int) -> Batch:
        """The first training images, uint8 ``(N, C, S, S)``, and their labels; of a stream, of its test split."""
        source = self.train if isinstance(self.train, ImageSet) else self.test
        if source is None:
            # Filling a buffer to shuffle would take long.
            in_order = cast(Iterable[Any], getattr(self.train, "in_order", self.train))
            rows = list(islice(in_order, count))
            if not rows:
                raise DataError("the stream has no image that can be read")
            images, labels = default_collate(rows)
            return images, labels
        images, labels = source.__getitems__(range(min(count, len(source))))
        return images.cpu(), labels

    # Loaders.

    def _in_workers(self) -> bool:
        """Whether workers make the views of the batch: on a CPU they are what else would compute."""
        on_cpu = self.trainer is None or self.trainer.strategy.root_device.type == "cpu"
        return self.views.on_host or (self.num_workers > 0 and on_cpu)

    def setup(self, stage: str) -> None:
        """Forget an earlier fit, and move images in memory to the GPU that trains."""
        self._resumed = None
        if self.trainer is not None and stage == "fit":
            forget_cut_epoch(self.trainer)
            if isinstance(self.train, IterableDataset) and world_size() > 1:
                self._group = dist.new_group(backend="gloo")
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        if device.type == "cuda" and not self._in_workers():
            for images in (self.train, self.test):
                if isinstance(images, MemoryImages) and images.images.numel() <= MOST_ON_DEVICE:
                    images.images = images.images.to(device)

    def train_dataloader(self) -> TrainingLoader:
        """Shuffled training batches, each epoch in another order, which the seed of the run decides."""
        views = self.views if self._in_workers() else None
        processes, rank, seed, first, repeat = 1, 0, torch.initial_seed(), Place(0, 0), False
        if self.trainer is not None:
            processes, rank = self.trainer.world_size, self.trainer.global_rank
            first, repeat = self._place(), self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
            if first.epoch and self._order_seed is not None:
                seed = self._order_seed  # the trainer asks for a loader anew
            else:
                seed = self.trainer.strategy.broadcast(seed)
        if self._resumed is not None:
            (seed, first), self._resumed = self._resumed, None
        self._order_seed = seed
        self._views_seed = hash((seed, rank)) % 2**63
        source: Shuffled | Streamed
        if isinstance(self.train, IterableDataset):
            source, order = Streamed(self.train, views, self.batch_size, seed, rank, processes), None
        else:
            source = Shuffled(self.train, views, seed)
            order = ShuffledOrder(len(self.train), self.batch_size, processes, rank, repeat=repeat)
        epoch = None if self.trainer is None else lambda: self._place().epoch
        options = self._options(self.train, views)
        group = None
        if order is None and processes > 1:
            group = self._group
            # Files are dealt out to the workers: all processes have to do so alike, whatever their cores.
            options["num_workers"] = min(of_all_processes(options["num_workers"]))
            options["persistent_workers"] &= options["num_workers"] > 0
        return TrainingLoader(source, order=order, first=first, epoch=epoch, group=group, **options)

    def state_dict(self) -> dict[str, int]:
        """The seed, and the next batch to train on."""
        if self.trainer is None or self._order_seed is None:
            return {}
        epoch, batches = self._place()
        return {
            "seed": self._order_seed,
            "epoch": epoch,
            "batches": batches,
            "global_batch": self.batch_size * self.trainer.world_size,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from :meth:`state_dict`."""
        if self.trainer is None or self.trainer.state.fn != "fit":
            return  # a trainer that validates or tests restores this too
        self.trainer.fit_loop._combined_loader = None  # somebody may have asked for a loader before this
        # Batches may be of another size now, or of more processes.
        was = state_dict["batches"]
        batches = was * state_dict["global_batch"] // (self.batch_size * self.trainer.world_size)
        self._resumed = state_dict["seed"], Place(state_dict["epoch"], batches)
        loops = self.trainer._checkpoint_connector._loaded_checkpoint["loops"]  # restored after this
        current = loops["fit_loop"]["epoch_loop.batch_progress"]["current"]
        current.update({name: count + batches - was for name, count in current.items()})

    def _place(self) -> Place:
        """Where the training is, by the trainer's own count."""
        assert self.trainer is not None
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        # Between two epochs, the number of batches is still that of the one before.
        return Place(epochs_ended(self.trainer), batches if within_epoch(self.trainer) else 0)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Held-out batches; none without labels."""
        if self.test is None or not self.is_labeled:
            return []
        return self.loader(self.test)

    def loader(self, images: ImageSet, *, clean: bool = False) -> DataLoader[Batch]:
        """Batches of a set in its order.

        Args:
            images: the training or the held-out set, or another.
            clean: normalized images instead of uint8.
        """
        prepare = self.views.clean if clean else None
        return DataLoader(
            images,
            max(1, min(EVALUATION_BATCH, EVALUATION_PIXELS // math.prod(self.image_shape[1:]))),
            collate_fn=_Collate(prepare),  # type: ignore[arg-type]
            **self._options(images),
        )

    def _options(self, source: Dataset[Any], views: TwoViews | None = None) -> dict[str, Any]:
        """How a loader reads images."""
        # Images in memory are indexed faster than sent, and images on a GPU cannot be sent.
        workers = 0 if isinstance(source, MemoryImages) and views is None else self.num_workers
        on_device = isinstance(source, MemoryImages) and source.images.is_cuda
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "worker_init_fn": _outlive_sigterm,
            "pin_memory": torch.cuda.is_available() and not on_device,
            # The numbers that torch draws for its workers would move the random state of the model.
            "generator": torch.Generator().manual_seed(0),
        }

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Make the views, or the clean images, on the device."""
        images, labels = batch
        if not isinstance(images, Tensor):
            return images, labels  # the workers have made the views
        assert self.trainer is not None
        if self.trainer.training:
            with seeded(self._views_seed, *self._place(), device=images.device):
                return self.views(images), labels
        return self.views.clean(images), labels

    def teardown(self, stage: str) -> None:
        """Say which images could not be read."""
        self._group = None
        self.report_unreadable()

    def report_unreadable(self) -> None:
        """Warn of images that could not be read, once for each new count."""
        for images in (self.train, self.test):
            news = images.news_of_unreadable() if isinstance(images, ImageFiles) else None
            if news is not None:
                rank_zero_warn(news)


def _outlive_sigterm(worker: int) -> None:
    """Clusters tell all processes of a job to stop; a training needs its workers until it has ended its step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # they end with the process that reads from them


@atexit.register
def _end_workers() -> None:
    """End what Python would at the exit, but wait no longer than ``EXIT_S``: workers ignore to be terminated.

    Of an iterator that is left by the loop there are none any more; one that is still kept has its own.
    """
    workers = [x for x in multiprocessing.active_children() if x.daemon]
    for worker in workers:
        worker.terminate()
    until = time.monotonic() + EXIT_S
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's would take a killed one for an error
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))
        if worker.is_alive():
            worker.kill()


class _Collate:
    """Hands on a batch that is stacked already, prepared."""

    def __init__(self, prepare: Callable[[Tensor], Tensor] | None) -> None:
        self.prepare = prepare

    def __call__(self, batch: Batch) -> Batch:
        images, labels = batch
        return (images if self.prepare is None else self.prepare(images)), labels
