"""Objectives: errors against the formula by hand, other people's functions called as they ask, refusals."""

import dataclasses
import importlib.util
import sys
import types

import pytest
import torch

import hybridlib as hl
from hybridlib.bench import objective as objectives
from hybridlib.bench.timing import Bench
from hybridlib.distill import objectives as losses

SHAPE = (6, 4, 9)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def measure(bench, implementation="hybridlib", shape=SHAPE, *arguments, dtype="float32", **truths):
    bench = dataclasses.replace(bench, dtype=dtype)
    return objectives.time_objective(bench, implementation, shape, *arguments, **truths)


def by_hand(teacher_hidden, teacher_head, student_hidden, student_head):
    """Loss and gradients, from sums over the vocabulary; the gradient by a token's logits is (q - p) / tokens."""
    p, q = ((x @ head.T).exp() for x, head in ((teacher_hidden, teacher_head), (student_hidden, student_head)))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    by_logits = (q - p) / len(p)
    return (p * (p / q).log()).sum() / len(p), by_logits @ student_head, by_logits.T @ student_hidden


def test_truth_is_the_formula_in_float64_slice_by_slice(monkeypatch):
    inputs = objectives.objective_inputs((7, 4, 30))
    hand = by_hand(*(x.double() for x in inputs.values()))
    assert 0.01 < hand[0] < 3  # two models not far apart
    for numbers in (2**25, 60):  # of logits at once: all tokens, or two
        monkeypatch.setattr(objectives, "_AT_ONCE", numbers)
        truth = objectives._truth(inputs)
        assert all(x.dtype == torch.float64 for x in truth.values())
        for x, y in zip(truth.values(), hand):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("implementation", ["hybridlib", "plain"])
def test_what_is_timed_is_the_loss_and_its_gradients(bench, implementation):
    row = measure(bench, implementation)
    assert row["reason"] is None and row["seconds"] > 0 and row["gpu_seconds"] is None and row["peak_bytes"] is None
    assert set(row["errors"]) == {"loss", "hidden", "head"} and 0 < max(row["errors"].values()) < 1e-5
    forward = measure(bench, implementation, SHAPE, "forward")
    assert set(forward["errors"]) == {"loss"} and forward["errors"]["loss"] < 1e-5
    half = measure(bench, implementation, (64, 16, 300), dtype="bfloat16")
    assert 1e-3 < half["errors"]["head"] < 5e-2  # logits of size 3 are rounded to bfloat16


def test_a_known_wrong_is_found(bench, monkeypatch):
    monkeypatch.setitem(objectives.IMPLEMENTATIONS, "hybridlib",
                        lambda **inputs: 1.01 * losses.divergence_from_hidden(**inputs))
    assert list(measure(bench)["errors"].values()) == pytest.approx([0.01] * 3, rel=1e-3)


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
def test_what_is_not_installed_or_needs_a_gpu_is_refused_with_a_reason(bench, monkeypatch, implementation, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert measure(bench, implementation)["reason"] == f"{package} is not installed (pip install {package})"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else name)
    assert measure(bench, implementation)["reason"] == "triton is not installed (pip install triton)"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert measure(bench, implementation)["reason"] == f"{package} needs a CUDA GPU, and this is on cpu"
    assert objectives.why_not("hybridlib", torch.device("cpu")) is None


@needs_gpu
def test_a_graph_times_the_objective_on_the_gpu(tmp_path):
    row = objectives.time_objective(Bench(hl.Ledger(tmp_path), repeats=3), "hybridlib", (512, 64, 4096))
    assert row["reason"] is None and row.get("graph_reason") is None, row
    assert row["gpu_seconds"] > 0 and row["peak_bytes"] > 0, row
