"""The accuracy study: which arm wins, on which data, by how much.

One command a stage, each a Hydra multirun that goes on where it was stopped, and the report of its runs:

    uv run python benchmarks/accuracy/study.py search     # each arm's learning rate and weight decay
    uv run python benchmarks/accuracy/study.py choose     # writes them to conf/tuned/chosen.yaml, to be committed
    uv run python benchmarks/accuracy/study.py explore    # all arms
    uv run python benchmarks/accuracy/study.py budgets    # other numbers of steps, other batch sizes
    uv run python benchmarks/accuracy/study.py final      # six arms on the test sets, once; all else is validation
    uv run python benchmarks/accuracy/study.py results    # docs/results.md and its pictures

``--jobs 2`` runs so many at once, which share the cores. Overrides go to adadim-train: ``places.cifar10=FOLDER``
(a folder of parquet files; by default the hub), ``places.torchvision=FOLDER``, ``places.medmnist=FOLDER``, or
``trainer.max_steps=4`` for a try. Runs go to ``runs/accuracy/STAGE``, the figures of all that have ended to
``benchmarks/results/accuracy/STAGE.json``.
"""

import argparse
import csv
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from adadim_lightning.report.statistics import thinned

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "accuracy"
ARMS = sorted(path.stem for path in (HERE / "conf" / "arm").glob("*.yaml"))
FINAL_ARMS = ["simclr", "vicreg", "fixed_50", "linear", "adadim_paper", "adadim"]
SEARCHED = [*FINAL_ARMS, "barlow_twins", "adadim_barlow_twins"]
# The arm whose search serves a variant, by the beginning of its name; the first match counts.
FAMILIES = (
    ("simclr_", "simclr"),
    ("vicreg_", "vicreg"),
    ("fixed_", "fixed_50"),
    ("cosine", "linear"),
    ("adadim_paper_", "adadim_paper"),
    ("one_batch_", "adadim_paper"),
    ("kappa_match", "adadim"),
    ("adadim_", "adadim"),
    ("", "adadim_paper"),  # kappa 1 and a schedule of the effective rank
)
# As adadim-train and adadim-report, where the package lies on the path without being installed.
TRAIN, REPORT = (
    (sys.executable, "-c", f"from adadim_lightning.cli.{name} import main; main()") for name in ("train", "report")
)
METRIC = "evaluation/trained_linear_balanced"
CURVES = ("dynamics/H_R", "dynamics/I_RZ", "dynamics/ER_R", "dynamics/ER_Z", "balance/alpha", "balance/beta")
VERSIONS = ("python", "torch", "lightning")
POINTS = 20  # of a committed curve at most, the first and the last among them
LARGE, SMALL = ["cifar10", "fashion_mnist"], ["pneumonia", "retina", "digits"]  # by images for validation
Pair = tuple[float, float]
RATES, DECAYS = (0.00075, 0.0015, 0.003, 0.006, 0.012), (0.0001, 0.1)

STAGES: dict[str, dict[str, str]] = {
    "search": {
        "experiment": "accuracy",
        "split": "validation",
        "+arm": ",".join(SEARCHED),
        "data": ",".join(f"study_{x}" for x in LARGE),
        "seed": "100",
        "optimizer.lr": ",".join(map(str, RATES)),
        "optimizer.weight_decay": ",".join(map(str, DECAYS)),
    },
    "explore": {
        "experiment": "accuracy",
        "split": "validation",
        "+arm": ",".join(ARMS),
        "data": ",".join(f"study_{x}" for x in LARGE),
        "seed": "0,1,2",
    },
    "final": {
        "experiment": "accuracy",
        "split": "test",
        "+arm": ",".join(FINAL_ARMS),
        "data": ",".join(f"study_{x}" for x in LARGE + SMALL),
        "seed": ",".join(map(str, range(10))),
    },
    "budgets": {
        "experiment": "accuracy",
        "split": "validation",
        "+arm": "simclr,vicreg,adadim_paper,adadim",
        "+budget": "short_run,long_run,small_batches,large_batches",
        "data": "study_cifar10",
        "seed": "0,1,2",
    },
    "gpu": {
        "experiment": "accuracy_gpu",
        "split": "test",
        "+arm": "simclr,vicreg,adadim_paper,adadim",
        "data": "study_cifar10_whole",
        "seed": "0,1,2",
    },
}


def run(stage: str, folder: Path, jobs: int, extra: list[str]) -> int:
    """Train what is missing of a stage."""
    settings = [f"{key}={value}" for key, value in STAGES[stage].items()]
    given = {argument.partition("=")[0] for argument in extra}
    settings = [x for x in settings if x.partition("=")[0] not in given]
    overrides = ["--config-dir", str(HERE / "conf"), "-m", *settings, *extra, f"run_dir={folder}", "resume=true"]
    if jobs > 1:
        overrides += ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}"]
    print(shlex.join(["adadim-train", *overrides]), flush=True)
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Whoever tells a group of processes to stop tells the training, too; its figures are to be collected then.
    signal.signal(signal.SIGTERM, lambda *_: None)
    # Where a small run is given a GPU, it computes as on a CPU.
    exact = {"OMP_NUM_THREADS": str(threads(jobs)), "NVIDIA_TF32_OVERRIDE": "0"}
    environment = {**exact, **os.environ, "PYTHONPATH": path}
    return subprocess.run([*TRAIN, *overrides], env=environment, check=False).returncode


def collect(stage: str, folder: Path, path: Path, jobs: int) -> list[dict[str, Any]]:
    """Figures of the runs that have ended, and of those before them that this machine does not hold."""
    found = {}
    if path.exists():
        found = {_key(record): _committed(record) for record in json.loads(path.read_text())["runs"]}
    for file in folder.glob("*/summary.json"):
        summary = json.loads(file.read_text())
        if summary["status"] == "ok":
            device = _device(summary["config"]["trainer"]["accelerator"], jobs)
            record = _record(summary, file.with_name("metrics.csv"), device)
            found[_key(record)] = record
        elif summary["status"] == "failed":
            print(f"{file.parent} failed: {summary['error']}", file=sys.stderr)
    runs = [found[key] for key in sorted(found)]
    if runs:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(record) for record in runs)
        path.write_text(f'{{"stage": "{stage}", "runs": [\n{lines}\n]}}\n')
    return runs


def _record(summary: dict[str, Any], metrics: Path, device: str) -> dict[str, Any]:
    config = summary["config"]
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    curves = {"step": [int(row["step"]) + 1 for row in rows]}
    curves |= {key: [round(float(row[key]), 4) if row[key] else None for row in rows] for key in CURVES}
    return _committed(
        {
            "data": config["data"]["name"],
            "arm": config["arm"],
            "seed": summary["seed"],
            "split": config["split"],
            "lr": config["optimizer"]["lr"],
            "weight_decay": config["optimizer"]["weight_decay"],
            "steps": curves["step"][-1],
            "batch_size": config["data"]["batch_size"],
            "objective": {key: value for key, value in config["objective"].items() if key != "_target_"},
            "balance": _plain(config["balance"]),
            "seconds": summary["seconds"],
            "device": device,
            "versions": summary["versions"],
            "values": {key: round(value, 6) for key, value in summary.items() if key.startswith("evaluation/")},
            "curves": curves,
        }
    )


def _committed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with no more than what is needed of it."""
    kept = thinned(len(record["curves"]["step"]), POINTS)
    curves = {key: [values[i] for i in kept] for key, values in record["curves"].items()}
    return record | {"versions": {name: record["versions"][name] for name in VERSIONS}, "curves": curves}


def _plain(value: Any) -> Any:
    """A configuration with the last part of its classes' names alone."""
    if not isinstance(value, dict):
        return value
    return {key: x.rpartition(".")[2] if key == "_target_" else _plain(x) for key, x in value.items()}


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    names = ("data", "arm", "lr", "weight_decay", "seed", "steps", "batch_size", "split")
    return *(record[name] for name in names), json.dumps([record["objective"], record["balance"]], sort_keys=True)


def threads(jobs: int) -> int:
    """CPU cores of a run."""
    return int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // jobs)))


def _device(accelerator: str, jobs: int) -> str:
    """What the runs that lie on this machine were trained on."""
    if accelerator == "cpu":
        return f"{threads(jobs)} of {os.cpu_count()} cores of a CPU ({platform.machine()})"
    import torch  # takes a second

    return str(torch.cuda.get_device_name())


def family(arm: str) -> str:
    """The arm whose search serves this one."""
    return arm if arm in SEARCHED else next(of for start, of in FAMILIES if arm.startswith(start))


def choose() -> None:
    """Write the learning rate and weight decay that were best on validation, and for each variant its family's.

    Each of the large sets has its own; those with few images for validation take what was best on both together.
    """
    scores: dict[str, dict[str, dict[Pair, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for record in json.loads((RESULTS / "search.json").read_text())["runs"]:
        pair = record["lr"], record["weight_decay"]
        scores[record["arm"]][record["data"]][pair].append(record["values"][METRIC])
    lines = ["# @package _global_", "# Learning rate and weight decay of each arm, by `study.py choose`", "tuned:"]
    for name, sets in {**{x: [x] for x in LARGE}, "both": LARGE}.items():
        lines.append(f"  {name}:")
        for arm in ARMS:
            tried = scores[family(arm)]
            found = [tried[x] for x in sets if x in tried] or list(tried.values())
            pairs = set(found[0]).intersection(*found)
            rate, decay = max(sorted(pairs), key=lambda pair: fmean(fmean(x[pair]) for x in found))
            lines.append(f"    {arm}: {{lr: {rate:g}, weight_decay: {decay:g}}}")
    lines += [f"  {name}: ${{tuned.both}}" for name in SMALL]
    path = HERE / "conf" / "tuned" / "chosen.yaml"
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "choose", "results"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="for a try: runs and figures go there")
    parser.add_argument("extra", nargs="*", help="overrides of adadim-train")
    arguments = parser.parse_intermixed_args()
    if arguments.stage == "results":
        import results

        results.main()
        return
    if arguments.stage == "choose":
        choose()
        return
    folder = arguments.folder or Path("runs/accuracy") / arguments.stage
    code = run(arguments.stage, folder.resolve(), arguments.jobs, arguments.extra)
    path = (folder if arguments.folder else RESULTS) / f"{arguments.stage}.json"
    runs = collect(arguments.stage, folder, path, arguments.jobs)
    print(f"{len(runs)} runs are in {path}")
    if runs and folder.exists():
        subprocess.run([*REPORT, str(folder), "--metric", METRIC], check=False)
    sys.exit(code)


if __name__ == "__main__":
    main()
