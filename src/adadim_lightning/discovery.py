"""Finds the backbone and the projection head of somebody else's module, and lists what there is to choose from."""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# The last part of the dotted name, with the field's prefixes and suffixes of a student.
_STUDENT = r"(student_|online_|anchor_|query_|base_)?{}(_q|_query|_student|_online)?"
_REPRESENTATION = re.compile(_STUDENT.format("(backbone|encoder|trunk|feature_extractor)"))
_PROJECTION = re.compile(_STUDENT.format("(projection_head|projector|projection|proj_head|projection_mlp)"))
_HEAD = re.compile(_STUDENT.format("(head|mlp_head)"))
_MOMENTUM = re.compile(r"(^|[._])(momentum|teacher|target|ema|key|k)($|[._])")

_SURVEY_DEPTH = 3
_SURVEY_LINES = 30


def _is_trained(module: nn.Module) -> bool:
    """Whether a module learns, or has nothing to learn; a momentum branch is frozen."""
    parameters = list(module.parameters())
    return not parameters or any(p.requires_grad for p in parameters)


def _outermost(names: list[str]) -> list[str]:
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _matches(module: nn.Module, pattern: re.Pattern[str]) -> list[str]:
    names = [
        name
        for name, _ in module.named_modules()
        if pattern.fullmatch(name.rpartition(".")[2]) and not _MOMENTUM.search(name)
    ]
    # Beside others a frozen one is a momentum branch; alone it is one that does not train, or not yet.
    return [name for name in names if _is_trained(module.get_submodule(name))] or names


def _student(module: nn.Module, name: str) -> str:
    """The student inside a wrapper of student and teacher."""
    children = [child for child, _ in module.get_submodule(name).named_children()]
    return next((f"{name}.{child}" for child in ("student", "online") if child in children), name)


def _only(module: nn.Module, names: list[str], what: str, argument: str) -> str:
    if len(names) == 1:
        return _student(module, names[0])
    found = f"{len(names)} were found: {', '.join(names)}" if names else "none was found by its name"
    raise LookupError(f"{type(module).__name__}: which submodule is the {what}? {found}; give {argument}=...")


def _backbones(module: nn.Module) -> list[str]:
    names = _matches(module, _REPRESENTATION)
    parents = [{name.rpartition(".")[0] for name in some} for some in (names, _matches(module, _PROJECTION))]
    # An "encoder" that is made of a backbone and a projection head puts out Z.
    return _outermost([name for name in names if not all(name in some for some in parents)])


def find_representation(module: nn.Module) -> str:
    """Dotted name of the backbone.

    Raises:
        LookupError: none or several have such a name.
    """
    return _only(module, _backbones(module), "backbone", "representation")


def find_embedding(module: nn.Module, representation: str | None) -> str:
    """Dotted name of the projection head, which is no part of the backbone.

    Raises:
        LookupError: none or several have such a name.
    """
    backbones = _backbones(module)
    if representation is not None:
        backbones.append(representation.partition("[")[0])

    def outside(names: list[str]) -> list[str]:
        # A backbone has projections of its own, such as that of the patches.
        inside = [name for name in names if any(name.startswith(f"{backbone}.") for backbone in backbones)]
        return _outermost([name for name in names if name not in inside])

    names = outside(_matches(module, _PROJECTION)) or outside(_matches(module, _HEAD))
    return _only(module, names, "projection head", "embedding")


def tensors_of(output: Any) -> Iterator[tuple[Any, Tensor]]:
    """The tensors that a module's output consists of, with the key of each (None: the output is one)."""
    if isinstance(output, Tensor):
        yield None, output
        return
    if isinstance(output, tuple | list):
        items: Any = enumerate(output)
    elif hasattr(output, "items"):
        items = output.items()
    else:
        items = vars(output).items() if hasattr(output, "__dict__") else ()
    yield from ((key, value) for key, value in items if isinstance(value, Tensor))


def is_compiled(module: nn.Module, name: str = "") -> bool:
    """Whether a module of this name was compiled, or is part of one that was."""
    whole = getattr(module, "_compiler_ctx", None) is not None  # a LightningModule
    return whole or "_orig_mod" in name or module._compiled_call_impl is not None


class Survey:
    """Notes which submodules are called in one step, and the shapes of what they put out.

    Compiled submodules are not looked into: a hook would make the compiler begin anew.
    """

    def __init__(self, module: nn.Module) -> None:
        self._seen: dict[str, list[str]] = {}
        self._handles: list[RemovableHandle] = []
        if is_compiled(module):
            return
        for name, submodule in module.named_modules():
            scripted = isinstance(submodule, torch.jit.ScriptModule)  # takes no hooks
            if name and name.count(".") < _SURVEY_DEPTH and not (scripted or is_compiled(submodule, name)):
                self._handles.append(submodule.register_forward_hook(partial(self._note, name)))

    def __deepcopy__(self, memo: Any) -> "Survey":
        # A copy of the model, such as a teacher, is not surveyed.
        return Survey(nn.Module())

    def _note(self, name: str, submodule: nn.Module, inputs: Any, output: Any) -> None:
        shapes = [
            f"[{key}] {tuple(x.shape)}" if key is not None else f"{tuple(x.shape)}"
            for key, x in tensors_of(output)
            # Maps larger than a pixel are of no use as rows.
            if x.ndim in (2, 3) or (x.ndim == 4 and x.shape[2:].numel() == 1)
        ]
        if shapes and self._handles:
            self._seen.setdefault(name, []).append(" ".join(shapes))

    def table(self) -> str:
        """One line for each submodule that put out something that could be R or Z."""
        if not self._seen:
            return ""
        lines = []
        for name, calls in self._seen.items():
            different = list(dict.fromkeys(calls))
            times = f", {len(calls)} calls" if len(calls) > 1 else ""
            lines.append(f"  {name}: {'; '.join(different)}{times}")
        if len(lines) > _SURVEY_LINES:
            # The outer modules are the likelier ones.
            outer = sorted(sorted(range(len(lines)), key=lambda i: list(self._seen)[i].count("."))[:_SURVEY_LINES])
            lines = [lines[i] for i in outer] + [f"  and {len(lines) - _SURVEY_LINES} more within these"]
        return "\nSubmodules of this step and what they put out:\n" + "\n".join(lines)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
