"""Two gloo processes, started once for the tests that ask for them."""

from collections.abc import Iterator

import pytest

from .distributed import TwoProcesses


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoProcesses]:
    processes = TwoProcesses(tmp_path_factory.mktemp("gloo"))
    yield processes
    processes.close()
