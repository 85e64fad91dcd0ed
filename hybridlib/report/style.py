"""The house style of figures: readable in grey, for each colour goes with a marker and a line style. matplotlib's
global settings are not touched."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

__all__ = ["COLOURS", "INK", "MEASURES", "MUTED", "PALE", "Plot", "axis_limits", "dodge", "finish", "format_interval",
           "format_number", "house_style", "label_of", "layer_ticks", "log_ticks", "look", "mebibytes", "milliseconds",
           "new_figure", "plain_axes"]

INK, MUTED, PALE = "#1a1a1a", "#6e6e6e", "#c9c9c9"
COLOURS = ("#0b3c6f", "#d55e00", "#5fb4ea", "#7b2d5e", "#e8a33d", "#1b7f5c", "#8a8a8a")
_LINES = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 1.6, 1, 1.6)), (0, (3, 1)), (0, (8, 3)), (0, (2, 3)))

_STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK,
    "axes.labelsize": 9, "axes.labelcolor": INK, "axes.labelpad": 6, "axes.edgecolor": MUTED, "axes.linewidth": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": "#e6e6e6", "grid.linewidth": 0.7,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.major.size": 3, "ytick.major.size": 3,
    "xtick.major.width": 0.7, "ytick.major.width": 0.7, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "legend.frameon": False, "legend.fontsize": 8.5, "legend.handletextpad": 0.6, "legend.columnspacing": 1.8,
    "lines.linewidth": 1.4, "lines.markersize": 5, "hatch.linewidth": 0.6,
    "figure.dpi": 120, "figure.facecolor": "white", "savefig.facecolor": "white", "savefig.dpi": 200,
    "figure.constrained_layout.h_pad": 0.06, "figure.constrained_layout.w_pad": 0.06,
    "svg.hashsalt": "hybridlib",  # the same figure gives the same file
}


class Measure(NamedTuple):
    name: str
    unit: str
    better: str  # "lower" or "higher"


MEASURES = {"kl": Measure("held-out KL", "nats a token", "lower"), "perplexity": Measure("perplexity", "", "lower"),
            "top1_agreement": Measure("top-1 agreement", "share of tokens", "higher"),
            "recall_exact": Measure("recall", "share exact", "higher"),
            "recall_composite": Measure("recall composite", "share right", "higher")}


def label_of(column: str) -> str:
    """Name a metric with its unit; any other column keeps its own name."""
    if column not in MEASURES:
        return column
    name, unit, _ = MEASURES[column]
    return f"{name} ({unit})" if unit else name


@contextmanager
def house_style():
    """Draw with the study's style inside the block; matplotlib's settings are put back after it."""
    with mpl.rc_context(mpl.rcParamsDefault | _STYLE):
        yield


class Plot(Figure):
    """A matplotlib Figure that a notebook shows once, as SVG and PNG, without pyplot."""

    def _repr_svg_(self) -> str:
        return self._file("svg", {"Date": None}).decode()

    def _repr_png_(self) -> bytes:
        return self._file("png", {"Software": None})

    def _file(self, kind: str, metadata: dict) -> bytes:
        with house_style():
            file = io.BytesIO()
            self.savefig(file, format=kind, metadata=metadata)
        return file.getvalue()


def axis_limits(values: Sequence, bounds: Sequence = (), log: bool = False) -> tuple[float, float]:
    """Find the limits of an axis that follows `values`; intervals, `bounds`, get at most as much room again."""
    values, bounds = np.ravel(values).astype(float), np.ravel(bounds).astype(float)
    bounds = bounds[np.isfinite(bounds) & ((bounds > 0) | (not log))]
    if log:
        values, bounds = np.log(values), np.log(bounds)
    room = np.ptp(values) or 0.1 * abs(values[0]) or 1.0
    ends = np.concatenate([values, bounds])
    low, high = max(ends.min(), values.min() - room), min(ends.max(), values.max() + room)
    margin = 0.06 * ((high - low) or room)
    span = low - margin, high + margin
    return tuple(float(end) for end in (np.exp(span) if log else span))


def look(i: int, *, line: bool = True) -> dict:
    """Return the i-th label's colour, marker and line style (none unless `line`) as keywords of matplotlib's `plot`."""
    return {"color": COLOURS[i % 7], "marker": "osD^vPX"[i % 7], "linestyle": _LINES[i % 7] if line else ""}


def new_figure(width: float, height: float, layout: str = "constrained") -> tuple[Figure, Axes]:
    """Make a `Plot` of `width` by `height` inches and its one axes."""
    figure = Plot(figsize=(width, height), layout=layout)
    return figure, figure.add_subplot()


def finish(figure: Figure, handles: Sequence = ()) -> Figure:
    """Put the legend of `handles`, if any, above the axes, and lay the figure out while the style holds."""
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 5))
    figure.draw_without_rendering()  # matplotlib makes ticks at the first draw, with the settings of that moment
    figure.set_layout_engine(None)  # or each file would be laid out again, twice as long as it takes to draw
    return figure


def plain_axes(axes: Axes) -> None:
    """Take away the ticks and the frame of axes whose rows and columns are names."""
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)


def dodge(count: int, step: float) -> np.ndarray:
    """Return offsets (count,) around 0 that set labels beside each other, `step` apart or closer, within 0.6 in all."""
    return (np.arange(count) - (count - 1) / 2) * min(step, 0.6 / count)


def layer_ticks(axes: Axes, count: int) -> None:
    """Put layer numbers along the x axis, every one of them where there is room."""
    axes.set_xticks(range(0, count, 1 if count <= 32 else 2 if count <= 64 else 5))
    axes.tick_params(axis="x", labelsize=8 if count <= 24 else 7)
    axes.set_xlabel("layer (0 at the embedding)")


def log_ticks(axis, low: float, high: float) -> None:
    """Show ticks of a logarithmic axis as plain numbers, at least a few of them on a short axis."""
    steps = (1, 1.5, 2, 3, 5, 7) if high / low < 12 else (1, 2, 5) if high / low < 200 else (1,)
    axis.set_major_locator(MaxNLocator(5) if high / low < 3 else LogLocator(subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def format_number(value: float, digits: int) -> str:
    """Format `value` with `digits` decimals and a true minus sign; what rounds to zero has none."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\u2212")


def format_interval(mean: float, low: float, high: float, digits: int) -> str:
    """Format ``mean [low, high]``, or the mean alone if there is no interval."""
    text = format_number(mean, digits)
    return f"{text} [{format_number(low, digits)}, {format_number(high, digits)}]" if np.isfinite(low) else text


def milliseconds(timing: Mapping, clock: str = "") -> str:
    """Format a timing as ``median [low, high]``, or a dash; `clock` goes before its names: ``"gpu_"``."""
    if pd.isna(timing.get(f"{clock}seconds")):
        return "\u2013"
    median, low, high = (1e3 * timing[clock + name] for name in ("seconds", "low", "high"))
    return f"{median:.3g} [{low:.3g}, {high:.3g}]"


def mebibytes(count: float | None) -> str:
    """Format bytes as whole MiB; a dash if they were not counted."""
    return "\u2013" if pd.isna(count) else f"{count / 2**20:,.0f}"
