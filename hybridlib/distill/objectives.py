"""Objectives: the alignment loss of stage 1 and the divergences of stage 2."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from hybridlib.checks import check_choice, check_int, check_number, is_number

__all__ = ["alignment_loss", "divergence", "divergence_from_hidden", "mixer_loss"]

_KINDS = ("forward", "reverse", "jensen_shannon", "alpha_beta")
_TAKES = {"jensen_shannon": ("beta",), "alpha_beta": ("alpha", "beta")}
_SMALLEST_EXPONENT = 0.01


def alignment_loss(student: torch.Tensor, teacher: torch.Tensor, *, normalize: bool = True) -> torch.Tensor:
    """Return the mean squared error of a mixer's output against that of the attention it replaces (stage 1).

    Both are (batch, time, width), for the same input; the loss is a scalar, float32. `normalize` divides it by the mean
    square of `teacher`, so that 1 is as bad as silence at every depth.
    Source: paper section 3, stage 1; RADLADS (arXiv 2505.03005), step 1.
    """
    error = (student.float() - teacher.float()).square().mean()
    return error / teacher.float().square().mean() if normalize else error


def mixer_loss(mixer: nn.Module, attention_input: torch.Tensor, attention_output: torch.Tensor, normalize: bool
               ) -> torch.Tensor:
    """Return the `alignment_loss` of a mixer on a layer's `attention_io`."""
    return alignment_loss(mixer(attention_input)[0], attention_output, normalize=normalize)


@torch.no_grad()
def divergence(teacher_logits: torch.Tensor, student_logits: torch.Tensor, *, kind: str = "forward",
               alpha: float | None = None, beta: float | None = None, temperature: float = 1.0) -> torch.Tensor:
    """Return the divergence of next-token distributions at each position, in nats, times temperature squared.

    With p the teacher's distribution and q the student's, both softened by the temperature:

    ====================  ==============================================================================
    kind                  divergence
    ====================  ==============================================================================
    ``"forward"``         KL(p || q) = sum p log(p / q)
    ``"reverse"``         KL(q || p)
    ``"jensen_shannon"``  beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; beta = 0.5
    ``"alpha_beta"``      -1 / (alpha beta) sum [p^alpha q^beta - alpha / s p^s - beta / s q^s],
                          s = alpha + beta; where alpha, beta or s is 0, the limit
    ====================  ==============================================================================

    Parameters
    ----------
    teacher_logits, student_logits : (..., vocab). No gradient goes to either. A logit of -inf is a probability of 0; a
        token that neither side can give adds nothing.
    alpha, beta : both for ``"alpha_beta"``: they and their sum are 0 or at least 0.01 in size, and a negative one
        overflows where a probability is near 0. `beta` alone, above 0 and below 1, for ``"jensen_shannon"``.
    temperature : divides both logits; its square keeps gradients on one scale (arXiv 1503.02531, section 2).

    Returns (...), float32 or wider. Raises ValueError for arguments outside these.

    Sources: paper section 3, stage 2 (forward); GKD, arXiv 2306.13649, section 2 (Jensen-Shannon); ABKD, arXiv
    2503.02050 (alpha-beta); Cichocki et al., Entropy 13 (2011), section 2 (its limits).
    """
    alpha, beta = check_divergence(kind, alpha, beta)
    check_number("temperature", temperature, 0, open_low=True)
    return temperature**2 * _loss_and_gradient(teacher_logits, student_logits.clone(), kind, alpha, beta, temperature)


def divergence_from_hidden(teacher_hidden: torch.Tensor, teacher_head: torch.Tensor, student_hidden: torch.Tensor,
                           student_head: torch.Tensor, *, kind: str = "forward", alpha: float | None = None,
                           beta: float | None = None, temperature: float = 1.0, chunk: int = 2048,
                           backend: str = "auto") -> torch.Tensor:
    """Return the mean of `divergence` over tokens, from hidden states and heads, by `chunk` tokens of logits at a time.

    The gradient is computed along with the loss, so no logits outlive their chunk.

    Parameters
    ----------
    teacher_hidden, student_hidden : (..., width), after the final norm; widths may differ.
    teacher_head, student_head : (vocab, width), output weights. Gradients go to the student's two tensors only.
    chunk : tokens at a time, well above the width: each chunk reads and writes the gradient of the head. Two matrices
        (chunk, vocab) are held, with ``"torch"`` two to six more in float32.
    backend : ``"torch"``, ``"triton"`` (our kernel, on CUDA GPUs, not in float64) or ``"auto"``: the kernel where it
        can run. Products are in autocast's dtype or the student's hidden states'.

    Returns a scalar in nats, float32 or wider. Raises ValueError for arguments or a backend that do not fit.
    """
    alpha, beta = check_divergence(kind, alpha, beta)
    check_number("temperature", temperature, 0, open_low=True)
    check_int("chunk", chunk, 1)
    _check_shapes(teacher_hidden, teacher_head, student_hidden, student_head)
    device = student_hidden.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    compute = autocast or student_hidden.dtype
    in_place = _choose_backend(backend, compute, student_hidden)
    gradients = torch.is_grad_enabled()
    with torch.autocast(device, enabled=False):
        return _Chunked.apply(teacher_hidden.detach().flatten(0, -2), teacher_head.detach(),
                              student_hidden.flatten(0, -2), student_head,
                              lambda p, q: in_place(p, q, kind, alpha, beta, temperature),
                              temperature, min(chunk, student_hidden[..., 0].numel()), compute, gradients)


def check_divergence(kind: str, alpha: Any, beta: Any, name: str = "kind") -> tuple[Any, Any]:
    """Return alpha and beta, or their defaults; raise ValueError unless they suit `kind` as `divergence` says."""
    check_choice(name, kind, _KINDS)
    for parameter, value in (("alpha", alpha), ("beta", beta)):
        if value is not None and parameter not in _TAKES.get(kind, ()):
            raise ValueError(f"{parameter}={value!r} is not taken by {name}={kind!r}; leave it out")
    if kind == "jensen_shannon":
        beta = 0.5 if beta is None else beta
        if not is_number(beta) or not 0 < beta < 1:
            raise ValueError(f"beta={beta!r} is not a number above 0 and below 1, as {name}='jensen_shannon' needs")
    if kind == "alpha_beta":
        _check_exponent("alpha", alpha), _check_exponent("beta", beta)
        if abs(alpha + beta) < 1e-9:  # 0.1 + 0.2 against -0.3
            beta = -alpha
        _check_exponent("alpha + beta", alpha + beta)
    return alpha, beta


def _check_exponent(name, value):
    if not is_number(value) or 0 < abs(value) < _SMALLEST_EXPONENT:
        raise ValueError(f"{name}={value!r} is not a number that is 0 or at least {_SMALLEST_EXPONENT} in size, "
                         "as 'alpha_beta' needs")


def _check_shapes(teacher_hidden, teacher_head, student_hidden, student_head):
    for whose, states, head in (("teacher", teacher_hidden, teacher_head), ("student", student_hidden, student_head)):
        expected = (*student_hidden.shape[:-1], states.shape[-1])
        if states.dim() < 2 or states.numel() == 0 or states.shape != expected:
            raise ValueError(f"{whose}_hidden has shape {tuple(states.shape)}; it must be (..., width), with a token, "
                             f"and of the student's tokens, {tuple(student_hidden.shape[:-1])}")
        if head.shape != (len(student_head), states.shape[-1]):
            raise ValueError(f"{whose}_head has shape {tuple(head.shape)}; it must be "
                             f"({len(student_head)}, {states.shape[-1]}), the student's vocabulary and the width")


def _choose_backend(backend, compute, hidden):
    check_choice("backend", backend, ("auto", "torch", "triton"))
    reason = _why_not_triton(compute, hidden)
    if backend == "triton" and reason is not None:
        raise ValueError(f"backend='triton' cannot run here: {reason}")
    if backend == "torch" or reason is not None:
        return _loss_and_gradient
    from hybridlib.kernels.divergence import loss_and_gradient
    return loss_and_gradient


def _why_not_triton(compute, hidden):
    if not hidden.is_cuda:
        return f"the kernel needs tensors on a CUDA GPU, and these are on {hidden.device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.cuda and torch.cuda.get_device_capability(hidden.device) < (8, 0):
        return "triton needs a GPU of compute capability 8.0 or above"
    return "the kernel has no float64" if compute == torch.float64 else None


class _Chunked(torch.autograd.Function):
    """`in_place(p, q)` takes logits, returns a loss for each row and leaves its gradient / temperature in q."""

    @staticmethod
    def forward(ctx, teacher_hidden, teacher_head, student_hidden, student_head, in_place, temperature, chunk,
                compute, gradients):
        teacher_weight, student_weight = teacher_head.to(compute), student_head.to(compute)
        tokens, vocab = len(student_hidden), len(student_head)
        wide = torch.promote_types(compute, torch.float32)
        # two buffers for all chunks: a name rebound in the loop would keep a third alive; GPUs want aligned rows
        width = -(-vocab // 64) * 64 if student_hidden.is_cuda else vocab
        p_logits, q_logits = (student_hidden.new_empty(chunk, width, dtype=compute)[:, :vocab] for _ in range(2))
        grad_hidden = torch.empty_like(student_hidden) if gradients and ctx.needs_input_grad[2] else None
        grad_head = torch.zeros_like(student_head, dtype=wide) if gradients and ctx.needs_input_grad[3] else None
        total = student_hidden.new_zeros((), dtype=wide)
        scale = temperature / tokens
        for i in range(0, tokens, chunk):
            x = student_hidden[i:i + chunk].to(compute)
            p, q = p_logits[:len(x)], q_logits[:len(x)]
            torch.mm(teacher_hidden[i:i + chunk].to(compute), teacher_weight.T, out=p)
            torch.mm(x, student_weight.T, out=q)
            total += in_place(p, q).sum()
            if grad_hidden is not None:
                grad_hidden[i:i + chunk] = (q @ student_weight).mul_(scale)
            if grad_head is not None:
                _add_product(grad_head, q.T, x, scale)
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(student_head.dtype))
        return total * (temperature**2 / tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads = (None if g is None else grad * g for g in ctx.saved_tensors)
        return None, None, *grads, None, None, None, None, None


def _add_product(total, a, b, scale):
    """Add scale a @ b to `total`; throughout in float32 where total is, a and b are half and torch offers it."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=scale)
    elif total.is_cuda and "dtype_out" in torch.ops.aten.addmm.overloads():  # torch 2.8
        torch.addmm(total, a, b, alpha=scale, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b, alpha=scale)


def _loss_and_gradient(teacher_logits, student_logits, kind, alpha, beta, temperature):
    """Return each row's divergence, without temperature squared; student_logits become its gradient, g - q sum g."""
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    log_p, log_q = (x.log_softmax(-1, dtype=wide) if temperature == 1 else (x.to(wide) / temperature).log_softmax(-1)
                    for x in (teacher_logits, student_logits))
    # 0 log 0 is 0
    if kind == "forward":  # g = -p
        p, no_p = log_p.exp(), log_p == -math.inf
        loss = log_p.sub_(log_q).masked_fill_(no_p, 0).mul_(p).sum(-1)
        torch.sub(log_q.exp_(), p, out=student_logits)
        return loss
    if kind == "reverse":  # g = q log(q / p)
        slope = log_p.neg_().add_(log_q).masked_fill_(log_q == -math.inf, 0)
        q = log_q.exp_()
        loss = total = slope.mul_(q).sum(-1)
    elif kind == "jensen_shannon":  # g = (1 - beta) q log(q / m)
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        p, q, no_p, no_q = log_p.exp(), log_q.exp(), log_p == -math.inf, log_q == -math.inf
        slope = log_q.sub_(log_m).masked_fill_(no_q, 0).mul_(q).mul_(1 - beta)
        total = slope.sum(-1)
        loss = beta * log_p.sub_(log_m).masked_fill_(no_p, 0).mul_(p).sum(-1) + total
    else:
        neither = (log_p == -math.inf) & (log_q == -math.inf)
        terms, slope = _alpha_beta(log_p.masked_fill_(neither, 0), log_q.masked_fill_(neither, 0), alpha, beta)
        loss, total, q = terms.sum(-1), slope.sum(-1), log_q.exp_().masked_fill_(neither, 0)
    torch.addcmul(slope, q, total[..., None], value=-1, out=student_logits)
    return loss


def _alpha_beta(log_p, log_q, alpha, beta):
    """Return the alpha-beta divergence's terms, and their derivatives by log q.

    With s = alpha + beta and G(x) = (p^x q^(s - x) - q^s) / x, which is q^s log(p / q) at x = 0, the divergence is
    sum (G(s) - G(alpha)) / beta, and the derivative -G(alpha); at beta = 0 the quotient is G's derivative.
    """
    s = alpha + beta

    def gap(x):
        if x == 0:
            return (s * log_q).exp() * (log_p - log_q).masked_fill_((log_q == -math.inf) & (s > 0), 0)
        return ((x * log_p + (s - x) * log_q if x != s else x * log_p).exp() - (s * log_q).exp()) / x

    at_alpha = gap(alpha)
    if beta != 0:
        terms = (gap(s) - at_alpha) / beta
    elif alpha != 0:
        ratio = (log_p - log_q).masked_fill_((log_p == -math.inf) & (alpha > 0), 0)
        terms = ((alpha * log_p).exp() * ratio - at_alpha) / alpha
    else:
        terms = (log_p - log_q).square() / 2
    return terms, -at_alpha
