"""The ledger: one JSON file for each thing that was measured, found again by its parameters.

Tuples come back as lists, numpy scalars as Python numbers. A metric may be nan or infinite, ``{"$float": "nan"}`` in
the file, a parameter may not; anything else (arrays, sets, paths) is refused by the name of its key. Files are replaced
in one step: of two processes that run the same thing at once, the last to finish wins.
"""

from __future__ import annotations

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
    """One measured thing: the `metrics` of what `kind` and `parameters` name, all that the result depends on.

    `seed` and `tokens` are ``parameters["seed"]`` and ``metrics["tokens"]`` if they are whole numbers. `versions`,
    `device` and `commit` are of `provenance`, `key` is of `record_key`; `started` is ISO 8601 in UTC.
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
    """A folder of records, without subfolders; the first run makes it.

    Records name the `device`, ``"auto"`` (a GPU if there is one) or ``"cpu"``, and the `commit`; None asks git. Raises
    ValueError if `folder` is a file or, when records are read, if a file there is no whole record.
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
        """Return the record of (kind, parameters), computing its metrics if there is none, or if `recompute`.

        Raises ValueError for a value that JSON cannot hold or a record file that is not whole, OSError if the record
        could not be written: the old one stays, and the text of the new one is logged.
        """
        path = self.path(kind, parameters)
        if path.exists() and not recompute:
            logger.info("found %s", path.name)
            return _read(path)
        self.folder.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made fails before the work
        commit, clock = self._commit(), time.perf_counter()
        metrics = compute()
        seconds = time.perf_counter() - clock
        if not isinstance(metrics, dict):
            raise ValueError(f"compute returned a {type(metrics).__name__} for {kind!r}; it must return a dict")
        return self._write(kind, parameters, metrics, seconds, describe_device(self.device), commit)

    def add(self, kind: str, parameters: dict, metrics: dict, *, seconds: float, device: str | None = None) -> Record:
        """Write, or replace, the record of a computation of `seconds` that has just ended elsewhere, on `device`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        device = device or describe_device(self.device)
        return self._write(kind, parameters, metrics, seconds, device, self._commit())

    def _commit(self) -> str | None:
        return code_commit(self.folder) if self.commit is None else self.commit

    def _write(self, kind, parameters, metrics, seconds, device, commit) -> Record:
        parameters, metrics = _plain(parameters, "parameters", finite=True), _plain(metrics, "metrics")
        started = datetime.now(timezone.utc) - timedelta(seconds=seconds)
        seed, tokens = (value if type(value) is int else None
                        for value in (parameters.get("seed"), metrics.get("tokens")))
        record = Record(kind, parameters, metrics, seed, software_versions(), device, commit,
                        started.isoformat(timespec="milliseconds"), round(seconds, 3), tokens,
                        record_key(kind, parameters))
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

        Dicts are flattened (``outer.inner``), lists among the parameters become tuples. A metric named like a parameter
        or a record's field gets the column ``metrics.name``, a parameter named like a field ``parameters.name``.
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
    """Return 16 hex digits of the sha256 of ``[kind, parameters]`` as canonical JSON; raises as `Ledger.run`."""
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise ValueError(f"kind={kind!r} is no kind; use lower-case letters, digits and underscores, a letter first")
    if not isinstance(parameters, dict):
        raise ValueError(f"parameters is a {type(parameters).__name__}; it must be a dict")
    plain = _plain(parameters, "parameters", finite=True)
    text = json.dumps([kind, plain], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value, where: str, finite: bool = False):
    """Return `value` with tuples as lists and numpy scalars as numbers; ValueError if JSON cannot hold it."""
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


def _untagged(pairs):
    return float(pairs[0][1]) if len(pairs) == 1 and pairs[0][0] == _TAG else dict(pairs)


def _refuse_constant(text):
    raise ValueError(f"{text} is not JSON")


def _flat(values: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _read(path: Path) -> Record:
    """Return the record in `path`; ValueError if it is truncated, foreign or was changed by hand."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_untagged,
                             parse_constant=_refuse_constant)
        types = get_type_hints(Record)
        if set(entries) != set(types) or not all(isinstance(entries[name], kind) for name, kind in types.items()):
            raise ValueError("its fields are not a record's")
        record = Record(**entries)
        if record_key(record.kind, record.parameters) != record.key or path.stem != f"{record.kind}-{record.key}":
            raise ValueError("its key does not fit its parameters or its name")
        return record
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole record of this ledger ({error}); delete it, "
                         "or run it again with recompute=True, which replaces it") from error


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        logger.error("this record could not be saved:\n%s", text)
        raise OSError(error.errno, f"could not write the record, {error.strerror or error}; what was there before is "
                                   "as it was, and the new record's text is in the log", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
