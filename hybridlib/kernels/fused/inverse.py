"""The inverse T = (I + A)^-1 of a chunk, the part of the gated delta rule that does not depend on a state."""

from __future__ import annotations

import triton
import triton.language as tl

from hybridlib.kernels.fused.tiles import block, kernel, load_rows, pairwise_decay, product, tokens_of


@triton.jit
def _inverse_of_16(a, PRECISION: tl.constexpr):
    """Return (I + a)^-1 for a strictly lower (16, 16): inverses of 1, 2, 4, 8 tokens, two joined into one.

    [[I + A1, 0], [B, I + A2]]^-1 = X - X [[0, 0], [B, 0]] X, where X = [[(I + A1)^-1, 0], [0, (I + A2)^-1]].
    """
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    x = tl.where(i == j, 1.0, 0.0) - tl.where(i // 2 == j // 2, a, 0.0)
    for level in tl.static_range(1, 4):
        joins = (i // (2 << level) == j // (2 << level)) & (i // (1 << level) != j // (1 << level))
        x -= product(product(x, tl.where(joins, a, 0.0), PRECISION), x, PRECISION)
    return x


@triton.jit
def _keys_and_gates(k, log_decay, beta, start, end, k_stride, gate_stride, beta_stride, head, KEY_DIM: tl.constexpr):
    """Load of 16 tokens k (16, KEY_DIM), sums of log_decay from the first (16,), their total, beta (16,)."""
    t = start + tl.arange(0, 16)
    at = t.to(tl.int64)
    decay = tl.load(log_decay + at * gate_stride + head, t < end, 0.0).to(tl.float32)
    strength = tl.load(beta + at * beta_stride + head, t < end, 0.0).to(tl.float32)
    keys = load_rows(k, start, end, k_stride, head * KEY_DIM, 16, KEY_DIM)
    return keys, tl.cumsum(decay, 0), tl.sum(decay, 0), strength


@triton.jit
def _scores(keys_i, keys_j, sums_i, sums_j, strength_i, keep, PRECISION: tl.constexpr):
    """Return a block of A: beta_i (k_i . k_j) D_ij where `keep`."""
    decay = pairwise_decay(sums_i, sums_j, keep)
    return product(keys_i, tl.trans(keys_j), PRECISION) * decay * strength_i[:, None]


@triton.jit
def _store_inverse(x, at, t00, t10, t11, t20, t21, t22, t30, t31, t32, t33, ZEROS: tl.constexpr):
    kind = x.dtype.element_ty
    if ZEROS:
        zero = tl.zeros((16, 16), kind)
        tl.store(block(x, at, 0, 16, 64, 64, 16, 16), zero)
        tl.store(block(x, at, 0, 32, 64, 64, 16, 16), zero)
        tl.store(block(x, at, 0, 48, 64, 64, 16, 16), zero)
        tl.store(block(x, at, 16, 32, 64, 64, 16, 16), zero)
        tl.store(block(x, at, 16, 48, 64, 64, 16, 16), zero)
        tl.store(block(x, at, 32, 48, 64, 64, 16, 16), zero)
    tl.store(block(x, at, 0, 0, 64, 64, 16, 16), t00.to(kind))
    tl.store(block(x, at, 16, 0, 64, 64, 16, 16), t10.to(kind))
    tl.store(block(x, at, 16, 16, 64, 64, 16, 16), t11.to(kind))
    tl.store(block(x, at, 32, 0, 64, 64, 16, 16), t20.to(kind))
    tl.store(block(x, at, 32, 16, 64, 64, 16, 16), t21.to(kind))
    tl.store(block(x, at, 32, 32, 64, 64, 16, 16), t22.to(kind))
    tl.store(block(x, at, 48, 0, 64, 64, 16, 16), t30.to(kind))
    tl.store(block(x, at, 48, 16, 64, 64, 16, 16), t31.to(kind))
    tl.store(block(x, at, 48, 32, 64, 64, 16, 16), t32.to(kind))
    tl.store(block(x, at, 48, 48, 64, 64, 16, 16), t33.to(kind))


@kernel
def invert(k, log_decay, beta, inverse, rest, sums, strengths, cu_seqlens, time, sequences, heads, k_stride,
           gate_stride, beta_stride, KEY_DIM: tl.constexpr, MANY: tl.constexpr, ZEROS: tl.constexpr,
           PRECISION: tl.constexpr, FINE: tl.constexpr):
    """T = (I + A)^-1 of a chunk of 64 tokens, A_ij = beta_i (k_i . k_j) D_ij for j < i.

    By blocks of 16 tokens: T_mm = (I + A_mm)^-1, and below the diagonal, block after block,
    T_mn = -T_mm (A_mn T_nn + .. + A_m(m-1) T_(m-1)n). Above it, zeros are stored only if ZEROS.
    """
    head, chunk = tl.program_id(0), tl.program_id(1)
    start, end = tokens_of(cu_seqlens, chunk, time, sequences, 64, MANY)
    strides = k_stride, gate_stride, beta_stride
    k0, c0, total, b0 = _keys_and_gates(k, log_decay, beta, start, end, *strides, head, KEY_DIM)
    k1, c1, next, b1 = _keys_and_gates(k, log_decay, beta, start + 16, end, *strides, head, KEY_DIM)
    c1, total = c1 + total, total + next
    k2, c2, next, b2 = _keys_and_gates(k, log_decay, beta, start + 32, end, *strides, head, KEY_DIM)
    c2, total = c2 + total, total + next
    k3, c3, next, b3 = _keys_and_gates(k, log_decay, beta, start + 48, end, *strides, head, KEY_DIM)
    c3 = c3 + total

    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    t00 = _inverse_of_16(_scores(k0, k0, c0, c0, b0, i > j, PRECISION), FINE)
    t11 = _inverse_of_16(_scores(k1, k1, c1, c1, b1, i > j, PRECISION), FINE)
    t22 = _inverse_of_16(_scores(k2, k2, c2, c2, b2, i > j, PRECISION), FINE)
    t33 = _inverse_of_16(_scores(k3, k3, c3, c3, b3, i > j, PRECISION), FINE)
    a10, a21 = _scores(k1, k0, c1, c0, b1, i >= 0, PRECISION), _scores(k2, k1, c2, c1, b2, i >= 0, PRECISION)
    a20, a32 = _scores(k2, k0, c2, c0, b2, i >= 0, PRECISION), _scores(k3, k2, c3, c2, b3, i >= 0, PRECISION)
    a31, a30 = _scores(k3, k1, c3, c1, b3, i >= 0, PRECISION), _scores(k3, k0, c3, c0, b3, i >= 0, PRECISION)
    t10 = -product(t11, product(a10, t00, FINE), FINE)
    t21 = -product(t22, product(a21, t11, FINE), FINE)
    t32 = -product(t33, product(a32, t22, FINE), FINE)
    t20 = -product(t22, product(a20, t00, FINE) + product(a21, t10, FINE), FINE)
    t31 = -product(t33, product(a31, t11, FINE) + product(a32, t21, FINE), FINE)
    t30 = -product(t33, product(a30, t00, FINE) + product(a31, t10, FINE) + product(a32, t20, FINE), FINE)

    at = chunk * heads + head
    _store_inverse(inverse, at, t00, t10, t11, t20, t21, t22, t30, t31, t32, t33, ZEROS)
    if rest is not None:
        kind = inverse.dtype.element_ty
        _store_inverse(rest, at, t00 - t00.to(kind), t10 - t10.to(kind), t11 - t11.to(kind), t20 - t20.to(kind),
                       t21 - t21.to(kind), t22 - t22.to(kind), t30 - t30.to(kind), t31 - t31.to(kind),
                       t32 - t32.to(kind), t33 - t33.to(kind), ZEROS)
    t = at.to(tl.int64) * 64 + tl.arange(0, 16)
    tl.store(sums + t, c0), tl.store(strengths + t, b0)
    tl.store(sums + t + 16, c1), tl.store(strengths + t + 16, b1)
    tl.store(sums + t + 32, c2), tl.store(strengths + t + 32, b2)
    tl.store(sums + t + 48, c3), tl.store(strengths + t + 48, b3)
