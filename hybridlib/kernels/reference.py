"""The two recurrences, one token at a time: slow, exact, and what every other backend is tested against.

Gated delta rule (arXiv 2412.06464, section 3) and gated linear attention (arXiv 2312.06635, section 4), in our
symbols: state S (key_dim, value_dim), decay a = exp(log_decay), write strength beta.

=====================  =======================================  ==========================
operator               state                                    output
=====================  =======================================  ==========================
gated delta rule       S <- a S                                 o = scale * S^T q
                       S <- S + beta k (v - S^T k)^T
gated linear           S <- diag(a) S + k v^T                   o = scale * S^T q
attention
=====================  =======================================  ==========================

Both functions take `scale` and `initial_state` as `hybridlib.kernels` passes them on: a number, and a tensor or None.
They compute in float64 if v is float64, else in float32.
"""

from __future__ import annotations

import torch

__all__ = ["gated_delta_rule", "gated_linear_attention"]


def gated_delta_rule(q, k, v, log_decay, beta, scale, initial_state):
    """Run the gated delta rule token by token; arguments and result as `hybridlib.kernels.gated_delta_rule`."""
    state, outputs = _first_state(k, v, initial_state), []
    for q_t, k_t, v_t, log_decay_t, beta_t in _tokens(state.dtype, q, k, v, log_decay, beta):
        state = log_decay_t.exp()[..., None, None] * state
        error = v_t - _read(state, k_t)
        state = state + k_t[..., :, None] * (beta_t[..., None] * error)[..., None, :]
        outputs.append(scale * _read(state, q_t))
    return torch.stack(outputs, dim=1).to(v.dtype), state


def gated_linear_attention(q, k, v, log_decay, scale, initial_state):
    """Run gated linear attention token by token; as `hybridlib.kernels.gated_linear_attention`."""
    state, outputs = _first_state(k, v, initial_state), []
    for q_t, k_t, v_t, log_decay_t in _tokens(state.dtype, q, k, v, log_decay):
        state = log_decay_t.exp()[..., :, None] * state + k_t[..., :, None] * v_t[..., None, :]
        outputs.append(scale * _read(state, q_t))
    return torch.stack(outputs, dim=1).to(v.dtype), state


def _read(state, key):
    """S^T k: state (batch, heads, key_dim, value_dim), key (batch, heads, key_dim) -> (batch, heads, value_dim)."""
    return (state * key[..., :, None]).sum(-2)


def _tokens(dtype, *inputs):
    """The inputs (batch, time, ...) as one tuple a time step, in `dtype`."""
    return zip(*(x.to(dtype).unbind(1) for x in inputs))


def _first_state(k, v, initial_state):
    dtype = torch.promote_types(v.dtype, torch.float32)
    if initial_state is not None:
        return initial_state.to(dtype)
    return torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[-1], dtype=dtype, device=v.device)
