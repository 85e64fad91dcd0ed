"""What the scoring engine saves: a full scoring by it against the loop of one run a layer, and what each part brings.

All loops score the same layers of the same student with the same tokens in the same order; each is a record as soon as
it is through. The rankings are compared with the plain loop's, so that speed is never shown without what it cost.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from .agreement import spearman, stability, top_k_jaccard
from .batched import group_size
from .candidates import ScoringJob
from .checks import check_choice, check_int
from .contest import SelectorSettings
from .corpus import Tokens
from .cost import Meter
from .distill import match
from .evaluate import heldout_kl
from .hybrid import restore
from .importance import score_layers
from .ledger import Ledger
from .scoring import EarlyStop, task_size
from .selection import budget_layers
from .study import Study, StudyRecords
from .style import format_number
from .timing import measured, wait
from .workers import count_workers, pool_of_workers

__all__ = ["AIM", "BUDGETS", "ENGINES", "CostSettings", "compare_engines", "compare_scoring", "engine_table",
           "engine_words", "recorded_scoring_speed", "repeat_pairs"]

#: the loops that can be compared, the plain one first
ENGINES = {"plain": "one run a layer, nothing shared", "engine": "the engine, with early stopping",
           "shared": "teacher's states shared", "recorded": "shared; steps compiled and recorded",
           "together": "shared; layers train together", "workers": "shared, and recorded on a GPU; by workers"}
BUDGETS = (0.125, 0.25, 0.5)  # at which the chosen sets are compared
AIM = (5.0, 0.9)  # times as fast, at this Jaccard index at every budget


@dataclass(frozen=True)
class CostSettings(SelectorSettings):
    """`SelectorSettings`, and what the comparison of scoring loops takes.

    Parameters
    ----------
    engine_loops : of `ENGINES`; an empty list leaves the comparison out.
    engine_tokens : tokens of stage 2 for each candidate. engine_heldout_tokens : to measure candidates on.
    engine_points : measurements along a candidate's training, of which `engine_window` must agree on the best layers
        for the engine to stop, see `EarlyStop`.
    engine_stop_heldout_tokens : held-out tokens for measurements that are not the last, 0 for as many as for that.
    engine_group : layers that train together, 0 for the rule of `scoring.task_size`.
    """

    engine_loops: list[str] = ("plain", "engine")
    engine_tokens: int = 4_096
    engine_heldout_tokens: int = 1_024
    engine_points: int = 4
    engine_window: int = 3
    engine_stop_heldout_tokens: int = 0
    engine_group: int = 0

    def __post_init__(self):
        super().__post_init__()
        _check_loops("engine_loops", self.engine_loops)
        check_int("engine_tokens", self.engine_tokens, self.context)
        check_int("engine_heldout_tokens", self.engine_heldout_tokens, self.context, self.heldout_tokens)
        check_int("engine_points", self.engine_points, 1, self.engine_tokens // self.context)
        check_int("engine_window", self.engine_window, 2)
        check_int("engine_stop_heldout_tokens", self.engine_stop_heldout_tokens, 0, self.engine_heldout_tokens)
        check_int("engine_group", self.engine_group, 0)


def compare_engines(study: Study) -> pd.DataFrame:
    """`compare_scoring` as the `CostSettings` of a study say; no rows if they leave it out."""
    s = study.settings
    step = study.match_settings.step_rows(s.context) * s.context
    stop = EarlyStop(s.budget, max(step, s.engine_tokens // s.engine_points), s.engine_window,
                     heldout_tokens=s.engine_stop_heldout_tokens or None)
    return compare_scoring(study, loops=s.engine_loops, num_tokens=s.engine_tokens, early_stop=stop,
                           heldout_tokens=s.engine_heldout_tokens, group=s.engine_group or None)


def compare_scoring(study: Study, *, early_stop: EarlyStop, loops: Sequence[str] = tuple(ENGINES)[:5],
                    num_tokens: int | None = None, heldout_tokens: int | None = None, direction: str = "add",
                    mixer: str | None = None, seed: int = 0, group: int | None = None,
                    workers: int = 0) -> pd.DataFrame:
    """Score all layers by each of `loops`; a row a loop. Record kind ``"scoring_speed"``, one a loop.

    ``"plain"``
        What one writes without an engine: for each layer ``restore``, ``match`` and ``heldout_kl``, one after the
        other. Every candidate has its own pass of the teacher over the rows that it trains on and is measured on;
        nothing is compiled or recorded, as is ``match``'s default. Operators and objective are hybridlib's own, on a
        GPU its fused kernels, so that what is compared is the scoring and not the step.
    ``"engine"``
        `score_layers` as a `Study` calls it: the teacher's states shared, steps compiled and recorded on a GPU, layers
        trained together where `scoring.task_size` says so, and stopped by `early_stop`. Every candidate is a record on
        disk as soon as it is measured, and checkpoints are written where a study's are; both are thrown away after.
    ``"shared"``, ``"recorded"``, ``"together"``
        The same without early stopping, to see what each part brings: states shared, nothing else; steps compiled
        and recorded, too (which changes nothing on a CPU, where it is left out); or all layers, or as many as memory
        holds, in one stacked model (recorded on a GPU).
    ``"workers"``
        As ``"recorded"`` (on a CPU, ``"shared"``), its tasks given to `workers` processes on this machine, each with a
        GPU of its own. What a process takes to start and to load the inputs is ``start_seconds``, not ``seconds``.

    Parameters
    ----------
    study : whose aligned student of `mixer` (None: the study's) and `seed` is scored, on its score rows.
    early_stop : of the engine.
    loops : names of `ENGINES`, run in their order there.
    num_tokens : tokens of stage 2 for each candidate, None for the study's. heldout_tokens : to measure on, likewise.
    direction : as in `score_layers`. group : layers that train together; None as said above.
    workers : processes, at most one a GPU; 0 for as many as there are GPUs.

    Metrics: ``seconds``, from the aligned student to the last score; ``tokens`` of training; ``values``, ``history``
    and ``history_tokens`` as in `LayerScores`; ``group``; ``peak_bytes``, the peak of memory as in `Cost`. What is
    compiled is compiled within a loop's time. What all of them need (kernels, memory) is warmed up before it by a step
    and a measurement, in each worker too.

    Raises ValueError for a bad argument. A loop that cannot run has its ``reason`` instead of numbers.
    """
    _check_loops("loops", loops)
    s, mixer, device = study.settings, mixer or study.settings.mixer, study.teacher.model.device
    num_tokens = s.score_tokens if num_tokens is None else num_tokens
    heldout_tokens = s.heldout_tokens if heldout_tokens is None else heldout_tokens
    check_int("num_tokens", num_tokens, s.context)
    check_int("heldout_tokens", heldout_tokens, s.context, s.heldout_tokens)
    check_choice("direction", direction, ("add", "remove"))
    early_stop.count(study.num_layers)
    count = count_workers(workers, device) if "workers" in loops else 0
    if not loops:
        return pd.DataFrame()
    student, teacher, whole = study.aligned(mixer, seed), study.teacher.model, study.tokens(seed, num_tokens, "score")
    tokens = Tokens(whole.train, whole.heldout[:heldout_tokens // s.context], whole.tokenizer, whole.source, whole.seed)
    recorded = study.match_settings
    eager = replace(recorded, compile=False, cuda_graph=False)
    together = group or -(-study.num_layers // -(-study.num_layers // group_size(student, tokens, eager,
                                                                                study.num_layers)))
    ways = {"plain": (eager, 1), "engine": (recorded, task_size(student, tokens, recorded, group)),
            "shared": (eager, 1), "recorded": (recorded, 1), "together": (recorded, together),
            "workers": (recorded, 1)}
    common = {"aligned": study._align_parameters(mixer, seed)[0], "mixer": mixer, "seed": seed, "direction": direction,
              "num_tokens": num_tokens, "heldout_tokens": heldout_tokens, "settings": recorded.numbers()}

    def compute(loop, settings, layers):
        def scored():
            if loop == "plain":
                return _plain(student, teacher, tokens, num_tokens, direction, settings), None
            with _kept_for_now(study, common) as kept:
                scores = score_layers(student, teacher, tokens, direction=direction, num_tokens=num_tokens, **kept,
                                      group=layers, settings=settings,
                                      early_stop=early_stop if loop == "engine" else None)
            return _figures(scores), scores.cost.peak_memory

        if loop == "workers":
            inputs = replace(study._inputs(mixer, seed, tokens), max_tokens=max(num_tokens, s.context))
            with _kept_for_now(study, common) as kept:
                job = ScoringJob(inputs, direction, num_tokens, heldout_tokens, settings)
                return _by_workers(job, student, teacher, tokens, count, kept) | {"num_layers": study.num_layers}
        _plain(student, teacher, tokens, tokens.context, direction, eager, layers=1)
        if device.type == "cuda":
            torch.compiler.reset()
        meter, begun = Meter(teacher, student), time.perf_counter()
        found, most = scored()
        wait(device)
        spent, most = time.perf_counter() - begun, meter.cost().peak_memory if most is None else most
        return found | {"seconds": spent, "peak_bytes": most, "num_layers": study.num_layers}

    rows = []
    for loop in (name for name in ENGINES if name in loops and not (name == "recorded" and device.type == "cpu")):
        stop = early_stop.parameters() if loop == "engine" else None
        parameters = common | {"loop": loop, "group": ways[loop][1], "early_stop": stop}
        parameters |= {"workers": count} if loop == "workers" else {}
        rows.append(measured(study.ledger, "scoring_speed", parameters, device,
                             lambda: compute(loop, *ways[loop]), s.recompute))
    return pd.DataFrame(rows)


def _plain(student, teacher, tokens, num_tokens, direction, settings, layers=None):
    """The loop of one run a layer, over the first `layers` or all."""
    every, spent, values, sign = range(student.config.num_hidden_layers), [], [], -1 if direction == "add" else 1
    for layer in every[:layers]:
        model = restore(student, teacher, [layer] if direction == "add" else [m for m in every if m != layer])
        spent.append(match(model, teacher, tokens, num_tokens, settings=settings).tokens[-1])
        values.append(sign * heldout_kl(model, teacher, tokens)[0])
    return {"tokens": sum(spent), "values": values, "history": [values], "history_tokens": spent[:1]}


def _figures(found):
    return {"tokens": found.tokens, "values": list(found.values), "history": [list(h) for h in found.history],
            "history_tokens": list(found.history_tokens)}


@contextmanager
def _kept_for_now(study, parameters):
    """`score_layers`' ``records`` and ``checkpoints`` as a study has them, in a folder that is removed afterwards."""
    study = copy.copy(study)
    with tempfile.TemporaryDirectory(dir=study.ledger.folder) as folder:
        study.ledger = Ledger(folder, device=study.ledger.device, commit=study.ledger.commit)
        yield {"records": StudyRecords(study, parameters), "checkpoints": Path(folder) / "models"}


def _by_workers(job, student, teacher, tokens, workers, kept):
    """The loop whose tasks go to processes: they start and load outside of ``seconds``, as others are warmed up."""
    begun = time.perf_counter()
    with pool_of_workers(job, workers, warm_up=tokens.context) as pool:
        started = time.perf_counter()
        found = score_layers(student, teacher, tokens, direction=job.direction, num_tokens=job.num_tokens,
                             heldout_tokens=job.heldout_tokens, settings=job.settings, executor=pool,
                             inputs=job.inputs, **kept)
        seconds = time.perf_counter() - started
    return _figures(found) | {"seconds": seconds, "start_seconds": started - begun, "peak_bytes": None}


def recorded_scoring_speed(ledger: Ledger) -> list[pd.DataFrame]:
    """The comparisons of a ledger as `compare_scoring` gives them, one a student and setting; of a loop the latest."""
    groups: dict[str, dict[str, dict]] = {}
    for record in ledger.find("scoring_speed"):
        row = record.parameters | record.metrics
        common = {name: row[name] for name in ("aligned", "direction", "num_tokens", "heldout_tokens", "settings",
                                               "device")}
        groups.setdefault(json.dumps(common, sort_keys=True), {})[row["loop"]] = row
    return [pd.DataFrame([group[loop] for loop in ENGINES if loop in group]) for group in groups.values()]


def repeat_pairs(ledger: Ledger, scores: Mapping[str, Sequence[float]], teacher: str,
                 mixer: str = "gdn") -> dict[str, tuple]:
    """Pairs for `reading.rankings` from the recorded comparisons of a teacher's loops, by adding a layer.

    First GA-S2 with itself, by the plain loop and by recorded steps over the same text, wherever both were run: they
    differ by rounding. Then each of `scores` (title -> a number a layer) with the plain loop's of the comparison in
    which those two rank layers most alike.
    """
    repeats = {}
    for frame in recorded_scoring_speed(ledger):
        rows = frame[frame["reason"].isna()].set_index("loop")
        first = frame.iloc[0]
        if ((first["aligned"]["teacher"], first["mixer"], first["direction"]) == (teacher, mixer, "add")
                and {"plain", "recorded"} <= set(rows.index)):
            title = f"{first['num_tokens']:,} tokens, mixers at {first['settings']['mixer_learning_rate']:g}"
            repeats[title] = tuple(rows.loc[loop, "values"] for loop in ("plain", "recorded"))
    if not repeats:
        return {}
    best = max(repeats, key=lambda title: spearman(*repeats[title]))
    return ({f"GA-S2 with itself: {title}": pair for title, pair in repeats.items()}
            | {f"{title} with GA-S2: {best}": (values, repeats[best][0]) for title, values in scores.items()})


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
    others = "".join(f" {ENGINES[loop].capitalize()}: {one['speed']:.2f} times as fast, Spearman "
                     f"{_number(one['spearman'], 3)}, Jaccard {_jaccards(one)}." for loop, one in against.items()
                     if loop != "engine") + _worker_words(rows)
    return (f"{text}: the engine took {engine['seconds']:,.1f} s against the plain loop's {plain['seconds']:,.1f} s, "
            f"**{found['speed']:.2f} times** as fast, with {100 * engine['tokens'] / plain['tokens']:.0f}% of the "
            f"tokens; it {early}.{_beyond_training(rows)} Rankings: Spearman {_number(found['spearman'], 3)}, Jaccard "
            f"of the best layers {_jaccards(found)}; {_stops_for(engine)}."
            f"{_along(engine)}{others} The aim of {AIM[0]:g} times at a Jaccard of at least "
            f"{AIM[1]:g} at every budget is {verdict}.")


def _beyond_training(rows):
    """What an engine whose layers train alone spends on anything but training, by the time of the same steps alone."""
    engine = rows.loc["engine"]
    if "recorded" not in rows.index or engine["group"] != 1:
        return ""
    alone = rows.loc["recorded", "seconds"] * engine["tokens"] / rows.loc["recorded", "tokens"]
    return (f" For as many tokens the recorded steps alone take {alone:,.1f} s; the rest goes into "
            f"{len(engine['history'])} measurements of every candidate in place of one{_on_few(engine)}, and into "
            "changing candidates.")


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


def _worker_words(rows):
    """What one worker a GPU brings beside the same loop in one process."""
    alone = next((loop for loop in ("recorded", "shared") if loop in rows.index), None)
    if "workers" not in rows.index or alone is None:
        return ""
    many, one = rows.loc["workers"], rows.loc[alone]
    apart = max(abs(a - b) for a, b in zip(many["values"], one["values"], strict=True))
    return (f" By {many['workers']:.0f} workers, {many['seconds']:,.1f} s (and {many['start_seconds']:,.1f} s to start "
            f"them and load what they need) against {one['seconds']:,.1f} s in one process, "
            f"{one['seconds'] / many['seconds']:.2f} times as fast; scores differ by at most {apart:.1g} nats, "
            f"Spearman {_number(spearman(many['values'], one['values']), 3)}.")


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


def _check_loops(name, loops):
    if not isinstance(loops, (list, tuple)):
        raise ValueError(f"{name}={loops!r} is not a list of names; an empty one leaves the comparison out")
    for loop in loops:
        check_choice(name, loop, tuple(ENGINES))
