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
from functools import lru_cache
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm

from .cohort import Cohort, steps_done
from .corpus import Tokens, load_tokens
from .cost import Meter, held_beside, heldout_size
from .distill import DistillationDiverged, MatchSettings, match
from .evaluate import heldout_kl
from .hybrid import linear_layers, load_hybrid, restore
from .kernels import fused
from .ledger import describe_device
from .passes import TeacherStates, repeatable
from .switched import Switched
from .teachers import load_teacher, sha256_of

__all__ = ["LoadedInputs", "ScoringInputs", "ScoringJob", "measure_candidates", "reason", "shares_step",
           "weights_sha256"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedInputs:
    """A scoring's inputs as they lie in this process; `states`, of this teacher, are shared by its candidates.

    `alive` has what the next task may go on with: the cohort that trained last, the step that candidates share, and
    their states between rounds. It does not travel. `beside` is what lay on the GPU before, for a `Meter`.
    """

    student: object
    teacher: object
    tokens: Tokens
    states: TeacherStates
    alive: dict = field(default_factory=dict, compare=False, repr=False)
    beside: int = field(init=False, compare=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "beside", held_beside(self.teacher, self.student))

    def __reduce__(self):
        return LoadedInputs, (self.student, self.teacher, self.tokens, self.states)

    @property
    def context(self) -> int:
        return self.tokens.context

    def load(self) -> LoadedInputs:
        return self

    def forget(self) -> None:
        """Give back what `alive` holds."""
        for name in {"cohort", "step"} & set(self.alive):
            self.alive[name][1].release()
        self.alive.clear()


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
