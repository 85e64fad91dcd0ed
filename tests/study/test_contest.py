"""A contest of selectors: what is kept of it, fronts, advice and words on numbers with a known answer."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest
from tests.conftest import CONTEST_SETTINGS as SETTINGS, contest_row as row

import hybridlib as hl
from hybridlib.report import contest as contest_report
from hybridlib.report.selector_plots import choice_map, quality_and_cost
from hybridlib.study import contest as c, study as study_module
from hybridlib.study.contest import FLOOR

def test_the_front_holds_what_none_beats_in_both(known):
    assert contest_report.front(known, "kl") == ["free", "cheap"]  # GA-S2 is as good and dearer, dear is worse and dearer
    assert contest_report.front(known, "recall_exact", "seconds") == ["free", "cheap", "dear"]
    assert contest_report.front_words(known, "kl", "flops") == ("- KL (nats a token) against FLOPs (estimated), from the cheapest: "
                                                   "**free** (0.901), **cheap** (0.300).")
    with pytest.raises(ValueError, match="^value='perplexity' is unknown"):
        contest_report.front(known, "perplexity")
    with pytest.raises(ValueError, match="^cost='euros' is unknown"):
        contest_report.front(known, "kl", "euros")


def test_advice_names_the_best_that_asks_for_no_more_and_of_equals_the_cheapest(known):
    table = contest_report.advice(known)
    assert list(table["use"]) == ["free", "free", "cheap", "cheap"]
    assert table["against the best of all"].iloc[-1] == "it is the best"
    assert table["against the best of all"].iloc[0].startswith("worse: 0.6")
    by_recall = contest_report.advice(known, "recall_exact")
    assert list(by_recall["use"]) == ["free", "free", "cheap", "dear"]
    assert by_recall["against the best of all"].iloc[2].startswith("worse: \u22120.3")


def test_controls_are_never_advised(known):
    control = known.rows[known.rows["selector"] == "cheap"].assign(selector="GA-S2, other text", name="ga-s2-again",
                                                                   kl=0.01, recall_exact=1.0)
    with_one = dataclasses.replace(known, rows=pd.concat([known.rows, control], ignore_index=True))
    assert "GA-S2, other text" in with_one.titles
    for value in ("kl", "recall_exact"):
        pd.testing.assert_frame_equal(contest_report.advice(with_one, value), contest_report.advice(known, value))
        assert contest_report.front(with_one, value) == contest_report.front(known, value)
    alone = dataclasses.replace(known, rows=control)
    assert contest_report.advice(alone).empty and contest_report.front(alone, "kl") == []


def test_words_on_cost_say_the_share_the_agreement_and_the_loss(known):
    lines = contest_report.cost_words(known, known.titles).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("- **free** against **GA-S2**: none of its FLOPs; none of its time (medians of 2 ")
    assert lines[0].endswith("**worse here**.")
    assert lines[1] == ("- **cheap** against **GA-S2**: 1/10 of its FLOPs; 1/10 of its time (medians of 2 seeds); "
                        "Spearman 0.90 (0.80 to 1.00) with its scores; Jaccard 1.00 with its set; the same hybrid on "
                        "every seed.")
    assert "10.0 times its FLOPs" in lines[2] and "a KL that differs by 0.2010 [" in lines[2]
    assert "with its scores (its set is not the best by its own scores);" in lines[2]  # 0 and 1 would be
    assert contest_report.cost_words(known, ["AVG"]) == "- **AVG** against **GA-S2**: not both were run."
    one = c.Contest(known.rows[known.rows["seed"] == 0], {}, {}, 4, {}, "")
    assert "KL 0.2000 higher, on one seed, which cannot tell" in contest_report.cost_words(one, ["dear"])
    assert "KL 0.2000 lower, on one seed" in contest_report.cost_words(one, ["GA-S2"], "dear") and "medians" not in contest_report.cost_words(
        one, ["dear"])


def test_time_is_the_median_over_seeds(known):
    third = known.rows[known.rows["seed"] == 1].assign(seed=2)
    rows = pd.concat([known.rows, third], ignore_index=True)
    rows.loc[(rows["selector"] == "cheap") & (rows["seed"] == 0), "seconds"] = 1e6  # a first call that compiles
    assert "1/10 of its time (medians of 3 seeds)" in contest_report.cost_words(dataclasses.replace(known, rows=rows), ["cheap"])


def test_neighbours_are_counted_beside_those_of_random_sets(known):
    table = contest_report.neighbours(known)
    assert list(table.index) == known.titles
    # of the 6 pairs of 4 layers, 3 are neighbours
    assert list(table.loc["cheap"]) == ["1.00", "0.50", "0.50"] and list(table.loc["free"]) == ["0.00", "0.50", "1.00"]


def test_scores_that_are_ga_s2s_own_are_not_anothers(tmp_path):
    settings = {"aligned": {"teacher": "t"}, "seeds": 1, "budget": 1, "mixer": "gdn"}
    rows = [row(title, "stage 2", 0, [0], 0.1, 0.5, 1.0, values) | {"name": name, "perplexity": 1.0,
                                                                    "top1_agreement": 1.0, "device": ""}
            for title, name, values in (("GA-S2", "ga-s2", [2.0, 1.0]), ("SMART", "smart", [2.0, 1.0]),
                                        ("GR-S2", "gr-s2", [3.0, 1.0]))]
    rows[1].pop("note")  # as in records made before there were notes
    ledger = hl.Ledger(tmp_path)
    ledger.add("contest", settings, {"rows": rows, "refused": {}, "teacher": {}, "num_layers": 2}, seconds=1.0)
    found = c.recorded_contest(ledger)
    assert dict(zip(found.rows["name"], found.rows["values"], strict=True)) == {
        "smart": None, "ga-s2": (2.0, 1.0), "gr-s2": (3.0, 1.0)}
    assert set(found.rows["note"]) == {""}


def test_agreement_is_the_mean_over_seeds(known):
    sets = contest_report.agreement_of_sets(known)
    assert sets.shape == (4, 4) and sets[1, 2] == 1 and sets[0, 1] == pytest.approx(1 / 3)


def test_unknown_costs_are_shown_as_such(known):
    known.rows.loc[known.rows["selector"] == "GA-S2", "flops"] = float("nan")
    assert contest_report.cost_table(known).loc["GA-S2", "FLOPs (estimated)"] == "\u2013"
    assert set(contest_report.cost_table(known)["peak memory (MiB)"]) == {"\u2013"}
    assert "GA-S2" not in contest_report.front(known, "kl") and "unknown share of its FLOPs" in contest_report.cost_words(known, ["cheap"])


def test_a_contest_is_run_once_recorded_and_read_again(tiny_teacher, tiny_tokens, tmp_path, monkeypatch):
    teacher, real = tiny_teacher(layers=4), hl.evaluate
    monkeypatch.setattr(study_module, "load_teacher", lambda *a, **k: hl.Teacher(teacher, None, "tiny", "r1"))
    monkeypatch.setattr(study_module, "load_tokens", lambda *a, **k: tiny_tokens)
    monkeypatch.setattr(study_module, "evaluate", lambda *a, recall=None, **k: real(*a, **k))  # no tokenizer here
    names = ["uniform", "ppl", "gate-gradient", "ga-s2", "exhaustive"]

    def make():
        settings = c.SelectorSettings(**SETTINGS, results=str(tmp_path / "results"), selectors=names)
        return hl.Study(settings)

    study = make()
    found = c.run_contest(study)
    assert found.titles == [hl.SELECTORS[name].title for name in names] and not found.refused
    assert len(found.rows) == 2 * (len(names) + 1) and set(found.rows["selector"]) - set(found.titles) == {FLOOR}
    assert found.sets["GA-S2"] == [study.select("ga-s2", seed=seed) for seed in (0, 1)]
    for _, line in found.rows.iterrows():
        assert line["kl"] == study.hybrid(line["layers"], seed=line["seed"]).metrics["kl"]
    before = len(list(study.ledger))
    again = c.run_contest(make())
    pd.testing.assert_frame_equal(again.rows, found.rows)
    assert len(list(study.ledger)) == before
    pd.testing.assert_frame_equal(c.recorded_contest(study.ledger).rows, found.rows)
    one_seed = c.run_contest(hl.Study(dataclasses.replace(study.settings, seeds=1)))
    fewer = c.run_contest(hl.Study(dataclasses.replace(study.settings, selectors=names[:2])))
    assert [len(k.rows) for k in (found, one_seed, fewer)] == [12, 6, 6]
    assert [len(k.rows) for k in c.recorded_contests(study.ledger)] == [12, 6]  # what differs in selectors is one
    more = c.run_contest(hl.Study(dataclasses.replace(study.settings, selectors=["ga-s1"])))
    fuller = c.recorded_contest(study.ledger)
    assert fuller.titles == ["uniform", "PPL", "GA-S1", "gate gradient", "GA-S2", "exhaustive"]
    assert fuller.settings["selectors"] == ["uniform", "ppl", "ga-s1", "gate-gradient", "ga-s2", "exhaustive"]
    assert fuller.sets["GA-S1"] == more.sets["GA-S1"] and fuller.sets["PPL"] == found.sets["PPL"]
    everything = [name for name in hl.SELECTORS if name.startswith("g") or name in names]
    other = c.run_contest(hl.Study(dataclasses.replace(study.settings, budget=1, selectors=everything)))
    assert len(other.rows) > len(fuller.rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c.StudySettings, "budget", 2)  # what a study starts from
        assert [(k.settings["budget"], k.settings["seeds"]) for k in c.recorded_contests(study.ledger)
                ] == [(2, 2), (2, 1), (1, 2)]
    assert contest_report.about(found, "selectors").startswith("Teacher **tiny**, 2 of 4 layers softmax, the others **gdn**; 256 ")


def test_without_a_record_the_command_is_shown(tmp_path):
    assert c.recorded_contest(hl.Ledger(tmp_path / "none")) is None
    assert "papermill notebooks/selectors.ipynb" in contest_report.about(None, "selectors")


@pytest.mark.parametrize(("names", "message"), [
    ([], r"^selectors=\[\] is not a list of names"), ("ga-s2", "^selectors='ga-s2' is not a list"),
    (["ga-s2", "ga-s2"], "^selectors names 'ga-s2' twice"),
    (["gas2"], r"^selector='gas2' is unknown; did you mean 'ga-s2'\?$")])
def test_bad_lists_of_selectors_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        c.SelectorSettings(selectors=names)


def test_what_a_selector_settled_on_is_said(known):
    known.rows.loc[known.rows["selector"] == "cheap", "note"] = "by multi hop, 4 pairs"
    settings = dict(aligned={"teacher": "t"}, mixer="gdn", align_tokens=1, score_tokens=1, match_tokens=1, seeds=2)
    told = contest_report.about(dataclasses.replace(known, settings=settings, refused={"HALO": "it cannot"}), "selectors")
    *told, left = told.split("\n\n")[1:]
    assert told == ["**cheap**: by multi hop, 4 pairs.", "**HALO** was not run: it cannot."]
    assert left.startswith("Selectors that were left out: uniform; random; ") and left.endswith("beam; exhaustive.")
    assert "HALO" not in left and "SMART; GA-S2, other text;" in left  # GA-S2 itself was run


def test_participants_are_described_in_the_order_given():
    table = contest_report.participants(["ga-s2", "uniform"])
    assert list(table.index) == ["GA-S2", "uniform"] and list(table["needs"]) == ["stage 2", "nothing"]
    assert list(table.columns) == ["source", "needs", "assumes", "costs"]
    assert list(table["costs"]) == [hl.SELECTORS["ga-s2"].cost, "nothing"]
    assert hl.SELECTORS["ga-s2"].cost.startswith("a candidate for each layer: L x T tokens forward and backward")


def test_a_map_of_choices_fills_each_cell_to_its_share_of_seeds():
    figure = choice_map({"a": [(0, 1), (0, 2)], "b": [(3,), (3,)]}, 4)
    filled = [p for p in figure.axes[0].patches if p.get_linewidth() == 0]
    assert [round(-p.get_height() / 0.76, 6) for p in filled] == [1, 0.5, 0.5, 0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="choices={} shows nothing"):
        choice_map({}, 4)
    with pytest.raises(ValueError, match=r"choices\['a'\]=.* layers from 0 to 3"):
        choice_map({"a": [(4,)]}, 4)


def test_quality_against_cost_fills_the_front_and_puts_what_is_free_at_the_left(known):
    front = contest_report.front(known, "kl")
    figure = quality_and_cost(known.chosen, "kl", "flops", front, ylabel="KL", xlabel="FLOPs", log=True)
    axes = figure.axes[0]
    points = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert [line.get_markerfacecolor() == "white" for line in points] == [False, False, True, True]
    x = [line.get_xdata()[0] for line in points]
    assert x[0] < x[1] == 1e5 < x[2] < x[3] and axes.get_xticklabels()[0].get_text() == "0"
    places = {}
    for text in axes.texts:  # beside the axes a number and a name a line; within them the points' labels
        places.setdefault(text.xy[1] if text.xycoords == "axes fraction" else None, []).append(text)
    beside = [[text.get_text() for text in line] for place, line in places.items() if place is not None]
    assert beside == [["1", "free"], ["2", "cheap"], ["3", "GA-S2"], ["4", "dear"]]
    figure.canvas.draw()
    assert all(axes.bbox.contains(*corner) for text in places[None] for corner in text.get_window_extent().get_points())
    with pytest.raises(ValueError, match="^column='speed' is unknown"):
        quality_and_cost(known.chosen, "speed", "flops", front, ylabel="", xlabel="")
    with pytest.raises(ValueError, match="no row with both"):
        quality_and_cost(known.chosen.assign(flops=float("nan")), "kl", "flops", [], ylabel="", xlabel="")
