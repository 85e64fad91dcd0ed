"""How fast a training step is, whole and by phase, against the loop that one writes first; each run a record."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F

from hybridlib.bench.operators import MODEL_BACKENDS
from hybridlib.bench.timing import Bench, peak_memory, time_calls, wait
from hybridlib.checks import check_choice, check_int
from hybridlib.distill.corpus import Tokens
from hybridlib.distill.objectives import divergence_from_hidden, mixer_loss
from hybridlib.distill.settings import AlignSettings, MatchSettings
from hybridlib.distill.stages import align, match
from hybridlib.models.hybrid import linear_layers, linearize, restore
from hybridlib.models.mixers import MIXERS
from hybridlib.models.passes import attention_io, compiled_if, last_hidden
from hybridlib.models.teachers import Teacher
from hybridlib.selection.rules import select

__all__ = ["LOOPS", "PHASES", "STAGES", "StepSettings", "check_align_tokens", "time_step"]

PHASES = ("teacher", "student", "objective", "backward", "optimizer")
STAGES, LOOPS = ("align", "match"), ("hybridlib", "plain")


@dataclass(frozen=True)
class StepSettings:
    """What is timed of a training step.

    Parameters
    ----------
    mixer : of the student. budget : softmax layers of the hybrid in ``"match"``, evenly spaced.
    batch_tokens : tokens a step. steps : to run; on a GPU at least 6, of which the first four, where a step is
        recorded, are not timed.
    plain_backend : of the mixers in the plain loop.
    align_tokens : of stage 1, by `align` in steps of `batch_tokens`, for the student that both loops of ``"match"``
        begin with; 0 leaves it as `linearize` makes it. Neither timed nor counted as memory.

    `check` raises ValueError for a value out of range.
    """

    mixer: str = "gdn"
    budget: float | int = 0.25
    batch_tokens: int = 16_384
    steps: int = 20
    plain_backend: str = "chunked"
    align_tokens: int = 1_048_576

    def check(self, context: int, untimed: int) -> None:
        check_choice("mixer", self.mixer, tuple(MIXERS))
        check_choice("plain_backend", self.plain_backend, MODEL_BACKENDS)
        check_int("batch_tokens", self.batch_tokens, context)
        check_int("steps", self.steps, untimed + 2 if untimed else 1)
        check_align_tokens("align_tokens", self.align_tokens, context)


def time_step(bench: Bench, teacher: Teacher, tokens: Tokens, stage: str, loop: str,
              how: StepSettings = StepSettings(), aligned: MutableMapping | None = None) -> dict:
    """Time the training step of one stage, whole and by phase. Record kind ``"step_speed"``.

    Parameters
    ----------
    teacher, tokens : from `load_teacher` and `load_tokens`; the device is the teacher's, the context that of `tokens`.
    stage : ``"align"`` (all layers linear) or ``"match"`` (a hybrid).
    loop : ``"hybridlib"`` is `align` or `match` itself, compiled and recorded on a GPU as a `Study` runs it.
        ``"plain"`` is the loop that one writes first, nothing compiled or recorded: KL from all logits of both models,
        one backward pass for all layers, torch's default AdamW. Both loops see the same rows and rates.
    aligned : a dict of the mixers that `align` trained, which the next loop can share.

    Metrics: ``tokens_per_second`` and ``step_seconds``, a median over whole steps; for each of `PHASES` its seconds,
    e.g. ``teacher_seconds``; ``peak_bytes``, ``loss`` and ``loss_tokens``. Of the plain loop also ``noise_loss``, the
    losses of another run in the other precision (``noise_dtype``: float32 on a GPU, bfloat16 on a CPU), which shows
    the effect of rounding; None if memory is short for it. Phases of the plain loop, and of both on a CPU, are medians
    over a few more steps in which a phase ends with a wait for the device, so that their sum may exceed a step. Phases
    of a recorded step are of CUDA graphs of its parts: ``backward`` is the time of all passes beyond that of the
    forward ones, ``optimizer`` that of a step beyond all passes. Stage 1's ``objective`` is in its ``student``.

    Raises ValueError for a bad argument.
    """
    check_choice("stage", stage, STAGES)
    check_choice("loop", loop, LOOPS)
    untimed = 4 if teacher.model.device.type == "cuda" else 0
    how.check(tokens.context, untimed)
    mixer, steps, batch_tokens = how.mixer, how.steps, how.batch_tokens
    model, settings_class = teacher.model, AlignSettings if stage == "align" else MatchSettings
    device, rows, num_layers = model.device, batch_tokens // tokens.context, model.config.num_hidden_layers
    layers = select("uniform", how.budget, num_layers=num_layers) if stage == "match" else ()
    settings = settings_class(batch_tokens=batch_tokens, schedule="constant", warmup=0.0, compile=True,
                              cuda_graph=True)
    parameters = {"teacher": teacher.name, "revision": teacher.revision, "stage": stage, "loop": loop, "mixer": mixer,
                  "layers": list(layers), "context": tokens.context, "batch_tokens": batch_tokens, "steps": steps,
                  "data": tokens.fingerprint, "plain_backend": how.plain_backend if loop == "plain" else None,
                  "align_tokens": how.align_tokens if stage == "match" else None}
    plain = loop == "plain"
    aligned = {} if aligned is None else aligned

    def new_student():
        student = linearize(model, mixer, teacher_name=teacher.name, teacher_revision=teacher.revision)
        if stage == "match" and how.align_tokens:
            weights = _aligned_mixers(teacher, tokens, how, aligned)
            student.load_state_dict(student.state_dict() | weights)
        student = restore(student, model, layers) if layers else student
        for l in linear_layers(student.config) if plain else ():
            student.model.layers[l].self_attn.backend = how.plain_backend
        return student.train()

    def run(student, count):
        if plain:
            return _loop(student, model, tokens, count, settings, plain=True)
        history = (align if stage == "align" else match)(student, model, tokens, count * rows * tokens.context,
                                                         settings=settings)
        return history.losses, history.elapsed

    def in_other_precision():
        try:
            losses, _ = _loop(new_student(), model, tokens, steps, settings, plain=True, half=device.type != "cuda")
        except torch.OutOfMemoryError:
            losses = None
        return {"noise_loss": losses, "noise_dtype": "float32" if device.type == "cuda" else "bfloat16"}

    def compute():
        student = new_student()
        run(student, untimed + 2)
        laps = []
        if plain or device.type != "cuda":
            _loop(student, model, tokens, min(steps, 5) + 1, settings, plain=plain, laps=laps)
        (losses, elapsed), peak = peak_memory(lambda: run(new_student(), steps), device)
        whole = float(pd.Series([0.0, *elapsed]).diff()[untimed + 1:].median())
        phases = (dict(pd.DataFrame(laps[1:]).median()) if laps else
                  _recorded_phases(settings, student, model, tokens, whole))
        noise = in_other_precision() if plain else {}
        return {"tokens_per_second": rows * tokens.context / whole, "step_seconds": whole,
                **{f"{name}_seconds": float(phases[name]) for name in PHASES}, "peak_bytes": peak,
                "loss": losses, **noise, "loss_tokens": [(i + 1) * rows * tokens.context for i in range(steps)],
                "num_layers": num_layers, "tokens": steps * rows * tokens.context}

    return bench.record("step_speed", parameters, compute)


def check_align_tokens(name: str, value: int, context: int) -> None:
    """Raise ValueError unless `value` is 0 or a whole number of tokens that fill a row of `context`."""
    if isinstance(value, bool) or not isinstance(value, int) or (value != 0 and value < context):
        raise ValueError(f"{name}={value!r} is neither 0 nor a whole number of at least {context}")


def _aligned_mixers(teacher, tokens, how, cache):
    """The mixers' weights after stage 1, by their names in the student, on the CPU; trained once for each `cache`."""
    device = teacher.model.device
    key = (teacher.name, teacher.revision, str(device), tokens.fingerprint, how.mixer, how.batch_tokens,
           how.align_tokens)
    if key not in cache:
        student = linearize(teacher.model, how.mixer)
        align(student, teacher.model, tokens, how.align_tokens,
              settings=AlignSettings(batch_tokens=how.batch_tokens, compile=True, cuda_graph=True))
        cache[key] = {name: x.to("cpu", copy=True) for name, x in student.state_dict().items() if ".self_attn." in name}
    return cache[key]


def _loop(student, teacher, tokens, steps, settings, *, plain, laps=None, half=None):
    """A training loop without comforts: (losses, seconds after each step). `laps` takes each step's seconds by phase.

    `plain` : whether the passes are those of the plain loop. `half` : whether products are in bfloat16; None, on a GPU
    only.
    """
    device, rows = teacher.device, settings.batch_tokens // tokens.context
    half = device.type == "cuda" if half is None else half
    mixers = {id(p) for l in linear_layers(student.config) for p in student.model.layers[l].self_attn.parameters()}
    groups = [{"params": [p for p in student.parameters() if id(p) in mixers],
               "lr": getattr(settings, "mixer_learning_rate", settings.learning_rate)}]
    if isinstance(settings, MatchSettings):
        groups += [{"params": [p for p in student.parameters() if id(p) not in mixers], "lr": settings.learning_rate}]
    trained = _train_only(student, [p for group in groups for p in group["params"]])
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, weight_decay=settings.weight_decay,
                                  fused=True if not plain and device.type == "cuda" else None)
    passes, losses, elapsed, begun = _passes(settings, student, teacher, plain), [], [], time.perf_counter()
    for i in range(steps):
        ids, seconds = tokens.rows(i * rows, rows).to(device), {}
        lap = (lambda name: None) if laps is None else _stopwatch(device, seconds)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            with torch.no_grad():
                target = passes.teacher(ids)
            lap("teacher")
            output = passes.student(ids, target)
            lap("student")
            loss = passes.objective(target, output)
            lap("objective")
            loss.backward()
            del target, output
            lap("backward")
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        lap("optimizer")
        elapsed.append(time.perf_counter() - begun)
        laps is None or laps.append(seconds)
    return losses, elapsed


class _Passes(NamedTuple):
    """The forward passes of a step; the objective is a scalar that `backward` starts from."""

    teacher: Callable  # token ids (rows, context) -> target
    student: Callable  # token ids, target -> output
    objective: Callable  # target, output -> loss


def _passes(settings, student, teacher, plain, compiled=False):
    layers = linear_layers(student.config)
    mixers = [student.model.layers[l].self_attn for l in layers]
    if isinstance(settings, AlignSettings):
        def taught(ids):
            inputs_outputs = list(attention_io(teacher, ids, compiled=compiled))
            return [inputs_outputs[l] for l in layers]

        if plain:
            return _Passes(taught, lambda ids, target: [mixer(x)[0].float() for mixer, (x, _) in zip(mixers, target)],
                           lambda target, outputs: sum(F.mse_loss(o, y.float()) / y.float().square().mean()
                                                       for o, (_, y) in zip(outputs, target)) / len(layers))
        loss_of = compiled_if(compiled, mixer_loss)
        return _Passes(taught, lambda ids, target: [loss_of(mixer, *pair, True) for mixer, pair in zip(mixers, target)],
                       lambda target, losses: sum(losses) / len(layers))
    if plain:
        def divergence(target, logits):
            p, q = (x.float().log_softmax(-1).flatten(0, 1) for x in (target, logits))
            return F.kl_div(q, p, log_target=True, reduction="batchmean")

        return _Passes(lambda ids: teacher(input_ids=ids, use_cache=False).logits,
                       lambda ids, target: student(input_ids=ids, use_cache=False).logits, divergence)
    return _Passes(lambda ids: last_hidden(teacher, ids, compiled=compiled),
                   lambda ids, target: last_hidden(student, ids, compiled=compiled),
                   lambda target, hidden: divergence_from_hidden(target, teacher.lm_head.weight, hidden,
                                                                 student.lm_head.weight))


def _recorded_phases(settings, student, teacher, tokens, whole):
    """Seconds of each phase of a compiled step, from CUDA graphs of its parts; `whole` is those of a step."""
    ids = tokens.rows(0, settings.batch_tokens // tokens.context).to(teacher.device)
    matching = isinstance(settings, MatchSettings)
    trained = _train_only(student.train(), [p for name, p in student.named_parameters()
                                            if matching or ".self_attn." in name])
    passes = _passes(settings, student, teacher, plain=False, compiled=True)

    def gpu_seconds(call):
        timing = time_calls([torch.autocast("cuda", torch.bfloat16)(call)], teacher.device, repeats=5, launched=False)
        if timing["gpu_seconds"] is None:
            raise RuntimeError(timing["graph_reason"])
        return timing["gpu_seconds"]

    def all_passes():
        for p in trained:
            p.grad = None
        target = torch.no_grad()(passes.teacher)(ids)
        passes.objective(target, passes.student(ids, target)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)

    with torch.autocast("cuda", torch.bfloat16):
        target = torch.no_grad()(passes.teacher)(ids)
        hidden = passes.student(ids, target).detach().requires_grad_() if matching else None
    phases = {"teacher": gpu_seconds(lambda: torch.no_grad()(passes.teacher)(ids)),
              "student": gpu_seconds(lambda: passes.student(ids, target)),
              "objective": gpu_seconds(lambda: passes.objective(target, hidden)) if matching else 0.0}
    total = gpu_seconds(all_passes)
    phases |= {"backward": total - sum(phases.values()), "optimizer": whole - total}
    for p in trained:
        p.grad = None
    return phases


def _train_only(student, parameters):
    student.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    return parameters


def _stopwatch(device, seconds):
    """A function that adds the time since its last call to one phase of `seconds`, the device's work included."""
    wait(device)
    last = time.perf_counter()

    def lap(name):
        nonlocal last
        wait(device)
        now = time.perf_counter()
        seconds[name], last = seconds.get(name, 0.0) + now - last, now

    return lap
