"""The doctests' vocabulary."""

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    import adadim_lightning.functional as functional

    doctest_namespace["torch"] = torch
    doctest_namespace.update({name: getattr(functional, name) for name in functional.__all__})
