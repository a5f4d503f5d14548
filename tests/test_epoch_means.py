"""Means over an epoch, against what Lightning logs itself."""

from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from adadim_lightning.epoch_means import EpochMeans
from tests.helpers import OneCallPerView, fit, fixed_batches


class Logging(OneCallPerView):
    """Logs the same values in both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.means = EpochMeans()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = super().training_step(batch, batch_idx)
        values = {"a": loss.detach(), "b": loss.detach().square() + self.global_step}
        if batch_idx % 2:
            values["rare"] = loss.detach() - 1
        weight = 1 + batch_idx
        self.means.add(self, {f"ours/{key}": value for key, value in values.items()}, weight=weight)
        theirs = {f"theirs/{key}": value for key, value in values.items()}
        self.log_dict(theirs, on_step=False, on_epoch=True, batch_size=weight)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """There is one."""


class Reader(Callback):
    """What a callback finds at the end of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.epochs.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def assert_equal_logs(epochs: list[dict[str, float]]) -> None:
    for epoch in epochs:
        assert {key.removeprefix("ours/") for key in epoch if key.startswith("ours/")} == {"a", "b", "rare"}
        for key in ("a", "b", "rare"):
            assert epoch[f"ours/{key}"] == pytest.approx(epoch[f"theirs/{key}"], rel=1e-6)


def test_callbacks_find_the_means_that_lightning_would_log() -> None:
    reader = Reader()
    fit(Logging(), fixed_batches(5), reader, max_epochs=3)
    assert len(reader.epochs) == 3
    assert_equal_logs(reader.epochs)
    assert len({epoch["ours/a"] for epoch in reader.epochs}) == 3


def test_an_epoch_that_is_cut_off_has_the_mean_of_its_steps() -> None:
    reader = Reader()
    fit(Logging(), fixed_batches(5), reader, max_epochs=-1, max_steps=7)
    assert len(reader.epochs) == 2
    assert_equal_logs(reader.epochs)


def test_validation_within_the_epoch_does_not_cut_the_mean_in_two() -> None:
    reader = Reader()
    batches = fixed_batches(6)
    fit(Logging(), (batches, batches), reader, max_epochs=2, val_check_interval=2, limit_val_batches=1)
    assert_equal_logs(reader.epochs)


def test_a_mean_can_be_monitored() -> None:
    stopping = EarlyStopping("ours/b", patience=0, mode="min", min_delta=1e9, check_on_train_epoch_end=True)
    reader = Reader()
    trainer = fit(Logging(), fixed_batches(2), reader, stopping, max_epochs=9)
    assert trainer.current_epoch == 2
    assert float(stopping.best_score) == pytest.approx(reader.epochs[0]["theirs/b"])


def test_a_module_that_is_trained_again_begins_anew() -> None:
    module, first, second = Logging(), Reader(), Reader()

    class Fails(Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 1:
                raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        fit(module, fixed_batches(5), first, Fails())
    fit(module, fixed_batches(5), second, max_epochs=1)
    assert_equal_logs(second.epochs)


def test_a_step_on_its_own_needs_no_trainer() -> None:
    module = Logging()
    batch = next(iter(fixed_batches(1)))
    with pytest.warns(UserWarning, match="not registered"):
        loss = module.training_step(batch, 0)
    assert float(loss) == pytest.approx(float(module.training_step(batch, 1)))


def test_a_step_without_values_logs_nothing() -> None:
    class Silent(Logging):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.means.add(self, {}, weight=1)
            return OneCallPerView.training_step(self, batch, batch_idx)

    reader = Reader()
    fit(Silent(), fixed_batches(2), reader)
    assert reader.epochs == [{}]
