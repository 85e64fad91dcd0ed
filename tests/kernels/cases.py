"""Inputs of both operators for the tests of every backend, and how far a result is from the truth."""

from __future__ import annotations

import torch

OPERATORS = {"gdn": "gated_delta_rule", "gla": "gated_linear_attention"}
DECAYS = ["mild", "none", "near none", "strong", "mixed", "strong, then mild"]


def make_inputs(operator, time, key_dim, value_dim, dtype, decay="mild", beta="random", repeat_keys=False, batch=2,
                heads=3, sequences=None, device="cpu", seed=None):
    """Inputs with values of `dtype`, log_decay and the initial state in float32."""
    random = torch.Generator().manual_seed(time if seed is None else seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    q = torch.nn.functional.normalize(normal(batch, time, heads, key_dim), dim=-1)
    k = torch.nn.functional.normalize(normal(batch, 1 if repeat_keys else time, heads, key_dim), dim=-1)
    k = k.expand(batch, time, heads, key_dim)
    v = normal(batch, time, heads, value_dim)
    uniform = torch.rand(batch, time, heads, *([key_dim] if operator == "gla" else []), generator=random)
    early = (torch.arange(time) < time // 2).view(1, time, *[1] * (uniform.dim() - 2))
    log_decay = {
        "mild": -0.1 * uniform,
        "none": 0 * uniform,
        "near none": -1e-6 * uniform,
        "strong": 0 * uniform - 20,
        "mixed": torch.where(uniform < 0.5, -20, -0.01 * uniform),
        "strong, then mild": torch.where(early, -20, -0.01 * uniform),
    }[decay]
    strength = torch.rand(batch, time, heads, generator=random)
    strength = {"random": strength, "zero": 0 * strength, "one": 0 * strength + 1}[beta]
    inputs = [q.to(dtype), k.to(dtype), v.to(dtype), log_decay] + ([strength.to(dtype)] if operator == "gdn" else [])
    state = normal(batch if sequences is None else sequences, heads, key_dim, value_dim)
    return [x.to(device) for x in inputs], state.to(device)


def error(found, truth):
    """Relative Frobenius error; 0 where both are zero."""
    difference = (found.double() - truth).norm()
    return 0.0 if difference == 0 else (difference / truth.norm()).item()


def results(operate, inputs, state, dtype=None):
    """Output, final state and every gradient of a fixed random functional of the two, whose weights are bfloat16's.

    operate(*inputs, state) gives the two; state may be None, and its gradient is then left out.
    """
    inputs = [x.to(dtype or x.dtype).requires_grad_() for x in inputs]
    state = None if state is None else state.to(dtype or state.dtype).requires_grad_()
    o, final = operate(*inputs, state)
    random = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=random).bfloat16().to(x) for x in (o, final)]
    sources = inputs if state is None else [*inputs, state]
    return [o.detach(), final.detach(), *torch.autograd.grad((o, final), sources, weights)]
