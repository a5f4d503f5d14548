"""Reads the file that wandb writes for a run, record by record."""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import MetricRecord, Record  # type: ignore[attr-defined]

BLOCK = 32768


def records(path: Path) -> Iterator[Record]:
    """The records of a LevelDB log: chunks of checksum, length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    data, place, body = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        chunk = data[place + 7 : place + 7 + length]
        place += 7 + length
        body = chunk if kind <= 2 else body + chunk
        if kind in (1, 4) and len(chunk) == length:
            record = Record()
            record.ParseFromString(body)
            yield record


def items(found: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in found}


@dataclass
class Found:
    """What a run told wandb."""

    folder: Path
    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, MetricRecord] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None

    def values(self, key: str) -> list[Any]:
        return [row[key] for row in self.history if key in row]

    def epochs(self, key: str) -> list[int]:
        return [row["epoch"] for row in self.history if key in row]


def read_run(path: Path) -> Found:
    found = Found(path.parent)
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= items(record.run.config.update)
        elif kind == "config":
            found.config |= items(record.config.update)
        elif kind == "history":
            found.history.append(items(record.history.item))
        elif kind == "summary":
            found.summary |= items(record.summary.update)
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def wandb_runs(folder: Path, *, finished: bool = True) -> list[Found]:
    """All runs in a folder, oldest first; wandb's own process writes the end a moment after `finish`."""
    paths = sorted(folder.rglob("offline-run-*/*.wandb"))
    until = time.monotonic() + (20 if finished else 0)
    while True:
        found = [read_run(path) for path in paths]
        if all(run.exit_code is not None for run in found) or time.monotonic() > until:
            return found
        time.sleep(0.05)
