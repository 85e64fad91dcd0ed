"""One token at a time, from the state that the tokens before it left: the operators as decoding runs them.

Where ``"fused"`` can run, a step is one launch if both dims are 16, 32, 64, 128 or 256, nothing is float64, nothing
takes a gradient and torch.compile does not trace. Elsewhere it is a few operations of PyTorch, which have gradients.
"""

from __future__ import annotations

import torch

from hybridlib.checks import check_choice
from hybridlib.kernels import _BACKENDS, check_tensors, fused
from hybridlib.kernels.reference import _read

__all__ = ["gated_delta_rule", "gated_linear_attention"]


def gated_delta_rule(q, k, v, log_decay, beta, state, scale=None, backend="auto"):
    """Take one step of the gated delta rule: S <- a S, S <- S + beta k (v - S^T k)^T, o = scale S^T q.

    Parameters
    ----------
    q, k, v, log_decay, beta, scale : as in `hybridlib.kernels.gated_delta_rule`, without the dimension of time.
    state : (batch, heads, key_dim, value_dim), after the tokens before this one; it stays as it is.
    backend : ``"auto"`` and ``"fused"`` run our GPU kernel where it can take the call; otherwise PyTorch computes.

    Returns o (batch, heads, value_dim) in v's dtype, and the state after this token; float32, or float64 if v is.
    Raises ValueError for a tensor that does not fit, or an unknown backend. Source: arXiv 2412.06464, section 3.
    """
    inputs = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta, "state": state}
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if _is_fused(inputs, "BH", scale, backend):
        return fused.token(q, k, v, log_decay, beta, state, scale)
    with torch.autocast(v.device.type, enabled=False):
        wide = torch.promote_types(v.dtype, torch.float32)
        query, k, value, log_decay, beta, state = (x.to(wide) for x in inputs.values())
        state = log_decay.exp()[..., None, None] * state
        error = value - _read(state, k)
        state = state + k[..., :, None] * (beta[..., None] * error)[..., None, :]
        return (scale * _read(state, query)).to(v.dtype), state


def gated_linear_attention(q, k, v, log_decay, state, scale=None, backend="auto"):
    """Take one step of gated linear attention: S <- diag(a) S + k v^T, o = scale S^T q.

    Arguments, results and errors are those of `gated_delta_rule`, but log_decay is (batch, heads, key_dim) and k may
    have any length. Source: arXiv 2312.06635, section 4.
    """
    inputs = {"q": q, "k": k, "v": v, "log_decay": log_decay, "state": state}
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if _is_fused(inputs, "BHK", scale, backend):
        return fused.token(q, k, v, log_decay, None, state, scale)
    with torch.autocast(v.device.type, enabled=False):
        wide = torch.promote_types(v.dtype, torch.float32)
        query, k, value, log_decay, state = (x.to(wide) for x in inputs.values())
        state = log_decay.exp()[..., :, None] * state + k[..., :, None] * value[..., None, :]
        return (scale * _read(state, query)).to(v.dtype), state


def _is_fused(inputs, decay_shape, scale, backend):
    """Check a call, and tell whether the kernel takes it. A scale must not be on the GPU."""
    check_choice("backend", backend, _BACKENDS)
    check_tensors(inputs, {"q": "BHK", "k": "BHK", "v": "BHV", "log_decay": decay_shape, "beta": "BH",
                           "state": "BHKV"}, {})
    dims = inputs["q"].shape[-1], inputs["v"].shape[-1]
    return not isinstance(scale, torch.Tensor) and fused.takes_step(backend, dims, *inputs.values())
