"""Scans cut along time, for calls with fewer sequences and heads than the GPU has multiprocessors.

Whatever the state before it, a segment of whole chunks leaves an affine map of it, and its gradient goes back through
the same map: S_(g+1) = M_g S_g + B_g, dS_g = M_g^T dS_(g+1) + dB_g. `_maps` makes the gated delta rule's B and M; for
gated linear attention M is diagonal, and its scan leaves it beside B. `_join` makes the states at the borders.
"""

from __future__ import annotations

import torch
import triton.language as tl

from hybridlib.kernels.fused.launch import SIZE, precision, segments_of
from hybridlib.kernels.fused.tiles import block, fine_product, kernel, load_rows, load_square, product, segment


@kernel
def _maps(k, v, inverse, rest, sums, strengths, maps, ends, cu_seqlens, time, sequences, heads, segments, k_stride,
          v_stride, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
          MANY: tl.constexpr, LOWER: tl.constexpr, PRECISION: tl.constexpr):
    """S' = in_C S + k^T (out T (beta v - (beta in) k S)) over a segment: `ends` from 0, `maps` from 1 with v = 0."""
    tile, head, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end, chunk = segment(cu_seqlens, n, time, sequences, segments, SIZE, MANY)
    kind = k.dtype.element_ty
    of_map = tile >= VALUE_DIM // WIDTH
    column = tl.where(of_map, tile - VALUE_DIM // WIDTH, tile) * WIDTH
    last = tl.where(of_map, start, end)  # of no token v is read
    i, j = tl.arange(0, KEY_DIM)[:, None], tl.arange(0, WIDTH)[None, :]
    state = tl.where((i == column + j) & of_map, 1.0, 0.0)
    for step in range(tl.cdiv(end - start, SIZE)):
        token, at = start + step * SIZE, (chunk + step) * heads + head
        k_c = load_rows(k, token, end, k_stride, head * KEY_DIM, SIZE, KEY_DIM)
        v_c = load_rows(v, token, last, v_stride, head * VALUE_DIM + column, SIZE, WIDTH)
        inverse_c = load_square(inverse, at, SIZE, LOWER)
        rest_c = None if rest is None else load_square(rest, at, SIZE, LOWER)
        sum_c = tl.load(sums + at.to(tl.int64) * SIZE + tl.arange(0, SIZE))
        strength = tl.load(strengths + at.to(tl.int64) * SIZE + tl.arange(0, SIZE))
        total = tl.min(sum_c, 0)
        recalled = tl.exp(sum_c)[:, None] * product(k_c, state.to(kind), PRECISION)
        new = fine_product(inverse_c, rest_c, strength[:, None] * (v_c.to(tl.float32) - recalled), PRECISION)
        new = (tl.exp(total - sum_c)[:, None] * new).to(kind)
        state = tl.exp(total) * state + product(tl.trans(k_c), new, PRECISION)
    if of_map:
        tl.store(block(maps, n * heads + head, 0, column, KEY_DIM, KEY_DIM, KEY_DIM, WIDTH), state)
    else:
        tl.store(block(ends, n * heads + head, 0, column, KEY_DIM, VALUE_DIM, KEY_DIM, WIDTH), state)


@kernel
def _join(maps, ends, initial, final, heads, segments, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
          WIDTH: tl.constexpr, DIAGONAL: tl.constexpr, BACK: tl.constexpr):
    """S' = M S + ends from segment to segment, from `initial` (0 if None), each S in `ends`; BACK: M^T, last first."""
    column, head, n = tl.program_id(0) * WIDTH, tl.program_id(1), tl.program_id(2)
    if initial is None:
        state = tl.zeros((KEY_DIM, WIDTH), tl.float32)
    else:
        state = tl.load(block(initial, n * heads + head, 0, column, KEY_DIM, VALUE_DIM, KEY_DIM, WIDTH)).to(tl.float32)
    for step in range(segments):
        g = segments - 1 - step if BACK else step
        at = (n * segments + g) * heads + head
        end = block(ends, at, 0, column, KEY_DIM, VALUE_DIM, KEY_DIM, WIDTH)
        added = tl.load(end)
        tl.store(end, state)
        if DIAGONAL:
            state = tl.load(maps + at.to(tl.int64) * KEY_DIM + tl.arange(0, KEY_DIM))[:, None] * state + added
        else:
            through = tl.load(block(maps, at, 0, 0, KEY_DIM, KEY_DIM, KEY_DIM, KEY_DIM))
            state = product(tl.trans(through) if BACK else through, state, "tf32x3") + added
    if final is not None:
        tl.store(block(final, n * heads + head, 0, column, KEY_DIM, VALUE_DIM, KEY_DIM, WIDTH),
                 state.to(final.dtype.element_ty))


def room(q, v, sequences, *shape):
    """Allocate M, of this shape, of each segment and head, in float32; None if scans are not cut."""
    segments = segments_of(q, v, sequences)
    return None if segments == 1 else q.new_empty(sequences * segments * q.shape[2], *shape, dtype=torch.float32)


def ends(at, device):
    """Allocate the states at the segments' ends, (sequences * segments, heads, key_dim, value_dim) in float32."""
    shape = at.sequences * at.segments, at.heads, at.key_dim, at.value_dim
    return torch.empty(shape, dtype=torch.float32, device=device)


def map_delta_rule(at, k, v, inverse, rest, sums, strengths, maps, cu_seqlens):
    """Fill `maps`, and return the states to which segments come from 0."""
    use, states = at.how("delta_rule.maps"), ends(at, k.device)
    width = min(use.width, at.key_dim)
    at.launch(_maps, use, ((at.key_dim + at.value_dim) // width, at.heads, at.sequences * at.segments),
              k, v, inverse, rest, sums, strengths, maps, states, cu_seqlens,
              *at.sizes, k.stride(1), v.stride(1), at.key_dim, at.value_dim, width,
              SIZE, at.many, at.by_lower, precision(at.dtype))
    return states


def join(at, maps, states, initial, final, back):
    """Replace the states to which segments come from 0 by those they start from; back: gradients, from the last end."""
    diagonal = maps.dim() == 2
    use = at.how("linear_attention.join" if diagonal else "delta_rule.join")
    width = min(use.width, at.value_dim)
    at.launch(_join, use, (at.value_dim // width, at.heads, at.sequences),
              maps, states, initial, final, at.heads, at.segments, at.key_dim, at.value_dim, width, diagonal, back)
