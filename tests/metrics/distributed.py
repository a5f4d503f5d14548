"""Run a function in several gloo processes."""

import itertools
import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing
from torchmetrics import Metric

TIMEOUT_S = 120  # a busy machine takes seconds to start a process, and gloo gives up where one comes late
TRIES = 3


def _run(rank: int, count: int, store: str, call: bytes) -> bytes:
    try:
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
    except RuntimeError as error:
        raise ConnectionError(error) from error
    try:
        function, args = pickle.loads(call)
        return pickle.dumps(function(*args))
    finally:
        distributed.destroy_process_group()


class Processes:
    """Processes that wait for functions; each call is a process group of its own.

    Arguments and results travel as bytes: torch would put all processes' tensors in the same shared memory.

    Args:
        folder: for the files by which they find each other.
        count: number of processes.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self.count = count
        self._calls = itertools.count()
        self._pool = self._start()
        self.run(distributed.get_rank)

    def _start(self) -> Any:
        # As clean as spawn, but the processes share one import of torchmetrics, which takes seconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["adadim_lightning.metrics"])
        return context.Pool(self.count, initializer=torch.set_num_threads, initargs=(1,))

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results of ``function(*args)`` by rank; no process can take two calls, because each call waits."""
        call = pickle.dumps((function, args))
        for left in reversed(range(TRIES)):
            try:
                return list(map(pickle.loads, self._call(call)))
            except ConnectionError:  # gloo's, now and then on a busy machine: nothing has run yet
                if not left:
                    raise
                self.close()  # one that never came to the meeting does not come to the next one either
                self._pool = self._start()
        raise AssertionError

    def _call(self, call: bytes) -> list[bytes]:
        store = str(self._folder / f"store-{next(self._calls)}")
        calls = [(rank, self.count, store, call) for rank in range(self.count)]
        return self._pool.starmap_async(_run, calls, chunksize=1).get(2 * TIMEOUT_S)

    def close(self) -> None:
        self._pool.terminate()
        self._pool.join()


def update_and_compute(metric: Metric, rounds: list[list[list[tuple[Tensor, ...]]]]) -> list[Tensor]:
    """Result after each round; ``rounds[i][rank]`` are the batches that a process sees in round i."""
    results = []
    for batches in rounds:
        for batch in batches[distributed.get_rank()]:
            metric.update(*batch)
        results.append(metric.compute())
    return results
