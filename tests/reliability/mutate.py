"""Changes each formula of ``functional/`` in one place, and lists the changes that no test notices.

    uv run python -m tests.reliability.mutate [NAME ...]

A sign, a factor, an axis, a comparison, a constant or a term is changed, one at a time, and the tests run until
one fails: those of that file, then the properties of all functions. Each change lives in a process of its own,
forked from one that has imported everything and collected the tests.
"""

import ast
import importlib
import inspect
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

os.environ["HYPOTHESIS_PROFILE"] = "mutation"

import pytest

import adadim_lightning.functional as functional
import adadim_lightning.metrics  # noqa: F401 - a fixture imports it, and every process would do so anew

TESTS = Path(__file__).parents[1] / "functional"
SOURCES = Path(functional.__file__).parent
SECONDS = 300  # a change may compute for ever; that is noticed
OPTIONS = ["-qq", "-s", "-o", "addopts=", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]

OPERATORS: dict[type, list[type]] = {
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div],
    ast.Div: [ast.Mult],
    ast.Pow: [ast.Mult],
    ast.BitAnd: [ast.BitOr],
}
COMPARISONS: dict[type, list[type]] = {
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
}
OPPOSITES = {
    name: other
    for pair in [("min", "max"), ("clamp_min", "clamp_max"), ("mean", "sum"), ("any", "all")]
    for name, other in (pair, pair[::-1])
}
# Without these a value is another one, or less precise.
DROPPED_METHODS = {
    *("square", "sqrt", "log", "exp", "clamp", "clamp_min", "clamp_max", "flip", "fill_diagonal_", "masked_fill"),
    *("to", "long", "float", "flatten"),
}
DROPPED_FUNCTIONS = {"full_precision", "to_float64", "like", "relu", "sqrt", "abs", "normalize"}

# Changes that change no value that anyone could see, by their beginning, each with its reason.
ROUNDING = "both sides of the choice give the same value but for rounding"
WIDE = "mixed precision narrows products of float32 matrices only; here there are none"
CUT = "torch.where(eigenvalues > noise, eigenvalues, 0.0) -> torch.where(eigenvalues >= noise"
EXACT = "no eigenvalue is exactly the estimate of rounding, unless both are zero"
OF_GRAM = "the one product of matrices is in cosine_gram, which switches mixed precision off itself"
PRECISE = "more precise than needed"
MPS = "float64 leaves no device but Apple's MPS, which the tests do not have"
SYMMETRIC = "the Gram matrix is symmetric"
EQUIVALENT = {
    "information.matrix_entropy: with no_autocast": OF_GRAM,
    "information.matrix_mutual_information: with no_autocast": OF_GRAM,
    "hypersphere.uniformity: with no_autocast": OF_GRAM,
    "information.matrix_mutual_information: (r.to(dtype), z.to(dtype)) if order == 2 else (to_float64(r), "
    "to_float64(z)) -> (to_float64": PRECISE,
    "information.matrix_mutual_information: information.to(dtype).to(r.device) -> information.to(dtype)": MPS,
    "_numeric.to_float64: x.to(float64_device(x.device)).to -> x.to": MPS,
    "contrastive._nt_xent_of_gram: gram.diagonal(-n) -> gram.diagonal(n)": SYMMETRIC,
    "contrastive._nt_xent_of_gram: dim=1 -> dim=0": SYMMETRIC,
    "_relations._values: dim=1 -> dim=0": SYMMETRIC,
    "_relations._differentiable: torch.autograd.grad(total, x, create_graph=True, allow_unused=True)[0] -> ": (
        "a tuple of one"
    ),
    "_relations._differentiable: total + of_uniformity * _nt_xent_of_gram(gram_z, temperature) -> of_uni": (
        "the total is zero before"
    ),
    "_relations.backward: ctx.needs_input_grad[0] and of_information is not None -> of_information is": (
        "a gradient that nobody wants is thrown away"
    ),
    "decorrelation._off_diagonal: n < d -> n <= d": ROUNDING,
    "decorrelation._barlow_twins_parts: n < d -> n <= d": ROUNDING,
    "hypersphere.alignment: with no_autocast": WIDE,
    "alpha_req.alpha_req: 1 / rank -> 2 / rank": "a common factor of all weights cancels",
    "neighbors.knn_predict: int(bank_labels.max()) + 1 -> int(bank_labels.max()) + 2": "no vote is for it",
    "lidar.lidar: white @ white.T if n < d else white.T @ white -> white": ROUNDING,
    "spectrum.eigenvalue_spectrum: with no_autocast(x)": WIDE,
    "alpha_req.alpha_req: with no_autocast": WIDE,
    "lidar.lidar: with no_autocast": WIDE,
    "decorrelation.invariance_loss: with no_autocast": WIDE,
    "decorrelation.variance_loss: with no_autocast": WIDE,
    "spectrum.eigenvalue_spectrum: x @ x.T if n < d else x.T @ x -> x @ x.T if n <= d": ROUNDING,
    "spectrum._eigenvalues: torch.linalg.eigvalsh(gram).flip(0) -> torch.linalg.eigvalsh(gram).flip(-1)": (
        "a vector has one axis"
    ),
    f"spectrum._eigenvalues: {CUT}": EXACT,
    f"information._renyi_entropy: {CUT}": EXACT,
    "information._renyi_entropy: torch.where(positive, p, 1.0) -> torch.where(positive, p, ": (
        "any positive number there: its logarithm is masked or multiplied by zero"
    ),
    "information._renyi_entropy: abs(order - 1) < 0.1 -> abs(order - 1) <": ROUNDING,
    "information._renyi_entropy: abs(order - 1) < 0.1 -> order - 1 < 0.1": ROUNDING,
    "information.matrix_entropy: x if order == 2 else to_float64(x) -> to_float64(x)": PRECISE,
}


class Mutant(NamedTuple):
    """One change.

    Attributes:
        kind: what sort of change.
        name: where it is and what it does; stays the same when lines move.
        line: of the file.
        code: the whole file with it.
    """

    kind: str
    name: str
    line: int
    code: CodeType


def variants(node: ast.AST, parent: ast.AST, field: str) -> Iterator[tuple[str, ast.AST]]:
    """What a part of a formula may be changed to, each with the kind of the change."""
    match node:
        case ast.BinOp(left, op, right):
            for other in OPERATORS.get(type(op), []):
                yield "sign" if isinstance(op, ast.Add | ast.Sub) else "factor", ast.BinOp(left, other(), right)
            if isinstance(op, ast.Add | ast.Sub | ast.Mult | ast.Div | ast.BitAnd):
                yield "missing term", left
            if isinstance(op, ast.Add | ast.Mult | ast.BitAnd):
                yield "missing term", right
        case ast.UnaryOp(ast.USub() | ast.Not(), operand):
            yield "sign", operand
        case ast.Compare(left, ops, comparators):
            for i, op in enumerate(ops):
                for other in COMPARISONS.get(type(op), []):
                    yield "comparison", ast.Compare(left, [*ops[:i], other(), *ops[i + 1 :]], comparators)
        case ast.BoolOp(op, values):
            for i in range(len(values)):
                rest = values[:i] + values[i + 1 :]
                yield "comparison", ast.BoolOp(op, rest) if len(rest) > 1 else rest[0]
        case ast.IfExp(_, body, orelse):
            yield "branch", body
            yield "branch", orelse
        case ast.Constant(bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(0 | 1 as value) if isinstance(parent, ast.keyword) and parent.arg == "dim":
            yield "axis", ast.Constant(1 - value)
        case ast.Constant(int(value)):
            kind = "axis" if isinstance(parent, ast.Subscript) else "constant"
            yield kind, ast.Constant(value + 1)
            yield kind, ast.Constant(value - 1)
        case ast.Constant(float(value)):
            yield "constant", ast.Constant(value * 2 or 1.0)
            yield "constant", ast.Constant(value / 2 or -1.0)
        case ast.Attribute(value, "T"):
            yield "axis", value
        case ast.Call(ast.Attribute(value, name) as function, args, keywords):
            if name in OPPOSITES:
                yield "min, max, mean", ast.Call(ast.Attribute(value, OPPOSITES[name], ast.Load()), args, keywords)
            if name in DROPPED_METHODS:
                yield "missing function", value
            if function.attr in DROPPED_FUNCTIONS and args:
                yield "missing function", args[0]
        case ast.Call(ast.Name(name), args, keywords):
            if name in OPPOSITES:
                yield "min, max, mean", ast.Call(ast.Name(OPPOSITES[name], ast.Load()), args, keywords)
            if name in DROPPED_FUNCTIONS:
                yield "missing function", args[0]
        case ast.With(_, body):
            yield "missing function", ast.If(ast.Constant(True), body, [])
        case ast.Expr(ast.Call()):
            yield "missing check", ast.Pass()


def sites(tree: ast.AST, within: str = "") -> Iterator[tuple[str, ast.AST, str, ast.AST, Any]]:
    """The parts of formulas, neither types nor messages: function, parent, field, node, and how to set it."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list", "exc"):
            continue
        for i, node in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(node, ast.AST) or isinstance(node, ast.JoinedStr):
                continue

            def put(new: ast.AST, field: str = field, value: Any = value, i: int = i) -> None:
                if isinstance(value, list):
                    value[i] = new
                else:
                    setattr(tree, field, new)

            yield within, tree, field, node, put
            yield from sites(node, node.name if isinstance(node, ast.FunctionDef) else within)


def spoken(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())[:100]


def mutants(name: str) -> Iterator[Mutant]:
    """All changes of a file."""
    path = SOURCES / f"{name}.py"
    tree = ast.parse(path.read_text())
    seen: Counter[str] = Counter()
    for function, parent, field, node, put in list(sites(tree)):
        for kind, new in variants(node, parent, field):
            shown = node if isinstance(node, ast.stmt) or isinstance(parent, ast.stmt | ast.arguments) else parent
            before = spoken(shown)
            put(new)
            after = spoken(new if shown is node else parent)
            code = compile(ast.fix_missing_locations(tree), str(path), "exec")
            put(node)
            label = f"{name}.{function}: {before} -> {after}"
            seen[label] += 1
            label += f" ({seen[label]})" if seen[label] > 1 else ""
            yield Mutant(kind, label, getattr(node, "lineno", 0), code)


def put_in_place(module: ModuleType, code: CodeType) -> None:
    """Give the functions of a module, wherever they are known by now, the code of a changed file."""
    changed = dict(vars(module))
    exec(code, changed)
    for name, new in changed.items():
        old = vars(module).get(name)
        if getattr(old, "__module__", None) == module.__name__:
            # Of a class its methods, static ones too.
            pairs = [(vars(old)[key], x) for key, x in vars(new).items()] if inspect.isclass(old) else [(old, new)]
            for mine, other in pairs:
                mine, other = (inspect.unwrap(getattr(x, "__func__", x)) for x in (mine, other))
                if inspect.isfunction(mine):
                    mine.__code__, mine.__defaults__ = other.__code__, other.__defaults__
                    mine.__kwdefaults__ = other.__kwdefaults__
        elif isinstance(new, int | float) and not isinstance(new, bool):
            setattr(module, name, new)


class Trials:
    """Runs the collected tests once for each change; a plugin of pytest.

    Args:
        names: the files to change.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.tried: Counter[str] = Counter()
        self.survivors: list[Mutant] = []
        self.equivalent: set[str] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for name in self.names:
            start, count, before = time.monotonic(), 0, len(self.survivors)
            near = [x for x in session.items if x.path.name == f"test_{name.removeprefix('_')}.py"]
            order = near + [x for x in session.items if x.path.name == "test_properties.py"]
            if noticed := self.first_failure(session, order, None, None):
                raise pytest.UsageError(f"{noticed} fails without any change")
            module = importlib.import_module(f"adadim_lightning.functional.{name}")
            for mutant in mutants(name):
                count += 1
                if mutant.name.startswith(tuple(EQUIVALENT)):
                    self.equivalent.add(mutant.name)
                    continue
                self.tried[mutant.kind] += 1
                noticed = self.first_failure(session, order, module, mutant)
                if noticed is None:
                    self.survivors.append(mutant)
                    print(f"  not noticed: {name}.py:{mutant.line} {mutant.name}", flush=True)
                # What noticed one change is likely to notice the next.
                order.sort(key=lambda x: x.nodeid != noticed)
            print(
                f"{name:16} {count:4} changes, {len(self.survivors) - before} not noticed, "
                f"{time.monotonic() - start:.0f} s",
                flush=True,
            )
        return True

    def first_failure(
        self, session: pytest.Session, tests: list[pytest.Item], module: ModuleType | None, mutant: Mutant | None
    ) -> str | None:
        """The name of the first test that fails with a change; None where all pass."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
                silent = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silent, 1)
                os.dup2(silent, 2)
                if module and mutant:
                    put_in_place(module, mutant.code)
                for test, following in zip(tests, [*tests[1:], None], strict=True):
                    test.config.hook.pytest_runtest_protocol(item=test, nextitem=following)
                    if session.testsfailed:
                        os.write(writer, test.nodeid.encode())
                        os._exit(1)
                os._exit(0)
            finally:
                os._exit(2)  # never back into the parent's code
        os.close(writer)
        noticed = os.read(reader, 10_000).decode()
        os.close(reader)
        _, status = os.waitpid(child, 0)
        return None if status == 0 else noticed or "the end of the process"


def run(names: list[str]) -> Trials:
    """Try all changes of some files, or of all."""
    names = names or sorted(x.stem for x in SOURCES.glob("*.py") if x.stem != "__init__")
    trials = Trials(names)
    code = pytest.main([*OPTIONS, str(TESTS)], plugins=[trials])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(int(code))
    return trials


def main() -> int:
    """List the survivors; the exit code is 1 if there are any."""
    trials = run(sys.argv[1:])
    for kind, count in sorted(trials.tried.items()):
        print(f"{kind:16} {count:4} changes")
    survivors, equivalent = len(trials.survivors), len(trials.equivalent)
    print(f"{trials.tried.total()} changes, {survivors} not noticed, {equivalent} equivalent")
    return min(len(trials.survivors), 1)


if __name__ == "__main__":
    sys.exit(main())
