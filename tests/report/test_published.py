"""The published sets: what their columns must be, and statistics of sets against counting all of them."""

from __future__ import annotations

from itertools import combinations
from random import Random

import numpy as np
import pandas as pd
import pytest

from hybridlib.records.folders import data_folder
from hybridlib.report import published
from hybridlib.selection import agreement

SETS, RESULTS = published.load_layer_sets(), published.load_results()


def rows(*sets, num_layers=12, **columns):
    """A frame of made-up sets; `columns` are values, or lists of one a set."""
    frame = pd.DataFrame({"teacher": "t", "num_layers": num_layers, "student_mixer": "gdn", "probe_mixer": np.nan,
                          "budget": 0.25, "selector": "S", "layers": [tuple(s) for s in sets], "config": "c"})
    for name, value in columns.items():
        frame[name] = value
    return frame.assign(kept=frame["layers"].map(len))


def test_layers_are_distinct_and_of_their_teacher_and_their_number_is_the_budget_but_for_one_known_slip():
    assert len(SETS) == 108
    for row in SETS.itertuples():
        assert row.kept == len(set(row.layers)) and 0 <= min(row.layers) <= max(row.layers) < row.num_layers
    counted = SETS.dropna(subset=["budget"])
    wrong = counted[(counted["kept"] - counted["budget"] * counted["num_layers"]).abs() >= 1]
    assert [(r.teacher, r.selector, r.budget) for r in wrong.itertuples()] == [("Qwen2.5-1.5B-Instruct", "GA-S2", 0.5)]
    assert set(SETS[SETS["budget"].isna()]["selector"]) == {"PostNAS"}
    assert set(SETS["student_mixer"]) == {"gdn", "gla"}


def test_a_probe_is_named_where_a_probe_ranked_the_layers():
    assert set(SETS.dropna(subset=["probe_mixer"])["selector"]) == {"GA-S2"}
    assert SETS[SETS["selector"] == "GA-S2"]["probe_mixer"].notna().all()


def test_a_file_with_other_columns_or_layers_is_refused(tmp_path):
    source = (data_folder("published") / "layer_sets.csv").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "layer_sets.csv"
    path.write_text("\n".join([source[0].replace("budget", "share"), source[1]]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="^layer_sets.csv has the columns teacher, .*; they must be teacher, "):
        published.load_layer_sets(path)
    for layers in ("0 16 11 28", "0 16 16 14"):
        path.write_text("\n".join([source[0], source[1].replace("0 16 11 14", layers)]) + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match="are not distinct layers from 0 to 27$"):
            published.load_layer_sets(path)
    path = tmp_path / "results.csv"
    path.write_text("teacher,student_mixer,budget,selector,metric,value\nt,gdn,0.25,AR,RULER,66.2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="^value=66.2 is not a share"):
        published.load_results(path)


def test_settings_name_a_budget_that_was_published():
    assert published.PublishedSettings(share=0.33).share == 0.33
    with pytest.raises(ValueError, match=r"^share=0.3 was not published; choose one of 0.125, 0.25, 0.33, 0.5$"):
        published.PublishedSettings(share=0.3)
    with pytest.raises(ValueError, match="^student='mamba'"):
        published.PublishedSettings(student="mamba")


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


def test_contiguity_refuses_layers_that_are_not_there():
    for layers in ((), (0, 8), (-1,)):
        with pytest.raises(ValueError, match="are not one or more layers from 0 to 7$"):
            agreement.contiguity(layers, 8)


def test_pairs_of_sets_differ_in_one_column_and_carry_what_random_sets_would_reach():
    frame = rows((3, 1, 5), (1, 3, 8), (0, 2), teacher=["a", "b", "c"], num_layers=[12, 12, 9])
    pairs = published.agreements(frame, "teacher")
    assert len(pairs) == 1  # the third has fewer layers
    assert pairs["jaccard"][0] == pytest.approx(2 / 4)
    overlaps = [len(set(s) & {1, 3, 5}) for s in combinations(range(12), 3)]
    assert pairs["probability"][0] == pytest.approx(np.mean([o >= 2 for o in overlaps]))
    assert np.isnan(pairs["spearman"][0]) and not pairs["nested"][0]


def test_orders_are_compared_over_the_layers_that_two_rankings_share_and_never_for_patterns():
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


def test_mean_agreement_is_symmetric_and_says_where_there_is_none():
    pairs = pd.DataFrame({"a": ["x", "y", "x"], "b": ["y", "x", "y"], "jaccard": [0.2, 0.4, 0.6]})
    matrix = published.mean_agreement(pairs, ["x", "y", "z"])
    assert matrix[0, 1] == matrix[1, 0] == pytest.approx(0.4) and np.isnan(matrix[0, 2])
    assert matrix.diagonal().tolist() == [1, 1, 1]


def test_pooled_clustering_is_what_random_draws_give():
    frame = rows((1, 2, 3, 7), (4, 5, 9), teacher=["a", "b"])
    text = published.clustering_words(published.clustering(frame))
    random = Random(0)
    draws = [sum(l + 1 in s for k in (4, 3) for s in [set(random.sample(range(12), k))] for l in s)
             for _ in range(20_000)]
    more = np.mean([d >= 3 for d in draws])
    said = float(text.split("as many or more in ")[1].split("%")[0])
    assert "3 pairs of neighbours in 2 sets, 1.5 expected" in text and said == pytest.approx(100 * more, abs=1.2)
    assert "no more and no less than chance" in text
    alone = published.clustering_words(published.clustering(rows(*[(0, 1, 2, 3)] * 3)))
    assert "they **cluster**" in alone


def test_each_reported_figure_finds_its_set():
    table = published.reported(SETS, RESULTS)
    assert len(table) == len(RESULTS)
    assert set(table[table["layers"].isna()]["selector"]) == {"GR-S2", "AVG-S2"}
    stage_1 = table[table["selector"] == "GA-S1"].iloc[0]
    assert stage_1["layers"] == (0, 1, 27, 24, 25, 2, 26)
    text = published.report_words(table)
    assert "**GA-S1** is held to the published set of stage-1 MSE: that they are one is our reading." in text
    assert "**Without a published set**: GR-S2, AVG-S2." in text
    transferred = table[table["selector"] == "GA-S2 (gdn probe)"].iloc[0]
    own = table[(table["selector"] == "GA-S2") & (table["teacher"] == transferred["teacher"])].iloc[0]
    assert transferred["student_mixer"] == "gla" and transferred["layers"] == own["layers"]


def test_sets_of_other_works_are_shown_and_set_beside_the_nearest_of_ours():
    quarter = published.of_share(SETS, 0.25, "gdn")
    assert set(quarter["budget"]) == {0.25} and set(quarter["probe_mixer"].dropna()) == {"gdn"}
    placed = published.of_share(SETS, 0.25, "gdn", placed=True)
    assert placed["selector"].tolist().count("PostNAS") == 1 and len(placed) == len(quarter) + 1
    assert "PostNAS" not in set(published.of_share(SETS, 0.25, "gla", placed=True)["selector"])
    ours, theirs = {20, 32, 33, 21, 22, 25, 17, 19, 5}, {17, 20, 32, 5, 16, 19, 21, 22, 25, 27}
    text = published.placed_words(SETS)
    assert text.startswith("- **PostNAS** on Qwen2.5-3B-Instruct: 10 of 36 layers") and "\n" not in text
    assert f"It shares {len(ours & theirs)} layers with the 9 of GA-S2, where random sets share 2.5; under 0.1%" in text
    frame = rows((0, 1), (0, 1, 2), (4, 5, 6, 7, 8), budget=[np.nan, 0.25, 0.5], probe_mixer=[np.nan, "gdn", "gdn"],
                 selector=["P", "GA-S2", "GA-S2"])
    assert "It shares 2 layers with the 3 of GA-S2" in published.placed_words(frame)  # the nearer of two
    assert f"{100 * 3 / 66:.1f}% of them share as many or more." in published.placed_words(frame)
    assert "shares" not in published.placed_words(frame[:1]) and published.placed_words(frame[1:]) == ""


def test_words_follow_the_figures():
    made_up = pd.DataFrame({"teacher": "Llama-3.2-3B-Instruct", "student_mixer": "gdn", "budget": 0.25,
                            "selector": ["GA-S2", "SMART", "AR"], "metric": "RULER", "value": [0.5, 0.6, 0.4]})
    text = published.report_words(published.reported(SETS, made_up))
    assert "reported in 1 of 2 comparisons on 1 teachers, by \u22120.100 to 0.100" in text
    assert "in 0 of 1 comparisons" in text


def test_slips_are_found_not_listed():
    assert "Qwen2.5-1.5B-Instruct, GA-S2 at 0.5**: 7 layers, where 14.0 are due; the set of budget 0.25" in \
        published.slip_words(SETS)
    frame = rows((5, 1, 3), (1, 5, 7, 3, 9, 2), budget=[0.25, 0.5])
    assert "all" not in published.slip_words(frame).split("**UNIFORM**")[0]
    assert "not nested" not in published.slip_words(frame)
    frame = rows((5, 1, 4), (1, 5, 7, 3, 9, 2), budget=[0.25, 0.5])
    assert "not nested: t, gdn, S, 0.25 in 0.5" in published.slip_words(frame)
