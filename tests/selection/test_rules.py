"""Selection rules on hand-made scores."""

from __future__ import annotations

import csv
import random
from itertools import combinations
from pathlib import Path

import pytest

import hybridlib as hl

ROOT = Path(__file__).resolve().parents[2]


def scores(values, direction="add", metric="kl"):
    values = tuple(map(float, values))
    return hl.LayerScores(direction, metric, values, values, (0.0,) * len(values), 0, 0.0)


def spread(layers):
    """The widest gap between neighbours in a set, less the narrowest."""
    gaps = [b - a for a, b in zip(layers, layers[1:], strict=False)]
    return max(gaps, default=0) - min(gaps, default=0)


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


@pytest.mark.parametrize("offset", ["centre", "start", "end"])
def test_uniform_takes_the_centres_of_equal_blocks_and_every_offset_as_many_layers(offset):
    assert hl.select("uniform", 2, num_layers=8) == (2, 6)
    assert hl.select("uniform", 0.25, num_layers=28) == (2, 6, 10, 14, 18, 22, 26)
    for num_layers in range(1, 40):
        for count in range(1, num_layers + 1):
            layers = hl.select("uniform", count, num_layers=num_layers, offset=offset)
            assert len(set(layers)) == count and list(layers) == sorted(layers)
            assert 0 <= layers[0] and layers[-1] < num_layers and (offset == "start" or spread(layers) <= 1)


def test_random_is_seeded_and_every_layer_gets_its_turn():
    draws = [hl.select("random", 2, num_layers=8, seed=s) for s in range(400)]
    assert draws == [hl.select("random", 2, num_layers=8, seed=s) for s in range(400)]
    counts = [sum(l in d for d in draws) for l in range(8)]  # expected 100 each, standard deviation below 9
    assert min(counts) > 65 and max(counts) < 135


def test_first_last_and_manual():
    assert hl.select("first", 3, num_layers=8) == (0, 1, 2) and hl.select("last", 0.25, num_layers=8) == (6, 7)
    assert hl.select("first", 1.0, num_layers=4) == hl.select("last", 4, num_layers=4) == (0, 1, 2, 3)
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


PUBLISHED = list(csv.DictReader((ROOT / "data/published/layer_sets.csv").read_text(encoding="utf-8").splitlines()))


def published(selector):
    """(teacher, number of layers, layers ascending) of each published row."""
    return [(r["teacher"], int(r["num_layers"]), tuple(sorted(map(int, r["layers"].split())))) for r in PUBLISHED
            if r["selector"] == selector]


def test_offsets_give_the_published_uniform_sets():
    rows = published("UNIFORM")
    assert len(rows) > 10
    for teacher, num_layers, layers in rows:
        ends = teacher.startswith("Llama") and num_layers % len(layers) == 0
        assert hl.select("uniform", len(layers), num_layers=num_layers, offset="end" if ends else "start") == layers


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("span", [3, 1000])  # few different scores make ties
def test_smart_is_the_best_of_all_its_placements(seed, span):
    draw = random.Random(seed)
    for num_layers in range(1, 12):
        values = [draw.randrange(span) for _ in range(num_layers)]
        for count in range(1, num_layers + 1):
            block = num_layers // count
            first = max(range(block), key=lambda l: (values[l], -l))
            last = max(range(num_layers - block, num_layers), key=lambda l: (values[l], -l)) if count > 1 else first
            allowed = [s for s in combinations(range(num_layers), count)
                       if (s[0], s[-1]) == (first, last) and spread(s) <= 1]
            best = min(allowed, key=lambda s: (-sum(values[l] for l in s), s))
            assert hl.select("smart", count, scores=scores(values)) == best


def test_published_smart_sets_are_placements_of_the_rule():
    rows = published("SMART")
    assert len(rows) > 10
    for _, num_layers, layers in rows:
        wanted = scores([float(l in layers) for l in range(num_layers)])
        assert hl.select("smart", len(layers), scores=wanted) == layers


def test_spacing_without_a_penalty_is_ga_and_with_a_large_one_forbids_neighbours_while_it_can():
    draw = random.Random(0)
    for num_layers in range(2, 12):
        given = scores([draw.randrange(1, 9) for _ in range(num_layers)] + [0, 10])
        for count in range(1, num_layers + 3):
            assert hl.select("ga-s2-spaced", count, scores=given, penalty=0) == hl.select("ga-s2", count, scores=given)
            for distance in (1, 2):
                kept, left = [], set(range(num_layers + 2))
                while len(kept) < count:
                    apart = [l for l in left if all(abs(l - m) > distance for m in kept)]
                    kept.append(max(apart or left, key=lambda l: (given.values[l], -l)))
                    left.remove(kept[-1])
                for penalty in (1.5, 1e300):
                    assert hl.select("ga-s2-spaced", count, scores=given, penalty=penalty,
                                     distance=distance) == tuple(sorted(kept))


def test_a_spacing_penalty_is_in_units_of_the_spread():
    near = scores([0.0, 0.5, 10.0, 9.0, 0.0, 8.0, 0.0])  # 3 loses 10 x penalty beside 2: it falls behind 5 above 0.1
    assert hl.select("ga-s2-spaced", 2, scores=near, penalty=0.09) == (2, 3)
    assert hl.select("ga-s2-spaced", 2, scores=near, penalty=0.11) == (2, 5)
    assert hl.select("ga-s2-spaced", 2, scores=near, penalty=0.11, distance=3) == (2, 3)


@pytest.mark.parametrize(("name", "arguments", "message"), [
    ("best", {}, "'best' is unknown; choose one of 'ga-s2'"),
    ("gr-s2", {}, r"'gr-s2' needs scores of score_layers\(direction='remove'"), ("avg", {}, "'avg' needs"),
    ("smart", {"scores": [GR, S1]}, r"'smart' needs scores of score_layers\(direction='add', metric='kl'"),
    ("ga-s2-spaced", {"scores": [GR, S1]}, "'ga-s2-spaced' needs scores"),
    ("ga-s2-spaced", {"offset": "middle"}, "offset='middle' .* 'centre', 'start', 'end'"),
    ("ga-s2-spaced", {"penalty": -1}, "penalty=-1 .* at least 0"),
    ("ga-s2-spaced", {"penalty": float("nan")}, "penalty=nan"),
    ("ga-s2-spaced", {"distance": 0}, "distance=0 .* at least 1")])
def test_bad_arguments_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        hl.select(name, 2, **{"scores": GA} | arguments)
