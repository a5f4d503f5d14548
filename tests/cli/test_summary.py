"""What runs and sweeps leave on the screen."""

import csv
import fcntl
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from adadim_lightning.cli.summary import Logged, print_report
from adadim_lightning.cli.sweep_report import hydra_argument, print_line, print_sweep
from adadim_lightning.cli.train import main

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Folder of a run of two epochs in a terminal of 80 columns, and the lines that were to be seen."""
    root = tmp_path_factory.mktemp("screen")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    command = [BIN / "adadim-train", "trainer.max_epochs=2", "run_dir=my runs/first"]
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, cwd=root, env=environment | {"TERM": "xterm-256color"}
    )
    os.close(slave)
    raw = b""
    try:
        while data := os.read(master, 65536):
            raw += data
    except OSError:  # the process has ended
        pass
    os.close(master)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw.decode())
    return root / "my runs" / "first", [line.rstrip() for line in re.split(r"\r\n|\r", text)]


def report(lines: list[str]) -> list[str]:
    """What follows the last state of the progress bar."""
    return lines[max(i for i, line in enumerate(lines) if line.startswith("epoch ")) + 1 :]


def test_a_run_fits_a_screen_of_80_by_24(screen: tuple[Path, list[str]]) -> None:
    _, lines = screen
    assert max(map(len, lines)) <= 80
    shown = [line for line in lines if not re.match(r"epoch .*(left|batch)", line)]  # overwritten
    assert len(report(lines)) <= 24
    assert len(shown) <= 30


def test_the_bar_of_a_run_shows_what_it_measures(screen: tuple[Path, list[str]]) -> None:
    last = [line for line in screen[1] if line.startswith("epoch ")][-1]
    assert re.match(
        r"epoch 2/2  ━+ +alpha \d\.\d\d  H\(R\) \d\.\d\d  I\(R;Z\) [ -]\d\.\d\d +[\d,]+ img/s +in \d", last
    )


def test_the_summary_shows_the_logged_values(screen: tuple[Path, list[str]]) -> None:
    folder, lines = screen
    with (folder / "metrics.csv").open(newline="") as file:
        ranks = [float(row["dynamics/ER_R"]) for row in csv.DictReader(file) if row["dynamics/ER_R"]]
    row = next(line for line in report(lines) if line.startswith("ER(R)"))
    assert row.split()[1:3] == [f"{ranks[0]:.3f}", f"{ranks[-1]:.3f}"]


def test_the_commands_that_are_named_next_lead_to_the_run(screen: tuple[Path, list[str]]) -> None:
    folder, lines = screen
    commands = [shlex.split(line) for line in report(lines) if line.startswith("  adadim-")]
    assert [words[0] for words in commands] == ["adadim-evaluate", "adadim-report", "adadim-embed"]
    for command, argument in commands:
        path = argument if command == "adadim-report" else parsed(argument)
        assert folder.parents[1] / path == folder


def parsed(argument: str) -> Any:
    """The value that Hydra reads."""
    return OverridesParser.create().parse_override(argument).value()


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "two words",
        "two  words ",
        "it's",
        "it's $5!",
        "a=b",
        "x,y",
        "0",
        "null",
        "[1]",
        "back\\slash",
        "end\\",
        "é",
        "\\'",
        '"',
    ],
)
def test_hydra_reads_any_folder_behind_the_shell(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / name, tmp_path / "deeper" / name):
        words = shlex.split(hydra_argument("ckpt", folder))
        assert len(words) == 1
        value = parsed(words[0])
        assert (tmp_path / str(value)).resolve() == folder


def test_a_printed_path_reads_well(tmp_path: Path) -> None:
    assert hydra_argument("ckpt", Path("/two words")) == "'ckpt=/two words'"
    assert hydra_argument("ckpt", Path("/a=b")) == """"ckpt='/a=b'\""""


def test_the_shorter_path_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "down").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "down")
    assert hydra_argument("ckpt", Path("/run")) == "ckpt=/run"
    assert hydra_argument("ckpt", tmp_path / "deep" / "run") == "ckpt=../run"


def test_a_missing_metric_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(tmp_path, Logged({}, {}), {}, missing="probe/no_[such]")
    assert "optimized_metric probe/no_[such] was not logged" in capsys.readouterr().out


def job(number: int, *overrides: str, status: str = "ok", value: float | None = None, **more: Any) -> Any:
    summary = {
        "overrides": [*overrides, "trainer.max_epochs=2", "run_dir=/runs/s", "hydra.sweep.subdir='1'"],
        "status": status,
        "error": None,
        "optimized_metric": "probe/linear_top1",
        "seconds": 12.3,
        "probe/linear_top1": value,
    }
    return Path(f"/runs/s/{number}"), summary | more


def test_a_job_of_a_sweep_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(*job(3, "objective=simclr", "seed=0", value=0.951, **{"dynamics/H_R": 3.9154}))
    print_line(*job(12, *(f"balance.alpha.some_long_key_{i}=0.123456789" for i in range(9)), status="failed"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "#3 objective=simclr seed=0 max_epochs=2  ok  linear 0.951  H(R) 3.915  12 s"
    assert len(lines) == 2
    assert len(lines[0]) <= 80
    assert len(lines[1]) == 80
    assert lines[1].startswith("#12 some_long_key_0=0.1235 ")
    assert lines[1].endswith("...  failed  12 s")


def test_a_sweep_ends_with_its_jobs_their_errors_and_what_comes_next(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [job(i, f"objective={name}", f"seed={i}", value=i / 7) for i, name in enumerate(["simclr", "vicreg"])]
    failed = {"status": "failed", "error": "data.root is not a folder; give one by data.root=FOLDER"}
    jobs += [job(i, "objective=adadim", f"seed={i}", **failed) for i in (2, 3)]
    print_sweep(jobs, Path("/runs/s"), ["/bin/adadim-train", "-m", "seed=0,1", "run_dir=elsewhere", "a='b c'"])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == "4 jobs: 2 ok, 2 failed"
    cells = [[cell.strip() for cell in line.split("│")] for line in lines if "│" in line]
    assert cells == [
        ["0", "objective=simclr seed=0", "ok", "0.0000"],
        ["1", "objective=vicreg seed=1", "ok", "0.1429"],
        ["2", "objective=adadim seed=2", "failed", ""],
        ["3", "objective=adadim seed=3", "failed", ""],
    ], "without what all jobs share"
    assert lines[-6:-4] == ["#2, #3", "  data.root is not a folder; give one by data.root=FOLDER"]
    assert lines[-3] == "Next"
    assert lines[-2] == "  adadim-report /runs/s"
    resume = ["adadim-train", "-m", "seed=0,1", "a='b c'", "run_dir=/runs/s", "resume=true"]
    assert shlex.split(lines[-1]) == resume


def test_a_sweep_without_failures_does_not_offer_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    print_sweep([job(0, "seed=0", value=0.5)], Path("/runs/s"), ["adadim-train", "-m"])
    printed = capsys.readouterr().out
    assert "1 job: 1 ok" in printed
    assert "resume" not in printed
    print_sweep([], Path("/runs/s"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("metric", ["probe/linear_top1", "evaluation/trained_linear_top1", "loss/total"])
def test_of_hundreds_of_jobs_the_best_ten_are_shown_in_eighty_columns(
    metric: str, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = []
    for i in range(300):
        overrides = [f"objective.gamma={i / 997}", f"backbone.a_long_name_of_a_key={'x' * 40}{i}"]
        problem = {"status": "failed", "error": f"cause {i} " + "and more " * 30} if i % 10 == 0 else {}
        value = None if problem else (i * 37 % 300) / 300
        jobs.append(job(i, *overrides, optimized_metric=metric, **{metric: value}, **problem))
    print_sweep(jobs, Path("/runs/s"), ["adadim-train", "-m"])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 80
    assert len(lines) < 60
    assert lines[1] == f"300 jobs: 270 ok, 30 failed; the best 10 by {metric}"
    shown = [float(line.rpartition("│")[2]) for line in lines if "│" in line]
    values = sorted((x[metric] for _, x in jobs if x[metric] is not None), reverse=metric != "loss/total")
    assert shown == pytest.approx(values[:10], abs=1e-4)
    assert "and 25 other errors, in the summary.json of the jobs" in lines


def test_the_report_of_a_sweep_loads_no_torch_and_outlives_its_reader() -> None:
    code = (
        "import sys; from pathlib import Path; from adadim_lightning.cli.sweep_report import print_sweep\n"
        "jobs = [(Path(str(i)), {'overrides': [f'seed={i}'], 'status': 'ok'}) for i in range(20)]\n"
        "sys.stdin.read(); [print_sweep(jobs, Path('s'), ['x']) for _ in range(3)]\n"
        "sys.exit(10 + ('torch' in sys.modules) + ('lightning' in sys.modules))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()  # before anything is written
    process.communicate(b"")
    assert process.returncode == 10


def test_an_epoch_without_a_value_has_not_that_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.csv").write_text(
        "dynamics/ER_R,dynamics/ER_Z,epoch,loss/total,probe/knn_top1,step\n"
        ",,0,4.5,,9\n"
        "7.5,3.25,1,,,19\n"
        ",,1,3.5,0.25,19\n"
        "6.5,,2,2.5,,29\n"
    )
    logged = Logged.read(tmp_path / "metrics.csv")
    assert logged.last == {
        "dynamics/ER_R": 6.5,
        "dynamics/ER_Z": 3.25,
        "loss/total": 2.5,
        "probe/knn_top1": 0.25,
    }
    print_report(tmp_path, logged, {})
    rows = {line.split("  ")[0]: line.split()[-4:] for line in capsys.readouterr().out.splitlines()}
    assert rows["ER(R)"][-2:] == ["-", "6.500"]
    assert rows["ER(Z)"] == ["-", "3.250", "(epoch", "2)"]
    assert rows["loss"][-2:] == ["4.500", "2.500"]
    assert rows["online kNN"] == ["-", "0.250", "(epoch", "2)"]
    print_report(tmp_path, Logged.read(tmp_path / "missing.csv"), {})
    assert "first epoch" not in capsys.readouterr().out


def test_a_run_that_logs_without_an_epoch_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Lightning's monitor of the learning rate writes rows that name no epoch.
    monitor = "+callbacks.lr={_target_: lightning.pytorch.callbacks.LearningRateMonitor, logging_interval: step}"
    few = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.log_every_n_steps=1"]
    off = ["~callbacks.dynamics_plot", "~callbacks.checkpoint", "~callbacks.linear_probe", "~callbacks.knn"]
    options = [*few, *off, monitor, "trust=[lightning]", "evaluation=null", "optimized_metric=dynamics/ER_R"]
    monkeypatch.setattr(sys, "argv", ["adadim-train", *options, f"run_dir={tmp_path / 'run'}"])
    main()
    assert "first epoch" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "ok"
    assert summary["lr-AdamW/pg1"] > 0
