"""Figures of selectors: what they keep, seed by seed, and what their quality costs. As in `plots`, one Figure each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator

from hybridlib.checks import check_choice, check_int
from hybridlib.report.style import (COLOURS, INK, Limits, MUTED, finish, house_style, layer_ticks, log_ticks, look,
                                    new_figure)
from hybridlib.selection.agreement import RANGES, interval

__all__ = ["choice_map", "quality_and_cost"]

_AROUND = np.array([(1, 1), (-1, 1), (1, -1), (-1, -1), (1.3, 0), (-1.3, 0), (0, 1.3), (0, -1.3),
                    (0, 2.4), (0, -2.4), (1, 2.4), (1, -2.4), (-1, 2.4), (-1, -2.4)])
_NEAR = 0.03  # of an axis: points closer than this share a label


def choice_map(choices: Mapping[str, Sequence[Iterable[int]]], num_layers: int) -> Figure:
    """How often each selector keeps each layer: a line a selector, a cell a layer, filled from below by share of seeds.

    Parameters
    ----------
    choices : label -> a set of layers for each seed.

    Raises ValueError if a layer is not from 0 to ``num_layers - 1``, or a label has no set.
    """
    check_int("num_layers", num_layers, 1)
    shares = {}
    for label, sets in choices.items():
        sets = [set(layers) for layers in sets]
        if not sets or any(not 0 <= l < num_layers for layers in sets for l in layers):
            raise ValueError(f"choices[{label!r}]={sets} is no list of sets of layers from 0 to {num_layers - 1}")
        shares[label] = [sum(l in layers for layers in sets) / len(sets) for l in range(num_layers)]
    if not shares:
        raise ValueError("choices={} shows nothing; give at least one label")
    with house_style():
        figure, axes = new_figure(min(7, 3 + 0.3 * num_layers), 0.85 + 0.27 * len(shares))
        for row, line in enumerate(shares.values()):
            for layer, share in enumerate(line):
                left, below = layer - 0.41, row + 0.38  # the axis points down
                axes.add_patch(Rectangle((left, below), 0.82, -0.76, facecolor="white", edgecolor="#bdbdbd",
                                         linewidth=0.7))
                axes.add_patch(Rectangle((left, below), 0.82, -0.76 * share, facecolor=COLOURS[0], linewidth=0))
        axes.set_xlim(-0.7, num_layers - 0.3)
        axes.set_ylim(len(shares) - 0.45, -0.55)
        axes.set_yticks(range(len(shares)), list(shares), fontsize=9)
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        layer_ticks(axes, num_layers)
        return finish(figure)


def quality_and_cost(frame: pd.DataFrame, value: str, cost: str, front: Sequence[str], *, ylabel: str, xlabel: str,
                     log: bool = False, confidence: float = 0.95) -> Figure:
    """A metric against what choosing cost: a number a selector, filled on the front, which a line joins.

    Parameters
    ----------
    frame : one row a selector and seed, with ``selector`` and ``needs``; the point is the mean over seeds, with the
        metric's Student's t interval, cut to what it can be.
    value, cost : columns; cost is logarithmic, and what costs nothing stands at the left end, marked 0.
    front : selectors to fill and to join, as `contest.front` gives them.
    log : the metric's axis is logarithmic.

    The numbers are explained beside the axes, in the frame's order; points that lie on one another share a label.
    """
    for column in (value, cost, "selector", "needs"):
        check_choice("column", column, tuple(frame.columns))
    rows = frame[frame[value].notna() & frame[cost].notna()]
    if rows.empty:
        raise ValueError(f"frame has no row with both {value!r} and {cost!r}; there is nothing to show")
    means = rows.groupby("selector", sort=False)[[cost, value]].mean()
    needs = rows.drop_duplicates("selector").set_index("selector")["needs"]
    kinds, paid = list(dict.fromkeys(needs)), means[cost][means[cost] > 0]
    low, high = (paid.min(), paid.max()) if len(paid) else (1.0, 10.0)
    nothing = low / max((high / low) ** 0.15, 3)
    x, limits = means[cost].where(means[cost] > 0, nothing), Limits(log)
    with house_style():
        figure, axes = new_figure(7, max(3.6, 1 + 0.16 * len(means)))
        axes.set_xscale("log")
        for i, title in enumerate(means.index):
            ends = interval(rows.loc[rows["selector"] == title, value], confidence, RANGES.get(value))[1:]
            limits.add(rows.loc[rows["selector"] == title, value], ends)
            shape = look(kinds.index(needs[title]), line=False) | {"markersize": 7, "markeredgewidth": 1.2}
            axes.vlines(x[title], *ends, color=shape["color"], linewidth=1, alpha=0.6, zorder=2)
            axes.plot(x[title], means.loc[title, value], **shape, zorder=4 + (title in front),
                      **({} if title in front else {"markerfacecolor": "white"}))
        axes.plot([x[t] for t in front], [means.loc[t, value] for t in front], color=INK, linewidth=1,
                  linestyle=(0, (5, 2)), zorder=3, drawstyle="steps-post")
        axes.set_xlim(nothing / (high / nothing) ** 0.05, high * (high / nothing) ** 0.05)
        axes.set_ylim(*limits.span())
        if log:
            axes.set_yscale("log")
            log_ticks(axes.yaxis, *limits.span())
        if (means[cost] == 0).any():
            ticks = [t for t in 10.0 ** np.arange(np.ceil(np.log10(low * 0.9)), np.log10(high * 2))]
            axes.xaxis.set_major_locator(FixedLocator([nothing, *ticks]))
            axes.set_xticklabels(["0", *(f"$10^{{{round(np.log10(t))}}}$" for t in ticks)])
        axes.minorticks_off()
        axes.grid()
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        _label(axes, [(x[t], means.loc[t, value], t in front) for t in means.index])
        for i, title in enumerate(means.index):
            for text, place, side in ((str(i + 1), 1.05, "right"), (title, 1.065, "left")):
                axes.annotate(text, (place, 1 - (i + 0.5) / len(means)), xycoords="axes fraction", ha=side,
                              va="center", fontsize=8, color=INK, weight="bold" if title in front else "normal",
                              annotation_clip=False)
        handles = [Line2D([], [], **look(i, line=False), label=f"needs {kind}") for i, kind in enumerate(kinds)]
        handles.append(Line2D([], [], color=INK, linewidth=1, linestyle=(0, (5, 2)), label="front (filled)"))
        return finish(figure, handles)


def _label(axes, points):
    """Numbers from 1 beside `points` (x, y, on the front); points that lie on one another have one label. Of the places
    around a point a label takes the first within the axes that no other point and no label before it lies in."""
    pixels = axes.transData.transform([p[:2] for p in points])
    places, scale = axes.transAxes.inverted().transform(pixels), axes.figure.dpi / 72
    left, taken = list(range(len(points))), []
    while left:
        near = [i for i in left if np.abs(places[i] - places[left[0]]).max() < _NEAR]
        left = [i for i in left if i not in near]
        text, others = ",".join(str(i + 1) for i in near), np.delete(pixels, near, axis=0)
        size = np.array([2 + 2 * len(text), 4])  # half of what 7 points of type take up

        def is_free(corner):
            middle = pixels[near[0]] + scale * corner * (4 + size)
            apart = [(np.abs(place - middle) > scale * (size + other)).any() for place, other in taken]
            within = axes.bbox.contains(*(middle - scale * size)) and axes.bbox.contains(*(middle + scale * size))
            return within and (np.abs(others - middle) > scale * (size + 4)).any(1).all() and all(apart)

        offset = next(filter(is_free, _AROUND), _AROUND[0]) * (4 + size)
        taken.append((pixels[near[0]] + scale * offset, size))
        axes.annotate(text, points[near[0]][:2], offset, textcoords="offset points", fontsize=7, ha="center",
                      va="center", color=INK if any(points[i][2] for i in near) else MUTED, zorder=6)
