"""Fixtures of the benchmarks' tests."""

import pytest

import hybridlib as hl
from hybridlib.bench.timing import Bench


@pytest.fixture
def bench(tmp_path):
    """Where tests measure: on the CPU, a few samples, records in a folder of the test's own."""
    return Bench(hl.Ledger(tmp_path / "records", device="cpu"), "cpu", repeats=3)


@pytest.fixture
def teacher(tiny_teacher):
    return hl.Teacher(tiny_teacher(), None, "tiny", "r1")
