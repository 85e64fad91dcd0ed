"""The two operators in chunks: large matrix products inside a chunk, one small step from chunk to chunk.

Symbols, for one head and one chunk of C tokens (i, j count tokens of the chunk; S is the state before it):

    D_ij  = a_(j+1) ... a_i      decay from token j to token i; 1 on the diagonal, 0 above it
    in_i  = a_1 ... a_i          decay from the chunk's start to token i
    out_j = D_Cj                 decay from token j to the chunk's end

Gated delta rule (arXiv 2412.06464, section 3; the WY form of arXiv 2406.06484):

    A  = strictly lower part of  beta_i (k_i . k_j) D_ij
    [U | W] = (I + A)^-1 [beta v | beta in k]
    N  = U - W S                                      each token's write, net of the state under its key
    O  = scale (in q) S + P N,                        P = scale (q_i . k_j) D_ij
    S' = in_C S + (out k)^T N  =  (in_C I - (out k)^T W) S + (out k)^T U

Gated linear attention (arXiv 2312.06635, section 4) has the same O and S' with N = v, and decays of its own for each
key dim: P_ij = scale sum_d q_id k_jd D_ijd.

No decay is divided by another and no positive number exponentiated, so log_decay may be as low as it likes. Gradients
of log_decay are sums over pairs, never differences of sums, so small ones stay exact.
In shapes, `rows` is batch times heads, and `all` chunks times rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

__all__ = ["gated_delta_rule", "gated_linear_attention"]


def gated_delta_rule(q, k, v, log_decay, beta, scale, initial_state, chunk=32):
    """Run `hybridlib.kernels.gated_delta_rule` in chunks of `chunk` tokens, a power of two; in float32 or float64."""
    return _in_chunks(_GatedDeltaRule.apply, (q, k, v, log_decay, beta), scale, initial_state, chunk)


def gated_linear_attention(q, k, v, log_decay, scale, initial_state, chunk=32):
    """Run `hybridlib.kernels.gated_linear_attention` in chunks of `chunk` tokens, a power of two."""
    return _in_chunks(_GatedLinearAttention.apply, (q, k, v, log_decay), scale, initial_state, chunk)


def _in_chunks(function, inputs, scale, initial_state, chunk):
    """Cut (batch, time, heads, dim) into (chunks, batch * heads, chunk, dim), apply `function`, and join again."""
    k, v = inputs[1:3]
    batch, time, heads, key_dim = k.shape
    value_dim, dtype = v.shape[-1], torch.promote_types(v.dtype, torch.float32)
    chunk = min(chunk, 1 << (time - 1).bit_length())
    count = -(-time // chunk)

    def cut(x):  # padding tokens have k = beta = log_decay = 0: they neither write nor decay
        x = x.to(dtype).view(batch, time, heads, -1) if x.dim() == 3 else x.to(dtype)
        x = F.pad(x, (0, 0, 0, 0, 0, count * chunk - time)) if count * chunk != time else x
        x = x.reshape(batch, count, chunk, heads, -1).permute(1, 0, 3, 2, 4)
        return x.reshape(count, batch * heads, chunk, -1)

    if initial_state is None:
        initial_state = k.new_zeros(batch, heads, key_dim, value_dim, dtype=dtype)
    state = initial_state.to(dtype).reshape(batch * heads, key_dim, value_dim)
    o, state = function(*map(cut, inputs), state, scale)
    o = o.view(count, batch, heads, chunk, value_dim).permute(1, 0, 3, 2, 4)
    o = o.reshape(batch, count * chunk, heads, value_dim)[:, :time].to(v.dtype)
    return o, state.view(batch, heads, key_dim, value_dim)


def _in_turn(x):
    """Tell whether chunks go one after the other, in several small products; on a GPU launches would dominate."""
    return x.device.type == "cpu"


def _chunks(q, k, v, log_decay, beta, scale):
    """Return what chunks have without the state: P, (I + A)^-1, U, -W, in q, out k, and in_C (all, 1, 1)."""
    decay, decay_in = _pairwise_decay(log_decay), log_decay.cumsum(1).exp()         # (all, C, C), (all, C, 1)
    scores = (q @ k.mT).mul_(decay).mul_(scale)                                     # (all, C, C)
    inverse = _inverse((k @ k.mT).mul_(decay).mul_(beta))                           # (all, C, C)
    u, w = inverse @ (v * beta), inverse @ (k * (beta * -decay_in))                 # (all, C, V), (all, C, K)
    return scores, inverse, u, w, q * (scale * decay_in), k * decay[:, -1, :, None], decay_in[:, -1:]


def _backward(gradients):
    """Make a backward pass of a function that returns gradients by `all`, the state's last."""
    @once_differentiable
    def backward(ctx, do, dstate):
        with torch.autocast(do.device.type, enabled=False):
            *grads, dstate = gradients(ctx, do.flatten(0, 1), dstate)
        return *(x.view(*ctx.shape, -1) for x in grads), dstate, None

    return backward


class _GatedDeltaRule(torch.autograd.Function):
    """q, k (chunks, rows, C, K), v (.., V), log_decay, beta (.., 1), state (rows, K, V) -> o (.., V), state."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, beta, state, scale):
        count, rows, size, value_dim = v.shape
        flat = tuple(x.flatten(0, 1) for x in (q, k, v, log_decay, beta))
        scores, inverse, u, w, q_in, k_out, total = _chunks(*flat, scale)  # type: ignore[call-arg]
        states, new = _states(u, w, k_out, total, state, count)
        o = torch.bmm(q_in, states[:-1].flatten(0, 1)).baddbmm_(scores, new)
        ctx.scale, ctx.shape = scale, (count, rows, size)
        ctx.save_for_backward(*flat, inverse, states)
        return o.view(count, rows, size, value_dim), states[-1].clone()

    @staticmethod
    @_backward
    def backward(ctx, do, dstate):
        q, k, v, log_decay, beta, inverse, states = ctx.saved_tensors
        count, scale, before = ctx.shape[0], ctx.scale, states[:-1].flatten(0, 1)
        decay, decay_in = _pairwise_decay(log_decay), log_decay.cumsum(1).exp()
        out, total, q_in = decay[:, -1, :, None], decay_in[:, -1:], scale * decay_in
        scores = (q @ k.mT).mul_(decay).mul_(scale)                                 # P
        k_out, w = k * out, inverse @ (k * (beta * -decay_in))                      # out k, -W
        recalled = k @ before                                                       # v as S has it
        gap = torch.addcmul(v, recalled, decay_in, value=-1)
        new = inverse @ (gap * beta)                                                # N

        # of the states, last chunk first; dN with them, and through N = (I + A)^-1 R: dR = (I + A)^-T dN
        dnew, dstates = _state_gradients(scores.mT @ do, (q * q_in).mT @ do, w, k_out, total, dstate, count)
        dafter = dstates[1:].flatten(0, 1)
        dright = inverse.mT @ dnew                                                  # (all, C, V)
        drecalled, dv = dright * (beta * -decay_in), dright * beta
        dq_in, dk_in, dk_out = do @ before.mT, drecalled @ before.mT, new @ dafter.mT  # (all, C, K)
        dpairs, dscores = (dright @ new.mT).neg_().tril_(-1), do @ new.mT           # of A and P (all, C, C)

        # log_decay: every D_ij, every in_i (with in_C of the state), every out_j = D_Cj. Last uses write in place, as
        # fresh memory takes longer than the product
        products = k @ k.mT                                                         # A = beta D products
        dpairs.mul_(decay)
        dbeta = (dpairs * products).sum(-1) + gap.mul_(dright).sum(-1)
        dpairs.mul_(beta)
        ddecay = products.mul_(dpairs).addcmul_(dscores, scores)
        ddecay[:, -1] += k_out.mul_(dk_out).sum(-1)
        dstart = recalled.mul_(drecalled).sum(-1) + (dq_in * q).sum(-1).mul_(q_in[..., 0])  # (all, C)
        dstart[:, -1] += total[:, 0, 0] * dafter.mul_(before).sum((1, 2))
        dlog_decay = _log_decay_gradient(ddecay, dstart)

        dscores.mul_(decay).mul_(scale)
        dq = torch.baddbmm(dq_in.mul_(q_in), dscores, k)
        dk = dk_in.addcmul_(dk_out, out).baddbmm_(dpairs + dpairs.mT, k).baddbmm_(dscores.mT, q)
        return dq, dk, dv, dlog_decay[..., None], dbeta[..., None], dstates[0]


def _states(new, w, k_out, total, state, count):
    """Return states (chunks + 1, rows, K, V) and N (all, C, V), from U, -W, out k and in_C (all, 1, 1)."""
    if not _in_turn(new):
        states = _scan(k_out.mT @ new, _transition(k_out, w, total), state, count)
        return states, new.baddbmm_(w, states[:-1].flatten(0, 1))
    rows = len(new) // count
    states = new.new_empty(count + 1, *state.shape)
    states[0] = state
    for n in range(count):
        at = slice(n * rows, (n + 1) * rows)
        new[at].baddbmm_(w[at], states[n])
        torch.mul(total[at], states[n], out=states[n + 1]).baddbmm_(k_out[at].mT, new[at])
    return states, new


def _state_gradients(dnew, read, w, k_out, total, dstate, count):
    """Return gradients of N and the states: dN = P^T dO + out k dS', dS = in_C dS' + (in q)^T dO - W^T dN."""
    if not _in_turn(dnew):
        read = read.baddbmm_(w.mT, dnew)
        dstates = _scan(read, _transition(k_out, w, total).mT, dstate, count, reverse=True)
        return dnew.baddbmm_(k_out, dstates[1:].flatten(0, 1)), dstates
    rows = len(dnew) // count
    dstates = dnew.new_empty(count + 1, *dstate.shape)
    dstates[count] = dstate
    for n in reversed(range(count)):
        at = slice(n * rows, (n + 1) * rows)
        dnew[at].baddbmm_(k_out[at], dstates[n + 1])
        torch.addcmul(read[at], total[at], dstates[n + 1], out=dstates[n]).baddbmm_(w[at].mT, dnew[at])
    return dnew, dstates


def _transition(k_out, w, total):
    """Return in_C I - (out k)^T W (all, K, K), from -W."""
    transition = k_out.mT @ w
    transition.diagonal(dim1=1, dim2=2).add_(total[:, 0])
    return transition


class _GatedLinearAttention(torch.autograd.Function):
    """q, k, log_decay (chunks, rows, C, K), v (.., V), state (rows, K, V) -> o (.., V), state."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, state, scale):
        count, rows, size, value_dim = v.shape
        q, k, v, decay = q.flatten(0, 1) * scale, k.flatten(0, 1), v.flatten(0, 1), log_decay.flatten(0, 1).exp()
        scores = q.new_zeros(len(q), size, size)                                    # P
        scores.diagonal(dim1=1, dim2=2).copy_((q * k).sum(-1))
        *inner, (q_in, k_out, total) = _decayed_levels(q, k, decay)                 # total (all, 1, K)
        for half, (q_half, k_half, _) in _by_half(inner):
            first, second = _halves(k_half, half)[:, :, 0], _halves(q_half, half)[:, :, 1]
            _lower_blocks(scores, half).copy_(second @ first.mT)
        states = _scan(k_out.mT @ v, total.mT, state, count)
        o = torch.baddbmm(q_in @ states[:-1].flatten(0, 1), scores, v)
        ctx.scale, ctx.shape = scale, (count, rows, size)
        ctx.save_for_backward(q, k, v, decay, scores, states)
        return o.view(count, rows, size, value_dim), states[-1].clone()

    @staticmethod
    @_backward
    def backward(ctx, do, dstate):
        q, k, v, decay, scores, states = ctx.saved_tensors
        count, before = ctx.shape[0], states[:-1].flatten(0, 1)
        *inner, (q_in, k_out, total) = _decayed_levels(q, k, decay)

        dstates = _scan(q_in.mT @ do, total.mT, dstate, count, reverse=True)
        dafter = dstates[1:].flatten(0, 1)
        dv = torch.baddbmm(k_out @ dafter, scores.mT, do)
        dscores = do @ v.mT
        dq, dk, dtotal = do @ before.mT, v @ dafter.mT, (dafter * before).sum(-1)[:, None]

        for half, (q_half, k_half, total) in reversed(list(_by_half(inner))):
            dblock = _lower_blocks(dscores, half)                                   # (all, pairs, half, half)
            total_1, total_2 = _halves(total, 1).unbind(2)                          # (all, pairs, 1, K)
            k_1, q_2 = _halves(k_half, half)[:, :, 0], _halves(q_half, half)[:, :, 1]
            dk_1, dq_2 = _halves(dk, half)[:, :, 0], _halves(dq, half)[:, :, 1]
            dtotal = dtotal[:, :, None]
            dtotal_1 = (dq_2 * q_2).sum(2, keepdim=True).addcmul_(dtotal, total_2)
            dtotal_2 = (dk_1 * k_1).sum(2, keepdim=True).addcmul_(dtotal, total_1)
            dtotal = torch.stack((dtotal_1, dtotal_2), 2).view_as(total)
            dq_2.mul_(total_1).add_(dblock @ k_1)
            dk_1.mul_(total_2).add_(dblock.mT @ q_2)

        dlog_decay = (dtotal + dq * q) * decay
        diagonal = dscores.diagonal(dim1=1, dim2=2)[..., None]
        dq, dk = (dq * decay).addcmul_(diagonal, k), dk.addcmul_(diagonal, q)
        return dq * ctx.scale, dk, dv, dlog_decay, dstates[0]


def _decayed_levels(q, k, decay):
    """Return for blocks of 1, 2, .. C tokens: q decayed from its block's start, k to its block's end, blocks' totals.

    A pair in two neighbouring blocks meets at their border: D_ij = (a_(j+1) .. to the border) (from the border .. a_i).
    q, k and decay (all, C, K); totals (all, C / block, K). Token i's own decay counts as q's, not as k's.
    """
    levels, size = [(q * decay, k, decay)], q.shape[1]
    for half, (q, k, total) in _by_half(levels):  # grows while it is read
        if half == size:
            return levels
        first, second = _halves(total, 1).unbind(2)
        q, k = q.clone(), k.clone()
        _halves(q, half)[:, :, 1].mul_(first)
        _halves(k, half)[:, :, 0].mul_(second)
        levels.append((q, k, (first * second)[:, :, 0]))


def _by_half(levels):
    return ((1 << i, level) for i, level in enumerate(levels))


def _halves(x, half):
    """View (all, tokens, dim) as (all, pairs of blocks, 2, half, dim)."""
    return x.view(len(x), -1, 2, half, x.shape[-1])


def _lower_blocks(x, half):
    """View the blocks of (all, C, C) where a second neighbour (rows) meets a first: (all, pairs, half, half)."""
    pairs = x.shape[-1] // (2 * half)
    return x.view(-1, pairs, 2, half, pairs, 2, half)[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _inverse(a):
    """Return (I + strictly lower part of a)^-1; [[I + A1, 0], [B, I + A2]]^-1 = [[X1, 0], [-X2 B X1, X2]]."""
    size, half = a.shape[-1], 1
    if a.device.type == "cpu":
        identity = torch.eye(size, dtype=a.dtype).expand_as(a)
        return torch.linalg.solve_triangular(a, identity, upper=False, unitriangular=True)
    diagonal = torch.ones_like(a[:, :, None, :1])                                   # blocks (all, C / half, half, half)
    while half < size:
        x1, x2 = diagonal[:, ::2], diagonal[:, 1::2]
        joined = a.new_zeros(len(a), size // (2 * half), 2 * half, 2 * half)
        joined[..., :half, :half], joined[..., half:, half:] = x1, x2
        joined[..., half:, :half] = (x2 @ _lower_blocks(a, half) @ x1).neg_()
        diagonal, half = joined, 2 * half
    return diagonal[:, 0]


def _pairwise_decay(log_decay):
    """Return D (all, C, C) from log_decay (all, C, 1): exp of the sum over t of [j < t <= i] log_decay_t."""
    size = log_decay.shape[1]
    lower = log_decay.new_ones(size, size).tril_()
    return ((lower * log_decay.mT) @ lower.tril(-1)).exp_().mul_(lower)


def _log_decay_gradient(dpairs, dstart):
    """Return the gradient (all, C) of log_decay from those of log D (all, C, C) and log in (all, C)."""
    size = dstart.shape[1]
    lower = dstart.new_ones(size, size).tril_()
    return (dpairs @ lower.mT.triu(1)).add_(dstart[:, :, None]).mul_(lower).sum(1)


def _scan(write, transition, state, count, reverse=False):
    """Return states (count + 1, rows, K, V): S_(n+1) = transition_n S_n + write_n, from `state`, or back to S_0."""
    write, transition = write.unflatten(0, (count, -1)), transition.unflatten(0, (count, -1))
    states = write.new_empty(count + 1, *write.shape[1:])
    states[count if reverse else 0] = state
    multiply_add = torch.addcmul if transition.shape[-1] == 1 else torch.baddbmm
    for n in reversed(range(count)) if reverse else range(count):
        old, new = (n + 1, n) if reverse else (n, n + 1)
        multiply_add(write[n], transition[n], states[old], out=states[new])
    return states
