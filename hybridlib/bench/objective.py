"""Speed and exactness of stage 2's objective, KL(teacher || student) in nats, mean over tokens, beside others' kernels.
``"plain"`` is torch's ``kl_div`` of logits in float32; ``"fla"`` is flash-linear-attention's FusedKLDivLoss and
``"liger"`` Liger-Kernel's LigerFusedLinearJSD at beta 0, optional packages, both on NVIDIA GPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, MutableMapping

import torch
import torch.nn.functional as F

from hybridlib.bench.exactness import relative_error
from hybridlib.bench.timing import Bench, peak_memory
from hybridlib.distill.objectives import divergence_from_hidden

__all__ = ["IMPLEMENTATIONS", "objective_inputs", "time_objective", "why_not"]

_PACKAGES = {"fla": ("fla", "flash-linear-attention"), "liger": ("liger_kernel", "liger-kernel")}
_AT_ONCE = 2**25  # logits of one model, for the truth


def time_objective(bench: Bench, implementation: str, shape: Iterable[int], direction: str = "forward+backward",
                   truths: MutableMapping | None = None) -> dict:
    """Time the forward KL from hidden states, with memory and error. Record kind ``"objective_speed"``.

    `implementation` is one of `IMPLEMENTATIONS`, `shape` (tokens, width, vocab), `direction` ``"forward"`` or
    ``"forward+backward"``; `truths` by shape can be shared by implementations. Metrics: the timing of `Bench.time`;
    ``peak_bytes`` beyond the inputs; ``errors`` of ``loss`` and of the gradients by the student's ``hidden`` states and
    ``head``, against the plain formula in float64.
    """
    tokens, width, vocab = shape = tuple(shape)
    parameters = {"implementation": implementation, "tokens": tokens, "width": width, "vocab": vocab,
                  "dtype": bench.dtype, "direction": direction, "repeats": bench.repeats,
                  "max_seconds": bench.max_seconds}
    truths = {} if truths is None else truths

    def compute():
        reason = why_not(implementation, bench.device)
        if reason is not None:
            return {"reason": reason}
        inputs = objective_inputs(shape, bench.dtype, bench.device)
        call = _call(implementation, inputs, direction != "forward")
        timing = bench.time([call], together=2)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()  # of graphs
        results, peak = peak_memory(call, bench.device)
        if shape not in truths:
            truths[shape] = _truth(inputs)
        errors = {name: relative_error(result, truth.to(bench.device))
                  for (name, truth), result in zip(truths[shape].items(), results)}
        return timing | {"peak_bytes": peak, "errors": errors}

    return bench.record("objective_speed", parameters, compute)


def why_not(implementation: str, device: torch.device) -> str | None:
    """Say in one sentence why an implementation cannot run on a device; None if it can."""
    if implementation not in _PACKAGES:
        return None
    module, package = _PACKAGES[implementation]
    for name, title in ((module, package), ("triton", "triton")):
        if importlib.util.find_spec(name) is None:
            return f"{title} is not installed (pip install {title})"
    if device.type != "cuda":
        return f"{package} needs a CUDA GPU, and this is on {device.type}"
    return None


def objective_inputs(shape: Iterable[int], dtype: str = "float32", device="cpu",
                     seed: int = 0) -> dict[str, torch.Tensor]:
    """Draw hidden states (tokens, width) and heads (vocab, width) of a teacher and of a student near it."""
    tokens, width, vocab = shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(mean, spread, *size):
        return mean + spread * torch.randn(*size, generator=generator, device=device)

    hidden, head = normal(0, 1, tokens, width), normal(0, 3 / width**0.5, vocab, width)  # logits of size 3
    inputs = {"teacher_hidden": hidden, "teacher_head": head, "student_hidden": normal(hidden, 0.3, tokens, width),
              "student_head": normal(head, 0.3 / width**0.5, vocab, width)}
    return {name: x.to(getattr(torch, dtype)) for name, x in inputs.items()}


def _plain(teacher_hidden, teacher_head, student_hidden, student_head):
    wide = torch.promote_types(student_hidden.dtype, torch.float32)
    p, q = (F.linear(x, head).to(wide).log_softmax(-1) for x, head in ((teacher_hidden, teacher_head),
                                                                       (student_hidden, student_head)))
    return F.kl_div(q, p, log_target=True, reduction="batchmean")


def _fla(teacher_hidden, teacher_head, student_hidden, student_head):
    from fla.modules import FusedKLDivLoss

    return FusedKLDivLoss()(student_hidden, teacher_hidden, student_head, teacher_head)


def _liger(teacher_hidden, teacher_head, student_hidden, student_head):
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.0)(student_hidden, student_head, teacher_hidden, teacher_head, None)


IMPLEMENTATIONS = {"hybridlib": divergence_from_hidden, "plain": _plain, "fla": _fla, "liger": _liger}


def _call(implementation, inputs, backward):
    loss_of, trained = IMPLEMENTATIONS[implementation], [inputs["student_hidden"], inputs["student_head"]]
    if not backward:
        return torch.no_grad()(lambda: (loss_of(**inputs),))
    for x in trained:
        x.requires_grad_(True)

    def call():
        loss = loss_of(**inputs)
        return loss.detach(), *torch.autograd.grad(loss, trained)

    return call


def _truth(inputs):
    """Loss and gradients by the plain formula in float64, a slice of tokens at a time; on the CPU."""
    states = [inputs[name].detach() for name in ("teacher_hidden", "student_hidden")]
    heads = [inputs[name].detach().double() for name in ("teacher_head", "student_head")]
    heads[1].requires_grad_(True)
    tokens, vocab = len(states[0]), len(heads[0])
    at_once = max(1, _AT_ONCE // vocab)
    loss, by_hidden, by_head = 0.0, [], torch.zeros_like(heads[1])
    for i in range(0, tokens, at_once):
        teacher, student = (x[i:i + at_once].double() for x in states)
        part = _plain(teacher, heads[0], student.requires_grad_(), heads[1]) * (len(teacher) / tokens)
        grads = torch.autograd.grad(part, (student, heads[1]))
        loss = loss + part.detach()
        by_hidden.append(grads[0])
        by_head += grads[1]
    return {"loss": loss.cpu(), "hidden": torch.cat(by_hidden).cpu(), "head": by_head.cpu()}
