"""The tap: what it reads, who shares it, and that it goes away."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adadim_lightning import AdaDim, DimensionMonitor, OnlineKNN, OnlineLinearProbe
from adadim_lightning.feed import Feed, Views, batch_size_of
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


@pytest.mark.filterwarnings("ignore:.*has nothing to score on")
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


# A feed lines up R and Z of a step.


class Anything(nn.Module):
    """Calls its parts as it is told."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.AdaptiveAvgPool2d(1))
        self.projector = nn.Sequential(nn.Flatten(), nn.Linear(6, 4))


N = 5


def crops(count: int, size: int) -> list[Tensor]:
    return [torch.randn(N, 1, size, size) for _ in range(count)]


def read(feed: Feed, batch: Any, step: Any, outputs: Any = None, graph: bool = False) -> list[Views]:
    module = Anything()
    feed.open(module)
    feed.record(True, graph=graph)
    step(module)
    views = feed.read(batch, outputs)
    feed.close()
    assert hooks(module) == 0
    return views


def by_call(module: Anything, x: Tensor) -> None:
    module.projector(module.backbone(x))


def backbone_by_call_head_at_once(module: Anything, views: list[Tensor]) -> None:
    module.projector(torch.cat([module.backbone(x) for x in views]))


STEPS = {
    "a call a view": lambda module, views: [by_call(module, x) for x in views],
    "views below each other": lambda module, views: by_call(module, torch.cat(views)),
    "the head at once": backbone_by_call_head_at_once,
    "the backbone at once": lambda module, views: [
        module.projector(r) for r in module.backbone(torch.cat(views)).split(N)
    ],
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_views_are_lined_up_however_the_parts_are_called(step) -> None:
    views = crops(2, 8)
    module = Anything()
    expected_r = [module.backbone(x).flatten(1) for x in views]
    expected_z = [module.projector(r) for r in expected_r]
    r, z = read(Feed(None, None), (views, torch.zeros(N)), lambda m: step(m, views))
    for ours, theirs in ((r.rows, expected_r), (z.rows, expected_z)):
        assert [x.shape for x in ours] == [x.shape for x in theirs]
        assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("at_once", [False, True], ids=["a call a crop", "a call a size"])
@pytest.mark.parametrize("head_sees_all", [False, True])
def test_of_crops_of_several_sizes_the_largest_are_read(at_once: bool, head_sees_all: bool) -> None:
    small, large = crops(3, 4), crops(2, 8)

    def step(module: Anything) -> None:
        groups = [torch.cat(small), torch.cat(large)] if at_once else [small[0], *large, *small[1:]]
        representations = [(x.shape[-1], module.backbone(x)) for x in groups]
        module.projector(torch.cat([r for size, r in representations if head_sees_all or size == 8]))

    module = Anything()
    r, z = read(Feed(None, None), [*large, *small], step)
    expected = [module.backbone(x).flatten(1) for x in large]
    assert len(r.rows) == len(z.rows) == 2
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(r.rows, expected, strict=True))
    assert all(torch.allclose(module.projector(x), y, atol=1e-6) for x, y in zip(r.rows, z.rows, strict=True))


def test_calls_without_gradients_are_those_of_a_teacher() -> None:
    student, teacher = crops(2, 8)

    def step(module: Anything) -> None:
        by_call(module, student)
        with torch.no_grad():
            by_call(module, teacher)

    r, _ = read(Feed(None, None), student, step)
    assert len(r.rows) == 1
    assert torch.allclose(r.rows[0], Anything().backbone(student).flatten(1))

    def teacher_alone(module: Anything) -> None:
        with torch.no_grad():
            by_call(module, teacher)

    r, _ = read(Feed(None, None), student, teacher_alone)
    assert torch.allclose(r.rows[0], Anything().backbone(teacher).flatten(1))


class Tokens(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


TOKENS = torch.arange(24.0).reshape(2, 3, 4)


@pytest.mark.parametrize(
    ("source", "make", "pool", "expected"),
    [
        ("vit", lambda x: x, "class", TOKENS[:, 0]),
        ("vit", lambda x: x, "mean", TOKENS.mean(1)),
        ("vit", lambda x: x.transpose(1, 2)[..., None], "mean", TOKENS.mean(1)),
        ("vit[1]", lambda x: (x, x[:, 2]), None, TOKENS[:, 2]),
        ("vit[tokens]", lambda x: {"tokens": x, "pooled": x[:, 1]}, "class", TOKENS[:, 0]),
        ("vit[pooled]", lambda x: SimpleNamespace(tokens=x, pooled=x[:, 1]), "class", TOKENS[:, 1]),
        ("vit", lambda x: {"pooled": x[:, 1], "attentions": None}, None, TOKENS[:, 1]),
        ("vit", lambda x: [x[:, 1], "text"], None, TOKENS[:, 1]),
    ],
)
def test_tokens_maps_and_structured_outputs_become_rows(source: str, make, pool, expected: Tensor) -> None:
    module = nn.Module()
    module.vit = Tokens(make)
    feed = Feed(source, pool=pool)
    feed.open(module)
    feed.record(True)
    module.vit(TOKENS)
    assert torch.equal(feed.read(TOKENS, None)[0].rows[0], expected)
    feed.close()


@pytest.mark.parametrize(
    ("source", "make", "message"),
    [
        ("vit", lambda x: x, r"'vit' must put out rows \(N, d\), got \(2, 3, 4\); pool=\"class\" or \"mean\""),
        (
            "vit",
            lambda x: x[..., None].expand(-1, -1, -1, 2),
            r"got \(2, 3, 4, 2\); pool=\"mean\" makes rows of maps",
        ),
        ("vit", lambda x: x[0, 0], r"got \(4,\); name another submodule"),
        (
            "vit",
            lambda x: (x, x[:, 0]),
            r"put out 2 tensors; name one of them: 'vit\[0\]' \(2, 3, 4\), 'vit\[1\]' \(2, 4\)",
        ),
        ("vit", lambda x: {"a": None}, "put out 0 tensors; name one of them: there is none"),
        ("vit[c]", lambda x: {"a": x}, r"'vit' put out no 'c' but 'vit\[a\]' \(2, 3, 4\)"),
        ("vit[0]", lambda x: x, "'vit' put out no '0' but one tensor"),
    ],
)
def test_what_is_no_rows_is_an_error_that_says_what_it_was(source: str, make, message: str) -> None:
    module = nn.Module()
    module.vit = Tokens(make)
    feed = Feed(source)
    feed.open(module)
    feed.record(True)
    module.vit(TOKENS)
    with pytest.raises(ValueError, match=message):
        feed.read(TOKENS, None)
    feed.close()


def test_rows_come_from_the_outputs_of_the_step_or_from_a_function_too() -> None:
    views = crops(2, 8)
    outputs = {"embedding": torch.randn(2 * N, 3), "projection": torch.randn(2 * N, 2)}
    r, z = read(Feed("embedding", "projection"), views, lambda m: None, outputs)
    assert torch.equal(torch.stack(r.rows), outputs["embedding"].reshape(2, N, 3))
    assert torch.equal(torch.stack(z.rows), outputs["projection"].reshape(2, N, 2))

    def rows(module, batch, outputs) -> list[Tensor]:
        assert isinstance(module, Anything)
        return [x.flatten(1) for x in batch]

    r, z = read(Feed(rows, "projection"), views, lambda m: None, outputs)
    assert all(torch.equal(x, y.flatten(1)) for x, y in zip(r.rows, views, strict=True))
    assert torch.equal(torch.stack(z.rows), outputs["projection"].reshape(2, N, 2))


def test_a_source_that_does_not_exist_is_an_error_that_lists_what_there_is() -> None:
    views = crops(2, 8)

    def step(module: Anything) -> None:
        for x in views:
            by_call(module, x)

    for outputs, returned in (
        ({"loss": 1, "logits": 2}, "no such entry but loss, logits"),
        (None, "no dictionary"),
    ):
        with pytest.raises(ValueError, match="Anything has no submodule named 'embeding'") as error:
            read(Feed("embeding"), views, step, outputs)
        assert returned in str(error.value)
        assert "\n  backbone: (5, 6, 1, 1), 2 calls" in str(error.value)
        assert "\n  projector.1: (5, 4), 2 calls" in str(error.value)


def test_what_is_not_found_by_name_is_an_error_that_lists_what_there_is() -> None:
    module, feed = Anything(), Feed(None, None)
    module.mlp = module.projector
    del module.projector
    feed.open(module)
    feed.record(True)
    module.mlp(module.backbone(crops(1, 8)[0]))
    with pytest.raises(ValueError, match=r"(?s)which submodule is the projection head.*mlp.1: "):
        feed.read(None, None)
    feed.close()


def test_a_function_that_gives_no_tensor_is_an_error() -> None:
    def rows(module, batch, outputs) -> int:
        return 3

    with pytest.raises(ValueError, match="the function 'rows' must give a tensor"):
        read(Feed(rows), crops(1, 8), lambda m: None)


def test_the_graph_is_kept_where_it_is_wanted_and_leads_to_the_original_output() -> None:
    views, graph = crops(2, 8), {}

    def step(module: Anything) -> None:
        graph["z"] = [module.projector(module.backbone(x)) for x in views]

    r, z = read(Feed(None, None), views, step, graph=True)
    assert all(x.requires_grad for x in (*r.rows, *z.rows))
    assert all(ours is theirs for ours, theirs in zip(z.originals, graph["z"], strict=True))
    gradient = torch.autograd.grad(z.rows[1].sum(), z.originals, allow_unused=True)
    assert gradient[0] is None
    assert torch.equal(gradient[1], torch.ones(N, 4))
    r, z = read(Feed(None, None), views, step)
    assert not any(x.requires_grad for x in (*r.rows, *z.rows))
    assert z.originals == []


def test_views_that_a_function_lists_stay_whole_and_rows_that_fit_no_tensor_are_not_cut() -> None:
    batch = torch.zeros(4, 6)
    rows = torch.randn(8, 3)
    [views] = read(Feed(lambda module, batch, outputs: [rows]), batch, lambda m: None)
    assert len(views.rows) == 1
    assert torch.equal(views.rows[0], rows)
    [views] = read(Feed(lambda module, batch, outputs: rows), batch, lambda m: None)
    assert [len(x) for x in views.rows] == [4, 4]
    [views] = read(Feed(lambda module, batch, outputs: rows[:6]), batch, lambda m: None)
    assert [len(x) for x in views.rows] == [6]


def test_of_token_sequences_of_several_lengths_the_longest_are_read() -> None:
    module, feed = nn.Module(), Feed("norm", pool="mean")
    module.norm = nn.Identity()
    feed.open(module)
    feed.record(True)
    long, short = torch.randn(2, 9, 4), torch.randn(2, 5, 4)
    for tokens in (short, long, short):
        module.norm(tokens)
    [views] = feed.read(None, None)
    assert len(views.rows) == 1
    assert torch.equal(views.rows[0], long.mean(1))
    feed.close()


def test_structured_outputs_are_copied_too() -> None:
    module, feed = nn.Module(), Feed("vit[0]")
    module.vit = Tokens(lambda x: (x[:, 0] - 20, x))
    feed.open(module)
    feed.record(True)
    r, _ = module.vit(TOKENS)
    expected = r.clone()
    nn.functional.relu_(r)
    assert torch.equal(feed.read(TOKENS, None)[0].rows[0], expected)
    feed.close()


def test_the_class_token_of_a_map_is_an_error() -> None:
    module, feed = nn.Module(), Feed("vit", pool="class")
    module.vit = Tokens(lambda x: x[..., None].expand(-1, -1, -1, 2))
    feed.open(module)
    feed.record(True)
    module.vit(TOKENS)
    with pytest.raises(ValueError, match="must put out rows"):
        feed.read(TOKENS, None)
    feed.close()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_call_that_is_repeated_in_the_backward_pass_counts_once(reentrant: bool) -> None:
    module, feed = Anything(), Feed(None, None)
    feed.open(module)
    feed.record(True)
    calls: list[int] = []
    module.backbone.register_forward_hook(lambda *_: calls.append(1))
    image = crops(1, 8)[0].requires_grad_()
    z = checkpoint(lambda x: module.projector(module.backbone(x)), image, use_reentrant=reentrant)
    z.sum().backward()
    assert len(calls) == 2
    r, z = feed.read(image, None)
    assert len(r.rows) == len(z.rows) == 1
    feed.close()


def test_a_copy_of_a_tapped_model_is_not_tapped() -> None:
    module, feed = Anything(), Feed(None, None)
    feed.open(module)
    feed.record(True, graph=True)
    views = crops(2, 8)
    by_call(module, views[0])
    teacher = copy.deepcopy(module)
    by_call(teacher, views[1])
    r, _ = feed.read(views, None)
    assert len(r.rows) == 1
    feed.close()


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.zeros(3, 1, 2, 2), 3),
        ((torch.zeros(7), [torch.zeros(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)], torch.zeros(7)), 3),
        ({"views": [{"image": torch.zeros(4, 5), "label": torch.zeros(4)}]}, 4),
        (("text", 3, None), None),
    ],
)
def test_the_number_of_images_is_that_of_the_first_tensor_with_rows(batch, expected) -> None:
    assert batch_size_of(batch) == expected


@pytest.mark.parametrize("options", [{"pool": "max"}, {"representation": 3}])
def test_a_feed_refuses_what_it_does_not_know(options: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        Feed(**({"representation": "a"} | options))
