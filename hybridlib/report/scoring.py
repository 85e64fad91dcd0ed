"""What the records of scoring loops show: tables of speed, with how well the rankings agree beside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from hybridlib.bench.scoring import ENGINES
from hybridlib.distill.settings import MatchSettings
from hybridlib.records.folders import data_folder
from hybridlib.report.style import mebibytes
from hybridlib.selection.agreement import spearman, top_k_jaccard
from hybridlib.selection.rules import budget_layers

__all__ = ["early_stop_table", "engine_table", "worker_table"]

_NONE = "\u2013"


def engine_table(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Compare each loop's speed, tokens and ranking with the plain loop's; ``commit`` tells runs apart."""
    rows = []
    for frame in frames:
        for _, row in frame.iterrows():
            which = _question(frame) | {"loop": ENGINES[row["loop"]]}
            if pd.notna(row["reason"]):
                rows.append(which | {"seconds": f"could not run: {row['reason']}"})
                continue
            rows.append(which | {
                "seconds": f"{row['seconds']:,.1f}", **_agreement(frame, row, "plain"),
                "tokens of training": f"{row['tokens']:,.0f}", "last measured after": f"{row['history_tokens'][-1]:,}",
                "layers a task": f"{row['group']}", "peak memory (MiB)": mebibytes(row.get("peak_bytes")),
                "commit": row["commit"][:7] if isinstance(row.get("commit"), str) else _NONE})
    index = ["teacher", "tokens a candidate", "higher rate", "loop"]
    return pd.DataFrame(rows).fillna(_NONE).set_index(index) if rows else pd.DataFrame()


def worker_table(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Compare one worker a GPU with the same loop in one process; ``scores apart`` is the largest difference of a
    layer's score, in nats."""
    rows = []
    for frame in frames:
        loops = _loops(frame)
        alone = loops.get("recorded", loops.get("shared"))
        many = loops.get("workers")
        if many is None or alone is None:
            continue
        rows.append(_question(frame) | {
            "workers": int(many["workers"]), "seconds": f"{many['seconds']:,.1f}",
            "seconds to start": f"{many['start_seconds']:,.1f}", "seconds of one process": f"{alone['seconds']:,.1f}",
            **_agreement(frame, many, alone["loop"]),
            "scores apart": f"{max(abs(a - b) for a, b in zip(many['values'], alone['values'], strict=True)):.1g}"})
    return pd.DataFrame(rows).set_index("teacher") if rows else pd.DataFrame()


def early_stop_table(frames: Sequence[pd.DataFrame], path: str | Path | None = None) -> pd.DataFrame:
    """Show early stopping as reported, second-hand, and by each engine of `frames` beside the plain loop: when a set
    settled, in shares of training, empty where it did not, and Jaccard of the best layers. `path` replaces
    ``data/published/early_stop.csv``."""
    reported = pd.read_csv(path or data_folder("published") / "early_stop.csv").set_index("quantity")
    rows = [{"teacher": "reported", **{name: "{low:.0%} to {high:.0%}".format(**reported.loc[key])
                                       for name, key in (("settled", "settled"), ("tokens saved", "saved"))}}]
    for frame in frames:
        loops = _loops(frame)
        if not {"plain", "engine"} <= set(loops):
            continue
        engine, plain = loops["engine"], loops["plain"]
        points, whole = engine["history_tokens"], plain["history_tokens"][-1]
        early = points[-1] < whole
        k = budget_layers(engine["early_stop"]["budget"], len(plain["values"]))
        rows.append(_question(frame) | {
            "settled": f"{points[-engine['early_stop']['window']] / whole:.0%}" if early else "not before the end",
            "stopped after": f"{points[-1] / whole:.0%}",
            "tokens saved": f"{1 - engine['tokens'] / plain['tokens']:.0%}",
            "Jaccard": f"{top_k_jaccard(engine['values'], plain['values'], k):.2f}"})
    return pd.DataFrame(rows).fillna(_NONE).set_index("teacher")


def _question(frame):
    first = frame.iloc[0]
    return {"teacher": first["aligned"]["teacher"], "tokens a candidate": f"{first['num_tokens']:,}",
            "higher rate": f"{MatchSettings.from_numbers(first['settings']).attention_learning_rate:g}"}


def _loops(frame):
    return {row["loop"]: row for _, row in frame.iterrows() if pd.isna(row["reason"])}


def _agreement(frame, row, loop):
    """Compare a loop's `row` with another `loop` of `frame`; empty without it."""
    other = _loops(frame).get(loop)
    if other is None:
        return {}
    values, others = row["values"], other["values"]
    agreement = {"times as fast": other["seconds"] / row["seconds"], "Spearman": spearman(values, others),
                 **{f"Jaccard at {100 * b:g}%": top_k_jaccard(values, others, budget_layers(b, len(values)))
                    for b in (0.125, 0.25, 0.5)}}
    return {name: f"{value:.2f}" for name, value in agreement.items()}
