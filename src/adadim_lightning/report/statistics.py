"""Means over seeds, paired differences and rank correlations: numbers alone, no runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

CONFIDENCE = 0.95
DASH = "\N{EN DASH}"  # in the place of a number that there is not


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None for fewer than two values) and number of values."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with its 95 % confidence interval, and the number of pairs."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Correlation:
    """Rank correlation of a value with the accuracy, over runs."""

    name: str
    spearman: float
    kendall: float
    n: int


@dataclass(frozen=True)
class Band:
    """A curve over several runs: mean at each epoch, and sample standard deviation (NaN of a single run)."""

    epoch: Array
    mean: Array
    sd: Array


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and sample standard deviation; None of nothing.

    Example:
        >>> spread([1.0, 3.0])
        Spread(mean=2.0, sd=1.4142135623730951, n=2)
    """
    if not values:
        return None
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), sd, len(values))


def paired_difference(
    values: Sequence[tuple[int | None, float]], baseline: Sequence[tuple[int | None, float]]
) -> Difference | None:
    """Mean difference to a baseline, paired by seed, with Student's 95 % confidence interval.

    Args:
        values: seed and value of each run; several runs of one seed count by their mean, and a run without a
            seed has no partner.
        baseline: the same of the baseline.

    Returns:
        The difference, or None where fewer than two seeds are in both.
    """
    from scipy.stats import t

    ours, theirs = _by_seed(values), _by_seed(baseline)
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    n = len(differences)
    if n < 2:
        return None
    mean = float(np.mean(differences))
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * float(np.std(differences, ddof=1)) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def _by_seed(values: Sequence[tuple[int | None, float]]) -> dict[int, float]:
    seeds: dict[int, list[float]] = {}
    for seed, value in values:
        if seed is not None:
            seeds.setdefault(seed, []).append(value)
    return {seed: float(np.mean(found)) for seed, found in seeds.items()}


def rank_correlation(name: str, pairs: Sequence[tuple[float, float]]) -> Correlation | None:
    """Spearman's rho and Kendall's tau-b of pairs; None of fewer than three, or where one side is constant."""
    from scipy.stats import kendalltau, spearmanr

    x, y = zip(*pairs, strict=True) if pairs else ((), ())
    if len(pairs) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return Correlation(name, float(spearmanr(x, y).statistic), float(kendalltau(x, y).statistic), len(pairs))


def band(curves: Sequence[tuple[Array, Array]]) -> Band:
    """Mean curve over runs: at each epoch of those that have a value there.

    Args:
        curves: epochs and values of each run, of any lengths.
    """
    epochs = np.unique(np.concatenate([epochs for epochs, _ in curves])) if curves else np.empty(0)
    table = np.full((len(curves), len(epochs)), math.nan)
    for row, (own, values) in zip(table, curves, strict=True):
        row[np.searchsorted(epochs, own)] = values
    n = np.isfinite(table).sum(axis=0)
    mean = np.nansum(table, axis=0) / n
    squares = np.nansum((table - mean) ** 2, axis=0)
    return Band(epochs, mean, np.where(n > 1, np.sqrt(squares / np.maximum(n - 1, 1)), math.nan))


def mean_spectrum(spectra: Sequence[Mapping[str, Array]], key: str) -> Array:
    """Eigenvalues of the last epoch as shares of their sum, mean over runs; empty where there are none."""
    last = [found[key][-1] for found in spectra if key in found and len(found[key])]
    shares = [row / row.sum() for row in last if row.sum() > 0]
    width = max(map(len, shares), default=0)
    return np.mean([np.pad(share, (0, width - len(share))) for share in shares], axis=0) if shares else np.empty(0)


def thinned(length: int, most: int) -> Array:
    """Indices of at most so many points, evenly spread, first and last among them: what a picture can show."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int))


def digits(value: float | None, *, decimals: int = 3, sign: bool = False) -> str:
    """A number with as many digits as a reader can use; a dash for none.

    Example:
        >>> digits(0.98765), digits(45.678), digits(1234.5), digits(2e-5), digits(3)
        ('0.988', '45.68', '1,234', '2.0e-05', '3.000')
    """
    if value is None or not math.isfinite(value):
        return DASH
    size = abs(value)
    plus = "+" if sign else ""
    if size and size < 0.5 * 10**-decimals:
        text = f"{value:{plus}.1e}"
    elif size >= 1000:
        text = f"{value:{plus},.0f}" if size < 1e7 else f"{value:{plus}.2e}"
    else:
        text = f"{value:{plus}.{1 if size >= 100 else min(2, decimals) if size >= 10 else decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}") if sign else text
