"""Figures and tables of an oracle, on records with known answers."""

import numpy as np
import pytest
from tests.study.test_oracle import drawn, made_up

from hybridlib.report import oracle as oracle_report
from hybridlib.study import oracle


def test_judged_selectors_stand_beside_a_random_set_and_the_best_first():
    truth = {s: 1.0 + sum(s) for s in oracle.sets_of_sizes(4)}
    records = [made_up({s: v + 1e-3 * seed * len(s) for s, v in truth.items()}, seed) for seed in range(3)]
    sets = [{"selector": "bad", "layers": [2, 3]}, {"selector": "ga-s2", "layers": [0, 1]}]
    chosen, every_set = [{"seed": seed, "choices": sets} for seed in range(3)], oracle.oracle_table(records)
    table = oracle_report.judged_table(oracle.judge(every_set, chosen), every_set, 2)
    assert list(table.index) == ["GA-S2", oracle.OTHER_SEEDS, "bad", "a set drawn at random"]
    assert table["rank by held-out KL"].tolist()[:3] == ["1", "1", "6"]
    pairs = [v for s, v in truth.items() if len(s) == 2]
    assert table.loc["bad", "regret by held-out KL"].startswith(f"{truth[2, 3] - min(pairs):.4f} [")
    assert table.iloc[-1, 1] == f"{np.mean(pairs) - min(pairs):.4f}"
    every_set = oracle.oracle_table([made_up(drawn(4, s), s, drawn(4, s)) for s in (0, 1)])
    table = oracle_report.judged_table(oracle.judge(every_set, chosen[:2]), every_set, 2)
    assert {"regret by recall", "rank by recall"} <= set(table.columns)


def test_seeds_are_compared_by_the_ranking_of_sets_of_one_size():
    truth = drawn(4, 0)
    same, other = made_up({s: v + 1.0 for s, v in truth.items()}, 1), made_up({s: -v for s, v in truth.items()}, 2)
    table = oracle_report.seed_agreement([made_up(truth), same, other])
    assert list(table.index) == [1, 2, 3] and table.to_numpy() == pytest.approx(np.array([[-1, 1]] * 3))
    assert oracle_report.seed_agreement([same]).empty


def test_interactions_are_sorted_and_told_from_0_by_their_interval():
    maps = np.full((3, 3, 3), np.nan)
    for (i, j), values in {(0, 1): (0.3, 0.31, 0.32), (0, 2): (-0.1, -0.11, -0.12), (1, 2): (0.1, -0.1, 0.0)}.items():
        maps[:, i, j] = maps[:, j, i] = values
    table = oracle_report.interaction_table(maps)
    assert list(table.index) == ["{0, 2}", "{1, 2}", "{0, 1}"] and table["mean"].iloc[0] == pytest.approx(-0.11)
    assert table["against 0"].tolist() == ["lower", "not told apart", "higher"]
    assert oracle_report.interaction_table(np.full((1, 3, 3), np.nan)).empty


def test_best_sets_are_named_by_size_and_seed():
    records = [made_up(drawn(4, s), s) for s in (0, 1)]
    table = oracle_report.best_sets(oracle.oracle_table(records))
    for size in (1, 2, 3):
        v = [oracle.values(r) for r in records]
        best = min((s for s in v[0] if len(s) == size), key=lambda s: v[0][s] + v[1][s])
        assert table.loc[size, "best set"] == "{" + ", ".join(map(str, best)) + "}" and table.loc[size, "as good"] == 1
    recalls = {s: float(1 in s and 3 in s) for s in oracle.sets_of_sizes(4)}
    table = oracle_report.best_sets(oracle.oracle_table([made_up(drawn(4, 0), 0, recalls)]), "recall_exact")
    assert table["best set"].tolist() == ["{}", "{0}", "{1, 3}", "{0, 1, 3}", "{0, 1, 2, 3}"]
    assert table["as good"].tolist() == [1, 4, 1, 2, 1]


def test_figures_show_what_they_are_given():
    recall = {s: len(s) / 4 for s in oracle.sets_of_sizes(4)}
    records = [made_up(drawn(4, s), s, recall) for s in (0, 1)]
    table = oracle.oracle_table(records)
    judged = oracle.judge(table, [{"seed": s, "choices": [{"selector": "S", "layers": [0]}]} for s in (0, 1)])
    figure = oracle_report.landscape(table, judged, selectors=["S", "absent"])
    assert len(figure.axes[0].lines[0].get_ydata()) == 16
    alone = oracle_report.landscape(table, oracle.judge(table, []), "recall_exact", selectors=["S"])
    assert alone.axes[0].lines[1].get_ydata().tolist() == [0, 0.25, 0.5, 0.75, 1]
    maps = oracle.interaction_maps(records)
    numbers = {t.get_position(): t.get_text() for t in oracle_report.interaction_map(maps).axes[0].texts}
    assert len(numbers) == 6  # of the lower triangle; columns from layer 0, rows from layer 1
    assert numbers[0.5, 0.5] == f"{maps.mean(0)[1, 0]:.3f}".replace("-", "\u2212")
