"""Arms: runs that differ in nothing but their seed."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from adadim_lightning.report.runs import SEEDS, UNREADABLE, RunRecord, flattened

# What a run is called, where it writes and what it prints make no other arm.
IGNORED = {"seed", "run_dir", "resume", "logger", "hydra", "optimized_metric", "show_views", "trust"}
MOST_SHOWN = 3  # differing keys of the configuration in a label
WIDEST_VALUE = 40  # characters of their values
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # in memory, of an object that a logger wrote as text
TARGET = "_target_"  # class that Hydra makes of a node


@dataclass(eq=False)
class Arm:
    """Runs of one configuration.

    Attributes:
        label: the overrides in which it differs from the other arms; without any, what its user called its runs.
        runs: its runs, in order of their folders.
    """

    label: str
    runs: list[RunRecord] = field(default_factory=list)

    @property
    def finished(self) -> list[RunRecord]:
        """The runs that came to their end."""
        return [run for run in self.runs if run.finished]

    @property
    def overrides(self) -> list[str]:
        """What led to it, in the fewest words of its runs."""
        return min((list(_overrides(run).values()) for run in self.runs), key=len)


def make_arms(runs: Sequence[RunRecord]) -> list[Arm]:
    """Group runs by their configuration, seed and folder apart; unreadable ones belong to none.

    A run that failed before its configuration was resolved joins the arm of the same overrides. Of runs whose
    command line nobody noted, those of one configuration are an arm if their seeds differ, else if they are called
    the same.
    """
    arms: dict[str, Arm] = {}
    late = []
    for run in runs:
        if run.status == UNREADABLE:
            continue
        config = _compared(run)
        unknown = not run.config and _title(run) is None
        if unknown or any("${" in value for value in config.values()):
            late.append(run)
            continue
        arms.setdefault(json.dumps(config, sort_keys=True), Arm("")).runs.append(run)
    for run in late:
        key = f"overrides {sorted(_overrides(run).values())}" if run.overrides is not None else f"run {run.name}"
        same = (arm for arm in arms.values() if run.overrides is not None and _has(arm, run))
        arm = next(same, None) or arms.setdefault(key, Arm(""))
        arm.runs.append(run)
    parts = [part for arm in arms.values() for part in _by_title(arm)]
    found = sorted(parts, key=lambda arm: min(map(runs.index, arm.runs)))
    _label(found)
    return found


def _by_title(arm: Arm) -> list[Arm]:
    seeds = {run.seed for run in arm.runs}
    titles = dict.fromkeys(_title(run) for run in arm.runs)
    if None not in seeds and len(seeds) == len(arm.runs):
        return [arm]
    return [Arm("", [run for run in arm.runs if _title(run) == title]) for title in titles]


def _title(run: RunRecord) -> str | None:
    """What its user called a run, where its command line does not tell more."""
    return run.title if run.overrides is None else None


def _has(arm: Arm, run: RunRecord) -> bool:
    wanted = sorted(_overrides(run).values())
    return any(other.overrides is not None and sorted(_overrides(other).values()) == wanted for other in arm.runs)


def _compared(run: RunRecord) -> dict[str, str]:
    """The configuration without what differs between runs of one arm."""
    config = flattened(run.config)
    folder = config.get("run_dir", "").strip("./")
    return {
        key: ADDRESS.sub("", value)
        for key, value in config.items()
        if key.partition(".")[0] not in IGNORED
        and not _is_private(key)
        and not (key.rpartition(".")[2] in SEEDS and value == str(run.seed))
        and not (folder and f"/{folder}/" in f"/{value}/")
    }


def _is_private(key: str) -> bool:
    """Whether a tool made the key for itself; those in two underscores are Hydra's instructions."""
    return any(part.startswith("_") and not part.endswith("_") for part in key.split("."))


def _overrides(run: RunRecord) -> dict[str, str]:
    """Overrides by their key, without those that make no other arm."""
    found = {text.lstrip("+~").partition("=")[0]: text for text in run.overrides or ()}
    return {key: text for key, text in found.items() if key.replace("/", ".").partition(".")[0] not in IGNORED}


def _label(arms: list[Arm]) -> None:
    keyed = [{text.lstrip("+~").partition("=")[0]: text for text in arm.overrides} for arm in arms]
    keys = dict.fromkeys(key for texts in keyed for key in texts)
    told = [key for key in keys if len(arms) == 1 or len({texts.get(key) for texts in keyed}) > 1]
    for arm, texts in zip(arms, keyed, strict=True):
        arm.label = " ".join(texts[key] for key in told if key in texts)
        titles = {_title(run) for run in arm.runs}
        if not arm.label and len(titles) == 1:
            arm.label = titles.pop() or ""
    for group in _alike(arms):
        _add_config(group)
    for arm in arms:
        noted = any(run.overrides is not None for run in arm.runs)
        more = f" and {len(arm.runs) - 1} more" if len(arm.runs) > 1 else ""
        arm.label = arm.label or ("default" if noted else arm.runs[0].name + more)
    for group in _alike(arms):
        for arm in group:
            arm.label = f"{arm.label} ({arm.runs[0].name})"


def _alike(arms: list[Arm]) -> list[list[Arm]]:
    labels = [arm.label for arm in arms]
    return [
        [arm for arm in arms if arm.label == label] for label in dict.fromkeys(labels) if labels.count(label) > 1
    ]


def _add_config(arms: list[Arm]) -> None:
    """Same command line, or none that is known: tell arms apart by what differs in their configurations."""
    configs = [_compared(arm.runs[0]) for arm in arms]
    keys = dict.fromkeys(key for config in configs for key in config)
    told = [key for key in keys if _is_shown(key) and len({config.get(key) for config in configs}) > 1]
    told = told[:MOST_SHOWN]
    for arm, config in zip(arms, configs, strict=True):
        texts = [f"{key.removesuffix('.' + TARGET)}={_short(config[key])}" for key in told if key in config]
        arm.label = " ".join([*([arm.label] if arm.label else []), *texts])


def _is_shown(key: str) -> bool:
    last = key.rpartition(".")[2]
    return last == TARGET or not last.startswith("_")


def _short(value: str) -> str:
    text = " ".join(value.split())
    return text if len(text) <= WIDEST_VALUE else text[: WIDEST_VALUE - 1] + "\N{HORIZONTAL ELLIPSIS}"
