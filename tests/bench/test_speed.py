"""The speed study: settings, parts, records found again."""

import pytest

import hybridlib as hl
from hybridlib.bench import operators, speed, timing
from hybridlib.bench.step import LOOPS


@pytest.mark.parametrize("name, value, sentence", [
    ("backends", ["cuda"], "backends='cuda' is unknown"), ("shapes", 3, "shapes=3 is not a list"),
    ("shapes", [[1, 0, 3, 4]], r"shape=\[1, 0, 3, 4\] is"),
    ("contexts", [0], "contexts=0 is not"), ("shares", [1.5], "shares=1.5 is not a number"),
    ("stages", ["score"], "stages='score' is unknown"), ("exactness_cases", ["wild"], "exactness_cases='wild' is"),
    ("exactness_dtypes", ["auto"], "exactness_dtypes='auto' is"), ("objectives", ["theirs"], "objectives='theirs' is"),
    ("objective_shapes", [[1, 2]], r"shape=\[1, 2\] is not \(tokens, width, vocab"), ("budget", 0, "budget=0 is not a"),
    *[(name, low - 1, f"{name}={low - 1} is not a whole number of at least {low}") for name, low in (
        ("repeats", 1), ("steps", 1), ("decode_batch", 1), ("new_tokens", 2), ("batch_tokens", 256))],
    ("step_align_tokens", True, "step_align_tokens=True is not a"), ("max_seconds", 0, "max_seconds=0 is not"),
    ("recompute", "yes", "recompute='yes' is neither"),
    *[(name, "softmax", f"{name}='softmax' is unknown") for name in ("dtype", "mixer")],
    ("plain_backend", "flash_qla", "plain_backend='flash_qla' is unknown")])
def test_bad_settings_are_refused(name, value, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        speed.SpeedSettings(**{name: value})


def test_parts_left_out_are_empty(tmp_path):
    settings = speed.SpeedSettings(shapes=[], exactness_cases=[], objective_shapes=[], stages=[], contexts=[],
                                   results=str(tmp_path), device="cpu")
    study = speed.SpeedStudy(settings)
    parts = study.operators, study.exactness, study.objectives, study.steps, study.decoding
    assert all(part().empty for part in parts) and not list(tmp_path.iterdir())
    assert set(speed.recorded_speed(study.bench.ledger)) == set(speed.KINDS)
    assert all(frame.empty for frame in speed.recorded_speed(study.bench.ledger).values())


def test_a_study_measures_each_backend_and_implementation_and_finds_its_records_again(tmp_path):
    settings = speed.SpeedSettings(backends=["chunked", "fla", "softmax"], exactness_cases=["beta 1", "length 1"],
                                   exactness_dtypes=["float32"], objectives=["hybridlib", "plain"], repeats=3,
                                   objective_shapes=[[6, 4, 9], [8, 4, 9]], shapes=[[1, 8, 2, 4]],
                                   results=str(tmp_path), device="cpu")
    study = speed.SpeedStudy(settings)
    timed, exact, objectives = study.operators(), study.exactness(), study.objectives()
    assert list(zip(timed["operator"], timed["backend"], timed["direction"])) == [
        (operator, backend, direction) for operator, backend in (
            ("gated_delta_rule", "chunked"), ("gated_linear_attention", "chunked"), ("gated_delta_rule", "fla"),
            ("gated_linear_attention", "fla"), ("softmax_attention", "softmax"))
        for direction in operators.DIRECTIONS]
    assert timed["reason"].notna().tolist() == (timed["backend"] == "fla").tolist()  # it cannot run on a CPU
    assert [(row["backend"], list(row["errors"])) for _, row in exact.iterrows()] == [
        ("chunked", ["beta 1", "length 1"]), ("chunked", ["length 1"])]  # fla is not compared in float32
    assert list(zip(objectives["tokens"], objectives["implementation"], objectives["direction"])) == [
        (tokens, name, direction) for tokens in (6, 8) for name in ("hybridlib", "plain")
        for direction in operators.DIRECTIONS]
    again = speed.recorded_speed(study.bench.ledger)
    assert [len(again[part]) for part in ("operators", "exactness", "objectives")] == [10, 2, 8]
    assert study.exactness()["errors"].tolist() == exact["errors"].tolist()


def test_recorded_speeds_are_the_latest_of_each_question_with_their_commit(tmp_path):
    for repeats, commit in ((2, "a" * 40), (3, "b" * 40)):
        bench = timing.Bench(hl.Ledger(tmp_path, device="cpu", commit=commit), "cpu", repeats=repeats)
        operators.time_operator(bench, "softmax_attention", "softmax", (1, 8, 2, 4))
    row, = speed.recorded_speed(hl.Ledger(tmp_path))["operators"].to_dict("records")
    assert (row["repeats"], row["commit"]) == (3, "b" * 40)


def test_newer_steps_of_another_alignment_take_the_place_of_older_ones(bench):
    for count in (None, 64, 32):
        for loop in LOOPS:
            parameters = {"teacher": "a", "stage": "match", "loop": loop} | ({"align_tokens": count} if count else {})
            bench.ledger.add("step_speed", parameters, {"reason": None, "loss": [count or 0]}, seconds=0.0)
    assert speed.recorded_speed(bench.ledger)["steps"]["loss"].tolist() == [[32], [32]]


def test_floors_are_those_of_the_latest_copy(bench):
    operators.time_operator(bench, "gated_delta_rule", "chunked", (1, 16, 2, 8))
    copied, = bench.ledger.find("copy_speed")
    bench.ledger.add("copy_speed", copied.parameters, copied.metrics | {"bytes_per_second": 5.0}, seconds=1.0)
    row, = speed.recorded_speed(bench.ledger)["operators"].to_dict("records")
    assert row["floor_seconds"] == row["floor_bytes"] / 5


def test_auto_takes_first_the_backend_that_records_show_fastest():
    """`auto` runs "fused" where it can: of the backends that models run with, no record has a faster one."""
    rows = speed.recorded_speed(hl.Ledger(hl.results_folder("h100")))["operators"]
    rows = rows[rows["reason"].isna() & rows["backend"].isin(["fused", "fla", "chunked"])]
    calls = rows.groupby(["operator", "direction", "batch", "time", "heads", "dim", "dtype"])
    fastest = [part.loc[part["gpu_seconds"].fillna(part["seconds"]).idxmin(), "backend"] for _, part in calls
               if "fused" in set(part["backend"]) and len(part) > 1]
    assert len(fastest) >= 20 and set(fastest) == {"fused"}
