"""The speed study: what the notebook of speeds measures, as tables, and what their numbers say, in words.

Each part can be left out, by an empty list among the settings, and each number is a record as soon as it is measured:
see `hybridlib.benchmarks`.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch

from .benchmarks import (BACKENDS, DIRECTIONS, DTYPES, OPERATORS, check_shape, dtype_name, time_decoding,
                         time_operator)
from .checks import check_choice, check_device, check_int, check_number
from .corpus import load_tokens
from .exactness import CASES, EXACT, cases_for, exactness_table, measure_exactness, tensor_table
from .kernel_speed import measure_kernels
from .ledger import Ledger
from .mixers import MIXERS
from .objective_speed import IMPLEMENTATIONS, check_objective_shape, objective_table, time_objective
from .selection import budget_layers
from .step_speed import LOOPS, PHASES, STAGES, check_align_tokens, loops_compared, time_step
from .study import StudySettings, results_folder
from .teachers import Teacher, load_teacher
from .timing import mebibytes, milliseconds, time_copy

__all__ = ["KINDS", "SpeedSettings", "SpeedStudy", "about_speed", "decoding_table", "decoding_words", "operator_table",
           "operator_words", "recorded_speed", "recorded_tables", "refusals", "speed_settings", "step_bars",
           "step_table", "step_words"]

KINDS = {"operators": "operator_speed", "exactness": "operator_exactness", "objectives": "objective_speed",
         "steps": "step_speed", "decoding": "decoding_speed", "kernels": "kernel_speed", "scaling": "kernel_scaling",
         "counters": "kernel_counters", "mixers": "mixer_speed"}
_LISTS = {"operators": OPERATORS[:2], "backends": BACKENDS, "stages": STAGES, "exactness_cases": CASES,
          "exactness_dtypes": DTYPES[1:], "objectives": IMPLEMENTATIONS, "shapes": None, "objective_shapes": None,
          "contexts": None, "shares": None, "kernel_shapes": None}


@dataclass(frozen=True)
class SpeedSettings:
    """The parameters of the notebook ``mixers_and_speed``.

    Parameters
    ----------
    teacher, mixer, corpus, device, results, recompute : as in `StudySettings`.
    operators, backends, shapes : as `time_operator` takes them; ``"softmax"`` among the backends is softmax attention.
    dtype : of operators, objectives and decoding; ``"auto"`` is bfloat16 on a GPU and float32 on a CPU.
    repeats : samples of a timing; max_seconds : its samples end sooner once they have taken this long.
    exactness_cases, exactness_dtypes : names among `exactness.CASES`, for all operators and backends.
    objectives, objective_shapes : implementations of the forward KL, and their (tokens, width, vocab).
    stages : of the training step; context, batch_tokens, steps : tokens a row and a step, and steps timed.
    step_align_tokens : of stage 1 before stage 2 is timed, 0 for none; plain_backend : of mixers in the plain loop.
    budget : softmax layers of the hybrid in stage 2, share or count.
    contexts : prompts' lengths for decoding; shares : of softmax layers, 1 the teacher, 0 all linear.
    decode_batch : prompts at once; new_tokens : generated for each.
    kernel_shapes : shapes whose calls are taken apart: the fused operators kernel by kernel, on a GPU, and the mixers
        part by part.

    An empty list of shapes, exactness_cases, objective_shapes, stages, contexts or kernel_shapes leaves that part out.
    """

    teacher: str = "lab"
    mixer: str = "gdn"
    corpus: str = "lab"
    operators: list[str] = OPERATORS[:2]
    backends: list[str] = ("reference", "chunked", "fused", "fla", "softmax")
    shapes: list[list[int]] = ((4, 256, 4, 32), (2, 512, 4, 32), (1, 1024, 4, 32))
    dtype: str = "auto"
    repeats: int = 20
    max_seconds: float = 0.1
    exactness_cases: list[str] = ("near none", "strong", "mixed", "strong then mild", "beta 0", "beta 1", "length 1",
                                  "length 63", "length 65", "length 4097", "repeated keys at beta 1", "dims 32",
                                  "packed", "random 1")
    exactness_dtypes: list[str] = ("float32", "bfloat16")
    objectives: list[str] = tuple(IMPLEMENTATIONS)
    objective_shapes: list[list[int]] = ((256, 64, 4096), (1024, 64, 4096))
    stages: list[str] = STAGES
    context: int = 256
    batch_tokens: int = 1_024
    steps: int = 4
    step_align_tokens: int = 16_384
    budget: float | int = 0.25
    plain_backend: str = "chunked"
    contexts: list[int] = (128, 256, 512, 1024)
    shares: list[float] = (1.0, 0.5, 0.25, 0.125)
    decode_batch: int = 1
    new_tokens: int = 16
    kernel_shapes: list[list[int]] = ()
    device: str = "auto"
    results: str = ""
    recompute: bool = False

    def __post_init__(self):
        for name in ("teacher", "corpus", "results"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r} is not text")
        for name, allowed in _LISTS.items():
            if not isinstance(getattr(self, name), (list, tuple)):
                raise ValueError(f"{name}={getattr(self, name)!r} is not a list")
            for value in getattr(self, name) if allowed else ():
                check_choice(name, value, allowed)
        for shape in (*self.shapes, *self.kernel_shapes):
            check_shape(shape)
        for shape in self.objective_shapes:
            check_objective_shape(shape)
        for context in self.contexts:
            check_int("contexts", context, 1)
        for share in self.shares:
            check_number("shares", share, 0, 1)
        check_choice("mixer", self.mixer, tuple(MIXERS))
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("plain_backend", self.plain_backend, BACKENDS[:4])
        for name, low in (("repeats", 1), ("context", 2), ("steps", 1), ("decode_batch", 1), ("new_tokens", 2)):
            check_int(name, getattr(self, name), low)
        check_number("max_seconds", self.max_seconds, 0, open_low=True)
        check_int("batch_tokens", self.batch_tokens, self.context)
        check_align_tokens("step_align_tokens", self.step_align_tokens, self.context)
        budget_layers(self.budget, 10**6)
        check_device(self.device)
        if not isinstance(self.recompute, bool):
            raise ValueError(f"recompute={self.recompute!r} is neither True nor False")


def speed_settings(namespace: Mapping) -> SpeedSettings:
    """Settings from a notebook's variables, as `notebook_settings` takes them.

    A parameter that only the other notebooks have is passed over, so that one set of parameters can serve them all.
    Raises ValueError for a name that no notebook has, and for a value out of range.
    """
    known, others = ({f.name for f in fields(kind)} for kind in (SpeedSettings, StudySettings))
    plain = {name: value for name, value in namespace.items()
             if not name.startswith("_") and name not in ("In", "Out", "quit", "exit")
             and isinstance(value, (bool, int, float, str, list, tuple, dict, type(None)))}
    for name in plain:
        if name not in known | others:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose among {', '.join(sorted(known))}"
            raise ValueError(f"{name}={plain[name]!r} is no parameter of this notebook; {hint}")
    return SpeedSettings(**{name: value for name, value in plain.items() if name in known})


class SpeedStudy:
    """The measurements under one `SpeedSettings`, each a record in `ledger`; tables have one row a record.

    Raises ValueError for settings that the teacher cannot take.
    """

    def __init__(self, settings: SpeedSettings | None = None):
        self.settings = settings or SpeedSettings()
        self.device = check_device(self.settings.device)
        folder = Path(self.settings.results).expanduser() if self.settings.results else results_folder()
        self.ledger = Ledger(folder, device=str(self.device))
        if self.settings.stages:
            config = self.teacher.model.config
            budget_layers(self.settings.budget, config.num_hidden_layers)
            if self.settings.context > config.max_position_embeddings:
                raise ValueError(f"context={self.settings.context} is beyond teacher {self.teacher.name}'s "
                                 f"{config.max_position_embeddings} tokens")

    @cached_property
    def teacher(self) -> Teacher:
        return load_teacher(self.settings.teacher, device=self.device)

    def copy(self) -> dict:
        """Bandwidth of a copy: see `time_copy`."""
        return time_copy(self.ledger, device=self.device, recompute=self.settings.recompute)

    def operators(self) -> pd.DataFrame:
        """Every operator, backend, shape and direction: see `time_operator`. Softmax attention is measured once."""
        s, rows = self.settings, []
        pairs = [(operator, backend) for backend in s.backends for operator in s.operators if backend != "softmax"]
        pairs += [(OPERATORS[2], "softmax")] if "softmax" in s.backends else []
        if s.shapes:
            self.copy()
        for (operator, backend), shape, direction in itertools.product(pairs, s.shapes, DIRECTIONS):
            rows.append(time_operator(self.ledger, operator, backend, shape, dtype=s.dtype, device=self.device,
                                      direction=direction, repeats=s.repeats, max_seconds=s.max_seconds,
                                      recompute=s.recompute))
        return pd.DataFrame(rows)

    def exactness(self) -> pd.DataFrame:
        """Every operator, backend and dtype over the cases that it takes: see `measure_exactness`."""
        s, rows = self.settings, []
        for operator, dtype in itertools.product(s.operators, s.exactness_dtypes):
            truths = {}
            rows += [measure_exactness(self.ledger, operator, backend, s.exactness_cases, dtype=dtype, truths=truths,
                                       device=self.device, recompute=s.recompute)
                     for backend in s.backends
                     if backend in EXACT and cases_for(operator, backend, dtype, s.exactness_cases)]
        return pd.DataFrame(rows)

    def objectives(self) -> pd.DataFrame:
        """Every shape, implementation and direction: see `time_objective`."""
        s, truths = self.settings, {}
        return pd.DataFrame([time_objective(self.ledger, name, shape, dtype=s.dtype, direction=direction,
                                            device=self.device, repeats=s.repeats, max_seconds=s.max_seconds,
                                            recompute=s.recompute, truths=truths)
                             for shape in s.objective_shapes for name in s.objectives for direction in DIRECTIONS])

    def steps(self) -> pd.DataFrame:
        """Both loops for every stage, one after the other: see `time_step`."""
        s, aligned = self.settings, {}
        if not s.stages:
            return pd.DataFrame()
        needed = max((s.steps + 2) * s.batch_tokens, s.step_align_tokens)
        tokens = load_tokens(s.corpus, self.teacher.tokenizer, s.context, max_tokens=needed, heldout_tokens=s.context)
        return pd.DataFrame([time_step(self.ledger, self.teacher, tokens, stage=stage, loop=loop, mixer=s.mixer,
                                       budget=s.budget, batch_tokens=s.batch_tokens, steps=s.steps,
                                       plain_backend=s.plain_backend, align_tokens=s.step_align_tokens,
                                       aligned=aligned, recompute=s.recompute)
                             for stage in s.stages for loop in LOOPS])

    def decoding(self) -> pd.DataFrame:
        """Every share and context: see `time_decoding`."""
        s = self.settings
        if not s.contexts:
            return pd.DataFrame()
        dtype = getattr(torch, dtype_name(s.dtype, self.device))
        teacher = self.teacher if dtype == torch.float32 else load_teacher(s.teacher, device=self.device, dtype=dtype)
        return pd.DataFrame([time_decoding(self.ledger, teacher, share=share, context=context, mixer=s.mixer,
                                           batch=s.decode_batch, new_tokens=s.new_tokens, recompute=s.recompute)
                             for share in s.shares for context in s.contexts])

    def kernels(self) -> dict[str, pd.DataFrame]:
        """What the fused operators spend kernel by kernel: see `measure_kernels`. Last of all: it brings a profiler."""
        s = self.settings
        return measure_kernels(self.ledger, s.operators, s.kernel_shapes, dtype=s.dtype, device=self.device,
                               repeats=s.repeats, recompute=s.recompute)


def recorded_speed(ledger: Ledger) -> dict[str, pd.DataFrame]:
    """The tables of `SpeedStudy` from a ledger's records, by the names in `KINDS`; of the same question, the latest.

    Each row has its ``commit`` beside. Memory floors are those of the ledger's latest `copy_speed` of the same device,
    not those of the record: all are held against one bandwidth. A table without records is empty.
    """
    tables, copied = {}, {r.parameters["device"]: r.metrics for r in ledger.find("copy_speed")
                      if r.metrics["reason"] is None}
    for name, kind in KINDS.items():
        latest = {}
        for r in (r for r in ledger if r.kind == kind):
            asked = {k: v for k, v in r.parameters.items() if k not in ("repeats", "max_seconds", "steps", "new_tokens",
                                                                        "data", "revision", "cases", "align_tokens")}
            metrics = _with_floor(r.metrics, copied.get(r.parameters.get("device")))
            latest[repr(sorted(asked.items()))] = r.parameters | metrics | {"commit": r.commit}
        tables[name] = pd.DataFrame(list(latest.values()))
    return tables


def _with_floor(metrics, copied):
    """Metrics, those of each kernel and part within too, with ``floor_seconds`` by what was `copied`."""
    if copied is None:
        return metrics
    if "kernels" in metrics:
        metrics = metrics | {"kernels": [_with_floor(one, copied) for one in metrics["kernels"]]}
    if "floor_seconds" in metrics:
        count = metrics.get("floor_bytes", metrics.get("bytes"))
        metrics = metrics | {"floor_seconds": count / copied["bytes_per_second"]}
    return metrics


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
