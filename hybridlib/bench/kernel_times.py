"""What the fused operators spend, kernel by kernel, and what bounds each kernel.

Three measurements, each a record by the rules of `timing.measured`, all of the backend ``"fused"`` on a GPU:

==================  ================================================================================================
function            what it finds
==================  ================================================================================================
`time_kernels`      of each launch of one call its time, its memory floor and FLOPs, and how much of the GPU it can fill
`scale_programs`    the kernels' times while sequences grow in number: what takes as long with a program on every
                    multiprocessor as with a few is bound by the latency of a program's own chain, not by throughput
`count_kernels`     the GPU's own counters, where ``ncu`` is installed and may read them: see `counters`
==================  ================================================================================================

A kernel's name is that of its launch ("delta_rule.scan"). Each is measured by itself, though in a call some start while
the one before them runs (`kernels.fused.follow`): their times add up to more than the call's. Times are in seconds,
memory in bytes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hybridlib import kernels
from hybridlib.bench.counters import read_counters, why_no_counters
from hybridlib.bench.launches import limits_of, resident_programs, watch_launches
from hybridlib.bench.mixer import time_mixer
from hybridlib.bench.operators import DIRECTIONS, OPERATORS, check_shape, dtype_name, memory_floor, operator_inputs
from hybridlib.bench.timing import measured, sentence, time_copy, time_graph, wait
from hybridlib.checks import check_choice, check_device, check_int
from hybridlib.kernels.fused import launch
from hybridlib.models.mixers import MIXERS
from hybridlib.records.ledger import Ledger

__all__ = ["PROGRAMS", "count_kernels", "measure_kernels", "scale_programs", "split_calls", "time_kernels"]

PROGRAMS = (9, 18, 33, 66, 132, 144, 198, 264, 288, 528)  # of a scan
_MIXER_OF = {mixer.operator: name for name, mixer in MIXERS.items()}
_SQUARE = 8192  # sides of the matrices whose product says how fast products are
_PROGRAM = ("import json, sys; from hybridlib.bench.kernel_times import _counted; "
            "_counted(*json.loads(sys.argv[1]))")


def time_kernels(ledger: Ledger, operator: str, shape: Iterable[int], *, dtype: str = "auto", device="auto",
                 repeats: int = 20, recompute: bool = False) -> dict:
    """Time every launch of a call with the gradients of all inputs. Record kind ``"kernel_speed"``.

    Parameters
    ----------
    operator : ``"gated_delta_rule"`` or ``"gated_linear_attention"``.
    shape, dtype, device : as in `benchmarks.time_operator`; inputs are as there, several sets in turn.
    repeats : calls that torch's profiler looks at.

    Metrics: ``kernels``, a dict a launch in order of launch: ``name``, ``pass`` ("forward" or "backward"), ``seconds``
    with quartiles ``low`` and ``high``; ``programs``, ``warps`` of each, ``registers`` a thread, ``spills`` (numbers
    of 4 bytes that a thread keeps in memory instead), ``shared`` memory of a program; ``resident``, programs that fit
    on a multiprocessor at once (`resident_programs`), and ``waves``, how often the GPU is filled; ``bytes`` that the
    kernel reads and writes at least and ``floor_seconds``, these over the speed of `time_copy`; ``flops`` of its matrix
    products (`product_flops`). Beside it ``kernel_seconds``, the sum of their medians; ``other_seconds`` a call of what
    else ran on the GPU; ``gpu_seconds`` of the whole call in a CUDA graph; ``multiprocessors``; and
    ``product_flops_per_second`` of one large product of this dtype (None for float32, multiplied in three parts).

    Raises ValueError for a bad argument.
    """
    parameters, device = _question(operator, dtype, device)
    batch, length, heads, dim = shape = check_shape(shape)
    check_int("repeats", repeats, 1)
    parameters |= {"batch": batch, "time": length, "heads": heads, "dim": dim, "repeats": repeats}

    def compute():
        reason = _why_not(device)
        if reason is not None:
            return {"reason": reason}
        copied = time_copy(ledger, device=device)["bytes_per_second"]
        calls = _calls(operator, shape, parameters["dtype"], device, True)
        found, others = _profiled(operator, calls, device, repeats)
        for kernel in found:
            kernel["floor_seconds"] = kernel["bytes"] / copied
        metrics = {"kernels": found, "kernel_seconds": sum(kernel["seconds"] for kernel in found),
                   "other_seconds": others, "multiprocessors": limits_of(device).multiprocessors,
                   "product_flops_per_second": _product_speed(parameters["dtype"], device), "gpu_seconds": None}
        try:
            metrics["gpu_seconds"] = time_graph(calls, repeats=repeats)["seconds"]
        except RuntimeError as error:
            metrics["graph_reason"] = sentence(error)
        return metrics

    return measured(ledger, "kernel_speed", parameters, device, compute, recompute)


def scale_programs(ledger: Ledger, operator: str, programs: Sequence[int] = PROGRAMS, *, time: int = 1024,
                   dim: int = 64, dtype: str = "auto", device="auto", repeats: int = 20,
                   recompute: bool = False) -> dict:
    """Time every kernel for growing numbers of sequences of one head. Record kind ``"kernel_scaling"``.

    Parameters
    ----------
    operator, dtype, device, repeats : as in `time_kernels`.
    programs : sequences in a call; at up to 64 dims in half precision a scan has one program for each. Scans are never
        cut along time here.
    time, dim : tokens of each sequence, and dims of its keys and values.

    Metrics: ``kernels``, dicts as in `time_kernels` with ``call`` (``"forward"``, without gradients, or
    ``"forward+backward"``) and ``batch``, the sequences; ``multiprocessors``.

    Raises ValueError for a bad argument.
    """
    parameters, device = _question(operator, dtype, device)
    if not isinstance(programs, (list, tuple)) or not programs:
        raise ValueError(f"programs={programs!r} is not a list of whole numbers of at least 1")
    for name, value in (*(("programs", number) for number in programs), ("time", time), ("dim", dim),
                        ("repeats", repeats)):
        check_int(name, value, 1)
    parameters |= {"programs": list(programs), "time": time, "dim": dim, "repeats": repeats}

    def compute():
        reason = _why_not(device)
        if reason is not None:
            return {"reason": reason}
        rows, before = [], launch.override_segments
        try:
            launch.override_segments = 1
            for batch in programs:
                for call in DIRECTIONS:
                    calls = _calls(operator, (batch, time, 1, dim), parameters["dtype"], device, call == DIRECTIONS[1])
                    rows += [{"call": call, "batch": batch} | kernel
                             for kernel in _profiled(operator, calls, device, repeats)[0]]
        finally:
            launch.override_segments = before
        return {"kernels": rows, "multiprocessors": limits_of(device).multiprocessors}

    return measured(ledger, "kernel_scaling", parameters, device, compute, recompute)


def count_kernels(ledger: Ledger, operator: str, shape: Iterable[int], *, dtype: str = "auto", device="auto",
                  recompute: bool = False) -> dict:
    """Read the GPU's counters for every launch of a call with gradients. Record kind ``"kernel_counters"``.

    Parameters as in `time_kernels`. The call runs in a process of its own, after another one to compile.

    Metrics: ``kernels``, a dict a launch in order of launch: ``name``, ``pass``, and what `counters.parse_counters`
    found. ``reason`` where ``ncu`` is not there, is refused the counters, or fails.

    Raises ValueError for a bad argument.
    """
    parameters, device = _question(operator, dtype, device)
    batch, length, heads, dim = shape = check_shape(shape)
    parameters |= {"batch": batch, "time": length, "heads": heads, "dim": dim}

    def compute():
        reason = _why_not(device) or why_no_counters()
        if reason is not None:
            return {"reason": reason}
        with _one_by_one():
            launches = _watched(operator, _calls(operator, shape, parameters["dtype"], device, True)[0])
        symbols = [one["symbol"] for one in launches]
        torch.cuda.empty_cache()
        rows = read_counters(_PROGRAM, json.dumps([operator, shape, parameters["dtype"], str(device)]), symbols)
        if [row["kernel"] for row in rows] != symbols:
            raise RuntimeError(f"ncu counted {', '.join(row['kernel'] for row in rows)}, where a call launches "
                               f"{', '.join(symbols)}")
        return {"kernels": [{"name": one["name"], "pass": one["pass"]} | row for one, row in zip(launches, rows)]}

    return measured(ledger, "kernel_counters", parameters, device, compute, recompute)


def measure_kernels(ledger: Ledger, operators: Iterable[str], shapes: Iterable[Iterable[int]], *, dtype: str = "auto",
                    device="auto", repeats: int = 20, recompute: bool = False) -> dict[str, pd.DataFrame]:
    """All three measurements of these operators, by shape or, with more and more programs, by the shapes' dims.

    And the parts of their mixers, by `time_mixer`. Tables of one row a record: ``"kernels"``, ``"scaling"``,
    ``"counters"``, ``"mixers"``.
    """
    shapes = [check_shape(shape) for shape in shapes]
    rows = {"mixers": [], "kernels": [], "scaling": [], "counters": []}
    how = {"dtype": dtype, "device": device, "recompute": recompute}
    for operator in operators if shapes else ():
        rows["mixers"] += [time_mixer(ledger, _MIXER_OF[operator], shape, direction=direction, repeats=repeats, **how)
                           for shape in shapes for direction in DIRECTIONS]
        rows["kernels"] += [time_kernels(ledger, operator, shape, repeats=repeats, **how) for shape in shapes]
        rows["scaling"] += [scale_programs(ledger, operator, dim=dim, repeats=repeats, **how)
                            for dim in dict.fromkeys(shape[3] for shape in shapes)]
        rows["counters"] += [count_kernels(ledger, operator, shape, **how) for shape in shapes]
    return {name: pd.DataFrame(found) for name, found in rows.items()}


def split_calls(names: Sequence[str], seconds: Sequence[float], call: Sequence[str]) -> np.ndarray:
    """The times of kernels that ran one after another as (calls, kernels of a call), from the last call back.

    A call at the beginning that was not seen whole is left out. Raises RuntimeError if `names` is not `call` over and
    over.
    """
    count = len(names) // len(call)
    kept = count * len(call)
    if not count or list(names[len(names) - kept:]) != list(call) * count:
        raise RuntimeError(f"the profiler saw {len(names)} launches of the kernels, which are not calls of {len(call)}")
    return np.reshape(seconds[len(seconds) - kept:], (count, len(call)))


def _watched(operator, call):
    """The launches of one call, as `watch_launches` finds them, with ``pass``."""
    with watch_launches(operator) as seen:
        forward = []
        call(lambda: forward.extend(seen))
    return [one | {"pass": "forward" if i < len(forward) else "backward"} for i, one in enumerate(seen)]


def _question(operator, dtype, device):
    check_choice("operator", operator, OPERATORS[:2])
    device = check_device(device)
    return {"operator": operator, "backend": "fused", "dtype": dtype_name(dtype, device)}, device


def _why_not(device):
    return kernels.fused.why_not() or (None if device.type == "cuda" else
                                       f"kernels are timed on a CUDA GPU, and this is on {device.type}")


def _calls(operator, shape, dtype, device, backward):
    """Functions that run the operator, each on inputs of its own, and call what they are given after the forward."""
    floor = memory_floor(operator_inputs(operator, shape, dtype, "meta"), DIRECTIONS[backward])
    return [_call(operator, operator_inputs(operator, shape, dtype, device, seed), backward)
            for seed in range(max(2, min(8, -(-2**28 // floor))))]  # together larger than any cache


def _call(operator, tensors, backward):
    inputs, d_o = [x.requires_grad_(backward) for x in tensors.values()], torch.randn_like(tensors["v"])

    def call(after_forward=lambda: None):
        with torch.set_grad_enabled(backward):
            o = getattr(kernels, operator)(*inputs, backend="fused")[0]
        after_forward()
        if backward:
            torch.autograd.grad(o, inputs, d_o)

    return call


@contextlib.contextmanager
def _one_by_one():
    """Within it no kernel starts before the one before it has ended, so that each has the GPU to itself."""
    before, launch.override_follows = launch.override_follows, False
    try:
        yield
    finally:
        launch.override_follows = before


def _profiled(operator, calls, device, repeats):
    """The launches of a call with their times, and the seconds of what else a call has on the GPU."""
    with _one_by_one():
        for call in calls:  # compiles
            call()
        launches, limits = _watched(operator, calls[0]), limits_of(device)
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
        fit = resident_programs(limits, one["warps"], one["registers"], one["shared"])
        one |= {"seconds": float(median), "low": float(low), "high": float(high), "resident": fit,
                "waves": one["programs"] / (fit * limits.multiprocessors)}
    return launches, sum(seconds for _, name, seconds in events if name not in symbols) / repeats


def _product_speed(dtype, device):
    """FLOPs a second of a large matrix product; None in float32."""
    if dtype == "float32":
        return None
    a, b, c = (torch.randn(_SQUARE, _SQUARE, device=device).to(getattr(torch, dtype)) for _ in range(3))
    return 2 * _SQUARE**3 / time_graph([lambda: torch.mm(a, b, out=c)], repeats=10)["seconds"]


def _counted(operator, shape, dtype, device):
    """What a process does under ``ncu``: a call to compile, and one that is counted."""
    call = _call(operator, operator_inputs(operator, shape, dtype, device), True)
    with _one_by_one():
        for start, stop in ((lambda: None,) * 2, (torch.cuda.profiler.start, torch.cuda.profiler.stop)):
            start()
            call()
            wait(device)
            stop()
