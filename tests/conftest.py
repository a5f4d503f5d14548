"""Settings shared by all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two xdist workers, and what they start, share two cores

import pytest
import torch
from hypothesis import Phase, settings

from tests.reliability.table import pytest_terminal_summary  # noqa: F401 -- here, because xdist reads no other conftest

torch.set_num_threads(1)

# The same examples each time; for others and more of them: HYPOTHESIS_PROFILE=thorough.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=15, database=None)
settings.register_profile("thorough", deadline=None, max_examples=500, database=None, print_blob=True)
# Where tests run again and again: a failure is all that counts, not its smallest example.
settings.register_profile(
    "mutation", settings.get_profile("ci"), max_examples=5, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start processes of their own, so that ``-m`` can leave them out."""
    for item in items:
        if "two_processes" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.two_processes)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
