"""The comparison of scoring loops: what is timed gives the same scores."""

import dataclasses
from types import SimpleNamespace

import pytest

import hybridlib as hl
from hybridlib.bench import scoring
from hybridlib.selection.engine import workers


@pytest.fixture(scope="module")
def study(tiny_files, tmp_path_factory):
    return hl.Study(scoring.CostSettings(
        **tiny_files, context=16, align_tokens=256, score_tokens=256, match_tokens=64, batch_tokens=128,
        heldout_tokens=64, seeds=1, device="cpu", results=str(tmp_path_factory.mktemp("speed")), engine_tokens=256,
        engine_heldout_tokens=64, engine_points=2, engine_window=2))


def compare(study, *loops, workers=0, **changes):
    return scoring.compare_engines(
        hl.Study(dataclasses.replace(study.settings, engine_loops=list(loops), **changes)), workers=workers)


@pytest.fixture(scope="module")
def compared(study):
    return compare(study, "together", "plain", "recorded", "engine")


def test_every_loop_gives_the_same_scores_and_is_a_record(study, compared, monkeypatch):
    rows = compared.set_index("loop")
    assert list(rows.index) == ["plain", "engine", "together"]  # nothing is recorded on a CPU
    assert rows["reason"].isna().all() and (rows["seconds"] > 0).all()
    expected = study.scores("gdn", 0)
    for loop in rows.index:
        assert rows.loc[loop, "values"] == pytest.approx(expected.values, abs=1e-5)  # two rounds: none can end early
        assert rows.loc[loop, "tokens"] == 3 * 256
    assert rows.loc["plain", "values"] == list(expected.values)
    assert list(rows["group"]) == [1, 1, 3] and list(rows.loc["engine", "history_tokens"]) == [128, 256]
    assert len(study.ledger.find("scoring_speed")) == 3
    assert len(study.ledger.find("candidate")) == 3  # those of the study's own scoring alone
    assert [p.name for p in study.ledger.folder.iterdir() if p.is_dir()] == ["models"]
    monkeypatch.setattr(scoring, "score_layers", None)
    monkeypatch.setattr(scoring, "match", None)
    again = compare(study, "plain", "engine", "together")
    assert again["seconds"].tolist() == compared["seconds"].tolist()
    recorded, = scoring.recorded_scoring_speed(study.ledger)
    assert recorded["loop"].tolist() == ["plain", "engine", "together"]
    assert recorded["seconds"].tolist() == compared["seconds"].tolist() and recorded["commit"].nunique() <= 1


def test_the_engine_is_timed_with_its_records_on_disk(study, compared, monkeypatch):
    score, candidates = scoring.score_layers, []

    def scored(*args, engine, **options):
        scores = score(*args, engine=engine, **options)
        ledger = engine.records.study.ledger
        assert engine.checkpoints.parent == ledger.folder and ledger.folder.parent == study.ledger.folder
        candidates.extend(ledger.find("candidate"))
        return scores

    monkeypatch.setattr(scoring, "score_layers", scored)
    rows = compare(study, "engine", engine_stop_heldout_tokens=16)
    assert rows["reason"].isna().all() and rows["early_stop"][0]["heldout_tokens"] == 16
    assert [(p.get("until"), p.get("measured_tokens")) for p in (r.parameters for r in candidates)] == (
        [(128, 16)] * 3 + [(None, None)] * 3)
    assert rows["history"][0][-1] == [-r.metrics["kl"] for r in candidates[3:]]


@pytest.fixture
def quick_workers(processes, monkeypatch):
    """Workers are forks of a process that has imported hybridlib, where they would import it themselves."""
    monkeypatch.setattr(workers, "multiprocessing", SimpleNamespace(get_context=lambda method: processes))


def test_two_workers_give_the_scores_of_one_process(study, compared, quick_workers):
    rows = compare(study, "plain", "shared", "engine", "workers", workers=2).set_index("loop")
    assert list(rows.index) == ["plain", "engine", "shared", "workers"] and rows["reason"].isna().all()
    assert rows.loc["workers", "values"] == pytest.approx(rows.loc["shared", "values"], abs=1e-6)
    assert rows.loc["workers", "seconds"] > 0 < rows.loc["workers", "start_seconds"]
    record, = study.ledger.find("scoring_speed", loop="workers")
    assert record.parameters["workers"] == 2 and record.metrics["tokens"] == 3 * 256
    assert compare(study).empty  # of no loops


def test_workers_that_cannot_start_are_named(study, compared, monkeypatch, quick_workers):
    with pytest.raises(ValueError, match="workers=0 is one process a GPU"):
        compare(study, "workers")
    inputs = study.scoring_inputs("gdn", 0, study.tokens(0, 256, "score"))
    monkeypatch.setattr(hl.Study, "scoring_inputs", lambda *_: dataclasses.replace(inputs, student_sha256="0"))
    reason, = compare(study, "workers", workers=1)["reason"]
    assert "a worker did not come up: ValueError" in reason and "holds other weights" in reason


def test_how_far_two_loops_repeat_one_another_is_said_beside_every_score(tmp_path):
    ledger, plain = hl.Ledger(tmp_path), [5.0, 4, 3, 2, 1, 0]
    metrics = {"reason": None, "seconds": 1.0, "tokens": 6, "history_tokens": [1]}
    for rate, again in ((1e-3, [0.0, 1, 2, 3, 4, 5]), (1e-4, [5.0, 4, 3, 2, 0, 1])):
        common = {"aligned": {"teacher": "lab"}, "mixer": "gdn", "seed": 0, "direction": "add", "num_tokens": 1000,
                  "heldout_tokens": 64, "settings": {"attention_learning_rate": rate}, "device": "a GPU"}
        for loop, values in (("plain", plain), ("recorded", again)):
            ledger.add("scoring_speed", common | {"loop": loop}, metrics | {"values": values}, seconds=1.0)
    pairs = scoring.repeat_pairs(ledger, {"PPL": (1.0, 2, 3, 4, 5, 6)}, "lab")
    assert pairs == {"GA-S2 with itself: 1,000 tokens, mixers at 1e-3": (plain, [0, 1, 2, 3, 4, 5]),
                     "GA-S2 with itself: 1,000 tokens, mixers at 1e-4": (plain, [5, 4, 3, 2, 0, 1]),
                     "PPL with the steadier GA-S2 (1,000 tokens, mixers at 1e-4)": ((1, 2, 3, 4, 5, 6), plain)}
    assert "the contest's GA-S2 with the steadier GA-S2 (1,000 tokens, mixers at 1e-4)" in scoring.repeat_pairs(
        ledger, {"GA-S2": (1.0, 2, 3, 4, 5, 6)}, "lab")
    assert scoring.repeat_pairs(ledger, {}, "another") == {}


@pytest.mark.parametrize(("change", "message"), [
    ({"engine_loops": ["fast"]}, "engine_loops='fast'"), ({"engine_loops": "plain"}, "is not a list"),
    ({"engine_tokens": 8}, "engine_tokens=8"), ({"engine_heldout_tokens": 128}, "engine_heldout_tokens=128"),
    ({"engine_points": 17}, "engine_points=17"), ({"engine_window": 1}, "engine_window=1"),
    ({"engine_stop_heldout_tokens": 65}, "engine_stop_heldout_tokens=65"), ({"engine_group": -1}, "engine_group=-1")])
def test_bad_settings_are_refused(study, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(study.settings, **change)
