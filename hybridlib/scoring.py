"""The scoring engine: the candidates of stage-2 scores as tasks that do not depend on one another.

A candidate is a hybrid with one layer swapped, trained for a while and measured. Candidates are computed here, one
after the other, or by an executor: `concurrent.futures` pools of processes, ``client.get_executor()`` of
dask.distributed, or an executor of submitit (SLURM). What a candidate gave is handed on as soon as it is there, so
that it can be kept; one that fails does not stop the others. With `EarlyStop` they advance in rounds.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path
from typing import Protocol

from tqdm.auto import tqdm

from .agreement import top_k_jaccard
from .checks import check_int, check_number
from .cost import Meter, heldout_size
from .corpus import Tokens, load_tokens
from .distill import DistillationDiverged, MatchSettings, match
from .evaluate import heldout_kl
from .hybrid import load_hybrid, restore
from .ledger import describe_device
from .passes import TeacherStates
from .teachers import load_teacher, sha256_of

__all__ = ["CandidateRecords", "EarlyStop", "LoadedInputs", "ScoringFailed", "ScoringInputs", "ScoringJob",
           "measure_candidates", "score_candidates", "weights_sha256"]

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # between two looks at jobs that cannot be waited for together


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

    Source: paper, its section on token cost, which follows the top-K set by its rolling Jaccard. That a set which
    has settled stays so is an assumption.
    """

    budget: float | int
    measure_every: int
    window: int = 3
    threshold: float = 1.0

    def __post_init__(self):
        self.count(10**6)
        check_int("measure_every", self.measure_every, 1)
        check_int("window", self.window, 2)
        check_number("threshold", self.threshold, 0, 1, open_low=True)

    def count(self, num_layers: int) -> int:
        """K of `num_layers` layers; ValueError if the budget is none."""
        from .selection import budget_layers  # it builds on this module

        return budget_layers(self.budget, num_layers)

    def settled(self, history: Sequence[Sequence[float]]) -> bool:
        """Whether scoring may stop after these measurements, each a score a layer, higher for keep."""
        if len(history) < self.window:
            return False
        count = self.count(len(history[-1]))
        return all(top_k_jaccard(a, b, count) >= self.threshold
                   for a, b in combinations(history[-self.window:], 2))


@dataclass(frozen=True)
class LoadedInputs:
    """A scoring's inputs as they lie in this process; `states`, of this teacher, are shared by its candidates."""

    student: object
    teacher: object
    tokens: Tokens
    states: TeacherStates

    @property
    def context(self) -> int:
        return self.tokens.context

    def load(self) -> LoadedInputs:
        return self


@dataclass(frozen=True)
class ScoringInputs:
    """Where a scoring's inputs are, so that a worker can load them itself; it keeps what it loaded last.

    Parameters
    ----------
    student : folder of the aligned student, one that every worker sees.
    student_sha256 : of its weights, see `weights_sha256`; a worker refuses others.
    teacher, corpus, context, seed : as `load_teacher` and `load_tokens` take them.
    max_tokens, heldout_tokens : training and held-out tokens to load; of the latter `heldout_rows` (first, end) are
        measured on.
    fingerprint : of the tokens; a worker that reads others refuses.
    device : to compute on, as `load_teacher` takes it: ``"cuda"`` is the first GPU that the worker sees.
    memory : bytes for the teacher's states, see `TeacherStates`.
    """

    student: str
    student_sha256: str
    teacher: str
    corpus: str
    context: int
    seed: int
    max_tokens: int
    heldout_tokens: int
    heldout_rows: tuple[int, int]
    fingerprint: str
    device: str = "auto"
    memory: int = 4 * 2**30

    def load(self) -> LoadedInputs:
        """Load everything; raises ValueError if it is not what the scoring began with."""
        return _load(self)


@lru_cache(maxsize=1)
def _load(inputs):
    if weights_sha256(inputs.student) != inputs.student_sha256:
        raise ValueError(f"student={inputs.student!r} holds other weights than those to be scored; "
                         "let every worker see the same folder")
    teacher = load_teacher(inputs.teacher, device=inputs.device)
    whole = load_tokens(inputs.corpus, teacher.tokenizer, inputs.context, inputs.seed, max_tokens=inputs.max_tokens,
                        heldout_tokens=inputs.heldout_tokens)
    rows = whole.heldout[slice(*inputs.heldout_rows)]
    tokens = Tokens(whole.train, rows, whole.tokenizer, whole.source, whole.seed)
    if tokens.fingerprint != inputs.fingerprint:
        raise ValueError(f"corpus={inputs.corpus!r} gives other tokens here than where the scoring began; "
                         "let every worker see the same files")
    student = load_hybrid(inputs.student, device=inputs.device, teacher=teacher)
    return LoadedInputs(student, teacher.model, tokens, TeacherStates(teacher.model, inputs.memory))


def weights_sha256(folder: str | Path) -> str:
    """The sha256 over the safetensors files of a saved hybrid."""
    return sha256_of(*sorted(Path(folder).glob("*.safetensors")))


@dataclass(frozen=True)
class ScoringJob:
    """What all candidates of a scoring share. Pickled, it is small if its inputs are `ScoringInputs`.

    Parameters
    ----------
    direction, num_tokens, heldout_tokens, settings : as `score_layers` takes them.
    checkpoints : folder in which candidates leave their state between rounds; None if there is one round.
    """

    inputs: LoadedInputs | ScoringInputs
    direction: str
    num_tokens: int
    heldout_tokens: int | None
    settings: MatchSettings = field(default_factory=MatchSettings)
    checkpoints: str | None = None

    def checkpoint(self, layer: int) -> Path | None:
        return None if self.checkpoints is None else Path(self.checkpoints) / f"layer-{layer}.safetensors"


class CandidateRecords(Protocol):
    """Where candidates are kept. `tokens` is how far a candidate was trained when it was measured."""

    def find(self, layer: int, tokens: int) -> dict | None:
        """What was kept, or None; ValueError naming what is damaged."""

    def keep(self, layer: int, tokens: int, found: dict) -> None:
        """Keep what was measured, on disk before this returns."""


def measure_candidates(job: ScoringJob, layers: Sequence[int], until: int, since: int = 0) -> dict[int, dict | str]:
    """The task: train the candidates of `layers` from `since` tokens to `until` and measure each.

    Returns, a layer each, ``kl``, ``kl_stderr`` (nats a token), ``tokens`` (trained in all), ``seconds`` (of this
    call), ``cost`` (of this call, a dict) and ``device``; or, if the candidate failed, why. Candidates that train
    together in one model would do so here: the layers of a call belong to one job and may share all they like.
    """
    found: dict[int, dict | str] = {}
    for layer in layers:
        try:
            found[layer] = _measure(job, job.inputs.load(), layer, until, since)
        except Exception as error:  # whatever it is, other candidates go on
            logger.warning("the candidate of layer %d failed", layer, exc_info=True)
            found[layer] = _reason(error)
    return found


def _measure(job, inputs, layer, until, since):
    begun, meter, taught = time.perf_counter(), Meter(inputs.teacher), inputs.states.computed
    layers = range(inputs.student.config.num_hidden_layers)
    kept = [layer] if job.direction == "add" else [m for m in layers if m != layer]
    model, spent = restore(inputs.student, inputs.teacher, kept), 0
    if until:
        spent = match(model, inputs.teacher, inputs.tokens, job.num_tokens, settings=job.settings, until=until,
                      checkpoint=job.checkpoint(layer), states=inputs.states).tokens[-1]
    kl, error = heldout_kl(model, inputs.teacher, inputs.tokens, heldout_tokens=job.heldout_tokens,
                           states=inputs.states)
    if not math.isfinite(kl):
        raise DistillationDiverged(f"its held-out KL after {spent} tokens is {kl}; try a lower learning rate")
    meter.stage_2(model, inputs.teacher, spent - since, heldout_size(inputs.tokens, job.heldout_tokens),
                  inputs.context, inputs.states.computed - taught)
    return {"kl": kl, "kl_stderr": error, "tokens": spent, "seconds": time.perf_counter() - begun,
            "cost": meter.cost().to_dict(), "device": describe_device(str(next(model.parameters()).device))}


def score_candidates(job: ScoringJob, num_layers: int, *, executor=None, early_stop: EarlyStop | None = None,
                     records: CandidateRecords | None = None, group: int = 1) -> dict[int, list[dict]]:
    """Measure the candidate of every layer: {tokens a candidate: what `measure_candidates` gave, by layer}.

    One entry without `early_stop`, else one a round; all candidates of a round are measured before the next begins.

    Parameters
    ----------
    executor : anything with the `submit` of a `concurrent.futures.Executor`, whose futures have `done`, `result` and
        `cancel`; None computes here.
    records : asked before a candidate is computed, and told as soon as it is measured.
    group : layers a task.

    Raises ScoringFailed, once all other candidates of the round are kept, and ValueError for a bad `early_stop`.
    """
    rounds: dict[int, list[dict]] = {}
    with ExitStack() as stack:
        if early_stop is not None and job.checkpoints is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hybridlib-scoring-"))
            job = replace(job, checkpoints=folder)
        sign = -1 if job.direction == "add" else 1
        for until in _rounds(job, early_stop):
            since = list(rounds.values())[-1][0]["tokens"] if rounds else 0
            rounds[until] = _round(job, num_layers, until, since, executor, records, group)
            history = [[sign * c["kl"] for c in found] for found in rounds.values()]
            if early_stop is not None and early_stop.settled(history):
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


def _round(job, num_layers, until, since, executor, records, group):
    found = {l: kept for l in range(num_layers) if records is not None and (kept := records.find(l, until))}
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
                measured = dict.fromkeys(layers, _reason(error))
            for l, one in measured.items():
                try:
                    if records is not None and isinstance(one, dict):
                        records.keep(l, until, one)
                except OSError as error:
                    one = _reason(error)
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


def _reason(error):
    """One line on what went wrong."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
