"""What records allow to say: outcomes follow the interval, and hybrids are found by the rule that kept their layers."""

import pandas as pd
import pytest

from hybridlib.records.ledger import Ledger
from hybridlib.report import tables, verdicts
from hybridlib.selection.agreement import chance_jaccard, kendall, paired_difference, spearman
from hybridlib.selection.rules import select
from hybridlib.study.contest import FLOOR

RULES = {"GA-S2": {"selector": "ga-s2"}, "GA-S1": {"selector": "ga-s1", "normalize": False},
         "uniform": {"selector": "uniform"}, "random": {"selector": "random"}, FLOOR: None}


def frame(**values):
    """One row a selector and seed: ``frame(a=[kl of seed 0, ...])``."""
    return pd.DataFrame([{"selector": name, "seed": seed, "kl": kl, "recall_exact": 1 - kl}
                         for name, kls in values.items() for seed, kl in enumerate(kls)])


def test_an_outcome_follows_the_interval_of_the_paired_difference():
    runs = frame(a=[0.10, 0.21, 0.32], b=[0.14, 0.26, 0.36])  # seeds differ more than selectors do
    mean, low, high = paired_difference([0.10, 0.21, 0.32], [0.14, 0.26, 0.36])
    assert low < high < 0
    text = f"\u2212{-mean:.4f} [\u2212{-low:.4f}, \u2212{-high:.4f}] nats a token: lower"
    assert verdicts.outcome(runs, "kl", "a", "b") == text
    assert verdicts.outcome(runs, "kl", "b", "a").endswith("nats a token: higher")
    assert verdicts.outcome(runs, "recall_exact", "a", "b").endswith("share exact: higher")


@pytest.mark.parametrize("a, b, text", [
    ([0.10, 0.30, 0.20], [0.20, 0.20, 0.25], "\u2212.* nats a token: not told apart"),  # the interval contains 0
    ([0.1], [0.9, 0.8], "\u22120.8000 nats a token: one seed cannot tell; seeds: 1 of 2 in common"),
    ([0.25, 0.5, None], [0.25, 0.5, 1], "equal on every seed; seeds: 2 of 3 in common"),
    ([0.25, 0.5, 0.75], [0.375, 0.625, 0.875], "\u22120.1250 nats a token: not told apart"),  # the same step each time
    ([0.25, 0.5], [0.25, 0.5], "equal on every seed"), ([0.25, None], [None, 0.5], "no seed in common")])
def test_an_outcome_claims_nothing_without_an_interval_that_excludes_0(a, b, text):
    runs = frame(**{name: [float("nan") if kl is None else kl for kl in kls] for name, kls in (("a", a), ("b", b))})
    outcome = verdicts.outcome(runs, "kl", "a", "b")
    assert pd.Series([outcome]).str.fullmatch(text).all(), outcome


@pytest.mark.parametrize("value, b, copies, message", [
    ("kl", "c", 1, "selector='c'"), ("speed", "b", 1, "value='speed'"), ("kl", "b", 2, "duplicate entries")])
def test_an_outcome_refuses_what_it_cannot_pair(value, b, copies, message):
    with pytest.raises(ValueError, match=message):
        verdicts.outcome(pd.concat([frame(a=[0.1, 0.2], b=[0.2, 0.3])] * copies), value, "a", b)


def test_verdicts_have_a_row_a_pair_and_a_column_a_value():
    runs = frame(a=[0.1, 0.2], b=[0.2, 0.35])
    table = verdicts.verdicts(runs, [("a", "b"), ("a", "c")])
    assert list(table.index) == ["a against b", "a against c"]
    assert list(table.columns) == ["held-out KL (lower is better)", "recall (higher is better)"]
    assert list(table.iloc[0]) == [verdicts.outcome(runs, value, "a", "b") for value in ("kl", "recall_exact")]
    assert set(table.iloc[1]) == {"not on record: c"}
    assert verdicts.verdicts(pd.DataFrame(), [("a", "b")]).empty
    by_setting = pd.concat([runs.assign(setting="z"), runs[runs["selector"] == "b"].assign(setting="y")])
    both = verdicts.verdicts(by_setting, [("a", "b"), ("c", "d")])
    assert both.loc["z"].iloc[0].equals(table.iloc[0]) and both.index.unique("setting").tolist() == ["z", "y"]
    assert [set(both.loc["y"].loc[row]) for row in ("a against b", "c against d")] == [
        {"not on record: a"}, {"not on record: c, d"}]


def test_rankings_show_agreement_beside_chance():
    a, b = [0.1, 0.9, 0.5, 0.3, 0.2, 0.8], [0.2, 0.8, 0.3, 0.9, 0.1, 0.7]
    table = verdicts.rankings({"a and b": (a, b), "a and a": (a, a)}, 2)
    assert list(table.index) == ["a and b", "a and a"]
    assert table.iloc[0, 0].startswith(f"{spearman(a, b):.2f} [") and table.iloc[1, 0].startswith("1.00 [")
    assert table["Kendall [95%]"].iloc[0].startswith(f"{kendall(a, b):.2f} [") and kendall(a, b) != spearman(a, b)
    assert table["Jaccard of the best 2 [95%]"].iloc[0].startswith("0.33 [")
    assert set(table["Jaccard by chance"]) == {f"{chance_jaccard(6, 2):.2f}"}


SCORES = {("kl", 0): [5, 1, 4, 0, 0, 0, 0, 0], ("kl", 1): [0, 0, 0, 0, 0, 0, 3, 2],
          ("mse", 0): [0, 0, 0, 9, 9, 0, 0, 0]}


@pytest.fixture
def ledger(tmp_path):
    """Records as a study writes them: two seeds of scores, and hybrids of GA-S2, uniform, random and no layer."""
    ledger = Ledger(tmp_path, device="cpu")
    aligned = {seed: {"teacher": "t", "mixer": "gdn", "seed": seed, "data": f"order {seed}", "num_tokens": 1000}
               for seed in (0, 1)}
    for seed in (0, 1):
        ledger.run("align", aligned[seed], lambda: {"heldout_error": [0.5] * 8})
    for (metric, seed), values in SCORES.items():
        parameters = {"aligned": aligned[seed], "mixer": "gdn", "seed": seed, "direction": "add", "metric": metric,
                      "heldout_tokens": 64}
        parameters |= {"num_tokens": 100, "settings": {"lr": 1}} if metric == "kl" else {"normalize": False}
        ledger.run("score", parameters, lambda: {
            "direction": "add", "metric": metric, "values": values, "tokens": 100, "measured": values,
            "stderr": values, "seconds": 1.0})

    def hybrid(seed, layers, kl, **other):
        parameters = {"aligned": aligned[seed], "mixer": "gdn", "seed": seed, "layers": list(layers),
                      "num_tokens": 2000, "settings": {"lr": 1}, "heldout_tokens": 64, "recall": {"pairs": 4}} | other
        ledger.run("hybrid", parameters, lambda: {"kl": kl, "recall_exact": 0.5, "loss": [1.0, 0.5]})

    ledger.hybrid = hybrid
    for seed, best in ((0, (0, 2)), (1, (6, 7))):
        hybrid(seed, best, 0.1)
        hybrid(seed, select("uniform", 2, num_layers=8), 0.2)
        hybrid(seed, select("random", 2, num_layers=8, seed=seed), 0.3)
        hybrid(seed, (), 0.9)
    return ledger


def test_hybrids_are_named_by_the_rule_that_keeps_their_layers(ledger):
    hybrids = verdicts.recorded_hybrids(ledger, RULES)
    assert list(zip(hybrids["selector"], hybrids["seed"])) == [
        (name, seed) for name in ("GA-S2", "uniform", "random", FLOOR) for seed in (0, 1)]
    assert list(hybrids["kl"]) == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.9, 0.9]
    assert list(hybrids["layers"][:4]) == [(0, 2), (6, 7), (2, 6), (2, 6)]
    assert set(hybrids["softmax_layers"]) == {"2 of 8"} and "loss" not in hybrids


def test_hybrids_are_found_by_the_scores_of_the_rule(ledger):
    ledger.hybrid(0, (3, 4), 0.4)  # GA-S1 with the absolute error would keep these
    hybrids = verdicts.recorded_hybrids(ledger, RULES)
    assert hybrids[hybrids["selector"] == "GA-S1"][["seed", "kl"]].values.tolist() == [[0, 0.4]]
    relative = verdicts.recorded_hybrids(ledger, RULES | {"GA-S1": {"selector": "ga-s1"}})
    assert "GA-S1" not in set(relative["selector"])
    assert verdicts.recorded_hybrids(ledger, {"GLA probe": {"selector": "ga-s2", "mixer": "gla"}}).empty


def test_every_setting_is_given_the_deepest_teacher_and_then_the_latest_first(ledger):
    ledger.hybrid(0, (0, 2), 0.05, num_tokens=9000)  # a longer stage 2 of one rule only
    ledger.hybrid(1, (7,), 0.5)  # a smaller budget of one rule only
    deep = {"teacher": "deep", "mixer": "gdn", "seed": 1, "num_tokens": 1000}
    ledger.run("align", deep, lambda: {"heldout_error": [0.5] * 9})
    ledger.hybrid(1, (2, 6), 0.3, aligned=deep)
    ledger.hybrid(1, (2, 6), 0.4, settings={"lr": 1, "mixer_learning_rate": 0.1, "grouping": "attention"})
    ledger.hybrid(0, (2, 6), 0.4, recall={"pairs": 4, "digits": 5})  # what no name tells
    hybrids = verdicts.recorded_hybrids(ledger, RULES | {"last": {"selector": "last"}})
    names = list(hybrids["setting"].unique())
    assert names[0] == "deep, gdn, 2 of 9" and "t, gdn, 1 of 8" in names and len(names) == 6
    at_two = [name for name in names if name.startswith("t, gdn, 2 of 8, ")]
    assert "t, gdn, 2 of 8, 9,000 tokens of stage 2, higher rate nan, mixers at the higher rate" in at_two
    assert "t, gdn, 2 of 8, 2,000 tokens of stage 2, higher rate 0.1, attention at the higher rate" in at_two
    assert [name[-3:] for name in at_two if name.endswith(")")] == ["(1)", "(2)"]
    assert hybrids[hybrids["setting"] == "t, gdn, 1 of 8"]["selector"].tolist() == [FLOOR, FLOOR, "last"]
    assert verdicts.recorded_hybrids(ledger, RULES, mixer="gla").empty


def test_of_one_rule_and_seed_the_latest_counts_unless_another_text_changes_its_layers(ledger):
    other = {"teacher": "t", "mixer": "gdn", "seed": 0, "data": "other text", "num_tokens": 1000}
    ledger.run("align", other, lambda: {"heldout_error": [0.5] * 8})
    ledger.hybrid(0, (2, 6), 0.7, aligned=other)
    hybrids = verdicts.recorded_hybrids(ledger, RULES)
    assert hybrids[hybrids["selector"] == "uniform"]["kl"].tolist() == [0.7, 0.2] and len(hybrids) == 8
    ledger.run("score", {"aligned": other, "mixer": "gdn", "direction": "add", "metric": "kl", "heldout_tokens": 64,
                         "num_tokens": 100, "settings": {"lr": 1}}, lambda: {
        "direction": "add", "metric": "kl", "values": [0] * 6 + [1, 2], "tokens": 100, "measured": [0] * 8,
        "stderr": [0] * 8, "seconds": 1.0})
    ledger.hybrid(0, (6, 7), 0.6, aligned=other)
    texts = [part.set_index(["selector", "seed"])["kl"].to_dict() for _, part in verdicts.recorded_hybrids(
        ledger, RULES).groupby("setting", sort=False)]
    assert texts[0] == {("GA-S2", 0): 0.6, ("uniform", 0): 0.7, ("random", 0): 0.6}
    assert len(texts[1]) == 8 and texts[1]["GA-S2", 0] == 0.1 and texts[1]["uniform", 0] == 0.2


def test_a_table_of_settings_says_what_was_run(tmp_path, ledger):
    nothing = verdicts.recorded_hybrids(Ledger(tmp_path / "none"), RULES)
    assert nothing.empty and tables.settings_table(nothing).empty and tables.settings_table(None).empty
    settings = tables.settings_table(verdicts.recorded_hybrids(ledger, RULES))["t, gdn, 2 of 8"]
    assert settings[["teacher", "mixer of the linear layers", "softmax layers", "tokens of stage 1",
                     "tokens of stage 2", "seeds"]].tolist() == ["t", "gdn", "2 of 8", "1,000", "2,000", "2"]
    assert settings["weights at the higher rate"] == "mixers" and len(settings) == 10
    assert settings["device"] == next(iter(ledger)).device
