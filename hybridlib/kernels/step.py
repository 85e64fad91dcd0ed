"""One token at a time, from the state that the tokens before it left: what decoding runs.

The recurrences are those of `hybridlib.kernels.reference`, for a single token and without a time axis. A step is
exact: float32 inside whatever the dtype of its inputs, float64 if v is float64, and each call costs the same however
long the text before it.
"""

from __future__ import annotations

import torch

__all__ = ["gated_delta_rule", "gated_linear_attention"]


def gated_delta_rule(q, k, v, log_decay, beta, state, scale=None):
    """Take one step of the gated delta rule: S <- a S, S <- S + beta k (v - S^T k)^T, o = scale S^T q.

    Parameters
    ----------
    q, k : (batch, heads, key_dim); k of unit length.
    v : (batch, heads, value_dim).
    log_decay, beta : (batch, heads).
    state : (batch, heads, key_dim, value_dim), what the tokens before this one left; it is not written to.
    scale : factor on the output; key_dim ** -0.5 if None.

    Returns
    -------
    o : (batch, heads, value_dim), in v's dtype.
    state : (batch, heads, key_dim, value_dim) after this token; float32, or float64 if v is.

    Raises
    ------
    ValueError : a shape that does not fit q and v.

    Source: arXiv 2412.06464, section 3.
    """
    _check_shapes(q, v, k=(k, "BHK"), log_decay=(log_decay, "BH"), beta=(beta, "BH"), state=(state, "BHKV"))
    with torch.autocast(v.device.type, enabled=False):
        query, k, value, log_decay, beta, state = _wide(v.dtype, q, k, v, log_decay, beta, state)
        state = log_decay.exp()[..., None, None] * state
        error = value - _read(state, k)
        state = state + k[..., :, None] * (beta[..., None] * error)[..., None, :]
        return _output(query, state, scale, v.dtype), state


def gated_linear_attention(q, k, v, log_decay, state, scale=None):
    """Take one step of gated linear attention: S <- diag(a) S + k v^T, o = scale S^T q.

    Parameters
    ----------
    q, k, v, state, scale : as in `gated_delta_rule`; k of any length.
    log_decay : (batch, heads, key_dim).

    Returns
    -------
    o, state : as in `gated_delta_rule`.

    Raises
    ------
    ValueError : as in `gated_delta_rule`.

    Source: arXiv 2312.06635, section 4.
    """
    _check_shapes(q, v, k=(k, "BHK"), log_decay=(log_decay, "BHK"), state=(state, "BHKV"))
    with torch.autocast(v.device.type, enabled=False):
        query, k, value, log_decay, state = _wide(v.dtype, q, k, v, log_decay, state)
        state = log_decay.exp()[..., :, None] * state + k[..., :, None] * value[..., None, :]
        return _output(query, state, scale, v.dtype), state


def _read(state, key):
    """S^T k: state (batch, heads, key_dim, value_dim), key (batch, heads, key_dim) -> (batch, heads, value_dim)."""
    return (state * key[..., :, None]).sum(-2)


def _output(query, state, scale, dtype):
    return ((query.shape[-1] ** -0.5 if scale is None else scale) * _read(state, query)).to(dtype)


def _wide(dtype, *inputs):
    return (x.to(torch.promote_types(dtype, torch.float32)) for x in inputs)


def _check_shapes(q, v, **others):
    for name, x in (("q", q), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; a step takes one token, (batch, heads, dim)")
    sizes = dict(zip("BHKV", (*q.shape, v.shape[-1])))
    for name, (x, shape) in ({"v": (v, "BHV")} | others).items():
        expected = tuple(sizes[s] for s in shape)
        if tuple(x.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; with q {tuple(q.shape)} and v {tuple(v.shape)} it "
                             f"must be {expected}")
