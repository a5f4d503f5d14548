"""Images without labels, labeled images from elsewhere, and damaged files, by the command."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from adadim_lightning.data import digits
from adadim_lightning.pretrained import load_backbone, load_pretrained
from tests.cli.test_train import run, summary
from tests.data.pictures import write

COUNT = 40
FOLDER = [
    "data=folder",
    "backbone=small_convnet",
    "data.image_size=16",
    "data.batch_size=16",
    "data.num_workers=0",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images side by side, of no class."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(COUNT):
        write(folder / f"{i:02d}.png", i, height=20, width=18)
    return folder


def test_a_folder_without_labels_is_trained_on_and_measured(
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    assert run(monkeypatch, tmp_path / "run", *FOLDER, f"data.root={pictures}") == 0
    output = capsys.readouterr().out
    assert not [str(x.message) for x in recwarn if "is zero" in str(x.message)]  # no validation is no mistake
    assert "labels     none, so no probes; H(R), I(R;Z) and the ranks need none" in output
    assert "40 images, RGB, 16 x 16, no labels" in output
    assert "was not logged" not in output  # without labels a rank is optimized
    found = summary(tmp_path / "run")
    assert (found["status"], found["error"], found["epochs"]) == ("ok", None, 1)
    assert not [key for key in found if key.startswith(("probe/", "evaluation/"))]
    measured = {key: value for key, value in found.items() if key.startswith("dynamics/")}
    assert measured.keys() == {f"dynamics/{name}" for name in ("H_R", "ER_R", "ER_Z", "I_RZ", "log_n")}
    assert all(np.isfinite(value) for value in measured.values())  # type: ignore[call-overload]
    assert (tmp_path / "run" / "dynamics.png").exists()
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == COUNT // 16


def nearest_neighbors(
    train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, k: int, t: float
) -> torch.Tensor:
    """Classes by the votes of the nearest, each weighted by exp(cosine / t)."""
    train, test = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (train, test))
    cosine, index = (test @ train.T).topk(k)
    votes = torch.zeros(len(test), 10, dtype=torch.double)
    votes.scatter_add_(1, labels[index], (cosine / t).exp())
    return votes.argmax(1)


def test_eval_data_brings_the_labels_for_probes(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path / "run", *FOLDER, f"data.root={pictures}", "eval_data=digits") == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[lines.index("eval_data  digits") + 1] == (
        "1,297 images, RGB, 16 x 16, 10 classes; 500 held out; in memory"
    )
    found = summary(tmp_path / "run")
    assert 0 < found["probe/linear_top1"] <= 1  # type: ignore[operator]
    # By hand, on the weights of the checkpoint.
    views = load_pretrained(tmp_path / "run").views
    images = digits(views=views, image_size=16, channels=3)
    backbone = load_backbone(tmp_path / "run").eval()
    with torch.no_grad():
        train, test = (backbone(views.clean(x.images)) for x in (images.train, images.test))  # type: ignore[union-attr]
    assert images.test is not None
    predicted = nearest_neighbors(train, images.train.labels, test, k=20, t=0.07)  # type: ignore[union-attr]
    accuracy = float((predicted == images.test.labels).double().mean())
    assert found["probe/knn_top1"] == pytest.approx(accuracy, abs=0.0041)  # ties may fall either way
    assert found["evaluation/trained_knn_top1"] == pytest.approx(accuracy, abs=0.05)
    assert found["evaluation/trained_linear_top1"] > 0.5  # type: ignore[operator]


def test_an_unknown_eval_data_is_named_with_the_nearest(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, hint in (("digit", "; did you mean 'digits'?"), ("nosuch", "; it has cifar10, cifar100")):
        assert run(monkeypatch, tmp_path / wrong, *FOLDER, f"data.root={pictures}", f"eval_data={wrong}") == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"eval_data has no option {wrong!r}{hint}" in line


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Forty images and one that is cut off."""
    folder = tmp_path / "damaged"
    for i in range(COUNT):
        write(folder / f"{i:02d}.png", i, height=20, width=18)
    content = (folder / "07.png").read_bytes()
    (folder / "broken.png").write_bytes(content[: len(content) // 2])
    return folder


@pytest.mark.parametrize("in_memory", ["true", "false"])
def test_an_image_that_cannot_be_read_is_left_out_and_counted(
    in_memory: str, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # As many as there are, so that each is looked at.
        overrides = [f"data.root={damaged}", f"data.in_memory={in_memory}", "data.batch_size=20"]
        assert run(monkeypatch, tmp_path / "run", *FOLDER, *overrides, "trainer.max_epochs=3") == 0
    told = [str(x.message) for x in caught if "cannot be read" in str(x.message)]
    assert told == [f"1 of 41 images cannot be read: {damaged / 'broken.png'}; left out"]
    assert summary(tmp_path / "run")["status"] == "ok"


@pytest.mark.parametrize("rest", [["data.in_memory=true"], ["data.in_memory=false", "data.num_workers=1"]])
def test_more_unreadable_images_than_allowed_are_one_line(
    rest: list[str],
    damaged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = [f"data.root={damaged}", "data.max_unreadable=0", "data.batch_size=20", "trainer.max_epochs=9"]
    assert run(monkeypatch, tmp_path / "run", *FOLDER, *overrides, *rest) == 1
    error = [
        line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("adadim-train: error")
    ]
    assert len(error) == 1
    assert str(damaged / "broken.png") in error[0]
    assert "raise data.max_unreadable" in error[0]
    assert summary(tmp_path / "run")["status"] == "failed"
