"""What `import adadim_lightning` costs over `import lightning`, and how soon `adadim-train --help` answers.

Run it by ``uv run python benchmarks/imports.py [--repeats N]``. Each contestant runs in fresh interpreters,
in turns.
"""

import argparse
import subprocess
import sys
import time
from statistics import median

LIGHTNING = "import lightning"
EVERYTHING = f"{LIGHTNING}; import adadim_lightning as a; [getattr(a, name) for name in a.__all__]"
HELP = "import sys; sys.argv = ['adadim-train', '--help']; from adadim_lightning.cli.train import main; main()"


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {LIGHTNING: [], EVERYTHING: [], HELP: []}
    for code in times:
        seconds(code)  # warm the file cache
    for _ in range(arguments.repeats):
        for code, measured in times.items():
            measured.append(seconds(code))
    base, ours, usage = (median(measured) for measured in times.values())
    print(f"import lightning                               {base:6.2f} s")
    print(f"import lightning and all of adadim_lightning   {ours:6.2f} s   ratio {ours / base:.3f}   goal <= 1.1")
    print(f"adadim-train --help                            {usage:6.2f} s")


if __name__ == "__main__":
    main()
