"""The tests of hypotheses: closed forms, known truths, worked examples, and a ledger from end to end."""

import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from hybridlib.records.ledger import Ledger
from hybridlib.report import hypotheses as tests
from hybridlib.report.hypotheses import (dunnett_table, equivalence, equivalence_table, hypotheses_table,
                                         variance_table)
from hybridlib.selection.rules import select
from hybridlib.study.catalogue import score_parameters
from hybridlib.study.evidence import Evidence
from hybridlib.study.recorded import NotRecorded, RecordedStudy, recall_tasks, recorded_arms
from hybridlib.study.selector import full_parameters
from hybridlib.study.settings import StudySettings


def frame(layers=None, mixer="gdn", main=True, **values):
    """A row an arm and seed, ``frame(a=[kl of seed 0, ...])``; None is no run. The composite is 1 less ten times KL."""
    rows = [{"arm": arm.replace("_", "-"), "seed": seed, "layers": (layers or {}).get(arm, (arm, seed)), "kl": kl,
             "recall_composite": 1 - 10 * kl, "main": main, "end": True, "mixer": mixer, "budget": 2,
             "match_tokens": 100} for arm, kls in values.items() for seed, kl in enumerate(kls) if kl is not None]
    return pd.DataFrame(rows)


def paired_t(x, y, level=0.95):
    d = np.subtract(x, y)
    error = d.std(ddof=1) / np.sqrt(len(d))
    half = stats.t.ppf((1 + level) / 2, len(d) - 1) * error
    return d.mean(), d.mean() - half, d.mean() + half, 2 * stats.t.sf(abs(d.mean()) / error, len(d) - 1), error


A, B = [0.100, 0.212, 0.330], [0.139, 0.256, 0.361]  # seeds differ more than arms do
FLAT = [0.10, 0.12, 0.11], [0.16, 0.13, 0.15]  # no variance between seeds beyond that within


@pytest.mark.parametrize("a, b, method", [(A, B, "mixed model"), (*FLAT, "paired t"), (A[:2], B[:2], "paired t")])
def test_a_difference_with_the_same_seeds_is_the_paired_t_test(a, b, method):
    own = tests.difference(frame(a=a, b=b), "kl", "a", "b")
    effect, low, high, p, _ = paired_t(a, b)
    assert own["method"] == method and own["seeds"] == len(a) and own["df"] == len(a) - 1
    assert [own[name] for name in ("effect", "low", "high", "p")] == pytest.approx([effect, low, high, p], rel=2e-3)


def test_a_mixed_model_takes_in_the_seeds_of_one_arm_alone():
    rng = np.random.default_rng(0)
    a, seeds = rng.normal(0, 0.001, 12), rng.normal(0, 0.01, 12)
    b = 0.02 + rng.normal(0, 0.001, 12)
    own = tests.difference(frame(a=a + seeds, b=[*(b + seeds)[:6]]), "kl", "a", "b")
    assert own["method"] == "mixed model" and (own["seeds"], own["df"]) == (6, 5)
    assert own["low"] < -0.02 < own["high"] and own["effect"] == pytest.approx(np.mean(a[:6] - b[:6]), abs=5e-4)


@pytest.mark.parametrize("a, b, fields, p", [
    ([0.3], [0.1], {"effect": pytest.approx(0.2), "seeds": 1}, np.nan),
    ([0.3, 0.2], [0.3, 0.2], {"effect": 0, "seeds": 2}, 1),
    ([0.3, 0.2, 0.1], [0.2, 0.1, 0.0], {"effect": pytest.approx(0.1)}, np.nan),  # the same step on every seed
    ([0.3, None], [None, 0.1], {"seeds": 0}, np.nan)])
def test_a_difference_claims_nothing_where_there_is_no_spread(a, b, fields, p):
    own = tests.difference(frame(a=a, b=b), "kl", "a", "b")
    assert {name: own[name] for name in fields} == fields
    assert own["p"] == p or np.isnan(p) and np.isnan(own["p"])
    assert np.isnan(own["low"])


@pytest.mark.parametrize("shift, equal", [(0.001, True), (0.0045, False), (-0.02, False)])
def test_two_one_sided_tests_are_those_of_the_closed_form(shift, equal):
    b = np.array([0.12, 0.13, 0.15, 0.11])
    a = b + shift + np.array([0.0005, -0.0005, 0.001, -0.001])
    own = equivalence(frame(a=a, b=b), "kl", "a", "b", 0.005)
    effect, low, high, _, error = paired_t(a, b, 0.9)
    assert own["p"] == pytest.approx(max(stats.t.sf((effect + 0.005) / error, 3), stats.t.cdf((effect - 0.005) / error,
                                                                                             3)))
    assert (own["low"], own["high"]) == pytest.approx((low, high))
    assert (own["p"] < 0.05) == equal == (-0.005 < low and high < 0.005)
    assert equivalence(frame(a=b, b=b), "kl", "a", "b", 0.005)["p"] == 0
    with pytest.raises(ValueError, match="margin=0"):
        equivalence(frame(a=a, b=b), "kl", "a", "b", 0)


def test_two_rows_of_an_arm_and_seed_are_refused():
    with pytest.raises(ValueError, match="arm 'a' and seed 0"):
        tests.difference(pd.concat([frame(a=A, b=B)] * 2), "kl", "a", "b")


def test_holm_corrects_over_six_tests_also_where_some_are_not_on_record(monkeypatch):
    ps = iter([0.01, 0.04, 0.03, 0.005])
    base = {"low": np.nan, "high": np.nan, "seeds": 3, "method": "", "missing": []}
    monkeypatch.setattr(tests, "difference", lambda *a: base | {"effect": -0.1, "p": next(ps)})
    table = hypotheses_table(pd.concat([frame(ga_s2=A), frame(mixer="gla", main=False, ga_s2=A)]))
    # 0.005 x 6, 0.01 x 5, 0.03 x 4, and 0.04 x 3 no less than that
    assert table["p_holm"][:4].tolist() == pytest.approx([0.05, 0.12, 0.12, 0.03]) and table["p_holm"][4:].isna().all()
    assert table["outcome"].tolist() == ["not told apart", "not told apart", "not told apart", "worse",
                                         *["not on record: ga-s2 by gdn"] * 2]


def test_noise_of_training_and_of_selection_are_told_apart():
    rng = np.random.default_rng(1)
    training, selection, count = 0.001, 0.01, 150
    rows = [frame(layers={"other": (i,)}, other=rng.normal(0.2, training, 3)).assign(arm="") for i in range(count)]
    chosen = 0.1 + rng.normal(0, selection, count // 2)
    same = chosen.repeat(2) + rng.normal(0, training, 2 * len(chosen))  # every set by two seeds, as AR's would be
    rows.append(frame(ga_s2=same).assign(layers=[("own", i // 2) for i in range(len(same))]))
    rows.append(frame(layers={"uniform": ("even",)}, uniform=[0.2, 0.201, 0.199]))
    rows.append(frame(gr_s2=0.1 + rng.normal(0, training, 5)))  # five sets that are as good
    table = variance_table(pd.concat(rows), ("ga-s2", "gr-s2", "uniform", "avg")).query("measure == 'kl'")
    table = table.set_index(table["arm"].where(table["component"] == "selection", "training"))
    assert table["df"]["training"] == 2 * count + len(chosen) + 2 and table["df"]["ga-s2"] == len(chosen) - 1
    assert table["variance"]["training"] == pytest.approx(training ** 2, rel=0.15)
    assert table["low"]["training"] < training ** 2 < table["high"]["training"]
    assert table["sd"]["ga-s2"] == pytest.approx(selection, rel=0.15)
    assert table["low"]["ga-s2"] < selection ** 2 < table["high"]["ga-s2"]
    assert table["outcome"].to_dict() == {
        "training": "estimated", "ga-s2": "above training", "gr-s2": "not told apart from training",
        "uniform": "one set on every seed", "avg": "not on record: avg"}


def test_components_of_variance_are_those_of_the_hand_worked_analysis():
    sets = {(1,): [1.0, 3.0], (2,): [6.0, 8.0], (3,): [4.0]}  # means 2, 7, 4; 4 within, 22 / 5 ... between
    values = [v for own in sets.values() for v in own]
    runs = frame(ga_s2=values).assign(layers=[layers for layers, own in sets.items() for _ in own])
    training, selection = (variance_table(runs, ("ga-s2",)).query("measure == 'kl'").iloc[i] for i in (0, 1))
    between = 2 * (2 - 4.4) ** 2 + 2 * (7 - 4.4) ** 2 + (4 - 4.4) ** 2
    size = (5 - (4 + 4 + 1) / 5) / 2
    assert (training["variance"], training["df"]) == (pytest.approx(4 / 2), 2)
    assert (selection["variance"], selection["df"]) == (pytest.approx((between / 2 - 2) / size), 2)
    assert selection["p"] == pytest.approx(stats.f.sf(between / 2 / 2, 2, 2))
    lone = variance_table(frame(ga_s2=[1.0, 2.0]), ("ga-s2",))
    assert set(lone["outcome"]) == {"not on record: a set that several seeds trained"}


def test_dunnetts_test_is_that_of_scipys_worked_example():
    runs = frame(ga_s2=[7.40, 8.50, 7.20, 8.24, 9.84, 8.32], avg=[9.76, 8.80, 7.68, 9.36],
                 ar=[12.80, 9.68, 12.16, 9.20, 10.55], random=[9.0])
    table = dunnett_table(runs, ("avg", "ar", "random", "ga-s1")).query("measure == 'kl'").set_index("a")
    assert table["p"][["avg", "ar"]].tolist() == pytest.approx([0.62004941, 0.0059035], abs=1e-3)
    assert table["effect"]["ar"] == pytest.approx(2.628, abs=1e-3) and table["low"]["ar"] > 0 > table["low"]["avg"]
    assert table["outcome"].to_dict() == {
        "avg": "not told apart", "ar": "worse", "random": "one seed cannot tell; not on record: seeds 1, 2 of random",
        "ga-s1": "not on record: ga-s1"}
    assert dunnett_table(runs)["a"].unique().tolist() == ["avg", "ga-s1", "ar", "gate-gradient", "learned-gates",
                                                          "random", "race"]


def test_equality_is_said_only_where_the_tests_say_it():
    runs = frame(ga_s2=[0.1, 0.2, 0.3, 0.1, 0.2], avg=[0.1005, 0.2, 0.2995], ar=[0.11, 0.2, 0.28], random=[0.1])
    table = equivalence_table(runs, ("ga-s2", "avg", "ar", "random")).query("measure == 'kl'").set_index("a")
    assert table["outcome"].to_dict() == {"avg": "equal", "ar": "not shown to be equal",
                                          "random": "one seed cannot tell; not on record: seeds 1, 2 of random"}


LAYERS, SETS = 8, {("gdn", "add"): (0, 2), ("gdn", "remove"): (6, 7), ("gla", "add"): (0, 3)}


@pytest.fixture
def ledger(tmp_path):
    """Records of a regime, of scores of three seeds, of the teacher, and of hybrids of GA-S2, GR-S2 and uniform."""
    for name in ("cloze", "fields"):
        (tmp_path / f"{name}.parquet").write_bytes(name.encode())
    settings = StudySettings(teacher="t", corpus="c", context=16, batch_tokens=16, align_tokens=160, score_tokens=64,
                             match_tokens=320, heldout_tokens=64, budget=2, recall_pairs=4, written=True, device="cpu",
                             reading=[str(tmp_path / "cloze.parquet"), str(tmp_path / "fields.parquet")])
    ledger = Ledger(tmp_path / "records", device="cpu", commit="none")
    for mixer in ("gdn", "gla"):
        for seed in range(3):
            ledger.add("align", {"teacher": "t", "revision": "r", "mixer": mixer, "seed": seed, "corpus": "c",
                                 "data": f"order {seed}", "context": 16, "num_tokens": 160,
                                 "settings": settings.align_settings.numbers()}, {"heldout_error": [0.5] * LAYERS},
                       seconds=1)
    ledger.study = RecordedStudy(settings, ledger)

    def hybrid(study, layers, seed, kl, recall=0.5, **figures):
        shares = {"recall_exact": 0.9, "recall_written": recall} if study.settings.written else {"recall_exact": 0.9}
        reading = {"cloze": {"teacher_forced": 0.9, "written": recall + 0.2}, "fields": {"teacher_forced": 0.9,
                                                                                        "written": 0.1}}
        ledger.add("hybrid", study.hybrid_parameters(layers, None, seed), {
            "kl": kl, "tokens": study.settings.match_tokens, **shares,
            **({"reading": reading} if study.settings.reading else {}), **figures}, seconds=1)

    ledger.hybrid = hybrid
    plan = Evidence(ledger.study.under(written=False, reading=()))
    for regime in plan._regimes():
        s = regime.settings
        best = s.grouping == "attention" and s.attention_learning_rate == 3e-4
        for study in (regime, regime.under(match_tokens=160)):
            for layers in (select("uniform", 2, num_layers=LAYERS), ()):
                hybrid(study, layers, 0, 0.2 if best else 0.3)
    study = ledger.study.regime()
    for seed in range(3):
        for (mixer, direction), best in SETS.items():
            own = full_parameters(score_parameters(study.settings, direction, "kl"), study.settings,
                                  study.aligned_parameters(mixer, seed))
            values = [float(l in best or (l == 1 and seed == 2)) for l in range(LAYERS)]  # the third seed differs
            ledger.add("score", own, {"direction": direction, "metric": "kl", "values": values, "measured": values,
                                      "stderr": values, "tokens": 64, "seconds": 1.0}, seconds=1)
    return ledger


KL = {"ga-s2": [0.100, 0.110, 0.125], "gr-s2": [0.120, 0.131, 0.144], "uniform": [0.190, 0.201, 0.213]}


def fill(ledger):
    study = ledger.study.regime()
    for name, values in KL.items():
        for seed, kl in enumerate(values):
            curve = [{"tokens": 64, "kl": 2 * kl}]
            ledger.hybrid(study, study.select(name, seed=seed), seed, kl, recall=1 - 2 * kl, curve=curve)
    half = study.under(match_tokens=160, mixer="gla")
    for seed in range(3):
        for i, probe in enumerate(("gdn", "gla")):
            ledger.hybrid(half, half.select("ga-s2", probe, seed), seed, 0.2 + 0.0001 * (seed - 1) * i)
    own = {"teacher": "t", "revision": "r", "corpus": "c", "context": 16, "heldout_tokens": 64}
    ledger.add("teacher", own | study._judging(), {"recall_exact": 1.0, "recall_written": 0.9, "reading": {
        "cloze": {"teacher_forced": 0.9, "written": 0.8}, "fields": {"teacher_forced": 0.9, "written": 0.29}}},
        seconds=1)
    for fewer in (study.under(reading=()), study.under(written=False, reading=())):  # as asked before
        ledger.add("teacher", own | fewer._judging(), {"recall_exact": 0.1}, seconds=1)
    return RecordedStudy(ledger.study.settings, ledger)


def test_arms_are_found_by_the_scores_on_record(ledger):
    study = fill(ledger)
    runs = recorded_arms(study)
    main = runs[runs["main"]].set_index(["arm", "seed"])
    assert main["layers"]["ga-s2"].tolist() == [(0, 2), (0, 2), (0, 1)] and main["layers"]["uniform"].tolist() == [
        (2, 6)] * 3 and set(KL) < set(main.index.get_level_values(0))  # seed 2: (0, 1) is GLA's choice as well
    assert main["kl"]["gr-s2"].tolist() == KL["gr-s2"]
    assert runs[~runs["end"]].groupby("arm")["kl"].first()["ga-s2"] == 0.2
    gla = runs[runs["mixer"] == "gla"]
    assert gla[gla["arm"] == "ga-s2 by gdn"]["layers"].tolist() == [(0, 2), (0, 2), (0, 1)]
    assert gla[gla["arm"] == "ga-s2"]["layers"].tolist() == [(0, 3), (0, 3), (0, 1)]
    assert set(runs[(runs["match_tokens"] == 48) & (runs["budget"] == 2)]["arm"]) == {"uniform"}  # of the best regime
    tasks = recall_tasks(study).set_index("task")["outcome"]
    assert tasks.to_dict() == {"phone book": "judging", "cloze": "judging", "fields": "left out: below 0.3"}
    assert main["recall_composite"]["ga-s2"].tolist() == pytest.approx([1 - 2 * kl + 0.1 for kl in KL["ga-s2"]])
    forced = recorded_arms(study, mode="teacher_forced").query("main")["recall_composite"]
    assert set(forced.round(9)) == {0.9}


def test_a_ledger_decides_the_hypotheses(ledger):
    table = hypotheses_table(recorded_arms(fill(ledger))).set_index(["hypothesis", "measure"])
    first = "better; not on record: seeds 3, 4 of ga-s2"
    assert table["outcome"].tolist()[:4] == [first, first, *[f"{first}, seeds 3, 4 of gr-s2"] * 2]
    assert table["effect"]["H1", "kl"] == pytest.approx(np.mean(np.subtract(KL["ga-s2"], KL["uniform"])), abs=1e-4)
    assert table["p"]["H2", "kl"] == pytest.approx(paired_t(KL["ga-s2"], KL["gr-s2"])[3], rel=0.02)
    assert table["tokens"].tolist() == [320] * 4 + [160] * 2 and table["seeds"].tolist() == [3] * 6
    assert table["outcome"]["H3", "kl"] == "equal" and table["p_holm"]["H3", "kl"] < 0.001
    assert table["outcome"]["H3", "recall_composite"] == "equal on every seed"


def test_what_is_not_on_record_is_said_and_nothing_fails(ledger):
    with pytest.raises(NotRecorded, match="hybrid-"):
        ledger.study.hybrid((0, 1))
    study = RecordedStudy(ledger.study.settings, ledger)
    runs = recorded_arms(study)
    assert not runs["main"].any() and set(recall_tasks(study)["outcome"]) == {"not on record: teacher"}
    for table in (hypotheses_table, equivalence_table, dunnett_table, variance_table):
        assert table(runs)["outcome"].str.startswith("not on record: ").all()
    chosen = ledger.study.regime()
    for seed in range(2):
        for name in ("ga-s2", "uniform"):
            ledger.hybrid(chosen, chosen.select(name, seed=seed), seed, 0.1 + 0.01 * seed)
    rest = hypotheses_table(recorded_arms(RecordedStudy(study.settings, ledger)))
    assert rest["outcome"].tolist() == [
        "equal on every seed; not on record: seeds 2, 3, 4 of ga-s2, seed 2 of uniform",
        "not on record: recall composite of ga-s2, recall composite of uniform",
        "not on record: seeds 2, 3, 4 of ga-s2, gr-s2", "not on record: recall composite of ga-s2, gr-s2",
        *["not on record: ga-s2 by gdn, ga-s2"] * 2]
    assert set(recorded_arms(study, arms=())["arm"]) == {""}
    with pytest.raises(ValueError, match="no aligned student"):
        RecordedStudy(StudySettings(), ledger)


def test_the_page_of_hypotheses_is_filled_in_from_the_records(ledger, tmp_path):
    page = runpy.run_path(str(Path(__file__).parents[2] / "book" / "generate.py"))["hypotheses"]
    settings = vars(fill(ledger).settings)
    (path := ledger.folder.with_suffix(".yaml")).write_text(yaml.safe_dump(settings | {
        "reading": [*settings["reading"]], "results": str(ledger.folder)}))
    text = page(path)
    effect = np.mean(np.subtract(KL["ga-s2"], KL["uniform"]))
    assert f"| H1 | held-out KL (nats a token) | ga-s2 | uniform | \u2212{-effect:.4f} [" in text
    assert "| fields | 0.29 | left out: below 0.3 |" in text
    assert "nan" not in text and "None" not in text and text.count("### ") == 5
    (path := tmp_path / "none.yaml").write_text(yaml.safe_dump(settings | {"reading": []}))
    assert page(path).startswith("There are no records of ") and "no aligned student" in page(path)
