"""Selection rules on hand-made scores."""

from __future__ import annotations

import pytest

import hybridlib as hl


def scores(values, direction="add", metric="kl"):
    values = tuple(map(float, values))
    return hl.LayerScores(direction, metric, values, values, (0.0,) * len(values), 0, 0.0)


GA = scores([0.1, 0.9, 0.5, 0.2, 0.8, 0.0])                   # 1 4 2 3 0 5
GR = scores([0.9, 0.1, 0.8, 0.7, 0.2, 0.6], "remove")        # 0 2 3 5 4 1
S1 = scores([0.0, 0.0, 0.3, 0.2, 0.1, 0.9], metric="mse")    # 5 2 3 4 0 1


@pytest.mark.parametrize(("name", "expected"), [("ga-s2", (1, 2, 4)), ("gr-s2", (0, 2, 3)), ("ga-s1", (2, 3, 5))])
def test_a_ranking_keeps_its_best(name, expected):
    assert hl.select(name, 0.5, scores=[GR, S1, GA]) == expected


def test_average_is_of_ranks_and_ties_go_to_ga():
    # ranks GA: 0:4 1:0 2:2 3:3 4:1 5:5; GR: 0:0 1:5 2:1 3:2 4:4 5:3; sums: 0:4 1:5 2:3 3:5 4:5 5:8
    assert hl.select("avg", 3, scores=[GA, GR]) == (0, 1, 2)
    assert hl.select("avg", 4, scores=[GR, GA]) == (0, 1, 2, 4)


def test_uniform_takes_the_centres_of_equal_blocks():
    assert hl.select("uniform", 2, num_layers=8) == (2, 6)
    assert hl.select("uniform", 0.25, num_layers=28) == (2, 6, 10, 14, 18, 22, 26)
    for layers in range(1, 40):
        for count in range(1, layers + 1):
            kept = hl.select("uniform", count, num_layers=layers)
            gaps = [b - a for a, b in zip(kept, kept[1:], strict=False)]
            assert len(set(kept)) == count and 0 <= kept[0] and kept[-1] < layers
            assert not gaps or max(gaps) - min(gaps) <= 1


def test_random_is_seeded_and_every_layer_gets_its_turn():
    draws = [hl.select("random", 2, num_layers=8, seed=s) for s in range(400)]
    assert draws == [hl.select("random", 2, num_layers=8, seed=s) for s in range(400)]
    counts = [sum(l in d for d in draws) for l in range(8)]  # expected 100 each, standard deviation below 9
    assert min(counts) > 65 and max(counts) < 135


def test_manual_is_checked_and_sorted():
    assert hl.select("manual", layers=[5, 1], num_layers=8) == (1, 5)
    for layers, message in (([8], "0 to 7"), ([1, 1], "twice"), (None, "give the layer indices")):
        with pytest.raises(ValueError, match=message):
            hl.select("manual", layers=layers, num_layers=8)


@pytest.mark.parametrize(("budget", "layers", "expected"), [(0.25, 28, 7), (0.33, 28, 9), (0.01, 8, 1), (1.0, 8, 8),
                                                            (1, 8, 1), (8, 8, 8)])
def test_budget_is_a_share_or_a_count(budget, layers, expected):
    assert hl.budget_layers(budget, layers) == expected


@pytest.mark.parametrize("budget", [0, 0.0, -0.25, -1, 1.5, 9, "half", None, True, float("nan"), float("inf")])
def test_bad_budgets_are_refused(budget):
    with pytest.raises(ValueError, match="budget="):
        hl.select("uniform", budget, num_layers=8)


def test_unknown_selectors_and_wrong_scores_are_refused():
    with pytest.raises(ValueError, match="'best' is unknown; choose one of 'ga-s2'"):
        hl.select("best", 0.5, scores=GA)
    with pytest.raises(ValueError, match="'gr-s2' needs scores of score_layers\\(direction='remove'"):
        hl.select("gr-s2", 0.5, scores=GA)
    with pytest.raises(ValueError, match="'avg' needs"):
        hl.select("avg", 0.5, scores=GA)
