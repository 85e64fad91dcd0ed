"""The study's figures: each function takes records' numbers and returns one matplotlib Figure, without a title. Higher
scores mean keep; layers count from 0, next to the embedding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.transforms import offset_copy

from hybridlib.checks import check_int
from hybridlib.models.hybrid import check_layers
from hybridlib.report.style import (COLOURS, INK, MEASURES, MUTED, PALE, Plot, axis_limits, dodge, finish,
                                    format_interval, format_number, house_style, label_of, layer_ticks, log_ticks,
                                    look, new_figure, plain_axes)
from hybridlib.selection.agreement import RANGES, bootstrap_interval, interval, spearman

__all__ = ["agreement_matrix", "breakdown", "comparison", "dot_intervals", "heat_map", "layer_map", "layer_scores",
           "loss_curves", "race_rounds", "rank_scatter", "scaling_curves", "scatter_panels"]

_OUTLINE = "#bdbdbd"
_DASHED = {"color": MUTED, "linewidth": 0.8, "linestyle": (0, (5, 2)), "zorder": 1}
_DOTTED = {"color": INK, "linewidth": 0.9, "linestyle": (0, (2, 2))}


def layer_scores(scores: Mapping[str, Sequence], ylabel: str = "importance (higher = keep)", *,
                 keep: Mapping[str, Iterable[int]] | None = None) -> Figure:
    """Draw each layer's score, mean over seeds with its 95% interval (Student's t), filled if in `keep` (label ->
    layers). `scores` is label -> array (seeds, layers), or (layers,) for one seed."""
    arrays = {label: np.atleast_2d(np.asarray(values, dtype=float)) for label, values in scores.items()}
    values = np.concatenate(list(arrays.values()))
    layers, beside, bounds = np.arange(values.shape[1]), dodge(len(arrays), 0.18), []
    with house_style():
        figure, axes = new_figure(7, 2.9)
        for i, (label, by_seed) in enumerate(arrays.items()):
            x, style = layers + beside[i], look(i, line=False) | {"markeredgewidth": 1.2, "zorder": 4}
            mean, low, high = np.array([interval(column) for column in by_seed.T]).T
            bounds += [low, high]
            axes.plot(x, mean, color=COLOURS[i % 7], linestyle=look(i)["linestyle"], linewidth=0.8, alpha=0.45)
            axes.vlines(x, low, high, color=COLOURS[i % 7], linewidth=1.2, zorder=3)
            filled = np.isin(layers, list(keep.get(label, ()))) if keep is not None else np.ones(len(x), bool)
            axes.plot(x[filled], mean[filled], **style)
            axes.plot(x[~filled], mean[~filled], **style, markerfacecolor="white")
        axes.set_xlim(-0.7, len(layers) - 0.3)
        axes.set_ylim(*axis_limits(values, bounds))
        axes.grid(axis="y")
        layer_ticks(axes, len(layers))
        axes.set_ylabel(ylabel)
        handles = [Line2D([], [], **look(i, line=False), label=label) for i, label in enumerate(arrays)
                   if len(arrays) > 1]
        if keep is not None:
            handles += [Line2D([], [], linestyle="", marker="o", color=MUTED, markerfacecolor=face, label=text)
                        for face, text in ((MUTED, "filled: kept"), ("white", "hollow: not kept"))]
        return finish(figure, handles)


def rank_scatter(x: Sequence[float], y: Sequence[float], xlabel: str, ylabel: str, *, k: int | None = None) -> Figure:
    """Draw two rankings of the same layers by scores `x` and `y` (layers,), higher = keep, with Spearman's correlation
    and its 95% bootstrap interval; layers that both put within the budget `k` are filled."""
    rho = bootstrap_interval(spearman, x, y)
    ranks = np.array([pd.Series(np.asarray(s, dtype=float)).rank(ascending=False) for s in (x, y)])
    count = ranks.shape[1]
    if k is not None:
        check_int("k", k, 1, count)
    both = (ranks <= (k or 0)).all(0)
    with house_style():
        figure, axes = new_figure(4.4, 4.4)
        axes.set_aspect("equal")
        axes.plot([0, count + 1], [0, count + 1], color=PALE, linewidth=1, zorder=1)
        if k is not None:
            axes.axvline(k + 0.5, **_DASHED)
            axes.axhline(k + 0.5, **_DASHED)
        axes.scatter(*ranks, s=float(np.clip(3600 / count, 95, 190)), c=np.where(both, COLOURS[0], "white"),
                     edgecolors=COLOURS[0], linewidths=1, zorder=3)
        for layer, place in enumerate(ranks.T):
            axes.annotate(str(layer), place, ha="center", va="center_baseline", fontsize=7 if count > 20 else 7.5,
                          color="white" if both[layer] else INK, zorder=4)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks([r for r in range(1, count + 1) if r == 1 or r % (5 if count > 12 else 2) == 0])
        axes.set_xlim(0, count + 1)
        axes.set_ylim(count + 1, 0)  # rank 1 at the top
        axes.set_xlabel(f"rank by {xlabel} (1 = kept first)")
        axes.set_ylabel(f"rank by {ylabel} (1 = kept first)")
        text = f"Spearman {format_interval(*rho, 2)}" if np.isfinite(rho[0]) else "Spearman undefined"
        axes.text(1, 1.015, text, transform=axes.transAxes, ha="right", va="bottom")
        return finish(figure)


def comparison(frame: pd.DataFrame, value: str, label: str = "selector", *, xlabel: str | None = None,
               group: str | None = None, reference: float | None = None, reference_label: str = "teacher",
               log: bool = False) -> Figure:
    """Draw a metric of several selections: a dot a seed, the mean, and its 95% interval (Student's t, cut to
    `agreement.RANGES`). `frame` has one row a run, of which those without `value` are left out; `value`, `label` and
    `group` are its columns; a line marks `reference`; `log` takes values above 0."""
    rows = frame.dropna(subset=[value])
    if log and not (rows[value] > 0).all():
        raise ValueError(f"frame has {value!r} of {rows[value].min()}; a logarithmic axis needs values above 0")
    labels, groups = list(dict.fromkeys(rows[label])), list(dict.fromkeys(rows[group])) if group else [None]
    beside, bounds = dodge(len(groups), 0.3), []
    styles = [look(j, line=False) | {"markersize": 6.5, "markeredgewidth": 1.5} | (
        {"markerfacecolor": "white"} if j % 2 else {}) for j in range(len(groups))]
    with house_style():
        figure, axes = new_figure(7, 0.95 + len(labels) * (0.2 + 0.22 * len(groups)))
        below = offset_copy(axes.transData, figure, y=-6.5, units="points")
        for (name, part), runs in rows.groupby([rows[label], rows[group] if group else rows[label]], sort=False):
            j = groups.index(part) if group else 0
            values, y = runs[value].to_numpy(dtype=float), labels.index(name) + beside[j]
            mean, low, high = interval(values, within=RANGES.get(value))
            bounds += [low, high]
            axes.hlines(y, low, high, color=COLOURS[j % 7], linewidth=2, zorder=3)
            if len(values) > 1:
                axes.plot(values, np.full(len(values), y), ".", color=MUTED, markersize=4.5, transform=below)
            axes.plot(mean, y, **styles[j], zorder=5)
            axes.annotate(format_interval(mean, low, high, 3), (1.02, y), va="center", fontsize=8,
                          xycoords=("axes fraction", "data"), annotation_clip=False)
        if reference is not None:
            axes.axvline(reference, color=INK, linestyle=(0, (5, 2)), linewidth=1, zorder=2)
            axes.annotate(f"{reference_label} {format_number(reference, 3)}", (reference, 1), (0, 2), fontsize=8,
                          xycoords=("data", "axes fraction"), textcoords="offset points", ha="center", va="bottom")
        limits = axis_limits([*rows[value], *([] if reference is None else [reference])], bounds, log)
        axes.set_xlim(*limits)
        if log:
            axes.set_xscale("log")
            log_ticks(axes.xaxis, *limits)
        _bars(axes, labels)
        better = f", {MEASURES[value].better} is better" if value in MEASURES else ""
        axes.set_xlabel(label_of(value) + better if xlabel is None else xlabel)
        handles = [Line2D([], [], **style | {"linestyle": "-", "linewidth": 2}, label=str(part))
                   for part, style in zip(groups, styles)]
        return finish(figure, handles if group else ())


def layer_map(selections: Mapping[str, Iterable[Iterable[int]]], num_layers: int) -> Figure:
    """Draw the share of seeds in which each selector keeps each layer; `selections` is label -> each seed's layers."""
    sets = {label: [check_layers(layers, num_layers) for layers in by_seed] for label, by_seed in selections.items()}
    linear = {"facecolor": "white", "edgecolor": _OUTLINE, "linewidth": 0.7}
    softmax = {"facecolor": COLOURS[0], "linewidth": 0}
    with house_style():
        figure, axes = new_figure(min(7, 2.7 + 0.3 * num_layers), 0.85 + 0.28 * len(sets))
        cells = {"all": [], "filled": []}  # collections, for hundreds of patches take seconds
        for row, by_seed in enumerate(sets.values()):
            for layer in range(num_layers):
                share = sum(layer in layers for layers in by_seed) / len(by_seed)
                for part, height in (("all", 0.74), ("filled", 0.74 * share)):
                    cells[part].append(Rectangle((layer - 0.41, row + 0.37), 0.82, -height))  # the axis points down
            axes.annotate(f"{len(by_seed[0])} of {num_layers}", (1.01, row), va="center", fontsize=8, color=MUTED,
                          xycoords=("axes fraction", "data"), annotation_clip=False)
        for part, style in (("all", linear), ("filled", softmax)):
            axes.add_collection(PatchCollection(cells[part], **style), autolim=False)
        axes.set_xlim(-0.7, num_layers - 0.3)
        axes.set_ylim(len(sets) - 0.45, -0.55)
        layer_ticks(axes, num_layers)
        axes.set_yticks(range(len(sets)), list(sets), fontsize=9)
        plain_axes(axes)
        return finish(figure, [Rectangle((0, 0), 1, 1, **softmax, label="softmax"),
                               Rectangle((0, 0), 1, 1, **linear, label="linear")])


def loss_curves(curves: Mapping[str, tuple[Sequence, Sequence]], ylabel: str = "loss") -> Figure:
    """Draw loss, logarithmic, against tokens trained on; `curves` is label -> (tokens, losses), both (points,)."""
    lines = {label: np.asarray(pair, dtype=float) for label, pair in curves.items()}
    if not all((losses > 0).all() for _, losses in lines.values()):
        raise ValueError("curves has a loss that is not above 0; a logarithmic axis cannot show it")
    most = max(tokens.max() for tokens, _ in lines.values())
    units = ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)"), (0, ""))
    unit, word = next((unit or 1, word) for unit, word in units if most >= unit)
    with house_style():
        figure, axes = new_figure(7, 3)
        for i, (label, (tokens, losses)) in enumerate(lines.items()):
            step = max(1, len(tokens) // 8)
            axes.plot(tokens / unit, losses, **look(i), markevery=(step * (i + 1) // (len(lines) + 1), step),
                      markeredgecolor="white", markeredgewidth=0.6, markersize=6, zorder=3)
        axes.set_yscale("log")
        log_ticks(axes.yaxis, *axes.get_ylim())
        axes.set_xlim(left=0)
        axes.grid(axis="y")
        axes.set_xlabel(f"tokens{word}")
        axes.set_ylabel(ylabel)
        handles = [Line2D([], [], **look(i), label=label) for i, label in enumerate(lines)]
        return finish(figure, handles if len(lines) > 1 else ())


def agreement_matrix(labels: Sequence[str], matrix: Sequence, measure: str = "Jaccard similarity", *,
                     digits: int = 2) -> Figure:
    """Draw `matrix` (n, n), within [-1, 1], of every pair of `labels` (n,) as a heat map; nan is hatched."""
    values = np.asarray(matrix, dtype=float)
    return heat_map(values, (labels, labels), measure, ["#f2f5f8", "#9cc3e0", "#2f6ea8", "#0b2a4f"],
                    (-1 if np.nanmin(values, initial=0) < 0 else 0, 1), digits=digits)


def heat_map(values: np.ndarray, names: tuple[Sequence[str], Sequence[str]], measure: str, colours: Sequence[str],
             limits: tuple[float, float], *, digits: int = 2, bold: np.ndarray | None = None) -> Figure:
    """Draw numbers (rows, columns) in coloured cells; nan is hatched, what a mask hides is left out. `names` are of
    rows and of columns, `limits` the numbers at the ends of `colours`; `bold` is (rows, columns)."""
    values, (low, high) = np.ma.asarray(values), limits
    size = 8.5 if len(values) <= 9 else 6.5 if len(values) <= 18 else 5
    gradient = LinearSegmentedColormap.from_list("house", list(colours))
    with house_style():
        side = min(6, 1.4 + 0.62 * len(names[0]))
        figure, axes = new_figure(side + 1.2, side, layout="compressed")
        mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap=gradient, vmin=low, vmax=high, edgecolors="white",
                               linewidth=1.5)
        for (row, column), number in np.ndenumerate(values.data):
            if np.ma.getmaskarray(values)[row, column]:
                continue
            if np.isnan(number):
                axes.add_patch(Rectangle((column + 0.03, row + 0.03), 0.94, 0.94, facecolor="white", hatch="////",
                                         edgecolor=_OUTLINE, linewidth=0))
                continue
            dark = np.dot(gradient((number - low) / (high - low))[:3], (0.3, 0.59, 0.11)) < 0.55
            axes.text(column + 0.5, row + 0.5, format_number(number, digits), ha="center", va="center_baseline",
                      fontsize=size, fontweight="bold" if bold is not None and bold[row, column] else "normal",
                      color="white" if dark else INK)
        axes.set_aspect("equal")
        axes.set_ylim(len(names[0]), 0)
        slanted = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names[1])) > 7 else {}
        axes.set_xticks(np.arange(len(names[1])) + 0.5, names[1], fontsize=9, **slanted)
        axes.set_yticks(np.arange(len(names[0])) + 0.5, names[0], fontsize=9)
        plain_axes(axes)
        bar = figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.03, label=measure)
        bar.outline.set(linewidth=0.7, edgecolor=MUTED)
        return finish(figure)


def scaling_curves(frame: pd.DataFrame, x: str, y: str, label: str, *, xlabel: str, ylabel: str,
                   panel: str | None = None, floor: str | None = None) -> Figure:
    """Draw how `y` grows with `x`, both logarithmic: a line a label, a panel for each value of column `panel`. Rows
    without `y` are left out; `floor` is a column that `y` cannot be below, dotted."""
    rows = frame.dropna(subset=[y])
    if not (rows[[x, y]] > 0).all(axis=None):
        raise ValueError(f"frame has {x!r} or {y!r} of {rows[[x, y]].min().min()}; logarithmic axes need more than 0")
    panels, labels = list(dict.fromkeys(rows[panel])) if panel else [None], list(dict.fromkeys(rows[label]))
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    with house_style():
        figure = Plot(figsize=(7 if across > 1 else 5.2, 0.7 + 2.5 * down), layout="constrained")
        grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(panels):]:
            axes.remove()
        for axes, name in zip(grid.flat, panels):
            part = rows[rows[panel] == name] if panel else rows
            for i, text in enumerate(labels):
                line = part[part[label] == text].sort_values(x)
                axes.plot(line[x], line[y], **look(i), markeredgecolor="white", markeredgewidth=0.6, markersize=6)
            if floor:
                least = part.groupby(x)[floor].min()
                axes.plot(least.index, least, **_DOTTED, zorder=1)
            axes.set_xscale("log")
            axes.set_yscale("log")
            ticks = sorted(rows[x].unique())
            axes.set_xticks(ticks, [f"{value / 1024:g}k" if value % 1024 == 0 else f"{value:g}" for value in ticks])
            axes.minorticks_off()
            axes.grid()
            axes.set_title(name or "", fontsize=9, loc="left")
        log_ticks(grid[0, 0].yaxis, *grid[0, 0].get_ylim())
        figure.supxlabel(xlabel, fontsize=9)
        figure.supylabel(ylabel, fontsize=9)
        handles = [Line2D([], [], **look(i), label=str(text)) for i, text in enumerate(labels)]
        return finish(figure, handles + ([Line2D([], [], **_DOTTED, label="memory floor")] if floor else []))


def breakdown(frame: pd.DataFrame, parts: Mapping[str, str], label: str, *, xlabel: str) -> Figure:
    """Draw what makes up a whole: a bar a row of `frame`, cut into `parts`, column -> name."""
    names = list(parts)
    hatches = ("", "////", "", "....", "\\\\\\\\", "xx", "")
    styles = [{"facecolor": COLOURS[i % 7], "hatch": hatches[i % 7], "edgecolor": "white"} for i in range(len(names))]
    ends = frame[names].to_numpy(dtype=float).cumsum(1)
    with house_style():
        figure, axes = new_figure(7, 0.95 + 0.42 * len(frame))
        for i, name in enumerate(names):
            axes.barh(range(len(frame)), frame[name], left=ends[:, i] - frame[name], height=0.66, **styles[i])
        for row, total in enumerate(ends[:, -1]):
            axes.annotate(f"{total:.3g}", (total, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
        _bars(axes, frame[label])
        axes.margins(x=0.08)
        axes.set_xlabel(xlabel)
        return finish(figure, [Rectangle((0, 0), 1, 1, **style, label=parts[n]) for style, n in zip(styles, names)])


def dot_intervals(frame: pd.DataFrame, values: Mapping[str, str], *, limits: tuple[float, float] = (-1, 1)) -> Figure:
    """Draw numbers with their intervals: a panel for each of `values`, column -> heading, a line a row of `frame`. The
    interval is that of the columns ``{value}_low`` and ``{value}_high``; all is cut to `limits`."""
    with house_style():
        figure = Plot(figsize=(7, 0.9 + 0.26 * len(frame)), layout="constrained")
        panels = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
        for i, (axes, (value, heading)) in enumerate(zip(panels, values.items())):
            ends = frame[[value, f"{value}_low", f"{value}_high"]].clip(*limits).to_numpy(dtype=float).T
            rows = np.arange(len(frame))
            axes.hlines(rows, ends[1], ends[2], color=COLOURS[i % 7], linewidth=2, zorder=3)
            axes.plot(ends[0], rows, **look(i, line=False) | {"markersize": 6}, zorder=4)
            axes.set_xlim(*axis_limits([0, *ends[0][np.isfinite(ends[0])]], ends[1:]))
            axes.axvline(0, **_DASHED)
            _bars(axes, frame.index)
            axes.set_xlabel(heading)
        return finish(figure)


def scatter_panels(frame: pd.DataFrame, y: str, columns: Sequence[str], *, ylabel: str) -> Figure:
    """Draw column `y` of `frame` against each of `columns`, a panel each, with Spearman's correlation."""
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    with house_style():
        figure = Plot(figsize=(7, 0.5 + 2.1 * down), layout="constrained")
        grid = figure.subplots(down, across, sharey=True, squeeze=False)
        for axes in grid.flat[len(columns):]:
            axes.remove()
        for axes, name in zip(grid.flat, columns):
            axes.plot(frame[name], frame[y], "o", color=COLOURS[0], markersize=4.5, markeredgecolor="white",
                      markeredgewidth=0.5)
            axes.set_xlabel(name)
            axes.grid()
            axes.set_title(f"Spearman {format_number(float(spearman(frame[name], frame[y])), 2)}", fontsize=8.5,
                           loc="right")
        figure.supylabel(ylabel, fontsize=9)
        return finish(figure)


def race_rounds(table: pd.DataFrame) -> Figure:
    """Draw every set of a `sets.race_table`: its KL at the end of each round that it was in, until it was out; the set
    that won is dark."""
    winner = table.sort_values(["round", "rank"]).drop_duplicates("round", keep="first")["layers"].iloc[-1]
    own = {"markeredgecolor": "white", "markeredgewidth": 0.5}
    with house_style():
        figure, axes = new_figure(7, 3)
        for layers, line in table.groupby("layers"):
            style = {"color": PALE, "zorder": 2}
            if layers == winner:
                style = {"color": COLOURS[1], "linewidth": 2, "zorder": 4}
            axes.plot(line["tokens"], line["kl"], marker="o", markersize=5, **style, **own)
        out = table[table["last"] & (table["layers"] != winner)]
        axes.plot(out["tokens"], out["kl"], "o", color=MUTED, markersize=5, zorder=3, **own)
        axes.set_xscale("log")
        axes.set_xticks(sorted(table["tokens"].unique()), [f"{n:,}" for n in sorted(table["tokens"].unique())])
        axes.minorticks_off()
        axes.grid()
        axes.set_xlabel("tokens of stage 2 a set, at the end of each round")
        axes.set_ylabel(label_of("kl"))
        return finish(figure, [Line2D([], [], color=COLOURS[1], linewidth=2, marker="o", label="the set that is left"),
                               Line2D([], [], color=MUTED, linestyle="", marker="o", label="out after this round")])


def _bars(axes, names):
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), [str(name) for name in names], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
