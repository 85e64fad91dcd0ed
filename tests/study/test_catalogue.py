"""Every selector through a study: a set of the budget's size, remembered, costed; searches against plain loops."""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial
from itertools import combinations

import pytest
import torch
from tests.conftest import CONTEST_SETTINGS

import hybridlib as hl
from hybridlib.distill.corpus import recall_tokens
from hybridlib.distill.recall import JUDGING_FAMILIES, TRAINING_FAMILIES
from hybridlib.selection.cost import Cost, one_run_a_layer_flops
from hybridlib.selection.engine.candidates import distilled_kl
from hybridlib.selection.rules import RULES
from hybridlib.selection.scorers import ablation
from hybridlib.selection.scorers.gates import gate_gradient_flops
from hybridlib.selection.scorers.postnas import search_once_for_all
from hybridlib.study import catalogue, study as study_module
from hybridlib.study.selector import scorer

LAYERS, KEPT = 4, 2
SMALL = CONTEST_SETTINGS | dict(score_tokens=128, seeds=1, match_learning_rate=1e-3, attention_learning_rate=1e-2)
TEXT = {"learned-gates": {"data": "text"},  # options that ask for no prompts
        "race": {"proposers": ("gate-gradient", "uniform")}}
NEED_TEXT = ("ar", "ar-mh", "ar-sum", "halo")  # prompts for a teacher that has a tokenizer and recalls


@pytest.fixture(scope="module")
def make(tiny_teacher, tiny_tokens, tmp_path_factory):
    """make(**changes): a study of a tiny teacher; all share their records."""
    teacher, folder = tiny_teacher(layers=LAYERS), tmp_path_factory.mktemp("results")
    tiny = hl.Teacher(teacher, None, "tiny", "r1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_module, "load_teacher",
                      lambda name, **k: tiny if name == "tiny" else hl.load_teacher(name, **k))
        patch.setattr(study_module, "load_tokens",
                      lambda name, *a, **k: tiny_tokens if name == "pattern" else hl.load_tokens(name, *a, **k))
        yield lambda **changes: hl.Study(hl.StudySettings(**SMALL | {"results": str(folder)} | changes))


@pytest.fixture(scope="module")
def lab_study(smoke_profile, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("lab"))
    return lambda **changes: hl.Study(hl.StudySettings(**smoke_profile | {"results": folder} | changes))


@pytest.fixture(scope="module")
def measured(make):
    """{layers: KL} of every set, by a plain loop over `distilled_kl`."""
    measure = plain_kl(make())
    return {layers: measure(layers) for size in range(LAYERS + 1) for layers in combinations(range(LAYERS), size)}


def plain_kl(study, tokens=None, **changes):
    return distilled_kl(study.aligned("gdn", 0), study.teacher.model, tokens or study.tokens(0, 128, "score"),
                        num_tokens=128, settings=dataclasses.replace(study.match_settings, **changes))


def check(study, found, kept):
    assert len(found.layers) == kept and list(found.layers) == sorted(set(found.layers))
    assert set(found.layers) <= set(range(study.num_layers))
    assert found.values is None or len(found.values) == study.num_layers
    needs = hl.SELECTORS[found.selector].needs
    assert (found.cost.training_tokens > 0) == (needs == "stage 2" or "gate" in found.selector)
    assert (found.cost.forward_tokens > 0) == (found.cost.flops > 0) == (needs != "nothing")
    assert needs == "nothing" or (found.cost.passes > 0 and found.cost.seconds > 0 and found.cost.device)


@pytest.mark.parametrize("name", [name for name in hl.SELECTORS if name not in NEED_TEXT])
def test_a_selector_gives_a_set_of_the_budgets_size_with_its_cost_and_is_remembered(make, name):
    study = make()
    found = study.selection(name, **TEXT.get(name, {}))
    check(study, found, KEPT)
    before = {r.key: r.started for r in study.ledger}
    again = make()
    assert again.selection(name, **TEXT.get(name, {})) == found  # its seconds, too: it was read
    assert {r.key: r.started for r in again.ledger} == before
    needs = hl.SELECTORS[name].needs
    assert needs == "nothing" or {r.kind for r in study.ledger} >= {"score"}


@pytest.mark.parametrize("name", [name for name in NEED_TEXT if name != "ar-sum"])
def test_a_selector_by_recall_takes_the_prompts_of_a_study(lab_study, name):
    study = lab_study()
    found = study.selection(name, num_examples=24)
    check(study, found, 2)
    assert lab_study().selection(name, num_examples=24) == found
    if name == "ar-mh":  # the lab teacher is at chance in multi_hop
        assert found.cost.passes == 9 and found.note == "scores of the task variable_tracking, 8 pairs"
    else:
        assert found.note == f"scores of the task needle, {study.settings.recall_pairs} pairs"


def test_no_selector_chooses_by_a_family_on_which_hybrids_are_judged(lab_study):
    def texts(value):
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return {value} if isinstance(value, str) else set().union(*map(texts, parts))

    study = lab_study()
    assert study.recall_task.name in JUDGING_FAMILIES and not set(JUDGING_FAMILIES) & set(TRAINING_FAMILIES)
    used = {name: texts(one.records(study.settings, 8, 0)) for name, one in hl.SELECTORS.items()}
    for name, own in used.items():
        assert not own & set(JUDGING_FAMILIES), name
    assert "needle" in used["ar"] & used["halo"] and "lookup_sum" in used["ar-sum"]


def test_gates_learn_from_prompts_of_families_that_do_not_judge(lab_study, monkeypatch):
    study, seen = lab_study(), {}
    for name in ("learned_gates", "gate_gradient"):
        real = getattr(catalogue, name)
        monkeypatch.setattr(catalogue, name, lambda student, teacher, tokens, *a, name=name, real=real, **k:
                            real(student, teacher, seen.setdefault(name, tokens), *a, **k))
    found = {name: study.selection(name, data="recall", **options)
             for name, options in (("learned-gates", {"num_tokens": 512}), ("gate-gradient", {"share": None}))}
    context, heldout = study.settings.context, study.settings.heldout_tokens
    rows = recall_tokens(study.teacher.tokenizer, context, 512, seed=0)
    assert seen["learned_gates"].fingerprint == rows.fingerprint
    rows = recall_tokens(study.teacher.tokenizer, context, heldout, seed=0)
    assert torch.equal(seen["gate_gradient"].heldout, rows.train)
    for name in found:
        own = study.ledger.find("score", selector=name)[0].parameters
        assert own["families"] == list(TRAINING_FAMILIES) and own["recall_tokens"] in (512, heldout)
        assert found[name].cost.training_tokens == own["recall_tokens"]
        text, = hl.SELECTORS[name].records(study.settings, 8, 0, data="text")
        assert not {"families", "recall_tokens", "data"} & set(text)  # as records have been
    with pytest.raises(ValueError, match="^tokenizer=None is no tokenizer"):
        recall_tokens(None, 64, 512)


def test_the_record_of_postnas_names_what_its_search_is_given(make):
    study, given = make(), inspect.signature(search_once_for_all).parameters.keys() - {"student", "teacher", "tokens"}
    changed = [study.selection("postnas", **options) for options in ({}, {"width": 1}, {"num_tokens": 64})]
    records = study.ledger.find("score", selector="postnas", seed=0)
    assert len(records) >= len(changed) and all(given <= r.parameters.keys() for r in records)
    before = hl.Ledger(hl.results_folder("h100")).find("score", selector="postnas")
    assert {frozenset(r.parameters) for r in (*records, *before)} == {frozenset(records[0].parameters)} and before


def test_sums_are_beyond_the_lab_teacher(lab_study):
    with pytest.raises(ablation.TaskTooHard, match="'lookup_sum', pairs=3.* 0.3 or less tells nothing"):
        lab_study().select("ar-sum", num_examples=8)
    tasks = [own["task"] for own in hl.SELECTORS["ar-sum"].records(hl.StudySettings(recall_pairs=16), 8, 0)]
    assert [(task["pairs"], task["digits"]) for task in tasks] == [(16, 1), (8, 1), (4, 1)]


def test_recall_over_two_hops_takes_fewer_pairs_before_it_gives_up(lab_study, smoke_teacher, monkeypatch):
    tasks, easy, short_study = [], set(), partial(lab_study, teacher=smoke_teacher)

    def refuse(task, *rest):
        tasks.append((task.name, task.pairs))
        if tasks[-1] not in easy:
            raise ablation.TaskTooHard(f"{task.name} is beyond it")
    monkeypatch.setattr(ablation, "_refuse_chance", refuse)
    with pytest.raises(ablation.TaskTooHard, match="^variable_tracking is beyond it"):
        short_study().select("ar-mh", num_examples=8)
    assert tasks == [(name, pairs) for pairs in (8, 4, 2) for name in ("multi_hop", "variable_tracking")]
    for count, name, pairs in ((9, "multi_hop", 2), (10, "variable_tracking", 4), (11, "multi_hop", 8)):
        easy.add((name, pairs))
        assert short_study().selection("ar-mh", num_examples=count).note == f"scores of the task {name}, {pairs} pairs"
        task, = [r.parameters["task"] for r in short_study().ledger.find("score", selector="ar", num_examples=count)]
        assert (task["name"], task["pairs"]) == (name, pairs)


def test_the_gate_gradient_costs_at_most_its_share_of_ga_s2(make, tiny_tokens):
    size = tiny_tokens.train.numel()  # no row twice, so that the teacher reads every row for the first time
    study = make(score_tokens=size, heldout_tokens=128)
    whole = study.selection("ga-s2").cost
    student, teacher = study.aligned("gdn", 0), study.teacher.model
    held = len(study.tokens(0, size, "score").heldout) * 16
    assert one_run_a_layer_flops(student, teacher, size, held, 16) == pytest.approx(whole.flops)
    row = 16 * gate_gradient_flops(student, teacher, 16)
    cheap = study.selection("gate-gradient", share=3.5 * row / whole.flops).cost
    assert cheap.flops == pytest.approx(3 * row) and cheap.training_tokens == 3 * 16 < held
    assert study.selection("gate-gradient", share=None).cost.training_tokens == held
    turns = study.selection("gate-gradient-turns", train=128 / size, share=None).cost
    assert turns.training_tokens == 128 + held
    training = 128 * gate_gradient_flops(student, teacher, 16, frozen=False)
    assert turns.flops == pytest.approx(training + held / 16 * row)
    fewer = study.selection("gate-gradient-turns", train=128 / size, share=(turns.flops - 0.5 * row) / whole.flops).cost
    assert fewer.training_tokens == 128 + held - 16


def test_ga_s2_again_trains_on_the_next_rows(make, tiny_tokens):
    study = make()
    rest = hl.Tokens(tiny_tokens.train[128 // 16:], study.tokens(0, 256, "score").heldout)
    measure = plain_kl(study, rest)
    assert study.selection("ga-s2-again").values == pytest.approx([-measure((l,)) for l in range(LAYERS)], rel=1e-5)
    with pytest.raises(ValueError, match="'ga-s2-again' needs twice score_tokens"):
        make(score_tokens=10**6).select("ga-s2-again")


def test_ga_s2_slow_trains_mixers_at_a_share_of_the_rate(make):
    study = make()
    measure = plain_kl(study, attention_learning_rate=study.settings.attention_learning_rate / 4)
    slow = study.selection("ga-s2-slow", rate=0.25)
    assert slow.values == pytest.approx([-measure((l,)) for l in range(LAYERS)], rel=1e-5)
    assert slow.values != study.selection("ga-s2").values


def test_smart_places_layers_by_untrained_candidates(make):
    study = make()
    untrained = hl.score_layers(study.aligned("gdn", 0), study.teacher.model, study.tokens(0, 128, "score"),
                                num_tokens=0)
    found = study.selection("smart")
    assert found.values == pytest.approx(untrained.values) and found.cost.training_tokens == 0
    assert found.layers == hl.select("smart", KEPT, scores=untrained)
    trained = study.selection("smart", num_tokens=128)
    assert trained.values == pytest.approx(study.selection("ga-s2").values, rel=1e-5) != found.values


def test_gates_in_turn_are_trained_at_a_share_of_the_mixers_rate(make):
    study = make()
    full, slow = (study.selection(name) for name in ("gate-gradient-turns", "gate-gradient-turns-slow"))
    assert full.values != slow.values and full.cost.training_tokens == slow.cost.training_tokens
    again = study.selection("gate-gradient-turns", rate=0.1)
    assert (again.values, again.cost) == (slow.values, slow.cost)  # of one record


def test_the_names_are_those_of_the_rules_and_each_is_described():
    assert set(RULES) - {"manual"} <= set(hl.SELECTORS)
    for name, one in hl.SELECTORS.items():
        assert one.title and one.source and one.assumes and one.cost, name
        assert one.needs in ("nothing", "teacher", "student", "stage 2"), name
    assert len({one.title for one in hl.SELECTORS.values()}) == len(hl.SELECTORS)


def test_a_selector_is_added_in_one_place(make):
    calls = []

    @scorer("even", "even layers", "a test", "teacher", "even layers matter", "nothing", options={"sign": 1},
            record=lambda settings, num_layers, seed, sign: {"selector": "even", "sign": sign}, note="sign {sign}")
    def even(study, mixer, seed, own):
        calls.append(own)
        values = tuple(own["sign"] * float(l % 2 == 0) for l in range(study.num_layers))
        return hl.LayerScores("remove", "even", values, values, values, 0, 0.0, Cost())

    try:
        assert make().select("even") == make().select("even", "gla", 1) == (0, 2)
        odd = make().selection("even", sign=-1)
        assert (odd.layers, odd.values, odd.note) == ((1, 3), (-1.0, 0.0, -1.0, 0.0), "sign -1")
        assert [own["sign"] for own in calls] == [1, -1]
        assert make().ledger.find("score", selector="even", sign=-1, teacher="tiny", heldout_tokens=64)
    finally:
        del hl.SELECTORS["even"]


def test_searches_find_what_plain_loops_find(make, measured):
    def best(sets):
        return min(sets, key=lambda layers: (measured[layers], layers))

    study, pairs = make(), list(combinations(range(LAYERS), KEPT))
    first = best([(l,) for l in range(LAYERS)])
    assert study.select("greedy-forward") == best([p for p in pairs if set(first) <= set(p)])
    three = best(list(combinations(range(LAYERS), 3)))
    assert study.select("greedy-backward") == best([p for p in pairs if set(p) <= set(three)])
    assert study.select("exhaustive") == best(pairs) == study.select("beam", width=LAYERS)
    assert study.select("ga-s2") == tuple(sorted(sorted(range(LAYERS), key=lambda l: measured[l,])[:KEPT]))


def test_a_race_is_among_what_is_proposed_and_near_it_and_its_tokens_are_all_that_it_costs(make):
    study, names = make(), ["gate-gradient", "uniform", "ga-s1"]
    found = study.selection("race", proposers=names, num_tokens=1500)
    record, = study.ledger.find("score", selector="race", num_tokens=1500)
    proposed = [study.selection(name) for name in names]
    assert [p["layers"] for p in record.metrics["proposals"]] == [list(p.layers) for p in proposed]
    rounds, spent = record.metrics["rounds"], [0]
    spent += [r["tokens"] for r in rounds]
    assert [len(r["sets"]) for r in rounds] == [6, 3, 2]  # there are 6 sets of 2 of 4 layers
    trained = sum(len(r["sets"]) * (until - since) for r, since, until in zip(rounds, spent, spent[1:]))
    asked = sum(p.cost.training_tokens for p in proposed)
    assert found.cost.training_tokens == record.tokens == trained + asked <= 1500
    assert found.layers == tuple(min(rounds[-1]["sets"], key=lambda row: row["kl"])["layers"])
    short = study.selection("race", proposers=["uniform"], sets=2)  # one proposal and no scores: nothing to race
    assert short.layers == study.select("uniform") and short.cost == Cost()


def test_costs_are_those_of_a_selector_alone_though_records_are_shared(make):
    study, heldout = make(), 64
    gradient, trained = study.selection("gate-gradient", share=None).cost, LAYERS * 128
    assert (gradient.forward_tokens, gradient.training_tokens, gradient.passes) == (heldout, heldout, 2)
    assert study.selection("gate-gradient-2").cost.training_tokens == (1 + 2 * LAYERS) * heldout
    assert study.selection("gate-gradient-path").cost.training_tokens == 8 * heldout
    assert study.selection("ppl").cost.forward_tokens == (LAYERS + 1) * heldout
    assert study.selection("ga-s1").cost.forward_tokens == heldout
    assert study.selection("learned-gates", data="text").cost.training_tokens == trained
    ga, gr, avg = (study.selection(name).cost for name in ("ga-s2", "gr-s2", "avg"))
    assert ga.training_tokens == gr.training_tokens == trained and avg == ga + gr and gr.flops != ga.flops
    every = study.selection("exhaustive")
    sets = [r for r in study.ledger.find("candidate", num_tokens=128) if len(r.parameters.get("layers", ())) == KEPT]
    assert len(sets) == 6 and every.cost.training_tokens == 6 * 128 and every.cost.forward_tokens == 6 * (128 + 2 * 64)
    assert every.cost.seconds == pytest.approx(sum(r.metrics["cost"]["seconds"] for r in sets))
    for name, sets in (("greedy-forward", KEPT * (2 * LAYERS - KEPT + 1) // 2),
                       ("greedy-backward", (LAYERS - KEPT) * (LAYERS + KEPT + 1) // 2)):
        assert study.selection(name).cost.training_tokens == sets * 128


def test_a_scores_record_is_keyed_by_what_it_depends_on(make):
    study = make()
    perplexity, gate = study.selection("ppl"), study.selection("gate-gradient")
    assert study.selection("ppl", "gla", 1) == perplexity  # the teacher's own
    assert study.selection("gate-gradient", "gla").values != gate.values
    assert study.selection("gate-gradient", seed=1).values != gate.values
    assert study.selection("gate-gradient", at=1.0, order=2).values != gate.values
    gates = study.selection("learned-gates", data="text").values
    assert make(budget=1).selection("learned-gates", data="text").values != gates
    assert make(budget=1).selection("gate-gradient").values == gate.values
    assert len(study.ledger.find("score", selector="ppl")) == 1


def test_rules_take_their_options(make):
    study = make()
    assert study.select("uniform") == (1, 3) and study.select("uniform", offset="start") == (0, 3)
    assert study.select("first") == (0, 1) and study.select("last") == (2, 3)
    assert len({study.select("random", seed=seed) for seed in range(20)}) > 2
    spaced = study.select("ga-s2-spaced", penalty=2.0)
    assert spaced[1] - spaced[0] > 1 and study.select("ga-s2-spaced", penalty=0.0) == study.select("ga-s2")
    assert study.selection("ga-s1", normalize=False).values != study.selection("ga-s1").values


@pytest.mark.parametrize(("name", "options", "message"), [
    ("ga-s3", {}, r"^selector='ga-s3' is unknown; did you mean 'ga-s2'\?$"),
    ("wisdom", {}, "^selector='wisdom' is unknown; choose among uniform, random, first"),
    (3, {}, "^selector=3 is unknown"), ("manual", {}, "^selector='manual' is unknown"),
    ("uniform", {"width": 2}, "^width=2 is no option of selector 'uniform'; its options: offset$"),
    ("first", {"width": 2}, "^width=2 is no option of selector 'first'; its options: none$"),
    ("gate-gradient", {"share": 0}, "^share=0"), ("gate-gradient", {"train": 2}, "^train=2"),
    ("learned-gates", {"data": "prose"}, "^data='prose' is unknown"),
    ("gate-gradient-turns", {"rate": 0}, "^rate=0"), ("ga-s2-slow", {"rate": 0}, "^rate=0"),
    ("race", {"sets": 1}, "^sets=1"), ("race", {"num_tokens": -1}, "^num_tokens=-1"),
    ("race", {"proposers": "uniform"}, "^proposers='uniform' is not a list of names"),
    ("race", {"proposers": ["race"]}, "^proposers='race' is unknown")])
def test_bad_input_is_refused_in_a_sentence(make, name, options, message):
    with pytest.raises(ValueError, match=message):
        make().select(name, **options)


def test_exhaustive_refuses_more_sets_than_it_can_measure(make, monkeypatch):
    monkeypatch.setattr("hybridlib.study.catalogue.MOST_SETS", 5)
    with pytest.raises(ValueError, match="^selector='exhaustive' would distil 6 sets of 2 of 4 layers; it takes at"):
        make(score_tokens=48).select("exhaustive")  # of which there is no record
