"""What a notebook says of its records: rankings compared, verdicts, committed GPU runs and published figures.

Each sentence is made from numbers in records. "Replicates" and "does not replicate" are said only where the interval
of a paired difference excludes 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from hybridlib.checks import check_choice
from hybridlib.records.folders import data_folder
from hybridlib.records.ledger import Ledger, Record
from hybridlib.report.style import format_interval, format_number
from hybridlib.selection.agreement import (RANGES, bootstrap_interval, chance_jaccard, kendall, paired_difference,
                                           spearman, top_k_jaccard)
from hybridlib.selection.rules import select
from hybridlib.selection.scores import LayerScores

__all__ = ["OWN", "about", "published", "rankings", "recorded", "verdict", "verdicts"]

OWN = ("better here", "worse here")  # words of a `verdict` on a comparison that the paper does not make

_MEASURES = {"kl": ("held-out KL", "nats a token", "lower"), "perplexity": ("perplexity", "", "lower"),
             "recall_exact": ("recall", "share of answers", "higher"),
             "top1_agreement": ("top-1 agreement", "share of tokens", "higher")}
_RESULT = ("replicates here", "does not replicate here")


def verdict(frame: pd.DataFrame, value: str, a: str, b: str, *, words: tuple[str, str] = _RESULT,
            digits: int = 4) -> str:
    """Whether `a` is better than `b`, as a sentence in Markdown: the paired difference over seeds and what it allows.

    Parameters
    ----------
    frame : one row a selector and seed, as `Study.compare` or `recorded` give it.
    value : what to compare: ``"kl"``, ``"perplexity"``, ``"recall_exact"`` or ``"top1_agreement"``.
    a, b : two of the column ``selector``; the claim is that `a` is better.
    words : said where the 95% interval excludes 0, in the direction of the claim and against it.

    One seed in common, or the same difference on every seed, has no interval, and the sentence says so. Raises
    ValueError for an unknown name, or a selector that has two rows of one seed.
    """
    check_choice("value", value, tuple(_MEASURES))
    name, unit, better = _MEASURES[value]
    for selector in (a, b):
        check_choice("selector", selector, tuple(dict.fromkeys(frame["selector"])))
    rows = frame[frame["selector"].isin([a, b])]
    if rows.duplicated(["selector", "seed"]).any():
        raise ValueError(f"frame has two rows of one seed for {a!r} or {b!r}; one run a selector and seed is allowed")
    pairs = rows.pivot(index="seed", columns="selector", values=value).dropna()
    claim = f"**{a}** against **{b}**, {name} ({better} is better)"
    if pairs.empty:
        return f"{claim}: they have no seed in common, so there is **nothing to compare**."
    mean, low, high = paired_difference(pairs[a], pairs[b], within=RANGES[value])
    difference = f"{format_interval(mean, low, high, digits)}{' ' + unit if unit else ''}"
    if len(pairs) == 1:
        return f"{claim}: difference {difference} on one seed, and **one seed cannot tell**."
    text = f"{claim}: mean difference {difference} over {len(pairs)} seeds; "
    if (pairs[a] == pairs[b]).all():
        return f"{claim}: no difference on any of {len(pairs)} seeds; **cannot be told apart**."
    if high - low < 1e-9 * abs(mean):  # shares of few prompts can differ by the same step on every seed
        return text + "**cannot be told apart**: the differences do not vary, which gives no interval."
    if low <= 0 <= high:
        return text + "**cannot be told apart**: the interval of the difference contains 0."
    return text + f"**{words[0] if (mean < 0) == (better == 'lower') else words[1]}**."


def verdicts(frame: pd.DataFrame, pairs: Iterable[tuple[str, str]], values: Sequence[str] = ("kl", "recall_exact"), *,
             words: tuple[str, str] = _RESULT) -> str:
    """A list in Markdown of the `verdict` on every value and pair; empty for a frame without rows.

    A pair of which `frame` lacks one is said not to have been run.
    """
    if frame.empty:
        return ""
    run = set(frame["selector"])
    return "\n".join(f"- {verdict(frame, value, a, b, words=words)}" if {a, b} <= run else
                     f"- **{a}** against **{b}**: not both were run." for value in values for a, b in pairs)


def rankings(pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]], k: int) -> pd.DataFrame:
    """How far two scores of the same layers agree; one row a pair, as text.

    Parameters
    ----------
    pairs : label -> two scores (layers,), higher = keep.
    k : layers that a budget keeps.

    Columns: the correlations of Spearman and of Kendall (tau-b, which no single far-off rank dominates) and the Jaccard
    index of the `k` best, each with its percentile bootstrap interval over layers (for the sets, of layers drawn as
    often), and the index that two random sets have on average.
    """
    rows = {}
    for label, (a, b) in pairs.items():
        rows[label] = {"Spearman [95%]": format_interval(*bootstrap_interval(spearman, a, b), 2),
                       "Kendall [95%]": format_interval(*bootstrap_interval(kendall, a, b), 2),
                       f"Jaccard of the best {k} [95%]": format_interval(*_jaccard_interval(a, b, k), 2),
                       "Jaccard by chance": format_number(chance_jaccard(len(a), k), 2)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("pair")


def _jaccard_interval(a, b, k):
    return bootstrap_interval(lambda x, y: top_k_jaccard(x, y, k), a, b)


def recorded(ledger: Ledger, rules: Mapping[str, Mapping | None], mixer: str | None = None, *,
             require: Iterable[str] = ()) -> pd.DataFrame:
    """The hybrids of a ledger whose layers the `rules` would keep, one row a rule and seed; empty if there are none.

    Parameters
    ----------
    ledger : holds the records ``"align"``, ``"score"`` and ``"hybrid"`` of a study.
    rules : label -> arguments of `Study.select` (``selector``, and maybe ``mixer`` of the probe and ``normalize``);
        None is the hybrid that keeps no layer.
    mixer : of the hybrids; None takes any.
    require : labels without which there is nothing to compare; a setting that lacks one is passed over.

    Layers are chosen again from the recorded scores, of several lengths the longest. Hybrids that differ in more
    than seed and layers are not mixed: the setting in which most rules were run is taken, the latest of equals.
    Columns are those of `Study.compare`, and what was run: see `about`.
    """
    records = list(ledger)
    depth = {_text(r.parameters): len(r.metrics["heldout_error"]) for r in records if r.kind == "align"}
    groups: dict[tuple[str, int], list[dict]] = {}
    for r in records:
        if r.kind != "hybrid" or mixer not in (None, r.parameters["mixer"]):
            continue
        p, layers = r.parameters, tuple(r.parameters["layers"])
        common = {k: v for k, v in p.items() if k not in ("seed", "layers", "aligned")}
        common["aligned"] = {k: v for k, v in p["aligned"].items() if k not in ("seed", "data")}
        labels = [name for name, rule in rules.items() if _kept(rule, r, records, depth) == layers]
        groups.setdefault((_text(common), len(layers)), []).extend(_row(name, r, depth) for name in labels)
    found = [(len({row["selector"] for row in rows}), max(row["started"] for row in rows), key)
             for key, rows in groups.items() if rows and key[1] and set(require) <= {row["selector"] for row in rows}]
    if not found:
        return pd.DataFrame()
    common, kept = max(found)[-1]
    frame = pd.DataFrame(groups[common, kept] + [row | {"kept": kept} for row in groups.get((common, 0), [])])
    order = {name: i for i, name in enumerate(rules)}
    frame = frame.sort_values(["selector", "seed"], key=lambda c: c.map(order) if c.name == "selector" else c)
    return frame.drop_duplicates(["selector", "seed"]).reset_index(drop=True)


def _kept(rule: Mapping | None, hybrid: Record, records: list[Record], depth: dict) -> tuple[int, ...] | None:
    """The layers that `rule` keeps under the budget of `hybrid`; None where no record tells."""
    p = hybrid.parameters
    count, num_layers = len(p["layers"]), depth.get(_text(p["aligned"]))
    if rule is None or count == 0 or num_layers is None:
        return () if rule is None and num_layers is not None else None
    aligned, scores = p["aligned"] | {"mixer": rule.get("mixer") or p["mixer"]}, []
    trained = {"settings": p["settings"]}
    for wanted in ({"direction": "add", "metric": "kl"} | trained, {"direction": "remove", "metric": "kl"} | trained,
                   {"direction": "add", "metric": "mse", "normalize": rule.get("normalize", True)}):
        wanted |= {"aligned": aligned, "heldout_tokens": p["heldout_tokens"]}
        same = [r for r in records if r.kind == "score" and wanted.items() <= r.parameters.items()]
        if same:
            longest = max(same, key=lambda r: (r.tokens or 0, r.started))
            scores.append(LayerScores.from_dict(longest.metrics))
    try:
        return select(rule["selector"], count, scores=scores, num_layers=num_layers, seed=p["seed"])
    except ValueError:  # the scores that it needs were not recorded
        return None


def _row(label: str, record: Record, depth: dict) -> dict:
    p = record.parameters
    return {"selector": label, "seed": p["seed"], "layers": tuple(p["layers"]),
            **{k: v for k, v in record.metrics.items() if not isinstance(v, list)},
            "teacher": p["aligned"]["teacher"], "mixer": p["mixer"], "num_layers": depth[_text(p["aligned"])],
            "kept": len(p["layers"]), "align_tokens": p["aligned"]["num_tokens"], "match_tokens": p["num_tokens"],
            "device": record.device, "started": record.started}


def about(frame: pd.DataFrame, notebook: str) -> str:
    """One sentence on what `recorded` found, or, if that is nothing, on the command that makes the records."""
    if frame.empty:
        return ("No GPU record of this experiment is committed yet. On a machine with a GPU, this makes them: "
                f"`papermill notebooks/{notebook}.ipynb out.ipynb -f notebooks/profiles/gpu.yaml -p corpus FOLDER`.")
    row, seeds = frame.iloc[0], frame["seed"].nunique()
    return (f"Teacher **{row['teacher']}**, {row['kept']} of {row['num_layers']} layers softmax, the others "
            f"**{row['mixer']}**; {row['align_tokens']:,} tokens of stage 1, {row['match_tokens']:,} of stage 2, "
            f"{seeds} seed{'s' if seeds > 1 else ''}; on {', '.join(dict.fromkeys(frame['device']))}.")


def published(**columns) -> pd.DataFrame:
    """Rows of ``data/published/results.csv`` in which the named columns have the given values.

    Figures that others reported about the paper; see the README beside the file for how far to trust them.
    """
    frame = pd.read_csv(data_folder("published") / "results.csv")
    for name, value in columns.items():
        check_choice("column", name, tuple(frame.columns))
        frame = frame[frame[name] == value]
    return frame.reset_index(drop=True)


def _text(parameters: dict) -> str:
    return json.dumps(parameters, sort_keys=True)
