"""The chunked operators against the recurrence in float64, the recurrence against the equation, and refusals."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

from hybridlib import kernels
from hybridlib.bench import operators as benchmarks
from hybridlib.kernels import chunked, fla_adapter, gated_delta_rule, gated_linear_attention, reference
from tests.kernels import cases
from tests.kernels.cases import DECAYS, OPERATORS, error, results

BATCH, HEADS, KEY_DIM, VALUE_DIM = 2, 2, 8, 12
TOLERANCE = 1e-5  # relative, Frobenius


def make_inputs(operator, time, decay="mild", with_state=True, **options):
    """Float64 inputs whose values are exact in float32, and the initial state (or None)."""
    options = {"batch": BATCH, "heads": HEADS, "seed": 0} | options
    inputs, state = cases.make_inputs(operator, time, KEY_DIM, VALUE_DIM, torch.float32, decay, **options)
    return [x.double() for x in inputs], state.double() if with_state else None


def run(module, operator, inputs, state, dtype, **options):
    operate = getattr(module, OPERATORS[operator])
    return results(lambda *x: operate(*x[:-1], KEY_DIM ** -0.5, x[-1], **options), inputs, state, dtype)


def check_against_recurrence(operator, inputs, state, **options):
    truth = run(reference, operator, inputs, state, torch.float64)
    in_float32 = run(reference, operator, inputs, state, torch.float32)
    found = run(chunked, operator, inputs, state, torch.float32, **options)
    for position, (x, own, t) in enumerate(zip(found, in_float32, truth)):
        allowed = max(TOLERANCE, 3 * error(own, t))  # the recurrence's own error where the problem is ill-conditioned
        assert error(x, t) <= allowed, f"result {position}: {error(x, t):.1e} > {allowed:.1e}"


def test_recurrence_is_the_equation():
    (q, k, v, log_decay, beta), state = make_inputs("gdn", 3, batch=1, heads=1)
    o, final = gated_delta_rule(q, k, v, log_decay, beta, initial_state=state, backend="reference")
    s, identity = state[0, 0], torch.eye(KEY_DIM, dtype=torch.float64)
    for t in range(3):  # the same rule in its other form: S <- a (I - beta k k^T) S + beta k v^T
        key, b = k[0, t, 0], beta[0, t, 0]
        s = log_decay[0, t, 0].exp() * (identity - b * torch.outer(key, key)) @ s + b * torch.outer(key, v[0, t, 0])
        torch.testing.assert_close(o[0, t, 0], KEY_DIM ** -0.5 * s.T @ q[0, t, 0])
    torch.testing.assert_close(final[0, 0], s)


def test_attention_without_decay_is_causal_linear_attention():
    (q, k, v, _), _ = make_inputs("gla", 37, with_state=False)
    o, _ = gated_linear_attention(q, k, v, torch.zeros_like(k), scale=1.0, backend="chunked")
    scores = torch.einsum("bihk,bjhk->bhij", q, k).tril()
    torch.testing.assert_close(o, torch.einsum("bhij,bjhv->bihv", scores, v))


@pytest.mark.parametrize("operator, time, case, options", [
    *((operator, 65, {"decay": decay, "with_state": state}, {}) for operator in OPERATORS for decay in DECAYS
      for state in (True, False)),
    *((operator, time, {"with_state": time % 2 == 0, "seed": time}, {}) for operator in OPERATORS
      for time in (1, 2, 3, 32, 63, 65, 100)),
    *((operator, 70, {"decay": "mixed"}, {"chunk": chunk}) for operator in OPERATORS for chunk in (1, 16, 64)),
    *(("gdn", 65, {"beta": beta, "repeat_keys": repeat}, {}) for beta in ("zero", "one", "random")
      for repeat in (True, False))])
def test_chunked(operator, time, case, options):
    check_against_recurrence(operator, *make_inputs(operator, time, **case), **options)


@pytest.mark.parametrize("decay", ["mild", "none", "strong", "mixed", "strong, then mild"])
@pytest.mark.parametrize("time", [1, 65, 100])
def test_chunked_delta_rule_takes_states_by_products_as_on_a_gpu(decay, time, monkeypatch):
    monkeypatch.setattr(chunked, "_in_turn", lambda x: False)
    check_against_recurrence("gdn", *make_inputs("gdn", time, decay, seed=time))


@pytest.mark.parametrize("operator", OPERATORS)
def test_chunked_gradients_by_finite_differences(operator):
    inputs, state = make_inputs(operator, 5, batch=1, heads=1)
    inputs = [x[..., :3] if x.dim() == 4 else x for x in inputs]
    inputs[3] = inputs[3] - 0.1
    leaves = [x.clone().requires_grad_() for x in (*inputs, state[..., :3, :3])]

    def operate(*xs):
        return getattr(chunked, OPERATORS[operator])(*xs[:-1], 0.7, xs[-1], chunk=4)

    assert torch.autograd.gradcheck(operate, leaves)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_half_precision_computes_in_float32(operator, backend):
    inputs, _ = make_inputs(operator, 40, with_state=False)
    inputs = [x.bfloat16() for x in inputs]
    operate = getattr(kernels, OPERATORS[operator])
    exact, exact_state = operate(*(x.double() for x in inputs), backend="reference")
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = operate(*leaves, backend=backend)
        (o.float().sum() + state.sum()).backward()
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32 and exact_state.dtype == torch.float64
    assert error(state, exact_state) < TOLERANCE
    torch.testing.assert_close(o, exact.bfloat16(), rtol=2 ** -7, atol=1e-6)
    assert all(x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("operator", OPERATORS)
def test_chunked_keeps_inputs_states_and_one_matrix_a_chunk(operator):
    inputs = benchmarks.operator_inputs(OPERATORS[operator], (1, 256, 2, 16))
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        getattr(kernels, OPERATORS[operator])(**inputs, backend="chunked")
    chunks, rows = 256 // 32, 2
    states, matrices = (chunks + 1) * rows * 16 * 16, chunks * rows * 32 * 32
    assert sum(kept.values()) <= 4 * (sum(x.numel() for x in inputs.values()) + states + matrices)


def test_inputs_are_left_as_they_were():
    inputs, state = make_inputs("gdn", 32)
    copies = [x.clone() for x in (*inputs, state)]
    _, final = gated_delta_rule(*inputs, initial_state=state)
    final.zero_()
    assert all(torch.equal(a, b) for a, b in zip((*inputs, state), copies))


@pytest.mark.parametrize("name, change, said", [
    ("q", lambda x: x[0], r"q has shape \(6, 2, 8\); it must be \(batch, time, heads, key_dim\)"),
    ("k", lambda x: x[..., :4], r"k has shape .* it must be \(batch = 2, time = 6, heads = 2, key_dim = 8\)"),
    ("v", lambda x: x[:, :5], "v has shape"),
    ("v", lambda x: x[..., :0], "v has shape .* at least 1"),
    ("q", lambda x: x.long(), "q is a torch.int64; it must be a floating tensor"),
    ("beta", lambda x: x[..., None], "beta has shape"),
    ("beta", lambda x: 0.5, "beta is a float; it must be a floating tensor"),
    ("log_decay", lambda x: x[..., None].expand(*x.shape, KEY_DIM), "log_decay has shape"),
    ("v", lambda x: x.to("meta"), "q is on cpu and v on meta; all must be on one device"),
    ("initial_state", lambda x: x.mT, "initial_state has shape"),
    ("scale", lambda x: "big", "scale='big' is not a number"),
    ("scale", lambda x: ["fused"], r"scale=\['fused'\] is not a number"),
    ("backend", lambda x: ["fused"], "backend=.* is unknown"),
    ("backend", lambda x: "cuda", "backend='cuda' is unknown; choose one of 'auto', 'reference'"),
    ("backend", lambda x: "fused", "backend='fused' cannot run here: "),
])
def test_bad_input_is_refused(name, change, said):
    inputs, state = make_inputs("gdn", 6)
    arguments = dict(zip(("q", "k", "v", "log_decay", "beta"), inputs), initial_state=state, scale=None, backend="auto")
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=said):
        gated_delta_rule(**arguments)


def test_auto_says_once_why_it_runs_another_backend(monkeypatch, caplog):
    inputs, _ = make_inputs("gdn", 3)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(kernels.fused, "why_not_for", lambda q, v: "dims are not 32, 64 or 128")
    monkeypatch.setattr(kernels, "_why_not_fla", lambda *call: "flash-linear-attention is not installed")
    kernels._warn.cache_clear()
    for _ in range(2):
        gated_delta_rule(*inputs)
    said, = caplog.messages
    assert said == "backend='auto' runs 'chunked', for 'fused' cannot run here: dims are not 32, 64 or 128"


def test_attention_refuses_a_decay_without_key_dim():
    (q, k, v, log_decay), _ = make_inputs("gla", 6)
    with pytest.raises(ValueError, match="log_decay has shape .* it must be .* heads = 2, key_dim = 8"):
        gated_linear_attention(q, k, v, log_decay[..., 0])


@pytest.mark.parametrize("packages, gpu, triton, capability, gradients, refusal", [
    ((), False, "3.7.1", (9, 0), False, "flash-linear-attention is not installed"),
    (("fla",), False, "3.7.1", (9, 0), False, "triton is not installed"),
    (("fla", "triton"), False, "3.7.1", (9, 0), False, "needs a CUDA GPU"),
    (("fla", "triton"), True, "3.6.0", (9, 0), False, None),
    (("fla", "triton"), True, "3.3.1", (9, 0), True, None),
    (("fla", "triton"), True, "3.4.0", (9, 0), True, "triton 3.4.0"),
    (("fla", "triton"), True, "3.7.0", (9, 0), True, "triton 3.7.0"),
    (("fla", "triton", "tilelang"), True, "3.7.0", (9, 0), True, None),
    (("fla", "triton"), True, "3.7.0", (8, 0), True, None),
    (("fla", "triton"), True, "3.7.1", (9, 0), True, None),
    (("fla", "triton"), True, "3.10.0", (9, 0), True, None),
])
def test_fla_says_why_not(monkeypatch, packages, gpu, triton, capability, gradients, refusal):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in packages else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=triton))
    reason = fla_adapter.why_not.__wrapped__(delta_rule_gradients=gradients)
    assert refusal in reason if refusal else reason is None


def test_available_backends(monkeypatch):
    monkeypatch.setattr(fla_adapter, "why_not", lambda **_: "no fla")
    backends = kernels.available_backends()
    assert list(backends) == ["reference", "chunked", "fused", "fla"]
    assert backends["reference"] is None and backends["chunked"] is None and backends["fla"] == "no fla"
    inputs, _ = make_inputs("gdn", 6)
    for here, reason in (("no fla", "no fla"), (None, "needs tensors on a CUDA GPU, and these are on cpu")):
        monkeypatch.setattr(fla_adapter, "why_not", lambda **_: here)
        with pytest.raises(ValueError, match=f"backend='fla' cannot run here: .*{reason}"):
            gated_delta_rule(*inputs, backend="fla")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("operator", OPERATORS)
def test_chunked_on_gpu(operator):
    inputs, state = make_inputs(operator, 65, "mixed")
    truth = run(reference, operator, inputs, state, torch.float64)
    found = run(chunked, operator, [x.cuda() for x in inputs], state.cuda(), torch.float32)
    assert all(error(x.cpu(), t) < TOLERANCE for x, t in zip(found, truth))


@pytest.mark.skipif(fla_adapter.why_not(True) is not None, reason=f"fla: {fla_adapter.why_not(True)}")
@pytest.mark.parametrize("operator", OPERATORS)
def test_fla_agrees(operator):
    inputs, _ = cases.make_inputs(operator, 100, 64, 64, torch.bfloat16, heads=2, device="cuda")
    operate = getattr(kernels, OPERATORS[operator])
    chunks, fla = (results(lambda *x: operate(*x[:-1], backend=backend), inputs, None)
                   for backend in ("chunked", "fla"))
    for expected, found in zip(chunks, fla):
        assert found.dtype == expected.dtype and error(found, expected.double()) < 2e-2


@pytest.mark.parametrize("name, shape", [("k", (2, 3, 4, 16)), ("v", (2, 3, 5, 8)), ("a", (2, 3)), ("b", (2, 3, 5)),
                                         ("A_log", (2, 3, 4)), ("dt_bias", (2, 1, 4))])
def test_inputs_that_do_not_fit_are_refused(name, shape):
    shapes = {"q": (2, 3, 4, 8), "k": (2, 3, 4, 8), "v": (2, 3, 4, 8), "a": (2, 3, 4), "b": (2, 3, 4), "A_log": (4,),
              "dt_bias": (4,)}
    assert [x.shape for x in kernels.delta_rule_inputs(*map(torch.ones, shapes.values()))[3:]] == [(2, 3, 4)] * 2
    with pytest.raises(ValueError, match=f"do not fit one another: .*{name} .{', '.join(map(str, shape))}"):
        kernels.delta_rule_inputs(*map(torch.ones, (shapes | {name: shape}).values()))
    with pytest.raises(ValueError, match="backend='fastest'"):
        kernels.delta_rule_inputs(*map(torch.ones, shapes.values()), backend="fastest")
