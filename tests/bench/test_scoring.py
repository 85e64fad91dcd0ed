"""The comparison of scoring loops: what is timed gives the same scores, and the words say what the numbers say."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest

import hybridlib as hl
from hybridlib.bench import scoring as scoring_speed
from hybridlib.report import scoring as scoring_report

STOP = hl.EarlyStop(0.25, 128, window=2)


@pytest.fixture(scope="module")
def study(tiny_files, tmp_path_factory):
    return hl.Study(scoring_speed.CostSettings(
        **tiny_files, context=16, align_tokens=256, score_tokens=256, match_tokens=64, batch_tokens=128,
        heldout_tokens=64, seeds=1, device="cpu", results=str(tmp_path_factory.mktemp("speed")), engine_tokens=256,
        engine_heldout_tokens=64, engine_points=2, engine_window=2))


@pytest.fixture(scope="module")
def compared(study):
    return scoring_speed.compare_scoring(study, early_stop=STOP, loops=("together", "plain", "recorded", "engine"))


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
    monkeypatch.setattr(scoring_speed, "score_layers", None)
    monkeypatch.setattr(scoring_speed, "match", None)
    again = scoring_speed.compare_scoring(study, early_stop=STOP, loops=("plain", "engine", "together"))
    assert again["seconds"].tolist() == compared["seconds"].tolist()
    found, = scoring_speed.recorded_scoring_speed(study.ledger)
    assert found["loop"].tolist() == ["plain", "engine", "together"]
    assert scoring_report.engine_words(found) == scoring_report.engine_words(compared)
    assert scoring_speed.compare_engines(study)["seconds"].tolist() == compared["seconds"].tolist()[:2]


def test_the_engine_is_timed_with_its_records_on_disk(study, compared, monkeypatch):
    real, kept = scoring_speed.score_layers, []

    def scored(*args, records, checkpoints, **options):
        found = real(*args, records=records, checkpoints=checkpoints, **options)
        ledger = records.study.ledger
        assert checkpoints.parent == ledger.folder and ledger.folder.parent == study.ledger.folder
        kept.extend(ledger.find("candidate"))
        return found

    monkeypatch.setattr(scoring_speed, "score_layers", scored)
    few = dataclasses.replace(study.settings, engine_loops=["engine"], engine_stop_heldout_tokens=16)
    found = scoring_speed.compare_engines(hl.Study(few))
    assert found["reason"].isna().all() and found["early_stop"][0]["heldout_tokens"] == 16
    assert [(p.get("until"), p.get("measured_tokens")) for p in (r.parameters for r in kept)] == (
        [(128, 16)] * 3 + [(None, None)] * 3)
    assert found["history"][0][-1] == [-r.metrics["kl"] for r in kept[3:]]


def test_a_loop_that_fails_is_named_and_costs_no_other(study, compared, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(scoring_speed, "score_layers", fails)
    found = scoring_speed.compare_scoring(study, early_stop=STOP, loops=("plain", "shared"))
    assert found["reason"].isna().tolist() == [True, False]
    table = scoring_report.engine_table(found)
    assert table["seconds"].iloc[1] == "could not run: RuntimeError: no memory left"
    assert "were not both run" in scoring_report.engine_words(found)


def test_two_workers_give_the_scores_of_one_process(study, compared):
    found = scoring_speed.compare_scoring(study, early_stop=STOP, loops=("plain", "shared", "engine", "workers"),
                                          workers=2).set_index("loop")
    assert list(found.index) == ["plain", "engine", "shared", "workers"] and found["reason"].isna().all()
    assert found.loc["workers", "values"] == pytest.approx(found.loc["shared", "values"], abs=1e-6)
    assert found.loc["workers", "seconds"] > 0 < found.loc["workers", "start_seconds"]
    record, = study.ledger.find("scoring_speed", loop="workers")
    assert record.parameters["workers"] == 2 and record.metrics["tokens"] == 3 * 256
    found.at["workers", "values"] = list(found.loc["shared", "values"])
    text = scoring_report.engine_words(found.reset_index())
    assert "By 2 workers, " in text and "in one process" in text and ", with the same scores to the last bit." in text
    found.at["workers", "values"] = [value + 1e-3 for value in found.loc["shared", "values"]]
    line = scoring_report.worker_words([found.reset_index(), found.drop("workers").reset_index()])
    assert line.startswith(f"- **{study.teacher.name}**, 256 tokens a candidate, each worker on a GPU of its own, ")
    assert line.endswith("; scores differ by at most 0.001 nats, Jaccard of the best layers 1.00 at 12.5%, "
                         "1.00 at 25%, 1.00 at 50%, Spearman 1.000.")
    assert ": by 2 workers, " in line and "\n" not in line
    assert "by workers" not in text.partition("The aim of")[2]  # what several processes save is not the engine's


def test_workers_that_cannot_start_are_named(study, compared, monkeypatch):
    with pytest.raises(ValueError, match="workers=0 is one process a GPU"):
        scoring_speed.compare_scoring(study, early_stop=STOP, loops=("workers",))
    inputs = study.scoring_inputs("gdn", 0, study.tokens(0, 256, "score"))
    monkeypatch.setattr(study, "scoring_inputs", lambda *_: dataclasses.replace(inputs, student_sha256="0"))
    found = scoring_speed.compare_scoring(study, early_stop=STOP, loops=("workers",), workers=1, direction="remove")
    assert "a worker did not come up: ValueError" in found["reason"][0] and "holds other weights" in found["reason"][0]


def frame(values, seconds, tokens=(8000, 2000), reached=500):
    common = {"aligned": {"teacher": "lab"}, "device": "a GPU", "num_tokens": 1000, "heldout_tokens": 64, "group": 1,
              "reason": None, "peak_bytes": None, "settings": {"mixer_learning_rate": 1e-3}}
    plain = common | {"loop": "plain", "early_stop": None, "seconds": 60.0, "tokens": tokens[0],
                      "values": [8, 7, 6, 5, 4, 3, 2, 1], "history_tokens": [1000]}
    return pd.DataFrame([plain, common | {"loop": "engine", "seconds": seconds, "tokens": tokens[1], "values": values,
                                          "history_tokens": [250, reached], "early_stop": {"budget": 0.25}}])


@pytest.mark.parametrize(("values", "seconds", "met", "said"), [
    ([9, 7, 6, 5, 4, 3, 2, 1], 10.0, True, ("**6.00 times**", "25% of the tokens", "1.00 at 12.5%", "500 tokens")),
    ([9, 7, 6, 5, 4, 3, 2, 1], 20.0, False, ("**3.00 times**", "20.0 s")),
    ([7, 8, 6, 5, 4, 3, 2, 1], 10.0, False, ("0.00 at 12.5%", "1.00 at 25%", "Spearman 0.976")),
    ([8, 5, 6, 7, 4, 3, 2, 1], 10.0, False, ("1.00 at 12.5%", "0.33 at 25%", "1.00 at 50%"))])
def test_the_aim_is_met_by_both_time_and_sets(values, seconds, met, said):
    text = scoring_report.engine_words(frame(values, seconds))
    assert ("is **met** here" in text) == met and all(part in text for part in said)
    assert "1,000 tokens of stage 2 for each candidate, mixers at a rate of 0.001, measured on 64: the engine" in text
    table = scoring_report.engine_table(frame(values, seconds))
    assert table["times as fast"].tolist() == ["1.00", f"{60 / seconds:.2f}"]


def test_the_aim_may_be_met_by_a_part_of_the_engine():
    both = frame([8, 7, 6, 4, 5, 3, 2, 1], 10.0)
    slow = both.iloc[1].to_dict() | {"loop": "shared", "seconds": 30.0, "values": [8, 7, 6, 5, 4, 3, 2, 1]}
    text = scoring_report.engine_words(pd.DataFrame([*both.to_dict("records"), slow]))
    assert "is **not met** here" in text and "early stopping looks at the best 25% alone" in text
    assert "Teacher's states shared: 2.00 times as fast, Spearman 1.000" in text
    text = scoring_report.engine_words(pd.DataFrame([*both.to_dict("records"), slow | {"seconds": 12.0}]))
    assert text.endswith("at every budget is **met** here by: teacher's states shared.")
    values = both["values"].tolist()
    both["history"] = [[values[0]], [values[1]] * 3]
    both["history_tokens"] = [[1000], [125, 250, 500]]
    recorded = slow | {"loop": "recorded", "tokens": 8000}
    text = scoring_report.engine_words(pd.DataFrame([*both.to_dict("records"), recorded]))
    assert ("For as many tokens the recorded steps alone take 7.5 s; the rest goes into 3 measurements of every "
            "candidate in place of one, and into changing candidates.") in text
    both["early_stop"] = [None, {"budget": 0.25, "heldout_tokens": 16}]
    text = scoring_report.engine_words(pd.DataFrame([*both.to_dict("records"), recorded]))
    assert "in place of one (all but the last on 16 held-out tokens), and" in text


def test_loops_of_two_runs_are_said_to_be():
    both = frame([9, 7, 6, 5, 4, 3, 2, 1], 10.0)
    plain = both.iloc[0].to_dict()
    alone, many = plain | {"loop": "shared", "seconds": 30.0}, plain | {"loop": "workers", "seconds": 20.0,
                                                                      "start_seconds": 1.0, "workers": 2}
    rows = [*both.to_dict("records"), alone, many]
    assert "two runs" not in scoring_report.engine_words(pd.DataFrame(rows))  # just run, no commit beside
    text = scoring_report.engine_words(pd.DataFrame([row | {"commit": "a" * 40} for row in rows]))
    assert "two runs" not in text and "in one process, 1.50 times as fast" in text
    rows = [row | {"commit": commit * 40} for row, commit in zip(rows, "abac", strict=True)]
    text = scoring_report.engine_words(pd.DataFrame(rows))
    assert "loop's 60.0 s (of two runs, at commits `bbbbbbb` and `aaaaaaa`), **6.00 times**" in text
    assert "in one process (of two runs, at commits `ccccccc` and `aaaaaaa`), 1.50 times as fast" in text
    assert "Teacher's states shared: 2.00 times" in text and text.count("two runs") == 2


@pytest.mark.parametrize(("points", "tokens", "said"), [
    ([100, 200, 300], 2400, "settled at 20%, which 2 measurements in a row showed at 30%; 70% of the tokens are saved, "
                            "**as reported**. Jaccard of the best layers with the plain loop's: 0.33."),
    ([200, 600], 4800, "40% of the tokens are saved, **less than reported**"),
    ([100, 200], 1600, "80% of the tokens are saved, **more than reported**"),
    ([500, 1000], 8000, "did not settle, and nothing is saved")])
def test_early_stopping_is_set_beside_what_was_reported_of_it(points, tokens, said):
    found = frame([8, 5, 7, 6, 4, 3, 2, 1], 10.0, (8000, tokens))
    found["history_tokens"] = [[1000], points]
    found["early_stop"] = [None, {"budget": 0.25, "window": 2}]
    lines = scoring_report.early_stop_words([found, found[:1]]).splitlines()
    assert len(lines) == 2 and "25 to 40% of training, which saves 58 to 74% of the tokens" in lines[0]
    assert said in lines[1] and lines[1].startswith("- **lab**, 1,000 tokens a candidate: ")


def test_how_far_two_loops_repeat_one_another_is_said_beside_every_score(tmp_path):
    ledger, plain = hl.Ledger(tmp_path), [5.0, 4, 3, 2, 1, 0]
    metrics = {"reason": None, "seconds": 1.0, "tokens": 6, "history_tokens": [1]}
    for rate, again in ((1e-3, [0.0, 1, 2, 3, 4, 5]), (1e-4, [5.0, 4, 3, 2, 0, 1])):
        common = {"aligned": {"teacher": "lab"}, "mixer": "gdn", "seed": 0, "direction": "add", "num_tokens": 1000,
                  "heldout_tokens": 64, "settings": {"mixer_learning_rate": rate}, "device": "a GPU"}
        for loop, values in (("plain", plain), ("recorded", again)):
            ledger.add("scoring_speed", common | {"loop": loop}, metrics | {"values": values}, seconds=1.0)
    pairs = scoring_speed.repeat_pairs(ledger, {"PPL": (1.0, 2, 3, 4, 5, 6)}, "lab")
    assert pairs == {"GA-S2 with itself: 1,000 tokens, mixers at 1e-3": (plain, [0, 1, 2, 3, 4, 5]),
                     "GA-S2 with itself: 1,000 tokens, mixers at 1e-4": (plain, [5, 4, 3, 2, 0, 1]),
                     "PPL with the steadier GA-S2 (1,000 tokens, mixers at 1e-4)": ((1, 2, 3, 4, 5, 6), plain)}
    assert "the contest's GA-S2 with the steadier GA-S2 (1,000 tokens, mixers at 1e-4)" in scoring_speed.repeat_pairs(
        ledger, {"GA-S2": (1.0, 2, 3, 4, 5, 6)}, "lab")
    assert scoring_speed.repeat_pairs(ledger, {}, "another") == {}


def test_a_scoring_that_went_on_to_the_end_is_said_to_have(study):
    assert "did not stop early" in scoring_report.engine_words(frame(range(8, 0, -1), 9.0, (8000, 8000), 1000))
    assert scoring_report.engine_words(pd.DataFrame()) == "The comparison of scoring loops was left out."
    nothing = hl.Study(dataclasses.replace(study.settings, engine_loops=[]))
    assert scoring_speed.compare_engines(nothing).empty


@pytest.mark.parametrize(("change", "message"), [
    ({"engine_loops": ["fast"]}, "engine_loops='fast'"), ({"engine_loops": "plain"}, "is not a list"),
    ({"engine_tokens": 8}, "engine_tokens=8"), ({"engine_heldout_tokens": 128}, "engine_heldout_tokens=128"),
    ({"engine_points": 17}, "engine_points=17"), ({"engine_window": 1}, "engine_window=1"),
    ({"engine_stop_heldout_tokens": 65}, "engine_stop_heldout_tokens=65"), ({"engine_group": -1}, "engine_group=-1")])
def test_bad_settings_are_refused(study, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(study.settings, **change)
