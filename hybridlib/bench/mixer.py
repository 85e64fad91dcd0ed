"""How long the parts of a mixer take: its operator, and what stands around it, which a kernel might absorb."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import torch

from hybridlib.bench.operators import DIRECTIONS, check_shape, dtype_name
from hybridlib.bench.timing import measured, time_calls, time_graph
from hybridlib.checks import check_choice, check_device, check_int, check_number
from hybridlib.models.mixers import MIXERS, build_mixer
from hybridlib.records.ledger import Ledger

__all__ = ["PARTS", "mixer_parts", "time_mixer"]

PARTS = ("projections", "before", "operator", "after", "output")
_SETS = 4  # of inputs, in turn, together larger than any cache at the shapes of training


def time_mixer(ledger: Ledger, mixer: str, shape: Iterable[int], *, dtype: str = "auto",
               direction: str = "forward+backward", device="auto", repeats: int = 20, max_seconds: float = 1.0,
               recompute: bool = False) -> dict:
    """Time the parts of a mixer one by one, on a GPU compiled as in the training step. Record kind ``"mixer_speed"``.

    Parameters
    ----------
    mixer : a name of `MIXERS`.
    shape : (batch, time, heads, dim); the hidden states' width is heads * dim.
    dtype : ``"bfloat16"`` is autocast from float32 weights; ``"auto"`` is that on a GPU and float32 on a CPU.
    direction : ``"forward"`` or ``"forward+backward"``, with gradients of inputs and weights.
    repeats, max_seconds : of samples, as `timing.time_calls` takes them.

    Metrics: ``parts``, a timing for each of `PARTS`, as `mixer_parts` names them: of the replay of a CUDA graph on a
    GPU, of calls on a CPU.

    Raises ValueError for a bad argument.
    """
    check_choice("mixer", mixer, tuple(MIXERS))
    batch, length, heads, dim = check_shape(shape)
    check_choice("direction", direction, DIRECTIONS)
    check_int("repeats", repeats, 1)
    check_number("max_seconds", max_seconds, 0, open_low=True)
    device, dtype = check_device(device), dtype_name(dtype, device)
    parameters = {"mixer": mixer, "batch": batch, "time": length, "heads": heads, "dim": dim, "dtype": dtype,
                  "direction": direction, "repeats": repeats, "max_seconds": max_seconds}

    def compute():
        config = SimpleNamespace(num_attention_heads=heads, head_dim=dim, hidden_size=heads * dim, rms_norm_eps=1e-6,
                                 mixer_qkv_bias=False, mixer_qk_norm=False, mixer_o_bias=False)
        module, generator = build_mixer(mixer, config, 0), torch.Generator().manual_seed(0)
        module.init_gates(generator)
        module.to(device)
        parts, autocast = mixer_parts(module), (device.type, torch.bfloat16, dtype == "bfloat16")
        states = [torch.randn(batch, length, heads * dim, generator=generator).to(device) for _ in range(_SETS)]
        with torch.no_grad(), torch.autocast(*autocast):
            given = [_inputs(parts, x) for x in states]
        found = {}
        for name, part in parts.items():
            run = torch.compile(part) if device.type == "cuda" and name != "operator" else part
            calls = [_call(run, inputs[name], module, direction == DIRECTIONS[1], autocast) for inputs in given]
            how = {"repeats": repeats, "max_seconds": max_seconds}
            found[name] = time_graph(calls, **how) if device.type == "cuda" else time_calls(calls, device, **how)
        return {"parts": found}

    return measured(ledger, "mixer_speed", parameters, device, compute, recompute)


def mixer_parts(module) -> dict[str, Callable]:
    """A mixer's forward pass in `PARTS`, each a function of tensors.

    ``projections`` : hidden states (batch, time, width) -> q, k, v, the output's gate, and the operator's gates, raw.
    ``before`` : q, k, v and the operator's gates -> what the operator takes: activated, normalised, within bounds.
    ``operator`` : that -> (batch, time, heads, dim).
    ``after`` : that and the output's gate -> normalised, gated, (batch, time, width).
    ``output`` : that -> the mixer's output.
    """
    taken = copy.copy(module)
    taken._run = lambda inputs, state: (inputs, state)  # what the operator would be given

    functions = (module.project, lambda q, k, v, *gates: taken.mix(q, k, v, *gates, None, None)[0],
                 lambda *inputs: module._run(inputs, None)[0], module.gate_output, module.o_proj)
    return dict(zip(PARTS, functions, strict=True))


def _inputs(parts, x):
    """What each part is given where the first is given x."""
    q, k, v, gate, *gates = parts["projections"](x)
    taken = parts["before"](q, k, v, *gates)
    o = parts["operator"](*taken)
    return dict(zip(PARTS, ((x,), (q, k, v, *gates), taken, (o, gate), (parts["after"](o, gate),)), strict=True))


def _call(run, inputs, module, backward, autocast):
    inputs = [x.detach().requires_grad_(backward) for x in inputs]
    wanted = [*inputs, *module.parameters()]

    def call():
        with torch.set_grad_enabled(backward), torch.autocast(*autocast):
            found = run(*inputs)
        if backward:
            found = found if isinstance(found, (tuple, list)) else (found,)
            torch.autograd.grad(found, wanted, [x.detach() for x in found], allow_unused=True)

    return call
