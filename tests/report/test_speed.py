"""Tables and figures of the speed study, from made-up records and from the committed ones."""

import math

import pandas as pd
import pytest

import hybridlib as hl
from hybridlib.bench import speed
from hybridlib.bench.step import LOOPS, PHASES
from hybridlib.report import plots, speed as tables, speed_plots

NOTHING = pd.DataFrame()


def operators(**gpu):
    base = {"operator": "gated_delta_rule", "heads": 9, "dim": 64, "dtype": "bfloat16", "direction": "forward",
            "floor_seconds": 1e-5, "reason": None, "low": 1e-3, "high": 3e-3, "peak_bytes": 2**20, "device": "a GPU"}
    rows = [{"backend": "fused", "batch": 2, "time": 100, "seconds": 2e-3}, {"backend": "fla", "batch": 2, "time": 100,
            "seconds": 8e-3}, {"backend": "fused", "batch": 1, "time": 200, "seconds": 2e-3},
            {"operator": "softmax_attention", "backend": "softmax", "batch": 2, "time": 100, "seconds": 4e-3},
            {"backend": "chunked", "batch": 2, "time": 100, "seconds": None, "reason": "out of memory"}]
    return pd.DataFrame([base | row | {f"gpu_{name}": gpu.get(row["backend"]) for name in ("seconds", "low", "high")}
                         for row in rows])


def test_a_table_of_operators_sets_each_beside_its_floor_and_the_fastest():
    table = tables.operator_table(operators())
    assert table.loc[("gated delta rule", "fused", "(2, 100, 9, 64)")].tolist() == [
        "2 [1, 3]", "\u2013", "0.01", "200.0", "1.00", "1"]
    assert table.loc[("gated delta rule", "fla", "(2, 100, 9, 64)"), "of the fastest"] == "4.00"
    by_graph = tables.operator_table(operators(fused=1e-3, fla=5e-4))
    assert by_graph.loc[("gated delta rule", "fused", "(2, 100, 9, 64)"), "of the fastest"] == "2.00"
    assert tables.operator_table(operators(), "forward+backward").empty
    assert tables.refusals(operators()).values.tolist() == [["chunked", "out of memory"]]


def test_curves_are_per_token_with_softmax_beside_each_operator():
    curves = speed_plots.operator_curves(operators())
    assert set(curves["panel"]) == {"gated delta rule, forward"}
    fused = curves[curves["backend"] == "fused"]
    assert list(fused["time"]) == [100, 200] and fused["microseconds"].tolist() == pytest.approx([10, 10])
    assert curves[curves["backend"] == "softmax"]["microseconds"].item() == pytest.approx(20)
    assert speed_plots.operator_curves(operators(), "gpu_seconds").empty and speed_plots.operator_curves(NOTHING).empty
    figure = plots.scaling_curves(curves, "time", "microseconds", "backend", panel="panel", floor="floor",
                                  xlabel="tokens in a row", ylabel="microseconds a token")
    lines = figure.axes[0].lines
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log" and len(lines) == 4
    assert list(lines[-1].get_ydata()) == pytest.approx([0.05, 0.05])
    with pytest.raises(ValueError, match="logarithmic axes need more than 0"):
        plots.scaling_curves(curves.assign(microseconds=0.0), "time", "microseconds", "backend", xlabel="", ylabel="")


def test_a_bar_is_as_long_as_its_parts_together():
    frame = pd.DataFrame({"bar": ["ours", "plain"], "teacher": [1.0, 2.0], "student": [3.0, 4.5]})
    figure = plots.breakdown(frame, {"teacher": "teacher's pass", "student": "student's pass"}, "bar", xlabel="ms")
    axes = figure.axes[0]
    assert [(p.get_x(), p.get_width()) for p in axes.patches] == [(0, 1), (0, 2), (1, 3), (2, 4.5)]
    assert [t.get_text() for t in axes.texts] == ["4", "6.5"] and len({p.get_hatch() for p in axes.patches}) == 2


def test_tables_of_exactness_name_the_worst_error_and_its_bound():
    row = {"operator": "gated_delta_rule", "backend": "fused", "dtype": "bfloat16", "reason": None, "triton": "9.9",
           "errors": {"mild": {"output": 1e-3, "gradient of k": 4e-3},
                      "strong": {"output": 2e-3, "gradient of k": 1e-5}},
           "reasons": {"packed": "it is too long"}, "equal": {"mild": True, "strong": False}}
    frame = pd.DataFrame([row, row | {"operator": "gated_linear_attention", "triton": None, "reasons": {},
                                      "errors": {"mild": {"output": math.inf}}, "equal": {"mild": True}},
                          row | {"reason": "it is not here"}])
    table = tables.exactness_table(frame)
    assert table.loc[("gated delta rule", "fused, Triton 9.9", "bfloat16")].tolist() == [
        2, "4.0e-03", "1e-02", 0, "mild", "gradient of k", "1 of 2"]
    assert table.iloc[1].tolist() == [1, "inf", "1e-02", 1, "mild", "output", "1 of 1"]
    assert tables.tensor_table(frame).values.tolist() == [["2.0e-03", "4.0e-03"], ["inf", "\u2013"]]
    assert tables.refusals(frame).values.tolist() == [["fused, packed", "it is too long"], ["fused", "it is not here"]]
    assert tables.exactness_table(frame[2:]).empty and tables.tensor_table(frame[2:]).empty


def test_a_table_of_objectives_compares_with_ours():
    row = {"tokens": 16384, "width": 576, "vocab": 49152, "dtype": "bfloat16", "direction": "forward+backward",
           "reason": None, "seconds": 8e-3, "low": 7e-3, "high": 9e-3, "gpu_seconds": 6e-3, "gpu_low": 5e-3,
           "gpu_high": 7e-3, "peak_bytes": 2**28, "errors": {"loss": 1e-4, "hidden": 3e-3, "head": 2e-3}}
    frame = pd.DataFrame([row | {"implementation": "hybridlib"},
                          row | {"implementation": "plain", "gpu_seconds": 24e-3, "peak_bytes": 2**32},
                          row | {"implementation": "liger", "gpu_seconds": None, "seconds": 20e-3}])
    table = tables.objective_table(frame)
    line = table.loc[("(16384, 576, 49152), bfloat16", "plain", "forward+backward")]
    assert line.tolist() == ["8 [7, 9]", "24 [5, 7]", "4.00", "4,096", "1.0e-04", "3.0e-03", "2.0e-03"]
    assert table["of ours"].tolist() == ["1.00", "4.00", "2.50"] and table.iloc[2]["GPU, ms"] == "\u2013"
    assert tables.objective_table(frame[1:2])["of ours"].tolist() == ["\u2013"]


def test_a_table_of_steps_compares_loops_and_their_losses():
    row = {"stage": "match", "reason": None, "step_seconds": 0.25, "peak_bytes": None, "align_tokens": 64.0,
           **{f"{name}_seconds": 0.05 for name in PHASES}}
    frame = pd.DataFrame([row | {"loop": "hybridlib", "tokens_per_second": 4000.0, "loss": [3.0, 1.0]},
                          row | {"loop": "plain", "tokens_per_second": 2000.0, "loss": [3.0, 0.5],
                                 "noise_loss": [3.0, 0.6]}])
    assert tables.step_table(frame).values.tolist() == [
        ["4,000", "2.00", "250", "250", "\u2013", "64", "1"], ["2,000", "1.00", "250", "250", "\u2013", "64", "0.2"]]
    assert tables.step_table(frame[:1])[["of the plain loop", "losses apart"]].values.tolist() == [["\u2013"] * 2]
    assert len(speed_plots.step_figures(frame)) == 1


def test_a_table_of_decoding_compares_with_the_teacher():
    row = {"reason": None, "context": 1024, "batch": 1, "linear_attention": 0, "prefill_seconds": 1.0}
    frame = pd.DataFrame([row | {"share": 1.0, "full_attention": 2**20, "tokens_per_second": 50.0},
                          row | {"share": 0.25, "full_attention": 2**18, "tokens_per_second": 75.0}])
    table = tables.decoding_table(frame)
    assert table["label"].tolist() == ["teacher", "25% softmax"]
    assert table["cache_of_teacher"].tolist() == [1, 0.25] and table["speed_of_teacher"].tolist() == [1, 1.5]
    by_graph = frame.assign(gpu_tokens_per_second=[2468.0, 1234.0])
    assert tables.decoding_table(by_graph)["speed_of_teacher"].tolist() == [1, 0.5]
    assert [len(speed_plots.decoding_figures(rows)) for rows in (frame, by_graph)] == [2, 3]
    assert tables.decoding_table(frame[1:])["cache_of_teacher"].isna().all()


def test_without_records_nothing_is_shown():
    assert [tables.captioned(part, NOTHING) for part in speed.KINDS] == [[]] * len(speed.KINDS)
    assert [draw(NOTHING) for draw in (speed_plots.operator_figures, speed_plots.step_figures,
                                       speed_plots.loss_figures, speed_plots.decoding_figures)] == [[]] * 4


def test_the_committed_records_are_read_and_shown():
    gpu = speed.recorded_speed(hl.Ledger(hl.results_folder("h100")))
    shown = tables.record_table(gpu)
    assert list(shown.index) == list(speed.KINDS) and (shown["records"] >= 4).all()
    assert shown["device"].str.contains("H100").all() and (shown["commit"].str.len() >= 7).all()
    assert [len(tables.captioned(part, frame)) >= 1 for part, frame in gpu.items()] == [True] * len(gpu)


def test_losses_of_both_loops_are_drawn_a_figure_a_stage():
    row = {"reason": None, "loss_tokens": (tokens := [1_000_000, 2_000_000, 3_000_000])}
    frame = pd.DataFrame([row | {"stage": stage, "loop": loop, "loss": [3.0, 2.0, last]}
                          for stage, last in (("match", 1.0), ("align", 0.5)) for loop in LOOPS]
                         + [{"reason": "no memory", "stage": "align", "loop": "plain"}])
    losses = speed_plots.step_losses(frame)
    assert losses["match"]["plain loop"] == (tokens, [3.0, 2.0, 1.0])
    assert set(losses["align"]) == {"hybridlib loop", "plain loop"}
    noisy = frame.assign(noise_loss=[[3.0, 2.0, 0.9] if loop == "plain" else None for loop in frame["loop"]],
                         noise_dtype="float32")
    assert speed_plots.step_losses(noisy)["match"]["plain loop, float32"] == (tokens, [3.0, 2.0, 0.9])
    for figure, last in zip(speed_plots.loss_figures(frame), (1.0, 0.5), strict=True):
        lines = figure.axes[0].lines
        assert [line.get_ydata()[-1] for line in lines] == [last, last]
        assert list(lines[0].get_xdata()) == [1, 2, 3] and "millions" in figure.axes[0].get_xlabel()
        assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 2  # told apart without colour
