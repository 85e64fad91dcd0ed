"""The ledger: the same question gives the same record, and no failure harms a record that is there."""

import errno
import hashlib
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from hybridlib.records import ledger as module
from hybridlib.records.ledger import Ledger, Record, record_key
from hybridlib.records.provenance import describe_device

PARAMETERS = {"mixer": "gdn", "layers": (3, 0), "budget": 0.25, "seed": 7, "settings": {"rate": 1e-3}}


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "records", commit="abc")


def never():
    raise AssertionError("computed although the record exists")


def test_a_run_is_computed_once(ledger):
    first = ledger.run("hybrid", PARAMETERS, lambda: {"kl": 0.1, "tokens": 64, "curve": (1.0, 0.5)})
    again = ledger.run("hybrid", dict(reversed(PARAMETERS.items())) | {"layers": [3, 0]}, never)
    assert first == again and isinstance(again, Record)
    assert first.metrics == {"kl": 0.1, "tokens": 64, "curve": [1.0, 0.5]}
    assert (first.seed, first.tokens, first.commit, first.kind) == (7, 64, "abc", "hybrid")
    assert list(ledger.folder.iterdir()) == [ledger.path("hybrid", PARAMETERS)]


def test_what_was_computed_elsewhere_is_added(ledger):
    before = datetime.now(timezone.utc)
    added = ledger.add("candidate", PARAMETERS, {"kl": 0.1, "tokens": 64}, seconds=3600.0, device="another machine")
    assert ledger.run("candidate", PARAMETERS, never) == added and added.metrics == {"kl": 0.1, "tokens": 64}
    assert (added.seconds, added.device, added.tokens, added.commit) == (3600.0, "another machine", 64, "abc")
    assert abs((before - datetime.fromisoformat(added.started)).total_seconds() - 3600) < 60
    assert ledger.add("candidate", PARAMETERS, {"kl": 0.2}, seconds=1.0).device == describe_device()
    assert ledger.run("candidate", PARAMETERS, never).metrics == {"kl": 0.2}
    with pytest.raises(ValueError, match="metrics\\['kl'\\] is a set"):
        ledger.add("candidate", PARAMETERS, {"kl": {1}}, seconds=1.0)


def test_time_and_surroundings_are_recorded(ledger, monkeypatch):
    clock = iter([100.0, 112.5])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    before = datetime.now(timezone.utc)
    record = ledger.run("align", {}, lambda: {})
    started = datetime.fromisoformat(record.started)
    assert started.utcoffset().total_seconds() == 0 and abs((started - before).total_seconds()) < 60
    assert record.seconds == 12.5 and record.seed is None and record.tokens is None
    assert set(record.versions) - {"triton"} == {"python", "torch", "transformers", "numpy", "hybridlib"}
    assert record.versions["numpy"] == np.__version__
    assert record.device == describe_device()


def test_the_key_is_the_documented_one():
    text = '["score",{"layers":[3,0],"metric":"kl","rate":0.001}]'
    expected = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert record_key("score", {"rate": 1e-3, "metric": "kl", "layers": (np.int64(3), 0)}) == expected
    assert record_key("score", {"a": 1}) != record_key("align", {"a": 1})
    assert record_key("score", {"a": 1}) != record_key("score", {"a": True})


def test_the_file_is_standard_json_and_floats_come_back(ledger):
    metrics = {"nan": math.nan, "up": math.inf, "list": [-math.inf, 0.1], "third": 1 / 3, "one": np.float32(0.5)}
    ledger.run("score", PARAMETERS, lambda: metrics)
    raw = json.loads(ledger.path("score", PARAMETERS).read_text(), parse_constant=pytest.fail)
    assert raw["metrics"]["nan"] == {"$float": "nan"} and raw["metrics"]["up"] == {"$float": "inf"}
    back = ledger.run("score", PARAMETERS, never).metrics
    assert math.isnan(back["nan"]) and back["up"] == math.inf and back["list"] == [-math.inf, 0.1]
    assert back["third"] == 1 / 3 and back["one"] == 0.5 and list(raw["metrics"]) == sorted(metrics)


@pytest.mark.parametrize("kind, parameters, words", [
    *((kind, {}, "kind=") for kind in ("", "a/b", "Score", "a-b", 3)), *(("score", *case) for case in (
    ({"corpus": Path("x")}, r"parameters\['corpus'\] is a "),
    ({"layers": [1, {2}]}, r"parameters\['layers'\]\[1\] is a set"),
    ({"a": {3: 1}}, r"parameters\['a'\] has the key 3"),
    ({"rate": math.nan}, r"parameters\['rate'\]=nan is not finite"),
    ({"x": np.zeros(2)}, r"parameters\['x'\] is a ndarray"), ([1], "parameters is a list")))])
def test_what_no_record_can_hold_is_refused_before_compute(ledger, kind, parameters, words):
    with pytest.raises(ValueError, match=words):
        ledger.run(kind, parameters, never)
    assert not ledger.folder.exists()


def test_metrics_are_checked_and_a_failed_compute_leaves_nothing(ledger):
    with pytest.raises(ValueError, match="compute returned a float"):
        ledger.run("score", {}, lambda: 0.1)
    with pytest.raises(ZeroDivisionError):
        ledger.run("score", {}, lambda: {"kl": 1 / 0})
    assert list(ledger.folder.iterdir()) == []


@pytest.mark.parametrize("where", ["replace", "fsync"])
def test_a_full_disk_leaves_the_record_as_it_was(ledger, monkeypatch, caplog, where):
    ledger.run("hybrid", PARAMETERS, lambda: {"kl": 0.1})
    before = ledger.path("hybrid", PARAMETERS).read_bytes()
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with monkeypatch.context() as patch:
        patch.setattr(module.os, where, full)
        with pytest.raises(OSError, match="No space left on device; what was there before is as it was") as caught:
            ledger.run("hybrid", PARAMETERS, lambda: {"kl": 0.123456}, recompute=True)
    assert caught.value.errno == errno.ENOSPC
    assert "0.123456" in caplog.text
    assert ledger.path("hybrid", PARAMETERS).read_bytes() == before
    assert len(list(ledger.folder.iterdir())) == 1
    assert ledger.run("hybrid", PARAMETERS, never).metrics == {"kl": 0.1}


@pytest.mark.parametrize("harm", [
    lambda text: text[:len(text) // 2], lambda text: text.replace('"gdn"', '"gla"'), lambda _: "[]", lambda _: "",
    lambda text: text.replace('"device"', '"machine"'), lambda text: json.dumps(json.loads(text) | {"seconds": "long"}),
    lambda text: text.replace("0.125", "NaN")])
def test_a_harmed_record_is_refused_by_name(ledger, harm):
    ledger.run("hybrid", PARAMETERS, lambda: {"kl": 0.125})
    path = ledger.path("hybrid", PARAMETERS)
    harmed = harm(path.read_text())
    path.write_text(harmed)
    for read in (lambda: ledger.run("hybrid", PARAMETERS, never), lambda: list(ledger), ledger.table):
        with pytest.raises(ValueError, match=f"{path.name} is not a whole record.*delete it.*recompute=True"):
            read()
    assert path.read_text() == harmed
    assert ledger.run("hybrid", PARAMETERS, lambda: {"kl": 0.5}, recompute=True).metrics == {"kl": 0.5}
    assert len(list(ledger)) == 1
    path.rename(ledger.folder / "other.json")
    with pytest.raises(ValueError, match="other.json.*does not fit its parameters or its name"):
        list(ledger)


def test_two_at_once_leave_one_valid_record(ledger):
    together = threading.Barrier(2)

    def work(value):
        def compute():
            together.wait(timeout=30)
            return {"kl": value}
        return ledger.run("hybrid", PARAMETERS, compute)

    with ThreadPoolExecutor(2) as pool:
        records = list(pool.map(work, (0.1, 0.2)))
    assert sorted(r.metrics["kl"] for r in records) == [0.1, 0.2]
    assert ledger.run("hybrid", PARAMETERS, never) in records
    assert len(list(ledger.folder.iterdir())) == 1


def test_find_and_order(ledger, tmp_path):
    assert list(ledger) == [] and not ledger.folder.exists()
    for seed in (10, 2, 5):
        ledger.run("hybrid", {"seed": seed, "layers": (1, 2)}, lambda: {})
    ledger.run("score", {"seed": 2, "flag": True}, lambda: {})
    assert [r.seed for r in ledger.find("hybrid")] == [10, 2, 5]  # as started
    assert [r.seed for r in ledger.find("hybrid", seed=2, layers=(1, 2))] == [2]
    assert ledger.find("hybrid", layers=(2, 1)) == [] and ledger.find("hybrid", absent=None) == []
    assert ledger.find("score", flag=1) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file' is a file; a ledger needs a folder"):
        Ledger(tmp_path / "file")


def test_table(ledger):
    ledger.run("hybrid", PARAMETERS, lambda: {"kl": 0.1, "seconds": 3.0, "seed": 1, "curve": [1, 2], "in": {"x": 2}})
    ledger.run("teacher", {"seed": 7}, lambda: {"kl": math.nan})
    table = ledger.table()
    assert list(table["kind"]) == ["hybrid", "teacher"]
    row = table.iloc[0]
    assert row["layers"] == (3, 0) and row["settings.rate"] == 1e-3 and row["kl"] == 0.1 and row["in.x"] == 2
    assert row["seed"] == 7 and row["metrics.seed"] == 1 and row["metrics.seconds"] == 3.0
    assert "curve" not in table.columns and math.isnan(table["kl"][1])
    assert list(ledger.table("teacher")["seed"]) == [7]
    assert ledger.table("align").empty and "kind" in ledger.table("align").columns
