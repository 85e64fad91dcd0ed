"""What a student is trained on: the alignment loss of stage 1 and the Kullback-Leibler divergence of stage 2."""

from __future__ import annotations

import torch

from .checks import check_number

__all__ = ["alignment_loss", "kl_divergence", "kl_from_hidden"]


def alignment_loss(student: torch.Tensor, teacher: torch.Tensor, *, normalize: bool = True) -> torch.Tensor:
    """Stage 1: mean squared error of a mixer's output against the attention output it stands in for.

    Parameters
    ----------
    student, teacher : (batch, time, width), outputs of the mixer and of the teacher's attention for the same input.
    normalize : divide by the mean square of `teacher`, so that 0 is exact and 1 is as bad as silence, at every depth;
        without it, layers with large outputs dominate.

    Returns a scalar, float32. Source: paper section 3, stage 1; RADLADS (arXiv 2505.03005), step 1.
    """
    error = (student.float() - teacher.float()).square().mean()
    return error / teacher.float().square().mean() if normalize else error


def kl_divergence(teacher_logits: torch.Tensor, student_logits: torch.Tensor, *,
                  temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher || student) of next-token distributions at each position, in nats, times temperature squared.

    Parameters
    ----------
    teacher_logits, student_logits : (..., vocab).
    temperature : both are divided by it before the softmax; the square keeps gradients on one scale (Hinton et al.,
        arXiv 1503.02531, section 2).

    Returns (...), float32 or wider. Source: paper section 3, stage 2.
    """
    check_number("temperature", temperature, 0, open_low=True)
    wide = torch.promote_types(teacher_logits.dtype, torch.float32)
    teacher = (teacher_logits.to(wide) / temperature).log_softmax(-1)
    student = (student_logits.to(wide) / temperature).log_softmax(-1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)


def kl_from_hidden(teacher_hidden: torch.Tensor, teacher_head: torch.Tensor, student_hidden: torch.Tensor,
                   student_head: torch.Tensor, *, temperature: float = 1.0, chunk: int = 2048) -> torch.Tensor:
    """Mean of `kl_divergence` over tokens, from hidden states and output heads, `chunk` tokens of logits at a time.

    The gradient is computed along with the loss, so no logits outlive their chunk: with p and q the softened
    distributions of teacher and student, d loss / d student logits = temperature * (q - p) / tokens.

    Parameters
    ----------
    teacher_hidden, student_hidden : (batch, time, width), after the final norm; widths may differ.
    teacher_head, student_head : (vocab, width), output weights. Gradients go to the student's two tensors only.

    Returns a scalar in nats, float32.
    """
    check_number("temperature", temperature, 0, open_low=True)
    return _ChunkedKL.apply(teacher_hidden.flatten(0, -2), teacher_head, student_hidden.flatten(0, -2), student_head,
                            temperature, chunk)


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, teacher_hidden, teacher_head, student_hidden, student_head, temperature, chunk):
        device = student_hidden.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        compute = autocast or student_hidden.dtype
        teacher_weight, student_weight = teacher_head.to(compute), student_head.to(compute)
        tokens = len(student_hidden)
        grad_hidden = torch.empty_like(student_hidden)
        grad_head = torch.zeros(student_head.shape, dtype=torch.float32, device=student_head.device)
        total = torch.zeros((), dtype=torch.float32, device=student_hidden.device)
        for i in range(0, tokens, chunk):
            x = student_hidden[i:i + chunk].to(compute)
            p = (teacher_hidden[i:i + chunk].to(compute) @ teacher_weight.T).float().div_(temperature)
            q = (x @ student_weight.T).float().div_(temperature)
            p, q = p.log_softmax(-1), q.log_softmax(-1)  # (chunk, vocab), both logs
            weight = p.exp()
            total += torch.dot(weight.flatten(), (p - q).flatten())
            grad = q.exp_().sub_(weight).mul_(temperature / tokens).to(compute)
            grad_hidden[i:i + chunk] = grad @ student_weight
            grad_head += grad.T @ x
        ctx.save_for_backward(grad_hidden, grad_head.to(student_head.dtype))
        return total * (temperature**2 / tokens)

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_head = ctx.saved_tensors
        return None, None, grad * grad_hidden, grad * grad_head, None, None
