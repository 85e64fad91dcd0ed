"""Two linear attention operators, one signature each, several ways to run them.

===============  ====================================================  =============================================
backend          meaning                                               where it runs
===============  ====================================================  =============================================
``"reference"``  the recurrence, a token at a time                     everywhere; slow; float64 for tests
``"chunked"``    matrix products in chunks, with its own gradients     everywhere
``"fused"``      our own GPU kernels, written in Triton                NVIDIA GPUs; dims 32, 64, 128; not in float64
``"fla"``        flash-linear-attention, an optional package           NVIDIA GPUs, not in float64
``"auto"``       the first that can run: ``"fused"`` on a GPU,         everywhere
                 ``"fla"`` there in half precision, ``"chunked"``
===============  ====================================================  =============================================

``"auto"`` never gives float32 to ``"fla"``, which multiplies it in TF32; ``"fused"`` is exact to float32's own error.
``"fused"`` takes packed sequences at once, the others one after another.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F

from hybridlib.checks import check_choice, check_number
from hybridlib.kernels import chunked, fla_adapter, fused, reference

__all__ = ["available_backends", "delta_rule_inputs", "gated_delta_rule", "gated_linear_attention"]

logger = logging.getLogger(__name__)

_SIZES = {"B": "batch", "N": "sequences", "T": "time", "H": "heads", "K": "key_dim", "V": "value_dim"}
_BACKENDS = ("auto", "reference", "chunked", "fused", "fla")


def gated_delta_rule(q, k, v, log_decay, beta, scale=None, initial_state=None, backend="auto", cu_seqlens=None):
    """Run the gated delta rule: S <- a S, S <- S + beta k (v - S^T k)^T, o = scale S^T q, with a = exp(log_decay).

    Parameters
    ----------
    q, k : (batch, time, heads, key_dim); k of unit length, or the state may grow without bound.
    v : (batch, time, heads, value_dim).
    log_decay : (batch, time, heads); natural log, finite and <= 0, which is not checked.
    beta : (batch, time, heads), from 0 to 1.
    scale : factor on the output; key_dim ** -0.5 if None.
    initial_state : (batch, heads, key_dim, value_dim); zeros if None. With cu_seqlens, (sequences, ..).
    backend : see the table in `hybridlib.kernels`.
    cu_seqlens : (sequences + 1,) int32 or int64, on v's device, for sequences packed into a batch of 1: tokens
        cu_seqlens[n] to cu_seqlens[n + 1] are sequence n. From 0 to time and never falling, which is not checked.

    Returns o (batch, time, heads, value_dim) in v's dtype, and the state after the last token, shaped as
    initial_state, in float32, or float64 if v is. Raises ValueError for an argument that does not fit, or a backend
    that cannot run here. Source: arXiv 2412.06464, section 3.
    """
    inputs = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}
    return _run("gated_delta_rule", inputs, "BTH", scale, initial_state, backend, cu_seqlens)


def gated_linear_attention(q, k, v, log_decay, scale=None, initial_state=None, backend="auto", cu_seqlens=None):
    """Run gated linear attention: S <- diag(a) S + k v^T, o = scale S^T q, with a = exp(log_decay) for each key dim.

    Arguments, results and errors are those of `gated_delta_rule`, but log_decay is (batch, time, heads, key_dim) and
    k may have any length. Source: arXiv 2312.06635, section 4.
    """
    inputs = {"q": q, "k": k, "v": v, "log_decay": log_decay}
    return _run("gated_linear_attention", inputs, "BTHK", scale, initial_state, backend, cu_seqlens)


def delta_rule_inputs(q, k, v, a, b, A_log, dt_bias, backend="auto"):
    """Make the inputs of `gated_delta_rule` from a mixer's projections.

    q and k become silu(q) and silu(k) of unit length, v silu(v), log_decay = -exp(A_log) softplus(a + dt_bias) and
    beta = sigmoid(b).

    Parameters
    ----------
    q, k : (batch, time, heads, key_dim); v : (batch, time, heads, value_dim); a, b : (batch, time, heads).
    A_log, dt_bias : (heads,), or (batch, 1, heads).
    backend : ``"auto"`` and ``"fused"`` run our GPU kernel where it can take the call; otherwise PyTorch computes.

    Returns q, k, v, log_decay (float32, float64 if `a` is), beta (as b). Raises ValueError for an unknown backend or
    shapes that do not fit. Source: arXiv 2412.06464, section 3.4.
    """
    check_choice("backend", backend, _BACKENDS)
    if (q.dim() != 4 or k.shape != q.shape or not q.shape[:3] == v.shape[:3] == a.shape == b.shape or v.dim() != 4
            or A_log.shape != dt_bias.shape or A_log.shape not in ((q.shape[2],), (q.shape[0], 1, q.shape[2]))):
        inputs = {"q": q, "k": k, "v": v, "a": a, "b": b, "A_log": A_log, "dt_bias": dt_bias}
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())
        raise ValueError(f"shapes do not fit one another: {shapes}; the function's parameters say which do")
    if backend in ("auto", "fused") and q.dtype == v.dtype and fused.why_not_for(q, v) is None:
        return fused.delta_rule_inputs(q, k, v, a, b, A_log, dt_bias)
    q, k = (F.normalize(F.silu(x), dim=-1, eps=1e-6) for x in (q, k))
    wide = torch.promote_types(a.dtype, torch.float32)
    return q, k, F.silu(v), -A_log.to(wide).exp() * F.softplus(a.to(wide) + dt_bias), b.sigmoid()


def available_backends() -> dict[str, str | None]:
    """Map each backend to None if it runs forward on this machine, else to the reason it cannot, in one sentence."""
    return {"reference": None, "chunked": None, "fused": fused.why_not(), "fla": fla_adapter.why_not()}


_accepted: set = set()  # calls that passed the checks and run fused: a second check would take longer than the kernels


def _run(operator, inputs, decay_shape, scale, initial_state, backend, cu_seqlens):
    compiling = torch.compiler.is_compiling()
    plain = not compiling and isinstance(backend, str) and isinstance(scale, (int, float, type(None)))
    call = (operator, backend, scale, *map(_kind, (*inputs.values(), initial_state, cu_seqlens))) if plain else None
    if call is not None and call in _accepted:
        backend = "fused"
    else:
        check_choice("backend", backend, _BACKENDS)
        sizes = {} if cu_seqlens is None else {"N": _count(cu_seqlens, inputs["v"])}
        shapes = {"q": "BTHK", "k": "BTHK", "v": "BTHV", "log_decay": decay_shape, "beta": "BTH",
                  "initial_state": "BHKV" if cu_seqlens is None else "NHKV"}
        states = {} if initial_state is None else {"initial_state": initial_state}
        check_tensors(inputs | states, shapes, sizes)
        if scale is not None:
            check_number("scale", scale, 0, open_low=True)
        backend = _choose(operator, inputs, initial_state, backend)
        if backend == "fused" and call is not None and len(_accepted) < 1000:
            _accepted.add(call)
    scale = inputs["q"].shape[-1] ** -0.5 if scale is None else scale
    if backend == "fused":
        return getattr(fused, operator)(*inputs.values(), scale, initial_state, cu_seqlens)
    run = getattr({"reference": reference, "chunked": chunked, "fla": fla_adapter}[backend], operator)
    return _run_uncompiled(run, inputs, scale, initial_state, cu_seqlens)


@torch.compiler.disable  # the compiler would unroll loops over chunks or tokens
def _run_uncompiled(run, inputs, scale, initial_state, cu_seqlens):
    with torch.autocast(inputs["v"].device.type, enabled=False):
        if cu_seqlens is None:
            return run(*inputs.values(), scale, initial_state)
        return _one_by_one(run, inputs, scale, initial_state, cu_seqlens.tolist())


def _kind(x):
    return (x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else type(x)


def _choose(operator, inputs, initial_state, backend):
    """Return the backend of a call, chosen where `backend` is ``"auto"``; ValueError if it cannot run the call."""
    q, v = inputs["q"], inputs["v"]
    if backend == "auto":
        reason = fused.why_not_for(q, v) if v.is_cuda else None
        if reason is None:
            return "fused" if v.is_cuda else "chunked"
        half = v.dtype in (torch.bfloat16, torch.float16)
        backend = "fla" if half and _why_not_fla(operator, inputs, initial_state) is None else "chunked"
        if not torch.compiler.is_compiling():
            _warn(backend, reason)
    elif backend in ("fused", "fla"):
        reason = fused.why_not_for(q, v) if backend == "fused" else _why_not_fla(operator, inputs, initial_state)
        if reason is not None:
            raise ValueError(f"backend={backend!r} cannot run here: {reason}")
    return backend


@functools.cache
def _warn(chosen, refusal):
    logger.warning("backend='auto' runs %r, for 'fused' cannot run here: %s", chosen, refusal)


def _one_by_one(run, inputs, scale, initial_state, borders):
    q, v = inputs["q"], inputs["v"]
    outputs, states = [], []
    for n, (start, end) in enumerate(zip(borders, borders[1:])):
        state = None if initial_state is None else initial_state[n:n + 1]
        if end > start:
            o, state = run(*(x[:, start:end] for x in inputs.values()), scale, state)
            outputs.append(o)
        elif state is None:
            state = v.new_zeros(1, q.shape[2], q.shape[3], v.shape[3])
        states.append(state.to(torch.promote_types(v.dtype, torch.float32)))
    return torch.cat(outputs, 1), torch.cat(states)


def _why_not_fla(operator, inputs, initial_state):
    q, v = inputs["q"], inputs["v"]
    gradients = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (*inputs.values(), initial_state))
    delta_rule = operator == "gated_delta_rule"
    reason = fla_adapter.why_not(delta_rule_gradients=delta_rule and gradients)
    if reason is not None:
        return reason
    if not v.is_cuda:
        return f"flash-linear-attention needs tensors on a CUDA GPU, and these are on {v.device}"
    if v.dtype == torch.float64:
        return "flash-linear-attention has no float64"
    if delta_rule and q.shape[-1] > 256:
        return f"flash-linear-attention's gated delta rule takes key_dim up to 256, not {q.shape[-1]}"
    return None


def check_tensors(tensors: dict, shapes: dict[str, str], sizes: dict[str, int]) -> None:
    """Raise ValueError unless all are floating, on v's device, and a letter (of `_SIZES`) in `shapes` is one size."""
    device = getattr(tensors["v"], "device", None)
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise ValueError(f"{name} is a {getattr(x, 'dtype', type(x).__name__)}; it must be a floating tensor")
        fits = x.dim() == len(shapes[name])
        for letter, size in zip(shapes[name], x.shape) if fits else ():
            fits = fits and sizes.setdefault(letter, size) == size
        if not fits:
            expected = [f"{_SIZES[s]} = {sizes[s]}" if s in sizes else _SIZES[s] for s in shapes[name]]
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be ({', '.join(expected)})")
        if 0 in x.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; every size must be at least 1")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device} and v on {device}; all must be on one device")


def _count(cu_seqlens, v):
    """Count the sequences of cu_seqlens; ValueError unless it is of integers, one-dimensional, and batch is 1."""
    if (not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64)
            or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.device != v.device):
        raise ValueError(f"cu_seqlens must be a one-dimensional tensor of int32 or int64 on {v.device} and hold at "
                         "least two numbers")
    if v.dim() == 4 and len(v) != 1:
        raise ValueError(f"with cu_seqlens batch must be 1, not {len(v)}")
    return len(cu_seqlens) - 1
