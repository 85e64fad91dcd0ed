"""What predicts a set's end, on made-up hybrids with a known truth, and what is read from a ledger of records."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from hybridlib.records.ledger import Ledger, Record
from hybridlib.report import plots, sets
from hybridlib.selection.cost import Cost
from hybridlib.selection.scores import LayerScores
from hybridlib.study.evidence import RANDOM_SETS, balanced_sets
from hybridlib.study.selector import Selection

DEPTH, KEPT = 8, 4
DRAW = np.random.default_rng(0)
GAIN, NOISE = DRAW.normal(size=DEPTH), DRAW.normal(size=DEPTH)
PAIRS = np.triu(DRAW.normal(size=(DEPTH, DEPTH)), 1)
SETS = balanced_sets(DEPTH, KEPT, 32)
ALIGNED = {"teacher": "t", "seed": 0}


def made_up(kl, early=()):
    """Hybrids of `SETS` whose end is `kl(layers)`; `early` is (tokens, noise of the KL there)."""
    draw = np.random.default_rng(1)
    return [Record("hybrid", {"layers": list(s)}, {"kl": kl(s), "curve": [
        {"tokens": tokens, "kl": kl(s) + float(draw.normal() * noise)} for tokens, noise in early]},
        0, {}, "CPU", None, "2026-01-01T00:00:00", 1.0, 100, "k") for s in SETS]


def additive(layers):
    return float(9 - sum(GAIN[l] for l in layers))


def paired(layers):
    return float(9 - sum(PAIRS[i, j] for i, j in combinations(layers, 2)))


def test_leave_one_out_is_that_of_one_fit_a_row():
    x, y = DRAW.normal(size=(12, 20)), DRAW.normal(size=12)
    for penalty, features in ((0.5, x), (30.0, x), (0.0, x[:, :3]), (1.0, x[:, :0])):
        expected = []
        for i in range(12):
            rest = np.arange(12) != i
            own, mean = features[rest] - features[rest].mean(0), y[rest].mean()
            weights = np.linalg.solve(own.T @ own + penalty * np.eye(own.shape[1]), own.T @ (y[rest] - mean))
            expected.append(mean + (features[i] - features[rest].mean(0)) @ weights)
        np.testing.assert_allclose(sets.leave_one_out(features, y, penalty), expected, rtol=1e-9)
    assert np.isnan(sets.leave_one_out(np.eye(4)[:, :1], np.arange(4.0), 0.0)[0])  # nothing else says what it brings


def test_a_ridge_predicts_a_row_from_the_others_alone():
    x, y = DRAW.normal(size=(20, 4)), DRAW.normal(size=20)
    other = y.copy()
    other[7] += 100
    assert sets.ridge_prediction(x, y)[7] == pytest.approx(sets.ridge_prediction(x, other)[7])
    truth = x @ [1.0, -2.0, 0.5, 0.0]
    np.testing.assert_allclose(sets.ridge_prediction(x, truth), truth, atol=1e-2)


def test_the_table_has_sums_turned_and_what_all_were_measured_at():
    records = made_up(additive, [(0, 1.0), (512, 0.1)])
    del records[3].metrics["curve"][0]
    table = sets.set_table(records, {"GA-S2": GAIN})
    assert list(table.columns) == ["end", "GA-S2", "KL after 512 tokens"] and list(table.index) == list(SETS)
    assert table["GA-S2"].iloc[0] == pytest.approx(additive(SETS[0]) - 9)
    assert sets.set_table([], {"GA-S2": GAIN}).empty


def test_predictors_are_ranked_as_the_truth_has_it():
    values = {"true scores": GAIN, "noise": NOISE}
    table = sets.set_table(made_up(additive, [(0, 5.0), (512, 0.1)]), values)
    found = sets.predictions(table, list(values))
    assert list(found.index) == ["true scores", "noise", "KL after 0 tokens", "KL after 512 tokens", "ridge on layers",
                                 "ridge on scores and pairs"]
    assert found.loc["true scores", ["spearman", "r2"]].tolist() == pytest.approx([1, 1])
    assert found.loc["KL after 512 tokens", "r2"] > 0.9 > 0.5 > found.loc["KL after 0 tokens", "r2"]
    assert found.loc["noise", "r2"] < 0.3 and found.loc["ridge on layers", "r2"] > 0.99
    assert (found["r2_low"] <= found["r2"] + 1e-9).all() and (found["r2"] <= found["r2_high"] + 1e-9).all()
    assert (found["sets"] == 32).all()
    together = sets.predictions(sets.set_table(made_up(paired), values), list(values))
    assert together.loc["ridge on scores and pairs", "r2"] > together.loc["true scores", "r2"]
    assert sets.predictions(table.iloc[:4]).empty
    for figure in (plots.dot_intervals(found, {"spearman": "Spearman", "r2": "R2"}),
                   plots.scatter_panels(table, "end", list(table.columns[1:]), ylabel="KL")):
        assert figure._repr_svg_()


def test_a_constant_column_predicts_nothing():
    table = sets.set_table(made_up(additive), {"flat": np.zeros(DEPTH)})
    assert "flat" not in sets.predictions(table, ["flat"]).index


def test_costs_are_shares_of_ga_s2_of_the_same_seed():
    choices = {"GA-S2": {s: Selection((0,), Cost(training_tokens=100, flops=1000.0 + s)) for s in (0, 1)},
               "race": {0: Selection((1,), Cost(training_tokens=10, flops=50.0))}, "old": {0: Selection((2,), None)}}
    hybrids = pd.DataFrame([("GA-S2", 0, .5), ("GA-S2", 1, .6), ("race", 0, .4), ("old", 0, .7)],
                           columns=["selector", "seed", "kl"])
    joined = sets.arms(choices, hybrids.assign(tokens=7)).set_index("selector")
    assert joined["kl"].tolist() == [.5, .6, .4, .7] and joined.loc["race", "tokens_share"] == 0.1
    assert joined.loc["race", "flops_share"] == 0.05 and np.isnan(joined.loc["old", "tokens"])


def race_metrics(layers):
    rounds = [(128, [(layers, 0.5), ((0, 1), 0.6), ((0, 2), None)]), (512, [(layers, 0.3), ((0, 1), 0.2)])]
    return {"layers": [0, 1], "cost": Cost(training_tokens=40).to_dict(), "rounds": [
        {"tokens": tokens, "sets": [{"layers": list(s), **({"error": "x"} if kl is None else {"kl": kl})}
                                    for s, kl in part]} for tokens, part in rounds]}


def scores(values, tokens=0):
    return LayerScores("add", "kl", tuple(values), tuple(values), tuple(values), tokens, 0.0,
                       Cost(training_tokens=tokens)).to_dict()


def test_records_of_a_ledger_are_those_of_the_student_and_what_is_missing_is_counted(tmp_path):
    ledger, numbers = Ledger(tmp_path / "results", device="cpu"), {"rate": 1e-4}
    assert sets.recorded_random(ledger) == [] and sets.on_record(ledger)["on record"].tolist() == [0, 0, 0]
    ledger.add("align", ALIGNED, {"heldout_error": [0.0] * DEPTH}, seconds=1)
    own = {"aligned": ALIGNED, "seed": 0, "settings": numbers, "num_tokens": 1000}
    for s in SETS[:6]:
        ledger.add("hybrid", own | {"layers": list(s), "measure_at": [0]},
                   {"kl": additive(s), "curve": [{"tokens": 0, "kl": 1.0}]}, seconds=1)
        ledger.add("hybrid", own | {"layers": list(s)}, {"kl": 0.0}, seconds=1)  # not measured on the way
    odd = next(s for s in combinations(range(DEPTH), KEPT) if s not in balanced_sets(DEPTH, KEPT, RANDOM_SETS))
    ledger.add("hybrid", own | {"layers": list(odd), "measure_at": [0]}, {"kl": 9.0, "curve": []}, seconds=1)
    add = {"aligned": ALIGNED, "seed": 0, "direction": "add", "metric": "kl"}
    for tokens, rate, values in ((100, 1e-4, GAIN), (10, 1e-4, NOISE), (1000, 1e-3, NOISE)):
        ledger.add("score", add | {"num_tokens": tokens, "settings": {"rate": rate}}, scores(values, tokens), seconds=1)
    gates = {"aligned": ALIGNED, "seed": 0, "selector": "gate-gradient", "at": 0.0, "order": 1, "steps": 1}
    ledger.add("score", gates | {"train_tokens": 9}, scores(NOISE), seconds=1)  # gates in turn
    random = sets.recorded_random(ledger)
    assert {tuple(r.parameters["layers"]) for r in random} == set(SETS[:6])
    assert sets.recorded_values(ledger, random[0]) == {"GA-S2": tuple(GAIN)}
    assert sets.on_record(ledger).loc["random sets"].tolist() == [6, RANDOM_SETS]
    assert sets.on_record(ledger)["on record"].tolist() == [6, 1, 0] and sets.recorded_choices(ledger)[0] == {}

    race = ledger.add("score", {"selector": "race", "budget": 2, "num_tokens": 50, **{
        k: own[k] for k in ("aligned", "seed", "settings")}}, race_metrics((3, 4)), seconds=1)
    best = list(np.sort(np.argsort(-GAIN)[:2]))
    for layers, tokens, kl in (([0, 1], 1000, .2), ([0, 1], 100, .9), (best, 1000, .3), (best, 100, .1)):
        ledger.add("hybrid", own | {"layers": [int(l) for l in layers], "num_tokens": tokens}, {"kl": kl}, seconds=1)
    joined = sets.arms(*sets.recorded_choices(ledger)).set_index("selector")
    assert joined["kl"].dropna().to_dict() == {"race, 50 tokens": .2, "GA-S2": .3} and "uniform" in joined.index
    assert joined.loc["race, 50 tokens", "tokens_share"] == 0.4
    table = sets.race_table(race)
    assert table["last"].tolist() == [False, False, True, True, True] and table["round"].tolist() == [1, 1, 1, 2, 2]
    assert np.isnan(table["kl"][2]) and table["rank"].tolist()[3:] == [2, 1]
    assert plots.race_rounds(table)._repr_svg_()
