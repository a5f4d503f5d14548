"""Settings shared by all tests."""

import pytest
import torch

torch.set_num_threads(1)  # two xdist workers share two cores


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
