"""The oracle: every set is measured once, a killed run goes on, and what is read from it is what brute force gives."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np
import pytest

import hybridlib as hl
from hybridlib.distill.evaluate import heldout_kl
from hybridlib.records.ledger import Record
from hybridlib.report import tables
from hybridlib.study import oracle

SMALL = dict(budget=0.34, sizes=(), oracle_tokens=64, oracle_points=(), oracle_heldout_tokens=64)


class Calls(list):
    limit = 10**6


@pytest.fixture
def calls(monkeypatch):
    """The sets that were trained and the size of their held-out text; ``calls.limit`` sets at most, then Ctrl-C."""
    calls = Calls()

    def one_by_one(student, teacher, tokens, sets, num_tokens, *, settings, measure_at, **recall):
        rows = []
        if len(calls) >= calls.limit:
            raise KeyboardInterrupt
        for layers in sets:
            calls.append((tuple(layers), tokens.heldout.numel()))
            curve = []
            for point in (*measure_at, num_tokens):
                hybrid = hl.restore(student, teacher, layers)
                hl.match(hybrid, teacher, tokens, point, settings=settings)
                figures = hl.evaluate(hybrid, teacher, tokens).metrics()
                curve.append({"tokens": point, "kl": figures["kl"], "recall_exact": None})
            rows.append({**figures, "layers": tuple(layers), "tokens": num_tokens, "losses": [1.0],
                         "loss_tokens": [num_tokens], "curve": curve[:-1], "seconds": 0.0})
        return rows

    monkeypatch.setattr(oracle, "match_sets", one_by_one)
    return calls


@pytest.fixture
def tiny_study(studies):
    return partial(studies, oracle.OracleSettings, **SMALL)


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
    for name, value in (("sizes", 2), ("oracle_points", [1.5]), ("oracle_tokens", 8), ("piece", 0), ("sizes", [-1]),
                        ("oracle_heldout_tokens", 10**9), ("selectors", ["best"]), ("selectors", ["manual"])):
        shown = value[0] if isinstance(value, list) else value
        with pytest.raises(ValueError, match=f"^{name}={shown!r} is "):
            oracle.OracleSettings(**{name: value})


def test_every_set_is_measured_as_a_single_run_would_measure_it(tiny_study, calls):
    study = tiny_study(oracle_points=(0.5,), oracle_heldout_tokens=32)
    record = oracle.oracle_record(study, 1)
    assert [tuple(row["layers"]) for row in record.metrics["sets"]] == oracle.sets_of_sizes(3)
    assert {size for _, size in calls} == {32} and record.seed == 1
    hybrid = hl.restore(study.aligned("gdn", 1), study.teacher.model, (0, 2))
    tokens = study.tokens(1, 64)
    hl.match(hybrid, study.teacher.model, tokens, 64, settings=replace(study.match_settings, compile=False))
    kl = heldout_kl(hybrid, study.teacher.model, tokens, heldout_tokens=32)[0]
    assert oracle.values(record)[0, 2] == pytest.approx(kl, rel=1e-5)
    assert set(oracle.values(record, tokens=32)) == set(oracle.sets_of_sizes(3))


def test_a_killed_oracle_goes_on_and_gives_the_same_record(tiny_study, tmp_path, calls):
    whole = oracle.oracle_record(tiny_study(results=str(tmp_path / "other"), piece=3), 0)
    calls.clear()
    calls.limit = 6
    with pytest.raises(KeyboardInterrupt):
        oracle.oracle_record(tiny_study(piece=3), 0)
    assert len(calls) == 6 and not tiny_study().ledger.find("oracle")
    calls.limit = 8
    record = oracle.oracle_record(tiny_study(piece=2), 0)  # pieces may be cut otherwise
    assert len(calls) == 8 == len(set(calls)) and record.metrics["sets"] == whole.metrics["sets"]
    assert oracle.oracle_record(tiny_study(), 0) == record and len(calls) == 8


def test_more_sizes_add_to_what_was_measured_and_other_measurements_do_not(tiny_study, calls):
    oracle.oracle_record(tiny_study(sizes=[1]), 0)
    oracle.oracle_record(tiny_study(sizes=[0, 1]), 0)
    assert [layers for layers, _ in calls] == [(0,), (1,), (2,), ()]
    oracle.oracle_record(tiny_study(sizes=[0], oracle_tokens=32), 0)
    oracle.oracle_record(tiny_study(sizes=[0], recompute=True), 0)
    assert len(calls) == 6


def test_choices_are_those_of_the_study_and_of_searches_over_the_record(tiny_study, calls, monkeypatch):
    study, select = tiny_study(), hl.Study.select
    record = oracle.oracle_record(study, 0)
    choices = oracle.choices(study, ["first", "random", "ga-s2", "oracle-greedy"], record).metrics["choices"]
    by = {(c["selector"], c["size"]): tuple(c["layers"]) for c in choices}
    assert len(by) == 8 and by["first", 2] == (0, 1)
    assert by["ga-s2", 1] == tiny_study(budget=1).select("ga-s2") and by["random", 2] == hl.select(
        "random", 2, num_layers=3, seed=0)
    v = oracle.values(record)
    best = min(((l,) for l in range(3)), key=v.get)
    assert by["oracle-greedy", 1] == best
    assert by["oracle-greedy", 2] == min((tuple(sorted({*best, l})) for l in range(3) if l not in best), key=v.get)
    part = oracle.oracle_record(tiny_study(sizes=[2]), 0)

    def beyond_the_teacher(self, selector, *args):
        if selector == "ar-mh":
            raise oracle.TaskTooHard("no recall to lose")
        return select(self, selector, *args)

    monkeypatch.setattr(hl.Study, "select", beyond_the_teacher)
    choices = oracle.choices(study, ["last", "ar-mh", "oracle-greedy"], part).metrics["choices"]
    assert choices == [{"selector": "last", "size": 2, "layers": [1, 2]}]  # the search needs single layers


@pytest.mark.parametrize("metric", oracle.METRICS)
def test_regret_and_rank_are_those_of_sorting_all_sets(metric):
    kls, recalls = [drawn(5, s) for s in (0, 1)], [drawn(5, s) for s in (2, 3)]
    records = [made_up(kl, seed, recall) for seed, (kl, recall) in enumerate(zip(kls, recalls))]
    chosen = [{"seed": seed, "choices": [{"selector": "S", "layers": [3, 1]}]} for seed in (0, 1)]
    judged = oracle.judge(oracle.oracle_table(records), chosen)
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


def test_a_set_that_could_not_be_trained_is_left_out_and_counted():
    kl = drawn(4, 0)
    record = made_up(kl, errors=[(1, 2)])
    assert set(kl) - set(oracle.values(record)) == {(1, 2)} and len(oracle.oracle_table([record])) == 15
    assert tables.settings_table([record])["value"]["sets that could not be trained"] == "1"
    with pytest.raises(ValueError, match=r"^layers=\(1, 2\) were not measured with seed 0"):
        oracle.judge(oracle.oracle_table([record]), [{"seed": 0, "choices": [{"selector": "S", "layers": [1, 2]}]}])


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


def test_layers_that_add_up_are_predicted_and_those_that_do_not_are_not():
    gain = np.array([0.1, 0.4, 0.25, 0.05, 0.3])
    additive = {s: 2 - gain[list(s)].sum() for s in oracle.sets_of_sizes(5)}
    frame = oracle.additivity([made_up(additive)])
    assert frame["size"].tolist() == [2, 3, 4]
    assert frame[["error", "rmse", "pick_regret"]].abs().to_numpy().max() < 1e-9
    assert frame["spearman"].tolist() == pytest.approx([1, 1, 1])
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
    assert oracle.settling([made_up(end)]).empty


def test_ties_are_counted_where_a_ranking_is_followed():
    end, recall = drawn(4, 0), {s: (1.0 if 1 in s else 0.25 * min(s, default=0)) for s in oracle.sets_of_sizes(4)}
    record = made_up(end, recall=recall, curve=[(50, end)])
    for row in record.metrics["sets"]:
        row["curve"][0]["recall_exact"] = 1 - row["recall_exact"]
    frame = oracle.settling([record], "recall_exact")
    assert frame[frame["size"] == 2][["tied", "distinct"]].values.tolist() == [[3, 3]]  # of {01, 12, 13} and two others
    assert frame["spearman_end"].to_numpy() == pytest.approx(-1)
    alike = oracle.settling([made_up({s: 1.0 for s in end}, curve=[(50, end)])])
    assert alike["spearman_end"].isna().all() and alike["tied"].tolist() == alike["sets"].tolist()


def test_a_ledger_gives_the_fullest_oracle_and_its_choices(tiny_study, calls):
    study = tiny_study()
    assert oracle.recorded_oracle(study.ledger) == ([], [])
    oracle.oracle_record(tiny_study(sizes=[1], oracle_tokens=32), 0)
    both = [oracle.oracle_record(tiny_study(sizes=[1, 2]), seed) for seed in (0, 1)]
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
    assert tables.settings_table([]).empty
    assert tables.settings_table(both)["value"][["teacher", "sets distilled", "seeds"]].tolist() == ["tiny", "6", "2"]
