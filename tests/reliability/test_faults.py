"""Faults, each really provoked: what the commands say, how they end, and what is lost.

A table of them all is printed when the tests are over.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adadim_lightning.run_folder import read_summary
from tests.data.pictures import encode, pixels, write
from tests.reliability.commands import Command, Ended, run

NOTHING = "nothing"
STEPS = "the steps since the last interval"
SMALL = (
    *(
        "data.batch_size=64",
        "trainer.accelerator=cpu",
        "backbone.channels=[4,8]",
        "head.hidden_dim=16",
        "head.out_dim=16",
    ),
    *(
        "callbacks.checkpoint.every_n_steps=2",
        "~callbacks.dynamics_plot",
        "~callbacks.knn",
        "~callbacks.linear_probe",
    ),
)
LONG = ("trainer.max_epochs=100000", "trainer.limit_val_batches=0")
SHORT = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=0")
COMMANDS = [
    "embed",
    pytest.param("evaluate", marks=pytest.mark.slow),
    pytest.param("export", marks=pytest.mark.slow),
]
Note = Callable[[str, str, str], None]


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Note:
    """Takes a row of the table."""
    return lambda *row: record_property("fault", row)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run the commands in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*overrides: str, folder: str = "run", **options: Any) -> Ended:
    return run("train", *SMALL, *overrides, f"run_dir={folder}", **options)


def started(*overrides: str, folder: str = "run", **options: Any) -> Command:
    """A training without end, two checkpoints old."""
    command = Command("train", *SMALL, *LONG, *overrides, f"run_dir={folder}", **options)
    command.wait_for(lambda: len(checkpoints(folder)) == 2)
    return command


def resume(*overrides: str, **options: Any) -> Ended:
    """Go on with the run for two steps."""
    last = max((int(path.stem.partition("step=")[2]) for path in checkpoints()), default=0)
    return train("resume=true", *LONG, f"trainer.max_steps={last + 2}", *overrides, **options)


def checkpoints(folder: str | Path = "run") -> list[Path]:
    """All but the link, oldest first."""
    return sorted(Path(folder).glob("checkpoints/epoch=*.ckpt"))


def step(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def status(folder: str = "run") -> str:
    summary = read_summary(Path(folder))
    assert summary is not None
    return str(summary["status"])


def assert_whole(folder: str | Path = "run") -> None:
    """Each checkpoint can be read, and no half-written file lies beside them."""
    names = {path.name for path in (Path(folder) / "checkpoints").iterdir()}
    assert names == {path.name for path in checkpoints(folder)} | {"last.ckpt"}
    assert [step(path) for path in checkpoints(folder)]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that SIGKILL ended, with two checkpoints."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    command = started(folder=str(folder))
    os.kill(command.pid, signal.SIGKILL)
    assert command.end().code == -signal.SIGKILL
    return folder


@pytest.fixture
def cut_off(killed: Path, here: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(killed, here / "run", symlinks=True))


# Processes that end.


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(cut_off: Path, note: Note) -> None:
    assert status() == "failed"  # the summary still says "running", but no process holds the folder
    before = max(map(step, checkpoints()))
    ended = resume()
    assert (ended.code, ended.err) == (0, "")
    assert f"step {before:,}" in ended.out
    assert max(map(step, checkpoints())) == before + 2
    assert status() == "ok"
    note("SIGKILL", "shown as failed; resume=true goes on", STEPS)


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_run_that_is_told_to_stop_says_so_in_one_line(sent: signal.Signals, code: int, note: Note) -> None:
    command = started()
    os.kill(command.pid, sent)
    ended = command.end()
    assert (ended.code, status()) == (code, "stopped")
    assert ended.line.startswith("stopped after ")
    assert_whole()
    lost = NOTHING if sent == signal.SIGTERM else STEPS
    note(sent.name, f"exit code {code}; one line; status stopped", lost)


@pytest.mark.slow
def test_a_run_whose_workers_are_told_to_stop_too_ends_with_a_checkpoint(here: Path, note: Note) -> None:
    command = started("data.num_workers=2")
    workers = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    assert len(workers) >= 2
    for pid in workers:
        os.kill(int(pid), signal.SIGTERM)
    time.sleep(1)
    assert command.code is None, command.end()  # it goes on until it is told itself
    before = time.time()
    os.kill(command.pid, signal.SIGTERM)
    ended = command.end()
    assert (ended.code, status()) == (143, "stopped"), ended
    assert ended.line.startswith("stopped after ")
    assert checkpoints()[-1].stat().st_mtime > before
    assert_whole()
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    note("SIGTERM to the workers, too", "exit code 143; one line; status stopped", NOTHING)


def test_a_killed_worker_of_the_loader_ends_the_run_in_one_line(note: Note) -> None:
    command = started("data.num_workers=1")
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    ended = command.end()
    assert ended.code == 1
    assert "worker" in ended.line
    assert "data.num_workers" in ended.line
    assert_whole()
    assert resume().code == 0
    note(
        "killed worker of the loader",
        "exit code 1; one line; resume=true goes on",
        "the steps since the last interval",
    )


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(note: Note) -> None:
    first = started()
    before = checkpoints()
    for overrides in ((), ("resume=true",)):
        second = train(*overrides)
        assert second.code == 1
        assert "is in use by a run that is going on" in second.line
    first.wait_for(lambda: checkpoints() != before)  # it goes on
    os.kill(first.pid, signal.SIGTERM)
    assert first.end().code == 143
    note("second run in a folder in use", "refused in one line; the first goes on", NOTHING)


# Checkpoints.


def spoil(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut off":
        del data[len(data) // 2 :]
    elif how == "empty":
        data.clear()
    else:
        with zipfile.ZipFile(path) as archive:
            weights = archive.read(max(archive.infolist(), key=lambda part: part.file_size))
        data[data.index(weights) + len(weights) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "how",
    [
        "a flipped bit",
        pytest.param("cut off", marks=pytest.mark.slow),
        pytest.param("empty", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_uses_the_checkpoint_before_a_broken_one(how: str, cut_off: Path, note: Note) -> None:
    before, last = checkpoints()
    spoil(last, how)
    steps = step(before)
    ended = resume(f"trainer.max_steps={steps + 1}")
    assert (ended.code, ended.err) == (0, "")
    assert f"{last.name} cannot be read" in ended.out
    assert f"step {steps:,}" in ended.out
    note(f"newest checkpoint {how}", "said; resumed from the one before", "one interval")


def test_a_run_without_a_sound_checkpoint_is_refused_and_left_alone(cut_off: Path, note: Note) -> None:
    for path in checkpoints():
        spoil(path, "cut off")
    before = {path: path.read_bytes() for path in checkpoints()}
    ended = resume()
    assert ended.code == 1
    assert "no checkpoint in run can be read; to begin anew" in ended.line
    assert {path: path.read_bytes() for path in checkpoints()} == before
    note("all checkpoints broken", "one line, and how to begin anew", NOTHING)


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


def test_code_in_a_checkpoint_does_not_run_at_resume(cut_off: Path, here: Path, note: Note) -> None:
    mark = here / "mark"
    for path in checkpoints():
        torch.save(torch.load(path, weights_only=True) | {"callbacks": Evil(mark)}, path)
    ended = resume()
    assert ended.code == 1
    assert "may run code, and is refused" in ended.out
    assert not mark.exists()
    torch.load(checkpoints()[0], weights_only=False)
    assert mark.exists()  # it would have
    note("code in all checkpoints", "refused at resume, not run", NOTHING)


@pytest.mark.parametrize("command", COMMANDS)
def test_code_in_a_checkpoint_does_not_run_in_other_commands(
    command: str, cut_off: Path, here: Path, note: Note
) -> None:
    mark = here / "mark"
    path = checkpoints()[-1]
    torch.save(torch.load(path, weights_only=True) | {"callbacks": Evil(mark)}, path)
    ended = run(command, "ckpt=run")
    assert ended.code == 1
    assert "may run code, and is refused" in ended.line
    assert not mark.exists()
    note(f"code in ckpt= of {command}", "refused in one line, not run", NOTHING)


def altered(path: Path, **parts: Any) -> None:
    """Change parts of the configuration in a checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["adadim"]["config"] |= parts
    torch.save(checkpoint, path)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_configuration_in_a_checkpoint_names_only_what_is_trusted(
    command: str, cut_off: Path, here: Path, note: Note
) -> None:
    mark = here / "mark"
    altered(checkpoints()[-1], head={"_target_": "os.system", "command": f"touch '{mark}'"})
    ended = run(command, "ckpt=run")
    assert ended.code == 1
    assert "os.system is not trusted; allow it by trust=[os]" in ended.line
    assert not mark.exists()
    note(f"os.system in ckpt= of {command}", "refused in one line, not run", NOTHING)


def test_a_class_in_a_checkpoint_is_made_only_if_the_user_trusts_it(cut_off: Path, here: Path, note: Note) -> None:
    mark = here / "mark"
    (here / "mine.py").write_text("import pathlib\n\n\ndef head(mark):\n    pathlib.Path(mark).touch()\n")
    altered(checkpoints()[-1], head={"_target_": "mine.head", "mark": str(mark)})
    arguments = ("embed", "ckpt=run")
    ended = run(*arguments, environment={"PYTHONPATH": str(here)})
    assert ended.code == 1
    assert "mine.head is not trusted; allow it by trust=[mine]" in ended.line
    assert not mark.exists()
    run(*arguments, "trust=[mine]", environment={"PYTHONPATH": str(here)})
    assert mark.exists()
    note("unknown class in a checkpoint", "refused; made after trust=[mine]", NOTHING)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("backbone.channels=[4,16]", "does not fit the model"),
        ("optimizer=sgd", "the run was begun with the optimizer torch.optim.AdamW"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_configuration_is_one_line(
    override: str, words: str, cut_off: Path, note: Note
) -> None:
    before = {path: path.read_bytes() for path in checkpoints()}
    ended = resume(override)
    assert ended.code == 1
    assert words in ended.line
    assert len(ended.line) < 400
    assert {path: path.read_bytes() for path in checkpoints()} == before
    note(f"resumed with {override}", "one line that says what does not fit", NOTHING)


@pytest.mark.slow
def test_resuming_what_never_began_begins(here: Path, note: Note) -> None:
    (here / "run").mkdir()
    ended = train("resume=true", "trainer.max_steps=2")
    assert (ended.code, ended.err) == (0, "")
    assert status() == "ok"
    note("resume=true, empty folder", "the run begins", NOTHING)


def test_half_a_summary_is_one_line(cut_off: Path, note: Note) -> None:
    path = cut_off / "summary.json"
    path.write_text(path.read_text()[:100])
    ended = resume()
    assert ended.code == 1
    assert "run/summary.json is not a summary of a run" in ended.line
    assert_whole()
    note("summary.json cut off", "one line", NOTHING)


# Images.


def picture_folder(root: Path, *, good: int = 8) -> Path:
    """Images that everybody can read."""
    for seed in range(good):
        write(root / f"good{seed}.png", seed)
    return root


def train_on_folder(root: Path, *overrides: str) -> Ended:
    data = ("data=folder", f"data.root={root}", "data.image_size=16", "backbone=small_convnet", "views=cifar")
    return train(*data, "data.batch_size=4", *SHORT, *overrides)


def odd_images() -> dict[str, bytes]:
    """Images that few expect, by what is odd."""
    frames = [Image.fromarray(pixels(seed)) for seed in (1, 2, 3)]
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "1x1": encode(pixels(0, 1, 1)),
        "16-bit": encode(np.linspace(0, 65535, 144).reshape(12, 12).astype(np.uint16)),
        "CMYK": encode(frames[0].convert("CMYK"), "JPEG"),
        "animated": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "EXIF-rotated": encode(frames[0], "JPEG", exif=turned),
    }


def broken_images() -> dict[str, bytes]:
    """Files that no image can be made of, by what is wrong."""
    photograph = encode(pixels(0, 40, 50), "JPEG")
    return {
        "truncated": photograph[: len(photograph) // 2],
        "zero-byte": b"",
        "bomb": encode(Image.new("1", (14000, 14000))),
        "text": b"<html>404</html>" * 100,
    }


def test_odd_images_are_trained_on_and_broken_ones_counted(here: Path, note: Note) -> None:
    root = picture_folder(here / "images")
    for name, data in (odd_images() | broken_images()).items():
        (root / f"{name}.png").write_bytes(data)
    ended = train_on_folder(root)
    assert (ended.code, status()) == (0, "ok")
    assert ended.line.startswith("warning: 4 of 17 images cannot be read: ")
    for name in odd_images():
        assert f"{name}.png" not in ended.line
        note(f"image: {name}", "trained on", NOTHING)
    for name in broken_images():
        assert f"{name}.png" in ended.line
        note(f"image: {name}", "left out, counted and named", "that image")


@pytest.mark.slow
def test_where_all_images_are_broken_nothing_is_trained(here: Path, note: Note) -> None:
    (here / "images").mkdir()
    for name, data in broken_images().items():
        (here / "images" / f"{name}.png").write_bytes(data)
    ended = train_on_folder(here / "images")
    assert ended.code == 1
    assert "none of the 4 images can be read" in ended.line
    note("all images broken", "one line that names them", NOTHING)


@pytest.mark.slow
def test_images_that_vanish_while_training_end_it_in_one_line(here: Path, note: Note) -> None:
    root = picture_folder(here / "images", good=12)
    data = ("data=folder", f"data.root={root}", "data.image_size=16", "backbone=small_convnet", "views=cifar")
    command = started(*data, "data.batch_size=4", "data.in_memory=false", "data.num_workers=1")
    shutil.rmtree(root)
    ended = command.end()
    assert ended.code == 1
    assert "none of the 12 images can be read" in ended.line
    assert_whole()
    note("image folder removed meanwhile", "exit code 1; one line", STEPS)


def test_a_folder_that_is_not_there_is_named(note: Note) -> None:
    ended = train_on_folder(Path("nowhere"))
    assert ended.code == 1
    assert "there is no folder nowhere; set data.root" in ended.line
    note("no such image folder", "one line with the fix", NOTHING)


# Disks.


def mount(folder: Path, *options: str) -> None:
    """Mount a small disk, or skip the test."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a disk can be mounted by root alone: {done.stderr.strip()}")


@pytest.fixture
def disk(here: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    mount(here / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs")
    try:
        yield here / "disk"
    finally:
        subprocess.run(["umount", "-l", str(here / "disk")], check=True)


def fill(disk: Path) -> None:
    """Leave no byte of it."""
    with pytest.raises(OSError, match="No space left"):
        (disk / "others").write_bytes(bytes(2**20))


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(disk: Path, note: Note) -> None:
    command = started(folder="disk/run")
    fill(disk)
    ended = command.end()
    assert ended.code == 1
    assert "No space left on device" in ended.line
    assert_whole("disk/run")
    (disk / "others").unlink()
    assert status("disk/run") == "failed"
    assert train("resume=true", "trainer.max_epochs=1", folder="disk/run").code == 0
    note(
        "disk full: checkpoint", "exit code 1; one line; resume=true goes on", "the steps since the last interval"
    )


@pytest.mark.slow
def test_a_full_disk_for_the_log_is_one_line(disk: Path, note: Note) -> None:
    command = Command("train", *SMALL, *LONG, "~callbacks.checkpoint", "run_dir=disk/run")
    command.wait_for(lambda: (disk / "run" / "metrics.csv").exists())
    fill(disk)
    ended = command.end()
    assert ended.code == 1
    assert "No space left on device" in ended.line
    note("disk full: metrics.csv", "exit code 1; one line", STEPS)


@pytest.mark.slow
def test_a_file_that_may_grow_no_further_is_one_line(note: Note) -> None:
    ended = train(*SHORT, limits={"RLIMIT_FSIZE": 20_000})
    assert ended.code == 1
    assert "File too large" in ended.line
    assert not list(Path("run/checkpoints").iterdir())
    note("quota on the size of files", "exit code 1; one line; no half file", "the run")


def test_a_disk_that_turns_read_only_is_one_line(cut_off: Path, note: Note) -> None:
    before = {path: path.read_bytes() for path in cut_off.rglob("*") if path.is_file()}
    mount(cut_off, "--bind", str(cut_off))
    try:
        mount(cut_off, "-o", "remount,bind,ro")
        for ended in (resume(), train(*SHORT, folder="run/other")):
            assert ended.code == 1
            assert "Read-only file system" in ended.line
        ended = run("evaluate", "ckpt=run", "out=run/figures.json")
        assert ended.code == 1
        assert "Read-only file system" in ended.line
    finally:
        subprocess.run(["umount", "-l", str(cut_off)], check=True)
    assert {path: path.read_bytes() for path in cut_off.rglob("*") if path.is_file()} == before
    note("read-only run folder", "one line: resume, train, evaluate", NOTHING)


def test_a_run_folder_that_is_a_file_is_named(here: Path, note: Note) -> None:
    (here / "run").write_text("mine")
    ended = train(*SHORT)
    assert ended.code == 1
    assert "name another output folder by run_dir=FOLDER" in ended.line
    assert (here / "run").read_text() == "mine"
    note("run_dir is a file", "one line with the fix", NOTHING)


# Memory, numbers, network, output.


def test_too_little_memory_for_the_images_is_one_line(note: Note) -> None:
    ended = train(*SHORT, "data.image_size=1000000")
    assert ended.code == 1
    assert "out of memory" in ended.line
    assert "lower data.batch_size" in ended.line
    note("out of memory at the start", "exit code 1; one line with advice", NOTHING)


@pytest.mark.slow
def test_memory_that_runs_out_while_training_keeps_the_last_checkpoint(note: Note) -> None:
    command = started("backbone.channels=[32,64]", "data.batch_size=1024")
    resource.prlimit(command.pid, resource.RLIMIT_AS, (1_000_000, 1_000_000))
    ended = command.end()
    assert ended.code == 1
    assert "out of memory" in ended.line
    assert_whole()
    assert status() == "failed"
    note("out of memory while training", "exit code 1; one line with advice", STEPS)


def test_a_learning_rate_out_of_all_bounds_is_noticed(note: Note) -> None:
    ended = train("optimizer.lr=1e30", "trainer.max_epochs=1")
    assert ended.code == 1
    assert "NaN or infinity appeared" in ended.line
    assert status() == "failed"
    for path in checkpoints():
        weights = torch.load(path, weights_only=True)["state_dict"].values()
        assert all(bool(torch.isfinite(x).all()) for x in weights if x.is_floating_point())
    note("learning rate of 1e30", "exit code 1; one line that names the step", "what follows the first bad step")


@pytest.mark.slow
def test_without_a_network_wandb_goes_offline(here: Path, note: Note) -> None:
    nobody = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "4"}
    ended = train(*SHORT, "logger=wandb", "logger.wandb.mode=online", environment=nobody)
    assert (ended.code, ended.err, status()) == (0, "", "ok")
    assert "wandb      offline (no network)" in ended.out
    assert len(list(here.glob("run/wandb/offline-run-*/*.wandb"))) == 1
    note("no network for wandb", "goes on offline after 30 s, and says how to upload", NOTHING)


@pytest.mark.parametrize("out", ["/dev/full", pytest.param("a pipe that nobody reads", marks=pytest.mark.slow)])
def test_a_run_outlives_its_output(out: str, here: Path, note: Note) -> None:
    if out != "/dev/full":
        os.mkfifo(here / "pipe")
        reader = os.open(here / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        command = Command("train", *SMALL, *SHORT, "run_dir=run", out=str(here / "pipe"))
        command.wait_for(lambda: (here / "run").exists())
        os.close(reader)
        ended = command.end()
    else:
        ended = train(*SHORT, out=out)
    assert (ended.code, ended.err, status()) == (0, "", "ok")
    note(f"stdout: {out}", "the run goes on to its end", "what it would have said")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objectiv.gamma=1", "did you mean 'objective'?"),
        ("hydra/sweeper=optuna", "pip install 'adadim-lightning[optuna]'"),
    ],
)
def test_what_is_not_there_is_named(override: str, words: str, note: Note) -> None:
    ended = train(*SHORT, override)
    assert ended.code == 1
    assert words in ended.line
    assert not Path("run/checkpoints").exists()
    note(override, f"one line: {words}", NOTHING)


def test_weights_of_another_program_that_are_cut_off_are_named(here: Path, note: Note) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"x": torch.zeros(1000)}, here / "x.safetensors")
    spoil(here / "x.safetensors", "cut off")
    ended = run("evaluate", "backbone=small_convnet", "data=digits", "weights=x.safetensors")
    assert ended.code == 1
    assert "x.safetensors cannot be read" in ended.line
    note("weights=x.safetensors cut off", "one line", NOTHING)


# Reports.


def test_a_report_shows_hostile_text_as_text(cut_off: Path, note: Note) -> None:
    hostile = "</script><script>document.title='owned'</script>"
    path = cut_off / "summary.json"
    summary = json.loads(path.read_text())
    summary |= {"status": "ok", "error": hostile, "overrides": [f"x={hostile}"], hostile: 1.0}
    summary["config"] |= {hostile: hostile}
    path.write_text(json.dumps(summary))
    folder = cut_off.rename(cut_off.with_name("<img src=x onerror=alert(1)>"))
    ended = run("report", folder.name, "--out", "page.html")
    assert (ended.code, ended.err) == (0, "")
    page = Path("page.html").read_text()
    assert "document.title" in page
    assert "<script>document.title" not in page
    assert "<img src=x" not in page
    note("hostile text in a run folder", "shown as text in the report", NOTHING)


def test_a_report_leaves_out_what_it_cannot_read(cut_off: Path, here: Path, note: Note) -> None:
    mark = here / "mark"
    np.savez(cut_off / "spectra.npz", R=np.array([Evil(mark)], dtype=object))
    with (cut_off / "metrics.csv").open("a") as file:
        file.write("\x00,7,half a li")
    broken = shutil.copytree(cut_off, here / "broken", symlinks=True)
    (broken / "summary.json").write_text('{"status": "ok", "con')
    ended = run("report", "run", "broken", "--out", "page.html")
    assert ended.code == 0
    assert "Traceback" not in ended.err
    warnings = ended.err.splitlines()
    assert all(line.startswith("warning: ") for line in warnings)
    for words in ("broken: ", "is not a summary of a run", "spectra.npz cannot be read"):
        assert any(words in line for line in warnings), words
    assert not mark.exists()
    assert Path("page.html").exists()
    note(
        "broken JSON, half a CSV, code in spectra.npz", "a warning each; the report has the rest", "what is broken"
    )
