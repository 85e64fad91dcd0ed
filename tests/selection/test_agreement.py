"""Agreement measures against closed forms, numbers worked out by hand, and enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from hybridlib.selection.agreement import (RANGES, bootstrap_interval, chance_jaccard, interval, jaccard, kendall,
                                           paired_difference, spearman, top_k_jaccard)


def test_jaccard_by_hand():
    assert jaccard([0, 1, 2, 3], (3, 2, 8)) == 2 / 5
    assert jaccard([1, 1, 2], {1, 2}) == jaccard([], []) == 1.0
    assert jaccard([], [4]) == 0.0 and jaccard(np.array([1, 2]), [2]) == 0.5


@pytest.mark.parametrize("n, a, b", [(6, 2, 3), (5, 4, 4), (4, 4, 2)])
def test_chance_jaccard_is_the_mean_over_all_pairs_of_sets(n, a, b):
    pairs = itertools.product(itertools.combinations(range(n), a), itertools.combinations(range(n), b))
    assert chance_jaccard(n, a, b) == pytest.approx(np.mean([jaccard(x, y) for x, y in pairs]), abs=1e-12)


def test_top_k_jaccard():
    a, b = [0.9, 0.1, 0.8, 0.7], [0.9, 0.8, 0.1, 0.7]
    assert top_k_jaccard(a, b, 1) == 1.0  # {0} and {0}
    assert top_k_jaccard(a, b, 2) == 1 / 3  # {0, 2} and {0, 1}
    assert top_k_jaccard(a, b, 3) == 2 / 4  # {0, 2, 3} and {0, 1, 3}
    assert top_k_jaccard([1, 1, 1], [3, 2, 1], 2) == 1.0  # equal scores: the lower index
    with pytest.raises(ValueError, match="k=5 is not a whole number from 1 to 4"):
        top_k_jaccard(a, b, 5)


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlations_are_scipys(seed):
    x, y = np.random.default_rng(seed).integers(0, 12, (2, 4, 30))  # with ties
    for ours, theirs in ((spearman, stats.spearmanr), (kendall, stats.kendalltau)):
        assert ours(x, y) == pytest.approx([theirs(*rows).statistic for rows in zip(x, y, strict=True)], abs=1e-12)


@pytest.mark.parametrize("measure", [spearman, kendall])
def test_a_constant_ranking_orders_nothing(measure):
    assert math.isnan(measure([1, 1, 1], [1, 2, 3])) and math.isnan(measure([1, 2, 3], [0.5, 0.5, 0.5]))
    assert np.isnan(measure([[1, 1, 1], [1, 2, 3]], [1, 2, 3])).tolist() == [True, False]


@pytest.mark.parametrize("measure", [spearman, kendall, paired_difference])
def test_bad_values_are_refused(measure):
    for values, message in (([1, 2, 3], "2 values and .* has 3"), ([1, float("nan")], "value nan; all values must be")):
        with pytest.raises(ValueError, match=message):
            measure([1, 2], values)
    with pytest.raises(ValueError, match="one-dimensional"):
        interval([[1.0, 2.0]])


def test_interval_with_the_table_of_student():
    half = 4.302653 / math.sqrt(3)  # s = 1, t(0.975, 2) = 4.302653
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - half, 2 + half), abs=1e-6)
    half = 12.706205  # s / sqrt(2) = 1, t(0.975, 1) = 12.706205
    assert interval([0.0, 2.0]) == pytest.approx((1.0, 1 - half, 1 + half), abs=1e-5)
    assert interval([0.25]) == pytest.approx((0.25, math.nan, math.nan), nan_ok=True)  # one seed


def test_an_interval_is_cut_to_what_a_quantity_can_be():
    mean, low, high = interval([0.9, 1.0], within=RANGES["recall_exact"])  # 0.95 +- 0.64 before
    assert (mean, high) == (pytest.approx(0.95), 1.0) and low == pytest.approx(interval([0.9, 1.0])[1])
    assert interval([0.5, 0.6, 0.7], within=(0.0, 1.0)) == interval([0.5, 0.6, 0.7])
    assert interval([0.0, 0.2], within=RANGES["kl"])[1] == 0 and interval([0.0, 0.2], within=RANGES["kl"])[2] > 1
    mean, low, high = interval([-1e-9, -1e-9], within=RANGES["kl"])  # rounding left the range
    assert low <= mean <= high
    difference = paired_difference([1.0, 0.1], [0.0, 0.0], within=RANGES["recall_exact"])
    assert difference == (pytest.approx(0.55), -1.0, 1.0)
    assert paired_difference([1.0, 0.1], [0.0, 0.0], within=RANGES["kl"]) == paired_difference([1.0, 0.1], [0.0, 0.0])


def test_paired_difference_cancels_what_seeds_share():
    seeds = np.array([0.0, 10.0, 20.0])
    mean, low, high = paired_difference(seeds + [1.1, 1.0, 0.9], seeds)
    assert mean == pytest.approx(1.0) and 0 < low < 1 < high
    assert high - low == pytest.approx(2 * 4.302653 * 0.1 / math.sqrt(3), abs=1e-6)


def test_bootstrap_of_a_mean_is_near_the_normal_interval():
    values = np.random.default_rng(1).normal(0, 1, 400)
    value, low, high = bootstrap_interval(lambda drawn: drawn.mean(-1), values, seed=3)
    half = 1.96 * values.std() / 20
    assert value == values.mean()
    assert low == pytest.approx(value - half, abs=0.2 * half) and high == pytest.approx(value + half, abs=0.2 * half)


def test_bootstrap_keeps_pairs_together_and_is_seeded():
    x = np.arange(12.0)
    assert bootstrap_interval(spearman, x, x ** 3, resamples=200) == pytest.approx((1.0, 1.0, 1.0))
    y = np.random.default_rng(0).permutation(x)
    first = bootstrap_interval(spearman, x, y, resamples=200, seed=5)
    assert first == bootstrap_interval(spearman, x, y, resamples=200, seed=5)
    assert first != bootstrap_interval(spearman, x, y, resamples=200, seed=6)
    assert -1 <= first[1] < first[0] < first[2] <= 1


def test_bootstrap_of_an_undefined_statistic():
    assert np.isnan(bootstrap_interval(spearman, [1, 1, 1], [1, 2, 3], resamples=100)).all()
    for samples, message in ((([1, 2], [1, 2, 3]), "lengths"), ((), "give at least one")):
        with pytest.raises(ValueError, match=message):
            bootstrap_interval(spearman, *samples)
