"""A GPU's own counters of the kernels of a program, by NVIDIA's Nsight Compute (``ncu``), where it is installed.

``ncu`` runs the program, repeats each kernel until all counters are read, from empty caches, and prints a table as CSV:
lines of its own, a header, the units, then a line a kernel. Durations it reads are therefore longer than in use.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["parse_counters", "read_counters", "why_no_counters"]

_SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "Occupancy", "LaunchStats")
_METRICS = ("gpu__time_duration.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed",
            "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active")  # which sections may leave out
_ASKED = ([x for name in _SECTIONS for x in ("--section", name)], ["--metrics", ",".join(_METRICS)])
_SHARES = {  # of a peak, in percent; the first that is there
    "multiprocessor": ("sm__throughput.avg.pct_of_peak_sustained_elapsed",),
    "dram": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
             "dram__throughput.avg.pct_of_peak_sustained_elapsed"),
    "l1": ("l1tex__throughput.avg.pct_of_peak_sustained_active", "l1tex__throughput.avg.pct_of_peak_sustained_elapsed"),
    "issue": ("smsp__issue_active.avg.pct_of_peak_sustained_active",
              "sm__inst_issued.avg.pct_of_peak_sustained_active"),
    "occupancy": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
}
_COUNTS = {"active": "smsp__warps_active.avg.per_cycle_active", "eligible": "smsp__warps_eligible.avg.per_cycle_active",
           "registers": "launch__registers_per_thread"}
_TENSOR = re.compile(r"sm__(inst_executed_)?pipe_tensor\w*\.avg\.pct_of_peak_sustained_(active|elapsed)")
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)(?<!_not_issued)_per_issue_active\.ratio")
_UNITS = {"s": 1, "second": 1, "ms": 1e-3, "msecond": 1e-3, "us": 1e-6, "usecond": 1e-6, "ns": 1e-9, "nsecond": 1e-9}


def why_no_counters() -> str | None:
    """Why counters cannot be read on this machine, in one sentence; None if ``ncu`` is there to try."""
    return None if _ncu() else "ncu (NVIDIA Nsight Compute), which reads a GPU's counters, is not installed"


def read_counters(program: str, argument: str, kernels: Iterable[str], *, max_seconds: float = 300) -> list[dict]:
    """The counters, as `parse_counters` returns them, of every launch of some kernels in a Python program.

    Parameters
    ----------
    program : Python, run as ``python -c`` with this package on its path and `argument` in ``sys.argv[1]``; counted is
        what it does between ``torch.cuda.profiler.start()`` and ``stop()``.
    kernels : names of the functions on the GPU; all others are passed over.
    max_seconds : until it is given up.

    A table with more counters is asked for first; what this ``ncu`` does not know makes it fail, and fewer are asked
    for. Raises RuntimeError, in one sentence, where that fails too.
    """
    said = ""
    for asked in ((*_ASKED[0], *_ASKED[1]), *_ASKED):
        command = [_ncu(), "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
                   "--profile-from-start", "off", "--target-processes", "all",
                   "--kernel-name", f"regex:^({'|'.join(sorted(set(kernels)))})$", *asked,
                   sys.executable, "-c", program, argument]
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max_seconds,
                                  env=os.environ | {"PYTHONPATH": path, "LC_ALL": "C"})
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"ncu had not ended after {max_seconds:g} seconds") from None
        rows = parse_counters(done.stdout)
        if rows:
            return rows
        said = done.stdout + "\n" + done.stderr
        if "ERR_NVGPUCTRPERM" in said:
            raise RuntimeError("this user may not read the GPU's counters (ERR_NVGPUCTRPERM)")
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("==ERROR==")] or lines[-1:] or ["it gave no message"]
    raise RuntimeError(f"ncu counted no kernel: {errors[0]}")


def parse_counters(text: str) -> list[dict]:
    """What ``ncu --csv --page raw`` printed, a dict a kernel in order of launch; empty if there is no table.

    ``kernel`` is the function's name. Shares of a peak, from 0 to 1: ``multiprocessor`` (its busiest part), ``tensor``
    (the tensor cores), ``issue`` (cycles in which a scheduler issued), ``dram``, ``l1`` (with shared memory),
    ``occupancy`` (warps there, of those that there is room for). Of each scheduler, on average: ``active`` and
    ``eligible`` warps, and ``stalls``, the warps that waited for each reason while one instruction was issued
    (``selected`` is the one that did not wait). ``registers`` a thread, ``resident``: programs that fit on a
    multiprocessor at once; ``seconds``. What the table lacks is None.
    """
    lines = [line for line in text.splitlines() if line and not line.startswith("==")]
    start = next((i for i, line in enumerate(lines) if line.replace('"', "").startswith("ID,")), len(lines))
    values, units = {}, {}  # by the launch's ID; by metric
    for row in csv.DictReader(lines[start:]):
        row = {name: value for name, value in row.items() if name and value is not None}
        if not row.get("ID"):
            units |= row
        elif "Metric Name" in row:  # a line a metric
            found = values.setdefault(row["ID"], {"Kernel Name": row.get("Kernel Name", "")})
            found[row["Metric Name"]] = row.get("Metric Value", "")
            units[row["Metric Name"]] = row.get("Metric Unit", "")
        else:
            values[row["ID"]] = row
    return [_chosen(row, units) for row in values.values()]


def _chosen(row, units):
    numbers = {name: number for name, value in row.items() if (number := _number(value)) is not None}
    chosen = {"kernel": row.get("Kernel Name", "").split("(")[0].strip(), "seconds": None}
    for name in ("gpu__time_duration.sum", "gpu__time_duration.avg"):
        if name in numbers and units.get(name) in _UNITS:
            chosen["seconds"] = numbers[name] * _UNITS[units[name]]
            break
    for key, names in _SHARES.items():
        chosen[key] = next((numbers[name] / 100 for name in names if name in numbers), None)
    if chosen["issue"] is None:
        chosen["issue"] = numbers.get("smsp__issue_active.avg.per_cycle_active")
    tensor = {name: value for name, value in numbers.items() if _TENSOR.fullmatch(name)}
    cycles = {name: value for name, value in tensor.items() if "cycles_active." in name} or tensor
    chosen["tensor"] = max(cycles.values()) / 100 if cycles else None
    chosen |= {key: numbers.get(name) for key, name in _COUNTS.items()}
    room = [value for name, value in numbers.items()
            if re.fullmatch("launch__occupancy_limit_(blocks|registers|shared_mem|warps)", name)]
    chosen["resident"] = min(room) if room else None
    chosen["stalls"] = {match[1]: value for name, value in numbers.items() if (match := _STALL.fullmatch(name))}
    return chosen


def _number(text):
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return None
    return number if number == number else None


def _ncu():
    return shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
