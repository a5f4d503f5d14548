"""What a run folder says about its run: the one file that all commands read, and whether the run still lives."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

SUMMARY = "summary.json"
LOCK = ".lock"
DIED = "the process ended without a word: killed, or out of memory"


def run_lock(folder: Path) -> FileLock:
    """The lock that a run holds on its folder while it lives; the system frees it however the process ends."""
    return FileLock(folder / LOCK)


def is_running(folder: Path) -> bool:
    """Whether a living process, here or on another host with the same disk, holds the folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with run_lock(folder).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that cannot be written to, such as a copy
        return False


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a run; None where there is none.

    A run writes its summary when it starts, with the status "running". One that says so while nothing holds its
    folder died on the way, and is given the status "failed".

    Raises:
        ValueError: the file is no summary.
    """
    path = folder / SUMMARY
    try:
        summary = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a summary of a run: {error}; remove it to go on from the checkpoints"
        ) from None
    if not isinstance(summary, dict) or "status" not in summary:
        raise ValueError(f"{path} is not a summary of a run: it has no status")
    if summary["status"] == "running" and not is_running(folder):
        summary |= {"status": "failed", "error": DIED}
    return summary


def run_folders(root: Path) -> Iterator[Path]:
    """All run folders at and below a folder, in order of their names; numbers in numeric order."""
    found = [path.parent for path in root.rglob(SUMMARY)]
    yield from sorted(
        found, key=lambda path: [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.parts]
    )
