"""Candidates as tasks that do not depend on one another, here or by an executor, and rounds of them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Protocol

from tqdm.auto import tqdm

from hybridlib.checks import check_executor, check_int, check_number
from hybridlib.distill.settings import MatchSettings
from hybridlib.selection.agreement import top_k_jaccard
from hybridlib.selection.cost import Cost, training_flops
from hybridlib.selection.engine.candidates import Job, measure_sets, reason, shares_step
from hybridlib.selection.engine.inputs import LoadedInputs, ScoringInputs
from hybridlib.selection.engine.sets import group_size
from hybridlib.selection.rules import budget_layers
from hybridlib.selection.search import Layers

__all__ = ["CandidateRecords", "EarlyStop", "Engine", "ScoringFailed", "run_candidates"]

POLL_SECONDS = 0.2  # between two looks at jobs that cannot be waited for together
SMALL_STEP = 1e12  # FLOPs; an H100 computes them in about the time that a step's thousands of launches take


class ScoringFailed(RuntimeError):
    """Some candidates failed; `failed` is {layer: why}. All others were measured before this was raised."""

    def __init__(self, failed: Mapping[int, str], num_layers: int):
        super().__init__(failed, num_layers)
        self.failed, self.num_layers = dict(sorted(failed.items())), num_layers

    def __str__(self):
        named = ", ".join(f"layer {layer} ({why})" for layer, why in self.failed.items())
        return (f"scoring failed for {named}; the other {self.num_layers - len(self.failed)} of {self.num_layers} "
                "candidates were measured")


@dataclass(frozen=True)
class EarlyStop:
    """Stop scoring once the set of the K best layers has stopped changing (paper, section on token cost).

    Parameters
    ----------
    budget : share or count of layers, K; see `rules.budget_layers`.
    measure_every : tokens of a candidate's training between two measurements; at least a step's.
    window : measurements, at least 2, whose sets must have a Jaccard of at least `threshold`, any two of them.
    heldout_tokens : held-out tokens for measurements on the way; None for as many as for scores.
    """

    budget: float | int
    measure_every: int
    window: int = 3
    threshold: float = 1.0
    heldout_tokens: int | None = None

    def __post_init__(self):
        self.count(10**6)
        check_int("measure_every", self.measure_every, 1)
        check_int("window", self.window, 2)
        check_number("threshold", self.threshold, 0, 1, open_low=True)
        if self.heldout_tokens is not None:
            check_int("heldout_tokens", self.heldout_tokens, 1)

    def parameters(self) -> dict:
        """The fields that are set, for a record."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def count(self, num_layers: int) -> int:
        """K of `num_layers` layers."""
        return budget_layers(self.budget, num_layers)

    def settled(self, history: Sequence[Sequence[float]]) -> bool:
        """Whether scoring may stop after measurements `history`, each a score a layer, higher for keep."""
        if len(history) < self.window:
            return False
        count = self.count(len(history[-1]))
        return all(top_k_jaccard(a, b, count) >= self.threshold
                   for a, b in combinations(history[-self.window:], 2))


class CandidateRecords(Protocol):
    """Where figures are recorded, by candidate, tokens trained and, if fewer than scores read, held-out tokens."""

    def find(self, candidate: int, tokens: int, heldout_tokens: int | None = None) -> dict | None:
        """The recorded figures, or None; ValueError naming what is damaged."""

    def keep(self, candidate: int, tokens: int, figures: dict, heldout_tokens: int | None = None) -> None:
        """Record `figures`, on disk before this returns."""


@dataclass(frozen=True)
class Engine:
    """How candidates are run.

    Parameters
    ----------
    executor : a `concurrent.futures.Executor`, dask.distributed's ``client.get_executor()`` or one of submitit. None
        runs candidates here.
    group : candidates that train together, in one stacked model; None for the rule of `group_of`.
    memory : bytes for the teacher's hidden states, see `TeacherStates`.
    records : where the figures of candidates are read from, or recorded as soon as they are measured.
    checkpoints : folder, seen by all workers, for the state of candidates; None for a temporary one.
    inputs : where workers load student, teacher and tokens; without them a task carries both models with it.
    """

    executor: object = None
    group: int | None = None
    memory: int = 4 * 2**30
    records: CandidateRecords | None = None
    checkpoints: str | Path | None = None
    inputs: ScoringInputs | None = None

    def __post_init__(self):
        check_executor(self.executor)
        if self.group is not None:
            check_int("group", self.group, 1)
        check_int("memory", self.memory, 0)

    def group_of(self, student, tokens, settings: MatchSettings) -> int:
        """Candidates a task: `group` or, where it is None, as many as memory holds on a GPU whose steps are small."""
        num_layers = student.config.num_hidden_layers
        if student.config.attention_dropout:
            return 1
        if self.group is not None:
            return min(self.group, num_layers)
        flops = training_flops(student, tokens.context) * settings.step_rows(tokens.context) * tokens.context
        if self.executor is not None or not next(student.parameters()).is_cuda or flops >= SMALL_STEP:
            return 1
        tasks = -(-num_layers // group_size(student, tokens, settings, num_layers))
        return -(-num_layers // tasks)


def run_candidates(job: Job, sets: Sequence[Layers], engine: Engine, group: int = 1, *, sign: int = -1,
                   early_stop: EarlyStop | None = None) -> dict[int, list[dict]]:
    """Measure the candidate of every set: {tokens a candidate: the figures of `measure_sets`, in the order of `sets`}.

    There is one entry, or one a round of `early_stop`; `sign` makes a KL a score, higher for keep. Raises ScoringFailed
    once all other candidates of the round are recorded, and ValueError for a bad `early_stop`.
    """
    rounds: dict[int, list[dict]] = {}
    with ExitStack() as stack:
        in_memory = engine.executor is None and isinstance(job.inputs, LoadedInputs) and (
            len(sets) <= group or group == 1 and shares_step(job))
        if isinstance(job.inputs, LoadedInputs):
            stack.callback(job.inputs.forget)
        if job.num_tokens > job.settings.checkpoint_every or early_stop is not None and not in_memory:
            folder = engine.checkpoints
            if folder is None and early_stop is not None and not in_memory:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hybridlib-scoring-"))
            job = replace(job, checkpoints=None if folder is None else str(Path(folder).resolve()))
        for until in _points(job, early_stop):
            since = list(rounds.values())[-1][0]["tokens"] if rounds else 0
            part = early_stop.heldout_tokens if until < job.num_tokens else None  # without the rule, there is one round
            rounds[until] = _round(job, sets, until, since, engine, group, part)
            history = [[sign * candidate["kl"] for candidate in figures] for figures in rounds.values()]
            if early_stop is not None and early_stop.settled(history):
                if part is not None:
                    final = _round(job, sets, until, until, engine, group)
                    rounds[until] = [_summed(*pair) for pair in zip(rounds[until], final, strict=True)]
                break
        for layers in sets if job.checkpoints is not None else ():
            job.checkpoint(layers).unlink(missing_ok=True)
    return rounds


def _points(job, early_stop):
    """At how many tokens candidates are measured; the last is `num_tokens`."""
    if early_stop is None or job.num_tokens == 0:
        return [job.num_tokens]
    step = job.settings.step_rows(job.inputs.context) * job.inputs.context
    if early_stop.measure_every < step:
        raise ValueError(f"measure_every={early_stop.measure_every} is less than a step of {step} tokens; measure "
                         "less often or lower batch_tokens")
    every, steps = early_stop.measure_every // step, max(1, job.num_tokens // step)
    return [n * step for n in range(every, steps, every)] + [job.num_tokens]


def _summed(first, last):
    both = {"seconds": first["seconds"] + last["seconds"]}
    if "cost" in first and "cost" in last:
        both["cost"] = Cost.total(map(Cost.from_dict, (first["cost"], last["cost"]))).to_dict()
    return last | both


def _round(job, sets, until, since, engine, group, part=None):
    """Every candidate trained from `since` to `until` tokens and measured, on `part` of the held-out tokens or all."""
    fewer, records = () if part is None else (part,), engine.records
    if part is not None:
        job = replace(job, heldout_tokens=part if job.heldout_tokens is None else min(part, job.heldout_tokens))
    figures = {} if records is None else {i: recorded for i in range(len(sets))
                                          if (recorded := records.find(i, until, *fewer))}
    missing = [i for i in range(len(sets)) if i not in figures]
    failed: dict[int, str] = {}
    tasks = [tuple(missing[i:i + group]) for i in range(0, len(missing), group)]
    calls = {task: partial(measure_sets, job, [sets[i] for i in task], until, since) for task in tasks}
    with tqdm(total=len(sets), initial=len(figures), desc=f"candidates ({until} tokens)", unit="set",
              leave=False) as bar:
        for task, result in _completed(calls, engine.executor):
            try:
                measured = result()
            except Exception as error:  # of the worker, not of a candidate
                measured = {sets[i]: {"error": reason(error)} for i in task}
            for i in task:
                candidate = measured[sets[i]]
                try:
                    if records is not None and "error" not in candidate:
                        records.keep(i, until, candidate, *fewer)
                except OSError as error:
                    candidate = {"error": reason(error)}
                if "error" in candidate:
                    failed[i] = candidate["error"]
                else:
                    figures[i] = candidate
                bar.update()
    if failed:
        raise ScoringFailed(failed, len(sets))
    return [figures[i] for i in range(len(sets))]


def _completed(calls: Mapping[tuple, Callable], executor) -> Iterator[tuple[tuple, Callable]]:
    """Yield each key of `calls` with a function that gives its result, as they end; cancel what is left."""
    if executor is None:
        yield from calls.items()
        return
    futures = {}
    try:
        for key, call in calls.items():
            futures[executor.submit(call)] = key
        if all(isinstance(future, Future) for future in futures):
            for future in as_completed(list(futures)):
                yield futures.pop(future), future.result
        while futures:  # jobs of submitit can only be asked
            done = [future for future in futures if future.done()]
            for future in done:
                yield futures.pop(future), future.result
            if not done:
                time.sleep(POLL_SECONDS)
    finally:
        for future in futures:
            future.cancel()
