"""What all commands share: Hydra around a task, and one line instead of a traceback."""

import difflib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

FULL_ERROR = "HYDRA_FULL_ERROR"


def config_dir() -> Path:
    """Folder of the configuration groups: inside the package when installed, else in the checkout."""
    package = Path(__file__).parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parents[1] / "conf"


def run_app(task: Callable[[DictConfig], Any], command: str, config_name: str) -> None:
    """Compose the configuration from the command line and run the task with it, or sweep over it.

    An error ends the process with exit code 1 and one line on stderr that names the cause;
    ``HYDRA_FULL_ERROR=1`` brings the traceback back.

    Args:
        task: gets the composed configuration.
        command: name of the command, for messages.
        config_name: primary configuration file, without ending.
    """
    wanted = os.environ.get(FULL_ERROR)

    def quiet_task(config: DictConfig) -> Any:
        # Processes that the task starts see the user's own setting.
        _set_environment(FULL_ERROR, wanted)
        try:
            return task(config)
        except Exception as error:
            # In a sweep the error goes to the sweeper; alone, Hydra would add a line of its own to it.
            if wanted == "1" or HydraConfig.get().mode != RunMode.RUN:
                raise
            _fail(command, error)
        finally:
            os.environ[FULL_ERROR] = "1"

    # Hydra raises instead of printing a traceback and ending the process by itself.
    os.environ[FULL_ERROR] = "1"
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)(quiet_task)()
    except Exception as error:
        if wanted == "1":
            raise
        _fail(command, error)
    finally:
        _set_environment(FULL_ERROR, wanted)


def _fail(command: str, error: Exception) -> NoReturn:
    print(f"{command}: error: {one_line(error)}", file=sys.stderr)
    sys.exit(1)


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def one_line(error: BaseException) -> str:
    """The cause of an error and its fix, in one line."""
    cause = error.__cause__
    if isinstance(error, InstantiationException) and cause is not None:
        return f"{_where(error)}{one_line(cause)}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = error.missing_cfg_file.rpartition("/")
        shown = [name for name in error.options if not name.startswith("_")]
        return f"{group or 'the configuration'} has no option {option!r}{_nearest(option, shown)}"
    for candidate in (error, cause):
        if isinstance(candidate, OmegaConfBaseException) and candidate.parent_node is not None:
            parent = candidate.parent_node
            if isinstance(parent, DictConfig) and isinstance(candidate.key, str) and candidate.key not in parent:
                where = str(candidate.full_key).rpartition(".")[0] or "the configuration"
                return f"{where} has no key {candidate.key!r}{_nearest(candidate.key, map(str, parent))}"
    if isinstance(error, OSError) and error.filename is not None:
        return (
            f"cannot use {error.filename}: {error.strerror}; name another output folder by run_dir=FOLDER"
            if error.filename2 is None
            else str(error)
        )
    message = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if isinstance(error, ValueError | RuntimeError | hydra.errors.HydraException | OmegaConfBaseException):
        return message or type(error).__name__
    return f"{type(error).__name__}: {message} ({FULL_ERROR}=1 shows the traceback)"


def _where(error: InstantiationException) -> str:
    """The configuration key that an object could not be made from, as Hydra's message ends."""
    key = str(error).rpartition("full_key: ")[2].strip() if "full_key: " in str(error) else ""
    return f"{key}: " if key else ""


def _nearest(wrong: str, names: Iterable[str]) -> str:
    names = sorted(names)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(names)}"
