"""Modules as users of lightly, timm and Hugging Face write them, against values by hand from the same pass."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from adadim_lightning import AdaDim, AdaDimLoss, Balance, ConstantSchedule, DimensionMonitor, LinearSchedule
from tests.helpers import assert_same_weights, fit
from tests.integration import modules

IMAGES = 8  # of a batch
ALPHA, GAMMA, WEIGHT = 0.3, 0.2, 0.5


def as_rows(output: Tensor) -> Tensor:
    return output.reshape(len(output), -1)


def class_token(tokens: Tensor) -> Tensor:
    return tokens[:, 0]


def mean_token(tokens: Tensor) -> Tensor:
    return tokens.mean(dim=1)


@dataclass(frozen=True)
class Case:
    """A module, and what the test itself knows of it.

    Args:
        make: builds it.
        native_loss: kind of its loss.
        names: submodules that put out R and Z of the student.
        sources: what a user gives; nothing where the names are found.
        momentum: submodules of the second view, where the student sees one.
        crops: sizes of the images of each view.
        kept: from which to which of a step's rows, all calls stacked, belong to the largest crops.
        read_r: rows of what the first submodule put out.
        read_z: rows of what the second put out.
    """

    make: Callable[[], LightningModule]
    native_loss: str
    names: tuple[str, str] = ("backbone", "projection_head")
    sources: dict[str, str] = field(default_factory=dict)
    momentum: tuple[str, str] | None = None
    crops: tuple[int, ...] = (32, 32)
    kept: tuple[int, int | None] = (0, None)
    read_r: Callable[[Any], Tensor] = as_rows
    read_z: Callable[[Any], Tensor] = as_rows


STUDENT = ("student_backbone", "student_head")
CROPS = (32, 32, 16, 16)
CASES = {
    "SimCLR": Case(modules.SimCLR, "sample_contrastive"),
    "SimCLR, ResNet-18": Case(modules.simclr_resnet18, "sample_contrastive"),
    "MoCo": Case(
        modules.MoCo,
        "sample_contrastive",
        momentum=("backbone_momentum", "projection_head_momentum"),
    ),
    "BYOL": Case(modules.BYOL, "other"),
    "Barlow Twins": Case(modules.BarlowTwins, "dimension_contrastive"),
    "VICReg": Case(modules.VICReg, "dimension_contrastive"),
    "SimSiam": Case(modules.SimSiam, "other"),
    "DINO": Case(modules.DINO, "other", STUDENT, crops=CROPS, kept=(0, 2 * IMAGES)),
    "DINO, grouped": Case(modules.GroupedDINO, "other", STUDENT, crops=CROPS, kept=(2 * IMAGES, 4 * IMAGES)),
    "MSN": Case(
        modules.MSN,
        "other",
        ("anchor_backbone", "anchor_projection_head"),
        crops=CROPS,
        kept=(0, IMAGES),
    ),
    "MAE": Case(
        modules.MAE,
        "other",
        ("backbone.vit.norm", "decoder"),
        {"representation": "backbone.vit.norm", "embedding": "decoder", "pool": "mean"},
        crops=(32,),
        read_r=mean_token,
        read_z=mean_token,
    ),
    "timm, pooled": Case(modules.ViT, "sample_contrastive"),
    "timm, class token": Case(
        modules.ViTOfTokens, "sample_contrastive", sources={"pool": "class"}, read_r=class_token
    ),
    "timm, mean token": Case(
        modules.ViTByFeatures,
        "sample_contrastive",
        ("backbone.norm", "projection_head"),
        {"representation": "backbone.norm", "pool": "mean"},
        read_r=mean_token,
    ),
    "Hugging Face, class token": Case(
        modules.HuggingFaceViT,
        "sample_contrastive",
        sources={"representation": "backbone[last_hidden_state]", "pool": "class"},
        read_r=lambda output: output.last_hidden_state[:, 0],
    ),
    "Hugging Face, pooler": Case(
        modules.HuggingFaceViT,
        "sample_contrastive",
        sources={"representation": "backbone[pooler_output]"},
        read_r=lambda output: output.pooler_output,
    ),
    "keys of the outputs": Case(
        modules.ReturnsDictionary,
        "sample_contrastive",
        sources={"representation": "embedding", "embedding": "projection"},
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def make(case: Case) -> LightningModule:
    """The same weights at every call."""
    torch.manual_seed(0)
    return case.make()


def batches(crops: tuple[int, ...], number: int, *, shuffle: bool = False) -> DataLoader[Any]:
    """Views of the same images, more alike than those of different images, in crops of several sizes."""
    generator = torch.Generator().manual_seed(7)
    samples = []
    for i in range(number * IMAGES):
        coarse = 4 * torch.randn(3, 4, 4, generator=generator)
        views = [F.interpolate(coarse[None], size=size, mode="bilinear")[0] for size in crops]
        noise = [torch.randn(view.shape, generator=generator) for view in views]
        samples.append(([x + e for x, e in zip(views, noise, strict=True)], i % 3, f"{i}.png"))
    return DataLoader(samples, batch_size=IMAGES, shuffle=shuffle)  # type: ignore[arg-type]


def constant_alpha() -> dict[str, Any]:
    return {
        "objective": AdaDimLoss(gamma=GAMMA, kappa=1, information_floor=None),
        "balance": Balance(ConstantSchedule(ALPHA)),
        "weight": WEIGHT,
    }


def monitoring(case: Case) -> DimensionMonitor:
    return DimensionMonitor(**case.sources)


def observing(case: Case) -> AdaDim:
    return AdaDim(
        **case.sources,
        native_loss=case.native_loss,
        momentum=case.momentum,
        observe=True,
        **constant_alpha(),
    )


def steering(case: Case) -> AdaDim:
    return AdaDim(**case.sources, native_loss=case.native_loss, momentum=case.momentum, **constant_alpha())


# Formulas, by hand.


def effective_rank(x: np.ndarray) -> float:
    sigma = np.linalg.svd(x, compute_uv=False)
    p = sigma / sigma.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def information(r: np.ndarray, z: np.ndarray) -> float:
    squares = []
    for x in (r, z):
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        squares.append((unit @ unit.T) ** 2)
    joint = (squares[0] * squares[1]).sum()
    return float(np.log(len(r) ** 2 * joint / (squares[0].sum() * squares[1].sum())))


def differentiable_information(r: Tensor, z: Tensor) -> Tensor:
    gram_r, gram_z = (F.normalize(x) @ F.normalize(x).T for x in (r, z))
    joint = (gram_r.square() * gram_z.square()).sum()
    return (len(r) ** 2 * joint / (gram_r.square().sum() * gram_z.square().sum())).log()


def vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    loss = 25 * (z1 - z2).square().mean()
    for z in (z1, z2):
        centered = z - z.mean(dim=0)
        covariance = centered.T @ centered / (len(z) - 1)
        deviation = (covariance.diagonal() + 1e-4).sqrt()
        off_diagonal = covariance - torch.diag(covariance.diagonal())
        loss = loss + 25 * (1 - deviation).clamp(min=0).mean() + off_diagonal.square().sum() / z.shape[1]
    return loss


def nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    z = F.normalize(torch.cat([z1, z2]))
    n = len(z1)
    terms = []
    for i, similarity in enumerate(z @ z.T / 0.2):
        others = torch.cat([similarity[:i], similarity[i + 1 :]])
        terms.append(torch.logsumexp(others, dim=0) - similarity[(i + n) % (2 * n)])
    return torch.stack(terms).mean()


def steered_by_hand(kind: str, native: Tensor, r: list[Tensor], z: list[Tensor]) -> Tensor:
    pairs = list(combinations(range(len(z)), 2)) if len(z) > 1 else [(0, 0)]
    totals = []
    for i, j in pairs:
        decorrelation, uniformity = vicreg(z[i], z[j]), nt_xent(z[i], z[j])
        i_rz = differentiable_information(torch.cat([r[i], r[j]]), torch.cat([z[i], z[j]]))
        if kind == "sample_contrastive":
            uniformity = native
        elif kind == "dimension_contrastive":
            decorrelation = native
        total = (1 - ALPHA) * decorrelation + ALPHA * uniformity + GAMMA * ALPHA * i_rz
        totals.append(native + WEIGHT * total if kind == "other" else total)
    return torch.stack(totals).mean()


# What really happened, by hooks of the test.


@contextmanager
def hooked(module: nn.Module, names: tuple[str, ...]) -> Iterator[list[list[Any]]]:
    """The outputs of some submodules, call by call, as they are, graph and all."""
    calls: list[list[Any]] = [[] for _ in names]
    handles = [
        module.get_submodule(name).register_forward_hook(lambda _, __, output, heard=heard: heard.append(output))
        for name, heard in zip(names, calls, strict=True)
    ]
    yield calls
    for handle in handles:
        handle.remove()


def largest_crops(case: Case, calls: list[list[Any]]) -> tuple[Tensor, Tensor]:
    """R and Z of one step."""
    r = torch.cat([case.read_r(output) for output in calls[0]])
    z = torch.cat([case.read_z(output) for output in calls[1]])
    assert len(r) == len(z)
    first, last = case.kept
    return r[first:last], z[first:last]


class Recorder(Callback):
    """Rows of R and Z of each step."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.steps: list[tuple[np.ndarray, np.ndarray]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._hooks = hooked(pl_module, self.case.names)
        self._calls = self._hooks.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        r, z = largest_crops(self.case, self._calls)
        self.steps.append((r.detach().double().numpy(), z.detach().double().numpy()))
        self._hooks.__exit__(None, None, None)

    def rows(self, which: int) -> np.ndarray:
        return np.concatenate([step[which] for step in self.steps])


def assert_dynamics(logged: dict[str, Any], recorder: Recorder) -> None:
    expected = {
        "dynamics/H_R": math.log(effective_rank(recorder.rows(0))),
        "dynamics/ER_R": effective_rank(recorder.rows(0)),
        "dynamics/ER_Z": effective_rank(recorder.rows(1)),
        "dynamics/I_RZ": float(np.mean([information(r, z) for r, z in recorder.steps])),
        "dynamics/log_n": math.log(len(recorder.steps[0][0])),
    }
    assert {key: float(logged[key]) for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


@each_case
@pytest.mark.parametrize("observer", [monitoring, observing, steering])
def test_rank_and_information_are_those_of_the_students_own_pass(
    case: Case, observer: Callable[[Case], Callback]
) -> None:
    recorder = Recorder(case)
    used = fit(make(case), batches(case.crops, 3), observer(case), recorder)
    assert len(recorder.steps) == 3
    views = {"MSN": 1, "MAE": 1, "MoCo": 1}.get(case.make.__name__, 2)
    assert {len(r) for r, _ in recorder.steps} == {views * IMAGES}
    assert_dynamics(used.callback_metrics, recorder)


@each_case
@pytest.mark.parametrize("observer", [monitoring, observing])
def test_observing_changes_neither_weights_nor_random_numbers(
    case: Case, observer: Callable[[Case], Callback]
) -> None:
    after = []
    for callbacks in ([], [observer(case)]):
        module = make(case)
        before = {key: value.clone() for key, value in module.state_dict().items()}
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)
        fit(module, batches(case.crops, 2, shuffle=True), *callbacks, max_epochs=2)
        after.append((module, torch.get_rng_state(), np.random.get_state(), random.getstate()))
        assert any(not torch.equal(before[key], value) for key, value in module.state_dict().items())
    (plain, *states), (observed, *observed_states) = after
    assert_same_weights(plain, observed)
    for (name, x), (_, y) in zip(plain.named_buffers(), observed.named_buffers(), strict=True):
        # lightly leaves the pointer into an empty memory bank unset.
        assert torch.equal(x, y) or name.endswith("bank_ptr")
    assert torch.equal(states[0], observed_states[0])
    assert np.array_equal(states[1][1], observed_states[1][1])
    assert states[1][2:] == observed_states[1][2:]
    assert states[2] == observed_states[2]
    assert [(name, x.training) for name, x in plain.named_modules()] == [
        (name, x.training) for name, x in observed.named_modules()
    ]
    assert [x.requires_grad for x in plain.parameters()] == [x.requires_grad for x in observed.parameters()]


@contextmanager
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class OneStep(Callback):
    """Seeds the step, and notes the gradients that reach the optimizer."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(5)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.gradients = gradients_of(pl_module)


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def gradients_by_hand(case: Case, *, steered: bool) -> tuple[dict[str, Tensor], float, float]:
    """Of one step of a module that no callback has seen: gradients, its own loss, and the loss minimized."""
    module = make(case).double()
    views, *rest = next(iter(batches(case.crops, 1)))
    batch = [[view.double() for view in views], *rest]
    with double_precision(), hooked(module, (*case.names, *(case.momentum or ()))) as calls:
        torch.manual_seed(5)
        outputs = module.training_step(batch, 0)
    native = outputs["loss"] if isinstance(outputs, dict) else outputs
    r, z = (list(x.split(IMAGES)) for x in largest_crops(case, calls))
    for x, later in zip((r, z), calls[2:], strict=False):
        x += [as_rows(output).detach() for output in later]
    total = steered_by_hand(case.native_loss, native, r, z) if steered else native
    total.backward()
    module.on_after_backward()
    return gradients_of(module), native.item(), total.item()


def farthest(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest difference of gradients, as a part of the largest gradient."""
    assert first.keys() == second.keys()
    scale = max(float(x.abs().max()) for x in first.values())
    return max(float((first[name] - second[name]).abs().max()) for name in first) / scale


@each_case
def test_a_steered_step_has_the_gradients_of_the_formula(case: Case) -> None:
    step = OneStep()
    used = fit(make(case), batches(case.crops, 1), steering(case), step, precision="64-true")
    by_hand, native, total = gradients_by_hand(case, steered=True)
    assert farthest(step.gradients, by_hand) < 1e-6
    logged = {key: float(value) for key, value in used.callback_metrics.items()}
    assert logged["loss/native"] == pytest.approx(native, rel=1e-5)
    assert logged["loss/total"] == pytest.approx(total, rel=1e-5)
    assert logged["balance/alpha"] == pytest.approx(ALPHA)
    assert logged["balance/beta"] == pytest.approx(GAMMA * ALPHA)


@each_case
def test_an_observed_step_has_the_gradients_of_the_module_and_logs_what_steering_would(case: Case) -> None:
    step = OneStep()
    used = fit(make(case), batches(case.crops, 1), observing(case), step, precision="64-true")
    own, native, _ = gradients_by_hand(case, steered=False)
    by_hand, _, total = gradients_by_hand(case, steered=True)
    assert farthest(step.gradients, own) < 1e-12
    assert farthest(own, by_hand) > 1e-3
    assert float(used.callback_metrics["loss/native"]) == pytest.approx(native, rel=1e-5)
    assert float(used.callback_metrics["loss/total"]) == pytest.approx(total, rel=1e-5)


# What is left behind.


class CrashError(Exception):
    """Somebody's bug."""


class CrashInHead(Callback):
    """The head fails in the middle of a step."""

    def __init__(self, case: Case, step: int) -> None:
        self.name = case.names[1]
        self.step = step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        def crash(*_: Any) -> None:
            handle.remove()
            raise CrashError

        if batch_idx == self.step:
            handle = pl_module.get_submodule(self.name).register_forward_pre_hook(crash)


def hooks_of(module: nn.Module) -> dict[str, list[Any]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        name: [hook for kind in kinds for hook in vars(x)[kind].values()] for name, x in module.named_modules()
    }


@each_case
@pytest.mark.parametrize("crash", [None, 0, 1], ids=["no crash", "crash in step 0", "crash in step 1"])
def test_a_fit_leaves_neither_hooks_nor_another_training_step(case: Case, crash: int | None) -> None:
    module = make(case)
    before = hooks_of(module)
    during: list[bool] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            tapped = any(pl_module.get_submodule(name)._forward_hooks for name in case.names)
            during.append("training_step" in vars(pl_module) and (tapped or case is CASES["keys of the outputs"]))

    callbacks = [steering(case), DimensionMonitor(**case.sources, name="beside"), Look()]
    if crash is None:
        fit(module, batches(case.crops, 2), *callbacks)
    else:
        with pytest.raises(CrashError):
            fit(module, batches(case.crops, 2), *callbacks, CrashInHead(case, crash))
    assert during == [True] * (2 if crash is None else crash + 1)
    assert hooks_of(module) == before
    assert "training_step" not in vars(module)
    fresh = make(case)
    fresh.load_state_dict(module.state_dict())
    for buffer, trained in zip(fresh.buffers(), module.buffers(), strict=True):
        buffer.copy_(trained)  # a memory bank is no part of the state
    losses = []
    for x in (module, fresh):
        torch.manual_seed(5)
        outputs = x.training_step(next(iter(batches(case.crops, 1))), 0)
        losses.append(outputs["loss"] if isinstance(outputs, dict) else outputs)
    assert losses[0].item() == losses[1].item()


def test_a_module_is_steered_again_in_a_second_fit_after_a_crash() -> None:
    case = CASES["SimCLR"]
    module, callback = make(case), steering(case)
    with pytest.raises(CrashError):
        fit(module, batches(case.crops, 2), callback, CrashInHead(case, 1))
    recorder = Recorder(case)
    used = fit(module, batches(case.crops, 2), steering(case), recorder)
    assert_dynamics(used.callback_metrics, recorder)
    assert float(used.callback_metrics["loss/total"]) != float(used.callback_metrics["loss/native"])


# Manual optimization.


def by_hand_case(**options: Any) -> Case:
    return Case(lambda: modules.ByHand(**options), "sample_contrastive")


def test_the_loss_of_a_module_that_optimizes_by_hand_cannot_be_steered() -> None:
    case = by_hand_case()
    module = make(case)
    before = hooks_of(module)
    with pytest.raises(ValueError, match=r"ByHand optimizes by hand .* observe=True"):
        fit(module, batches(case.crops, 2), steering(case))
    assert hooks_of(module) == before
    assert "training_step" not in vars(module)


@pytest.mark.parametrize("silent", [False, True], ids=["returns the loss", "returns nothing"])
def test_a_module_that_optimizes_by_hand_is_observed(silent: bool) -> None:
    case = by_hand_case(silent=silent)
    recorder = Recorder(case)
    module, plain = make(case), make(case)
    used = fit(module, batches(case.crops, 3), observing(case), recorder)
    fit(plain, batches(case.crops, 3))
    assert_same_weights(module, plain)
    logged = {key: float(value) for key, value in used.callback_metrics.items()}
    assert_dynamics(logged, recorder)
    assert {"balance/alpha", "balance/beta"} <= logged.keys()
    assert ("loss/total" in logged) is not silent
    if not silent:
        rows = [tuple(torch.from_numpy(x) for x in step) for step in recorder.steps]
        # The module's own loss is lightly's NT-Xent, of temperature 0.5.
        native, total = [], []
        for r, z in rows:
            z1, z2 = F.normalize(z).chunk(2)
            logits = torch.cat([z1, z2]) @ torch.cat([z1, z2]).T / 0.5
            logits.fill_diagonal_(-math.inf)
            native.append(F.cross_entropy(logits, torch.arange(2 * IMAGES).roll(IMAGES)))
            total.append(steered_by_hand(case.native_loss, native[-1], [*r.chunk(2)], [*z.chunk(2)]))
        assert logged["loss/native"] == pytest.approx(float(torch.stack(native).mean()), rel=1e-5)
        assert logged["loss/total"] == pytest.approx(float(torch.stack(total).mean()), rel=1e-5)


class Progress(Callback):
    """Alpha that a linear schedule from 0 to 1 gave in each batch."""

    def __init__(self, steering: AdaDim) -> None:
        self.steering = steering
        self.alphas: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.alphas.append(float(self.steering.objective.alpha))


@pytest.mark.parametrize("length", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 16}], ids=str)
def test_progress_with_two_optimizers_by_hand_runs_from_zero_to_one(length: dict[str, int]) -> None:
    case = by_hand_case()
    callback = AdaDim(observe=True, balance=Balance(LinearSchedule(0.0, 1.0)))
    progress = Progress(callback)
    used = fit(make(case), batches(case.crops, 4), callback, progress, **length)
    assert used.global_step == 16  # two optimizers, eight batches
    assert progress.alphas == pytest.approx([i / 8 for i in range(8)])
    assert float(used.callback_metrics["balance/alpha"]) == pytest.approx(7 / 8)


# Names.


def colors(module: LightningModule, batch: Any, outputs: Any) -> list[Tensor]:
    return [view.mean(dim=(2, 3)) for view in batch[0]]


@pytest.mark.parametrize(
    "representation",
    ["backbone[pooler_output]", "backbone.layernorm", colors],
    ids=["an entry", "a part", "a function"],
)
def test_the_projection_of_patches_within_a_backbone_is_not_taken_for_the_head(representation: Any) -> None:
    case = CASES["Hugging Face, pooler"]
    recorder = Recorder(case)
    used = fit(make(case), batches(case.crops, 2), DimensionMonitor(representation, pool="class"), recorder)
    er_z = effective_rank(recorder.rows(1))
    assert float(used.callback_metrics["dynamics/ER_Z"]) == pytest.approx(er_z, rel=1e-4)


# What cannot be found is listed.

ASKED = [
    pytest.param(lambda **sources: DimensionMonitor(**sources), id="monitor"),
    pytest.param(lambda **sources: AdaDim(**sources, native_loss="other"), id="steering"),
]


@pytest.mark.parametrize("ask", ASKED)
@pytest.mark.parametrize(
    ("make_module", "sources", "crops", "error", "said"),
    [
        pytest.param(
            modules.MAE,
            {},
            (32,),
            ValueError,
            [
                "which submodule is the projection head? none was found by its name; give embedding=...",
                "backbone.vit.norm: (8, 9, 16)",
                "decoder: (8, 17, 12)",
                "prediction_head: (8, 8, 192)",
            ],
            id="no head by its name",
        ),
        pytest.param(
            modules.MAE,
            {"embedding": "decoder", "pool": "mean"},
            (32,),
            RuntimeError,
            ["'backbone' was not called in this step", "backbone.vit.norm: (8, 9, 16)"],
            id="encode instead of forward",
        ),
        pytest.param(
            modules.ViTByFeatures,
            {},
            (32, 32),
            RuntimeError,
            ["'backbone' was not called in this step", "backbone.norm: (8, 17, 16), 2 calls"],
            id="forward_features instead of forward",
        ),
        pytest.param(
            modules.TwoTowers,
            {},
            (32, 32),
            ValueError,
            [
                "which submodule is the backbone? 2 were found: left.backbone, right.backbone",
                "left.backbone: (8, 16, 1, 1)",
                "right.head: (8, 12)",
            ],
            id="two backbones",
        ),
        pytest.param(
            modules.TwoTowers,
            {"representation": "left.backbone"},
            (32, 32),
            ValueError,
            ["which submodule is the projection head? 2 were found: left.head, right.head", "left.head: (8, 12)"],
            id="two heads",
        ),
        pytest.param(
            modules.HuggingFaceViT,
            {},
            (32, 32),
            ValueError,
            [
                "'backbone' put out 2 tensors; name one of them",
                "'backbone[last_hidden_state]' (8, 17, 16), 'backbone[pooler_output]' (8, 16)",
                "backbone: [last_hidden_state] (8, 17, 16) [pooler_output] (8, 16), 2 calls",
            ],
            id="an object without a key",
        ),
        pytest.param(
            modules.HuggingFaceViT,
            {"representation": "backbone[pooled]"},
            (32, 32),
            ValueError,
            ["'backbone' put out no 'pooled' but", "'backbone[pooler_output]' (8, 16)"],
            id="an object with a wrong key",
        ),
        pytest.param(
            modules.HuggingFaceViT,
            {"representation": "backbone[last_hidden_state]"},
            (32, 32),
            ValueError,
            ["'backbone[last_hidden_state]' must put out rows (N, d)", "(8, 17, 16)", 'pool="class" or "mean"'],
            id="tokens of an object without a pool",
        ),
        pytest.param(
            modules.ViTOfTokens,
            {},
            (32, 32),
            ValueError,
            ["'backbone' must put out rows (N, d), got (8, 17, 16)", 'pool="class" or "mean"'],
            id="tokens without a pool",
        ),
        pytest.param(
            modules.ReturnsDictionary,
            {"representation": "embeddings", "embedding": "projection"},
            (32, 32),
            ValueError,
            ["no submodule named 'embeddings'", "no such entry but loss, embedding, projection"],
            id="a wrong key of the outputs",
        ),
        pytest.param(
            modules.SimCLR,
            {"representation": "embedding", "embedding": "projection"},
            (32, 32),
            ValueError,
            ["no submodule named 'embedding'", "returned no such entry", "backbone: (8, 16, 1, 1)"],
            id="a key of a bare loss",
        ),
    ],
)
def test_the_error_lists_what_there_is(
    ask: Callable[..., Callback],
    make_module: Callable[[], LightningModule],
    sources: dict[str, str],
    crops: tuple[int, ...],
    error: type[Exception],
    said: list[str],
) -> None:
    module = make_module()
    before = hooks_of(module)
    with pytest.raises(error) as raised:
        fit(module, batches(crops, 1), ask(**sources))
    for part in said:
        assert part in str(raised.value)
    assert hooks_of(module) == before
    assert "training_step" not in vars(module)


@pytest.mark.parametrize("name", ["sample_contrastive", "dimension_contrastive"])
def test_a_student_of_one_view_without_its_momentum_branch_is_an_error(name: str) -> None:
    case = CASES["MoCo"]
    with pytest.raises(ValueError, match=r"the student sees one view of each image.*momentum=\(\.\.\.\)"):
        fit(make(case), batches(case.crops, 1), AdaDim(native_loss=name))
