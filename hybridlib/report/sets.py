"""How well layer scores, their interactions and an early look predict how good a set of layers ends, and what racing
sets brings: frames from records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from math import comb

import numpy as np
import pandas as pd

from hybridlib.records.ledger import Ledger, Record
from hybridlib.selection.agreement import bootstrap_interval, spearman
from hybridlib.selection.cost import Cost
from hybridlib.selection.rules import select
from hybridlib.selection.scores import LayerScores
from hybridlib.study.catalogue import SELECTORS
from hybridlib.study.evidence import RANDOM_SETS, balanced_sets
from hybridlib.study.selector import Selection

__all__ = ["arms", "leave_one_out", "on_record", "predictions", "race_table", "recorded_choices",
           "recorded_random", "recorded_values", "ridge_prediction", "set_table"]

PENALTIES = tuple(10.0 ** np.arange(-3, 5))  # that a ridge regression chooses from
END = "end"  # the column with what is to be predicted
_KINDS = {"ga-s2": {"direction": "add", "metric": "kl"}, "gr-s2": {"direction": "remove", "metric": "kl"},
          "gate-gradient": {"selector": "gate-gradient", "at": 0.0, "order": 1, "steps": 1}}
_VARIANTS = ("train_tokens", "families", "early_stop")  # of which a selector's own record has none


def set_table(records: Iterable[Record], values: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """Make a row a hybrid of `records`, indexed by its layers, of what may predict its held-out KL, lower for better.

    Columns: `END`, the KL in nats a token; for each of `values`, label -> (layers,), higher = keep, the sum over the
    set with the sign turned; then the KL after each number of tokens that all were measured at.
    """
    rows, points = [], []
    for record in records:
        layers = tuple(record.parameters["layers"])
        early = {point["tokens"]: point["kl"] for point in record.metrics.get("curve", ())}
        rows.append({"layers": layers, END: record.metrics["kl"],
                     **{label: -float(sum(own[l] for l in layers)) for label, own in values.items()},
                     **{f"KL after {tokens:,} tokens": kl for tokens, kl in sorted(early.items())}})
        points.append(rows[-1].keys())
    if not rows:
        return pd.DataFrame(columns=[END])
    return pd.DataFrame(rows)[[name for name in rows[0] if all(name in row for row in points)]].set_index("layers")


def leave_one_out(features: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """Predict each y (n,) by a ridge regression on `features` (n, p) and a free mean, fitted to all others.

    From one fit: y_i - (y_i - fitted_i) / (1 - h_i) with h the diagonal of the hat matrix (Allen, 1974). nan where a
    row alone decides its own fit.
    """
    n = len(y)
    centred = features - features.mean(0)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    keep = size > 1e-10 * max(size.max(initial=0), 1e-300)
    left = left[:, keep] * np.sqrt(size[keep] ** 2 / (size[keep] ** 2 + penalty))
    leverage = 1 / n + (left ** 2).sum(1)
    fitted = y.mean() + left @ (left.T @ (y - y.mean()))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(1 - leverage > 1e-9, y - (y - fitted) / (1 - leverage), np.nan)


def ridge_prediction(features: np.ndarray, y: np.ndarray, penalties: Sequence[float] = PENALTIES) -> np.ndarray:
    """Predict each y (n,) from all others: `features` (n, p) get unit variance, and the penalty is the one of the least
    `leave_one_out` error among those others, so that nothing of a row enters its own prediction."""
    spread = features.std(0)
    x = (features - features.mean(0))[:, spread > 0] / spread[spread > 0]
    predicted = np.empty(len(y))
    for i in range(len(y)):
        rest = np.arange(len(y)) != i
        errors = [np.nanmean((leave_one_out(x[rest], y[rest], penalty) - y[rest]) ** 2) for penalty in penalties]
        penalty, mean = penalties[int(np.argmin(errors))], x[rest].mean(0)
        others, centred = x[rest] - mean, y[rest] - y[rest].mean()
        weights = others.T @ np.linalg.solve(others @ others.T + penalty * np.eye(len(others)), centred)
        predicted[i] = y[rest].mean() + (x[i] - mean) @ weights
    return predicted


def predictions(table: pd.DataFrame, labels: Sequence[str] = ()) -> pd.DataFrame:
    """Measure how well each column of a `set_table`, and regressions on the sets' layers, predict the end.

    Returns
    -------
    DataFrame
        A row a predictor: ``spearman`` of predicted and measured, and ``r2`` = 1 - sum (y - y')^2 / sum (y - m)^2, y'
        predicted by a line through the other sets and m their mean, each with ``_low`` and ``_high``, a bootstrap
        interval over sets; ``sets``. The regressions are ridges, see `ridge_prediction`, on which layers are in the
        set, and on the sums in the columns `labels` and which pairs are in it. Empty for fewer than 5 sets.
    """
    if len(table) < 5:
        return pd.DataFrame(columns=["sets", *(f"{name}{end}" for name in ("spearman", "r2")
                                               for end in ("", "_low", "_high"))])
    y = table[END].to_numpy(dtype=float)
    num_layers = 1 + max(max(layers) for layers in table.index)
    member = np.array([np.isin(range(num_layers), layers) for layers in table.index], dtype=float)
    pairs = np.array([member[:, i] * member[:, j] for i, j in combinations(range(num_layers), 2)]).T
    base = leave_one_out(np.empty((len(y), 0)), y, 1.0)
    scores = table[[label for label in labels if label in table]].to_numpy(dtype=float)
    guesses = {name: (column, leave_one_out(column[:, None], y, 0.0))
               for name in table.columns.drop(END) if np.ptp(column := table[name].to_numpy(dtype=float)) > 0}
    for name, features in (("ridge on layers", member), ("ridge on scores and pairs", np.hstack([scores, pairs]))):
        guesses[name] = (ridge_prediction(features, y),) * 2
    rows = {name: dict(zip(
        ("sets", "spearman", "spearman_low", "spearman_high", "r2", "r2_low", "r2_high"),
        (len(y), *bootstrap_interval(spearman, predicted, y), *bootstrap_interval(_r2, y, by_line, base))))
        for name, (predicted, by_line) in guesses.items() if np.isfinite(by_line).all()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("predictor")


def _r2(y, predicted, base):
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - ((y - predicted) ** 2).sum(-1) / ((y - base) ** 2).sum(-1)


def arms(choices: Mapping[str, Mapping[int, Selection]], hybrids: pd.DataFrame) -> pd.DataFrame:
    """Join to what each selection cost its hybrid, if there is one: ``tokens`` trained on and ``flops``, and as a share
    of GA-S2's of the same seed (nan where one is not known). `choices` is label -> seed -> selection, `hybrids` as
    `Study.compare` gives them."""
    spent = pd.DataFrame([{"selector": label, "seed": seed, "tokens": one.cost and one.cost.training_tokens,
                           "flops": one.cost and one.cost.flops} for label, by_seed in choices.items()
                          for seed, one in by_seed.items()], columns=["selector", "seed", "tokens", "flops"])
    spent = spent.astype({"tokens": float, "flops": float})
    reference = spent[spent["selector"] == SELECTORS["ga-s2"].title].set_index("seed")
    for name in ("tokens", "flops"):
        spent[f"{name}_share"] = spent[name] / spent["seed"].map(reference[name]).astype(float)
    return spent.merge(hybrids.drop(columns=["tokens", "flops"], errors="ignore"), "left", ["selector", "seed"])


def race_table(record: Record) -> pd.DataFrame:
    """Make a row a set and round of a race: ``round`` from 1 on, ``tokens`` a set, ``layers``, ``kl`` (nan if it could
    not be trained), ``rank`` in the round, and ``last``, whether the set went no further."""
    rows = [{"round": i, "tokens": part["tokens"], "layers": tuple(row["layers"]), "kl": row.get("kl", float("nan"))}
            for i, part in enumerate(record.metrics["rounds"], 1) for row in part["sets"]]
    table = pd.DataFrame(rows, columns=["round", "tokens", "layers", "kl"])
    return table.assign(rank=table.groupby("round")["kl"].rank(method="first"),
                        last=table["round"] == table.groupby("layers")["round"].transform("max"))


def recorded_random(ledger: Ledger) -> list[Record]:
    """Find the hybrids of balanced random sets that were measured on the way: those of the seed and settings with most
    sets, and of these the longest trained."""
    depths = {_text(r.parameters): len(r.metrics["heldout_error"]) for r in ledger if r.kind == "align"}
    groups: dict[str, list[Record]] = {}
    for record in ledger.find("hybrid"):
        p = record.parameters
        num_layers, size = depths.get(_text(p["aligned"]), 0), len(p["layers"])
        if p.get("measure_at") and 0 < size < num_layers and tuple(p["layers"]) in balanced_sets(
                num_layers, size, min(RANDOM_SETS, comb(num_layers, size))):
            groups.setdefault(_text({k: v for k, v in p.items() if k != "layers"} | {"size": size}), []).append(record)
    return max(groups.values(), key=lambda group: (len(group), group[0].parameters["num_tokens"]), default=[])


def recorded_values(ledger: Ledger, hybrid: Record) -> dict[str, tuple[float, ...]]:
    """Read the scores of GA-S2, GR-S2 and the gate gradient for the student and the settings of `hybrid`: title ->
    (layers,), higher = keep; of each the longest trained."""
    return {SELECTORS[name].title: LayerScores.from_dict(record.metrics).values
            for name, record in _scores(ledger, hybrid.parameters).items()}


def recorded_choices(ledger: Ledger) -> tuple[dict[str, dict[int, Selection]], pd.DataFrame]:
    """Find races, and GA-S2's, the gate gradient's and the uniform sets for the same students, with their hybrids:
    `choices` and `hybrids` for `arms`; hybrids of one length, that of the longest of a race's set."""
    hybrids, choices, rows = ledger.find("hybrid"), {}, []
    for race in ledger.find("score", selector="race"):
        p, count = race.parameters, race.parameters["budget"]
        same = [h for h in hybrids if h.parameters["aligned"] == p["aligned"]
                and h.parameters["settings"] == p["settings"]]
        scores = {name: LayerScores.from_dict(r.metrics) for name, r in _scores(ledger, p).items() if name != "gr-s2"}
        chosen = {f"race, {p['num_tokens']:,} tokens": Selection(tuple(race.metrics["layers"]), Cost.from_dict(
            race.metrics["cost"]) if race.metrics["cost"] else None)}
        chosen |= {SELECTORS[name].title: Selection(own.best(count), own.cost) for name, own in scores.items()}
        if scores:
            depth = len(next(iter(scores.values())).values)
            chosen["uniform"] = Selection(select("uniform", count, num_layers=depth), Cost())
        lengths = [h.parameters["num_tokens"] for h in same if h.parameters["layers"] == race.metrics["layers"]]
        for label, one in chosen.items():
            choices.setdefault(label, {})[race.seed] = one
            ends = [h for h in same if tuple(h.parameters["layers"]) == one.layers and lengths
                    and h.parameters["num_tokens"] == max(lengths)]
            rows += [{"selector": label, "seed": race.seed, "layers": one.layers, "match_tokens": max(lengths),
                      "kl": h.metrics["kl"], "recall_exact": h.metrics.get("recall_exact")} for h in ends[-1:]]
    columns = ["selector", "seed", "layers", "match_tokens", "kl", "recall_exact"]
    return choices, pd.DataFrame(rows, columns=columns).drop_duplicates(["selector", "seed"])


def on_record(ledger: Ledger) -> pd.DataFrame:
    """Count what there is in `ledger` for this chapter, and what was planned."""
    random = recorded_random(ledger)
    students = random or [r for r in ledger.find("score", metric="kl") if "settings" in r.parameters]
    scores = _scores(ledger, students[-1].parameters) if students else {}
    return pd.DataFrame({"on record": {"random sets": len(random), "scores of layers": len(scores),
                                       "races": len(ledger.find("score", selector="race"))},
                         "planned": {"random sets": RANDOM_SETS, "scores of layers": len(_KINDS), "races": 1}})


def _scores(ledger, parameters) -> dict[str, Record]:
    found = {}
    for name, kind in _KINDS.items():
        alike = [r for r in ledger.find("score", aligned=parameters["aligned"], **kind)
                 if r.parameters.get("settings", parameters["settings"]) == parameters["settings"]
                 and not set(_VARIANTS) & set(r.parameters)]
        if alike:
            found[name] = max(alike, key=lambda r: (r.parameters.get("num_tokens", 0), r.started))
    return found


def _text(parameters):
    return json.dumps(parameters, sort_keys=True)
