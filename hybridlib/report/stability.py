"""How far a ranking of layers repeats itself, when it settles, and what noise says of both: frames from the records of
candidates at several rates and after several numbers of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import combinations, permutations

import numpy as np
import pandas as pd

from hybridlib.records.ledger import Record
from hybridlib.report.style import format_interval
from hybridlib.report.tables import attention_rate
from hybridlib.selection.agreement import bootstrap_interval, chance_jaccard, spearman, top_k_jaccard
from hybridlib.selection.rules import budget_layers
from hybridlib.study.catalogue import SELECTORS

__all__ = ["candidate_points", "coverage", "noise", "readable", "repetition", "risen", "settling", "tables_of"]

_SELECTORS = {"add": "GA-S2", "remove": "GR-S2"}
_ORDER = {"GA-S2": 0, "GR-S2": 1}
_GRADIENT = "gate-gradient"
_COUNTS = ("length", "tokens", "seed", "seeds", "layers", "num_layers", "candidates", "rose", "compared", "above",
           "seeds_for")
_HEADINGS = {"grouping": "at the higher rate", "rate": "attention rate", "length": "tokens of a candidate",
             "tokens": "after tokens", "num_layers": "of layers", "spearman": "Spearman",
             "jaccard": "Jaccard of the best", "chance": "Jaccard by chance",
             "share": "share of the end's best", "other_seed": "with other seeds' ends",
             "corrected": "the same, corrected for noise", "rose": "loss rose", "compared": "with an untrained KL",
             "above": "above it", "above_share": "share above it", "change": "median change of KL",
             "source": "source of noise", "ratio": "spread / noise", "predicted": "Spearman predicted",
             "observed": "Spearman observed", "seeds_for": "seeds for reliability 0.9",
             "early": "early share of the best"}
_RUN = ["setting", "grouping", "selector", "rate", "length"]  # of candidates that differ in layer and seed alone
_COLUMNS = [*_RUN, "seed", "layer", "num_layers", "tokens", "end", "kl", "value", "rose", "rows"]


def candidate_points(records: Iterable[Record]) -> pd.DataFrame:
    """Read every measurement of a candidate, and every score of a layer by the gate gradient: a row each.

    Parameters
    ----------
    records : of any kinds; those of kind ``"align"`` say how many layers a teacher has.

    Returns
    -------
    pandas.DataFrame
        ``setting`` names teacher, mixer, tokens of stage 1 and device (and counts what these do not tell apart), so
        that nothing is compared across devices; ``grouping`` and ``rate`` are those of `tables.attention_rate`;
        ``length`` are the tokens that the candidate was to train on, ``tokens`` those after which it was measured,
        ``end`` whether these are all; ``kl`` in nats a token; ``value`` is higher for more worth keeping; ``rose`` as
        in `History`, None in older records; ``rows`` the KL of each held-out row, or None. The gate gradient has no
        rate, no grouping and 0 tokens.
    """
    records, rows = sorted(records, key=lambda r: "measured_tokens" in r.parameters), []  # on all rows come first
    depths = {_text(r.parameters): len(r.metrics["heldout_error"]) for r in records if r.kind == "align"}
    default = SELECTORS[_GRADIENT].options
    for record in records:
        p, m = record.parameters, record.metrics
        if record.kind == "candidate" and "until" not in p:
            trained = {k: v for k, v in p["settings"].items() if not k.endswith(("attention_learning_rate", "grouping",
                                                                                 "mixer_learning_rate"))}
            regime, sign = attention_rate(p["settings"]), -1 if p["direction"] == "add" else 1
            common = {"common": _setting(record), "trained": _text(trained), "grouping": regime["grouping"],
                      "selector": _SELECTORS[p["direction"]], "rate": regime["attention_learning_rate"],
                      "length": p["num_tokens"], "seed": p["seed"], "layer": p["layer"],
                      "num_layers": depths.get(_text(p["aligned"]))}
            rows += [common | {"tokens": point["tokens"], "end": point is m, "kl": point["kl"],
                               "value": sign * point["kl"], "rose": m.get("rose") if point is m else None,
                               "rows": point.get("kl_rows")} for point in (*m.get("curve", ()), m)]
        elif record.kind == "score" and p.get("selector") == _GRADIENT and "train_tokens" not in p and not (
                {"families", "examples", "data"} & set(p)) and all(
                p.get(k) == default[k] for k in ("at", "order", "steps", "share")):
            rows += [{"common": _setting(record), "trained": "", "grouping": "", "rate": np.nan, "tokens": 0,
                      "selector": SELECTORS[_GRADIENT].title, "length": p["score_tokens"], "seed": p["seed"],
                      "layer": layer, "num_layers": len(m["values"]), "end": True, "kl": np.nan, "value": value,
                      "rose": None, "rows": None} for layer, value in enumerate(m["values"])]
    if not rows:
        return pd.DataFrame(columns=_COLUMNS)
    frame = pd.DataFrame(rows).drop_duplicates(["common", "trained", *_RUN[1:], "seed", "layer", "tokens"])
    deepest = frame.groupby("common")["layer"].transform("max") + 1
    frame["num_layers"] = frame["num_layers"].astype(float).fillna(deepest).astype(int)
    frame["setting"] = _numbered([json.loads(text)["name"] for text in frame["common"]], frame["common"])
    frame["grouping"] = _numbered(frame["grouping"], frame["trained"], frame["setting"])
    order = frame.assign(depth=-frame["num_layers"], place=frame["selector"].map(_ORDER).fillna(len(_ORDER)))
    order = order.sort_values(["depth", "setting", "place", "rate", "length", "seed", "tokens", "layer"],
                              ascending=[True, True, True, False, *[True] * 4], kind="stable")
    return order[_COLUMNS].reset_index(drop=True)


def coverage(points: pd.DataFrame) -> pd.DataFrame:
    """Say what is on record: a row a run and seed, with its ``layers`` (of ``num_layers``) and the ``tokens`` after
    which all of these were measured."""
    def measured(part):
        complete = part.groupby("tokens")["layer"].nunique() == part["layer"].nunique()
        return pd.Series({"layers": part["layer"].nunique(), "num_layers": part["num_layers"].iloc[0],
                          "tokens": tuple(complete.index[complete])})

    runs = points.groupby([*_RUN, "seed"], sort=False, dropna=False)
    return _indexed([(*key, *measured(part)) for key, part in runs], ["seed", "layers", "num_layers", "tokens"])


def repetition(points: pd.DataFrame, budget: float | int) -> pd.DataFrame:
    """Measure how far seeds rank all layers alike: a row a run of two seeds at least and point of training.

    ``spearman``, and ``jaccard`` of the best K of `budget`, are means over pairs of seeds; ``*_low`` and ``*_high`` are
    the ends of a 95% bootstrap interval over layers; ``chance`` is the Jaccard index of random sets.
    """
    rows = []
    for key, tokens, _, values, end in _rankings(points):
        if len(values) > 1:
            k = budget_layers(budget, values.shape[1])
            rows.append((*key, tokens, end, len(values), *bootstrap_interval(_between_seeds(spearman), *values),
                         *bootstrap_interval(_between_seeds(lambda a, b, k=k: top_k_jaccard(a, b, k)), *values),
                         chance_jaccard(values.shape[1], k)))
    return _indexed(rows, ["tokens", "end", "seeds", "spearman", "spearman_low", "spearman_high", "jaccard",
                           "jaccard_low", "jaccard_high", "chance"])


def settling(points: pd.DataFrame, budget: float | int) -> pd.DataFrame:
    """Compare rankings on the way with those at the end: a row a run and point before its end.

    ``spearman`` is that of a seed's ranking with its own end, mean over seeds, with a 95% bootstrap interval over
    layers; ``share``, of the end's best K, those among the best K here; ``other_seed`` is Spearman's correlation with
    the ends of the other seeds, and ``corrected`` is this over the root of the product of what seeds agree here and at
    the end (Spearman, 1904): what would be left without noise, above 1 by chance; nan with one seed, or where seeds do
    not agree.
    """
    rows, rankings = [], list(_rankings(points))
    ends = {key: (seeds, values) for key, _, seeds, values, end in rankings if end}
    for key, tokens, seeds, early, end in rankings:
        if end or key not in ends:
            continue
        both = sorted(set(seeds) & set(ends[key][0]))
        if not both:
            continue
        early, late = early[[seeds.index(s) for s in both]], ends[key][1][[ends[key][0].index(s) for s in both]]
        k, count = budget_layers(budget, early.shape[1]), len(both)

        def own(*samples, count=count):
            return np.mean([spearman(samples[i], samples[count + i]) for i in range(count)], axis=0)

        jaccards = np.array([top_k_jaccard(a, b, k) for a, b in zip(early, late)])
        other = np.mean([spearman(early[i], late[j]) for i, j in permutations(range(count), 2)] or [np.nan])
        agreed = [_between_seeds(spearman)(*values) if count > 1 else np.nan for values in (early, late)]
        corrected = other / np.sqrt(np.prod(agreed)) if min(agreed) > 0 else np.nan
        rows.append((*key, tokens, count, *bootstrap_interval(own, *early, *late),
                     float(np.mean(2 * jaccards / (1 + jaccards))), other, corrected))
    return _indexed(rows, ["tokens", "seeds", "spearman", "spearman_low", "spearman_high", "share", "other_seed",
                           "corrected"])


def risen(points: pd.DataFrame) -> pd.DataFrame:
    """Count candidates that training made worse: a row a run and point after some training.

    ``candidates`` are those measured there; ``rose`` of them ended with a higher loss than they started with (nan where
    no record says so, or before the end); ``compared`` have an untrained KL, at whatever rate, and ``above`` of these a
    higher one here, ``above_share`` as a share; ``change`` is the median of the KL over the untrained one, less 1.
    """
    trained = points[points["selector"].isin(_SELECTORS.values())]
    same = ["setting", "selector", "seed", "layer"]
    start = trained[trained["tokens"] == 0].drop_duplicates(same)[[*same, "kl", "rows"]]
    trained = trained[trained["tokens"] > 0].merge(start, "left", on=same, suffixes=("", "_start"))
    pairs = [_on_shared_rows(*row) for row in trained[["kl", "rows", "kl_start", "rows_start"]].itertuples(index=False)]
    trained[["kl", "start"]] = np.array(pairs, dtype=float).reshape(-1, 2)
    rows = []
    for key, part in trained.groupby([*_RUN, "tokens"], sort=False, dropna=False):
        rose, known = part["rose"].dropna(), part.dropna(subset=["start"])
        above = int((known["kl"] > known["start"]).sum())
        rows.append((*key, bool(part["end"].any()), part["seed"].nunique(), len(part),
                     float(rose.sum()) if len(rose) else np.nan, len(known), above if len(known) else np.nan,
                     above / len(known) if len(known) else np.nan, (known["kl"] / known["start"]).median() - 1))
    return _indexed(rows, ["tokens", "end", "seeds", "candidates", "rose", "compared", "above", "above_share",
                           "change"])


def noise(points: pd.DataFrame) -> pd.DataFrame:
    """Set the noise of candidates' KL against its spread over layers, and predict from it how far rankings repeat.

    Both are standard deviations of the natural logarithm of the KL (of the value over its mean size where one is not
    above 0), so shares of a KL. Two sources of noise, ``source``: ``"seeds"``, what is left of a layer's value in one
    seed beside the means of layer and seed; ``"text"``, the held-out rows that one seed was measured on, mean over
    seeds. ``ratio`` is spread over noise; ``reliability`` = spread^2 / (spread^2 + noise^2), the correlation that
    attenuation leaves of two measurements of one truth (Spearman, 1904); ``predicted`` is Spearman's coefficient for
    it if values are normal, 6 / pi arcsin(reliability / 2) (Pearson, 1907); ``observed`` is that of seeds;
    ``seeds_for`` says how many seeds' mean has a reliability of 0.9 by Spearman's and Brown's formula (1910).
    """
    rows = []
    for key, tokens, seeds, values, end in _rankings(points):
        sources, positive = {}, (values > 0).all() or (values < 0).all()
        if len(values) > 1:
            scaled = np.log(np.abs(values)) if positive else values / np.abs(values).mean()
            left = _residual_variance(scaled)
            sources["seeds"] = left, max(scaled.mean(0).var(ddof=1) - left / len(values), 0.0)
        by_row = _held_out(points, key, tokens, seeds) if positive else []
        if len(by_row):
            text = [_residual_variance(one / one.mean(0)) / len(one) for one in by_row]  # each (rows, layers)
            spread = [np.log(one.mean(0)).var(ddof=1) for one in by_row]
            sources["text"] = np.mean(text), max(np.mean(spread) - np.mean(text), 0.0)
        observed = _between_seeds(spearman)(*values) if len(values) > 1 else np.nan
        for source, (left, spread) in sources.items():
            r = spread / (spread + left) if spread + left else np.nan
            rows.append((*key, tokens, end, source, len(values), left ** 0.5, spread ** 0.5,
                         (spread / left) ** 0.5 if left else np.inf, r, 6 / np.pi * np.arcsin(r / 2),
                         observed if source == "seeds" else np.nan,
                         max(1.0, np.ceil(9 * (1 - r) / r)) if r else np.inf))
    return _indexed(rows, ["tokens", "end", "source", "seeds", "noise", "spread", "ratio", "reliability", "predicted",
                           "observed", "seeds_for"])


def tables_of(points: pd.DataFrame, budget: float | int) -> dict[str, pd.DataFrame]:
    """Make every table of this module by its name, and ``"law"``: a row a run, what its end says side by side.

    ``law`` has columns of `repetition`, of `noise` between seeds and of `risen`; ``early`` is the ``share`` of
    `settling` at the first point after some training. nan is not on record.
    """
    own = {"coverage": coverage(points), "repetition": repetition(points, budget),
           "settling": settling(points, budget), "risen": risen(points), "noise": noise(points)}
    early = own["settling"][own["settling"]["tokens"] > 0].reset_index().drop_duplicates(_RUN)
    law = _indexed([key for key, _ in points.groupby(_RUN, sort=False, dropna=False)], []).reset_index()
    for part in (
            _at_end(own["repetition"], ["seeds", "spearman", "spearman_low", "spearman_high", "jaccard", "chance"]),
            _at_end(own["noise"][own["noise"]["source"] == "seeds"], ["ratio", "predicted", "seeds_for"]),
            early[[*_RUN, "share"]].rename(columns={"share": "early"}),
            _at_end(own["risen"], ["candidates", "rose", "compared", "above"])):
        law = law.merge(part, "left", on=_RUN)
    return own | {"law": law.set_index(_RUN)}


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """Show a frame of this module as text: without the setting and grouping that all rows share, intervals beside their
    values, a dash for what is not on record."""
    shown = frame.reset_index()
    same = [name for name in ("setting", "grouping") if shown.loc[shown[name] != "", name].nunique() < 2]
    shown = shown.drop(columns=[*same, "end"], errors="ignore")
    table = {_HEADINGS.get(name, name): [
        _cell(name, *values) for values in zip(*(shown[own] for own in (name, f"{name}_low", f"{name}_high")
                                                 if own in shown))]
             for name in shown if not name.endswith(("_low", "_high"))}
    return pd.DataFrame(table).set_index([_HEADINGS.get(name, name) for name in _RUN if name in shown])


def _rankings(points) -> Iterator[tuple]:
    """Runs and points with at least one seed of all layers: key, tokens, seeds, values (seeds, layers), end."""
    for (*key, tokens), part in points.groupby([*_RUN, "tokens"], sort=False, dropna=False):
        table = part.pivot_table(index="seed", columns="layer", values="value").dropna()
        if table.shape[1] == part["num_layers"].iloc[0] and len(table):
            yield tuple(map(_key, key)), tokens, list(table.index), table.to_numpy(), bool(part["end"].all())


def _held_out(points, key, tokens, seeds):
    """The KL of held-out rows of each seed, (rows, layers) each; empty if one candidate has none."""
    run = points[(points["tokens"] == tokens) & points["seed"].isin(seeds)]
    for name, value in zip(_RUN, key):
        run = run[run[name].isna() if value is None else run[name] == value]
    if run["rows"].isna().any() or run["rows"].map(len).nunique() > 1:
        return []
    return [np.array(part.sort_values("layer")["rows"].tolist()).T for _, part in run.groupby("seed")]


def _on_shared_rows(kl, rows, start, start_rows):
    """Two figures of a candidate on the held-out rows that both were measured on, which are the first ones."""
    if not isinstance(rows, list) or not isinstance(start_rows, list) or len(rows) == len(start_rows):
        return kl, start
    count = min(len(rows), len(start_rows))
    return np.mean(rows[:count]), np.mean(start_rows[:count])


def _between_seeds(agreement):
    def mean(*seeds):
        return np.mean([agreement(a, b) for a, b in combinations(seeds, 2)], axis=0)
    return mean


def _residual_variance(table):
    """Of (repetitions, layers), beside the means of both."""
    left = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    return (left ** 2).sum() / ((len(table) - 1) * (table.shape[1] - 1))


def _at_end(frame, columns):
    return frame[frame["end"].astype(bool)].reset_index()[[*_RUN, *columns]]


def _cell(name, value, low=np.nan, high=np.nan):
    if isinstance(value, (str, tuple)):
        return value if isinstance(value, str) else ", ".join(f"{part:,}" for part in value)
    if pd.isna(value) or np.isinf(value):
        return "\u2013" if pd.isna(value) else "\u221e"
    return f"{value:g}" if name == "rate" else f"{value:,.0f}" if name in _COUNTS else format_interval(
        value, low, high, 3 if name in ("noise", "spread") else 2)


def _key(value):
    return None if pd.isna(value) else value


def _indexed(rows, columns):
    return pd.DataFrame(rows, columns=[*_RUN, *columns]).astype({"rate": float, "length": float}).set_index(_RUN)


def _setting(record):
    p = record.parameters
    aligned = {k: v for k, v in p["aligned"].items() if k not in ("seed", "data")}
    name = f"{aligned['teacher']}, {p['mixer']}, {aligned['num_tokens']:,} tokens of stage 1, {record.device}"
    return _text({"aligned": aligned, "heldout": p["heldout_tokens"], "name": name})


def _numbered(names, keys, within=None):
    """Each name, with a number where different keys bear it (`within` a part)."""
    own = pd.DataFrame({"name": list(names), "key": list(keys), "part": "" if within is None else list(within)})
    number = own.groupby(["part", "name"])["key"].transform(lambda part: pd.factorize(part)[0])
    return [f"{name} ({n + 1})" if n else name for name, n in zip(own["name"], number)]


def _text(parameters):
    return json.dumps(parameters, sort_keys=True)
