"""Our own GPU kernels for both operators, forward and backward, in Triton, which is imported when one first runs.

The book's page on kernels derives them. Sums keep their order, so results are the same in every run.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from hybridlib.kernels.fused import ops
from hybridlib.kernels.fused.launch import by_token

__all__ = ["delta_rule_inputs", "gated_delta_rule", "gated_linear_attention", "gated_norm", "takes_step", "token",
           "why_not", "why_not_for"]

DIMS, STEP_DIMS = (32, 64, 128), (16, 32, 64, 128, 256)
_STEP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result
def why_not() -> str | None:
    """Return the reason why the fused kernels cannot run on this machine, in one sentence; None if they can."""
    return _why_not()


@functools.cache
def _why_not():
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed, and the fused kernels are written in it"
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "the fused kernels need a CUDA GPU, and there is none"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the fused kernels need a GPU of compute capability 8.0 or later"
    return None


def why_not_for(q: torch.Tensor, v: torch.Tensor) -> str | None:
    """Return the reason why the fused kernels cannot take a call with these; None if they can."""
    reason = why_not()
    if reason is not None:
        return reason
    if not (v.is_cuda or _interpreted()):
        return f"the fused kernels need tensors on a CUDA GPU, and these are on {v.device}"
    if v.dtype == torch.float64:
        return "the fused kernels have no float64"
    if q.shape[-1] not in DIMS or v.shape[-1] not in DIMS:
        return f"the fused kernels take key_dim and value_dim of 32, 64 or 128, not {q.shape[-1]} and {v.shape[-1]}"
    return None


def gated_delta_rule(q, k, v, log_decay, beta, scale, initial_state, cu_seqlens=None):
    """Run the gated delta rule; arguments and result as `hybridlib.kernels.gated_delta_rule`."""
    return _run("gated_delta_rule", (q, k, v, log_decay, beta), scale, initial_state, cu_seqlens)


def gated_linear_attention(q, k, v, log_decay, scale, initial_state, cu_seqlens=None):
    """Run gated linear attention; arguments and result as `hybridlib.kernels.gated_linear_attention`."""
    return _run("gated_linear_attention", (q, k, v, log_decay), scale, initial_state, cu_seqlens)


def delta_rule_inputs(*inputs):
    """Make the gated delta rule's inputs; arguments and result as `hybridlib.kernels.delta_rule_inputs`."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return ops.delta_rule_inputs(*inputs)
    return ops.module("delta_rule_inputs").forward(*inputs)


def takes_step(backend: str, dims: tuple[int, ...], *tensors: torch.Tensor) -> bool:
    """Tell whether `token` or `gated_norm` can take a call with these tensors; not while torch.compile traces."""
    if backend not in ("auto", "fused") or torch.compiler.is_compiling():
        return False
    device, grad = tensors[0].device, torch.is_grad_enabled()
    return ((device.type == "cuda" or _interpreted()) and all(dim in STEP_DIMS for dim in dims)
            and all(x.device == device and x.dtype in _STEP_DTYPES and not (grad and x.requires_grad) for x in tensors)
            and why_not() is None)


def token(q, k, v, log_decay, beta, state, scale):
    """Run a step of the gated delta rule, or with beta None of gated linear attention; see `hybridlib.kernels.step`."""
    return ops.module("step").token(q, k, v, log_decay, beta, state, scale)


def gated_norm(o, g, weight, eps):
    """Return RMSNorm of o, rounded to its dtype, times silu(g); o, g (batch, heads, dim), weight (dim,)."""
    return ops.module("step").gated_norm(o, g, weight, eps)


def _interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


def _run(name, inputs, scale, initial_state, cu_seqlens):
    key_dim, value_dim, dtype = inputs[0].shape[-1], inputs[2].shape[-1], inputs[2].dtype
    if 32 in (key_dim, value_dim) and (name == "gated_linear_attention" or key_dim != value_dim):
        more = (0, max(64 - key_dim, 0)), (0, max(64 - value_dim, 0))
        inputs = [pad(x, more[1] if i == 2 else more[0]) if x.dim() == 4 else x for i, x in enumerate(inputs)]
        initial_state = None if initial_state is None else pad(initial_state, more[1] + more[0])
        o, state = _run(name, inputs, scale, initial_state, cu_seqlens)
        return o[..., :value_dim], state[..., :key_dim, :value_dim]
    if name == "gated_linear_attention" and dtype == torch.float32 and max(key_dim, value_dim) > 64:
        return _by_parts(inputs, scale, initial_state, cu_seqlens)
    inputs = [x if x.dtype == dtype else x.to(dtype) for x in inputs[:3]] + list(inputs[3:])
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, initial_state))
    if torch.compiler.is_compiling():
        return tuple(ops.OPERATORS[name](inputs, float(scale), initial_state, cu_seqlens, keep)[:2])
    inputs = [by_token(x) for x in inputs]
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    if keep:
        return _Fused.apply(ops.module(name), float(scale), cu_seqlens, initial_state, *inputs)
    return ops.module(name).forward(*inputs, float(scale), initial_state, cu_seqlens, False)[:2]


def _by_parts(inputs, scale, initial_state, cu_seqlens):
    """Run gated linear attention by 64 of the key dims, which add up, and 64 of the value dims, which do not meet."""
    keys, values = (range(0, inputs[i].shape[-1], 64) for i in (0, 2))
    outputs, states = [], []
    for column in values:
        parts = []
        for row in keys:
            part = [x[..., start:start + 64] for x, start in zip(inputs, (row, row, column, row))]
            first = None if initial_state is None else initial_state[..., row:row + 64, column:column + 64]
            parts.append(_run("gated_linear_attention", part, scale, first, cu_seqlens))
        outputs.append(sum(o for o, _ in parts))
        states.append(torch.cat([state for _, state in parts], -2))
    return torch.cat(outputs, -1), torch.cat(states, -1)


class _Fused(torch.autograd.Function):
    """operator, scale, cu_seqlens, initial_state, *inputs -> o, state; `operator` is one of the two modules."""

    @staticmethod
    def forward(ctx, operator, scale, cu_seqlens, initial_state, *inputs):
        o, final, saved = operator.forward(*inputs, scale, initial_state, cu_seqlens, True)
        ctx.operator, ctx.scale, ctx.count = operator, scale, len(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cu_seqlens, initial_state, *inputs, *saved)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx, d_o, d_final):
        cu_seqlens, initial_state, *tensors = ctx.saved_tensors
        inputs, saved = tensors[:ctx.count], tensors[ctx.count:]
        d_o = torch.zeros_like(inputs[2]) if d_o is None else by_token(d_o)
        d_final = None if d_final is None else d_final.contiguous()
        *grads, d_initial = ctx.operator.backward(*inputs, ctx.scale, initial_state, cu_seqlens, saved, d_o, d_final)
        return None, None, None, d_initial, *grads
