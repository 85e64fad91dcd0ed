"""How far selectors rank layers alike: the scores that count, their pairs, agreement with known answers."""

import dataclasses

import pytest
from tests.conftest import CONTEST_SETTINGS as SETTINGS

import hybridlib as hl
from hybridlib.distill.recall import RecallTask
from hybridlib.report import rankings
from hybridlib.selection.agreement import spearman
from hybridlib.selection.cost import Cost
from hybridlib.selection.engine import candidates
from hybridlib.study import contest as c, study as study_module


def test_scores_are_paired_with_the_references_of_the_same_seed_and_with_their_own_of_another():
    scores = {"PPL": (1.0, 2.0), "GA-S1": (2.0, 2.5), "GA-S1, seed 1": (1.5, 1.0), "GA-S2": (3.0, 4.0),
              "GA-S2, seed 1": (5.0, 6.0)}
    assert rankings.score_pairs(scores) == {
        "PPL with GA-S2": ((1.0, 2.0), (3.0, 4.0)), "GA-S1 with GA-S2": ((2.0, 2.5), (3.0, 4.0)),
        "GA-S1, seed 1 with GA-S2, seed 1": ((1.5, 1.0), (5.0, 6.0)),
        "GA-S1 with itself, seed 1": ((2.0, 2.5), (1.5, 1.0)), "GA-S2 with itself, seed 1": ((3.0, 4.0), (5.0, 6.0))}
    assert rankings.score_pairs({"PPL": (1.0, 2.0)}) == {}


def test_agreement_of_scores_is_the_mean_over_seeds_of_those_that_have_numbers(known):
    titles, ranks = rankings.agreement_of_scores(known)
    assert titles == ["cheap", "GA-S2", "dear"] and ranks[0, 1] == pytest.approx(0.9) and ranks[1, 2] == 1


def test_recorded_scores_are_those_of_the_selectors(tiny_teacher, tiny_tokens, tmp_path, monkeypatch):
    teacher, real = tiny_teacher(layers=3), hl.evaluate
    for module in (study_module, candidates):  # no tokenizer here
        monkeypatch.setattr(module, "evaluate", lambda *a, recall=None, **k: real(*a, **k))
    monkeypatch.setattr(study_module, "load_teacher", lambda *a, **k: hl.Teacher(teacher, None, "tiny", "r1"))
    monkeypatch.setattr(study_module, "load_tokens", lambda *a, **k: tiny_tokens)
    settings = c.SelectorSettings(**SETTINGS, results=str(tmp_path / "results"), selectors=["uniform"])
    study = hl.Study(settings)
    contest = c.run_contest(study)
    names = ["ppl", "rad", "ga-s1", "gate-gradient", "gate-gradient-2", "gate-gradient-path", "gate-gradient-turns",
             "gate-gradient-turns-slow", "postnas", "smart", "ga-s2", "ga-s2-again", "ga-s2-slow",
             "gr-s2", "exhaustive"]
    chosen = {name: study.selection(name, seed=0) for name in names}
    later = study.selection("ga-s2", seed=1)
    assert study.selection("ppl", seed=1).values == chosen["ppl"].values
    kept = [name for name in names if name not in ("postnas", "exhaustive")]  # they make sets, not scores
    titles = [hl.SELECTORS[name].title for name in kept]
    titles.insert(titles.index("GA-S2") + 1, "GA-S2, seed 1")

    def check():
        scores = rankings.recorded_scores(study.ledger, contest)
        assert list(scores) == titles and scores["GA-S2, seed 1"] == tuple(later.values)
        for name in kept:
            if name != "rad":  # which searches, with such scores to begin from
                assert scores[hl.SELECTORS[name].title] == tuple(chosen[name].values), name
        return scores

    scores = check()
    for changed in (dict(budget=1), dict(score_tokens=48), dict(attention_learning_rate=1e-2), dict(heldout_tokens=128),
                    dict(align_tokens=128)):
        other = hl.Study(dataclasses.replace(settings, **changed))
        for name in ("rad", "gate-gradient", "gate-gradient-turns", "ga-s2", "ga-s2-slow"):
            other.selection(name)
    study.selection("ga-s2-slow", rate=0.5), study.selection("gate-gradient", share=None)
    study.selection("smart", num_tokens=64)
    study.scores("gdn", 0, metric="mse", normalize=False)
    assert check() == scores  # other settings and options, and what is no selector's, stay out
    gla = dataclasses.replace(contest, settings=contest.settings | {"mixer": "gla"})
    assert set(rankings.recorded_scores(study.ledger, gla)) == {"PPL", "RAD"}  # they ask the teacher alone
    another = dataclasses.replace(contest, settings=contest.settings | {
        "aligned": contest.settings["aligned"] | {"teacher": "another"}})
    assert rankings.recorded_scores(study.ledger, another) == {}


def test_scores_by_recall_are_those_of_the_task_that_the_selector_settles_on(known, tmp_path):
    settings = dict(SETTINGS, recall_pairs=8, selectors=["ar"], mixer="gdn", aligned={
        "teacher": "tiny", "revision": "r1", "corpus": "pattern", "context": 16, "mixer": "gdn", "seed": 0})
    contest, ledger = dataclasses.replace(known, settings=settings), hl.Ledger(tmp_path)

    def record(value, name, **task):
        ledger.add("score", {"selector": "ar", "teacher": "tiny", "revision": "r1", "corpus": "pattern", "context": 16,
                             "data": "d", "heldout_tokens": 64, "num_examples": 200,
                             "task": dataclasses.asdict(RecallTask(name, **task))}, {"values": [value]}, seconds=1.0)

    record(0.0, "key_value", pairs=2)  # on which hybrids are judged, and by which no selector chooses any more
    record(1.0, "needle", pairs=2)
    record(2.0, "variable_tracking", pairs=4, hops=2)
    record(3.0, "variable_tracking", pairs=2, hops=2)
    assert rankings.recorded_scores(ledger, contest) == {"AR": (1.0,), "AR-MH": (2.0,)}
    record(4.0, "needle", pairs=8)
    assert rankings.recorded_scores(ledger, contest) == {"AR": (4.0,), "AR-MH": (2.0,)}


@pytest.fixture
def aims(known, tmp_path):
    """aims(ours, theirs, flops, again): a contest, and a ledger with scores of two seeds under its settings."""
    aligned = {"teacher": "tiny", "revision": "r1", "corpus": "pattern", "context": 16, "mixer": "gdn", "seed": 0}
    settings = SETTINGS | {"mixer": "gdn", "attention_learning_rate": 1e-3, "aligned": aligned, "selectors": ["ga-s2"]}
    contest = dataclasses.replace(known, settings=settings, num_layers=10)

    def make(ours, theirs, flops=10.0, again=None):
        ledger, settings = hl.Ledger(tmp_path), hl.MatchSettings(
            batch_tokens=64, learning_rate=3e-4, attention_learning_rate=1e-3, compile=True, cuda_graph=True).numbers()

        def record(seed, values, flops, **asked):
            parameters = {"aligned": aligned | {"seed": seed}, "mixer": "gdn", "seed": seed, "heldout_tokens": 64}
            ledger.add("score", parameters | asked, {"values": values, "cost": Cost(flops=flops).to_dict()},
                       seconds=1.0)

        for seed in (0, 1):
            record(seed, ours[seed], flops, selector="gate-gradient", at=0.0, order=1, steps=1, share=0.05,
                   score_tokens=64)
            record(seed, theirs[seed], 400.0, direction="add", metric="kl", num_tokens=64, settings=settings)
        if again is not None:
            record(0, again, 400.0, selector="ga-s2-again", num_tokens=64, settings=settings)
        return ledger, contest

    return make


UP = [float(layer) for layer in range(10)]
SWAPPED = [5.0, 1.0, 2.0, 3.0, 4.0, 0.0, 6.0, 7.0, 8.0, 9.0]  # ranks of two layers differ by 5: 1 - 6 x 50 / 990


def test_agreement_with_ga_s2_is_of_the_same_seed_beside_what_ga_s2_agrees_with_itself(aims):
    ledger, contest = aims([UP, UP], [UP, SWAPPED], again=SWAPPED)
    table = rankings.agreement_with_ga_s2(ledger, [contest, dataclasses.replace(contest, num_layers=3)])
    assert list(table.index) == [("tiny", "gate gradient", 0), ("tiny", "gate gradient", 1),
                                 ("tiny", "GA-S2, other text", 0)]
    ours, later, again = (row for _, row in table.iterrows())
    assert (ours["spearman"], ours["low"], ours["high"], ours["kendall"], ours["flops_share"]) == (1, 1, 1, 1, 1 / 40)
    assert ours["ga_s2_again"] == again["spearman"] == later["spearman"] == pytest.approx(1 - 6 * 50 / 990)
    assert later["low"] < 0.7 < later["high"] <= 1 and list(table["met"]) == [True, False, False]
    both = [5.0, 2.0, 4.0, 6.0, 8.0, 5.0, 12.0, 14.0, 16.0, 18.0]  # UP and SWAPPED, added
    assert ours["with_both"] == pytest.approx(spearman(UP, both)) and table["with_both"].isna().tolist() == [
        False, True, False]
    assert rankings.agreement_with_ga_s2(hl.Ledger(ledger.folder / "none"), [contest]).empty
    ledger, contest = aims([UP, UP], [UP, UP], flops=21.0)  # it costs too much
    table = rankings.agreement_with_ga_s2(ledger, [contest])
    assert list(table["spearman"])[:2] == [1, 1] and not table["met"].any()


def test_the_layers_whose_ranks_differ_most_are_named(aims):
    ledger, contest = aims([UP, UP], [UP, SWAPPED], again=SWAPPED)
    table = rankings.rank_gaps(ledger, contest, 3)
    assert list(table.index) == [(1, 0), (1, 5)] and list(table["lost"]) == [0.5, 0.5]  # seed 0 agrees
    assert list(table["gate gradient"]) == [10, 5] and list(table["GA-S2"]) == [5, 10]
    assert table["GA-S2, other text"].isna().all()
    ledger, contest = aims([SWAPPED, UP], [UP, UP], again=SWAPPED)
    assert list(rankings.rank_gaps(ledger, contest, 1)["GA-S2, other text"]) == [5]
    with pytest.raises(ValueError, match="^count=0"):
        rankings.rank_gaps(ledger, contest, 0)
