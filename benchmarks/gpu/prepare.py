"""Unpack the parquet files of CIFAR-10 to arrays, with pyarrow and Pillow alone.

    python benchmarks/gpu/prepare.py PARQUET_FOLDER ARRAYS_FOLDER

Each ``train-*.parquet`` and ``test-*.parquet`` (columns ``img`` and ``label``, as on the hub) becomes a ``.npz``
beside the others; what is there already is left alone, so the files may come in several parts.
"""

import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet
from PIL import Image


def unpack(source: Path, target: Path) -> None:
    """Decode one file."""
    table = pyarrow.parquet.read_table(source)
    column = "img" if "img" in table.column_names else "image"
    encoded = (row["bytes"] for row in table[column].to_pylist())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = list(pool.map(lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), encoded))
    temporary = target.with_suffix(".tmp.npz")
    np.savez(temporary, images=np.stack(images), labels=np.asarray(table["label"].to_pylist()))
    os.replace(temporary, target)


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    files = sorted(source.glob("*.parquet"))
    if not files and not any(target.glob("*.npz")):
        sys.exit(f"no parquet file is in {source}; the first argument is the folder of CIFAR-10's")
    for file in files:
        if not (target / f"{file.stem}.npz").exists():
            unpack(file, target / f"{file.stem}.npz")
            print(f"unpacked   {file.name}", flush=True)


if __name__ == "__main__":
    main()
