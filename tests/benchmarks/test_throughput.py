"""The throughput benchmark: both sides do the same work, and its parts run."""

import argparse
from typing import Any

import numpy as np
import pytest
import throughput as benchmark
import torch
from kornia.constants import Resample
from lightly.transforms import VICRegTransform
from PIL import Image
from torchvision.transforms import v2


@pytest.fixture(scope="module")
def bench() -> Any:
    benchmark.WARM_UP = 1
    options = argparse.Namespace(
        backbone="small", batch_size=16, steps=2, rounds=1, workers=1, precision="32-true"
    )
    return benchmark.Bench(options)


Steps = dict[str, dict[str, Any]]


def of_lightly(transform: Any) -> Steps:
    """The steps that lightly's list takes, by the names of ours; those it never takes are left out."""
    steps: Steps = {}
    for step in transform.transforms:
        kind = type(step).__name__
        if kind == "RandomResizedCrop":
            steps["crop"] = {"size": tuple(step.size), "scale": tuple(step.scale), "ratio": tuple(step.ratio)}
        elif kind == "RandomHorizontalFlip":
            steps["flip"] = {"p": step.p}
        elif kind == "RandomVerticalFlip":
            assert step.p == 0
        elif kind == "RandomRotate":
            assert step.prob == 0
        elif kind == "RandomApply":
            (jitter,) = step.transforms
            ranges = {key: getattr(jitter, key) for key in ("brightness", "contrast", "saturation", "hue")}
            steps["color_jitter"] = {"p": step.p} | ranges
        elif kind == "RandomGrayscale":
            steps["grayscale"] = {"p": step.p}
        elif kind == "RandomSolarization":
            steps["solarize"] = {"p": step.prob, "threshold": step.threshold / 255}
        elif kind == "GaussianBlur":
            steps["blur"] = {"p": step.prob, "sigma": tuple(step.sigmas)}
        elif kind == "Normalize":
            steps["normalize"] = {"mean": step.mean, "std": step.std}
        else:
            assert kind == "ToTensor", kind
    return steps


def of_kornia(module: Any) -> tuple[str, dict[str, Any]]:
    p = module.p
    module = getattr(module, "by_kornia", module)
    assert module.p == p
    generator: Any = module._param_generator
    kind = next(x for x in (type(module), *type(module).__mro__) if x.__module__.startswith("kornia.")).__name__
    if kind == "RandomResizedCrop":
        assert module.flags["resample"] == Resample.BILINEAR
        return "crop", {"size": generator.output_size, "scale": generator.scale, "ratio": generator.ratio}
    if kind == "RandomHorizontalFlip":
        return "flip", {"p": p}
    if kind == "ColorJitter":
        samplers = {
            key: getattr(generator, f"{key}_sampler") for key in ("brightness", "contrast", "saturation", "hue")
        }
        return "color_jitter", {"p": p} | {key: (float(x.low), float(x.high)) for key, x in samplers.items()}
    if kind == "RandomGrayscale":
        return "grayscale", {"p": p}
    if kind == "RandomSolarize":
        return "solarize", {"p": p, "threshold": float(generator.sampler_dict["thresholds"].high)}
    assert kind == "RandomGaussianBlur"
    return "blur", {"p": p, "sigma": generator.sigma}


def of_torchvision(module: Any) -> tuple[str, dict[str, Any]]:
    found = {} if isinstance(module, v2.RandomResizedCrop) else {"p": module.p}
    if isinstance(module, v2.RandomApply):
        (module,) = module.transforms
    keys: dict[str, tuple[str, tuple[str, ...]]] = {
        "RandomResizedCrop": ("crop", ("size", "scale", "ratio")),
        "RandomHorizontalFlip": ("flip", ()),
        "ColorJitter": ("color_jitter", ("brightness", "contrast", "saturation", "hue")),
        "RandomGrayscale": ("grayscale", ()),
        "RandomSolarize": ("solarize", ("threshold",)),
        "GaussianBlur": ("blur", ("sigma",)),
    }
    name, parameters = keys[type(module).__name__]
    return name, found | {key: getattr(module, key) for key in parameters}


@pytest.mark.parametrize("backend", ["kornia", "torchvision"])
def test_the_recipe_is_that_of_lightly(backend: str, bench: Any) -> None:
    view1, view2 = VICRegTransform(input_size=benchmark.SIZE).transforms
    theirs = of_lightly(view1.transform)
    assert of_lightly(view2.transform) == theirs
    views = bench.views(backend)
    read = of_kornia if backend == "kornia" else of_torchvision
    steps = views.pipelines((benchmark.SIZE, benchmark.SIZE))
    assert all(first is second for first, second in steps)
    ours = dict(read(first) for first, _ in steps)
    ours["normalize"] = {"mean": views.mean.flatten().tolist(), "std": views.std.flatten().tolist()}
    assert list(ours) == list(theirs)
    for name, parameters in theirs.items():
        assert ours[name].keys() == parameters.keys(), name
        for key, value in parameters.items():
            # Bytes of 128 and more are inverted on both sides: 127 / 255 < 0.5 < 128 / 255.
            tolerance = 0.5 / 255 if key == "threshold" else 1e-6
            assert ours[name][key] == pytest.approx(value, abs=tolerance), (name, key)


def test_lightly_and_ours_have_the_same_effect(bench: Any) -> None:
    image = bench.images[0]
    transform = VICRegTransform(input_size=benchmark.SIZE)
    picture = Image.fromarray(image.movedim(0, -1).numpy())
    np.random.seed(0)
    theirs = torch.cat([torch.stack(transform(picture)) for _ in range(250)])
    ours = torch.cat(bench.views("kornia")(image.expand(250, -1, -1, -1).contiguous()))
    assert theirs.shape == ours.shape
    assert float(ours.mean()) == pytest.approx(float(theirs.mean()), abs=0.1)
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.1)
    assert float(ours.diff(dim=-1).abs().mean()) == pytest.approx(
        float(theirs.diff(dim=-1).abs().mean()), rel=0.15
    )


@pytest.mark.parametrize("side", ["lightly", "ours", "host"])
def test_each_side_trains_and_gives_a_rate(side: str, bench: Any, monkeypatch: Any) -> None:
    trained: list[Any] = []
    rate = benchmark.rate

    def keep(module: Any, *arguments: Any, **data: Any) -> float:
        trained.append((module, {key: x.clone() for key, x in module.state_dict().items()}))
        return rate(module, *arguments, **data)

    monkeypatch.setattr(benchmark, "rate", keep)
    assert getattr(bench, side)() > 0
    ((module, before),) = trained
    after = module.state_dict()
    weights = [key for key, _ in module.named_parameters() if after[key].ndim > 1]
    assert len(weights) >= 6
    assert all(not torch.equal(before[key], after[key]) for key in weights)
    # Two timed batches and one to warm up went through the backbone.
    (steps,) = {int(x) for key, x in after.items() if key.startswith("backbone") and "num_batches" in key}
    assert steps == (6 if side == "lightly" else 3)  # lightly's documentation passes one view after the other


def test_the_stages_are_all_timed(bench: Any) -> None:
    stages = bench.stages()
    assert list(stages) == ["load", "views", "forward", "objective", "backward"]
    assert all(milliseconds > 0 for milliseconds in stages.values())
    assert bench.bare() > 0
