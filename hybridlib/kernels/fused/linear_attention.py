"""Gated linear attention in three kernels, in the symbols of `hybridlib.kernels.chunked`.

=================  ==================================  =======================================================
kernel             one program for each                computes
=================  ==================================  =======================================================
_scan              segment, head, tile of the state    states before chunks, or their gradients, last chunk first
_outputs           chunk and head                      O
_gradients         chunk and head                      all gradients but the initial state's
=================  ==================================  =======================================================

The states and P are kept for the backward pass, in the dtype of the inputs; decays are computed again. A segment is a
sequence or, where these are few, a part of one (`segments`).

Decays D_ijd of a pair of tokens do not factor over i and j unless a decay is divided by another. So pairs are taken
level by level: at level l the chunk falls into blocks of 2^l tokens, and a token i in an odd block meets each token j
of the even block before it at the border b, that block's last token,

    D_ijd = exp(e_id) exp(e_jd),    e_i = C_i - C_b,    e_j = C_b - C_j,

where C are the sums of log_decay from the chunk's start (`sums`), which the first scan leaves in float32. With
x = exp(e) q in odd blocks and exp(e) k in even ones, x x^T holds this level's P. Six levels and the diagonal
(q_i . k_i) make up a chunk of 64. Nothing positive is exponentiated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import segments
from .launch import SIZE, Place, precision, stride
from .tiles import (
    block,
    load_columns,
    kernel,
    load_rows,
    product,
    segment,
    store_rows,
    sums_of_gradients,
    sums_over_columns,
    tokens_of,
)


@triton.jit
def _meeting(sums, c, at, row, LEVEL, KEY_DIM: tl.constexpr, HEIGHT: tl.constexpr, SIZE: tl.constexpr):
    """Of this level: exp(e) (SIZE, HEIGHT), whether a row's block is odd, and which pairs i > j meet (SIZE, SIZE)."""
    i, j, d = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :], tl.arange(0, HEIGHT)[None, :]
    border = (i >> (LEVEL + 1) << (LEVEL + 1)) + (1 << LEVEL) - 1
    c_b = tl.load(sums + at.to(tl.int64) * (SIZE * KEY_DIM) + border * KEY_DIM + row + d)
    odd = (i >> LEVEL) % 2 == 1
    return tl.exp(tl.minimum(tl.where(odd, c - c_b, c_b - c), 0.0)), odd, (i >> LEVEL) ^ (j >> LEVEL) == 1


@kernel
def _scan(x, y, log_decay, sums, initial, final, states, totals, cu_seqlens, time, sequences, heads, segments, scale,
          x_stride, y_stride, decay_stride,
          KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
          SIZE: tl.constexpr, MANY: tl.constexpr, BACK: tl.constexpr, PRECISION: tl.constexpr):
    """S' = in_C S + (out k)^T v, chunk after chunk; BACK: dS = in_C dS' + (scale in q)^T dO, last chunk first.

    (x, y) is (k, v) or (q, dO). A program has a tile (HEIGHT, WIDTH) of the state, in registers, in float32. `states`
    gets the state before each chunk, or the gradient of the state after it; `final` the last one,
    `totals` the decay from the start to the end. `sums` gets C, if it is not None; BACK reads it, and no log_decay.
    """
    tile, head, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, column = tile // (VALUE_DIM // WIDTH) * HEIGHT, tile % (VALUE_DIM // WIDTH) * WIDTH
    start, end, chunk = segment(cu_seqlens, n, time, sequences, segments, SIZE, MANY)
    s, t = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    d = tl.arange(0, HEIGHT)[:, None]
    kind = x.dtype.element_ty
    if initial is None:
        state = tl.zeros((HEIGHT, WIDTH), tl.float32)
    else:
        state = tl.load(block(initial, n * heads + head, row, column, KEY_DIM, VALUE_DIM, HEIGHT, WIDTH)).to(tl.float32)
    count = tl.cdiv(end - start, SIZE)
    passed = tl.zeros((HEIGHT,), tl.float32)
    for step in range(count):
        c = count - 1 - step if BACK else step
        token = start + c * SIZE
        x_c = load_columns(x, token, end, x_stride, head * KEY_DIM + row, SIZE, HEIGHT)
        kept = ((chunk + c) * heads + head).to(tl.int64) * (SIZE * KEY_DIM) + t * KEY_DIM + row + d  # C, transposed
        if BACK:
            sum_c = tl.load(sums + kept)
        else:
            sum_c = sums_over_columns(
                load_columns(log_decay, token, end, decay_stride, head * KEY_DIM + row, SIZE, HEIGHT), s <= t)
            if sums is not None:
                if column == 0:
                    tl.store(sums + kept, sum_c)
        y_c = load_rows(y, token, end, y_stride, head * VALUE_DIM + column, SIZE, WIDTH)
        if states is not None:
            tl.store(block(states, (chunk + c) * heads + head, row, column, KEY_DIM, VALUE_DIM, HEIGHT, WIDTH),
                     state.to(states.dtype.element_ty))
        total = tl.min(sum_c, 1)
        x_c = x_c.to(tl.float32) * (scale * tl.exp(sum_c if BACK else total[:, None] - sum_c))
        if totals is not None:
            passed += total
        state = tl.exp(total)[:, None] * state + product(x_c.to(kind), y_c, PRECISION)
    if final is not None:
        tl.store(block(final, n * heads + head, row, column, KEY_DIM, VALUE_DIM, HEIGHT, WIDTH), state)
    if totals is not None:
        if column == 0:
            tl.store(totals + (n * heads + head) * KEY_DIM + row + tl.arange(0, HEIGHT), tl.exp(passed))


@kernel
def _outputs(q, k, v, sums, states, o, pairs, cu_seqlens, time, sequences, heads, scale,
             q_stride, k_stride, v_stride,
             KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEIGHT: tl.constexpr, SIZE: tl.constexpr,
             MANY: tl.constexpr, PRECISION: tl.constexpr):
    """O = scale ((in q) S + P v) of one chunk, HEIGHT of the key dims at a time; `pairs`, if not None, gets P."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    start, end = tokens_of(cu_seqlens, chunk, time, sequences, SIZE, MANY)
    at = chunk * heads + head
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    kind = q.dtype.element_ty
    scores, read = tl.zeros((SIZE, SIZE), tl.float32), tl.zeros((SIZE, VALUE_DIM), tl.float32)
    for row in range(0, KEY_DIM, HEIGHT):
        q_c = load_rows(q, start, end, q_stride, head * KEY_DIM + row, SIZE, HEIGHT)
        k_c = load_rows(k, start, end, k_stride, head * KEY_DIM + row, SIZE, HEIGHT)
        sum_c = tl.load(block(sums, at, 0, row, SIZE, KEY_DIM, SIZE, HEIGHT))
        state = tl.load(block(states, at, row, 0, KEY_DIM, VALUE_DIM, HEIGHT, VALUE_DIM))
        scores += tl.where(i == j, tl.sum(q_c.to(tl.float32) * k_c.to(tl.float32), 1)[:, None], 0.0)
        for level in range(6):
            decayed, odd, meet = _meeting(sums, sum_c, at, row, level, KEY_DIM, HEIGHT, SIZE)
            x = (tl.where(odd, q_c, k_c).to(tl.float32) * decayed).to(kind)
            scores += tl.where((i > j) & meet, product(x, tl.trans(x), PRECISION), 0.0)
        read += product((q_c * tl.exp(sum_c)).to(kind), state, PRECISION)
    v_c = load_rows(v, start, end, v_stride, head * VALUE_DIM, SIZE, VALUE_DIM)
    scores = scores.to(kind)
    if pairs is not None:
        tl.store(block(pairs, at, 0, 0, SIZE, SIZE, SIZE, SIZE), scores)
    read += product(scores, v_c, PRECISION)
    store_rows(o, scale * read, start, end, heads * VALUE_DIM, head * VALUE_DIM, SIZE, VALUE_DIM)


@kernel
def _gradients(q, k, v, sums, states, pairs, d_o, d_states, dq, dk, dv, d_decay,
               cu_seqlens, time, sequences, heads, scale, q_stride, k_stride, v_stride, o_stride,
               KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEIGHT: tl.constexpr, SIZE: tl.constexpr,
               MANY: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of one chunk from dO and dS', HEIGHT of the key dims at a time. With dP = scale dO v^T,

        dq = scale in dO S^T + (through P),  dk = out v dS'^T + (through P),  dv = P^T dO + (out k) dS'

    and through P, at each level, dx = dP x (dP made symmetric; pairs of this level): exp(e) dx is q's in odd blocks and
    k's in even ones, and C's is x dx in odd blocks and -x dx in even ones, for over a block and the one it meets x dx
    sums up to the same, so that C_b's is 0. log_decay's gradient at t is the sum of C's over i >= t, where q dq from
    in_i joins in; of k dk from out_j over j < t; and of in_C S dS'.
    """
    head, chunk = tl.program_id(0), tl.program_id(1)
    start, end = tokens_of(cu_seqlens, chunk, time, sequences, SIZE, MANY)
    at = chunk * heads + head
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    kind = q.dtype.element_ty
    v_c = load_rows(v, start, end, v_stride, head * VALUE_DIM, SIZE, VALUE_DIM)
    do_c = load_rows(d_o, start, end, o_stride, head * VALUE_DIM, SIZE, VALUE_DIM)
    d_scores = product(do_c, tl.trans(v_c), PRECISION), product(v_c, tl.trans(do_c), PRECISION)
    d_scores = tl.where(i >= j, d_scores[0], d_scores[1]) * scale
    d_diagonal = tl.sum(tl.where(i == j, d_scores, 0.0), 1)[:, None]
    d_scores = d_scores.to(kind)
    dv_c = tl.zeros((SIZE, VALUE_DIM), tl.float32)
    for row in range(0, KEY_DIM, HEIGHT):
        q_c = load_rows(q, start, end, q_stride, head * KEY_DIM + row, SIZE, HEIGHT)
        k_c = load_rows(k, start, end, k_stride, head * KEY_DIM + row, SIZE, HEIGHT)
        sum_c = tl.load(block(sums, at, 0, row, SIZE, KEY_DIM, SIZE, HEIGHT))
        dq_c, dk_c = d_diagonal * k_c.to(tl.float32), d_diagonal * q_c.to(tl.float32)
        d_sums = tl.zeros((SIZE, HEIGHT), tl.float32)
        for level in range(6):
            decayed, odd, meet = _meeting(sums, sum_c, at, row, level, KEY_DIM, HEIGHT, SIZE)
            x = (tl.where(odd, q_c, k_c).to(tl.float32) * decayed).to(kind)
            dx = product(tl.where(meet, d_scores, 0.0), x, PRECISION)
            moved = x.to(tl.float32) * dx
            d_sums += tl.where(odd, moved, -moved)
            dx *= decayed
            dq_c += tl.where(odd, dx, 0.0)
            dk_c += tl.where(odd, 0.0, dx)

        before = tl.load(block(states, at, row, 0, KEY_DIM, VALUE_DIM, HEIGHT, VALUE_DIM))
        dq_in = scale * tl.exp(sum_c) * product(do_c, tl.trans(before), PRECISION)
        store_rows(dq, dq_c + dq_in, start, end, heads * KEY_DIM, head * KEY_DIM + row, SIZE, HEIGHT)
        d_decay_c = sums_of_gradients(j >= i, d_sums + q_c * dq_in, PRECISION)

        after = tl.load(block(d_states, at, row, 0, KEY_DIM, VALUE_DIM, HEIGHT, VALUE_DIM))
        total = tl.min(sum_c, 0)[None, :]
        decay_out = tl.exp(total - sum_c)
        dk_out = decay_out * product(v_c, tl.trans(after), PRECISION)
        store_rows(dk, dk_c + dk_out, start, end, heads * KEY_DIM, head * KEY_DIM + row, SIZE, HEIGHT)
        d_decay_c += sums_of_gradients(j < i, k_c * dk_out, PRECISION)
        dv_c += product((decay_out * k_c).to(kind), after, PRECISION)

        d_decay_c += tl.exp(total) * tl.sum(before.to(tl.float32) * after.to(tl.float32), 1)[None, :]
        store_rows(d_decay, d_decay_c, start, end, heads * KEY_DIM, head * KEY_DIM + row, SIZE, HEIGHT)
    scores = tl.load(block(pairs, at, 0, 0, SIZE, SIZE, SIZE, SIZE))
    dv_c += scale * product(tl.trans(scores), do_c, PRECISION)
    store_rows(dv, dv_c, start, end, heads * VALUE_DIM, head * VALUE_DIM, SIZE, VALUE_DIM)


def kept(q, v, count, keep, sequences):
    """Room for what `forward` leaves to `backward`, for `count` chunks: sums, states, P and M."""
    sums = q.new_empty(count, SIZE, q.shape[-1], dtype=torch.float32)
    states = q.new_empty(count, q.shape[-1], v.shape[-1])
    pairs = q.new_empty(count, SIZE, SIZE) if keep else None
    return sums, states, pairs, segments.room(q, v, sequences, q.shape[-1])


def forward(q, k, v, log_decay, scale, initial, cu_seqlens, keep):
    """o, final state, and what `backward` needs: sums, states, (if `keep`) P, and M."""
    at = Place((q, k, v, log_decay), (initial,), cu_seqlens, keep)
    sums, states, pairs, maps = kept(q, v, at.chunks * at.heads, keep, at.sequences)
    final = q.new_empty(at.sequences, at.heads, at.key_dim, at.value_dim, dtype=torch.float32)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    _launch_scan(at, k, v, log_decay, sums, initial, final, states, maps, cu_seqlens, 1.0, False)
    use = at.how("linear_attention.outputs")
    at.launch(_outputs, use, (at.heads, at.chunks, 1),
              q, k, v, sums, states, o, pairs, cu_seqlens,
              at.time, at.sequences, at.heads, scale, stride(q), stride(k), stride(v),
              at.key_dim, at.value_dim, use.width, SIZE, at.many, precision(q.dtype))
    return o, final, (sums, states, pairs, maps)


def backward(q, k, v, log_decay, scale, initial, cu_seqlens, saved, d_o, d_final):
    """Gradients of q, k, v, log_decay and (None if there was none) the initial state."""
    at, (sums, states, pairs, maps) = Place((q, k, v, log_decay, d_o), (initial, d_final), cu_seqlens), saved
    dq, dk, dv, d_decay = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, log_decay))
    d_initial = None if initial is None else torch.empty(initial.shape, dtype=initial.dtype, device=initial.device)
    d_states = torch.empty_like(states)
    _launch_scan(at, q, d_o, log_decay, sums, d_final, d_initial, d_states, maps, cu_seqlens, scale, True)
    use = at.how("linear_attention.gradients")
    at.launch(_gradients, use, (at.heads, at.chunks, 1),
              q, k, v, sums, states, pairs, d_o, d_states, dq, dk, dv, d_decay, cu_seqlens,
              at.time, at.sequences, at.heads, scale, stride(q), stride(k), stride(v), stride(d_o),
              at.key_dim, at.value_dim, use.width, SIZE, at.many, precision(q.dtype))
    return dq, dk, dv, d_decay, d_initial


def _launch_scan(at, x, y, log_decay, sums, initial, final, states, maps, cu_seqlens, scale, back):
    use = at.how("linear_attention.scan")
    height, width = min(use.width, at.key_dim), min(use.width, at.value_dim)
    grid = at.key_dim // height * (at.value_dim // width), at.heads, at.sequences * at.segments

    def scan(sums, *ends_and_found, part=0):
        at.launch(_scan, use, grid,
                  x, y, log_decay, sums, *ends_and_found,
                  cu_seqlens, at.time, at.sequences, at.heads, at.segments, scale,
                  stride(x), stride(y), stride(log_decay),
                  at.key_dim, at.value_dim, height, width, SIZE, at.many, back, precision(at.dtype), part=part)

    if maps is None:
        return scan(sums, initial, final, states, None)
    ends = segments.ends(at, x.device)
    scan(sums if back else None, None, ends, None, None if back else maps, part=1)
    segments.join(at, maps, ends, initial, final, back)
    scan(sums, ends, None, states, None)
