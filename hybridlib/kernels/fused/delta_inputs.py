"""The gated delta rule's inputs, from a mixer's projections, and their gradients, in one kernel each way.

==============  ========================================  ========================================================
input           from a projection z                       gradient of z, from that of the input (d)
==============  ========================================  ========================================================
q, k            y = s / |s|, s = silu(z)                  (d - y (y . d)) / |s| silu'(z)
v               silu(z)                                   d silu'(z)
log_decay       g = -exp(A_log) softplus(z + dt_bias)     -exp(A_log) sigmoid(z + dt_bias) d; A_log: sum of g d
beta            sigmoid(z)                                beta (1 - beta) d
==============  ========================================  ========================================================
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybridlib.kernels.fused.launch import by_token, dense_like
from hybridlib.kernels.fused.tiles import exp

_ELEMENTS, _WARPS = 2048, 4  # of q, k and v each in a program


def forward(q, k, v, a, b, A_log, dt_bias):
    """Return q, k, v, log_decay, beta; arguments as `hybridlib.kernels.delta_rule_inputs`."""
    projections = [*map(by_token, (q, k, v, a, b))]
    inputs = [*map(dense_like, projections)]
    inputs[3] = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    grid, sizes = _sizes(projections, A_log)
    with torch.cuda.device_of(q):
        _forward[grid](*projections, A_log.contiguous(), dt_bias.contiguous(), *inputs, *sizes, num_warps=_WARPS)
    return inputs


def backward(q, k, v, a, b, A_log, dt_bias, *d_inputs):
    """Return gradients of q, k, v, a, b from those of `forward`'s results, and in one tensor of A_log and dt_bias."""
    projections = [*map(by_token, (q, k, v, a, b))]
    grads, (grid, sizes) = [*map(dense_like, projections)], _sizes(projections, A_log)
    sums = torch.empty(2, grid[1], grid[0], q.shape[2], dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _backward[grid](*projections, A_log.contiguous(), dt_bias.contiguous(), *(d.contiguous() for d in d_inputs),
                        *grads, sums, *sizes, triton.next_power_of_2(q.shape[2]), num_warps=_WARPS)
    return [*grads, sums.sum(2, keepdim=True) if A_log.dim() > 1 else sums.sum((1, 2))]


def _sizes(projections, A_log):
    (batch, time, heads, key_dim), value_dim = projections[0].shape, projections[2].shape[-1]
    rows = _ELEMENTS // max(key_dim, value_dim)
    strides = [x.stride(1) for x in projections]
    return (triton.cdiv(time * heads, rows), batch), (time, *strides, heads, key_dim, value_dim, A_log.dim() > 1, rows)


@triton.jit
def _forward(q, k, v, a, b, A_log, dt_bias, q_out, k_out, v_out, log_decay, beta, time, q_stride, k_stride, v_stride,
             a_stride, b_stride, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BY_BATCH: tl.constexpr,
             ROWS: tl.constexpr):
    row, token, head, exist = _rows(time, H, ROWS)
    s, length = _unit(_load(q, token * q_stride + head * K, exist, K))
    _store(q_out, row * K, s / length[:, None], exist, K)
    s, length = _unit(_load(k, token * k_stride + head * K, exist, K))
    _store(k_out, row * K, s / length[:, None], exist, K)
    z = _load(v, token * v_stride + head * V, exist, V)
    _store(v_out, row * V, z * _sigmoid(z), exist, V)
    rate, x = _gate(a + token * a_stride + head, A_log, dt_bias, head, exist, H, BY_BATCH)
    tl.store(log_decay + row, -rate * _softplus(x), exist)
    strength = _sigmoid(tl.load(b + token * b_stride + head, exist, 0.0).to(tl.float32))
    tl.store(beta + row, strength.to(beta.dtype.element_ty), exist)


@triton.jit
def _backward(q, k, v, a, b, A_log, dt_bias, d_q_out, d_k_out, d_v_out, d_log_decay, d_beta, d_q, d_k, d_v, d_a, d_b,
              sums, time, q_stride, k_stride, v_stride, a_stride, b_stride, H: tl.constexpr, K: tl.constexpr,
              V: tl.constexpr, BY_BATCH: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr):
    row, token, head, exist = _rows(time, H, ROWS)
    z = _load(q, token * q_stride + head * K, exist, K)
    _store(d_q, row * K, _unit_back(z, _load(d_q_out, row * K, exist, K)), exist, K)
    z = _load(k, token * k_stride + head * K, exist, K)
    _store(d_k, row * K, _unit_back(z, _load(d_k_out, row * K, exist, K)), exist, K)
    z = _load(v, token * v_stride + head * V, exist, V)
    _store(d_v, row * V, _load(d_v_out, row * V, exist, V) * _silu_slope(z), exist, V)
    strength = _sigmoid(tl.load(b + token * b_stride + head, exist, 0.0).to(tl.float32))
    d = tl.load(d_beta + row, exist, 0.0).to(tl.float32) * strength * (1 - strength)
    tl.store(d_b + row, d.to(d_b.dtype.element_ty), exist)
    rate, x = _gate(a + token * a_stride + head, A_log, dt_bias, head, exist, H, BY_BATCH)
    d = -rate * tl.load(d_log_decay + row, exist, 0.0).to(tl.float32)  # 0 where there is no row
    tl.store(d_a + row, (d * _sigmoid(x)).to(d_a.dtype.element_ty), exist)
    one = tl.arange(0, HEADS)
    mine = head[:, None] == one[None, :]
    place = sums + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * H + one
    tl.store(place, tl.sum(tl.where(mine, (d * _softplus(x))[:, None], 0.0), 0), one < H)  # of A_log
    place += tl.num_programs(1) * tl.num_programs(0) * H
    tl.store(place, tl.sum(tl.where(mine, (d * _sigmoid(x))[:, None], 0.0), 0), one < H)  # of dt_bias


@triton.jit
def _rows(time, H: tl.constexpr, ROWS: tl.constexpr):
    """Return rows in dense tensors, their token in all sequences, their head, and which of them exist."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.program_id(1).to(tl.int64) * time * H + i
    return row, row // H, i % H, i < time * H


@triton.jit
def _load(x, start, exist, DIM: tl.constexpr):
    return tl.load(x + start[:, None] + tl.arange(0, DIM)[None, :], exist[:, None], 0.0).to(tl.float32)


@triton.jit
def _store(x, start, value, exist, DIM: tl.constexpr):
    tl.store(x + start[:, None] + tl.arange(0, DIM)[None, :], value.to(x.dtype.element_ty), exist[:, None])


@triton.jit
def _gate(a, A_log, dt_bias, head, exist, H: tl.constexpr, BY_BATCH: tl.constexpr):
    own = head
    if BY_BATCH:
        own += tl.program_id(1) * H
    x = tl.load(a, exist, 0.0).to(tl.float32) + tl.load(dt_bias + own).to(tl.float32)
    return exp(tl.load(A_log + own).to(tl.float32)), x


@triton.jit
def _unit(z):
    """Return s = silu(z) and the length of each row, at least 1e-6."""
    s = z * _sigmoid(z)
    return s, tl.maximum(tl.sqrt(tl.sum(s * s, 1)), 1e-6)


@triton.jit
def _unit_back(z, d):
    s, length = _unit(z)
    y = s / length[:, None]
    along = tl.where(length > 1e-6, tl.sum(y * d, 1), 0.0)
    return (d - y * along[:, None]) / length[:, None] * _silu_slope(z)


@triton.jit
def _silu_slope(z):
    p = _sigmoid(z)
    return p * (1 + z * (1 - p))


@triton.jit
def _sigmoid(x):
    return 1 / (1 + exp(-x))


@triton.jit
def _softplus(x):
    """log(1 + e^x), exact to float32 for every x: log(1 + e) = 2 artanh(e / (2 + e)), e = e^-|x|, by its series."""
    e = exp(-tl.abs(x))
    u = e / (2 + e)  # at most 1/3
    w = u * u
    series = 1 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13))))))
    return tl.maximum(x, 0.0) + 2 * u * series
