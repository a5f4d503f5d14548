"""Reads the file that Weights & Biases writes for a run, without their service."""

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adadim_lightning.report.runs import nested

# The format is LevelDB's log: blocks that hold records of CRC, length, kind and body; one that does not fit into
# a block goes on in the next.
MAGIC = b":W&B"
HEADER, BLOCK = 7, 32768
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class WandbFile:
    """What such a file says.

    Attributes:
        name: what its user called the run; empty where nobody did.
        config: the configuration, nested.
        rows: what was logged.
        summary: the last values.
        exit_code: None while it runs.
        seconds: how long it took.
        cut: the byte where damage begins, 0 if there is none.
    """

    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    seconds: float | None = None
    cut: int = 0


def read_wandb_file(path: Path) -> WandbFile:
    """Read a ``run-ID.wandb``; a file that ends in the middle of a record gives what is whole.

    Raises:
        ValueError: the file is of another kind.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    if not data.startswith(MAGIC):
        raise ValueError("it does not begin as one")
    found = WandbFile()
    for body in _bodies(data, found):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        try:
            record.ParseFromString(body)
        except DecodeError as error:
            raise ValueError(f"a record cannot be decoded: {error}") from error
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.config |= _items(record.run.config.update)
            found.name = str(record.run.display_name) or found.name
        elif kind == "config":
            found.config |= _items(record.config.update)
        elif kind == "history":
            found.rows.append(_items(record.history.item))
        elif kind == "summary":
            found.summary |= _items(record.summary.update)
        elif kind == "exit":
            found.exit_code = int(record.exit.exit_code)
    seconds = [row["_runtime"] for row in [*found.rows, found.summary] if "_runtime" in row]
    found.seconds = max(map(float, seconds), default=None)
    found.config = nested(found.config)
    found.config.pop("_wandb", None)  # notes of its own
    return found


def _bodies(data: bytes, found: WandbFile) -> Iterator[bytes]:
    place, body = HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:  # too little is left of the block for a record
            place += BLOCK - place % BLOCK
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, place)
        part = data[place + HEADER : place + HEADER + length]
        if len(part) < length:  # still being written
            return
        if zlib.crc32(part, zlib.crc32(bytes([kind]))) != crc:
            found.cut = place
            return
        body = part if kind in (WHOLE, FIRST) else body + part
        if kind in (WHOLE, LAST):
            yield body
        place += HEADER + length


def _items(items: Iterable[Any]) -> dict[str, Any]:
    """Key and value of each item; a nested key, which W&B makes of dictionaries, becomes dotted."""
    found = {}
    for item in items:
        key = item.key or ".".join(item.nested_key)
        found[key] = json.loads(item.value_json)
    return found
