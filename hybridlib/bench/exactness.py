"""How exact the operators are: each backend against the recurrence in float64, over named cases, as records. Compared
are the output, the final state and the gradients of one random functional of both by every input."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from hybridlib.bench.operators import MODEL_BACKENDS, operator_with, refusal
from hybridlib.bench.timing import Bench, error_line, wait
from hybridlib.records.provenance import software_versions

__all__ = ["CASES", "Case", "EXACT", "cases_for", "error_bound", "make_case", "measure_exactness", "relative_error"]

EXACT = (*MODEL_BACKENDS, "flash_qla")  # backends that can be measured
_DECAYS = ("mild", "none", "near none", "strong", "mixed", "strong then mild")
_STATE, _AT_ONCE = "initial_state", 2**23  # numbers of v whose truth is computed at once


@dataclass(frozen=True)
class Case:
    """The inputs of an operator, up to its dtype.

    `decay` is that of log_decay: ``"mild"`` (-0.1 to 0), ``"none"`` (0), ``"near none"`` (-1e-6 to 0), ``"strong"``
    (-20), ``"mixed"`` (half -20, half -0.01 to 0) or ``"strong then mild"`` (-20 in the first half of the tokens).
    `beta`, of the gated delta rule, is ``"random"`` (0 to 1), ``"zero"`` or ``"one"``. `repeat_keys` gives each head
    one key; `borders` are those of packed sequences, as `cu_seqlens`.
    """

    batch: int = 2
    time: int = 130
    heads: int = 9
    key_dim: int = 64
    value_dim: int = 64
    decay: str = "mild"
    beta: str = "random"
    repeat_keys: bool = False
    borders: tuple[int, ...] = ()
    seed: int = 0

    def __str__(self) -> str:
        return (f"({self.batch}, {self.time}, {self.heads}, {self.key_dim}, {self.value_dim}), decay {self.decay}, "
                f"beta {self.beta}" + (", one key a head" if self.repeat_keys else "")
                + (f", packed at {', '.join(map(str, self.borders))}" if self.borders else "") + f", seed {self.seed}")


def _random(seed):
    draw = random.Random(seed)
    return Case(draw.randint(1, 4), draw.randint(2, 400), draw.randint(1, 12), decay=draw.choice(_DECAYS), seed=seed)


CASES: dict[str, Case] = {
    **{decay: Case(decay=decay) for decay in _DECAYS},
    "beta 0": Case(beta="zero"), "beta 1": Case(beta="one"), "repeated keys": Case(repeat_keys=True),
    "repeated keys at beta 1": Case(repeat_keys=True, beta="one", decay="near none"),
    **{f"length {time}": Case(time=time) for time in (1, 63, 65)}, "length 4097": Case(1, 4097),
    "dims 32": Case(key_dim=32, value_dim=32), "dims 128": Case(key_dim=128, value_dim=128),
    "keys 128 and values 64": Case(key_dim=128), "keys 64 and values 128": Case(value_dim=128),
    "packed": Case(1, 400, borders=(0, 5, 5, 69, 133, 198, 400)),
    **{f"random {seed}": _random(seed) for seed in (1, 2, 3)},
    "16 x 1024 x 9 x 64": Case(16, 1024), "2 x 4096 x 16 x 128": Case(2, 4096, 16, 128, 128),
}


def measure_exactness(bench: Bench, operator: str, backend: str, cases: Iterable[str] = tuple(CASES),
                      truths: MutableMapping | None = None) -> dict:
    """Measure a backend's errors in the cases that `cases_for` allows. Record kind ``"operator_exactness"``.

    `backend` is one of `EXACT`; `truths` by case can be shared by backends of one operator, dtype and device. The dtype
    is that of q, k, v and beta; log_decay and the initial state are float32. Metrics by case: ``errors`` by tensor
    against ``"reference"`` in float64 (beyond 1,000 tokens ``"chunked"``) from the same rounded inputs, infinite for
    what is not finite; ``equal``, whether two runs gave the same bits; ``reasons``, why a case could not be run. Raises
    ValueError if no case is left.
    """
    dtype, device = bench.dtype, bench.device
    allowed = cases_for(operator, backend, dtype, cases)
    if not allowed:
        raise ValueError(f"cases={list(cases)!r} has none that {backend!r} takes in {dtype}; see cases_for")
    truths = {} if truths is None else truths
    parameters = {"operator": operator, "backend": backend, "dtype": dtype,
                  "cases": {name: str(case) for name, case in allowed.items()}}
    if backend == "fused" and "triton" in (versions := software_versions()):
        parameters["triton"] = versions["triton"]  # another compiler, other kernels

    def compute():
        reason = refusal(operator, backend, next(iter(allowed.values())).key_dim, dtype, device)
        if reason is not None:
            return {"reason": reason}
        errors, equal, reasons = {}, {}, {}
        for name, case in allowed.items():
            try:
                if name not in truths:
                    truths[name] = _Answers(operator, case, dtype, device)
                answers = truths[name]
                first, second = (answers.by(backend) for _ in range(2))
                errors[name] = {tensor: relative_error(x, answers.truth[tensor]) for tensor, x in first.items()}
                equal[name] = all(torch.equal(x, second[tensor]) for tensor, x in first.items())
            except Exception as error:  # backends are other people's code: the other cases go on
                reasons[name] = error_line(error)
        return {"reason": None if errors else next(iter(reasons.values())), "errors": errors, "equal": equal,
                "reasons": reasons}

    return bench.record("operator_exactness", parameters, compute)


def cases_for(operator: str, backend: str, dtype: str, names: Iterable[str] = tuple(CASES)) -> dict[str, Case]:
    """Keep the cases that an operator, a backend and a dtype take: ``"reference"`` up to 1,000 tokens; ``"fla"``, which
    tunes itself for each size and multiplies float32 in TF32, one size in half precision."""
    allowed = {}
    for name in names:
        case = CASES[name]
        excluded = (operator == "gated_linear_attention" and case.beta != "random"
                    or dtype == "float16" and case.decay.startswith("strong")
                    or backend == "reference" and case.time > 1000
                    or backend == "fla" and (dtype == "float32" or case.time < 64 or case.borders
                                             or (case.heads, case.key_dim, case.value_dim) != (9, 64, 64))
                    or backend == "flash_qla" and (operator != "gated_delta_rule" or dtype == "float32" or case.borders
                                                   or (case.key_dim, case.value_dim) != (128, 128)))
        if not excluded:
            allowed[name] = case
    return allowed


def error_bound(backend: str, dtype: str) -> float:
    """Return the bound of an error: 1e-2 in half precision, in float32 1e-5, or 1e-3 where products are TF32's."""
    return 1e-2 if dtype != "float32" else 1e-3 if backend in ("fused", "fla") else 1e-5


def make_case(operator: str, case: Case, dtype: str = "float32", device="cpu") -> dict[str, torch.Tensor]:
    """Make a case's tensors: the operator's inputs in its order, ``initial_state`` last; drawn on the CPU."""
    generator, kind = torch.Generator().manual_seed(case.seed), getattr(torch, dtype)
    size = (case.batch, case.time, case.heads)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    q, v = F.normalize(draw(*size, case.key_dim), dim=-1), draw(*size, case.value_dim)
    k = F.normalize(draw(case.batch, 1 if case.repeat_keys else case.time, case.heads, case.key_dim), dim=-1)
    delta_rule = operator == "gated_delta_rule"
    uniform = torch.rand(*size, *(() if delta_rule else (case.key_dim,)), generator=generator)
    early = (torch.arange(case.time) < case.time // 2).view(1, -1, *[1] * (uniform.dim() - 2))
    if case.decay in ("mixed", "strong then mild"):
        log_decay = torch.where(uniform < 0.5 if case.decay == "mixed" else early, -20, -0.01 * uniform)
    else:
        factor, least = {"mild": (-0.1, 0), "none": (0, 0), "near none": (-1e-6, 0), "strong": (0, -20)}[case.decay]
        log_decay = factor * uniform + least
    strength = torch.rand(*size, generator=generator)
    strength = {"random": strength, "zero": 0 * strength, "one": 0 * strength + 1}[case.beta]
    inputs = {"q": q.to(kind), "k": k.expand_as(q).to(kind), "v": v.to(kind), "log_decay": log_decay}
    inputs |= {"beta": strength.to(kind)} if delta_rule else {}
    inputs[_STATE] = draw(max(len(case.borders) - 1, case.batch), case.heads, case.key_dim, case.value_dim)
    return {name: x.to(device) for name, x in inputs.items()}


def relative_error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Divide the difference's Frobenius norm by that of `truth`; 0 if they are equal, infinite if undefined."""
    difference = (result.double() - truth).norm().item()
    size = truth.norm().item()
    return 0.0 if difference == 0 else difference / size if math.isfinite(difference) and size > 0 else math.inf


class _Answers:
    """What an operator answers in one case; inputs, the functional's weights and the truth are computed once."""

    def __init__(self, operator, case, dtype, device):
        self.operator, self.case, self.inputs = operator, case, make_case(operator, case, dtype, device)
        generator = torch.Generator().manual_seed(7)
        self.weights = [torch.randn(self.inputs[name].shape, generator=generator).bfloat16().to(device)
                        for name in ("v", _STATE)]  # bfloat16's numbers, so that no dtype rounds them

    def by(self, backend, dtype=None, rows=slice(None)):
        """Output, final state and gradients, by name: of some `rows` of the batch, computed in `dtype`."""
        tensors = {name: x[rows].to(dtype or x.dtype).requires_grad_() for name, x in self.inputs.items()}
        *operands, state = tensors.values()
        packed = {"cu_seqlens": torch.tensor(self.case.borders, device=state.device)} if self.case.borders else {}
        o, final = operator_with(self.operator, backend)(*operands, initial_state=state, **packed)
        weights = [weight[rows].to(x.dtype) for x, weight in zip((o, final), self.weights)]
        grads = torch.autograd.grad((o, final), list(tensors.values()), weights)
        wait(state.device)  # an error of the GPU comes up here
        gradients = {f"gradient of {name.replace('_', ' ')}": grad for name, grad in zip(tensors, grads)}
        return {"output": o.detach(), "final state": final.detach()} | gradients

    @cached_property
    def truth(self):
        case, exact = self.case, "reference" if self.case.time < 1000 else "chunked"
        at_once = max(1, _AT_ONCE // (case.time * case.heads * case.value_dim))
        slices = [slice(i, i + at_once) for i in range(0, case.batch, at_once)] if not case.borders else [slice(None)]
        parts = [self.by(exact, torch.float64, rows) for rows in slices]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
