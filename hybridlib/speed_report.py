"""What the records of the speed study show: tables to read, and sentences that follow from their numbers."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from .benchmarks import DIRECTIONS, OPERATORS
from .checks import check_choice
from .exactness import exactness_table, tensor_table
from .objective_speed import objective_table
from .step_speed import LOOPS, PHASES, loops_compared
from .timing import mebibytes, milliseconds

__all__ = ["about_speed", "decoding_table", "decoding_words", "operator_table", "operator_words",
           "recorded_tables", "refusals", "step_bars", "step_table", "step_words"]


def operator_table(frame: pd.DataFrame, direction: str = "forward") -> pd.DataFrame:
    """Operators as a table to read: milliseconds as launched and on the GPU, with quartiles, floor and peak memory."""
    check_choice("direction", direction, DIRECTIONS)
    rows = _timed(frame)
    rows = rows[rows["direction"] == direction] if len(rows) else rows
    if rows.empty:
        return rows
    table = [{"operator": row["operator"].replace("_", " "), "backend": row["backend"],
              "shape": f"({row['batch']}, {row['time']}, {row['heads']}, {row['dim']})",
              "launched, ms": milliseconds(row), "GPU, ms": milliseconds(row, "gpu_"),
              "floor, ms": f"{1e3 * row['floor_seconds']:.3g}",
              "peak, MiB": mebibytes(row["peak_bytes"])}
             for _, row in rows.iterrows()]
    return pd.DataFrame(table).set_index(["operator", "backend", "shape"])


def recorded_tables(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The tables to read of `recorded_speed`, but those of kernels, by caption; without those that are empty."""
    found = {"operators, forward": operator_table(tables["operators"]),
             "operators, forward+backward": operator_table(tables["operators"], DIRECTIONS[1]),
             "worst error of each backend": exactness_table(tables["exactness"]),
             "worst error of each tensor": tensor_table(tables["exactness"]),
             "objective": objective_table(tables["objectives"]), "steps": step_table(tables["steps"]),
             "decoding": decoding_table(tables["decoding"]).round(3)}
    return {caption: table for caption, table in found.items() if len(table)}


def about_speed(tables: Mapping[str, pd.DataFrame]) -> str:
    """What `recorded_speed` found, in a sentence, and the command that makes the records of what it did not find."""
    found = {name: frame for name, frame in tables.items() if len(frame)}
    missing = [name for name in tables if name not in found]
    text = (f"No GPU record of {', '.join(missing)} is committed yet. On a machine with a GPU, this makes them: "
            "`papermill notebooks/mixers_and_speed.ipynb out.ipynb -f notebooks/profiles/mixers_and_speed/gpu.yaml`."
            if missing else "")
    if not found:
        return text
    devices = dict.fromkeys(device for frame in found.values() for device in frame["device"])
    teachers = dict.fromkeys(t for frame in found.values() if "teacher" in frame for t in frame["teacher"])
    return (f"{sum(map(len, found.values()))} records ({', '.join(found)}), measured on {' and '.join(devices)}"
            + _at_commits(found) + (f"; teacher **{', '.join(teachers)}**. " if teachers else ". ") + text).rstrip()


def _at_commits(found):
    """Which code the records are of: one commit for all, or those of each table, in the order of the records."""
    each = {name: tuple(dict.fromkeys(f"`{commit[:7]}`" for commit in frame["commit"].dropna()))
            for name, frame in found.items() if "commit" in frame and frame["commit"].notna().any()}
    if not each:
        return ""
    if len(set(each.values())) == 1:
        return f" at {' and '.join(next(iter(each.values())))}"
    return " at commits " + ", ".join(f"{' and '.join(commits)} ({name})" for name, commits in each.items())


def operator_words(frame: pd.DataFrame) -> str:
    """A list in Markdown: for each operator, direction and shape, the fastest backend, its floor and the others.

    Softmax attention is set beside each where it was timed at the same shape.
    """
    rows, lines = _timed(frame), []
    if rows.empty:
        return ""
    rows = rows.assign(best=rows["gpu_seconds"].fillna(rows["seconds"]))
    softmax = {key: part["best"].iloc[-1] for key, part in rows[rows["operator"] == OPERATORS[2]].groupby(
        ["direction", "batch", "time", "heads", "dim"])}
    for (operator, direction, *shape), part in rows.groupby(
            ["operator", "direction", "batch", "time", "heads", "dim"], sort=False):
        if operator == OPERATORS[2]:
            continue
        part, attention = part.sort_values("best"), softmax.get((direction, *shape))
        first, how = part.iloc[0], "of GPU time" if pd.notna(part.iloc[0]["gpu_seconds"]) else "as launched"
        others = [f"`{row['backend']}` takes {row['best'] / first['best']:.1f} times as long"
                  for _, row in part[1:].iterrows()]
        lines.append(f"- {operator.replace('_', ' ')}, {direction}, ({', '.join(map(str, shape))}): "
                     f"**{first['backend']}**, {1e3 * first['best']:.3g} ms {how}, which is "
                     f"{first['best'] / first['floor_seconds']:.1f} times its memory floor"
                     + (f"; {', '.join(others)}" if others else "")
                     + (f"; softmax attention takes {attention / first['best']:.2g} times as long" if attention else "")
                     + ".")
    return "\n".join(lines)


def step_words(frame: pd.DataFrame) -> str:
    """A list in Markdown: for each stage, tokens a second of both loops and how far apart their losses are."""
    rows, lines = _timed(frame), []
    if rows.empty:
        return ""
    for stage, part in rows.groupby("stage", sort=False):
        loops = {row["loop"]: row for _, row in part.iterrows()}
        text = "; ".join(f"{name} {row['tokens_per_second']:,.0f} tokens/s" for name, row in loops.items())
        if set(LOOPS) <= set(loops):
            plain = loops["plain"].get("plain_backend")
            text += f", with `{plain}` mixers" if isinstance(plain, str) else ""
            text += f"; {loops_compared(*(loops[name] for name in LOOPS))}"
        lines.append(f"- {stage}: {text}.")
    return "\n".join(lines)


def decoding_words(frame: pd.DataFrame) -> str:
    """A list in Markdown: at the longest context, each share's cache and speed beside those of the teacher."""
    rows = _timed(frame)
    if rows.empty:
        return ""
    rows = rows[rows["context"] == rows["context"].max()]
    whole, lines = rows[rows["share"] == 1], []
    for _, row in rows.iterrows():
        cache, gpu = row["full_attention"] + row["linear_attention"], row.get("gpu_tokens_per_second")
        size = f"{cache / 2**20:.3g}" if cache < 1000 * 2**20 else mebibytes(cache)
        text = (f"{100 * row['share']:g}% softmax: cache {size} MiB, "
                f"{row['tokens_per_second']:.3g} tokens/s{f' ({gpu:,.0f} by GPU time)' if pd.notna(gpu) else ''}")
        if len(whole) and row["share"] < 1:
            teacher = whole.iloc[0]
            speeds = {"tokens_per_second": "as launched from Python"}
            speeds |= {"gpu_tokens_per_second": "by GPU time"} if pd.notna(gpu) else {}
            text += (f", **{cache / teacher['full_attention']:.2f} times** the teacher's memory; its speed is "
                     + ", ".join(f"**{row[clock] / teacher[clock]:.2f} times** the teacher's {how}"
                                 for clock, how in reversed(speeds.items())))
        lines.append(f"- {text}.")
    return f"After {rows['context'].iloc[0]:,} tokens:\n\n" + "\n".join(lines)


def step_bars(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows for a figure of the step: ``bar`` (stage and loop) and milliseconds of each of `PHASES`."""
    rows = _timed(frame)
    if rows.empty:
        return rows
    return pd.DataFrame([{"bar": f"{row['stage']}, {row['loop']}"} | {name: 1e3 * row[f"{name}_seconds"]
                                                                       for name in PHASES}
                         for _, row in rows.iterrows()])


def step_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Throughput of whole steps, beside the sum of the phases timed apart and, on a GPU, the memory a loop adds."""
    rows = _timed(frame)
    if rows.empty:
        return rows
    apart = sum(rows[f"{name}_seconds"] for name in PHASES)
    return pd.DataFrame({"stage": rows["stage"], "loop": rows["loop"],
                         "tokens/s": rows["tokens_per_second"].map("{:,.0f}".format),
                         "step, ms": (1e3 * rows["step_seconds"]).map("{:.4g}".format),
                         "phases, ms": (1e3 * apart).map("{:.4g}".format),
                         "peak, MiB": [mebibytes(peak) for peak in rows["peak_bytes"]]}).set_index(["stage", "loop"])


def decoding_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Decoding with ``label`` (share of softmax layers), cache in MiB (``cache``, and by type) and tokens a second."""
    rows = _timed(frame)
    if rows.empty:
        return rows
    label = [("teacher" if share == 1 else f"{100 * share:g}% softmax") for share in rows["share"]]
    rows = rows.assign(label=label, softmax_mib=rows["full_attention"] / 2**20,
                       linear_mib=rows["linear_attention"] / 2**20)
    rows = rows.assign(cache_mib=rows["softmax_mib"] + rows["linear_mib"]).reset_index(drop=True)
    return rows.reindex(columns=["label", "context", "batch", "softmax_mib", "linear_mib", "cache_mib",
                                 "tokens_per_second", "gpu_tokens_per_second", "prefill_seconds"])


def refusals(frame: pd.DataFrame) -> pd.DataFrame:
    """What could not run, and why; one row a reason and backend, implementation, softmax share or loop."""
    if frame.empty or frame["reason"].isna().all():
        return pd.DataFrame(columns=["what", "reason"])
    what = next(name for name in ("backend", "implementation", "share", "loop") if name in frame)
    rows = frame[frame["reason"].notna()].rename(columns={what: "what"})
    return rows[["what", "reason"]].drop_duplicates().reset_index(drop=True)


def _timed(frame):
    return frame[frame["reason"].isna()] if len(frame) else pd.DataFrame()
