"""How fast it is: the operators, the training step and decoding, each measurement a record.

Every function returns its record as a dict, parameters and metrics together, by the rules of `timing.measured`: asked
again it reads the record, and what cannot run here has its ``reason`` in place of numbers. Times are in seconds, memory
in bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F

from hybridlib import kernels
from hybridlib.bench.peers import eager, flash_qla
from hybridlib.bench.timing import measured, peak_memory, sentence, time_calls, time_copy, time_graph
from hybridlib.checks import check_choice, check_device, check_int, check_number
from hybridlib.records.ledger import Ledger

__all__ = ["BACKENDS", "DIRECTIONS", "DTYPES", "OPERATORS", "check_shape", "dtype_name", "memory_floor",
           "operator_inputs", "operator_with", "refusal", "time_operator"]

OPERATORS = ("gated_delta_rule", "gated_linear_attention", "softmax_attention")
BACKENDS = ("reference", "chunked", "fused", "fla", "flash_qla", *eager.PEERS, "softmax")
DIRECTIONS = ("forward", "forward+backward")
DTYPES = ("auto", "bfloat16", "float16", "float32")


def time_operator(ledger: Ledger, operator: str, backend: str, shape: Iterable[int], *, dtype: str = "auto",
                  direction: str = "forward", device="auto", repeats: int = 20, max_seconds: float = 1.0,
                  recompute: bool = False) -> dict:
    """Time one operator on fresh random inputs, several sets of them in turn. Record kind ``"operator_speed"``.

    Parameters
    ----------
    operator : one of `OPERATORS`; ``"softmax_attention"`` is torch's scaled_dot_product_attention, causal.
    backend : as `kernels` names them; ``"flash_qla"``, FlashQLA's gated delta rule, an optional package that only
        measurements use; ``"transformers"`` and ``"naive"``, others' PyTorch forms (`kernels.eager`); ``"softmax"`` for
        softmax attention.
    shape : (batch, time, heads, dim); keys and values are of the same dim.
    dtype : of q, k, v and beta, ``"auto"`` is bfloat16 on a GPU and float32 on a CPU; log_decay is float32, as in the
        mixers.
    direction : ``"forward"``, without gradients, or ``"forward+backward"``, with those of every input.
    repeats, max_seconds : of samples, as `timing.time_calls` takes them.

    Metrics: ``seconds`` with ``low`` and ``high`` as launched from Python; ``gpu_seconds``, ``gpu_low``, ``gpu_high``
    of a CUDA graph (None on a CPU; ``graph_reason`` says why a call could not be captured); ``peak_bytes`` held beyond
    the inputs; ``floor_bytes`` (`memory_floor`) and ``floor_seconds``, that over the speed of `time_copy`.

    Raises ValueError for a bad argument.
    """
    check_choice("operator", operator, OPERATORS)
    check_choice("backend", backend, ("softmax",) if operator == OPERATORS[2] else BACKENDS[:-1])
    batch, length, heads, dim = check_shape(shape)
    check_choice("direction", direction, DIRECTIONS)
    check_int("repeats", repeats, 1)
    check_number("max_seconds", max_seconds, 0, open_low=True)
    device, dtype = check_device(device), dtype_name(dtype, device)
    parameters = {"operator": operator, "backend": backend, "batch": batch, "time": length, "heads": heads, "dim": dim,
                  "dtype": dtype, "direction": direction, "repeats": repeats, "max_seconds": max_seconds}

    def compute():
        reason = refusal(operator, backend, dim, dim, dtype, device)
        if reason is not None:
            return {"reason": reason}
        copied = time_copy(ledger, device=device)["bytes_per_second"]
        shape, backward = (batch, length, heads, dim), direction == DIRECTIONS[1]
        floor = memory_floor(operator_inputs(operator, shape, dtype, "meta"), direction)
        sets = max(2, min(8, -(-2**28 // floor)))  # together larger than any cache
        inputs = [operator_inputs(operator, shape, dtype, device, seed) for seed in range(sets)]
        calls = [_call(operator, backend, tensors, backward) for tensors in inputs]
        timing = time_calls(calls, device, repeats=repeats, max_seconds=max_seconds)
        metrics = timing | {"peak_bytes": peak_memory(calls[0], device)[1], "floor_bytes": floor,
                            "floor_seconds": floor / copied, "gpu_seconds": None}
        if device.type == "cuda":
            try:
                graph = time_graph(calls, repeats=repeats, max_seconds=max_seconds)
                metrics |= {f"gpu_{name}": graph[name] for name in ("seconds", "low", "high")}
            except Exception as error:  # backends are other people's code
                metrics["graph_reason"] = sentence(error)
        return metrics

    return measured(ledger, "operator_speed", parameters, device, compute, recompute)


def operator_inputs(operator: str, shape: Iterable[int], dtype: str = "float32", device="cpu",
                    seed: int = 0) -> dict[str, torch.Tensor]:
    """Random q, k (of unit length), v and, by operator, log_decay (<= 0, float32) and beta (0 to 1), by name."""
    check_choice("operator", operator, OPERATORS)
    batch, length, heads, dim = check_shape(shape)
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
    """The linear operator with a backend of `BACKENDS`: takes what `kernels`' function does, without its `backend`."""
    if backend == "flash_qla":
        return flash_qla.gated_delta_rule
    if backend in eager.PEERS:
        return functools.partial(eager.run, backend, operator)
    return functools.partial(getattr(kernels, operator), backend=backend)


def refusal(operator: str, backend: str, key_dim: int, value_dim: int, dtype: str, device: torch.device) -> str | None:
    """Why a backend of `BACKENDS` cannot be measured here, in one sentence; None if it can, or a call must tell."""
    if backend == "flash_qla":
        return flash_qla.why_not(operator, key_dim, value_dim, dtype, device)
    if backend in eager.PEERS:
        return eager.why_not(backend, operator)
    return kernels.available_backends().get(backend)


def memory_floor(inputs: Mapping[str, torch.Tensor], direction: str = "forward") -> int:
    """Bytes that an operator must move at least, whatever it computes.

    - forward: q, k, v and the gates are read, o (of v's size) is written: bytes(inputs) + bytes(v);
    - backward: do (of v's size), q, k, v and the gates are read, and as many gradients as inputs are written:
      2 bytes(inputs) + bytes(v); ``"forward+backward"`` is the sum of both, 3 bytes(inputs) + 2 bytes(v).

    States are left out: they are smaller, and an operator may keep them on chip.
    """
    check_choice("direction", direction, DIRECTIONS)
    read, written = sum(x.nbytes for x in inputs.values()), inputs["v"].nbytes
    return read + written if direction == "forward" else 3 * read + 2 * written


def _call(operator, backend, tensors, backward):
    """A function without arguments that runs the operator on `tensors`, with the gradients of all if `backward`."""
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


def check_shape(shape: Iterable[int]) -> tuple[int, int, int, int]:
    """`shape` as a tuple; raises ValueError unless it is (batch, time, heads, dim), whole numbers of at least 1."""
    ok = isinstance(shape, (list, tuple)) and len(shape) == 4
    if not ok or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
        raise ValueError(f"shape={shape!r} is not (batch, time, heads, dim), four whole numbers of at least 1")
    return tuple(shape)


def dtype_name(dtype: str, device: str | torch.device) -> str:
    """`dtype` with ``"auto"`` made bfloat16 on a GPU and float32 on a CPU; raises ValueError if it is unknown."""
    check_choice("dtype", dtype, DTYPES)
    return dtype if dtype != "auto" else "bfloat16" if check_device(device).type == "cuda" else "float32"
