"""How fast a training step is, whole and by phase, against the loop that one writes first; each run a record."""

from __future__ import annotations

import time
from collections.abc import MutableMapping

import pandas as pd
import torch
import torch.nn.functional as F

from hybridlib.bench.operators import BACKENDS
from hybridlib.bench.timing import measured, peak_memory, time_graph, wait
from hybridlib.checks import check_choice, check_int
from hybridlib.distill.corpus import Tokens
from hybridlib.distill.objectives import divergence_from_hidden, mixer_loss
from hybridlib.distill.settings import AlignSettings, MatchSettings
from hybridlib.distill.stages import align, match
from hybridlib.models.hybrid import linear_layers, linearize, restore
from hybridlib.models.mixers import MIXERS
from hybridlib.models.passes import attention_io, compiled_if, last_hidden
from hybridlib.models.teachers import Teacher
from hybridlib.records.ledger import Ledger
from hybridlib.selection.rules import select

__all__ = ["LOOPS", "PHASES", "STAGES", "check_align_tokens", "time_step"]

PHASES = ("teacher", "student", "objective", "backward", "optimizer")
STAGES, LOOPS = ("align", "match"), ("hybridlib", "plain")
def time_step(ledger: Ledger, teacher: Teacher, tokens: Tokens, *, stage: str = "match", loop: str = "hybridlib",
              mixer: str = "gdn", budget: float | int = 0.25, batch_tokens: int = 16_384, steps: int = 20,
              plain_backend: str = "chunked", align_tokens: int = 1_048_576, recompute: bool = False,
              aligned: MutableMapping | None = None) -> dict:
    """Time the training step of one stage, whole and by phase. Record kind ``"step_speed"``.

    Parameters
    ----------
    teacher, tokens : from `load_teacher` and `load_tokens`; the device is the teacher's, the context that of `tokens`.
    stage : ``"align"`` (all layers linear) or ``"match"`` (a hybrid with `budget` softmax layers, evenly spaced).
    loop : ``"hybridlib"`` is `align` or `match` itself, compiled and recorded on a GPU as a `Study` runs it.
        ``"plain"`` is the loop that one writes first, nothing compiled or recorded: KL from all logits of both models,
        mixers by `plain_backend`, one backward pass for all layers, torch's default AdamW.
    batch_tokens : tokens a step. steps : to run; on a GPU at least 6, of which the first four, where a step is
        recorded, are not timed. Both loops see the same rows and rates.
    align_tokens : of stage 1, by `align` in steps of `batch_tokens`, before the student of ``"match"`` is made, which
        is the same for both loops; 0 leaves it as `linearize` makes it. Neither timed nor counted as memory.
    aligned : where the mixers that `align` trained are kept for the next loop, if given; else it trains them anew.

    Metrics: ``tokens_per_second`` and ``step_seconds``, a median over whole steps; for each of `PHASES` its seconds,
    e.g. ``teacher_seconds``; ``peak_bytes``, ``loss`` and ``loss_tokens``. Of the plain loop also ``noise_loss``, what
    rounding to bfloat16 does to its losses: those of another run, without autocast on a GPU and with it on a CPU, as
    ``noise_dtype`` says; None if memory is short for it. Phases of the plain loop, and of both on a CPU, are medians
    over a few more steps in which a phase ends with a wait for the device, so that their sum may exceed a step. Phases
    of a recorded step are of CUDA graphs of its parts: ``backward`` is what the whole takes beyond the passes before
    it, ``optimizer`` what a step takes beyond that. Stage 1's ``objective`` is in its ``student``.

    Raises ValueError for a bad argument.
    """
    check_choice("stage", stage, STAGES)
    check_choice("loop", loop, LOOPS)
    check_choice("mixer", mixer, tuple(MIXERS))
    check_choice("plain_backend", plain_backend, BACKENDS[:4])
    check_int("batch_tokens", batch_tokens, tokens.context)
    untimed = 4 if teacher.model.device.type == "cuda" else 0
    check_int("steps", steps, untimed + 2 if untimed else 1)
    check_align_tokens("align_tokens", align_tokens, tokens.context)
    model, settings_class = teacher.model, AlignSettings if stage == "align" else MatchSettings
    device, rows, num_layers = model.device, batch_tokens // tokens.context, model.config.num_hidden_layers
    layers = select("uniform", budget, num_layers=num_layers) if stage == "match" else ()
    settings = settings_class(batch_tokens=batch_tokens, schedule="constant", warmup=0.0, compile=True,
                              cuda_graph=True)
    parameters = {"teacher": teacher.name, "revision": teacher.revision, "stage": stage, "loop": loop, "mixer": mixer,
                  "layers": list(layers), "context": tokens.context, "batch_tokens": batch_tokens, "steps": steps,
                  "data": tokens.fingerprint, "plain_backend": plain_backend if loop == "plain" else None,
                  "align_tokens": align_tokens if stage == "match" else None}
    plain, step = loop == "plain", _STEPS[stage, loop]
    aligned = {} if aligned is None else aligned

    def student():
        made = linearize(model, mixer, teacher_name=teacher.name, teacher_revision=teacher.revision)
        if stage == "match" and align_tokens:
            weights = _aligned(teacher, tokens, mixer, batch_tokens, align_tokens, aligned)
            made.load_state_dict(made.state_dict() | weights)
        made = restore(made, model, layers) if layers else made
        for l in linear_layers(made.config) if plain else ():
            made.model.layers[l].self_attn.backend = plain_backend
        return made.train()

    def run(made, count):
        if plain:
            return _loop(made, model, tokens, rows, count, settings, step, fused=False)
        history = (align if stage == "align" else match)(made, model, tokens, count * rows * tokens.context,
                                                         settings=settings)
        return history.losses, history.elapsed

    def in_other_precision():
        try:
            losses, _ = _loop(student(), model, tokens, rows, steps, settings, step, fused=False,
                              half=device.type != "cuda")
        except torch.OutOfMemoryError:
            losses = None
        return {"noise_loss": losses, "noise_dtype": "float32" if device.type == "cuda" else "bfloat16"}

    def compute():
        made = student()
        run(made, untimed + 2)
        phases = []
        if plain or device.type != "cuda":
            _loop(made, model, tokens, rows, min(steps, 5) + 1, settings, step, fused=not plain, phases=phases)
        (losses, elapsed), peak = peak_memory(lambda: run(student(), steps), device)
        whole = float(pd.Series([0.0, *elapsed]).diff()[untimed + 1:].median())
        spent = (dict(pd.DataFrame(phases[1:]).median()) if phases else
                 _recorded(stage, made, model, tokens, rows, whole))
        noise = in_other_precision() if plain else {}
        return {"tokens_per_second": rows * tokens.context / whole, "step_seconds": whole,
                **{f"{name}_seconds": float(spent[name]) for name in PHASES}, "peak_bytes": peak,
                "loss": losses, **noise, "loss_tokens": [(i + 1) * rows * tokens.context for i in range(steps)],
                "num_layers": num_layers, "tokens": steps * rows * tokens.context}

    return measured(ledger, "step_speed", parameters, device, compute, recompute)


def check_align_tokens(name: str, value: int, context: int) -> None:
    """Raise ValueError unless `value` is 0 or a whole number of tokens that fill a row of `context`."""
    if isinstance(value, bool) or not isinstance(value, int) or (value != 0 and value < context):
        raise ValueError(f"{name}={value!r} is neither 0 nor a whole number of at least {context}")


def _aligned(teacher, tokens, mixer, batch_tokens, num_tokens, kept):
    """The mixers' weights, by their names in the student and on the CPU, after stage 1; once for each question."""
    device = teacher.model.device
    key = teacher.name, teacher.revision, str(device), tokens.fingerprint, mixer, batch_tokens, num_tokens
    if key not in kept:
        student = linearize(teacher.model, mixer)
        align(student, teacher.model, tokens, num_tokens,
              settings=AlignSettings(batch_tokens=batch_tokens, compile=True, cuda_graph=True))
        kept[key] = {name: x.to("cpu", copy=True) for name, x in student.state_dict().items() if ".self_attn." in name}
    return kept[key]


def _loop(student, teacher, tokens, rows, steps, settings, step, *, fused, phases=None, half=None):
    """A training loop without comforts: (losses, seconds after each step). `phases` takes a dict of seconds a step.

    `half` : whether products are in bfloat16; None, on a GPU only.
    """
    device = teacher.device
    half = device.type == "cuda" if half is None else half
    mixers = {id(p) for l in linear_layers(student.config) for p in student.model.layers[l].self_attn.parameters()}
    groups = [{"params": [p for p in student.parameters() if id(p) in mixers],
               "lr": getattr(settings, "mixer_learning_rate", settings.learning_rate)}]
    if isinstance(settings, MatchSettings):
        groups += [{"params": [p for p in student.parameters() if id(p) not in mixers], "lr": settings.learning_rate}]
    trained = [p for group in groups for p in group["params"]]
    student.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, weight_decay=settings.weight_decay,
                                  fused=True if fused and device.type == "cuda" else None)
    losses, elapsed, begun = [], [], time.perf_counter()
    for i in range(steps):
        batch, spent = tokens.rows(i * rows, rows).to(device), {}
        lap = (lambda name: None) if phases is None else _stopwatch(device, spent)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = step(student, teacher, batch, lap)
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        lap("optimizer")
        elapsed.append(time.perf_counter() - begun)
        phases is None or phases.append(spent)
    return losses, elapsed


def _recorded(stage, student, teacher, tokens, rows, whole):
    """Seconds of each phase of a compiled step, from CUDA graphs of its parts; `whole` is those of a step."""
    ids, layers = tokens.rows(0, rows).to(teacher.device), linear_layers(student.config)
    trained = [p for n, p in student.named_parameters() if stage == "match" or ".self_attn." in n]
    student.train().requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    loss_of = compiled_if(True, mixer_loss)

    def on_gpu(call):
        def cast():
            with torch.autocast("cuda", torch.bfloat16):
                return call()
        return time_graph([cast], repeats=5)["seconds"]

    @torch.no_grad()
    def taught():
        return (list(attention_io(teacher, ids, compiled=True)) if stage == "align" else
                last_hidden(teacher, ids, compiled=True))

    def learnt(target):
        if stage == "match":
            return last_hidden(student, ids, compiled=True)
        return [loss_of(student.model.layers[l].self_attn, *target[l], True) for l in layers]

    def compared(target, hidden):
        return divergence_from_hidden(target, teacher.lm_head.weight, hidden, student.lm_head.weight)

    def stepped():
        for p in trained:
            p.grad = None
        target = taught()
        losses = learnt(target) if stage == "align" else [compared(target, learnt(target))]
        for loss in losses:
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)

    with torch.autocast("cuda", torch.bfloat16):
        target = taught()
        hidden = learnt(target).detach().requires_grad_() if stage == "match" else None
    spent = {"teacher": on_gpu(taught), "student": on_gpu(lambda: learnt(target)),
             "objective": on_gpu(lambda: compared(target, hidden)) if stage == "match" else 0.0}
    passes = on_gpu(stepped)
    spent |= {"backward": passes - sum(spent.values()), "optimizer": whole - passes}
    for p in trained:
        p.grad = None
    return spent


def _stopwatch(device, spent):
    wait(device)
    last = time.perf_counter()

    def lap(name):
        nonlocal last
        wait(device)
        now = time.perf_counter()
        spent[name], last = spent.get(name, 0.0) + now - last, now

    return lap


def _align_step(student, teacher, rows, lap):
    layers = linear_layers(student.config)
    with torch.no_grad():
        seen = list(attention_io(teacher, rows))
    lap("teacher")
    total = 0.0
    for l in layers:
        loss = mixer_loss(student.model.layers[l].self_attn, *seen[l], True) / len(layers)
        lap("student")
        loss.backward()
        lap("backward")
        total = total + loss.detach()
    lap("objective")
    return total


def _plain_align_step(student, teacher, rows, lap):
    layers = linear_layers(student.config)
    with torch.no_grad():
        seen = list(attention_io(teacher, rows))
    lap("teacher")
    outputs = [student.model.layers[l].self_attn(seen[l][0])[0].float() for l in layers]
    lap("student")
    targets = [seen[l][1].float() for l in layers]
    loss = sum(F.mse_loss(x, y) / y.square().mean() for x, y in zip(outputs, targets)) / len(layers)
    lap("objective")
    loss.backward()
    lap("backward")
    return loss.detach()


def _match_step(hybrid, teacher, rows, lap):
    with torch.no_grad():
        target = last_hidden(teacher, rows)
    lap("teacher")
    hidden = last_hidden(hybrid, rows)
    lap("student")
    loss = divergence_from_hidden(target, teacher.lm_head.weight, hidden, hybrid.lm_head.weight)
    lap("objective")
    loss.backward()
    lap("backward")
    return loss.detach()


def _plain_match_step(hybrid, teacher, rows, lap):
    with torch.no_grad():
        target = teacher(input_ids=rows, use_cache=False).logits
    lap("teacher")
    logits = hybrid(input_ids=rows, use_cache=False).logits
    lap("student")
    p, q = (x.float().log_softmax(-1).flatten(0, 1) for x in (target, logits))
    loss = F.kl_div(q, p, log_target=True, reduction="batchmean")
    lap("objective")
    loss.backward()
    lap("backward")
    return loss.detach()


_STEPS = {("align", "hybridlib"): _align_step, ("align", "plain"): _plain_align_step,
          ("match", "hybridlib"): _match_step, ("match", "plain"): _plain_match_step}
