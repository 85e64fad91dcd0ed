"""The published sets: what their columns must be, and statistics of sets against counting all of them."""

from itertools import combinations
from random import Random

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hybridlib.report import published
from hybridlib.selection import agreement
from hybridlib.selection.scorers.ablation import halo_values

SETS, RESULTS = published.load_layer_sets(), published.load_results()
OTHERS, HALO = published.load_other_sets(), published.load_halo()


def rows(*sets, num_layers=12, **columns):
    """A frame of made-up sets; `columns` are values, or lists of one a set."""
    frame = pd.DataFrame({"teacher": "t", "num_layers": num_layers, "student_mixer": "gdn", "probe_mixer": np.nan,
                          "budget": 0.25, "selector": "S", "layers": [tuple(s) for s in sets], "config": "c"})
    for name, value in columns.items():
        frame[name] = value
    return frame.assign(size=frame["layers"].map(len))


def test_layers_are_distinct_and_of_their_teacher():
    assert len(SETS) == 108
    for row in SETS.itertuples():
        assert row.size == len(set(row.layers)) and 0 <= min(row.layers) <= max(row.layers) < row.num_layers
    assert set(SETS[SETS["budget"].isna()]["selector"]) == {"PostNAS"}
    assert set(SETS["student_mixer"]) == {"gdn", "gla"} and RESULTS["value"].between(0, 1).all()
    assert (SETS["probe_mixer"].notna() == (SETS["selector"] == "GA-S2")).all()


def test_settings_name_a_budget_that_was_published():
    with pytest.raises(ValueError, match=r"^share=0.3 was not published; choose one of 0.125, 0.25, 0.33, 0.5$"):
        published.PublishedSettings(share=0.3)


@pytest.mark.parametrize("num_layers, k", [(7, 1), (7, 3), (8, 4), (5, 5)])
def test_contiguity_is_what_counting_all_sets_gives(num_layers, k):
    every = list(combinations(range(num_layers), k))
    counts = [sum(b - a == 1 for a, b in zip(s, s[1:])) for s in every]
    shares = [counts.count(p) / len(every) for p in range(k)]
    assert agreement.contiguity_distribution(k, num_layers) == pytest.approx(shares)
    for layers, count in zip(every, counts):
        pairs, expected, probability = agreement.contiguity(reversed(layers), num_layers)
        assert pairs == count and expected == pytest.approx(np.mean(counts))
        assert probability == pytest.approx(np.mean([c >= count for c in counts]))
    with pytest.raises(ValueError, match=f"from 0 to {num_layers - 1}$"):
        agreement.contiguity((0, num_layers), num_layers)


def test_pairs_of_sets_differ_in_one_column_and_carry_what_random_sets_would_reach():
    frame = rows((3, 1, 5), (1, 3, 8), (0, 2), teacher=["a", "b", "c"], num_layers=[12, 12, 9])
    pairs = published.agreements(frame, "teacher")
    assert len(pairs) == 1  # the third has fewer layers
    assert pairs["jaccard"][0] == pytest.approx(2 / 4)
    overlaps = [len(set(s) & {1, 3, 5}) for s in combinations(range(12), 3)]
    assert pairs["probability"][0] == pytest.approx(np.mean([o >= 2 for o in overlaps]))
    assert np.isnan(pairs["spearman"][0]) and not pairs["nested"][0]
    sets = (4, 1, 6, 9), (6, 1, 4, 2)
    pairs = published.agreements(rows(*sets, teacher=["a", "b"]), "teacher")
    assert pairs["spearman"][0] == pytest.approx(-1)  # 4 1 6 against 6 1 4
    pattern = published.agreements(rows(*sets, teacher=["a", "b"], selector="SMART"), "teacher")
    assert np.isnan(pattern["spearman"][0])


def test_probes_are_compared_for_the_student_of_their_own_mixer():
    pairs = published.agreements(SETS, "probe_mixer")
    assert len(pairs) == 8 and set(pairs["a"]) == {"gdn"} and set(pairs["b"]) == {"gla"}
    quarter = pairs[(pairs["budget"] == 0.25) & (pairs["teacher"] == "Llama-3.2-3B-Instruct")]
    a, b = ({14, 8, 5, 12, 15, 13, 2}, {14, 8, 12, 5, 16, 15, 13})
    assert quarter["jaccard"].tolist() == [pytest.approx(len(a & b) / len(a | b))]


def test_the_agreement_matrix_is_symmetric_and_says_where_there_is_none():
    pairs = pd.DataFrame({"a": ["x", "y", "x"], "b": ["y", "x", "y"], "jaccard": [0.2, 0.4, 0.6]})
    matrix = published.agreement_matrix(pairs, ["x", "y", "z"])
    assert matrix[0, 1] == matrix[1, 0] == pytest.approx(0.4) and np.isnan(matrix[0, 2])
    assert matrix.diagonal().tolist() == [1, 1, 1]


def test_a_table_of_agreement_has_means_beside_chance():
    pairs = published.agreements(rows((0, 1, 2), (0, 1, 2), (6, 7, 8), teacher=["a", "b", "c"]), "teacher")
    table = published.agreement_table(pairs, "selector")
    assert table.loc["S", ["pairs", "Jaccard", "by chance"]].tolist() == [
        3, pytest.approx(1 / 3), pytest.approx(agreement.chance_jaccard(12, 3))]
    assert table.loc["S", "that at most 5% of random sets reach"] == 1  # 1 of 220 sets is the same
    none = published.agreements(rows((0, 1)), "teacher")
    assert published.agreement_table(none, "selector").empty
    assert np.isnan(published.agreement_matrix(none, ["a", "b"])[0, 1])


def test_pooled_clustering_is_what_random_draws_give():
    line = published.clustering_table(rows((1, 2, 3, 7), (4, 5, 9), teacher=["a", "b"])).loc["S"]
    random = Random(0)
    draws = [sum(l + 1 in s for k in (4, 3) for s in [set(random.sample(range(12), k))] for l in s)
             for _ in range(20_000)]
    assert line[["sets", "pairs", "expected"]].tolist() == [2, 3, 1.5]
    assert line["as many or more"] == pytest.approx(np.mean([d >= 3 for d in draws]), abs=0.012)
    assert line["as many or fewer"] == pytest.approx(np.mean([d <= 3 for d in draws]), abs=0.012)


def test_each_reported_figure_finds_its_set():
    table = published.with_layers(RESULTS, SETS)
    assert len(table) == len(RESULTS)
    assert set(table[table["layers"].isna()]["selector"]) == {"GR-S2", "AVG-S2"}
    stage_1 = table[table["selector"] == "GA-S1"].iloc[0]
    assert stage_1["layers"] == (0, 1, 27, 24, 25, 2, 26)
    transferred = table[table["selector"] == "GA-S2 (gdn probe)"].iloc[0]
    own = table[(table["selector"] == "GA-S2") & (table["teacher"] == transferred["teacher"])].iloc[0]
    assert transferred["student_mixer"] == "gla" and transferred["layers"] == own["layers"]


def test_differences_are_those_of_the_same_teacher_student_and_budget():
    figures = pd.DataFrame({"teacher": "Llama-3.2-3B-Instruct", "student_mixer": "gdn", "budget": 0.25,
                            "metric": "RULER", "selector": ["GA-S2", "SMART", "AVG-S2"], "value": [0.5, 0.6, 0.4]})
    table = published.with_layers(pd.concat([figures, figures.head(1).assign(budget=0.5)]), SETS)
    gaps = published.differences(table)
    assert gaps["rival"].tolist() == ["SMART", "AVG-S2"] and gaps["difference"].tolist() == pytest.approx([-0.1, 0.1])
    ours, smart = table["layers"].iloc[0], table["layers"].iloc[1]
    assert gaps["other layers"][0] == len(set(ours) - set(smart)) and pd.isna(gaps["other layers"][1])


def test_sets_of_other_works_are_set_beside_those_of_their_teacher():
    quarter = published.of_share(SETS, 0.25, "gdn")
    assert set(quarter["budget"]) == {0.25} and set(quarter["probe_mixer"].dropna()) == {"gdn"}
    other = rows((0, 1, 2), teacher="t", selector="P")
    frame = rows((0, 1), (2, 5, 7), (3,), teacher=["t", "t", "u"], selector=["A", "B", "A"])
    table = published.overlaps(frame, other)
    assert table["selector"].tolist() == ["A", "B"] and set(table["other"]) == {"P"}
    assert table["shared"].tolist() == [2, 1] and table["expected"].tolist() == pytest.approx([0.5, 0.75])
    for size, shared, probability in zip((2, 3), (2, 1), table["probability"]):
        counts = [len(set(s) & {0, 1, 2}) for s in combinations(range(12), size)]
        assert probability == pytest.approx(np.mean([c >= shared for c in counts]))
    assert published.overlaps(frame[2:], other).empty


def test_other_works_have_sets_of_their_teachers_layers_and_correct_postnas():
    for row in OTHERS.itertuples():
        assert row.size == len(set(row.layers)) and set(row.layers) <= set(range(row.num_layers))
        assert np.isnan(row.budget) or row.size == pytest.approx(row.budget * row.num_layers, abs=0.5)
    wanted = {"PostNAS (full attention)": (17, 20, 32), "PostNAS (sliding window 2048)": (5, 16, 19, 21, 22, 25, 27)}
    parts = OTHERS[OTHERS["teacher"] == "Qwen2.5-3B"].set_index("selector")["layers"]
    assert parts.to_dict() == wanted
    joint, = SETS[SETS["selector"] == "PostNAS"]["layers"]
    assert joint == parts.iloc[0] + parts.iloc[1]
    assert OTHERS["layers"].map(len).min() == 0  # the hybrid without softmax is a set, not a gap


def test_a_ranking_that_was_published_is_that_of_its_scores():
    scores = published.load_perplexities()
    ranked = OTHERS[OTHERS["selector"].str.startswith(("one softmax", "PPL"))]
    smallest = ranked[ranked["budget"] == ranked.groupby("teacher")["budget"].transform("min")]
    assert len(smallest) == 22  # as many as there are columns of scores
    for row in smallest.itertuples():
        column = row.selector.removeprefix("one softmax layer, ") if row.selector[0] == "o" else "ablated"
        values = scores[scores["teacher"] == row.teacher][column].to_numpy()
        order = np.argsort(-values if column == "ablated" else values)
        assert tuple(order[:row.size].tolist()) == row.layers, (row.teacher, column)


def test_a_ranking_repeats_itself_where_its_larger_cuts_begin_as_its_smaller():
    sets = (3, 1), (3, 1, 5, 7), (5, 7), (3, 1, 5, 7)
    pairs = published.repeats(rows(*sets, budget=[0.25, 0.5] * 2, selector=["S", "S", "T", "T"]))
    assert pairs["selector"].tolist() == ["S", "T"] and pairs["jaccard"].tolist() == [1, 0]
    assert pairs["chance"].tolist() == pytest.approx([agreement.chance_jaccard(12, 2)] * 2)


def test_perplexities_agree_where_they_would_keep_the_same_layers():
    frame = pd.DataFrame({"teacher": "t", "layer": range(4), "ablated": [9, 5, 2, 1], "same": [1, 2, 5, 9],
                          "opposite": [9, 5, 2, 1], "absent": np.nan})
    table = published.score_agreements(frame).set_index(["a", "b"])["spearman"]
    assert table["ablated", "same"] == pytest.approx(1) and table["same", "opposite"] == pytest.approx(-1)
    assert table["ablated", "opposite"] == pytest.approx(-1) and len(table) == 3


@pytest.mark.parametrize("name", ["arc_challenge", "arc_easy"])
def test_a_benchmark_has_the_fewest_questions_that_its_accuracies_can_be_shares_of(name):
    accuracies = HALO[name].to_numpy()  # of four decimals, too few for HellaSwag's ten thousand questions
    items = np.arange(1, 3000)[:, None]
    apart = np.abs(accuracies * items - (accuracies * items).round()).max(1)
    assert items[apart <= 0.5e-4 * items[:, 0] + 1e-6][0] == published.ITEMS[name]


def test_the_quotient_gives_back_the_sets_that_halo_kept_but_for_one_layer():
    table = published.halo_table(HALO, OTHERS)
    assert table["layers"].tolist() == [28, 36, 36] and table["K"].tolist() == [7, 9, 9]
    assert table["of HALO's set"].tolist() == [7, 8, 9]
    assert table["within"].tolist() == [11, 9, 23]
    part = HALO[(HALO["teacher"] == "Qwen3-4B") & HALO["layer"].notna()]
    sense, recall = part[list(published.ITEMS)].mean(axis=1), part[["fda", "ruler_qa_squad", "swde"]].mean(axis=1)
    best = part.loc[sense.idxmax()]
    error = sum(best[n] * (1 - best[n]) / items for n, items in published.ITEMS.items()) ** 0.5 / 3
    assert table.loc["Qwen3-4B", "standard error"] == pytest.approx(error)
    rho = stats.spearmanr(halo_values(recall.tolist(), sense.tolist()), -recall).statistic
    assert table.loc["Qwen3-4B", "Spearman with recall"] == pytest.approx(rho)


@pytest.mark.parametrize("alike", [0.0, 0.6, 1.0])
def test_accuracies_drawn_again_are_those_of_questions_answered_one_by_one(alike):
    accuracies, items = np.array([0.7, 0.3, 0.7, 0.5]), 200
    drawn = published.redraw_accuracies(accuracies, items, 20_000, alike, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    own = rng.random((4000, items, 4))
    own[:, :round(alike * items)] = own[:, :round(alike * items), :1]  # a question as hard for every layer
    answered = (own < accuracies).mean(1)
    assert drawn.mean(0) == pytest.approx(accuracies, abs=0.002)
    assert np.cov(drawn.T) == pytest.approx(np.cov(answered.T), abs=0.08 * 0.25 / items)
    if alike == 1:
        assert (drawn[:, 0] == drawn[:, 2]).all() and (drawn[:, 0] >= drawn[:, 3]).all()


def test_a_ranking_survives_as_far_as_questions_are_answered_alike():
    table = published.halo_redraws(HALO, OTHERS, draws=200)
    assert table["answers"].tolist() == ["apart", "least alike", "alike", "shuffled"] * 3
    pd.testing.assert_frame_equal(table, published.halo_redraws(HALO, OTHERS, draws=200))
    for _, part in table.groupby("teacher"):
        survival = part["spearman"].tolist()
        assert survival[0] < survival[1] < survival[2] < 1 and survival[3] < survival[1]
        assert (part["spearman_low"] < part["spearman"]).all() and (part["spearman"] < part["spearman_high"]).all()
    with pytest.raises(ValueError, match="^draws=0 "):
        published.halo_redraws(HALO, OTHERS, draws=0)


def test_without_noise_nothing_changes(monkeypatch):
    monkeypatch.setattr(published, "ITEMS", dict.fromkeys(published.ITEMS, 10**12))
    table = published.halo_redraws(HALO, OTHERS, draws=20).set_index("answers")
    assert (table.loc[["apart", "least alike", "alike"], "jaccard"] == 1).all()
    assert (table.loc["apart", "certain"] == table.loc["apart", "K"]).all()


def test_what_does_not_fit_is_found_not_listed():
    table = published.consistency(SETS)
    assert table["fail"].iloc[0] == "Qwen2.5-1.5B-Instruct, GA-S2 at 0.5: 7 layers"
    assert table.iloc[0][["of", "hold"]].tolist() == [107, 106]
    count = len(SETS[SETS["selector"] == "UNIFORM"])
    assert (table["of"].iloc[2:] == count).all() and (table["hold"].iloc[2:] < count).all()  # no one rule
    table = published.consistency(rows((5, 1, 3), (1, 5, 7, 3, 9, 2), budget=[0.25, 0.5]))
    assert table["hold"].tolist()[:2] == [2, 1] and set(table["fail"][:2]) == {""}
    table = published.consistency(rows((5, 1, 4), (1, 5, 7, 3, 9, 2), budget=[0.25, 0.5]))
    assert table["fail"].iloc[1] == "t, gdn, S: 0.25 in 0.5"
