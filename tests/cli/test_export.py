"""`adadim-export` from a run folder to files, in this process."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adadim_lightning.cli.export import main
from adadim_lightning.pretrained import load_backbone
from tests.helpers import all_digits
from tests.test_export import MEDMNIST
from tests.test_pretrained import train_tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("runs") / "tiny")


def command(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    """Run the command as a shell would; its exit code."""
    monkeypatch.setattr(sys, "argv", ["adadim-export", *overrides])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The one line that a command which cannot work prints."""
    assert command(monkeypatch, *overrides) == 1
    error = capsys.readouterr().err
    assert error.startswith("adadim-export: error: ")
    assert error.count("\n") == 1
    return error


def altered(run: Path, path: Path, **changes: Any) -> Path:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["adadim"]["config"] |= changes
    torch.save(checkpoint, path)
    return path


def test_several_formats_go_beside_the_run_and_compute_what_it_computes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, f"ckpt={run}", "format=[onnx,safetensors,torchscript]") == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert not list(tmp_path.iterdir())  # no folder of Hydra's
    folder = run / "export"
    names = ["backbone.onnx", "backbone.safetensors", "backbone.torchscript.pt"]
    assert sorted(x.name for x in folder.iterdir()) == sorted([*names, *(f"{name}.json" for name in names)])

    lines = output.out.splitlines()
    assert lines[0] == "backbone   tiny, compared on 64 of its images"
    for line, name in zip(lines[1:4], names, strict=True):
        assert re.fullmatch(rf"\w+ +\d\.\d\d MB   largest difference \d\.\de[-+]\d\d   {re.escape(name)}", line)
    assert lines[-1] == f"Everything is in {folder}"
    assert max(map(len, lines[:-1])) <= 80

    data, backbone = all_digits(), load_backbone(run).eval()
    images = (data.test.images[:5] / 255 - 0.3053) / 0.3758
    with torch.no_grad():
        expected = backbone(images)
    session = onnxruntime.InferenceSession(folder / "backbone.onnx")
    found = session.run(None, {"images": images.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    beside = json.loads((folder / "backbone.onnx.json").read_text())
    assert beside | {"largest_difference": 0, "load": []} == {
        "channels": 1,
        "image_size": 8,
        "resize": 12,
        "mean": [0.3053],
        "std": [0.3758],
        "backbone": {
            "_target_": "adadim_lightning.models.SmallConvNet", "in_channels": 1, "channels": [4, 8]
        },
        "checkpoint": "tiny/checkpoints/epoch=0000-step=000003.ckpt",
        "format": "onnx",
        "representation_dim": 8,
        "largest_difference": 0,
        "images_compared": 64,
        "load": [],
    }  # fmt: skip


def test_out_names_the_file_or_the_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, f"ckpt={run / 'checkpoints' / 'last.ckpt'}", "out=new/mine.st") == 0
    assert command(monkeypatch, f"ckpt={run}", "out=there") == 0
    assert sorted(str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*") if x.is_file()) == [
        "new/mine.st", "new/mine.st.json", "there/backbone.safetensors", "there/backbone.safetensors.json"
    ]  # fmt: skip
    error = failure(monkeypatch, capsys, f"ckpt={run}", "out=x.onnx", "format=[torchscript,safetensors]")
    assert "out must be a folder for several formats, got x.onnx" in error
    (tmp_path / "file").touch()
    error = failure(monkeypatch, capsys, f"ckpt={run}", "out=file/x.st")
    assert "cannot write file/x.st: " in error
    assert "run_dir" not in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["out=file/below", "format=[torchscript,safetensors]"], "Not a directory; name another place by out=..."),
        (
            ["out=taken", "format=[torchscript,safetensors]"],
            "cannot write taken/backbone.safetensors: it is a folder",
        ),
        (["out=new", "format=[torchscript,torchvision]"], "torchvision is for backbones that torchvision made"),
        (["out=x.onnx"], "out=x.onnx is named like onnx, but the format is safetensors: give format=onnx"),
        (["out=x.pt2", "format=torchscript"], "named like torch_export, but the format is torchscript"),
    ],
)
def test_what_cannot_be_written_is_known_before_any_format_is(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "backbone.safetensors").mkdir(parents=True)
    assert message in failure(monkeypatch, capsys, f"ckpt={run}", *overrides)
    assert [x.name for x in tmp_path.rglob("*") if x.is_file()] == ["file"]


def test_images_may_come_from_other_data(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the run's own are gone, one line says how; color and size are those of the run."""
    gone = {"_target_": "adadim_lightning.data.image_folder", "root": str(tmp_path / "gone"), "image_size": 12}
    path = altered(run, tmp_path / "moved.ckpt", data=gone | {"channels": 1, "mean": [0.3053], "std": [0.3758]})
    out = f"out={tmp_path / 'x.safetensors'}"
    error = failure(monkeypatch, capsys, f"ckpt={path}", out)
    assert "the run's own images cannot be loaded (" in error
    assert "give others by data=..., such as data=folder data.root=FOLDER" in error
    assert "data.root is not given" in failure(monkeypatch, capsys, f"ckpt={path}", out, "data=folder")
    other = ["data=digits"]
    if (MEDMNIST / "retinamnist.npz").exists():
        other = ["data=medmnist/retina", f"data.root={MEDMNIST}"]
    assert command(monkeypatch, f"ckpt={path}", out, *other) == 0
    assert "largest difference 0.0e+00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "give ckpt=RUN_OR_CHECKPOINT"),
        (["ckpt=no/such/run"], "there is no checkpoint no/such/run"),
        (["ckpt=RUN", "format=onnxx"], "there is no format 'onnxx'"),
        (["ckpt=RUN", "format=[]"], "give format=..."),
        (
            ["ckpt=RUN", "format=timm"],
            "timm is for backbones that timm made, not for adadim_lightning.models.Small",
        ),
        (["ckpt=RUN", "fromat=onnx"], "did you mean 'format'?"),
        (["ckpt=RUN", "data=digitz"], "data has no option 'digitz'; did you mean 'digits'?"),
    ],
)
def test_what_cannot_work_is_one_line(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
) -> None:
    assert message in failure(monkeypatch, capsys, *(x.replace("RUN", str(run)) for x in overrides))


def test_missing_onnx_gives_the_line_that_installs_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    error = failure(monkeypatch, capsys, f"ckpt={run}", "format=[safetensors,onnx]", "out=never")
    assert "pip install 'adadim-lightning[onnx]'" in error
    assert not Path("never").exists()


def test_data_of_a_checkpoint_may_not_run_code(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"_target_": "os.system", "command": f"touch {tmp_path / 'mark'}", "image_size": 12}
    error = failure(monkeypatch, capsys, f"ckpt={altered(run, tmp_path / 'x.ckpt', data=data)}")
    assert "os.system is not trusted" in error
    assert not (tmp_path / "mark").exists()
