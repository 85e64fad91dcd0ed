"""What the records of the speed study show: tables to read, and sentences that follow from their numbers."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from hybridlib.bench.exactness import error_bound
from hybridlib.bench.operators import DIRECTIONS, OPERATORS
from hybridlib.bench.step import LOOPS, PHASES
from hybridlib.checks import check_choice
from hybridlib.report.style import mebibytes, milliseconds

__all__ = ["LOSSES", "about_speed", "decoding_table", "decoding_words", "exactness_table", "exactness_words",
           "loops_compared", "objective_table", "objective_words", "operator_table", "operator_words",
           "recorded_tables", "refusals", "step_bars", "step_losses", "step_table", "step_words", "tensor_table"]


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


def exactness_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Records as a table to read: each backend's worst error, in which case and tensor, and its bound."""
    table = [{"operator": row["operator"].replace("_", " "), "backend": _backend(row), "dtype": row["dtype"],
              "cases": len(row["errors"]), "worst error": f"{worst:.1e}", "bound": f"{bound:.0e}",
              "within": "yes" if worst <= bound else "no", "case": case, "tensor": tensor,
              "two runs alike": f"{sum(row['equal'].values())} of {len(row['equal'])}"}
             for row, worst, bound, case, tensor in _worst(frame)]
    return pd.DataFrame(table).set_index(["operator", "backend", "dtype"]) if table else pd.DataFrame()


def tensor_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The worst error of the output, the final state and each gradient, over all cases."""
    table = []
    for row, *_ in _worst(frame):
        errors = pd.DataFrame(row["errors"]).max(axis=1)
        table.append({"operator": row["operator"].replace("_", " "), "backend": _backend(row), "dtype": row["dtype"],
                      **errors.map("{:.1e}".format)})
    index = ["operator", "backend", "dtype"]
    return pd.DataFrame(table).set_index(index).fillna("\u2013") if table else pd.DataFrame()


def exactness_words(frame: pd.DataFrame) -> str:
    """A list in Markdown: each backend's worst error beside its bound, whether runs differ, and what could not run."""
    lines = []
    for row, worst, bound, case, tensor in _worst(frame):
        beyond = sum(max(errors.values()) > bound for errors in row["errors"].values())
        verdict = f"within {bound:.0e}" if worst <= bound else f"**beyond** {bound:.0e}, as in {beyond} of them"
        unlike = [name for name, equal in row["equal"].items() if not equal]
        runs = "two runs gave the same bits" if not unlike else f"two runs differed in {', '.join(unlike)}"
        count = len(row["errors"])
        lines.append(f"- {row['operator'].replace('_', ' ')}, `{_backend(row)}`, {row['dtype']}: at most "
                     f"**{worst:.1e}** over {count} case{'s' * (count > 1)} ({tensor}, in \u201c{case}\u201d), "
                     f"{verdict}; {runs}"
                     + "".join(f"; \u201c{name}\u201d could not run: {why}" for name, why in row["reasons"].items())
                     + ".")
    return "\n".join(lines)


def _backend(row):
    """A backend's name, with the version of Triton that compiled it where the record is of one."""
    return f"{row['backend']}, Triton {row['triton']}" if isinstance(row.get("triton"), str) else row["backend"]


def _worst(frame):
    """(row, worst error, its bound, case, tensor) of each record that has errors."""
    for _, row in frame.iterrows():
        if pd.isna(row["reason"]):
            worst, case, tensor = max((error, case, tensor) for case, errors in row["errors"].items()
                                      for tensor, error in errors.items())
            yield row, worst, error_bound(row["backend"], row["dtype"]), case, tensor


LOSSES = {"align": "stage 1: error of mixers, relative", "match": "stage 2: KL (nats a token)"}


def step_losses(frame: pd.DataFrame) -> dict[str, dict[str, tuple[list, list]]]:
    """Losses of the loops that ran, by stage and loop: (tokens trained on, losses), as `plots.loss_curves` takes them.

    Beside the loops stands the plain one in the other precision, e.g. ``"plain float32"``, where it was recorded. Of
    several records of one stage and loop, the last.
    """
    found = {}
    for _, row in frame[frame["reason"].isna()].iterrows() if len(frame) else ():
        curves = found.setdefault(row["stage"], {})
        curves[row["loop"]] = (row["loss_tokens"], row["loss"])
        if isinstance(row.get("noise_loss"), list):
            curves[f"{row['loop']} {row['noise_dtype']}"] = (row["loss_tokens"], row["noise_loss"])
    return found


def loops_compared(ours: Mapping, plain: Mapping) -> str:
    """Two records in words: how much faster hybridlib's loop is, how far apart the losses are, and what noise does."""
    count, text = plain.get("align_tokens"), "no step's loss differs"
    if pd.notna(count) and count:
        text = f"after {count:,.0f} tokens of alignment {text}"
    text = (f"hybridlib's loop is **{ours['tokens_per_second'] / plain['tokens_per_second']:.2f} times** as fast, and "
            f"{text} by more than {_apart(ours['loss'], plain['loss'])}")
    if isinstance(plain.get("noise_loss"), list):
        text += (f"; those of the plain loop itself, in {plain['noise_dtype']}, differ by up to "
                 f"{_apart(plain['noise_loss'], plain['loss'])}")
    return text


def _apart(losses, others):
    share = max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(losses, others))
    return f"{float(f'{100 * share:.2g}'):g}%"


_ERRORS = {"loss": "loss", "hidden": "gradient of hidden states", "head": "gradient of the head"}


def objective_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Records as a table to read: milliseconds with quartiles as launched and on the GPU, peak memory and errors.

    Errors are those of the loss and of the gradients by hidden states and head.
    """
    table = [{"shape": f"({row['tokens']}, {row['width']}, {row['vocab']}), {row['dtype']}",
              "implementation": row["implementation"], "direction": row["direction"],
              "launched, ms": milliseconds(row), "GPU, ms": milliseconds(row, "gpu_"),
              "peak, MiB": mebibytes(row["peak_bytes"]),
              **{f"error, {name}": f"{row['errors'][name]:.1e}" if name in row["errors"] else "\u2013"
                 for name in _ERRORS}}
             for _, row in _ran(frame).iterrows()]
    return pd.DataFrame(table).set_index(["shape", "implementation", "direction"]) if table else pd.DataFrame()


def objective_words(frame: pd.DataFrame) -> str:
    """A list in Markdown: for each shape, hybridlib's time, memory and errors with gradients, and the others' beside.

    The GPU's time is compared where both have it, else that as launched.
    """
    if frame.empty:
        return ""
    lines, rows = [], frame[frame["direction"] == DIRECTIONS[1]]
    for _, part in rows.groupby(["tokens", "width", "vocab", "dtype"], sort=False):
        found = {row["implementation"]: row for _, row in _ran(part).iterrows()}
        ours = found.get("hybridlib")
        said = [_said(name, row, None if row is ours else ours) for name, row in found.items()]
        said += [f"`{row['implementation']}` could not run: {row['reason']}"
                 for _, row in part[part["reason"].notna()].iterrows()]
        lines.append(f"- {_spell(part.iloc[0])}, with gradients: {'; '.join(said)}.")
    return "\n".join(lines)


def _said(name, row, ours):
    both = pd.notna(row["gpu_seconds"]) and (ours is None or pd.notna(ours["gpu_seconds"]))
    clock, how = ("gpu_seconds", "of GPU time") if both else ("seconds", "as launched")
    worst, where = max((error, text) for key, text in _ERRORS.items() if (error := row["errors"].get(key)) is not None)
    has_peak = pd.notna(row["peak_bytes"])
    if ours is None:
        memory = f", {mebibytes(row['peak_bytes'])} MiB at the peak" if has_peak else ""
        return f"**{name}** {1e3 * row[clock]:.3g} ms {how}{memory}, error at most {worst:.1e} ({where})"
    memory = f" and {row['peak_bytes'] / ours['peak_bytes']:.1f} times the memory" if has_peak else ""
    return (f"`{name}` {row[clock] / ours[clock]:.2f} times hybridlib's time ({how}){memory}, error at most "
            f"{worst:.1e} ({where})")


def _spell(row):
    return f"{row['tokens']:,} tokens of width {row['width']:,}, vocabulary {row['vocab']:,}, {row['dtype']}"


def _ran(frame):
    return frame[frame["reason"].isna()] if len(frame) else frame
