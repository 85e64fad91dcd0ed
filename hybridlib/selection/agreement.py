"""How far two rankings or layer sets agree, and how sure a number is: 95 percent intervals (value, low, high)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import comb

import numpy as np
from scipy import stats

from hybridlib.checks import check_int
from hybridlib.models.hybrid import check_layers

__all__ = ["RANGES", "bootstrap_interval", "chance_jaccard", "contiguity", "contiguity_distribution", "interval",
           "jaccard", "kendall", "paired_difference", "spearman", "top_k_jaccard"]

CONFIDENCE = 0.95  # of every interval
#: what values of a metric or of an agreement can be: (least, largest)
RANGES = {"kl": (0.0, np.inf), "perplexity": (1.0, np.inf), "top1_agreement": (0.0, 1.0), "recall_exact": (0.0, 1.0),
          "recall_composite": (0.0, 1.0), "jaccard": (0.0, 1.0), "spearman": (-1.0, 1.0), "kendall": (-1.0, 1.0)}


def jaccard(a: Iterable[int], b: Iterable[int]) -> float:
    """Share of the layers in either set that are in both, |a and b| / |a or b|; 1.0 if both are empty."""
    a, b = set(a), set(b)
    return len(a & b) / len(a | b) if a | b else 1.0


def chance_jaccard(num_layers: int, k_a: int, k_b: int | None = None) -> float:
    """Expected `jaccard` of sets of `k_a` and `k_b` (None: `k_a`) of `num_layers` layers, drawn at random: exact."""
    k_b = k_a if k_b is None else k_b
    check_int("k_a", k_a, 1, num_layers)
    check_int("k_b", k_b, 1, num_layers)
    shared = range(max(0, k_a + k_b - num_layers), min(k_a, k_b) + 1)
    return sum(comb(k_a, s) * comb(num_layers - k_a, k_b - s) / comb(num_layers, k_b) * s / (k_a + k_b - s)
               for s in shared)


def contiguity(layers: Iterable[int], num_layers: int) -> tuple[int, float, float]:
    """Whether layers cluster: (pairs, expected, probability), for pairs of neighbours l and l + 1 in the set.

    `expected` is the mean number of pairs over all sets of as many layers, K (K - 1) / L; `probability` is the share of
    those sets with at least as many pairs. Raises ValueError for no layer, or one out of range.
    """
    layers = check_layers(layers, num_layers)
    pairs, k = sum(l + 1 in layers for l in layers), len(layers)
    return pairs, k * (k - 1) / num_layers, float(contiguity_distribution(k, num_layers)[pairs:].sum())


def contiguity_distribution(k: int, num_layers: int) -> np.ndarray:
    """The share of all sets of `k` layers with p pairs of neighbours, for each p: (k,) (Wald and Wolfowitz, 1940)."""
    check_int("k", k, 1, num_layers)
    sets = comb(num_layers, k)
    return np.array([comb(k - 1, r - 1) * comb(num_layers - k + 1, r) / sets for r in range(k, 0, -1)])


def top_k_jaccard(scores_a: Sequence[float], scores_b: Sequence[float], k: int) -> float | np.ndarray:
    """`jaccard` of the `k` layers with the highest scores in each, (..., layers) -> (...); ties go to low indices."""
    a, b = _pair("scores_a", scores_a, "scores_b", scores_b, 1)
    check_int("k", k, 1, a.shape[-1])
    a, b = (np.argsort(-scores, axis=-1, kind="stable")[..., :k] for scores in (a, b))
    shared = (a[..., :, None] == b[..., None, :]).sum((-2, -1))
    return shared / (2 * k - shared)


def spearman(x: Sequence[float], y: Sequence[float]) -> float | np.ndarray:
    """Spearman's rank correlation, (..., n) -> (...); equal values share a rank; nan and ValueError as in `kendall`."""
    x, y = _pair("x", x, "y", y, 2)
    return _correlation(*(2 * stats.rankdata(values, axis=-1) - values.shape[-1] - 1 for values in (x, y)))


def kendall(x: Sequence[float], y: Sequence[float]) -> float | np.ndarray:
    """Kendall's tau-b, (..., n) -> (...); nan for a constant, ValueError for unlike lengths or a value not finite."""
    x, y = _pair("x", x, "y", y, 2)
    orders = (np.sign(values[..., :, None] - values[..., None, :]) for values in (x, y))
    return _correlation(*(order.reshape(*order.shape[:-2], -1) for order in orders))


def _correlation(x, y):
    """Pearson's correlation along the last axis, where both have mean 0."""
    with np.errstate(invalid="ignore"):
        rho = (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.clip(rho, -1.0, 1.0)


def interval(values: Sequence[float], within: tuple[float, float] | None = None) -> tuple[float, float, float]:
    """Mean and Student's t interval over seeds, ``mean +- t * s / sqrt(n)``; one value v gives (v, nan, nan).

    `within` (least, largest) is what the quantity can be, see `RANGES`; the interval is cut to it.
    """
    values = _finite("values", values, 1)
    if values.ndim != 1:
        raise ValueError(f"values has shape {values.shape}; it must be one-dimensional")
    least, most = within or (-np.inf, np.inf)
    mean = float(values.mean())
    if len(values) == 1:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values))
    return mean, min(mean, max(least, mean - half)), max(mean, min(most, mean + half))  # rounding may leave the range


def paired_difference(a: Sequence[float], b: Sequence[float],
                      within: tuple[float, float] | None = None) -> tuple[float, float, float]:
    """`interval` of a - b, where entry i of both is of one seed; `within` is the range of `a` and of `b`."""
    a, b = _pair("a", a, "b", b, 1)
    return interval(a - b, within and (within[0] - within[1], within[1] - within[0]))


def bootstrap_interval(statistic: Callable[..., np.ndarray], *samples: Sequence[float], resamples: int = 2000,
                       seed: int = 0) -> tuple[float, float, float]:
    """Value and percentile bootstrap interval of ``statistic(*samples)``, a map from arrays (..., n) to (...).

    All samples are resampled with the same indices. Draws whose statistic is nan are left out; if they are at least
    half, low and high are nan.
    """
    arrays = [_finite(f"samples[{i}]", s, 2) for i, s in enumerate(samples)]
    if len({a.shape for a in arrays}) != 1:
        raise ValueError(f"samples have lengths {[len(a) for a in arrays]}; give at least one, all of one length")
    check_int("resamples", resamples, 100)
    value, n = float(statistic(*arrays)), len(arrays[0])
    draws = np.random.default_rng(seed).integers(0, n, (resamples, n))
    values = statistic(*(a[draws] for a in arrays))
    values = values[np.isfinite(values)]
    if not np.isfinite(value) or len(values) <= resamples / 2:
        return value, float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return value, float(low), float(high)


def _finite(name, values, least):
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or array.shape[-1] < least:
        raise ValueError(f"{name} has shape {array.shape}; it must have at least {least} value(s)")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has the value {array[~np.isfinite(array)][0]}; all values must be finite")
    return array


def _pair(name_a, a, name_b, b, least):
    a, b = _finite(name_a, a, least), _finite(name_b, b, least)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"{name_a} has {a.shape[-1]} values and {name_b} has {b.shape[-1]}; they must have as many")
    return a, b
