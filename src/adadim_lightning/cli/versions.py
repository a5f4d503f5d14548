"""Versions of what a run depends on."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "adadim-lightning",
    "torch",
    "lightning",
    "torchvision",
    "torchmetrics",
    "hydra-core",
    "kornia",
    "scikit-learn",
    "numpy",
    "wandb",
)


def own_version() -> str:
    """Name and version of this package, as ``--version`` prints them."""
    return f"{PACKAGES[0]} {version(PACKAGES[0])}"


def versions() -> dict[str, str]:
    """Version of Python, the platform and each package that is installed."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
