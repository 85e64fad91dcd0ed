"""Candidates, sets of layers, are restored, trained and measured: one by one, in turn in one step, or stacked."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm

from hybridlib.checks import check_int
from hybridlib.distill.corpus import Tokens
from hybridlib.distill.evaluate import evaluate, heldout_row_kl, mean_stderr, written_recall
from hybridlib.distill.loop import steps_done
from hybridlib.distill.reading import ReadingItem, reading_figures
from hybridlib.distill.recall import RecallTask, encode_all, generate_recall
from hybridlib.distill.settings import DistillationDiverged, History, MatchSettings
from hybridlib.distill.stages import match, repeatable_if_fused
from hybridlib.models.hybrid import linear_layers, restore
from hybridlib.models.passes import TeacherStates
from hybridlib.records.provenance import describe_device
from hybridlib.selection.cost import Meter, heldout_size
from hybridlib.selection.engine.cohort import Cohort
from hybridlib.selection.engine.inputs import LoadedInputs, ScoringInputs
from hybridlib.selection.engine.switched import Switched
from hybridlib.selection.search import Layers, Measure

__all__ = ["Job", "distilled_kl", "measure_along", "measure_set", "measure_sets", "one_layer_sets", "reason",
           "shares_step"]

logger = logging.getLogger(__name__)

_KL_FIGURES = ("kl", "kl_stderr", "kl_rows")


@dataclass(frozen=True)
class Job:
    """What candidates have in common. Pickled, it is small if its inputs are `ScoringInputs`.

    Parameters
    ----------
    num_tokens, settings : of stage 2; 0 tokens measure candidates untrained.
    heldout_tokens : held-out tokens to measure on, None for all.
    evaluation : measure all figures of `evaluate.evaluate`, not the KL alone, and give the losses of training.
    written, reading : for an evaluation at the end: `recall` by what a hybrid writes too, and files (see `reading`).
    checkpoints : folder in which candidates leave their state; None for nowhere.
    """

    inputs: LoadedInputs | ScoringInputs
    num_tokens: int
    settings: MatchSettings = field(default_factory=MatchSettings)
    heldout_tokens: int | None = None
    evaluation: bool = False
    recall: RecallTask | None = None
    recall_examples: int = 200
    written: bool = False
    reading: Mapping[str, Sequence[ReadingItem]] = field(default_factory=dict)
    checkpoints: str | Path | None = None

    def checkpoint(self, layers: Layers) -> Path | None:
        """The file in which the candidate with these softmax layers leaves its state."""
        name = hashlib.sha256(repr(layers).encode()).hexdigest()[:16]
        return None if self.checkpoints is None else Path(self.checkpoints) / f"candidate-{name}.safetensors"

    def heldout(self, tokens: Tokens) -> int:
        """Held-out tokens that each candidate is measured on."""
        return heldout_size(tokens, self.heldout_tokens)


def one_layer_sets(direction: str, num_layers: int) -> list[Layers]:
    """The candidates of one-layer scores: layer l alone softmax (``"add"``), or all but layer l (``"remove"``)."""
    every = range(num_layers)
    return [(l,) if direction == "add" else tuple(m for m in every if m != l) for l in every]


def measure_sets(job: Job, sets: Iterable[Layers], until: int | None = None, since: int = 0, *,
                 stack: bool | None = None) -> dict[Layers, dict]:
    """Train the candidates with these softmax layers from `since` tokens to `until` (None: the end), and measure each.

    They train together, as a `Cohort`, if `stack` says so (None: if there are several), else in turn.

    Returns
    -------
    dict
        {layers: figures}: ``kl``, ``kl_stderr``, ``kl_rows`` (nats a token), ``tokens`` (trained in all), ``rose`` (see
        `History`), ``seconds`` and ``cost`` (a dict) of this call, ``device``; for an evaluation the other figures of
        `evaluate`, ``loss``, ``loss_tokens`` and ``train_seconds``, and at the end those of `job.written` and
        `job.reading`. A candidate that failed has ``error``, the reason, in place of figures.
    """
    sets = [tuple(layers) for layers in sets]
    if job.num_tokens and (len(sets) > 1 if stack is None else stack):
        inputs = None
        try:
            inputs = job.inputs.load()
            return _measure_together(job, inputs, sets, job.num_tokens if until is None else until, since)
        except Exception:
            if inputs is not None:
                inputs.forget()
            logger.warning("the sets %s could not be measured together; now in turn", sets, exc_info=True)
    figures = {}
    for layers in sets:
        try:
            figures[layers] = measure_set(job, layers, until, since)
        except Exception as error:  # whatever it is, other candidates go on
            logger.warning("the candidate with softmax layers %s failed", layers, exc_info=True)
            figures[layers] = {"error": reason(error)}
    return figures


def measure_set(job: Job, layers: Layers, until: int | None = None, since: int = 0) -> dict:
    """The figures of one candidate, as `measure_sets` gives them; raises what went wrong."""
    job, until = replace(job, inputs=job.inputs.load()), job.num_tokens if until is None else until
    key = "step", job.num_tokens, job.settings
    if until and shares_step(job) and job.inputs.alive.get("without") != key:
        try:
            with repeatable_if_fused(job.inputs.student):
                return _measure_in_turn(job, key, layers, until, since)
        except DistillationDiverged:
            raise
        except Exception:
            logger.warning("the set %s could not be measured in the recorded step; now by itself", layers,
                           exc_info=True)
            job.inputs.forget()
            job.inputs.alive["without"] = key
    return _measure_alone(job, layers, until, since)


def measure_along(job: Job, layers: Layers, points: Iterable[int] = (), heldout_tokens: int | None = None,
                  end: bool = True) -> list[dict]:
    """The figures of one candidate after each of `points` tokens and, with `end`, at its end; raises what went wrong.

    Points are rounded up to whole steps, and several may be one; `heldout_tokens` are read there, None for those of
    `job`. Where no recorded step serves (see `shares_step`), `job` needs `checkpoints`.
    """
    on_the_way = job if heldout_tokens is None else replace(job, heldout_tokens=heldout_tokens)
    step = job.settings.step_rows(job.inputs.context) * job.inputs.context
    figures, since = [], 0
    for point in (*points, *([job.num_tokens] if end else ())):
        until = job.num_tokens if point >= job.num_tokens else -(-point // step) * step
        figures.append(measure_set(job if until == job.num_tokens else on_the_way, layers, until, since))
        since = figures[-1]["tokens"]
    return figures


def distilled_kl(student, teacher, tokens, *, num_tokens: int = 500_000, settings: MatchSettings | None = None,
                 heldout_tokens: int | None = None, inputs: ScoringInputs | None = None) -> Measure:
    """A measure for searches: the held-out KL, in nats a token, of the hybrid with these layers after a short stage 2.

    Parameters
    ----------
    student : aligned and all linear; it is left as it was.
    num_tokens, heldout_tokens : of stage 2 for each set (0: untrained), and held out to measure on (None: all).
    inputs : where an executor's workers load their inputs; without them every call carries both models.
    """
    check_int("num_tokens", num_tokens, 0)
    for name, value in (("num_tokens", num_tokens or None), ("heldout_tokens", heldout_tokens)):
        if value is not None:
            check_int(name, value, tokens.context)
    if len(linear_layers(student.config)) != student.config.num_hidden_layers:
        raise ValueError("student has softmax layers; distilled_kl takes the all-linear student that linearize gave")
    inputs = inputs or LoadedInputs(student, teacher, tokens, TeacherStates(teacher))
    return partial(_kl, Job(inputs, num_tokens, settings or MatchSettings(), heldout_tokens))


def _kl(job, layers):
    return measure_set(job, layers)["kl"]


def shares_step(job: Job) -> bool:
    """Whether candidates take turns in one recorded step: on a GPU, if settings say so and inputs share states."""
    inputs = job.inputs
    return (isinstance(inputs, LoadedInputs) and job.settings.cuda_graph and inputs.states is not None
            and next(inputs.student.parameters()).is_cuda
            and not inputs.student.config.attention_dropout)


class _Bill:
    """Time and cost of a call, from now on; one `Meter` a candidate."""

    def __init__(self, inputs, count=1):
        self.inputs, self.begun = inputs, time.perf_counter()
        self.meters = [Meter(inputs.teacher, beside=inputs.beside) for _ in range(count)]
        self.taught = inputs.states.computed if inputs.states is not None else None

    def figures(self, models, trained, measured):
        """Of each candidate (its model, or the modules that computed): ``seconds``, ``cost``, ``device``."""
        inputs, count = self.inputs, len(self.meters)
        seconds = (time.perf_counter() - self.begun) / count
        taught = None if self.taught is None else inputs.states.computed - self.taught
        device, bills = describe_device(str(next(inputs.student.parameters()).device)), []
        for i, (meter, model) in enumerate(zip(self.meters, models, strict=True)):
            meter.stage_2(model, inputs.teacher, trained, measured, inputs.context, 0 if i and taught else taught)
            cost = replace(meter.cost(), seconds=seconds)
            bills.append({"seconds": seconds, "cost": cost.to_dict(), "device": device})
        return bills


def _measure_alone(job, layers, until, since):
    inputs = job.inputs
    bill = _Bill(inputs)
    model, history = restore(inputs.student, inputs.teacher, layers), History("match")
    if until:
        history = match(model, inputs.teacher, inputs.tokens, job.num_tokens, settings=job.settings, until=until,
                        checkpoint=job.checkpoint(layers), states=inputs.states)
    spent = history.tokens[-1] if until else 0
    if job.evaluation:
        figures = evaluate(model, inputs.teacher, inputs.tokens, recall=job.recall,
                           recall_examples=job.recall_examples, heldout_tokens=job.heldout_tokens).metrics()
        figures |= _training(history)
    else:
        figures = _kl_figures(heldout_row_kl(model, inputs.teacher, inputs.tokens, heldout_tokens=job.heldout_tokens,
                                             states=inputs.states))
    _check_kl(figures["kl"], spent)
    return figures | {"tokens": spent, "rose": history.rose} | bill.figures(
        [model], spent - since, job.heldout(inputs.tokens))[0] | _texts(job, inputs, until, lambda: model)


def _measure_in_turn(job, key, layers, until, since):
    inputs = job.inputs
    bill = _Bill(inputs)
    if inputs.alive.get("step", (None,))[0] != key:
        inputs.forget()
        step = Switched(inputs.student, inputs.teacher, inputs.tokens, job.num_tokens, job.settings, inputs.states)
        inputs.alive.update(step=(key, step), held={})
    step, held, path = inputs.alive["step"][1], inputs.alive["held"], job.checkpoint(layers)
    end = step.steps_until(until)
    step.take(layers, checkpoint=path if steps_done(path) else None,  # its memory serves what is held next
              held=held.pop(layers, None) if since and path is None else None)
    if step.step > end:
        raise ValueError(f"checkpoint={str(path)!r} is {step.step} steps into the run, beyond until={until}")
    with _bar(step, end) as bar:
        step.train(end, bar=bar, checkpoints=None if path is None else {0: path})
    if step.errors:
        raise step.errors[0]
    spent = step.step * step.step_tokens
    if job.evaluation:
        figures = step.figures(inputs.tokens, job.heldout(inputs.tokens), _prompts(job, inputs))[0]
        figures |= _training(step.histories[0])
    else:
        figures = _kl_figures(step.heldout_row_kl(inputs.tokens, job.heldout_tokens))
    _check_kl(figures["kl"], spent)
    if path is None and until < job.num_tokens:
        held[layers] = step.hold()
    return figures | {"tokens": spent, "rose": step.histories[0].rose} | bill.figures(
        [_parts_of(inputs, layers)], spent - since, job.heldout(inputs.tokens))[0] | _texts(job, inputs, until,
                                                                                            step.hybrid)


def _measure_together(job, inputs, sets, until, since):
    bill = _Bill(inputs, len(sets))
    steps = {layers: steps_done(job.checkpoint(layers)) for layers in sets}
    examples = _prompts(job, inputs)
    figures: dict[Layers, dict] = {}
    for step in dict.fromkeys(steps.values()):
        part = [layers for layers in sets if steps[layers] == step]
        cohort = _cohort(job, inputs, part, step, since)
        end = cohort.steps_until(until)
        if cohort.step > end:
            raise ValueError(f"checkpoints of {part} are {cohort.step} steps into the run, beyond until={until}")
        with _bar(cohort, end) as bar:
            cohort.train(end, bar=bar, checkpoints=None if job.checkpoints is None else
                         {c: job.checkpoint(layers) for c, layers in enumerate(part)})
        if until == job.num_tokens:
            inputs.forget()
        spent = end * cohort.step_tokens
        evaluations = cohort.figures(inputs.tokens, job.heldout(inputs.tokens), examples)
        for c, (layers, measured) in enumerate(zip(part, evaluations, strict=True)):
            error, done = cohort.errors.get(c), _training(cohort.histories[c]) if job.evaluation else {}
            try:
                if error is None:
                    _check_kl(measured["kl"], spent)
                    shown = measured if job.evaluation else {name: measured[name] for name in _KL_FIGURES}
                    figures[layers] = shown | done | {"tokens": spent, "rose": cohort.histories[c].rose} | _texts(
                        job, inputs, until, partial(cohort.hybrid, c))
            except DistillationDiverged as caught:
                error = caught
            if error is not None:
                figures[layers] = {"error": reason(error), "tokens": len(cohort.histories[c].losses)
                                   * cohort.step_tokens} | done
    for layers, own in zip(sets, bill.figures([_parts_of(inputs, layers) for layers in sets], spent - since,
                                              job.heldout(inputs.tokens)), strict=True):
        figures[layers] |= own
    return figures


def _cohort(job, inputs, sets: Sequence[Layers], steps, since):
    """The cohort of `sets` after `steps` steps: the one of the last call, or one made from its checkpoints."""
    key = job.num_tokens, job.settings, tuple(sets)
    last, cohort = inputs.alive.get("cohort", (None, None))
    if last == key and since == cohort.step * cohort.step_tokens and (not cohort.errors or job.checkpoints is None):
        return cohort
    inputs.forget()
    cohort = None  # with its memory
    cohort = Cohort(inputs.student, inputs.teacher, inputs.tokens, sets, job.num_tokens, job.settings, inputs.states)
    if steps:
        cohort.resume({c: job.checkpoint(layers) for c, layers in enumerate(sets)})
    inputs.alive["cohort"] = key, cohort
    return cohort


def _bar(run, end):
    count = len(run.histories)
    return tqdm(total=(end - run.step) * run.step_tokens * count, unit="tok", unit_scale=True, leave=False,
                desc="match" if count == 1 else f"match {count} sets")


def _texts(job, inputs, until, hybrid: Callable):
    """The figures of what a candidate at its end, the plain model that `hybrid` gives, reads and writes."""
    figures: dict = {}
    if job.evaluation and until == job.num_tokens and (job.written or job.reading):
        model, tokenizer = hybrid(), inputs.tokens.tokenizer
        if job.written:
            figures |= written_recall(model, tokenizer, job.recall, job.recall_examples)
        if job.reading:
            figures["reading"] = reading_figures(model, tokenizer, job.reading)
    return figures


def _prompts(job, inputs):
    """The encoded prompts of `job.recall`; None if there is none."""
    return job.recall and encode_all(generate_recall(job.recall, job.recall_examples, seed=1), inputs.tokens.tokenizer,
                                     inputs.student.config)


def _kl_figures(rows):
    """The figures of `_KL_FIGURES`, as `evaluate.Evaluation.metrics` gives them, of the KL of each row."""
    return dict(zip(_KL_FIGURES, (*mean_stderr(rows), [round(kl, 6) for kl in rows]), strict=True))


def _training(history):
    return {"loss": history.losses, "loss_tokens": history.tokens, "train_seconds": history.seconds}


def _parts_of(inputs, layers):
    """The modules of a candidate that compute, for a `Meter`."""
    pairs = zip(inputs.student.model.layers, inputs.teacher.model.layers, strict=True)
    parts = [part for l, (own, teachers) in enumerate(pairs)
             for part in (own.mlp, (teachers if l in layers else own).self_attn)]
    return nn.ModuleList([*parts, inputs.student.lm_head])


def _check_kl(kl, spent):
    if not math.isfinite(kl):
        raise DistillationDiverged(f"its held-out KL after {spent} tokens is {kl}; try a lower learning rate")


def reason(error: BaseException) -> str:
    """One line on what went wrong."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
