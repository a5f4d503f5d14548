"""Reads what a submodule puts out while the model runs, without a second forward pass."""

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_taps: WeakKeyDictionary[nn.Module, "Tap"] = WeakKeyDictionary()


class Tap:
    """Records the outputs of one submodule by a forward hook.

    All readers of the same submodule share one tap: get it by :meth:`open`, give it back by :meth:`close`.
    Nothing is kept unless some reader has asked for the current step by :meth:`record`.
    """

    def __init__(self, submodule: nn.Module, name: str) -> None:
        self.name = name
        self._submodule = submodule
        self._readers: set[object] = set()
        self._recording: set[object] = set()
        self._outputs: list[Tensor] = []
        self._hook: RemovableHandle | None = None

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
            ValueError: the model has no submodule of that name; the message lists those it has.
        """
        try:
            submodule = module.get_submodule(name)
        except AttributeError:
            children = ", ".join(child for child, _ in module.named_children()) or "none"
            raise ValueError(
                f"{type(module).__name__} has no submodule named {name!r}; its submodules are: {children}"
            ) from None
        tap = _taps.setdefault(submodule, cls(submodule, name))
        tap._readers.add(reader)
        if tap._hook is None:
            tap._hook = submodule.register_forward_hook(tap._on_forward)
        return tap

    def close(self, reader: object) -> None:
        """Let go of the tap; the hook goes with the last reader."""
        self.release(reader)
        self._readers.discard(reader)
        if not self._readers and self._hook is not None:
            self._hook.remove()
            self._hook = None
            _taps.pop(self._submodule, None)

    def record(self, reader: object, wanted: bool) -> None:
        """Begin a step: forget the step before, and keep the outputs of this one if they are wanted."""
        (self._recording.add if wanted else self._recording.discard)(reader)
        self._outputs = []

    def release(self, reader: object) -> None:
        """End a step for this reader; the outputs go with the last that wanted them."""
        self._recording.discard(reader)
        if not self._recording:
            self._outputs = []

    def _on_forward(self, submodule: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._recording:
            if not isinstance(output, Tensor) or output.ndim != 2:
                found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(f"the submodule {self.name!r} must put out one tensor (N, d), got {found}")
            # A copy: a head may begin by an activation in place.
            self._outputs.append(output.detach().clone())

    def read(self) -> list[Tensor]:
        """Outputs of the step, one for each call of the submodule, detached.

        Raises:
            RuntimeError: the submodule was not called in this step.
        """
        if not self._outputs:
            raise RuntimeError(f"the submodule {self.name!r} was not called in this training step")
        return self._outputs
