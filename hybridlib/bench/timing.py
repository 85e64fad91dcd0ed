"""The one timer: a call as launched from Python and on the GPU alone, its memory, and a copy to compare it with."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from hybridlib.checks import check_device
from hybridlib.records.ledger import Ledger
from hybridlib.records.provenance import describe_device

__all__ = ["Bench", "DTYPES", "error_line", "peak_memory", "time_copy", "time_graph", "wait"]

logger = logging.getLogger(__name__)

DTYPES = ("auto", "bfloat16", "float16", "float32")
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}  # well beyond the caches
_GLIBC_LIMIT = 31 * 2**20  # bytes: glibc keeps freed blocks up to 32 MiB, once one of that size has been freed


@dataclass(frozen=True)
class Bench:
    """Where speeds are measured, how often, and the ledger of their records.

    Parameters
    ----------
    device : ``"auto"``, ``"cpu"`` or ``"cuda"``; a `torch.device` afterwards.
    dtype : of inputs, one of `DTYPES`; ``"auto"`` becomes bfloat16 on a GPU and float32 on a CPU.
    repeats : samples of a timing; after `max_seconds` it takes no further one, but at least three.
    recompute : measure again, replacing records.
    """

    ledger: Ledger
    device: str | torch.device = "auto"
    dtype: str = "auto"
    repeats: int = 20
    max_seconds: float = 1.0
    recompute: bool = False

    def __post_init__(self):
        device = check_device(self.device)
        object.__setattr__(self, "device", device)
        if self.dtype == "auto":
            object.__setattr__(self, "dtype", "bfloat16" if device.type == "cuda" else "float32")

    def time(self, calls: Sequence[Callable], together: int = 10) -> dict:
        """Time one of `calls` by two clocks: as launched from Python, and on the GPU alone.

        Calls have inputs of their own and take turns, so that no input is still in a cache; a sample on a GPU has at
        least `together` of them. Returns the seconds of one call, median and quartiles, as launched (``seconds``,
        ``low``, ``high``, ``samples``) and those of `time_graph`.
        """
        launched = _quartiles(_launched_sampler(calls, self.device, together), self.repeats, self.max_seconds)
        return launched | time_graph(calls, self.device, self.repeats, self.max_seconds, together)

    def record(self, kind: str, parameters: dict, compute: Callable[[], dict]) -> dict:
        """Return the record of `kind` with these parameters and the device's name, computed if there is none. If
        `compute` raises, the record has ``reason`` in place of numbers, and the next call computes it again."""
        parameters = parameters | {"device": describe_device(str(self.device))}
        exists = self.ledger.path(kind, parameters).exists() and not self.recompute

        def attempt():
            try:
                return {"reason": None} | compute()
            except Exception as error:  # backends are other people's code
                logger.warning("%s of %s failed", kind, parameters, exc_info=True)
                return {"reason": error_line(error)}
            finally:
                if self.device.type == "cuda":  # a failure must not leave the next one short of memory
                    gc.collect()
                    torch.cuda.empty_cache()

        record = self.ledger.run(kind, parameters, attempt, recompute=self.recompute)
        if exists and record.metrics["reason"] is not None:
            record = self.ledger.run(kind, parameters, attempt, recompute=True)
        return record.parameters | record.metrics


def time_graph(calls: Sequence[Callable], device: torch.device, repeats: int = 20, max_seconds: float = 1.0,
               together: int = 10) -> dict:
    """Time one call in a CUDA graph of all `calls`, whose replay needs nothing from Python; parameters of `Bench`.

    Seconds are ``gpu_seconds`` with quartiles ``gpu_low`` and ``gpu_high``. ``gpu_seconds`` is None on a CPU and where
    no graph can be captured; ``graph_reason`` then says why.
    """
    if device.type != "cuda":
        return {"gpu_seconds": None}
    try:
        graph = _quartiles(_graph_sampler(calls, device, together), repeats, max_seconds)
    except Exception as error:  # calls may be other people's code
        return {"gpu_seconds": None, "graph_reason": error_line(error)}
    return {f"gpu_{name}": graph[name] for name in ("seconds", "low", "high")}


def _quartiles(sampler, repeats, max_seconds):
    samples, begun = [], time.perf_counter()
    while len(samples) < repeats and (len(samples) < 3 or time.perf_counter() - begun < max_seconds):
        samples.append(sampler())
    low, median, high = (float(x) for x in np.quantile(samples, (0.25, 0.5, 0.75)))
    return {"seconds": median, "low": low, "high": high, "samples": len(samples)}


def _launched_sampler(calls, device, together):
    if device.type == "cuda":
        batches = [list(calls) * -(-together // len(calls))]
    else:  # the first calls of a process wait for pages of memory, which training does not
        torch.empty(_GLIBC_LIMIT, dtype=torch.uint8)
        batches = [[call] for call in calls]
    for call in batches[0]:  # compiles, tunes, and fills the allocator's pool
        call()
    wait(device)
    turns = itertools.cycle(batches)

    def sample():
        batch, start = next(turns), time.perf_counter()
        for call in batch:
            call()
        wait(device)
        return (time.perf_counter() - start) / len(batch)

    return sample


def _graph_sampler(calls, device, together):
    """Return a function that replays a CUDA graph of all calls and returns the seconds of one. Raises RuntimeError for
    calls that wait for the device or copy from it. Where torch sees a call wait, no capture is begun: one that fails
    midway would spoil later ones."""
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
    replays = max(1, together // len(calls))

    def sample():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # the clock starts when this one ends: the next ones are queued by then
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        wait(device)
        return start.elapsed_time(end) / 1000 / (replays * len(calls))

    return sample


@contextlib.contextmanager
def _no_waiting():
    """Within the block, raise RuntimeError where torch sees a call wait for the GPU, in any thread."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():  # torch warns that it does not see everything
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def peak_memory(call: Callable, device: torch.device) -> tuple:
    """Return the result of `call`, and the most bytes of GPU memory held beyond those before (None on a CPU)."""
    if device.type != "cuda":
        return call(), None
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    wait(device)
    return result, torch.cuda.max_memory_allocated(device) - before


def time_copy(bench: Bench) -> dict:
    """Time a copy of 1 GiB on a GPU, or 64 MiB on a CPU. Record kind ``"copy_speed"``.

    Metrics: the timing of the faster of ``"copy"`` and ``"negation"``, which ``by`` names, and ``bytes_per_second``,
    read and written, on a GPU by its graph.
    """
    def compute():
        numbers, timings, slow = _COPY_BYTES[bench.device.type] // 4, [], replace(bench, repeats=20, max_seconds=1.0)
        pairs = [tuple(torch.zeros(numbers, device=bench.device) for _ in range(2)) for _ in range(2)]
        for by, move in (("copy", lambda source, target: target.copy_(source)),
                         ("negation", lambda source, target: torch.neg(source, out=target))):
            timing = slow.time([functools.partial(move, *pair) for pair in pairs])
            seconds = timing["gpu_seconds"] or timing["seconds"]
            timings.append(timing | {"bytes_per_second": 8 * numbers / seconds, "by": by})
        return max(timings, key=lambda timing: timing["bytes_per_second"])

    return bench.record("copy_speed", {"num_bytes": None}, compute)


def error_line(error: Exception) -> str:
    """Return the message of `error` in one line of at most 200 characters, after its type unless ValueError."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "it gave no message")
    return (text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")[:200]


def wait(device: str | torch.device) -> None:
    """Return once the device has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
