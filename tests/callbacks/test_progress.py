"""The line in the terminal, read back from a pseudo-terminal that a real fit writes to."""

import os
import pty
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset

from adadim_lightning import AdaDim
from adadim_lightning.callbacks import Throughput, progress, progress_callback
from adadim_lightning.callbacks.progress import EpochBar, EpochLines, TimeLeft, _duration, _rate
from tests.helpers import every_epoch, fit, fixed_batches, held_out, tiny_module

FIGURES = ("alpha", "H(R)", "I(R;Z)", "img/s", "left")


class Terminal:
    """What is written to a pseudo-terminal, as the lines that were to be seen on it one after the other."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        self.file = open(slave, "w", encoding="utf-8")  # noqa: SIM115 -- closed below
        self._raw = b""
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()

    def _drain(self) -> None:
        try:
            while data := os.read(self._master, 65536):
                self._raw += data
        except OSError:
            pass

    def close(self) -> str:
        """Everything that was written."""
        self.file.close()
        self._reader.join()
        os.close(self._master)
        return self._raw.decode()


def lines(raw: str) -> list[str]:
    """Each state of each line."""
    return [text for text in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw)) if text.strip()]


@pytest.fixture
def watch() -> Callable[..., str]:
    """Fit with a progress bar in a terminal of some width; all that it was sent."""

    def watched(width: int, data: Any, *callbacks: Callback, error: str = "", **options: Any) -> str:
        terminal = Terminal()
        module = options.pop("module", None)
        steering = [] if module else [AdaDim("backbone", "projection_head", every_n_steps=2), Throughput()]
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("TERM", "xterm-256color")
            monkeypatch.setenv("COLUMNS", str(width))
            monkeypatch.setattr(sys, "stdout", terminal.file)
            bar = progress_callback()
            assert isinstance(bar, EpochBar)
            parts = [*steering, *callbacks, bar]
            with pytest.raises(RuntimeError, match=error) if error else nullcontext():
                fit(module or tiny_module(), data, *parts, enable_progress_bar=True, **options)
        return terminal.close()

    return watched


class Slow(Callback):
    """Some time for each batch, or for those of one epoch."""

    def __init__(self, seconds: float, epoch: int | None = None) -> None:
        self.seconds = seconds
        self.epoch = epoch

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.epoch in (None, trainer.current_epoch):
            time.sleep(self.seconds)


class Figures(Callback):
    """Values as wide as they get."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {"balance/alpha": 0.5, "dynamics/H_R": 7.624, "dynamics/I_RZ": -1.905}
        pl_module.log_dict(values | {"throughput/images_per_second": 123_456.0})


class Quick(LightningModule):
    """Next to nothing to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class Stream(IterableDataset[Any]):
    """Batches that end, but do not say when."""

    def __init__(self, batches: int) -> None:
        self.loader = fixed_batches(batches)

    def __iter__(self) -> Iterator[Any]:
        yield from self.loader


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_fit_leaves_one_line_that_fits_the_terminal(watch: Callable[..., str], width: int) -> None:
    raw = watch(width, fixed_batches(4), max_epochs=4)
    seen = lines(raw)
    assert raw.count("\n") == 1, "every state but the last overwrites the one before"
    assert all(text.startswith("epoch ") and len(text) <= width for text in seen)
    last = seen[-1]
    assert last.startswith("epoch 4/4  ")
    assert re.search(r"in \d+s$", last)
    shown = [name for name in (*FIGURES[:3], "img/s", "images/s", "batch", "━") if name in last]
    assert (
        shown
        == {
            60: ["alpha", "H(R)", "I(R;Z)"],
            80: ["alpha", "H(R)", "I(R;Z)", "img/s", "━"],
            120: ["alpha", "H(R)", "I(R;Z)", "images/s", "batch", "━"],
        }[width]
    )


def test_eighty_columns_hold_every_figure_though_epochs_and_batches_have_four_digits(
    watch: Callable[..., str],
) -> None:
    data = DataLoader(torch.ones(1000), batch_size=1)  # type: ignore[arg-type]
    options = {"module": Quick(), "max_epochs": 5000, "max_steps": 1020}
    seen = lines(watch(80, data, Slow(0.05, epoch=1), Figures(), **options))
    second = [text for text in seen if text.startswith("epoch    2/5000")]
    assert second
    assert all(len(text) <= 80 for text in seen)
    assert all(name in second[0] for name in FIGURES)


def test_what_the_host_knows_is_shown_within_the_first_epoch(watch: Callable[..., str]) -> None:
    seen = lines(watch(80, fixed_batches(8), Slow(0.1)))
    first = [text for text in seen if re.search(r"batch [3-7]/8", text)]
    assert first
    assert re.search(r"alpha \d\.\d{3} +[\d,]+ images/s +\ds left", first[0])


def test_figures_are_those_of_the_epoch_before(watch: Callable[..., str]) -> None:
    logged: list[dict[str, float]] = []

    class Note(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    seen = lines(watch(120, fixed_batches(4), Slow(0.1), Note(), max_epochs=2))
    second = [text for text in seen if text.startswith("epoch 2/2") and "batch 4/4" not in text]
    assert f"H(R) {logged[0]['dynamics/H_R']:.3f}" in second[0]
    assert f"I(R;Z) {logged[0]['dynamics/I_RZ']:6.3f}" in second[0]
    assert f"H(R) {logged[1]['dynamics/H_R']:.3f}" in seen[-1]


def test_validation_does_not_disturb_the_line(watch: Callable[..., str]) -> None:
    raw = watch(80, (fixed_batches(2), held_out()), max_epochs=3, num_sanity_val_steps=2)
    assert raw.count("\n") == 1
    assert all(text.startswith("epoch ") for text in lines(raw))


def test_a_stream_shows_its_batches_and_once_it_ended_the_time_left(watch: Callable[..., str]) -> None:
    loader: Any = DataLoader(Stream(5), batch_size=None)
    seen = lines(watch(120, loader, Slow(0.1), max_epochs=2))
    first = [text for text in seen if text.startswith("epoch 1/2") and re.search("batch [2-4]", text)]
    second = [text for text in seen if text.startswith("epoch 2/2") and re.search("batch [2-4]", text)]
    assert first
    assert second
    assert "left" not in first[0]
    assert not re.search(r"batch \d/", first[0])
    assert re.search(r"\ds left", second[0])


def test_steps_alone_give_the_time_left_and_no_number_of_epochs(watch: Callable[..., str]) -> None:
    seen = lines(watch(80, fixed_batches(4), Slow(0.1), max_epochs=-1, max_steps=10))
    assert any(re.match(r"epoch 2  .* \ds left", text) for text in seen)
    assert seen[-1].startswith("epoch 3  ")


def test_what_is_printed_meanwhile_stands_whole_above_the_line(watch: Callable[..., str]) -> None:
    class Chatty(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            print(f"said {trainer.global_step}")

    seen = lines(watch(80, fixed_batches(3), Chatty()))
    assert [text.strip() for text in seen if "said" in text] == ["said 1", "said 2", "said 3"]


def test_an_error_gives_the_terminal_back(watch: Callable[..., str]) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("on purpose")

    threads = threading.active_count()
    raw = watch(80, fixed_batches(2), Fails(), error="on purpose")
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l"), "the cursor is shown again"
    assert threading.active_count() == threads


class NoWaiting(TorchDispatchMode):
    """Fails where a tensor's value is read, which on a device waits for all that was begun."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bar", [EpochBar, EpochLines])
def test_a_step_reads_no_value_from_the_device(bar: type[Callback], capsys: pytest.CaptureFixture[str]) -> None:
    class Watched(bar):  # type: ignore[valid-type,misc]
        steps = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.steps += 1
            with NoWaiting():
                super().on_train_batch_end(*args)

    with pytest.raises(AssertionError, match="a value was read"), NoWaiting():
        float(torch.ones(()))
    watched = Watched()
    steering = AdaDim("backbone", "projection_head", every_n_steps=2)
    fit(tiny_module(), fixed_batches(4), steering, Throughput(), watched, max_epochs=2, enable_progress_bar=True)
    assert watched.steps == 8


class Clock(Callback):
    """A second for each batch but the first, which takes a minute; notes the seconds that were said to be left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.said: list[float] = []
        monkeypatch.setattr(progress.time, "perf_counter", lambda: self.now)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.left = TimeLeft(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.now += 1.0 if self.said else 60.0
        self.left.batch_ended(trainer, batch_idx + 1)
        self.said.append(self.left.seconds)
        self.batches = batch_idx + 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.left.epoch_ended(self.batches)


UNKNOWN = float("nan")


def test_time_left_is_that_of_the_whole_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    fit(Quick(), DataLoader(torch.ones(5)), clock, max_epochs=4)  # type: ignore[arg-type]
    assert clock.said == pytest.approx([UNKNOWN, *range(18, -1, -1)], nan_ok=True)


def test_time_left_of_a_resumed_fit_counts_this_session_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data: Any = DataLoader(torch.ones(5))  # type: ignore[arg-type]
    fit(Quick(), data, every_epoch(tmp_path), max_epochs=8)
    clock = Clock(monkeypatch)
    fit(Quick(), data, clock, max_epochs=10, ckpt_path=tmp_path / "7.ckpt")
    assert clock.said == pytest.approx([UNKNOWN, *range(8, -1, -1)], nan_ok=True), "two epochs of ten are left"


def test_time_left_over_a_stream_is_known_once_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    fit(tiny_module(), DataLoader(Stream(5), batch_size=None), clock, max_epochs=3)  # type: ignore[arg-type]
    assert clock.said == pytest.approx([UNKNOWN] * 6 + list(range(8, -1, -1)), nan_ok=True)


def test_the_nearer_of_epochs_and_steps_ends_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    fit(Quick(), DataLoader(torch.ones(5)), clock, max_epochs=100, max_steps=12)  # type: ignore[arg-type]
    assert clock.said == pytest.approx([UNKNOWN, *range(10, -1, -1)], nan_ok=True)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (599, "9m59s"), (600, "10m"), (3599, "59m"), (3600, "1h00m")),
        *(
            (5025, "1h23m"),
            (36_000, "10h"),
            (86_399, "23h"),
            (86_400, "1d00h"),
            (863_999, "9d23h"),
            (864_000, "10d"),
        ),
    ],
)
def test_a_duration_has_five_characters_at_most(seconds: float, text: str) -> None:
    assert _duration(seconds) == text
    assert len(text) <= 5


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (9.6, "10"),
        (1_234.5, "1,234"),
        (9_999.4, "9,999"),
        (9_999.6, "10.0k"),
        (99_949, "99.9k"),
        (99_951, "100k"),
        (999_499, "999k"),
        (999_501, "1.0M"),
        (12_345_678, "12.3M"),
    ],
)
def test_a_rate_has_five_characters_at_most(value: float, text: str) -> None:
    assert _rate(value) == text
    assert len(text) <= 5


def test_plain_lines_fit_eighty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    one: Any = DataLoader(torch.ones(1), batch_size=1)  # type: ignore[arg-type]
    fit(Quick(), one, Figures(), EpochLines(), max_epochs=5000, max_steps=340)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2, "every 167th epoch of 5000"
    assert all(len(line) <= 80 for line in printed)
    assert re.fullmatch(
        r"epoch  334/5000  alpha 0.500  H\(R\) 7.624  I\(R;Z\) -1.905   123k img/s  \d+s left", printed[1]
    )


def test_progress_is_plain_lines_in_a_pipe_and_in_a_dumb_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(progress_callback(), EpochLines)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal.file)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress_callback(), EpochLines)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(progress_callback(), EpochBar)
    monkeypatch.undo()
    terminal.close()
