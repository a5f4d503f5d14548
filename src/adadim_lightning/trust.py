"""Which objects a configuration may name: what it instantiates is code that runs."""

import difflib
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

ALLOWED = (
    "adadim_lightning",
    "kornia.augmentation",
    "lightning.pytorch",
    "timm",
    "torch.nn",
    "torch.optim",
    "torchvision.models",
    "torchvision.transforms",
)
# Parts of the above that import what they are told to, unpickle files, upload or start programs.
REFUSED = (
    "adadim_lightning.cli",
    "adadim_lightning.export",
    "adadim_lightning.extras",
    "adadim_lightning.pretrained",
    "lightning.pytorch.cli",
    "lightning.pytorch.core.saving",
    "lightning.pytorch.demos",
    "lightning.pytorch.utilities",
    "timm.data",
    "timm.models._builder",
    "timm.models._helpers",
    "timm.models._hub",
    "timm.task",
    "timm.utils",
)


class UntrustedTargetError(ValueError):
    """A configuration names an object that it may not."""


def check_targets(config: Any, trust: Sequence[str] = ()) -> None:
    """Refuse a configuration that names an object outside the packages that are trusted.

    All names are judged before anything is imported, so that no code of an untrusted module runs. A name must lie
    in one of ``ALLOWED`` (and in none of ``REFUSED``) or in a package of ``trust``, and so must the module that
    defines the object: ``torch.nn.os.system`` is refused. Private names and methods of classes, such as
    ``load_from_checkpoint``, need a line of their own in ``trust``. The objects are not called.

    Args:
        config: nested dicts and lists; each value of a key ``_target_`` is a name.
        trust: further packages, modules or objects, such as ``my_package``.

    Raises:
        UntrustedTargetError: a name is not trusted, does not exist, or is no class or function.

    Example:
        >>> check_targets({"optimizer": {"_target_": "torch.optim.AdamW"}})
        >>> check_targets({"optimizer": {"_target_": "os.system"}})
        Traceback (most recent call last):
        adadim_lightning.trust.UntrustedTargetError: os.system is not trusted; allow it by trust=[os]
    """
    extra = (trust,) if isinstance(trust, str) else tuple(trust)
    names = list(dict.fromkeys(_targets(config)))
    for name in names:
        private = any(part.startswith("_") for part in name.split("."))
        if not _within(name, extra) and (private or not _trusted(name, extra)):
            raise _refusal(name, name)
    for name in names:
        _check_object(name, extra)


def _targets(config: Any) -> Iterator[str]:
    """Every name under ``_target_``, at any depth."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key != "_target_":
                yield from _targets(value)
            elif isinstance(value, str) and all(part.isidentifier() for part in value.split(".")):
                yield value
            else:
                raise UntrustedTargetError(f"_target_ must be a dotted name, got {value!r}")
    elif isinstance(config, Sequence) and not isinstance(config, str | bytes):
        for value in config:
            yield from _targets(value)


def _check_object(name: str, extra: tuple[str, ...]) -> None:
    """Find the object that a trusted name stands for, and refuse it if it comes from elsewhere."""
    path, *parts = name.split(".")
    found: Any = _import(path, name)
    for part in parts:
        owner, path = found, f"{path}.{part}"
        if inspect.isclass(owner) and not _within(name, extra):
            raise _refusal(name, name)
        if isinstance(owner, ModuleType) and not hasattr(owner, part):
            found = _import(path, name, dir(owner))
        elif not hasattr(owner, part):
            raise _missing(path, name, dir(owner))
        else:
            found = getattr(owner, part)
        # Whatever a trusted module has imported is within reach of its name.
        if isinstance(found, ModuleType) and found.__name__ != path and not _trusted(found.__name__, extra):
            raise _refusal(name, f"{found.__name__}.")
    if not inspect.isclass(found) and not inspect.isroutine(found):
        raise UntrustedTargetError(f"{name} is neither a class nor a function")
    home = found.__module__ or "builtins"
    if not _trusted(home, extra):
        raise _refusal(name, f"{home}.")


def _import(path: str, name: str, siblings: Sequence[str] = ()) -> ModuleType:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not _within(path, (error.name,)):  # it is there, but lacks a package it needs
            raise
        raise _missing(path, name, siblings) from error


def _missing(path: str, name: str, siblings: Sequence[str]) -> UntrustedTargetError:
    """The error for a name that leads nowhere."""
    owner, _, part = path.rpartition(".")
    near = difflib.get_close_matches(part, [s for s in siblings if not s.startswith("_")], n=1)
    what = f"{owner} has no {part!r}" if owner else f"{part} is not installed"
    return UntrustedTargetError(f"{name}: {what}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _refusal(name: str, origin: str) -> UntrustedTargetError:
    """The error for a name, and what to trust: a whole package, but only a part of those we know."""
    package = origin.partition(".")[0]
    if any(_within(known, (package,)) for known in ALLOWED):
        package = origin.rpartition(".")[0]
    return UntrustedTargetError(f"{name} is not trusted; allow it by trust=[{package}]")


def _trusted(name: str, extra: tuple[str, ...]) -> bool:
    return _within(name, extra) or (_within(name, ALLOWED) and not _within(name, REFUSED))


def _within(name: str, namespaces: Sequence[str]) -> bool:
    """Whether a dotted name is one of the namespaces or lies in one."""
    return any(f"{name}.".startswith(f"{namespace.rstrip('.')}.") for namespace in namespaces)
