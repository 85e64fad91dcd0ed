"""The candidates of a scoring, as tasks: where its inputs are, and what a task computes with them.

A task takes the candidates of a few layers some tokens further and measures them. They share the teacher's pass and,
if there are several, train together in one stacked model; their state between two tasks is on disk.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm

from hybridlib.checks import check_int
from hybridlib.distill.corpus import Tokens
from hybridlib.distill.evaluate import heldout_kl
from hybridlib.distill.settings import DistillationDiverged, MatchSettings
from hybridlib.distill.stages import match
from hybridlib.kernels import fused
from hybridlib.models.hybrid import linear_layers, restore
from hybridlib.models.passes import TeacherStates, repeatable
from hybridlib.records.provenance import describe_device
from hybridlib.selection.cost import Meter, heldout_size
from hybridlib.selection.engine.cohort import Cohort, steps_done
from hybridlib.selection.engine.inputs import LoadedInputs, ScoringInputs
from hybridlib.selection.engine.switched import Switched
from hybridlib.selection.search import Measure

__all__ = ["ScoringJob", "distilled_kl", "measure_candidates", "reason", "shares_step"]

logger = logging.getLogger(__name__)


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


def measure_candidates(job: ScoringJob, layers: Sequence[int], until: int, since: int = 0) -> dict[int, dict | str]:
    """The task: train the candidates of `layers` from `since` tokens to `until` and measure each.

    Returns, a layer each, ``kl``, ``kl_stderr`` (nats a token), ``tokens`` (trained in all), ``seconds`` (of this
    call), ``cost`` (of this call, a dict) and ``device``; or, if the candidate failed, why.

    Several layers train together, as a `Cohort`, to the scores that each gets alone, up to rounding; their checkpoints
    are those of runs alone, so that either way goes on from the other's. Seconds are shared out evenly, and the
    teacher's pass is the first layer's, as it is of candidates measured in turn. If a group cannot be trained as one
    (it may not fit the GPU's memory), its candidates are measured in turn.

    Layers that train alone take turns in one recorded step, as `Switched`, where `shares_step` says so. Without
    checkpoints their states are kept in memory; what is lost there is trained again. So measured, a candidate has the
    same scores in every process, to the last bit, where its mixers run the fused kernels.
    """
    if len(layers) > 1 and until:
        inputs = None
        try:
            inputs = job.inputs.load()
            return _measure_together(job, inputs, tuple(layers), until, since)
        except Exception:
            if inputs is not None:
                inputs.forget()
            logger.warning("layers %s could not be measured together; now in turn", layers, exc_info=True)
    found: dict[int, dict | str] = {}
    for layer in layers:
        try:
            found[layer] = (_measure_recorded(job, layer, until, since) or
                            _measure(job, job.inputs.load(), layer, until, since))
        except Exception as error:  # whatever it is, other candidates go on
            logger.warning("the candidate of layer %d failed", layer, exc_info=True)
            found[layer] = reason(error)
    return found


def shares_step(job: ScoringJob) -> bool:
    """Whether layers that train alone take turns in one recorded step: on a GPU, if the settings ask for it."""
    inputs = job.inputs
    return (isinstance(inputs, LoadedInputs) and job.settings.cuda_graph and next(inputs.student.parameters()).is_cuda
            and not inputs.student.config.attention_dropout)


def _measure_recorded(job, layer, until, since):
    """As `_measure`, in a step that all candidates share; None where there is none, or it cannot run."""
    job = replace(job, inputs=job.inputs.load())
    inputs, key = job.inputs, ("step", job.num_tokens, job.settings)
    if not until or not shares_step(job) or inputs.alive.get("without") == key:
        return None
    try:
        with repeatable() if _sums_in_order(inputs.student) else contextlib.nullcontext():
            return _measure_in_turn(job, key, layer, until, since)
    except DistillationDiverged:
        raise
    except Exception:
        logger.warning("layer %d could not be measured in the recorded step; now by itself", layer, exc_info=True)
        inputs.forget()
        inputs.alive["without"] = key
        return None


def _sums_in_order(student):
    """Whether a step of it has no operator that `repeatable` refuses: its mixers run the fused kernels."""
    mixers = [student.model.layers[l].self_attn for l in linear_layers(student.config)]
    return fused.why_not() is None and all(mixer.backend in ("auto", "fused") and mixer.head_dim in fused.DIMS
                                           for mixer in mixers)


def _measure_in_turn(job, key, layer, until, since):
    inputs = job.inputs
    begun, meter, taught = time.perf_counter(), Meter(inputs.teacher, beside=inputs.beside), inputs.states.computed
    if inputs.alive.get("step", (None,))[0] != key:
        inputs.forget()
        step = Switched(inputs.student, inputs.teacher, inputs.tokens, job.num_tokens, job.settings, inputs.states)
        inputs.alive.update(step=(key, step), held={})
    step, held, path = inputs.alive["step"][1], inputs.alive["held"], job.checkpoint(layer)
    kept, end = _kept(job, inputs, layer), step.steps
    step.take(kept, checkpoint=path if steps_done(path) else None,  # its memory serves what is held next
              held=held.pop((job.direction, layer), None) if since and path is None else None)
    if until < job.num_tokens:
        end = max(1, until // step.step_tokens)
    if step.step > end:
        raise ValueError(f"checkpoint={str(path)!r} is {step.step} steps into the run, beyond until={until}")
    with tqdm(total=(end - step.step) * step.step_tokens, unit="tok", unit_scale=True, desc="match",
              leave=False) as bar:
        step.train(end, bar=bar, checkpoints=None if path is None else {0: path})
    if step.errors:
        raise step.errors[0]
    spent = step.step * step.step_tokens
    kl, error = step.heldout_kl(inputs.tokens, job.heldout_tokens)
    if not math.isfinite(kl):
        raise DistillationDiverged(_not_finite(kl, spent))
    if path is None and until < job.num_tokens:
        held[job.direction, layer] = step.hold()
    meter.stage_2(_parts_of(inputs, kept), inputs.teacher, spent - since,
                  heldout_size(inputs.tokens, job.heldout_tokens), inputs.context, inputs.states.computed - taught)
    return {"kl": kl, "kl_stderr": error, "tokens": spent, "seconds": time.perf_counter() - begun,
            "cost": meter.cost().to_dict(), "device": describe_device(str(step.device))}


def _measure(job, inputs, layer, until, since):
    begun, meter, taught = time.perf_counter(), Meter(inputs.teacher, beside=inputs.beside), inputs.states.computed
    model, spent = restore(inputs.student, inputs.teacher, _kept(job, inputs, layer)), 0
    if until:
        spent = match(model, inputs.teacher, inputs.tokens, job.num_tokens, settings=job.settings, until=until,
                      checkpoint=job.checkpoint(layer), states=inputs.states).tokens[-1]
    kl, error = heldout_kl(model, inputs.teacher, inputs.tokens, heldout_tokens=job.heldout_tokens,
                           states=inputs.states)
    if not math.isfinite(kl):
        raise DistillationDiverged(_not_finite(kl, spent))
    meter.stage_2(model, inputs.teacher, spent - since, heldout_size(inputs.tokens, job.heldout_tokens),
                  inputs.context, inputs.states.computed - taught)
    return {"kl": kl, "kl_stderr": error, "tokens": spent, "seconds": time.perf_counter() - begun,
            "cost": meter.cost().to_dict(), "device": describe_device(str(next(model.parameters()).device))}


def _measure_together(job, inputs, layers, until, since):
    begun, taught = time.perf_counter(), inputs.states.computed
    meters = {layer: Meter(inputs.teacher, beside=inputs.beside) for layer in layers}
    steps = {layer: steps_done(job.checkpoint(layer)) for layer in layers}
    parts = [[l for l in layers if steps[l] == step] for step in dict.fromkeys(steps.values())]
    found: dict[int, dict | str] = {}
    for part in parts:
        cohort = _cohort(job, inputs, tuple(part), steps[part[0]], since)
        end = max(1, until // cohort.step_tokens) if until < job.num_tokens else cohort.steps
        if cohort.step > end:
            raise ValueError(f"checkpoints of layers {part} are {cohort.step} steps into the run, beyond until={until}")
        with tqdm(total=(end - cohort.step) * cohort.step_tokens * len(part), unit="tok", unit_scale=True,
                  desc=f"match {len(part)} layers", leave=False) as bar:
            cohort.train(end, bar=bar, checkpoints=None if job.checkpoints is None else
                         {c: job.checkpoint(layer) for c, layer in enumerate(part)})
        if until == job.num_tokens:
            inputs.forget()
        spent, rows = cohort.step * cohort.step_tokens, heldout_size(inputs.tokens, job.heldout_tokens)
        heldout = Tokens(inputs.tokens.train, inputs.tokens.heldout[:rows // inputs.context])
        for c, (layer, figures) in enumerate(zip(part, cohort.figures(heldout), strict=True)):
            kl, error = figures["kl"], cohort.errors.get(c)
            if error is None and not math.isfinite(kl):
                error = DistillationDiverged(_not_finite(kl, spent))
            found[layer] = reason(error) if error else {"kl": kl, "kl_stderr": figures["kl_stderr"], "tokens": spent}
    seconds, device = (time.perf_counter() - begun) / len(layers), next(inputs.student.parameters()).device
    taught = inputs.states.computed - taught
    for layer, one in found.items():
        if isinstance(one, dict):
            meters[layer].stage_2(_parts_of(inputs, _kept(job, inputs, layer)), inputs.teacher, one["tokens"] - since,
                                  heldout_size(inputs.tokens, job.heldout_tokens), inputs.context,
                                  taught if layer == layers[0] else 0)
            cost = replace(meters[layer].cost(), seconds=seconds)
            one |= {"seconds": seconds, "cost": cost.to_dict(), "device": describe_device(str(device))}
    return found


def _cohort(job, inputs, layers, steps, since):
    """The cohort of `layers` after `steps` steps: the one of the last round, or one made from its checkpoints."""
    key = job.direction, job.num_tokens, job.settings, layers
    known, cohort = inputs.alive.get("cohort", (None, None))
    if known == key and 0 < since == cohort.step * cohort.step_tokens and not cohort.errors:
        return cohort
    inputs.forget()
    cohort = None  # with its memory
    cohort = Cohort(inputs.student, inputs.teacher, inputs.tokens, [_kept(job, inputs, layer) for layer in layers],
                    job.num_tokens, job.settings, inputs.states)
    if steps:
        cohort.resume({c: job.checkpoint(layer) for c, layer in enumerate(layers)})
    inputs.alive["cohort"] = key, cohort
    return cohort


def _kept(job, inputs, layer):
    """The softmax layers of a layer's candidate."""
    layers = range(inputs.student.config.num_hidden_layers)
    return (layer,) if job.direction == "add" else tuple(m for m in layers if m != layer)


def _parts_of(inputs, kept):
    """The modules of a candidate that computes, for a `Meter`."""
    pairs = zip(inputs.student.model.layers, inputs.teacher.model.layers, strict=True)
    layers = [part for l, (own, taught) in enumerate(pairs)
              for part in (own.mlp, (taught if l in kept else own).self_attn)]
    return nn.ModuleList([*layers, inputs.student.lm_head])


def _not_finite(kl, spent):
    return f"its held-out KL after {spent} tokens is {kl}; try a lower learning rate"


def reason(error):
    """One line on what went wrong."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def distilled_kl(student, teacher, tokens, *, num_tokens: int = 500_000, settings: MatchSettings | None = None,
                 heldout_tokens: int | None = None, inputs: ScoringInputs | None = None) -> Measure:
    """A measure: the held-out KL, in nats a token, of the hybrid with these layers after a short stage 2.

    With it, `greedy_forward` is greedy addition that scores the remaining layers anew given the chosen ones, where
    GA-S2 scores each once, alone: its first round measures what `score_layers` measures.

    Parameters
    ----------
    student : aligned and all linear, from `hybrid.linearize` and `distill.align`; it is left as it was.
    num_tokens : tokens of stage 2 for each set; 0 measures it untrained.
    settings : of stage 2. Every set sees the same rows in the same order.
    heldout_tokens : held-out tokens to measure on, None for all.
    inputs : where the workers of an executor find student, teacher and tokens; without them the measure takes both
        models with it at every call.

    Cost of an evaluation: a copy of the student, stage 2 over `num_tokens`, and a pass over the held-out rows. The
    teacher's pass is computed once and shared, see `TeacherStates`.

    Assumes that sets can be told apart after `num_tokens`: a short stage 2 may rank them otherwise than a long one.
    """
    check_int("num_tokens", num_tokens, 0)
    for name, value in (("num_tokens", num_tokens or None), ("heldout_tokens", heldout_tokens)):
        if value is not None:
            check_int(name, value, tokens.context)
    if len(linear_layers(student.config)) != student.config.num_hidden_layers:
        raise ValueError("student has softmax layers; distilled_kl takes the all-linear student that linearize gave")
    inputs = inputs or LoadedInputs(student, teacher, tokens, TeacherStates(teacher))
    return partial(_distilled_kl, inputs, num_tokens, settings, heldout_tokens)


def _distilled_kl(inputs, num_tokens, settings, heldout_tokens, layers):
    given = inputs.load()
    hybrid = restore(given.student, given.teacher, layers)
    if num_tokens:
        match(hybrid, given.teacher, given.tokens, num_tokens, settings=settings, states=given.states)
    return heldout_kl(hybrid, given.teacher, given.tokens, heldout_tokens=heldout_tokens, states=given.states)[0]
