"""`adadim-embed` from the command line to the file, in this process."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from adadim_lightning.cli import embed, train
from adadim_lightning.pretrained import load_pretrained
from tests.data.pictures import write
from tests.helpers import all_digits

CLASSES = {"ant": 12, "bee": 10, "cat": 8}
BROKEN = "broken.png"


def run(monkeypatch: pytest.MonkeyPatch, command: Any, *overrides: str) -> int:
    """Run a command as a shell would; its exit code."""
    monkeypatch.setattr(sys, "argv", [command.__name__, *overrides])
    try:
        command.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on folders of classes with one broken file, which lie beside it."""
    root = tmp_path_factory.mktemp("run")
    seeds = iter(range(100))
    for name, count in CLASSES.items():
        for i in range(count):
            write(root / "pictures" / name / f"{i}.png", next(seeds), height=16, width=16)
    (root / "pictures" / "bee" / BROKEN).write_bytes(b"no image")
    data = [f"data.root={root / 'pictures'}", "data.image_size=16", "data.in_memory=false", "data.num_workers=0"]
    options = [
        "data=folder",
        *data,
        "data.batch_size=8",
        "data.held_out=0.3",
        "views=cifar",
        "backbone=small_convnet",
    ]
    with pytest.MonkeyPatch.context() as monkeypatch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the broken file may be met
        assert run(monkeypatch, train, *options, "trainer.max_epochs=1", f"run_dir={root / 'first run'}") == 0
    return root / "first run"


@pytest.fixture(scope="module")
def embedded(trained: Path) -> Path:
    """What adadim-embed writes of that run."""
    out = trained.parent / "new" / "of a run.npz"
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.warns(UserWarning, match=BROKEN):
        assert run(monkeypatch, embed, f"ckpt={trained}", f"out={out}") == 0
    return out


def by_hand(path: str) -> Tensor:
    """The normalized pixels of a file."""
    pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean[:, None, None]) / std[:, None, None]


@torch.no_grad()
def test_rows_are_the_outputs_of_backbone_and_head_on_the_clean_images(trained: Path, embedded: Path) -> None:
    rows = read(embedded)
    model = load_pretrained(trained)
    r = model.backbone.eval()(torch.stack([by_hand(path) for path in rows["path"]]))
    assert model.projection_head is not None
    z = model.projection_head.eval()(r)
    assert rows["representation"].dtype == rows["embedding"].dtype == np.float32
    np.testing.assert_allclose(rows["representation"], r, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows["embedding"], z, rtol=1e-4, atol=1e-4)
    assert rows["representation"].std(axis=0).max() > 1e-3  # images differ


def test_each_readable_file_has_a_row_with_its_path_label_and_split(trained: Path, embedded: Path) -> None:
    rows = read(embedded)
    assert sorted(rows) == ["embedding", "label", "path", "representation", "split"]
    files = [str(path) for path in (trained.parent / "pictures").glob("*/*.png") if path.name != BROKEN]
    assert sorted(rows["path"]) == sorted(files)
    names = list(CLASSES)
    assert [names[label] for label in rows["label"]] == [Path(path).parent.name for path in rows["path"]]
    # 0.3 of 31 files are held out, rounded up.
    kept = list(rows["split"])
    assert kept == sorted(kept, reverse=True)
    assert (kept.count("train"), kept.count("test")) == (20, 10)


def test_parquet_holds_the_same(trained: Path, embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    out = embedded.with_name("same.parquet")
    with pytest.warns(UserWarning, match=BROKEN):
        assert run(monkeypatch, embed, f"ckpt={trained}", f"out={out}") == 0
    table = pyarrow.parquet.read_table(out)
    rows = read(embedded)
    assert table.column_names == list(rows)
    for name, values in rows.items():
        np.testing.assert_array_equal(np.array(table[name].to_pylist(), dtype=values.dtype), values)
    found = Dataset.from_parquet(str(out), cache_dir=str(embedded.parent / "cache"))[3]
    assert found["path"] == rows["path"][3]
    assert found["representation"] == rows["representation"][3].tolist()


def test_without_pyarrow_the_install_line_comes_before_the_work(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run(monkeypatch, embed, f"ckpt={trained}", f"out={tmp_path / 'x.parquet'}") == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == ("adadim-embed: error: pyarrow is not installed; pip install 'adadim-lightning[hf]'\n")
    assert not list(tmp_path.iterdir())


def test_images_without_labels_are_embedded_too(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for seed in range(3):  # fewer than a batch, and of other sizes than those of the training
        write(tmp_path / "pictures" / f"{seed}.png", seed, height=30 + seed, width=16)
    out = tmp_path / "rows.npz"
    data = ("data=folder", f"data.root={tmp_path / 'pictures'}")
    assert run(monkeypatch, embed, f"ckpt={trained}", *data, f"out={out}") == 0
    rows = read(out)
    assert rows["label"].tolist() == [-1, -1, -1]
    assert rows["split"].tolist() == ["train"] * 3
    assert [Path(path).name for path in rows["path"]] == ["0.png", "1.png", "2.png"]
    output = capsys.readouterr()
    assert "first run\n  pictures: 3 images, RGB, 16 x 16, no labels; in memory\n" in output.out
    assert "  representation (128), embedding (128), label, path, split\n" in output.out
    assert output.out.endswith(f"\n3 images are in {os.path.relpath(out)}\n")
    assert output.err == ""


@torch.no_grad()
def test_weights_of_another_program_are_embedded_without_a_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torchvision.models.resnet18()
    file = tmp_path / "theirs.pth"
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, file)
    out = tmp_path / "rows.npz"
    data = ("data=digits", "data.channels=3", "data.image_size=32")
    assert run(monkeypatch, embed, "backbone=resnet18", f"weights={file}", *data, f"out={out}") == 0
    assert f"weights    {file}, behind 'state_dict.module.'" in capsys.readouterr().out
    rows = read(out)
    assert sorted(rows) == ["label", "path", "representation", "split"]
    assert rows["representation"].shape == (1797, 512)
    model.fc = nn.Identity()  # type: ignore[assignment]
    images = all_digits()
    assert rows["label"][:1297].tolist() == images.train.labels.tolist()  # type: ignore[union-attr]
    pixels = images.train.images[:8].expand(-1, 3, -1, -1)  # type: ignore[union-attr]
    larger = torchvision.transforms.v2.functional.resize(pixels, [32, 32], antialias=True)
    r = model.eval()((larger / 255 - 0.3053) / 0.3758)
    np.testing.assert_allclose(rows["representation"][:8], r, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["out=x.csv"], "out must end in .npz or .parquet, got x.csv"),
        (["out=occupied/x.npz"], "cannot write occupied/x.npz: Not a directory; name another file by out=FILE"),
        (["out=folder.npz"], "cannot write folder.npz: it is a folder; name another file by out=FILE"),
        (["output=x.npz"], "the configuration has no key 'output'; did you mean 'out'?"),
        (["probes=[knn]"], "the configuration has no key 'probes'; it has ckpt, hydra, out, "),
    ],
)
def test_a_mistake_is_one_line_and_leaves_older_files(
    overrides: list[str],
    message: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "occupied").write_text("a file")
    (tmp_path / "embeddings.npz").write_text("of yesterday")
    assert run(monkeypatch, embed, f"ckpt={trained}", *overrides) == 1
    output = capsys.readouterr()
    assert output.err.startswith("adadim-embed: error: ")
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert sorted(x.name for x in tmp_path.iterdir()) == ["embeddings.npz", "folder.npz", "occupied"]
    assert (tmp_path / "embeddings.npz").read_text() == "of yesterday"


def test_a_file_that_will_be_replaced_is_named_before_the_work(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for there in (False, True):
        with pytest.warns(UserWarning, match=BROKEN):
            assert run(monkeypatch, embed, f"ckpt={trained}", "out=mine.npz") == 0
        lines = capsys.readouterr().out.splitlines()
        assert ("  mine.npz is there already: it will be replaced" in lines[:3]) is there


def test_several_models_are_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.ckpt"
    other.write_bytes((trained / "checkpoints" / "last.ckpt").read_bytes())
    assert run(monkeypatch, embed, f"ckpt=['{trained}',{other}]", f"out={tmp_path / 'x.npz'}") == 1
    assert "adadim-embed takes one model at a time, and ckpt means 2" in capsys.readouterr().err
