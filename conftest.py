"""The doctests' vocabulary."""

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    from adadim_lightning import functional, metrics

    doctest_namespace["torch"] = torch
    for module in (functional, metrics):
        doctest_namespace.update({name: getattr(module, name) for name in module.__all__})
