"""Figures of the speed study: those that draw take a table of `SpeedStudy` and return a list, empty without records."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hybridlib.bench.operators import OPERATORS
from hybridlib.bench.step import PHASES
from hybridlib.checks import check_choice
from hybridlib.report import plots
from hybridlib.report.kernel_tables import scaling_points
from hybridlib.report.speed import LOSSES, decoding_table, step_bars, step_losses
from hybridlib.report.style import MUTED, Plot, finish, house_style, log_ticks, look

__all__ = ["decoding_figures", "kernel_figures", "loss_figures", "operator_curves", "operator_figures", "step_figures"]

_PHASES = dict(zip(PHASES, ("teacher's pass", "student's pass", "objective", "backward", "optimizer")))
_CLOCKS = {"seconds": "microseconds a token, as launched", "gpu_seconds": "microseconds a token, GPU time"}


def operator_curves(frame: pd.DataFrame, clock: str = "seconds") -> pd.DataFrame:
    """Rows for a figure of time against length: ``panel``, ``backend``, ``time``, and microseconds a token.

    Columns ``microseconds``, of the clock ``"seconds"`` (as launched) or ``"gpu_seconds"``, and ``floor``. Shapes with
    the heads and dim that most shapes have; of those of one length, the one with most tokens. Softmax attention is
    repeated beside each operator. Empty if nothing was timed by that clock.
    """
    check_choice("clock", clock, ("seconds", "gpu_seconds"))
    rows = frame[frame["reason"].isna()] if len(frame) else frame
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


def kernel_figures(frame: pd.DataFrame) -> list[Figure]:
    """Seconds of each kernel against its programs, both logarithmic, a panel an operator, dim and call.

    A dashed line stands at the number of multiprocessors, up to which each program has one of its own.
    """
    points = scaling_points(frame)
    if points.empty:
        return []
    names, kernels = list(dict.fromkeys(points["panel"])), list(dict.fromkeys(points["kernel"]))
    edge = {"color": MUTED, "linewidth": 0.9, "linestyle": (0, (5, 2))}
    with house_style():
        figure = Plot(figsize=(7, 0.9 + 2.5 * -(-len(names) // 2)), layout="constrained")
        grid = figure.subplots(-(-len(names) // 2), 2, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(names):]:
            axes.remove()
        for axes, name in zip(grid.flat, names):
            part = points[points["panel"] == name]
            for i, kernel in enumerate(kernels):
                line = part[part["kernel"] == kernel].sort_values("programs")
                axes.plot(line["programs"], line["microseconds"], **look(i), markeredgecolor="white", markersize=6,
                          markeredgewidth=0.6)
            axes.axvline(part["multiprocessors"].iloc[0], **edge, zorder=1)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.grid()
            axes.set_title(name, fontsize=8, loc="left")
        log_ticks(grid[0, 0].xaxis, *grid[0, 0].get_xlim())
        log_ticks(grid[0, 0].yaxis, *grid[0, 0].get_ylim())
        figure.supxlabel("programs of the kernel", fontsize=9)
        figure.supylabel("microseconds", fontsize=9)
        handles = [Line2D([], [], **look(i), label=kernel) for i, kernel in enumerate(kernels)]
        return [finish(figure, [*handles, Line2D([], [], **edge, label="multiprocessors")])]
