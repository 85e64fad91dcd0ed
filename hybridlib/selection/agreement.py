"""How far two rankings or two layer sets agree, and how sure a number over a few seeds is.

All intervals are (value, low, high). A number that is not defined (the spread of one seed, the correlation of a
constant ranking) is nan.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from math import comb

import numpy as np
from scipy import stats

from hybridlib.checks import check_int, check_number

__all__ = ["RANGES", "bootstrap_interval", "chance_jaccard", "contiguity", "contiguity_distribution", "interval",
           "jaccard", "kendall", "paired_difference", "pairwise", "spearman", "stability", "top_k_jaccard"]

#: what values of a metric or of an agreement can be: (least, largest)
RANGES = {"kl": (0.0, np.inf), "perplexity": (1.0, np.inf), "top1_agreement": (0.0, 1.0), "recall_exact": (0.0, 1.0),
          "jaccard": (0.0, 1.0), "spearman": (-1.0, 1.0), "kendall": (-1.0, 1.0)}


def jaccard(a: Iterable[int], b: Iterable[int]) -> float:
    """Share of the layers in either set that are in both, |a and b| / |a or b|; 1.0 if both are empty.

    Order and repeats do not count. Raises ValueError if an entry is no whole number.
    """
    a, b = _layers("a", a), _layers("b", b)
    return len(a & b) / len(a | b) if a | b else 1.0


def chance_jaccard(num_layers: int, k_a: int, k_b: int | None = None) -> float:
    """Expected `jaccard` of two sets of `k_a` and `k_b` (None: `k_a`) layers drawn at random from `num_layers`.

    The overlap is hypergeometric; the expectation is summed exactly.
    """
    k_b = k_a if k_b is None else k_b
    check_int("num_layers", num_layers, 1)
    check_int("k_a", k_a, 1, num_layers)
    check_int("k_b", k_b, 1, num_layers)
    shared = range(max(0, k_a + k_b - num_layers), min(k_a, k_b) + 1)
    return sum(comb(k_a, s) * comb(num_layers - k_a, k_b - s) / comb(num_layers, k_b) * s / (k_a + k_b - s)
               for s in shared)


def contiguity(layers: Iterable[int], num_layers: int) -> tuple[int, float, float]:
    """Whether layers cluster: (pairs, expected, probability), for pairs of neighbours l and l + 1 in the set.

    `expected` is the mean number of pairs over all sets of as many layers, K (K - 1) / L. `probability` is the share of
    those sets that have at least as many pairs, see `contiguity_distribution`; it is small if the layers cluster.

    Raises ValueError if there is no layer, or one that is not from 0 to ``num_layers - 1``.
    """
    chosen = _layers("layers", layers)
    check_int("num_layers", num_layers, 1)
    if not chosen or min(chosen) < 0 or max(chosen) >= num_layers:
        raise ValueError(f"layers={sorted(chosen)} are not one or more layers from 0 to {num_layers - 1}")
    pairs, k = sum(layer + 1 in chosen for layer in chosen), len(chosen)
    return pairs, k * (k - 1) / num_layers, float(contiguity_distribution(k, num_layers)[pairs:].sum())


def contiguity_distribution(k: int, num_layers: int) -> np.ndarray:
    """The share of all sets of `k` layers that have p pairs of neighbours, for each p: (k,).

    k layers in r runs have k - r pairs, and C(k - 1, r - 1) C(L - k + 1, r) of the C(L, k) sets have r runs (the runs
    test of Wald and Wolfowitz, 1940).
    """
    check_int("num_layers", num_layers, 1)
    check_int("k", k, 1, num_layers)
    sets = comb(num_layers, k)
    return np.array([comb(k - 1, r - 1) * comb(num_layers - k + 1, r) / sets for r in range(k, 0, -1)])


def top_k_jaccard(scores_a: Sequence[float], scores_b: Sequence[float], k: int) -> float:
    """`jaccard` of the `k` layers with the highest scores in each; of equal scores the lower layer index is taken.

    Raises ValueError if the scores differ in length or are not finite, or `k` is not from 1 to the number of layers.
    """
    a, b = _pair("scores_a", scores_a, "scores_b", scores_b, 1)
    check_int("k", k, 1, len(a))
    best = [np.argsort(-scores, kind="stable")[:k] for scores in (a, b)]
    return jaccard(*best)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values share their mean rank.

    nan if `x` or `y` is constant. Raises ValueError if they differ in length, have fewer than two values or one that is
    not finite. The numbers are those of scipy's `spearmanr`, a call of which takes about ten times as long: a bootstrap
    makes thousands.
    """
    return _correlation(x, y, lambda order: order.sum(1))  # twice the ranks less their mean


def kendall(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b: pairs in the same order less pairs in opposite order, corrected for ties.

    nan and ValueError as in `spearman`; the numbers are those of scipy's `kendalltau`.
    """
    return _correlation(x, y, np.ravel)


def _correlation(x, y, form):
    """Of a `form` of the order of every pair: 1, 0 or -1 if x_i is above, level with or below x_j, (n, n)."""
    x, y = (form(np.sign(values[:, None] - values)) for values in _pair("x", x, "y", y, 2))
    if not x.any() or not y.any():
        return float("nan")
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def interval(values: Sequence[float], confidence: float = 0.95,
             within: tuple[float, float] | None = None) -> tuple[float, float, float]:
    """Mean and Student's t interval of a quantity over seeds, ``mean +- t * s / sqrt(n)``.

    The interval holds for independent, roughly normal values; for two of them t is 12.7. One value v gives (v, nan,
    nan). `within` (least, largest) is what the quantity can be, see `RANGES`: the interval is cut to it, and is rough
    where it was cut, since values near an end are not normal.
    """
    values = _finite("values", values, 1)
    check_confidence(confidence)
    least, most = within or (-np.inf, np.inf)
    mean = float(values.mean())
    if len(values) == 1:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values))
    return mean, min(mean, max(least, mean - half)), max(mean, min(most, mean + half))  # rounding may leave the range


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95,
                      within: tuple[float, float] | None = None) -> tuple[float, float, float]:
    """`interval` of a - b, where entry i of both is of one seed, so that what its two runs share cancels.

    The two differ at that confidence if low and high have the same sign. `within` is the range of `a` and of `b`.
    """
    a, b = _pair("a", a, "b", b, 1)
    return interval(a - b, confidence, within and (within[0] - within[1], within[1] - within[0]))


def bootstrap_interval(statistic: Callable[..., float], *samples: Sequence[float], confidence: float = 0.95,
                       resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Value and percentile bootstrap interval of ``statistic(*samples)``.

    All samples are resampled with the same indices, so that entry i of each (a layer's two scores) stays together.
    Draws whose statistic is nan are left out, which scipy's `bootstrap` cannot do; if they are more than half, low and
    high are nan. The interval is rough for few layers, and narrow at the ends of a bounded statistic.

    Parameters
    ----------
    statistic : maps arrays of one length to a number.
    samples : one or more sequences of the same length, at least two values each.
    resamples : draws, at least 100.
    seed : of the draws.
    """
    if not samples:
        raise ValueError("samples is empty; give bootstrap_interval at least one sequence")
    arrays = [_finite(f"samples[{i}]", s, 2) for i, s in enumerate(samples)]
    if len({len(a) for a in arrays}) > 1:
        raise ValueError(f"samples have lengths {[len(a) for a in arrays]}; they must be equal")
    check_confidence(confidence)
    check_int("resamples", resamples, 100)
    check_int("seed", seed, 0)
    value, n = float(statistic(*arrays)), len(arrays[0])
    draws = np.random.default_rng(seed).integers(0, n, (resamples, n))
    values = np.array([statistic(*(a[rows] for a in arrays)) for rows in draws], dtype=float)
    values = values[np.isfinite(values)]
    if not np.isfinite(value) or len(values) <= resamples / 2:
        return value, float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return value, float(low), float(high)


def pairwise(measure: Callable[..., float], items: Sequence) -> np.ndarray:
    """Matrix (n, n) of ``measure(items[i], items[j])``, e.g. `jaccard` of layer sets or `spearman` of scores."""
    items = list(items)
    return np.array([[float(measure(a, b)) for b in items] for a in items]).reshape(len(items), len(items))


def stability(history: Sequence[Sequence[float]], k: int) -> np.ndarray:
    """How near the ranking at each measurement along training is to the last one: (measurements, 2).

    Columns: `spearman` with the last measurement, and `top_k_jaccard` of the `k` best with it. `history` has a score a
    layer for each measurement, as `LayerScores.history` has. Raises ValueError for no measurement, and as those two do.
    """
    history = [list(scores) for scores in history]
    if not history:
        raise ValueError("history is empty; give at least one measurement")
    return np.array([[spearman(scores, history[-1]), top_k_jaccard(scores, history[-1], k)] for scores in history])


def check_confidence(confidence: float) -> None:
    """Raise ValueError unless `confidence` is above 0 and below 1."""
    check_number("confidence", confidence, 0, 1, open_low=True)
    if confidence == 1:
        raise ValueError("confidence=1 gives an endless interval; use a number below 1")


def _layers(name: str, layers: Iterable[int]) -> set[int]:
    try:
        return {operator.index(layer) for layer in layers}
    except TypeError:
        raise ValueError(f"{name}={layers!r} is no set of layers; give whole numbers, e.g. (0, 3, 7)") from None


def _finite(name: str, values: Sequence[float], least: int) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={values!r} is not a sequence of numbers") from None
    if array.ndim != 1 or len(array) < least:
        raise ValueError(f"{name} has shape {array.shape}; it must be one-dimensional with at least {least} value(s)")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has the value {array[~np.isfinite(array)][0]}; all values must be finite")
    return array


def _pair(name_a: str, a: Sequence[float], name_b: str, b: Sequence[float],
          least: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = _finite(name_a, a, least), _finite(name_b, b, least)
    if len(a) != len(b):
        raise ValueError(f"{name_a} has {len(a)} values and {name_b} has {len(b)}; they must have as many")
    return a, b
