"""What an oracle's records show: its figures, and sentences that follow from its numbers.

Figures as in `plots`: no title, intervals wherever there are seeds, nothing told by colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from hybridlib.checks import check_choice
from hybridlib.records.ledger import Record
from hybridlib.report.plots import as_table
from hybridlib.report.style import (COLOURS, INK, MUTED, PALE, dodge, finish, format_interval, format_number,
                                    house_style, look, new_figure)
from hybridlib.selection.agreement import RANGES, interval, spearman
from hybridlib.study.catalogue import SELECTORS
from hybridlib.study.oracle import METRICS, OTHER_SEEDS, any_set, settling, values

__all__ = ["about_oracle", "additive_words", "best_sets", "interaction_map", "interaction_words", "judged_table",
           "judged_words", "landscape", "seed_words", "settled_words", "settling_curves", "settling_report"]

SETTLED = 0.95  # Spearman between the last two points of the curve from which on a ranking is called settled
_NAMES = {"kl": ("KL", "nats a token"), "recall_exact": ("recall", "share of answers")}


def landscape(table: pd.DataFrame, judged: pd.DataFrame | None = None, value: str = "kl", *,
              selectors: Sequence[str] = (), ylabel: str = "held-out KL (nats a token)") -> Figure:
    """Every measured set as a grey dash over the number of its layers, mean over seeds, and where selectors' sets lie.

    Parameters
    ----------
    table : of `oracle.oracle_table`. judged : of `oracle.judge`, for the markers of `selectors`, seven at most.
    value : the column to show. A line joins the best set of each size; where selectors meet, their markers stand side
        by side.
    """
    means = table.dropna(subset=[value]).groupby(["size", "layers"], as_index=False)[value].mean()
    if means.empty:
        raise ValueError(f"table has no row with a {value!r}; there is nothing to show")
    best = means.groupby("size")[value].min() if value == "kl" else means.groupby("size")[value].max()
    names = [name for name in dict.fromkeys(selectors) if judged is not None and (judged["selector"] == name).any()][:7]
    with house_style():
        figure, axes = new_figure(7, 3.4)
        axes.plot(means["size"] - 0.2, means[value], linestyle="", marker="_", color=MUTED, alpha=0.5, markersize=7)
        axes.plot(best.index - 0.2, best, color=INK, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        for i, name in enumerate(names):
            mine = judged[judged["selector"] == name].groupby("size")[value].mean()
            axes.plot(mine.index + 0.08 * i, mine, **look(i, line=False), markeredgecolor="white", markeredgewidth=0.5)
        axes.set_xticks(sorted(means["size"].unique()))
        axes.grid(axis="y")
        axes.set_xlabel("softmax layers")
        axes.set_ylabel(ylabel)
        handles = [Line2D([], [], linestyle="", marker="_", color=MUTED, label="every set"),
                   Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (2, 2)), label="best set")]
        return finish(figure, handles + [Line2D([], [], **look(i, line=False), label=_title(name))
                                         for i, name in enumerate(names)])


def settling_curves(frame: pd.DataFrame, metric: str = "kl") -> Figure:
    """Spearman correlation of the ranking of sets along training with that at the end, a line a size, mean over seeds.

    `frame` is that of `oracle.settling` by `metric`. Bars span the seeds; points stand side by side, whatever lies
    between them.
    """
    check_choice("metric", metric, METRICS)
    rows = frame.dropna(subset=["spearman_end"])
    if rows.empty:
        raise ValueError("frame has no ranking to follow; measure sets at two points of training at least")
    with house_style():
        figure, axes = new_figure(7, 3)
        sizes, points = sorted(rows["size"].unique()), sorted(rows["tokens"].unique())
        for i, (size, beside) in enumerate(zip(sizes, dodge(len(sizes), 0.08))):
            spread = rows[rows["size"] == size].groupby("tokens")["spearman_end"].agg(["mean", "min", "max"])
            x = np.searchsorted(points, spread.index) + beside
            axes.plot(x, spread["mean"], **look(i), markeredgecolor="white", markeredgewidth=0.5)
            axes.vlines(x, spread["min"], spread["max"], color=COLOURS[i % 7], linewidth=1)
        axes.axhline(SETTLED, color=MUTED, linewidth=0.8, linestyle=(0, (5, 2)), zorder=1)
        axes.set_ylim(min(0.9, axes.get_ylim()[0]), 1.01)
        axes.set_xlim(-0.5, len(points) - 0.5)
        axes.set_xticks(range(len(points)), [f"{point:,}" for point in points])
        axes.grid(axis="y")
        axes.set_xlabel("tokens of stage 2")
        axes.set_ylabel(f"Spearman with the end, by {_NAMES[metric][0]}")
        return finish(figure, [Line2D([], [], **look(i), label=_layers(size))
                               for i, size in enumerate(sizes)])


def interaction_map(maps: np.ndarray, unit: str = "KL (nats a token)", *, digits: int = 3) -> Figure:
    """Pairwise interactions as a heat map: mean over seeds, in each cell its number.

    Parameters
    ----------
    maps : (seeds, layers, layers) of `oracle.interaction_maps`; symmetric, so the lower triangle is drawn. Blue is
        below 0, one layer stands in for the other; orange above, they help one another. A number is bold where all
        seeds, two at least, agree on its sign; cells without a number are hatched.
    """
    maps = np.asarray(maps, dtype=float)
    if maps.ndim != 3 or maps.shape[1] != maps.shape[2] or not len(maps):
        raise ValueError(f"maps has shape {maps.shape}; give (seeds, layers, layers)")
    mean = maps.mean(0)
    sure = (np.sign(maps) == np.sign(maps[0])).all(0) & (len(maps) > 1)
    count, most = len(mean), float(np.nanmax(np.abs(mean), initial=0)) or 1.0
    colours = LinearSegmentedColormap.from_list("two", ["#2f6ea8", "#f4f4f4", "#d55e00"])
    with house_style():
        side = min(6, 1.2 + 0.6 * count)
        figure, axes = new_figure(side + 1.2, side, layout="compressed")
        shown = np.ma.masked_invalid(np.where(np.tri(count, k=-1, dtype=bool), mean, np.nan))
        mesh = axes.pcolormesh(shown, cmap=colours, vmin=-most, vmax=most, edgecolors="white", linewidth=1.5)
        for i, j in ((i, j) for j, i in combinations(range(count), 2)):
            if np.isnan(mean[i, j]):
                axes.add_patch(Rectangle((j + 0.03, i + 0.03), 0.94, 0.94, facecolor="white", hatch="////",
                                         edgecolor=PALE, linewidth=0))
                continue
            axes.text(j + 0.5, i + 0.5, format_number(mean[i, j], digits), ha="center", va="center_baseline",
                      fontsize=7.5 if count <= 12 else 5, fontweight="bold" if sure[i, j] else "normal",
                      color="white" if mean[i, j] < -0.7 * most else INK)
        axes.set_aspect("equal")
        axes.set_xlim(0, max(1, count - 1))
        axes.set_ylim(count, min(1, count - 1))
        axes.set_xticks(np.arange(count - 1) + 0.5, range(count - 1))
        axes.set_yticks(np.arange(1, count) + 0.5, range(1, count))
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_xlabel("layer (0 at the embedding)")
        axes.set_ylabel("layer")
        bar = figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.03, label=f"interaction, {unit}")
        bar.outline.set(linewidth=0.7, edgecolor=MUTED)
        return finish(figure)


def best_sets(table: pd.DataFrame, metric: str = "kl") -> pd.DataFrame:
    """The best set of each size by the mean over seeds, and which set was best in each seed, as text.

    ``as good`` counts the sets with that mean; of equals the first in the order of layers is named.
    """
    check_choice("metric", metric, METRICS)
    sign, rows = 1 if metric == "kl" else -1, []
    for size, part in table.dropna(subset=[metric]).groupby("size"):
        mean = (sign * part.groupby("layers")[metric].mean()).sort_values(kind="stable")
        winners = {seed: min(zip(sign * own[metric], own["layers"]))[1] for seed, own in part.groupby("seed")}
        best = part[part["layers"] == mean.index[0]]
        rows.append({"size": size, "sets": len(mean), "best set": _set(mean.index[0]),
                     "as good": int((mean == mean.iloc[0]).sum()),
                     _NAMES[metric][0]: format_interval(*interval(best[metric], within=RANGES[metric]), 3),
                     "by seed": "; ".join(_set(layers) for layers in winners.values())})
    return pd.DataFrame(rows).set_index("size")


def about_oracle(records: Sequence[Record]) -> str:
    """One sentence on what was enumerated, or, if that is nothing, on the command that does it."""
    if not records:
        return ("No oracle of a GPU is committed yet. On a machine with a GPU, this makes one: `papermill "
                "notebooks/oracle.ipynb out.ipynb -f notebooks/profiles/oracle/gpu.yaml`.")
    p, rows = records[0].parameters, records[0].metrics["sets"]
    failed = sum("error" in row for record in records for row in record.metrics["sets"])
    sizes = sorted({len(row["layers"]) for row in rows})
    return (f"Teacher **{p['aligned']['teacher']}**, mixer **{p['mixer']}**: {len(rows)} sets of {sizes[0]} to "
            f"{sizes[-1]} layers, each distilled for {p['num_tokens']:,} tokens after {p['aligned']['num_tokens']:,} "
            f"of stage 1; {len(records)} seed{'s' * (len(records) > 1)}; on "
            f"{', '.join(dict.fromkeys(record.device for record in records))}."
            + (f" {failed} could not be trained." if failed else ""))


def settled_words(frame: pd.DataFrame, metric: str = "kl") -> str:
    """A list in Markdown: for each size, whether the ranking of its sets has settled, and what an early pick costs.

    `frame` is that of `oracle.settling` by `metric`. Settled is said where Spearman's correlation between the last two
    points is at least 0.95 in every seed. Where sets tie as the best, how many do is said: among them nothing ranks.
    """
    check_choice("metric", metric, METRICS)
    if frame.empty:
        return "- Sets were not measured on the way, so nothing tells whether their ranking has settled."
    last, lines = frame[frame["tokens"] == frame["tokens"].max()], []
    for size, part in last.groupby("size"):
        low, name = part["spearman_next"].min(skipna=False), _NAMES[metric][0]
        if np.isnan(low):
            lines.append(f"- **{_layers(size)}** ({part['sets'].iloc[0]} sets), by {name}: all sets have one value at "
                         "the end or before, in one seed at least, so **nothing can be told**.")
            continue
        word = "**settled**" if low >= SETTLED else "**not settled**"
        early, sets = format_number(part["early_regret"].mean(), 4), part["sets"].iloc[0]
        ties = (f" Of the {sets}, {_range(part['tied'])} share the best value, and there are "
                f"{_range(part['distinct'])} values in all.") if part["tied"].max() > 1 else ""
        lines.append(f"- **{_layers(size)}** ({sets} sets), by {name}: Spearman of the ranking at "
                     f"{int(part['tokens'].iloc[0]):,} tokens with that of the end {format_number(low, 3)} in the "
                     f"worst seed: {word}. The set that is best there is {early} from the best at the end.{ties}")
    return "\n".join(lines)


def settling_report(records: Sequence[Record]) -> tuple[list[Figure], str]:
    """By KL and then by recall: `settling_curves`, where there is a ranking, and in Markdown `settled_words` and
    `seed_words`."""
    along = {metric: settling(records, metric) for metric in METRICS}
    return ([settling_curves(frame, metric) for metric, frame in along.items() if frame["spearman_end"].notna().any()],
            "\n\n".join(words for metric, frame in along.items()
                        for words in (settled_words(frame, metric), seed_words(records, metric))))


def seed_words(records: Sequence[Record], metric: str = "kl") -> str:
    """One sentence: how far the seeds agree on the ranking of sets of a size; what no selector can do better than."""
    pairs, name = [], _NAMES[metric][0]
    for a, b in combinations([values(record, metric) for record in records], 2):
        for size in sorted({len(layers) for layers in a}):
            sets = [layers for layers in a if len(layers) == size and layers in b]
            pairs += [spearman([a[s] for s in sets], [b[s] for s in sets])] if len(sets) >= 3 else []
    pairs = [p for p in pairs if np.isfinite(p)]
    if not pairs:
        why = "One seed was run" if len(records) < 2 else f"No two seeds rank sets of one size by {name}"
        return f"{why}, so nothing tells how far seeds agree on the ranking by {name}."
    return (f"Between seeds, the rankings of sets of one size by {name} have a Spearman correlation of "
            f"{format_number(min(pairs), 2)} to {format_number(max(pairs), 2)}.")


def judged_words(judged: pd.DataFrame, records: Sequence[Record], size: int, metric: str = "kl") -> str:
    """A list in Markdown: each selector's regret at one size, over seeds, its ranks, and what a random set has."""
    check_choice("metric", metric, METRICS)
    name, unit = _NAMES[metric]
    if judged.empty or f"{metric}_regret" not in judged or not (judged["size"] == size).any():
        return f"- No set of {_layers(size)} was judged by {name}."
    rows, lines = judged[judged["size"] == size].dropna(subset=[f"{metric}_regret"]), []
    for selector, part in rows.groupby("selector", sort=False):
        mean, low, high = interval(part[f"{metric}_regret"], within=(0.0, np.inf))
        ranks = part[f"{metric}_rank"].astype(int)
        word = ("**one seed cannot tell**" if len(part) == 1 else "**the best set in every seed**" if ranks.max() == 1
                else "**worse than the best**" if low > 0 else "**cannot be told apart from the best**")
        lines.append((mean, f"- **{_title(selector)}**: regret {format_interval(mean, low, high, 4)} {unit}, rank "
                            f"{_range(ranks)} of {part['sets'].iloc[0]}: {word}."))
    if any_set(records, size, metric) == 0:
        return f"- All sets of {_layers(size)} have the same {name} here, so **nothing can be told** by it."
    drawn = format_number(any_set(records, size, metric), 4)
    floor = f" The regret of the {OTHER_SEEDS} is what noise between seeds costs." if metric == "kl" and (
        rows["selector"] == OTHER_SEEDS).any() else ""
    return "\n".join([line for _, line in sorted(lines)] + [f"- A set drawn at random: {drawn} on average.{floor}"])


def judged_table(judged: pd.DataFrame, size: int) -> pd.DataFrame:
    """Regret and rank of each selector at one size, by KL and by recall, with intervals over seeds, as text."""
    rows = judged[judged["size"] == size]
    columns = [column for metric in METRICS for column in (f"{metric}_regret", f"{metric}_rank")]
    return as_table(rows.assign(selector=rows["selector"].map(_title)), "selector", columns).set_index("selector")


def interaction_words(maps: np.ndarray, metric: str = "kl") -> str:
    """A list in Markdown: how many pairs of layers help one another or stand in for one another, and the strongest."""
    maps = np.asarray(maps, dtype=float)
    pairs = [(i, j) for i, j in combinations(range(maps.shape[1]), 2) if np.isfinite(maps[:, i, j]).all()]
    if not pairs:
        return "- Sets of no, one and two layers were not all measured, so there is no interaction to tell of."
    found = {pair: interval(maps[:, pair[0], pair[1]]) for pair in pairs}
    below, above = (sum(mean < 0 for mean, _, _ in found.values()), sum(mean > 0 for mean, _, _ in found.values()))
    sure = sum(low > 0 or high < 0 for _, low, high in found.values())
    lines = [f"- Of {len(pairs)} pairs, {below} bring less together than alone (one stands in for the other) and "
             f"{above} more; the interval over seeds excludes 0 for {sure}."]
    for word, pick, sign in (("Most in place of one another", min, -1), ("Most in need of one another", max, 1)):
        pair = pick(found, key=lambda p: found[p][0])
        if sign * found[pair][0] > 0:
            lines.append(f"- {word}: layers {pair[0]} and {pair[1]}, {format_interval(*found[pair], 4)} "
                         f"{_NAMES[metric][1]}.")
    return "\n".join(lines)


def additive_words(frame: pd.DataFrame) -> str:
    """A list in Markdown: how well the gains of single layers predict larger sets, and what they leave unexplained."""
    lines = []
    for size, part in frame.groupby("size"):
        r2 = part["r2"].dropna()
        fit = f" The best fit of one number a layer explains {format_number(100 * r2.mean(), 1)}% of the variance." \
            if len(r2) else ""
        lines.append(f"- **{size} layers**: measured less predicted {format_interval(*interval(part['error']), 4)}, "
                     "Spearman of predicted and measured "
                     f"{format_interval(*interval(part['spearman'], within=RANGES['spearman']), 2)}; the set "
                     f"predicted best has a regret of "
                     f"{format_interval(*interval(part['pick_regret'], within=(0.0, np.inf)), 4)}.{fit}")
    return "\n".join(lines) or "- No sets of two layers or more were measured beside those of one and none."


def _title(selector):
    """A selector's title; of a search over the record, and of other seeds, the name."""
    return SELECTORS[selector].title if selector in SELECTORS else selector


def _range(numbers):
    """``3``, or ``3 to 5``."""
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def _layers(size):
    return f"{size} layer" + ("s" if size != 1 else "")


def _set(layers):
    return "{" + ", ".join(map(str, layers)) + "}"
