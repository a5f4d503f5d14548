"""Checkpoints: when they are written, that they are whole, and that a run goes on from them to the bit."""

import os
import pickle
import random
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from torchmetrics import MeanMetric

from adadim_lightning import AdaDim, AdaDimLoss, Balance, EffectiveRankSchedule, OnlineKNN, OnlineLinearProbe
from adadim_lightning.callbacks import DynamicsPlot, RunCheckpoints
from adadim_lightning.callbacks.continuing import row_of_epoch
from adadim_lightning.callbacks.progress import EpochLines
from adadim_lightning.data import ImageData
from tests.helpers import (
    OneCallPerView,
    all_digits,
    assert_same_weights,
    fit,
    fixed_batches,
    some_digits,
    tiny_module,
    trainer,
    two_noisy_views,
)
from tests.reliability.runs import flat, same

STEPS = 3  # of an epoch of `some_digits`


class StopError(Exception):
    """Ends a fit."""


class At(Callback):
    """Does something after a step, counted from 1."""

    def __init__(self, step: int, act: Callable[[], Any]) -> None:
        self.step = step
        self.act = act
        self.seen = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen += 1
        if self.seen == self.step:
            self.act()


def stop() -> None:
    raise StopError


class Draws(Callback):
    """Moves the random state of Python, NumPy and torch, and lets the loss know."""

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        drawn = random.random() + np.random.rand() + float(torch.rand(()))
        (view1, _), _ = batch
        view1.mul_(1 + 0.01 * drawn)
        pl_module.log("drawn", drawn, on_step=False, on_epoch=True, batch_size=1)


class Notes(Callback):
    """Keeps, also across a resume, when there was a validation and what each epoch logged."""

    def __init__(self) -> None:
        self.kept: dict[str, list[Any]] = {"validated": [], "logged": []}

    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.kept["validated"].append(trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        self.kept["logged"].append({key: value.item() for key, value in trainer.callback_metrics.items()})

    def state_dict(self) -> dict[str, Any]:
        return self.kept

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = state_dict


class DigitStream(IterableDataset[Any]):
    """Digits as a stream, each epoch in another order."""

    epoch = 0

    def __iter__(self):
        order = torch.randperm(96, generator=torch.Generator().manual_seed(self.epoch))
        images = all_digits().train
        return iter([(images.images[i], int(images.labels[i])) for i in order])


def stream() -> ImageData:
    return ImageData(DigitStream(), some_digits().test, views=two_noisy_views(), batch_size=32)


def in_a_worker() -> ImageData:
    data = some_digits()
    return ImageData(data.train, data.test, views=data.views, batch_size=32, num_workers=1)


def in_workers_that_stay() -> ImageData:
    """Two, so that each has a share of the stream and the order of an epoch shows."""
    return ImageData(DigitStream(), some_digits().test, views=two_noisy_views(), batch_size=32, num_workers=2)


class KeepsAnAverage(OneCallPerView):
    """After each batch it moves an average of its weights; logs this and that, some in the first batch alone."""

    def __init__(self) -> None:
        super().__init__()
        self.average = deepcopy(self.encoder).requires_grad_(False)
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.mean(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log("highest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        if batch_idx == 0:
            self.log("first", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for mine, other in zip(self.average.parameters(), self.encoder.parameters(), strict=True):
            mine.lerp_(other.detach(), 0.1)
        self.log("at the end", float(batch_idx), on_step=False, on_epoch=True, batch_size=1)


class StepsByHand(OneCallPerView):
    """Every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


def with_schedule() -> LightningModule:
    """It asks for the number of steps, and so for the loader, before the trainer knows where it goes on."""
    return with_dropout(lr_schedule=linear_decay)


def linear_decay(optimizer: Any, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1 - step / (2 * steps))


def with_dropout(**options: Any) -> LightningModule:
    module = tiny_module(objective=AdaDimLoss(gamma=0.3, kappa="match"), **options)
    module.backbone.append(nn.Dropout(0.2))
    return module


def adadim(**options: Any) -> AdaDim:
    balance = Balance(EffectiveRankSchedule(), every_n_steps=2, window=64)
    return AdaDim(balance=balance, every_n_steps=2, window=64, **options)


def steers_a_foreign_loss() -> AdaDim:
    return adadim(representation="encoder", embedding="projector", native_loss="dimension_contrastive")


def no_adadim() -> Callback:
    return Callback()


VARIANTS: dict[str, dict[str, Any]] = {
    "images in memory": {},
    "a schedule": {"module": with_schedule},
    "views in a worker": {"data": in_a_worker},
    "a stream": {"data": stream},
    "accumulated gradients": {"fit": {"accumulate_grad_batches": 2}},
    "a stream in workers": {"data": in_workers_that_stay},
    "loaders made anew": {"fit": {"reload_dataloaders_every_n_epochs": 1}},
    "a stream made anew": {"data": stream, "fit": {"reload_dataloaders_every_n_epochs": 1}},
    "one batch again and again": {"fit": {"overfit_batches": STEPS}},
    "a number of steps": {"fit": {"max_epochs": -1, "max_steps": 2 * STEPS}},
    "validation within an epoch": {"fit": {"val_check_interval": 2}},
    "a foreign module": {"module": OneCallPerView, "adadim": steers_a_foreign_loss, "probes": list},
    "a module with an average": {"module": KeepsAnAverage, "adadim": no_adadim, "probes": list},
    "optimized by hand": {"module": StepsByHand, "adadim": no_adadim, "probes": list},
}


def last(folder: Path) -> dict[str, Any]:
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    del checkpoint["adadim_run"]["files"]["run"]  # a name of its own
    return dict(flat(checkpoint))


@pytest.mark.parametrize(
    ("variant", "cut"),
    [("images in memory", STEPS), *((x, y) for x in VARIANTS for y in (2, STEPS + 1, STEPS + 2))],
)
def test_run_cut_off_after_any_step_goes_on_to_the_bit(variant: str, cut: int, tmp_path: Path) -> None:
    options = VARIANTS[variant]
    make, data = options.get("module", with_dropout), options.get("data", some_digits)

    def run(folder: Path, seed: int, *more: Callback, **resume: Any) -> None:
        random.seed(seed)
        np.random.seed(seed)
        module = make()
        torch.manual_seed(seed)
        callbacks = [
            options.get("adadim", adadim)(),
            *options.get("probes", lambda: [OnlineLinearProbe(), OnlineKNN(k=5)])(),
            Draws(),
            Notes(),
            RunCheckpoints(folder, every_n_minutes=0),
        ]
        fit(module, data(), *callbacks, *more, **{"max_epochs": 2} | options.get("fit", {}), **resume)

    run(tmp_path / "whole", 7)
    # The step's own checkpoint is written after this, so the run goes on from the one before.
    with pytest.raises(StopError):
        run(tmp_path / "cut", 7, At(cut, stop))
    run(tmp_path / "cut", 8, ckpt_path=tmp_path / "cut" / "last.ckpt")
    whole, resumed = last(tmp_path / "whole"), last(tmp_path / "cut")
    assert len(whole) > 50
    assert [key for key in whole.keys() | resumed.keys() if not same(whole.get(key), resumed.get(key))] == []


def test_a_run_goes_on_from_a_checkpoint_of_lightning_too(tmp_path: Path) -> None:
    def run(seed: int, **resume: Any) -> tuple[LightningModule, Notes]:
        module, notes = with_schedule(), Notes()
        theirs = ModelCheckpoint(tmp_path / "theirs", save_top_k=-1, filename="{epoch}")
        torch.manual_seed(seed)
        fit(
            module,
            some_digits(),
            adadim(),
            Draws(),
            notes,
            theirs,
            RunCheckpoints(tmp_path),
            max_epochs=3,
            **resume,
        )
        return module, notes

    random.seed(1)
    np.random.seed(1)
    whole, logged = run(7)
    resumed, logged_again = run(8, ckpt_path=tmp_path / "theirs" / "epoch=0.ckpt")
    assert logged.kept == logged_again.kept
    assert_same_weights(whole, resumed)


def written(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder; nothing else may be in it but the link to the last."""
    found = sorted(path.name for path in folder.iterdir() if not path.is_symlink())
    steps = [int(name.removesuffix(".ckpt").rpartition("step=")[2]) for name in found]
    assert (folder / "last.ckpt").resolve().name == found[-1]
    return steps


def train(*callbacks: Callback, **options: Any) -> None:
    fit(tiny_module(), some_digits(), *callbacks, max_epochs=2, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every_n_steps": 2, "keep": 9}, [2, 3, 5, 6]),
        ({"every_n_steps": 2}, [5, 6]),
        ({"keep": 1}, [6]),
        ({"keep": 9}, [3, 6]),
        ({"every_n_minutes": 0, "keep": 9}, [1, 2, 3, 4, 5, 6]),
        ({"every_n_minutes": None, "keep": 9}, [3, 6]),
    ],
)
def test_checkpoints_come_at_intervals_and_ends_of_epochs_and_the_last_are_kept(
    options: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    train(RunCheckpoints(tmp_path, **options))
    assert written(tmp_path) == expected


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"every_n_minutes": -1}, {"keep": 0}, {"keep": 1.5}])
def test_interval_that_is_none_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be .*got"):
        RunCheckpoints(**options)


class Unwritable(Callback):
    """Puts something into a checkpoint, at one step, that fails in the middle of its file."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.global_step == 2:
            checkpoint["zzz"] = threading.Lock()


def test_checkpoint_that_cannot_be_written_leaves_no_trace_and_those_before_stay(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="pickle"):
        train(Unwritable(), RunCheckpoints(tmp_path, every_n_minutes=0))
    assert written(tmp_path) == [1]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1


def test_what_a_killed_run_had_not_finished_writing_is_removed(tmp_path: Path) -> None:
    with pytest.raises(StopError):
        train(RunCheckpoints(tmp_path, every_n_steps=1), At(3, stop))
    run = torch.load(tmp_path / "last.ckpt", weights_only=True)["adadim_run"]["files"]["run"]
    (tmp_path / f"epoch=0000-step=000003.ckpt.{run}.tmp").write_bytes(b"half")
    train(RunCheckpoints(tmp_path), ckpt_path=tmp_path / "last.ckpt")
    assert written(tmp_path) == [3, 6]


def test_files_of_other_runs_and_callbacks_stay(tmp_path: Path) -> None:
    all_of_them = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1)
    fit(tiny_module(), some_digits(), all_of_them, RunCheckpoints(tmp_path, keep=1), max_epochs=1)
    theirs = {path: path.read_bytes() for path in tmp_path.iterdir() if not path.is_symlink()}
    assert len(theirs) == 4
    train(RunCheckpoints(tmp_path, keep=1))
    found = {path for path in tmp_path.iterdir() if not path.is_symlink()}
    assert {path: path.read_bytes() for path in theirs} == theirs
    assert [path.name for path in found - theirs.keys()] == ["epoch=0001-step=000006.ckpt"]
    train(RunCheckpoints(tmp_path, keep=9))  # the names of its first epoch are taken
    new = {path.name for path in tmp_path.iterdir() if not path.is_symlink()} - {path.name for path in found}
    assert new == {"epoch=0000-step=000003-v1.ckpt", "epoch=0001-step=000006-v1.ckpt"}
    assert (tmp_path / "last.ckpt").resolve().name == "epoch=0001-step=000006-v1.ckpt"


def test_what_a_run_wrote_after_the_checkpoint_that_it_goes_on_from_goes_first(tmp_path: Path) -> None:
    train(RunCheckpoints(tmp_path, every_n_steps=1))
    assert written(tmp_path) == [5, 6]
    (tmp_path / "epoch=0001-step=000006.ckpt").write_bytes(b"broken")
    train(RunCheckpoints(tmp_path, every_n_steps=1), ckpt_path=tmp_path / "epoch=0001-step=000005.ckpt")
    assert written(tmp_path) == [5, 6]
    assert last(tmp_path)[".global_step"] == 6


def test_a_resume_leaves_the_files_of_others_too(tmp_path: Path) -> None:
    all_of_them = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1)
    fit(tiny_module(), some_digits(), all_of_them, RunCheckpoints(tmp_path), max_epochs=1)
    goes_on_from = (tmp_path / "last.ckpt").resolve()
    train(RunCheckpoints(tmp_path))  # another run
    (tmp_path / "epoch=0001-step=000006.ckpt.other.tmp").write_bytes(b"of one that goes on elsewhere")
    before = {path for path in tmp_path.iterdir() if not path.is_symlink()}
    assert len(before) == 3 + 1 + 2 + 1
    train(RunCheckpoints(tmp_path, keep=1), ckpt_path=goes_on_from)
    assert before - set(tmp_path.iterdir()) == {goes_on_from}


def test_a_callback_that_is_used_again_forgets_another_model(tmp_path: Path) -> None:
    callback = RunCheckpoints(tmp_path, keep=1)
    fit(tiny_module(), some_digits(), callback, max_epochs=1)
    first = callback.written()
    fit(tiny_module(), some_digits(), callback, max_epochs=1)
    assert all(path.is_file() for path in first)
    assert [path.name for path in callback.written()] == ["epoch=0000-step=000003-v1.ckpt"]


def test_a_fit_after_one_that_was_interrupted_sees_whole_epochs_and_ends_with_them(tmp_path: Path) -> None:
    module, data, seen = tiny_module(), some_digits(), []
    notes = LambdaCallback(on_train_batch_start=lambda t, m, b, i: seen.append((t.current_epoch, i)))
    used = trainer(RunCheckpoints(tmp_path), notes, At(STEPS + 2, interrupt), max_epochs=3)
    with pytest.raises(SystemExit):
        used.fit(module, datamodule=data)
    seen.clear()
    used.fit(module, datamodule=data)
    assert seen == [(epoch, i) for epoch in (1, 2) for i in range(STEPS)]
    seen.clear()
    fit(tiny_module(), some_digits(), notes, max_epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert seen == [(3, i) for i in range(STEPS)]


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("every", "expected"), [(1, [2, 4, 6, 8, 9]), (2, [1, 3, 5, 7, 9])])
def test_validations_put_a_checkpoint_off_but_once(every: int, expected: list[int], tmp_path: Path) -> None:
    data = some_digits(batch_size=10)
    options = {"val_check_interval": every, "max_epochs": 1}
    fit(tiny_module(), data, RunCheckpoints(tmp_path, every_n_steps=1, keep=99), **options)
    assert written(tmp_path) == expected


def test_a_run_that_stopped_early_is_over(tmp_path: Path) -> None:
    def run(**resume: Any) -> int:
        early = EarlyStopping("loss/total", patience=1, min_delta=1e9, check_on_train_epoch_end=True)
        return fit(
            tiny_module(), some_digits(), early, RunCheckpoints(tmp_path), max_epochs=9, **resume
        ).global_step

    assert run() == 2 * STEPS
    assert run(ckpt_path=tmp_path / "last.ckpt") == 2 * STEPS


@pytest.mark.parametrize("told", ["in the validation", "after it"])
def test_a_stop_by_a_validation_leaves_the_count_of_steps_right(told: str, tmp_path: Path) -> None:
    def run(folder: Path, *more: Callback, **resume: Any) -> list[int]:
        logger = CSVLogger(str(folder), "", "")
        options = {"val_check_interval": 2, "logger": logger, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
        with suppress(SIGTERMException):
            fit(tiny_module(), some_digits(), *more, RunCheckpoints(folder), max_epochs=2, **options, **resume)
        logger.save()
        if not (folder / "metrics.csv").exists():
            return []
        rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
        return sorted({int(row[rows[0].index("step")]) for row in rows[1:]})

    hook = "on_validation_batch_start" if told == "in the validation" else "on_validation_end"
    stop_there = LambdaCallback(**{hook: lambda *_: os.kill(os.getpid(), signal.SIGTERM)})
    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", stop_there)
    assert max(run(tmp_path / "cut", ckpt_path=tmp_path / "cut" / "last.ckpt")) == max(whole)


def test_a_loader_that_somebody_asked_for_early_is_made_anew(tmp_path: Path) -> None:
    def first_batches(**resume: Any) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []
        asks = LambdaCallback(
            setup=lambda trainer, module, stage: trainer.estimated_stepping_batches,
            on_train_batch_start=lambda t, m, b, i: seen.append(int(b[1].sum())),
        )
        with suppress(StopError):
            stops = [] if resume else [At(3, stop)]
            fit(tiny_module(), some_digits(), asks, RunCheckpoints(tmp_path, every_n_steps=1), *stops, **resume)
        return seen

    assert first_batches()[2:] == first_batches(ckpt_path=tmp_path / "last.ckpt")


def test_the_folder_is_that_of_lightnings_checkpoints(tmp_path: Path) -> None:
    for loggers in (False, CSVLogger(str(tmp_path / "logs"), "mine", 3), CSVLogger(str(tmp_path), "", "")):
        theirs, ours = ModelCheckpoint(), RunCheckpoints()
        options = {"logger": loggers, "default_root_dir": tmp_path, "max_epochs": 1}
        fit(tiny_module(), some_digits(), theirs, ours, **options)
        assert [path.parent for path in ours.written()] == [Path(theirs.dirpath or "")]


def test_a_trial_run_writes_nothing(tmp_path: Path) -> None:
    fit(tiny_module(), some_digits(), RunCheckpoints(tmp_path), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_files_that_come_later_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave out AsyncCheckpointIO"):
        train(RunCheckpoints(tmp_path), plugins=[AsyncCheckpointIO()])


def test_a_validation_with_a_checkpoint_leaves_the_next_fit_alone(tmp_path: Path) -> None:
    module, data = tiny_module(), some_digits()
    with pytest.raises(StopError):
        fit(module, data, RunCheckpoints(tmp_path, every_n_steps=1), At(3, stop), max_epochs=2)
    callbacks = [RunCheckpoints(tmp_path / "other")]
    used = trainer(*callbacks, max_epochs=2)
    used.validate(module, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    again = At(2 * STEPS, stop)
    with pytest.raises(StopError):  # as many batches as a fit that begins has
        fit(module, data, *callbacks, again, max_epochs=2)


@pytest.mark.parametrize(("size", "left"), [(16, [4, 5]), (48, [1]), (60, [])])
def test_images_of_an_epoch_are_not_seen_twice_where_a_batch_has_more_or_fewer_now(
    size: int, left: list[int], tmp_path: Path
) -> None:
    with pytest.raises(StopError):
        fit(with_schedule(), some_digits(), RunCheckpoints(tmp_path, every_n_steps=1), At(STEPS, stop))
    seen: list[tuple[int, int]] = []
    notes = LambdaCallback(on_train_batch_start=lambda t, m, b, i: seen.append((t.current_epoch, i)))
    data = some_digits(batch_size=size)
    fit(with_schedule(), data, EpochLines(), notes, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert seen == [(0, i) for i in left] + [(1, i) for i in range(96 // size)]


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def test_sigterm_ends_the_fit_with_a_checkpoint_of_its_step(tmp_path: Path) -> None:
    with pytest.raises(SIGTERMException):
        train(At(2, kill(signal.SIGTERM)), RunCheckpoints(tmp_path))
    assert written(tmp_path) == [2]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.parametrize(("step", "expected"), [(2, [2, 3, 6]), (STEPS, [3, 6])])
def test_a_signal_writes_a_checkpoint_before_it_reaches_who_listened_before(
    number: int, step: int, expected: list[int], tmp_path: Path
) -> None:
    heard: list[tuple[int, bool]] = []

    def listen(number: int, frame: Any) -> None:
        heard.append((number, any(tmp_path.glob(f"*step={step:06d}.ckpt"))))

    before = signal.signal(number, listen)
    try:
        train(At(step, kill(number)), RunCheckpoints(tmp_path, keep=9))
        assert signal.getsignal(number) is listen
    finally:
        signal.signal(number, before)
    assert heard == [(number, True)]
    assert written(tmp_path) == expected


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("fails", [False, True])
def test_signals_are_left_as_they_were(number: int, fails: bool, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("gone")

    before = signal.getsignal(number)
    with pytest.raises(RuntimeError, match="gone") if fails else nullcontext():
        train(LambdaCallback(on_train_batch_end=fail if fails else None), RunCheckpoints(tmp_path))
    assert signal.getsignal(number) == before


class EverySecond(Callback):
    """Logs in the training of each second epoch; in the first, and between them, nothing."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch % 2:
            pl_module.log("mine", float(trainer.current_epoch), on_step=False, on_epoch=True, batch_size=1)


@pytest.mark.filterwarnings("ignore:DynamicsPlot draws nothing")
def test_what_an_epoch_did_not_log_is_not_taken_from_the_one_before(tmp_path: Path) -> None:
    plot, lines, rows = DynamicsPlot(tmp_path / "plot"), EpochLines(), []

    class Rows(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            rows.append(row_of_epoch(trainer))

    used = trainer(EverySecond(), plot, lines, RunCheckpoints(tmp_path), Rows(), max_epochs=4)
    used.fit(tiny_module(), fixed_batches(2))
    assert [row.get("mine") for row in rows] == [None, 1.0, None, 3.0]
    mine = plot.history["mine"]
    assert [x if x == x else None for x in mine + [float("nan")] * (4 - len(mine))] == [None, 1.0, None, 3.0]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]


class Duplicates(Callback):
    """Copies the trainer after each batch, without the copies so far."""

    def __init__(self, duplicate: Callable[[Any], Any]) -> None:
        self.duplicate = duplicate
        self.copies: list[Trainer] = []

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.copies.append(self.duplicate(trainer))


@pytest.mark.parametrize(
    "duplicate", [deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copied", "pickled"]
)
def test_trainer_is_copied_within_a_fit_without_what_the_callback_put_into_it(
    duplicate: Callable[[Any], Any], tmp_path: Path
) -> None:
    duplicates = Duplicates(duplicate)
    used = trainer(RunCheckpoints(tmp_path), duplicates, max_epochs=1)
    used.fit(OneCallPerView(), fixed_batches(1))
    connector: Any = duplicates.copies[0]._logger_connector
    assert connector is not used._logger_connector
    assert connector.on_batch_end.__self__ is connector  # Lightning's own, of the copy
