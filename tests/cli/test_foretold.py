"""What a run will leave out, cannot score or will wait for in vain is said before it trains."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf
from torch import nn

from adadim_lightning.cli.build import Subject
from adadim_lightning.cli.closing import evaluate_backbones, unseen_classes, why_unscored
from adadim_lightning.cli.measure import _measure
from adadim_lightning.data import ImageData, MemoryImages
from tests.cli.test_train import ONE_STEP, PLAIN, run, summary
from tests.data.pictures import write
from tests.helpers import two_noisy_views

BEST = "+callbacks.best._target_=lightning.pytorch.callbacks.ModelCheckpoint"
EARLY = "+callbacks.early._target_=lightning.pytorch.callbacks.EarlyStopping"
WAITED_FOR = {
    "optimized_metric=probe/knn_top5": "which nothing in this run logs; did you mean 'probe/knn_top1'?",
    "optimized_metric=los/total": "'los/total', which nothing in this run logs; did you mean 'loss/total'?",
    "optimized_metric=loss/redundancy": "which nothing in this run logs; it logs balance/alpha, ",
    "optimized_metric=evaluation/trained_knn_top1 evaluation=null": "nothing in this run logs: evaluation is null",
    "optimized_metric=evaluation/trained_knn_top1 evaluation.probes=[linear]": "which nothing in this run logs",
    "optimized_metric=probe/knn_top1 ~callbacks.knn": "'probe/knn_top1', which nothing in this run logs; it logs",
    "optimized_metric=probe/knn_top1 trainer.limit_val_batches=0": "logs: trainer.limit_val_batches is 0",
    "optimized_metric=probe/knn_top1 trainer.check_val_every_n_epoch=9": "=9 is more than trainer.max_epochs=1",
    "optimized_metric=balance/alpha ~callbacks.adadim": "'balance/alpha', which nothing in this run logs",
    "optimized_metric=dynamics/H_R +callbacks.adadim.name=mine": "did you mean 'mine/dynamics/H_R'?",
    f"{BEST} +callbacks.best.monitor=probe/knn": "the monitor of ModelCheckpoint is 'probe/knn', which",
    f"{EARLY} +callbacks.early.monitor=loss": "the monitor of EarlyStopping is 'loss', which",
    f"{EARLY} +callbacks.early.monitor=evaluation/trained_knn_top1": "after the training: nothing can wait",
    f"{EARLY} +callbacks.early.monitor=val_loss": "the monitor of EarlyStopping is 'val_loss'",
}


@pytest.mark.parametrize("overrides", WAITED_FOR)
def test_a_metric_that_nothing_logs_is_one_line_before_the_training(
    overrides: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path / "run", *ONE_STEP, *overrides.split()) == 1
    output = capsys.readouterr()
    assert WAITED_FOR[overrides] in output.err
    assert len(output.err.splitlines()) == 1
    assert "epoch 1/1" not in output.out
    assert not (tmp_path / "run" / "metrics.csv").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        "optimized_metric=loss/redundancy objective=barlow_twins",
        "optimized_metric=mine/dynamics/H_R +callbacks.adadim.name=mine",
        "optimized_metric=evaluation/trained_few_shot_10pct_top1 evaluation.probes=[few_shot]",
        f"optimized_metric=throughput/images_per_second {BEST} +callbacks.best.monitor=loss_weighted/information",
    ],
)
def test_every_name_that_is_logged_can_be_waited_for(
    overrides: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, tmp_path / "run", *ONE_STEP, *overrides.split()) == 0
    found = summary(tmp_path / "run")
    assert found["optimized_metric"] in found


def test_the_names_of_a_foreign_callback_are_its_own_affair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = [
        "+callbacks.own._target_=tests.cli.test_foretold.Own",
        "trust=[tests]",
        "optimized_metric=own/number",
    ]
    assert run(monkeypatch, tmp_path / "run", *ONE_STEP, "evaluation=null", *foreign) == 0
    assert summary(tmp_path / "run")["own/number"] == 7


class Own(Callback):
    """Somebody else's callback, which logs under a name of its own."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("own/number", 7.0)


@pytest.mark.parametrize(
    ("overrides", "default"),
    [
        (["~callbacks.linear_probe"], "dynamics/ER_R"),
        (["trainer.limit_val_batches=0"], "dynamics/ER_R"),
        ([], "probe/linear_top1"),
    ],
    ids=str,
)
def test_the_default_of_what_is_optimized_is_logged(
    overrides: list[str], default: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [x for x in ONE_STEP if not (overrides and x.startswith("trainer.limit_val"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(monkeypatch, tmp_path / "run", *steps, "evaluation=null", *overrides) == 0
    found = summary(tmp_path / "run")
    assert found["optimized_metric"] == default
    assert default in found


# Labels.


def images(labels: list[int] | None) -> MemoryImages | None:
    if labels is None:
        return None
    pixels = torch.randint(0, 256, (len(labels), 1, 8, 8), dtype=torch.uint8)
    return MemoryImages(pixels, torch.tensor(labels))


LABELS: list[tuple[list[int], list[int] | None, str | None]] = [
    ([0, 1, 0, 1], [0, 1], None),
    ([0, 1, -1, -1], [-1, 1], None),
    ([0, 1, 0, 1], None, "none held out"),
    ([-1, -1, -1], None, "none"),
    ([-1, -1, -1], [-1, -1], "none"),
    ([0, 1, 0, 1], [-1, -1], "none on the held-out images"),
    ([-1, -1, -1], [0, 1], "none on the training images"),
    ([3, 3, -1, 3], [3, 3], "all of one class"),
]


def data(train: list[int], test: list[int] | None) -> ImageData:
    made = images(train)
    assert made is not None
    return ImageData(made, images(test), views=two_noisy_views(), batch_size=2)


@pytest.mark.parametrize(("train", "test", "reason"), LABELS, ids=str)
def test_labels_that_no_probe_can_use_are_known_from_the_data(
    train: list[int], test: list[int] | None, reason: str | None
) -> None:
    """Where there is a reason nothing is measured, and where there is none everything is: no error in the end."""
    made = data(train, test)
    assert why_unscored(made) == reason
    settings = {"of": ["raw"], "probes": ["linear", "knn", "few_shot"], "images": 100}
    found = evaluate_backbones({"raw": nn.Flatten()}, made, settings)
    assert bool(found) is (reason is None)


EVALUATION = {"few_shot": [0.5], "seed": 0, "label_free": {"images": 4, "views": 2, "rows": 4}}


@pytest.mark.parametrize(("train", "test", "reason"), [x for x in LABELS if x[2]], ids=str)
def test_evaluate_says_why_labels_cannot_be_used_before_it_reads_an_image(
    train: list[int], test: list[int] | None, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = data(train, test)
    subject = Subject("x", "x", Refusing(), None, made)
    with pytest.raises(
        ValueError, match=rf"images cannot serve knn \(labels: {reason}\); set probes=\[label_free\]"
    ):
        _measure(subject, OmegaConf.create({"probes": ["knn"], **EVALUATION}))
    subject.backbone = nn.Flatten()
    found = _measure(subject, OmegaConf.create({"probes": ["knn", "label_free"], **EVALUATION}))
    assert f"  labels: {reason}; only what needs none is measured" in capsys.readouterr().out
    assert "H_R" in found["values"]
    assert "knn_top1" not in found["values"]


class Refusing(nn.Flatten):
    """A backbone that nobody may run."""

    def forward(self, _: Any) -> Any:
        raise AssertionError("it was run")


def test_one_image_is_too_few_for_label_free_values_and_that_is_known_before() -> None:
    subject = Subject("x", "x", Refusing(), None, data([0, 1, 0], [1]))
    with pytest.raises(ValueError, match=r"label_free needs at least 2 images, and images has 1; leave it out"):
        _measure(subject, OmegaConf.create({"probes": ["knn", "label_free"], **EVALUATION}))


def test_few_neighbors_and_unseen_classes_are_said_before_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    subject = Subject("x", "x", nn.Flatten(), None, data([0, 1, 0, 1, -1], [0, 2, 2, -1]))
    found = _measure(subject, OmegaConf.create({"probes": ["knn"], **EVALUATION}))
    output = capsys.readouterr().out
    assert "  4 labeled images to learn from: all of them are neighbors, not k = 20" in output
    assert (
        "  2 of 3 held-out labels are of classes that no training image has: they always count as wrong" in output
    )
    assert found["values"]["knn_top1"] <= 1 / 3


def test_unseen_classes_counts_labels_alone() -> None:
    assert unseen_classes(torch.tensor([0, 1, -1]), torch.tensor([0, 1, -1])) == 0
    assert unseen_classes(torch.tensor([0, 1, -1]), torch.tensor([5, -1, 5, 1])) == 2


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two classes."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(16):
        write(root / "ab"[i % 2] / f"{i}.png", i, height=40, width=40)
    return root


def test_a_run_says_what_it_leaves_out_before_it_trains(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["data=folder", f"data.root={pictures}", "data.image_size=40", "data.batch_size=4", PLAIN]
    options += ["backbone=small_convnet", "trainer.max_epochs=1", "trainer.limit_train_batches=1"]
    expected = {
        "data.held_out=0": "labels     none held out, so no probes; H(R), I(R;Z) and the ranks need none",
        "data.held_out=0.25": "evaluation without raw pixels: 4,800 of an image are more than 1,024",
    }
    for i, (override, line) in enumerate(expected.items()):
        assert run(monkeypatch, tmp_path / str(i), *options, override) == 0
        lines = capsys.readouterr().out.splitlines()
        assert line in lines
        first = next(i for i, x in enumerate(lines) if x.startswith("epoch 1/1"))
        assert lines.index(line) < first


def test_a_resumed_run_without_a_checkpoint_says_that_it_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.csv").write_text("epoch,step\n")
    assert run(monkeypatch, folder, *ONE_STEP, "evaluation=null", "resume=true") == 0
    assert "has no checkpoint: the run begins anew" in capsys.readouterr().out
