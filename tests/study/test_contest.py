"""A contest of selectors: run once, recorded, read again, and what several of them come to together."""

from __future__ import annotations

from functools import partial

import pandas as pd
import pytest
from tests.conftest import contest_row as row

import hybridlib as hl
from hybridlib.report.tables import settings_table
from hybridlib.study import contest as c


def test_scores_that_are_ga_s2s_own_are_not_anothers(tmp_path):
    settings = {"aligned": {"teacher": "t"}, "seeds": 1, "budget": 1, "mixer": "gdn"}
    rows = [row(title, "stage 2", 0, [0], 0.1, 0.5, 1.0, values) | {"name": name, "perplexity": 1.0,
                                                                    "top1_agreement": 1.0, "device": ""}
            for title, name, values in (("GA-S2", "ga-s2", [2.0, 1.0]), ("SMART", "smart", [2.0, 1.0]),
                                        ("GR-S2", "gr-s2", [3.0, 1.0]))]
    rows[1].pop("note")  # as in records made before there were notes
    ledger = hl.Ledger(tmp_path)
    assert c.recorded_contests(ledger) == []
    ledger.add("contest", settings, {"rows": rows, "refused": {}, "teacher": {}, "num_layers": 2}, seconds=1.0)
    contest, = c.recorded_contests(ledger)
    assert dict(zip(contest.rows["name"], contest.rows["values"], strict=True)) == {
        "smart": None, "ga-s2": (2.0, 1.0), "gr-s2": (3.0, 1.0)}
    assert set(contest.rows["note"]) == {""}


@pytest.mark.parametrize("layers", [4])
def test_a_contest_is_run_once_recorded_and_read_again(studies, layers, monkeypatch):
    names = ["uniform", "ppl", "gate-gradient", "ga-s2", "exhaustive"]
    contest_study = partial(studies, c.SelectorSettings, selectors=names)
    study = contest_study()
    contest = c.run_contest(study)
    assert contest.titles == [hl.SELECTORS[name].title for name in names] and not contest.refused
    assert len(contest.rows) == 2 * (len(names) + 1)
    assert set(contest.rows["selector"]) - set(contest.titles) == {c.FLOOR}
    assert contest.sets["GA-S2"] == [study.select("ga-s2", seed=seed) for seed in (0, 1)]
    for _, line in contest.rows.iterrows():
        assert line["kl"] == study.hybrid(line["layers"], seed=line["seed"]).metrics["kl"]
    before = len(list(study.ledger))
    pd.testing.assert_frame_equal(c.run_contest(contest_study()).rows, contest.rows)
    assert len(list(study.ledger)) == before
    pd.testing.assert_frame_equal(c.recorded_contests(study.ledger)[0].rows, contest.rows)
    one_seed = c.run_contest(contest_study(seeds=1))
    fewer = c.run_contest(contest_study(selectors=names[:2]))
    assert [len(k.rows) for k in (contest, one_seed, fewer)] == [12, 6, 6]
    assert [len(k.rows) for k in c.recorded_contests(study.ledger)] == [12, 6]  # what differs in selectors is one
    more = c.run_contest(contest_study(selectors=["ga-s1"]))
    fuller = c.recorded_contests(study.ledger)[0]
    assert fuller.titles == ["uniform", "PPL", "GA-S1", "gate gradient", "GA-S2", "exhaustive"]
    assert fuller.settings["selectors"] == ["uniform", "ppl", "ga-s1", "gate-gradient", "ga-s2", "exhaustive"]
    assert fuller.sets["GA-S1"] == more.sets["GA-S1"] and fuller.sets["PPL"] == contest.sets["PPL"]
    others = ["uniform", "random", "first", "last", "ppl", "ga-s1", "gate-gradient", "ga-s2"]
    other = c.run_contest(contest_study(budget=1, selectors=others))
    assert len(other.rows) > len(fuller.rows)
    settings = settings_table(contest)["value"]
    assert settings[["teacher", "softmax layers", "tokens of stage 1", "seeds"]].tolist() == [
        "tiny", "2 of 4", "256", "2"]
    monkeypatch.setattr(c.StudySettings, "budget", 2)  # what a study starts from
    assert [(k.settings["budget"], k.settings["seeds"]) for k in c.recorded_contests(study.ledger)
            ] == [(2, 2), (2, 1), (1, 2)]
    assert {r.commit for r in study.ledger.find("contest")} == {contest.commit}


@pytest.mark.parametrize(("names", "message"), [
    ([], r"^selectors=\[\] is not a list of names"), ("ga-s2", "^selectors='ga-s2' is not a list"),
    (["ga-s2", "ga-s2"], "^selectors names 'ga-s2' twice"),
    (["gas2"], r"^selector='gas2' is unknown; did you mean 'ga-s2'\?$")])
def test_bad_lists_of_selectors_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        c.SelectorSettings(selectors=names)
