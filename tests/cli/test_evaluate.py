"""`adadim-evaluate` from the command line to the table and the JSON, in this process."""

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from adadim_lightning.cli import embed, evaluate, measure, train
from tests.cli.test_train import PLAIN
from tests.data.pictures import DATASETS, encode, pixels, write

QUICK = ("probes=[knn,label_free]", "label_free.images=40", "label_free.views=2", "label_free.rows=60")
ONE_EPOCH = ("trainer.max_epochs=1", "trainer.limit_val_batches=1", PLAIN)


def run(monkeypatch: pytest.MonkeyPatch, command: Any, *overrides: str) -> int:
    """Run a command as a shell would; its exit code."""
    monkeypatch.setattr(sys, "argv", [command.__name__, *overrides])
    try:
        command.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def models(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["models"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the digits."""
    folder = tmp_path_factory.mktemp("digits") / "first run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(monkeypatch, train, *ONE_EPOCH, "trainer.limit_train_batches=4", f"run_dir={folder}") == 0
    return folder


@pytest.fixture(scope="module")
def unlabeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a folder of images without classes, which lies beside it."""
    root = tmp_path_factory.mktemp("unlabeled")
    for seed in range(12):
        write(root / "pictures" / f"{seed}.png", seed, height=16, width=16)
    data = ("data=folder", f"data.root={root / 'pictures'}", "data.image_size=16", "data.batch_size=4")
    with pytest.MonkeyPatch.context() as monkeypatch:
        options = (*data, "views=cifar", "backbone=small_convnet", *ONE_EPOCH)
        assert run(monkeypatch, train, *options, f"run_dir={root / 'run'}") == 0
    return root / "run"


@pytest.fixture(scope="module")
def measured(digits: Path) -> tuple[dict[str, Any], list[str], dict[str, np.ndarray]]:
    """Of the run on the digits: what the JSON says, what the terminal says, what adadim-embed writes."""
    out, rows = digits.parent / "new" / "all.json", digits.parent / "rows.npz"
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.MonkeyPatch.context() as terminal:
        terminal.setenv("COLUMNS", "80")
        terminal.chdir(digits.parent)
        printed = digits.parent / "printed"
        with printed.open("w") as file:
            terminal.setattr(sys, "stdout", file)
            assert run(monkeypatch, evaluate, f"ckpt={digits}", "label_free.images=100", f"out={out}") == 0
            assert run(monkeypatch, embed, f"ckpt={digits}", f"out={rows}") == 0
    (model,) = models(out)
    with np.load(rows, allow_pickle=False) as file:
        return model, printed.read_text().splitlines(), dict(file)


def split(rows: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    return rows["representation"][rows["split"] == name], rows["label"][rows["split"] == name]


def test_linear_accuracy_is_that_of_scikit_learn_on_the_embeddings(measured: Any) -> None:
    model, _, rows = measured
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(*split(rows, "train"))
    score = probe.score(*split(rows, "test"))
    assert 0.5 < score < 1
    assert model["values"]["linear_top1"] == pytest.approx(score, abs=0.003)
    assert model["values"]["linear_sgd_top1"] == pytest.approx(score, abs=0.03)
    assert model["labeled_images"] == {"train": 1297, "test": 500}


def test_knn_accuracies_are_those_of_scikit_learn(measured: Any) -> None:
    model, _, rows = measured
    for key, weights in (("knn_top1", lambda d: np.exp((1 - d) / 0.07)), ("knn_plain_top1", "uniform")):
        probe = KNeighborsClassifier(20, metric="cosine", weights=weights).fit(*split(rows, "train"))
        assert model["values"][key] == pytest.approx(probe.score(*split(rows, "test")), abs=0.003), key


def test_few_labels_score_as_scikit_learn_on_such_draws(measured: Any) -> None:
    model, _, rows = measured
    x, labels = split(rows, "train")
    for share in (0.01, 0.1):
        scores = []
        for seed in range(12):
            random = np.random.default_rng(seed)
            classes = [np.flatnonzero(labels == c) for c in range(10)]
            chosen = np.concatenate([random.permutation(c)[: math.ceil(share * len(c))] for c in classes])
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(
                x[chosen], labels[chosen]
            )
            scores.append(probe.score(*split(rows, "test")))
        name = f"few_shot_{100 * share:g}pct_top1"
        assert abs(model["values"][name] - np.mean(scores)) < 4 * np.std(scores) / math.sqrt(3) + 0.01
        assert 0 < model["values"][f"{name}_std"] < 0.1


def mutual_information(rows: dict[str, np.ndarray], chosen: np.ndarray) -> float:
    """The matrix-based I(R;Z) of order 2, in nats."""
    grams = []
    for name in ("representation", "embedding"):
        x = rows[name][chosen].astype(np.float64)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        grams.append(x @ x.T)
    r, z, both = (-np.log((k**2).sum() / np.trace(k) ** 2) for k in (*grams, grams[0] * grams[1]))
    return r + z - both


def test_label_free_values_are_those_of_the_held_out_embeddings(measured: Any) -> None:
    model, _, rows = measured
    values, test = model["values"], rows["split"] == "test"
    for key, name in (("ER_R", "representation"), ("ER_Z", "embedding")):
        p = np.linalg.svd(rows[name][test].astype(np.float64), compute_uv=False)
        p = p[p > 0] / p.sum()
        entropy = -(p * np.log(p)).sum()
        assert values[key] == pytest.approx(np.exp(entropy), rel=1e-3)
        if key == "ER_R":
            assert values["H_R"] == pytest.approx(entropy, rel=1e-4)
            assert values["rankme"] == pytest.approx(np.exp(entropy), rel=1e-2)
    assert values["log_n"] == pytest.approx(math.log(500))
    assert values["I_RZ"] == pytest.approx(mutual_information(rows, test), abs=1e-5)
    r = rows["representation"][test].astype(np.float64)
    r /= np.linalg.norm(r, axis=1, keepdims=True)
    closeness = np.exp(-2 * (2 - 2 * r @ r.T)[np.triu_indices(len(r), 1)])
    assert values["uniformity"] == pytest.approx(np.log(closeness.mean()), abs=1e-3)
    assert 1 < values["lidar"] < 100
    # Views of one image lie closer than images.
    assert 0 < values["alignment"] < 0.8 * (2 - 2 * r @ r.T).mean()


def test_the_table_fits_80_columns_and_shows_the_figures_of_the_json(measured: Any) -> None:
    model, lines, _ = measured
    assert max(map(len, lines)) <= 80
    assert lines[:2] == [
        "first run", "  digits: 1,297 images, grey, 8 x 8, 10 classes; 500 held out; in memory",
    ]  # fmt: skip
    table = {line.partition("┃")[0].partition("│")[0].strip(): line.split("│")[-1].strip() for line in lines}
    values = model["values"]
    for label, key in {"logistic regression": "linear_top1", "LiDAR": "lidar", "of at most": "log_n"}.items():
        assert table[label] == f"{values[key]:.3f}"
    assert table["10 %"] == f"{values['few_shot_10pct_top1']:.3f} +- {values['few_shot_10pct_top1_std']:.3f}"
    assert (table["trained on"], table["measured on"]) == ("digits", "digits")
    assert f"All figures are in {Path('new') / 'all.json'}" in lines


def other_weights(run_folder: Path, path: Path) -> Path:
    """A checkpoint of the same model with other weights."""
    checkpoint = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    generator = torch.Generator().manual_seed(1)
    for name, value in checkpoint["state_dict"].items():
        if name.startswith("backbone.") and value.ndim == 4:
            value += 0.2 * torch.randn(value.shape, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return path


def test_values_depend_on_the_seed_and_not_on_the_models_before(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = other_weights(digits, tmp_path / "other.ckpt")
    options = ("probes=[linear,few_shot,label_free]", "few_shot=0.01", *QUICK[1:])

    def values(name: str, ckpt: str, *more: str) -> list[dict[str, float]]:
        assert run(monkeypatch, evaluate, ckpt, *options, *more, f"out={tmp_path / name}.json") == 0
        return [model["values"] for model in models(tmp_path / f"{name}.json")]

    torch.rand(7)  # the state of the process does not matter
    (first, second) = values("both", f"ckpt=['{digits}',{other}]")
    assert values("alone", f"ckpt={other}") == [second]
    assert first["ER_R"] != second["ER_R"]
    (reseeded,) = values("seed", f"ckpt={other}", "seed=1")
    assert reseeded["ER_R"] == second["ER_R"]
    assert reseeded["lidar"] != second["lidar"]
    assert reseeded["few_shot_1pct_top1"] != second["few_shot_1pct_top1"]


def test_label_free_options_say_how_much_is_looked_at(
    digits: Path, measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for images, views in ((30, 2), (20, 2), (30, 5)):
        more = (f"label_free.images={images}", f"label_free.views={views}")
        out = tmp_path / f"{images}-{views}.json"
        options = ("probes=label_free", "label_free.rows=50", *more)
        assert run(monkeypatch, evaluate, f"ckpt={digits}", *options, f"out={out}") == 0
        found.append(models(out)[0]["values"])
    r, _ = split(measured[2], "test")
    p = np.linalg.svd(r[np.linspace(0, 499, 50).astype(int)], compute_uv=False)
    p = p / p.sum()
    assert found[0]["H_R"] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-4)
    assert found[0]["log_n"] == pytest.approx(math.log(50))
    assert len({values["lidar"] for values in found}) == 3
    assert found[1]["lidar"] < 20
    assert len({values["H_R"] for values in found}) == 1


@pytest.mark.parametrize("count", [2, 4, 7])
def test_several_models_stand_side_by_side(
    count: int,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"{'a_name_that_goes_on_' * (i % 3)}{i}" for i in range(count)]
    for name in names:
        shutil.copytree(digits / "checkpoints", tmp_path / "runs" / name / "checkpoints")
    out = tmp_path / "all.json"
    options = ("probes=[few_shot]", "few_shot=[0.01]")
    assert run(monkeypatch, evaluate, f"ckpt={tmp_path / 'runs'}/*", *options, f"out={out}") == 0
    found = models(out)
    assert [model["name"] for model in found] == sorted(names)
    assert len({json.dumps(model["values"]) for model in found}) == 1
    lines = capsys.readouterr().out.split("All figures")[0].splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if line.strip().startswith("1 %")]
    assert [row.count("+-") for row in rows] == {2: [2], 4: [2, 2], 7: [3, 3, 1]}[count]
    assert not any("…" in line for line in lines)  # a long name is folded, not cut


def test_names_tell_models_apart(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/run", "b/run"):
        shutil.copytree(digits / "checkpoints", tmp_path / name / "checkpoints", symlinks=True)
    mine = other_weights(digits, tmp_path / "b" / "run" / "checkpoints" / "mine.ckpt")
    loose = shutil.copy(mine, tmp_path / "loose.ckpt")
    (tmp_path / "c" / "checkpoints").mkdir(parents=True)
    (tmp_path / "c" / "notes.txt").write_text("no run")
    monkeypatch.chdir(tmp_path)
    last = "b/run/checkpoints/last.ckpt"
    listed = f"ckpt=[a/run,{last},{last},{mine},{loose},{tmp_path / 'a' / 'run'}]"
    options = ("probes=knn", "out=all.json")
    assert run(monkeypatch, evaluate, f"ckpt=['{tmp_path}/c*']", *options) == 1
    output = capsys.readouterr()
    assert output.out == f"left out   {tmp_path / 'c'} holds no checkpoint; name a run's folder or a .ckpt file\n"
    assert f"no run or checkpoint matches {tmp_path}/c*" in output.err
    assert run(monkeypatch, evaluate, listed, *options) == 0
    assert [model["name"] for model in models(tmp_path / "all.json")] == [
        "a/run",
        "b/run/last",
        "b/run/mine",
        "loose",
    ]


def test_transfer_shows_other_images_as_those_of_the_training(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if (DATASETS / "medmnist" / "retinamnist.npz").exists():
        data, name = ["data=medmnist/retina", f"data.root={DATASETS / 'medmnist'}"], "RetinaMNIST"
    else:
        for seed in range(20):
            write(tmp_path / "shapes" / "ab"[seed % 2] / f"{seed}.png", seed)
        data, name = ["data=folder", f"data.root={tmp_path / 'shapes'}"], "shapes"
    assert run(monkeypatch, evaluate, f"ckpt={digits}", *data, *QUICK, f"out={tmp_path / 'x.json'}") == 0
    (model,) = models(tmp_path / "x.json")
    assert (model["trained_on"], model["data"], model["image_shape"]) == ("digits", name, [1, 8, 8])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["trained", "on", "│", "digits"] in lines
    assert ["measured", "on", "│", name] in lines


def test_without_labels_only_what_needs_none_is_measured(
    unlabeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.json"
    assert run(monkeypatch, evaluate, f"ckpt={unlabeled}", *QUICK, f"out={out}") == 0
    (model,) = models(out)
    assert {"H_R", "lidar", "I_RZ", "alignment"} <= set(model["values"])
    assert not [key for key in model["values"] if "top1" in key]
    assert model["labeled_images"] == {}
    output = capsys.readouterr().out
    assert "  labels: none; only what needs none is measured\n" in output
    assert "Nearest" not in output
    assert run(monkeypatch, evaluate, f"ckpt={unlabeled}", "probes=[linear,knn]", f"out={out}") == 1
    assert "pictures cannot serve linear, knn (labels: none); set probes=[label_free]" in (capsys.readouterr().err)
    assert models(out) == [model]


def test_images_that_cannot_be_read_count_for_nothing(
    unlabeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(9):
        write(tmp_path / "all" / f"{seed}.png", seed, height=16, width=16)
    shutil.copytree(tmp_path / "all", tmp_path / "with_broken")
    (tmp_path / "with_broken" / "4b.png").write_bytes(b"no image")
    found = []
    for name in ("all", "with_broken"):
        data = ("data=folder", f"data.root={tmp_path / name}", "data.in_memory=false", "data.num_workers=0")
        assert run(monkeypatch, evaluate, f"ckpt={unlabeled}", *data, *QUICK, f"out={tmp_path / 'x.json'}") == 0
        found.append(models(tmp_path / "x.json")[0]["values"])
    assert found[1]["log_n"] == pytest.approx(math.log(9))
    assert found[1]["ER_R"] == pytest.approx(found[0]["ER_R"], rel=1e-5)


def test_images_that_are_gone_are_named_and_finished_models_are_kept(
    digits: Path,
    unlabeled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "x.json"
    pictures = unlabeled.parent / "pictures"
    pictures.rename(tmp_path / "elsewhere")
    try:
        assert run(monkeypatch, evaluate, f"ckpt=['{digits}','{unlabeled}']", *QUICK, f"out={out}") == 1
        output = capsys.readouterr()
        assert output.err == (
            f"adadim-evaluate: error: the images that run was trained on cannot be loaded (there is no folder "
            f"{pictures}; set data.root to the folder of your images); say where they are, or give others, by "
            "data=... data.root=...\n"
        )
        assert [model["name"] for model in models(out)] == ["first run"]
        assert "weighted, T = 0.07" in output.out
        assert output.out.endswith(f"All figures are in {os.path.relpath(out)}\n")
        moved = ("data=folder", f"data.root={tmp_path / 'elsewhere'}")
        assert run(monkeypatch, evaluate, f"ckpt={unlabeled}", *moved, *QUICK, f"out={out}") == 0
    finally:
        (tmp_path / "elsewhere").rename(pictures)


def test_streams_are_refused(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets import Dataset, Features, Image

    rows = {"image": [{"bytes": encode(pixels(seed)), "path": None} for seed in range(4)]}
    Dataset.from_dict(rows, features=Features({"image": Image()})).to_parquet(str(tmp_path / "train.parquet"))
    data = ("data=huggingface", f"data.path={tmp_path / 'train.parquet'}", "data.streaming=true")
    for command, what in ((evaluate, "evaluated"), (embed, "embedded")):
        out = tmp_path / ("x.npz" if command is embed else "x.json")
        assert run(monkeypatch, command, f"ckpt={digits}", *data, f"out={out}") == 1
        assert f"a stream cannot be {what}; set data.streaming=false" in capsys.readouterr().err
        assert not out.exists()


def test_models_that_were_not_trained_here_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "theirs.pth"
    torch.manual_seed(5)
    torch.save(torchvision.models.resnet18().state_dict(), file)
    data = ("data=digits", "data.channels=3", "data.image_size=32", "probes=label_free", *QUICK[1:])
    found = []
    for weights in ([f"weights={file}"], [], []):
        out = tmp_path / "x.json"
        assert run(monkeypatch, evaluate, "backbone=resnet18", *weights, *data, f"out={out}") == 0
        found.append(models(out)[0])
    assert found[0]["name"] == "resnet18"
    assert found[0]["source"] == str(file)
    assert found[0]["trained_on"] is None
    assert "I_RZ" not in found[0]["values"]
    assert found[0]["values"]["ER_R"] > 1
    assert found[1]["values"] == found[2]["values"] != found[0]["values"]  # drawn by the seed
    output = capsys.readouterr().out
    assert output.count("weights    none given: the backbone is untrained") == 2
    assert "trained on" not in output


def test_a_logistic_regression_that_would_take_long_is_left_out(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "MOST_FOR_LOGISTIC", 1297 * 128 * 10 * 0.05)
    options = ("probes=[linear,few_shot]", f"out={tmp_path / 'x.json'}")
    assert run(monkeypatch, evaluate, f"ckpt={digits}", *options) == 0
    values = models(tmp_path / "x.json")[0]["values"]
    assert values["linear_top1"] is values["few_shot_10pct_top1"] is None
    assert values["linear_sgd_top1"] > 0.5
    assert values["few_shot_1pct_top1"] > 0.3
    output = capsys.readouterr().out
    assert "  logistic regression of so many images would take too long: no all labels, 10 %\n" in output
    lines = [line.split() for line in output.splitlines()]
    assert ["logistic", "regression", "│", "-"] in lines
    assert ["10", "%", "│", "-"] in lines


RUN = "ckpt=RUN"  # stands for the run on the digits


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "nothing to look at: give ckpt=RUN, or backbone=... and weights=FILE"),
        (["data=cifar10"], "nothing to look at: give ckpt=RUN, or backbone=... and weights=FILE"),
        (["ckpt=[]"], "nothing to look at: ckpt is an empty list"),
        (["ckpt=nowhere"], "there is no checkpoint nowhere"),
        (["ckpt=nowhere/*"], "no run or checkpoint matches nowhere/*"),
        (["ckpt=occupied"], "occupied cannot be read: it was not written by PyTorch"),
        (["ckpt=weights.pth"], "weights.pth was not written by adadim-train; for weights of other models give"),
        (["ckpt=[RUN,weights.pth]", "probes=knn"], "weights.pth was not written by adadim-train"),
        (["backbone=resnet18"], "a backbone of its own needs images: give data=..."),
        (["backbone=resnet18", "data=digits", "weights=occupied"], "occupied cannot be read"),
        (
            ["backbone=resnet18", "data=digits", "weights=weights.pth"],
            "weights.pth lacks 100 of 100 weights of ResNet",
        ),
        ([RUN, "backbone=resnet18"], "give either ckpt=..., or backbone=... and weights=..., not both"),
        (
            ["ckpt=[RUN,a/epoch=1.ckpt]"],
            "quote a value that holds an equals sign, as in 'ckpt=[\"epoch=1.ckpt\"]'",
        ),
        ([RUN, "weights=weights.pth"], "give either ckpt=..., or backbone=... and weights=..., not both"),
        ([RUN, "views=cifar"], "the checkpoint decides views, as it was trained; leave views out"),
        ([RUN, "data=digits", "data.image_size=9"], "the checkpoint decides data.image_size, as it was trained"),
        ([RUN, "data=folder"], "data.root is not given; set data.root=..."),
        ([RUN, "data=digit"], "data has no option 'digit'; did you mean 'digits'?"),
        ([RUN, "probes=[lineal]"], "probes has no option 'lineal'; did you mean 'linear'?"),
        ([RUN, "probes=[]"], "probes is empty: name some of linear, knn, few_shot, label_free"),
        ([RUN, "few_shot=[0]"], "each of few_shot must be > 0: it is a share of the labels"),
        ([RUN, "few_shot=[0.1,2]"], "each of few_shot must lie in [0, 1], got 2"),
        ([RUN, "seed=-1"], "seed must be an integer >= 0, got -1"),
        ([RUN, "label_free.views=1"], "label_free.views must be an integer >= 2, got 1"),
        ([RUN, "label_free.row=9"], "label_free has no key 'row'; did you mean 'rows'?"),
        ([RUN, "prob=[knn]"], "the configuration has no key 'prob'; did you mean 'probes'?"),
        ([RUN, "out=x.csv"], "out must end in .json, got x.csv"),
        ([RUN, "out=occupied/x.json"], "cannot write occupied/x.json: Not a directory; name another file by out="),
    ],
)
def test_a_mistake_is_one_line_before_the_work(
    overrides: list[str],
    message: str,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "occupied").write_text("not a checkpoint")
    torch.save({"weight": torch.zeros(2)}, "weights.pth")
    shutil.copy(digits / "checkpoints" / "last.ckpt", "RUN")
    assert run(monkeypatch, evaluate, *overrides) == 1
    output = capsys.readouterr()
    assert output.err.startswith("adadim-evaluate: error: ")
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert not list(tmp_path.rglob("*.json"))


def test_an_interrupt_leaves_the_older_figures(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.json"
    out.write_text("of yesterday")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.5)  # views take longer than that
    try:
        many = ("label_free.images=500", "label_free.views=200", "probes=label_free")
        assert run(monkeypatch, evaluate, f"ckpt={digits}", *many, f"out={out}") == 130
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert out.read_text() == "of yesterday"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
