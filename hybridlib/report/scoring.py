"""What the records of scoring loops show: a table and sentences that follow from its numbers.

The rankings are compared with the plain loop's, so that speed is never shown without what it cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from hybridlib.bench.scoring import ENGINES
from hybridlib.records.folders import data_folder
from hybridlib.report.style import format_number
from hybridlib.selection.agreement import spearman, stability, top_k_jaccard
from hybridlib.selection.rules import budget_layers

__all__ = ["AIM", "BUDGETS", "early_stop_words", "engine_table", "engine_words", "worker_words"]

BUDGETS = (0.125, 0.25, 0.5)  # at which the chosen sets are compared
AIM = (5.0, 0.9)  # times as fast, at this Jaccard index at every budget


def engine_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Of each loop: seconds, how many times as fast as the plain one, tokens, and how its ranking agrees with that."""
    rows = {}
    for _, row in frame.iterrows():
        if not pd.isna(row["reason"]):
            rows[ENGINES[row["loop"]]] = {"seconds": f"could not run: {row['reason']}"}
            continue
        found = _against(frame, row)
        peak = row.get("peak_bytes")
        rows[ENGINES[row["loop"]]] = {
            "seconds": f"{row['seconds']:,.1f}", "times as fast": _number(found and found["speed"], 2),
            "tokens of training": f"{row['tokens']:,.0f}", "layers a task": f"{row['group']}",
            "Spearman": _number(found and found["spearman"], 3),
            **{f"Jaccard at {100 * b:g}%": _number(found and found["jaccard"][b], 2) for b in BUDGETS},
            "peak memory (MiB)": "\u2013" if pd.isna(peak) else f"{peak / 2**20:,.0f}"}
    return pd.DataFrame.from_dict(rows, orient="index").fillna("\u2013").rename_axis("loop")


def engine_words(frame: pd.DataFrame) -> str:
    """In Markdown: what was scored, how the engine's time and ranking compare with the plain loop's, and the aim."""
    if frame.empty:
        return "The comparison of scoring loops was left out."
    first = frame.iloc[0]
    text = (f"Teacher **{first['aligned']['teacher']}** on {first['device']}, {first['num_tokens']:,} tokens of stage "
            f"2 for each candidate, mixers at a rate of {first['settings']['mixer_learning_rate']:g}, measured on "
            f"{first['heldout_tokens']:,}")
    rows = frame[frame["reason"].isna()].set_index("loop")
    if not {"plain", "engine"} <= set(rows.index):
        return f"{text}: the plain loop and the engine were not both run."
    engine, plain = rows.loc["engine"], rows.loc["plain"]
    against = {loop: _against(frame, row) for loop, row in rows.iterrows() if loop not in ("plain", "workers")}
    found, stopped = against["engine"], engine["history_tokens"][-1]
    early = (f"stopped after {stopped:,} tokens a candidate" if stopped < plain["history_tokens"][-1] else
             "did not stop early: the best layers had not settled before")
    met = [loop for loop, one in against.items() if one["speed"] >= AIM[0] and min(one["jaccard"].values()) >= AIM[1]]
    verdict = f"**met** here by: {', '.join(ENGINES[loop] for loop in met)}" if met else "**not met** here"
    others = "".join(f" {ENGINES[loop].capitalize()}{_runs(rows.loc[loop], plain)}: {one['speed']:.2f} times as fast, "
                     f"Spearman {_number(one['spearman'], 3)}, Jaccard {_jaccards(one)}."
                     for loop, one in against.items() if loop != "engine") + _worker_words(rows)
    return (f"{text}: the engine took {engine['seconds']:,.1f} s against the plain loop's {plain['seconds']:,.1f} s"
            f"{_runs(engine, plain)}, **{found['speed']:.2f} times** as fast, with "
            f"{100 * engine['tokens'] / plain['tokens']:.0f}% of the tokens; it {early}.{_beyond_training(rows)} "
            f"Rankings: Spearman {_number(found['spearman'], 3)}, Jaccard of the best layers {_jaccards(found)}; "
            f"{_stops_for(engine)}.{_along(engine)}{others} The aim of {AIM[0]:g} times at a Jaccard of at least "
            f"{AIM[1]:g} at every budget is {verdict}.")


def early_stop_words(frames: Sequence[pd.DataFrame], path: str | Path | None = None) -> str:
    """A list in Markdown: what was reported of early stopping, then what each engine of `frames` that ran with it did.

    A set settles at the first of the measurements that agreed. What stopping cost is said as the Jaccard index of the
    best layers with those of the plain loop. `path` is another file than ``data/published/early_stop.csv``.
    """
    told = pd.read_csv(path or data_folder("published") / "early_stop.csv").set_index("quantity")
    lines = [f"- **Reported**, second-hand: sets settle at {_shares(told.loc['settled'])} of training, which saves "
             f"{_shares(told.loc['saved'])} of the tokens and loses less than {told.loc['ruler_lost', 'high']:g} of "
             "RULER."]
    for frame in frames:
        rows = frame[frame["reason"].isna()].set_index("loop")
        if not {"plain", "engine"} <= set(rows.index):
            continue
        engine, plain, title = rows.loc["engine"], rows.loc["plain"], frame.iloc[0]["aligned"]["teacher"]
        points, window, whole = engine["history_tokens"], engine["early_stop"]["window"], plain["history_tokens"][-1]
        title = f"- **{title}**, {frame.iloc[0]['num_tokens']:,} tokens a candidate"
        if points[-1] == whole:
            lines.append(f"{title}: the best layers did not settle, and nothing is saved.")
            continue
        budget = engine["early_stop"]["budget"]
        kept = top_k_jaccard(engine["values"], plain["values"], budget_layers(budget, len(plain["values"])))
        saved = 1 - engine["tokens"] / plain["tokens"]
        low, high = told.loc["saved", ["low", "high"]]
        word = "as reported" if low <= saved <= high else "less than reported" if saved < low else "more than reported"
        lines.append(f"{title}: the best layers settled at {100 * points[-window] / whole:.0f}%, which {window} "
                     f"measurements in a row showed at {100 * points[-1] / whole:.0f}%; {100 * saved:.0f}% of the "
                     f"tokens are saved, **{word}**. Jaccard of the best layers with the plain loop's: {kept:.2f}.")
    return "\n".join(lines)


def _shares(row):
    return f"{100 * row['low']:g} to {100 * row['high']:g}%"


def _beyond_training(rows):
    """What an engine whose layers train alone spends on anything but training, by the time of the same steps alone."""
    engine = rows.loc["engine"]
    if "recorded" not in rows.index or engine["group"] != 1:
        return ""
    alone = rows.loc["recorded", "seconds"] * engine["tokens"] / rows.loc["recorded", "tokens"]
    return (f" For as many tokens the recorded steps alone{_runs(engine, rows.loc['recorded'])} take {alone:,.1f} s; "
            f"the rest goes into {len(engine['history'])} measurements of every candidate in place of one"
            f"{_on_few(engine)}, and into changing candidates.")


def _on_few(engine):
    few = engine["early_stop"].get("heldout_tokens")
    return f" (all but the last on {few:,} held-out tokens)" if few else ""


def _along(engine):
    """How the ranking moved along the engine's training; nothing where it was measured once."""
    history, budget = engine.get("history"), engine["early_stop"]["budget"]
    if not isinstance(history, list) or len(history) < 2:
        return ""
    points = stability(history, budget_layers(budget, len(history[-1])))[:-1]
    said = ", ".join(f"{_number(rho, 2)} and {set_:.2f} after {tokens:,}"
                     for (rho, set_), tokens in zip(points, engine["history_tokens"], strict=False))
    return f" Along its training, Spearman and Jaccard of the best layers with its own last measurement: {said} tokens."


def worker_words(frames: Sequence[pd.DataFrame]) -> str:
    """A list in Markdown: what one worker a GPU brings, for each comparison that has it beside one process."""
    lines = []
    for frame in frames:
        first, said = frame.iloc[0], _worker_words(frame[frame["reason"].isna()].set_index("loop"))
        if said:
            lines.append(f"- **{first['aligned']['teacher']}**, {first['num_tokens']:,} tokens a candidate, each "
                         f"worker on a GPU of its own, {first['device']}: b{said.removeprefix(' B')}")
    return "\n".join(lines)


def _worker_words(rows):
    """What one worker a GPU brings beside the same loop in one process."""
    alone = next((loop for loop in ("recorded", "shared") if loop in rows.index), None)
    if "workers" not in rows.index or alone is None:
        return ""
    many, one = rows.loc["workers"], rows.loc[alone]
    apart = max(abs(a - b) for a, b in zip(many["values"], one["values"], strict=True))
    sets = {b: top_k_jaccard(many["values"], one["values"], budget_layers(b, len(one["values"]))) for b in BUDGETS}
    agree = (f"; scores differ by at most {apart:.1g} nats, Jaccard of the best layers {_jaccards({'jaccard': sets})}, "
             f"Spearman {_number(spearman(many['values'], one['values']), 3)}." if apart else
             ", with the same scores to the last bit.")
    return (f" By {many['workers']:.0f} workers, {many['seconds']:,.1f} s (and {many['start_seconds']:,.1f} s to start "
            f"them and load what they need) against {one['seconds']:,.1f} s in one process{_runs(many, one)}, "
            f"{one['seconds'] / many['seconds']:.2f} times as fast{agree}")


def _runs(a, b):
    """That two rows are of two runs, if their commits differ: then code may have changed what is compared."""
    commits = [row.get("commit") for row in (a, b)]
    if any(pd.isna(commit) for commit in commits) or commits[0] == commits[1]:
        return ""
    return f" (of two runs, at commits `{commits[0][:7]}` and `{commits[1][:7]}`)"


def _jaccards(found):
    return ", ".join(f"{found['jaccard'][b]:.2f} at {100 * b:g}%" for b in BUDGETS)


def _stops_for(engine):
    budget = engine["early_stop"]["budget"]
    size = f"{budget} layers" if isinstance(budget, int) else f"{100 * budget:g}%"
    return f"early stopping looks at the best {size} alone"


def _against(frame, row):
    """How a loop's `row` compares with the plain loop of `frame`; None if that is missing."""
    plain = [p for _, p in frame.iterrows() if p["loop"] == "plain" and pd.isna(p["reason"])]
    if not plain:
        return None
    values, theirs = row["values"], plain[0]["values"]
    return {"speed": plain[0]["seconds"] / row["seconds"], "spearman": spearman(values, theirs),
            "jaccard": {b: top_k_jaccard(values, theirs, budget_layers(b, len(values))) for b in BUDGETS}}


def _number(value, digits):
    return "\u2013" if value is None or pd.isna(value) else format_number(value, digits)
