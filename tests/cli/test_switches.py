"""The switches of a run: precision, memory format, compilation, rates, workers; real steps by the command."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch import nn

from adadim_lightning.pretrained import load_backbone
from tests.cli.test_train import PLAIN, run, summary

SHORT = [
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "data.batch_size=64",
    "trainer.accelerator=cpu",
    PLAIN,
]
SPY = ["+callbacks.spy._target_=spies_of_a_test.Spy", "trust=[spies_of_a_test]"]
SOURCE = '''
import torch
from lightning.pytorch import Callback

NOTES = {}


class Spy(Callback):
    """Notes what really happens in the first convolution, and the steps of the optimizer."""

    def on_train_start(self, trainer, pl_module):
        conv = next(x for x in pl_module.backbone.modules() if isinstance(x, torch.nn.Conv2d))
        NOTES.clear()
        NOTES.update(module=pl_module, kinds={type(x).__name__ for x in pl_module.modules()}, workers=set())

        def note(module, inputs, output):
            if pl_module.training:
                last = torch.channels_last
                NOTES.update(
                    output=output.dtype,
                    weight=module.weight.dtype,
                    formats=[x.is_contiguous(memory_format=last) for x in (inputs[0], module.weight)],
                )

        self.handle = conv.register_forward_hook(note)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        (optimizer,) = trainer.optimizers
        NOTES.update(optimizer=type(optimizer).__name__, loss=outputs["loss"].detach())
        NOTES.update(lr=optimizer.param_groups[0]["lr"], steps=trainer.global_step, precision=trainer.precision)
        NOTES.update(workers=trainer.train_dataloader.num_workers, shape=tuple(batch[0][0].shape))

    def on_train_end(self, trainer, pl_module):
        self.handle.remove()
'''


@pytest.fixture(scope="module")
def spies(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A package of the user's own, as a file on the path."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "spies_of_a_test.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    import spies_of_a_test  # type: ignore[import-not-found]

    assert isinstance(spies_of_a_test, ModuleType)
    yield spies_of_a_test.NOTES
    sys.path.remove(str(folder))
    del sys.modules["spies_of_a_test"]


def figures(folder: Path) -> dict[str, float]:
    """What was logged and evaluated, but for the time it took."""
    prefixes = ("loss", "dynamics", "balance", "probe", "evaluation")
    return {key: value for key, value in summary(folder).items() if key.startswith(prefixes)}  # type: ignore[misc]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, spies: Any) -> tuple[dict[str, float], dict[str, Any], Path]:
    """A run without any switch: its figures, what the spy saw, and its folder."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(monkeypatch, folder, *SHORT, *SPY) == 0
    return figures(folder), dict(spies), folder


def test_without_a_switch_all_is_in_full_precision(plain: Any) -> None:
    found, notes, _ = plain
    assert notes["precision"] == "32-true"  # null, on a CPU
    assert (notes["output"], notes["weight"]) == (torch.float32, torch.float32)
    assert (notes["steps"], notes["workers"], notes["optimizer"]) == (2, 0, "AdamW")
    assert len(found) > 20


def test_a_package_needs_trust(
    spies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spies.clear()
    assert run(monkeypatch, tmp_path / "run", *SHORT, SPY[0]) == 1
    error = capsys.readouterr().err.strip()
    assert error == (
        "adadim-train: error: spies_of_a_test.Spy is not trusted; allow it by trust=[spies_of_a_test]"
    )
    assert not spies
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_mixed_precision_computes_in_bfloat16_and_keeps_weights_in_full(
    spies: Any, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, tmp_path / "run", *SHORT, *SPY, "trainer.precision=bf16-mixed") == 0
    assert spies["precision"] == "bf16-mixed"
    assert (spies["output"], spies["weight"]) == (torch.bfloat16, torch.float32)
    assert all(p.dtype == torch.float32 for p in spies["module"].parameters())
    assert spies["loss"].dtype == torch.float32
    found = figures(tmp_path / "run")
    assert all(math.isfinite(value) for value in found.values())
    assert found["loss/total"] == pytest.approx(plain[0]["loss/total"], rel=0.05)
    assert found["loss/total"] != plain[0]["loss/total"]


def test_channels_last_changes_the_format_and_no_figure(
    spies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In color, since one channel lies the same way in both formats; one step, since Adam magnifies rounding.
    color = [
        "data.channels=3",
        "data.mean=[0.3,0.3,0.3]",
        "data.std=[0.4,0.4,0.4]",
        "trainer.limit_train_batches=1",
    ]
    results = []
    for switch in ("true", "false"):
        folder = tmp_path / switch
        assert run(monkeypatch, folder, *SHORT, *SPY, *color, f"channels_last={switch}") == 0
        assert spies["formats"] == [switch == "true"] * 2
        found = figures(folder)
        results.append({key: x for key, x in found.items() if key.startswith(("loss", "dynamics"))})
    assert len(results[0]) > 10
    assert results[0] == pytest.approx(results[1], rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_compiled_parts_give_the_same_figures_and_an_ordinary_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    compile_module = nn.Module.compile

    def note(module: nn.Module, *arguments: Any, **options: Any) -> None:
        compile_module(module, *arguments, **options)
        compiled.append(module)

    monkeypatch.setattr(nn.Module, "compile", note)
    small = ["trainer.limit_train_batches=1", "backbone.channels=[8]", "~callbacks.knn", "~callbacks.linear_probe"]
    small += ["optimized_metric=loss/total"]
    results, states, outputs = [], [], []
    images = torch.randn(4, 1, 8, 8)
    for switch in ("true", "false"):
        folder = tmp_path / switch
        assert run(monkeypatch, folder, *SHORT, *small, f"compile={switch}") == 0
        results.append(figures(folder))
        states.append(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
        backbone = load_backbone(folder)
        assert all(torch.equal(x, states[-1][f"backbone.{key}"]) for key, x in backbone.state_dict().items())
        outputs.append(backbone.eval()(images))
    assert [type(x).__name__ for x in compiled] == ["SmallConvNet", "Sequential"]
    for key, value in results[1].items():
        tolerance = 0.03 if key.startswith("evaluation") else 1e-4
        assert results[0][key] == pytest.approx(value, rel=tolerance, abs=tolerance), key
    assert list(states[0]) == list(states[1])
    torch.testing.assert_close(*outputs, rtol=0.05, atol=0.02)


def test_synchronized_batch_norms_of_one_process_are_plain_ones(
    spies: Any, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, tmp_path / "run", *SHORT, *SPY, "trainer.sync_batchnorm=true") == 0
    assert "BatchNorm2d" in spies["kinds"]  # Lightning converts where there are several processes
    assert "SyncBatchNorm" not in spies["kinds"]
    assert figures(tmp_path / "run") == plain[0]


# Name: overrides, learning rate of a step, steps, and the line that says so.
RATES = {
    "none": (["lr_scaling=none"], 1e-3, 4, "learning rate 0.001 (not scaled); global batch 64 = 64"),
    "linear": (
        ["lr_scaling=linear"], 2.5e-4, 4,
        "learning rate 0.00025 (0.001 x 64/256); global batch 64 = 64",
    ),
    "sqrt": (
        ["lr_scaling=sqrt"], 5e-4, 4,
        "learning rate 0.0005 (0.001 x sqrt(64/256)); global batch 64 = 64",
    ),
    "accumulated": (
        ["lr_scaling=linear", "trainer.accumulate_grad_batches=2"], 5e-4, 2,
        "learning rate 0.0005 (0.001 x 128/256); global batch 128 = 64 x 2 accumulated",
    ),
    "lars": (
        ["optimizer=lars", "optimizer.lr=0.4", "lr_scaling=linear"], 0.1, 4,
        "learning rate 0.1 (0.4 x 64/256); global batch 64 = 64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RATES)
def test_the_learning_rate_follows_the_global_batch_and_is_printed(
    name: str, spies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, lr, steps, line = RATES[name]
    rest = ["~lr_schedule", "trainer.limit_train_batches=4", *(["optimizer.lr=1e-3"] if name != "lars" else [])]
    assert run(monkeypatch, tmp_path / "run", *SHORT, *SPY, *rest, *overrides) == 0
    assert f"optimizer  {line}\n" in capsys.readouterr().out
    assert spies["lr"] == pytest.approx(lr)
    assert spies["steps"] == steps
    assert spies["optimizer"] == ("Lars" if name == "lars" else "AdamW")


def test_an_unknown_rule_of_scaling_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path / "run", *SHORT, "lr_scaling=liner") == 1
    assert "the learning-rate rule must be one of none, linear, sqrt, got 'liner'" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["kornia", "torchvision"])
def test_workers_make_the_views(
    backend: str, spies: Any, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [f"views.backend={backend}", "data.num_workers=2"]
    assert run(monkeypatch, tmp_path / "run", *SHORT, *SPY, *overrides) == 0
    assert spies["workers"] == 2
    assert spies["shape"] == (64, 1, 8, 8)
    found = figures(tmp_path / "run")
    assert found.keys() == plain[0].keys()
    assert found["loss/total"] == pytest.approx(plain[0]["loss/total"], rel=0.2)  # other draws of the same views


def test_show_views_draws_a_picture_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path / "run", "show_views=true") == 0
    output = capsys.readouterr().out
    assert "views.png; without show_views=true it is trained on that" in output
    picture = imread(tmp_path / "run" / "views.png")
    assert min(picture.shape[:2]) > 600
    assert picture.std() > 0.2
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "metrics.csv").exists()
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (found["status"], found["epochs"]) == ("ok", 0)
    # The folder is free for the run itself.
    assert run(monkeypatch, tmp_path / "run", *SHORT, "trainer.limit_train_batches=1") == 0


@pytest.mark.parametrize("override", ["~views.augmentations.noise", "views.augmentations.noise=null"])
def test_a_step_of_the_recipe_is_removed_on_the_command_line(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, tmp_path / "run", "show_views=true", override) == 0
    recipe = summary(tmp_path / "run")["config"]["views"]["augmentations"]  # type: ignore[index]
    assert recipe.get("noise") is None
    assert list(recipe)[:3] == ["crop", "affine", "color_jitter"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("views.augmentations.crop.scal=1", "views.augmentations.crop has no key 'scal'; did you mean 'scale'?"),
        ("+views.augmentations.flipp.p=0.5", "views: there is no augmentation 'flipp'; did you mean 'flip'?"),
        ("+views.second.blur.p=0.5", "views: second changes 'blur', which is not in the recipe: crop, affine"),
        ("views.backend=cornia", 'views: backend must be "kornia" or "torchvision", got \'cornia\''),
    ],
)
def test_a_mistake_in_the_views_is_one_line(
    override: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, tmp_path / "run", override) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
