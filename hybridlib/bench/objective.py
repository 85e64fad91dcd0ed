"""How fast the objective of stage 2 is, and how exact, beside the plain formula and other people's kernels.

All compute KL(teacher || student), in nats, mean over tokens, from hidden states and output heads, with the gradients
of the student's hidden states and head:

=================  ==================================================================================================
implementation     what it is
=================  ==================================================================================================
``"hybridlib"``    `divergence_from_hidden`
``"plain"``        both models' logits as they come, log-softmax in float32, torch's ``kl_div``
``"fla"``          flash-linear-attention's FusedKLDivLoss, an optional package, on NVIDIA GPUs
``"liger"``        Liger-Kernel's LigerFusedLinearJSD at beta 0, which is the forward KL (its second half of the
                   Jensen-Shannon divergence is left out), an optional package, on NVIDIA GPUs
=================  ==================================================================================================
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, MutableMapping

import torch
import torch.nn.functional as F

from hybridlib.bench.exactness import relative_error
from hybridlib.bench.operators import DIRECTIONS, dtype_name
from hybridlib.bench.timing import measured, peak_memory, sentence, time_calls, time_graph
from hybridlib.checks import check_choice, check_device, check_int, check_number
from hybridlib.distill.objectives import divergence_from_hidden
from hybridlib.records.ledger import Ledger

__all__ = ["IMPLEMENTATIONS", "check_objective_shape", "objective_inputs", "time_objective", "why_not"]

_PACKAGES = {"fla": ("fla", "flash-linear-attention"), "liger": ("liger_kernel", "liger-kernel")}
_AT_ONCE = 2**25  # logits of one model, for the truth
def time_objective(ledger: Ledger, implementation: str, shape: Iterable[int], *, dtype: str = "auto",
                   direction: str = "forward+backward", device="auto", repeats: int = 20, max_seconds: float = 1.0,
                   recompute: bool = False, truths: MutableMapping | None = None) -> dict:
    """Time and peak memory of the forward KL from hidden states, and its error. Record kind ``"objective_speed"``.

    Parameters
    ----------
    implementation : one of `IMPLEMENTATIONS`.
    shape : (tokens, width, vocab); teacher and student have one width.
    dtype : of hidden states and heads, ``"auto"`` is bfloat16 on a GPU and float32 on a CPU.
    direction : ``"forward"``, without gradients, or ``"forward+backward"``, with those of the student's two tensors.
    repeats, max_seconds : of samples, as `timing.time_calls` takes them, of two calls each on a GPU.
    truths : where truths are kept, by shape, for the next implementation, if given.

    Metrics: ``seconds`` with ``low`` and ``high`` as launched from Python; ``gpu_seconds``, ``gpu_low``, ``gpu_high``
    of a CUDA graph (None on a CPU; ``graph_reason`` says why a call could not be captured); ``peak_bytes`` held beyond
    the inputs, logits and gradients included; ``errors`` by `relative_error` of the ``loss`` and, with the backward
    pass, the gradients by ``hidden`` states and ``head``, against the plain formula in float64 on the same inputs, a
    slice of tokens at a time. Logits are larger than any cache, so one set of inputs will do.

    Raises ValueError for a bad argument.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    tokens, width, vocab = shape = check_objective_shape(shape)
    check_choice("direction", direction, DIRECTIONS)
    check_int("repeats", repeats, 1)
    check_number("max_seconds", max_seconds, 0, open_low=True)
    device, dtype = check_device(device), dtype_name(dtype, device)
    parameters = {"implementation": implementation, "tokens": tokens, "width": width, "vocab": vocab, "dtype": dtype,
                  "direction": direction, "repeats": repeats, "max_seconds": max_seconds}
    truths = {} if truths is None else truths

    def compute():
        reason = why_not(implementation, device)
        if reason is not None:
            return {"reason": reason}
        inputs, backward = objective_inputs(shape, dtype, device), direction == DIRECTIONS[1]
        call = _call(implementation, inputs, backward)
        clock = {"repeats": repeats, "max_seconds": max_seconds, "together": 2}
        metrics = time_calls([call], device, **clock) | {"gpu_seconds": None}
        if device.type == "cuda":
            try:
                graph = time_graph([call], **clock)
                metrics |= {f"gpu_{name}": graph[name] for name in ("seconds", "low", "high")}
            except RuntimeError as error:
                metrics["graph_reason"] = sentence(error)
            torch.cuda.empty_cache()  # what graphs hold
        found, metrics["peak_bytes"] = peak_memory(call, device)
        if shape not in truths:
            truths[shape] = _truth(inputs)
        pairs = zip(truths[shape].items(), found)
        return metrics | {"errors": {name: relative_error(x, truth.to(device)) for (name, truth), x in pairs}}

    return measured(ledger, "objective_speed", parameters, device, compute, recompute)


def why_not(implementation: str, device: str | torch.device = "auto") -> str | None:
    """Why an implementation cannot run on a device, in one sentence; None if it can."""
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation not in _PACKAGES:
        return None
    module, package = _PACKAGES[implementation]
    for name, shown in ((module, package), ("triton", "triton")):
        if importlib.util.find_spec(name) is None:
            return f"{shown} is not installed (pip install {shown})"
    if check_device(device).type != "cuda":
        return f"{package} needs a CUDA GPU, and this is on {check_device(device).type}"
    return None


def objective_inputs(shape: Iterable[int], dtype: str = "float32", device="cpu",
                     seed: int = 0) -> dict[str, torch.Tensor]:
    """Random hidden states (tokens, width) and heads (vocab, width) of a teacher and of a student not far from it."""
    tokens, width, vocab = check_objective_shape(shape)
    generator = torch.Generator(device).manual_seed(seed)

    def near(mean, spread, *size):
        return mean + spread * torch.randn(*size, generator=generator, device=device)

    hidden, head = near(0, 1, tokens, width), near(0, 3 / width**0.5, vocab, width)  # logits of size 3
    inputs = {"teacher_hidden": hidden, "teacher_head": head, "student_hidden": near(hidden, 0.3, tokens, width),
              "student_head": near(head, 0.3 / width**0.5, vocab, width)}
    return {name: x.to(getattr(torch, dtype)) for name, x in inputs.items()}


def check_objective_shape(shape: Iterable[int]) -> tuple[int, int, int]:
    """`shape` as a tuple; raises ValueError unless it is (tokens, width, vocab), whole numbers of at least 1."""
    ok = isinstance(shape, (list, tuple)) and len(shape) == 3
    if not ok or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
        raise ValueError(f"shape={shape!r} is not (tokens, width, vocab), three whole numbers of at least 1")
    return tuple(shape)


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
    """A function without arguments that returns (loss,), or (loss, gradient of hidden states, gradient of head)."""
    loss_of, wanted = IMPLEMENTATIONS[implementation], [inputs["student_hidden"], inputs["student_head"]]
    if not backward:
        return torch.no_grad()(lambda: (loss_of(**inputs),))
    for x in wanted:
        x.requires_grad_(True)

    def call():
        loss = loss_of(**inputs)
        return loss.detach(), *torch.autograd.grad(loss, wanted)

    return call


def _truth(inputs):
    """Loss and gradients by the plain formula in float64, a slice of tokens at a time; kept on the CPU."""
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
