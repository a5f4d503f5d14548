"""Reads what a submodule puts out while the model runs, without a second forward pass."""

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adadim_lightning.discovery import tensors_of

_taps: WeakKeyDictionary[nn.Module, "Tap"] = WeakKeyDictionary()


class NotCalledError(RuntimeError):
    """A submodule that is read was not called in this step."""


class Call(NamedTuple):
    """One call of a tapped submodule.

    Attributes:
        output: what it put out, copied: a head may begin by an activation in place.
        original: what it put out itself, where a reader wanted the graph.
        size: pixels of an image or number of tokens of its input; 0 for others.
        trained: whether gradients were on; a momentum branch runs without.
        inputs: its first tensor of two or more dimensions, detached, not copied.
    """

    output: Any
    original: Any
    size: int
    trained: bool
    inputs: Tensor | None


def _copy(output: Any, graph: bool) -> Any:
    if isinstance(output, Tensor):
        return output.clone() if graph else output.detach().clone()
    return {key: x.clone() if graph else x.detach().clone() for key, x in tensors_of(output)}


def _in_backward() -> bool:
    """Whether activation checkpointing is calling the module again, for its gradients."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _size(inputs: tuple[Any, ...], named: dict[str, Any]) -> int:
    for x in (*inputs, *named.values()):
        if isinstance(x, Tensor) and x.ndim >= 3:
            return math.prod(x.shape[2:]) if x.ndim > 3 else x.shape[1]
    return 0


def _first_rows(inputs: tuple[Any, ...]) -> Tensor | None:
    for x in inputs:  # no generator: compilers trace the hook, and older ones cannot trace that
        if isinstance(x, Tensor) and x.ndim >= 2:
            return x.detach()
    return None


class Tap:
    """Records the outputs of one submodule by a forward hook.

    All readers of the same submodule share one tap: get it by :meth:`open`, give it back by :meth:`close`.
    Nothing is kept unless some reader has asked for the current step by :meth:`record`.
    """

    def __init__(self, submodule: nn.Module, name: str) -> None:
        self.name = name
        self._submodule = submodule
        self._readers: set[object] = set()
        self._wanted: dict[object, bool] = {}
        # Plain attributes: the hook is also traced by compilers.
        self._recording = False
        self._graph = False
        self._calls: list[Call] = []
        self._ended: list[Call] = []
        self._hook: RemovableHandle | None = None

    def __deepcopy__(self, memo: Any) -> "Tap":
        # A copy of the model, such as a teacher, is not tapped.
        return Tap(nn.Identity(), self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        # Whoever saves a tapped submodule wants neither its readers nor a file that needs this package: what is
        # pickled in place of the hook does nothing, whatever it is called with.
        return SimpleNamespace, (), {"_on_forward": nullcontext().__exit__}

    @classmethod
    def open(cls, module: nn.Module, name: str, reader: object) -> "Tap":
        """Tap a submodule for a reader; hooks are placed with the first reader.

        Args:
            module: the model.
            name: dotted name of the submodule.
            reader: whoever reads; needed again to record and to close.

        Returns:
            The tap of this submodule.

        Raises:
            AttributeError: the model has no submodule of that name.
        """
        submodule = module.get_submodule(name)
        tap = _taps.setdefault(submodule, cls(submodule, name))
        tap._readers.add(reader)
        if tap._hook is None:
            tap._hook = submodule.register_forward_hook(tap._on_forward, with_kwargs=True)
        return tap

    def close(self, reader: object) -> None:
        """Let go of the tap; the hook goes with the last reader."""
        self.release(reader)
        self._readers.discard(reader)
        if not self._readers and self._hook is not None:
            self._hook.remove()
            self._hook = None
            _taps.pop(self._submodule, None)

    def record(self, reader: object, wanted: bool, *, graph: bool = False) -> None:
        """Begin a step: forget the step before, and keep the outputs of this one if they are wanted."""
        if wanted:
            self._wanted[reader] = graph
        else:
            self._wanted.pop(reader, None)
        self._recording = bool(self._wanted)
        self._graph = any(self._wanted.values())
        self._calls, self._ended = [], []

    def release(self, reader: object) -> None:
        """End a step for this reader; the outputs go with the last that wanted them."""
        self._wanted.pop(reader, None)
        self._graph = any(self._wanted.values())
        if not self._wanted:
            self._recording = False
            self._calls, self._ended = [], []

    def end_run(self) -> None:
        """End one run of the step; of an optimizer that runs it several times, the last run counts."""
        # The last, since what Lightning hands on as the outputs of the step is that of the last run too.
        if self._calls:
            self._ended, self._calls = self._calls, []

    def _on_forward(
        self, submodule: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        if self._recording and not _in_backward():
            copy = _copy(output, self._graph)
            original = output if self._graph else None
            self._calls.append(
                Call(copy, original, _size(inputs, named), torch.is_grad_enabled(), _first_rows(inputs))
            )

    def read(self) -> list[Call]:
        """The calls of the step: those of the student, where the submodule was called with and without gradients.

        Raises:
            NotCalledError: the submodule was not called in this step.
        """
        # What is called after the last run, such as by other callbacks, is not of the step.
        calls = self._ended or self._calls
        if not calls:
            raise NotCalledError(f"the submodule {self.name!r} was not called in this step")
        return [call for call in calls if call.trained] or calls
