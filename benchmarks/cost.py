"""What AdaDim costs: time of a training step, where it goes, memory, and whether cheaper spectra would help.

Run it by ``uv run python benchmarks/cost.py [--json FILE] [--blocks N] [--quick]``.

All contenders train one model, torchvision's ResNet-18 with its own stem and a head of adadim-train, on the same
two views of each image, which are made beforehand and lie on the device, through Lightning's Trainer. Views would
make every step longer and AdaDim's part of it smaller. What is said to be as in adadim-train is made from its
configuration files. All of them push both views through the model in one call, so that only the loss differs.

- Race: each contender's Trainer waits in a thread of its own for its turn. A turn is one step on a CPU, and on a
  GPU as many steps as lie between two readings, so that the device is not stopped at each of them. A round has one
  turn of each. Times are divided by that of the bare VICReg in the same round, which takes out what the machine
  does meanwhile. A cycle is the steps from one reading to the next; its length is made of the medians over the
  steps of each kind (ordinary, with gradients compared for kappa, with a reading), each as often as it
  occurs. Intervals are of a bootstrap over the rounds. On a CPU contenders that only illustrate take part in every
  fourth round; and with glibc memory is kept, rather than given back to the system and asked for again at each
  step, which moves the steps of a contender by several percent, by where its memory happens to lie.
- Rebuilt: on a CPU, AdaDim and `objective=vicreg` alone, built anew again and again; with memory kept, and as
  glibc has it. How much do their ratios vary, which no interval of one race can tell?
- Parts: the same step in stages, one after the other, each with its backward pass.
- Memory: each contender in a process of its own; what the process needed at most, and how much of it came with
  the training.
- Spectra: the exact effective rank beside two randomized estimates.
"""

import argparse
import json
import logging
import math
import os
import platform
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median, stdev
from typing import Any

import lightning
import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markdown import Markdown
from scipy.fft import dct
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from adadim_lightning import AdaDimModule
from adadim_lightning.callbacks.monitor import _information, rank_of_eigenvalues
from adadim_lightning.cli.app import config_dir
from adadim_lightning.functional import (
    eigenvalue_spectrum,
    nt_xent_loss,
    vicreg_loss,
)
from adadim_lightning.functional._relations import nt_xent_and_information
from adadim_lightning.metrics.window import PendingSteps, RecentRows, Step
from adadim_lightning.models import representation_dim
from adadim_lightning.objective import MATCH_EVERY
from adadim_lightning.report.dynamics import BLUE, GREEN, GREY, ORANGE, RED
from adadim_lightning.report.statistics import paired_difference
from adadim_lightning.report.style import style_of

COMMAND = "python benchmarks/cost.py"
RESULT = "benchmarks/results/cost.json"
KEPT_MEMORY = {  # glibc's settings: one arena for all threads, nothing by mmap, nothing given back
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}
GOALS = {"cpu": 0.03, "cuda": 0.05}
CONFIDENCE, DRAWS = 0.95, 1000  # of the bootstrap
WORTH = 0.01  # of the step: what a faster estimate has to save to be worth its error
TEMPERATURE = 0.2  # of NT-Xent, for all
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Settings:
    """How large everything is.

    Attributes:
        overrides: of adadim-train, for all contenders.
        heads: options of its group ``head``, with overrides; the first is the one that it takes by default.
        size: side of the images.
        blocks: cycles of the race, for each head.
        steps_a_turn: None is a cycle.
        warm_up: turns that are not timed.
        others_every: rounds from one turn to the next of a contender that only illustrates.
        cycles_of_parts: readings in the measurement of the parts, of which the first is not timed.
        dims: numbers of dimensions of the spectra.
        rows: number of rows behind each.
        repeats: of each spectrum, on each number of dimensions.
        memory: contenders whose memory is measured, for each head.
        apart: in processes of their own.
        rebuilt: pairs that are built anew; on a CPU.
    """

    overrides: tuple[str, ...]
    heads: Mapping[str, tuple[str, ...]]
    size: int
    blocks: Mapping[str, int]
    steps_a_turn: int | None
    warm_up: int
    others_every: int
    cycles_of_parts: int
    dims: tuple[int, ...]
    rows: int
    repeats: Callable[[int], int]
    memory: Mapping[str, tuple[str, ...]]
    apart: bool
    rebuilt: int


def on_gpu() -> bool:
    return torch.cuda.is_available()


def full_settings(blocks: int | None = None) -> Settings:
    gpu = on_gpu()
    return Settings(
        overrides=("data=cifar10", "backbone=resnet18"),
        heads={"mlp": (), "vicreg": ()},
        size=32,
        blocks={
            "mlp": blocks or (20 if gpu else 4),
            "vicreg": (blocks + 1) // 2 if blocks else (10 if gpu else 2),
        },
        steps_a_turn=None if gpu else 1,
        warm_up=1 if gpu else 3,
        others_every=1 if gpu else 4,
        cycles_of_parts=3,
        dims=(128, 512, 2048, 4096),
        rows=4096,
        repeats=lambda d: 7 if d <= 512 else 3 if gpu else 2 if d <= 2048 else 1,
        memory={"mlp": tuple(ARMS), "vicreg": ("adadim", "vicreg_plain", "lightly_vicreg")},
        apart=not gpu,  # what a GPU has handed out can be counted anew
        rebuilt=12,
    )


def quick_settings(blocks: int | None = None) -> Settings:
    """Everything once, tiny: to see whether it runs."""
    cycle = [
        f"{place}.{key}" for place in ("callbacks.adadim", "balance") for key in ("every_n_steps=10", "window=32")
    ]
    model = ["backbone=small_convnet", "backbone.channels=[4,8]", "data.batch_size=8", "head.hidden_dim=16"]
    return Settings(
        overrides=("data=cifar10", *model, *cycle),
        heads={"mlp": ("head.out_dim=8",), "vicreg": ("head.out_dim=24",)},
        size=8,
        blocks={"mlp": blocks or 2, "vicreg": 1},
        steps_a_turn=None if on_gpu() else 1,
        warm_up=1,
        others_every=1,
        cycles_of_parts=2,
        dims=(16, 64),
        rows=96,
        repeats=lambda d: 2,
        memory={"mlp": ("adadim", "vicreg_plain")},
        apart=False,  # a new process takes longer than all the rest
        rebuilt=2,
    )


# The contenders.


def lightly_vicreg() -> Callable[[Tensor, Tensor], Tensor]:
    from lightly.loss import VICRegLoss

    return VICRegLoss()


def lightly_simclr() -> Callable[[Tensor, Tensor], Tensor]:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=TEMPERATURE)


def plain_simclr(z1: Tensor, z2: Tensor) -> Tensor:
    return nt_xent_loss(z1, z2, temperature=TEMPERATURE)


@dataclass(frozen=True)
class Arm:
    """A contender.

    Attributes:
        title: what it is.
        objective: option of adadim-train's group, for an ``AdaDimModule``.
        measured: whether adadim-train's callback is there.
        make_loss: of a bare module, in the place of the objective.
        wide: whether it takes part with the second head too.
        every_round: or now and then.
    """

    title: str
    objective: str = "adadim"
    measured: bool = False
    make_loss: Callable[[], Callable[[Tensor, Tensor], Tensor]] | None = None
    wide: bool = True
    every_round: bool = True


REFERENCE = "vicreg_plain"
ARMS = {
    "adadim": Arm("AdaDim, as `adadim-train` has it", measured=True),
    "vicreg": Arm("VICReg, as `adadim-train objective=vicreg` has it", "vicreg", measured=True),
    "vicreg_module": Arm("the same without the callback that measures", "vicreg", wide=False),
    REFERENCE: Arm("VICReg alone, in a bare LightningModule", make_loss=lambda: vicreg_loss),
    "simclr_plain": Arm("SimCLR alone, likewise", make_loss=lambda: plain_simclr, wide=False, every_round=False),
    "lightly_vicreg": Arm("lightly's VICRegLoss, likewise", make_loss=lightly_vicreg, every_round=False),
    "lightly_simclr": Arm(
        "lightly's NTXentLoss, likewise", make_loss=lightly_simclr, wide=False, every_round=False
    ),
}


class Plain(LightningModule):
    """A module with a loss and nothing else: nothing is logged, measured or guarded."""

    def __init__(self, backbone: nn.Module, head: nn.Module, loss: Any, optimizer: Any) -> None:
        super().__init__()
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.projection_head = head
        self.loss = loss
        self._optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (view1, view2), _ = batch
        images = torch.cat([view1, view2]).to(memory_format=torch.channels_last)
        z1, z2 = self.projection_head(self.backbone(images)).chunk(2)
        loss: Tensor = self.loss(z1, z2)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self._optimizer(self.parameters())
        return optimizer


@cache
def _config(overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", list(overrides))


def config_of(settings: Settings, head: str, objective: str = "adadim", *more: str) -> DictConfig:
    """The configuration of adadim-train."""
    return _config((*settings.overrides, f"head={head}", f"objective={objective}", *settings.heads[head], *more))


def device_of() -> torch.device:
    return torch.device("cuda" if on_gpu() else "cpu")


def cpu_threads() -> str:
    count = torch.get_num_threads()
    return f"{count} CPU thread{'' if count == 1 else 's'}"


def precision() -> str:
    return "bf16-mixed" if on_gpu() and torch.cuda.is_bf16_supported() else "32-true"


def model_of(settings: Settings, config: DictConfig) -> tuple[nn.Module, nn.Module]:
    """Backbone and head, the same whoever trains them."""
    torch.manual_seed(0)
    backbone = instantiate(config.backbone, _convert_="all")
    width = representation_dim(backbone, torch.zeros(3, settings.size, settings.size))
    return backbone, instantiate(config.head, _convert_="all")(width)


def build(settings: Settings, head: str, name: str, *more: str) -> tuple[LightningModule, list[Callback]]:
    """The module of a contender, and its callbacks."""
    arm = ARMS[name]
    config = config_of(settings, head, arm.objective, *more)
    backbone, projection_head = model_of(settings, config)
    optimizer = instantiate(config.optimizer, _convert_="all")
    if arm.make_loss is not None:
        return Plain(backbone, projection_head, arm.make_loss(), optimizer), []
    objective = instantiate(config.objective, _convert_="all")
    module = AdaDimModule(
        backbone, projection_head, objective, optimizer, channels_last=bool(config.channels_last)
    )
    return module, [instantiate(config.callbacks.adadim, _convert_="all")] if arm.measured else []


class Batches(Dataset[Any]):
    """A few batches of noise on the device, again and again: the pixels do not matter here."""

    def __init__(self, settings: Settings, config: DictConfig, steps: int = 10**6) -> None:
        shape = (8, 2, config.data.batch_size, 3, settings.size, settings.size)
        generator = torch.Generator().manual_seed(1)
        self.views = torch.randn(shape, generator=generator).to(device_of())
        self.labels = torch.zeros(config.data.batch_size, dtype=torch.long, device=device_of())
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, ...], Tensor]:
        return tuple(self.views[index % len(self.views)]), self.labels


def trainer_of(callbacks: list[Callback], **limits: Any) -> Trainer:
    return Trainer(
        accelerator="gpu" if on_gpu() else "cpu",
        devices=1,
        max_epochs=1,
        precision=precision(),  # type: ignore[arg-type]
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **limits,
    )


def quieten() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")


def now() -> float:
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


# The race.


class Turn(Callback):
    """Holds the training at the beginning of a turn until it may go on.

    It stands before all other callbacks, so that a turn ends when everything of its last step is done and the next
    batch is there.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.taken = 0
        self.last = False
        self.may_go = threading.Semaphore(0)
        self.waits = threading.Semaphore(0)

    def on_train_batch_start(self, trainer: Trainer, *others: Any) -> None:
        if self.taken % self.steps == 0:
            self.waits.release()
            self.may_go.acquire()
            trainer.should_stop = self.last
        self.taken += 1


class Racer:
    """A contender whose fit goes on turn by turn."""

    def __init__(self, settings: Settings, head: str, name: str, batches: Batches, steps_a_turn: int) -> None:
        self.name = name
        self.module, callbacks = build(settings, head, name)
        self._turn = Turn(steps_a_turn)
        self._trainer = trainer_of([self._turn, *callbacks])
        self._batches = batches
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()
        self._wait()

    def _fit(self) -> None:
        try:
            self._trainer.fit(self.module, DataLoader(self._batches, batch_size=None))
        except BaseException as error:  # for the main thread, whatever it is
            self._error = error
        finally:
            self._turn.waits.release()

    def _wait(self) -> None:
        self._turn.waits.acquire()
        if self._error is not None:
            raise self._error

    def turn(self) -> float:
        """Seconds of a turn."""
        start = now()
        self._turn.may_go.release()
        self._wait()
        return now() - start

    def end(self) -> None:
        """One more turn, untimed, and the end of the fit."""
        self._turn.last = True
        self._turn.may_go.release()
        self._thread.join()
        if self._error is not None:
            raise self._error


def kind_of(step: int, config: DictConfig) -> str:
    if (step + 1) % config.callbacks.adadim.every_n_steps == 0:
        return "reading"
    return "matched" if step % MATCH_EVERY == 0 else "ordinary"


def kinds_of_a_cycle(config: DictConfig) -> dict[str, int]:
    """How many of the steps from one reading to the next are of which kind."""
    kinds = [kind_of(step, config) for step in range(config.callbacks.adadim.every_n_steps)]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def cycle_lengths(relative: Mapping[str, Array], cycle: Mapping[str, int], measured: Array) -> Array:
    """Mean length of a step over a cycle, of each contender.

    Args:
        relative: for each kind of step, times ``(contenders, ..., rounds)`` over that of the reference in the same
            round; NaN where a contender had no turn.
        cycle: how many steps of a cycle are of which kind.
        measured: which contenders measure; for the others all steps are of one kind.
    """
    total = sum(cycle.values())
    by_kind = sum(count / total * np.nanmedian(relative[kind], axis=-1) for kind, count in cycle.items())
    together = np.nanmedian(np.concatenate([relative[kind] for kind in cycle], axis=-1), axis=-1)
    return np.where(measured.reshape(-1, *[1] * (together.ndim - 1)), by_kind, together)


def compare(
    seconds: Mapping[str, Sequence[float]], kinds: Sequence[str], cycle: Mapping[str, int], steps_a_turn: int
) -> dict[str, Any]:
    """Length of a step of each contender, and how much longer AdaDim's is than each."""
    names = list(seconds)
    times = np.array([seconds[name] for name in names], dtype=float)
    reference = times[names.index(REFERENCE)]
    measured = np.array([ARMS[name].measured for name in names])
    of_kind = {kind: (times / reference)[:, np.array(kinds) == kind] for kind in cycle}
    random = np.random.default_rng(0)
    # Rounds drawn with replacement, the same for all contenders, and as many of each kind as there are.
    drawn = {kind: x[:, random.integers(x.shape[1], size=(DRAWS, x.shape[1]))] for kind, x in of_kind.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a draw may leave out a contender that has few turns
        lengths, draws = (cycle_lengths(x, cycle, measured) for x in (of_kind, drawn))
        overhead, overheads = (x[names.index("adadim")] / x - 1 for x in (lengths, draws))
        low, high = np.nanquantile(overheads, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=1)
    unit = 1000 * float(np.median(reference)) / steps_a_turn
    found = {}
    for i, name in enumerate(names):
        found[name] = {"step_ms": unit * float(lengths[i]), "turns": int(np.isfinite(times[i]).sum())}
        if name != "adadim":
            found[name] |= {"overhead": float(overhead[i]), "low": float(low[i]), "high": float(high[i])}
    return found


def race(settings: Settings, head: str) -> dict[str, Any]:
    """Steps of all contenders in turns."""
    config = config_of(settings, head)
    cycle_steps = int(config.callbacks.adadim.every_n_steps)
    steps_a_turn = settings.steps_a_turn or cycle_steps
    rounds = settings.blocks[head] * cycle_steps // steps_a_turn
    batches = Batches(settings, config)
    names = [name for name, arm in ARMS.items() if arm.wide or head == next(iter(settings.heads))]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    kinds: list[str] = []
    racers: list[Racer] = []
    order = np.random.default_rng(0)
    try:
        racers += (Racer(settings, head, name, batches, steps_a_turn) for name in names)
        for _ in range(settings.warm_up):
            for racer in racers:
                racer.turn()
        for number in range(rounds):
            turn = settings.warm_up + number  # of those that have one in every round
            kinds.append(kind_of(turn, config) if steps_a_turn == 1 else "cycle")
            # At random, for what one leaves behind, in a cache or in the allocator, is felt by the next.
            for racer in (racers[i] for i in order.permutation(len(racers))):
                takes_part = ARMS[racer.name].every_round or number % settings.others_every == 0
                seconds[racer.name].append(racer.turn() if takes_part else math.nan)
    finally:
        for racer in racers:
            racer.end()
    cycle = kinds_of_a_cycle(config) if steps_a_turn == 1 else {"cycle": 1}
    return {
        "d_r": int(racers[0].module.projection_head[0].in_features),  # type: ignore[index]
        "d_z": int(racers[0].module.projection_head[-1].out_features),  # type: ignore[index]
        "layers": int(config.head.layers),
        "rounds": rounds,
        "steps_a_turn": steps_a_turn,
        "cycle": cycle,
        "kinds": kinds,
        "arms": compare(seconds, kinds, cycle, steps_a_turn),
        "seconds": {name: [None if math.isnan(x) else x for x in xs] for name, xs in seconds.items()},
    }


REBUILT_ROUNDS = 10


def rebuilt_pairs(settings: Settings) -> list[float]:
    """By how much a step of AdaDim is longer than one of ``objective=vicreg``, of each pair that is built anew.

    The head is the default one; the steps are ordinary ones.
    """
    head = next(iter(settings.heads))
    batches = Batches(settings, config_of(settings, head))
    found = []
    for number in range(settings.rebuilt):
        racers: list[Racer] = []
        seconds: dict[str, list[float]] = {"adadim": [], "vicreg": []}
        try:
            racers += (Racer(settings, head, name, batches, 1) for name in seconds)
            for turn in range(settings.warm_up + REBUILT_ROUNDS):
                for racer in racers[:: -1 if (turn + number) % 2 else 1]:
                    taken = racer.turn()
                    if turn >= settings.warm_up:
                        seconds[racer.name].append(taken)
        finally:
            for racer in racers:
                racer.end()
        found.append(median(seconds["adadim"]) / median(seconds["vicreg"]) - 1)
    return found


def rebuilt(settings: Settings) -> dict[str, Any] | None:
    """The same in processes of their own, with memory kept and as glibc has it."""
    if on_gpu():
        return None
    found = {}
    for name, environment in (("kept", KEPT_MEMORY), ("given_back", {})):
        pairs = apart("--rebuilt", environment=environment) if settings.apart else rebuilt_pairs(settings)
        mean = paired_difference(list(enumerate(pairs)), [(i, 0.0) for i in range(len(pairs))])
        assert mean is not None
        found[name] = {"pairs": pairs, **asdict(mean), "sd": stdev(pairs)}
    return found


def apart(*options: str, environment: Mapping[str, str]) -> Any:
    """What this script prints with such options, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), *options]
    others = {name: value for name, value in os.environ.items() if name not in KEPT_MEMORY}
    settings = {**others, **environment, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=settings, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# The parts of a step.

VIEWS = "views"
PARTS = {
    VIEWS: "two views of each image",
    "backbone": "backbone",
    "head": "projection head",
    "decorrelation": "VICReg",
    "relations": "NT-Xent and I(R;Z)",
    "matching": "comparison of gradients, on average",
    "guard": "watch for NaN in loss and gradients",
    "optimizer": "optimizer",
    "keeping": "copies of R and Z",
    "measuring": "measuring of the window, on average",
    "reading": "spectra of a reading, on average",
}
ADDED = ("relations", "matching", "keeping", "measuring", "reading")  # to a step of VICReg


class Laps:
    """Seconds of each part of a step; a part may have several laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = now()

    def __call__(self, part: str) -> None:
        at = now()
        self.seconds[part] = self.seconds.get(part, 0.0) + at - self._last
        self._last = at


class Stages:
    """A training step of AdaDim taken apart; its gradients are those of the whole."""

    def __init__(self, settings: Settings, head: str) -> None:
        self.config = config_of(settings, head)
        module, _ = build(settings, head, "adadim")
        assert isinstance(module, AdaDimModule)
        self.module = module.to(device_of())
        self.objective = module.objective
        self.objective.set_balance(0.5)  # no part is multiplied by zero
        self.optimizer = module.configure_optimizers()
        self.views = instantiate(self.config.views, _convert_="all")
        generator = torch.Generator().manual_seed(2)
        shape = (self.config.data.batch_size, 3, settings.size, settings.size)
        self.images = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device_of())
        callback = self.config.callbacks.adadim
        self.pending = PendingSteps(callback.window)
        self.recent = [RecentRows(callback.window) for _ in range(2)]

    def gradients(self, view1: Tensor, view2: Tensor, lap: Callable[[str], None]) -> tuple[Tensor, Tensor, Tensor]:
        """Leave the gradients of the objective in the weights; the loss, R and Z."""
        module, objective = self.module, self.objective
        with torch.autocast(device_of().type, torch.bfloat16, enabled="bf16" in precision()):
            r_of_backbone = module(torch.cat([view1, view2]))
            lap("backbone")
            r = r_of_backbone.detach().requires_grad_()
            z_of_head = module.projection_head(r)
            lap("head")
        z = z_of_head.detach().float().requires_grad_()
        alpha, beta, kappa = objective.alpha, objective.beta, objective.kappa
        loss = (1 - alpha) * vicreg_loss(*z.chunk(2))
        loss.backward()
        lap("decorrelation")
        uniformity, information = nt_xent_and_information(r.float(), z, objective.temperature)
        relations = alpha * kappa * uniformity + beta * information
        relations.backward()
        loss = (loss + relations).detach()
        lap("relations")
        z_of_head.backward(z.grad.to(z_of_head.dtype))  # type: ignore[union-attr]
        lap("head")
        r_of_backbone.backward(r.grad)
        lap("backbone")
        return loss, r.detach(), z_of_head.detach()

    def match(self, z: Tensor, lap: Callable[[str], None]) -> None:
        """Compare the gradients of decorrelation and uniformity at Z."""
        z1, z2 = z.float().chunk(2)
        z1, z2 = z1.requires_grad_(), z2.requires_grad_()
        parts = self.objective.parts(z1, z2, z1, z2)
        lap("")  # what the step has already
        self.objective._match_gradients(parts["decorrelation"], parts["uniformity"], (z1, z2))
        lap("matching")

    def step(self, *, read: bool) -> dict[str, float]:
        """Seconds of each part."""
        guard = self.module.guard
        lap = Laps()
        view1, view2 = self.views(self.images)
        lap(VIEWS)
        loss, r, z = self.gradients(view1, view2, lap)
        self.match(z, lap)
        guard.watch(loss, 0)
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        guard.watch(torch.nn.utils.get_total_norm(gradients), 0)
        if not on_gpu():
            guard.check()
        lap("guard")
        if on_gpu():  # where nobody waits to hear of a NaN, the step is taken back instead
            self.module._step_unless_tripped(self.optimizer.step)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        lap("optimizer")
        r, z = r.clone(), z.clone()  # as the taps do
        self.pending.add(Step.of(0, [r], [z]))
        lap("keeping")
        if read:
            steps, _ = self.pending.take(r.device)
            for recent, rows in zip(
                self.recent, zip(*((x.step.r, x.step.z) for x in steps), strict=True), strict=True
            ):
                recent.update(torch.cat(rows))
            _information(steps)
            lap("measuring")
            for recent in self.recent:
                rank_of_eigenvalues(recent.read()[0], "singular")
            lap("reading")
        return lap.seconds


def parts_of_step(settings: Settings, head: str) -> dict[str, Any]:
    """Milliseconds of each part, and its share of the step."""
    stages = Stages(settings, head)
    cycle = kinds_of_a_cycle(stages.config)
    steps = sum(cycle.values())
    callback = stages.config.callbacks.adadim
    window = math.ceil(callback.window / (2 * stages.config.data.batch_size))  # in steps, all before a reading
    laps = [stages.step(read=(i + 1) % window == 0) for i in range(window * settings.cycles_of_parts)]
    laps = laps[window:]  # the first cycle was to warm up
    often = {"matching": 1 / MATCH_EVERY, "measuring": 1 / steps, "reading": 1 / steps}
    rows = {}
    for part in PARTS:
        once = 1000 * median([lap[part] for lap in laps if part in lap])
        rows[part] = {"once_ms": once, "ms": once * often.get(part, 1.0)}
    whole = sum(row["ms"] for row in rows.values())
    for row in rows.values():
        row["share"] = row["ms"] / whole
    before = whole - sum(rows[part]["ms"] for part in (VIEWS, *ADDED))
    return {
        "step_ms": whole,
        "rows": rows,
        # Both without views, as in the race.
        "added": sum(rows[part]["ms"] for part in ADDED) / before,
    }


# Memory.


def peak_memory(settings: Settings, head: str, name: str) -> dict[str, float]:
    """MiB that this process needed at most for a few steps with readings, and how many of them came with these."""
    # How much is kept does not depend on how often it is read.
    rows = 4 * int(config_of(settings, head).data.batch_size)
    often = [f"{x}.{y}" for x in ("callbacks.adadim", "balance") for y in ("every_n_steps=2", f"window={rows}")]
    module, callbacks = build(settings, head, name, *often)
    batches = Batches(settings, config_of(settings, head), steps=4)
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    before = memory_now("VmRSS")
    trainer_of(callbacks).fit(module, DataLoader(batches, batch_size=None))
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu() else memory_now("VmHWM")
    return {"peak_mib": peak, "training_mib": peak - before}


def memory_now(field: str) -> float:
    """MiB of this process.

    The largest is read from ``/proc`` where that is: what getrusage gives may be that of the process that started
    this one.
    """
    if on_gpu():
        return torch.cuda.memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024
    import resource

    unit = 2**20 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def memory(settings: Settings) -> dict[str, dict[str, dict[str, float]]]:
    """Peak memory of the contenders."""
    measure_one = peak_memory_apart if settings.apart else partial(peak_memory, settings)
    return {head: {name: measure_one(head, name) for name in names} for head, names in settings.memory.items()}


def peak_memory_apart(head: str, name: str, *options: str) -> dict[str, float]:
    """:func:`peak_memory` in a process of its own."""
    found: dict[str, float] = apart("--memory", head, name, *options, environment={})
    return found


# Spectra.

PROBES, LANCZOS_STEPS, DEFLATED, LOW_RANK = 16, 32, 64, 128
METHODS = {"exact": "exact", "lanczos": "stochastic Lanczos", "low_rank": "low rank and a flat tail"}
SPECTRA = {"decaying": 0.75, "isotropic": 0.0}  # power by which the singular values fall


def rows_with_spectrum(n: int, d: int, power: float, seed: int = 0) -> Tensor:
    """Random rows whose principal axes are those of no single dimension."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((n, d), dtype=np.float32) * np.arange(1, d + 1, dtype=np.float32) ** -power
    signs = random.choice(np.array([-1.0, 1.0], dtype=np.float32), size=d)
    # A cosine transform is orthogonal, and mixes all dimensions without a d x d matrix.
    return torch.from_numpy(np.ascontiguousarray(dct(x * signs, axis=1, norm="ortho")))


def exact_rank(x: Tensor) -> float:
    """As the callbacks take it: the second moment and its eigenvalues, in float64."""
    return rank_of_eigenvalues(eigenvalue_spectrum(x), "singular")


def low_rank_rank(x: Tensor, rank: int = LOW_RANK) -> float:
    """From the largest singular values; the rest of the squared norm is spread evenly over the others."""
    count = min(x.shape)
    rank = min(rank, count // 2)
    values = torch.svd_lowrank(x, q=rank, niter=2)[1].double()
    rest = (x.square().sum(dtype=torch.float64) - values.square().sum()).clamp_min(0.0) / (count - rank)
    p = torch.cat([values, rest.sqrt().expand(count - rank)])
    p = p / p.sum()
    return math.exp(float(-torch.xlogy(p, p).sum()))


@torch.no_grad()
def lanczos_rank(
    x: Tensor, *, probes: int = PROBES, steps: int = LANCZOS_STEPS, deflated: int = DEFLATED, seed: int = 0
) -> tuple[float, float]:
    r"""Effective rank by stochastic Lanczos quadrature, without the second moment.

    With :math:`G = X^\top X` the entropy is :math:`\ln a - b / a`, where :math:`a = \operatorname{tr} G^{1/2}` and
    :math:`b = \operatorname{tr}(G^{1/2} \ln G^{1/2})`. The largest singular values, which would make the estimate
    vary most, come from a low rank and are taken out. Of the rest each trace is a mean over random signs v of
    :math:`v^\top f(G) v`, and that is a Gauss quadrature with nodes and weights from a few steps of Lanczos.

    Args:
        x: rows, shape ``(N, d)``, float32.
        probes: number of vectors v.
        steps: of Lanczos.
        deflated: number of singular values that are taken out.
        seed: of the vectors.

    Returns:
        The estimate, and its relative error: two standard errors over the probes (jackknife), and what the second
        half of the steps still changed.
    """
    if len(x) < x.shape[1]:
        x = x.T
    d = x.shape[1]
    deflated = min(deflated, d // 4)
    steps = min(steps, d - deflated)
    scale = float(x.square().sum()) / d  # the mean eigenvalue: what is far below it is rounding
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        largest, axes = torch.svd_lowrank(x, q=deflated, niter=2)[1:]
        v = (torch.randint(2, (d, probes)) * 2 - 1).to(x)
    v = v - axes @ (axes.T @ v)
    squared_length = v.square().sum(dim=0)
    v = v / squared_length.sqrt()
    basis = x.new_zeros(probes, steps, d)
    diagonal, beside = x.new_zeros(probes, steps), x.new_zeros(probes, steps)
    for j in range(steps):
        basis[:, j] = v.T
        w = x.T @ (x @ v)
        w = (w - axes @ (axes.T @ w)).T.unsqueeze(1)  # (probes, 1, d)
        diagonal[:, j] = (w * basis[:, j : j + 1]).sum(dim=(1, 2))
        known = basis[:, : j + 1]
        for _ in range(2):  # once is not enough in float32
            w = w - (w @ known.mT) @ known
        norm = torch.linalg.vector_norm(w, dim=2)  # (probes, 1)
        norm = torch.where(norm > 1e-5 * scale, norm, 0.0)
        beside[:, j] = norm.squeeze(1)
        v = (w / torch.where(norm > 0, norm, 1.0).unsqueeze(2) * (norm > 0).unsqueeze(2)).squeeze(1).T

    def traces(count: int) -> tuple[Tensor, Tensor]:
        """What each probe says of both, in units in which the mean eigenvalue is one."""
        off = beside[:, : count - 1].double() / scale
        matrix = torch.diag_embed(diagonal[:, :count].double() / scale)
        nodes, vectors = torch.linalg.eigh(matrix + torch.diag_embed(off, 1) + torch.diag_embed(off, -1))
        weights = squared_length.double().unsqueeze(1) * vectors[:, 0].square()
        rest, top = nodes.clamp_min(0.0).sqrt(), largest.double() / math.sqrt(scale)
        a = top.sum() + (weights * rest).sum(dim=1)
        return a, torch.xlogy(top, top).sum() + (weights * torch.xlogy(rest, rest)).sum(dim=1)

    a, b = traces(steps)
    value = _entropy(a, b)
    others = ~torch.eye(probes, dtype=torch.bool)
    without = torch.stack([_entropy(a[x], b[x]) for x in others.to(a.device)])
    deviation = ((probes - 1) / probes * (without - without.mean()).square().sum()).sqrt()
    changed = (value - _entropy(*traces(max(steps // 2, 1)))).abs()
    return min(math.exp(float(value)), float(d)), math.expm1(float(2 * deviation + changed))


def _entropy(a: Tensor, b: Tensor) -> Tensor:
    """Of the means over the probes; see :func:`lanczos_rank`."""
    return a.mean().log() - b.mean() / a.mean()


def spectra(settings: Settings, step_ms: float, every: int) -> dict[str, Any]:
    """Time and error of the effective rank, exact and randomized."""
    cases = []
    for d in settings.dims:
        for spectrum, power in SPECTRA.items():
            x = rows_with_spectrum(settings.rows, d, power).to(device_of())
            values: dict[str, float] = {}
            stated = 0.0
            seconds: dict[str, list[float]] = {method: [] for method in METHODS}
            for repeat in range(settings.repeats(d) + (d <= 512)):  # small ones are run once to warm up
                for method in METHODS:
                    start = now()
                    if method == "lanczos":
                        values[method], stated = lanczos_rank(x)
                    else:
                        values[method] = exact_rank(x) if method == "exact" else low_rank_rank(x)
                    if repeat or d > 512:
                        seconds[method].append(now() - start)
            ms = {method: 1000 * median(times) for method, times in seconds.items()}
            cases.append(
                {
                    "d": d,
                    "spectrum": spectrum,
                    "rank": values,
                    "ms": ms,
                    "speed": {method: ms["exact"] / ms[method] for method in METHODS if method != "exact"},
                    "error": {
                        method: abs(values[method] / values["exact"] - 1)
                        for method in METHODS
                        if method != "exact"
                    },
                    "stated_error": stated,
                    "exact_share": ms["exact"] / every / step_ms,
                    "saved": (ms["exact"] - ms["lanczos"]) / every / step_ms,
                }
            )
    return {
        "rows": settings.rows,
        "probes": PROBES,
        "lanczos_steps": LANCZOS_STEPS,
        "deflated": DEFLATED,
        "low_rank": LOW_RANK,
        "worth": WORTH,
        "cases": cases,
    }


# All of it.


def measure(quick: bool = False, *, blocks: int | None = None) -> dict[str, Any]:
    """Measure everything.

    Args:
        quick: tiny sizes, whose figures mean nothing.
        blocks: cycles of the race with the default head; half of them with the other.

    Returns:
        What :func:`markdown` and :func:`pictures` read, ready for JSON.
    """
    quieten()
    settings = quick_settings(blocks) if quick else full_settings(blocks)
    start = time.perf_counter()
    config = config_of(settings, next(iter(settings.heads)))
    # In processes of their own, and first, while nothing else runs.
    needed = memory(settings)
    anew = rebuilt(settings)
    races = {head: race(settings, head) for head in settings.heads}
    parts = {head: parts_of_step(settings, head) for head in settings.heads}
    every = int(config.callbacks.adadim.every_n_steps)
    step_ms = next(iter(races.values()))["arms"][REFERENCE]["step_ms"]
    goal = GOALS[device_of().type]
    headline = next(iter(races.values()))["arms"]["vicreg"]["overhead"]
    import lightly

    return {
        "command": COMMAND + (" --quick" if quick else "") + (f" --blocks {blocks}" if blocks else ""),
        "quick": quick,
        "device": torch.cuda.get_device_name() if on_gpu() else cpu_threads(),
        "gpu": on_gpu(),
        "machine": platform.machine(),
        "versions": {x.__name__: str(x.__version__) for x in (torch, lightning, lightly)},
        "settings": {
            "backbone": str(config.backbone.get("name", "small convnet")),
            "image_size": settings.size,
            "batch_size": int(config.data.batch_size),
            "precision": precision(),
            "every_n_steps": every,
            "window": int(config.callbacks.adadim.window),
            "optimizer": str(config.optimizer._target_),
            "temperature": TEMPERATURE,
        },
        "confidence": CONFIDENCE,
        "goal": goal,
        "met": bool(headline <= goal),
        "race": races,
        "objective": {key: x for key, x in OmegaConf.to_container(config.objective).items() if key != "_target_"},
        "rebuilt": anew,
        "parts": parts,
        "memory": needed,
        "spectra": spectra(settings, step_ms, every),
        "seconds": time.perf_counter() - start,
    }


# What came of it.


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f} %"


def _whole(value: float) -> str:
    return f"{100 * value:.0f} %"


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def _longer(found: dict[str, Any], head: str, name: str) -> str:
    arm = found["race"][head]["arms"].get(name)
    if arm is None or "overhead" not in arm:
        return ""
    return f"{_signed(arm['overhead'])} ({_signed(arm['low'])[:-2]} to {_signed(arm['high'])})"


def _in_words(found: dict[str, Any], head: str, name: str) -> str:
    value = found["race"][head]["arms"][name]["overhead"]
    return f"{_percent(abs(value))} {'longer' if value >= 0 else 'shorter'}"


def markdown(found: dict[str, Any]) -> str:
    """The section of the results page."""
    settings, heads = found["settings"], list(found["race"])
    first, wide = heads
    d_z = {head: found["race"][head]["d_z"] for head in heads}
    batch, size, every = settings["batch_size"], settings["image_size"], settings["every_n_steps"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = ["## What it costs", ""]
    if found["quick"]:
        lines += ["**A trial with tiny sizes: none of these figures means anything.**", ""]
    lines += [
        f"A step trains {settings['backbone']} on two views of {batch} images of {size} x {size}, with the head "
        f"`{first}` of `adadim-train` (d_Z = {d_z[first]}) and the wider `{wide}` (d_Z = {d_z[wide]}), on "
        f"{found['device']}, {settings['precision']} ({versions}). AdaDim is the shipped one: the objective, and "
        f"the callback that measures and steers, with a reading every {every} steps over the last "
        f"{settings['window']:,} rows. All contenders took turns within one run; in parentheses are the "
        f"{_whole(found['confidence'])} intervals of the ratios. gamma is {found['objective']['gamma']:.1f}. "
        "Memory is kept, where glibc would give it back after each step (`KEPT_MEMORY` in the script).",
        "",
    ]
    lines += _race_table(found)
    lines += ["![What AdaDim costs: against other losses, by part, and its spectra](images/cost.png)", ""]
    lines += [
        "Where a step of AdaDim goes, taken apart and with views, each part with its backward pass; the measuring "
        "is spread over all steps, and Lightning's loop and the logging are left out:",
        "",
    ]
    parts = found["parts"]
    rows = [
        [title, *(x for head in heads for x in _part(parts[head]["rows"][part]))]
        for part, title in PARTS.items()
        if part in parts[heads[0]]["rows"]  # not all were told apart at all times
    ]
    rows.append(["all", *(x for head in heads for x in (_ms(parts[head]["step_ms"]), ""))])
    lines += _table(["part", *(x for head in heads for x in (f"`{head}`: ms", "share"))], rows)
    spectra = found["spectra"]
    lines += [
        f"The effective rank of {spectra['rows']:,} rows: as it is, from the exact spectrum, in float64; by "
        f"stochastic Lanczos quadrature beside the {spectra['deflated']} largest singular values "
        f"({spectra['probes']} probes, {spectra['lanczos_steps']} steps), with the error that it states itself in "
        f"parentheses; and from the {spectra['low_rank']} largest singular values (`torch.svd_lowrank`, at most "
        "half of them) and a flat tail:",
        "",
    ]
    rows = []
    for case in spectra["cases"]:
        ms, error = case["ms"], case["error"]
        rows.append(
            [
                f"{case['d']}, {case['spectrum']}",
                f"{case['rank']['exact']:.1f}",
                _ms(ms["exact"]),
                _ms(ms["lanczos"]),
                f"{_percent(error['lanczos'])} ({_percent(case['stated_error'])})",
                _ms(ms["low_rank"]),
                _percent(error["low_rank"]),
            ]
        )
    lines += _table(["d, spectrum", "rank", "exact, ms", "Lanczos, ms", "error", "low rank, ms", "error"], rows)
    lines += [
        *_conclusions(found),
        "",
        f"All figures are in `{RESULT}`, written by `uv run {found['command']} --json {RESULT}`.",
    ]
    return "\n".join(lines) + "\n"


def markdown_of_gpu(found: dict[str, Any], file: str) -> str:
    """The race alone, on a GPU."""
    first = next(iter(found["race"]))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    rounds = [race["rounds"] for race in found["race"].values()]
    lines = [
        "### On a GPU",
        "",
        f"The same race on {found['device']}, {found['settings']['precision']} ({versions}), with "
        f"gamma {found['objective']['gamma']:.1f}; a turn has as many "
        "steps as lie between two readings. So small a step keeps such a GPU waiting for the CPU that starts its "
        "operations: what is compared here are numbers of operations more than their work.",
        "",
        *_race_table(found),
        f"A step of AdaDim is {_in_words(found, first, 'vicreg')} than one of `objective=vicreg`; the goal, at "
        f"most {_whole(found['goal'])}, is {'met' if found['met'] else 'missed'}. There were "
        f"{' and '.join(map(str, rounds))} rounds, so the intervals are wide. The figures are in `{file}`, "
        f"by `uv run {found['command']} --json {file}`.",
    ]
    return "\n".join(lines) + "\n"


def _race_table(found: dict[str, Any]) -> list[str]:
    heads = list(found["race"])
    first, rows = heads[0], []
    for name in found["race"][first]["arms"]:
        row = [ARMS[name].title]
        for head in heads:
            arm = found["race"][head]["arms"].get(name)
            row += [_ms(arm["step_ms"]) if arm else "", _longer(found, head, name)]
        needed = found["memory"][first].get(name)
        rows.append([*row, f"{needed['training_mib']:,.0f}" if needed else ""])
    columns = [x for head in heads for x in (f"`{head}`: ms a step", "AdaDim's is longer by")]
    return _table(["", *columns, f"`{first}`: MiB for training"], rows)


def _part(row: dict[str, float]) -> list[str]:
    return [_ms(row["ms"]), _percent(row["share"])]


def _conclusions(found: dict[str, Any]) -> list[str]:
    first, wide = found["race"]
    parts, goal = found["parts"], found["goal"]
    strict = found["race"][first]["arms"][REFERENCE]["overhead"]
    reading = {head: parts[head]["rows"]["reading"] for head in (first, wide)}
    return [
        f"- A step of AdaDim is {_in_words(found, first, 'vicreg')} than one of `objective=vicreg`; the goal, at "
        f"most {_whole(goal)}, is {'met' if found['met'] else 'missed'}; with the head `{wide}` it is "
        f"{_in_words(found, wide, 'vicreg')}. Both log the same parts and are measured alike;"
        " VICReg has no backward pass of NT-Xent and of I(R;Z), and compares no gradients.",
        *_rebuilt(found),
        f"- The stricter figures: it is {_in_words(found, first, 'vicreg_module')} than our VICReg without any "
        f"measuring, and {_in_words(found, first, REFERENCE)} than a bare VICReg that logs nothing and watches "
        f"for nothing, {'within' if strict <= goal else 'beyond'} that goal. Taken apart, what AdaDim adds to a "
        f"step of VICReg is {_percent(parts[first]['added'])} of it, and {_percent(parts[wide]['added'])} with "
        f"`{wide}`.",
        f"- In the same model it is {_in_words(found, first, 'lightly_vicreg')} than lightly's VICRegLoss and "
        f"{_in_words(found, first, 'lightly_simclr')} than its NTXentLoss; with the head `{wide}` it is "
        f"{_in_words(found, wide, 'lightly_vicreg')} than VICRegLoss, which builds matrices of d_Z x d_Z.",
        f"- The spectra of R and Z take {_ms(reading[first]['once_ms'])} ms a reading, "
        f"{_percent(reading[first]['share'])} of all steps together; with the head `{wide}` "
        f"{_ms(reading[wide]['once_ms'])} ms and {_percent(reading[wide]['share'])}.",
        _verdict(found["spectra"]),
    ]


def _rebuilt(found: dict[str, Any]) -> list[str]:
    """How much of a ratio is chance."""
    if found["rebuilt"] is None:
        return []
    kept, usual = (
        f"{_signed(x['mean'])} ({_signed(x['low'])[:-2]} to {_signed(x['high'])}), with a standard deviation of "
        f"{_percent(x['sd'])}"
        for x in (found["rebuilt"]["kept"], found["rebuilt"]["given_back"])
    )
    return [
        f"- An interval of one race leaves out where each contender's memory happens to lie. In "
        f"{found['rebuilt']['kept']['n']} pairs that were built anew an ordinary step of AdaDim was longer than "
        f"one of `objective=vicreg` by {kept}; as glibc has it, without memory kept, by {usual}."
    ]


def _verdict(spectra: dict[str, Any]) -> str:
    """Whether a randomized spectrum would help."""
    cases = spectra["cases"]
    threshold = f"{_whole(spectra['worth'])} of the default model's step"
    worst = {method: _percent(max(x["error"][method] for x in cases)) for method in ("lanczos", "low_rank")}
    errors = (
        f"Its error is up to {worst['lanczos']} here, that of a low rank with a flat tail up to "
        f"{worst['low_rank']}; the exact value has none, and is the same on every process."
    )
    most = {d: max(case["saved"] for case in cases if case["d"] == d) for d in sorted({x["d"] for x in cases})}
    gains = [d for d, saved in most.items() if saved >= spectra["worth"]]
    if not gains:
        return (
            f"- Randomized (Lanczos), a spectrum would save less than {threshold} for all d up to {max(most)}: "
            f"the exact one stays. {errors}"
        )
    saved = ", ".join(f"{_percent(most[d])} at d = {d}" for d in gains)
    smaller = [d for d in most if d < gains[0]]
    stays = f" Up to d = {smaller[-1]} it saves less or nothing: there the exact one stays." if smaller else ""
    return (
        f"- Randomized (Lanczos), a spectrum would save more than {threshold} where d is large: {saved}.{stays} "
        f"{errors}"
    )


def pictures(found: dict[str, Any]) -> dict[str, Figure]:
    """The picture of the section."""
    figure = Figure(figsize=(9, 7.4), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)  # type: ignore[union-attr]
    # Apart, so that the long names above leave no gaps below.
    above, below = figure.subfigures(2, 1, height_ratios=[1.25, 1])
    race, parts = above.subplots(1, 2)
    _draw_race(race, found)
    _draw_parts(parts, found)
    _draw_spectra(*below.subplots(1, 2), found)
    return {"cost": figure}


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


SHORT = {
    "vicreg": "objective=vicreg",
    "vicreg_module": "objective=vicreg,\nnot measured",
    REFERENCE: "bare VICReg",
    "simclr_plain": "bare SimCLR",
    "lightly_vicreg": "lightly's VICReg",
    "lightly_simclr": "lightly's NT-Xent",
}


def _draw_race(axes: Axes, found: dict[str, Any]) -> None:
    names = [name for name in SHORT if name in next(iter(found["race"].values()))["arms"]]
    for index, (head, race) in enumerate(found["race"].items()):
        style = style_of(index)
        arms = [(i, race["arms"][name]) for i, name in enumerate(names) if name in race["arms"]]
        values = [100 * arm["overhead"] for _, arm in arms]
        # The point is not always inside the interval of a bootstrap.
        spans = [
            [max(100 * (arm["overhead"] - arm["low"]), 0.0) for _, arm in arms],
            [max(100 * (arm["high"] - arm["overhead"]), 0.0) for _, arm in arms],
        ]
        axes.errorbar(
            values,
            [i + 0.16 * (2 * index - 1) for i, _ in arms],
            xerr=spans,
            color=style.color,
            marker=style.marker,
            markersize=5,
            linestyle="none",
            capsize=3,
            label=f"head {head}, d_Z = {race['d_z']}",
        )
    axes.axvline(0, color=GREY, linewidth=1)
    axes.axvline(100 * found["goal"], color=RED, linewidth=1, linestyle="--", label="goal")
    axes.set_yticks(range(len(names)), [SHORT[name] for name in names])
    axes.invert_yaxis()
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("percent of the other's step", fontsize=9)
    _title(axes, "How much longer AdaDim's step is than")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.3, -0.16), ncols=2)


def _draw_parts(axes: Axes, found: dict[str, Any]) -> None:
    keys = [part for part in PARTS if all(part in parts["rows"] for parts in found["parts"].values())]
    smallest = 100.0
    for index, (head, parts) in enumerate(found["parts"].items()):
        style = style_of(index)
        shares = [100 * parts["rows"][part]["share"] for part in keys]
        smallest = min(smallest, *shares)
        axes.plot(shares, range(len(keys)), style.marker, color=style.color, markersize=5, label=f"head {head}")
    axes.set_xscale("log")
    axes.set_xlim(smallest / 1.6, 160)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(range(len(keys)), [PARTS[part] for part in keys])
    for label, part in zip(axes.get_yticklabels(), keys, strict=True):
        label.set_color(RED if part in ADDED else "black")
    axes.invert_yaxis()
    axes.set_xlabel("percent of the step (in red: not in VICReg's)", fontsize=9)
    _title(axes, "Where a step goes")


def _draw_spectra(times: Axes, errors: Axes, found: dict[str, Any]) -> None:
    cases = found["spectra"]["cases"]
    colors = {"exact": GREEN, "lanczos": BLUE, "low_rank": ORANGE}
    for line, spectrum in zip(("-", "--"), SPECTRA, strict=True):
        of_spectrum = [case for case in cases if case["spectrum"] == spectrum]
        d = [case["d"] for case in of_spectrum]
        for method, title in METHODS.items():
            if spectrum == "decaying":  # the other takes as long
                ms = [case["ms"][method] for case in of_spectrum]
                times.plot(d, ms, marker="o", markersize=4, color=colors[method], label=title)
            if method != "exact":
                error = [max(100 * case["error"][method], 1e-3) for case in of_spectrum]
                label = f"{title.split(' and')[0]}, {spectrum}"
                errors.plot(d, error, line, marker="o", markersize=4, color=colors[method], label=label)
    for axes, title, label in (
        (times, "Time of an effective rank (decaying)", "ms"),
        (errors, "Error of the randomized ones", "percent of the exact one"),
    ):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted({case["d"] for case in cases}))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        axes.set_xlabel(f"d, of {found['spectra']['rows']} rows", fontsize=9)
        axes.set_ylabel(label, fontsize=9)
        _title(axes, title)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend
        axes.legend(frameon=False, fontsize=8, handlelength=3, loc="upper left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see whether it runs")
    parser.add_argument("--blocks", type=int, help="cycles from reading to reading, with the default head")
    parser.add_argument("--memory", nargs=2, metavar=("HEAD", "CONTENDER"), help="only its peak memory, as JSON")
    parser.add_argument("--rebuilt", action="store_true", help="only the pairs that are built anew, as JSON")
    arguments = parser.parse_args()
    quieten()
    settings = quick_settings() if arguments.quick else full_settings()
    if arguments.memory:
        print(json.dumps(peak_memory(settings, *arguments.memory)))
        return
    if arguments.rebuilt:
        print(json.dumps(rebuilt_pairs(settings)))
        return
    if not on_gpu() and not os.environ.keys() >= KEPT_MEMORY.keys():  # they count from the start of a process
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEPT_MEMORY})
    found = measure(arguments.quick, blocks=arguments.blocks)
    Console(width=150).print(Markdown(markdown(found)))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
