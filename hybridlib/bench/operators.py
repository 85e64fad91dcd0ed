"""How fast the operators are, by each backend and by other implementations, each measurement a record. Functions that
measure take what `speed.SpeedSettings` allows and return parameters and metrics in one dict (see `Bench.record`); times
are in seconds, memory in bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F

from hybridlib import kernels
from hybridlib.bench import peers
from hybridlib.bench.timing import Bench, peak_memory, time_copy

__all__ = ["BACKENDS", "DIRECTIONS", "MODEL_BACKENDS", "OPERATORS", "memory_floor", "operator_inputs", "operator_with",
           "refusal", "time_operator"]

OPERATORS = ("gated_delta_rule", "gated_linear_attention", "softmax_attention")
MODEL_BACKENDS = ("reference", "chunked", "fused", "fla")
BACKENDS = (*MODEL_BACKENDS, *peers.PEERS, "softmax")
DIRECTIONS = ("forward", "forward+backward")
_CACHES = 2**28  # bytes: inputs of calls that take turns are together larger than any cache


def time_operator(bench: Bench, operator: str, backend: str, shape: Iterable[int], direction: str = "forward") -> dict:
    """Time one operator on random inputs. Record kind ``"operator_speed"``.

    `operator` is one of `OPERATORS`; ``"softmax_attention"`` (backend ``"softmax"``) is torch's, causal. `shape` is
    (batch, time, heads, dim); q, k, v and beta are of `bench`'s dtype, log_decay is float32. `direction` is
    ``"forward"`` or ``"forward+backward"``, with gradients of every input. Metrics: the timing of `Bench.time`;
    ``peak_bytes`` beyond the inputs; ``floor_bytes`` (`memory_floor`) and ``floor_seconds``, these over the speed of
    `time_copy`.
    """
    batch, length, heads, dim = shape
    parameters = {"operator": operator, "backend": backend, "batch": batch, "time": length, "heads": heads, "dim": dim,
                  "dtype": bench.dtype, "direction": direction, "repeats": bench.repeats,
                  "max_seconds": bench.max_seconds}

    def compute():
        reason = refusal(operator, backend, dim, bench.dtype, bench.device)
        if reason is not None:
            return {"reason": reason}
        bandwidth = time_copy(replace(bench, recompute=False))["bytes_per_second"]
        floor = memory_floor(operator_inputs(operator, shape, bench.dtype, "meta"), direction)
        calls = [_call(operator, backend, operator_inputs(operator, shape, bench.dtype, bench.device, seed),
                       direction != "forward") for seed in range(max(2, min(8, -(-_CACHES // floor))))]
        return bench.time(calls) | {"peak_bytes": peak_memory(calls[0], bench.device)[1], "floor_bytes": floor,
                                    "floor_seconds": floor / bandwidth}

    return bench.record("operator_speed", parameters, compute)


def operator_inputs(operator: str, shape: Iterable[int], dtype: str = "float32", device="cpu",
                    seed: int = 0) -> dict[str, torch.Tensor]:
    """Draw q, k (of unit length), v and, by operator, log_decay (<= 0, float32) and beta (0 to 1), by name."""
    batch, length, heads, dim = shape
    generator = None if str(device) == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(*last):
        return torch.randn(batch, length, heads, *last, generator=generator, device=device)

    dtype = getattr(torch, dtype)
    inputs = {"q": normal(dim).to(dtype), "k": F.normalize(normal(dim), dim=-1).to(dtype), "v": normal(dim).to(dtype)}
    if operator == "gated_delta_rule":
        inputs |= {"log_decay": F.logsigmoid(normal() + 3), "beta": normal().sigmoid().to(dtype)}
    elif operator == "gated_linear_attention":
        inputs |= {"log_decay": F.logsigmoid(normal(dim)) / 16}
    return inputs


def operator_with(operator: str, backend: str) -> Callable:
    """Return the linear operator with one of `BACKENDS`, as a function of the other arguments in `kernels`."""
    if backend in peers.PEERS:
        return peers.gated_delta_rule(backend)
    return functools.partial(getattr(kernels, operator), backend=backend)


def refusal(operator: str, backend: str, dim: int, dtype: str, device: torch.device) -> str | None:
    """Say why one of `BACKENDS` cannot run an operator here; None if it can or only a call can tell."""
    if backend in peers.PEERS:
        return peers.why_not(backend, operator, dim, dtype, device)
    return kernels.available_backends().get(backend)


def memory_floor(inputs: Mapping[str, torch.Tensor], direction: str = "forward") -> int:
    """Count the bytes that an operator must move at least, states left out: forward, bytes(inputs) + bytes(v) for
    reading q, k, v and gates and writing o; backward, 2 bytes(inputs) + bytes(v) more, for do and the gradients."""
    inputs_bytes, output_bytes = sum(x.nbytes for x in inputs.values()), inputs["v"].nbytes
    return inputs_bytes + output_bytes if direction == "forward" else 3 * inputs_bytes + 2 * output_bytes


def _call(operator, backend, tensors, backward):
    inputs = [x.requires_grad_(backward) for x in tensors.values()]
    run = operator_with(operator, backend) if operator != "softmax_attention" else None

    def forward():
        if run is not None:
            return run(*inputs)[0]
        q, k, v = (x.transpose(1, 2) for x in inputs)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    if not backward:
        return torch.no_grad()(forward)
    do = torch.randn_like(tensors["v"])
    return lambda: torch.autograd.grad(forward(), inputs, do)
