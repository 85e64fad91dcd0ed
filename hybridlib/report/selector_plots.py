"""What the quality of a selector's choice costs: one Figure, as in `plots`."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from hybridlib.report.contest import COSTS, front
from hybridlib.report.style import INK, MUTED, axis_limits, finish, house_style, label_of, log_ticks, look, new_figure
from hybridlib.selection.agreement import RANGES, interval
from hybridlib.study.contest import Contest

__all__ = ["quality_and_cost"]

_AROUND = np.array([(1, 1), (-1, 1), (1, -1), (-1, -1), (1.3, 0), (-1.3, 0), (0, 1.3), (0, -1.3),
                    (0, 2.4), (0, -2.4), (1, 2.4), (1, -2.4), (-1, 2.4), (-1, -2.4)])
_NEAR = 0.03  # of an axis: points closer than this share a label
_JOINED = {"color": INK, "linewidth": 1, "linestyle": (0, (5, 2))}


def quality_and_cost(contest: Contest, value: str, cost: str = "flops", *, log: bool = False) -> Figure:
    """Draw a metric (mean over seeds, 95% interval by Student's t) against the cost of choosing, filled on the `front`;
    `value` and `cost` are as it takes them. The cost is logarithmic, with 0 at its left end; `log` makes the metric so,
    too."""
    best = list(front(contest, value, cost).index)
    rows = contest.chosen.dropna(subset=[value, cost])
    if rows.empty:
        raise ValueError(f"the contest has no row with both {value!r} and {cost!r}; there is nothing to show")
    means = rows.groupby("selector", sort=False)[[cost, value]].mean()
    needs = rows.drop_duplicates("selector").set_index("selector")["needs"]
    kinds, paid = list(dict.fromkeys(needs)), means[cost][means[cost] > 0]
    low, high = (paid.min(), paid.max()) if len(paid) else (1.0, 10.0)
    nothing = low / max((high / low) ** 0.15, 3)
    x, bounds = means[cost].where(means[cost] > 0, nothing), []
    with house_style():
        figure, axes = new_figure(7, max(3.6, 1 + 0.16 * len(means)))
        axes.set_xscale("log")
        for i, title in enumerate(means.index):
            runs, on_front = rows.loc[rows["selector"] == title, value], title in best
            _, *ends = interval(runs, within=RANGES[value])
            bounds += ends
            shape = look(kinds.index(needs[title]), line=False) | {"markersize": 7, "markeredgewidth": 1.2}
            axes.vlines(x[title], *ends, color=shape["color"], linewidth=1, alpha=0.6, zorder=2)
            axes.plot(x[title], means.loc[title, value], **shape, zorder=4 + on_front,
                      **({} if on_front else {"markerfacecolor": "white"}))
            for text, place, side in ((str(i + 1), 1.05, "right"), (title, 1.065, "left")):
                axes.annotate(text, (place, 1 - (i + 0.5) / len(means)), xycoords="axes fraction", ha=side,
                              va="center", fontsize=8, color=INK, weight="bold" if on_front else "normal",
                              annotation_clip=False)
        axes.plot(x[best], means.loc[best, value], **_JOINED, zorder=3, drawstyle="steps-post")
        axes.set_xlim(nothing / (high / nothing) ** 0.05, high * (high / nothing) ** 0.05)
        limits = axis_limits(rows[value], bounds, log)
        axes.set_ylim(*limits)
        if log:
            axes.set_yscale("log")
            log_ticks(axes.yaxis, *limits)
        if (means[cost] == 0).any():
            powers = range(int(np.ceil(np.log10(low * 0.9))), int(np.ceil(np.log10(high * 2))))
            axes.xaxis.set_major_locator(FixedLocator([nothing, *(10.0 ** power for power in powers)]))
            axes.set_xticklabels(["0", *(f"$10^{{{power}}}$" for power in powers)])
        axes.minorticks_off()
        axes.grid()
        axes.set_xlabel(COSTS[cost])
        axes.set_ylabel(label_of(value))
        _number(axes, np.column_stack([x, means[value]]), np.isin(means.index, best))
        handles = [Line2D([], [], **look(i, line=False), label=f"needs {kind}") for i, kind in enumerate(kinds)]
        return finish(figure, [*handles, Line2D([], [], **_JOINED, label="front (filled)")])


def _number(axes, points, on_front):
    """Number `points` (n, 2) where no other point or label lies; points on one another share a label."""
    pixels = axes.transData.transform(points)
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
        axes.annotate(text, points[near[0]], offset, textcoords="offset points", fontsize=7, ha="center",
                      va="center", color=INK if on_front[near].any() else MUTED, zorder=6)
