"""Operators and their peers: the floor by hand, calls against the recurrence, what cannot run."""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import sys
import types

import pytest
import torch

import hybridlib as hl
from hybridlib import kernels
from hybridlib.bench import operators, peers, timing
from hybridlib.bench.exactness import relative_error
from hybridlib.bench.timing import Bench

FLASH_QLA = ("flash_qla", "gated_delta_rule", 128, "bfloat16")
REFUSAL = ("there is no CUDA GPU" if not torch.cuda.is_available() else
           peers.why_not(*FLASH_QLA, torch.device("cuda")))


@pytest.fixture
def stand_in(monkeypatch):
    """A package `flash_qla` that keeps its documented promises by the recurrence; the calls that it gets."""
    calls = []

    def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                               cu_seqlens=None):
        calls.append(dict(locals()))
        assert q.dtype == k.dtype == v.dtype and g.dtype == torch.float32 and len(q) == 1 and output_final_state
        return kernels.gated_delta_rule(q, k, v, g, beta, scale, initial_state, "reference", cu_seqlens)

    module = types.ModuleType("flash_qla")
    module.chunk_gated_delta_rule = chunk_gated_delta_rule
    monkeypatch.setitem(sys.modules, "flash_qla", module)
    monkeypatch.setattr(peers, "why_not", lambda *arguments: None)
    return calls


def test_floor_counts_inputs_outputs_and_gradients():
    shape, tokens = (2, 8, 3, 4), 2 * 8 * 3
    qkvo, half = 4 * tokens * 4, 2  # numbers of q, k, v and o; bytes of bfloat16
    gates = tokens * (4 + half)  # log_decay in float32, beta like q
    inputs = operators.operator_inputs("gated_delta_rule", shape, "bfloat16")
    assert operators.memory_floor(inputs) == qkvo * half + gates
    both = operators.memory_floor(inputs, "forward+backward")
    assert both == (3 * 3 + 2) * tokens * 4 * half + 3 * gates
    gla = operators.operator_inputs("gated_linear_attention", shape, "float32")
    assert operators.memory_floor(gla) == qkvo * 4 + tokens * 4 * 4
    assert operators.memory_floor(operators.operator_inputs("softmax_attention", shape)) == qkvo * 4


def test_what_is_timed_is_the_operator_and_its_gradients():
    inputs = operators.operator_inputs("gated_delta_rule", (1, 16, 2, 8))
    o = operators._call("gated_delta_rule", "chunked", inputs, False)()
    assert torch.equal(o, kernels.gated_delta_rule(*inputs.values(), backend="chunked")[0]) and not o.requires_grad
    grads = operators._call("gated_delta_rule", "chunked", inputs, True)()
    assert [g.shape for g in grads] == [x.shape for x in inputs.values()]
    q, k, v = (x.detach() for x in list(inputs.values())[:3])
    o = operators._call("softmax_attention", "softmax", {"q": q, "k": k, "v": v}, False)()
    last = (q[0, -1, 0] @ k[0, :, 0].T / 8**0.5).softmax(-1) @ v[0, :, 0]
    assert torch.allclose(o[0, -1, 0], last, atol=1e-6)


def test_a_record_has_its_floor_and_one_copy_serves_all(bench):
    arguments = ("gated_delta_rule", "chunked", (1, 16, 2, 8))
    row = operators.time_operator(bench, *arguments)
    assert row["reason"] is None and row["gpu_seconds"] is None and row["peak_bytes"] is None
    copied = timing.time_copy(bench)
    assert row["floor_seconds"] == row["floor_bytes"] / copied["bytes_per_second"]
    operators.time_operator(dataclasses.replace(bench, recompute=True), *arguments)
    operators.time_operator(bench, *arguments, "forward+backward")
    assert len(bench.ledger.find("operator_speed")) == 2 and timing.time_copy(bench) == copied


@pytest.mark.parametrize("change, reason", [
    ({"installed": False}, "FlashQLA is not installed (pip install flash-qla)"),
    ({"device": "cpu"}, "FlashQLA needs a CUDA GPU, and this is on cpu"),
    ({"capability": (8, 9)}, "FlashQLA needs compute capability 9.0 or above, and this GPU has 8.9"),
    ({"operator": "gated_linear_attention"}, "flash_qla has the gated delta rule, not gated linear attention"),
    ({"dim": 64}, "FlashQLA takes keys and values of 128 dims, not 64"),
    ({"dtype": "float32"}, "FlashQLA takes bfloat16 and float16, not float32"),
    ({}, None), ({"dtype": "float16", "capability": (10, 0)}, None)])
def test_flash_qla_says_why_not(monkeypatch, change, reason):
    call = {"operator": "gated_delta_rule", "dim": 128, "dtype": "bfloat16", "device": "cuda", "installed": True,
            "capability": (9, 0)} | change
    installed, capability = call.pop("installed"), call.pop("capability")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert peers.why_not("flash_qla", **call | {"device": torch.device(call["device"])}) == reason


def test_the_peer_is_the_pytorch_form_where_transformers_would_run_kernels(monkeypatch):
    module = importlib.import_module("transformers.models.qwen3_5.modeling_qwen3_5")

    @functools.wraps(inspect.unwrap(module.torch_chunk_gated_delta_rule))
    def not_plain(*args, **kwargs):
        raise AssertionError("not the PyTorch form")

    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", not_plain)
    inputs = operators.operator_inputs("gated_delta_rule", (1, 70, 2, 16))
    ours = kernels.gated_delta_rule(**inputs, backend="reference")[0]
    theirs = operators.operator_with("gated_delta_rule", "transformers")(*inputs.values())[0]
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_state", [False, True])
def test_a_batch_is_given_as_one_packed_row_and_comes_back_as_it_was(stand_in, with_state):
    inputs = list(operators.operator_inputs("gated_delta_rule", (2, 5, 3, 8)).values())
    inputs += [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))] if with_state else []
    results = []
    for run in (peers.gated_delta_rule("flash_qla"), kernels.gated_delta_rule):
        leaves = [x.clone().requires_grad_() for x in inputs]
        o, state = run(*leaves[:5], initial_state=leaves[5] if with_state else None)
        assert o.shape == (2, 5, 3, 8) and state.shape == (2, 3, 8, 8)
        results.append([o, state, *torch.autograd.grad(o.sin().sum() + state.cos().sum(), leaves)])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_flash_qla_is_called_without_copies_and_with_the_same_borders_each_time(stand_in):
    inputs = operators.operator_inputs("gated_delta_rule", (3, 4, 2, 8))
    for _ in range(2):
        peers.gated_delta_rule("flash_qla")(*inputs.values(), scale=0.5)
    first, again = stand_in
    assert first["q"].shape == (1, 12, 2, 8) and first["beta"].shape == first["g"].shape == (1, 12, 2)
    assert all(first[theirs].data_ptr() == inputs[ours].data_ptr() and first[theirs].is_contiguous()
               for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("g", "log_decay"), ("beta", "beta")))
    assert first["cu_seqlens"].tolist() == [0, 4, 8, 12] and first["cu_seqlens"].dtype == torch.int32
    assert first["cu_seqlens"] is again["cu_seqlens"] and (first["scale"], first["initial_state"]) == (0.5, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_times_the_same_calls_on_the_gpu(tmp_path):
    row = operators.time_operator(Bench(hl.Ledger(tmp_path), repeats=3), "gated_delta_rule", "chunked",
                                  (2, 256, 4, 64), "forward+backward")
    assert row["reason"] is None and "graph_reason" not in row and row["peak_bytes"] > 0
    assert row["gpu_seconds"] > row["floor_seconds"]


@pytest.mark.skipif(REFUSAL is not None, reason=f"flash_qla: {REFUSAL}")
@pytest.mark.parametrize("shape", [(2, 130, 3, 128), (2, 1024, 2, 128), (1, 4096, 2, 128)])
def test_flash_qla_agrees(shape):
    inputs = operators.operator_inputs("gated_delta_rule", shape, "bfloat16", "cuda")
    state = torch.randn(shape[0], shape[2], 128, 128, device="cuda")
    results = []
    for run, dtype in ((peers.gated_delta_rule("flash_qla"), None), (kernels.gated_delta_rule, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (*inputs.values(), state)]
        try:
            o, final = run(*leaves[:5], initial_state=leaves[5])
        except Exception as error:  # TileLang's compiler refuses some of FlashQLA's kernels
            if type(error).__name__ != "InternalError":
                raise
            pytest.skip(f"FlashQLA does not compile for {shape}: {timing.error_line(error)}")
        results.append([o, final, *torch.autograd.grad((o, final), leaves, [inputs["v"].to(o), state.to(final)])])
    for theirs, truth in zip(*results, strict=True):
        assert relative_error(theirs, truth) < 2e-2
