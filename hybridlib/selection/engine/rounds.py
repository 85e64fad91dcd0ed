"""The scoring engine: the candidates of stage-2 scores as tasks that do not depend on one another.

A candidate is a hybrid with one layer swapped, trained for a while and measured. Candidates are computed here, one
after the other or several in one model, or by an executor: `concurrent.futures` pools of processes,
``client.get_executor()`` of dask.distributed, or an executor of submitit (SLURM). What a candidate gave is handed on as
soon as it is there, so that it can be kept; one that fails does not stop the others. With `EarlyStop` they advance in
rounds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from typing import Protocol

from tqdm.auto import tqdm

from hybridlib.checks import check_int, check_number
from hybridlib.distill.settings import MatchSettings
from hybridlib.selection.agreement import top_k_jaccard
from hybridlib.selection.cost import Cost, training_flops
from hybridlib.selection.engine.inputs import LoadedInputs
from hybridlib.selection.engine.measure import ScoringJob, measure_candidates, reason, shares_step
from hybridlib.selection.engine.sets import group_size

__all__ = ["CandidateRecords", "EarlyStop", "ScoringFailed", "score_candidates", "task_size"]

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
    """Stop scoring once the top-K set has stopped changing.

    Every `measure_every` tokens all candidates are measured. Scoring stops at the first measurement at which the sets
    of the K best layers of the last `window` measurements agree: the Jaccard of any two of them is at least
    `threshold`.

    Parameters
    ----------
    budget : share or count of layers, K; see `selection.budget_layers`.
    measure_every : tokens of a candidate's training between two measurements; at least a step's.
    window : measurements that must agree, at least 2.
    threshold : smallest Jaccard, above 0 and at most 1; 1 asks for equal sets.
    heldout_tokens : held-out tokens for measurements that may turn out not to be the last, at most those of the scores;
        None for as many. Where fewer say that the set has settled, the candidates are measured once more on all, so
        that scores are always of all.

    Source: paper, its section on token cost, which follows the top-K set by its rolling Jaccard. That a set which
    has settled stays so is an assumption.
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
        """For a record; `heldout_tokens` is left out where it is None, as in records older than it."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def count(self, num_layers: int) -> int:
        """K of `num_layers` layers; ValueError if the budget is none."""
        from hybridlib.selection.rules import budget_layers

        return budget_layers(self.budget, num_layers)

    def settled(self, history: Sequence[Sequence[float]]) -> bool:
        """Whether scoring may stop after these measurements, each a score a layer, higher for keep."""
        if len(history) < self.window:
            return False
        count = self.count(len(history[-1]))
        return all(top_k_jaccard(a, b, count) >= self.threshold
                   for a, b in combinations(history[-self.window:], 2))


class CandidateRecords(Protocol):
    """Where candidates are kept. `tokens` is how far a candidate was trained when it was measured; `part`, given only
    where that were fewer than those of the scores, on how many held-out tokens."""

    def find(self, layer: int, tokens: int, part: int | None = None) -> dict | None:
        """What was kept, or None; ValueError naming what is damaged."""

    def keep(self, layer: int, tokens: int, found: dict, part: int | None = None) -> None:
        """Keep what was measured, on disk before this returns."""


def task_size(student, tokens, settings: MatchSettings, group: int | None, executor=None) -> int:
    """Layers a task: `group`, or where it is None what is likely to be fast.

    Layers train together where a student is so small that launching a step's kernels takes a GPU longer than running
    them: there, and without an executor, as many as memory holds, in even groups. That is taken to be so where a step
    needs fewer than `SMALL_STEP` FLOPs by `cost.training_flops`. Elsewhere it is one: on a CPU nothing is launched, and
    a stacked step takes longer than its parts. Candidates that draw random numbers (dropout) train alone in any case.
    """
    num_layers = student.config.num_hidden_layers
    if group is not None:
        check_int("group", group, 1)
    if student.config.attention_dropout:
        return 1
    if group is not None:
        return min(group, num_layers)
    flops = training_flops(student, tokens.context) * settings.step_rows(tokens.context) * tokens.context
    if executor is not None or not next(student.parameters()).is_cuda or flops >= SMALL_STEP:
        return 1
    tasks = -(-num_layers // group_size(student, tokens, settings, num_layers))
    return -(-num_layers // tasks)


def score_candidates(job: ScoringJob, num_layers: int, *, executor=None, early_stop: EarlyStop | None = None,
                     records: CandidateRecords | None = None, group: int = 1) -> dict[int, list[dict]]:
    """Measure the candidate of every layer: {tokens a candidate: what `measure_candidates` gave, by layer}.

    One entry without `early_stop`, else one a round; all candidates of a round are measured before the next begins.

    Parameters
    ----------
    executor : anything with the `submit` of a `concurrent.futures.Executor`, whose futures have `done`, `result` and
        `cancel`; None computes here.
    records : asked before a candidate is computed, and told as soon as it is measured.
    group : layers a task; of several, the candidates train together.

    Between rounds a candidate's state is in its checkpoint; or in memory, where one process computes all in one model
    and a candidate takes no more tokens than lie between two checkpoints. Then what a kill costs is their training up
    to the round that it met, and no measurement.

    Raises ScoringFailed, once all other candidates of the round are kept, and ValueError for a bad `early_stop`.
    """
    rounds: dict[int, list[dict]] = {}
    with ExitStack() as stack:
        alive = executor is None and isinstance(job.inputs, LoadedInputs) and (
            num_layers <= group or group == 1 and shares_step(job))  # states stay in memory
        if isinstance(job.inputs, LoadedInputs):
            stack.callback(job.inputs.forget)
        if alive and job.num_tokens <= job.settings.checkpoint_every:
            job = replace(job, checkpoints=None)
        elif early_stop is not None and job.checkpoints is None and not alive:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hybridlib-scoring-"))
            job = replace(job, checkpoints=folder)
        sign = -1 if job.direction == "add" else 1
        for until in _rounds(job, early_stop):
            since = list(rounds.values())[-1][0]["tokens"] if rounds else 0
            part = early_stop.heldout_tokens if until < job.num_tokens else None  # without the rule, there is one round
            rounds[until] = _round(job, num_layers, until, since, executor, records, group, part)
            history = [[sign * c["kl"] for c in found] for found in rounds.values()]
            if early_stop is not None and early_stop.settled(history):
                if part is not None:
                    final = _round(job, num_layers, until, until, executor, records, group)
                    rounds[until] = [_after(*pair) for pair in zip(rounds[until], final, strict=True)]
                break
        for layer in range(num_layers) if job.checkpoints is not None else ():
            job.checkpoint(layer).unlink(missing_ok=True)
    return rounds


def _rounds(job, early_stop):
    """At how many tokens candidates are measured; the last is `num_tokens`."""
    if early_stop is None or job.num_tokens == 0:
        return [job.num_tokens]
    step = job.settings.step_rows(job.inputs.context) * job.inputs.context
    if early_stop.measure_every < step:
        raise ValueError(f"measure_every={early_stop.measure_every} is less than a step of {step} tokens; measure "
                         "less often or lower batch_tokens")
    every, steps = early_stop.measure_every // step, max(1, job.num_tokens // step)
    return [n * step for n in range(every, steps, every)] + [job.num_tokens]


def _after(first, last):
    """The `last` of two measurements of a candidate, at what both took."""
    both = {"seconds": first["seconds"] + last["seconds"]}
    if "cost" in first and "cost" in last:
        both["cost"] = Cost.total(map(Cost.from_dict, (first["cost"], last["cost"]))).to_dict()
    return last | both


def _round(job, num_layers, until, since, executor, records, group, part=None):
    """Every candidate trained from `since` to `until` tokens and measured, on `part` of the held-out tokens or all."""
    named = () if part is None else (part,)
    if part is not None:
        job = replace(job, heldout_tokens=part if job.heldout_tokens is None else min(part, job.heldout_tokens))
    found = {l: kept for l in range(num_layers) if records is not None and (kept := records.find(l, until, *named))}
    missing = [l for l in range(num_layers) if l not in found]
    failed: dict[int, str] = {}
    tasks = [tuple(missing[i:i + group]) for i in range(0, len(missing), group)]
    calls = {layers: partial(measure_candidates, job, layers, until, since) for layers in tasks}
    with tqdm(total=num_layers, initial=len(found), desc=f"score ({job.direction}, {until} tokens)", unit="layer",
              leave=False) as bar:
        for layers, result in _completed(calls, executor):
            try:
                measured = result()
            except Exception as error:  # of the worker, not of a candidate
                measured = dict.fromkeys(layers, reason(error))
            for l, one in measured.items():
                try:
                    if records is not None and isinstance(one, dict):
                        records.keep(l, until, one, *named)
                except OSError as error:
                    one = reason(error)
                (failed if isinstance(one, str) else found)[l] = one
                bar.update()
    if failed:
        raise ScoringFailed(failed, num_layers)
    return [found[l] for l in range(num_layers)]


def _completed(calls: Mapping[tuple, Callable], executor) -> Iterator[tuple[tuple, Callable]]:
    """Each key of `calls` with a function that gives its result, as they are done; what is left is called off."""
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
