"""What records allow to say: paired comparisons of hybrids, agreement of rankings, and the hybrids of a ledger."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from hybridlib.checks import check_choice
from hybridlib.records.ledger import Ledger, Record
from hybridlib.report.style import MEASURES, format_interval, format_number
from hybridlib.selection.agreement import (RANGES, bootstrap_interval, chance_jaccard, kendall, paired_difference,
                                           spearman, top_k_jaccard)
from hybridlib.selection.rules import select
from hybridlib.selection.scores import LayerScores

__all__ = ["direction", "outcome", "rankings", "recorded_hybrids", "verdicts"]


def outcome(frame: pd.DataFrame, value: str, a: str, b: str, *, digits: int = 4) -> str:
    """State the mean of a - b over seeds, its 95% interval, and ``lower`` or ``higher`` where that excludes 0.

    `frame` has one row a selector and seed, as `Study.compare` gives it; `value` is a key of `style.MEASURES`. Raises
    ValueError for an unknown name, or two rows of a selector and seed.
    """
    check_choice("value", value, tuple(MEASURES))
    for selector in (a, b):
        check_choice("selector", selector, tuple(frame["selector"].unique()))
    rows = frame[frame["selector"].isin([a, b])]
    pairs = rows.pivot(index="seed", columns="selector", values=value).dropna()
    if pairs.empty:
        return "no seed in common"
    if (pairs[a] == pairs[b]).all():
        return "equal on every seed"
    mean, low, high = paired_difference(pairs[a], pairs[b], within=RANGES[value])
    if high - low < 1e-9 * abs(mean):  # shares of few prompts can differ by the same step on every seed
        low = high = float("nan")
    number = f"{format_interval(mean, low, high, digits)} {MEASURES[value].unit}".strip()
    return f"{number}: {direction(low, high, len(pairs))}"


def direction(low: float, high: float, seeds: int) -> str:
    """Say what an interval over `seeds` allows to say of a difference."""
    if seeds == 1:
        return "one seed cannot tell"
    return "lower" if high < 0 else "higher" if low > 0 else "not told apart"


def verdicts(frame: pd.DataFrame, pairs: Iterable[tuple[str, str]],
             values: Sequence[str] = ("kl", "recall_exact")) -> pd.DataFrame:
    """State the `outcome` of every pair, a row each, by every value, a column each; empty for an empty frame."""
    if frame.empty:
        return pd.DataFrame()
    selectors = set(frame["selector"])
    return pd.DataFrame({f"{MEASURES[value].name} ({MEASURES[value].better} is better)": {
        f"{a} against {b}": outcome(frame, value, a, b) if {a, b} <= selectors else "not both were run"
        for a, b in pairs} for value in values}).rename_axis("comparison")


def rankings(pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]], k: int) -> pd.DataFrame:
    """Compare two scores (layers,), higher = keep, of each pair, as text: Spearman, Kendall (tau-b) and Jaccard of the
    `k` best, with 95% bootstrap intervals over layers, and Jaccard by chance."""
    measures = {"Spearman [95%]": spearman, "Kendall [95%]": kendall,
                f"Jaccard of the best {k} [95%]": lambda x, y: top_k_jaccard(x, y, k)}
    return pd.DataFrame.from_dict({label: {
        heading: format_interval(*bootstrap_interval(measure, a, b), 2) for heading, measure in measures.items()}
        | {"Jaccard by chance": format_number(chance_jaccard(len(a), k), 2)} for label, (a, b) in pairs.items()},
        orient="index").rename_axis("pair")


def recorded_hybrids(ledger: Ledger, rules: Mapping[str, Mapping | None], mixer: str | None = None, *,
                     require: Iterable[str] = ()) -> pd.DataFrame:
    """Find a ledger's hybrids whose layers the `rules` would keep: a row a rule and seed, empty if none.

    `rules` is label -> arguments of `Study.select` (``selector``, ``mixer`` of the probe, ``normalize``), or None for
    the hybrid that keeps no layer; `mixer` None takes any hybrid. Layers are chosen again from the longest recorded
    scores. Of several settings that have all labels in `require`, the one with most rules is taken, the latest of
    equals. Columns are those of `Study.compare`, and what was run, for `tables.settings_table`.
    """
    records = list(ledger)
    depths = {_text(r.parameters): len(r.metrics["heldout_error"]) for r in records if r.kind == "align"}
    settings: dict[tuple[str, int], list[dict]] = {}
    for r in records:
        if r.kind != "hybrid" or mixer not in (None, r.parameters["mixer"]):
            continue
        p, layers = r.parameters, tuple(r.parameters["layers"])
        common = {k: v for k, v in p.items() if k not in ("seed", "layers", "aligned")}
        common["aligned"] = {k: v for k, v in p["aligned"].items() if k not in ("seed", "data")}
        labels = [label for label, rule in rules.items() if _layers_by_rule(rule, r, records, depths) == layers]
        settings.setdefault((_text(common), len(layers)), []).extend(_row(label, r, depths) for label in labels)
    labels = {key: {row["selector"] for row in rows} for key, rows in settings.items() if key[1]}
    complete = [key for key, names in labels.items() if names and set(require) <= names]
    if not complete:
        return pd.DataFrame()
    common, count = max(complete, key=lambda key: (len(labels[key]), max(row["started"] for row in settings[key]), key))
    frame = pd.DataFrame(settings[common, count] + settings.get((common, 0), []))
    frame["softmax_layers"] = frame["softmax_layers"].iloc[0]  # of the setting: the floor has none
    order = {name: i for i, name in enumerate(rules)}
    frame = frame.sort_values(["selector", "seed"], key=lambda c: c.map(order) if c.name == "selector" else c)
    return frame.drop_duplicates(["selector", "seed"]).reset_index(drop=True)


def _layers_by_rule(rule, hybrid: Record, records: list[Record], depths: dict[str, int]) -> tuple[int, ...] | None:
    p = hybrid.parameters
    count, num_layers = len(p["layers"]), depths.get(_text(p["aligned"]))
    if rule is None or count == 0 or num_layers is None:
        return () if rule is None and num_layers is not None else None
    same = {"aligned": p["aligned"] | {"mixer": rule.get("mixer") or p["mixer"]}, "heldout_tokens": p["heldout_tokens"]}
    scores = []
    for own in ({"direction": "add", "metric": "kl", "settings": p["settings"]},
                {"direction": "remove", "metric": "kl", "settings": p["settings"]},
                {"direction": "add", "metric": "mse", "normalize": rule.get("normalize", True)}):
        alike = [r for r in records if r.kind == "score" and (same | own).items() <= r.parameters.items()]
        if alike:
            longest = max(alike, key=lambda r: (r.tokens or 0, r.started))
            scores.append(LayerScores.from_dict(longest.metrics))
    try:
        return select(rule["selector"], count, scores=scores, num_layers=num_layers, seed=p["seed"])
    except ValueError:  # the scores that it needs were not recorded
        return None


def _row(label: str, record: Record, depths: dict[str, int]) -> dict:
    p = record.parameters
    return {"selector": label, "seed": p["seed"], "layers": tuple(p["layers"]),
            **{k: v for k, v in record.metrics.items() if not isinstance(v, list)},
            "teacher": p["aligned"]["teacher"], "mixer": p["mixer"],
            "softmax_layers": f"{len(p['layers'])} of {depths[_text(p['aligned'])]}",
            "align_tokens": p["aligned"]["num_tokens"], "match_tokens": p["num_tokens"], "device": record.device,
            "commit": record.commit, "started": record.started}


def _text(parameters: dict) -> str:
    return json.dumps(parameters, sort_keys=True)
