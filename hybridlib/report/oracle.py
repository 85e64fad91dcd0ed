"""Figures and tables of an oracle's records: the sets of every size, the selectors among them, how layers interact."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hybridlib.checks import check_choice
from hybridlib.records.ledger import Record
from hybridlib.report.plots import heat_map
from hybridlib.report.style import (INK, MEASURES, MUTED, finish, format_interval, format_number, house_style,
                                    label_of, look, new_figure)
from hybridlib.report.tables import as_table
from hybridlib.report.verdicts import direction
from hybridlib.selection.agreement import RANGES, interval, spearman
from hybridlib.study.catalogue import SELECTORS
from hybridlib.study.oracle import METRICS, values

__all__ = ["best_sets", "interaction_map", "interaction_table", "judged_table", "landscape", "seed_agreement"]

_BEST = {"color": INK, "linewidth": 0.9, "linestyle": (0, (2, 2))}


def landscape(table: pd.DataFrame, judged: pd.DataFrame | None = None, value: str = "kl", *,
              selectors: Sequence[str] = ()) -> Figure:
    """Draw every measured set over its size, mean over seeds, and those of up to seven `selectors`; a line joins the
    best. `table` is that of `oracle.oracle_table`, `judged` that of `oracle.judge`."""
    means = table.dropna(subset=[value]).groupby(["size", "layers"], as_index=False)[value].mean()
    best = means.groupby("size")[value].agg("min" if MEASURES[value].better == "lower" else "max")
    names = [name for name in dict.fromkeys(selectors) if judged is not None and (judged["selector"] == name).any()][:7]
    with house_style():
        figure, axes = new_figure(7, 3.4)
        axes.plot(means["size"] - 0.2, means[value], linestyle="", marker="_", color=MUTED, alpha=0.5, markersize=7)
        axes.plot(best.index - 0.2, best, **_BEST, zorder=1)
        for i, name in enumerate(names):
            mine = judged[judged["selector"] == name].groupby("size")[value].mean()
            axes.plot(mine.index + 0.08 * i, mine, **look(i, line=False), markeredgecolor="white", markeredgewidth=0.5)
        axes.set_xticks(sorted(means["size"].unique()))
        axes.grid(axis="y")
        axes.set_xlabel("softmax layers")
        axes.set_ylabel(label_of(value))
        handles = [Line2D([], [], linestyle="", marker="_", color=MUTED, label="every set"),
                   Line2D([], [], **_BEST, label="best set")]
        return finish(figure, handles + [Line2D([], [], **look(i, line=False), label=_title(name))
                                         for i, name in enumerate(names)])


def seed_agreement(records: Sequence[Record], metric: str = "kl") -> pd.DataFrame:
    """Find the least and largest Spearman of two seeds' rankings of a size's sets, three sets at least."""
    rows = []
    for a, b in combinations([values(record, metric) for record in records], 2):
        for size in sorted({len(layers) for layers in a}):
            sets = [layers for layers in a if len(layers) == size and layers in b]
            if len(sets) >= 3:
                rows.append({"size": size, "spearman": spearman([a[s] for s in sets], [b[s] for s in sets])})
    frame = pd.DataFrame(rows, columns=["size", "spearman"]).groupby("size")["spearman"].agg(["min", "max"])
    return frame.rename(columns={"min": "least Spearman of two seeds", "max": "largest"})


def best_sets(table: pd.DataFrame, metric: str = "kl") -> pd.DataFrame:
    """Name the best set of each size by the mean over seeds and by each seed; ``as good`` counts sets of that mean."""
    check_choice("metric", metric, METRICS)
    sign, rows = 1 if MEASURES[metric].better == "lower" else -1, []
    for size, part in table.dropna(subset=[metric]).groupby("size"):
        mean = (sign * part.groupby("layers")[metric].mean()).sort_values(kind="stable")
        winners = [min(zip(sign * own[metric], own["layers"]))[1] for _, own in part.groupby("seed")]
        best = part[part["layers"] == mean.index[0]]
        rows.append({"size": size, "sets": len(mean), "best set": _set(mean.index[0]),
                     "as good": int((mean == mean.iloc[0]).sum()),
                     label_of(metric): format_interval(*interval(best[metric], within=RANGES[metric]), 3),
                     "by seed": "; ".join(map(_set, winners))})
    return pd.DataFrame(rows).set_index("size")


def judged_table(judged: pd.DataFrame, table: pd.DataFrame, size: int) -> pd.DataFrame:
    """Show each selector's regret (mean over seeds, 95% interval) and rank among all sets of `size`, then the mean
    regret of all sets; empty if no set of that size was judged."""
    rows, every_set = judged[judged["size"] == size], table[table["size"] == size]
    if rows.empty:
        return pd.DataFrame()
    headings = {f"{metric}_regret": f"regret by {MEASURES[metric].name}" for metric in METRICS
                if rows[f"{metric}_regret"].notna().any()}
    ranked = as_table(rows, "selector", headings, digits=4).astype({"runs": str})
    for regret, heading in headings.items():
        ranks = rows.groupby("selector")[regret.replace("regret", "rank")].agg(["min", "max"]).loc[ranked.index]
        ranked[heading.replace("regret", "rank")] = [f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
                                                    for low, high in ranks.to_numpy()]
    order = rows.groupby("selector", sort=False)["kl_regret"].mean().sort_values(kind="stable").index
    drawn = {heading: format_number(every_set[regret].mean(), 4) for regret, heading in headings.items()}
    return pd.concat([ranked.loc[order].rename(_title), pd.DataFrame(drawn, index=["a set drawn at random"])]).fillna(
        "\u2013").rename_axis(f"of {rows['sets'].iloc[0]} sets")


def interaction_map(maps: np.ndarray, unit: str = "KL (nats a token)", *, digits: int = 3) -> Figure:
    """Draw `oracle.interaction_maps`, mean over seeds: below 0 (blue) one layer stands in for the other, above (orange)
    they help one another. Bold: two or more seeds agree on the sign; hatched: not measured."""
    mean, count = maps.mean(0), maps.shape[1]
    alike = (np.sign(maps) == np.sign(maps[0])).all(0) & (len(maps) > 1)
    most = float(np.nanmax(np.abs(mean), initial=0)) or 1.0
    lower = np.ma.array(mean, mask=~np.tri(count, k=-1, dtype=bool))[1:, :-1]
    names = [str(layer) for layer in range(count)]
    return heat_map(lower, (names[1:], names[:-1]), f"interaction of two layers, {unit}",
                    ["#2f6ea8", "#f4f4f4", "#d55e00"], (-most, most), digits=digits, bold=alike[1:, :-1])


def interaction_table(maps: np.ndarray) -> pd.DataFrame:
    """Show each measured pair's interaction with its 95% interval over seeds, the most negative first."""
    rows = []
    for i, j in combinations(range(maps.shape[1]), 2):
        if np.isfinite(maps[:, i, j]).all():
            mean, low, high = interval(maps[:, i, j])
            rows.append({"layers": _set((i, j)), "mean": mean, "low": low, "high": high,
                         "against 0": direction(low, high, len(maps))})
    return pd.DataFrame(rows, columns=["layers", "mean", "low", "high", "against 0"]).sort_values("mean").set_index(
        "layers")


def _title(selector):
    return SELECTORS[selector].title if selector in SELECTORS else selector


def _set(layers):
    return "{" + ", ".join(map(str, layers)) + "}"
