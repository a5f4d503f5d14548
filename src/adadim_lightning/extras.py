"""Optional packages, imported when they are needed."""

import importlib
from types import ModuleType


class MissingExtraError(ModuleNotFoundError, ValueError):
    """An optional package is not installed; the message names the line that installs it."""


def require(package: str, extra: str) -> ModuleType:
    """Import a package that only an extra of this one installs.

    Args:
        package: name to import, or one of its submodules, such as ``timm.optim``.
        extra: the extra that brings it.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: the package is not installed. What else goes wrong on import is raised as it is.

    Example:
        >>> require("no_such_package", "timm")
        Traceback (most recent call last):
        adadim_lightning.extras.MissingExtraError: no_such_package is not installed; \
pip install 'adadim-lightning[timm]'
    """
    root = package.partition(".")[0]
    try:
        importlib.import_module(root)
    except ModuleNotFoundError as error:
        if error.name != root:  # installed, but broken
            raise
        message = f"{root} is not installed; pip install 'adadim-lightning[{extra}]'"
        raise MissingExtraError(message, name=root) from error
    return importlib.import_module(package)
