"""The two recurrences, one token at a time: the truth for tests of every other backend, in float64 if v is."""

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
    """Return S^T k: state (batch, heads, key_dim, value_dim), key (batch, heads, key_dim)."""
    return (state * key[..., :, None]).sum(-2)


def _tokens(dtype, *inputs):
    return zip(*(x.to(dtype).unbind(1) for x in inputs))


def _first_state(k, v, initial_state):
    dtype = torch.promote_types(v.dtype, torch.float32)
    if initial_state is not None:
        return initial_state.to(dtype)
    return torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[-1], dtype=dtype, device=v.device)
