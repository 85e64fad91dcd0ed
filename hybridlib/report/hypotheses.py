"""The hypotheses of the study that decides, and what else its hybrids allow to say, by scipy's and statsmodels' tests.

Every function takes the frame of `study.recorded.recorded_arms`, or one like it, and returns a table of numbers with
one ``outcome`` a row. A row that misses records says which. An effect is the mean of the first arm less that of the
second, in the unit of the measure.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import statsmodels.formula.api as models
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from hybridlib.checks import check_choice, check_number
from hybridlib.report.style import MEASURES
from hybridlib.study.evidence import MAIN, MORE_SEEDS, REPEATED, SEEDS

__all__ = ["HYPOTHESES", "LEVEL", "MARGINS", "Hypothesis", "difference", "dunnett_table", "equivalence",
           "equivalence_table", "hypotheses_table", "variance_table"]

LEVEL = 0.05
#: what counts as equal, by measure, and so the measures of the hypotheses
MARGINS = {"kl": 0.005, "recall_composite": 0.05}
REFERENCE = "ga-s2"
SINGULAR = 0.02  # times the residual variance: less of it between seeds is none, as near as the fit's steps come to 0
_NO_SET = "not on record: a set that several seeds trained"


class Hypothesis(NamedTuple):
    """Arm `a` is better than arm `b`, or `equal` within `MARGINS`, in students of `mixer` (None: the study's)."""

    a: str
    b: str
    mixer: str | None = None
    equal: bool = False


#: those of book/hypotheses.md, stated before the runs
HYPOTHESES = {"H1": Hypothesis("ga-s2", "uniform"), "H2": Hypothesis("ga-s2", "gr-s2"),
              "H3": Hypothesis("ga-s2 by gdn", "ga-s2", mixer="gla", equal=True)}


def hypotheses_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Test `HYPOTHESES` by the measures of `MARGINS`: a row each of ``hypothesis``, ``measure``, ``a``, ``b``,
    ``effect`` with its 95% interval ``low`` and ``high``, ``p``, ``p_holm``, ``seeds`` in common, ``tokens``,
    ``method`` and ``outcome``.

    H1 and H2 are of the rows that are ``main``, by `difference`; H3 is of the longest runs of its students that both
    arms have, by `equivalence`. Holm's correction is over all rows; those not on record count as p = 1.
    """
    rows = []
    for name, h in HYPOTHESES.items():
        part = frame[frame["main"]] if h.mixer is None else _longest(frame[frame["end"] & (frame["mixer"] == h.mixer)],
                                                                    (h.a, h.b))
        for value, margin in MARGINS.items():
            test = equivalence(part, value, h.a, h.b, margin) if h.equal else difference(part, value, h.a, h.b)
            if h.equal and test["seeds"] > 1:  # the interval of the difference, not that of the test
                test |= {key: x for key, x in _paired(*_pairs(part, value, h.a, h.b)).items() if key in ("low", "high")}
            tokens = part["match_tokens"].max() if len(part) else None
            rows.append({"hypothesis": name, "measure": value, "a": h.a, "b": h.b, "tokens": tokens, "equal": h.equal,
                         **test})
    table = pd.DataFrame(rows)
    table["p_holm"] = multipletests(table["p"].fillna(1.0), alpha=LEVEL, method="holm")[1]
    table.loc[table["p"].isna(), "p_holm"] = np.nan
    table["outcome"] = [_verdict(row) for _, row in table.iterrows()]
    return table[["hypothesis", "measure", "a", "b", "effect", "low", "high", "p", "p_holm", "seeds", "tokens",
                  "method", "outcome"]]


def difference(frame: pd.DataFrame, value: str, a: str, b: str) -> dict:
    """Estimate the mean `value` of arm `a` less that of `b`: ``effect``, its 95% interval ``low`` and ``high``, ``p``,
    ``df``, ``seeds`` in common, ``method``, ``missing``. The test is two-sided.

    ``"mixed model"``: the arm is a fixed and the seed a random effect, fitted by REML; the effect over its standard
    error is held against Student's t with the runs less the seeds less 1 as degrees of freedom, so that with the same
    seeds in both arms it is the paired test. ``"paired t"``, on the seeds in common, where that model is singular (no
    variance between seeds), does not converge, or these are fewer than three.
    """
    x, y = _pairs(frame, value, a, b)
    result = _paired(x, y) | {"missing": _missing(frame, value, (a, b))}
    if len(x) < 3 or not _spread(x - y):
        return result
    runs = _runs(frame, value, (a, b))
    scale = (runs[value] - runs.groupby("arm")[value].transform("mean")).std()
    data = pd.DataFrame({"z": (runs[value] - runs[value].mean()) / scale, "first": (runs["arm"] == a).astype(float),
                         "seed": runs["seed"]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a singular fit, which is looked at below
        try:
            fit = models.mixedlm("z ~ first", data, groups="seed").fit(reml=True)
        except np.linalg.LinAlgError:
            return result
    if not fit.converged or not fit.cov_re.iloc[0, 0] > SINGULAR * fit.scale or not fit.bse_fe["first"] > 0:
        return result
    effect, error = fit.fe_params["first"] * scale, fit.bse_fe["first"] * scale
    df = len(data) - data["seed"].nunique() - 1
    half = stats.t.ppf(1 - LEVEL / 2, df) * error
    return result | {"effect": effect, "low": effect - half, "high": effect + half, "df": df, "method": "mixed model",
                     "p": 2 * stats.t.sf(abs(effect) / error, df)}


def equivalence(frame: pd.DataFrame, value: str, a: str, b: str, margin: float) -> dict:
    """Test whether arms `a` and `b` are within `margin` of each other by two one-sided paired tests: as `difference`,
    but ``p`` is the larger one's and ``low`` and ``high`` the 90% interval, which lies within the margin where
    p < .05."""
    check_number("margin", margin, 0, open_low=True)
    x, y = _pairs(frame, value, a, b)
    result = _paired(x, y, 1 - 2 * LEVEL) | {"method": "two one-sided tests" if len(x) else "", "p": np.nan,
                                             "missing": _missing(frame, value, (a, b))}
    if len(x) > 1 and (x == y).all():
        result["p"] = 0.0
    elif _spread(x - y):
        result["p"] = float(ttost_paired(x, y, -margin, margin)[0])
    return result


def equivalence_table(frame: pd.DataFrame, arms: Sequence[str] = MAIN, reference: str = REFERENCE) -> pd.DataFrame:
    """Test each of `arms` but `reference` for `equivalence` with it by the measures of `MARGINS`, in the rows that are
    ``main``. No correction is made for their number."""
    main, rows = frame[frame["main"]], []
    for value, margin in MARGINS.items():
        for arm in arms:
            if arm != reference:
                test = equivalence(main, value, arm, reference, margin)
                said = ("one seed cannot tell" if test["seeds"] == 1 else "equal" if test["p"] < LEVEL else
                        "not shown to be equal")
                rows.append({"measure": value, "a": arm, "b": reference, "margin": margin, **test,
                             "outcome": _said(test, said)})
    return pd.DataFrame(rows)[["measure", "a", "b", "effect", "low", "high", "margin", "p", "seeds", "outcome"]]


def dunnett_table(frame: pd.DataFrame, arms: Iterable[str] | None = None, reference: str = REFERENCE) -> pd.DataFrame:
    """Compare `arms`, those of the study that no hypothesis names, with `reference` by Dunnett's test, in the rows that
    are ``main``: ``effect``, its simultaneous 95% interval, ``p`` corrected for all arms of a measure, ``seeds`` (of
    the arm), ``outcome``. The test pools the variance within arms and does not pair seeds."""
    named = {arm for h in HYPOTHESES.values() if h.mixer is None for arm in (h.a, h.b)}
    arms = [arm for arm in MAIN if arm not in named] if arms is None else list(arms)
    main, rows = frame[frame["main"]], []
    for value in MARGINS:
        samples = {arm: _runs(main, value, (arm,))[value].to_numpy() for arm in (*arms, reference)}
        family = [arm for arm in arms if len(samples[arm]) > 1] if len(samples[reference]) > 1 else []
        test = interval = None
        if family and any(np.ptp(samples[arm]) > 0 for arm in (*family, reference)):
            test = stats.dunnett(*(samples[arm] for arm in family), control=samples[reference], rng=0)
            interval = test.confidence_interval(1 - LEVEL)
        for arm in arms:
            own = {"seeds": len(samples[arm]), "missing": _missing(main, value, (arm, reference)), "effect": np.nan,
                   "low": np.nan, "high": np.nan, "p": np.nan}
            if len(samples[arm]) and len(samples[reference]):
                own["effect"] = samples[arm].mean() - samples[reference].mean()
            if test is not None and arm in family:
                i = family.index(arm)
                own |= {"low": interval.low[i], "high": interval.high[i], "p": test.pvalue[i]}
            said = "one seed cannot tell" if np.isnan(own["p"]) else _way(value, own["effect"], own["p"])
            rows.append({"measure": value, "a": arm, "b": reference, **own, "outcome": _said(own, said)})
    return pd.DataFrame(rows)[["measure", "a", "b", "effect", "low", "high", "p", "seeds", "outcome"]]


def variance_table(frame: pd.DataFrame, arms: Sequence[str] = MAIN) -> pd.DataFrame:
    """Tell the noise of training one set of layers from that of choosing the set, in hybrids at their end.

    For each ``mixer``, ``budget``, ``tokens`` and ``measure`` that at least one set has been trained with by several
    seeds, and for the main rows: a row with the ``component`` ``"training"``, the variance within sets pooled over all
    sets (a seed draws the gates, aligns, and orders the data), and for each arm one with ``"selection"``, the variance
    between its sets beyond what training explains (one-way analysis of variance with unequal group sizes; it may be
    below 0). ``variance``, its 95% interval ``low`` and ``high`` (by the chi-squared distribution for training; for
    selection by F, that of training being taken for exact) and ``sd`` come with the degrees of freedom ``df``,
    ``sets``, ``runs``, and ``p`` of the F test that choosing adds none.
    """
    ends, rows = frame[frame["end"]], []
    for (mixer, budget, tokens), part in ends.groupby(["mixer", "budget", "match_tokens"]):
        repeated = part.groupby(part["layers"].map(str))["seed"].nunique().max() > 1
        for value in MARGINS if repeated or part["main"].any() else ():
            runs = part.dropna(subset=[value])
            at = {"mixer": mixer, "budget": budget, "tokens": tokens, "measure": value}
            training = _between_sets(runs, value)
            own = {"component": "training", "arm": "", **training, "variance": np.nan, "outcome": _NO_SET}
            if training["df_within"]:
                squares, df = training["within"], training["df_within"]
                ends_of = squares / stats.chi2.ppf([1 - LEVEL / 2, LEVEL / 2], df)
                own |= {"variance": squares / df, "low": ends_of[0], "high": ends_of[1], "df": df,
                        "outcome": "estimated"}
            rows.append({**at, **own})
            for arm in arms:
                mine = runs[runs["arm"] == arm]
                if len(mine) or part["main"].any():
                    rows.append({**at, "component": "selection", "arm": arm,
                                 **_selection(mine, value, own["variance"], training["df_within"], arm)})
    names = ["mixer", "budget", "tokens", "measure", "component", "arm", "sets", "runs", "df", "variance", "low",
             "high", "sd", "p", "outcome"]
    if not rows:
        rows = [{"measure": value, "component": "training", "arm": "", "outcome": _NO_SET} for value in MARGINS]
    table = pd.DataFrame(rows, columns=[name for name in names if name != "sd"])
    return table.assign(sd=np.sqrt(table["variance"].astype(float).clip(lower=0)))[names]


def _between_sets(runs, value):
    """Sums of squares between and within sets of layers, by ordinary least squares."""
    runs = runs.drop_duplicates(["layers", "seed"])
    counts = runs["layers"].map(str).value_counts()
    result = {"sets": len(counts), "runs": len(runs), "df_within": len(runs) - len(counts), "within": 0.0,
              "between": 0.0, "size": np.nan}
    if len(counts) > 1:
        fit = models.ols("z ~ C(layers)", pd.DataFrame({"z": runs[value] - runs[value].mean(),
                                                        "layers": runs["layers"].map(str)})).fit()
        result |= {"within": fit.ssr, "between": fit.ess,
                   "size": (len(runs) - (counts ** 2).sum() / len(runs)) / (len(counts) - 1)}
    elif len(runs) > 1:
        result["within"] = (len(runs) - 1) * runs[value].var()
    return result


def _selection(runs, value, training, df_training, arm):
    """The component of one arm, see `variance_table`."""
    parts = _between_sets(runs, value)
    own = {"sets": parts["sets"], "runs": parts["runs"], "variance": np.nan}
    if parts["sets"] < 2:
        return own | {"outcome": f"not on record: {arm}" if not len(runs) else "one seed cannot tell"
                      if len(runs) < 2 else "one set on every seed"}
    df = parts["sets"] - 1
    if not training > 0:
        return own | {"df": df, "outcome": "training has no variance" if training == 0 else _NO_SET}
    ratio = parts["between"] / df / training
    ends = ratio / stats.f.ppf([1 - LEVEL / 2, LEVEL / 2], df, df_training)
    low, high = (training * (end - 1) / parts["size"] for end in ends)
    p = stats.f.sf(ratio, df, df_training)
    return own | {"df": df, "variance": training * (ratio - 1) / parts["size"], "low": low, "high": high, "p": p,
                  "outcome": "above training" if p < LEVEL else "not told apart from training"}


def _runs(frame, value, arms):
    """The runs of `arms` that have the measure; ValueError for two of one arm and seed."""
    check_choice("value", value, tuple(MEASURES))
    runs = frame[frame["arm"].isin(arms)].dropna(subset=[value]).astype({value: float})
    if (twice := runs[runs.duplicated(["arm", "seed"])]).size:
        raise ValueError(f"frame has two rows of arm {twice['arm'].iloc[0]!r} and seed {twice['seed'].iloc[0]}; "
                         "take those of one setting")
    return runs


def _pairs(frame, value, a, b):
    """The values of both arms on the seeds in common."""
    table = _runs(frame, value, (a, b)).pivot(index="seed", columns="arm", values=value).reindex(columns=[a, b])
    table = table.dropna()
    return table[a].to_numpy(), table[b].to_numpy()


def _paired(x, y, confidence=1 - LEVEL):
    """The paired t test of the mean of x - y; no interval of one pair, or of differences without spread."""
    result = {"effect": float(np.mean(x - y)) if len(x) else np.nan, "low": np.nan, "high": np.nan, "p": np.nan,
              "df": len(x) - 1, "seeds": len(x), "method": "paired t" if len(x) else ""}
    if len(x) > 1 and (x == y).all():
        result["p"] = 1.0
    elif _spread(x - y):
        test = stats.ttest_rel(x, y)
        interval = test.confidence_interval(confidence)
        result |= {"low": float(interval.low), "high": float(interval.high), "p": float(test.pvalue)}
    return result


def _spread(differences):
    """Whether they differ: shares of few prompts can change by the same step on every seed."""
    return len(differences) > 1 and np.ptp(differences) > 1e-9 * np.abs(differences).max()


def _longest(frame, arms):
    """The rows of the longest runs, at the budget with most of them, that have both arms, else one; none without."""
    def merit(part):
        return part["arm"][part["arm"].isin(arms)].nunique(), part["match_tokens"].iloc[0], part["arm"].isin(arms).sum()

    return max((part for _, part in frame.groupby(["match_tokens", "budget"])), key=merit, default=frame)


def _missing(frame, value, arms):
    """Name arms, or seeds of them, that the study plans and `frame` lacks."""
    missing, runs = [], _runs(frame, value, arms)
    for arm in arms:
        planned = range(MORE_SEEDS if arm in REPEATED and frame["main"].any() else SEEDS)
        absent = sorted({*planned} - {*runs["seed"][runs["arm"] == arm]})
        if len(absent) == len(planned):
            missing.append(f"{MEASURES[value].name} of {arm}" if (frame["arm"] == arm).any() else arm)
        elif absent:
            missing.append(f"seed{'s' * (len(absent) > 1)} {', '.join(map(str, absent))} of {arm}")
    return missing


def _way(value, effect, p):
    if not p < LEVEL:
        return "not told apart"
    return "better" if (effect < 0) == (MEASURES[value].better == "lower") else "worse"


def _said(test, said):
    """The outcome of a row, and what it misses."""
    missing = f"not on record: {', '.join(test['missing'])}" if test["missing"] else ""
    if not test["seeds"] or np.isnan(test["effect"]):
        return missing or "no seed in common"
    return f"{said}; {missing}" if missing else said


def _verdict(row):
    said = _way(row["measure"], row["effect"], row["p_holm"])
    if row["seeds"] == 1:
        said = "one seed cannot tell"
    elif row["effect"] == 0 and row["p"] in (0, 1):
        said = "equal on every seed"
    elif row["equal"]:
        excludes = row["low"] > 0 or row["high"] < 0
        said = "equal" if row["p_holm"] < LEVEL else _way(row["measure"], row["effect"], 0 if excludes else 1)
    return _said(row, said)
