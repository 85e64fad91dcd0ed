"""What the scoring engine saves: a full scoring by it against the loop of one run a layer, and each part's share."""

from __future__ import annotations

import copy
import functools
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

from hybridlib.bench.timing import Bench, wait
from hybridlib.checks import check_choice, check_int
from hybridlib.distill.corpus import Tokens
from hybridlib.distill.evaluate import heldout_kl
from hybridlib.distill.settings import MatchSettings
from hybridlib.distill.stages import match
from hybridlib.models.hybrid import restore
from hybridlib.records.ledger import Ledger
from hybridlib.selection.agreement import spearman
from hybridlib.selection.cost import Meter
from hybridlib.selection.engine.candidates import Job
from hybridlib.selection.engine.rounds import EarlyStop, Engine
from hybridlib.selection.engine.sets import group_size
from hybridlib.selection.engine.workers import count_workers, pool_of_workers
from hybridlib.selection.scorers.importance import score_layers
from hybridlib.study.candidates import StudyRecords
from hybridlib.study.contest import SelectorSettings
from hybridlib.study.study import Study

__all__ = ["CostSettings", "ENGINES", "compare_engines", "recorded_scoring_speed", "repeat_pairs"]

#: the loops that can be compared, the plain one first
ENGINES = {"plain": "one run a layer, nothing shared", "engine": "the engine, with early stopping",
           "shared": "teacher's states shared", "recorded": "shared; steps compiled and recorded",
           "together": "shared; layers train together", "workers": "shared, and recorded on a GPU; by workers"}


@dataclass(frozen=True)
class CostSettings(SelectorSettings):
    """`SelectorSettings`, and what the comparison of scoring loops takes.

    `engine_loops` are of `ENGINES`; empty, they leave the comparison out. `engine_tokens` are of stage 2 for a
    candidate, `engine_heldout_tokens` those to measure it on. `engine_points`, `engine_window` and
    `engine_stop_heldout_tokens` make an `EarlyStop`, with 0 for no other held-out tokens; `engine_group` layers train
    together, 0 for `Engine.group_of`.
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
        if not isinstance(self.engine_loops, (list, tuple)):
            raise ValueError(f"engine_loops={self.engine_loops!r} is not a list of names; an empty one leaves it out")
        for loop in self.engine_loops:
            check_choice("engine_loops", loop, ENGINES)
        check_int("engine_tokens", self.engine_tokens, self.context)
        check_int("engine_heldout_tokens", self.engine_heldout_tokens, self.context, self.heldout_tokens)
        check_int("engine_points", self.engine_points, 1, self.engine_tokens // self.context)
        check_int("engine_window", self.engine_window, 2)
        check_int("engine_stop_heldout_tokens", self.engine_stop_heldout_tokens, 0, self.engine_heldout_tokens)
        check_int("engine_group", self.engine_group, 0)


def compare_engines(study: Study, *, workers: int = 0) -> pd.DataFrame:
    """Score all layers, by adding, by each loop of a study's `CostSettings`. Record kind ``"scoring_speed"``.

    - ``"plain"``: `restore`, `match` and `heldout_kl` a layer, with their own passes of the teacher, nothing compiled.
    - ``"engine"``: `score_layers` as a `Study` calls it, with `EarlyStop`; its records and checkpoints are thrown away.
    - ``"shared"``: without early stopping, the teacher's states shared; ``"recorded"``, not on a CPU: steps compiled
      and recorded, too; ``"together"``: all layers, or as many as memory holds, in one stacked model, too.
    - ``"workers"``: as ``"recorded"``, by `workers` processes on this machine, at most one a GPU; 0 for all GPUs.

    A row a loop. Metrics: ``seconds``, from the aligned student to the last score, compiling included; ``tokens`` of
    training; ``start_seconds``, to start workers and load their inputs; others as in `LayerScores` and `Cost`.
    Raises ValueError for a number of workers that this machine cannot have.
    """
    s, device = study.settings, study.teacher.model.device
    count = count_workers(workers, device) if "workers" in s.engine_loops else 0
    if not s.engine_loops:
        return pd.DataFrame()
    runner, bench, rows = _Runner(study, count), Bench(study.ledger, device, recompute=s.recompute), []
    for loop in (name for name in ENGINES if name in s.engine_loops and (name, device.type) != ("recorded", "cpu")):
        parameters = runner.common | {"loop": loop, "group": runner.group(loop),
                                      "early_stop": runner.early_stop.parameters() if loop == "engine" else None}
        parameters |= {"workers": count} if loop == "workers" else {}
        rows.append(bench.record("scoring_speed", parameters, functools.partial(runner.run, loop)))
    return pd.DataFrame(rows)


class _Runner:
    """The loops over one aligned student and its score rows."""

    def __init__(self, study, workers):
        s = study.settings
        self.study, self.workers, self.teacher = study, workers, study.teacher.model
        self.student, rows = study.aligned(s.mixer, 0), study.tokens(0, s.engine_tokens, "score")
        self.tokens = Tokens(rows.train, rows.heldout[:s.engine_heldout_tokens // s.context], rows.tokenizer,
                             rows.source, rows.seed)
        self.recorded = s.match_settings
        self.eager = replace(self.recorded, compile=False, cuda_graph=False)
        step = self.recorded.step_rows(s.context) * s.context
        self.early_stop = EarlyStop(s.budget, max(step, s.engine_tokens // s.engine_points), s.engine_window,
                                    heldout_tokens=s.engine_stop_heldout_tokens or None)
        self.common = {"aligned": study.aligned_parameters(s.mixer, 0), "mixer": s.mixer, "seed": 0, "direction": "add",
                       "num_tokens": s.engine_tokens, "heldout_tokens": s.engine_heldout_tokens,
                       "settings": self.recorded.numbers()}

    def group(self, loop):
        layers, wanted = self.study.num_layers, self.study.settings.engine_group or None
        if loop == "engine":
            return Engine(group=wanted).group_of(self.student, self.tokens, self.recorded)
        if loop == "together":
            return wanted or -(-layers // -(-layers // group_size(self.student, self.tokens, self.eager, layers)))
        return 1

    def run(self, loop):
        if loop == "workers":
            return self._by_workers()
        self._plain(self.tokens.context, layers=1)  # loads what all loops need
        if self.teacher.device.type == "cuda":
            torch.compiler.reset()
        meter, begun = Meter(self.teacher, self.student), time.perf_counter()
        if loop == "plain":
            metrics = self._plain(self.common["num_tokens"])
            peak = meter.cost().peak_memory
        else:
            with self._temporary_engine(group=self.group(loop)) as engine:
                scores = self._score(engine=engine, settings=self.eager if loop == "shared" else self.recorded,
                                     early_stop=self.early_stop if loop == "engine" else None)
            metrics, peak = _metrics(scores), scores.cost.peak_memory
        wait(self.teacher.device)
        return metrics | {"seconds": time.perf_counter() - begun, "peak_bytes": peak}

    def _score(self, **options):
        return score_layers(self.student, self.teacher, self.tokens, direction="add",
                            num_tokens=self.common["num_tokens"], **options)

    def _plain(self, num_tokens, layers=None):
        trained, values = [], []
        for layer in range(self.study.num_layers)[:layers]:
            model = restore(self.student, self.teacher, [layer])
            trained.append(match(model, self.teacher, self.tokens, num_tokens, settings=self.eager).tokens[-1])
            values.append(-heldout_kl(model, self.teacher, self.tokens)[0])
        return {"tokens": sum(trained), "values": values, "history": [values], "history_tokens": trained[:1],
                "num_layers": self.study.num_layers}

    def _by_workers(self):
        """Time workers from when they have started and loaded."""
        num_tokens = self.common["num_tokens"]
        inputs = replace(self.study.scoring_inputs(self.common["mixer"], 0, self.tokens), max_tokens=num_tokens)
        job = Job(inputs, num_tokens, self.recorded, self.common["heldout_tokens"])
        with self._temporary_engine(inputs=inputs) as engine:
            begun = time.perf_counter()
            with pool_of_workers(job, self.workers, warm_up=self.tokens.context) as pool:
                started = time.perf_counter()
                scores = self._score(engine=replace(engine, executor=pool), heldout_tokens=job.heldout_tokens,
                                     settings=self.recorded)
                seconds = time.perf_counter() - started
        return _metrics(scores) | {"seconds": seconds, "start_seconds": started - begun, "peak_bytes": None}

    @contextmanager
    def _temporary_engine(self, **how):
        """An engine with ``records`` and ``checkpoints`` as a study has them, in a folder that is then removed."""
        study = copy.copy(self.study)
        with tempfile.TemporaryDirectory(dir=study.ledger.folder) as folder:
            study.ledger = Ledger(folder, device=study.ledger.device, commit=study.ledger.commit)
            yield Engine(records=StudyRecords(study, self.common), checkpoints=Path(folder) / "models", **how)


def _metrics(scores):
    return {"tokens": scores.tokens, "values": list(scores.values), "history": [list(h) for h in scores.history],
            "history_tokens": list(scores.history_tokens), "num_layers": len(scores.values)}


def recorded_scoring_speed(ledger: Ledger) -> list[pd.DataFrame]:
    """Read the comparisons of `compare_engines`, one a student and setting; of a loop the latest, each row with its
    ``commit``."""
    groups: dict[str, dict[str, dict]] = {}
    for record in ledger.find("scoring_speed"):
        row = record.parameters | record.metrics | {"commit": record.commit}
        common = [row[name] for name in ("aligned", "direction", "num_tokens", "heldout_tokens", "settings", "device")]
        groups.setdefault(json.dumps(common, sort_keys=True), {})[row["loop"]] = row
    return [pd.DataFrame([group[loop] for loop in ENGINES if loop in group]) for group in groups.values()]


def repeat_pairs(ledger: Ledger, scores: Mapping[str, Sequence[float]], teacher: str,
                 mixer: str = "gdn") -> dict[str, tuple]:
    """Pair scores by label: GA-S2 of a teacher with itself (the plain loop and recorded steps, which differ by
    rounding; the pair most alike last), and each of `scores` (title -> a number a layer) with GA-S2's plain loop."""
    repeats = {}
    for frame in recorded_scoring_speed(ledger):
        first, rows = frame.iloc[0], frame[frame["reason"].isna()].set_index("loop")
        if ((first["aligned"]["teacher"], first["mixer"], first["direction"]) == (teacher, mixer, "add")
                and {"plain", "recorded"} <= set(rows.index)):
            rate = MatchSettings.from_numbers(first["settings"]).attention_learning_rate
            rate = np.format_float_scientific(rate, trim="-", exp_digits=1)
            repeats[f"{first['num_tokens']:,} tokens, mixers at {rate}"] = tuple(
                rows.loc[["plain", "recorded"], "values"])
    if not repeats:
        return {}
    repeats = dict(sorted(repeats.items(), key=lambda item: spearman(*item[1])))
    best = list(repeats)[-1]
    titles = {"GA-S2": "the contest's GA-S2"}  # another run than the one that it is compared with
    other = f"the {'steadier ' * (len(repeats) > 1)}GA-S2 ({best})"
    return ({f"GA-S2 with itself: {label}": pair for label, pair in repeats.items()}
            | {f"{titles.get(title, title)} with {other}": (own, repeats[best][0]) for title, own in scores.items()})
