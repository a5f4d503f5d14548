"""Changes each formula of ``functional/`` in one place, and lists the changes that no test notices.

    uv run python -m tests.reliability.mutate [NAME ...]

A sign, a factor or an axis is changed, one at a time; the tests of that file run, and if none fails those of all
that builds on it. Each change lives in a process of its own, forked from one that has imported everything.
"""

import ast
import copy
import importlib
import inspect
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

import adadim_lightning.functional as functional

HERE = Path(__file__).parents[1]
NEAR = "functional/test_{}.py"
FAR = ("functional", "metrics", "test_objective.py", "test_steering.py")
SECONDS = 120
SWAPPED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
# Changes that change no value, each with its reason.
EQUIVALENT: dict[str, str] = {}


class Mutant(NamedTuple):
    """One change.

    Attributes:
        module: the file's name.
        where: line and what is changed.
        tree: the file with it.
    """

    module: str
    where: str
    tree: ast.Module


def sites(tree: ast.AST) -> Iterator[ast.AST]:
    """The parts of formulas: neither messages, nor types, nor docstrings."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.arguments | ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                yield from sites(ast.Expr(node.value))
            continue
        yield node
        yield from sites(node)


def changed(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What a node may be changed to, and the name of the change."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
        other = SWAPPED[type(node.op)]
        yield f"{type(node.op).__name__} -> {other.__name__}", ast.BinOp(node.left, other(), node.right)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "minus -> plus", node.operand
    elif isinstance(node, ast.keyword) and node.arg == "dim" and isinstance(node.value, ast.Constant):
        yield f"dim={node.value.value} -> {1 - node.value.value}", ast.keyword("dim", ast.Constant(1 - node.value.value))
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        yield f"{node.value} -> {node.value * 2 or 1}", ast.Constant(node.value * 2 or 1)


def mutants(name: str) -> Iterator[Mutant]:
    """All changes of a file."""
    path = Path(functional.__file__).with_name(f"{name}.py")
    tree = ast.parse(path.read_text())
    count = sum(1 for _ in sites(tree))
    for i in range(count):
        node = list(sites(tree))[i]
        for label, _ in changed(node):
            mutated = copy.deepcopy(tree)
            target = list(sites(mutated))[i]
            replacement = dict(changed(target))[label]
            for parent in ast.walk(mutated):
                for field, value in ast.iter_fields(parent):
                    if value is target:
                        setattr(parent, field, replacement)
                    elif isinstance(value, list) and any(x is target for x in value):
                        value[[x is target for x in value].index(True)] = replacement  # noqa: B909
            line = getattr(node, "lineno", getattr(getattr(node, "value", None), "lineno", 0))
            yield Mutant(name, f"{name}.py:{line} {label}", ast.fix_missing_locations(mutated))


def put_in_place(module: ModuleType, tree: ast.Module) -> None:
    """Give the functions of a module, wherever they are known by now, the code of a changed file."""
    namespace = dict(vars(module))
    exec(compile(tree, module.__file__ or "", "exec"), namespace)
    for name, value in namespace.items():
        old = vars(module).get(name)
        if inspect.isfunction(old) and old.__module__ == module.__name__:
            before, after = inspect.unwrap(old), inspect.unwrap(value)
            before.__code__ = after.__code__
            before.__defaults__, before.__kwdefaults__ = after.__defaults__, after.__kwdefaults__
        elif isinstance(value, int | float) and not isinstance(value, bool):
            setattr(module, name, value)


def passes(paths: list[str]) -> bool:
    """Whether the tests pass, here and now."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    return pytest.main(["-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist", *paths]) == 0


def survives(mutant: Mutant) -> bool:
    """Whether no test notices a change."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)  # a change may run for ever: that is noticed
        put_in_place(importlib.import_module(f"adadim_lightning.functional.{mutant.module}"), mutant.tree)
        near = str(HERE / NEAR.format(mutant.module.removeprefix("_")))
        quiet = (not Path(near).exists() or passes([near])) and passes([str(HERE / x) for x in FAR])
        os._exit(0 if quiet else 1)
    _, status = os.waitpid(child, 0)
    return status == 0


def main() -> int:
    """List the survivors; the exit code is their number, at most 1."""
    torch.set_num_threads(1)
    names = sys.argv[1:] or sorted(
        x.stem for x in Path(functional.__file__).parent.glob("*.py") if x.stem != "__init__"
    )
    # Everything is imported once, and must pass as it is.
    output = os.dup(1), os.dup(2)
    good = passes([str(HERE / x) for x in FAR])
    os.dup2(output[0], 1)
    os.dup2(output[1], 2)
    if not good:
        print("the tests fail without any change")
        return 1
    survivors = 0
    for name in names:
        found = list(mutants(name))
        alive = [x for x in found if x.where not in EQUIVALENT and survives(x)]
        survivors += len(alive)
        print(f"{name:16} {len(found):4} changes, {len(alive)} not noticed", flush=True)
        for mutant in alive:
            print(f"  {mutant.where}", flush=True)
    return min(survivors, 1)


if __name__ == "__main__":
    sys.exit(main())
