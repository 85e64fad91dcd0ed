"""The study's pieces: what they are made of, and what records decide."""

from __future__ import annotations

from itertools import combinations

import pytest
import yaml
from tests.conftest import profile_path

import hybridlib as hl
from hybridlib.study import evidence
from hybridlib.study.evidence import Evidence, balanced_sets
from hybridlib.study.pieces import work


@pytest.fixture
def study(smoke_profile, tmp_path):
    changes = {"results": str(tmp_path), "context": 64, "match_tokens": 1024, "corpus_tokens": 2048, "test_tokens": 512,
               "recall_prompts": 10, "budget": 2}
    return hl.Study(hl.StudySettings(**smoke_profile | changes))


def write(study, layers, kl, seed=0, measure_at=()):
    study.ledger.add("hybrid", study.hybrid_parameters(layers, None, seed, measure_at), {"kl": kl}, seconds=1)


def test_the_regime_is_the_best_of_the_two_best(study):
    plan = Evidence(study)
    uniform = hl.select("uniform", 2, num_layers=8)
    assert plan.chosen() is None and {piece.name.split(", seed")[0] for piece in plan.pieces()} == {"align gdn", *(
        f"gdn, {grouping} at {rate:g}" for grouping in ("attention", "mixers") for rate in evidence.RATES)}
    for i, regime in enumerate(plan._regimes()):  # the third and the last are the best of the first round
        for layers in (uniform, ()):
            write(regime, layers, {2: 0.1, 5: 0.2}.get(i, 0.3 + i))
    assert plan.chosen() is None
    third, last = plan._regimes()[2], plan._regimes()[5]
    for regime, kl in ((third, 0.2), (last, 0.1)):
        for layers in (uniform, ()):
            write(regime.under(match_tokens=512), layers, kl)
    chosen = plan.chosen().settings
    assert (chosen.attention_learning_rate, chosen.grouping) == (1e-3, "mixers")
    assert chosen.match_tokens == study.settings.match_tokens
    assert len({piece.name for piece in plan.pieces() if "main: (" in piece.name}) == 2 * 3


def test_every_piece_of_scores_leaves_the_records_that_say_it_is_done(studies, monkeypatch):
    monkeypatch.setattr(evidence, "SEEDS", 1)
    monkeypatch.setattr(evidence, "SCORERS", ("ga-s1", "gate-gradient", "smart", "ppl"))
    study = studies(score_tokens=256, budget=1)
    plan = Evidence(study)
    seconds = work(lambda: plan.scores(study, 0), 5, study.ledger.folder / "models" / "locks")
    assert len(seconds) == 1 + 6 + 5 and all(piece.done() for piece in plan.scores(study, 0))
    candidate = study.ledger.find("candidate", layer=2, direction="add")[0].metrics
    assert [point["tokens"] for point in candidate["curve"]] == [0, 64, 64, 128] and candidate["tokens"] == 256
    untrained = hl.restore(study.aligned("gdn", 0), study.teacher.model, (2,))
    rows = study.tokens(0, 256, "score")
    assert candidate["curve"][0]["kl"] == pytest.approx(hl.evaluate(untrained, study.teacher.model, rows).kl, rel=1e-4)
    assert study.scores("gdn", 0).measured[2] == candidate["kl"]
    assert {len(layers) for name in ("ga-s2", "ppl") for layers in (plan._layers(study, name, 0),)} == {1}
    assert plan._layers(study, "learned-gates", 0) is None and plan._layers(study, "ga-s2", 1) is None


@pytest.mark.parametrize(("notebook", "changes"), [("importance_scoring", {}), ("oracle", {"seeds": 1})])
def test_the_command_line_reads_either_settings_and_does_what_time_allows(tmp_path, monkeypatch, notebook, changes):
    named = yaml.safe_load(profile_path(notebook, "smoke").read_text(encoding="utf-8"))
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(named | changes), encoding="utf-8")
    seen = []
    monkeypatch.setattr(evidence, "work", lambda pieces, minutes, *a, **k: seen.append((list(pieces()), minutes)))
    evidence.main([str(tmp_path / "settings.yaml"), "--minutes", "3", "--results", str(tmp_path / "records")])
    (pieces, minutes), = seen
    names = {piece.name for piece in pieces}
    assert minutes == 3 and not any(piece.done() for piece in pieces)
    assert names == {"lab: oracle, seed 0", "lab: contest"} if "sizes" in named else "align gdn, seed 0" in names


def test_a_file_to_read_that_is_not_there_is_refused_at_once(study):
    with pytest.raises(ValueError, match="reading names 'nowhere.parquet'"):
        Evidence(study.under(reading=("nowhere.parquet",)))


def test_balanced_sets_hold_each_layer_alike_and_pairs_nearly():
    sets = balanced_sets(30, 8, 32)
    uses = [sum(l in s for s in sets) for l in range(30)]
    assert len(set(sets)) == 32 and {len(s) for s in sets} == {8} and set(uses) <= {8, 9}
    pairs = [sum({l, m} <= set(s) for s in sets) for l, m in combinations(range(30), 2)]
    assert max(pairs) <= 4  # 2.06 on average
    assert sorted(balanced_sets(5, 2, 10)) == sorted(combinations(range(5), 2))
    assert balanced_sets(30, 8, 32, seed=1) != sets
    with pytest.raises(ValueError, match="count=11"):
        balanced_sets(5, 2, 11)
