"""What records allow to say: paired comparisons of hybrids, agreement of rankings, and the hybrids of a ledger."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from hybridlib.checks import check_choice
from hybridlib.records.ledger import Ledger, Record
from hybridlib.report.style import MEASURES, format_interval, format_number
from hybridlib.report.tables import attention_rate
from hybridlib.selection.agreement import (RANGES, bootstrap_interval, chance_jaccard, kendall, paired_difference,
                                           spearman, top_k_jaccard)
from hybridlib.selection.rules import select
from hybridlib.selection.scores import LayerScores

__all__ = ["direction", "outcome", "rankings", "recorded_hybrids", "verdicts"]

_NAMES = ["teacher", "mixer", "softmax_layers"]  # what every setting is named by, and what it may be told apart by
_APART = {"corpus": "text {}", "align_tokens": "{:,} tokens of stage 1", "match_tokens": "{:,} tokens of stage 2",
          "align_learning_rate": "stage 1 at {}", "match_learning_rate": "stage 2 at {}",
          "attention_learning_rate": "higher rate {}", "grouping": "{} at the higher rate",
          "recall_pairs": "recall of {} pairs", "device": "{}"}


def outcome(frame: pd.DataFrame, value: str, a: str, b: str, *, digits: int = 4) -> str:
    """State the mean of a - b over the seeds of both, its 95% interval, ``lower`` or ``higher`` where that excludes 0,
    and how many seeds they share where one has more.

    `frame` has one row a selector and seed, as `Study.compare` gives it; `value` is a key of `style.MEASURES`. Raises
    ValueError for an unknown name, or two rows of a selector and seed.
    """
    check_choice("value", value, tuple(MEASURES))
    for selector in (a, b):
        check_choice("selector", selector, tuple(frame["selector"].unique()))
    rows = frame[frame["selector"].isin([a, b])].dropna(subset=[value])
    pairs = rows.pivot(index="seed", columns="selector", values=value).reindex(columns=list(dict.fromkeys((a, b))))
    seeds, pairs = len(pairs), pairs.dropna()
    if pairs.empty:
        return "no seed in common"
    shared = "" if len(pairs) == seeds else f"; seeds: {len(pairs)} of {seeds} in common"
    if (pairs[a] == pairs[b]).all():
        return "equal on every seed" + shared
    mean, low, high = paired_difference(pairs[a], pairs[b], within=RANGES[value])
    if high - low < 1e-9 * abs(mean):  # shares of few prompts can differ by the same step on every seed
        low = high = float("nan")
    number = f"{format_interval(mean, low, high, digits)} {MEASURES[value].unit}".strip()
    return f"{number}: {direction(low, high, len(pairs))}{shared}"


def direction(low: float, high: float, seeds: int) -> str:
    """Say what an interval over `seeds` allows to say of a difference."""
    if seeds == 1:
        return "one seed cannot tell"
    return "lower" if high < 0 else "higher" if low > 0 else "not told apart"


def verdicts(frame: pd.DataFrame, pairs: Iterable[tuple[str, str]],
             values: Sequence[str] = ("kl", "recall_exact")) -> pd.DataFrame:
    """State the `outcome` of every pair, a row each, by every value, a column each, or which of the two is not on
    record; for each ``setting``, if `frame` has that column. Empty for an empty frame."""
    if frame.empty:
        return pd.DataFrame()
    if "setting" in frame:
        pairs, parts = list(pairs), frame.groupby("setting", sort=False)
        return pd.concat({name: verdicts(part.drop(columns="setting"), pairs, values) for name, part in parts},
                         names=["setting"])
    missing = {(a, b): ", ".join(name for name in (a, b) if name not in set(frame["selector"])) for a, b in pairs}
    return pd.DataFrame({f"{MEASURES[value].name} ({MEASURES[value].better} is better)": {
        f"{a} against {b}": f"not on record: {names}" if names else outcome(frame, value, a, b)
        for (a, b), names in missing.items()} for value in values}).rename_axis("comparison")


def rankings(pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]], k: int) -> pd.DataFrame:
    """Compare two scores (layers,), higher = keep, of each pair, as text: Spearman, Kendall (tau-b) and Jaccard of the
    `k` best, with 95% bootstrap intervals over layers, and Jaccard by chance."""
    measures = {"Spearman [95%]": spearman, "Kendall [95%]": kendall,
                f"Jaccard of the best {k} [95%]": lambda x, y: top_k_jaccard(x, y, k)}
    return pd.DataFrame.from_dict({label: {
        heading: format_interval(*bootstrap_interval(measure, a, b), 2) for heading, measure in measures.items()}
        | {"Jaccard by chance": format_number(chance_jaccard(len(a), k), 2)} for label, (a, b) in pairs.items()},
        orient="index").rename_axis("pair")


def recorded_hybrids(ledger: Ledger, rules: Mapping[str, Mapping | None], mixer: str | None = None) -> pd.DataFrame:
    """Find a ledger's hybrids whose layers the `rules` would keep: a row a setting, rule and seed, empty if none.

    `rules` is label -> arguments of `Study.select` (``selector``, ``mixer`` of the probe, ``normalize``), or None for
    the hybrid that keeps no layer, which stands in every budget's setting; `mixer` None takes any hybrid. Layers are
    chosen again from the longest recorded scores.

    Hybrids of one ``setting`` differ in layers, seed and the text's fingerprint alone, measurements on the way apart;
    of a rule and seed the latest counts, but where a rule keeps other layers by other text, each text has a setting.
    The deepest teacher is first, then the latest setting. Its name is unique: teacher, mixer and budget, then what else
    tells those alike apart. Columns are those of `Study.compare`, and what was run, for `tables.settings_table`.
    """
    records = list(ledger)
    depths = {_text(r.parameters): len(r.metrics["heldout_error"]) for r in records if r.kind == "align"}
    rows = [_row(label, r, depths) for r in records if r.kind == "hybrid" and mixer in (None, r.parameters["mixer"])
            for label, rule in rules.items()
            if _layers_by_rule(rule, r, records, depths) == tuple(r.parameters["layers"])]
    settings: list[pd.DataFrame] = []
    for _, alike in pd.DataFrame(rows).groupby(["common", "device"]) if rows else ():
        for count in set(alike["count"]) - {0}:
            part = alike[alike["count"].isin([0, count])].assign(softmax_layers=f"{count} of {alike['depth'].iloc[0]}")
            latest = part.drop_duplicates(["selector", "seed", "layers"], keep="last")
            by_text = part.groupby(part.groupby("seed")["text"].transform(lambda texts: pd.factorize(texts)[0]))
            settings += [own for _, own in by_text] if latest.duplicated(["selector", "seed"]).any() else [latest]
    if not settings:
        return pd.DataFrame(columns=["setting", "selector", "seed"])
    settings.sort(key=lambda part: (part["depth"].iloc[0], part["started"].max()), reverse=True)
    frame = pd.concat([part.assign(setting=name) for name, part in zip(_names(settings), settings)])
    places = {name: {value: i for i, value in enumerate(order)}
              for name, order in (("setting", frame["setting"].unique()), ("selector", rules))}
    return frame.drop(columns=["common", "count", "depth", "text"]).sort_values(
        ["setting", "selector", "seed"], key=lambda c: c.map(places[c.name]) if c.name in places else c,
        ignore_index=True)


def _names(settings: list[pd.DataFrame]) -> list[str]:
    """Name settings (frames of one each) by what tells them apart; a number comes last, where nothing else does."""
    firsts, names = pd.DataFrame([part.iloc[0] for part in settings]), []
    for _, row in firsts.iterrows():
        alike = firsts[(firsts[_NAMES] == row[_NAMES]).all(axis=1)]
        apart = [form.format(row[name]) for name, form in _APART.items() if alike[name].nunique(dropna=False) > 1]
        names.append(", ".join([*row[_NAMES], *apart]))
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _layers_by_rule(rule, hybrid: Record, records: list[Record], depths: dict[str, int]) -> tuple[int, ...] | None:
    p = hybrid.parameters
    count, num_layers = len(p["layers"]), depths.get(_text(p["aligned"]))
    if rule is None or count == 0 or num_layers is None:
        return () if rule is None and num_layers is not None else None
    same = {"aligned": p["aligned"] | {"mixer": rule.get("mixer") or p["mixer"]}}
    scores = []
    for own in ({"direction": "add", "metric": "kl", "settings": p["settings"]},
                {"direction": "remove", "metric": "kl", "settings": p["settings"]},
                {"direction": "add", "metric": "mse", "normalize": rule.get("normalize", True)}):
        alike = [r for r in records if r.kind == "score" and (same | own).items() <= r.parameters.items()]
        if alike:
            longest = max(alike, key=lambda r: (r.tokens or 0, r.parameters["heldout_tokens"], r.started))
            scores.append(LayerScores.from_dict(longest.metrics))
    try:
        return select(rule["selector"], count, scores=scores, num_layers=num_layers, seed=p["seed"])
    except ValueError:  # the scores that it needs were not recorded
        return None


def _row(label: str, record: Record, depths: dict[str, int]) -> dict:
    p = record.parameters
    aligned, trained = p["aligned"], p.get("settings", {})
    common = {k: v for k, v in p.items() if k not in ("seed", "layers", "measure_at")}
    common["aligned"] = {k: v for k, v in aligned.items() if k not in ("seed", "data")}
    return {"selector": label, "seed": p["seed"], "layers": tuple(p["layers"]),
            **{k: v for k, v in record.metrics.items() if not isinstance(v, (list, dict))},
            "teacher": aligned["teacher"], "mixer": p["mixer"], "align_tokens": aligned["num_tokens"],
            "match_tokens": p["num_tokens"], "align_learning_rate": aligned.get("settings", {}).get("learning_rate"),
            "match_learning_rate": trained.get("learning_rate"),
            **attention_rate(trained), "corpus": aligned.get("corpus"),
            "recall_pairs": p.get("recall", {}).get("pairs"), "device": record.device,
            "commit": record.commit and record.commit[:7] + record.commit[40:],  # that of an edited tree says so
            "started": record.started,
            "common": _text(common), "count": len(p["layers"]), "depth": depths[_text(aligned)],
            "text": str(aligned.get("data"))}


def _text(parameters: dict) -> str:
    return json.dumps(parameters, sort_keys=True)
