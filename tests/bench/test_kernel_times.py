"""Kernels one by one: bytes and FLOPs against what Triton's interpreter does, room by hand, the counters' table."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import Interval

import hybridlib as hl
from hybridlib import kernels
from hybridlib.bench import counters, kernel_times as kernel_speed, launches, speed
from hybridlib.kernels.fused import launch
from hybridlib.report import kernel_tables as kernel_report, speed as speed_report, speed_plots

H100 = launches.Limits(132, 65536, 233472, 64, 32)


@pytest.fixture
def ledger(tmp_path):
    return hl.Ledger(tmp_path / "records", device="cpu")


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
        tensors = kernel_speed.operator_inputs(operator, shape, dtype)
        with launches.watch_launches(operator) as seen:
            watch = launch.watch

            def both(*launched):
                watch(*launched)
                touched = sum(size for _, size in read) + sum(size for _, size in written)
                assert (seen[-1]["bytes"], seen[-1]["flops"]) == (touched, sum(flops)), (seen[-1], touched, sum(flops))
                read.clear(), written.clear(), flops.clear()

            launch.watch = both
            kernel_speed._call(operator, tensors, backward)()
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
    with launches.watch_launches("gated_delta_rule") as seen:
        for _ in range(2):
            launch.Place.launch(place, kernel, use, (3, 4, 1), *arguments)
    launch.Place.launch(place, kernel, use, (3, 4, 1), *arguments)
    assert ran == [(1, 2), ((3, 4, 1), 7), ((3, 4, 1), 7)] and len(seen) == 2 and seen[0] == seen[1]
    flops = 2 * (10 * 16**2 * 16 + 40 * 16**3) * 2 * 2 * 3  # 2 sequences of 2 chunks, 3 heads
    assert seen[0] == {"name": "delta_rule.invert", "symbol": "_invert_on_gpu", "programs": 12, "warps": 1,
                       "registers": 96, "spills": 2, "shared": 512, "flops": flops, "bytes": 20}


@pytest.mark.parametrize("warps, registers, shared, expected", [
    (4, 128, 0, 4),  # a warp takes 4,096 registers, a quarter of 16,384 has room for 4 of them: 16 warps
    (4, 255, 0, 2),  # 8,192 a warp, 2 in a quarter: 8 warps
    (4, 168, 0, 3),  # 5,376 a warp, 3 in a quarter (65,536 / 5,376 would be 12.2)
    (4, 130, 0, 3),  # rounded up to 136: 4,352 a warp, 3 in a quarter
    (8, 255, 0, 1), (1, 255, 0, 8),
    (4, 32, 100_000, 2),  # 233,472 / (100,096 + 1,024)
    (4, 32, 115_712, 2),  # 116,736 each, exactly half
    (4, 32, 115_713, 1), (4, 32, 227 * 1024, 1),
    (4, 16, 0, 16),  # 64 warps
    (1, 16, 0, 32),  # 32 programs
])
def test_room_on_a_multiprocessor_is_that_counted_by_hand(warps, registers, shared, expected):
    assert launches.resident_programs(H100, warps, registers, shared) == expected


def test_calls_are_taken_apart_from_the_last_one_back():
    call, seconds = ["_scan", "_outputs", "_scan"], [9.0, 8.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    split = kernel_speed.split_calls(["_outputs", "_scan", *call, *call], seconds, call)
    assert split.tolist() == [[1, 2, 3], [4, 5, 6]]
    for names in (["_scan", "_scan", "_outputs"], ["_scan"], []):
        with pytest.raises(RuntimeError, match=f"^the profiler saw {len(names)} launches .* not calls of 3$"):
            kernel_speed.split_calls(names, seconds[:len(names)], call)


WIDE = '''==PROF== Connected to process 4242 (/usr/bin/python3.12)
==PROF== Profiling "_scan": 0%....50%....100% - 9 passes
"ID","Process ID","Kernel Name","Context","gpu__time_duration.sum","sm__throughput.avg.pct_of_peak_sustained_elapsed",\
"gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed","l1tex__throughput.avg.pct_of_peak_sustained_active",\
"sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active",\
"sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active","smsp__issue_active.avg.per_cycle_active",\
"sm__warps_active.avg.pct_of_peak_sustained_active","smsp__warps_active.avg.per_cycle_active",\
"smsp__warps_eligible.avg.per_cycle_active","launch__registers_per_thread","launch__occupancy_limit_registers",\
"launch__occupancy_limit_shared_mem","launch__occupancy_limit_warps","launch__occupancy_limit_blocks",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_not_issued_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_selected_per_issue_active.ratio"
"","","","","ns","%","%","%","%","%","inst/cycle","%","warp","warp","register/thread","block","block","block","block",\
"inst","inst","inst"
"0","4242","_scan","1","86,112","21.50","12.25","30","9.50","7.50","0.11","6.25","1.02","0.12","255","2","3","16","32",\
"4.75","4.70","1.00"
==PROF== Disconnected from process 4242
"1","4242","_gradients","1","153000","60","n/a","","","","","","","","","","","","","","nan",""
'''


def test_the_counters_of_a_wide_table_are_read_and_missing_ones_are_none():
    scan, gradients = counters.parse_counters(WIDE)
    assert scan == {"kernel": "_scan", "seconds": pytest.approx(86.112e-6), "multiprocessor": 0.215, "dram": 0.1225,
                    "l1": 0.3, "issue": 0.11, "occupancy": 0.0625, "tensor": 0.075, "active": 1.02, "eligible": 0.12,
                    "registers": 255, "resident": 2, "stalls": {"long_scoreboard": 4.75, "selected": 1.0}}
    assert gradients["kernel"] == "_gradients" and gradients["seconds"] == pytest.approx(153e-6)
    assert gradients["multiprocessor"] == 0.6 and gradients["stalls"] == {}
    assert all(gradients[name] is None for name in ("dram", "l1", "issue", "occupancy", "tensor", "active", "resident"))


def test_a_table_of_one_line_a_metric_is_read_too():
    head = '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"\n'
    rows = [(0, "_invert", "gpu__time_duration.sum", "usecond", "37.5"),
            (0, "_invert", "smsp__issue_active.avg.pct_of_peak_sustained_active", "%", "44"),
            (1, "_scan(float*)", "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed", "%", "8")]
    text = head + "".join(f'"{i}","{name}","Speed","{metric}","{unit}","{value}"\n'
                          for i, name, metric, unit, value in rows)
    invert, scan = counters.parse_counters("==WARNING== noise\n" + text)
    assert (invert["kernel"], invert["seconds"], invert["issue"]) == ("_invert", pytest.approx(37.5e-6), 0.44)
    assert (scan["kernel"], scan["seconds"], scan["tensor"]) == ("_scan", None, 0.08)
    assert counters.parse_counters("==ERROR== nothing\n") == counters.parse_counters("") == []


def run_as_ncu(monkeypatch, *answers):
    """Stand in for ncu: each call gets the next answer (stdout, stderr); the commands that came."""
    commands, left, others = [], list(answers), subprocess.run

    def run(command, **how):
        if command[0] != "ncu":
            return others(command, **how)
        commands.append((command, how["env"]))
        stdout, stderr = left.pop(0)
        if stdout is None:
            raise subprocess.TimeoutExpired(command, how["timeout"])
        return subprocess.CompletedProcess(command, 1, stdout, stderr)

    monkeypatch.setattr(counters, "_ncu", lambda: "ncu")
    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_fewer_counters_are_asked_for_where_one_is_unknown(monkeypatch):
    commands = run_as_ncu(monkeypatch, ("==ERROR== Failed to find metric sm__pipe\n", ""), (WIDE, ""))
    rows = counters.read_counters("pass", "[]", ["_scan", "_gradients", "_scan"])
    assert [row["kernel"] for row in rows] == ["_scan", "_gradients"]
    (first, environment), (second, _) = commands
    assert "--metrics" in first and "--metrics" not in second and second.count("--section") == 6
    assert first[first.index("--kernel-name") + 1] == "regex:^(_gradients|_scan)$"
    assert first[-4:] == [sys.executable, "-c", "pass", "[]"]
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(Path(hl.__file__).parents[1])


@pytest.mark.parametrize("answers, sentence", [
    ([("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "")], "this user may not read the GPU's"),
    ([("", "")] * 2 + [("x\n==ERROR== The  application failed.\n", "y")],
     "ncu counted no kernel: ==ERROR== The application failed."),
    ([("", "")] * 3, "ncu counted no kernel: it gave no message"),
    ([(None, "")], "ncu had not ended after 300 seconds"),
])
def test_what_ncu_cannot_count_is_said_in_a_sentence(monkeypatch, answers, sentence):
    run_as_ncu(monkeypatch, *answers)
    with pytest.raises(RuntimeError, match=f"^{sentence}"):
        counters.read_counters("pass", "[]", ["_scan"])


def test_without_a_gpu_or_ncu_records_have_a_reason(ledger, monkeypatch):
    call = (ledger, "gated_delta_rule")
    monkeypatch.setattr(kernels.fused, "why_not", lambda: "there is none")
    rows = [kernel_speed.time_kernels(*call, (1, 64, 1, 64), device="cpu"),
            kernel_speed.scale_programs(*call, (1, 2), device="cpu"),
            kernel_speed.count_kernels(*call, (1, 64, 1, 64), device="cpu")]
    assert [row["reason"] for row in rows] == ["there is none"] * 3 and not any("kernels" in row for row in rows)
    assert speed_report.refusals(pd.DataFrame(rows)).values.tolist() == [["fused", "there is none"]]
    monkeypatch.setattr(kernels.fused, "why_not", lambda: None)
    again = kernel_speed.time_kernels(*call, (1, 64, 1, 64), device="cpu")
    assert again["reason"] == "kernels are timed on a CUDA GPU, and this is on cpu"
    assert {r.kind for r in ledger} == {"kernel_speed", "kernel_scaling", "kernel_counters"}
    monkeypatch.setattr(kernel_speed, "_why_not", lambda device: None)
    monkeypatch.setattr(counters, "_ncu", lambda: None)
    assert "is not installed" in kernel_speed.count_kernels(*call, (1, 64, 1, 64), device="cpu")["reason"]


def test_counters_go_to_the_launches_of_the_call_and_others_are_refused(ledger, monkeypatch):
    found = [{"symbol": "_scan", "name": "linear_attention.scan", "pass": "forward"},
             {"symbol": "_gradients", "name": "linear_attention.gradients", "pass": "backward"}]
    monkeypatch.setattr(kernel_speed, "_why_not", lambda device: None)
    monkeypatch.setattr(kernel_speed, "_watched", lambda operator, call: found)
    commands = run_as_ncu(monkeypatch, (WIDE, ""), (WIDE, ""))
    row = kernel_speed.count_kernels(ledger, "gated_linear_attention", (1, 64, 1, 64), device="cpu")
    assert row["reason"] is None and [(one["name"], one["pass"], one["registers"]) for one in row["kernels"]] == [
        ("linear_attention.scan", "forward", 255), ("linear_attention.gradients", "backward", None)]
    assert json.loads(commands[0][0][-1]) == ["gated_linear_attention", [1, 64, 1, 64], "float32", "cpu"]
    compile(commands[0][0][-2], "program", "exec")
    monkeypatch.setattr(kernel_speed, "_watched", lambda operator, call: found[:1])
    row = kernel_speed.count_kernels(ledger, "gated_linear_attention", (2, 64, 1, 64), device="cpu")
    assert row["reason"] == "RuntimeError: ncu counted _scan, _gradients, where a call launches _scan"


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


def test_times_of_a_call_are_medians_beside_what_each_kernel_could_do(ledger, monkeypatch):
    one = {"pass": "forward", "warps": 4, "registers": 168, "spills": 0, "shared": 0}
    found = [one | {"symbol": "_scan", "name": "linear_attention.scan", "programs": 144, "bytes": 6000, "flops": 10},
             one | {"symbol": "_outputs", "name": "linear_attention.outputs", "programs": 792, "bytes": 9, "flops": 5}]
    ran = []
    for name, value in (("_why_not", lambda device: None), ("_watched", lambda *call: [dict(one) for one in found]),
                        ("_calls", lambda *call: [lambda i=i: ran.append(i) for i in range(3)]), ("profile", Seen),
                        ("limits_of", lambda device: H100), ("_product_speed", lambda *how: 7.0),
                        ("time_graph", lambda calls, repeats: {"seconds": 6e-6}),
                        ("time_copy", lambda ledger, device: {"bytes_per_second": 3e9})):
        monkeypatch.setattr(kernel_speed, name, value)
    row = kernel_speed.time_kernels(ledger, "gated_linear_attention", (1, 64, 1, 64), device="cpu", repeats=4)
    assert row["reason"] is None and ran == [0, 1, 2, 0, 1, 2, 0]  # the first three compile
    scan, outputs = row["kernels"]
    assert [scan[name] for name in ("low", "seconds", "high")] == pytest.approx([1.75e-6, 2.5e-6, 5.25e-6])
    assert scan["floor_seconds"] == pytest.approx(2e-6) and "symbol" not in scan
    assert (scan["resident"], scan["waves"], outputs["waves"]) == (3, pytest.approx(144 / 396), 2)
    assert (row["kernel_seconds"], row["other_seconds"]) == (pytest.approx(4.5e-6), pytest.approx(0.5e-6))
    assert (row["gpu_seconds"], row["product_flops_per_second"], row["multiprocessors"]) == (6e-6, 7, 132)
    rows = kernel_speed.scale_programs(ledger, "gated_delta_rule", [1, 3], device="cpu", repeats=4)
    assert [(one["call"], one["batch"], one["name"]) for one in rows["kernels"]][2:6] == [
        ("forward+backward", 1, one["name"]) for one in found] + [("forward", 3, one["name"]) for one in found]
    assert len(rows["kernels"]) == 8 and launch.override_segments is None


def test_scans_are_cut_again_after_an_error(ledger, monkeypatch):
    monkeypatch.setattr(kernel_speed, "_why_not", lambda device: None)
    monkeypatch.setattr(kernel_speed, "_calls", lambda *call: 1 / launch.override_segments and 1 / 0)
    row = kernel_speed.scale_programs(ledger, "gated_delta_rule", [1], device="cpu")
    assert row["reason"] == "ZeroDivisionError: division by zero"
    assert launch.override_segments is None


@pytest.mark.parametrize("run, sentence", [
    (lambda l: kernel_speed.time_kernels(l, "softmax_attention", (1, 2, 3, 4)), "operator='softmax_attention' is"),
    (lambda l: kernel_speed.time_kernels(l, "gated_delta_rule", (1, 2, 3)), r"shape=\(1, 2, 3\) is not \(batch"),
    (lambda l: kernel_speed.time_kernels(l, "gated_delta_rule", (1, 2, 3, 4), repeats=0), "repeats=0 is not"),
    (lambda l: kernel_speed.count_kernels(l, "gated_delta_rule", (1, 2, 3, 4), dtype="int8"), "dtype='int8' is"),
    (lambda l: kernel_speed.scale_programs(l, "gated_delta_rule", ()), r"programs=\(\) is not a list"),
    (lambda l: kernel_speed.scale_programs(l, "gated_delta_rule", (4, 0)), "programs=0 is not a whole number"),
    (lambda l: kernel_speed.scale_programs(l, "gated_delta_rule", dim=0), "dim=0 is not a whole number"),
])
def test_bad_arguments_are_refused_before_any_compute(ledger, run, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        run(ledger)
    assert not ledger.folder.exists()


def test_what_bounds_a_kernel_is_read_from_how_its_time_grows():
    assert kernel_report.latency_share((9, 132, 264), (80, 100, 160), 132) == 0.8
    assert kernel_report.latency_share((264, 9, 132), (85, 20, 80), 132) == 0.25  # more memory is asked for
    assert kernel_report.latency_share((9, 132), (80, 79), 132) == 1
    assert kernel_report.latency_share((100, 132, 264), (80, 80, 100), 132) is None  # too few to tell
    assert kernel_report.latency_share((144, 1440), (10, 40), 132) is None


def tables():
    record = {"operator": "gated_delta_rule", "backend": "fused", "dtype": "bfloat16", "device": "GPU", "reason": None}
    call = record | {"batch": 16, "time": 1024, "heads": 9, "dim": 64}
    one = {"programs": 144, "warps": 4, "registers": 200, "spills": 0, "shared": 32768, "resident": 2,
           "waves": 144 / 264, "low": 70e-6, "high": 95e-6}
    launched = [one | {"name": "delta_rule.scan", "pass": "forward", "seconds": 80e-6, "bytes": 60, "flops": 8,
                       "floor_seconds": 20e-6},
                one | {"name": "delta_rule.gradients", "pass": "backward", "seconds": 120e-6, "bytes": 90,
                       "flops": None, "floor_seconds": 60e-6}]
    timed = call | {"kernels": launched, "kernel_seconds": 200e-6, "gpu_seconds": 205e-6, "multiprocessors": 132,
                    "product_flops_per_second": 1e6}
    counted = [{"name": launched[i]["name"], "pass": launched[i]["pass"]} | row
               for i, row in enumerate(counters.parse_counters(WIDE))]
    points = [{"call": call, "batch": n, "name": "delta_rule.scan", "pass": "forward", "programs": n, "seconds": t}
              for call in ("forward", "forward+backward")
              for n, t in ((9, 80e-6), (132, 84e-6), (264, 100e-6), (528, 1600e-6))]
    refused = record | {"reason": "there is none"}
    return {"kernels": pd.DataFrame([timed, refused]), "counters": pd.DataFrame([refused, call | {"kernels": counted}]),
            "scaling": pd.DataFrame([record | {"kernels": points, "multiprocessors": 132, "time": 1024, "dim": 64}])}


def test_words_say_where_time_goes_and_what_bounds_it():
    lines = kernel_report.kernel_words(tables()).splitlines()
    assert lines[:3] == [
        "- gated delta rule, (16, 1024, 9, 64), bfloat16, forward and backward: 200 µs in 2 kernels, one by one; "
        "205 µs as a CUDA graph of the call.",
        "  - scan: **80 µs** (40%); moving its bytes would take 25% of that, its products 10%; 144 programs of 4 warps "
        "are 0.55 waves; counted: issue slots 11%, tensor cores 7.5%, DRAM 12%, 1.02 warps a scheduler, 0.12 of them "
        "ready, most wait for long scoreboard 4.75; bound by latency.",
        "  - gradients: **120 µs** (60%); moving its bytes would take 50% of that; 144 programs of 4 warps are 0.55 "
        "waves."]
    assert lines[4] == ("  - scan: 9 programs 80 µs, 132 programs 84 µs (1.05 times that), 264 programs 100 µs "
                        "(1.25 times that), 528 programs 1,600 µs (20.00 times that). With a program on every "
                        "multiprocessor 95% of its time is the chain of steps in a program: **latency** bounds it.")
    assert [line[:9] for line in lines[3:]] == ["- gated d", "  - scan:"] * 2


def test_a_call_is_bound_by_what_its_kernels_counters_are_near():
    frames, asked = tables(), ("gated_delta_rule", (16, 1024, 9, 64))
    assert kernel_report.bound_words(frames, *asked) == ""  # the other kernel was not counted
    assert kernel_report.bound_words(frames, *asked, "forward") == (
        "What bounds it, by the GPU's counters in a call with gradients: `scan` 100% of the time, bound by latency "
        "(0.12 of 1.02 warps a scheduler are ready; DRAM 12%, tensor cores 7.5% of their peaks).")
    scan, gradients = frames["counters"]["kernels"].iloc[1]
    gradients |= scan | {"name": "delta_rule.gradients", "pass": "backward", "dram": 0.8}
    assert "`gradients` 60% of the time, bound by bandwidth (80% of the peak); `scan` 40%" in (
        kernel_report.bound_words(frames, *asked))
    gradients |= {"dram": 0.1, "tensor": 0.75}
    assert "bound by products (75% of the peak)" in kernel_report.bound_words(frames, *asked)
    gradients |= {"tensor": 0.1, "eligible": 0.9}
    assert "near no limit (0.90 warps a scheduler are ready)" in kernel_report.bound_words(frames, *asked)
    assert kernel_report.bound_words(frames, "gated_linear_attention", asked[1]) == ""
    assert kernel_report.bound_words({}, *asked) == ""


def test_tables_have_a_line_a_launch():
    found = kernel_report.kernel_tables(tables())
    times, counted = found.values()
    assert times.loc[("gated delta rule", "(16, 1024, 9, 64)", 1)].tolist() == [
        "scan", "80 [70, 95]", "40%", "25%", "10%", 144, 2, "0.55", 4, 200, 0, "32"]
    assert times["products"].tolist() == ["10%", "\u2013"]
    assert counted["issue slots"].tolist() == ["11%", "\u2013"]
    assert counted["waits"].tolist() == ["long scoreboard 4.75", "\u2013"]
    for table in found.values():
        assert table.style.set_caption("kernels").to_html()


def test_the_figure_has_a_panel_a_call_and_a_line_at_the_multiprocessors():
    figure, = speed_plots.kernel_figures(tables()["scaling"])
    assert [axes.get_title("left") for axes in figure.axes] == ["gated delta rule, 64 dims, forward",
                                                                "gated delta rule, 64 dims, forward+backward"]
    scan, edge = figure.axes[0].lines
    assert scan.get_xdata().tolist() == [9, 132, 264, 528] and scan.get_ydata().tolist() == pytest.approx([80, 84, 100,
                                                                                                          1600])
    assert list(edge.get_xdata()) == [132, 132] and figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["scan", "multiprocessors"]


def test_without_shapes_or_records_nothing_is_said(ledger):
    empty = kernel_speed.measure_kernels(ledger, ["gated_delta_rule"], [], device="cpu")
    assert set(empty) == {"kernels", "scaling", "counters", "mixers"} and not ledger.folder.exists()
    assert kernel_report.kernel_words(empty) == "" and kernel_report.kernel_tables(empty) == {}
    assert speed_plots.kernel_figures(empty["scaling"]) == [] and kernel_report.scaling_points(empty["scaling"]).empty


def test_records_are_found_again_by_the_names_of_their_tables(ledger, monkeypatch):
    monkeypatch.setattr(kernels.fused, "why_not", lambda: "there is none")
    measured = kernel_speed.measure_kernels(ledger, ["gated_delta_rule"], [[1, 64, 1, 64], [2, 64, 1, 128]],
                                            device="cpu")
    assert "Mixer **gdn**, (2, 64, 1, 128), float32, forward+backward" in kernel_report.kernel_words(measured)
    assert {name: len(frame) for name, frame in measured.items()} == {"mixers": 4, "kernels": 2, "scaling": 2,
                                                                      "counters": 2}
    found = speed.recorded_speed(ledger)
    assert all(len(found[name]) == len(frame) for name, frame in measured.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("operator", ["gated_delta_rule", "gated_linear_attention"])
def test_the_kernels_of_a_call_take_what_the_call_takes(tmp_path, operator):
    row = kernel_speed.time_kernels(hl.Ledger(tmp_path / "records"), operator, (4, 512, 40, 64), repeats=10)
    assert row["reason"] is None and 0.5 * row["gpu_seconds"] < row["kernel_seconds"] < 1.3 * row["gpu_seconds"]
    forward = 3 if operator == "gated_delta_rule" else 2
    assert [one["pass"] for one in row["kernels"]] == ["forward"] * forward + ["backward"] * 2
    assert row["other_seconds"] < 0.2 * row["kernel_seconds"]
    for one in row["kernels"]:
        assert one["low"] <= one["seconds"] <= one["high"] and one["resident"] >= 1 and one["registers"] >= 16
        assert 0 < one["floor_seconds"] and 0 < one["flops"] / one["seconds"] < row["product_flops_per_second"]
    assert row["kernels"][0]["programs"] == (4 * 8 * 40 if operator == "gated_delta_rule" else 4 * 40)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_scans_are_not_cut_while_programs_grow_and_are_afterwards_as_before(tmp_path):
    row = kernel_speed.scale_programs(hl.Ledger(tmp_path / "records"), "gated_delta_rule", [2, 9], repeats=5)
    assert row["reason"] is None and launch.override_segments is None and launch.watch is None
    scans = [(one["call"], one["programs"]) for one in row["kernels"] if one["name"] == "delta_rule.scan"]
    assert scans == [("forward", 2), ("forward+backward", 2), ("forward", 9), ("forward+backward", 9)]
    assert not any(one["name"].endswith((".join", ".maps")) for one in row["kernels"])


@pytest.mark.skipif(not torch.cuda.is_available() or counters.why_no_counters() is not None,
                    reason="needs a GPU and NVIDIA's ncu")
def test_the_counters_of_a_call_are_read(tmp_path):
    row = kernel_speed.count_kernels(hl.Ledger(tmp_path / "records"), "gated_delta_rule", (2, 256, 4, 64))
    if row["reason"] is not None:
        pytest.skip(row["reason"])
    assert ([one["name"].split(".")[1] for one in row["kernels"]]
            == ["invert", "scan", "outputs", "scan_back", "gradients"])
    assert all(one["seconds"] > 0 and 0 < one["issue"] < 1 and one["stalls"] for one in row["kernels"])


@pytest.mark.parametrize("key, arguments, share", [
    ("inverse", {"LOWER": True}, 10), ("rest", {"ZEROS": False}, 10), ("inverse", {"ZEROS": True}, 16),
    ("inverse", {"LOWER": False}, 16), ("k", {"LOWER": True}, 16)])
def test_blocks_above_the_diagonal_count_as_moved_only_where_they_are(key, arguments, share):
    x = torch.empty(3, 64, 64, dtype=torch.bfloat16)
    assert launches._moved("delta_rule.scan", key, x, arguments) == 3 * 16 * 16 * share * 2
