"""What a call of the fused operators launches, kernel by kernel: time, bytes and FLOPs, each call a record.

Kernels are measured one by one. In a call some start beside the one before them (`kernels.fused.launch.follows`), so
their times add up to more than the call's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hybridlib import kernels
from hybridlib.bench.operators import (DIRECTIONS, OPERATORS, calls_in_turn, check_shape, operator_inputs,
                                       operator_with)
from hybridlib.bench.timing import Bench, time_calls, time_copy, wait
from hybridlib.checks import check_choice
from hybridlib.kernels.fused import launch

__all__ = ["product_flops", "split_calls", "time_kernels", "watch_launches"]

_IN_PLACE = {("delta_rule.gradients", "dv"), ("delta_rule.join", "ends"), ("linear_attention.join", "ends")}


def time_kernels(bench: Bench, operator: str, shape: Iterable[int]) -> dict:
    """Time every launch of a call with the gradients of all inputs, on a GPU. Record kind ``"kernel_speed"``.

    `operator` is ``"gated_delta_rule"`` or ``"gated_linear_attention"``; inputs of `shape` (batch, time, heads, dim)
    are those of `time_operator`, several sets in turn. torch's profiler sees `bench.repeats` calls.

    Metrics: ``kernels``, a dict a launch in order, that of `watch_launches` with ``pass`` ("forward" or "backward"),
    ``seconds`` with quartiles ``low`` and ``high``, and ``floor_seconds``, its bytes over the speed of `time_copy`;
    ``kernel_seconds``, the sum of their medians; ``other_seconds`` of other work on the GPU in a call; ``gpu_seconds``
    of the whole call in a CUDA graph.

    Raises ValueError for a bad argument.
    """
    check_choice("operator", operator, OPERATORS[:2])
    batch, length, heads, dim = shape = check_shape(shape)
    parameters = {"operator": operator, "backend": "fused", "dtype": bench.dtype, "batch": batch, "time": length,
                  "heads": heads, "dim": dim, "repeats": bench.repeats}

    def compute():
        device, reason = bench.device, _why_not(bench.device)
        if reason is not None:
            return {"reason": reason}
        bandwidth = time_copy(replace(bench, recompute=False))["bytes_per_second"]
        calls = calls_in_turn(operator, "fused", shape, DIRECTIONS[1], bench.dtype, device)
        before, launch.override_follows = launch.override_follows, False  # each kernel has the GPU to itself
        try:
            launches = _launches(operator, operator_inputs(operator, shape, bench.dtype, device))
            other_seconds = _add_times(launches, calls, device, bench.repeats)
        finally:
            launch.override_follows = before
        for kernel in launches:
            kernel["floor_seconds"] = kernel["bytes"] / bandwidth
        return {"kernels": launches, "kernel_seconds": sum(kernel["seconds"] for kernel in launches),
                "other_seconds": other_seconds,
                **time_calls(calls, device, repeats=bench.repeats, launched=False)}

    return bench.record("kernel_speed", parameters, compute)


def _why_not(device):
    return kernels.fused.why_not() or (None if device.type == "cuda" else
                                       f"kernels are timed on a CUDA GPU, and this is on {device.type}")


def _launches(operator, tensors):
    """The launches of one call with gradients, as `watch_launches` gives them, with ``pass``."""
    inputs = [x.requires_grad_() for x in tensors.values()]
    with watch_launches(operator) as launches:
        o = operator_with(operator, "fused")(*inputs)[0]
        num_forward = len(launches)
        torch.autograd.grad(o, inputs, torch.ones_like(o))
    return [one | {"pass": "forward" if i < num_forward else "backward"} for i, one in enumerate(launches)]


def _add_times(launches, calls, device, repeats):
    """Give each launch its ``seconds``, ``low`` and ``high``; the seconds of a call's other work on the GPU."""
    for call in calls:  # compiles
        call()
    wait(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for i in range(repeats):
            calls[i % len(calls)]()
        wait(device)
    events = sorted((event.time_range.start, event.name, 1e-6 * event.time_range.elapsed_us())
                    for event in profiler.events() if event.device_type == DeviceType.CUDA)
    symbols = [one.pop("symbol") for one in launches]
    own = [(name, seconds) for _, name, seconds in events if name in symbols]
    times = split_calls([name for name, _ in own], [seconds for _, seconds in own], symbols)
    for one, (low, median, high) in zip(launches, np.quantile(times, (0.25, 0.5, 0.75), axis=0).T):
        one |= {"seconds": float(median), "low": float(low), "high": float(high)}
    return sum(seconds for _, name, seconds in events if name not in symbols) / repeats


def split_calls(names: Sequence[str], seconds: Sequence[float], call: Sequence[str]) -> np.ndarray:
    """The times of kernels that ran one after another as (calls, kernels of a call), from the last call back.

    A first call that was not seen whole is left out. Raises RuntimeError if `names` is not `call` over and over.
    """
    count = len(names) // len(call)
    size = count * len(call)
    if not count or list(names[len(names) - size:]) != list(call) * count:
        raise RuntimeError(f"the profiler saw {len(names)} launches of the kernels, which are not calls of {len(call)}")
    return np.reshape(seconds[len(seconds) - size:], (count, len(call)))


@contextmanager
def watch_launches(operator: str) -> Iterator[list[dict]]:
    """Within the block, a list that gets a dict for each launch of an operator's kernels.

    ``name`` ("delta_rule.scan"); ``symbol``, its function on the GPU; ``programs``, and ``warps`` of each;
    ``registers`` a thread, ``spills`` (numbers of 4 bytes that a thread keeps in memory instead) and bytes of
    ``shared`` memory (all three None in Triton's interpreter); ``flops`` (`product_flops`); and ``bytes``, the least
    that the kernel can move: every tensor once, twice if it is read and then replaced.
    """
    launches, before = [], launch.watch

    def watch(kernel, use, grid, arguments, compiled):
        named = dict(zip(inspect.signature(kernel.fn).parameters, arguments))
        name = f"{operator.removeprefix('gated_')}.{kernel.fn.__name__.removeprefix('_')}"
        tensors = {key: x for key, x in named.items() if isinstance(x, torch.Tensor)}
        launches.append({"name": name, "symbol": getattr(compiled, "name", kernel.fn.__name__),
                         "programs": grid[0] * grid[1] * grid[2], "warps": use.warps,
                         "registers": getattr(compiled, "n_regs", None), "spills": getattr(compiled, "n_spills", None),
                         "shared": compiled and compiled.metadata.shared, "flops": product_flops(name, named),
                         "bytes": sum(_moved_bytes(name, key, x, named) for key, x in tensors.items())})

    launch.watch = watch
    try:
        yield launches
    finally:
        launch.watch = before


def _moved_bytes(name, key, x, arguments):
    """Bytes of an argument that a kernel moves at least."""
    if key in ("inverse", "rest") and (arguments.get("LOWER") or arguments.get("ZEROS") is False):
        return x.nbytes * 10 // 16  # not the blocks above the diagonal
    return x.nbytes * (2 if (name, key) in _IN_PLACE else 1)


def product_flops(name: str, arguments: Mapping) -> int | None:
    """FLOPs of the matrix products of one launch, 2 for each multiply-add; None for packed sequences.

    Products with matrices of zeros and ones, which sum, count as well, for they run on the same units. With chunks of
    C tokens, keys of K and values of V dims, V / W programs for the columns of a state, and f products for one with the
    inverse (3 where what rounding cut off is multiplied as well, else 1), the multiply-adds a chunk and head are

    - delta rule: invert 10 16^2 K + 40 16^3, scans (either way) 3 C K V + (f + 1) C^2 V + C^2 K V / W, without outputs
      2 C K V + C^2 V, outputs C K V + C^2 V + C^2 K, gradients 3 C K V + 2 C^2 V + 6 C^2 K, maps
      (K + V) (2 C K + f C^2);
    - linear attention: scans (either way) C K V + 2 C^2 K V / W, outputs and gradients of the values alone C K V +
      C^2 V + 3 C^2 K, gradients 3 C K V + 2 C^2 V + (5 + s) C^2 K, with s = 4, or 2 in float32, and without those of
      the values, by p programs, 2 C K V + p C^2 V + (4 + s) C^2 K; all in chunks that need no levels.

    A join has K^2 V for each segment of the delta rule, and none of linear attention.
    """
    if arguments.get("cu_seqlens") is not None:
        return None
    c, k = launch.SIZE, arguments["KEY_DIM"]
    v = arguments.get("VALUE_DIM", k)
    if name.endswith(".join"):
        return 0 if arguments["DIAGONAL"] else 2 * len(arguments["maps"]) * k * k * v
    fine, tiles = 1 if arguments.get("rest") is None else 3, v // arguments.get("WIDTH", v)
    summed = 2 if arguments["PRECISION"] == "tf32x3" else 4
    adds = {
        "delta_rule.invert": 10 * 16**2 * k + 40 * 16**3,
        "delta_rule.scan": 3 * c * k * v + (fine + 1) * c * c * v + c * c * k * tiles,
        "delta_rule.scan_back": 3 * c * k * v + (fine + 1) * c * c * v + c * c * k * tiles,
        "delta_rule.outputs": c * k * v + c * c * v + c * c * k,
        "delta_rule.gradients": 3 * c * k * v + 2 * c * c * v + 6 * c * c * k,
        "delta_rule.maps": (k + v) * (2 * c * k + fine * c * c),
        "linear_attention.scan": c * k * v + 2 * c * c * k * tiles,
        "linear_attention.outputs": c * k * v + c * c * v + 3 * c * c * k,
        "linear_attention.gradients": 3 * c * k * v + 2 * c * c * v + (5 + summed) * c * c * k,
        "linear_attention.value_gradients": c * k * v + c * c * v + 3 * c * c * k,
    }[name]
    if name == "delta_rule.scan" and arguments.get("o") is None:
        adds = 2 * c * k * v + c * c * v
    if name == "linear_attention.gradients" and arguments.get("dv") is None:
        adds = 2 * c * k * v + k // arguments["ROWS"] * c * c * v + (4 + summed) * c * c * k
    return 2 * adds * arguments["sequences"] * -(-arguments["time"] // c) * arguments["heads"]
