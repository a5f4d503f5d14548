"""Bias and spread of the estimators of dimensionality and information, where the truth is known.

Run it by ``uv run python benchmarks/estimator_study.py [--json FILE] [--quick]``; it takes some four minutes of
one CPU core. The effective rank is held against that of the population's spectrum, the matrix-based information
against the mutual information of jointly Gaussian R and Z, both in closed form, and against a nearest-neighbor
estimator. The results page takes its tables and its picture from here.
"""

import argparse
import json
import math
import platform
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.spatial.distance import cdist
from scipy.special import digamma
from scipy.stats import spearmanr
from torch import Tensor

from adadim_lightning.functional import effective_rank, eigenvalue_spectrum, matrix_mutual_information
from adadim_lightning.metrics import EffectiveRank
from adadim_lightning.metrics.window import RecentRows
from adadim_lightning.report.dynamics import GREY
from adadim_lightning.report.style import style_of

Array = np.ndarray[Any, Any]
Found = dict[str, Any]
Record = dict[str, Any]
SpectrumKind = Literal["singular", "eigen"]

COMMAND = "python benchmarks/estimator_study.py"
RESULT = "benchmarks/results/estimator_study.json"
SPECTRA: tuple[SpectrumKind, ...] = ("singular", "eigen")

DIM = 256
ROWS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
WIDE_DIM = 512
PAPER_DIM, PAPER_BATCH, WINDOW = 2048, 256, 4096
STREAM_BATCH, STREAM_STEPS, STREAM_CHANGE = 128, 128, 64
VIEW_ROWS = 1024
TOLERANCE = 0.05

CORRELATIONS = (0.0, 0.3, 0.6, 0.8, 0.9, 0.95)
INFORMATION_DIMS = (2, 8, 32, 128)
INFORMATION_ROWS = (64, 128, 256, 512, 1024, 2048)
MOST_ROWS_SLOW = 512  # of I_1, with its three eigen-decompositions, and of the neighbors
BATCH = 256
ORDERS = (0.5, 1.0, 2.0, 3.0, 5.0)
DECAYS = (0.0, 0.5, 1.0, 2.0)
# The square of the mean over the variance: the second is what a rectified Gaussian has, as R after a ReLU.
MEAN_POWERS = (0.0, 2 / (math.pi - 2), 10.0)
L_SIZES = (10, 50)


class Population(NamedTuple):
    """Rows with a known second moment.

    Attributes:
        decay: eigenvalue k of the covariance is k to the power of minus this.
        signal: number of dimensions with variance 1; the others have ``noise``. 0: the power law.
        noise: variance of the dimensions beside the signal.
        mean_power: square of the mean over the trace of the covariance.
        tails: degrees of freedom of Student's t, one factor for a whole row; 0: Gaussian.
    """

    decay: float = 0.0
    signal: int = 0
    noise: float = 1e-4
    mean_power: float = 0.0
    tails: int = 0

    def eigenvalues(self, dim: int) -> Tensor:
        """Eigenvalues of the covariance, shape ``(dim,)``, descending."""
        if self.signal:
            return torch.full((dim,), self.noise, dtype=torch.float64).index_fill_(
                0, torch.arange(self.signal), 1.0
            )
        return torch.arange(1, dim + 1, dtype=torch.float64) ** -self.decay

    def mean(self, dim: int) -> Tensor:
        """Mean of the rows: the same in each direction of the covariance."""
        power = self.mean_power * self.eigenvalues(dim).sum()
        return (power / dim).sqrt().expand(dim)

    def effective_rank(self, dim: int, spectrum: SpectrumKind, center: bool) -> float:
        """The value that an estimator tends to with the number of rows."""
        moment = self.eigenvalues(dim)
        if self.mean_power and not center:
            mean = self.mean(dim)
            moment = torch.linalg.eigvalsh(moment.diag() + torch.outer(mean, mean))
        return rank_of(moment, spectrum)

    def draw(self, rows: int, dim: int, generator: torch.Generator) -> Tensor:
        """Independent rows, shape ``(rows, dim)``, float64."""
        x = torch.randn(rows, dim, dtype=torch.float64, generator=generator) * self.eigenvalues(dim).sqrt()
        if self.tails:
            chi = torch.randn(rows, self.tails, dtype=torch.float64, generator=generator).square().mean(dim=1)
            x = x * (chi**-0.5)[:, None]
        return x + self.mean(dim)


POPULATIONS = {
    "isotropic": Population(),
    "power law": Population(decay=1),
    "steep power law": Population(decay=2),
    "low rank + noise": Population(signal=16),
    "power law + mean": Population(decay=1, mean_power=MEAN_POWERS[1]),
    "power law, heavy tails": Population(decay=1, tails=5),
}
WIDE_POPULATIONS = ("isotropic", "power law")
STREAM_POPULATIONS = ("isotropic", "steep power law")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPE_POPULATIONS = {
    "power law": Population(decay=1),
    "low rank": Population(signal=16, noise=0.0),
    "low rank + noise": Population(signal=16),
    "power law + large mean": Population(decay=1, mean_power=100.0),
}


def rank_of(eigenvalues: Tensor, spectrum: SpectrumKind) -> float:
    """Effective rank of eigenvalues of a second moment, written apart from the library's own."""
    values = np.asarray(eigenvalues, dtype=np.float64).clip(min=0)
    if spectrum == "singular":
        values = np.sqrt(values)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def isotropic_rank(rows: float, dim: float, spectrum: SpectrumKind) -> float:
    """What the effective rank of isotropic rows reads, by the Marchenko-Pastur law; it forgets terms of O(1)."""
    ratio = min(rows, dim) / max(rows, dim)
    # By the angle, in which the density has no edge; the midpoints never touch its ends.
    angle = (np.arange(20_000) + 0.5) / 20_000 * math.pi
    values = 1 + ratio + 2 * math.sqrt(ratio) * np.cos(angle)
    weight = np.sin(angle) ** 2 / values
    weight /= weight.sum()
    if spectrum == "singular":
        values = np.sqrt(values)
    mean = float((weight * values).sum())
    return min(rows, dim) * mean * math.exp(-float((weight * values * np.log(values)).sum()) / mean)


def isotropic_rows(spectrum: SpectrumKind, tolerance: float = TOLERANCE) -> float:
    """Rows per dimension from which on the effective rank of isotropic rows lacks at most ``tolerance``."""
    low, high = 1.0, 1000.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if isotropic_rank(middle, 1.0, spectrum) >= 1 - tolerance else (middle, high)
    return high


def draw_pair(
    rows: int,
    dim: int,
    correlation: float,
    generator: torch.Generator,
    *,
    decay: float = 0.0,
    mean_power: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Jointly Gaussian R and Z, ``(rows, dim)`` each, all canonical correlations equal.

    A scale of the axes and a mean leave the mutual information as it is.
    """
    r = torch.randn(rows, dim, generator=generator)
    noise = torch.randn(rows, dim, generator=generator)
    z = correlation * r + math.sqrt(1 - correlation**2) * noise
    population = Population(decay=decay, mean_power=mean_power)
    scale, mean = population.eigenvalues(dim).sqrt().float(), population.mean(dim).float()
    return r * scale + mean, z * scale + mean


def gaussian_information(dim: int, correlation: float) -> float:
    """Mutual information in nats of what :func:`draw_pair` draws."""
    return -dim / 2 * math.log1p(-(correlation**2)) + 0.0


def neighbor_information(r: Tensor, z: Tensor, neighbors: int = 3) -> float:
    """Mutual information in nats by nearest neighbors, first estimator of Kraskov et al., Phys. Rev. E 2004.

    Args:
        r: shape ``(n, d_R)``.
        z: shape ``(n, d_Z)``, row by row with ``r``.
        neighbors: which neighbor's distance sets the scale at a point.
    """
    n = len(r)
    distance_r, distance_z = (cdist(x.double().numpy(), x.double().numpy(), "chebyshev") for x in (r, z))
    for distance in (distance_r, distance_z):
        np.fill_diagonal(distance, np.inf)  # a point is no neighbor of its own
    radius = np.partition(np.maximum(distance_r, distance_z), neighbors - 1, axis=1)[:, neighbors - 1, None]
    inside = [(distance < radius).sum(axis=1) for distance in (distance_r, distance_z)]
    return float(digamma(neighbors) + digamma(n) - sum(np.mean(digamma(count + 1)) for count in inside))


def information(r: Tensor, z: Tensor, order: float = 2.0) -> float:
    return float(matrix_mutual_information(r, z, order=order))


def independent_information(rows: int, dim_r: int, dim_z: int) -> float:
    """What I_2 reads of independent, isotropic R and Z: its formula with the expected squares of the cosines."""
    others = rows - 1
    return (
        math.log(rows)
        + math.log1p(others / (dim_r * dim_z))
        - math.log1p(others / dim_r)
        - math.log1p(others / dim_z)
    )


class Cells:
    """Values of many draws, by what they were drawn for."""

    def __init__(self) -> None:
        self.values: dict[tuple[tuple[str, Any], ...], list[float]] = defaultdict(list)
        self.truths: dict[tuple[tuple[str, Any], ...], float] = {}

    def add(self, value: float, truth: float | None = None, **key: Any) -> None:
        place = tuple(key.items())
        self.values[place].append(float(value))
        if truth is not None:
            self.truths[place] = truth

    def records(self) -> list[Record]:
        """One a cell: its key, the truth, mean, standard deviation, extremes, number of draws; relative bias."""
        records = []
        for place, values in self.values.items():
            record = {**dict(place), "mean": np.mean(values), "sd": np.std(values, ddof=1)}
            record |= {"min": min(values), "max": max(values), "draws": len(values)}
            if place in self.truths:
                record["truth"] = self.truths[place]
                if record["truth"]:
                    record["bias"] = record["mean"] / record["truth"] - 1
            records.append({name: _short(value) for name, value in record.items()})
        return records


def _short(value: Any) -> Any:
    """Numbers with six digits: more are noise, and would make the file long."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def pick(records: Iterable[Record], **key: Any) -> list[Record]:
    """The records with these values, in their order."""
    return [record for record in records if all(record[name] == value for name, value in key.items())]


def only(records: Iterable[Record], **key: Any) -> Record:
    """The one record with these values."""
    (record,) = pick(records, **key)
    return record


class Plan(NamedTuple):
    """How much is measured; draws of another seed stay apart, so that they check each other."""

    draws: int
    seed: int
    quick: bool

    def generators(self, section: int) -> list[torch.Generator]:
        """One a draw."""
        seeds = (1_000_000 * self.seed + 1_000 * section + draw for draw in range(self.draws))
        return [torch.Generator().manual_seed(seed) for seed in seeds]


def measure_rank(plan: Plan) -> list[Record]:
    """Effective rank against the number of rows, for each population and convention."""
    cells = Cells()
    for generator in plan.generators(0):
        for name, population in POPULATIONS.items():
            _add_ranks(cells, population, name, DIM, ROWS[:5:2] if plan.quick else ROWS, generator)
    return cells.records()


def measure_width(plan: Plan) -> list[Record]:
    """The same for twice the width, un-centered."""
    cells = Cells()
    for generator in plan.generators(1):
        for name in WIDE_POPULATIONS:
            rows = ROWS[:3:2] if plan.quick else ROWS[:-1]
            _add_ranks(cells, POPULATIONS[name], name, WIDE_DIM, rows, generator, centers=(False,))
    return cells.records()


def _add_ranks(
    cells: Cells,
    population: Population,
    name: str,
    dim: int,
    rows: tuple[int, ...],
    generator: torch.Generator,
    centers: tuple[bool, ...] = (False, True),
) -> None:
    """Readings of growing parts of one draw."""
    x = population.draw(max(rows), dim, generator)
    for center in centers:
        truths = {spectrum: population.effective_rank(dim, spectrum, center) for spectrum in SPECTRA}
        for n in rows:
            eigenvalues = eigenvalue_spectrum(x[:n], center=center)
            for spectrum in SPECTRA:
                key = {"population": name, "dim": dim, "rows": n, "spectrum": spectrum, "center": center}
                cells.add(rank_of(eigenvalues, spectrum), truths[spectrum], **key)


def measure_paper(plan: Plan) -> list[Record]:
    """At the paper's width: one batch of one view, the mean of as many as the window holds, and the window."""
    cells = Cells()
    names = WIDE_POPULATIONS
    batches = WINDOW // PAPER_BATCH
    for generator in plan.generators(2):
        for name in names:
            population = POPULATIONS[name]
            truth = population.effective_rank(PAPER_DIM, "singular", False)
            whole = name == "power law" and not plan.quick  # the large one takes seconds
            x = population.draw(WINDOW if whole else PAPER_BATCH, PAPER_DIM, generator).float()
            cells.add(float(effective_rank(x[:PAPER_BATCH])), truth, population=name, reading="one batch")
            if whole:
                readings = [float(effective_rank(batch)) for batch in x.split(PAPER_BATCH)]
                cells.add(float(np.mean(readings)), truth, population=name, reading=f"mean of {batches} batches")
                metric = EffectiveRank()
                for batch in x.split(PAPER_BATCH):
                    metric.update(batch)
                cells.add(float(metric.compute()), truth, population=name, reading="window")
    return cells.records()


def measure_stream(plan: Plan) -> list[Record]:
    """Readings of a stream whose population changes half way: last batch, running window, all rows so far."""
    cells = Cells()
    before, after = (POPULATIONS[name] for name in STREAM_POPULATIONS)
    every = 32 if plan.quick else 16
    for generator in plan.generators(3):
        window, whole = RecentRows(WINDOW), EffectiveRank()
        for step in range(1, STREAM_STEPS + 1):
            population = before if step <= STREAM_CHANGE else after
            batch = population.draw(STREAM_BATCH, DIM, generator)
            window.update(batch)
            whole.update(batch)
            if step % every == 0:
                truth = population.effective_rank(DIM, "singular", False)
                readings = {
                    "one batch": float(effective_rank(batch)),
                    "window": rank_of(window.read()[0], "singular"),
                    "all rows": float(whole.compute()),
                }
                for reading, value in readings.items():
                    cells.add(value, truth, reading=reading, rows=step * STREAM_BATCH)
    return cells.records()


def measure_streaming_error(plan: Plan) -> float:
    """Largest relative difference between the streaming metric and one pass over the same rows."""
    errors = []
    for generator in plan.generators(4):
        x = POPULATIONS["power law + mean"].draw(VIEW_ROWS, DIM, generator)
        for center in (False, True):
            metric = EffectiveRank(center=center)
            for batch in x.split(96):
                metric.update(batch)
            once = rank_of(eigenvalue_spectrum(x, center=center), "singular")
            errors.append(abs(rank_of(metric.eigenvalues(), "singular") / once - 1))
    return max(errors)


def measure_views(plan: Plan) -> list[Record]:
    """Rows that come in pairs, as the two views of an image do: how many independent ones they are worth."""
    cells = Cells()
    for generator in plan.generators(5):
        for correlation in (0.0, 0.5, 0.9, 1.0):
            shared, *own = (
                torch.randn(VIEW_ROWS // 2, DIM, dtype=torch.float64, generator=generator) for _ in range(3)
            )
            views = [math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * x for x in own]
            value = rank_of(eigenvalue_spectrum(torch.cat(views)), "singular")
            cells.add(value, float(DIM), correlation=correlation, rows=VIEW_ROWS)
        half = rank_of(eigenvalue_spectrum(views[0]), "singular")
        cells.add(half, float(DIM), correlation=0.0, rows=VIEW_ROWS // 2)
    return cells.records()


def measure_dtype(plan: Plan) -> list[Record]:
    """Effective rank of rounded rows over that of the same rows in float64."""
    cells = Cells()
    for generator in plan.generators(6):
        # Rounding is relative to an entry, so the directions of the spectrum must not be the axes.
        turn = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64, generator=generator))[0]
        for name in tuple(DTYPE_POPULATIONS)[: 2 if plan.quick else None]:
            x = DTYPE_POPULATIONS[name].draw(VIEW_ROWS, DIM, generator) @ turn
            for center in (False, True):
                exact = eigenvalue_spectrum(x, center=center)
                for dtype_name, dtype in DTYPES.items():
                    rounded = eigenvalue_spectrum(x.to(dtype), center=center)
                    for spectrum in SPECTRA:
                        ratio = rank_of(rounded, spectrum) / rank_of(exact, spectrum)
                        key = {"population": name, "dtype": dtype_name, "spectrum": spectrum, "center": center}
                        cells.add(ratio, 1.0, **key)
    return cells.records()


def measure_sweep(plan: Plan) -> tuple[list[Record], list[Record]]:
    """All estimators over growing correlation, and their rank correlation with the mutual information."""
    cells, ranks = Cells(), Cells()
    dims = INFORMATION_DIMS[:2] if plan.quick else INFORMATION_DIMS
    correlations = CORRELATIONS[::2] if plan.quick else CORRELATIONS
    for generator in plan.generators(7):
        for dim in dims:
            readings = defaultdict(list)
            truths = [gaussian_information(dim, correlation) for correlation in correlations]
            for correlation, truth in zip(correlations, truths, strict=True):
                r, z = draw_pair(BATCH, dim, correlation, generator)
                for estimator, value in _estimates(r, z).items():
                    cells.add(value, truth, estimator=estimator, dim=dim, rows=BATCH, correlation=correlation)
                    readings[estimator].append(value)
            if not plan.quick:
                for estimator, values in readings.items():
                    ranks.add(_rank_correlation(values, truths), estimator=estimator, dim=dim, rows=BATCH)
    return cells.records(), ranks.records()


def _estimates(r: Tensor, z: Tensor) -> dict[str, float]:
    """What the estimators read of one batch; the excess is over the same batch with its pairs torn apart."""
    second = information(r, z)
    estimates = {"I_2": second, "I_2 excess": second - information(r, z.roll(1, dims=0))}
    if len(r) <= MOST_ROWS_SLOW:
        first = information(r, z, 1.0)
        estimates |= {"I_1": first, "I_1 excess": first - information(r, z.roll(1, dims=0), 1.0)}
        estimates["KSG"] = neighbor_information(r, z)
    return estimates


def _rank_correlation(values: list[float], truths: list[float]) -> float:
    return float(spearmanr(values, truths).statistic)


def measure_growth(plan: Plan) -> list[Record]:
    """Estimators against the number of rows."""
    cells = Cells()
    for generator in plan.generators(8):
        for dim in (8, 128):
            for correlation in (0.0, 0.9):
                rows = INFORMATION_ROWS[:3:2] if plan.quick else INFORMATION_ROWS
                r, z = draw_pair(max(rows), dim, correlation, generator)
                truth = gaussian_information(dim, correlation)
                for n in rows:
                    for estimator, value in _estimates(r[:n], z[:n]).items():
                        cells.add(value, truth, estimator=estimator, dim=dim, rows=n, correlation=correlation)
    return cells.records()


def measure_head(plan: Plan) -> list[Record]:
    """A common width of R and Z, 512 rows: independent, Z a linear map of R, and Z = R."""
    cells = Cells()
    rows, dim_r, dim_z = 512, 512, 2048
    for generator in plan.generators(9):
        r = torch.randn(rows, dim_r, generator=generator)
        heads = {
            "independent": torch.randn(rows, dim_z, generator=generator),
            "linear map": r @ torch.randn(dim_r, dim_z, generator=generator),
            "identity": r,
        }
        heads["linear map, shuffled"] = heads["linear map"].roll(1, dims=0)
        for head, z in heads.items():
            cells.add(information(r, z), head=head, rows=rows, dim_r=dim_r, dim_z=z.shape[1])
    return cells.records()


def measure_spectra(plan: Plan) -> tuple[list[Record], list[Record]]:
    """I when the spectrum of R and Z varies beside their correlation: which of the two does it follow?"""
    cells, ranks = Cells(), Cells()
    dim = 32
    correlations = CORRELATIONS[::2] if plan.quick else CORRELATIONS
    for generator in plan.generators(10):
        readings = defaultdict(list)
        for decay in DECAYS[::3] if plan.quick else DECAYS:
            for correlation in correlations:
                r, z = draw_pair(BATCH, dim, correlation, generator, decay=decay)
                truth = gaussian_information(dim, correlation)
                readings["mutual information"].append(truth)
                readings["ER(R)"].append(float(effective_rank(r)))
                for estimator, value in _estimates(r, z).items():
                    key = {"estimator": estimator, "decay": decay, "correlation": correlation}
                    cells.add(value, truth, dim=dim, rows=BATCH, **key)
                    readings[estimator].append(value)
        if not plan.quick:
            for target in ("mutual information", "ER(R)"):
                for estimator, values in readings.items():
                    if estimator not in ("mutual information", "ER(R)"):
                        ranks.add(_rank_correlation(values, readings[target]), estimator=estimator, target=target)
    return cells.records(), ranks.records()


def measure_centering(plan: Plan) -> list[Record]:
    """I of R and Z with a mean, as they are and centered."""
    cells = Cells()
    dim, correlation = 32, 0.8
    for generator in plan.generators(11):
        for mean_power in MEAN_POWERS:
            r, z = draw_pair(BATCH, dim, correlation, generator, mean_power=mean_power)
            for center in (False, True):
                pair = (r - r.mean(dim=0), z - z.mean(dim=0)) if center else (r, z)
                for order in (1.0, 2.0):
                    key = {"order": order, "mean_power": _short(mean_power), "center": center}
                    key |= {"dim": dim, "rows": BATCH, "correlation": correlation}
                    cells.add(information(*pair, order), gaussian_information(dim, correlation), **key)
    return cells.records()


def measure_orders(plan: Plan) -> tuple[list[Record], list[Record]]:
    """Orders of the Renyi entropy over growing correlation."""
    cells, ranks = Cells(), Cells()
    dim = 8
    correlations = CORRELATIONS[::2] if plan.quick else CORRELATIONS
    for generator in plan.generators(12):
        pairs = [draw_pair(BATCH, dim, correlation, generator) for correlation in correlations]
        truths = [gaussian_information(dim, correlation) for correlation in correlations]
        for order in ORDERS:
            values = [information(r, z, order) for r, z in pairs]
            for correlation, value, truth in zip(correlations, values, truths, strict=True):
                cells.add(value, truth, order=order, dim=dim, rows=BATCH, correlation=correlation)
            if not plan.quick:
                ranks.add(_rank_correlation(values, truths), order=order, dim=dim, rows=BATCH)
    return cells.records(), ranks.records()


def measure_negative() -> list[Record]:
    """Pairs of which one is always at zero: I_2 falls below zero, I_1 cannot."""
    records = []
    for size in L_SIZES:
        a, b = [*range(size), *[0] * (size - 1)], [*[0] * size, *range(1, size)]
        r, z = (torch.nn.functional.one_hot(torch.tensor(x), size).float() for x in (a, b))
        records += [{"size": size, "order": q, "value": _short(information(r, z, q))} for q in (1.0, 2.0)]
    return records


def rows_needed(records: list[Record], tolerance: float = TOLERANCE) -> float | None:
    """Rows from which on the bias stays within the tolerance, between two sizes by the logarithms; None: not seen.

    Args:
        records: of one population and convention, by growing number of rows.
        tolerance: relative.
    """
    if abs(records[-1]["bias"]) > tolerance:
        return None
    needed = float(records[-1]["rows"])
    for smaller, larger in zip(records[-2::-1], records[:0:-1], strict=True):
        low, high = abs(smaller["bias"]), abs(larger["bias"])
        if low > tolerance:
            share = math.log(low / tolerance) / math.log(low / max(high, 1e-9))
            return float(smaller["rows"] * (larger["rows"] / smaller["rows"]) ** share)
        needed = float(smaller["rows"])
    return needed


def measure(quick: bool = False) -> Found:
    """Measure everything.

    Args:
        quick: a few draws, of another seed, of the cheaper cells.

    Returns:
        Figures that go to JSON as they are.
    """
    plan = Plan(draws=2, seed=1, quick=True) if quick else Plan(draws=20, seed=0, quick=False)
    rank, width = measure_rank(plan), measure_width(plan)
    sweep, sweep_ranks = measure_sweep(plan)
    spectra, spectra_ranks = measure_spectra(plan)
    orders, orders_ranks = measure_orders(plan)
    needed = [
        {
            "population": name,
            "dim": dim,
            "spectrum": spectrum,
            "center": center,
            "rows": _short(rows_needed(pick(records, population=name, dim=dim, spectrum=spectrum, center=center))),
        }
        for records, dim, names, centers in (
            (rank, DIM, tuple(POPULATIONS), (False, True)),
            (width, WIDE_DIM, WIDE_POPULATIONS, (False,)),
        )
        for name in names
        for spectrum in SPECTRA
        for center in centers
    ]
    return {
        "command": COMMAND,
        "quick": quick,
        "seed": plan.seed,
        "draws": plan.draws,
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__},
        "machine": platform.machine(),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "effective_rank": {
            "tolerance": TOLERANCE,
            "rows": rank,
            "width": width,
            "needed": needed,
            "isotropic_rows_per_dim": {spectrum: _short(isotropic_rows(spectrum)) for spectrum in SPECTRA},
            "paper": measure_paper(plan),
            "stream": measure_stream(plan),
            "streaming_error": _short(measure_streaming_error(plan)),
            "views": measure_views(plan),
            "dtype": measure_dtype(plan),
        },
        "information": {
            "sweep": sweep,
            "sweep_ranks": sweep_ranks,
            "growth": measure_growth(plan),
            "head": measure_head(plan),
            "spectra": spectra,
            "spectra_ranks": spectra_ranks,
            "centering": measure_centering(plan),
            "orders": orders,
            "orders_ranks": orders_ranks,
            "negative": measure_negative(),
        },
    }


def markdown(found: Found) -> str:
    """The section of the results page; each number in it is taken from the figures.

    Args:
        found: of :func:`measure`, all of it, not the quick part.
    """
    rank, information = found["effective_rank"], found["information"]
    low, high = CORRELATIONS[0], CORRELATIONS[-1]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    bullets = [*_rank_conclusions(rank), *_information_conclusions(information)]
    parts = [
        "## The estimators",
        f"How far is a reading from the truth? Here the truth is known: rows come from populations of known "
        f"spectrum, and R and Z are jointly Gaussian, with all canonical correlations equal to c, so that the "
        f"true I(R;Z) is -d/2 ln(1 - c²). Mean ± standard deviation of {found['draws']} draws.",
        _rank_table(rank),
        f"Effective rank (ER), un-centered, {DIM} dimensions: how far a reading is off, in percent of the "
        f"true value, and the rows from which on its bias stays within {_percent(rank['tolerance'])}.",
        _sweep_table(information),
        f"Readings of {BATCH} rows of isotropic R and Z, in nats. KSG is the nearest-neighbor estimator of "
        f"Kraskov, Stögbauer and Grassberger (2004).",
        _order_table(information),
        f"Do readings of {BATCH} rows rise with the true I(R;Z), c from {low:g} to {high:g}? Spearman's rank "
        f'correlation. "Above shuffled" is the reading less that of the same rows with the pairs torn apart. '
        f"In the last two columns the spectrum of R and Z varies, too (d = "
        f"{information['spectra'][0]['dim']}).",
        "![effective rank against rows; a stream that changes; I_2 against rows; I_2 against the true information]"
        "(images/estimators.png)",
        "\n".join(f"- {bullet}" for bullet in bullets),
        f"From `uv run {found['command']} --json {RESULT}` ({found['device']}, seed {found['seed']}, "
        f"{versions}); all figures are in [{Path(RESULT).name}](../{RESULT}).",
    ]
    return "\n\n".join(parts) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _count(rows: float | None) -> str:
    """Rows to two digits: they lie between two sizes that were measured."""
    return f"> {ROWS[-1]:,}" if rows is None else f"{float(f'{rows:.2g}'):,.0f}"


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def _spread(record: Record) -> str:
    text = f"{record['mean']:.2f} ± {record['sd']:.2f}"
    return text.removeprefix("-") if float(text.split()[0]) == 0 else text  # no minus zero


def _needed(rank: Found, **key: Any) -> float | None:
    rows: float | None = only(rank["needed"], dim=DIM, center=False, **key)["rows"]
    return rows


def _rank_table(rank: Found) -> str:
    shown = (256, 1024, 4096)
    rows = []
    for name in POPULATIONS:
        row = [name]
        for spectrum in SPECTRA:
            cells = [
                only(rank["rows"], population=name, spectrum=spectrum, center=False, rows=rows) for rows in shown
            ]
            row.append(f"{cells[0]['truth']:.0f}")
            row += [f"{100 * cell['bias']:+.1f} ± {100 * cell['sd'] / cell['truth']:.1f}" for cell in cells]
            row.append(_count(_needed(rank, population=name, spectrum=spectrum)))
        rows.append(row)
    columns = [f"{n:,} rows" for n in shown]
    return _table(["population", "ER, singular", *columns, "needed", "ER, eigen", *columns, "needed"], rows)


def _sweep_table(information: Found) -> str:
    ends = (CORRELATIONS[0], CORRELATIONS[-2])
    estimators = ("I_2", "I_1", "KSG")
    rows = []
    for dim in INFORMATION_DIMS:
        for correlation in ends:
            cells = pick(information["sweep"], dim=dim, correlation=correlation)
            readings = [_spread(only(cells, estimator=estimator)) for estimator in estimators]
            rows.append([f"{dim}, c = {correlation:g}", f"{cells[0]['truth']:.2f}", *readings])
    return _table(["d_R = d_Z", "true I(R;Z)", *estimators], rows)


NAMES = {
    "I_2": "I_2",
    "I_1": "I_1",
    "I_2 excess": "I_2 above shuffled",
    "I_1 excess": "I_1 above shuffled",
    "KSG": "KSG",
}
TRUE, RANK = "mutual information", "ER(R)"


def _order_table(information: Found) -> str:
    rows = []
    for estimator, label in NAMES.items():
        cells = [only(information["sweep_ranks"], estimator=estimator, dim=dim) for dim in INFORMATION_DIMS]
        cells += [only(information["spectra_ranks"], estimator=estimator, target=x) for x in (TRUE, RANK)]
        rows.append([label, *map(_spread, cells)])
    header = [f"true I, d = {dim}" for dim in INFORMATION_DIMS]
    return _table(["", *header, "true I, spectra vary", "ER(R), spectra vary"], rows)


def _rank_conclusions(rank: Found) -> list[str]:
    paper = {record["reading"]: record for record in pick(rank["paper"], population="power law")}
    batch, averaged, window = paper.values()
    tolerance = _percent(rank["tolerance"])

    needed = {
        (spectrum, heavy): [
            (_needed(rank, population=name, spectrum=spectrum) or math.inf) / DIM
            for name, population in POPULATIONS.items()
            if bool(population.tails) is heavy
        ]
        for spectrum in SPECTRA
        for heavy in (False, True)
    }
    light, heavy = (max(needed["singular", tails]) for tails in (False, True))
    paired = only(rank["views"], correlation=0.9)
    single = only(rank["views"], correlation=0.0, rows=paired["rows"])

    mean = pick(rank["rows"], population="power law + mean", rows=ROWS[0])
    truth = {(x["spectrum"], x["center"]): f"{x['truth']:.0f}" for x in mean}
    rounded = pick(rank["dtype"], dtype="bfloat16", spectrum="singular", center=False)
    noisy = max(abs(x["mean"] - 1) for x in rounded if x["population"] != "low rank")
    low_rank = POPULATIONS["low rank + noise"].signal
    return [
        f"The effective rank reads low. With singular values it hardly scatters, so averaging readings does "
        f"not help, but stacking their rows does: with {PAPER_DIM:,} dimensions (power law, true ER "
        f"{batch['truth']:,.0f}) a batch of {PAPER_BATCH} reads {batch['mean']:.0f}, the mean of "
        f"{WINDOW // PAPER_BATCH} batches {averaged['mean']:.0f}, and one spectrum of the same {WINDOW:,} "
        f"rows {window['mean']:,.0f}, which is {_percent(-window['bias'])} low. ER / d_Z, the paper's alpha, "
        f"is {batch['mean'] / PAPER_DIM:.2f} by the batch where {batch['truth'] / PAPER_DIM:.2f} is true.",
        f"For a bias within {tolerance}, singular values of Gaussian rows need "
        f"{min(needed['singular', False]):.1f} to {light:.1f} rows per dimension, whatever the spectrum; "
        f"eigenvalues {min(needed['eigen', False]):.1f} to {max(needed['eigen', False]):.1f}. Heavy tails "
        f"need {heavy:.1f} and {max(needed['eigen', True]):.1f}. So take {_round_up(light)} rows per "
        f"dimension, or {_round_up(heavy)} where some rows are far longer than others. Two views of an image "
        f"are less than two rows: at a correlation of {paired['correlation']:g}, {paired['rows']:,} rows are "
        f"{_percent(-paired['bias'], 1)} low, not {_percent(-single['bias'], 1)}.",
        f"Un-centered singular values are the stable convention: a mean like that after a ReLU moves the true "
        f"ER of the power law from {truth['singular', True]} to {truth['singular', False]}, and that of the "
        f"eigenvalues from {truth['eigen', True]} to {truth['eigen', False]}. Centering changes which "
        f"quantity is read, hardly how well. bfloat16 rows move the reading by {_percent(noisy, 2)} or less, "
        f"except of rows without any noise: {low_rank} exact dimensions then read "
        f"{low_rank * only(rounded, population='low rank')['mean']:.1f}.",
    ]


def _round_up(rows: float) -> str:
    """To the next half."""
    return f"{math.ceil(2 * rows) / 2:g}"


def _information_conclusions(information: Found) -> list[str]:
    dim = INFORMATION_DIMS[-1]
    none, strong = (
        only(information["sweep"], estimator="I_2", dim=dim, correlation=c) for c in (0.0, CORRELATIONS[-2])
    )
    head = {record["head"]: record for record in information["head"]}
    apart = head["independent"]
    lowest = min(x["value"] for x in information["negative"] if x["order"] == 2.0)
    grown = pick(information["growth"], estimator="I_2", dim=8, correlation=0.0)

    ranks = {(x["estimator"], x["target"]): f"{x['mean']:.2f}" for x in information["spectra_ranks"]}
    neighbors = only(information["sweep"], estimator="KSG", dim=8, correlation=CORRELATIONS[-2])
    means = pick(information["centering"], order=2.0, mean_power=_short(MEAN_POWERS[1]))
    hidden, centered = (only(means, center=center)["mean"] for center in (False, True))
    return [
        f"I_2 and I_1 are no mutual information in nats. In {dim} dimensions, independent R and Z read "
        f"{none['mean']:.2f}, and R and Z that share {strong['truth']:.0f} nats {strong['mean']:.2f}. At "
        f"common widths ({apart['dim_r']} and {apart['dim_z']:,}, {apart['rows']} rows, bound ln n = "
        f"{math.log(apart['rows']):.2f}) an independent Z reads {apart['mean']:.2f} and a linear map of R, "
        f"whose spectrum is narrower, {head['linear map']['mean']:.2f} "
        f"({head['linear map, shuffled']['mean']:.2f} when its pairs are torn apart). The reading of "
        f"independent ones changes with the rows (8 dimensions: {grown[0]['mean']:.2f} with "
        f"{grown[0]['rows']}, {grown[-1]['mean']:.2f} with {grown[-1]['rows']:,}), and I_2 can be negative "
        f"({lowest:.2f} for two one-hot codes of which one is always at zero).",
        f"At a fixed spectrum and number of rows I_2 does rise with the information. Where the spectrum "
        f"varies, it follows ER(R) (Spearman {ranks['I_2', RANK]}) rather than the information "
        f"({ranks['I_2', TRUE]}); less its reading of shuffled pairs it follows the information "
        f"({ranks['I_2 excess', TRUE]}). KSG orders best ({ranks['KSG', TRUE]}), but is no measure of large "
        f"values either: {neighbors['mean']:.1f} of {neighbors['truth']:.1f} nats in 8 dimensions.",
        f"A mean hides dependence: with one like that after a ReLU, I_2 falls from {centered:.2f} centered to "
        f"{hidden:.2f} (c = {means[0]['correlation']:g}). So compare I_2 at equal rows and widths only, beside "
        f"ER(R), ER(Z) and the reading of shuffled pairs; take its fall for less dependence only where those "
        f"stand still.",
    ]


def to_text(found: Found) -> str:
    """JSON with a record a line."""
    text = json.dumps(found, indent=1, allow_nan=False)
    return re.sub(r"\{[^{}\[\]]*\}", lambda match: json.dumps(json.loads(match[0])), text) + "\n"


def pictures(found: Found) -> dict[str, Figure]:
    """The picture of the results page: rank and information, each against rows and against what misleads it.

    Args:
        found: of :func:`measure`, all of it, not the quick part.
    """
    figure = Figure(figsize=(10.5, 8.4), layout="constrained")
    (rank, stream), (growth, spectra) = figure.subplots(2, 2)
    _draw_rank(rank, found["effective_rank"]["rows"])
    _draw_stream(stream, found["effective_rank"]["stream"])
    _draw_growth(growth, found["information"]["growth"])
    _draw_spectra(spectra, found["information"]["spectra"])
    return {"estimators": figure}


def _draw_rank(axes: Axes, records: list[Record]) -> None:
    for index, name in enumerate(("isotropic", "steep power law", "power law, heavy tails")):
        style = style_of(index)
        for spectrum, line in zip(SPECTRA, ("-", ":"), strict=True):
            curve = pick(records, population=name, spectrum=spectrum, center=False)
            axes.semilogx(
                [record["rows"] / record["dim"] for record in curve],
                [record["mean"] / record["truth"] for record in curve],
                color=style.color,
                linestyle=line,
                marker=style.marker,
                markersize=5,
                label=name if spectrum == "singular" else None,
            )
    axes.plot([], [], color=GREY, linestyle=":", label="the same, eigenvalues")
    axes.axhspan(
        1 - TOLERANCE, 1 + TOLERANCE, color=GREY, alpha=0.18, linewidth=0, label=f"within {_percent(TOLERANCE)}"
    )
    axes.set_ylim(0, 1.08)
    axes.set_xticks([0.25, 1, 4, 16], ["1/4", "1", "4", "16"])
    axes.minorticks_off()
    _finish(
        axes, f"Effective rank needs rows (d = {records[0]['dim']})", "rows per dimension", "reading / true value"
    )
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def _draw_stream(axes: Axes, records: list[Record]) -> None:
    rows = [record["rows"] for record in pick(records, reading="window")]
    truths = [record["truth"] for record in pick(records, reading="window")]
    change = STREAM_CHANGE * STREAM_BATCH
    before, after = truths[0], truths[-1]
    axes.plot([0, change, change, rows[-1]], [before, before, after, after], color="black", label="true value")
    names = {
        "all rows": "all rows so far",
        "window": f"running window of {WINDOW:,} rows",
        "one batch": f"one batch of {STREAM_BATCH}",
    }
    for index, (reading, label) in enumerate(names.items()):
        style = style_of(index)
        means = [record["mean"] for record in pick(records, reading=reading)]
        axes.plot(rows, means, color=style.color, linestyle=style.line, marker=style.marker, ms=5, label=label)
    axes.axhline(STREAM_BATCH, color=GREY, linewidth=1)
    axes.annotate("most that one batch can read", (0, STREAM_BATCH + 5), color=GREY, fontsize=9)
    axes.set_ylim(0, 1.32 * before)
    _finish(axes, "One batch is bounded, all rows are late", "rows seen", "effective rank, singular values")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False, fontsize=9, loc="upper right", ncols=2)


def _draw_growth(axes: Axes, records: list[Record]) -> None:
    records = pick(records, estimator="I_2")
    rows = sorted({record["rows"] for record in records})
    axes.semilogx(rows, np.log(rows), color="black", label="ln n, the most possible")
    for index, dim in enumerate((128, 8)):
        for correlation, line in ((0.9, "-"), (0.0, ":")):
            curve = pick(records, dim=dim, correlation=correlation)
            style = style_of(index)
            axes.semilogx(
                [record["rows"] for record in curve],
                [record["mean"] for record in curve],
                color=style.color,
                linestyle=line,
                marker=style.marker,
                markersize=5,
                label=f"d = {dim}, true I(R;Z) = {curve[0]['truth']:.3g}",
            )
    axes.set_xticks(rows, [f"{n:,}" for n in rows])
    axes.minorticks_off()
    axes.set_ylim(0, 10.5)
    _finish(axes, "$I_2$ is not zero for independent R and Z", "rows n", "$I_2$ [nats]")
    axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)


def _draw_spectra(axes: Axes, records: list[Record]) -> None:
    for index, decay in enumerate(DECAYS):
        style = style_of(index)
        curve = pick(records, estimator="I_2", decay=decay)
        axes.plot(
            [record["truth"] for record in curve],
            [record["mean"] for record in curve],
            color=style.color,
            linestyle=style.line,
            marker=style.marker,
            markersize=5,
            label=f"$I_2$, eigenvalues $k^{{-{decay:g}}}$" if decay else "$I_2$, flat spectrum",
        )
    for index, decay in enumerate(DECAYS):
        neighbors = pick(records, estimator="KSG", decay=decay)
        axes.plot(
            [record["truth"] for record in neighbors],
            [record["mean"] for record in neighbors],
            color=GREY,
            linewidth=1,
            label=None if index else "nearest neighbors (KSG), all four",
        )
    _finish(
        axes,
        f"$I_2$ follows the spectrum (d = {records[0]['dim']}, {records[0]['rows']} rows)",
        "true I(R;Z) [nats]",
        "estimate [nats]",
    )
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    axes.set_ylim(-0.1, 4.2)


def _finish(axes: Axes, title: str, below: str, beside: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(below, fontsize=10)
    axes.set_ylabel(beside, fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--quick", action="store_true", help="a few draws of the cheaper cells")
    arguments = parser.parse_args()
    found = measure(arguments.quick)
    if arguments.json:
        arguments.json.write_text(to_text(found))
    print(to_text(found) if arguments.quick else markdown(found))


if __name__ == "__main__":
    main()
