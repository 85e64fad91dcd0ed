"""The published sets: what their columns must be, and statistics of sets against counting all of them."""

from itertools import combinations
from random import Random

import numpy as np
import pandas as pd
import pytest

from hybridlib.report import published
from hybridlib.selection import agreement

SETS, RESULTS = published.load_layer_sets(), published.load_results()


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


def test_sets_of_other_works_are_set_beside_the_nearest_of_ours():
    quarter = published.of_share(SETS, 0.25, "gdn")
    assert set(quarter["budget"]) == {0.25} and set(quarter["probe_mixer"].dropna()) == {"gdn"}
    with_others = published.of_share(SETS, 0.25, "gdn", others=True)
    assert with_others["selector"].tolist().count("PostNAS") == 1 and len(with_others) == len(quarter) + 1
    assert "PostNAS" not in set(published.of_share(SETS, 0.25, "gla", others=True)["selector"])
    ours, theirs = {20, 32, 33, 21, 22, 25, 17, 19, 5}, {17, 20, 32, 5, 16, 19, 21, 22, 25, 27}
    line = published.nearest_sets(SETS).loc[0]
    assert line[["selector", "teacher", "layers", "size", "size of GA-S2", "shared", "expected"]].tolist() == [
        "PostNAS", "Qwen2.5-3B-Instruct", 36, 10, 9, len(ours & theirs), 2.5] and line["probability"] < 0.001
    frame = rows((0, 1), (0, 1, 2), (4, 5, 6, 7, 8), budget=[np.nan, 0.25, 0.5], probe_mixer=[np.nan, "gdn", "gdn"],
                 selector=["P", "GA-S2", "GA-S2"])
    line = published.nearest_sets(frame).loc[0]
    assert (line["size of GA-S2"], line["shared"]) == (3, 2) and line["probability"] == pytest.approx(3 / 66)
    assert "shared" not in published.nearest_sets(frame[:1]) and published.nearest_sets(frame[1:]).empty


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
