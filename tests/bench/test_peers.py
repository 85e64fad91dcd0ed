"""FlashQLA as a peer: what it cannot take by hand, its call as it asks for, FLA's own kernels where it is installed."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

import hybridlib as hl
from hybridlib import kernels
from hybridlib.bench import exactness, operators as benchmarks, speed, timing
from hybridlib.bench.peers import flash_qla
from hybridlib.kernels import fla
from hybridlib.report import speed as speed_report, speed_plots

CALL = ("gated_delta_rule", 128, 128, "bfloat16")
ON_GPU = "there is no CUDA GPU" if not torch.cuda.is_available() else flash_qla.why_not(*CALL, torch.device("cuda"))
INSTALLED = ON_GPU is None


@pytest.fixture
def ledger(tmp_path):
    return hl.Ledger(tmp_path / "records", device="cpu")


@pytest.fixture
def stand_in(monkeypatch):
    """A package `flash_qla` that keeps its documented promises by the recurrence; returns the calls it was given."""
    calls = []

    def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                               cu_seqlens=None):
        calls.append(dict(locals()))
        assert q.dtype == k.dtype == v.dtype and g.dtype == torch.float32 and len(q) == 1 and output_final_state
        return kernels.gated_delta_rule(q, k, v, g, beta, scale, initial_state, "reference", cu_seqlens)

    module = types.ModuleType("flash_qla")
    module.chunk_gated_delta_rule = chunk_gated_delta_rule
    monkeypatch.setitem(sys.modules, "flash_qla", module)
    monkeypatch.setattr(flash_qla, "why_not", lambda *arguments: None)
    return calls


@pytest.mark.parametrize("change, said", [
    ({"installed": False}, "FlashQLA is not installed (pip install flash-qla)"),
    ({"device": "cpu"}, "FlashQLA needs a CUDA GPU, and this is on cpu"),
    ({"capability": (8, 9)}, "FlashQLA needs a GPU of compute capability 9.0 (Hopper) or above, and this one has 8.9"),
    ({"operator": "gated_linear_attention"}, "FlashQLA has the gated delta rule, not gated linear attention"),
    ({"key_dim": 64}, "FlashQLA takes key_dim and value_dim of 128, not 64 and 128"),
    ({"value_dim": 256}, "FlashQLA takes key_dim and value_dim of 128, not 128 and 256"),
    ({"dtype": "float32"}, "FlashQLA takes bfloat16 and float16, not float32"),
    ({}, None), ({"dtype": "float16", "capability": (10, 0)}, None),
])
def test_it_says_why_not(monkeypatch, change, said):
    here = {"operator": CALL[0], "key_dim": 128, "value_dim": 128, "dtype": "bfloat16", "device": "cuda",
            "installed": True, "capability": (9, 0)} | change
    installed, capability = here.pop("installed"), here.pop("capability")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert flash_qla.why_not(**here | {"device": torch.device(here["device"])}) == said


@pytest.mark.parametrize("with_state", [False, True])
def test_a_batch_is_given_as_one_packed_row_and_comes_back_as_it_was(stand_in, with_state):
    inputs = list(benchmarks.operator_inputs("gated_delta_rule", (2, 5, 3, 8)).values())
    inputs += [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))] if with_state else []
    results = []
    for run in (flash_qla.gated_delta_rule, kernels.gated_delta_rule):
        leaves = [x.clone().requires_grad_() for x in inputs]
        o, state = run(*leaves[:5], initial_state=leaves[5] if with_state else None)
        assert o.shape == (2, 5, 3, 8) and state.shape == (2, 3, 8, 8)
        results.append([o, state, *torch.autograd.grad(o.sin().sum() + state.cos().sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_it_is_called_without_copies_and_with_the_same_borders_each_time(stand_in):
    inputs = benchmarks.operator_inputs("gated_delta_rule", (3, 4, 2, 8))
    for _ in range(2):
        flash_qla.gated_delta_rule(*inputs.values(), scale=0.5)
    first, again = stand_in
    assert first["q"].shape == (1, 12, 2, 8) and first["beta"].shape == first["g"].shape == (1, 12, 2)
    assert all(first[theirs].data_ptr() == inputs[ours].data_ptr() and first[theirs].is_contiguous()
               for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("g", "log_decay"), ("beta", "beta")))
    assert first["cu_seqlens"].tolist() == [0, 4, 8, 12] and first["cu_seqlens"].dtype == torch.int32
    assert first["cu_seqlens"] is again["cu_seqlens"] and (first["scale"], first["initial_state"]) == (0.5, None)


def test_models_cannot_run_with_it():
    inputs = benchmarks.operator_inputs("gated_delta_rule", (1, 4, 1, 8))
    with pytest.raises(ValueError, match="^backend='flash_qla' is unknown"):
        kernels.gated_delta_rule(*inputs.values(), backend="flash_qla")
    assert "flash_qla" not in kernels.available_backends() and "flash_qla" not in speed.SpeedSettings().backends
    with pytest.raises(ValueError, match="^plain_backend='flash_qla' is unknown"):
        speed.SpeedSettings(plain_backend="flash_qla")
    profiles = Path(__file__).parents[2] / "notebooks" / "profiles" / "mixers_and_speed"
    listed = {path.stem for path in profiles.glob("*.yaml")
              if "flash_qla" in yaml.safe_load(path.read_text(encoding="utf-8"))["backends"]}
    assert listed == {"gpu"}


def test_a_timing_where_it_cannot_run_is_a_row_with_its_reason(ledger, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    row = benchmarks.time_operator(ledger, "gated_delta_rule", "flash_qla", (1, 16, 2, 8), device="cpu", repeats=3)
    assert row["reason"] == "FlashQLA needs a CUDA GPU, and this is on cpu" and "seconds" not in row
    frame = pd.DataFrame([row])
    assert speed_report.refusals(frame).values.tolist() == [["flash_qla", row["reason"]]]
    assert speed_report.operator_table(frame).empty and speed_report.operator_words(frame) == ""


def test_its_timing_stands_beside_the_others(ledger, stand_in):
    rows = [benchmarks.time_operator(ledger, "gated_delta_rule", backend, (1, 16, 2, 8), device="cpu", repeats=3,
                                     direction="forward+backward") for backend in ("reference", "flash_qla")]
    assert [row["reason"] for row in rows] == [None, None] and rows[1]["seconds"] > 0
    assert stand_in[0]["q"].requires_grad
    frame = pd.DataFrame(rows)
    table = speed_report.operator_table(frame, "forward+backward")
    assert ("gated delta rule", "flash_qla", "(1, 16, 2, 8)") in table.index
    assert "flash_qla" in speed_report.operator_words(frame) and set(speed_plots.operator_curves(frame)["backend"]) == {
        "reference", "flash_qla"}


def test_exactness_gives_it_the_cases_that_it_takes(ledger, stand_in, monkeypatch):
    takes = ["dims 128", "2 x 4096 x 16 x 128"]
    assert list(exactness.cases_for("gated_delta_rule", "flash_qla", "bfloat16")) == takes
    assert not exactness.cases_for("gated_delta_rule", "flash_qla", "float32")
    assert not exactness.cases_for("gated_linear_attention", "flash_qla", "bfloat16")
    monkeypatch.setitem(exactness.CASES, "dims 128", exactness.Case(2, 5, 1, 128, 128))
    row = exactness.measure_exactness(ledger, "gated_delta_rule", "flash_qla", ["dims 128", "length 63"],
                                      dtype="bfloat16", device="cpu")
    assert row["reason"] is None and list(row["cases"]) == list(row["errors"]) == ["dims 128"]
    assert set(row["errors"]["dims 128"]) == {"output", "final state", *(
        f"gradient of {name}" for name in ("q", "k", "v", "log decay", "beta", "initial state"))}
    assert 1e-4 < max(row["errors"]["dims 128"].values()) <= exactness.error_bound("flash_qla", "bfloat16")
    assert "`flash_qla`, bfloat16: at most" in speed_report.exactness_words(pd.DataFrame([row]))


@pytest.mark.parametrize("before", [None, "1"])
@pytest.mark.parametrize("fails", [False, True])
def test_fla_is_told_not_to_hand_its_call_over(monkeypatch, before, fails):
    seen = []

    def chunk_gated_delta_rule(q, k, v, g, beta, **options):
        seen.append(os.environ.get("FLA_FLASH_QLA"))
        return 1 / 0 if fails else (v, None)

    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[name].chunk_gated_delta_rule = chunk_gated_delta_rule
    if before is None:
        monkeypatch.delenv("FLA_FLASH_QLA", raising=False)
    else:
        monkeypatch.setenv("FLA_FLASH_QLA", before)
    inputs = list(benchmarks.operator_inputs("gated_delta_rule", (1, 4, 1, 8)).values())
    if fails:
        with pytest.raises(ZeroDivisionError):
            fla.gated_delta_rule(*inputs, 1.0, None)
    else:
        assert fla.gated_delta_rule(*inputs, 1.0, None)[0] is inputs[2]
    assert seen == ["0"] and os.environ.get("FLA_FLASH_QLA") == before  # elsewhere it may, as it might before


@pytest.mark.skipif(not INSTALLED, reason=f"flash_qla: {ON_GPU}")
@pytest.mark.parametrize("shape", [(2, 130, 3, 128), (2, 1024, 2, 128), (1, 4096, 2, 128)])
def test_flash_qla_agrees(shape):
    inputs = benchmarks.operator_inputs("gated_delta_rule", shape, "bfloat16", "cuda")
    state = torch.randn(shape[0], shape[2], 128, 128, device="cuda")
    results = []
    for run, dtype in ((flash_qla.gated_delta_rule, None), (kernels.gated_delta_rule, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (*inputs.values(), state)]
        try:
            o, final = run(*leaves[:5], initial_state=leaves[5])
        except Exception as error:  # TileLang's compiler refuses some of FlashQLA's kernels
            if type(error).__name__ != "InternalError":
                raise
            pytest.skip(f"FlashQLA does not compile for {shape}: {timing.sentence(error)}")
        results.append([o, final, *torch.autograd.grad((o, final), leaves, [inputs["v"].to(o), state.to(final)])])
    for found, expected in zip(*results, strict=True):
        assert exactness.relative_error(found, expected) < 2e-2


@pytest.mark.skipif(fla.why_not() is not None or importlib.util.find_spec("flash_qla") is None,
                    reason=f"fla: {fla.why_not()}; or flash_qla is not installed")
def test_fla_itself_runs_its_own_kernels(monkeypatch):
    def theirs(**inputs):
        raise AssertionError("FLA handed its call to FlashQLA")

    import flash_qla as package

    monkeypatch.setattr(package, "chunk_gated_delta_rule", theirs)
    inputs = benchmarks.operator_inputs("gated_delta_rule", (1, 128, 2, 128), "bfloat16", "cuda")
    with torch.no_grad():
        assert kernels.gated_delta_rule(*inputs.values(), backend="fla")[0].isfinite().all()
