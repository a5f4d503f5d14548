"""Streams that several processes read: equally many batches for each, whatever they skip."""

import multiprocessing
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback
from torch import distributed
from torch.utils.data import IterableDataset

from adadim_lightning.callbacks import RunCheckpoints
from adadim_lightning.data import ImageData, huggingface
from tests.data.pictures import encode, pixels, views
from tests.helpers import fit, tiny_module
from tests.metrics.conftest import two_processes  # noqa: F401
from tests.metrics.distributed import Processes
from tests.test_distributed import ddp_trainer

BATCH = 4
Epochs = list[list[list[int]]]


def write(folder: Path, sizes: list[int], *, broken: Any = (), empty: Any = ()) -> Path:
    """Parquet files of so many rows each, whose labels are the numbers of the rows."""
    folder.mkdir(exist_ok=True)
    start = 0
    for i, size in enumerate(sizes):
        numbers = range(start, start := start + size)
        pictures = [
            b"oops" if n in broken else None if n in empty else encode(pixels(n, 8, 8, 1)) for n in numbers
        ]
        table = {"image": pa.array(pictures, pa.binary()), "label": pa.array(numbers, pa.int64())}
        pq.write_table(pa.table(table), folder / f"train-{i:05d}.parquet")
    return folder


class Own(IterableDataset[Any]):
    """Somebody's stream, which gives more to the first process, and fails there if it is to."""

    def __init__(self, sizes: list[int], *, fails: bool = False) -> None:
        self.sizes = sizes
        self.fails = fails
        self.share = 0, 1

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        rank, processes = self.share
        for i in range(self.sizes[rank]):
            yield torch.full((1, 8, 8), i, dtype=torch.uint8), i * processes + rank
        if self.fails and rank == 0:
            raise ConnectionResetError("the server is gone")


class Seen(Callback):
    """The labels of each batch of each epoch."""

    def __init__(self) -> None:
        self.epochs: Epochs = []
        self._epoch = -1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch != self._epoch:
            self._epoch = trainer.current_epoch
            self.epochs.append([])
        self.epochs[-1].append(batch[1].tolist())


def train(source: Path | IterableDataset[Any], *callbacks: Callback, **options: Any) -> Epochs | str:
    """What this process has trained on, or how it failed."""
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have workers
    multiprocessing.set_start_method("fork", force=True)  # which need not import everything anew
    own = {key: options.pop(key) for key in ("num_workers", "shuffle_buffer", "max_unreadable") if key in options}
    common: dict[str, Any] = {"views": views(1), "batch_size": BATCH, "num_workers": 0}
    warnings.simplefilter("ignore")
    if isinstance(source, Path):
        shuffled = {"shuffle_buffer": 8, "streaming": True, "channels": 1, "pixel_range": None}
        data = huggingface(str(source), **{**common, **shuffled, **own})
    else:
        data = ImageData(source, None, **{**common, **own})
    seen = Seen()
    resume = options.pop("ckpt_path", None)
    options = {"max_epochs": 2, "enable_progress_bar": False} | options
    try:
        if distributed.is_initialized():
            trainer = ddp_trainer([seen, *callbacks], **options)
            trainer.fit(tiny_module(), datamodule=data, ckpt_path=resume, weights_only=True)
        else:
            fit(tiny_module(), data, seen, *callbacks, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return seen.epochs


def both(processes: Processes, source: Path | IterableDataset[Any], *callbacks: Callback, **options: Any) -> Any:
    return processes.run(Call(source, callbacks, options))


class Call:
    """A training with its arguments, which can be sent."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __call__(self) -> Epochs | str:
        source, callbacks, options = self.arguments
        return train(source, *callbacks, **options)


@pytest.mark.parametrize(
    ("sizes", "workers", "batches"),
    [
        ([26, 7], 0, 33 // 8),
        ([26, 7], 2, 26 // 8 + 7 // 8),
        ([5, 9, 20], 0, 34 // 8),
        ([25, 1, 8], 2, None),
        ([33], 0, 33 // 8),
    ],
)
def test_files_of_any_sizes_give_every_process_as_many_batches(
    sizes: list[int],
    workers: int,
    batches: int | None,
    tmp_path: Path,
    two_processes: Processes,  # noqa: F811
) -> None:
    first, second = both(two_processes, write(tmp_path / "d", sizes), num_workers=workers)
    for mine, others in zip(first, second, strict=True):
        assert len(mine) == len(others) > 0
        assert len(mine) == batches or batches is None
        seen = Counter(number for batch in mine + others for number in batch)
        assert set(seen.values()) == {1}, "an image came twice"
        assert sum(sizes) - len(seen) < 2 * BATCH * max(workers, 1), "more is left out than a last batch"
    assert first[0] != first[1], "another order in each epoch"


@pytest.mark.parametrize("buffer", [1, 8])
@pytest.mark.parametrize("bad", [range(0, 40, 2), range(14), [0, 8, 9]], ids=["every second", "a file", "some"])
@pytest.mark.parametrize("kind", ["broken", "empty"])
def test_pictures_that_one_process_skips_cost_the_others_no_more_than_a_batch(
    kind: str,
    bad: Any,
    buffer: int,
    tmp_path: Path,
    two_processes: Processes,  # noqa: F811
) -> None:
    folder = write(tmp_path / "d", [14, 26], **{kind: bad})
    first, second = both(two_processes, folder, shuffle_buffer=buffer, max_epochs=1)
    assert len(first[0]) == len(second[0]) > 0
    seen = [number for batch in first[0] + second[0] for number in batch]
    assert len(seen) == len(set(seen))
    assert not set(seen) & set(bad)
    # A process that met more broken pictures than the other ends earlier, by no more than these.
    uneven = 2 * BATCH if kind == "broken" else 0
    assert 40 - len(bad) - len(seen) < 2 * BATCH + uneven


def test_ones_own_stream_ends_everywhere_with_the_first_that_ends(two_processes: Processes) -> None:  # noqa: F811
    first, second = both(two_processes, Own([21, 10]), max_epochs=1)
    assert first == [[[0, 2, 4, 6], [8, 10, 12, 14]]]
    assert second == [[[1, 3, 5, 7], [9, 11, 13, 15]]]


@pytest.mark.parametrize("options", [{"limit_train_batches": 2}, {"max_steps": 5, "max_epochs": -1}])
def test_limits_of_the_trainer_hold(options: Any, two_processes: Processes) -> None:  # noqa: F811
    first, second = both(two_processes, Own([21, 14]), **options)
    expected = [2, 2] if "limit_train_batches" in options else [3, 2]
    assert [len(epoch) for epoch in first] == [len(epoch) for epoch in second] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_process_that_meets_too_many_unreadable_pictures_ends_all_with_its_line(
    workers: int,
    tmp_path: Path,
    two_processes: Processes,  # noqa: F811
) -> None:
    folder = write(tmp_path / "d", [20, 20], broken=[5, 6])
    lines = both(two_processes, folder, max_unreadable=0, shuffle_buffer=1, num_workers=workers)
    reason = "1 images of the stream cannot be read, more than max_unreadable=0; raise data.max_unreadable, or"
    assert all(reason in line and "\n" not in line for line in lines)
    assert any(line.startswith("UnreadableImagesError") for line in lines)


def test_an_error_in_the_stream_of_one_process_ends_all(two_processes: Processes) -> None:  # noqa: F811
    first, second = both(two_processes, Own([6, 30], fails=True))
    assert first == "ConnectionResetError: the server is gone"
    assert second == "DataError: ConnectionResetError: the server is gone (in process 0)"


def test_a_stream_without_a_whole_batch_is_refused(two_processes: Processes) -> None:  # noqa: F811
    line = "DataError: the stream has no whole batch of 4 images{}; lower data.batch_size"
    assert both(two_processes, Own([9, 3])) == [line.format(" for each process")] * 2
    assert train(Own([3])) == line.format("")  # Lightning would begin epochs for ever


@pytest.mark.parametrize("workers", [0, 2])
def test_training_resumes_within_an_epoch_of_a_stream(
    workers: int,
    tmp_path: Path,
    two_processes: Processes,  # noqa: F811
) -> None:
    folder = write(tmp_path / "d", [26, 31], broken=[3, 5, 7, 40])
    # The last checkpoint within the first epoch.
    saving = RunCheckpoints(tmp_path / "c", every_n_steps=1, keep=20)
    whole = both(two_processes, folder, saving, num_workers=workers)
    for step in (2, len(whole[0][0]) - 1):
        path = tmp_path / "c" / f"epoch=0000-step={step:06d}.ckpt"
        rest = both(two_processes, folder, num_workers=workers, ckpt_path=str(path))
        assert rest == [[epochs[0][step:], epochs[1]] for epochs in whole]
    # Else nobody can end the processes any more.
    assert two_processes.run(signal.getsignal, signal.SIGTERM) == [signal.SIG_DFL] * 2
