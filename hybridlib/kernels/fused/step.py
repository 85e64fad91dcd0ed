"""One token of both operators, and the norm and gate after it, each in one launch, in float32, without gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybridlib.kernels.fused.launch import Launch, run
from hybridlib.kernels.fused.tiles import exp

_WIDTH, _ELEMENTS = 16, 1024  # columns of a program, and numbers of a state that a warp holds

kernel = triton.jit(do_not_specialize=["q_stride", "k_stride", "v_stride", "decay_stride", "beta_stride", "o_stride",
                                       "g_stride"])


def token(q, k, v, log_decay, beta, state, scale):
    """Return o, state; arguments as the functions of `hybridlib.kernels.step`, beta None for gated linear attention."""
    (batch, heads, key_dim), value_dim = q.shape, v.shape[-1]
    q, k, v, log_decay = _dense(q), _dense(k), _dense(v), _dense(log_decay)
    beta, state = None if beta is None else _dense(beta), state.contiguous()
    o = torch.empty((batch, heads, value_dim), dtype=v.dtype, device=v.device)
    new = torch.empty(state.shape, dtype=torch.float32, device=v.device)
    width = min(_WIDTH, value_dim)
    use = Launch(max(1, key_dim * width // _ELEMENTS), 1, width)
    _launch(_token, use, (batch * heads, value_dim // width, 1), (q, k, v, log_decay, beta, state, o, new),
            (float(scale), q.stride(0), k.stride(0), v.stride(0), log_decay.stride(0),
             0 if beta is None else beta.stride(0)), (heads, key_dim, value_dim, width))
    return o, new


def gated_norm(o, g, weight, eps):
    """Return RMSNorm of o, rounded to its dtype, times silu(g); o, g (batch, heads, dim), weight (dim,)."""
    batch, heads, dim = o.shape
    o, g = _dense(o), _dense(g)
    out = torch.empty(o.shape, dtype=torch.promote_types(o.dtype, g.dtype), device=o.device)
    _launch(_gated_norm, Launch(1, 1), (batch * heads, 1, 1), (o, g, weight, out),
            (float(eps), o.stride(0), g.stride(0)), (heads, dim))
    return out


def _launch(kernel, use, grid, tensors, numbers, sizes):
    key, aligned = [tensors[0].device, sizes], 0
    for x in tensors:
        key.append(None if x is None else x.dtype)
        aligned |= 0 if x is None else x.data_ptr()
    with torch.cuda.device_of(tensors[0]):
        run(kernel, use, grid, (*tensors, *numbers, *sizes), tuple(key) if aligned % 16 == 0 else None)


def _dense(x):
    """Return x (batch, heads, ..), or a copy, with all but batch dense."""
    return x if x.is_contiguous() or x[0].is_contiguous() else x.contiguous()


@triton.jit
def _row(H: tl.constexpr):
    row = tl.program_id(0)
    return row.to(tl.int64), (row // H).to(tl.int64), row % H


@kernel
def _token(q, k, v, log_decay, beta, state, o, new, scale, q_stride, k_stride, v_stride, decay_stride, beta_stride,
           H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr):
    row, n, head = _row(H)
    i, j = tl.arange(0, K), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    place = row * (K * V) + i[:, None] * V + j[None, :]
    S = tl.load(state + place).to(tl.float32)
    query = tl.load(q + n * q_stride + head * K + i).to(tl.float32)[:, None]
    key = tl.load(k + n * k_stride + head * K + i).to(tl.float32)[:, None]
    written = tl.load(v + n * v_stride + head * V + j).to(tl.float32)
    if beta is None:
        S *= exp(tl.load(log_decay + n * decay_stride + head * K + i).to(tl.float32))[:, None]
    else:
        S *= exp(tl.load(log_decay + n * decay_stride + head).to(tl.float32))
        strength = tl.load(beta + n * beta_stride + head).to(tl.float32)
        written = strength * (written - tl.sum(S * key, 0))
    S += key * written[None, :]
    tl.store(new + place, S)
    tl.store(o + row * V + j, (scale * tl.sum(S * query, 0)).to(o.dtype.element_ty))


@kernel
def _gated_norm(o, g, weight, out, eps, o_stride, g_stride, H: tl.constexpr, DIM: tl.constexpr):
    row, n, head = _row(H)
    i = tl.arange(0, DIM)
    x = tl.load(o + n * o_stride + head * DIM + i).to(tl.float32)
    z = tl.load(g + n * g_stride + head * DIM + i).to(tl.float32)
    normed = x / tl.sqrt(tl.sum(x * x, 0) / DIM + eps) * tl.load(weight + i).to(tl.float32)
    gate = (z / (1 + exp(-z))).to(g.dtype.element_ty).to(tl.float32)  # rounded where PyTorch does
    normed = normed.to(o.dtype.element_ty).to(tl.float32)
    tl.store(out + row * DIM + i, (normed * gate).to(out.dtype.element_ty))
