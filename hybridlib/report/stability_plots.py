"""How agreement grows with training, and what noise predicts of it: Figures, as in `plots`, of `stability`'s frames."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hybridlib.report.style import INK, MUTED, PALE, Plot, finish, house_style, look, new_figure

__all__ = ["figures", "predicted_agreement", "token_curves"]

_LEVEL = {"color": MUTED, "linewidth": 1, "linestyle": (0, (1, 1.5))}


def figures(frames: Mapping[str, pd.DataFrame]) -> dict[str, list[Figure]]:
    """Draw what `stability.tables_of` one setting allow: ``"repetition"``, ``"settling"``, ``"risen"`` and ``"noise"``,
    each a list, which may be empty."""
    drawn: dict[str, list[Figure]] = {name: [] for name in ("repetition", "settling", "risen", "noise")}
    for name, value, ylabel, more in (
            ("repetition", "spearman", "Spearman of two seeds", {}),
            ("repetition", "jaccard", "Jaccard of the best K", {"level": "chance", "level_label": "by chance"}),
            ("settling", "spearman", "Spearman with the end", {}),
            ("settling", "share", "share of the end's best K", {"limits": (-0.05, 1.05)}),
            ("risen", "above_share", "share above untrained", {"limits": (-0.05, 1.05)})):
        rows = frames[name].reset_index().dropna(subset=["rate", value])
        if len(rows):
            drawn[name].append(token_curves(frames[name], value, ylabel, **more))
    if frames["noise"]["observed"].notna().any():
        drawn["noise"].append(predicted_agreement(frames["noise"]))
    return drawn


def token_curves(frame: pd.DataFrame, value: str, ylabel: str, *, level: str | None = None, level_label: str = "",
                 limits: tuple[float, float] | None = None) -> Figure:
    """Draw a column of one setting against tokens of training: a panel a selector, a line a rate and length of run.

    Bars are from column ``{value}_low`` to ``{value}_high``, where `frame` has them; a run that has no rate is a line
    across; a thin line is the mean of column `level`. Raises ValueError for several settings or groupings.
    """
    rows = _of_one_setting(frame).dropna(subset=[value])
    curves = rows[rows["rate"].notna()]
    panels, runs = list(dict.fromkeys(curves["selector"])), list(dict.fromkeys(zip(curves["rate"], curves["length"])))
    labels = [f"rate {rate:g}" + (f", {length:,.0f} tokens" if sum(r == rate for r, _ in runs) > 1 else "")
              for rate, length in runs]
    across, handles = rows[rows["rate"].isna()], []
    unit, word = (1e6, " (millions)") if curves["tokens"].max() >= 1e6 / 2 else (1e3, " (thousands)")
    with house_style():
        figure = Plot(figsize=(7, 2.9), layout="constrained")
        grid = figure.subplots(1, max(1, len(panels)), sharex=True, sharey=True, squeeze=False)[0]
        for axes, name in zip(grid, panels or [""]):
            for i, run in enumerate(runs):
                line = curves[(curves["selector"] == name) & (curves["rate"] == run[0]) & (curves["length"] == run[1])]
                x = line["tokens"].to_numpy(dtype=float) / unit
                axes.plot(x, line[value], **look(i), markeredgecolor="white", markeredgewidth=0.6, zorder=4)
                if f"{value}_low" in line:
                    axes.vlines(x, line[f"{value}_low"], line[f"{value}_high"], color=look(i)["color"], linewidth=1,
                                alpha=0.7, zorder=3)
            for i, (_, row) in enumerate(across.iterrows()):
                axes.axhline(row[value], **look(len(runs) + i) | {"marker": ""}, zorder=2)
            if level:
                axes.axhline(rows[level].mean(), **_LEVEL, zorder=1)
            axes.set_xlim(left=-0.03 * curves["tokens"].max() / unit)
            axes.grid(axis="y")
            axes.set_title(name, fontsize=9, loc="left")
            axes.set_xlabel(f"tokens of training{word}")
            if limits:
                axes.set_ylim(*limits)
        grid[0].set_ylabel(ylabel)
        handles = [Line2D([], [], **look(i), label=label) for i, label in enumerate(labels)]
        handles += [Line2D([], [], **look(len(runs) + i) | {"marker": ""}, label=row["selector"])
                    for i, (_, row) in enumerate(across.iterrows())]
        return finish(figure, handles + ([Line2D([], [], **_LEVEL, label=level_label)] if level else []))


def predicted_agreement(frame: pd.DataFrame) -> Figure:
    """Draw the Spearman correlation of seeds against the one that their noise predicts, from `stability.noise` of one
    setting: a point a run and point of training, filled at its end; on the line, noise explains all."""
    rows = _of_one_setting(frame).dropna(subset=["observed"])
    names, least = list(dict.fromkeys(rows["selector"])), min(0.0, rows[["predicted", "observed"]].min().min())
    with house_style():
        figure, axes = new_figure(5.2, 4.2)
        axes.plot([least, 1], [least, 1], color=PALE, linewidth=1, zorder=1)
        for _, row in rows.iterrows():
            style = look(names.index(row["selector"]), line=False) | {"markersize": 7, "markeredgewidth": 1.2}
            axes.plot(row["predicted"], row["observed"], **style, zorder=3,
                      **({} if row["end"] else {"markerfacecolor": "white"}))
        axes.set_aspect("equal")
        axes.set_xlim(least - 0.05, 1.05)
        axes.set_ylim(least - 0.05, 1.05)
        axes.grid()
        axes.set_xlabel("Spearman predicted from the noise")
        axes.set_ylabel("Spearman of two seeds, mean over pairs")
        handles = [Line2D([], [], **look(i, line=False), label=name) for i, name in enumerate(names)]
        return finish(figure, [*handles, Line2D([], [], linestyle="", marker="o", color=INK, markerfacecolor="white",
                                                label="hollow: on the way")])


def _of_one_setting(frame):
    rows = frame.reset_index()
    for name in ("setting", "grouping"):
        if (count := rows.loc[rows[name] != "", name].nunique()) > 1:
            raise ValueError(f"frame has {count} of {name}; a figure shows one, choose its rows")
    return rows
