"""The cluster that the tests of this folder share."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from .cluster import CannotStartError, Cluster, slurm_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        try:
            running = stack.enter_context(slurm_cluster())
        except CannotStartError as reason:
            pytest.skip(f"no Slurm here: {reason}")
        yield running
