"""What was aimed at on one H100, and whether records meet it; both come out of the same functions as the figures do.

Operators at (16, 1024, 9, 64) in bfloat16, GPU time being that of a CUDA graph: the gated delta rule within 0.08 ms
forward and 0.30 ms with gradients, gated linear attention within 1.3 times that; at least 2 times less GPU time than
flash-linear-attention, and 5 times less as launched from Python; at (2, 4096, 16, 128) not more GPU time than FlashQLA.
The training step of smollm2-135m at a context of 1,024 tokens: stage 1 at 250,000 tokens a second, stage 2 at 150,000,
aiming at 400,000 and 250,000. Elsewhere, on a CPU at (1, 1024, 9, 64) in float32: ``"chunked"`` at least 1.5 times
faster than transformers' PyTorch form, and faster than flash-linear-attention's naive functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import pandas as pd

from hybridlib.bench.operators import DIRECTIONS
from hybridlib.report.kernel_tables import bound_words

__all__ = ["Verdict", "cpu_verdicts", "gpu_verdicts", "target_table", "target_words"]

_TRAINING, _WIDE, _SMALL = (16, 1024, 9, 64), (2, 4096, 16, 128), (1, 1024, 9, 64)
_TIMES = {("gated_delta_rule", "forward"): 0.08e-3, ("gated_delta_rule", "forward+backward"): 0.30e-3,
          ("gated_linear_attention", "forward"): 1.3 * 0.08e-3,
          ("gated_linear_attention", "forward+backward"): 1.3 * 0.30e-3}
_STEPS = {"align": (250_000, 400_000), "match": (150_000, 250_000)}
_NAMES = {"fla": "flash-linear-attention", "flash_qla": "FlashQLA", "transformers": "transformers' PyTorch form",
          "naive": "flash-linear-attention's naive function"}


@dataclass(frozen=True)
class Verdict:
    """One target and what was measured.

    Parameters
    ----------
    target : in words; bound : its number, in `unit`; most : whether the bound is not to be passed, rather than reached.
    found : what was measured, in `unit`; None if nothing was, or not all that it needs.
    aim : a second bound, beyond the first, if there is one. why : what else was measured and tells what bounds it.
    """

    target: str
    bound: float
    unit: str
    most: bool
    found: float | None
    aim: float | None = None
    why: str = ""

    @property
    def verdict(self) -> str:
        """``"met"``, ``"missed"`` or ``"not measured"``; with an aim that too, e.g. ``"met, aim missed"``."""
        if self.found is None:
            return "not measured"
        reached = [self.found <= bound if self.most else self.found >= bound
                   for bound in (self.bound, self.aim) if bound is not None]
        words = ["met" if one else "missed" for one in reached]
        return words[0] + (f", aim {words[1]}" if self.aim is not None else "")


def gpu_verdicts(tables: Mapping[str, pd.DataFrame]) -> list[Verdict]:
    """Every target of an H100 from the tables of `speed.recorded_speed`; tables but operators and steps may be missing.

    Only records of a device whose name has ``H100`` in it count. What is compared was measured on one device. What
    bounds a call or a step that misses its target is told where kernels, counters and mixers were measured.
    """
    tables = {name: _of_device(frame, "H100") for name, frame in tables.items()}
    operators, found = tables["operators"], []
    for (operator, direction), bound in _TIMES.items():
        ours = _operator(operators, operator, "fused", _TRAINING, direction, "gpu_seconds", "bfloat16")
        found.append(Verdict(f"{_call(operator, direction, _TRAINING)}: GPU time", 1e3 * bound, "ms", True,
                             None if ours is None else 1e3 * ours,
                             why=bound_words(tables, operator, _TRAINING, direction)))
    for clock, least, text in (("gpu_seconds", 2, "GPU time"), ("seconds", 5, "as launched")):
        found += [_ratio(operators, operator, "fla", "fused", _TRAINING, direction, clock, least, text, "bfloat16")
                  for operator, direction in _TIMES]
    found += [replace(_ratio(operators, "gated_delta_rule", "flash_qla", "fused", _WIDE, direction, "gpu_seconds", 1,
                             "GPU time", "bfloat16"), why=bound_words(tables, "gated_delta_rule", _WIDE, direction))
              for direction in DIRECTIONS]
    steps = tables["steps"]
    for stage, (bound, aim) in _STEPS.items():
        rows = _where(steps, stage=stage, loop="hybridlib", context=1024, teacher="smollm2-135m")
        found.append(Verdict(f"stage {1 if stage == 'align' else 2} (`{stage}`)", bound, "tokens/s", False,
                             None if rows.empty else float(rows.iloc[-1]["tokens_per_second"]), aim,
                             why="" if rows.empty else _step_bound(rows.iloc[-1], tables.get("mixers"))))
    return found


def cpu_verdicts(operators: pd.DataFrame) -> list[Verdict]:
    """The targets of a CPU that this table of operators has anything about: those timed at (1, 1024, 9, 64)."""
    if operators.empty or "device" in operators and operators["device"].str.contains("NVIDIA").any():
        return []
    found = [_ratio(operators, operator, peer, "chunked", _SMALL, direction, "seconds", least, "as launched", "float32")
             for operator, peer, least in (("gated_delta_rule", "transformers", 1.5), ("gated_delta_rule", "naive", 1),
                                           ("gated_linear_attention", "naive", 1)) for direction in DIRECTIONS]
    return [one for one in found if one.found is not None]


def target_table(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """Targets as a table to read: what was aimed at, what was found, the verdict."""
    table = [{"target": one.target, "bound": _bound(one), "found": "\u2013" if one.found is None else _number(one),
              "verdict": one.verdict} for one in verdicts]
    return pd.DataFrame(table).set_index("target") if table else pd.DataFrame()


def target_words(verdicts: Iterable[Verdict]) -> str:
    """In a sentence how many targets are met; then a list in Markdown, a line a target. Empty without any."""
    verdicts = list(verdicts)
    if not verdicts:
        return ""
    met, missed, none = (sum(one.verdict.split(",")[0] == word for one in verdicts)
                         for word in ("met", "missed", "not measured"))
    lines = [f"- {one.target}: {_bound(one)}; "
             + (f"{_number(one)}, **{one.verdict}**." if one.found is not None else f"{one.verdict}.")
             + (f" {one.why}" if one.why and "missed" in one.verdict else "") for one in verdicts]
    return (f"Of {len(verdicts)} targets {met} met, {missed} missed, {none} not measured.\n\n" + "\n".join(lines))


def _step_bound(row, mixers):
    """What of a step its mixers take, and how fast it would be if their operators took no time; empty if not known."""
    needed = {"mixer", "layers", "num_layers", "batch_tokens", "step_seconds"}
    if mixers is None or not needed <= set(row.index):
        return ""
    parts = _where(mixers, mixer=row["mixer"], direction=DIRECTIONS[1], time=row["context"],
                   batch=row["batch_tokens"] // row["context"])
    if parts.empty:
        return ""
    parts, count = parts.iloc[-1]["parts"], row["num_layers"] - (len(row["layers"]) if row["stage"] == "match" else 0)
    each, operator = sum(part["seconds"] for part in parts.values()), parts["operator"]["seconds"]
    rest = row["step_seconds"] - count * operator
    return (f"Of a step's {1e3 * row['step_seconds']:.3g} ms its {count} mixers take {1e3 * count * each:.3g}, by what "
            f"one takes alone; if their operators took no time at all, it would run at "
            f"{row['batch_tokens'] / rest:,.0f} tokens/s.")


def _ratio(frame, operator, peer, ours, shape, direction, clock, least, text, dtype):
    """How many times the time of `ours` the peer takes, both on one device; of two runs if their commits differ."""
    times = [_operator(frame, operator, backend, shape, direction, clock, dtype) for backend in (peer, ours)]
    on_gpu = _operator(frame, operator, ours, shape, direction, "gpu_seconds", dtype) if clock == "seconds" else None
    runs = {_operator(frame, operator, backend, shape, direction, "commit", dtype) for backend in (peer, ours)}
    apart = len(runs - {None}) > 1
    text += ", of two runs" if apart else ""
    if apart and clock == "seconds":  # what a processor takes depends on what else it does
        times = [None, None]
    why = "" if None in (on_gpu, times[1]) else (f"Of its {_short(1e3 * times[1])} ms as launched the GPU computes for "
                                                 f"{_short(1e3 * on_gpu)} ms; the rest is the processor's.")
    return Verdict(f"{_call(operator, direction, shape)}: time of {_NAMES[peer]} over that of `{ours}`, {text}", least,
                   "times", False, None if None in times else times[0] / times[1], why=why)


def _operator(frame, operator, backend, shape, direction, clock, dtype):
    rows = _where(frame, operator=operator, backend=backend, direction=direction, dtype=dtype,
                  **dict(zip(("batch", "time", "heads", "dim"), shape)))
    rows = rows[rows[clock].notna()] if len(rows) and clock in rows else rows[:0]
    return None if rows.empty else rows.iloc[-1][clock]


def _where(frame, **values):
    """The rows that ran and have these values; none if a column is missing."""
    if frame.empty or any(name not in frame for name in values):
        return frame[:0]
    rows = frame[frame["reason"].isna()]
    for name, value in values.items():
        rows = rows[rows[name] == value]
    return rows


def _of_device(frame, name):
    """Rows of the device with this in its name that was measured last."""
    if frame.empty or "device" not in frame:
        return frame[:0]
    rows = frame[frame["device"].str.contains(name, regex=False)]
    return rows[rows["device"] == rows["device"].iloc[-1]] if len(rows) else rows


def _call(operator, direction, shape):
    return f"{operator.replace('_', ' ')}, {direction}, ({', '.join(map(str, shape))})"


def _bound(one):
    aim = f", aiming at {one.aim:,.0f}" if one.aim is not None else ""
    if (one.bound, one.unit) == (1, "times"):
        return "no shorter"
    return f"at {'most' if one.most else 'least'} {_short(one.bound)} {one.unit}{aim}"


def _number(one):
    return f"{_short(one.found)} {one.unit}"


def _short(number):
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"
