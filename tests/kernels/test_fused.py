"""The fused kernels against the recurrence in float64: on a GPU, and elsewhere in Triton's interpreter."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from hybridlib import kernels
from hybridlib.kernels import fused, step
from hybridlib.kernels.fused import launch
from hybridlib.models.mixers import MixerState, build_mixer
from tests.kernels.cases import DECAYS, OPERATORS, error, make_inputs, results
from tests.kernels.interpreter import interpret_as_gpus_compute

BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # relative, Frobenius

ON_GPU = [(operator, dtype) for operator in OPERATORS for dtype in (torch.float32, torch.bfloat16)]

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def run(operator, inputs, state, backend, dtype=None, **options):
    operate = getattr(kernels, OPERATORS[operator])
    return results(lambda *x: operate(*x[:-1], initial_state=x[-1], backend=backend, **options), inputs, state, dtype)


def gradients_agree_when_compiled(operator, inputs, state, **options):
    """Assert that torch.compile takes a call of the operator whole, with the same results and gradients."""
    def fused_only(*tensors):
        return getattr(kernels, OPERATORS[operator])(*tensors[:-1], initial_state=tensors[-1], backend="fused")

    results = []
    for f in (fused_only, torch.compile(fused_only, fullgraph=True, **options)):
        tensors = [x.clone().requires_grad_() for x in (*inputs, state)]
        o, final = f(*tensors)
        results.append([o, final, *torch.autograd.grad(o.float().sum() + final.square().sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def check(operator, inputs, state, bound, **options):
    exact = "reference" if inputs[0].shape[1] < 1000 else "chunked"
    truth = run(operator, inputs, state, exact, torch.float64, **options)
    found = run(operator, inputs, state, "fused", **options)
    names = ["o", "state", "q", "k", "v", "log_decay", *(["beta"] if operator == "gdn" else []), "initial_state"]
    for name, x, t in zip(names, found, truth):
        assert error(x, t) <= bound, f"{name}: {error(x, t):.1e} > {bound:.1e}"
    return found


SQUARE = {"key_dim": 64, "value_dim": 64}
CASES = [*(SQUARE | {"decay": decay} for decay in DECAYS), *(SQUARE | {"time": time} for time in (1, 63, 64, 65, 4097)),
         *({"key_dim": key_dim, "value_dim": value_dim} for key_dim, value_dim in (
             (32, 32), (128, 128), (32, 128), (128, 64), (64, 128), (64, 32)))]
WRITES = [SQUARE | {"beta": beta, "repeat_keys": repeat} for beta in ("zero", "one", "random")
          for repeat in (True, False)]
HALF = [SQUARE | {"decay": decay} for decay in DECAYS if not decay.startswith("strong")]  # exp(-20) is 0 in float16


@on_gpu
@pytest.mark.parametrize("operator, dtype, case", [
    *((*kind, case) for kind in ON_GPU for case in CASES), *((*kind, case) for kind in ON_GPU[:2] for case in WRITES),
    *((operator, torch.float16, case) for operator in OPERATORS for case in HALF)])
def test_kernels_against_the_recurrence(operator, dtype, case):
    check(operator, *make_inputs(operator, dtype=dtype, device="cuda", **{"time": 130} | case), BOUNDS[dtype])


def check_delta_rule_inputs(key_dim, value_dim, dtype, bound, by_batch=False, device="cpu", **compiled):
    """Hold what the gated delta rule is given, and the gradients of that, against PyTorch in float64."""
    (batch, time, heads), random = (2, 45, 3), torch.Generator().manual_seed(key_dim)
    whole = torch.randn(batch, time, heads * (2 * key_dim + value_dim + 2) + 7, generator=random) * 3
    whole[0, 0] = 0  # silu of it has no length
    whole = whole.to(dtype)
    few = (batch, 1, heads) if by_batch else (heads,)
    own = [torch.randn(few, generator=random), torch.randn(few, generator=random) - 4]
    weights = [torch.randn(x, generator=random).to(dtype) for x in (
        (batch, time, heads, key_dim),) * 2 + ((batch, time, heads, value_dim),) + ((batch, time, heads),) * 2]
    weights[0][0, 0] = weights[1][0, 0] = 0  # where the gradient is as large as 1e6

    def run(backend, wide=None, wrap=lambda f: f):
        tensors = [x.to(device, wide or x.dtype).requires_grad_() for x in (whole, *own)]

        def compute(whole, A_log, dt_bias):
            sizes = [heads * key_dim] * 2 + [heads * value_dim, heads, heads, 7]
            *qkv, a, b, _ = whole.split(sizes, -1)
            q, k, v = (x.unflatten(-1, (heads, -1)) for x in qkv)
            return kernels.delta_rule_inputs(q, k, v, a, b, A_log, dt_bias, backend)

        found = wrap(compute)(*tensors)
        seeds = [w.to(x) for w, x in zip(weights, found, strict=True)]
        return [*(x.detach() for x in found), *torch.autograd.grad(found, tensors, seeds)]

    truth, found = run("reference", torch.float64), run("auto")
    for name, x, t in zip(("q", "k", "v", "log_decay", "beta", "projections", "A_log", "dt_bias"), found, truth):
        assert error(x, t) <= bound, f"{name}: {error(x, t):.1e} > {bound:.1e}"
    again = run("auto", wrap=lambda f: torch.compile(f, fullgraph=True, **compiled))
    assert all(torch.equal(x, y) for x, y in zip(found[:5], again))


def check_steps(operator, key_dim, value_dim, dtype, decay="mild", beta="random", time=40, device="cpu"):
    """Hold steps, a token after another, against the recurrence in float64; the states given are not written to."""
    inputs, first = make_inputs(operator, time, key_dim, value_dim, dtype, decay, beta, heads=2, device=device)
    truth, last = getattr(kernels, OPERATORS[operator])(*(x.double() for x in inputs), initial_state=first.double(),
                                                        backend="reference")
    assert fused.takes_step("auto", (key_dim, value_dim), *inputs, first)
    state, before, outputs = first, first.clone(), []
    for t in range(time):
        o, state = getattr(step, OPERATORS[operator])(*(x[:, t] for x in inputs), state)
        outputs.append(o)
    assert o.dtype == dtype and state.dtype == torch.float32 and torch.equal(first, before)
    assert error(torch.stack(outputs, 1), truth) <= (1e-5 if dtype == torch.float32 else 1e-2)
    assert error(state, last) <= 1e-5 or last.norm() < 1e-30  # of float32's smallest few digits are left


def check_step_strides(operator, device="cpu"):
    """Rows of wider tensors, heads that are not dense, a state in another order and of bfloat16, a scale of its own."""
    inputs, state = make_inputs(operator, 1, 32, 64, torch.float32, device=device)
    token, state = [x[:, 0] for x in inputs], state.bfloat16().mT.contiguous().mT
    token[0] = torch.cat([token[0], token[0]], 1)[:, :3]
    token[2] = torch.stack([token[2], token[2]], 2)[:, :, 1]
    run = getattr(step, OPERATORS[operator])
    for x, y in zip(run(*token, state, 2.5), run(*token, state, 2.5, backend="reference"), strict=True):
        assert x.dtype == y.dtype == torch.float32 and error(x, y.double()) <= 1e-6


def check_gated_norm(dim, dtype, weight_dtype, device="cpu"):
    random = torch.Generator().manual_seed(dim)
    o, g = torch.randn(2, 5, 3, 2 * dim, generator=random).to(device, dtype)[:, 2].split(dim, -1)
    weight = torch.randn(dim, generator=random).to(device, weight_dtype)
    normed = torch.nn.functional.rms_norm(o.double(), (dim,), weight.double(), 1e-6)
    made = fused.gated_norm(o, g, weight, 1e-6)
    assert made.dtype == dtype and made.shape == o.shape
    assert error(made, normed * torch.nn.functional.silu(g.double())) <= (1e-6 if dtype == torch.float32 else 1e-2)


def check_mixer_steps(name, half, qk_norm=False, device="cpu"):
    """Hold a mixer that reads a token at a time by kernels against one that reads them at once in PyTorch.

    half: None for float32, "weights" or "autocast" for bfloat16.
    """
    torch.manual_seed(0)
    mixer = build_mixer(name, SimpleNamespace(
        num_attention_heads=2, head_dim=32, hidden_size=48, mixer_qkv_bias=True, mixer_o_bias=False, rms_norm_eps=1e-6,
        mixer_qk_norm=qk_norm), 0)
    mixer.init_gates(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(mixer.o_norm.weight)
    mixer, x = mixer.to(device), torch.randn(2, 9, 48).to(device)
    with torch.no_grad():
        mixer.backend = "reference"
        expected = mixer(x)[0]
        mixer.backend, cache, dtype = "auto", DynamicCache(), torch.bfloat16 if half == "weights" else torch.float32
        cache.layers, mixer, x = [MixerState()], mixer.to(dtype), x.to(dtype)
        with torch.autocast(device, torch.bfloat16, enabled=half == "autocast"):
            parts = [mixer(x[:, start:end], past_key_values=cache)[0]
                     for start, end in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9))]
    assert fused.takes_step("auto", (32, 32), parts[0].detach())
    assert {part.dtype for part in parts} == {torch.bfloat16 if half else torch.float32}
    assert error(torch.cat(parts, 1), expected.double()) <= (2e-2 if half else 1e-5)


FLOATS = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
NORMS = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
STEPS = [*((64, 64, {"decay": decay, "time": 400}) for decay in DECAYS),
         *((*dims, {}) for dims in ((16, 16), (32, 32), (128, 128), (256, 256), (64, 256), (256, 32))),
         *((64, 64, {"beta": beta}) for beta in ("zero", "one"))]


@on_gpu
@pytest.mark.parametrize("check, arguments, options", [
    *((check_delta_rule_inputs, (*dims, *kind), {"by_batch": by_batch}) for by_batch in (False, True) for kind in FLOATS
      for dims in ((32, 32), (64, 64), (128, 128), (64, 128))),
    *((check_steps, (operator, *dims, dtype), options) for operator, dtype in ON_GPU for *dims, options in STEPS),
    *((check_step_strides, (operator,), {}) for operator in OPERATORS),
    *((check_gated_norm, (dim, *dtypes), {}) for dim in (16, 32, 64, 128, 256) for dtypes in NORMS),
    *((check_mixer_steps, (name, half, True), {}) for name in OPERATORS for half in (None, "weights", "autocast"))])
def test_around_the_operators(check, arguments, options):
    check(*arguments, device="cuda", **options)


@on_gpu
@pytest.mark.parametrize("operator, dtype", ON_GPU)
def test_a_step_in_a_cuda_graph(operator, dtype):
    inputs, state = make_inputs(operator, 1, 64, 64, dtype, device="cuda")
    token, run = [x[:, 0] for x in inputs], getattr(step, OPERATORS[operator])
    run(*token, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*token, state)
    state.mul_(2)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, run(*token, state), strict=True))


@pytest.mark.parametrize("operator", OPERATORS)
def test_which_steps_the_kernels_take(monkeypatch, operator):
    inputs, state = make_inputs(operator, 1, 32, 64, torch.float32)
    token, run, calls = [x[:, 0] for x in inputs], getattr(step, OPERATORS[operator]), []
    monkeypatch.setattr(fused, "token", lambda *call: calls.append(call) or call[-2:])
    monkeypatch.setattr(fused, "why_not", lambda: None)
    monkeypatch.setattr(fused, "_interpreted", lambda: True)
    run(*token, state.double()), run(*(x.double() for x in token), state), run(*token, state.clone().requires_grad_())
    run(*token[:2], token[2][..., :48], *token[3:], state[..., :48])
    run(*token, state, backend="chunked"), run(*token, state, torch.ones(()))
    assert not calls
    with torch.no_grad():
        run(*token, state.requires_grad_()), run(*token, state, 2, "fused")
    assert [call[-1] for call in calls] == [32 ** -0.5, 2]
    assert all(call[-2] is state and (call[-3] is None) == (operator == "gla") for call in calls)
    with pytest.raises(ValueError, match="backend='wild' is unknown"):
        run(*token, state, backend="wild")


@on_gpu
@pytest.mark.parametrize("operator, dtype", ON_GPU)
@pytest.mark.parametrize("heads, borders, cut", [(3, [0, 5, 5, 69, 133, 198, 400], False),
                                                 (2, [0, 5, 5, 4133, 8000, 8000], True)])
def test_packed_sequences(operator, dtype, heads, borders, cut):
    inputs, state = make_inputs(operator, borders[-1], 64, 64, dtype, batch=1, heads=heads, sequences=len(borders) - 1,
                                device="cuda")
    assert (launch.segments_of(inputs[0], inputs[2], len(borders) - 1) >= 3) == cut
    check(operator, inputs, state, BOUNDS[dtype], cu_seqlens=torch.tensor(borders, device="cuda"))


@on_gpu
@pytest.mark.parametrize("operator, dtype", ON_GPU)
@pytest.mark.parametrize("time, backend", [(300, "fused"), (4200, "fused"), (70, "auto")])
def test_results_are_the_same_in_every_run_and_of_auto(operator, dtype, time, backend):
    inputs, state = make_inputs(operator, time, 64, 64, dtype, device="cuda")
    first, second = run(operator, inputs, state, "fused"), run(operator, inputs, state, backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@on_gpu
@pytest.mark.parametrize("operator, dtype", ON_GPU)
@pytest.mark.parametrize("batch, time, heads, dim, segments", [
    (16, 1024, 9, 64, None), (1, 1, 1, 64, None), (3, 100, 2, 64, None), (4, 1000, 3, 128, None),
    (40, 300, 8, 32, None), (2, 700, 3, 64, 5), (1, 9000, 2, 64, None)])
def test_kernels_that_follow_a_scan_change_no_bit(monkeypatch, operator, dtype, batch, time, heads, dim, segments):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    monkeypatch.setattr(launch, "override_segments", segments)
    inputs, state = make_inputs(operator, time, dim, dim, dtype, batch=batch, heads=heads, device="cuda")
    monkeypatch.setattr(launch, "override_follows", False)
    alone = run(operator, inputs, state, "fused")
    monkeypatch.setattr(launch, "override_follows", True)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(alone, run(operator, inputs, state, "fused")))


def test_kernels_follow_scans_that_leave_them_room(monkeypatch):
    monkeypatch.setattr(launch, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(launch, "_capability", lambda device: capability)
    gpu, cpu, capability = torch.device("cuda", 0), torch.device("cpu"), (9, 0)
    assert [launch.follows(gpu, programs) for programs in (1, 144, 198, 199)] == [True, True, True, False]
    assert not launch.follows(cpu, 1)
    capability = (8, 0)
    assert not launch.follows(gpu, 1)
    monkeypatch.setattr(launch, "override_follows", True)
    assert launch.follows(cpu, 10**6)
    monkeypatch.setattr(launch, "override_segments", 3)
    x = torch.empty(2, 700, 4, 32)
    place = launch.Place((x, x, x), (), None)
    assert (place.chunks, place.turns(None), place.turns(place.counts(2))) == (22, 22, 2 * 3 * 4)
    assert place.counts(2).shape == (22 * 4 * 2,)
    assert launch.Place((x[:1], x[:1], x[:1]), (), torch.tensor([0, 300, 700])).counts(2) is None  # packed


@on_gpu
@pytest.mark.parametrize("operator, dtype", ON_GPU)
@pytest.mark.parametrize("batch, time", [(4, 1000), (1, 4200)])
def test_gradients_can_be_had_twice_and_in_a_cuda_graph(operator, dtype, batch, time):
    inputs, _ = make_inputs(operator, time, 64, 64, dtype, batch=batch, heads=2, device="cuda")
    inputs = [x.requires_grad_() for x in inputs]
    operate, weight = getattr(kernels, OPERATORS[operator]), torch.randn_like(inputs[2])
    o = operate(*inputs, backend="fused")[0]
    first, second = (torch.autograd.grad(o, inputs, weight, retain_graph=True) for _ in range(2))
    del o  # with its graph, which torch would go on with on this stream
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        side.wait_stream(torch.cuda.default_stream())
        torch.autograd.grad(operate(*inputs, backend="fused")[0], inputs, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(operate(*inputs, backend="fused")[0], inputs, weight)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, captured))


@on_gpu
@pytest.mark.parametrize("operator, dtype", ON_GPU)
@pytest.mark.parametrize("time, heads, dim, decay", [(4097, 2, 64, "near none"), (8192, 9, 64, "mild"),
                                                     (8000, 1, 64, "mixed"), (6000, 2, 128, "mild")])
def test_segments(operator, dtype, time, heads, dim, decay):
    inputs, state = make_inputs(operator, time, dim, dim, dtype, decay, batch=1, heads=heads, device="cuda")
    assert launch.segments_of(inputs[0], inputs[2], 1) >= 3
    check(operator, inputs, state, BOUNDS[dtype])
    check(operator, inputs, None, BOUNDS[dtype])


@on_gpu
@pytest.mark.parametrize("operator", OPERATORS)
def test_segments_compiled(operator):
    inputs, state = make_inputs(operator, 4200, 64, 64, torch.bfloat16, batch=1, heads=2, device="cuda")
    gradients_agree_when_compiled(operator, inputs, state)


@pytest.mark.parametrize("batch, time, heads, dim, sequences, expected", [
    (1, 32768, 9, 64, 1, 132 // 9 * 2),                                        # 18 chunks each
    (1, 28672, 9, 64, 1, 28), (1, 16384, 9, 64, 1, 14), (1, 28608, 9, 64, 1, 14),
    (1, 32768, 9, 128, 1, 132 // (9 * 4)), (4, 8192, 9, 64, 4, 6), (4, 4096, 9, 64, 4, 3), (5, 8192, 9, 64, 5, 4),
    (8, 2048, 9, 64, 8, 1), (16, 1024, 9, 64, 16, 1), (1, 32768, 1, 64, 1, launch.MOST),
    (1, 4096, 1, 64, 1, 4096 // 64 // launch.LEAST), (1, 24 * 64 - 64, 1, 64, 1, 1), (1, 32768, 2, 64, 4, 132 // 8),
    (1, 32768, 2, 64, 32, 1)])
def test_scans_are_cut_only_where_multiprocessors_idle(monkeypatch, batch, time, heads, dim, sequences, expected):
    q = torch.empty(batch, time, heads, dim, device="meta")
    assert launch.segments_of(q, q, sequences) == 1  # no multiprocessors, none to fill
    monkeypatch.setattr(launch, "_multiprocessors", lambda device: 132)
    assert launch.segments_of(q, q, sequences) == expected
    monkeypatch.setattr(launch, "override_segments", 5)
    assert launch.segments_of(q, q, sequences) == 5


@on_gpu
@pytest.mark.parametrize("operator", OPERATORS)
def test_slices_of_one_projection_are_read_in_place(operator):
    inputs, state = make_inputs(operator, 130, 64, 64, torch.bfloat16, device="cuda")
    joined = torch.cat([x.flatten(2) for x in inputs[:3]], -1)
    slices = [x.unflatten(-1, (3, 64)) for x in joined.chunk(3, -1)]
    operate = getattr(kernels, OPERATORS[operator])
    o, final = operate(*slices, *inputs[3:], initial_state=state, backend="fused")
    o_2, final_2 = operate(*inputs, initial_state=state, backend="fused")
    assert torch.equal(o, o_2) and torch.equal(final, final_2)


def test_packed_sequences_in_other_backends():
    inputs, state = make_inputs("gdn", 40, 32, 32, torch.float32, batch=1, sequences=4)
    borders = torch.tensor([0, 7, 7, 30, 40])
    o, final = kernels.gated_delta_rule(*inputs, initial_state=state, backend="chunked", cu_seqlens=borders)
    third = [x[:, 7:30] for x in inputs]
    o_3, final_3 = kernels.gated_delta_rule(*third, initial_state=state[2:3], backend="reference")
    torch.testing.assert_close(o[:, 7:30], o_3, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final[2:3], final_3, rtol=1e-4, atol=1e-5)
    assert torch.equal(final[1], state[1])


@pytest.mark.parametrize("batch, change, said", [
    (1, lambda x: x.float(), "cu_seqlens must be a one-dimensional tensor of int32 or int64"),
    (1, lambda x: x[:1], "hold at least two numbers"),
    (1, lambda x: x[:2], "initial_state has shape"),
    (2, lambda x: x, "with cu_seqlens batch must be 1, not 2"),
])
def test_bad_borders_are_refused(batch, change, said):
    inputs, state = make_inputs("gdn", 40, 32, 32, torch.float32, batch=batch, sequences=3)
    with pytest.raises(ValueError, match=said):
        kernels.gated_delta_rule(*inputs, initial_state=state, cu_seqlens=change(torch.tensor([0, 7, 30, 40])))


@pytest.mark.parametrize("triton, gpu, capability, refusal", [
    (None, False, (9, 0), "triton is not installed"), ("triton", False, (9, 0), "need a CUDA GPU, and there is none"),
    ("triton", True, (7, 5), "compute capability 8.0"), ("triton", True, (9, 0), None)])
def test_says_why_not(monkeypatch, triton, gpu, capability, refusal):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: triton)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    reason = fused._why_not.__wrapped__()
    assert refusal in reason if refusal else reason is None


@pytest.mark.parametrize("dtype, dim, said", [
    (torch.float32, 64, "these are on cpu"),
    (torch.float64, 64, "no float64"),
    (torch.float32, 48, "key_dim and value_dim of 32, 64 or 128, not 48 and 48"),
])
def test_refuses_what_it_cannot_run(monkeypatch, dtype, dim, said):
    monkeypatch.setattr(fused, "why_not", lambda: None)
    monkeypatch.setattr(fused, "_interpreted", lambda: "cpu" not in said)
    inputs, _ = make_inputs("gdn", 4, dim, dim, dtype)
    with pytest.raises(ValueError, match=f"backend='fused' cannot run here: .*{said}"):
        kernels.gated_delta_rule(*inputs, backend="fused")


def interpreted_checks():
    """Run kernels in Triton's interpreter, in a process of its own: small shapes, the same code."""
    interpret_as_gpus_compute()

    def case(operator, time, key_dim, value_dim, dtype, *decay, batch=1, heads=1, borders=None, **options):
        sequences = None if borders is None else len(borders) - 1
        inputs, state = make_inputs(operator, time, key_dim, value_dim, dtype, *decay, batch=batch, heads=heads,
                                    sequences=sequences, **options)
        packed = {} if borders is None else {"cu_seqlens": torch.tensor(borders)}
        check(operator, inputs, state, 1e-4 if dtype == torch.float32 else 1e-2, **packed)

    case("gla", 65, 64, 32, torch.float32, "mixed")
    launch.override["linear_attention.scan"] = launch.Launch(4, 1, 64)  # float32's 16 columns are slow here
    for operator in OPERATORS:
        for dtype in (torch.float32, torch.bfloat16):
            for decay in DECAYS if dtype == torch.float32 else ("mild", "strong, then mild"):
                case(operator, 70, 32, 32, dtype, decay)
            case(operator, 75, 32, 32, dtype, heads=2 if dtype == torch.float32 else 1, borders=[0, 5, 5, 70, 75])
        case(operator, 65, 64, 32, torch.float32, "mixed", batch=2)
        case(operator, 1, 32, 64, torch.float32, batch=2)
    case("gla", 20, 128, 128, torch.float32, "mixed")
    for key_dim, value_dim, decay in ((128, 128, "strong, then mild"), (128, 64, "mild"), (64, 128, "mixed")):
        case("gla", 70, key_dim, value_dim, torch.bfloat16, decay)
    for beta in ("zero", "one"):
        for repeat_keys in (True, False):
            case("gdn", 70, 32, 32, torch.float32, beta=beta, repeat_keys=repeat_keys)


def interpreted_checks_of_inputs():
    """What the gated delta rule is given."""
    interpret_as_gpus_compute()
    for *arguments, by_batch in ((32, 32, torch.float32, 1e-5, False), (32, 32, torch.bfloat16, 1e-2, True),
                                 (64, 128, torch.float32, 1e-5, True)):
        check_delta_rule_inputs(*arguments, by_batch, backend="aot_eager")


def interpreted_checks_of_steps():
    """A token at a time: operators, the norm and gate after them, and mixers."""
    interpret_as_gpus_compute()
    for operator in OPERATORS:
        check_steps(operator, 16, 16, torch.float32, "near none", time=40)
        for decay in ("none", "strong", "strong, then mild"):
            check_steps(operator, 32, 16, torch.float32, decay, time=10)
        check_steps(operator, 32, 64, torch.bfloat16, time=6)
        for key_dim, value_dim in ((64, 64), (128, 32), (32, 128), (256, 16)):
            check_steps(operator, key_dim, value_dim, torch.float32, "mixed", time=3)
        check_step_strides(operator)
        for half in (None, "weights", "autocast"):
            check_mixer_steps(operator, half, qk_norm=half is None)
    for beta in ("zero", "one"):
        check_steps("gdn", 32, 16, torch.float32, beta=beta, time=10)
    for dim, *dtypes in ((32, torch.float32, torch.float32), (64, torch.bfloat16, torch.float32),
                         (256, torch.bfloat16, torch.bfloat16)):
        check_gated_norm(dim, *dtypes)


def interpreted_checks_of_segments():
    """As `interpreted_checks`, with scans cut along time: some segments shorter, some empty."""
    interpret_as_gpus_compute()
    launch.override["linear_attention.scan"] = launch.Launch(4, 1, 64)
    for operator in OPERATORS:
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
            for number, decay in ((3, "near none"), (2, "mild"), (5, "mixed"))[:1 if dtype == torch.bfloat16 else 3]:
                launch.override_segments = number
                inputs, state = make_inputs(operator, 150, 32, 32, dtype, decay, batch=2 if number == 2 else 1, heads=1)
                check(operator, inputs, None if number == 2 else state, bound)
        inputs, state = make_inputs(operator, 140, 32, 64, torch.float32, batch=1, heads=1, sequences=3)
        launch.override_segments = 3
        check(operator, inputs, state, 1e-4, cu_seqlens=torch.tensor([0, 5, 5, 140]))
    launch.override_segments = 2
    for operator in OPERATORS:
        inputs, state = make_inputs(operator, 70, 128, 64, torch.float32, batch=1, heads=1,
                                    repeat_keys=operator == "gdn")
        check(operator, inputs, state, 1e-4)
    for operator in OPERATORS:
        inputs, state = make_inputs(operator, 70, 32, 32, torch.float32, batch=1, heads=1)
        gradients_agree_when_compiled(operator, inputs, state, backend="aot_eager")
        *_, maps = fused.ops.module(OPERATORS[operator]).forward(*inputs, 1.0, state, None, True)[2]
        assert maps.shape[0] == 2


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("what", ["", "_of_segments", "_of_inputs", "_of_steps"])
def test_in_the_interpreter(what, interpreted):
    status, printed = interpreted[f"interpreted_checks{what}"]
    assert status == 0, printed[-2000:]
