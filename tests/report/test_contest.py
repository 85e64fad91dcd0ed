"""Tables and the figure of a contest: fronts, costs, agreement and advice on numbers with a known answer."""

import dataclasses

import pandas as pd
import pytest

from hybridlib.report import contest as contest_report
from hybridlib.report.selector_plots import quality_and_cost


def test_the_front_holds_what_none_beats_in_both(known):
    front = contest_report.front(known, "kl")  # GA-S2 is as good as cheap and dearer, dear is worse and dearer
    assert list(front.index) == ["free", "cheap"] and front.loc["cheap"].tolist() == pytest.approx([1e5, 0.3005])
    assert list(contest_report.front(known, "recall_exact", "seconds").index) == ["free", "cheap", "dear"]
    with pytest.raises(ValueError, match="^value='perplexity' is unknown"):
        contest_report.front(known, "perplexity")
    with pytest.raises(ValueError, match="^cost='euros' is unknown"):
        contest_report.front(known, "kl", "euros")


def test_the_best_of_those_that_need_no_more_is_named_and_of_equals_the_cheapest(known):
    table = contest_report.best_by_need(known)
    assert list(table.index) == ["nothing", "teacher", "student", "stage 2"]
    assert list(table["use"]) == ["free", "free", "cheap", "cheap"]
    assert table["against the best of all"].iloc[0].startswith("free against cheap: 0.6")
    by_recall = contest_report.best_by_need(known, "recall_exact")
    assert list(by_recall["use"]) == ["free", "free", "cheap", "dear"]
    assert by_recall["against the best of all"].iloc[2].endswith("share exact: lower")


def test_controls_are_never_advised(known):
    control = known.rows[known.rows["selector"] == "cheap"].assign(selector="GA-S2, other text", name="ga-s2-again",
                                                                   kl=0.01, recall_exact=1.0)
    with_one = dataclasses.replace(known, rows=pd.concat([known.rows, control], ignore_index=True))
    assert "GA-S2, other text" in with_one.titles
    alone = dataclasses.replace(known, rows=control)
    for table in (contest_report.best_by_need, contest_report.front):
        for value in ("kl", "recall_exact"):
            pd.testing.assert_frame_equal(table(with_one, value), table(known, value))
        assert table(alone, "kl").empty


def test_a_reference_is_compared_in_cost_agreement_and_kl(known):
    table = contest_report.reference_table(known)
    assert list(table.index) == ["free", "cheap", "dear"]
    assert table["share of its FLOPs"].tolist() == ["0", "1/10", "10.0"]
    assert table["Spearman"].tolist() == ["\u2013", "0.90 (0.80 to 1.00)", "1.00"]
    assert table["best by its scores"].tolist() == ["\u2013", "yes", "no"]  # dear keeps 0 and 2, scored below 1
    assert table["Jaccard"].tolist() == ["0.33", "1.00", "0.33"]
    assert table.loc["dear", "held-out KL"].startswith("0.2010 [")
    assert contest_report.reference_table(known, "AVG").empty
    third = known.rows[known.rows["seed"] == 1].assign(seed=2)
    rows = pd.concat([known.rows, third], ignore_index=True)
    rows.loc[(rows["selector"] == "cheap") & (rows["seed"] == 0), "seconds"] = 1e6  # a first call that compiles
    table = contest_report.reference_table(dataclasses.replace(known, rows=rows))
    assert table.loc["cheap", "share of its seconds"] == "1/10"


def test_neighbours_are_counted_beside_those_of_random_sets(known):
    table = contest_report.neighbours(known)
    assert list(table.index) == known.titles
    # of the 6 pairs of 4 layers, 3 are neighbours
    assert table.loc["cheap"].tolist() == [1, 0.5, 0.5] and table.loc["free"].tolist() == [0, 0.5, 1]
    sets = contest_report.agreement_of_sets(known)
    assert sets.shape == (4, 4) and sets[1, 2] == 1 and sets[0, 1] == pytest.approx(1 / 3)


def test_unknown_costs_are_a_dash_and_notes_are_shown(known):
    known.rows.loc[known.rows["selector"] == "GA-S2", "flops"] = float("nan")
    known.rows.loc[known.rows["selector"] == "cheap", "note"] = "by multi hop, 4 pairs"
    table = contest_report.cost_table(dataclasses.replace(known, refused={"HALO": "it cannot"}))
    assert table.loc["GA-S2", "FLOPs of choosing (estimated)"] == "\u2013"
    assert table.loc["cheap", "FLOPs of choosing (estimated)"] == "1.00e+05"
    assert set(table["peak memory (MiB)"]) == {"\u2013"}
    assert table["note"][["cheap", "HALO", "dear"]].tolist() == ["by multi hop, 4 pairs", "not run: it cannot", ""]
    assert "GA-S2" not in contest_report.front(known, "kl").index
    assert contest_report.reference_table(known).loc["cheap", "share of its FLOPs"] == "\u2013"


def test_quality_against_cost_fills_the_front_and_puts_what_is_free_at_the_left(known):
    figure = quality_and_cost(known, "kl", log=True)
    axes = figure.axes[0]
    points = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert [line.get_markerfacecolor() == "white" for line in points] == [False, False, True, True]
    x = [line.get_xdata()[0] for line in points]
    assert x[0] < x[1] == 1e5 < x[2] < x[3] and axes.get_xticklabels()[0].get_text() == "0"
    figure.canvas.draw()
    numbers = [text for text in axes.texts if text.xycoords != "axes fraction"]  # the points' labels
    assert all(axes.bbox.contains(*corner) for text in numbers for corner in text.get_window_extent().get_points())
    with pytest.raises(ValueError, match="no row with both"):
        quality_and_cost(dataclasses.replace(known, rows=known.rows.assign(flops=float("nan"))), "kl")
