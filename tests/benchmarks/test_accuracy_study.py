"""The accuracy study: its data, its arms, and the figures that it collects."""

import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import study
import study_data
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from adadim_lightning import AdaDimLoss, Balance, Statistics
from adadim_lightning.cli.app import config_dir
from tests.data.pictures import DATASETS, encode

STUDY = Path(__file__).parents[2] / "benchmarks" / "accuracy"
ROOT = STUDY.parents[1]
real_data = pytest.mark.skipif(not DATASETS.exists(), reason=f"the real files are not at {DATASETS}")


ARMS = sorted(path.stem for path in (STUDY / "conf" / "arm").glob("*.yaml"))


@cache
def composed(arm: str, data: str = "study_cifar10") -> DictConfig:
    """What the study trains, by adadim-train's configuration and its own."""
    overrides = ["experiment=accuracy", f"+arm={arm}", f"data={data}"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", [f"hydra.searchpath=[file://{STUDY / 'conf'}]", *overrides])


def measured(er_z: float) -> Statistics:
    return Statistics(er_z=er_z, er_r=20.0, i_rz=0.5, rows=4096, dim_r=128, dim_z=512)


# Of each arm: alpha before the first estimate; alpha at half time with ER(Z) of an eighth of d_Z, and the phase of
# beta there; gamma; kappa.
EXPECTED = {
    "simclr": (1, 1, 1, 0, 1),
    "vicreg": (0, 0, 0, 0, 1),
    "barlow_twins": (0, 0, 0, 0, 1),
    "fixed_25": (0.25, 0.25, 0.25, 0, 1),
    "fixed_50": (0.5, 0.5, 0.5, 0, 1),
    "fixed_75": (0.75, 0.75, 0.75, 0, 1),
    "linear": (0.5, 0.5, 0.5, 0, 1),
    "cosine": (0.5, 0.5, 0.5, 0, 1),
    "adadim_paper": (0, 0.125, 0.125, 0.1, 1),
    "adadim_paper_gamma_0": (0, 0.125, 0.125, 0, 1),
    "adadim_paper_gamma_1": (0, 0.125, 0.125, 1, 1),
    "one_batch_min": (0, 0.125, 0.125, 1, 1),
    "streaming_gamma_0": (0, 0.125, 0.125, 0, 1),
    "streaming_gamma_0_1": (0, 0.125, 0.125, 0.1, 1),
    "streaming_gamma_1": (0, 0.125, 0.125, 1, 1),
    "streaming_gamma_minus_1": (0, 0.125, 0.125, -1, 1),
    "order_1": (0, 0.125, 0.125, 1, 1),
    "floor": (0, 0.125, 0.125, 1, 1),
    "lagged": (0, 0.125, 0, 1, 1),
    "reversed": (1, 0.875, 0.875, 1, 1),
    "kappa_match": (0, 0.125, 0.125, 1, "match"),
    "simclr_information": (1, 1, 1, 1, 1),
    "vicreg_information": (0, 0, 1, 1, 1),
    "adadim_gamma_0": (0.5, 0.125, 0.125, 0, "match"),
    "adadim_gamma_2": (0.5, 0.125, 0.125, 2, "match"),
    "adadim_gamma_4": (0.5, 0.125, 0.125, 4, "match"),
    "adadim_fixed_25": (0.25, 0.25, 0.25, 1, "match"),
    "adadim_fixed_50": (0.5, 0.5, 0.5, 1, "match"),
    "adadim_barlow_twins": (0.5, 0.125, 0.125, 1, "match"),
    "adadim": (0.5, 0.125, 0.125, 1, "match"),
}


WITHOUT_FLOOR = {"one_batch_min", "order_1", "lagged", "reversed"}


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_is_what_its_name_says(arm: str) -> None:
    config = composed(arm)
    assert config.arm == arm
    assert config.optimizer.lr == config.tuned.cifar10[arm].lr
    balance = instantiate(config.balance, _convert_="all")
    assert isinstance(balance, Balance)
    start, _ = balance(progress=0.5, epoch=2)
    balance.observe(measured(64.0))
    loss = instantiate(config.objective, _convert_="all")
    assert isinstance(loss, AdaDimLoss)
    found = (start, *balance(progress=0.5, epoch=2), loss.gamma)
    assert found == pytest.approx(EXPECTED[arm][:4])
    assert ("match" if loss.match_gradients else float(loss.kappa)) == EXPECTED[arm][4]
    assert (loss.decorrelation == "barlow_twins") == ("barlow_twins" in arm)
    without = arm.startswith(("adadim_paper", "streaming")) or arm in WITHOUT_FLOOR
    assert loss.information_floor == (0.3 if arm == "floor" else None if without else 0.0)
    assert loss.order == (1 if arm == "order_1" else 2)
    assert (balance.window == 1) == (arm.startswith("adadim_paper") or arm == "one_batch_min")


def test_all_arms_share_model_steps_batch_and_evaluation() -> None:
    settings = []
    for arm in ARMS:
        config = composed(arm)
        keys = ("backbone", "head", "trainer", "views", "data", "lr_schedule", "evaluation", "lr_scaling")
        settings.append({key: config[key] for key in keys})
    assert all(found == settings[0] for found in settings)


def test_the_split_for_validation_trains_on_the_images_of_the_split_for_the_test() -> None:
    views = study_data._unused(1)["views"]
    validation, test = (
        study_data.study("digits", split=split, views=views, batch_size=256) for split in ("validation", "test")
    )
    assert torch.equal(validation.train.images, test.train.images)
    sizes = [len(x) for x in (test.train, validation.test, test.test)]
    assert sizes == [997, 300, 500]
    everything = torch.cat([x.images for x in (test.train, validation.test, test.test)]).flatten(1)
    assert len(everything.unique(dim=0)) == len(everything) == 1797


@real_data
@pytest.mark.parametrize(
    ("name", "root", "channels", "sizes"),
    [
        ("fashion_mnist", ".", 1, (8192, 5000, 10000)),
        ("pneumonia", "medmnist", 1, (4708, 524, 624)),
        ("retina", "medmnist", 3, (1080, 120, 400)),
    ],
)
def test_the_splits_of_the_real_sets(name: str, root: str, channels: int, sizes: tuple[int, int, int]) -> None:
    options = {"channels": channels, "image_size": 16, "root": str(DATASETS / root), "batch_size": 256}
    views = study_data._unused(channels)["views"]
    validation, test = (
        study_data.study(name, split=split, views=views, images=8192, **options)
        for split in ("validation", "test")
    )
    assert torch.equal(validation.train.images, test.train.images)
    assert (len(test.train), len(validation.test), len(test.test)) == sizes
    assert test.image_shape == (channels, 16, 16)
    if name == "fashion_mnist":
        assert set(Counter(test.test.labels.tolist()).values()) == {1000}
        assert set(Counter(validation.test.labels.tolist()).values()) == {500}
        # Among 60,000 small images some are equal by chance.
        rows = {row.numpy().tobytes() for row in test.train.images}
        assert sum(row.numpy().tobytes() in rows for row in validation.test.images) < 50


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """CIFAR-10's layout, with 5,120 small pictures to train on and 40 to test."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    folder = tmp_path / "parquet"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name, count in (
        ("train-00000-of-00002", 2560),
        ("train-00001-of-00002", 2560),
        ("test-00000-of-00001", 40),
    ):
        pixels = draw.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        pixels[:, :4] //= 1 + (np.arange(count) % 10)[:, None, None, None].astype(np.uint8)
        images = [{"bytes": encode(x, "WEBP", lossless=True), "path": None} for x in map(Image.fromarray, pixels)]
        table = pyarrow.table({"img": images, "label": [i % 10 for i in range(count)]})
        writer.write_table(table, folder / f"{name}.parquet")
    return folder


def run_study(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(STUDY / "study.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_stage_is_trained_collected_and_gone_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    small = [
        "+arm=simclr,adadim",
        "data=study_digits",
        "trainer.max_steps=4",
        "--jobs",
        "1",
        "--folder",
        str(folder),
    ]
    run_study("explore", *small, "seed=0")
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.csv")}
    printed = run_study("explore", *small, "seed=0,1")
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps  # not trained again
    assert f"4 runs are in {folder / 'explore.json'}" in printed
    assert (folder / "report.html").exists()
    found = json.loads((folder / "explore.json").read_text())
    assert [(x["arm"], x["seed"]) for x in found["runs"]] == [
        *(("adadim", 0), ("adadim", 1), ("simclr", 0), ("simclr", 1))
    ]
    for record in found["runs"]:
        summaries = [json.loads(path.read_text()) for path in folder.glob("*/summary.json")]
        own = next(x for x in summaries if (x["config"]["arm"], x["seed"]) == (record["arm"], record["seed"]))
        for metric in ("linear_balanced", "knn_top1", "few_shot_1pct_top1", "few_shot_10pct_top1"):
            name = f"evaluation/trained_{metric}"
            assert record["values"][name] == pytest.approx(own[name], abs=1e-6)
        assert record["curves"]["step"] == [3, 4]
        assert record["curves"]["dynamics/H_R"][-1] == pytest.approx(own["dynamics/H_R"], abs=1e-4)
        assert (record["steps"], record["batch_size"], record["split"]) == (4, 256, "validation")
        assert str(tmp_path) not in json.dumps(record)
    # What another machine has trained stays when this one adds to it.
    (folder / "explore.json").write_text((folder / "explore.json").read_text().replace('"seed": 1', '"seed": 7'))
    assert "6 runs are in" in run_study("explore", *small, "seed=0,1")


def test_each_large_set_has_its_best_rate_and_decay_and_the_small_ones_the_best_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [(0.001, 0.1), (0.003, 0.1), (0.01, 0.0)]
    scores = {"cifar10": (0.40, 0.38, 0.10), "fashion_mnist": (0.70, 0.75, 0.76)}
    runs = [
        {"data": data, "arm": arm, "lr": lr, "weight_decay": decay, "values": {study.METRIC: x}}
        for arm in study.SEARCHED
        for data, found in scores.items()
        for (lr, decay), x in zip(pairs, reversed(found) if arm == "simclr" else found, strict=True)
        if "barlow" not in arm or data == "cifar10"
    ]
    (tmp_path / "search.json").write_text(json.dumps({"runs": runs}))
    (tmp_path / "conf" / "tuned").mkdir(parents=True)
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "HERE", tmp_path)
    study.choose()
    tuned = OmegaConf.load(tmp_path / "conf" / "tuned" / "chosen.yaml").tuned
    best = dict(zip(("first", "middle", "last"), ({"lr": x, "weight_decay": y} for x, y in pairs), strict=True))
    expected = {
        "cifar10": ("first", "last", "first"),
        "fashion_mnist": ("last", "first", "first"),  # Barlow Twins was not tried there
        **dict.fromkeys(("pneumonia", "retina", "digits"), ("middle", "middle", "first")),
    }
    for data, places in expected.items():
        assert sorted(tuned[data]) == ARMS
        for arm, place in zip(("vicreg", "simclr", "barlow_twins"), places, strict=True):
            assert tuned[data][arm] == best[place], (data, arm)
        assert tuned[data].simclr_information == tuned[data].simclr


@pytest.mark.parametrize(
    ("data", "name"),
    [("fashion_mnist", "fashion_mnist"), ("pneumonia", "both"), ("retina", "both"), ("digits", "both")],
)
def test_a_run_takes_the_rate_of_its_data(data: str, name: str) -> None:
    for arm in ("simclr", "adadim"):
        config = composed(arm, f"study_{data}")
        chosen = {key: config.optimizer[key] for key in ("lr", "weight_decay")}
        assert chosen == config.tuned[name][arm]


def test_a_variant_takes_the_rate_of_the_arm_whose_objective_it_varies() -> None:
    for arm in ARMS:
        family = study.family(arm)
        assert family in study.SEARCHED
        assert EXPECTED[arm][4] == EXPECTED[family][4]  # kappa
        assert ("barlow" in arm) == ("barlow" in family)


@pytest.mark.slow
def test_the_gpu_tier_goes_on_from_piece_to_piece(parquet: Path, tmp_path: Path) -> None:
    """At toy size on the CPU: a piece is cut off, the next goes on, at the end come figures."""
    toy = ["backbone=small_convnet", "head=mlp", "trainer.accelerator=cpu", "trainer.limit_train_batches=2"]
    toy += ["seed=0", "+arm=simclr,adadim", "evaluation.images=40", "evaluation.probes=[linear,knn]"]
    toy += ["data.batch_size=32", "data.image_size=8"]
    out = tmp_path / "out"
    out.mkdir()

    def piece(seconds: int, *more: str) -> str:
        return subprocess.run(
            ["bash", str(ROOT / "benchmarks" / "gpu" / "run.sh"), str(parquet), *toy, *more],
            env={
                **os.environ,
                "WORK": str(tmp_path / "work"),
                "OUT": str(out),
                "SECONDS_A_PIECE": str(seconds),
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    first = piece(60, "trainer.max_epochs=100000")
    assert "the same command goes on" in first
    checkpoints = list((tmp_path / "work" / "runs" / "0" / "checkpoints").iterdir())
    assert checkpoints
    assert not (out / "gpu.json").exists()
    steps = json.loads((tmp_path / "work" / "runs" / "0" / "summary.json").read_text())["epochs"]
    second = piece(60, "trainer.max_epochs=100000")
    assert "the same command goes on" in second
    after = json.loads((tmp_path / "work" / "runs" / "0" / "summary.json").read_text())["epochs"]
    assert after > steps > 0
    done = piece(600, "trainer.max_epochs=3")
    assert "all runs have ended" in done
    runs = json.loads((out / "gpu.json").read_text())["runs"]
    assert [(x["arm"], x["steps"]) for x in runs] == [("adadim", 6), ("simclr", 6)]


@pytest.mark.parametrize("stage", ["search", "explore", "final", "budgets", "repeated"])
def test_the_committed_curves_have_no_more_points_than_they_need(stage: str) -> None:
    for run in json.loads((study.RESULTS / f"{stage}.json").read_text())["runs"]:
        assert run["curves"]["step"][-1] == run["steps"]
        assert {len(curve) for curve in run["curves"].values()} == {len(run["curves"]["step"])}
        assert len(run["curves"]["step"]) <= study.POINTS


def test_what_was_collected_before_is_thinned_too(tmp_path: Path) -> None:
    path = tmp_path / "explore.json"
    (before,) = json.loads((study.RESULTS / "explore.json").read_text())["runs"][:1]
    steps = list(range(1, 108))
    long = before | {"curves": dict.fromkeys(before["curves"], steps), "versions": before["versions"] | {"x": "1"}}
    path.write_text(json.dumps({"runs": [long]}))
    (found,) = study.collect("explore", tmp_path / "none", path, 1)
    assert found["curves"]["step"][0] == 1
    assert found["curves"]["step"][-1] == 107
    assert len(found["curves"]["step"]) == study.POINTS
    assert list(found["versions"]) == ["python", "torch", "lightning"]
    assert json.loads(path.read_text())["runs"] == [found]


def test_the_cores_of_a_run_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert [study.threads(jobs) for jobs in (1, 2, 3, 16)] == [8, 4, 2, 1]
    assert study._device("cpu", 2).startswith("4 of 8 cores of a CPU")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert study.threads(1) == 3
