"""Settings shared by all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two xdist workers, and what they start, share two cores

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
