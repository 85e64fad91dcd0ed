"""Whether a contest's selectors rank layers alike, and as GA-S2 does, and how far GA-S2 repeats itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from hybridlib.checks import check_int
from hybridlib.records.ledger import Ledger
from hybridlib.selection.agreement import bootstrap_interval, kendall, spearman
from hybridlib.selection.cost import Cost
from hybridlib.study.contest import Contest
from hybridlib.study.catalogue import SELECTORS
from hybridlib.study.selector import Selection, full_parameters
from hybridlib.study.settings import StudySettings

__all__ = ["AIM", "agreement_of_scores", "agreement_with_ga_s2", "rank_gaps", "recorded_scores", "score_pairs"]

AIM = (0.9, 1 / 20)  # of the gate gradient: Spearman's correlation with GA-S2, at least; share of its FLOPs, at most


def recorded_scores(ledger: Ledger, contest: Contest) -> dict[str, tuple[float, ...]]:
    """Read scores under `contest`'s settings and default options: title and seed -> (layers,), higher = keep."""
    return {SELECTORS[name].title + (f", seed {seed}" if seed else ""): scores.values
            for (name, seed), scores in _scores(ledger, contest).items()}


def _scores(ledger, contest) -> dict[tuple[str, int], Selection]:
    s, aligned, chosen = contest.settings, contest.settings["aligned"], {}
    settings = StudySettings.from_record(s)
    records = {_text(r.parameters): r for r in sorted(ledger.find("score"), key=lambda r: r.started)
               if "values" in r.metrics}
    for name, selector in SELECTORS.items():
        for seed in sorted({r.parameters.get("seed", 0) for r in records.values()}):
            origin = aligned | {"mixer": s["mixer"], "seed": seed}
            if selector.needs == "teacher":
                origin = {key: aligned[key] for key in ("teacher", "revision", "corpus", "context")}
            keys = [_text(full_parameters(own, settings, origin))
                    for own in selector.records(settings, contest.num_layers, seed)]
            record = next((records[key] for key in keys if key in records), None)
            if record is not None and record not in chosen.values():
                chosen[name, seed] = record
    return {key: Selection((), Cost.from_dict(cost) if (cost := record.metrics.get("cost")) else None,
                           tuple(record.metrics["values"])) for key, record in chosen.items()}


def _text(parameters):
    """Write parameters as text without the fingerprint of a corpus ("data"), for which one must load it."""
    return json.dumps({key: _text(value) if key == "aligned" else value for key, value in parameters.items()
                       if key != "data"}, sort_keys=True)


def score_pairs(scores: Mapping[str, Sequence[float]], reference: str = "GA-S2") -> dict[str, tuple]:
    """Pair each selector's scores with those of `reference` of the same seed, and with its own of another."""
    pairs, own = {}, {}
    for title, values in scores.items():
        base, _, seed = title.partition(", seed ")
        theirs = f"{reference}, seed {seed}" if seed else reference
        if base != reference and theirs in scores:
            pairs[f"{title} with {theirs}"] = values, scores[theirs]
        if seed and base in scores:
            own[f"{base} with itself, seed {seed}"] = scores[base], values
    return pairs | own


def agreement_of_scores(contest: Contest) -> tuple[list[str], np.ndarray]:
    """Return titles and mean Spearman correlation over seeds (n, n) of selectors that score every layer."""
    table = contest.chosen.pivot(index="selector", columns="seed", values="values").reindex(contest.titles).dropna()
    by_seed = [np.array(table[seed].tolist()) for seed in table]  # (selectors, layers) each
    return list(table.index), np.mean([spearman(values[:, None], values) for values in by_seed], axis=0)


def agreement_with_ga_s2(ledger: Ledger, contests: Iterable[Contest]) -> pd.DataFrame:
    """Measure how far selectors rank layers as GA-S2 does: a row a teacher (its first contest), selector and seed; nan
    is not on record. ``low`` to ``high`` is the bootstrap interval over layers of ``spearman``; ``flops_share`` is of
    GA-S2's FLOPs; ``met`` says whether both numbers of `AIM` are reached; ``ga_s2_again`` is Spearman's correlation of
    GA-S2 with itself on other text, ``with_both`` the selector's with the mean of the two."""
    rows = {}
    for contest in contests:
        teacher = contest.settings["aligned"]["teacher"]
        scores = {} if teacher in {key[0] for key in rows} else _scores(ledger, contest)
        for (name, seed), ours in scores.items():
            theirs, again = scores.get(("ga-s2", seed)), scores.get(("ga-s2-again", seed))
            if name == "ga-s2" or theirs is None:
                continue
            value, low, high = bootstrap_interval(spearman, ours.values, theirs.values)
            share = ours.cost.flops / theirs.cost.flops if ours.cost and theirs.cost else np.nan
            rows[teacher, SELECTORS[name].title, seed] = {
                "spearman": value, "low": low, "high": high, "kendall": kendall(ours.values, theirs.values),
                "flops_share": share, "met": value >= AIM[0] and share <= AIM[1],
                "ga_s2_again": spearman(theirs.values, again.values) if again else np.nan,
                "with_both": spearman(ours.values, np.add(theirs.values, again.values)) if again else np.nan}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["teacher", "selector", "seed"] if rows else None)


def rank_gaps(ledger: Ledger, contest: Contest, count: int = 4) -> pd.DataFrame:
    """Find by seed the `count` layers whose ranks (1 is kept first) by the gate gradient and GA-S2 differ most.
    ``lost`` is a layer's share of the lost agreement: a difference of d takes 6 d^2 / (L (L^2 - 1)) off Spearman's
    correlation. nan is of selectors that were not run."""
    check_int("count", count, 1)
    scores, rows = _scores(ledger, contest), {}
    names = ("gate-gradient", "ga-s2", "ga-s2-again", "ga-s2-slow", "smart", "gr-s2")
    for seed in [seed for name, seed in scores if name == names[0] and ("ga-s2", seed) in scores]:
        table = pd.DataFrame({SELECTORS[name].title: rankdata(-np.array(scores[name, seed].values), "ordinal")
                              if (name, seed) in scores else np.nan for name in names})
        gaps = (table.iloc[:, 0] - table.iloc[:, 1]).abs().sort_values(ascending=False, kind="stable")
        for l in gaps[gaps > 0].index[:count]:
            rows[seed, l] = {**table.loc[l], "lost": gaps[l] ** 2 / (gaps ** 2).sum()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["seed", "layer"] if rows else None)
