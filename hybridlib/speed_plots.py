"""Figures of the speed study: each function takes a table of `SpeedStudy` and returns a list, empty without records."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from . import plots
from .speed import decoding_table, operator_curves, step_bars
from .step_speed import LOSSES, PHASES, step_losses

__all__ = ["decoding_figures", "loss_figures", "operator_figures", "step_figures"]

_PHASES = dict(zip(PHASES, ("teacher's pass", "student's pass", "objective", "backward", "optimizer")))
_CLOCKS = {"seconds": "microseconds a token, as launched", "gpu_seconds": "microseconds a token, GPU time"}


def operator_figures(frame: pd.DataFrame) -> list[Figure]:
    """Time a token against the length of a row, for each clock that was read, with the memory floor."""
    curves = {label: operator_curves(frame, clock) for clock, label in _CLOCKS.items()}
    return [plots.scaling_curves(rows, "time", "microseconds", "backend", panel="panel", floor="floor",
                                 xlabel="tokens in a row", ylabel=label) for label, rows in curves.items() if len(rows)]


def step_figures(frame: pd.DataFrame) -> list[Figure]:
    """Where the time of a training step goes, a bar a stage and loop."""
    bars = step_bars(frame)
    return [plots.breakdown(bars, _PHASES, "bar", xlabel="milliseconds a step")] if len(bars) else []


def loss_figures(frame: pd.DataFrame) -> list[Figure]:
    """Loss of every timed step against tokens trained on, a figure a stage: both loops, and the other precision."""
    return [plots.loss_curves({f"{loop} loop": curve for loop, curve in loops.items()}, LOSSES[stage])
            for stage, loops in step_losses(frame).items()]


def decoding_figures(frame: pd.DataFrame) -> list[Figure]:
    """Memory of the cache and tokens a second, by each clock that was read, against the context: a line a share."""
    table = decoding_table(frame)
    columns = {"cache_mib": "cache (MiB)", "tokens_per_second": "tokens a second, as launched",
               "gpu_tokens_per_second": "tokens a second, GPU time"}
    return [plots.scaling_curves(table, "context", column, "label", xlabel="tokens of context", ylabel=text)
            for column, text in columns.items() if len(table) and table[column].notna().any()]
