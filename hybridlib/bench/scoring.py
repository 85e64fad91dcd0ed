"""What the scoring engine saves: a full scoring by it against the loop of one run a layer, and what each part brings.

All loops score the same layers of the same student with the same tokens in the same order; each is a record as soon as
it is through. `scoring_report` says what the records show.
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

import numpy as np
import pandas as pd
import torch

from hybridlib.bench.timing import measured, wait
from hybridlib.checks import check_choice, check_int
from hybridlib.distill.corpus import Tokens
from hybridlib.distill.evaluate import heldout_kl
from hybridlib.distill.stages import match
from hybridlib.models.hybrid import restore
from hybridlib.records.ledger import Ledger
from hybridlib.selection.agreement import spearman
from hybridlib.selection.cost import Meter
from hybridlib.selection.engine.measure import ScoringJob
from hybridlib.selection.engine.rounds import EarlyStop, task_size
from hybridlib.selection.engine.sets import group_size
from hybridlib.selection.engine.workers import count_workers, pool_of_workers
from hybridlib.selection.scorers.importance import score_layers
from hybridlib.study.contest import SelectorSettings
from hybridlib.study.study import Study, StudyRecords

__all__ = ["CostSettings", "ENGINES", "compare_engines", "compare_scoring", "loop_rankings", "loop_words",
           "recorded_scoring_speed", "repeat_pairs"]

#: the loops that can be compared, the plain one first
ENGINES = {"plain": "one run a layer, nothing shared", "engine": "the engine, with early stopping",
           "shared": "teacher's states shared", "recorded": "shared; steps compiled and recorded",
           "together": "shared; layers train together", "workers": "shared, and recorded on a GPU; by workers"}


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
    common = {"aligned": study.aligned_parameters(mixer, seed), "mixer": mixer, "seed": seed, "direction": direction,
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
            inputs = replace(study.scoring_inputs(mixer, seed, tokens), max_tokens=max(num_tokens, s.context))
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
    """The comparisons of a ledger as `compare_scoring` gives them, one a student and setting; of a loop the latest.

    Loops of one comparison may have been run at different times, by different code: each row has its ``commit``, and
    words say where two that are compared are of two runs.
    """
    groups: dict[str, dict[str, dict]] = {}
    for record in ledger.find("scoring_speed"):
        row = record.parameters | record.metrics | {"commit": record.commit}
        common = {name: row[name] for name in ("aligned", "direction", "num_tokens", "heldout_tokens", "settings",
                                               "device")}
        groups.setdefault(json.dumps(common, sort_keys=True), {})[row["loop"]] = row
    return [pd.DataFrame([group[loop] for loop in ENGINES if loop in group]) for group in groups.values()]


def loop_rankings(ledger: Ledger, teacher: str, mixer: str = "gdn") -> dict[tuple[int, float], tuple]:
    """GA-S2 of a teacher by the plain loop and by recorded steps, which differ by rounding: (tokens of a candidate,
    rate of its mixers) -> the two lists of values, wherever both loops are recorded. The pair most alike comes last.
    """
    found = {}
    for frame in recorded_scoring_speed(ledger):
        rows = frame[frame["reason"].isna()].set_index("loop")
        first = frame.iloc[0]
        if ((first["aligned"]["teacher"], first["mixer"], first["direction"]) == (teacher, mixer, "add")
                and {"plain", "recorded"} <= set(rows.index)):
            found[int(first["num_tokens"]), first["settings"]["mixer_learning_rate"]] = tuple(
                rows.loc[loop, "values"] for loop in ("plain", "recorded"))
    return dict(sorted(found.items(), key=lambda item: spearman(*item[1])))


def loop_words(num_tokens: int, rate: float) -> str:
    """The key of `loop_rankings` in words."""
    return f"{num_tokens:,} tokens, mixers at {np.format_float_scientific(rate, trim='-', exp_digits=1)}"


def repeat_pairs(ledger: Ledger, scores: Mapping[str, Sequence[float]], teacher: str,
                 mixer: str = "gdn") -> dict[str, tuple]:
    """Pairs for `reading.rankings` from the recorded comparisons of a teacher's loops, by adding a layer.

    First GA-S2 with itself, see `loop_rankings`. Then each of `scores` (title -> a number a layer, of a contest) with
    the plain loop's of the comparison in which its two loops rank layers most alike: the steadier GA-S2, where there
    are several.
    """
    repeats = {loop_words(*key): pair for key, pair in loop_rankings(ledger, teacher, mixer).items()}
    if not repeats:
        return {}
    best = list(repeats)[-1]
    ours = {"GA-S2": "the contest's GA-S2"}  # which is another than the one it is held to
    other = f"the {'steadier ' * (len(repeats) > 1)}GA-S2 ({best})"
    return ({f"GA-S2 with itself: {title}": pair for title, pair in repeats.items()}
            | {f"{ours.get(title, title)} with {other}": (own, repeats[best][0]) for title, own in scores.items()})


def _check_loops(name, loops):
    if not isinstance(loops, (list, tuple)):
        raise ValueError(f"{name}={loops!r} is not a list of names; an empty one leaves the comparison out")
    for loop in loops:
        check_choice(name, loop, tuple(ENGINES))
