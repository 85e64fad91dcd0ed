"""Tables of the speed study, each from a table of `SpeedStudy` or `recorded_speed` with one row a record. Records that
have a ``reason`` in place of numbers are left to `refusals`."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from pandas.io.formats.style import Styler

from hybridlib.bench.exactness import error_bound
from hybridlib.bench.step import PHASES
from hybridlib.report.style import mebibytes, milliseconds

__all__ = ["captioned", "decoding_table", "exactness_table", "measured", "objective_table", "operator_table",
           "record_table", "refusals", "step_table", "tensor_table"]

_SHAPE = ["batch", "time", "heads", "dim"]
_NONE = "\u2013"


def captioned(part: str, frame: pd.DataFrame) -> list[Styler]:
    """Caption the tables of a part of the speed study (a key of `speed.KINDS`), refusals last; leave out empty ones."""
    tables = {
        "operators": {"operators, forward": operator_table,
                      "operators, forward+backward": lambda frame: operator_table(frame, "forward+backward")},
        "exactness": {"worst error of each backend": exactness_table,
                      "worst error of each tensor, over all cases": tensor_table},
        "objectives": {"objective": objective_table},
        "steps": {"steps": step_table},
        "decoding": {"decoding": lambda frame: decoding_table(frame).round(3)}}[part]
    tables[f"{part}: what could not run"] = refusals
    return [table.style.set_caption(caption) for caption, build in tables.items() if len(table := build(frame))]


def measured(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the records that have numbers."""
    return frame[frame["reason"].isna()] if len(frame) else pd.DataFrame()


def refusals(frame: pd.DataFrame) -> pd.DataFrame:
    """Say what could not run, and why: a row a reason and backend, implementation, softmax share, loop or case."""
    rows = []
    for _, row in frame.iterrows():
        what = next(row[name] for name in ("backend", "implementation", "share", "loop") if name in row)
        if pd.notna(row["reason"]):
            rows.append((what, row["reason"]))
        elif isinstance(row.get("reasons"), dict):
            rows += [(f"{what}, {case}", reason) for case, reason in row["reasons"].items()]
    return pd.DataFrame(rows, columns=["what", "reason"]).drop_duplicates(ignore_index=True)


def record_table(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Count each part's records, with their devices, teachers and commits."""
    def names(frame, column, length=None):
        return ", ".join(dict.fromkeys(str(x)[:length] for x in frame[column].dropna())) if column in frame else ""

    return pd.DataFrame({part: {"records": len(frame), "device": names(frame, "device"),
                                "teacher": names(frame, "teacher"), "commit": names(frame, "commit", 7)}
                         for part, frame in tables.items()}).T.rename_axis("part")


def _indexed(rows, *columns):
    return pd.DataFrame(rows).set_index(list(columns)) if rows else pd.DataFrame()


def _shape(row, names):
    return f"({', '.join(str(int(row[name])) for name in names)})"


def operator_table(frame: pd.DataFrame, direction: str = "forward") -> pd.DataFrame:
    """Show milliseconds as launched and on the GPU with quartiles, memory floor and peak memory. ``of the floor`` and
    ``of the fastest`` (at this shape) are ratios of times, on the GPU where it was timed."""
    rows = measured(frame)
    rows = rows[rows["direction"] == direction] if len(rows) else rows
    if rows.empty:
        return rows
    rows = rows.sort_values(["operator", *_SHAPE], kind="stable")
    best = rows["gpu_seconds"].fillna(rows["seconds"]).astype(float)
    fastest = best.groupby([rows[name] for name in ("operator", *_SHAPE, "dtype")]).transform("min")
    return pd.DataFrame({
        "operator": rows["operator"].str.replace("_", " "), "backend": rows["backend"],
        "shape": [_shape(row, _SHAPE) for _, row in rows.iterrows()],
        "launched, ms": [milliseconds(row) for _, row in rows.iterrows()],
        "GPU, ms": [milliseconds(row, "gpu_") for _, row in rows.iterrows()],
        "floor, ms": (1e3 * rows["floor_seconds"]).map("{:.3g}".format),
        "of the floor": (best / rows["floor_seconds"]).map("{:.1f}".format),
        "of the fastest": (best / fastest).map("{:.2f}".format),
        "peak, MiB": rows["peak_bytes"].map(mebibytes)}).set_index(["operator", "backend", "shape"])


def exactness_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Show each backend's worst error, where it is, its bound, and how many cases two runs gave alike."""
    table = []
    for row, errors in _errors(frame):
        bound, worst = error_bound(row["backend"], row["dtype"]), errors.max()
        table.append(_which(row) | {
            "cases": errors.shape[1], "worst error": f"{worst.max():.1e}", "bound": f"{bound:.0e}",
            "cases beyond": int((worst > bound).sum()), "case": worst.idxmax(), "tensor": errors.max(axis=1).idxmax(),
            "two runs alike": f"{sum(row['equal'].values())} of {len(row['equal'])}"})
    return _indexed(table, "operator", "backend", "dtype")


def tensor_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Show the worst error of the output, the final state and each gradient, over all cases."""
    table = [_which(row) | dict(errors.max(axis=1).map("{:.1e}".format)) for row, errors in _errors(frame)]
    return _indexed(table, "operator", "backend", "dtype").fillna(_NONE)


def _errors(frame):
    """Yield each record that has errors, as row and frame (tensors, cases)."""
    return [(row, pd.DataFrame(row["errors"])) for _, row in measured(frame).iterrows()]


def _which(row):
    triton = f", Triton {row['triton']}" if isinstance(row.get("triton"), str) else ""
    return {"operator": row["operator"].replace("_", " "), "backend": row["backend"] + triton, "dtype": row["dtype"]}


def objective_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Show milliseconds as launched and on the GPU with quartiles, peak memory and relative errors; ``of ours`` is the
    ratio of times to hybridlib's, on the GPU where both were timed there."""
    table, call, rows = [], ["tokens", "width", "vocab", "dtype", "direction"], measured(frame)
    ours = {tuple(row[call]): row for _, row in rows.iterrows() if row["implementation"] == "hybridlib"}
    for _, row in rows.iterrows():
        own = ours.get(tuple(row[call]))
        both = own is not None and pd.notna(row["gpu_seconds"]) and pd.notna(own["gpu_seconds"])
        clock = "gpu_seconds" if both else "seconds"
        table.append({
            "shape": f"{_shape(row, call[:3])}, {row['dtype']}",
            "implementation": row["implementation"], "direction": row["direction"],
            "launched, ms": milliseconds(row), "GPU, ms": milliseconds(row, "gpu_"),
            "of ours": _NONE if own is None else f"{row[clock] / own[clock]:.2f}",
            "peak, MiB": mebibytes(row["peak_bytes"]),
            **{f"error, {name}": f"{row['errors'][name]:.1e}" if name in row["errors"] else _NONE
               for name in ("loss", "hidden", "head")}})
    return _indexed(table, "shape", "implementation", "direction")


def step_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Show throughput, the sum of phases timed apart and, on a GPU, a loop's added memory. ``losses apart`` is the
    largest relative difference of a step's loss from the plain loop's (of its own, in the other precision)."""
    table, rows = [], measured(frame)
    plain = {row["stage"]: row for _, row in rows.iterrows() if row["loop"] == "plain"}
    for _, row in rows.iterrows():
        other, ratio, apart = plain.get(row["stage"]), _NONE, _NONE
        if other is not None:
            ratio = f"{row['tokens_per_second'] / other['tokens_per_second']:.2f}"
            losses = row.get("noise_loss") if row["loop"] == "plain" else row["loss"]
            if isinstance(losses, list):
                apart = f"{max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(losses, other['loss'])):.2g}"
        table.append({
            "stage": row["stage"], "loop": row["loop"], "tokens/s": f"{row['tokens_per_second']:,.0f}",
            "of the plain loop": ratio, "step, ms": f"{1e3 * row['step_seconds']:.4g}",
            "phases, ms": f"{1e3 * sum(row[f'{name}_seconds'] for name in PHASES):.4g}",
            "peak, MiB": mebibytes(row["peak_bytes"]),
            "aligned on": f"{row['align_tokens']:,.0f}" if pd.notna(row.get("align_tokens")) else _NONE,
            "losses apart": apart})
    return _indexed(table, "stage", "loop")


def decoding_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Show decoding by share of softmax layers: MiB of the cache, tokens a second and seconds of prefill.
    ``cache_of_teacher`` and ``speed_of_teacher``, by GPU time where it was timed, are over the teacher's."""
    rows = measured(frame).reset_index(drop=True)
    if rows.empty:
        return rows
    rows = rows.reindex(columns=list(dict.fromkeys([*rows, "gpu_tokens_per_second"])))
    label = ["teacher" if share == 1 else f"{100 * share:g}% softmax" for share in rows["share"]]
    rows = rows.assign(label=label, softmax_mib=rows["full_attention"] / 2**20,
                       linear_mib=rows["linear_attention"] / 2**20,
                       gpu_tokens_per_second=rows["gpu_tokens_per_second"].astype(float))
    rows["cache_mib"] = rows["softmax_mib"] + rows["linear_mib"]
    speed = rows["gpu_tokens_per_second"].fillna(rows["tokens_per_second"])
    teacher = rows["share"] == 1
    for name, values in (("cache_of_teacher", rows["cache_mib"]), ("speed_of_teacher", speed)):
        rows[name] = values / rows["context"].map(dict(zip(rows["context"][teacher], values[teacher])))
    return rows[["label", "context", "batch", "softmax_mib", "linear_mib", "cache_mib", "cache_of_teacher",
                 "tokens_per_second", "gpu_tokens_per_second", "speed_of_teacher", "prefill_seconds"]]
