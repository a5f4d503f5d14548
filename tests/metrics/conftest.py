"""Gloo processes, started once for the tests that ask for them."""

from collections.abc import Iterator

import pytest

from .distributed import Processes


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    processes = Processes(tmp_path_factory.mktemp("gloo"), 2)
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def four_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    processes = Processes(tmp_path_factory.mktemp("gloo"), 4)
    yield processes
    processes.close()
