"""Means over an epoch, against what Lightning logs itself."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from adadim_lightning.epoch_means import EpochMeans
from tests.helpers import OneCallPerView, fit, fixed_batches, trainer


class Logging(OneCallPerView):
    """Logs the same values in both ways, one of them now and then."""

    def __init__(self, *, rare: bool = False) -> None:
        super().__init__()
        self.means = EpochMeans()
        self.rare = rare
        self.logged = 0  # values that came by log

    def log(self, name: str, *arguments: Any, **options: Any) -> None:
        self.logged += name.startswith("ours/")
        super().log(name, *arguments, **options)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = super().training_step(batch, batch_idx)
        values = {"a": loss.detach(), "b": loss.detach().square() + self.global_step}
        if self.rare and batch_idx % 2:
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


def assert_equal_logs(epochs: list[dict[str, float]], *, rare: bool = False) -> None:
    keys = {"a", "b", "rare"} if rare else {"a", "b"}
    for epoch in epochs:
        assert {key.removeprefix("ours/") for key in epoch if key.startswith("ours/")} == keys
        for key in keys:
            assert epoch[f"ours/{key}"] == pytest.approx(epoch[f"theirs/{key}"], rel=1e-6)


def test_callbacks_find_the_means_that_lightning_would_log() -> None:
    module, reader = Logging(), Reader()
    fit(module, fixed_batches(5), reader, max_epochs=3)
    assert len(reader.epochs) == 3
    assert_equal_logs(reader.epochs)
    assert len({epoch["ours/a"] for epoch in reader.epochs}) == 3
    assert module.logged == 3 * 2  # both values in the first step of each epoch


def test_a_value_that_only_some_steps_have_is_the_mean_of_these() -> None:
    reader = Reader()
    fit(Logging(rare=True), fixed_batches(5), reader, max_epochs=2)
    assert len(reader.epochs) == 2
    assert_equal_logs(reader.epochs, rare=True)


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
    used = fit(Logging(), fixed_batches(2), reader, stopping, max_epochs=9)
    assert used.current_epoch == 2
    assert float(stopping.best_score) == pytest.approx(reader.epochs[0]["theirs/b"])


@pytest.mark.parametrize("same_trainer", [False, True])
def test_a_module_that_is_trained_again_begins_anew(same_trainer: bool) -> None:
    module, first, second = Logging(), Reader(), Reader()

    class Fails(Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 2 and trainer.callbacks[0] is first:
                raise RuntimeError("out of order")

    used = trainer(first, Fails())
    with pytest.raises(RuntimeError, match="out of order"):
        used.fit(module, fixed_batches(5))
    used = used if same_trainer else trainer()
    used.callbacks = [second]
    used.fit(module, fixed_batches(5))
    assert len(second.epochs) == 1
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


class Overshooting(OneCallPerView):
    """Each step is run twice; the first run has a value that no digit of the others would survive."""

    def __init__(self) -> None:
        super().__init__()
        self.means = EpochMeans()
        self.runs = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.runs += 1
        value = torch.tensor(1e12 if self.runs % 2 else 1.0 + batch_idx)
        self.means.add(self, {"ours": value}, weight=3)
        loss: Tensor = super().training_step(batch, batch_idx)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Twice(self.parameters(), lr=1e-3)


class Twice(torch.optim.SGD):
    """Asks for the gradient twice a step."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        return super().step(closure)


def test_last_run_of_a_step_takes_the_place_of_the_others_exactly() -> None:
    module, reader = Overshooting(), Reader()
    fit(module, fixed_batches(4), reader, max_epochs=2)
    assert module.runs == 16
    assert [epoch["ours"] for epoch in reader.epochs] == [2.5, 2.5]  # of 1, 2, 3 and 4
