"""How a call is timed: as launched from Python, on the GPU alone, in memory, and against a copy of the same bytes.

Calls come in a list, one for each set of inputs, and are taken in turn, so that no input is still in a cache from the
call before. A timing is a dict of ``seconds`` (the median of its samples), ``low`` and ``high`` (their quartiles) and
``samples``, all of one call.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch

from hybridlib.checks import check_device, check_int, check_number
from hybridlib.records.ledger import Ledger
from hybridlib.records.provenance import describe_device

__all__ = ["copy_speed", "measured", "peak_memory", "sentence", "time_calls", "time_copy", "time_graph", "wait"]

logger = logging.getLogger(__name__)

_TOGETHER = 10
_COPIED = {"cuda": 2**30, "cpu": 2**26}  # bytes, well beyond the caches
_KEPT = 31 * 2**20  # bytes: glibc keeps freed blocks for itself up to 32 MiB, once one of that size has been freed


def time_calls(calls: Sequence[Callable], device: str | torch.device = "cpu", *, repeats: int = 20,
               max_seconds: float = 1.0, together: int = _TOGETHER) -> dict:
    """Time as launched from Python: on a GPU, of calls queued one after the other, whichever of the two is slower.

    Parameters
    ----------
    calls : functions without arguments, at least one.
    repeats : samples to take.
    max_seconds : stop earlier once the samples have taken this long, though not before the third.
    together : calls in one sample on a GPU, at least; launches overlap the work before them, as they do in training.

    Raises ValueError for no calls or a number out of range.
    """
    device = _check(calls, device, repeats, max_seconds, together)
    at_once = list(calls) * -(-together // len(calls)) if device.type == "cuda" else list(calls[:1])
    if device.type == "cpu":  # else the first calls of a process wait for pages of memory, which training does not
        torch.empty(_KEPT, dtype=torch.uint8)
    for call in at_once:  # compiles, tunes, and fills the allocator's pool
        call()
    wait(device)
    samples, begun = [], time.perf_counter()
    while len(samples) < repeats and (len(samples) < 3 or time.perf_counter() - begun < max_seconds):
        chosen = at_once if device.type == "cuda" else [calls[len(samples) % len(calls)]]
        start = time.perf_counter()
        for call in chosen:
            call()
        wait(device)
        samples.append((time.perf_counter() - start) / len(chosen))
    return _summary(samples)


def time_graph(calls: Sequence[Callable], *, repeats: int = 20, max_seconds: float = 1.0,
               together: int = _TOGETHER) -> dict:
    """Time on the GPU alone: all calls are captured into one CUDA graph, whose replays need nothing from Python.

    Parameters as for `time_calls`. Raises ValueError where there is no GPU, RuntimeError for calls that cannot be
    captured (they wait for the device, or copy from it). Where torch sees a call wait, no capture is begun: one that
    fails midway would spoil later ones.
    """
    device = _check(calls, "cuda", repeats, max_seconds, together)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls:
            call()
        with _no_waiting():
            for call in calls:
                call()
    torch.cuda.current_stream(device).wait_stream(side)
    wait(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    wait(device)
    in_a_row, samples, begun = max(1, together // len(calls)), [], time.perf_counter()
    while len(samples) < repeats and (len(samples) < 3 or time.perf_counter() - begun < max_seconds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # the clock starts when this one ends: the next ones are queued by then
        start.record()
        for _ in range(in_a_row):
            graph.replay()
        end.record()
        wait(device)
        samples.append(start.elapsed_time(end) / 1000 / (in_a_row * len(calls)))
    return _summary(samples)


@contextlib.contextmanager
def _no_waiting():
    """Within it, what waits for the GPU raises RuntimeError, in any thread, as far as torch sees it."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():  # torch warns that it does not see everything
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def copy_speed(device: str | torch.device = "auto", num_bytes: int | None = None, *, repeats: int = 20) -> dict:
    """How fast the device moves memory: `num_bytes` (1 GiB on a GPU, 64 MiB on a CPU) are read, and as many written.

    By `Tensor.copy_` and by an elementwise operation on float32, which a GPU moves otherwise: the faster one counts,
    and ``by`` names it. A timing, with ``bytes_per_second``: twice `num_bytes` over the median. Raises ValueError for
    a bad argument.
    """
    device = check_device(device)
    num_bytes = _COPIED[device.type] if num_bytes is None else num_bytes
    check_int("num_bytes", num_bytes, 4)
    pairs = [tuple(torch.zeros(num_bytes // 4, device=device) for _ in range(2)) for _ in range(2)]
    ways = {"copy": lambda source, target: target.copy_(source),
            "negation": lambda source, target: torch.neg(source, out=target)}
    found = []
    for by, move in ways.items():
        calls = [lambda source=source, target=target, move=move: move(source, target) for source, target in pairs]
        timing = time_graph(calls, repeats=repeats) if device.type == "cuda" else time_calls(calls, repeats=repeats)
        found.append(timing | {"bytes_per_second": 8 * (num_bytes // 4) / timing["seconds"], "by": by})
    return max(found, key=lambda timing: timing["bytes_per_second"])


def peak_memory(call: Callable, device: str | torch.device) -> tuple:
    """(result of `call`, most bytes of GPU memory held beyond what was held before it; None on a CPU)."""
    device = check_device(device)
    if device.type != "cuda":
        return call(), None
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    wait(device)
    return result, torch.cuda.max_memory_allocated(device) - before


def time_copy(ledger: Ledger, *, device="auto", num_bytes: int | None = None, recompute: bool = False) -> dict:
    """The bandwidth of `copy_speed`: ``bytes_per_second``, and the timing. Record kind ``"copy_speed"``."""
    device = check_device(device)
    if num_bytes is not None:
        check_int("num_bytes", num_bytes, 4)
    return measured(ledger, "copy_speed", {"num_bytes": num_bytes}, device, lambda: copy_speed(device, num_bytes),
                    recompute)


def measured(ledger: Ledger, kind: str, parameters: dict, device: str | torch.device, compute: Callable[[], dict],
             recompute: bool = False) -> dict:
    """The record of (`kind`, `parameters` and the device's name) as one dict: parameters, then metrics.

    A speed is a fact of one device, so its name is a parameter: in the same folder another device is measured anew. If
    `compute` raises, whatever it is (backends are other people's code), the record has ``reason``, one sentence, in
    place of numbers, and is computed again the next time it is asked for.
    """
    parameters = parameters | {"device": describe_device(str(device))}
    known = ledger.path(kind, parameters).exists() and not recompute

    def attempt():
        try:
            return {"reason": None} | compute()
        except Exception as error:
            logger.warning("%s of %s failed", kind, parameters, exc_info=True)
            return {"reason": sentence(error)}
        finally:
            if torch.device(device).type == "cuda":  # what failed must not leave the next one short of memory
                gc.collect()
                torch.cuda.empty_cache()

    record = ledger.run(kind, parameters, attempt, recompute=recompute)
    if known and record.metrics["reason"] is not None:
        record = ledger.run(kind, parameters, attempt, recompute=True)
    return record.parameters | record.metrics


def sentence(error: Exception) -> str:
    """What `error` says, in one line of at most 200 characters; its type goes before, unless it is a ValueError."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "it gave no message")
    return (text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")[:200]


def wait(device: str | torch.device) -> None:
    """Return once the device has done all that it was asked to."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _check(calls, device, repeats, max_seconds, together):
    if not calls:
        raise ValueError(f"calls={calls!r} holds nothing to time; give at least one function without arguments")
    check_int("repeats", repeats, 1)
    check_int("together", together, 1)
    check_number("max_seconds", max_seconds, 0, open_low=True)
    return check_device(device)


def _summary(samples):
    low, median, high = (float(x) for x in np.quantile(samples, (0.25, 0.5, 0.75)))
    return {"seconds": median, "low": low, "high": high, "samples": len(samples)}
