"""Many processes train as one does with the whole of each batch."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor, nn

from adadim_lightning import AdaDim, DimensionMonitor, OnlineKNN
from adadim_lightning.distributed import check_strategy
from adadim_lightning.functional import knn_predict
from adadim_lightning.pretrained import load_pretrained
from tests.helpers import all_digits
from tests.metrics.conftest import four_processes, two_processes  # noqa: F401
from tests.metrics.distributed import Processes
from tests.test_distributed import PARTS

from . import worker
from .runs import DIGITS, differences, newest, said, start

pytorch_lightning = pytest.importorskip("pytorch_lightning")

ROOT = Path(__file__).parents[2]
MOST = 1e-5


@pytest.fixture(params=["two_processes", pytest.param("four_processes", marks=pytest.mark.slow)])
def processes(request: pytest.FixtureRequest) -> Processes:
    found: Processes = request.getfixturevalue(request.param)
    return found


@cache
def alone() -> dict[str, Any]:
    """What one process does."""
    return {"gradients": worker.all_gradients(), "steered": worker.steered()}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest of all parameters, relative; a gradient of mere rounding is compared with others."""
    norms = {name: float(gradient.norm()) for name, gradient in expected.items()}
    largest = max(norms.values())
    assert largest > 1e-3
    return max(
        float((found[name] - expected[name]).norm()) / max(norm, 1e-6 * largest) for name, norm in norms.items()
    )


def assert_gradients_of_one(results: list[dict[str, dict[int, worker.Steps]]]) -> None:
    table = {
        (name, n): max(
            difference(ours, theirs)
            for result in results
            for ours, theirs in zip(result[name][n], steps, strict=True)
        )
        for name, of_part in alone()["gradients"].items()
        for n, steps in of_part.items()
    }
    print(f"\n{len(results)} processes, batches a step: largest relative difference")
    for (name, n), largest in table.items():
        print(f"  {name}, {n}: {largest:.0e}")
    assert {name for name, _ in table} > set(PARTS)
    assert max(table.values()) <= MOST


def assert_counts(ours: dict[str, Any], one: dict[str, Any], images: int) -> None:
    """Each of the held-out images is counted once."""
    for key in ("probe/knn_top1", "probe/linear_top1"):
        hits = ours["logged"][-1][key] * images
        assert hits == pytest.approx(round(hits), abs=1e-4)
        assert ours["logged"][-1][key] == pytest.approx(one["logged"][-1][key], abs=1e-6)


def assert_equal(first: Any, second: Any) -> None:
    """To the bit."""
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


def assert_steered_as_one(results: list[dict[str, Any]]) -> None:
    for result in results[1:]:
        assert_equal(result, results[0])
    ours, one = results[0], alone()["steered"]
    assert_counts(ours, one, worker.HELD_OUT)
    assert len(set(one["alphas"])) > 2
    assert ours["alphas"] == pytest.approx(one["alphas"], rel=1e-3)
    for together, logged in zip(ours["logged"], one["logged"], strict=True):
        assert together == pytest.approx(logged, rel=2e-3, abs=1e-4)


def test_gradient_of_each_loss_part_is_that_of_one_process_with_the_whole_batch(processes: Processes) -> None:
    assert_gradients_of_one(processes.run(worker.all_gradients))


@pytest.mark.parametrize("name", worker.ACCUMULATED)
def test_accumulated_gradient_is_the_mean_of_those_of_its_batches(name: str) -> None:
    plain, (accumulated,) = (alone()["gradients"][name][n] for n in (1, worker.STEPS))
    assert len(plain) == worker.STEPS
    mean = {key: sum(step[key] for step in plain) / len(plain) for key in accumulated}
    assert difference(accumulated, mean) <= MOST
    assert difference(plain[0], plain[1]) > 1e-3


def test_alpha_and_all_that_is_logged_are_the_same_on_every_process(processes: Processes) -> None:
    assert_steered_as_one(processes.run(worker.steered))


def test_fewer_held_out_images_than_processes_are_scored_too(processes: Processes) -> None:
    for result in processes.run(worker.steered, 1):
        assert_counts(result, worker.steered(1), 1)


# Other ways to start, and what is refused.


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Two network namespaces that reach each other, or a skip that says why there are none."""
    names = [f"adadim{os.getpid()}{end}" for end in "ab"]
    steps = [["netns", "add", name] for name in names]
    steps += [["link", "add", names[0], "type", "veth", "peer", "name", names[1]]]
    for i, name in enumerate(names, start=1):
        steps += [
            ["link", "set", name, "netns", name],
            ["-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", name],
        ]
        steps += [["-n", name, "link", "set", device, "up"] for device in ("lo", name)]
    try:
        for step in steps:
            try:
                done = subprocess.run(["ip", *step], capture_output=True, text=True)
            except FileNotFoundError:
                pytest.skip("there is no ip command to make network namespaces with")
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("each", [1, 2])
def test_two_nodes_of_torchrun_train_as_one_process(each: int, nodes: list[str], tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [
                *("ip", "netns", "exec", node, sys.executable, "-m", "torch.distributed.run"),
                *("--nnodes", "2", "--node-rank", str(i), "--nproc-per-node", str(each)),
                *("--master-addr", "10.77.0.1", "--master-port", "29500"),
                *("-m", "tests.reliability.worker", str(tmp_path)),
            ],
            cwd=ROOT,
            env=os.environ | {"GLOO_SOCKET_IFNAME": node},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i, node in enumerate(nodes)
    ]
    try:
        for process in started:
            out, _ = process.communicate(timeout=300)
            assert process.returncode == 0, out
    finally:
        for process in started:
            process.kill()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2 * each)]
    assert_gradients_of_one([result["gradients"] for result in results])
    assert_steered_as_one([result["steered"] for result in results])


@cache
def weights_of_one() -> dict[str, Tensor]:
    return worker.weights()


def launch(folder: Path, **options: Any) -> dict[str, Tensor]:
    """The weights that a program of its own leads to."""
    program, weights = folder / "program.py", folder / "weights.pt"
    call = f"worker.launch({str(weights)!r}, **{options!r})"
    program.write_text(f"from tests.reliability import worker\nif __name__ == '__main__':\n    {call}\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Tensor] = torch.load(weights)
    return found


def test_unused_parameters_may_be_looked_for(two_processes: Processes) -> None:  # noqa: F811
    for found in two_processes.run(partial(worker.weights, find_unused_parameters=True)):
        torch.testing.assert_close(found, weights_of_one(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_notebook", "ddp_spawn"])
def test_processes_that_the_trainer_starts_by_itself_train_as_one(strategy: str, tmp_path: Path) -> None:
    found = launch(tmp_path, strategy=strategy, devices=2)
    torch.testing.assert_close(found, weights_of_one(), rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_with_synchronized_batch_norm_train_as_one(tmp_path: Path) -> None:
    options = {"accelerator": "gpu", "batch_norm": True}
    one = launch(tmp_path, devices=1, **options)
    two = launch(tmp_path, devices=2, strategy="ddp_spawn", sync_batchnorm=True, **options)
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "strategy",
    [FSDPStrategy(), object.__new__(DeepSpeedStrategy), pytorch_lightning.strategies.FSDPStrategy()],
    ids=["FSDP", "DeepSpeed", "FSDP of pytorch_lightning"],
)
def test_strategies_that_cut_the_model_are_refused_in_one_line(strategy: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^AdaDim needs .* but \w+Strategy cuts it .*; use Trainer\(.*$"
    ) as error:
        check_strategy(SimpleNamespace(strategy=strategy), AdaDim())
    assert type(strategy).__name__ in str(error.value)


@pytest.mark.parametrize("callback", [None, AdaDim(native_loss="other"), DimensionMonitor(), OnlineKNN()])
def test_fit_with_the_model_in_parts_is_refused(callback: Any, two_processes: Processes) -> None:  # noqa: F811
    for line in two_processes.run(worker.refusal, *filter(None, [callback])):
        name = "AdaDimModule" if callback is None else type(callback).__name__
        assert line.startswith(f"{name} needs the whole model in every process, but ModelParallelStrategy cuts")


# Resuming.


def test_bank_of_other_processes_is_dealt_out(two_processes: Processes) -> None:  # noqa: F811
    rows = [(torch.randn(6, 3), torch.arange(6)) for _ in range(2)]
    for state in ({"bank": rows}, worker.bank_of({"bank": rows})):
        for found in two_processes.run(worker.bank_of, state):
            assert_equal(found["bank"], rows)


TWO = (*DIGITS, "trainer.max_epochs=2", "trainer.devices=2", "trainer.strategy=ddp")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that was never cut off."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder, *TWO).wait(600) == 0, said(folder)
    return folder / "run"


@pytest.mark.slow
def test_command_with_two_processes_scores_and_logs_once(whole: Path) -> None:
    with (whole / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for column in ("loss/total", "probe/knn_top1", "balance/alpha"):
        assert [row["epoch"] for row in rows if row[column]] == ["0", "1"]
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["status"], summary["epochs"]) == ("ok", 2)
    assert summary["evaluation/trained_knn_top1"] > 0.9

    checkpoint = torch.load(newest(whole), weights_only=True)
    assert checkpoint["global_step"] == 2 * (1297 // 128)
    assert len(list((whole / "checkpoints").glob("epoch=0001-step=000020*"))) == 1
    test, trained = all_digits().test, load_pretrained(newest(whole))
    with torch.no_grad():
        r = trained.backbone.eval()(trained.views.clean(test.images))
    states = checkpoint["callbacks"]
    bank, labels = (torch.cat(x) for x in zip(*states["OnlineKNN{}"]["bank"], strict=True))
    norm_and_linear = nn.Sequential(
        nn.BatchNorm1d(r.shape[1], eps=1e-10, affine=False), nn.Linear(r.shape[1], 10)
    ).eval()
    norm_and_linear.load_state_dict(states["OnlineLinearProbe{}"]["probe"])
    found = {
        "probe/knn_top1": knn_predict(r, bank, labels, k=20, temperature=0.07),
        "probe/linear_top1": norm_and_linear(r).argmax(dim=1),
    }
    for key, classes in found.items():
        assert summary[key] * 500 == pytest.approx(float((classes == test.labels).sum()), abs=1e-3)


def begun(folder: Path) -> tuple["subprocess.Popen[bytes]", list[str]]:
    """A run of two processes in its second epoch, and its other processes."""
    process = start(folder, *TWO)
    while not list(folder.glob("run/checkpoints/epoch=0001-*")):
        assert process.poll() is None, said(folder)
        time.sleep(0.02)
    return process, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


@pytest.mark.slow
@pytest.mark.parametrize("who", ["all of them", "the second alone"])
def test_two_processes_that_are_told_to_stop_end_together_with_a_checkpoint(
    who: str, whole: Path, tmp_path: Path
) -> None:
    process, others = begun(tmp_path)
    before = newest(tmp_path / "run").stat().st_mtime
    for other in others:
        os.kill(int(other), signal.SIGTERM)
    if who == "all of them":
        process.terminate()
    assert process.wait(60) == 143, said(tmp_path)
    assert said(tmp_path).strip().splitlines()[-1].startswith("stopped after ")
    assert newest(tmp_path / "run").stat().st_mtime > before
    assert start(tmp_path, *TWO, "resume=true").wait(600) == 0, said(tmp_path)
    assert differences(whole, tmp_path / "run") == []


@pytest.mark.slow
def test_run_of_two_processes_that_is_killed_goes_on_as_if_it_had_not_been(whole: Path, tmp_path: Path) -> None:
    process, others = begun(tmp_path)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{other}").exists() for other in others):
        assert time.monotonic() < deadline, "the other process did not end by itself"
        time.sleep(0.1)
    assert start(tmp_path, *TWO, "resume=true").wait(600) == 0, said(tmp_path)
    assert differences(whole, tmp_path / "run") == []
