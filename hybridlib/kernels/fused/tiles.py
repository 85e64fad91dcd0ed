"""Parts of all kernels: where a chunk's tokens lie, tiles in and out of memory, decays and products.

Tensors of tokens are (batch, time, heads, dim) with heads and dim dense, so that token t of head h starts at
``t * stride + h * dim``. A chunk's own tensors lie at ``chunk * heads + head``. A chunk is SIZE tokens; rows past the
end of the sequence are loaded as zeros and never stored, and zeros neither write nor decay.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-128.0)  # exp of it is 0 in float32

# Kernels are not compiled anew for sizes that differ from call to call.
kernel = triton.jit(do_not_specialize=["time", "sequences", "heads", "segments", "turn", "gate_stride", "beta_stride"])


@triton.jit
def exp(x):
    """Return e^x, in one instruction of the GPU; 0 where it would be no normal number of float32."""
    if _INTERPRETED:
        return tl.exp(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2_E], tl.float32, True, 1)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Return a b, summed in float32."""
    if _INTERPRETED:  # it has no products of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def fine_product(a, rest, b, PRECISION: tl.constexpr):
    """Return (a + rest) b for b in float32, cut in two of a's dtype as well, for sums whose terms cancel."""
    high = b.to(a.dtype)
    both = product(a, high, PRECISION)
    if rest is not None:
        both += product(a, (b - high.to(tl.float32)).to(a.dtype), PRECISION)
        both += product(rest, high, PRECISION)
    return both


@triton.jit
def sequence(cu_seqlens, n, time, sequences, SIZE: tl.constexpr, MANY: tl.constexpr):
    """Return sequence n's first token, the one past its last, and its first chunk. MANY >= sequences, a power of 2."""
    if cu_seqlens is None:
        start, end, chunk = n * time, n * time + time, n * tl.cdiv(time, SIZE)
    else:
        m = tl.arange(0, MANY)
        first, last = tl.load(cu_seqlens + m, m < n, 0), tl.load(cu_seqlens + m + 1, m < n, 0)
        chunk = tl.sum((last - first + SIZE - 1) // SIZE).to(tl.int32)
        start, end = tl.load(cu_seqlens + n).to(tl.int32), tl.load(cu_seqlens + n + 1).to(tl.int32)
    return start, end, chunk


@triton.jit
def segment(cu_seqlens, n, time, sequences, segments, SIZE: tl.constexpr, MANY: tl.constexpr):
    """Return the same of segment n % segments of sequence n // segments; the last may have fewer chunks or none."""
    start, end, chunk = sequence(cu_seqlens, n // segments, time, sequences, SIZE, MANY)
    each = tl.cdiv(tl.cdiv(end - start, SIZE), segments)  # chunks
    first = n % segments * each
    return tl.minimum(start + first * SIZE, end), tl.minimum(start + (first + each) * SIZE, end), chunk + first


@triton.jit
def tokens_of(cu_seqlens, chunk, time, sequences, SIZE: tl.constexpr, MANY: tl.constexpr):
    """Return a chunk's first token and the one past its sequence's last; an empty range for chunks past the last."""
    if cu_seqlens is None:
        count = tl.cdiv(time, SIZE)
        n = chunk // count
        start, end = n * time + (chunk - n * count) * SIZE, n * time + time
    else:
        m = tl.arange(0, MANY)
        exist = m < sequences
        first, last = tl.load(cu_seqlens + m, exist, 0), tl.load(cu_seqlens + m + 1, exist, 0)
        count = (last - first + SIZE - 1) // SIZE
        before = exist & (tl.cumsum(count, 0) <= chunk)
        n = tl.sum(before.to(tl.int32))
        start = tl.load(cu_seqlens + n, n < sequences, 0).to(tl.int32)
        start += (chunk - tl.sum(tl.where(before, count, 0)).to(tl.int32)) * SIZE
        end = tl.load(cu_seqlens + n + 1, n < sequences, 0).to(tl.int32)
    return start, end


@triton.jit
def rows(x, start, end, stride, column, SIZE: tl.constexpr, DIM: tl.constexpr):
    """Return pointers to x[start : start + SIZE, column : column + DIM] (SIZE, DIM), and which of them exist."""
    i, d = tl.arange(0, SIZE)[:, None], tl.arange(0, DIM)[None, :]
    return x + start.to(tl.int64) * stride + column + i * stride + d, start + i < end


@triton.jit
def load_rows(x, start, end, stride, column, SIZE: tl.constexpr, DIM: tl.constexpr):
    """Load x[start : start + SIZE, column : column + DIM] (SIZE, DIM)."""
    pointers, exist = rows(x, start, end, stride, column, SIZE, DIM)
    return tl.load(pointers, exist, 0.0)


@triton.jit
def load_columns(x, start, end, stride, column, SIZE: tl.constexpr, DIM: tl.constexpr):
    """Load the transpose of `load_rows` (DIM, SIZE)."""
    i, d = tl.arange(0, SIZE)[None, :], tl.arange(0, DIM)[:, None]
    return tl.load(x + start.to(tl.int64) * stride + column + i * stride + d, start + i < end, 0.0)


@triton.jit
def store_rows(x, value, start, end, stride, column, SIZE: tl.constexpr, DIM: tl.constexpr):
    """Set x[start : start + SIZE, column : column + DIM] to `value`."""
    pointers, exist = rows(x, start, end, stride, column, SIZE, DIM)
    tl.store(pointers, value.to(x.dtype.element_ty), exist)


@triton.jit
def block(x, index, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Return pointers to x[index, row : row + HEIGHT, column : column + WIDTH], of x (all, ROWS, COLUMNS), dense."""
    i, j = tl.arange(0, HEIGHT)[:, None], tl.arange(0, WIDTH)[None, :]
    return x + index.to(tl.int64) * (ROWS * COLUMNS) + row * COLUMNS + column + i * COLUMNS + j


@triton.jit
def load_square(x, index, SIZE: tl.constexpr, LOWER: tl.constexpr):
    """Load x[index] (SIZE, SIZE); LOWER: without its blocks of 16 above the diagonal, which are taken for 0."""
    if not LOWER:
        return tl.load(block(x, index, 0, 0, SIZE, SIZE, SIZE, SIZE))
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    return tl.load(block(x, index, 0, 0, SIZE, SIZE, SIZE, SIZE), i // 16 >= j // 16, 0.0)


@triton.jit
def pairwise_decay(sums_i, sums_j, keep):
    """Return exp(sums_i - sums_j) for the pairs in `keep`, where that is never positive; 0 for the others."""
    return tl.where(keep, exp(sums_i[:, None] - sums_j[None, :]), 0.0)


@triton.jit
def sums_over_columns(x, which):
    """Return x which, for `which` of zeros and ones and log decays x: exact to 4e-6 |x|, by products of float16."""
    which, x = which.to(tl.float16), tl.maximum(x.to(tl.float32), LOWEST)
    high = x.to(tl.float16)
    return product(high, which, "tf32") + product((x - high.to(tl.float32)).to(tl.float16), which, "tf32")


@triton.jit
def sums_over_rows(which, x):
    """Return which x, as `sums_over_columns`."""
    which, x = which.to(tl.float16), tl.maximum(x.to(tl.float32), LOWEST)
    high = x.to(tl.float16)
    return product(which, high, "tf32") + product(which, (x - high.to(tl.float32)).to(tl.float16), "tf32")


@triton.jit
def sums_of_gradients(which, x, PRECISION: tl.constexpr):
    """Return which x, for `which` of zeros and ones: exact to 2^-16 |x|, by products of bfloat16, or as PRECISION."""
    which = tl.where(which, 1.0, 0.0)
    if PRECISION == "tf32x3":
        return product(which, x, PRECISION)
    which, high = which.to(tl.bfloat16), x.to(tl.bfloat16)
    return product(which, high, PRECISION) + product(which, (x - high.to(tl.float32)).to(tl.bfloat16), PRECISION)
