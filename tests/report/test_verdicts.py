"""What notebooks say of their records: a claim is made only where the interval allows it, from the right records."""

from __future__ import annotations

import pandas as pd
import pytest

from hybridlib.records.ledger import Ledger
from hybridlib.report import verdicts as reading
from hybridlib.selection.agreement import chance_jaccard, kendall, paired_difference, spearman
from hybridlib.selection.rules import select
from hybridlib.study.contest import FLOOR

RULES = {"GA-S2": {"selector": "ga-s2"}, "GA-S1": {"selector": "ga-s1", "normalize": False},
         "uniform": {"selector": "uniform"}, "random": {"selector": "random"}, FLOOR: None}


def frame(**values):
    """One row a selector and seed: ``frame(a=[kl of seed 0, ...])``."""
    return pd.DataFrame([{"selector": name, "seed": seed, "kl": kl, "recall_exact": 1 - kl}
                         for name, kls in values.items() for seed, kl in enumerate(kls)])


def test_a_verdict_follows_the_interval_of_the_paired_difference():
    runs = frame(a=[0.10, 0.21, 0.32], b=[0.14, 0.26, 0.36])  # seeds differ more than selectors do
    mean, low, high = paired_difference([0.10, 0.21, 0.32], [0.14, 0.26, 0.36])
    assert low < high < 0
    text = reading.verdict(runs, "kl", "a", "b")
    assert "**replicates here**" in text and "held-out KL (lower is better)" in text and "over 3 seeds" in text
    assert f"\u2212{-mean:.4f} [\u2212{-low:.4f}, \u2212{-high:.4f}] nats a token" in text
    assert "**does not replicate here**" in reading.verdict(runs, "kl", "b", "a")
    assert "**replicates here**" in reading.verdict(runs, "recall_exact", "a", "b")  # higher is better
    assert "**worse here**" in reading.verdict(runs, "kl", "b", "a", words=reading.OWN)


def test_a_verdict_claims_nothing_where_the_interval_contains_0():
    text = reading.verdict(frame(a=[0.10, 0.30, 0.20], b=[0.20, 0.20, 0.25]), "kl", "a", "b")
    assert "**cannot be told apart**" in text and "contains 0" in text and "replicate" not in text


def test_one_seed_cannot_tell():
    text = reading.verdict(frame(a=[0.1], b=[0.9]), "kl", "a", "b")
    assert "**one seed cannot tell**" in text and "replicate" not in text and "[" not in text
    assert "**one seed cannot tell**" in reading.verdict(frame(a=[0.1], b=[0.9, 0.8]), "kl", "a", "b")


def test_the_same_step_on_every_seed_is_no_interval():
    text = reading.verdict(frame(a=[0.25, 0.5, 0.75], b=[0.375, 0.625, 0.875]), "kl", "a", "b")
    assert "**cannot be told apart**" in text and "do not vary" in text
    text = reading.verdict(frame(a=[0.25, 0.5], b=[0.25, 0.5]), "kl", "a", "b")
    assert "no difference on any of 2 seeds; **cannot be told apart**" in text


def test_a_verdict_refuses_what_it_cannot_pair():
    runs = frame(a=[0.1, 0.2], b=[0.2, 0.3])
    with pytest.raises(ValueError, match="selector='c'"):
        reading.verdict(runs, "kl", "a", "c")
    with pytest.raises(ValueError, match="value='speed'"):
        reading.verdict(runs, "speed", "a", "b")
    with pytest.raises(ValueError, match="two rows of one seed"):
        reading.verdict(pd.concat([runs, runs]), "kl", "a", "b")


def test_verdicts_list_every_pair_and_value_and_say_what_was_not_run():
    lines = reading.verdicts(frame(a=[0.1, 0.2], b=[0.2, 0.3]), [("a", "b"), ("a", "c")]).splitlines()
    assert len(lines) == 4 and all(line.startswith("- ") for line in lines)
    assert [line for line in lines if "not both were run" in line] == lines[1::2]
    assert reading.verdicts(pd.DataFrame(), [("a", "b")]) == ""


def test_rankings_show_agreement_beside_chance():
    a, b = [0.1, 0.9, 0.5, 0.3, 0.2, 0.8], [0.2, 0.8, 0.3, 0.9, 0.1, 0.7]
    table = reading.rankings({"a and b": (a, b), "a and a": (a, a)}, 2)
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
        about = {"aligned": aligned[seed], "mixer": "gdn", "seed": seed, "direction": "add", "metric": metric,
                 "heldout_tokens": 64}
        about |= {"num_tokens": 100, "settings": {"lr": 1}} if metric == "kl" else {"normalize": False}
        ledger.run("score", about, lambda: {"direction": "add", "metric": metric, "values": values, "tokens": 100,
                                            "measured": values, "stderr": values, "seconds": 1.0})

    def hybrid(seed, layers, kl, **other):
        about = {"aligned": aligned[seed], "mixer": "gdn", "seed": seed, "layers": list(layers), "num_tokens": 2000,
                 "settings": {"lr": 1}, "heldout_tokens": 64, "recall": {"pairs": 4}} | other
        ledger.run("hybrid", about, lambda: {"kl": kl, "recall_exact": 0.5, "loss": [1.0, 0.5]})

    ledger.hybrid = hybrid
    for seed, best in ((0, (0, 2)), (1, (6, 7))):
        hybrid(seed, best, 0.1)
        hybrid(seed, select("uniform", 2, num_layers=8), 0.2)
        hybrid(seed, select("random", 2, num_layers=8, seed=seed), 0.3)
        hybrid(seed, (), 0.9)
    return ledger


def test_recorded_names_hybrids_by_the_rule_that_keeps_their_layers(ledger):
    found = reading.recorded(ledger, RULES)
    assert list(zip(found["selector"], found["seed"])) == [
        (name, seed) for name in ("GA-S2", "uniform", "random", FLOOR) for seed in (0, 1)]
    assert list(found["kl"]) == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.9, 0.9]
    assert list(found["layers"][:4]) == [(0, 2), (6, 7), (2, 6), (2, 6)]
    assert set(found["num_layers"]) == {8} and set(found["kept"]) == {2} and "loss" not in found


def test_recorded_uses_the_scores_of_the_rule(ledger):
    ledger.hybrid(0, (3, 4), 0.4)  # GA-S1 with the absolute error would keep these
    found = reading.recorded(ledger, RULES)
    assert found[found["selector"] == "GA-S1"][["seed", "kl"]].values.tolist() == [[0, 0.4]]
    relative = reading.recorded(ledger, RULES | {"GA-S1": {"selector": "ga-s1"}})
    assert "GA-S1" not in set(relative["selector"])
    other_probe = reading.recorded(ledger, {"GLA probe": {"selector": "ga-s2", "mixer": "gla"}})
    assert other_probe.empty


def test_recorded_does_not_mix_settings(ledger):
    ledger.hybrid(0, (0, 2), 0.05, num_tokens=9000)  # a longer stage 2 of one rule only
    assert set(reading.recorded(ledger, RULES)["match_tokens"]) == {2000}
    ledger.hybrid(0, (0,), 0.5)  # a smaller budget of one rule only
    assert set(reading.recorded(ledger, RULES)["kept"]) == {2}
    assert reading.recorded(ledger, RULES, require=("GA-S2", "GA-S1")).empty
    assert reading.recorded(ledger, RULES, mixer="gla").empty


def test_recorded_and_about_without_records(tmp_path, ledger):
    nothing = reading.recorded(Ledger(tmp_path / "none"), RULES)
    assert nothing.empty and reading.verdicts(nothing, [("GA-S2", "uniform")]) == ""
    text = reading.about(nothing, "kl_or_mse")
    assert "papermill notebooks/kl_or_mse.ipynb out.ipynb -f notebooks/profiles/gpu.yaml" in text
    text = reading.about(reading.recorded(ledger, RULES), "kl_or_mse")
    assert "**t**, 2 of 8 layers softmax" in text and "1,000 tokens" in text and "2 seeds" in text


def test_published_filters_by_column():
    rows = reading.published(teacher="Llama-3.2-3B-Instruct", student_mixer="gdn", budget=0.25)
    assert {"GA-S2", "GR-S2", "AVG-S2", "GA-S1", "UNIFORM"} <= set(rows["selector"])
    assert set(rows["teacher"]) == {"Llama-3.2-3B-Instruct"}
    with pytest.raises(ValueError, match="column='model'"):
        reading.published(model="x")
