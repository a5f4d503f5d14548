"""The evaluation that closes a run, against the functions that users have for the same."""

from pathlib import Path

import pytest
import torch
from torch import nn

from adadim_lightning.cli.closing import check_evaluation, evaluate_backbones
from adadim_lightning.data import ImageData, digits
from adadim_lightning.evaluation import few_shot_accuracy, knn_accuracy, linear_accuracies
from tests.cli.test_train import ONE_STEP, run, summary
from tests.data.pictures import views

SETTINGS = {"of": ["raw", "trained"], "probes": ["linear", "knn", "few_shot"], "images": 5000}


@pytest.fixture(scope="module")
def data() -> ImageData:
    return digits(views=views(1))


@pytest.fixture(scope="module")
def backbones() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"raw": nn.Flatten(), "trained": nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU())}


def test_it_gives_what_the_evaluation_functions_give(data: ImageData, backbones) -> None:
    found = evaluate_backbones(backbones, data, SETTINGS)
    for name, backbone in backbones.items():
        with torch.no_grad():
            train, test = ((backbone(data.views.clean(x.images)), x.labels) for x in (data.train, data.test))
        linear = linear_accuracies(train, test)
        assert found.pop(f"evaluation/{name}_linear_top1") == pytest.approx(linear.top1)
        assert found.pop(f"evaluation/{name}_linear_balanced") == pytest.approx(linear.balanced)
        assert found.pop(f"evaluation/{name}_knn_top1") == pytest.approx(knn_accuracy(train, test))
        for share, label in ((0.01, "1pct"), (0.1, "10pct")):
            mean, _ = few_shot_accuracy(train, test, share)
            assert found.pop(f"evaluation/{name}_few_shot_{label}_top1") == pytest.approx(mean)
    assert found == {}


def test_only_what_is_asked_for_is_measured(data: ImageData, backbones) -> None:
    found = evaluate_backbones(backbones, data, {"of": ["trained"], "probes": ["knn"], "images": 5000})
    assert list(found) == ["evaluation/trained_knn_top1"]
    assert evaluate_backbones(backbones, data, {"of": [], "probes": ["knn"], "images": 5000}) == {}
    assert evaluate_backbones(backbones, data, None) == {}


def test_no_more_images_are_seen_than_allowed(data: ImageData) -> None:
    seen = []

    class Counting(nn.Flatten):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    evaluate_backbones({"trained": Counting()}, data, {"of": ["trained"], "probes": ["knn"], "images": 100})
    assert sum(seen) == 200


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"of": ["best"]}, "evaluation.of has no option 'best'; there are raw, untrained, trained"),
        ({"probes": ["svm"]}, "evaluation.probes has no option 'svm'; there are linear, knn, few_shot"),
        ({"of": None}, r"evaluation.of must be a list such as \[raw, untrained, trained\], got None"),
        ({"probes": "knn"}, r"evaluation.probes must be a list such as \[linear, knn, few_shot\], got 'knn'"),
        ({"images": 1}, "evaluation.images must be an integer >= 2"),
        ({"images": None}, "evaluation.images must be an integer >= 2"),
    ],
    ids=str,
)
def test_a_setting_that_there_is_not_is_named(change: dict[str, object], cause: str) -> None:
    check_evaluation(SETTINGS)
    with pytest.raises(ValueError, match=cause):
        check_evaluation({**SETTINGS, **change})


@pytest.mark.parametrize("settings", [5, "off", True, ["knn"]])
def test_settings_that_are_none_are_named(settings: object) -> None:
    with pytest.raises(ValueError, match="evaluation must be null or have the keys of, probes and images"):
        check_evaluation(settings)


def test_a_run_measures_and_prints_what_its_configuration_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, tmp_path / "run", *ONE_STEP, "evaluation.of=[trained]", "evaluation.probes=[few_shot]")
    found = {key for key in summary(tmp_path / "run") if key.startswith("evaluation/")}
    assert found == {f"evaluation/trained_few_shot_{share}_top1" for share in ("1pct", "10pct")}
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if "held-out top-1" in line)
    assert lines[head].split("held-out top-1")[1].split() == ["1", "%", "10", "%"]
    run(monkeypatch, tmp_path / "none", *ONE_STEP, "evaluation=null")
    assert not [key for key in summary(tmp_path / "none") if key.startswith("evaluation/")]
