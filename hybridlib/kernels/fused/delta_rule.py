"""The gated delta rule in five kernels, in the symbols of `hybridlib.kernels.chunked`; see the book's page on kernels.

With R = beta (v - in k S), the tokens' writes are N = T R, T = (I + A)^-1; then O = scale (in q) S + P N and
S' = in_C S + (out k)^T N. The backward pass takes T, the states and N (`written`) in the inputs' dtype, with the part
of T that rounding cut off (`rest`), for dR = T^T dN cancels where keys repeat. Sums of log_decay from the chunk's start
(`sums`) and beta (`strengths`) lie by chunk, in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybridlib.kernels.fused import segments
from hybridlib.kernels.fused.follow import finish, in_turn, open_counts, publish, wait_for
from hybridlib.kernels.fused.inverse import invert
from hybridlib.kernels.fused.launch import Place, SIZE, dense_like, precision
from hybridlib.kernels.fused.tiles import (block, exp, fine_product, kernel, load_rows, load_square, pairwise_decay,
                                           product, segment, store_rows, tokens_of)

ALL = 1 << 30  # chunks of a turn: all of them, see the book on launches


@kernel
def _scan(q, k, v, inverse, sums, strengths, initial, o, final, states, written, ready,
          turn, cu_seqlens, time, sequences, heads, segments, scale, q_stride, k_stride, v_stride,
          KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, MANY: tl.constexpr,
          LOWER: tl.constexpr, PRECISION: tl.constexpr):
    """Chunk after chunk: N = T (beta v - (beta in) k S), O = (scale in) q S + P N, S' = in_C S + k^T (out N).

    Without `o`, `states` and `written` get the state before each chunk and N. LOWER: see `load_square`.
    """
    column, head, n = tl.program_id(0) * WIDTH, tl.program_id(1), tl.program_id(2)
    start, end, chunk = segment(cu_seqlens, n, time, sequences, segments, SIZE, MANY)
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    kind = k.dtype.element_ty
    count, tile, tiles = tl.cdiv(end - start, SIZE), tl.program_id(0), tl.num_programs(0)
    if ready is not None:
        open_counts(ready, chunk, count, head, heads, tile, tiles)
    if initial is None:
        state = tl.zeros((KEY_DIM, WIDTH), tl.float32)
    else:
        state = tl.load(block(initial, n * heads + head, 0, column, KEY_DIM, VALUE_DIM, KEY_DIM, WIDTH)).to(tl.float32)
    for first in range(0, count, turn):
        for step in range(first, tl.minimum(first + turn, count)):
            token, at = start + step * SIZE, (chunk + step) * heads + head
            if o is not None:
                q_c = load_rows(q, token, end, q_stride, head * KEY_DIM, SIZE, KEY_DIM)
            k_c = load_rows(k, token, end, k_stride, head * KEY_DIM, SIZE, KEY_DIM)
            v_c = load_rows(v, token, end, v_stride, head * VALUE_DIM + column, SIZE, WIDTH)
            inverse_c = load_square(inverse, at, SIZE, LOWER)
            sum_c = tl.load(sums + at.to(tl.int64) * SIZE + tl.arange(0, SIZE))
            strength = tl.load(strengths + at.to(tl.int64) * SIZE + tl.arange(0, SIZE))
            total = tl.min(sum_c, 0)
            decay_in, decay_out = exp(sum_c), exp(total - sum_c)

            before = state.to(kind)
            if ready is not None:  # of the chunk before, whose stores have arrived by now
                some = tl.minimum(step, 1)
                publish(ready + (at - some * heads) * tiles + tile, some)
            if states is not None:
                tl.store(block(states, at, 0, column, KEY_DIM, VALUE_DIM, KEY_DIM, WIDTH), before)
            right = strength[:, None] * (v_c.to(tl.float32) - decay_in[:, None] * product(k_c, before, PRECISION))
            new = product(inverse_c, right.to(kind), PRECISION)
            if written is not None:
                store_rows(written, new, token, end, heads * VALUE_DIM, head * VALUE_DIM + column, SIZE, WIDTH)
            if o is not None:
                scores = product(q_c, tl.trans(k_c), PRECISION) * pairwise_decay(sum_c, sum_c, i >= j)
                read = decay_in[:, None] * product(q_c, before, PRECISION)
                read += product(scores.to(kind), new.to(kind), PRECISION)
                store_rows(o, scale * read, token, end, heads * VALUE_DIM, head * VALUE_DIM + column, SIZE, WIDTH)
            state = exp(total) * state + product(tl.trans(k_c), (decay_out[:, None] * new).to(kind), PRECISION)
    if ready is not None:
        publish(ready + ((chunk + count - 1) * heads + head) * tiles + tile, tl.minimum(count, 1))
    if final is not None:
        tl.store(block(final, n * heads + head, 0, column, KEY_DIM, VALUE_DIM, KEY_DIM, WIDTH), state)


@triton.jit
def _own_chunk(ready, cu_seqlens, time, sequences, heads, segments, SIZE: tl.constexpr, MANY: tl.constexpr,
               BACK: tl.constexpr):
    """Return the index of this program's chunk and head, and its tokens: none, for some programs beside a scan."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    at = chunk * heads + head
    if ready is None:
        start, end = tokens_of(cu_seqlens, chunk, time, sequences, SIZE, MANY)
    else:
        at, start, end = in_turn(at, time, sequences, heads, segments, SIZE, BACK)
    return at, start, end


@kernel
def _outputs(q, k, sums, states, written, o, ready, cu_seqlens, time, sequences, heads, segments, scale, q_stride,
             k_stride, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
             MANY: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, PRECISION: tl.constexpr):
    """O = scale (in q) S + P N of one chunk, beside the scan that makes S and N if `ready` is not None."""
    head = tl.program_id(0)
    at, start, end = _own_chunk(ready, cu_seqlens, time, sequences, heads, segments, SIZE, MANY, False)
    if start == end:
        return
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    kind = q.dtype.element_ty
    q_c = load_rows(q, start, end, q_stride, head * KEY_DIM, SIZE, KEY_DIM)
    k_c = load_rows(k, start, end, k_stride, head * KEY_DIM, SIZE, KEY_DIM)
    sum_c = tl.load(sums + at.to(tl.int64) * SIZE + tl.arange(0, SIZE))
    decay_in = exp(sum_c)
    scores = (product(q_c, tl.trans(k_c), PRECISION) * pairwise_decay(sum_c, sum_c, i >= j)).to(kind)
    if ready is not None:
        wait_for(ready, at, TILES, WARPS)
    for column in range(0, VALUE_DIM, WIDTH):
        here = head * VALUE_DIM + column
        before = tl.load(block(states, at, 0, column, KEY_DIM, VALUE_DIM, KEY_DIM, WIDTH))
        new = load_rows(written, start, end, heads * VALUE_DIM, here, SIZE, WIDTH)
        read = decay_in[:, None] * product(q_c, before, PRECISION) + product(scores, new, PRECISION)
        store_rows(o, scale * read, start, end, heads * VALUE_DIM, here, SIZE, WIDTH)
    if ready is not None:
        finish()


@kernel
def _scan_back(q, k, inverse, rest, sums, strengths, d_o, d_final, d_right, d_states, d_initial, ready,
               cu_seqlens, time, sequences, heads, segments, scale, q_stride, k_stride, o_stride,
               KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
               MANY: tl.constexpr, PRECISION: tl.constexpr):
    """Last chunk first: dN = P^T dO + out k dS', dR = T^T dN, dS = in_C dS' + q^T (scale in dO) - k^T (beta in dR)."""
    column, head, n = tl.program_id(0) * WIDTH, tl.program_id(1), tl.program_id(2)
    start, end, chunk = segment(cu_seqlens, n, time, sequences, segments, SIZE, MANY)
    j, i = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    kind = q.dtype.element_ty
    count, tile, tiles = tl.cdiv(end - start, SIZE), tl.program_id(0), tl.num_programs(0)
    if ready is not None:
        open_counts(ready, chunk, count, head, heads, tile, tiles)
    if d_final is None:
        d_state = tl.zeros((KEY_DIM, WIDTH), tl.float32)
    else:
        d_state = tl.load(block(d_final, n * heads + head, 0, column, KEY_DIM, VALUE_DIM, KEY_DIM, WIDTH))
    for step in range(count):
        token = start + (count - 1 - step) * SIZE
        at = (chunk + count - 1 - step) * heads + head
        q_c = load_rows(q, token, end, q_stride, head * KEY_DIM, SIZE, KEY_DIM)
        k_c = load_rows(k, token, end, k_stride, head * KEY_DIM, SIZE, KEY_DIM)
        do_c = load_rows(d_o, token, end, o_stride, head * VALUE_DIM + column, SIZE, WIDTH)
        inverse_c = load_square(inverse, at, SIZE, False)
        rest_c = None if rest is None else load_square(rest, at, SIZE, False)
        sum_c = tl.load(sums + at.to(tl.int64) * SIZE + tl.arange(0, SIZE))
        strength = tl.load(strengths + at.to(tl.int64) * SIZE + tl.arange(0, SIZE))
        total = tl.min(sum_c, 0)
        decay_in, decay_out = exp(sum_c), exp(total - sum_c)

        after = d_state.to(kind)
        if ready is not None:  # of the chunk before, whose stores have arrived by now
            some = tl.minimum(step, 1)
            publish(ready + (at + some * heads) * tiles + tile, some)
        if d_states is not None:
            tl.store(block(d_states, at, 0, column, KEY_DIM, VALUE_DIM, KEY_DIM, WIDTH), after)
        decay = tl.where(i >= j, exp(sum_c[None, :] - sum_c[:, None]), 0.0)
        scores = scale * product(k_c, tl.trans(q_c), PRECISION) * decay                       # P^T
        d_new = decay_out[:, None] * product(k_c, after, PRECISION)
        d_new += product(scores.to(kind), do_c, PRECISION)
        rest_t = None if rest is None else tl.trans(rest_c)
        d_right_c = fine_product(tl.trans(inverse_c), rest_t, d_new, PRECISION)
        do_in = ((scale * decay_in)[:, None] * do_c.to(tl.float32)).to(kind)
        d_right_in = ((strength * decay_in)[:, None] * d_right_c).to(kind)
        d_state = exp(total) * d_state + product(tl.trans(q_c), do_in, PRECISION)
        d_state -= product(tl.trans(k_c), d_right_in, PRECISION)
        if d_right is not None:
            store_rows(d_right, d_right_c, token, end, heads * VALUE_DIM, head * VALUE_DIM + column, SIZE, WIDTH)
    if ready is not None:
        publish(ready + (chunk * heads + head) * tiles + tile, tl.minimum(count, 1))
    if d_initial is not None:
        tl.store(block(d_initial, n * heads + head, 0, column, KEY_DIM, VALUE_DIM, KEY_DIM, WIDTH), d_state)


@kernel
def _gradients(q, k, v, sums, strengths, states, written, d_o, d_states, dq, dk, dv, d_decay, d_beta,
               ready, cu_seqlens, time, sequences, heads, segments, scale, q_stride, k_stride, v_stride, o_stride,
               KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
               MANY: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of one chunk from N, dO, dR (in `dv`, which dv replaces) and dS', where R = beta e, e = v - in k S.

    dv = beta dR, dP = dO N^T and dA = -dR N^T in the lower triangle (A's without the diagonal), and

        dq    = scale in dO S^T + scale (dP D) k
        dk    = out N dS'^T - beta in dR S^T + scale (dP D)^T q + (M + M^T) k,     M = beta dA D
        dbeta = sum_v dR e + sum_j dA_ij (k_i . k_j) D_ij,    sum_v dR e = sum_v dR v - in sum_k k (dR S^T)

    dP and dq need nothing of the scan backwards, and come before a wait for it. The gradient of log_decay of token t is
    a sum over all that it decays: pairs with j < t <= i (of P and A), in_i for t <= i, out_j for j < t, and in_C.
    """
    head = tl.program_id(0)
    at, start, end = _own_chunk(ready, cu_seqlens, time, sequences, heads, segments, SIZE, MANY, True)
    if start == end:
        return
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    kind = q.dtype.element_ty
    q_c = load_rows(q, start, end, q_stride, head * KEY_DIM, SIZE, KEY_DIM)
    k_c = load_rows(k, start, end, k_stride, head * KEY_DIM, SIZE, KEY_DIM)
    sum_c = tl.load(sums + at.to(tl.int64) * SIZE + tl.arange(0, SIZE))
    strength = tl.load(strengths + at.to(tl.int64) * SIZE + tl.arange(0, SIZE))
    total = tl.min(sum_c, 0)
    decay_in, decay_out = exp(sum_c), exp(total - sum_c)

    dp = tl.zeros((SIZE, SIZE), tl.float32)
    for column in range(0, VALUE_DIM, WIDTH):
        here = head * VALUE_DIM + column
        do_c = load_rows(d_o, start, end, o_stride, here, SIZE, WIDTH)
        new = load_rows(written, start, end, heads * VALUE_DIM, here, SIZE, WIDTH)
        dp += product(do_c, tl.trans(new), PRECISION)
    dp *= scale * pairwise_decay(sum_c, sum_c, i >= j)
    pairs = tl.where(i > j, dp * product(q_c, tl.trans(k_c), PRECISION), 0.0)
    d_in = tl.sum(pairs, 1) - tl.sum(pairs, 0)
    dp_c = dp.to(kind)

    dq_c = tl.zeros((SIZE, KEY_DIM), tl.float32)
    for column in range(0, VALUE_DIM, WIDTH):
        do_c = load_rows(d_o, start, end, o_stride, head * VALUE_DIM + column, SIZE, WIDTH)
        before = tl.load(block(states, at, 0, column, KEY_DIM, VALUE_DIM, KEY_DIM, WIDTH))
        dq_c += product(do_c, tl.trans(before), PRECISION)
    dq_c *= (scale * decay_in)[:, None]
    d_in += tl.sum(dq_c * q_c.to(tl.float32), 1)
    dq_c += product(dp_c, k_c, PRECISION)
    store_rows(dq, dq_c, start, end, heads * KEY_DIM, head * KEY_DIM, SIZE, KEY_DIM)

    if ready is not None:
        wait_for(ready, at, TILES, WARPS)
    da, d_strength = tl.zeros((SIZE, SIZE), tl.float32), tl.zeros((SIZE,), tl.float32)
    for column in range(0, VALUE_DIM, WIDTH):
        here = head * VALUE_DIM + column
        new = load_rows(written, start, end, heads * VALUE_DIM, here, SIZE, WIDTH)             # N
        d_right = load_rows(dv, start, end, heads * VALUE_DIM, here, SIZE, WIDTH)
        v_c = load_rows(v, start, end, v_stride, here, SIZE, WIDTH)
        da -= product(d_right, tl.trans(new), PRECISION)
        d_strength += tl.sum(d_right.to(tl.float32) * v_c.to(tl.float32), 1)
    da *= pairwise_decay(sum_c, sum_c, i > j)
    pairs = da * product(k_c, tl.trans(k_c), PRECISION)
    by_pair = tl.sum(pairs, 1)
    d_strength += by_pair
    d_in += strength * by_pair - tl.sum(strength[:, None] * pairs, 0)
    da_c = (strength[:, None] * da).to(kind)                                                  # M

    dk_in, dk_out = tl.zeros((SIZE, KEY_DIM), tl.float32), tl.zeros((SIZE, KEY_DIM), tl.float32)
    d_total = 0.0
    for column in range(0, VALUE_DIM, WIDTH):
        here = head * VALUE_DIM + column
        d_right = load_rows(dv, start, end, heads * VALUE_DIM, here, SIZE, WIDTH)
        before = tl.load(block(states, at, 0, column, KEY_DIM, VALUE_DIM, KEY_DIM, WIDTH))
        dk_in += product(d_right, tl.trans(before), PRECISION)
        new = load_rows(written, start, end, heads * VALUE_DIM, here, SIZE, WIDTH)
        after = tl.load(block(d_states, at, 0, column, KEY_DIM, VALUE_DIM, KEY_DIM, WIDTH))
        dk_out += product(new, tl.trans(after), PRECISION)
        d_total += tl.sum(tl.sum(before.to(tl.float32) * after.to(tl.float32), 1), 0)
        store_rows(dv, strength[:, None] * d_right.to(tl.float32), start, end, heads * VALUE_DIM, here, SIZE, WIDTH)
    k_f = k_c.to(tl.float32)
    by_key = decay_in * tl.sum(dk_in * k_f, 1)                                                # sum_v dR (in k S)
    dk_out *= decay_out[:, None]
    d_strength -= by_key
    d_in -= strength * by_key
    d_out = tl.sum(dk_out * k_f, 1)
    d_sums = tl.sum(tl.where(i >= j, d_in[:, None], d_out[:, None]), 0) + exp(total) * d_total
    dk_c = dk_out - (strength * decay_in)[:, None] * dk_in
    dk_c += product(tl.trans(dp_c), q_c, PRECISION)
    dk_c += product(da_c, k_c, PRECISION)
    dk_c += product(tl.trans(da_c), k_c, PRECISION)
    store_rows(dk, dk_c, start, end, heads * KEY_DIM, head * KEY_DIM, SIZE, KEY_DIM)
    t = start + tl.arange(0, SIZE)
    t_at = t.to(tl.int64) * heads + head
    tl.store(d_decay + t_at, d_sums.to(d_decay.dtype.element_ty), t < end)
    tl.store(d_beta + t_at, d_strength.to(d_beta.dtype.element_ty), t < end)
    if ready is not None:
        finish()


def saved_tensors(q, v, count, keep, sequences):
    """Allocate, for `count` chunks, what `forward` leaves to `backward`: T, its rest, sums, strengths, states, N, M."""
    inverse = q.new_empty(count, SIZE, SIZE)
    rest = torch.empty_like(inverse) if keep and q.dtype != torch.float32 else None
    sums, strengths = (q.new_empty(count, SIZE, dtype=torch.float32) for _ in range(2))
    states = q.new_empty(count, q.shape[-1], v.shape[-1]) if keep else None
    written = dense_like(v) if keep else None
    return inverse, rest, sums, strengths, states, written, segments.room(q, v, sequences, q.shape[-1], q.shape[-1])


def forward(q, k, v, log_decay, beta, scale, initial, cu_seqlens, keep):
    """Return o, the final state, and `saved_tensors` for `backward`, of which states and N only if `keep`."""
    at = Place((q, k, v, log_decay, beta), (initial,), cu_seqlens, keep)
    strides = q.stride(1), k.stride(1), v.stride(1)
    inverse, rest, sums, strengths, states, written, maps = saved = saved_tensors(
        q, v, at.chunks * at.heads, keep, at.sequences)
    o = dense_like(v)
    final = q.new_empty(at.sequences, at.heads, at.key_dim, at.value_dim, dtype=torch.float32)
    many, dots = at.many, precision(q.dtype)
    at.launch(invert, at.how("delta_rule.invert"), (at.heads, at.chunks, 1),
              k, log_decay, beta, inverse, rest, sums, strengths, cu_seqlens, *at.sizes[:3],
              strides[1], log_decay.stride(1), beta.stride(1), at.key_dim, many, keep or not at.by_lower, dots, dots)
    starts, ends = initial, final
    if maps is not None:
        starts, ends = segments.map_delta_rule(at, k, v, inverse, rest, sums, strengths, maps, cu_seqlens), None
        segments.join(at, maps, starts, initial, final, False)
    use = at.how("delta_rule.scan")
    tiles, warps = at.value_dim // use.width, use.warps
    ready = at.counts(tiles) if keep else None
    at.launch(_scan, use, (tiles, at.heads, at.sequences * at.segments),
              None if keep else q, k, v, inverse, sums, strengths, starts, None if keep else o, ends, states, written,
              ready, ALL, cu_seqlens, *at.sizes, scale, *strides,
              at.key_dim, at.value_dim, use.width, SIZE, many, at.by_lower, dots, part=ready is not None)
    if keep:
        use = at.how("delta_rule.outputs")._replace(follows=ready is not None)
        at.launch(_outputs, use, (at.heads, at.turns(ready), 1),
                  q, k, sums, states, written, o, ready, cu_seqlens, *at.sizes, scale, *strides[:2],
                  at.key_dim, at.value_dim, use.width, SIZE, many, tiles, warps, dots, part=(tiles, warps))
    return o, final, saved


def backward(q, k, v, log_decay, beta, scale, initial, cu_seqlens, saved, d_o, d_final):
    """Return gradients of q, k, v, log_decay, beta and, None if there was none, the initial state."""
    at = Place((q, k, v, log_decay, beta, d_o), (initial, d_final), cu_seqlens)
    inverse, rest, sums, strengths, states, written, maps = saved
    dq, dk, dv, d_decay, d_beta = map(dense_like, (q, k, v, log_decay, beta))
    d_initial = None if initial is None else dense_like(initial)
    d_states, many, dots = torch.empty_like(states), at.many, precision(q.dtype)
    use = at.how("delta_rule.scan_back")
    tiles, warps = at.value_dim // use.width, use.warps
    ready = at.counts(tiles)

    def scan_back(*ends_and_results, part=0):
        at.launch(_scan_back, use, (tiles, at.heads, at.sequences * at.segments),
                  q, k, inverse, rest, sums, strengths, d_o, *ends_and_results, cu_seqlens, *at.sizes, scale,
                  q.stride(1), k.stride(1), d_o.stride(1), at.key_dim, at.value_dim, use.width, SIZE, many, dots,
                  part=(part, ready is not None))

    if maps is None:
        scan_back(d_final, dv, d_states, d_initial, ready)
    else:
        d_ends = segments.ends(at, q.device)
        scan_back(None, None, None, d_ends, None, part=1)
        segments.join(at, maps, d_ends, d_final, d_initial, True)
        scan_back(d_ends, dv, d_states, None, ready)
    use = at.how("delta_rule.gradients")._replace(follows=ready is not None)
    at.launch(_gradients, use, (at.heads, at.turns(ready), 1),
              q, k, v, sums, strengths, states, written, d_o, d_states, dq, dk, dv, d_decay, d_beta, ready,
              cu_seqlens, *at.sizes, scale, q.stride(1), k.stride(1), v.stride(1), d_o.stride(1),
              at.key_dim, at.value_dim, use.width, SIZE, many, tiles, warps, dots, part=(tiles, warps))
    return dq, dk, dv, d_decay, d_beta, d_initial
