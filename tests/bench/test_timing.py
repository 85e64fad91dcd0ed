"""The timer and its records; how fast anything is, is never asserted."""

import contextlib
import dataclasses
import time
import warnings
from unittest.mock import Mock

import pytest
import torch

from hybridlib.bench import timing
from hybridlib.bench.timing import Bench
from hybridlib.records.provenance import describe_device

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_timing_is_the_median_and_takes_inputs_in_turn():
    seen = []
    calls = [lambda i=i: (seen.append(i), time.sleep(0.03 if len(seen) == 3 else 0.001)) for i in range(2)]
    timed = Bench(None, "cpu", repeats=5, max_seconds=10).time(calls)
    assert seen == [0, 0, 1, 0, 1, 0]  # one to warm up
    assert timed["samples"] == 5 and timed["low"] <= timed["seconds"] <= timed["high"]
    assert timed["seconds"] < 0.03  # one slow sample does not make the median
    assert timed["gpu_seconds"] is None and "graph_reason" not in timed
    assert Bench(None, "cpu", repeats=50, max_seconds=1e-9).time(calls)["samples"] == 3
    assert timing.time_graph(calls, torch.device("cpu")) == {"gpu_seconds": None}


def test_quartiles_are_those_of_the_samples():
    samples = iter([4.0, 1.0, 3.0, 2.0, 5.0])
    assert timing._quartiles(lambda: next(samples), 5, 10) == {"seconds": 3, "low": 2, "high": 4, "samples": 5}


def test_a_record_is_read_again_and_measured_anew_after_a_failure_or_on_request(bench):
    calls = []

    def compute():
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("\n it is not here \n at all")
        return {"seconds": len(calls)}

    ask = {"kind": "some_speed", "parameters": {"n": 1}, "compute": compute}
    assert bench.record(**ask)["reason"] == "RuntimeError: it is not here"
    again = bench.record(**ask)
    assert again == {"n": 1, "device": describe_device("cpu"), "reason": None, "seconds": 2}
    assert bench.record(**ask) == again
    assert dataclasses.replace(bench, recompute=True).record(**ask)["seconds"] == 3
    assert len(bench.ledger.find("some_speed")) == 1


def test_memory_moves_at_the_faster_of_two_ways(bench, monkeypatch):
    times = iter([4.0, 2.0])
    monkeypatch.setattr(timing, "_COPY_BYTES", {"cpu": 8})
    monkeypatch.setattr(Bench, "time", lambda self, calls: [call() for call in calls] and {
        "seconds": next(times), "gpu_seconds": None})
    copy = timing.time_copy(bench)
    assert (copy["seconds"], copy["bytes_per_second"], copy["by"]) == (2.0, 8.0, "negation")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("error", [None, RuntimeError("this waits")])
def test_torch_s_mode_that_finds_what_waits_is_then_as_it_was(monkeypatch, error):
    set_mode = Mock(side_effect=lambda mode: mode == "error" and warnings.warn("it does not see all", stacklevel=2))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 1)  # torch's number of "warn"
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with pytest.raises(RuntimeError, match="^this waits$") if error else contextlib.nullcontext():
        with timing._no_waiting():
            if error:
                raise error
    assert [call.args for call in set_mode.call_args_list] == [("error",), (1,)]


@needs_gpu
def test_a_call_that_waits_is_not_captured_and_spoils_no_later_one(monkeypatch):
    captured, capture, x = [], torch.cuda.graph, torch.ones(2**20, device="cuda")
    monkeypatch.setattr(torch.cuda, "graph", lambda *graphs: captured.append(1) or capture(*graphs))
    waits = Bench(None, repeats=3).time([lambda: x.sum().item()])
    assert waits["seconds"] > 0 and waits["gpu_seconds"] is None and waits["graph_reason"]
    assert not captured and torch.cuda.get_sync_debug_mode() == 0
    timed = Bench(None, repeats=3).time([lambda: x.sum()])
    assert captured and "graph_reason" not in timed
    assert 0 < timed["gpu_low"] <= timed["gpu_seconds"] <= timed["gpu_high"]
