"""Tables of selectors: what they choose, how good it is, what choosing costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from hybridlib.checks import check_choice
from hybridlib.report.style import format_interval, format_number
from hybridlib.report.verdicts import OWN
from hybridlib.selection.agreement import RANGES, contiguity, interval, jaccard, paired_difference, spearman
from hybridlib.study.catalogue import SELECTORS, find_selector
from hybridlib.study.contest import Contest, _COSTS

__all__ = ["about", "advice", "agreement_of_sets", "aside", "cost_table", "cost_words", "front", "front_words",
           "mean_agreement", "neighbours", "participants", "spread"]

_NEEDS = {"nothing": "nothing at all", "teacher": "the teacher alone",
          "student": "an aligned student, whose weights stay as they are",
          "stage 2": "an aligned student, and training of candidates"}


_LOWER = {"kl": True, "recall_exact": False}


_NAMES = {"kl": "KL (nats a token)", "recall_exact": "recall (share exact)"}


def about(contest: Contest | None, notebook: str) -> str:
    """In Markdown, what was run and which selectors were not; of no contest, the command that would record one."""
    if contest is None:
        return ("No GPU record of this experiment is committed yet. On a machine with a GPU, this makes it: `papermill "
                f"notebooks/{notebook}.ipynb out.ipynb -f notebooks/profiles/{notebook}/gpu.yaml -p corpus FOLDER`.")
    s, kept = contest.settings, len(contest.chosen["layers"].iloc[0])
    text = (f"Teacher **{s['aligned']['teacher']}**, {kept} of {contest.num_layers} layers softmax, the others "
            f"**{s['mixer']}**; {s['align_tokens']:,} tokens of stage 1, {s['score_tokens']:,} for a candidate, "
            f"{s['match_tokens']:,} of stage 2; {s['seeds']} seed{'s' if s['seeds'] > 1 else ''}; on {contest.device}.")
    notes = dict(zip(contest.chosen["selector"], contest.chosen["note"], strict=True))
    told = [f"**{title}**: {note}." for title, note in notes.items() if note]
    told += [f"**{title}** was not run: {why}." for title, why in contest.refused.items()]
    left = [s.title for s in SELECTORS.values() if s.title not in (*contest.titles, *contest.refused)]
    told += [f"Selectors that were left out: {'; '.join(left)}."] if left else []
    return "\n\n".join([text, *told])


def participants(names: Sequence[str]) -> pd.DataFrame:
    """What each of these selectors is: its source, what it needs, what it assumes, what it costs in words."""
    found = {find_selector(name).title: find_selector(name) for name in names}
    return pd.DataFrame({title: {"source": s.source, "needs": s.needs, "assumes": s.assumes, "costs": s.cost}
                         for title, s in found.items()}).T.rename_axis("selector")


def agreement_of_sets(contest: Contest) -> np.ndarray:
    """Mean over seeds of the Jaccard index of two selectors' sets: (selectors, selectors), in the order of titles."""
    return mean_agreement(contest, contest.titles, "layers", jaccard)


def mean_agreement(contest: Contest, titles: Sequence[str], column: str, measure) -> np.ndarray:
    """Mean over seeds of ``measure(a, b)`` of what two selectors have in `column`: (titles, titles)."""
    matrix = np.zeros((len(titles), len(titles)))
    seeds = list(dict.fromkeys(contest.chosen["seed"]))
    for seed in seeds:
        of = contest.chosen[contest.chosen["seed"] == seed].set_index("selector")[column]
        matrix += [[measure(of[a], of[b]) for b in titles] for a in titles]
    return matrix / len(seeds)


def neighbours(contest: Contest) -> pd.DataFrame:
    """Whether the layers of each selector's sets lie beside one another, as text: pairs of neighbours that are both
    kept, how many random sets of as many layers have on average, and the share of those that have at least as many,
    see `agreement.contiguity`. The mean over seeds and, where they differ, the range."""
    table = {}
    for title, sets in contest.sets.items():
        pairs, expected, share = zip(*(contiguity(layers, contest.num_layers) for layers in sets), strict=True)
        table[title] = {"pairs of neighbours": spread(pairs), "in random sets": spread(expected),
                        "random sets with as many": spread(share)}
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("selector")


def cost_table(contest: Contest) -> pd.DataFrame:
    """What each selector needs and cost, mean over seeds, as text; a dash where it is not known."""
    means = contest.chosen.groupby("selector", sort=False)[list(_COSTS)].mean()
    table = pd.DataFrame({"needs": contest.chosen.drop_duplicates("selector").set_index("selector")["needs"]})
    for column, label in _COSTS.items():
        shown = means[column] / 2**20 if column == "peak_memory" else means[column]
        form = {"flops": "{:.2e}", "seconds": "{:,.1f}"}.get(column, "{:,.0f}")
        table[label] = ["\u2013" if np.isnan(x) else form.format(x) for x in shown]
    return table


def front(contest: Contest, value: str, cost: str = "flops") -> list[str]:
    """Titles of the selectors that none beats in both, from the cheapest: as cheap and better, or cheaper and as good.
    Controls are left out.

    Parameters
    ----------
    value : ``"kl"`` or ``"recall_exact"``; cost : a field of `Cost`. Both are means over seeds.
    """
    check_choice("value", value, tuple(_LOWER))
    check_choice("cost", cost, tuple(_COSTS))
    means = contest.usable.groupby("selector", sort=False)[[cost, value]].mean().dropna()
    badness = means[value] if _LOWER[value] else -means[value]
    best, kept = np.inf, []
    for title in sorted(means.index, key=lambda t: (means.loc[t, cost], badness[t])):
        if badness[title] < best:
            best = badness[title]
            kept.append(title)
    return kept


def front_words(contest: Contest, value: str, cost: str) -> str:
    """One line in Markdown: the `front`, from the cheapest, with the mean of `value` for each."""
    means = contest.chosen.groupby("selector", sort=False)[value].mean()
    kept = ", ".join(f"**{t}** ({format_number(means[t], 3)})" for t in front(contest, value, cost))
    return f"- {_NAMES[value]} against {_COSTS[cost]}, from the cheapest: {kept}."


def advice(contest: Contest, value: str = "kl") -> pd.DataFrame:
    """Which selector to use, by what one has: for each need, the best of those that ask for no more, and of equals the
    cheapest; its cost; and whether it can be told from the best of all, by the paired difference over seeds (95%).
    Controls are left out."""
    check_choice("value", value, tuple(_LOWER))
    rows, needs = contest.usable, list(_NEEDS)
    means = rows.groupby("selector", sort=False)[[value, "flops", "seconds"]].mean()
    means["order"] = means[value] if _LOWER[value] else -means[value]
    means["needs"] = [needs.index(n) for n in rows.drop_duplicates("selector")["needs"]]
    best, table = next(iter(means.sort_values(["order", "flops"]).index), None), {}
    for level, text in enumerate(_NEEDS.values()):
        allowed = means[means["needs"] <= level]
        if allowed.empty:
            continue
        title = allowed.sort_values(["order", "flops"]).index[0]
        measured = rows.loc[rows["selector"] == title, value]
        table[text] = {"use": title, _NAMES[value]: format_interval(*interval(measured, within=RANGES[value]), 3),
                       _COSTS["flops"]: f"{means.loc[title, 'flops']:.2e}",
                       "seconds": f"{means.loc[title, 'seconds']:,.1f}",
                       "against the best of all": _told_apart(rows, value, title, best)}
    frame = pd.DataFrame.from_dict(table, orient="index")
    return frame.rename_axis("if you have")


def _told_apart(rows, value, title, best):
    if title == best:
        return "it is the best"
    pair = rows[rows["selector"].isin([title, best])].pivot(index="seed", columns="selector", values=value)
    if (pair[title] == pair[best]).all():
        return f"as {best} on every seed"
    mean, low, high = paired_difference(pair[title], pair[best], within=RANGES[value])
    if not np.isfinite(low):
        return f"{format_number(mean, 3)} from {best} on one seed, which cannot tell"
    apart = "worse" if low > 0 or high < 0 else "cannot be told apart"
    return f"{apart}: {format_interval(mean, low, high, 3)} from {best}"


def cost_words(contest: Contest, titles: Sequence[str], reference: str = "GA-S2") -> str:
    """For each of `titles`, in Markdown: its share of the reference's FLOPs (means over seeds) and seconds (medians,
    for a first call may compile), how its scores rank layers against the reference's, and, where the interval over
    seeds allows it, which of the two hybrids has the lower KL."""
    rows, lines = contest.chosen, []
    for title in titles:
        if title == reference or not {title, reference} <= set(rows["selector"]):
            lines += [] if title == reference else [f"- **{title}** against **{reference}**: not both were run."]
            continue
        a, b = (rows[rows["selector"] == t].set_index("seed") for t in (title, reference))
        parts = [f"{_share(a['flops'].mean(), b['flops'].mean())} its FLOPs",
                 f"{_share(a['seconds'].median(), b['seconds'].median())} its time"
                 + (f" (medians of {len(a)} seeds)" if len(a) > 1 else "")]
        if all(v is not None for v in [*a["values"], *b["values"]]):
            rho = [spearman(a["values"][seed], b["values"][seed]) for seed in a.index]
            parts.append(f"Spearman {spread(rho)} with its scores{aside(a)}")
        shared = [jaccard(a["layers"][seed], b["layers"][seed]) for seed in a.index]
        parts.append(f"Jaccard {spread(shared)} with its set")
        if (a["kl"] == b["kl"]).all():
            parts.append("the same hybrid on every seed")
        elif len(a) == 1:
            nats = a["kl"].iloc[0] - b["kl"].iloc[0]
            parts.append(f"KL {format_number(abs(nats), 4)} {'lower' if nats < 0 else 'higher'}, on one seed, which "
                         "cannot tell")
        else:
            mean, low, high = paired_difference(a["kl"], b["kl"])
            word = "cannot be told apart" if low <= 0 <= high else OWN[0] if mean < 0 else OWN[1]
            parts.append(f"a KL that differs by {format_interval(mean, low, high, 4)} nats a token, **{word}**")
        lines.append(f"- **{title}** against **{reference}**: {'; '.join(parts)}.")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """The mean of bounded values and, where they differ, their least and their largest, as text."""
    mean, low, high = (format_number(float(f(values)), 2) for f in (np.mean, np.min, np.max))
    return mean if low == high else f"{mean} ({low} to {high})"


def aside(rows: pd.DataFrame) -> str:
    """What to say beside the scores of a selector, given its `rows`, if its sets are not the best by them."""
    best = [tuple(sorted(sorted(range(len(v)), key=lambda l, v=v: (-v[l], l))[:len(kept)]))
            for v, kept in zip(rows["values"], rows["layers"], strict=True)]
    return "" if best == [tuple(kept) for kept in rows["layers"]] else " (its set is not the best by its own scores)"


def _share(part, whole):
    if part == 0:
        return "none of"
    if np.isnan(part) or np.isnan(whole) or whole == 0:
        return "an unknown share of"
    return f"1/{whole / part:,.0f} of" if part < whole / 1.5 else f"{part / whole:.1f} times"
