"""Targets: verdicts by hand from made-up records; others' PyTorch forms compute what ours do."""

from __future__ import annotations

import functools
import importlib
import inspect

import pandas as pd
import pytest
import torch

import hybridlib as hl
from hybridlib import kernels
from hybridlib.bench import operators as benchmarks, speed
from hybridlib.bench.peers import eager
from hybridlib.report import speed as speed_report, targets as speed_targets


def tables(forward=0.07, fla=0.21, launched=0.1, align=410_000, device="NVIDIA H100 80GB HBM3, 79 GiB"):
    base = {"operator": "gated_delta_rule", "backend": "fused", "batch": 16, "time": 1024, "heads": 9, "dim": 64,
            "dtype": "bfloat16", "direction": "forward", "device": device, "reason": None}
    rows = [{"gpu_seconds": 1e-3 * forward, "seconds": 1e-3 * launched},
            {"backend": "fla", "gpu_seconds": 1e-3 * fla, "seconds": 0.6e-3},
            {"direction": "forward+backward", "gpu_seconds": 0.31e-3, "seconds": 0.4e-3},
            {"backend": "fla", "direction": "forward+backward", "reason": "it is broken"}]
    step = {"teacher": "smollm2-135m", "context": 1024, "device": device, "reason": None}
    steps = [{"stage": "align", "loop": "hybridlib", "tokens_per_second": align},
             {"stage": "align", "loop": "plain", "tokens_per_second": 40_000},
             {"stage": "match", "loop": "hybridlib", "tokens_per_second": 180_000}]
    return {"operators": pd.DataFrame([base | row for row in rows]), "steps": pd.DataFrame([step | s for s in steps])}


def verdicts(**changes):
    return {one.target: one for one in speed_targets.gpu_verdicts(tables(**changes))}


def test_each_target_is_met_missed_or_not_measured():
    found = verdicts()
    shape = "(16, 1024, 9, 64)"
    assert len(found) == 16
    assert found[f"gated delta rule, forward, {shape}: GPU time"].verdict == "met"
    assert found[f"gated delta rule, forward+backward, {shape}: GPU time"].verdict == "missed"
    assert found[f"gated linear attention, forward, {shape}: GPU time"].verdict == "not measured"
    ratio = f"gated delta rule, forward, {shape}: time of flash-linear-attention over that of `fused`"
    assert found[f"{ratio}, GPU time"].found == pytest.approx(3) and found[f"{ratio}, GPU time"].verdict == "met"
    assert found[f"{ratio}, as launched"].found == pytest.approx(6)
    assert found[f"{ratio.replace('forward', 'forward+backward')}, GPU time"].verdict == "not measured"
    assert found["stage 1 (`align`)"].verdict == "met, aim met"
    assert found["stage 2 (`match`)"].verdict == "met, aim missed"


def test_a_call_that_is_launched_too_slowly_says_how_much_of_it_the_gpu_computes():
    frame = tables()
    frame["operators"].loc[frame["operators"]["backend"] == "fused", "seconds"] = 0.5e-3
    lines = [line for line in speed_targets.target_words(speed_targets.gpu_verdicts(frame)).splitlines()
             if "delta rule, forward, (16" in line]
    assert "Of its 0.5 ms as launched the GPU computes for" in lines[2] and "**missed**" in lines[2]
    assert not any("as launched the GPU" in line for line in lines[:2])
    assert "the GPU computes" not in "\n".join(
        line for line in speed_targets.target_words(verdicts().values()).splitlines() if "**met" in line)


def test_a_bound_itself_is_within():
    found = verdicts(forward=0.08, fla=0.16, align=250_000)
    assert [one.verdict for name, one in found.items() if "gated delta rule, forward, (16" in name][:2] == ["met"] * 2
    assert found["stage 1 (`align`)"].verdict == "met, aim missed"
    assert verdicts(align=249_999)["stage 1 (`align`)"].verdict == "missed, aim missed"


@pytest.mark.parametrize("commits, said", [(("a", "b"), True), (("a", "a"), False), ((None, "b"), False)])
def test_a_comparison_of_records_of_two_commits_says_so(commits, said):
    frame = tables()
    frame["operators"]["commit"] = frame["operators"]["backend"].map(dict(zip(("fused", "fla"), commits)))
    compared = [one.target for one in speed_targets.gpu_verdicts(frame)
                if "time of flash" in one.target and one.found is not None]
    assert len(compared) == 2 - said and all(("of two runs" in target) == said for target in compared)
    assert not any("as launched" in target for target in compared) or not said  # a processor is not the same twice


def test_a_step_that_misses_its_aim_says_what_its_mixers_take():
    frames = tables()
    whole = {"mixer": "gdn", "layers": [1, 2], "num_layers": 12, "batch_tokens": 16_384, "step_seconds": 0.1,
             "context": 1024}
    frames["steps"] = frames["steps"].assign(**{name: [value] * 3 for name, value in whole.items()})
    parts = {"projections": {"seconds": 2e-3}, "operator": {"seconds": 1e-3}}
    frames["mixers"] = pd.DataFrame([{"mixer": "gdn", "batch": 16, "time": 1024, "direction": "forward+backward",
                                      "parts": parts, "reason": None, "device": "NVIDIA H100"}])
    said = {one.target: one.why for one in speed_targets.gpu_verdicts(frames)}
    assert said["stage 2 (`match`)"] == (
        "Of a step's 100 ms its 10 mixers take 30, by what one takes alone; if their operators took no time at all, it "
        "would run at 182,044 tokens/s.")  # 16,384 in 90 ms
    assert "its 12 mixers take 36" in said["stage 1 (`align`)"]
    frames["mixers"]["batch"] = 8
    assert not any(one.why for one in speed_targets.gpu_verdicts(frames) if one.unit == "tokens/s")


def test_other_devices_and_empty_tables_have_no_verdict():
    for found in (speed_targets.gpu_verdicts({"operators": pd.DataFrame(), "steps": pd.DataFrame()}),
                  verdicts(device="NVIDIA H200").values()):
        assert {one.verdict for one in found} == {"not measured"}
    assert speed_targets.cpu_verdicts(pd.DataFrame()) == [] == speed_targets.cpu_verdicts(tables()["operators"])
    assert speed_targets.target_words([]) == "" and speed_targets.target_table([]).empty


def test_words_and_table_name_bound_finding_and_verdict():
    words = speed_targets.target_words(speed_targets.gpu_verdicts(tables()))
    assert words.startswith("Of 16 targets 5 met, 1 missed, 10 not measured.\n\n- gated delta rule, forward, ")
    assert "GPU time: at most 0.3 ms; 0.31 ms, **missed**." in words
    assert "- stage 2 (`match`): at least 150,000 tokens/s, aiming at 250,000; 180,000 tokens/s, **met, aim" in words
    table = speed_targets.target_table(speed_targets.gpu_verdicts(tables()))
    assert len(table) == 16 and table.loc["stage 1 (`align`)", "verdict"] == "met, aim met"


def test_committed_records_have_a_verdict_for_every_stage():
    found = speed_targets.gpu_verdicts(speed.recorded_speed(hl.Ledger(hl.results_folder("h100"))))
    assert len(found) == 16 and "not measured" not in {one.verdict for one in found if one.unit == "tokens/s"}


def test_a_cpu_is_compared_with_others_forms_of_the_same_run():
    base = {"operator": "gated_delta_rule", "batch": 1, "time": 1024, "heads": 9, "dim": 64, "dtype": "float32",
            "direction": "forward", "device": "a CPU, 2 cores", "reason": None}
    frame = pd.DataFrame([base | {"backend": "chunked", "seconds": 0.01}, base | {"backend": "transformers",
                         "seconds": 0.016}, base | {"backend": "naive", "seconds": 0.009}])
    ours, naive = speed_targets.cpu_verdicts(frame)
    assert (ours.verdict, ours.found, naive.verdict) == ("met", pytest.approx(1.6), "missed")


def test_the_peer_is_the_pytorch_form_where_transformers_would_run_kernels(monkeypatch):
    module = importlib.import_module("transformers.models.qwen3_5.modeling_qwen3_5")

    @functools.wraps(inspect.unwrap(module.torch_chunk_gated_delta_rule))
    def not_plain(*args, **kwargs):
        raise AssertionError("not the PyTorch form")

    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", not_plain)
    inputs = benchmarks.operator_inputs("gated_delta_rule", (1, 70, 2, 16))
    ours = kernels.gated_delta_rule(**inputs, backend="reference")[0]
    torch.testing.assert_close(eager.run("transformers", "gated_delta_rule", **inputs)[0], ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("peer", eager.PEERS)
@pytest.mark.parametrize("operator", benchmarks.OPERATORS[:2])
def test_peers_compute_the_operator(peer, operator, tmp_path):
    reason = benchmarks.refusal(operator, peer, 16, 16, "float32", torch.device("cpu"))
    row = benchmarks.time_operator(hl.Ledger(tmp_path, device="cpu"), operator, peer, (1, 70, 2, 16), device="cpu",
                                   repeats=3, direction="forward+backward")
    assert row["reason"] == reason
    if reason is not None:
        pytest.skip(reason)
    inputs = list(benchmarks.operator_inputs(operator, (1, 70, 2, 16)).values())
    truth = getattr(kernels, operator)(*inputs, backend="reference")
    for x, t in zip(benchmarks.operator_with(operator, peer)(*inputs), truth):
        assert (x - t).norm() <= 1e-5 * t.norm()


def test_peers_say_what_they_lack(monkeypatch):
    assert eager.why_not("transformers", "gated_linear_attention").startswith("transformers' Qwen3.5 has the gated")
    monkeypatch.setattr(eager.importlib.util, "find_spec", lambda name: None)
    assert eager.why_not("naive", "gated_delta_rule").endswith("(pip install fla-core)")
    assert "naive" not in kernels.available_backends()


def test_records_of_speed_name_their_commits(tmp_path):
    for length, commit in ((8, "a" * 40), (16, "b" * 40)):
        benchmarks.time_operator(hl.Ledger(tmp_path, device="cpu", commit=commit), "softmax_attention", "softmax",
                                 (1, length, 2, 4), device="cpu", repeats=2)
    found = speed.recorded_speed(hl.Ledger(tmp_path))
    assert " at `aaaaaaa` and `bbbbbbb`. No GPU record" in speed_report.about_speed(found)
    both = {"operators": found["operators"][:1], "steps": found["operators"][1:]}
    assert " at commits `aaaaaaa` (operators), `bbbbbbb` (steps)." in speed_report.about_speed(both)


def test_auto_takes_first_what_the_records_found_fastest():
    """`auto` runs "fused" where it can: of the backends that models run with, no record found a faster one."""
    rows = speed.recorded_speed(hl.Ledger(hl.results_folder("h100")))["operators"]
    rows = rows[rows["reason"].isna() & rows["backend"].isin(["fused", "fla", "chunked"])]
    asked = rows.groupby(["operator", "direction", "batch", "time", "heads", "dim", "dtype"])
    found = {key: part.loc[part["gpu_seconds"].fillna(part["seconds"]).idxmin(), "backend"] for key, part in asked
             if "fused" in set(part["backend"]) and len(part) > 1}
    assert len(found) >= 20 and set(found.values()) == {"fused"}
