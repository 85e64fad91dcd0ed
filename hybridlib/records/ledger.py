"""The ledger: one JSON file for each thing that was measured, found again by its parameters.

A record is named after its kind and its parameters, so that a second run of the same reads the file instead of
computing. A record file is standard JSON with sorted keys:

- tuples are stored, and come back, as lists; a numpy scalar as the Python number it holds;
- a metric that is not finite is stored as ``{"$float": "nan"}``, ``"inf"`` or ``"-inf"`` and comes back as that float;
  a parameter must be finite, since nan does not equal itself and no second run could name it;
- anything else (arrays, sets, paths, objects) is refused by the name of its key.

A file is written beside its place and moved there in one step: a reader sees the old record or the new one, never
half of one. Of two processes that run the same thing at once, the last to finish wins, and both get a valid record.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pandas as pd

from hybridlib.records.provenance import code_commit, describe_device, software_versions

__all__ = ["Ledger", "Record", "record_key"]

logger = logging.getLogger(__name__)

_KIND = re.compile(r"[a-z][a-z0-9_]*")
_TAG = "$float"
_COLUMNS = ("kind", "seconds", "device", "commit", "started", "key")  # of a record, in `Ledger.table`


@dataclass(frozen=True)
class Record:
    """One measured thing.

    Parameters
    ----------
    kind : the name of the measurement, e.g. ``"score"``; lower-case letters, digits and underscores.
    parameters : everything the result depends on; with `kind` it makes the key.
    metrics : the numbers that the measurement gave.
    seed : ``parameters["seed"]`` if it is a whole number, else None.
    versions : software: python, torch, transformers, numpy, hybridlib.
    device : GPU name with its memory, or CPU model with its cores.
    commit : git commit of the code, with ``+dirty`` if files differed from it; None outside a checkout.
    started : the time of the start, ISO 8601 in UTC.
    seconds : wall time.
    tokens : ``metrics["tokens"]`` if it is a whole number, else None.
    key : the first 16 hex digits of the sha256 of (kind, parameters) as canonical JSON.
    """

    kind: str
    parameters: dict
    metrics: dict
    seed: int | None
    versions: dict
    device: str
    commit: str | None
    started: str
    seconds: int | float
    tokens: int | None
    key: str


class Ledger:
    """A folder of records.

    Parameters
    ----------
    folder : the folder of the record files, without subfolders; the first run makes it.
    device : the device that records name: ``"auto"`` (a GPU if there is one) or ``"cpu"``.
    commit : the commit that records name; None asks git. For a copy of the code that has no ``.git``.

    Raises
    ------
    ValueError : `folder` is a file; or, when records are read, a file there is no whole record (it is named).
    """

    def __init__(self, folder: str | Path, *, device: str = "auto", commit: str | None = None):
        self.folder, self.device, self.commit = Path(folder), str(device), commit
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"folder={str(self.folder)!r} is a file; a ledger needs a folder, which may be new")

    def __iter__(self) -> Iterator[Record]:
        """All records, in the order in which they were started."""
        records = [_read(path) for path in sorted(self.folder.glob("*.json"))]
        return iter(sorted(records, key=lambda r: (r.started, r.kind, r.key)))

    def path(self, kind: str, parameters: dict) -> Path:
        """Return the place of the record of (kind, parameters), which need not exist."""
        return self.folder / f"{kind}-{record_key(kind, parameters)}.json"

    def run(self, kind: str, parameters: dict, compute: Callable[[], dict], *, recompute: bool = False) -> Record:
        """Return the record of (kind, parameters), computing it if there is none.

        Parameters
        ----------
        kind, parameters : the name of the record; parameters hold JSON values only.
        compute : called without arguments if there is no record; returns the metrics, a dict of JSON values.
        recompute : compute even if there is a record, and replace it, readable or not.

        Raises
        ------
        ValueError : a value that JSON cannot hold, by its key; or a record file that is truncated or not ours.
        OSError : the record could not be written, e.g. on a full disk. The old record stays as it was, and the text
            of the new one is logged as an error so that the work is not lost.
        """
        path, parameters = self.path(kind, parameters), _plain(parameters, "parameters", finite=True)
        if path.exists() and not recompute:
            logger.info("found %s", path.name)
            return _read(path)
        self.folder.mkdir(parents=True, exist_ok=True)  # before the work: a folder that cannot be made fails at once
        commit, started, clock = self._commit(), datetime.now(timezone.utc), time.perf_counter()
        metrics = compute()
        seconds = time.perf_counter() - clock
        if not isinstance(metrics, dict):
            raise ValueError(f"compute returned a {type(metrics).__name__} for {kind!r}; it must return a dict")
        return self._write(kind, parameters, metrics, started, seconds, describe_device(self.device), commit)

    def add(self, kind: str, parameters: dict, metrics: dict, *, seconds: float, device: str | None = None) -> Record:
        """Write the record of a computation that has just ended elsewhere, in place of one that exists.

        Parameters
        ----------
        kind, parameters, metrics : as for `run`, which also says what is raised.
        seconds : wall time of the computation.
        device : its device, as `describe_device` names it there; the ledger's if None.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        started = datetime.now(timezone.utc) - timedelta(seconds=seconds)
        device = device or describe_device(self.device)
        return self._write(kind, parameters, metrics, started, seconds, device, self._commit())

    def _commit(self) -> str | None:
        return code_commit(self.folder) if self.commit is None else self.commit

    def _write(self, kind, parameters, metrics, started, seconds, device, commit) -> Record:
        parameters, metrics = _plain(parameters, "parameters", finite=True), _plain(metrics, "metrics")
        record = Record(kind=kind, parameters=parameters, metrics=metrics, seed=_whole(parameters.get("seed")),
                        versions=software_versions(), device=device, commit=commit,
                        started=started.isoformat(timespec="milliseconds"), seconds=round(seconds, 3),
                        tokens=_whole(metrics.get("tokens")), key=record_key(kind, parameters))
        path = self.path(kind, parameters)
        _replace(path, json.dumps(_tagged(asdict(record)), sort_keys=True, indent=1, allow_nan=False) + "\n")
        logger.info("wrote %s", path.name)
        return record

    def find(self, kind: str, /, **parameters: Any) -> list[Record]:
        """Return the records of `kind` whose parameters include these, in the order in which they were started."""
        items = _plain(parameters, "parameters", finite=True).items()
        return [r for r in self if r.kind == kind and all(
            k in r.parameters and r.parameters[k] == v and isinstance(r.parameters[k], bool) == isinstance(v, bool)
            for k, v in items)]

    def table(self, kind: str | None = None) -> pd.DataFrame:
        """Return one row a record: parameters, scalar metrics, then kind, seconds, device, commit, started and key.

        Dicts are flattened (``outer.inner``), lists among the parameters become tuples, lists among the metrics are
        left out. A metric named like a parameter or a record's field gets the column ``metrics.name``, a parameter
        named like a field ``parameters.name``.
        """
        rows = [(r, _flat(r.parameters), _flat(r.metrics)) for r in self if kind is None or r.kind == kind]
        taken = {name for _, parameters, _ in rows for name in parameters} | set(_COLUMNS)
        table = []
        for record, parameters, metrics in rows:
            row = {f"parameters.{k}" if k in _COLUMNS else k: tuple(v) if isinstance(v, list) else v
                   for k, v in parameters.items()}
            row |= {f"metrics.{k}" if k in taken else k: v for k, v in metrics.items() if not isinstance(v, list)}
            table.append(row | {name: getattr(record, name) for name in _COLUMNS})
        names = dict.fromkeys(name for row in table for name in row if name not in _COLUMNS)
        return pd.DataFrame(table, columns=[*names, *_COLUMNS])


def record_key(kind: str, parameters: dict) -> str:
    """Return the first 16 hex digits of the sha256 of ``[kind, parameters]`` as canonical JSON.

    Canonical is: keys sorted, no spaces, ASCII, tuples as lists, floats as the shortest text that reads back the
    same. 1 and 1.0 are different, as they are in JSON. Raises ValueError as `Ledger.run` does.
    """
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise ValueError(f"kind={kind!r} is no kind; use lower-case letters, digits and underscores, a letter first")
    if not isinstance(parameters, dict):
        raise ValueError(f"parameters is a {type(parameters).__name__}; it must be a dict")
    plain = _plain(parameters, "parameters", finite=True)
    text = json.dumps([kind, plain], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value, where: str, finite: bool = False):
    """Return `value` with tuples as lists, numpy scalars as numbers; ValueError at `where` if JSON cannot hold it."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key == _TAG:
                raise ValueError(f"{where} has the key {key!r}; a key must be a string other than {_TAG!r}")
        return {key: _plain(inner, f"{where}[{key!r}]", finite) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, f"{where}[{i}]", finite) for i, inner in enumerate(value)]
    if isinstance(value, float) and finite and not math.isfinite(value):
        raise ValueError(f"{where}={value!r} is not finite; a parameter must be")
    if value is not None and type(value) not in (str, bool, int, float):
        raise ValueError(f"{where} is a {type(value).__name__}; allowed are None, bool, int, float, str, list and dict")
    return value


def _tagged(value):
    if isinstance(value, dict):
        return {key: _tagged(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_tagged(inner) for inner in value]
    return {_TAG: repr(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _untagged(pairs: list[tuple]):
    return float(pairs[0][1]) if len(pairs) == 1 and pairs[0][0] == _TAG else dict(pairs)


def _refuse_constant(text: str):
    raise ValueError(f"{text} is not JSON")


def _whole(value) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _flat(values: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _read(path: Path) -> Record:
    """Return the record in `path`; ValueError naming the file if it is truncated, foreign or was changed by hand."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_untagged,
                             parse_constant=_refuse_constant)
        types = get_type_hints(Record)
        if not isinstance(entries, dict) or set(entries) != set(types):
            raise ValueError("its fields are not a record's")
        wrong = [name for name, kind in types.items() if not isinstance(entries[name], kind)]
        if wrong:
            raise ValueError(f"its field {wrong[0]!r} has the wrong type")
        record = Record(**entries)
        if record_key(record.kind, record.parameters) != record.key:
            raise ValueError("its key does not fit its parameters")
        if path.name != f"{record.kind}-{record.key}.json":
            raise ValueError("its name does not fit its key")
        return record
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole record of this ledger ({error}); delete it, "
                         "or run it again with recompute=True, which replaces it") from error


def _replace(path: Path, text: str) -> None:
    """Write `text` to a temporary name in the same folder, then move it to `path`; OSError leaves `path` as it was."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        logger.error("this record could not be saved:\n%s", text)
        reason = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        raise OSError(error.errno, f"could not write the record, {reason}; what was there before is as it was, "
                                   "and the new record's text is in the log", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
