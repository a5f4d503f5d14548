"""R and Z of each step of any module: found, tapped, and lined up view by view."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import compress
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from adadim_lightning.discovery import Survey, find_embedding, find_representation, is_compiled, tensors_of
from adadim_lightning.tap import NotCalledError, Tap

Source = str | Callable[[Any, Any, Any], Tensor | Sequence[Tensor]]
"""Where R or Z comes from: the dotted name of a submodule, ``name[key]`` for one entry of what it puts out, the
key of an entry of what ``training_step`` returns, or a function ``(module, batch, outputs)`` that is called after
``training_step`` and returns the rows, or a list with the rows of each view."""

Pool = Literal["class", "mean"]


class _Piece(NamedTuple):
    """Rows that came in one call."""

    rows: Tensor
    size: int
    originals: list[Tensor]
    is_view: bool = False
    inputs: Tensor | None = None


class Views(NamedTuple):
    """What a :class:`Feed` reads of one source.

    Attributes:
        rows: shape ``(N, d)`` for each view.
        originals: what the source itself put out for them, where the graph was wanted.
    """

    rows: list[Tensor]
    originals: list[Tensor]


def _as_rows(x: Tensor, pool: Pool | None, label: str) -> Tensor:
    if x.ndim >= 2 and x.shape[2:].numel() == 1:
        return x.flatten(1)
    if x.ndim == 3 and pool is not None:
        return x[:, 0] if pool == "class" else x.mean(1)
    if x.ndim == 4 and pool == "mean":
        return x.mean((2, 3))
    advice = {3: 'pool="class" or "mean" makes rows of tokens', 4: 'pool="mean" makes rows of maps'}
    raise ValueError(
        f"{label} must put out rows (N, d), got {tuple(x.shape)}; "
        + advice.get(x.ndim, "name another submodule or give a function")
    )


def _entry(output: Any, key: str | None, name: str) -> tuple[Any, Tensor]:
    """Key and tensor of the entry asked for, or of the only one."""
    entries = dict(tensors_of(output))
    if key is not None:
        for found, x in entries.items():
            if str(found) == key:
                return found, x
    elif len(entries) == 1:
        return next(iter(entries.items()))
    listed = ", ".join(f"'{name}[{found}]' {tuple(x.shape)}" for found, x in entries.items() if found is not None)
    if key is not None:
        raise ValueError(f"{name!r} put out no {key!r} but {listed or 'one tensor'}")
    raise ValueError(f"{name!r} put out {len(entries)} tensors; name one of them: {listed or 'there is none'}")


def images_of(batch: Any, dims: int = 2) -> Iterator[Tensor]:
    """The tensors of so many dimensions or more in a batch, whatever it looks like, in their order."""
    if isinstance(batch, Tensor):
        if batch.ndim >= dims:
            yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for x in batch.values() if isinstance(batch, Mapping) else batch:
            yield from images_of(x, dims)


def batch_size_of(batch: Any) -> int | None:
    """Number of images of a batch: the rows of its first tensor of two or more dimensions."""
    return next((len(images) for images in images_of(batch)), None)


def _recut(pieces: list[_Piece], sizes: list[int]) -> list[_Piece]:
    """The same rows in pieces of other sizes; the first piece then stands for the calls they came in."""
    if [len(piece.rows) for piece in pieces] == sizes:
        return pieces
    originals = [x for piece in pieces for x in piece.originals]
    rows = torch.split(torch.cat([piece.rows for piece in pieces]), sizes)
    return [_Piece(x, 0, originals if i == 0 else []) for i, x in enumerate(rows)]


def _fed_by(first: list[_Piece], pieces: list[_Piece]) -> list[_Piece] | None:
    """The last calls whose inputs are the rows of R; None unless they are as many.

    A head may be called twice on the same R, once for an output that nobody uses, or on other rows beside.
    """
    wanted = torch.cat([piece.rows for piece in first]).detach()
    for end in range(len(pieces), 0, -1):
        for start in range(end - 1, -1, -1):
            inputs = [piece.inputs for piece in pieces[start:end]]
            fed = [x.flatten(1) for x in inputs if x is not None and x.numel() == len(x) * wanted.shape[1]]
            count = sum(map(len, fed))
            if len(fed) < len(inputs) or count > len(wanted):
                break
            if count == len(wanted) and torch.equal(torch.cat(fed).to(wanted.dtype), wanted):
                return pieces[start:end]
    return None


def _cut_into_views(pieces: list[_Piece], sizes: list[int]) -> Views:
    """Cut pieces with the rows of several views; one as long as a tensor of the batch is a view."""
    rows: list[Tensor] = []
    for piece in pieces:
        whole = piece.is_view or len(piece.rows) in sizes
        # The largest, so that a smaller tensor beside the images does not cut them to shreds.
        images = next((n for n in sorted(sizes, reverse=True) if n and len(piece.rows) % n == 0), None)
        rows += [piece.rows] if whole or images is None else torch.split(piece.rows, images)
    return Views(rows, [x for piece in pieces for x in piece.originals])


class Feed:
    """R, or R and Z, of each step of a module: found, tapped, and lined up view by view.

    Sources of one feed see the same images in the same order: in a call for each view, in one call with the views
    below each other, or anything between. Of crops of several sizes the largest are read.

    Args:
        representation: where R comes from; by default found by the names of the submodules.
        embedding: where Z comes from, likewise; False for a feed of R alone.
        pool: makes rows of tokens ``(N, T, d)``: the first, which is the class token, or the mean of all; and of
            maps ``(N, d, H, W)``: the mean.
    """

    def __init__(
        self,
        representation: Source | None,
        embedding: Source | Literal[False] | None = False,
        pool: Pool | None = None,
    ) -> None:
        if pool not in (None, "class", "mean"):
            raise ValueError(f'pool must be "class", "mean" or None, got {pool!r}')
        for name, source in (("representation", representation), ("embedding", embedding)):
            if isinstance(source, nn.Module):
                raise ValueError(f"{name} must be the dotted name of a submodule, not the submodule itself")
            if not (source is None or source is False or isinstance(source, str) or callable(source)):
                raise ValueError(f"{name} must be a name or a function, got {source!r}")
        self.representation = representation
        self.embedding = embedding
        self.pool = pool
        self._module: Any = None
        self._sources: list[Source] = []
        self._taps: list[tuple[Tap, str | None] | None] = []
        self._survey: Survey | None = None
        self._surveyed = False
        self._problem: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        closed = Feed(self.representation, self.embedding, self.pool)
        return vars(closed)  # what it has tapped belongs to a fit of this process

    def names(self, module: nn.Module) -> list[Source]:
        """The sources, found where they were left out.

        Raises:
            LookupError: one was left out and none or several modules have such a name.
        """
        representation = find_representation(module) if self.representation is None else self.representation
        if self.embedding is False:
            return [representation]
        if self.embedding is not None:
            return [representation, self.embedding]
        return [
            representation,
            find_embedding(module, representation if isinstance(representation, str) else None),
        ]

    def open(self, module: nn.Module) -> None:
        """Place the taps; what cannot be found is an error of the first reading, which knows all shapes."""
        self._module = module
        self._problem = None
        try:
            self._sources = self.names(module)
        except LookupError as error:
            self._problem = str(error)
            self._sources = []
        self._taps = [self._tap(source) for source in self._sources]
        self._surveyed = False

    def _tap(self, source: Source) -> tuple[Tap, str | None] | None:
        if not isinstance(source, str):
            return None
        parts = re.fullmatch(r"([^\[\]]+)(?:\[(.+)\])?", source)
        if parts is None:
            return None
        try:
            return Tap.open(self._module, parts[1], self), parts[2]
        except AttributeError:
            return None

    def submodule(self, module: nn.Module) -> nn.Module:
        """The submodule that R comes from.

        Raises:
            ValueError: R does not come from a submodule.
        """
        if self._problem is not None:
            raise ValueError(self._problem)
        if self._taps[0] is None:
            raise ValueError(
                f"{self._label(0)} is no submodule of {type(module).__name__}, but a probe with a loader of its "
                "own needs one that makes R of images"
            )
        return module.get_submodule(self._taps[0][0].name)

    def is_trained(self) -> bool:
        """Whether R comes from a submodule with parameters that learn."""
        tap = self._taps[0] if self._taps else None
        return tap is not None and any(p.requires_grad for p in self.submodule(self._module).parameters())

    def record(self, wanted: bool, *, graph: bool = False) -> None:
        """Begin a step; the first that is wanted is surveyed."""
        if wanted and not self._surveyed:
            self._surveyed, self._survey = True, Survey(self._module)
        for tap in self._taps:
            if tap is not None:
                tap[0].record(self, wanted, graph=graph)

    def end_run(self) -> None:
        """End one run of the step, of which an optimizer such as SAM or L-BFGS makes several."""
        for tap in self._taps:
            if tap is not None:
                tap[0].end_run()

    def release(self) -> None:
        """End a step."""
        if self._survey is not None:
            self._survey.close()
        for tap in self._taps:
            if tap is not None:
                tap[0].release(self)

    def close(self) -> None:
        """Remove the taps."""
        for tap in self._taps:
            if tap is not None:
                tap[0].close(self)
        self._taps = []
        self._end_survey()
        self._module = None

    def _end_survey(self) -> str:
        if self._survey is None:
            return ""
        self._survey.close()
        table = self._survey.table()
        self._survey = None
        return table

    def read(self, batch: Any, outputs: Any) -> list[Views]:
        """Views of R, or of R and of Z, of this step.

        Args:
            batch: the batch of the step, which tells the number of images.
            outputs: what ``training_step`` returned.

        Returns:
            For each source its views, in the order in which the module saw them.

        Raises:
            ValueError: a source does not exist, or does not put out rows, or R and Z differ in number; in the
                first step the message lists the submodules and the shapes of what they put out.
            NotCalledError: a submodule was not called.
        """
        try:
            if self._problem is not None:
                raise ValueError(self._problem)
            views = self._line_up([self._pieces(i, batch, outputs) for i in range(len(self._sources))], batch)
        except NotCalledError as error:
            compiled = any(is_compiled(x) for x in self._module.modules())
            advice = "what was compiled and has run before the fit is not seen: call torch.compiler.reset() first"
            raise NotCalledError(f"{error}{f'; {advice}' if compiled else ''}{self._end_survey()}") from None
        except ValueError as error:
            raise ValueError(f"{error}{self._end_survey()}") from error
        self._end_survey()
        return views

    def _pieces(self, index: int, batch: Any, outputs: Any) -> list[_Piece]:
        source, tap = self._sources[index], self._taps[index]
        if tap is not None:
            pieces = []
            for call in tap[0].read():
                key, x = _entry(call.output, tap[1], tap[0].name)
                originals = [] if call.original is None else [dict(tensors_of(call.original))[key]]
                rows = _as_rows(x, self.pool, self._label(index))
                pieces.append(_Piece(rows, call.size, originals, inputs=call.inputs))
            return pieces
        if isinstance(source, str):
            label = f"the entry {source!r} of the outputs"
            found = outputs.get(source) if isinstance(outputs, Mapping) else None
            if found is None:
                returned = ", ".join(map(str, outputs)) if isinstance(outputs, Mapping) else "no dictionary"
                raise ValueError(
                    f"{type(self._module).__name__} has no submodule named {source!r}, and its training_step "
                    f"returned no such entry but {returned}"
                )
        else:
            label = f"the function {getattr(source, '__name__', source)!r}"
            found = source(self._module, batch, outputs)
        several = isinstance(found, list | tuple)
        found = list(found) if several else [found]
        if not found:
            raise ValueError(f"{label} must give a tensor (N, d) or a list of them, got an empty list")
        for x in found:
            if not isinstance(x, Tensor):
                raise ValueError(f"{label} must give a tensor (N, d) or a list of them, got {type(x).__name__}")
        return [_Piece(_as_rows(x, self.pool, label), 0, [x], several) for x in found]

    def _line_up(self, sources: list[list[_Piece]], batch: Any) -> list[Views]:
        # The labels tell their number too, where the first dimension is that of the views.
        first, sizes = sources[0], [len(x) for x in images_of(batch, dims=1)]
        # Crops of several sizes: the largest are the global views, which every branch of the module sees.
        size = max(piece.size for piece in first)
        large = [piece.size == size for piece in first]
        all_rows = [len(piece.rows) for piece in first]
        large_rows = list(compress(all_rows, large))
        views = [_cut_into_views(list(compress(first, large)), sizes)]
        for i, pieces in enumerate(sources[1:], start=1):
            total = sum(len(piece.rows) for piece in pieces)
            if total == sum(all_rows):
                kept = list(compress(_recut(pieces, all_rows), large))
            elif total == sum(large_rows):
                kept = _recut(pieces, large_rows)
            elif (fed := _fed_by(first, pieces)) is not None:
                kept = list(compress(_recut(fed, all_rows), large))
            else:
                calls = ", ".join(str(len(piece.rows)) for piece in pieces)
                raise ValueError(
                    f"{self._label(0)} put out {sum(all_rows)} rows in this step but {self._label(i)} {total}: "
                    f"they must see the same views; the calls of {self._label(i)} had {calls} rows, and a "
                    "function (module, batch, outputs) in its place can return those of the views, or return them "
                    "from training_step and give their key"
                )
            views.append(_cut_into_views(kept, sizes))
        for i, (rows, _) in enumerate(views):
            if len({x.shape[1] for x in rows}) > 1:
                shapes = ", ".join(str(tuple(x.shape)) for x in rows)
                raise ValueError(
                    f"{self._label(i)} put out views of different dimensions, {shapes}; follow each by a callback "
                    "with a name of its own"
                )
        return views

    def _label(self, index: int) -> str:
        source = self._sources[index]
        return repr(source) if isinstance(source, str) else f"{getattr(source, '__name__', source)}"
