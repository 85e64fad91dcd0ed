"""Kernels one by one: bytes and FLOPs against what Triton's interpreter does, times from a profiler's events."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import Interval

import hybridlib as hl
from hybridlib import kernels
from hybridlib.bench import kernel_times, operators
from hybridlib.bench.timing import Bench
from hybridlib.kernels.fused import launch

def interpreted_launches():
    """In the interpreter, in a process of its own: each byte that a kernel touches and each product, by launch."""
    from triton.runtime import interpreter

    from tests.kernels.test_fused import interpret_as_gpus_compute

    def sized(addresses, mask, size):
        return {(int(at), size) for at in np.asarray(addresses)[np.asarray(mask)].ravel()}

    class Memory:
        def load(self, addresses, mask, other, dtype):
            read.update(sized(addresses, mask, np.dtype(dtype).itemsize))
            return memory.load(addresses, mask, other, dtype)

        def store(self, addresses, value, mask):
            written.update(sized(addresses, mask, value.dtype.itemsize))
            return memory.store(addresses, value, mask)

        def __getattr__(self, name):
            return getattr(memory, name)

    def count_product(self, a, b, *rest):
        flops.append(2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return multiply(self, a, b, *rest)

    interpret_as_gpus_compute()
    read, written, flops, names = set(), set(), [], []
    memory, interpreter._interpreter = interpreter._interpreter, Memory()
    multiply, interpreter.InterpreterBuilder.create_dot = interpreter.InterpreterBuilder.create_dot, count_product
    for operator, dtype, shape, segments, backward in (
            ("gated_delta_rule", "float32", (1, 128, 2, 32), 2, True),
            ("gated_delta_rule", "bfloat16", (2, 64, 1, 64), 1, True),
            ("gated_delta_rule", "bfloat16", (1, 64, 1, 128), 1, False),
            ("gated_linear_attention", "float32", (1, 64, 1, 64), 1, True),
            ("gated_linear_attention", "bfloat16", (1, 128, 2, 32), 2, True),
            ("gated_linear_attention", "bfloat16", (1, 64, 1, 128), 1, True)):
        launch.override_segments = segments
        tensors = operators.operator_inputs(operator, shape, dtype)
        with kernel_times.watch_launches(operator) as seen:
            watch = launch.watch

            def both(*launched):
                watch(*launched)
                touched = sum(size for _, size in read) + sum(size for _, size in written)
                assert (seen[-1]["bytes"], seen[-1]["flops"]) == (touched, sum(flops)), (seen[-1], touched, sum(flops))
                read.clear(), written.clear(), flops.clear()

            launch.watch = both
            operators._call(operator, "fused", tensors, backward)()
        names += [(one["name"], one["programs"]) for one in seen]
    assert launch.watch is None
    print(json.dumps(names))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_bytes_and_flops_are_those_that_the_interpreter_touches_and_multiplies():
    root = Path(__file__).resolve().parents[2]
    code = ("import torch; torch.set_num_threads(1); from tests.bench import test_kernel_times; "
            "test_kernel_times.interpreted_launches()")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=root, capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
                               "PYTHONPATH": str(root)}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [tuple(one) for one in json.loads(done.stdout)]
    cut = [("delta_rule.invert", 4), ("delta_rule.maps", 8), ("delta_rule.join", 4), ("delta_rule.scan", 4),
           ("delta_rule.outputs", 4), ("delta_rule.scan_back", 4), ("delta_rule.join", 4), ("delta_rule.scan_back", 4),
           ("delta_rule.gradients", 4)]
    assert found[:9] == cut
    assert found[9:14] == [("delta_rule.invert", 2), ("delta_rule.scan", 2), ("delta_rule.outputs", 2),
                           ("delta_rule.scan_back", 2), ("delta_rule.gradients", 2)]
    assert found[14:16] == [("delta_rule.invert", 1), ("delta_rule.scan", 4)]
    assert [name for name, _ in found[16:20]] == [f"linear_attention.{name}"
                                                  for name in ("scan", "outputs", "scan", "gradients")]
    assert len(found) == 33 and {name for name, _ in found} >= {"linear_attention.join"}
    assert found[-2:] == [("linear_attention.gradients", 2), ("linear_attention.value_gradients", 1)]


def test_first_launches_and_later_ones_are_watched():
    def _invert(k, inverse, time, sequences, heads, KEY_DIM, PRECISION):
        pass

    class Compiled:
        name, n_regs, n_spills, metadata = "_invert_on_gpu", 96, 2, SimpleNamespace(shared=512)

        def __getitem__(self, grid):
            return lambda *arguments: ran.append((grid, len(arguments)))

    class Kernel:
        fn = staticmethod(_invert)

        def __getitem__(self, grid):
            return lambda *arguments, num_warps, num_stages: ran.append((num_warps, num_stages)) or Compiled()

    ran, kernel, use = [], Kernel(), launch.Launch(1, 2)
    place, two = SimpleNamespace(key=("a key",)), torch.ones(2, dtype=torch.bfloat16)
    arguments = torch.ones(4), two, 65, 2, 3, 16, "tf32"
    with kernel_times.watch_launches("gated_delta_rule") as seen:
        for _ in range(2):
            launch.Place.launch(place, kernel, use, (3, 4, 1), *arguments)
    launch.Place.launch(place, kernel, use, (3, 4, 1), *arguments)
    assert ran == [(1, 2), ((3, 4, 1), 7), ((3, 4, 1), 7)] and len(seen) == 2 and seen[0] == seen[1]
    flops = 2 * (10 * 16**2 * 16 + 40 * 16**3) * 2 * 2 * 3  # 2 sequences of 2 chunks, 3 heads
    assert seen[0] == {"name": "delta_rule.invert", "symbol": "_invert_on_gpu", "programs": 12, "warps": 1,
                       "registers": 96, "spills": 2, "shared": 512, "flops": flops, "bytes": 20}


def test_calls_are_taken_apart_from_the_last_one_back():
    call, seconds = ["_scan", "_outputs", "_scan"], [9.0, 8.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    split = kernel_times.split_calls(["_outputs", "_scan", *call, *call], seconds, call)
    assert split.tolist() == [[1, 2, 3], [4, 5, 6]]
    for names in (["_scan", "_scan", "_outputs"], ["_scan"], []):
        with pytest.raises(RuntimeError, match=f"^the profiler saw {len(names)} launches .* not calls of 3$"):
            kernel_times.split_calls(names, seconds[:len(names)], call)


class Seen:
    """Stands in for torch's profiler: each call 10 us after the one before, the scan of the last one 8 us late."""

    def __init__(self, activities):
        self.calls = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def events(self):
        for i in reversed(range(4)):  # in no order
            scan = 1 + i if i < 3 else 12
            for name, start, length in (("_outputs", 12, 2), ("Memset (Device)", 1, 0.5), ("_scan", 2, scan)):
                span = Interval(100 * i + start, 100 * i + start + length)
                yield SimpleNamespace(name=name, device_type=DeviceType.CUDA, time_range=span)
        yield SimpleNamespace(name="_scan", device_type=DeviceType.CPU, time_range=Interval(0, 1000))


def test_times_of_a_call_are_medians_beside_what_each_kernel_could_do(bench, monkeypatch):
    one = {"pass": "forward", "programs": 144}
    launches = [one | {"symbol": "_scan", "name": "linear_attention.scan", "bytes": 6000},
                one | {"symbol": "_outputs", "name": "linear_attention.outputs", "bytes": 9}]
    runs, before = [], launch.override_follows
    for name, value in (("_why_not", lambda device: None), ("profile", Seen),
                        ("_launches", lambda *call: [dict(one) for one in launches]),
                        ("calls_in_turn", lambda *call: [lambda i=i: runs.append(i) for i in range(3)]),
                        ("time_calls", lambda calls, device, **how: {"gpu_seconds": 6e-6}),
                        ("time_copy", lambda bench: {"bytes_per_second": 3e9})):
        monkeypatch.setattr(kernel_times, name, value)
    call = dataclasses.replace(bench, repeats=4, recompute=True), "gated_linear_attention", (1, 64, 1, 64)
    row = kernel_times.time_kernels(*call)
    assert runs == [0, 1, 2, 0, 1, 2, 0]  # the first three compile
    scan, outputs = row["kernels"]
    assert [scan[name] for name in ("low", "seconds", "high")] == pytest.approx([1.75e-6, 2.5e-6, 5.25e-6])
    assert scan["floor_seconds"] == pytest.approx(2e-6) and "symbol" not in scan
    assert (row["kernel_seconds"], row["other_seconds"]) == (pytest.approx(4.5e-6), pytest.approx(0.5e-6))
    assert row["gpu_seconds"] == 6e-6 and launch.override_follows is before
    monkeypatch.setattr(kernel_times, "_launches", lambda *call: 1 / launch.override_follows)
    assert kernel_times.time_kernels(*call)["reason"] == "ZeroDivisionError: division by zero"
    assert launch.override_follows is before


def test_without_a_gpu_a_record_has_its_reason(bench, monkeypatch):
    call = bench, "gated_delta_rule", (1, 64, 1, 64)
    monkeypatch.setattr(kernels.fused, "why_not", lambda: "there is none")
    row = kernel_times.time_kernels(*call)
    assert row["reason"] == "there is none" and "kernels" not in row
    monkeypatch.setattr(kernels.fused, "why_not", lambda: None)
    assert kernel_times.time_kernels(*call)["reason"] == "kernels are timed on a CUDA GPU, and this is on cpu"
    assert [r.kind for r in bench.ledger] == ["kernel_speed"]


@pytest.mark.parametrize("operator, shape, sentence", [
    ("softmax_attention", (1, 2, 3, 4), "operator='softmax_attention' is"),
    ("gated_delta_rule", (1, 2, 3), r"shape=\(1, 2, 3\) is not \(batch")])
def test_bad_arguments_are_refused_before_any_compute(bench, operator, shape, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        kernel_times.time_kernels(bench, operator, shape)
    assert not bench.ledger.folder.exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("operator", ["gated_delta_rule", "gated_linear_attention"])
def test_the_kernels_of_a_call_take_as_long_as_the_call(tmp_path, operator):
    row = kernel_times.time_kernels(Bench(hl.Ledger(tmp_path), repeats=10), operator, (4, 512, 40, 64))
    assert row["reason"] is None and 0.5 * row["gpu_seconds"] < row["kernel_seconds"] < 1.3 * row["gpu_seconds"]
    forward = 3 if operator == "gated_delta_rule" else 2
    assert [one["pass"] for one in row["kernels"]] == ["forward"] * forward + ["backward"] * 2
    assert row["other_seconds"] < 0.2 * row["kernel_seconds"]
    for one in row["kernels"]:
        assert one["low"] <= one["seconds"] <= one["high"] and one["registers"] >= 16
        assert 0 < one["floor_seconds"] and one["flops"] > 0
    assert row["kernels"][0]["programs"] == (4 * 8 * 40 if operator == "gated_delta_rule" else 4 * 40)


@pytest.mark.parametrize("key, arguments, share", [
    ("inverse", {"LOWER": True}, 10), ("rest", {"ZEROS": False}, 10), ("inverse", {"ZEROS": True}, 16),
    ("inverse", {"LOWER": False}, 16), ("k", {"LOWER": True}, 16)])
def test_blocks_above_the_diagonal_count_as_moved_only_where_they_are(key, arguments, share):
    x = torch.empty(3, 64, 64, dtype=torch.bfloat16)
    assert kernel_times._moved_bytes("delta_rule.scan", key, x, arguments) == 3 * 16 * 16 * share * 2
