"""The cost study: its contenders do the same work, its figures are what they say, the page shows only these."""

import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cost as benchmark
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from adadim_lightning import AdaDim, AdaDimModule


@pytest.fixture(scope="module")
def cost() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "on_gpu", lambda: False)  # sums in half precision depend on their order
        yield benchmark


@pytest.fixture(scope="module")
def settings(cost: Any) -> Any:
    return cost.quick_settings()


@pytest.fixture(scope="module")
def found(cost: Any) -> dict[str, Any]:
    result: dict[str, Any] = cost.measure(quick=True)
    return result


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{key}")
    else:
        yield path, tree


def test_a_quick_measurement_has_every_figure(cost: Any, found: dict[str, Any]) -> None:
    assert json.loads(json.dumps(found)) == found
    assert list(found["race"]) == list(found["parts"]) == ["mlp", "vicreg"]
    for head, race in found["race"].items():
        names = [name for name, arm in cost.ARMS.items() if arm.wide or head == "mlp"]
        assert list(race["arms"]) == list(race["seconds"]) == names
        assert sum(race["cycle"].values()) == (1 if "cycle" in race["cycle"] else 10)
        assert all(len(seconds) == race["rounds"] for seconds in race["seconds"].values())
        assert race["arms"]["adadim"].keys() == {"step_ms", "turns"}
        for name in names[1:]:
            arm = race["arms"][name]
            assert arm.keys() == {"step_ms", "turns", "overhead", "low", "high"}
            assert arm["turns"] == race["rounds"]
            assert arm["overhead"] > -1  # a ratio of times, minus one
            assert arm["low"] <= arm["high"]
    assert found["met"] == (found["race"]["mlp"]["arms"]["vicreg"]["overhead"] <= found["goal"])
    assert found["memory"]["mlp"].keys() == {"adadim", "vicreg_plain"}
    assert [case["d"] for case in found["spectra"]["cases"]] == [16, 16, 64, 64]
    for path, value in leaves(found):
        assert isinstance(value, str | int | float | None)
        if isinstance(value, float):
            assert math.isfinite(value), path
        if path.rsplit("/", 1)[-1] in ("step_ms", "once_ms", "ms", "share", "peak_mib", "exact_share"):
            assert value > 0, path


def test_the_shares_of_the_parts_are_those_of_the_whole_step(cost: Any, found: dict[str, Any]) -> None:
    for parts in found["parts"].values():
        rows = parts["rows"]
        assert list(rows) == list(cost.PARTS)
        assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
        assert sum(row["ms"] for row in rows.values()) == pytest.approx(parts["step_ms"])
        # Of ten steps one has a reading, and in one the gradients are compared.
        assert rows["keeping"]["ms"] == rows["keeping"]["once_ms"]
        for part in ("measuring", "reading", "matching"):
            assert rows[part]["ms"] == pytest.approx(rows[part]["once_ms"] / 10)
        added = sum(rows[part]["ms"] for part in cost.ADDED)
        vicreg = parts["step_ms"] - rows["views"]["ms"] - added
        assert parts["added"] == pytest.approx(added / vicreg)


@pytest.mark.parametrize("head", ["mlp", "vicreg"])
def test_a_step_taken_apart_has_the_gradients_of_the_objective(head: str, cost: Any, settings: Any) -> None:
    stages = cost.Stages(settings, head)
    view1, view2 = torch.randn(2, 8, 3, 8, 8, device=cost.device_of())
    reference = copy.deepcopy(stages.module)
    reference.objective.match_gradients = False  # the stages take kappa as it is
    loss, r, z = stages.gradients(view1, view2, lambda part: None)
    expected_r = reference(torch.cat([view1, view2]))
    expected_z = reference.projection_head(expected_r)
    output = reference.objective(*expected_r.chunk(2), *expected_z.chunk(2))
    output.total.backward()
    assert all(float(value) != 0 for value in output.weighted.values())
    torch.testing.assert_close(loss, output.total.detach())
    torch.testing.assert_close(r, expected_r.detach())
    torch.testing.assert_close(z, expected_z.detach())
    pairs = list(zip(stages.module.parameters(), reference.parameters(), strict=True))
    assert len(pairs) > 8
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_all_contenders_train_the_same_model_and_vicreg_is_the_same_loss_in_all(cost: Any, settings: Any) -> None:
    modules = {name: cost.build(settings, "mlp", name)[0] for name in cost.ARMS}
    (views, labels) = cost.Batches(settings, cost.config_of(settings, "mlp"))[0]
    (view1, view2) = (x.cpu() for x in views)
    weights = modules["adadim"].backbone.state_dict() | modules["adadim"].projection_head.state_dict()
    for module in modules.values():
        own = module.backbone.state_dict() | module.projection_head.state_dict()
        assert all(torch.equal(own[key], value) for key, value in weights.items())
        assert module.configure_optimizers().defaults == modules["adadim"].configure_optimizers().defaults

    def loss(name: str) -> Any:
        module = modules[name]
        if not isinstance(module, AdaDimModule):
            return module.training_step(((view1, view2), labels), 0).item()
        r = module(torch.cat([view1, view2]))
        return module.objective(*r.chunk(2), *module.projection_head(r).chunk(2)).total.item()

    modules["adadim"].objective.match_gradients = False
    modules["adadim"].objective.set_balance(0.0, 0.0)
    for name in ("adadim", "vicreg", "vicreg_module"):  # with alpha 0, AdaDim is VICReg
        assert loss(name) == pytest.approx(loss("vicreg_plain"), rel=1e-5)
    modules["adadim"].objective.set_balance(1.0, 0.0)
    assert loss("adadim") == pytest.approx(loss("simclr_plain"), rel=1e-5)
    assert loss("lightly_simclr") == pytest.approx(loss("simclr_plain"), rel=1e-5)
    modules["vicreg"].objective.halve_variance = True
    assert loss("lightly_vicreg") == pytest.approx(loss("vicreg"), rel=1e-4)


def test_the_contenders_are_what_adadim_train_ships(cost: Any) -> None:
    for head in cost.full_settings().heads:
        for name, gamma, schedule in (
            ("adadim", 1.0, "EffectiveRankSchedule"),
            ("vicreg", 0.0, "ConstantSchedule"),
        ):
            config = cost.config_of(cost.full_settings(), head, cost.ARMS[name].objective)
            assert config.objective.gamma == gamma
            assert config.callbacks.adadim.balance.alpha._target_.endswith(schedule)
            assert config.callbacks.adadim.every_n_steps <= 50
            assert config.data.batch_size == 256
    settings = cost.quick_settings()
    assert [type(x) for x in cost.build(settings, "mlp", "adadim")[1]] == [AdaDim]
    assert [type(x) for x in cost.build(settings, "mlp", "vicreg")[1]] == [AdaDim]
    assert all(cost.build(settings, "mlp", name)[1] == [] for name in cost.ARMS if not cost.ARMS[name].measured)


def test_training_in_turns_is_training(cost: Any, settings: Any) -> None:
    batches = cost.Batches(settings, cost.config_of(settings, "mlp"), steps=13)
    racer = cost.Racer(settings, "mlp", "adadim", batches, 1)
    other = cost.Racer(settings, "mlp", "vicreg_plain", batches, 2)
    for _ in range(12):
        assert racer.turn() > 0
        other.turn() if other._turn.taken < 12 else None
    racer.end()
    other.end()
    for name, of_racer in (("adadim", racer), ("vicreg_plain", other)):
        module, callbacks = cost.build(settings, "mlp", name)
        cost.trainer_of(callbacks).fit(module, DataLoader(batches, batch_size=None))
        for ours, theirs in zip(of_racer.module.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert float(racer.module.objective.alpha) != 0.5  # the callback has read


def test_an_error_in_the_training_of_a_contender_ends_the_race(cost: Any, settings: Any) -> None:
    class Broken(Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            raise RuntimeError("out of order")

    batches = cost.Batches(settings, cost.config_of(settings, "mlp"))
    racer = cost.Racer(settings, "mlp", "vicreg_plain", batches, 1)
    racer._trainer.callbacks.append(Broken())
    for call in (racer.turn, racer.end):
        with pytest.raises(RuntimeError, match="out of order"):
            call()


def test_the_kinds_of_steps_are_what_the_callback_does(cost: Any, settings: Any) -> None:
    config = cost.config_of(settings, "mlp")
    batches = cost.Batches(settings, config)
    done: dict[int, str] = {}

    class Witness(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            (callback,) = (x for x in trainer.callbacks if isinstance(x, AdaDim))
            read = callback.balance.statistics is not self.seen
            matched = not torch.equal(module.objective.gradient_norms, self.norms)
            self.seen, self.norms = callback.balance.statistics, module.objective.gradient_norms.clone()
            done[batch_idx] = "reading" if read else "matched" if matched else "ordinary"

        seen = None
        norms = torch.zeros(2)

    racer = cost.Racer(settings, "mlp", "adadim", batches, 1)
    racer._trainer.callbacks.append(Witness())
    for _ in range(22):
        racer.turn()
    racer.end()
    assert {step: done[step] for step in range(1, 22)} == {
        step: cost.kind_of(step, config) for step in range(1, 22)
    }
    assert cost.kinds_of_a_cycle(config) == {"matched": 1, "ordinary": 8, "reading": 1}


def test_the_cycle_of_the_shipped_settings_is_that_of_its_readings(cost: Any) -> None:
    config = cost.config_of(cost.full_settings(), "mlp")
    assert cost.kinds_of_a_cycle(config) == {"matched": 5, "ordinary": 44, "reading": 1}


def test_overheads_are_right_however_fast_the_machine_is_meanwhile(cost: Any) -> None:
    cycle = {"ordinary": 42, "measured": 7, "reading": 1}
    kinds = [kind for kind, count in cycle.items() for _ in range(count)] * 2
    pace = np.random.default_rng(0).uniform(0.5, 2.0, len(kinds))
    longer = {"ordinary": 1.01, "measured": 1.05, "reading": 2.0}
    seconds = {
        "adadim": [longer[kind] * x for kind, x in zip(kinds, pace, strict=True)],
        "vicreg_plain": list(pace),
        "lightly_vicreg": [2 * x if i % 3 == 0 else math.nan for i, x in enumerate(pace)],
    }
    found = cost.compare(seconds, kinds, cycle, 1)
    mean = (42 * 1.01 + 7 * 1.05 + 2.0) / 50
    for name, length in (("vicreg_plain", 1.0), ("lightly_vicreg", 2.0)):
        expected = mean / length - 1
        assert [found[name][key] for key in ("overhead", "low", "high")] == pytest.approx([expected] * 3)
    assert found["lightly_vicreg"]["turns"] == 34
    assert found["adadim"]["step_ms"] == pytest.approx(1000 * np.median(pace) * mean)


def test_intervals_are_wide_where_the_times_are_uncertain(cost: Any) -> None:
    random = np.random.default_rng(0)
    kinds, cycle = ["ordinary"] * 40, {"ordinary": 1}

    def width(noise: float) -> float:
        times = {"adadim": 1 + noise * random.standard_normal(40), "vicreg_plain": np.ones(40)}
        arm = cost.compare(times, kinds, cycle, 1)["vicreg_plain"]
        assert arm["low"] <= arm["overhead"] <= arm["high"]
        return float(arm["high"] - arm["low"])

    assert 0 < width(0.01) < width(0.1)


@pytest.mark.parametrize(
    ("n", "d", "spectrum"), [(256, 64, "decaying"), (512, 256, "decaying"), (512, 128, "isotropic")]
)
def test_a_randomized_rank_is_as_near_as_it_says(n: int, d: int, spectrum: str, cost: Any) -> None:
    for seed in range(3):
        x = cost.rows_with_spectrum(n, d, cost.SPECTRA[spectrum], seed=seed)
        exact = cost.exact_rank(x)
        estimate, stated = cost.lanczos_rank(x, seed=seed)
        assert 0 < stated < 0.1
        assert abs(estimate / exact - 1) < 1.5 * stated  # stated at two standard errors
        assert cost.lanczos_rank(x, seed=seed) == (estimate, stated)
    assert cost.lanczos_rank(x.T.contiguous(), seed=seed)[0] == pytest.approx(exact, rel=0.05)


def test_a_flat_tail_suits_isotropic_rows_and_flatters_others(cost: Any) -> None:
    isotropic, decaying = (cost.rows_with_spectrum(2048, 128, power) for power in (0.0, 1.5))
    assert cost.low_rank_rank(isotropic, 32) == pytest.approx(cost.exact_rank(isotropic), rel=0.02)
    assert cost.low_rank_rank(decaying, 32) > 1.02 * cost.exact_rank(decaying)


def test_the_rows_of_the_spectra_have_no_axis_of_their_own(cost: Any) -> None:
    x = cost.rows_with_spectrum(1024, 64, 0.75)
    second = x.T @ x
    off = second - second.diag().diag()
    assert off.norm() > 0.3 * second.norm()  # else random signs would estimate without any error
    values = torch.linalg.svdvals(x)
    assert values[0] / values[-1] > 10


def test_memory_is_that_of_the_contender_and_not_of_the_process_that_started_it(cost: Any, settings: Any) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("reads /proc")
    ballast = torch.ones(3 * 2**27)  # 1.5 GiB
    found = cost.peak_memory_apart("mlp", "adadim", "--quick")
    assert float(ballast[-1]) == 1
    assert found.keys() == {"peak_mib", "training_mib"}
    assert 0 < found["training_mib"] < found["peak_mib"] < 1536


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_everything_is_measured_on_a_gpu_too(cost: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "on_gpu", torch.cuda.is_available)
    found = cost.measure(quick=True)
    assert found["gpu"]
    assert found["goal"] == 0.05
    assert found["race"]["mlp"]["cycle"] == {"cycle": 1}
    assert all(math.isfinite(value) for _, value in leaves(found) if isinstance(value, float))
    assert cost.markdown(found).startswith("## What it costs")


def test_a_pair_that_is_built_anew_is_compared_by_its_own_steps(
    cost: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"adadim": iter(range(1, 1000)), "vicreg": iter(range(2, 2000, 2))}  # twice as long, turn by turn
    turn = cost.Racer.turn

    def told(racer: Any) -> float:
        turn(racer)
        return float(next(seconds[racer.name]))

    monkeypatch.setattr(cost.Racer, "turn", told)
    found = cost.rebuilt(settings)
    for pairs in (found["kept"], found["given_back"]):
        assert pairs["pairs"] == [-0.5, -0.5]
        assert (pairs["mean"], pairs["low"], pairs["high"], pairs["sd"], pairs["n"]) == (-0.5, -0.5, -0.5, 0.0, 2)


# The page.

NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)*")


def shown(text: str) -> set[str]:
    return {number.lstrip("+-").replace(",", "").rstrip(".") for number in NUMBER.findall(text)}


def known(found: dict[str, Any]) -> set[str]:
    """All ways in which the page may write a figure."""
    ways: set[str] = set()
    for _, value in leaves(found):
        if isinstance(value, str):
            ways |= shown(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            ways |= {f"{abs(value) * factor:.{digits}f}" for factor in (1, 100) for digits in range(3)}
    return ways


def scrambled(tree: Any, random: np.random.Generator) -> Any:
    """The same tree with other numbers; numbers of dimensions stay, which group the spectra."""
    if isinstance(tree, dict):
        return {key: value if key == "d" else scrambled(value, random) for key, value in tree.items()}
    if isinstance(tree, list):
        return [scrambled(value, random) for value in tree]
    if isinstance(tree, bool) or not isinstance(tree, int | float):
        return tree
    return type(tree)(random.uniform(1000, 9000)) if isinstance(tree, int) else random.uniform(0.001, 900)


def test_the_page_shows_no_number_that_is_not_in_the_file(cost: Any, found: dict[str, Any]) -> None:
    for figures in (found, *(scrambled(found, np.random.default_rng(seed)) for seed in range(3))):
        text = cost.markdown(figures)
        assert text.startswith("## What it costs\n")
        assert len(shown(text)) > 60
        assert shown(text) - known(figures) == set()
        on_gpu = cost.markdown_of_gpu(figures, "cost.json")
        assert len(shown(on_gpu)) > 20
        assert shown(on_gpu) - known(figures) == set()


def test_the_page_has_its_tables_its_picture_and_where_they_come_from(cost: Any, found: dict[str, Any]) -> None:
    text = cost.markdown(found)
    assert text.count("| --- |") == 3
    widths = [{line.count("|") for line in block.splitlines()} for block in text.split("\n\n") if block[0] == "|"]
    assert len(widths) == 3
    assert all(len(width) == 1 for width in widths)
    assert re.search(r"!\[.+\]\(images/cost\.png\)", text)
    assert "benchmarks/results/cost.json" in text
    assert "python benchmarks/cost.py" in text
    assert len(re.findall(r"^- .+\.$", text, re.MULTILINE)) in range(3, 7)
    assert "trial" in text
    assert "trial" not in cost.markdown(found | {"quick": False})


def test_the_conclusions_follow_the_figures(cost: Any, found: dict[str, Any]) -> None:
    figures = copy.deepcopy(found)
    figures["goal"], figures["met"] = 0.03, True
    arms = figures["race"]["mlp"]["arms"]
    arms["vicreg"]["overhead"], arms["vicreg_plain"]["overhead"] = -0.004, 0.021
    arms["lightly_vicreg"]["overhead"] = -0.2
    for case in figures["spectra"]["cases"]:
        case["saved"] = 0.02 if case["d"] == 64 else -0.01
    text = cost.markdown(figures)
    for words in (
        "0.4 % shorter than one of `objective=vicreg`; the goal, at most 3 %, is met",
        "2.1 % longer than a bare VICReg that logs nothing and watches for nothing, within that goal",
        "20.0 % shorter than lightly's VICRegLoss",
        "2.0 % at d = 64. Up to d = 16 it saves less or nothing",
    ):
        assert words in text
    figures["met"] = False
    arms["vicreg_plain"]["overhead"] = 0.04
    for case in figures["spectra"]["cases"]:
        case["saved"] = 0.002
    text = cost.markdown(figures)
    for words in ("is missed", "beyond that goal", "less than 1 % of the default model's step for all d up to 64"):
        assert words in text


def test_the_picture_is_drawn(cost: Any, found: dict[str, Any], tmp_path: Path) -> None:
    drawn = cost.pictures(found)
    assert list(drawn) == ["cost"]
    drawn["cost"].savefig(tmp_path / "cost.png", dpi=100)
    assert drawn["cost"].get_size_inches()[0] * 100 == 900
    assert len(drawn["cost"].axes) == 4
    assert all(axes.has_data() and axes.get_title("left") for axes in drawn["cost"].axes)
