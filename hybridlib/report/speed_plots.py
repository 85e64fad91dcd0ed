"""Figures of the speed study, each function from a table of `SpeedStudy` to a list of figures."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from hybridlib.bench.operators import OPERATORS
from hybridlib.bench.step import PHASES
from hybridlib.report import plots
from hybridlib.report.speed import decoding_table, measured

__all__ = ["decoding_figures", "loss_figures", "operator_curves", "operator_figures", "step_figures", "step_losses"]

_PHASES = dict(zip(PHASES, ("teacher's pass", "student's pass", "objective", "backward", "optimizer")))
_LOSSES = {"align": "stage 1: error of mixers, relative", "match": "stage 2: KL (nats a token)"}
_CLOCKS = {"seconds": "microseconds a token, as launched", "gpu_seconds": "microseconds a token, GPU time"}


def operator_curves(frame: pd.DataFrame, clock: str = "seconds") -> pd.DataFrame:
    """Prepare the figure of time against length: ``microseconds`` a token as launched (``"seconds"``) or on the GPU
    (``"gpu_seconds"``), at the commonest heads and dim, and of one length the most tokens. Softmax attention is
    repeated beside each operator."""
    rows = measured(frame)
    rows = rows[rows[clock].notna()] if clock in rows else rows[:0]
    if rows.empty:
        return pd.DataFrame()
    heads, dim = rows.groupby(["heads", "dim"])["time"].nunique().idxmax()
    rows = rows[(rows["heads"] == heads) & (rows["dim"] == dim)].sort_values(["batch"], kind="stable")
    rows = rows.drop_duplicates(["operator", "backend", "time", "direction", "dtype"], keep="last").sort_index()
    linear, softmax = rows[rows["operator"] != OPERATORS[2]], rows[rows["operator"] == OPERATORS[2]]
    names = list(dict.fromkeys(linear["operator"])) or [OPERATORS[2]]
    rows = pd.concat([linear, *(softmax.assign(operator=name) for name in names)])
    tokens = rows["batch"] * rows["time"]
    rows = rows.assign(panel=rows["operator"].str.replace("_", " ") + ", " + rows["direction"],
                       microseconds=1e6 * rows[clock].astype(float) / tokens,
                       floor=1e6 * rows["floor_seconds"].astype(float) / tokens)
    if len(linear):
        rows.loc[rows["backend"] == "softmax", "floor"] = float("nan")  # a panel's floor is that of its operator
    return rows[["panel", "backend", "batch", "time", "heads", "dim", "microseconds", "floor"]].reset_index(drop=True)


def operator_figures(frame: pd.DataFrame) -> list[Figure]:
    """Draw time a token against the length of a row, for each clock that was read, with the memory floor."""
    curves = {label: operator_curves(frame, clock) for clock, label in _CLOCKS.items()}
    return [plots.scaling_curves(rows, "time", "microseconds", "backend", panel="panel", floor="floor",
                                 xlabel="tokens in a row", ylabel=label) for label, rows in curves.items() if len(rows)]


def step_figures(frame: pd.DataFrame) -> list[Figure]:
    """Draw where the time of a training step goes, a bar a stage and loop."""
    bars = pd.DataFrame([{"bar": f"{row['stage']}, {row['loop']}"}
                         | {name: 1e3 * row[f"{name}_seconds"] for name in PHASES}
                         for _, row in measured(frame).iterrows()])
    return [plots.breakdown(bars, _PHASES, "bar", xlabel="milliseconds a step")] if len(bars) else []


def loss_figures(frame: pd.DataFrame) -> list[Figure]:
    """Draw the loss of every timed step, a figure a stage: both loops, and the other precision."""
    return [plots.loss_curves(loops, _LOSSES[stage]) for stage, loops in step_losses(frame).items()]


def step_losses(frame: pd.DataFrame) -> dict[str, dict[str, tuple[list, list]]]:
    """Collect losses by stage and loop, e.g. ``"plain loop, float32"``: (tokens trained on, losses)."""
    stages = {}
    for _, row in measured(frame).iterrows():
        curves = stages.setdefault(row["stage"], {})
        curves[f"{row['loop']} loop"] = row["loss_tokens"], row["loss"]
        if isinstance(row.get("noise_loss"), list):
            curves[f"{row['loop']} loop, {row['noise_dtype']}"] = row["loss_tokens"], row["noise_loss"]
    return stages


def decoding_figures(frame: pd.DataFrame) -> list[Figure]:
    """Draw the cache's memory and tokens a second, by each clock, against the context: a line a share."""
    table = decoding_table(frame)
    columns = {"cache_mib": "cache (MiB)", "tokens_per_second": "tokens a second, as launched",
               "gpu_tokens_per_second": "tokens a second, GPU time"}
    return [plots.scaling_curves(table, "context", column, "label", xlabel="tokens of context", ylabel=text)
            for column, text in columns.items() if len(table) and table[column].notna().any()]
