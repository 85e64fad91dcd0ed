"""Objectives: errors against the formula by hand, other people's functions called as they ask, refusals."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
import warnings

import pandas as pd
import pytest
import torch

import hybridlib as hl
from hybridlib.bench import objective as objectives, timing
from hybridlib.distill import objectives as losses
from hybridlib.report import speed as speed_report

SHAPE = (6, 4, 9)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def ledger(tmp_path):
    return hl.Ledger(tmp_path / "records", device="cpu")


def measure(ledger, implementation="hybridlib", shape=SHAPE, **settings):
    return objectives.time_objective(ledger, implementation, shape, device="cpu", repeats=3, **settings)


def by_hand(teacher_hidden, teacher_head, student_hidden, student_head):
    """Loss and gradients, from sums over the vocabulary; the gradient by a token's logits is (q - p) / tokens."""
    p, q = ((x @ head.T).exp() for x, head in ((teacher_hidden, teacher_head), (student_hidden, student_head)))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    by_logits = (q - p) / len(p)
    return (p * (p / q).log()).sum() / len(p), by_logits @ student_head, by_logits.T @ student_hidden


def test_inputs_are_two_models_not_far_apart():
    inputs = objectives.objective_inputs((50, 8, 90), "bfloat16")
    assert [tuple(x.shape) for x in inputs.values()] == [(50, 8), (90, 8), (50, 8), (90, 8)]
    assert {x.dtype for x in inputs.values()} == {torch.bfloat16}
    loss = by_hand(*(x.double() for x in inputs.values()))[0]
    assert 0.01 < loss < 3
    other = objectives.objective_inputs((50, 8, 90), "bfloat16", seed=1)
    assert not torch.equal(inputs["student_head"], other["student_head"])


def test_truth_is_the_formula_in_float64_slice_by_slice(monkeypatch):
    inputs = objectives.objective_inputs((7, 4, 30))
    hand = by_hand(*(x.double() for x in inputs.values()))
    for numbers in (2**25, 60):  # of logits at once: all tokens, or two
        monkeypatch.setattr(objectives, "_AT_ONCE", numbers)
        truth = objectives._truth(inputs)
        assert all(x.dtype == torch.float64 for x in truth.values())
        for x, y in zip(truth.values(), hand):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("implementation", ["hybridlib", "plain"])
def test_what_is_timed_is_the_loss_and_its_gradients(ledger, implementation):
    row = measure(ledger, implementation)
    assert row["reason"] is None and row["seconds"] > 0 and row["gpu_seconds"] is None and row["peak_bytes"] is None
    assert set(row["errors"]) == {"loss", "hidden", "head"} and 0 < max(row["errors"].values()) < 1e-5
    forward = measure(ledger, implementation, direction="forward")
    assert set(forward["errors"]) == {"loss"} and forward["errors"]["loss"] < 1e-5
    half = measure(ledger, implementation, (64, 16, 300), dtype="bfloat16")
    assert 1e-3 < half["errors"]["head"] < 5e-2  # logits of size 3 are rounded to bfloat16


def test_a_known_wrong_is_found(ledger, monkeypatch):
    monkeypatch.setitem(objectives.IMPLEMENTATIONS, "hybridlib",
                        lambda **inputs: 1.01 * losses.divergence_from_hidden(**inputs))
    assert list(measure(ledger)["errors"].values()) == pytest.approx([0.01] * 3, rel=1e-3)


def test_truths_are_kept_for_the_next_implementation_and_records_for_the_next_question(ledger, monkeypatch):
    made, truth, truths = [], objectives._truth, {}
    monkeypatch.setattr(objectives, "_truth", lambda inputs: made.append(1) or truth(inputs))
    first = measure(ledger, truths=truths)
    measure(ledger, "plain", truths=truths)
    assert made == [1] and list(truths) == [SHAPE]
    assert measure(ledger) == first and len(ledger.find("objective_speed")) == 2


def test_others_are_called_with_their_own_order_of_arguments(monkeypatch):
    inputs = objectives.objective_inputs(SHAPE)
    settings = {}

    class Theirs:
        def __init__(self, **given):
            settings.update(given)

        def __call__(self, *tensors):
            return [x if x is None else next(name for name, y in inputs.items() if x is y) for x in tensors]

    for package, module, name in (("fla", "modules", "FusedKLDivLoss"),
                                  ("liger_kernel", "transformers", "LigerFusedLinearJSD")):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        monkeypatch.setitem(sys.modules, f"{package}.{module}", types.ModuleType(module))
        setattr(sys.modules[f"{package}.{module}"], name, Theirs)
    assert objectives.IMPLEMENTATIONS["fla"](**inputs) == ["student_hidden", "teacher_hidden", "student_head",
                                                           "teacher_head"] and settings == {}
    assert objectives.IMPLEMENTATIONS["liger"](**inputs) == ["student_hidden", "student_head", "teacher_hidden",
                                                             "teacher_head", None] and settings == {"jsd_beta": 0.0}


@pytest.mark.parametrize("implementation, package", [("fla", "flash-linear-attention"), ("liger", "liger-kernel")])
def test_what_is_not_installed_or_needs_a_gpu_is_refused_with_a_reason(ledger, monkeypatch, implementation, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert measure(ledger, implementation)["reason"] == f"{package} is not installed (pip install {package})"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else name)
    assert measure(ledger, implementation)["reason"] == "triton is not installed (pip install triton)"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert measure(ledger, implementation)["reason"] == f"{package} needs a CUDA GPU, and this is on cpu"
    assert objectives.why_not("hybridlib", "cpu") is None


def test_a_lack_of_memory_is_a_row_with_its_reason(ledger, monkeypatch):
    def too_large(**inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    ours = measure(ledger)
    monkeypatch.setitem(objectives.IMPLEMENTATIONS, "plain", too_large)
    row = measure(ledger, "plain")
    assert row["reason"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB."
    frame = pd.DataFrame([ours, row])
    assert "`plain` could not run: OutOfMemoryError: CUDA" in speed_report.objective_words(frame)
    assert len(speed_report.objective_table(frame)) == 1


def test_words_and_tables_compare_with_hybridlib():
    row = {"tokens": 16384, "width": 576, "vocab": 49152, "dtype": "bfloat16", "direction": "forward+backward",
           "reason": None, "seconds": 8e-3, "low": 7e-3, "high": 9e-3, "gpu_seconds": 6e-3, "gpu_low": 5e-3,
           "gpu_high": 7e-3, "peak_bytes": 2**28, "errors": {"loss": 1e-4, "hidden": 3e-3, "head": 2e-3}}
    frame = pd.DataFrame([row | {"implementation": "hybridlib"},
                          row | {"implementation": "plain", "gpu_seconds": 24e-3, "peak_bytes": 2**32},
                          row | {"implementation": "liger", "gpu_seconds": None, "seconds": 20e-3}])
    words = speed_report.objective_words(frame)
    error = "error at most 3.0e-03 (gradient of hidden states)"
    assert words == ("- 16,384 tokens of width 576, vocabulary 49,152, bfloat16, with gradients: **hybridlib** 6 ms of "
                     f"GPU time, 256 MiB at the peak, {error}; `plain` 4.00 times hybridlib's time (of GPU time) and "
                     f"16.0 times the memory, {error}; `liger` 2.50 times hybridlib's time (as launched) and 1.0 times "
                     f"the memory, {error}.")
    table = speed_report.objective_table(frame)
    line = table.loc[("(16384, 576, 49152), bfloat16", "plain", "forward+backward")]
    assert line.tolist() == ["8 [7, 9]", "24 [5, 7]", "4,096", "1.0e-04", "3.0e-03", "2.0e-03"]
    assert table.iloc[2]["GPU, ms"] == "\u2013"
    assert "**hybridlib**" not in speed_report.objective_words(frame[1:2])


@pytest.mark.parametrize("change, sentence", [
    ({"implementation": "theirs"}, "implementation='theirs' is unknown"),
    ({"shape": (1, 2)}, r"shape=\(1, 2\) is not \(tokens, width, vocab\)"), ({"shape": (1, 0, 2)}, "shape="),
    ({"direction": "up"}, "direction='up' is unknown"), ({"dtype": "int8"}, "dtype='int8' is unknown"),
])
def test_bad_arguments_are_refused_before_any_compute(ledger, change, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        measure(ledger, **change)
    assert not ledger.folder.exists()


@pytest.mark.parametrize("fails", [False, True])
def test_torch_s_mode_that_finds_what_waits_is_then_as_it_was(monkeypatch, fails):
    modes = [1]  # torch's number of "warn"

    def set_mode(mode):
        modes.append(mode)
        if mode == "error":
            warnings.warn("this mode does not see everything", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="^this waits$") if fails else contextlib.nullcontext():
            with timing._no_waiting():
                assert modes == [1, "error"]
                if fails:
                    raise RuntimeError("this waits")
    assert modes == [1, "error", 1]


@needs_gpu
def test_a_graph_times_the_objective_on_the_gpu(tmp_path):
    row = objectives.time_objective(hl.Ledger(tmp_path), "hybridlib", (512, 64, 4096), repeats=3)
    assert row["reason"] is None and row.get("graph_reason") is None, row
    assert row["gpu_seconds"] > 0 and row["peak_bytes"] > 0, row


@needs_gpu
def test_a_call_that_waits_is_not_captured(monkeypatch, tmp_path):
    def waits(**inputs):
        loss = losses.divergence_from_hidden(**inputs)
        return loss if loss.item() > 0 else -loss

    captured, capture = [], torch.cuda.graph
    monkeypatch.setattr(torch.cuda, "graph", lambda *graphs: captured.append(1) or capture(*graphs))
    monkeypatch.setitem(objectives.IMPLEMENTATIONS, "plain", waits)
    row = objectives.time_objective(hl.Ledger(tmp_path), "plain", (512, 64, 4096), repeats=3)
    assert row["reason"] is None and row["gpu_seconds"] is None and row["graph_reason"], row
    assert not captured and torch.cuda.get_sync_debug_mode() == 0, row
    row = objectives.time_objective(hl.Ledger(tmp_path), "hybridlib", (512, 64, 4096), repeats=3)
    assert captured and row.get("graph_reason") is None and row["gpu_seconds"] > 0, row  # nothing was spoilt
