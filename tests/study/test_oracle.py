"""The oracle: every set is measured once, a killed run goes on, and what is read from it is what brute force gives."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest

import hybridlib as hl
from hybridlib.distill.evaluate import heldout_kl
from hybridlib.records.ledger import Record
from hybridlib.report import oracle as oracle_report
from hybridlib.study import oracle, study as study_module

SMALL = dict(teacher="tiny", context=16, align_tokens=256, score_tokens=64, match_tokens=128, batch_tokens=64,
             heldout_tokens=64, seeds=2, recall_pairs=2, budget=0.34, device="cpu", oracle_tokens=64,
             oracle_heldout_tokens=64)


def one_by_one(calls):
    """What trains and measures sets, one after the other; `calls` is told of each."""

    def measure(student, teacher, tokens, sets, num_tokens, *, settings, group, recall, recall_examples, measure_at):
        rows = []
        for layers in sets:
            calls.append((tuple(layers), tokens.heldout.numel()))
            curve = []
            for point in (*measure_at, num_tokens):
                hybrid = hl.restore(student, teacher, layers)
                hl.match(hybrid, teacher, tokens, point, settings=settings)
                figures = hl.evaluate(hybrid, teacher, tokens).metrics()
                curve.append({"tokens": point, "kl": figures["kl"], "recall_exact": None})
            rows.append({"layers": tuple(layers), **{name: figures[name] for name in (
                "kl", "kl_stderr", "perplexity", "top1_agreement", "recall_exact", "recall_stderr")},
                "tokens": num_tokens, "losses": [1.0], "loss_tokens": [num_tokens], "curve": curve[:-1],
                "seconds": 0.0})
        return rows

    return measure


@pytest.fixture
def tiny_study(tiny_teacher, tiny_tokens, tmp_path, monkeypatch):
    teacher = tiny_teacher()
    monkeypatch.setattr(study_module, "load_teacher", lambda *a, **k: hl.Teacher(teacher, None, "tiny", "r1"))
    monkeypatch.setattr(study_module, "load_tokens", lambda *a, **k: tiny_tokens)

    def make(**changes):
        return hl.Study(oracle.OracleSettings(**{**SMALL, "results": str(tmp_path / "results"), **changes}))

    return make


def made_up(values, seed=0, recall=None, curve=(), errors=()):
    """A record that has a KL for each set, and maybe recalls and earlier points {tokens: values}."""
    rows = [{"layers": list(layers), "kl": kl, "kl_stderr": 0.0, "perplexity": 1.0, "top1_agreement": 1.0,
             "recall_exact": recall and recall[layers], "recall_stderr": recall and 0.0, "tokens": 100, "seconds": 1.0,
             "curve": [{"tokens": t, "kl": early[layers], "recall_exact": None} for t, early in curve]
             + [{"tokens": 100, "kl": kl, "recall_exact": None}]} for layers, kl in values.items()]
    for row in rows:
        if tuple(row["layers"]) in errors:
            row |= {"kl": None, "error": "stage 2 met nan"}
    parameters = {"mixer": "gdn", "seed": seed, "num_tokens": 100,
                  "aligned": {"teacher": "t", "num_tokens": 10, "seed": seed, "data": str(seed)}}
    return Record("oracle", parameters, {"sets": rows, "tokens": 100}, seed, {}, "CPU", None,
                  f"2026-01-0{seed + 1}", 1.0, 100, f"{seed:016d}")


def drawn(num_layers, seed, sizes=()):
    generator = np.random.default_rng(seed)
    return {layers: float(generator.random()) for layers in oracle.sets_of_sizes(num_layers, sizes)}


def test_sets_of_sizes_are_all_of_them():
    assert len(oracle.sets_of_sizes(8)) == 2 ** 8
    assert oracle.sets_of_sizes(3, [2, 0]) == [(), (0, 1), (0, 2), (1, 2)]
    with pytest.raises(ValueError, match="^sizes=4 is not a whole number from 0 to 3$"):
        oracle.sets_of_sizes(3, [4])


def test_settings_are_checked_before_any_compute():
    settings = oracle.OracleSettings(sizes=[1, 2], oracle_tokens=1000, oracle_points=[0.25, 1.0])
    assert settings.sizes == (1, 2) and settings.measure_at == (250, 1000)
    for changes, message in (({"sizes": 2}, "^sizes=2 is not a list"), ({"sizes": [-1]}, "^sizes=-1 is not a whole"),
                             ({"selectors": ["best"]}, "^selectors='best' is unknown"),
                             ({"selectors": ["manual"]}, "^selectors='manual' is unknown"),
                             ({"oracle_points": [1.5]}, "^oracle_points=1.5 is not a number"),
                             ({"oracle_tokens": 8}, "^oracle_tokens=8 is not"), ({"piece": 0}, "^piece=0 is not"),
                             ({"oracle_heldout_tokens": 10**9}, "^oracle_heldout_tokens=")):
        with pytest.raises(ValueError, match=message):
            oracle.OracleSettings(**changes)


def test_every_set_is_measured_as_a_single_run_would_measure_it(tiny_study):
    calls, study = [], tiny_study()
    record = oracle.oracle_record(study, 1, tokens=64, measure_at=(32,), heldout_tokens=32, measure=one_by_one(calls))
    assert [tuple(row["layers"]) for row in record.metrics["sets"]] == oracle.sets_of_sizes(3)
    assert {size for _, size in calls} == {32} and record.seed == 1
    hybrid = hl.restore(study.aligned("gdn", 1), study.teacher.model, (0, 2))
    tokens = study.tokens(1, 64)
    hl.match(hybrid, study.teacher.model, tokens, 64, settings=replace(study.match_settings, compile=False))
    kl = heldout_kl(hybrid, study.teacher.model, tokens, heldout_tokens=32)[0]
    assert oracle.values(record)[0, 2] == pytest.approx(kl, rel=1e-5)
    assert set(oracle.values(record, tokens=32)) == set(oracle.sets_of_sizes(3))


def test_a_killed_oracle_goes_on_and_gives_the_same_record(tiny_study, tmp_path):
    whole = oracle.oracle_record(tiny_study(results=str(tmp_path / "other")), 0, tokens=64, piece=3,
                                 measure=one_by_one([]))
    calls = []
    working = one_by_one(calls)

    def dying(student, teacher, tokens, sets, *args, **kwargs):
        if len(calls) >= 6:
            raise KeyboardInterrupt
        return working(student, teacher, tokens, sets, *args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        oracle.oracle_record(tiny_study(), 0, tokens=64, piece=3, measure=dying)
    assert len(calls) == 6 and not tiny_study().ledger.find("oracle")
    record = oracle.oracle_record(tiny_study(), 0, tokens=64, piece=2, measure=working)  # pieces may be cut otherwise
    assert len(calls) == 8 == len(set(calls))
    assert record.metrics["sets"] == whole.metrics["sets"]
    again = oracle.oracle_record(tiny_study(), 0, tokens=64, measure=working)
    assert again == record and len(calls) == 8


def test_more_sizes_add_to_what_was_measured_and_other_measurements_do_not(tiny_study):
    calls = []
    measure = one_by_one(calls)
    oracle.oracle_record(tiny_study(), 0, sizes=[1], tokens=64, measure=measure)
    oracle.oracle_record(tiny_study(), 0, sizes=[0, 1], tokens=64, measure=measure)
    assert [layers for layers, _ in calls] == [(0,), (1,), (2,), ()]
    oracle.oracle_record(tiny_study(), 0, sets=[(2,)], tokens=32, measure=measure)
    oracle.oracle_record(tiny_study(recompute=True), 0, sets=[(2,)], tokens=64, measure=measure)
    assert len(calls) == 6
    with pytest.raises(ValueError, match="^sets is empty"):
        oracle.oracle_record(tiny_study(), 0, sets=[], tokens=64, measure=measure)
    with pytest.raises(ValueError):
        oracle.oracle_record(tiny_study(), 0, sets=[(3,)], tokens=64, measure=measure)


def test_choices_are_those_of_the_study_and_of_searches_over_the_record(tiny_study, monkeypatch):
    study = tiny_study()
    record = oracle.oracle_record(study, 0, tokens=64, measure=one_by_one([]))
    found = oracle.choices(study, ["first", "random", "ga-s2", "oracle-greedy"], record).metrics["choices"]
    by = {(c["selector"], c["size"]): tuple(c["layers"]) for c in found}
    assert len(by) == 8 and by["first", 2] == (0, 1)
    assert by["ga-s2", 1] == tiny_study(budget=1).select("ga-s2") and by["random", 2] == hl.select(
        "random", 2, num_layers=3, seed=0)
    v = oracle.values(record)
    best = min(((l,) for l in range(3)), key=v.get)
    assert by["oracle-greedy", 1] == best
    assert by["oracle-greedy", 2] == min((tuple(sorted({*best, l})) for l in range(3) if l not in best), key=v.get)
    part = oracle.oracle_record(study, 0, sizes=[2], tokens=64, measure=one_by_one([]))

    def beyond_the_teacher(self, selector, *args):
        if selector == "ar-mh":
            raise oracle.TaskTooHard("no recall to lose")
        return select(self, selector, *args)

    select = hl.Study.select
    monkeypatch.setattr(hl.Study, "select", beyond_the_teacher)
    found = oracle.choices(study, ["last", "ar-mh", "oracle-greedy"], part).metrics["choices"]
    assert found == [{"selector": "last", "size": 2, "layers": [1, 2]}]  # the search needs single layers


@pytest.mark.parametrize("metric", oracle.METRICS)
def test_regret_and_rank_are_those_of_sorting_all_sets(metric):
    kls, recalls = [drawn(5, s) for s in (0, 1)], [drawn(5, s) for s in (2, 3)]
    records = [made_up(kl, seed, recall) for seed, (kl, recall) in enumerate(zip(kls, recalls))]
    chosen = [{"seed": seed, "choices": [{"selector": "S", "layers": [3, 1]}]} for seed in (0, 1)]
    judged = oracle.judge(records, chosen)
    for seed in (0, 1):
        table = kls[seed] if metric == "kl" else {s: -v for s, v in recalls[seed].items()}
        order = sorted((s for s in table if len(s) == 2), key=table.get)
        row = next(r for _, r in judged.iterrows() if r["selector"] == "S" and r["seed"] == seed)
        assert row["layers"] == (1, 3) and row["sets"] == 10
        assert row[f"{metric}_rank"] == order.index((1, 3)) + 1
        assert row[f"{metric}_regret"] == pytest.approx(table[1, 3] - table[order[0]])
        other = min((s for s in kls[1 - seed] if len(s) == 2), key=kls[1 - seed].get)
        row = next(r for _, r in judged.iterrows() if r["selector"] == oracle.OTHER_SEEDS and r["seed"] == seed)
        assert row["layers"] == other and row[f"{metric}_regret"] == pytest.approx(table[other] - table[order[0]])
    own = [[v if metric == "kl" else -r for v, r in zip(k.values(), c.values())] for k, c in zip(kls, recalls)]
    pairs = [[v for v, s in zip(o, kls[0]) if len(s) == 2] for o in own]
    assert oracle.any_set(records, 2, metric) == pytest.approx(np.mean([np.mean(p) - min(p) for p in pairs]))


def test_a_set_that_could_not_be_trained_is_left_out_and_counted():
    kl = drawn(4, 0)
    record = made_up(kl, errors=[(1, 2)])
    assert set(kl) - set(oracle.values(record)) == {(1, 2)} and len(oracle.oracle_table([record])) == 15
    assert "1 could not be trained" in oracle_report.about_oracle([record])
    with pytest.raises(ValueError, match="are not in values"):
        oracle.judge([record], [{"seed": 0, "choices": [{"selector": "S", "layers": [1, 2]}]}])


def test_interactions_are_those_of_the_function_that_made_the_values():
    gain, pair = np.array([0.1, 0.4, 0.2, 0.05]), {(0, 2): 0.3, (1, 3): -0.02}
    values = {s: 3 - gain[list(s)].sum() - sum(g for p, g in pair.items() if set(p) <= set(s))
              for s in oracle.sets_of_sizes(4)}
    maps = oracle.interaction_maps([made_up(values), made_up(values, 1)])
    expected = np.zeros((4, 4))
    for (i, j), g in pair.items():
        expected[i, j] = expected[j, i] = g
    off = ~np.eye(4, dtype=bool)
    assert maps.shape == (2, 4, 4) and maps[0][off] == pytest.approx(expected[off])
    text = oracle_report.interaction_words(maps)
    assert "need of one another: layers 0 and 2, 0.3000" in text and "place of one another: layers 1 and 3" in text
    assert "no interaction" in oracle_report.interaction_words(np.full((1, 3, 3), np.nan))


def test_layers_that_add_up_are_predicted_and_those_that_do_not_are_not():
    gain = np.array([0.1, 0.4, 0.25, 0.05, 0.3])
    additive = {s: 2 - gain[list(s)].sum() for s in oracle.sets_of_sizes(5)}
    frame = oracle.additivity([made_up(additive)])
    assert frame["size"].tolist() == [2, 3, 4]
    assert frame[["error", "rmse", "pick_regret"]].abs().to_numpy().max() < 1e-9
    assert frame["spearman"].tolist() == pytest.approx([1, 1, 1])
    assert "explains 99.4% of the" in oracle_report.additive_words(frame.assign(r2=[0.9936, 0.9944, np.nan]))
    assert frame["r2"].dropna().tolist() == pytest.approx([1, 1])  # five sets of four layers say nothing
    # One layer is enough: whatever is added to the first brings nothing.
    saturated = {s: 2 - max((gain[l] for l in s), default=0) for s in oracle.sets_of_sizes(5)}
    frame = oracle.additivity([made_up(saturated)])
    expected = np.mean([gain[list(s)].sum() - max(gain[list(s)]) for s in combinations(range(5), 2)])
    assert frame["error"].iloc[0] == pytest.approx(expected) and frame["r2"].iloc[0] < 1
    assert oracle.additivity([made_up({s: v for s, v in additive.items() if s})]).empty


def test_settling_follows_the_ranking_along_training():
    end = drawn(5, 0)
    early = {s: -v for s, v in end.items()}
    frame = oracle.settling([made_up(end, curve=[(25, early), (50, end)])])
    first, second = (frame[frame["tokens"] == t] for t in (25, 50))
    assert set(frame["size"]) == {1, 2, 3, 4} and set(frame["tokens"]) == {25, 50}
    assert first["spearman_next"].to_numpy() == pytest.approx(-1)
    assert second["spearman_end"].to_numpy() == pytest.approx(1)
    pairs = [v for s, v in end.items() if len(s) == 2]
    assert first[first["size"] == 2]["early_regret"].iloc[0] == pytest.approx(max(pairs) - min(pairs))
    assert second["early_regret"].to_numpy() == pytest.approx(0)
    assert oracle_report.settled_words(frame).count("**settled**") == 4
    flipped = oracle.settling([made_up(end, curve=[(25, end), (50, early)])])
    assert oracle_report.settled_words(flipped).count("**not settled**") == 4
    assert "nothing tells" in oracle_report.settled_words(oracle.settling([made_up(end)]))
    assert "share the best" not in oracle_report.settled_words(frame)


def test_ties_are_counted_where_a_ranking_is_said_to_have_settled():
    end, known = drawn(4, 0), {s: (1.0 if 1 in s else 0.25 * min(s, default=0)) for s in oracle.sets_of_sizes(4)}
    record = made_up(end, recall=known, curve=[(50, end)])
    for row in record.metrics["sets"]:
        row["curve"][0]["recall_exact"] = 1 - row["recall_exact"]
    frame = oracle.settling([record], "recall_exact")
    assert frame[frame["size"] == 2][["tied", "distinct"]].values.tolist() == [[3, 3]]  # of {01, 12, 13} and two others
    alike = oracle.settling([made_up({s: 1.0 for s in end}, curve=[(50, end)])])
    assert oracle_report.settled_words(alike).count("so **nothing can be told**") == 3
    text = oracle_report.settled_words(frame, "recall_exact")
    assert "**2 layers** (6 sets), by recall: " in text and "Of the 6, 3 share the best value, and there are 3" in text
    assert text.count("share the best") == 2 and text.count("**not settled**") == 3  # of one layer, one is best


def test_words_say_no_more_than_the_interval():
    truth = {s: 1.0 + sum(s) for s in oracle.sets_of_sizes(4)}
    noisy = [made_up({s: v + 1e-3 * seed * len(s) for s, v in truth.items()}, seed) for seed in range(3)]
    sets = [{"selector": "ga-s2", "layers": [0, 1]}, {"selector": "bad", "layers": [2, 3]}]
    chosen = [{"seed": seed, "choices": sets} for seed in range(3)]
    text = oracle_report.judged_words(oracle.judge(noisy, chosen), noisy, 2)
    good, bad = (next(line for line in text.splitlines() if f"**{name}**" in line) for name in ("GA-S2", "bad"))
    assert "rank 1 of 6: **the best set in every seed**" in good and "rank 6 of 6: **worse than the best**" in bad
    assert text.index(good) < text.index(bad) and "what noise between seeds costs" in text
    one = oracle_report.judged_words(oracle.judge(noisy[:1], chosen[:1]), noisy[:1], 2)
    assert one.count("one seed cannot tell") == 2 and "between seeds" not in one
    equal = [made_up({s: 1.0 for s in truth}, seed) for seed in range(2)]
    assert "**nothing can be told**" in oracle_report.judged_words(oracle.judge(equal, chosen[:2]), equal, 2)
    assert "No set of 3 layers" in oracle_report.judged_words(oracle.judge(noisy, chosen), noisy, 3)
    assert "correlation of 1.00 to 1.00" in oracle_report.seed_words(noisy)
    assert "One seed" in oracle_report.seed_words(noisy[:1])
    assert oracle_report.seed_words(equal).startswith("No two seeds rank sets of one size by KL, so nothing tells")
    table = oracle_report.judged_table(oracle.judge([made_up(drawn(4, s), s, drawn(4, s)) for s in (0, 1)], chosen), 2)
    assert list(table.index[:2]) == ["GA-S2", "bad"] and "recall_exact_rank" in table


def test_best_sets_are_named_by_size_and_seed():
    records = [made_up(drawn(4, s), s) for s in (0, 1)]
    table = oracle_report.best_sets(oracle.oracle_table(records))
    for size in (1, 2, 3):
        v = [oracle.values(r) for r in records]
        best = min((s for s in v[0] if len(s) == size), key=lambda s: v[0][s] + v[1][s])
        assert table.loc[size, "best set"] == "{" + ", ".join(map(str, best)) + "}" and table.loc[size, "as good"] == 1
    recalls = {s: float(1 in s and 3 in s) for s in oracle.sets_of_sizes(4)}
    table = oracle_report.best_sets(oracle.oracle_table([made_up(drawn(4, 0), 0, recalls)]), "recall_exact")
    assert table["best set"].tolist() == ["{}", "{0}", "{1, 3}", "{0, 1, 3}", "{0, 1, 2, 3}"]
    assert table["as good"].tolist() == [1, 4, 1, 2, 1]


def test_a_ledger_gives_the_fullest_oracle_and_its_choices(tiny_study):
    study = tiny_study()
    assert oracle.recorded_oracle(study.ledger) == ([], [])
    oracle.oracle_record(study, 0, sizes=[1], tokens=32, measure=one_by_one([]))
    both = [oracle.oracle_record(study, seed, sizes=[1, 2], tokens=64, measure=one_by_one([])) for seed in (0, 1)]
    chosen = [oracle.choices(study, ["first"], record) for record in both]
    assert oracle.recorded_oracle(study.ledger) == (both, chosen)
    more = [oracle.choices(study, ["first", "uniform"], record) for record in both]
    for record in both:
        oracle.choices(study, ["last"], record)
    assert oracle.recorded_oracle(study.ledger) == (both, more)
    assert oracle.recorded_oracle(study.ledger, "gla") == ([], [])
    aligned = both[0].parameters["aligned"]
    for other in (aligned, aligned | {"num_tokens": 1}):  # a contest of other students counts for nothing
        study.ledger.run("contest", {"aligned": other}, lambda: {"rows": [
            {"name": name, "seed": seed, "layers": layers} for seed in (1, 2)
            for name, layers in (("first", [0]), ("first", [0, 1, 2]), ("none", []), ("ga-s1", [3]))]})
    assert oracle.recorded_oracle(study.ledger)[1] == more + [
        {"seed": 1, "choices": [{"selector": name, "layers": layers}]}
        for name, layers in (("first", [0, 1, 2]), ("ga-s1", [3]))]
    assert "No oracle" in oracle_report.about_oracle([])
    assert "6 sets of 1 to 2 layers" in oracle_report.about_oracle(both)


def test_figures_show_what_they_are_given():
    recall = {s: len(s) / 4 for s in oracle.sets_of_sizes(4)}
    records = [made_up(drawn(4, s), s, recall, [(50, drawn(4, s + 7))]) for s in (0, 1)]
    judged = oracle.judge(records, [{"seed": s, "choices": [{"selector": "S", "layers": [0]}]} for s in (0, 1)])
    figure = oracle_report.landscape(oracle.oracle_table(records), judged, selectors=["S", "absent"])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["every set", "best set", "S"]
    dashes = figure.axes[0].lines[0].get_ydata()
    assert len(dashes) == 16
    alone = oracle_report.landscape(oracle.oracle_table(records), oracle.judge(records, []), "recall_exact",
                                    selectors=["S"], ylabel="recall")
    assert [t.get_text() for t in alone.legends[0].get_texts()] == ["every set", "best set"]
    assert alone.axes[0].lines[1].get_ydata().tolist() == [0, 0.25, 0.5, 0.75, 1]
    maps = oracle.interaction_maps(records)
    texts = {t.get_text() for t in oracle_report.interaction_map(maps).axes[0].texts}
    assert len(oracle_report.interaction_map(maps).axes[0].texts) == 6
    assert f"{maps.mean(0)[0, 1]:.3f}".replace("-", "\u2212") in texts
    curves = oracle_report.settling_curves(oracle.settling(records))
    assert [t.get_text() for t in curves.legends[0].get_texts()] == ["1 layer", "2 layers", "3 layers"]
    assert curves.axes[0].get_ylabel() == "Spearman with the end, by KL"
    figures, text = oracle_report.settling_report(records)
    assert len(figures) == 1 and text.count("by KL") == 4 and "the ranking by recall" in text
    for broken in (lambda: oracle_report.interaction_map(maps[0]),
                   lambda: oracle_report.settling_curves(pd.DataFrame({"spearman_end": [float("nan")]})),
                   lambda: oracle_report.landscape(oracle.oracle_table(records).assign(kl=None))):
        with pytest.raises(ValueError):
            broken()
