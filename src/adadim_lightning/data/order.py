"""Training batches as a function of the seed and of their place: any of them can be the next one again."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, get_worker_info

from adadim_lightning.data.images import ImageSet
from adadim_lightning.data.pixels import DataError
from adadim_lightning.data.views import TwoViews


class Place(NamedTuple):
    """Where a training is: batches of an epoch that were taken."""

    epoch: int
    batches: int


@contextmanager
def seeded(*numbers: int, device: torch.device | None = None) -> Iterator[None]:
    """Random numbers that depend on some integers alone; those of the outside go on as if nothing were drawn.

    Args:
        numbers: what tells these random numbers from all others.
        device: a GPU whose random numbers are wanted too.
    """
    seed = hash(numbers) % 2**63
    states = random.getstate(), np.random.get_state()
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class ShuffledOrder(DistributedSampler[int]):
    """Positions of a process's images in an endless training: ``epoch * images + place in the epoch``.

    The steps of all processes together read the epoch from its beginning, whatever their number, and the last,
    incomplete global batch is left out. :class:`Shuffled` knows which image is at a position.

    Args:
        images: number of images.
        batch_size: images of a step and process.
        processes: number of processes.
        rank: of this process.
        repeat: whether every epoch is like the first.
    """

    def __init__(self, images: int, batch_size: int, processes: int, rank: int, *, repeat: bool = False) -> None:
        # Its kind, so that Lightning leaves it in its place; nothing else is inherited.
        super().__init__(range(images), processes, rank)  # type: ignore[arg-type]
        self.images = images
        self.batch_size = batch_size
        self.repeat = repeat
        self.first_step = 0

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch."""
        super().set_epoch(0 if self.repeat else epoch)

    @property
    def steps(self) -> int:
        """Number of steps of an epoch."""
        return self.images // (self.batch_size * self.num_replicas)

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __iter__(self) -> Iterator[int]:
        for step in range(self.first_step, self.steps):
            place = (step * self.num_replicas + self.rank) * self.batch_size
            yield from range(self.epoch * self.images + place, self.epoch * self.images + place + self.batch_size)


def _views_of(images: Sequence[Tensor], views: TwoViews, *numbers: int) -> tuple[Tensor, Tensor]:
    """Both views of some images of any sizes, one image at a time; the random numbers are those of ``numbers``."""
    pairs = []
    for i, image in enumerate(images):
        with seeded(*numbers, i):
            pairs.append(views.of_one(image))
    view1, view2 = (torch.stack(x) for x in zip(*pairs, strict=True))
    return view1, view2


class Shuffled(Dataset[Any]):
    """Training batches by the positions of their images, in another order each epoch.

    Args:
        images: the training images.
        views: makes both views; None leaves that to others.
        seed: of the order and of the views.
    """

    def __init__(self, images: ImageSet, views: TwoViews | None, seed: int) -> None:
        self.images = images
        self.views = views
        self.seed = seed
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.images))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(hash((self.seed, epoch)) % 2**63)
            self._order = epoch, torch.randperm(len(self.images), generator=generator)
        return int(self._order[1][place])

    def __getitems__(self, positions: Sequence[int]) -> Any:
        """The batch at these positions: images, or both views of them, and their labels."""
        indices, views = [self._index(position) for position in positions], self.views
        if views is None:
            return self.images.__getitems__(indices)
        if views.on_host:
            # From an image's own size, where the views have a size of theirs.
            read = self.images.__getitem__ if views.size is None else self.images.pixels
            pairs = [read(index) for index in indices]
            labels = torch.tensor([label for _, label in pairs])
            return _views_of([image for image, _ in pairs], views, self.seed, positions[0]), labels
        images, labels = self.images.__getitems__(indices)
        with seeded(self.seed, positions[0]):
            return views(images), labels


class Streamed(IterableDataset[Any]):
    """Training batches of a stream.

    Args:
        images: pairs of a uint8 image and a label.
        views: makes both views; None leaves that to others.
        batch_size: images of a step and process; those that fill no batch are left out.
        seed: of the views.
        rank: of this process.
        processes: number of processes.
    """

    def __init__(
        self,
        images: IterableDataset[Any],
        views: TwoViews | None,
        batch_size: int,
        seed: int,
        rank: int,
        processes: int = 1,
    ) -> None:
        self.images = images
        self.views = views
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.processes = processes
        # Workers that live on have a copy of all this from before the first epoch, but share this memory.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Choose what the next iteration reads."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Any]:
        epoch = int(self._epoch)
        if hasattr(self.images, "epoch"):
            self.images.epoch = epoch
        if hasattr(self.images, "share"):
            self.images.share = self.rank, self.processes
        worker = get_worker_info()
        items = iter(self.images)
        for i in count():
            batch = list(islice(items, self.batch_size))
            if len(batch) < self.batch_size:
                return
            yield self._batch(batch, self.seed, self.rank, epoch, worker.id if worker else 0, i)

    def _batch(self, batch: list[tuple[Tensor, int]], *numbers: int) -> Any:
        images, labels = zip(*batch, strict=True)
        known = torch.as_tensor(labels)
        if self.views is not None and self.views.on_host:
            return _views_of(images, self.views, *numbers), known
        stacked = torch.stack(images)
        if self.views is None:
            return stacked, known
        with seeded(*numbers):
            return self.views(stacked), known


class TrainingLoader(DataLoader[Any]):
    """Training batches that can go on after any of them.

    Args:
        dataset: what is read; of a stream, what was trained on already is read again.
        order: in which order; None for a stream.
        first: where the first iteration begins.
        epoch: tells the epoch that an iteration is to read; by default each reads the next.
        group: the processes that read a stream in step, with collectives on the CPU; None for one process.
        options: of ``torch.utils.data.DataLoader``.
    """

    dataset: Shuffled | Streamed

    # Lightning makes some loaders anew, from what it finds under the names of these arguments.
    def __init__(
        self,
        dataset: Shuffled | Streamed,
        *,
        order: ShuffledOrder | None,
        first: Place,
        epoch: Callable[[], int] | None = None,
        group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        if order is not None:
            options |= {"sampler": order, "batch_size": order.batch_size, "collate_fn": _as_it_is}
        super().__init__(dataset, **{"batch_size": None, **options})
        self.order = order
        self.first = first
        self.epoch = epoch
        self.group = group
        self._begun = 0

    def __iter__(self) -> Any:
        # Lightning begins to read before it knows in which epoch it goes on.
        epoch = max(self.epoch(), self.first.epoch) if self.epoch is not None else self.first.epoch + self._begun
        self._begun += 1
        # Lightning begins some epochs twice.
        batches = self.first.batches if epoch == self.first.epoch else 0
        if isinstance(self.dataset, Streamed):
            self.dataset.set_epoch(epoch)
            # In the earlier run, all processes had the batches that are skipped.
            rest: Iterator[Any] = islice(super().__iter__(), batches, None)
            rest = rest if self.group is None else _in_step(rest, self.group)
            return rest if batches else self._some(rest)
        assert self.order is not None
        self.order.set_epoch(epoch)
        self.order.first_step = batches
        return super().__iter__()

    def _some(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Refuse an epoch without a batch: Lightning would begin the next, for ever."""
        batch = next(batches, None)
        if batch is None:
            assert isinstance(self.dataset, Streamed)
            size, processes = self.dataset.batch_size, self.dataset.processes
            each = " for each process" * (processes > 1) + " of one worker" * (self.num_workers > 1)
            raise DataError(f"the stream has no whole batch of {size} images{each}; lower data.batch_size")
        yield batch
        yield from batches

    # Lightning warns of loaders without these two that they cannot go on; the data module keeps the place.

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


def _in_step(batches: Iterator[Any], group: dist.ProcessGroup) -> Iterator[Any]:
    """Yield batches as long as every process has one, and raise an error of any process on all of them."""
    while True:
        batch, error = None, None
        try:
            batch = next(batches, None)
        except Exception as problem:
            error = problem
        state = torch.tensor([error is not None, batch is None], dtype=torch.int32)
        dist.all_reduce(state, dist.ReduceOp.MAX, group=group)
        failed, ended = state.tolist()
        if failed:
            _raise_on_all(error, group)
        if ended:
            return
        yield batch


def _raise_on_all(own: Exception | None, group: dist.ProcessGroup) -> NoReturn:
    kinds: list[Any] = [None] * dist.get_world_size(group)
    text = str(own) if isinstance(own, ValueError | RuntimeError) else f"{type(own).__name__}: {own}"
    dist.all_gather_object(kinds, own and text, group=group)
    if own is not None:
        raise own
    rank, text = next((rank, text) for rank, text in enumerate(kinds) if text is not None)
    raise DataError(f"{text} (in process {rank})")


def _as_it_is(batch: Any) -> Any:
    """Batches are whole already."""
    return batch
