"""Tables of a contest: what the selectors are, what choosing cost, how alike they choose, which one to use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from hybridlib.checks import check_choice
from hybridlib.report.style import MEASURES, format_interval, format_number, label_of
from hybridlib.report.tables import neighbour_counts
from hybridlib.report.verdicts import outcome
from hybridlib.selection.agreement import RANGES, interval, jaccard, spearman
from hybridlib.study.catalogue import find_selector
from hybridlib.study.contest import Contest

__all__ = ["COSTS", "agreement_of_sets", "best_by_need", "cost_table", "front", "neighbours", "participants",
           "reference_table"]

#: fields of `Cost` and what tables and figures call them
COSTS = {"forward_tokens": "tokens forward", "training_tokens": "tokens of training", "passes": "passes",
         "flops": "FLOPs of choosing (estimated)", "seconds": "seconds of choosing", "peak_memory": "peak memory (MiB)"}
_NEEDS = ("nothing", "teacher", "student", "stage 2")  # each includes those before it
_DASH = "\u2013"


def participants(names: Sequence[str]) -> pd.DataFrame:
    """Say in words what each selector is: its source, what it needs and assumes, and what it costs."""
    selectors = [find_selector(name) for name in names]
    return pd.DataFrame({s.title: {"source": s.source, "needs": s.needs, "assumes": s.assumes, "costs": s.cost}
                         for s in selectors}).T.rename_axis("selector")


def agreement_of_sets(contest: Contest) -> np.ndarray:
    """Mean over seeds of the Jaccard index of two selectors' sets: (selectors, selectors), in the order of titles."""
    sets = contest.chosen.pivot(index="selector", columns="seed", values="layers").reindex(contest.titles)
    return np.mean([[[jaccard(a, b) for b in sets[seed]] for a in sets[seed]] for seed in sets], axis=0)


def cost_table(contest: Contest) -> pd.DataFrame:
    """Show as text what each selector needs and cost, mean over seeds; a dash stands for what is not known."""
    rows = contest.chosen.assign(peak_memory=contest.chosen["peak_memory"] / 2**20).groupby("selector", sort=False)
    means = rows[list(COSTS)].mean()
    forms = {"flops": "{:.2e}", "seconds": "{:,.1f}"}
    table = rows[["needs"]].first().assign(**{
        label: [_DASH if np.isnan(x) else forms.get(name, "{:,.0f}").format(x) for x in means[name]]
        for name, label in COSTS.items()}, note=rows["note"].first())
    refused = pd.DataFrame({"note": {title: f"not run: {why}" for title, why in contest.refused.items()}})
    return pd.concat([table, refused]).fillna(_DASH).rename_axis("selector")


def neighbours(contest: Contest) -> pd.DataFrame:
    """Count the neighbours among the layers of each selector's sets, mean over seeds: see `neighbour_counts`."""
    counts = neighbour_counts(contest.chosen.assign(num_layers=contest.num_layers))
    return counts.groupby("selector", sort=False).agg(**{
        "pairs of neighbours": ("pairs", "mean"), "in random sets": ("expected", "mean"),
        "share of random sets with as many": ("probability", "mean")})


def front(contest: Contest, value: str, cost: str = "flops") -> pd.DataFrame:
    """Keep the selectors, controls apart, that none beats in both `value` (``"kl"`` or ``"recall_exact"``) and `cost`
    (a field of `Cost`): means over seeds, the cheapest first."""
    check_choice("value", value, ("kl", "recall_exact"))
    check_choice("cost", cost, tuple(COSTS))
    means = contest.usable.groupby("selector", sort=False)[[cost, value]].mean().dropna()
    worse = means[value] if MEASURES[value].better == "lower" else -means[value]
    means = means.assign(worse=worse).sort_values([cost, "worse"], kind="stable")
    leads = means["worse"] < means["worse"].cummin().shift(fill_value=np.inf)
    return means.loc[leads, [cost, value]]


def best_by_need(contest: Contest, value: str = "kl") -> pd.DataFrame:
    """Name the best selector for each level of needs, by ``"kl"`` or ``"recall_exact"`` with its 95% interval over
    seeds; of equals the cheapest, and no controls."""
    check_choice("value", value, ("kl", "recall_exact"))
    rows, table = contest.usable, {}
    means = rows.groupby("selector", sort=False)[[value, "flops", "seconds"]].mean()
    means = means.sort_values([value, "flops"], ascending=[MEASURES[value].better == "lower", True], kind="stable")
    level = rows.drop_duplicates("selector").set_index("selector")["needs"].map(_NEEDS.index)
    for need, name in enumerate(_NEEDS):
        allowed = means[level[means.index] <= need]
        if allowed.empty:
            continue
        title, best = allowed.index[0], means.index[0]
        runs = rows.loc[rows["selector"] == title, value]
        table[name] = {"use": title, label_of(value): format_interval(*interval(runs, within=RANGES[value]), 3),
                       COSTS["flops"]: f"{means.loc[title, 'flops']:.2e}",
                       COSTS["seconds"]: f"{means.loc[title, 'seconds']:,.1f}",
                       "against the best of all": "it is the best" if title == best else
                       f"{title} against {best}: {outcome(rows, value, title, best, digits=3)}"}
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("needs at most")


def reference_table(contest: Contest, reference: str = "GA-S2") -> pd.DataFrame:
    """Compare each selector with `reference`; empty if that was not run. FLOPs are means over seeds and seconds
    medians, for a first call may compile; correlations and indices are mean (least to largest) over seeds."""
    rows, table = contest.chosen, {}
    theirs = rows[rows["selector"] == reference].set_index("seed")
    for title in contest.titles if len(theirs) else ():
        ours = rows[rows["selector"] == title].set_index("seed")
        scored = title != reference and all(v is not None for v in [*ours["values"], *theirs["values"]])
        table[title] = {
            "share of its FLOPs": _ratio(ours["flops"].mean(), theirs["flops"].mean()),
            "share of its seconds": _ratio(ours["seconds"].median(), theirs["seconds"].median()),
            "Spearman": _range([spearman(ours["values"][s], theirs["values"][s]) for s in ours.index])
            if scored else _DASH,
            "best by its scores": _DASH if not scored else "yes" if all(
                set(np.argsort(-np.array(values), kind="stable")[:len(layers)]) == set(layers)
                for values, layers in zip(ours["values"], ours["layers"])) else "no",
            "Jaccard": _range([jaccard(ours["layers"][s], theirs["layers"][s]) for s in ours.index]),
            MEASURES["kl"].name: outcome(rows, "kl", title, reference)}
    return pd.DataFrame.from_dict(table, orient="index").drop(reference, errors="ignore").rename_axis(
        f"against {reference}")


def _range(values: Sequence[float]) -> str:
    mean, low, high = (format_number(float(f(values)), 2) for f in (np.mean, np.min, np.max))
    return mean if low == high else f"{mean} ({low} to {high})"


def _ratio(part: float, whole: float) -> str:
    if np.isnan(part) or np.isnan(whole) or whole == 0:
        return _DASH
    return "0" if part == 0 else f"1/{whole / part:,.0f}" if part < whole / 1.5 else f"{part / whole:.1f}"
