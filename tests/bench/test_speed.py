"""Speeds: the floor and the tables by hand, records, refusals; how fast anything is, is never asserted."""

from __future__ import annotations

import time

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import hybridlib as hl
from hybridlib import kernels
from hybridlib.bench import (decoding, exactness, objective as objective_speed, operators as benchmarks, speed,
                             step as step_speed, timing)
from hybridlib.records.provenance import describe_device
from hybridlib.report import plots, speed as speed_report, speed_plots


@pytest.fixture
def ledger(tmp_path):
    return hl.Ledger(tmp_path / "records", device="cpu")


@pytest.fixture
def teacher(tiny_teacher):
    return hl.Teacher(tiny_teacher(), None, "tiny", "r1")


def operator(ledger, *arguments, **settings):
    return benchmarks.time_operator(ledger, *arguments, device="cpu", repeats=3, **settings)


def test_floor_counts_inputs_outputs_and_gradients():
    shape, tokens = (2, 8, 3, 4), 2 * 8 * 3
    qkvo, half = 4 * tokens * 4, 2  # numbers of q, k, v and o; bytes of bfloat16
    gates = tokens * (4 + half)  # log_decay in float32, beta like q
    inputs = benchmarks.operator_inputs("gated_delta_rule", shape, "bfloat16")
    assert benchmarks.memory_floor(inputs) == qkvo * half + gates
    both = benchmarks.memory_floor(inputs, "forward+backward")
    assert both == (3 * 3 + 2) * tokens * 4 * half + 3 * gates
    gla = benchmarks.operator_inputs("gated_linear_attention", shape, "float32")
    assert benchmarks.memory_floor(gla) == qkvo * 4 + tokens * 4 * 4
    assert benchmarks.memory_floor(benchmarks.operator_inputs("softmax_attention", shape)) == qkvo * 4


def test_inputs_are_fresh_and_within_what_operators_take():
    one, two = (benchmarks.operator_inputs("gated_delta_rule", (1, 16, 2, 8), "float32", seed=seed) for seed in (0, 1))
    assert not torch.equal(one["q"], two["q"])
    assert torch.allclose(one["k"].norm(dim=-1), torch.ones(1, 16, 2), atol=1e-6)
    assert (one["log_decay"] <= 0).all() and ((one["beta"] > 0) & (one["beta"] < 1)).all()
    assert list(benchmarks.operator_inputs("softmax_attention", (1, 16, 2, 8))) == ["q", "k", "v"]


def test_what_is_timed_is_the_operator_and_its_gradients():
    inputs = benchmarks.operator_inputs("gated_delta_rule", (1, 16, 2, 8))
    o = benchmarks._call("gated_delta_rule", "chunked", inputs, False)()
    assert torch.equal(o, kernels.gated_delta_rule(*inputs.values(), backend="chunked")[0]) and not o.requires_grad
    grads = benchmarks._call("gated_delta_rule", "chunked", inputs, True)()
    assert [g.shape for g in grads] == [x.shape for x in inputs.values()]
    q, k, v = (x.detach() for x in list(inputs.values())[:3])
    o = benchmarks._call("softmax_attention", "softmax", {"q": q, "k": k, "v": v}, False)()
    last = (q[0, -1, 0] @ k[0, :, 0].T / 8**0.5).softmax(-1) @ v[0, :, 0]
    assert torch.allclose(o[0, -1, 0], last, atol=1e-6)


def test_a_timing_is_the_median_and_takes_inputs_in_turn():
    seen = []
    calls = [lambda i=i: (seen.append(i), time.sleep(0.03 if len(seen) == 3 else 0.001)) for i in range(2)]
    timed = timing.time_calls(calls, repeats=5, max_seconds=10)
    assert seen == [0, 0, 1, 0, 1, 0]  # one to warm up
    assert timed["samples"] == 5 and timed["low"] <= timed["seconds"] <= timed["high"]
    assert timed["seconds"] < 0.03  # one slow sample does not make the median
    assert timing.time_calls(calls, repeats=50, max_seconds=1e-9)["samples"] == 3


def test_dtype_and_device_are_found_where_none_is_named(ledger, tmp_path):
    named = "bfloat16" if torch.cuda.is_available() else "float32", describe_device()
    row = benchmarks.time_operator(ledger, "gated_delta_rule", "chunked", (1, 8, 1, 4), repeats=1)
    assert row["reason"] is None and (row["dtype"], row["device"]) == named
    row = objective_speed.time_objective(hl.Ledger(tmp_path), "plain", (4, 4, 8), repeats=1)
    assert row["reason"] is None and (row["dtype"], row["device"]) == named


def test_asking_again_returns_the_record_and_recompute_measures_again(ledger, monkeypatch):
    calls = []
    monkeypatch.setattr(benchmarks, "time_calls", lambda *a, **k: calls.append(1) or timing.time_calls(*a, **k))
    arguments = ("gated_delta_rule", "chunked", (1, 16, 2, 8))
    first = operator(ledger, *arguments)
    assert operator(ledger, *arguments) == first and len(calls) == 1
    assert first["reason"] is None and first["gpu_seconds"] is None and first["peak_bytes"] is None
    copied = timing.time_copy(ledger, device="cpu")
    assert first["floor_seconds"] == first["floor_bytes"] / copied["bytes_per_second"]
    operator(ledger, *arguments, recompute=True)
    operator(ledger, *arguments, direction="forward+backward")
    assert len(calls) == 3 and len(ledger.find("operator_speed")) == 2 and len(ledger.find("copy_speed")) == 1


def test_a_backend_that_cannot_run_has_its_reason_and_is_tried_again(ledger, monkeypatch):
    monkeypatch.setattr(kernels, "available_backends", lambda: {"fla": "it is not here"})
    row = operator(ledger, "gated_delta_rule", "fla", (1, 16, 2, 8))
    assert row["reason"] == "it is not here" and "seconds" not in row
    monkeypatch.setattr(kernels, "available_backends", lambda: {"fla": None})
    monkeypatch.setattr(kernels, "gated_delta_rule", lambda *a, **k: 1 / 0)
    assert operator(ledger, "gated_delta_rule", "fla", (1, 16, 2, 8))["reason"] == "ZeroDivisionError: division by zero"
    monkeypatch.setattr(kernels, "gated_delta_rule", lambda q, k, v, *a, **kw: (v, None))
    assert operator(ledger, "gated_delta_rule", "fla", (1, 16, 2, 8))["reason"] is None


@pytest.mark.parametrize("call, sentence", [
    (lambda l: operator(l, "delta", "chunked", (1, 2, 3, 4)), "operator='delta' is unknown"),
    (lambda l: operator(l, "gated_delta_rule", "softmax", (1, 2, 3, 4)), "backend='softmax' is unknown"),
    (lambda l: operator(l, "gated_delta_rule", "chunked", (1, 2, 3)), r"shape=\(1, 2, 3\) is not \(batch, time"),
    (lambda l: operator(l, "gated_delta_rule", "chunked", (1, 0, 3, 4)), r"shape=\(1, 0, 3, 4\) is not"),
    (lambda l: operator(l, "gated_delta_rule", "chunked", (1, 2, 3, 4), dtype="int8"), "dtype='int8' is unknown"),
    (lambda l: operator(l, "gated_delta_rule", "chunked", (1, 2, 3, 4), direction="up"), "direction='up' is unknown"),
    (lambda l: timing.time_copy(l, device="cpu", num_bytes=0), "num_bytes=0 is not a whole number of at least 4"),
    (lambda l: timing.time_calls([]), r"calls=\[\] holds nothing to time"),
])
def test_bad_arguments_are_refused_before_any_compute(ledger, call, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        call(ledger)
    assert not ledger.folder.exists()


@pytest.mark.parametrize("change, sentence", [
    ({"backends": ["cuda"]}, "backends='cuda' is unknown"), ({"shapes": 3}, "shapes=3 is not a list"),
    ({"shapes": [[1, 2]]}, r"shape=\[1, 2\] is not"), ({"contexts": [0]}, "contexts=0 is not a whole number"),
    ({"shares": [1.5]}, "shares=1.5 is not a number"), ({"stages": ["score"]}, "stages='score' is unknown"),
    ({"batch_tokens": 8}, "batch_tokens=8 is not a whole number of at least 256"), ({"steps": 0}, "steps=0"),
    ({"step_align_tokens": 8}, "step_align_tokens=8 is neither 0 nor a whole number of at least 256"),
    ({"exactness_cases": ["wild"]}, "exactness_cases='wild' is unknown"), ({"exactness_dtypes": ["auto"]},
                                                                           "exactness_dtypes='auto' is unknown"),
    ({"objectives": ["theirs"]}, "objectives='theirs' is unknown"), ({"objective_shapes": [[1, 2]]},
                                                                      r"shape=\[1, 2\] is not \(tokens, width, vocab"),
    ({"new_tokens": 1}, "new_tokens=1 is not"), ({"budget": 0}, "budget=0 is not a count"),
    ({"recompute": "yes"}, "recompute='yes' is neither"), ({"plain_backend": "softmax"}, "plain_backend='softmax'"),
])
def test_bad_settings_are_refused(change, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        speed.SpeedSettings(**change)


@pytest.mark.parametrize("stage", step_speed.STAGES)
def test_both_loops_of_a_stage_train_alike(ledger, teacher, tiny_tokens, stage):
    rows = [step_speed.time_step(ledger, teacher, tiny_tokens, stage=stage, loop=loop, budget=1, batch_tokens=64,
                                 steps=3, align_tokens=128) for loop in step_speed.LOOPS]
    assert [row["reason"] for row in rows] == [None, None]
    ours, plain = (torch.tensor(row["loss"]) for row in rows)
    assert torch.allclose(ours, plain, rtol=2e-4) and len(ours) == 3
    assert rows[0]["loss_tokens"] == [64, 128, 192] and rows[0]["teacher"] == "tiny"
    measured = [phase for phase in step_speed.PHASES if (stage, phase) != ("align", "objective")]
    assert all(row[f"{phase}_seconds"] > 0 for row in rows for phase in measured)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    frame = pd.DataFrame(rows)
    words = speed_report.step_words(frame)
    assert words.startswith(f"- {stage}: hybridlib ") and "no step's loss differs by more than" in words
    assert ("after 128 tokens of alignment" in words) == (stage == "match")
    assert "; those of the plain loop itself, in bfloat16, differ by up to" in words
    assert rows[0].get("noise_loss") is None and len(rows[1]["noise_loss"]) == 3
    noise = (torch.tensor(rows[1]["noise_loss"]) - plain).abs()
    assert noise.max() > 3 * (ours - plain).abs().max() and (noise < 0.1 * plain).all()
    assert list(speed_report.step_bars(frame)["bar"]) == [f"{stage}, hybridlib", f"{stage}, plain"]


def test_stage_2_is_timed_from_one_aligned_student_for_both_loops(ledger, teacher, tiny_tokens, monkeypatch):
    student, ids = hl.linearize(teacher.model), tiny_tokens.rows(0, 4)
    hl.align(student, teacher.model, tiny_tokens, 512, settings=hl.AlignSettings(batch_tokens=64))
    calls, aligned = [], {}
    monkeypatch.setattr(step_speed, "align", lambda *a, **k: calls.append(a[3]) or hl.align(*a, **k))

    def time_step(stage="match", loop="plain", tokens=512, **kept):
        return step_speed.time_step(ledger, teacher, tiny_tokens, stage=stage, loop=loop, budget=1, batch_tokens=64,
                                    steps=2, align_tokens=tokens, recompute=True, **kept)

    @torch.no_grad()
    def first_loss(student, half=False):
        models = teacher.model, hl.restore(student, teacher.model, [1])
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            p, q = (model(ids).logits.float().log_softmax(-1) for model in models)
        return float((p.exp() * (p - q)).sum(-1).mean())

    rows = [time_step(loop=loop, aligned=aligned) for loop in step_speed.LOOPS]
    assert calls == [512]
    assert [row["loss"][0] for row in rows] == pytest.approx([first_loss(student)] * 2, rel=1e-5)
    assert rows[1]["noise_loss"][0] == pytest.approx(first_loss(student, half=True), rel=1e-3)
    assert abs(rows[1]["noise_loss"][0] - rows[1]["loss"][0]) > 1e-4
    assert time_step()["loss"] == rows[1]["loss"] and calls == [512, 512]  # made again: the same to the bit
    plain = time_step(tokens=0, aligned=aligned)
    assert len(calls) == 2 and plain["loss"][0] == pytest.approx(first_loss(hl.linearize(teacher.model)), rel=1e-5)
    assert [row["align_tokens"] for row in (*rows, plain)] == [512, 512, 0] and len(ledger.find("step_speed")) == 3
    time_step(tokens=64, aligned=aligned)
    assert len(calls) == 3 and len(aligned) == 2
    calls.clear()
    assert time_step(stage="align", loop="plain")["align_tokens"] is None and not calls


def test_what_a_hybridlib_step_is_timed_by_is_what_align_and_match_compute(teacher, tiny_tokens):
    for stage, run, settings in (("align", hl.align, hl.AlignSettings), ("match", hl.match, hl.MatchSettings)):
        settings = settings(batch_tokens=64, schedule="constant", warmup=0.0)
        losses, _ = step_speed._loop(hl.linearize(teacher.model), teacher.model, tiny_tokens, 4, 3, settings,
                                     step_speed._STEPS[stage, "hybridlib"], fused=True)
        history = run(hl.linearize(teacher.model), teacher.model, tiny_tokens, 192, settings=settings)
        assert losses == pytest.approx(history.losses, rel=1e-5)


@pytest.mark.parametrize("change, sentence", [
    ({"stage": "score"}, "stage='score' is unknown"), ({"loop": "fast"}, "loop='fast' is unknown"),
    ({"batch_tokens": 8}, "batch_tokens=8 is not a whole number of at least 16"), ({"steps": 0}, "steps=0 is not"),
    ({"align_tokens": 15}, "align_tokens=15 is neither 0 nor a whole number of at least 16"),
    ({"align_tokens": None}, "align_tokens=None is neither"), ({"align_tokens": True}, "align_tokens=True is neither"),
    ({"budget": 9}, "budget=9 is not a count from 1 to 3 layers"), ({"mixer": "mamba"}, "mixer='mamba' is unknown"),
])
def test_bad_steps_are_refused(ledger, teacher, tiny_tokens, change, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        step_speed.time_step(ledger, teacher, tiny_tokens, **{"batch_tokens": 64, **change})


def test_decoding_of_the_teacher_holds_keys_and_values_of_every_token(ledger, teacher):
    row = decoding.time_decoding(ledger, teacher, context=8, batch=2, new_tokens=4)
    config = teacher.model.config
    held = 2 * config.num_hidden_layers * 2 * config.num_key_value_heads * 8 * 4 * (8 + 4 - 1)  # the last is not read
    assert row["reason"] is None and (row["full_attention"], row["linear_attention"]) == (held, 0)
    assert row["tokens_per_second"] > 0 and row["mixer"] is None and row["gpu_tokens_per_second"] is None


def test_decoding_of_a_hybrid_holds_states_that_do_not_grow(ledger, teacher):
    rows = [decoding.time_decoding(ledger, teacher, share=share, context=context, new_tokens=3)
            for share in (0.34, 0) for context in (8, 16)]
    assert [row["reason"] for row in rows] == [None] * 4
    assert rows[0]["full_attention"] < rows[1]["full_attention"] and rows[2]["full_attention"] == 0
    assert rows[0]["linear_attention"] == rows[1]["linear_attention"] > 0
    assert rows[3]["linear_attention"] == rows[0]["linear_attention"] * 3 // 2
    assert speed_report.refusals(pd.DataFrame(rows)).empty


@pytest.mark.parametrize("change, sentence", [
    ({"share": 1.5}, "share=1.5 is not a number of at least 0 and at most 1"), ({"context": 0}, "context=0 is not"),
    ({"new_tokens": 1}, "new_tokens=1 is not a whole number of at least 2"), ({"batch": 0}, "batch=0 is not")])
def test_bad_decoding_is_refused(ledger, teacher, change, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        decoding.time_decoding(ledger, teacher, **change)


def operators(**gpu):
    base = {"operator": "gated_delta_rule", "heads": 9, "dim": 64, "dtype": "bfloat16", "direction": "forward",
            "floor_seconds": 1e-5, "reason": None, "low": 1e-3, "high": 3e-3, "peak_bytes": 2**20, "device": "a GPU"}
    rows = [{"backend": "fused", "batch": 2, "time": 100, "seconds": 2e-3}, {"backend": "fla", "batch": 2, "time": 100,
            "seconds": 8e-3}, {"backend": "fused", "batch": 1, "time": 200, "seconds": 2e-3},
            {"operator": "softmax_attention", "backend": "softmax", "batch": 2, "time": 100, "seconds": 4e-3},
            {"backend": "chunked", "batch": 2, "time": 100, "seconds": None, "reason": "out of memory"}]
    return pd.DataFrame([base | row | {"gpu_seconds": gpu.get(row["backend"])} for row in rows])


def test_words_and_tables_of_operators_say_what_was_measured():
    words = speed_report.operator_words(operators()).splitlines()
    assert words[0] == ("- gated delta rule, forward, (2, 100, 9, 64): **fused**, 2 ms as launched, which is 200.0 "
                        "times its memory floor; `fla` takes 4.0 times as long; softmax attention takes 2 times as "
                        "long.")
    assert len(words) == 2
    by_graph = speed_report.operator_words(operators(fused=1e-3, fla=5e-4)).splitlines()[0]
    assert "**fla**, 0.5 ms of GPU time" in by_graph and "`fused` takes 2.0 times as long" in by_graph
    table = speed_report.operator_table(operators())
    assert table.loc[("gated delta rule", "fused", "(2, 100, 9, 64)"), "launched, ms"] == "2 [1, 3]"
    assert list(speed_report.refusals(operators()).itertuples(index=False, name=None)) == [("chunked", "out of memory")]


def test_curves_are_per_token_with_softmax_beside_each_operator():
    curves = speed_plots.operator_curves(operators())
    assert set(curves["panel"]) == {"gated delta rule, forward"}
    fused = curves[curves["backend"] == "fused"]
    assert list(fused["time"]) == [100, 200] and fused["microseconds"].tolist() == pytest.approx([10, 10])
    assert curves[curves["backend"] == "softmax"]["microseconds"].item() == pytest.approx(20)
    assert speed_plots.operator_curves(operators(), "gpu_seconds").empty
    assert speed_plots.operator_curves(pd.DataFrame()).empty
    figure = plots.scaling_curves(curves, "time", "microseconds", "backend", panel="panel", floor="floor",
                                  xlabel="tokens in a row", ylabel="microseconds a token")
    lines = figure.axes[0].lines
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log" and len(lines) == 4
    assert list(lines[-1].get_ydata()) == pytest.approx([0.05, 0.05])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["fused", "fla", "softmax", "memory floor"]
    with pytest.raises(ValueError, match="logarithmic axes need more than 0"):
        plots.scaling_curves(curves.assign(microseconds=0.0), "time", "microseconds", "backend", xlabel="", ylabel="")


def test_a_bar_is_as_long_as_its_parts_together():
    frame = pd.DataFrame({"bar": ["ours", "plain"], "teacher": [1.0, 2.0], "student": [3.0, 4.5]})
    figure = plots.breakdown(frame, {"teacher": "teacher's pass", "student": "student's pass"}, "bar", xlabel="ms")
    axes = figure.axes[0]
    assert [(p.get_x(), p.get_width()) for p in axes.patches] == [(0, 1), (0, 2), (1, 3), (2, 4.5)]
    assert [t.get_text() for t in axes.texts] == ["4", "6.5"]
    assert len({p.get_hatch() for p in axes.patches}) == 2


def test_floors_are_those_of_the_latest_copy(ledger):
    operator(ledger, "gated_delta_rule", "chunked", (1, 16, 2, 8))
    copied, = ledger.find("copy_speed")
    ledger.add("copy_speed", copied.parameters, copied.metrics | {"bytes_per_second": 5.0}, seconds=1.0)
    tables = speed.recorded_speed(ledger)
    assert list(speed_report.recorded_tables(tables)) == ["operators, forward"]
    row, = tables["operators"].to_dict("records")
    assert row["floor_seconds"] == row["floor_bytes"] / 5
    metrics = {"kernels": [{"bytes": 10, "floor_seconds": 1.0}, {"bytes": 20}], "reason": None}
    assert speed._with_floor(metrics, {"bytes_per_second": 5.0})["kernels"] == [
        {"bytes": 10, "floor_seconds": 2.0}, {"bytes": 20}]
    assert speed._with_floor(metrics, None) == metrics


def test_memory_moves_at_the_faster_of_two_ways(monkeypatch):
    times = iter([{"seconds": 4.0}, {"seconds": 2.0}])
    monkeypatch.setattr(timing, "time_calls", lambda calls, **how: [call() for call in calls] and next(times))
    assert timing.copy_speed("cpu", 8) == {"seconds": 2.0, "bytes_per_second": 8.0, "by": "negation"}


def test_decoding_words_compare_with_the_teacher():
    row = {"reason": None, "context": 1024, "batch": 1, "linear_attention": 0, "prefill_seconds": 1.0}
    frame = pd.DataFrame([row | {"share": 1.0, "full_attention": 2**20, "tokens_per_second": 50.0},
                          row | {"share": 0.25, "full_attention": 2**18, "tokens_per_second": 75.0}])
    assert ("- 25% softmax: cache 0.25 MiB, 75 tokens/s, **0.25 times** the teacher's memory; its speed is **1.50 "
            "times** the teacher's as launched from Python.") in speed_report.decoding_words(frame)
    assert list(speed_report.decoding_table(frame)["label"]) == ["teacher", "25% softmax"]
    assert len(speed_plots.decoding_figures(frame)) == 2
    by_graph = frame.assign(gpu_tokens_per_second=[2468.0, 1234.0])
    assert "75 tokens/s (1,234 by GPU time), **0.25 times**" in speed_report.decoding_words(by_graph)
    assert ("**0.50 times** the teacher's by GPU time, **1.50 times** the teacher's as launched from Python."
            ) in speed_report.decoding_words(by_graph)
    assert len(speed_plots.decoding_figures(by_graph)) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("share", [1, 0.34, 0])
def test_decoding_on_a_gpu_is_also_timed_without_its_launches(tmp_path, tiny_teacher, share):
    teacher = hl.Teacher(tiny_teacher().cuda(), None, "tiny", "r1")
    row = decoding.time_decoding(hl.Ledger(tmp_path, device="auto"), teacher, share=share, context=8, new_tokens=4)
    assert row["reason"] is None and "graph_reason" not in row
    assert row["gpu_tokens_per_second"] > row["tokens_per_second"]


def test_recorded_speeds_are_the_latest_of_each_question(ledger):
    assert all(frame.empty for frame in speed.recorded_speed(ledger).values())
    assert "No GPU record" in speed_report.about_speed(speed.recorded_speed(ledger))
    for repeats in (2, 3):
        benchmarks.time_operator(ledger, "softmax_attention", "softmax", (1, 8, 2, 4), device="cpu", repeats=repeats)
    found = speed.recorded_speed(ledger)
    assert found["operators"]["repeats"].tolist() == [3]
    assert speed_report.about_speed(found).startswith("1 records (operators), measured on ")


def test_parts_left_out_say_nothing(tmp_path):
    settings = speed.SpeedSettings(shapes=[], exactness_cases=[], objective_shapes=[], stages=[], contexts=[],
                                   results=str(tmp_path), device="cpu")
    study = speed.SpeedStudy(settings)
    for part, words in ((study.operators(), speed_report.operator_words),
                        (study.exactness(), speed_report.exactness_words),
                        (study.objectives(), speed_report.objective_words), (study.steps(), speed_report.step_words),
                        (study.decoding(), speed_report.decoding_words)):
        assert part.empty and words(part) == "" and speed_report.refusals(part).empty
        assert speed_report.exactness_table(part).empty and speed_report.objective_table(part).empty
        assert [draw(part) for draw in (speed_plots.operator_figures, speed_plots.step_figures,
                                        speed_plots.loss_figures, speed_plots.decoding_figures)] == [[]] * 4
    assert not list(tmp_path.iterdir())


def test_a_study_measures_each_backend_and_implementation_and_finds_its_records_again(tmp_path):
    settings = speed.SpeedSettings(backends=["chunked", "fla", "softmax"], exactness_cases=["beta 1", "length 1"],
                                   exactness_dtypes=["float32"], objectives=["hybridlib", "plain"], repeats=3,
                                   objective_shapes=[[6, 4, 9], [8, 4, 9]], results=str(tmp_path), device="cpu")
    study = speed.SpeedStudy(settings)
    exact, objectives = study.exactness(), study.objectives()
    assert [(row["backend"], list(row["errors"])) for _, row in exact.iterrows()] == [
        ("chunked", ["beta 1", "length 1"]), ("chunked", ["length 1"])]  # fla is not compared in float32
    assert list(zip(objectives["tokens"], objectives["implementation"], objectives["direction"])) == [
        (tokens, name, direction) for tokens in (6, 8) for name in ("hybridlib", "plain")
        for direction in benchmarks.DIRECTIONS]
    found = speed.recorded_speed(study.ledger)
    assert len(found["exactness"]) == 2 and len(found["objectives"]) == 8
    assert speed_report.exactness_words(found["exactness"]) == speed_report.exactness_words(exact)
    about = speed_report.about_speed(found)
    assert about.startswith("10 records (exactness, objectives), measured on ")
    assert "No GPU record of operators, steps, decoding, kernels, scaling, counters, mixers is committed yet." in about
    assert "gpu.yaml" in about
    fewer = exactness.measure_exactness(study.ledger, "gated_delta_rule", "chunked", ["length 1"], device="cpu")
    latest = speed.recorded_speed(study.ledger)["exactness"]
    assert len(latest) == 2 and list(latest.iloc[0]["errors"]) == list(fewer["errors"]) == ["length 1"]


def test_committed_steps_are_read_and_newer_ones_of_another_alignment_take_their_place(ledger):
    old = {"teacher": "a", "stage": "match", "mixer": "gdn"}
    for count in (None, 64, 32):
        for loop, last in zip(step_speed.LOOPS, (1.0, 0.5)):
            parameters = old | {"loop": loop} | ({"align_tokens": count} if count else {})
            noise = {"noise_loss": [3.0, 0.6], "noise_dtype": "float32"} if count and loop == "plain" else {}
            ledger.add("step_speed", parameters, {"reason": None, "tokens_per_second": 4 * last, "loss": [3.0, last],
                                                  "loss_tokens": [1, 2], **noise}, seconds=0.0)
        steps = speed.recorded_speed(ledger)["steps"]
        words = speed_report.step_words(steps)
        assert "**2.00 times** as fast" in words and "by more than 100%" in words and len(steps) == 2
        assert (f"after {count} tokens" in words) == ("in float32, differ by up to 20%." in words) == bool(count)
        curves = speed_report.step_losses(steps)["match"]
        assert list(curves) == list(step_speed.LOOPS) + ["plain float32"] * bool(count)
        assert len(speed_plots.loss_figures(steps)[0].axes[0].lines) == len(curves)


def test_losses_of_both_loops_are_drawn_a_figure_a_stage():
    row = {"reason": None, "loss_tokens": [64, 128, 192]}
    frame = pd.DataFrame([row | {"stage": stage, "loop": loop, "loss": [3.0, 2.0, last]}
                          for stage, last in (("match", 1.0), ("align", 0.5)) for loop in step_speed.LOOPS]
                         + [{"reason": "no memory", "stage": "align", "loop": "plain"}])
    losses = speed_report.step_losses(frame)
    assert losses["match"]["plain"] == ([64, 128, 192], [3.0, 2.0, 1.0])
    assert set(losses["align"]) == set(step_speed.LOOPS)
    figures = speed_plots.loss_figures(frame)
    noisy = frame.assign(noise_loss=[[3.0, 2.0, 0.9] if loop == "plain" else None for loop in frame["loop"]],
                         noise_dtype="float32")
    assert speed_report.step_losses(noisy)["match"]["plain float32"] == ([64, 128, 192], [3.0, 2.0, 0.9])
    assert [text.get_text() for text in speed_plots.loss_figures(noisy)[0].legends[0].get_texts()] == [
        "hybridlib loop", "plain loop", "plain float32 loop"]
    assert [figure.axes[0].get_ylabel() for figure in figures] == ["stage 2: KL (nats a token)",
                                                                   "stage 1: error of mixers, relative"]
    for figure, last in zip(figures, (1.0, 0.5)):
        lines = figure.axes[0].lines
        assert [line.get_ydata()[-1] for line in lines] == [last, last]
        assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 2  # told apart without colour
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["hybridlib loop", "plain loop"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_times_the_same_calls_on_the_gpu(ledger):
    row = benchmarks.time_operator(ledger, "gated_delta_rule", "chunked", (2, 256, 4, 64),
                                   direction="forward+backward", repeats=3)
    assert row["reason"] is None and "graph_reason" not in row and row["peak_bytes"] > 0
    assert row["gpu_seconds"] > row["floor_seconds"]


def test_a_graph_needs_a_gpu():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="^device='cuda' asks for a GPU"):
            timing.time_graph([lambda: F.relu(torch.ones(1))])
