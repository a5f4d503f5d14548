"""Reading what runs left behind, whole or damaged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb

from adadim_lightning.report.runs import RunRecord, flattened, nested, read_runs, seed_of
from adadim_lightning.report.wandb_file import read_wandb_file
from adadim_lightning.run_folder import run_lock
from tests.report.runs import history, write_run, write_sweep


def only(path: Path) -> RunRecord:
    (run,), warnings = read_runs([path])
    assert warnings == []
    return run


def test_a_run_folder_is_read_as_the_contract_has_it(tmp_path: Path) -> None:
    run = only(write_run(tmp_path / "first", "objective=simclr", seed=3, epochs=5))
    assert (run.name, run.status, run.seed, run.seconds) == ("first", "ok", 3, 12.5)
    assert run.overrides == ["objective=simclr", "seed=3", f"run_dir={tmp_path}"]
    assert run.history["epoch"].tolist() == [0, 1, 2, 3, 4]
    columns = history(5, seed=3)
    for key in ("dynamics/H_R", "probe/linear_top1"):  # of two rows an epoch
        epochs, values = run.curve(key)
        assert epochs.tolist() == [1, 2, 3, 4, 5]
        assert values == pytest.approx(columns[key])
        assert run.values[key] == pytest.approx(columns[key][-1])
    assert run.spectra["R"].shape == (5, 16)
    assert {"seed", "seconds", "epochs"}.isdisjoint(run.values)


def test_runs_of_a_sweep_come_in_numeric_order_each_once(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep", ["a=1", "a=2", "a=3", "a=4"], range(3), epochs=1)
    runs, _ = read_runs([tmp_path / "sweep", tmp_path / "sweep" / "3", tmp_path])
    assert len(runs) == 12
    assert [run.name for run in runs][-2:] == ["sweep/10", "sweep/11"]
    alone, _ = read_runs([tmp_path / "sweep"])
    assert [run.name for run in alone] == [str(i) for i in range(12)]


def test_folders_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / parent / "run", epochs=1) for parent in "ab"]
    runs, _ = read_runs(folders)
    assert [run.name for run in runs] == [str(folder) for folder in folders]


def test_a_running_run_is_shown_with_what_it_has(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", epochs=2, status="running")
    bare = {"status": "running", "error": None, "seed": 0, "overrides": [], "config": {}}
    (folder / "summary.json").write_text(json.dumps(bare))
    with (folder / "metrics.csv").open("a") as file:
        file.write("2,29,0.")  # a line that is being written
    with run_lock(folder):
        run = only(folder)
    assert (run.status, run.error) == ("running", None)
    assert run.values["dynamics/H_R"] == pytest.approx(history(2)["dynamics/H_R"][-1])
    dead = only(folder)
    assert dead.status == "failed"
    assert dead.error is not None


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("metrics.csv", b"\xff\xfe\x00"),
        ("metrics.csv", b"a,b\n1,2\n"),
        ("metrics.csv", b""),
        ("spectra.npz", b"PK\x03\x04 cut off"),
        ("spectra.npz", b""),
        ("summary.json", b'{"status": "ok", "config": {'),
        ("summary.json", b"[1, 2]"),
        ("summary.json", b"\xff\xff"),
    ],
)
def test_a_damaged_file_costs_that_file_and_a_line(tmp_path: Path, file: str, damage: bytes) -> None:
    write_sweep(tmp_path, ["a=1", "a=2"], [0], epochs=2)
    (tmp_path / "0" / file).write_bytes(damage)
    (broken, whole), warnings = read_runs([tmp_path])
    assert whole.status == "ok"
    assert len(warnings) == 1
    assert warnings[0].startswith("0: ")
    assert "\n" not in warnings[0]
    assert broken.status == ("unreadable" if file == "summary.json" else "ok")
    assert bool(broken.spectra) == (file != "spectra.npz")
    assert bool(broken.history) == (file != "metrics.csv")


def test_a_spectrum_with_a_nan_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", epochs=1)
    np.savez(folder / "spectra.npz", epoch=np.arange(1), R=np.full((1, 4), np.nan), Z=np.ones((1, 4)))
    (run,), warnings = read_runs([folder])
    assert run.spectra == {}
    assert "spectra.npz" in warnings[0]


def test_a_spectrum_that_would_run_code_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", epochs=1)
    np.savez(folder / "spectra.npz", epoch=np.arange(1), R=np.array([[object()]]), Z=np.ones((1, 4)))
    (run,), warnings = read_runs([folder])
    assert run.spectra == {}
    assert len(warnings) == 1


def test_a_run_without_metrics_or_spectra_is_read(tmp_path: Path) -> None:
    run = only(write_run(tmp_path / "run", status="failed", error="no such data", columns={}))
    assert (run.status, run.error, run.history, run.spectra) == ("failed", "no such data", {}, {})


def test_nothing_to_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run found in"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match="there is no folder"):
        read_runs([tmp_path / "nowhere"])


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `wandb` of two real offline runs, one of which failed; long enough for several blocks."""
    root = tmp_path_factory.mktemp("wandb")
    for seed in (0, 1):
        config = {
            "objective.gamma": 0.1,
            "_wandb.t": [seed],
            "seed": seed,
            "overrides": ["objective.gamma=0.1", f"seed={seed}"],
        }
        settings = wandb.Settings(silent=True, x_disable_stats=True, x_disable_machine_info=True, console="off")
        run = wandb.init(
            project="p", name="größe 0.1", dir=str(root), mode="offline", config=config, settings=settings
        )
        for epoch in range(60):
            run.log(
                {"epoch": epoch, "dynamics/H_R": 3 + epoch, "trainer/global_step": 10 * epoch, "pad": "x" * 900}
            )
            run.log({"epoch": epoch, "probe/linear_top1": epoch / 60, "trainer/global_step": 10 * epoch})
        run.config.update({"head": {"dim": 8}})
        run.summary["evaluation/trained_linear_top1"] = 0.5 + seed
        run.finish(exit_code=seed)
    return root / "wandb"


def test_offline_runs_of_wandb_are_read_from_their_files(offline: Path) -> None:
    runs, warnings = read_runs([offline])
    assert warnings == []
    first, second = sorted(runs, key=lambda run: run.seed or 0)
    assert [run.title for run in runs] == ["größe 0.1"] * 2
    assert [run.name for run in runs] == [f"größe 0.1 ({f.stem})" for f in sorted(offline.rglob("run-*.wandb"))]
    assert (first.status, first.error) == ("ok", None)
    assert (second.status, second.error) == ("failed", "exit code 1")
    assert first.overrides == ["objective.gamma=0.1", "seed=0"]
    assert first.config == {"objective": {"gamma": 0.1}, "seed": 0, "head": {"dim": 8}}
    assert first.history["dynamics/H_R"].tolist() == [3 + epoch for epoch in range(60)]
    assert first.curve("probe/linear_top1")[1] == pytest.approx([epoch / 60 for epoch in range(60)])
    assert set(first.values) == {"dynamics/H_R", "probe/linear_top1", "evaluation/trained_linear_top1"}
    assert second.values["evaluation/trained_linear_top1"] == 1.5
    assert first.seconds is not None


def test_one_folder_or_file_of_wandb_is_enough(offline: Path) -> None:
    file = min(offline.glob("offline-run-*/run-*.wandb"))
    assert only(file.parent).values == only(file).values != {}


def test_a_foreign_run_is_called_what_its_user_called_it(offline: Path) -> None:
    assert only(min(offline.glob("offline-run-*"))).name == "größe 0.1"


@pytest.mark.parametrize(
    ("config", "seed"),
    [
        ({"seed": 3, "data": {"seed": 4}}, 3),
        ({"seed_everything": 3}, 3),
        ({"trainer": {"random_seed": 3}, "data": {"seed": 3}}, 3),
        ({"trainer": {"random_seed": "3"}}, 3),
        ({"model": {"seed": 3}, "data": {"seed": 4}}, None),
        ({"seed": None}, None),
        ({"seed": [1, 2]}, None),
        ({}, None),
    ],
)
def test_seed_of_a_foreign_run_is_found_under_its_usual_keys(config: dict[str, Any], seed: int | None) -> None:
    assert seed_of(config) == seed


def test_a_wandb_file_that_is_cut_off_gives_what_is_whole(offline: Path, tmp_path: Path) -> None:
    data = min(offline.glob("offline-run-*/run-*.wandb")).read_bytes()
    assert len(data) > 2 * 32768  # several blocks, records across their borders among them
    for size in (7, 40000, len(data) // 2, len(data) - 3):
        file = tmp_path / f"run-{size}.wandb"
        file.write_bytes(data[:size])
        (run,), warnings = read_runs([file])
        assert (run.status, warnings) == ("running", [])
        assert len(run.history.get("epoch", ())) == (
            0 if size == 7 else pytest.approx(60 * size / len(data), abs=8)
        )


def test_a_wandb_file_with_a_flipped_bit_is_read_up_to_it(offline: Path, tmp_path: Path) -> None:
    data = bytearray(min(offline.glob("offline-run-*/run-*.wandb")).read_bytes())
    data[len(data) // 2] ^= 1
    file = tmp_path / "run-x.wandb"
    file.write_bytes(data)
    (run,), warnings = read_runs([file])
    assert "is damaged" in warnings[0]
    assert 20 < len(run.history["epoch"]) < 40
    assert 0 < read_wandb_file(file).cut <= len(data) // 2


def test_a_file_of_another_kind_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "run-x.wandb").write_bytes(b"something else")
    (run,), warnings = read_runs([tmp_path])
    assert run.status == "unreadable"
    assert len(warnings) == 1


def test_a_run_of_ours_that_logged_to_wandb_too_counts_once(tmp_path: Path, offline: Path) -> None:
    folder = write_run(tmp_path / "run", epochs=1)
    inside = folder / "wandb" / "offline-run-1"
    inside.mkdir(parents=True)
    (inside / "run-1.wandb").write_bytes(min(offline.glob("offline-run-*/run-*.wandb")).read_bytes())
    assert only(tmp_path).name == "run"


def test_dotted_and_nested_configurations_are_the_same() -> None:
    tree = {"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None}
    assert flattened(nested({"a.b.c": 1, "a.d": [1, 2], "e": None})) == flattened(tree)
    assert nested(tree) == tree
    assert nested({"a": 1, "a.b": 2}) == {"a": 1, "a.b": 2}
