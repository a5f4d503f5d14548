"""The commands as processes of their own, forked from one that has imported everything."""

import atexit
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CLI = ("train", "run", "evaluate", "embed", "measure", "export", "report")
IMPORTED = (
    *(f"adadim_lightning.cli.{name}" for name in CLI),
    *("adadim_lightning.report.page", "adadim_lightning.report.pictures", "hydra._internal.hydra"),
    *(
        "kornia.augmentation",
        "matplotlib.pyplot",
        "sklearn.datasets",
        "sklearn.linear_model",
        "torchvision.models",
    ),
)
ROOT = Path(__file__).parents[2]
PATIENCE_S = 120


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (minus the signal that killed it), and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line on stderr."""
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self
        assert "Traceback" not in self.err + self.out
        return lines[0]


class Command:
    """A command that was started.

    Args:
        name: such as ``train``, of ``adadim-train``.
        arguments: of the command line.
        environment: what is added to that of this process.
        out: file that takes stdout.
        limits: of the process, by their names in :mod:`resource`.
    """

    def __init__(
        self,
        name: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        out: str | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = (str(Path(self._folder.name) / name) for name in ("out", "err"))
        self._code: int | None = None
        self.pid: int = _ask(
            name=name,
            arguments=arguments,
            environment={"OMP_NUM_THREADS": "1", **os.environ, **(environment or {})},
            cwd=os.getcwd(),
            streams=[out or self._out, self._err],
            limits=dict(limits or {}),
        )

    @property
    def code(self) -> int | None:
        """The exit code, once there is one."""
        if self._code is None:
            self._code = _ask(poll=self.pid)
        return self._code

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        """Wait until something holds; what it is."""
        deadline = time.monotonic() + PATIENCE_S
        while not (value := condition()):
            assert self.code is None, self.end()
            assert time.monotonic() < deadline, self.end()
            time.sleep(0.02)
        return value

    def end(self, patience: float = PATIENCE_S) -> Ended:
        """Wait for the end; one that does not come is made, by SIGKILL."""
        deadline = time.monotonic() + patience
        while self.code is None:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
            time.sleep(0.01)
        out, err = (
            Path(path).read_text(errors="replace") if Path(path).exists() else ""
            for path in (self._out, self._err)
        )
        assert self._code is not None
        return Ended(self._code, out, err)


def run(name: str, *arguments: str, **options: Any) -> Ended:
    """Run a command to its end."""
    return Command(name, *arguments, **options).end()


@cache
def _zygote() -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", __name__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _ask(**question: Any) -> Any:
    process = _zygote()
    assert process.stdin is not None
    assert process.stdout is not None
    print(json.dumps(question), file=process.stdin, flush=True)
    return json.loads(process.stdout.readline())


def _serve() -> None:
    """Fork a command for each line that asks for one, and tell how those ended that are asked about."""
    for module in IMPORTED:
        importlib.import_module(module)
    importlib.import_module("adadim_lightning.cli.app").offer_eval_data()
    gc.freeze()  # else each command would copy the memory of all modules
    for line in iter(sys.stdin.readline, ""):
        question = json.loads(line)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                _become(**question)
        print(json.dumps(answer), flush=True)


def _become(
    name: str,
    arguments: list[str],
    environment: dict[str, str],
    cwd: str,
    streams: list[str],
    limits: dict[str, int],
) -> None:
    """Go on as a command that a shell started."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    for number, path in enumerate([os.devnull, *streams]):
        handle = os.open(path, (os.O_WRONLY | os.O_CREAT) if number else os.O_RDONLY)
        os.dup2(handle, number)
        os.close(handle)
    for limit, value in limits.items():
        resource.setrlimit(getattr(resource, limit), (value, value))
    sys.argv = [f"adadim-{name}", *arguments]
    os._exit(_code(importlib.import_module(f"adadim_lightning.cli.{name}").main))


def _code(main: Callable[[], None]) -> int:
    """Exit code of a program; ends it as Python does, except that taking all modules apart would take seconds."""
    code: Any = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stderr.flush()
    try:
        sys.stdout.flush()
    except OSError:
        traceback.print_exc()
        code = 120
    return int(code)


if __name__ == "__main__":
    _serve()
    os._exit(0)
