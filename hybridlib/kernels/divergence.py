"""Our Triton kernel for divergences of next-token distributions: a row's loss, with its gradient over its logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["loss_and_gradient"]


def loss_and_gradient(teacher_logits: torch.Tensor, student_logits: torch.Tensor, kind: str, alpha: float | None,
                      beta: float | None, temperature: float, *, block: int = 8192) -> torch.Tensor:
    """Return the divergence of each row in nats, (rows,) in float32, without temperature squared.

    Both logits are (rows, vocab), of one dtype, at most 32 bits wide, and one row stride. The gradient of a row's
    divergence by logits / temperature overwrites the student's, and any padding between rows. Other arguments are as in
    `hybridlib.distill.objectives.divergence`, checked there; `block` is columns at a time, a power of 2.
    """
    rows, vocab = student_logits.shape
    stride = student_logits.stride(0)
    loss = student_logits.new_empty(rows, dtype=torch.float32)
    block = min(block, triton.next_power_of_2(stride))
    with torch.cuda.device_of(student_logits):
        _kernel[(rows,)](teacher_logits, student_logits, loss, 1 / temperature, vocab, stride, kind, alpha or 0.0,
                         beta or 0.0, block, num_warps=32)
    return loss


@triton.jit
def _kernel(teacher, student, loss, inverse_temperature, vocab: tl.constexpr, stride: tl.constexpr,
            kind: tl.constexpr, alpha: tl.constexpr, beta: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    teacher += row * stride
    student += row * stride

    # pass 1: each column of the block keeps its own maximum and sum, so that threads meet only once, at the end
    p_max, q_max = tl.full([block], -1e38, tl.float32), tl.full([block], -1e38, tl.float32)
    p_sum, q_sum = tl.zeros([block], tl.float32), tl.zeros([block], tl.float32)
    for start in range(0, stride, block):
        column = start + tl.arange(0, block)
        p_logit = _load(teacher, column, inverse_temperature, stride)
        q_logit = _load(student, column, inverse_temperature, stride)
        p_max, p_sum = _add_exp(p_max, p_sum, tl.where(column < vocab, p_logit, float("-inf")))
        q_max, q_sum = _add_exp(q_max, q_sum, tl.where(column < vocab, q_logit, float("-inf")))
    p_norm, q_norm = _log_sum(p_max, p_sum), _log_sum(q_max, q_sum)

    # pass 2: the row's loss, and the sum of its derivatives by log q, which for the forward KL is known
    losses, slopes = tl.zeros([block], tl.float32), tl.zeros([block], tl.float32)
    if kind != "forward":
        for start in range(0, stride, block):
            column = start + tl.arange(0, block)
            log_p = _load(teacher, column, inverse_temperature, stride) - p_norm
            log_q = _load(student, column, inverse_temperature, stride) - q_norm
            term, slope = _terms(log_p, log_q, kind, alpha, beta)
            losses += tl.where(column < vocab, term, 0.0)
            slopes += tl.where(column < vocab, slope, 0.0)
    total = -1.0 if kind == "forward" else tl.sum(slopes, 0)

    # pass 3: the gradient
    for start in range(0, stride, block):
        column = start + tl.arange(0, block)
        log_p = _load(teacher, column, inverse_temperature, stride) - p_norm
        log_q = _load(student, column, inverse_temperature, stride) - q_norm
        term, slope = _terms(log_p, log_q, kind, alpha, beta)
        if kind == "forward":
            losses += tl.where(column < vocab, term, 0.0)
        gradient = slope - tl.exp(log_q) * total
        tl.store(student + column, gradient.to(student.dtype.element_ty), column < stride)
    tl.store(loss + row, tl.sum(losses, 0))


@triton.jit
def _load(row, column, scale, stride: tl.constexpr):
    return scale * tl.load(row + column, column < stride, other=0.0).to(tl.float32)


@triton.jit
def _add_exp(largest, total, x):
    """Add exp(x) to total exp(largest), by one exponential."""
    smaller = tl.exp(-tl.abs(x - largest))
    return tl.maximum(largest, x), tl.where(x > largest, total * smaller + 1, total + smaller)


@triton.jit
def _log_sum(largest, total):
    top = tl.max(largest, 0)
    return top + tl.log(tl.sum(total * tl.exp(largest - top), 0))


@triton.jit
def _terms(log_p, log_q, kind: tl.constexpr, alpha: tl.constexpr, beta: tl.constexpr):
    """Return the terms of the divergence and their derivatives by log q, up to a multiple of q."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    if kind == "forward":
        term, slope = p * (log_p - log_q), -p
    elif kind == "reverse":
        slope = q * (log_q - log_p)
        term = slope
    elif kind == "jensen_shannon":
        less = tl.exp(-tl.abs(log_p - log_q))  # the lesser of p and q over the greater
        mean = tl.where(log_p > log_q, beta + (1 - beta) * less, beta * less + (1 - beta))
        log_m = tl.maximum(log_p, log_q) + tl.log(mean)
        slope = (1 - beta) * q * (log_q - log_m)
        term = beta * p * (log_p - log_m) + slope
    else:
        slope = -_gap(log_p, log_q, alpha, alpha + beta)
        if beta != 0:
            term = (_gap(log_p, log_q, alpha + beta, alpha + beta) + slope) / beta
        elif alpha != 0:
            term = (tl.exp(alpha * log_p) * (log_p - log_q) + slope) / alpha
        else:
            term = 0.5 * slope * slope
    return term, slope


@triton.jit
def _gap(log_p, log_q, x: tl.constexpr, s: tl.constexpr):
    """(p^x q^(s - x) - q^s) / x, at x = 0 its limit; see `objectives._alpha_beta`."""
    if x == 0:
        gap = tl.exp(s * log_q) * (log_p - log_q)
    else:
        gap = (tl.exp(x * log_p + (s - x) * log_q) - tl.exp(s * log_q)) / x
    return gap
