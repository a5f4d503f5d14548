"""What all commands share: Hydra around a task, and one line instead of a traceback."""

import argparse
import difflib
import functools
import glob
import inspect
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from adadim_lightning.cli.versions import own_version

FULL_ERROR = "HYDRA_FULL_ERROR"
INTERRUPTED = 130  # as shells number a Ctrl-C
# Hydra's plugins by a word in the names of their options, and our extras that install them.
PLUGINS = {
    "submitit": ("hydra-submitit-launcher", "slurm"),
    "joblib": ("hydra-joblib-launcher", "joblib"),
    "optuna": ("hydra-optuna-sweeper", "optuna"),
}
OVERRIDE = re.compile(r"\+{0,2}[A-Za-z_][\w./@]*=")


def config_dir() -> Path:
    """Folder of the configuration groups: inside the package when installed, else in the checkout."""
    package = Path(__file__).parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parents[1] / "conf"


EVAL_DATA = {key: f"${{data.{key}}}" for key in ("image_size", "channels", "mean", "std")}


@functools.cache  # once in a process: Hydra 1.4 minds a second time
def offer_eval_data() -> None:
    """Make every option of ``data`` one of ``eval_data`` too, at the size and in the colors of ``data``."""
    store = ConfigStore.instance()
    root = config_dir() / "data"
    for path in sorted(root.rglob("*.yaml")):
        node = OmegaConf.load(path)
        assert isinstance(node, DictConfig)
        node.pop("defaults", None)  # of views and backbone there is one, that of data
        group = "/".join(("eval_data", *path.relative_to(root).parts[:-1]))
        node = OmegaConf.merge(node, EVAL_DATA)
        store.store(group=group, name=path.stem, node=node, provider="adadim-lightning")


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
        # Hydra 1.4 asks for a list of allowed classes; ours is in `trust`, and 1.3 takes none.
        warnings.filterwarnings("ignore", r"\s*hydra\.utils\.instantiate\(\) resolved")
        try:
            with _one_line_each(wanted):
                return task(config)
        except Exception as error:
            # In a sweep the error goes to the sweeper; alone, Hydra would add a line of its own to it.
            if wanted == "1" or HydraConfig.get().mode != RunMode.RUN:
                raise
            _fail(command, error)
        finally:
            os.environ[FULL_ERROR] = "1"

    if "--version" in sys.argv[1:]:  # Hydra would tell its own
        print(own_version())
        return
    offer_eval_data()
    sys.argv[1:] = quoted(sys.argv[1:])
    warnings.filterwarnings("ignore", "The version_base parameter is deprecated")  # by Hydra 1.4; 1.3 needs it
    # Hydra raises instead of printing a traceback and ending the process by itself.
    os.environ[FULL_ERROR] = "1"
    try:
        with _one_line_each(wanted):
            hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)(quiet_task)()
    except Exception as error:
        if wanted == "1":
            raise
        _fail(command, error)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        _set_environment(FULL_ERROR, wanted)


def quoted(arguments: Sequence[str]) -> list[str]:
    """Quote what Hydra's grammar has no place for, so that paths work as people type them.

    Args:
        arguments: the command line. Overrides that Hydra understands stay as they are, but for a value with commas
            that is an existing path, and a leading ``~/``.

    Example:
        >>> quoted(["data.root=Photos (2023)", "seed=1", "data.classes=[a,b]"])
        ['data.root="Photos (2023)"', 'seed=1', 'data.classes=[a,b]']
    """
    multirun = any(x in ("-m", "--multirun") for x in arguments)
    return [_quoted(x, multirun) if OVERRIDE.match(x) else x for x in arguments]


def _quoted(argument: str, multirun: bool) -> str:
    key, _, value = argument.partition("=")
    if value.startswith("~/"):
        value = os.path.expanduser(value)
    parses = _parses(argument := f"{key}={value}")
    if parses and not ("," in value and os.path.exists(value)):
        return argument
    if os.path.exists(value) or not value.startswith(tuple("[{'\"")):
        parts = value.split(",") if multirun and not os.path.exists(value) else [value]
        attempt = f"{key}={','.join(x if x and _parses(f'{key}={x}') else _quote(x) for x in parts)}"
        if len(parts) == 1:
            attempt = f"{key}={_quote(value)}"
        if _parses(attempt):
            return attempt
    return argument


def _quote(value: str) -> str:
    # A backslash counts as itself, but before a quotation mark.
    return '"' + re.sub(r'(\\*)("|$)', lambda x: 2 * x[1] + ('\\"' if x[2] else ""), value) + '"'


def _parses(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except Exception:
        return False
    return True


@contextmanager
def _one_line_each(full: str | None) -> Iterator[None]:
    """Make a line of every warning, and of what is wrong with the flags, unless all of it is wanted."""
    usual = warnings.formatwarning, argparse.ArgumentParser.error
    if full != "1":
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
        argparse.ArgumentParser.error = _refuse_flags  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        warnings.formatwarning, argparse.ArgumentParser.error = usual  # type: ignore[method-assign]


def _refuse_flags(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    hint = "put flags such as -m before all overrides" if "=" in message else "--help shows the usage"
    raise ValueError(f"{message}; {hint}")


def _fail(command: str, error: Exception) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes, one speaks
        print(f"{command}: error: {_printable(one_line(error))}", file=sys.stderr)
    sys.exit(1)


def _printable(text: str) -> str:
    """A text without line breaks and without what would move the cursor or color the terminal."""
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def one_line(error: BaseException) -> str:
    """The cause of an error and its fix, in one line."""
    cause = error.__cause__
    key = _configured_key(error)
    if key is not None:
        reason = cause if isinstance(error, InstantiationException) and cause else error
        return f"{key}: {_unknown_argument(reason) or _message(reason)}"
    if isinstance(error, MissingConfigException) and (missing := _missing_plugin(str(error.missing_cfg_file))):
        return missing
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = error.missing_cfg_file.rpartition("/")
        shown = [name for name in error.options if not name.startswith("_")]
        # An option may lie deeper, as data=medmnist/retina does.
        folder = config_dir() / re.sub("^eval_data", "data", group)
        if group.startswith(("data/", "eval_data/")):  # Hydra lists what lies beside such a folder
            shown = [path.stem for path in folder.glob("*.yaml")] or shown
        deeper = next(folder.glob(f"*/{glob.escape(option)}.yaml"), None)
        if deeper is not None:
            meant = str(deeper.relative_to(folder).with_suffix(""))
            return f"{group} has no option {option!r}; did you mean {meant!r}?"
        return f"{group or 'the configuration'} has no option {option!r}{_nearest(option, shown)}"
    for candidate in (error, cause):
        if isinstance(candidate, InterpolationResolutionError):
            break  # its key is there; what its value refers to is not
        if isinstance(candidate, OmegaConfBaseException) and candidate.parent_node is not None:
            parent = candidate.parent_node
            if isinstance(parent, DictConfig) and isinstance(candidate.key, str) and candidate.key not in parent:
                where = str(candidate.full_key).rpartition(".")[0] or "the configuration"
                hint = _nearest(candidate.key, map(str, parent), new=str(candidate.full_key))
                return f"{where} has no key {candidate.key!r}{hint}"
    if isinstance(error, OSError) and error.filename is not None:
        hint = "; name another output folder by run_dir=FOLDER" if _is_output(str(error.filename)) else ""
        return f"cannot use {error.filename}: {error.strerror}{hint}"
    return _message(error)


def _missing_plugin(option: str) -> str | None:
    """The line that installs the plugin of Hydra whose option was asked for; None if it has one, or needs none."""
    group, _, name = option.rpartition("/")
    for word, (package, extra) in PLUGINS.items():
        if group in ("hydra/launcher", "hydra/sweeper") and word in name:
            try:
                version(package)
            except PackageNotFoundError:
                return f"{package} is not installed; pip install 'adadim-lightning[{extra}]'"
    return None


def _is_output(path: str) -> bool:
    """Whether a path lies in the folder of the run."""
    if not HydraConfig.initialized():
        return True  # before a run begins, Hydra touches nothing but its folder
    folder = Path(HydraConfig.get().runtime.output_dir)
    return folder in (Path(path).absolute(), *Path(path).absolute().parents)


def _message(error: BaseException) -> str:
    """What an error says, with its type where only that tells what kind of thing went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if _lost_worker(error):
        return (
            "a worker of the data loader was killed, perhaps out of memory; fewer take less: data.num_workers=..."
        )
    if _out_of_memory(error):
        return "out of memory; lower data.batch_size, or take a smaller backbone or image size"
    if lines and lines[0].startswith("Error(s) in loading state_dict"):
        return f"the checkpoint does not fit the model, resume with the settings it was trained with: {lines[1]}"
    message = "; ".join(lines)
    if re.search(r"mismatched input '='|no viable alternative at input '.*='", message):
        message += "; quote a value that holds an equals sign, as in 'ckpt=[\"epoch=1.ckpt\"]'"
    plain = (ValueError, RuntimeError, hydra.errors.HydraException, OmegaConfBaseException)
    # Lightning's own error for a wrong setting; importing it here would cost seconds.
    if isinstance(error, plain) or type(error).__name__ == "MisconfigurationException":
        return message or type(error).__name__
    return f"{type(error).__name__}: {message} ({FULL_ERROR}=1 shows the traceback)"


def _lost_worker(error: BaseException) -> bool:
    """Whether a process that loads images died: its pipe breaks, if PyTorch does not notice before."""
    if "DataLoader worker" in str(error):
        return True
    files = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, EOFError | ConnectionError) and any(x.endswith("dataloader.py") for x in files)


def _out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory left, of the host or of a GPU."""
    told = any(words in str(error) for words in ("can't allocate memory", "CUDA out of memory"))
    return told or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _configured_key(error: BaseException) -> str | None:
    """Key of the object that could not be made: Hydra 1.3 puts it into its message, 1.4 into a note."""
    texts = list(getattr(error, "__notes__", []))
    if isinstance(error, InstantiationException):
        texts.append(str(error))
    keys = [text.partition("full_key: ")[2].partition("\n")[0].strip(" ':") for text in texts]
    return next(filter(None, keys), "configuration" if isinstance(error, InstantiationException) else None)


def _unknown_argument(error: BaseException) -> str | None:
    """The near match of a key that the object does not take, which only its constructor noticed."""
    _, found, wrong = str(error).partition("got an unexpected keyword argument '")
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    target = next((names["_target_"] for names in reversed(frames) if callable(names.get("_target_"))), None)
    if not found or target is None:
        return None
    names = [name for name in inspect.signature(target).parameters if name not in ("self", "args", "kwargs")]
    wrong = wrong.partition("'")[0]
    return f"there is no key {wrong!r}{_nearest(wrong, names)}"


def nearest(wrong: str, names: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """The name that someone probably meant."""
    near = difflib.get_close_matches(wrong, sorted(names), n=1, cutoff=cutoff)
    return near[0] if near else None


def _nearest(wrong: str, names: Iterable[str], *, new: str | None = None) -> str:
    """A hint at the near match, or at all names there are."""
    names = sorted(name for name in names if not name.startswith("_"))
    near = nearest(wrong, names)
    if near is not None:
        return f"; did you mean {near!r}?"
    return f"; it has {', '.join(names) or 'none'}" + (f"; add a new one by +{new}=..." if new else "")
