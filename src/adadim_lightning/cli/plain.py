"""What the commands without Hydra share: arguments, and one line instead of a traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from adadim_lightning.cli.versions import own_version


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of all commands, and that knows ``--version``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument(
            "--version", action="version", version=own_version(), help="show the version of adadim-lightning"
        )

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, and end."""
        self.exit(1, f"{self.prog}: error: {message}; {self.prog} --help shows the usage\n")


def run_plain(parser: argparse.ArgumentParser, task: Callable[[argparse.Namespace], None]) -> None:
    """Run a task with the arguments of the command line; an error is one line and exit code 1."""
    arguments = parser.parse_args()
    try:
        task(arguments)
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        from adadim_lightning.cli.app import one_line  # not for the help, which should be quick

        print(f"{parser.prog}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
