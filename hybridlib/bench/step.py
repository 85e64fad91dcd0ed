"""How fast a training step is, whole and by phase, against the loop that one writes first; each run a record."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from hybridlib.bench.timing import Bench, peak_memory, time_graph, wait
from hybridlib.checks import check_choice, check_int
from hybridlib.distill.corpus import Tokens
from hybridlib.distill.objectives import divergence_from_hidden, mixer_loss
from hybridlib.distill.settings import AlignSettings, MatchSettings
from hybridlib.distill.stages import align, match, weight_groups
from hybridlib.models.hybrid import linear_layers, linearize, restore
from hybridlib.models.passes import attention_io, compiled_if, last_hidden
from hybridlib.models.teachers import Teacher
from hybridlib.selection.rules import select
from hybridlib.study.settings import NotebookSettings

__all__ = ["LOOPS", "PHASES", "STAGES", "StepSettings", "time_step"]

PHASES = ("teacher", "student", "objective", "backward", "optimizer")
STAGES, LOOPS = ("align", "match"), ("hybridlib", "plain")


@dataclass(frozen=True)
class StepSettings(NotebookSettings):
    """What is timed of a training step, beside `NotebookSettings`.

    `stages` are of `STAGES`, and `steps` how many to run of each; a GPU's first four, where a step is recorded, are not
    timed. `step_align_tokens` are of stage 1 for the student that ``"match"`` begins with, 0 for none; `plain_backend`
    is of the mixers in the plain loop.
    """

    stages: list[str] = STAGES
    steps: int = 4
    step_align_tokens: int = 16_384
    plain_backend: str = "chunked"


def time_step(bench: Bench, teacher: Teacher, tokens: Tokens, stage: str, loop: str, how: StepSettings,
              aligned: MutableMapping | None = None) -> dict:
    """Time the training step of one stage, whole and by phase. Record kind ``"step_speed"``.

    `stage` is ``"align"`` (all layers linear) or ``"match"`` (a hybrid). `loop` is ``"hybridlib"``, compiled and
    recorded on a GPU, or ``"plain"``, never compiled, which takes the KL from all logits of both models and steps by
    torch's default AdamW. `aligned` is a dict of trained mixers that the next loop of one teacher and text can share.

    Metrics: ``tokens_per_second`` and ``step_seconds``, a median over whole steps; for each of `PHASES` its seconds,
    e.g. ``teacher_seconds``; ``peak_bytes``, ``loss`` and ``loss_tokens``. Of the plain loop also ``noise_loss``, the
    losses in the other precision (``noise_dtype``), None if memory is short for it. Phases are medians over a few more
    steps in which a phase ends with a wait for the device; those of a recorded step are of CUDA graphs of its parts.
    Raises ValueError for a bad stage or loop, a budget beyond the teacher's layers, or too few steps to time.
    """
    check_choice("stage", stage, STAGES)
    check_choice("loop", loop, LOOPS)
    untimed = 4 if teacher.model.device.type == "cuda" else 0
    check_int("steps", how.steps, untimed + 2 if untimed else 1)
    mixer, steps, batch_tokens = how.mixer, how.steps, how.batch_tokens
    model, settings_class = teacher.model, AlignSettings if stage == "align" else MatchSettings
    device, rows, num_layers = model.device, batch_tokens // tokens.context, model.config.num_hidden_layers
    layers = select("uniform", how.budget, num_layers=num_layers) if stage == "match" else ()
    settings = settings_class(batch_tokens=batch_tokens, schedule="constant", warmup=0.0, compile=True,
                              cuda_graph=True)
    parameters = {"teacher": teacher.name, "revision": teacher.revision, "stage": stage, "loop": loop, "mixer": mixer,
                  "layers": list(layers), "context": tokens.context, "batch_tokens": batch_tokens, "steps": steps,
                  "data": tokens.fingerprint, "plain_backend": how.plain_backend if loop == "plain" else None,
                  "align_tokens": how.step_align_tokens if stage == "match" else None}
    plain = loop == "plain"
    aligned = {} if aligned is None else aligned

    def new_student():
        student = linearize(model, mixer, teacher_name=teacher.name, teacher_revision=teacher.revision)
        if stage == "match" and how.step_align_tokens:
            student.load_state_dict(student.state_dict() | _aligned_mixers(model, tokens, how, aligned))
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
        half = device.type != "cuda"
        try:
            losses, _ = _loop(new_student(), model, tokens, steps, settings, plain=True, half=half)
        except torch.OutOfMemoryError:
            losses = None
        return {"noise_loss": losses, "noise_dtype": "bfloat16" if half else "float32"}

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


def _aligned_mixers(teacher, tokens, how, cache):
    key = how.mixer, how.batch_tokens, how.step_align_tokens
    if key not in cache:
        student = linearize(teacher, how.mixer)
        align(student, teacher, tokens, how.step_align_tokens,
              settings=AlignSettings(batch_tokens=how.batch_tokens, compile=True, cuda_graph=True))
        cache[key] = {name: x.to("cpu", copy=True) for name, x in student.state_dict().items() if ".self_attn." in name}
    return cache[key]


def _weight_groups(student, settings):
    """Group the weights that a stage trains, for an optimizer, and freeze all others."""
    mixers, named = tuple(f"model.layers.{l}.self_attn." for l in linear_layers(student.config)), []
    for name, p in student.named_parameters():
        p.requires_grad_(isinstance(settings, MatchSettings) or name.startswith(mixers))
        named += [(name, p)] if p.requires_grad else []
    groups = (weight_groups(named, lambda name: name.startswith(mixers), settings)
              if isinstance(settings, MatchSettings) else [(named, settings.learning_rate)])
    return [{"params": [p for _, p in group], "lr": rate} for group, rate in groups]


def _loop(student, teacher, tokens, steps, settings, *, plain, laps=None, half=None):
    """Train without comforts: (losses, seconds after each step). `laps` takes each step's seconds by phase, `plain`
    chooses the plain passes, and `half` puts products in bfloat16 (None: on a GPU only)."""
    device, rows = teacher.device, settings.batch_tokens // tokens.context
    half = device.type == "cuda" if half is None else half
    groups = _weight_groups(student, settings)
    trained = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, weight_decay=settings.weight_decay)
    passes, losses, elapsed, begun = _passes(settings, student, teacher, plain), [], [], time.perf_counter()

    def lap():
        if laps is not None:
            wait(device)
            marks.append(time.perf_counter())

    for i in range(steps):
        ids, marks = tokens.rows(i * rows, rows).to(device), []
        lap()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            with torch.no_grad():
                target = passes.teacher(ids)
            lap()
            output = passes.student(ids, target)
            lap()
            loss = passes.objective(target, output)
            lap()
            loss.backward()
            del target, output
            lap()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        lap()
        elapsed.append(time.perf_counter() - begun)
        if laps is not None:
            laps.append(dict(zip(PHASES, np.diff(marks), strict=True)))
    return losses, elapsed


class _Passes(NamedTuple):
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
    """Find the seconds of a compiled step's phases from CUDA graphs of its parts; `whole` is a step's."""
    ids = tokens.rows(0, settings.batch_tokens // tokens.context).to(teacher.device)
    trained = [p for group in _weight_groups(student.train(), settings) for p in group["params"]]
    passes = _passes(settings, student, teacher, plain=False, compiled=True)
    matching = isinstance(settings, MatchSettings)

    def gpu_seconds(call):
        timing = time_graph([torch.autocast("cuda", torch.bfloat16)(call)], teacher.device, repeats=5)
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
    return phases | {"backward": total - sum(phases.values()), "optimizer": whole - total}
