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
of the even block before it at the border between the two,

    D_ijd = exp(e_id) exp(e_jd),    e_i = sum of log_decay from the border to i,  e_j = from behind j to the border,

where e = M log_decay with a matrix M of zeros and ones. With x = exp(e) q in odd blocks and exp(e) k in even ones,
x x^T holds this level's P. Six levels and the diagonal (q_i . k_i) make up a chunk of 64. Nothing positive is
exponentiated.
"""

from __future__ import annotations

import functools

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
    sums_over_columns,
    sums_over_rows,
    tokens_of,
)


IN, OUT = tl.constexpr(6), tl.constexpr(7)  # where `_counting` has the sums from the chunk's start and to its end


@functools.cache
def _counting(device, dtype, transposed=False):
    """M of each level, then the two that make in_i and out_j (8, SIZE, SIZE): whose log_decay counts, row by row."""
    t, s = torch.arange(SIZE, device=device)[:, None], torch.arange(SIZE, device=device)[None, :]
    rows = [(t >> n == s >> n) & torch.where((t >> n) % 2 == 1, s <= t, s > t) for n in range(6)]
    counting = torch.stack(rows + [s <= t, s > t])
    return (counting.mT if transposed else counting).to(dtype).contiguous()


@triton.jit
def _tile(counting, n, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    return tl.load(counting + n * (SIZE * SIZE) + i * SIZE + j)


@triton.jit
def _neighbours(LEVEL, SIZE: tl.constexpr):
    """Whether i and j are in two blocks that meet at this level, one odd and the even one before it."""
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    return (i >> LEVEL) ^ (j >> LEVEL) == 1


@kernel
def _scan(x, y, log_decay, initial, final, states, totals, cu_seqlens, time, sequences, heads, segments, scale,
          x_stride, y_stride, decay_stride,
          KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
          SIZE: tl.constexpr, MANY: tl.constexpr, BACK: tl.constexpr, PRECISION: tl.constexpr):
    """S' = in_C S + (out k)^T v, chunk after chunk; BACK: dS = in_C dS' + (scale in q)^T dO, last chunk first.

    (x, y) is (k, v) or (q, dO). A program has a tile (HEIGHT, WIDTH) of the state, in registers, in float32. `states`
    gets the state before each chunk, or the gradient of the state after it; `final` the last one,
    `totals` the decay from the start to the end.
    """
    tile, head, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, column = tile // (VALUE_DIM // WIDTH) * HEIGHT, tile % (VALUE_DIM // WIDTH) * WIDTH
    start, end, chunk = segment(cu_seqlens, n, time, sequences, segments, SIZE, MANY)
    s, t = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    between = s <= t if BACK else s > t
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
        decay = load_columns(log_decay, token, end, decay_stride, head * KEY_DIM + row, SIZE, HEIGHT)
        y_c = load_rows(y, token, end, y_stride, head * VALUE_DIM + column, SIZE, WIDTH)
        if states is not None:
            tl.store(block(states, (chunk + c) * heads + head, row, column, KEY_DIM, VALUE_DIM, HEIGHT, WIDTH),
                     state.to(states.dtype.element_ty))
        x_c = x_c.to(tl.float32) * (scale * tl.exp(sums_over_columns(decay, between)))
        total = tl.sum(decay.to(tl.float32), 1)
        if totals is not None:
            passed += total
        state = tl.exp(total)[:, None] * state + product(x_c.to(kind), y_c, PRECISION)
    if final is not None:
        tl.store(block(final, n * heads + head, row, column, KEY_DIM, VALUE_DIM, HEIGHT, WIDTH), state)
    if totals is not None:
        if column == 0:
            tl.store(totals + (n * heads + head) * KEY_DIM + row + tl.arange(0, HEIGHT), tl.exp(passed))


@kernel
def _outputs(q, k, v, log_decay, states, o, pairs, counting, cu_seqlens, time, sequences, heads, scale,
             q_stride, k_stride, v_stride, decay_stride,
             KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEIGHT: tl.constexpr, SIZE: tl.constexpr,
             MANY: tl.constexpr, PRECISION: tl.constexpr):
    """O = scale ((in q) S + P v) of one chunk, HEIGHT of the key dims at a time; `pairs`, if not None, gets P."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    start, end = tokens_of(cu_seqlens, chunk, time, sequences, SIZE, MANY)
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    kind = q.dtype.element_ty
    scores, read = tl.zeros((SIZE, SIZE), tl.float32), tl.zeros((SIZE, VALUE_DIM), tl.float32)
    for row in range(0, KEY_DIM, HEIGHT):
        q_c = load_rows(q, start, end, q_stride, head * KEY_DIM + row, SIZE, HEIGHT)
        k_c = load_rows(k, start, end, k_stride, head * KEY_DIM + row, SIZE, HEIGHT)
        decay = load_rows(log_decay, start, end, decay_stride, head * KEY_DIM + row, SIZE, HEIGHT)
        state = tl.load(block(states, chunk * heads + head, row, 0, KEY_DIM, VALUE_DIM, HEIGHT, VALUE_DIM))
        scores += tl.where(i == j, tl.sum(q_c.to(tl.float32) * k_c.to(tl.float32), 1)[:, None], 0.0)
        for level in range(6):
            odd = (i >> level) % 2 == 1
            decayed = tl.exp(sums_over_rows(_tile(counting, level, SIZE), decay))
            x = (tl.where(odd, q_c, k_c).to(tl.float32) * decayed).to(kind)
            scores += tl.where((i > j) & _neighbours(level, SIZE), product(x, tl.trans(x), PRECISION), 0.0)
        read += product((q_c * tl.exp(sums_over_rows(_tile(counting, IN, SIZE), decay))).to(kind), state, PRECISION)
    v_c = load_rows(v, start, end, v_stride, head * VALUE_DIM, SIZE, VALUE_DIM)
    scores = scores.to(kind)
    if pairs is not None:
        tl.store(block(pairs, chunk * heads + head, 0, 0, SIZE, SIZE, SIZE, SIZE), scores)
    read += product(scores, v_c, PRECISION)
    store_rows(o, scale * read, start, end, heads * VALUE_DIM, head * VALUE_DIM, SIZE, VALUE_DIM)


@kernel
def _gradients(q, k, v, log_decay, states, pairs, d_o, d_states, dq, dk, dv, d_decay, counting, counting_back,
               cu_seqlens, time, sequences, heads, scale, q_stride, k_stride, v_stride, decay_stride, o_stride,
               KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEIGHT: tl.constexpr, SIZE: tl.constexpr,
               MANY: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of one chunk from dO and dS', HEIGHT of the key dims at a time. With dP = scale dO v^T,

        dq = scale in dO S^T + (through P),  dk = out v dS'^T + (through P),  dv = P^T dO + (out k) dS'

    and through P, at each level, dx = dP x (dP made symmetric; pairs of this level): exp(e) dx is q's in odd blocks and
    k's in even ones, and M^T (x dx) is log_decay's. log_decay's gradient has these further sums: of q dq from in_i,
    over t <= i, of k dk from out_j, over j < t, and of in_C S dS'.
    """
    head, chunk = tl.program_id(0), tl.program_id(1)
    start, end = tokens_of(cu_seqlens, chunk, time, sequences, SIZE, MANY)
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    kind = q.dtype.element_ty
    sum_kind = counting_back.dtype.element_ty
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
        decay = load_rows(log_decay, start, end, decay_stride, head * KEY_DIM + row, SIZE, HEIGHT)
        dq_c, dk_c = d_diagonal * k_c.to(tl.float32), d_diagonal * q_c.to(tl.float32)
        d_sums = tl.zeros((SIZE, HEIGHT), tl.float32)
        for level in range(6):
            odd = (i >> level) % 2 == 1
            decayed = tl.exp(sums_over_rows(_tile(counting, level, SIZE), decay))
            x = tl.where(odd, q_c, k_c).to(tl.float32) * decayed
            dx = product(tl.where(_neighbours(level, SIZE), d_scores, 0.0), x.to(kind), PRECISION)
            d_sums += product(_tile(counting_back, level, SIZE), (x * dx).to(sum_kind), PRECISION)
            dx *= decayed
            dq_c += tl.where(odd, dx, 0.0)
            dk_c += tl.where(odd, 0.0, dx)

        before = tl.load(block(states, chunk * heads + head, row, 0, KEY_DIM, VALUE_DIM, HEIGHT, VALUE_DIM))
        decay_in = tl.exp(sums_over_rows(_tile(counting, IN, SIZE), decay))
        dq_in = scale * decay_in * product(do_c, tl.trans(before), PRECISION)
        d_sums += product(_tile(counting_back, IN, SIZE), (q_c * dq_in).to(sum_kind), PRECISION)
        store_rows(dq, dq_c + dq_in, start, end, heads * KEY_DIM, head * KEY_DIM + row, SIZE, HEIGHT)

        after = tl.load(block(d_states, chunk * heads + head, row, 0, KEY_DIM, VALUE_DIM, HEIGHT, VALUE_DIM))
        decay_out = tl.exp(sums_over_rows(_tile(counting, OUT, SIZE), decay))
        dk_out = decay_out * product(v_c, tl.trans(after), PRECISION)
        d_sums += product(_tile(counting_back, OUT, SIZE), (k_c * dk_out).to(sum_kind), PRECISION)
        store_rows(dk, dk_c + dk_out, start, end, heads * KEY_DIM, head * KEY_DIM + row, SIZE, HEIGHT)
        dv_c += product((decay_out * k_c).to(kind), after, PRECISION)

        total = tl.exp(tl.sum(decay.to(tl.float32), 0))
        d_sums += (total * tl.sum(before.to(tl.float32) * after.to(tl.float32), 1))[None, :]
        store_rows(d_decay, d_sums, start, end, heads * KEY_DIM, head * KEY_DIM + row, SIZE, HEIGHT)
    scores = tl.load(block(pairs, chunk * heads + head, 0, 0, SIZE, SIZE, SIZE, SIZE))
    dv_c += scale * product(tl.trans(scores), do_c, PRECISION)
    store_rows(dv, dv_c, start, end, heads * VALUE_DIM, head * VALUE_DIM, SIZE, VALUE_DIM)


def kept(q, v, count, keep, sequences):
    """Room for what `forward` leaves to `backward`, for `count` chunks: states, P and M."""
    states = q.new_empty(count, q.shape[-1], v.shape[-1])
    pairs = q.new_empty(count, SIZE, SIZE) if keep else None
    return states, pairs, segments.room(q, v, sequences, q.shape[-1])


def forward(q, k, v, log_decay, scale, initial, cu_seqlens, keep):
    """o, final state, and what `backward` needs: the states, (if `keep`) P, and M."""
    at = Place((q, k, v, log_decay), (initial,), cu_seqlens, keep)
    states, pairs, maps = kept(q, v, at.chunks * at.heads, keep, at.sequences)
    final = q.new_empty(at.sequences, at.heads, at.key_dim, at.value_dim, dtype=torch.float32)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    _launch_scan(at, k, v, log_decay, initial, final, states, maps, cu_seqlens, 1.0, False)
    use = at.how("linear_attention.outputs")
    at.launch(_outputs, use, (at.heads, at.chunks, 1),
              q, k, v, log_decay, states, o, pairs, _counting(q.device, torch.float16), cu_seqlens,
              at.time, at.sequences, at.heads, scale, stride(q), stride(k), stride(v), stride(log_decay),
              at.key_dim, at.value_dim, use.width, SIZE, at.many, precision(q.dtype))
    return o, final, (states, pairs, maps)


def backward(q, k, v, log_decay, scale, initial, cu_seqlens, saved, d_o, d_final):
    """Gradients of q, k, v, log_decay and (None if there was none) the initial state."""
    at, (states, pairs, maps) = Place((q, k, v, log_decay, d_o), (initial, d_final), cu_seqlens), saved
    dq, dk, dv, d_decay = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, log_decay))
    d_initial = None if initial is None else torch.empty(initial.shape, dtype=initial.dtype, device=initial.device)
    d_states = torch.empty_like(states)
    _launch_scan(at, q, d_o, log_decay, d_final, d_initial, d_states, maps, cu_seqlens, scale, True)
    sum_dtype = torch.float32 if q.dtype == torch.float32 else torch.bfloat16        # float16 would underflow
    use = at.how("linear_attention.gradients")
    at.launch(_gradients, use, (at.heads, at.chunks, 1),
              q, k, v, log_decay, states, pairs, d_o, d_states, dq, dk, dv, d_decay,
              _counting(q.device, torch.float16), _counting(q.device, sum_dtype, True), cu_seqlens,
              at.time, at.sequences, at.heads, scale,
              stride(q), stride(k), stride(v), stride(log_decay), stride(d_o),
              at.key_dim, at.value_dim, use.width, SIZE, at.many, precision(q.dtype))
    return dq, dk, dv, d_decay, d_initial


def _launch_scan(at, x, y, log_decay, initial, final, states, maps, cu_seqlens, scale, back):
    use = at.how("linear_attention.scan")
    height, width = min(use.width, at.key_dim), min(use.width, at.value_dim)
    grid = at.key_dim // height * (at.value_dim // width), at.heads, at.sequences * at.segments

    def scan(*ends_and_found, part=0):
        at.launch(_scan, use, grid,
                  x, y, log_decay, *ends_and_found, cu_seqlens, at.time, at.sequences, at.heads, at.segments, scale,
                  stride(x), stride(y), stride(log_decay),
                  at.key_dim, at.value_dim, height, width, SIZE, at.many, back, precision(at.dtype), part=part)

    if maps is None:
        return scan(initial, final, states, None)
    ends = segments.ends(at, x.device)
    scan(None, ends, None, None if back else maps, part=1)
    segments.join(at, maps, ends, initial, final, back)
    scan(ends, None, states, None)
