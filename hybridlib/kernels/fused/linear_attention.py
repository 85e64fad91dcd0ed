"""Gated linear attention in four kernels, in the symbols of `hybridlib.kernels.chunked`.

With C the sums of log_decay from the chunk's start (`sums`), decays of a pair of tokens factor over i and j about half
of the chunk's whole decay, H_d: D_ijd = exp(C_id - H_d) exp(H_d - C_jd). A chunk with a decay below exp(`LOWEST`) is
taken level by level: at level l it falls into blocks of 2^l tokens, and a token i in an odd block meets each token j of
the even block before it at the border b, that block's last token,

    D_ijd = exp(e_id) exp(e_jd),    e_i = C_i - C_b,    e_j = C_b - C_j.

With x = exp(e) q in odd blocks and exp(e) k in even ones, x x^T holds this level's P. Six levels and the diagonal
(q_i . k_i) make up a chunk of 64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybridlib.kernels.fused import segments
from hybridlib.kernels.fused.follow import finish, in_turn, open_counts, publish, wait_for
from hybridlib.kernels.fused.launch import Place, SIZE, dense_like, how, precision
from hybridlib.kernels.fused.tiles import (block, exp, kernel, load_columns, load_rows, product, segment, store_rows,
                                           sums_of_gradients, sums_over_columns, sums_over_rows, tokens_of)

LOWEST = {torch.float32: -80.0, torch.bfloat16: -80.0, torch.float16: -8.0}  # sum of log_decay of a chunk taken whole


@triton.jit
def _about_middle(q, k, sums):
    """Return exp(C - H) and exp(H - C), with H half of a chunk's whole decay, q and k with these, and exp(H)."""
    half = 0.5 * tl.min(sums, 0)[None, :]
    up, down = exp(sums - half), exp(half - sums)
    return up, down, (q * up).to(q.dtype), (k * down).to(k.dtype), exp(half)


@triton.jit
def _meeting(q, k, log_decays, sums, LEVEL, SIZE: tl.constexpr):
    """Return a level's exp(e), x, whether a row's block is odd (SIZE, 1), and which pairs i > j meet (SIZE, SIZE)."""
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    at_border = sums_over_rows(j <= (i >> (LEVEL + 1) << (LEVEL + 1)) + (1 << LEVEL) - 1, log_decays)
    odd = (i >> LEVEL) % 2 == 1
    decayed = exp(tl.minimum(tl.where(odd, sums - at_border, at_border - sums), 0.0))
    x = (tl.where(odd, q, k).to(tl.float32) * decayed).to(q.dtype)
    return decayed, x, odd, (i > j) & ((i >> LEVEL) ^ (j >> LEVEL) == 1)


@triton.jit
def _is_strong(lowest, at, BOUND: tl.constexpr, TILES: tl.constexpr):
    return tl.min(tl.load(lowest + at * TILES + tl.arange(0, TILES)), 0) < BOUND


@kernel
def _scan(x, y, log_decay, initial, final, states, lowest, totals, ready, cu_seqlens, time, sequences, heads, segments,
          scale, x_stride, y_stride, decay_stride, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEIGHT: tl.constexpr,
          WIDTH: tl.constexpr, SIZE: tl.constexpr, MANY: tl.constexpr, BACK: tl.constexpr, PRECISION: tl.constexpr):
    """S' = in_C S + (out k)^T v, chunk after chunk; BACK: dS = in_C dS' + (scale in q)^T dO, last chunk first.

    (x, y) is (k, v) or (q, dO). `states` gets the state before each chunk, or the gradient of the state after it;
    `lowest` the least sum of log_decay over a chunk in any of a tile's key dims.
    """
    tile, head, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, column = tile // (VALUE_DIM // WIDTH) * HEIGHT, tile % (VALUE_DIM // WIDTH) * WIDTH
    start, end, chunk = segment(cu_seqlens, n, time, sequences, segments, SIZE, MANY)
    s, t = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    kind = x.dtype.element_ty
    count, tiles = tl.cdiv(end - start, SIZE), tl.num_programs(0)
    if ready is not None:
        open_counts(ready, chunk, count, head, heads, tile, tiles)
    if initial is None:
        state = tl.zeros((HEIGHT, WIDTH), tl.float32)
    else:
        state = tl.load(block(initial, n * heads + head, row, column, KEY_DIM, VALUE_DIM, HEIGHT, WIDTH)).to(tl.float32)
    passed = tl.zeros((HEIGHT,), tl.float32)
    for step in range(count):
        c = count - 1 - step if BACK else step
        token = start + c * SIZE
        x_c = load_columns(x, token, end, x_stride, head * KEY_DIM + row, SIZE, HEIGHT)
        sum_c = sums_over_columns(
            load_columns(log_decay, token, end, decay_stride, head * KEY_DIM + row, SIZE, HEIGHT), s <= t)
        y_c = load_rows(y, token, end, y_stride, head * VALUE_DIM + column, SIZE, WIDTH)
        if ready is not None:  # of the chunk before, whose stores have arrived by now
            some = tl.minimum(step, 1)
            publish(ready + ((chunk + c + (some if BACK else -some)) * heads + head) * tiles + tile, some)
        if states is not None:
            tl.store(block(states, (chunk + c) * heads + head, row, column, KEY_DIM, VALUE_DIM, HEIGHT, WIDTH),
                     state.to(states.dtype.element_ty))
        total = tl.min(sum_c, 1)
        if lowest is not None:
            if column == 0:
                tl.store(lowest + ((chunk + c) * heads + head) * (KEY_DIM // HEIGHT) + row // HEIGHT, tl.min(total, 0))
        x_c = x_c.to(tl.float32) * (scale * exp(sum_c if BACK else total[:, None] - sum_c))
        if totals is not None:
            passed += total
        state = exp(total)[:, None] * state + product(x_c.to(kind), y_c, PRECISION)
    if ready is not None:
        last = chunk if BACK else chunk + count - 1
        publish(ready + (last * heads + head) * tiles + tile, tl.minimum(count, 1))
    if final is not None:
        tl.store(block(final, n * heads + head, row, column, KEY_DIM, VALUE_DIM, HEIGHT, WIDTH), state)
    if totals is not None:
        if column == 0:
            tl.store(totals + (n * heads + head) * KEY_DIM + row + tl.arange(0, HEIGHT), tl.exp(passed))


@triton.jit
def _outputs_of(at, q, k, v, log_decay, states, o, cu_seqlens, time, sequences, heads, scale, q_stride, k_stride,
                v_stride, decay_stride, BY_LEVELS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
                HEIGHT: tl.constexpr, SIZE: tl.constexpr, MANY: tl.constexpr, PRECISION: tl.constexpr):
    """O = scale ((in q) S + P v) of one chunk and head, HEIGHT of the key dims at a time."""
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    chunk, head = at // heads, at % heads
    start, end = tokens_of(cu_seqlens, chunk, time, sequences, SIZE, MANY)
    kind = q.dtype.element_ty
    pairs, read = tl.zeros((SIZE, SIZE), tl.float32), tl.zeros((SIZE, VALUE_DIM), tl.float32)
    for row in range(0, KEY_DIM, HEIGHT):
        here = head * KEY_DIM + row
        q_c = load_rows(q, start, end, q_stride, here, SIZE, HEIGHT)
        k_c = load_rows(k, start, end, k_stride, here, SIZE, HEIGHT)
        decay_c = load_rows(log_decay, start, end, decay_stride, here, SIZE, HEIGHT)
        state = tl.load(block(states, at, row, 0, KEY_DIM, VALUE_DIM, HEIGHT, VALUE_DIM))
        sum_c = sums_over_rows(j <= i, decay_c)
        if BY_LEVELS:
            pairs += tl.where(i == j, tl.sum(q_c.to(tl.float32) * k_c.to(tl.float32), 1)[:, None], 0.0)
            for level in range(6):
                decayed, x, odd, meet = _meeting(q_c, k_c, decay_c, sum_c, level, SIZE)
                pairs += tl.where(meet, product(x, tl.trans(x), PRECISION), 0.0)
            q_in = q_c * exp(sum_c)
        else:
            up, down, x_q, x_k, rest = _about_middle(q_c, k_c, sum_c)
            pairs += tl.where(i >= j, product(x_q, tl.trans(x_k), PRECISION), 0.0)
            q_in = q_c * (up * rest)
        read += product(q_in.to(kind), state, PRECISION)
    v_c = load_rows(v, start, end, v_stride, head * VALUE_DIM, SIZE, VALUE_DIM)
    read += product(pairs.to(kind), v_c, PRECISION)
    store_rows(o, scale * read, start, end, heads * VALUE_DIM, head * VALUE_DIM, SIZE, VALUE_DIM)


@kernel
def _outputs(q, k, v, log_decay, states, lowest, o, ready, cu_seqlens, time, sequences, heads, segments, scale,
             q_stride, k_stride, v_stride, decay_stride, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
             HEIGHT: tl.constexpr, SIZE: tl.constexpr, MANY: tl.constexpr, TILES: tl.constexpr, BOUND: tl.constexpr,
             PRECISION: tl.constexpr, OF_SCAN: tl.constexpr, WARPS: tl.constexpr):
    """Outputs of one chunk and head, by levels where its decays are strong."""
    at = tl.program_id(0)
    if ready is not None:
        at, start, end = in_turn(at, time, sequences, heads, segments, SIZE, False)
        if start == end:
            return
        wait_for(ready, at, OF_SCAN, WARPS)
    if _is_strong(lowest, at, BOUND, TILES):
        _outputs_of(at, q, k, v, log_decay, states, o, cu_seqlens, time, sequences, heads, scale,
                    q_stride, k_stride, v_stride, decay_stride,
                    True, KEY_DIM, VALUE_DIM, HEIGHT, SIZE, MANY, PRECISION)
    else:
        _outputs_of(at, q, k, v, log_decay, states, o, cu_seqlens, time, sequences, heads, scale,
                    q_stride, k_stride, v_stride, decay_stride,
                    False, KEY_DIM, VALUE_DIM, HEIGHT, SIZE, MANY, PRECISION)
    if ready is not None:
        finish()


@triton.jit
def _gradients_of(at, first, q, k, v, log_decay, states, d_o, d_states, dq, dk, dv, d_decay, ready, cu_seqlens, time,
                  sequences, heads, scale, q_stride, k_stride, v_stride, decay_stride, o_stride,
                  BY_LEVELS: tl.constexpr, OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr, ROWS: tl.constexpr,
                  KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEIGHT: tl.constexpr, SIZE: tl.constexpr,
                  MANY: tl.constexpr, PRECISION: tl.constexpr, OF_SCAN: tl.constexpr, WARPS: tl.constexpr):
    """Gradients of one chunk and head from dO and dS', HEIGHT of ROWS key dims at a time. With dP = scale dO v^T,

        dq = scale in dO S^T + (through P),  dk = out v dS'^T + (through P),  dv = P^T dO + (out k) dS'

    and through P, pairs i > j, dx = dP x (keys' x for queries) or dP^T x (queries' for keys), with x's decay once more.
    log_decay's gradient at t is the sum of C's over i >= t, which is q dq from in_i and x dx of queries, less that of
    keys; of k dk from out_j over j < t; and of in_C S dS'. OF_KEYS: dq, dk and log_decay's; OF_VALUES: dv.
    """
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    chunk, head = at // heads, at % heads
    start, end = tokens_of(cu_seqlens, chunk, time, sequences, SIZE, MANY)
    kind = q.dtype.element_ty
    do_c = load_rows(d_o, start, end, o_stride, head * VALUE_DIM, SIZE, VALUE_DIM)
    if OF_KEYS:
        v_c = load_rows(v, start, end, v_stride, head * VALUE_DIM, SIZE, VALUE_DIM)
        d_pairs = scale * product(do_c, tl.trans(v_c), PRECISION)
        diagonal = tl.sum(tl.where(i == j, d_pairs, 0.0), 1)[:, None]
        below = tl.where(i > j, d_pairs, 0.0).to(kind)
        if ready is not None:
            wait_for(ready, at, OF_SCAN, WARPS)
    pairs, dv_c = tl.zeros((SIZE, SIZE), tl.float32), tl.zeros((SIZE, VALUE_DIM), tl.float32)
    for step in range(0, ROWS, HEIGHT):
        row = first + step
        here = head * KEY_DIM + row
        q_c = load_rows(q, start, end, q_stride, here, SIZE, HEIGHT)
        k_c = load_rows(k, start, end, k_stride, here, SIZE, HEIGHT)
        decay_c = load_rows(log_decay, start, end, decay_stride, here, SIZE, HEIGHT)
        after = tl.load(block(d_states, at, row, 0, KEY_DIM, VALUE_DIM, HEIGHT, VALUE_DIM))
        sum_c = sums_over_rows(j <= i, decay_c)
        if OF_KEYS:
            before = tl.load(block(states, at, row, 0, KEY_DIM, VALUE_DIM, HEIGHT, VALUE_DIM))
            d_total = tl.sum(before.to(tl.float32) * after.to(tl.float32), 1)[None, :]
        if BY_LEVELS:
            q_f, k_f, total = q_c.to(tl.float32), k_c.to(tl.float32), tl.min(sum_c, 0)[None, :]
            decay_out = exp(total - sum_c)
            k_out = decay_out * k_f
            if OF_VALUES:
                pairs += tl.where(i == j, tl.sum(q_f * k_f, 1)[:, None], 0.0)
            if OF_KEYS:
                dq_in = scale * exp(sum_c) * product(do_c, tl.trans(before), PRECISION)
                dk_out = decay_out * product(v_c, tl.trans(after), PRECISION)
                dq_c, dk_c, d_sums, d_outs = diagonal * k_f + dq_in, diagonal * q_f + dk_out, q_f * dq_in, k_f * dk_out
                d_total = exp(total) * d_total
            for level in range(6):
                decayed, x, odd, meet = _meeting(q_c, k_c, decay_c, sum_c, level, SIZE)
                if OF_VALUES:
                    pairs += tl.where(meet, product(x, tl.trans(x), PRECISION), 0.0)
                if OF_KEYS:
                    met = tl.where(meet, below, 0.0)
                    dx = product(met, x, PRECISION) + product(tl.trans(met), x, PRECISION)
                    d_sums += tl.where(odd, x * dx, -(x * dx))
                    dq_c += tl.where(odd, decayed * dx, 0.0)
                    dk_c += tl.where(odd, 0.0, decayed * dx)
        else:
            up, down, x_q, x_k, rest = _about_middle(q_c, k_c, sum_c)
            k_out = x_k * rest
            if OF_VALUES:
                pairs += tl.where(i >= j, product(x_q, tl.trans(x_k), PRECISION), 0.0)
            if OF_KEYS:
                dx_q = (scale * rest) * product(do_c, tl.trans(before), PRECISION) + product(below, x_k, PRECISION)
                dq_c, d_sums = diagonal * k_c + up * dx_q, x_q * dx_q
                dx_k = product(tl.trans(below), x_q, PRECISION)
                d_sums -= x_k * dx_k
                dx_out = rest * product(v_c, tl.trans(after), PRECISION)
                dk_c, d_outs = diagonal * q_c + down * (dx_k + dx_out), x_k * dx_out
                d_total = rest * rest * d_total
        if OF_KEYS:
            store_rows(dq, dq_c, start, end, heads * KEY_DIM, here, SIZE, HEIGHT)
            store_rows(dk, dk_c, start, end, heads * KEY_DIM, here, SIZE, HEIGHT)
        if OF_VALUES:
            dv_c += product(k_out.to(kind), after, PRECISION)
        if OF_KEYS:
            d_decay_c = sums_of_gradients(j >= i, d_sums, PRECISION)
            d_decay_c += sums_of_gradients(j < i, d_outs, PRECISION) + d_total
            store_rows(d_decay, d_decay_c, start, end, heads * KEY_DIM, here, SIZE, HEIGHT)
    if OF_VALUES:
        dv_c += scale * product(tl.trans(pairs.to(kind)), do_c, PRECISION)
        store_rows(dv, dv_c, start, end, heads * VALUE_DIM, head * VALUE_DIM, SIZE, VALUE_DIM)


@kernel
def _gradients(q, k, v, log_decay, states, lowest, d_o, d_states, dq, dk, dv, d_decay, ready, cu_seqlens, time,
               sequences, heads, segments, scale, q_stride, k_stride, v_stride, decay_stride, o_stride,
               ROWS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEIGHT: tl.constexpr,
               SIZE: tl.constexpr, MANY: tl.constexpr, TILES: tl.constexpr, BOUND: tl.constexpr,
               PRECISION: tl.constexpr, OF_SCAN: tl.constexpr, WARPS: tl.constexpr):
    """Gradients of one chunk, head and ROWS key dims, by levels where decays are strong; of v if `dv` is not None."""
    at, first = tl.program_id(0) // (KEY_DIM // ROWS), tl.program_id(0) % (KEY_DIM // ROWS) * ROWS
    if ready is not None:
        at, start, end = in_turn(at, time, sequences, heads, segments, SIZE, True)
        if start == end:
            return
    if _is_strong(lowest, at, BOUND, TILES):
        _gradients_of(at, first, q, k, v, log_decay, states, d_o, d_states, dq, dk, dv, d_decay, ready, cu_seqlens,
                      time, sequences, heads, scale, q_stride, k_stride, v_stride, decay_stride, o_stride,
                      True, True, dv is not None, ROWS, KEY_DIM, VALUE_DIM, HEIGHT, SIZE, MANY, PRECISION,
                      OF_SCAN, WARPS)
    else:
        _gradients_of(at, first, q, k, v, log_decay, states, d_o, d_states, dq, dk, dv, d_decay, ready, cu_seqlens,
                      time, sequences, heads, scale, q_stride, k_stride, v_stride, decay_stride, o_stride,
                      False, True, dv is not None, ROWS, KEY_DIM, VALUE_DIM, HEIGHT, SIZE, MANY, PRECISION,
                      OF_SCAN, WARPS)
    if ready is not None:
        finish()


@kernel
def _value_gradients(q, k, log_decay, lowest, d_o, d_states, dv, cu_seqlens, time, sequences, heads, scale,
                     q_stride, k_stride, decay_stride, o_stride,
                     KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEIGHT: tl.constexpr, SIZE: tl.constexpr,
                     MANY: tl.constexpr, TILES: tl.constexpr, BOUND: tl.constexpr, PRECISION: tl.constexpr):
    """dv of one chunk and head, by levels where the chunk's decays are strong."""
    at = tl.program_id(0)
    if _is_strong(lowest, at, BOUND, TILES):
        _gradients_of(at, 0, q, k, None, log_decay, None, d_o, d_states, None, None, dv, None, None, cu_seqlens,
                      time, sequences, heads, scale, q_stride, k_stride, 0, decay_stride, o_stride,
                      True, False, True, KEY_DIM, KEY_DIM, VALUE_DIM, HEIGHT, SIZE, MANY, PRECISION, 0, 0)
    else:
        _gradients_of(at, 0, q, k, None, log_decay, None, d_o, d_states, None, None, dv, None, None, cu_seqlens,
                      time, sequences, heads, scale, q_stride, k_stride, 0, decay_stride, o_stride,
                      False, False, True, KEY_DIM, KEY_DIM, VALUE_DIM, HEIGHT, SIZE, MANY, PRECISION, 0, 0)


def saved_tensors(q, v, count, keep, sequences):
    """Allocate, for `count` chunks, what `forward` leaves to `backward`: states, `lowest` and M."""
    tiles = q.shape[-1] // how("linear_attention.scan", q.dtype, q.shape[-1], v.shape[-1]).width
    return (q.new_empty(count, q.shape[-1], v.shape[-1]), q.new_empty(count, tiles, dtype=torch.float32),
            segments.room(q, v, sequences, q.shape[-1]))


def forward(q, k, v, log_decay, scale, initial, cu_seqlens, keep):
    """Return o, the final state, and `saved_tensors` for `backward`."""
    at = Place((q, k, v, log_decay), (initial,), cu_seqlens, keep)
    states, lowest, maps = saved_tensors(q, v, at.chunks * at.heads, keep, at.sequences)
    final = q.new_empty(at.sequences, at.heads, at.key_dim, at.value_dim, dtype=torch.float32)
    o = dense_like(v)
    ready, of_scan = _launch_scan(at, k, v, log_decay, initial, final, states, lowest, maps, cu_seqlens, 1.0, False)
    use = at.how("linear_attention.outputs")._replace(follows=ready is not None)
    at.launch(_outputs, use, (at.heads * at.turns(ready), 1, 1),
              q, k, v, log_decay, states, lowest, o, ready, cu_seqlens, *at.sizes, scale,
              q.stride(1), k.stride(1), v.stride(1), log_decay.stride(1),
              *_constants(at, use, lowest), *of_scan, part=of_scan)
    return o, final, (states, lowest, maps)


def backward(q, k, v, log_decay, scale, initial, cu_seqlens, saved, d_o, d_final):
    """Return gradients of q, k, v, log_decay and, None if there was none, the initial state."""
    apart = max(q.shape[-1], v.shape[-1]) > 64  # dv by itself: one program cannot hold it all in registers
    at, (states, lowest, maps) = Place((q, k, v, log_decay, d_o), (initial, d_final), cu_seqlens), saved
    dq, dk, dv, d_decay = map(dense_like, (q, k, v, log_decay))
    d_initial = None if initial is None else dense_like(initial)
    d_states = torch.empty_like(states)
    ready, of_scan = _launch_scan(at, q, d_o, log_decay, d_final, d_initial, d_states, None, maps, cu_seqlens, scale,
                                  True)
    use = at.how("linear_attention.gradients")._replace(follows=ready is not None)
    rows = use.width if apart else at.key_dim
    at.launch(_gradients, use, (at.heads * at.turns(ready) * (at.key_dim // rows), 1, 1),
              q, k, v, log_decay, states, lowest, d_o, d_states, dq, dk, None if apart else dv, d_decay, ready,
              cu_seqlens, *at.sizes, scale, q.stride(1), k.stride(1), v.stride(1), log_decay.stride(1), d_o.stride(1),
              rows, *_constants(at, use, lowest), *of_scan, part=of_scan)
    if apart:
        use = at.how("linear_attention.value_gradients")
        at.launch(_value_gradients, use, (at.heads * at.chunks, 1, 1),
                  q, k, log_decay, lowest, d_o, d_states, dv, cu_seqlens, *at.sizes[:3], scale,
                  q.stride(1), k.stride(1), log_decay.stride(1), d_o.stride(1), *_constants(at, use, lowest))
    return dq, dk, dv, d_decay, d_initial


def _constants(at, use, lowest):
    return (at.key_dim, at.value_dim, use.width, SIZE, at.many, lowest.shape[1], LOWEST[at.dtype],
            precision(at.dtype))


def _launch_scan(at, x, y, log_decay, initial, final, states, lowest, maps, cu_seqlens, scale, back):
    """Run a scan; return its counts for a kernel beside it (`follow`), and the programs and warps of a count."""
    use = at.how("linear_attention.scan")
    height, width = min(use.width, at.key_dim), min(use.width, at.value_dim)
    tiles = at.key_dim // height * (at.value_dim // width)
    ready = None if back and max(at.key_dim, at.value_dim) > 64 else at.counts(tiles)  # beside it, gradients are slower

    def scan(*ends_and_results, part=0):
        at.launch(_scan, use, (tiles, at.heads, at.sequences * at.segments),
                  x, y, log_decay, *ends_and_results, cu_seqlens, *at.sizes, scale,
                  x.stride(1), y.stride(1), log_decay.stride(1),
                  at.key_dim, at.value_dim, height, width, SIZE, at.many, back, precision(at.dtype),
                  part=(part, ready is not None))

    if maps is None:
        scan(initial, final, states, lowest, None, ready)
    else:
        ends = segments.ends(at, x.device)
        scan(None, ends, None, None, None if back else maps, None, part=1)
        segments.join(at, maps, ends, initial, final, back)
        scan(ends, None, states, lowest, None, ready)
    return ready, (tiles, use.warps)
