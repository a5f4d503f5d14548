"""The tap: what it reads, who shares it, and that it goes away."""

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from adadim_lightning import AdaDim, DimensionMonitor, OnlineKNN, OnlineLinearProbe
from adadim_lightning.tap import Tap
from tests.helpers import fit, fixed_batches, held_out, tiny_module, trainer


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        self.recurrent = nn.LSTM(3, 2)
        self.image = nn.Unflatten(1, (3, 1))


def test_it_reads_what_the_submodule_put_out_call_by_call_and_detached() -> None:
    model, reader = Model(), object()
    tap = Tap.open(model, "encoder.0", reader)
    tap.record(reader, True)
    inputs = [torch.randn(5, 4), torch.randn(2, 4)]
    outputs = [model.encoder[0](x) for x in inputs]
    read = [call.output for call in tap.read()]
    assert len(read) == 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(read, outputs, strict=True))
    assert not any(x.requires_grad for x in read)
    assert all(x.requires_grad for x in outputs)
    tap.close(reader)


def test_a_new_step_forgets_the_step_before_and_an_unwanted_step_keeps_nothing() -> None:
    model, reader = Model(), object()
    tap = Tap.open(model, "encoder", reader)
    tap.record(reader, True)
    model.encoder(torch.ones(5, 4))
    tap.record(reader, True)
    model.encoder(torch.ones(2, 4))
    assert [len(call.output) for call in tap.read()] == [2]
    tap.record(reader, False)
    model.encoder(torch.ones(3, 4))
    with pytest.raises(RuntimeError, match="'encoder' was not called in this step"):
        tap.read()
    tap.close(reader)


def test_two_readers_share_one_hook_which_goes_with_the_last() -> None:
    model = Model()
    taps = [Tap.open(model, "encoder", reader) for reader in ("first", "second")]
    assert taps[0] is taps[1]
    assert len(model.encoder._forward_hooks) == 1
    taps[0].record("first", True)
    taps[0].record("second", False)
    model.encoder(torch.ones(2, 4))
    assert len(taps[1].read()) == 1
    taps[0].close("first")
    assert len(model.encoder._forward_hooks) == 1
    taps[1].close("second")
    assert len(model.encoder._forward_hooks) == 0
    taps[1].close("second")
    again = Tap.open(model, "encoder", "first")
    assert len(model.encoder._forward_hooks) == 1
    again.close("first")


def test_reading_before_any_call_is_an_error() -> None:
    model, reader = Model(), object()
    tap = Tap.open(model, "encoder", reader)
    tap.record(reader, True)
    with pytest.raises(RuntimeError, match="was not called"):
        tap.read()
    tap.close(reader)


def test_what_was_read_stays_when_the_model_works_on_it_in_place() -> None:
    model, reader = Model(), object()
    tap = Tap.open(model, "encoder.0", reader)
    tap.record(reader, True)
    output = model.encoder[0](torch.randn(5, 4))
    expected = output.detach().clone()
    nn.functional.relu_(output)  # as a head that begins with ReLU(inplace=True) does
    assert torch.equal(tap.read()[0].output, expected)
    tap.close(reader)


class Crash(Callback):
    """Fails in the second step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == 1:
            raise KeyError("crash")


def all_readers() -> list[Callback]:
    return [DimensionMonitor(), AdaDim(), OnlineLinearProbe(num_classes=10), OnlineKNN()]


def hooks(module) -> int:
    return sum(len(submodule._forward_hooks) for submodule in module.modules())


def test_no_hook_is_left_on_the_model_after_a_fit_or_a_crash() -> None:
    module = tiny_module()
    seen = []

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            seen.append(hooks(pl_module))

    fit(module, (fixed_batches(2), held_out()), *all_readers(), Count())
    assert seen == [2, 2]
    assert hooks(module) == 0
    with pytest.raises(KeyError, match="crash"):
        fit(module, (fixed_batches(3), held_out()), *all_readers(), Crash())
    assert hooks(module) == 0


def test_a_reader_that_finds_no_submodule_leaves_no_hook_of_the_others() -> None:
    module = tiny_module()
    with pytest.raises(ValueError, match="has no submodule named 'encoder'"):
        fit(module, fixed_batches(2), DimensionMonitor(), OnlineKNN("encoder"))
    assert hooks(module) == 0


def test_validation_does_not_pile_up_outputs() -> None:
    held: list[int] = []

    class Held(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
            tap = Tap.open(pl_module, "backbone", self)
            try:
                held.append(sum(len(call.output) for call in tap.read()))
            except RuntimeError:
                held.append(0)

        def teardown(self, trainer, pl_module, stage) -> None:
            Tap.open(pl_module, "backbone", self).close(self)

    module = tiny_module()
    used = trainer(DimensionMonitor(), Held(), num_sanity_val_steps=0)
    used.fit(module, fixed_batches(2), held_out(size=80))
    assert len(held) == 4
    assert max(held) <= 32  # the rows of the last training step at most
    assert hooks(module) == 0
