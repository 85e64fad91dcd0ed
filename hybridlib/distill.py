"""Distillation: one training loop, two stages.

`align` (stage 1) trains each mixer to give the teacher's attention output for the teacher's own layer input. `match`
(stage 2) trains all weights on the divergence of next-token distributions. Both stop with a sentence at the first
number that is not finite, and both can be killed and resumed to the same numbers.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .checks import check_choice, check_int, check_number
from .graphs import Graphed, Update
from .hybrid import linear_layers
from .objectives import check_divergence, divergence_from_hidden
from .passes import TeacherStates, attention_io, compiled_if, last_hidden, mixer_loss

__all__ = ["AlignSettings", "DistillationDiverged", "History", "MatchSettings", "align", "match"]

logger = logging.getLogger(__name__)


class DistillationDiverged(RuntimeError):
    """Training met a number that is not finite, or a loss far above its start; says where and what to try."""


@dataclass(frozen=True)
class _Settings:
    """Settings that both stages share; see `AlignSettings` and `MatchSettings` for their defaults.

    Parameters
    ----------
    batch_tokens : tokens a step; rounded down to whole rows, at least one.
    micro_batch_tokens : tokens a forward pass, None for the whole batch; smaller needs less memory, same gradients.
    schedule : ``"cosine"`` (down to a tenth) or ``"constant"``, after a linear warm-up.
    warmup : share of the steps over which the rates rise from 0.
    clip : largest norm of the gradient over all trained weights.
    checkpoint_every : tokens between two checkpoints.
    compile : on a GPU, run the layers through ``torch.compile``, which costs a minute once; elsewhere it changes
        nothing.
    cuda_graph : on a GPU, record a step (its passes, and the optimizer's update) once and replay it, which saves the
        time to launch it. Needs the memory of a step for itself; elsewhere it changes nothing.
    divergence_factor : stop if a step's loss is this many times the mean of the first ten steps (or of
        `loss_floor`, where those are smaller).
    """

    batch_tokens: int = 16_384
    micro_batch_tokens: int | None = None
    schedule: str = "constant"
    warmup: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    checkpoint_every: int = 5_000_000
    compile: bool = False
    cuda_graph: bool = False
    divergence_factor: float = 10.0
    loss_floor: float = 0.1

    def __post_init__(self):
        check_int("batch_tokens", self.batch_tokens, 1)
        if self.micro_batch_tokens is not None:
            check_int("micro_batch_tokens", self.micro_batch_tokens, 1)
        check_choice("schedule", self.schedule, ("cosine", "constant"))
        check_number("warmup", self.warmup, 0, 1)
        check_number("weight_decay", self.weight_decay, 0)
        check_number("clip", self.clip, 0, open_low=True)
        check_int("checkpoint_every", self.checkpoint_every, 1)
        for name in ("compile", "cuda_graph"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is neither True nor False")
        check_number("divergence_factor", self.divergence_factor, 1, open_low=True)

    def step_rows(self, context: int) -> int:
        """Rows of `context` tokens in a step."""
        return max(1, self.batch_tokens // context)

    def numbers(self) -> dict:
        """The settings that a run's figures depend on, as JSON has them: all but `compile` and `cuda_graph`."""
        return json.loads(json.dumps({k: v for k, v in asdict(self).items() if k not in ("compile", "cuda_graph")}))


@dataclass(frozen=True)
class AlignSettings(_Settings):
    """Stage 1 (paper: 100M tokens at context 512, rate 1e-3, cosine). `normalize` as in `objectives.alignment_loss`."""

    learning_rate: float = 1e-3
    schedule: str = "cosine"
    normalize: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_number("learning_rate", self.learning_rate, 0, open_low=True)


@dataclass(frozen=True)
class MatchSettings(_Settings):
    """Stage 2 (paper: 600M tokens at context 4096, constant rates, 7e-6 and 1e-4).

    `mixer_learning_rate` is the rate of the linear mixers, `learning_rate` that of all other weights, the softmax
    layers' attention among them. `divergence` is the kind that `objectives.divergence` speaks of, and `alpha`, `beta`
    and `temperature` are as there.
    """

    learning_rate: float = 7e-6
    mixer_learning_rate: float = 1e-4
    temperature: float = 1.0
    divergence: str = "forward"
    alpha: float | None = None
    beta: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check_number("learning_rate", self.learning_rate, 0)
        check_number("mixer_learning_rate", self.mixer_learning_rate, 0)
        check_number("temperature", self.temperature, 0, open_low=True)
        check_divergence(self.divergence, self.alpha, self.beta, name="divergence")


@dataclass
class History:
    """What a stage did: after `tokens[i]` tokens the step's loss was `losses[i]`.

    `layer_losses` (stage 1) is the last step's loss of each linear layer, by layer index. `elapsed[i]` is the wall time
    in seconds after step i, `seconds` that of all.
    """

    stage: str
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    elapsed: list[float] = field(default_factory=list)
    layer_losses: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def final_loss(self) -> float:
        """Mean loss of the last tenth of the steps."""
        last = self.losses[-max(1, len(self.losses) // 10):]
        return sum(last) / len(last)


def align(student, teacher, tokens, num_tokens: int, *, settings: AlignSettings | None = None,
          checkpoint: str | Path | None = None) -> History:
    """Stage 1: train every linear mixer of `student`, in place, to give the teacher's attention output.

    Parameters
    ----------
    student : from `hybrid.linearize`. Only its mixers are trained.
    teacher : the model it was made from, on the same device.
    tokens : from `corpus.load_tokens`; rows are taken in its order, from the first.
    num_tokens : tokens to train on, at least one row.
    checkpoint : a file to save to along the way and, if it exists, to go on from. Its run must be the same one.

    Raises ValueError for bad settings or a foreign checkpoint, `DistillationDiverged` if the loss does. Source: paper
    section 3, stage 1.
    """
    settings = settings or AlignSettings()
    layers = linear_layers(student.config)
    mixers = {l: student.model.layers[l].self_attn for l in layers}
    named = [(f"model.layers.{l}.self_attn.{n}", p) for l, m in mixers.items() for n, p in m.named_parameters()]

    compiled = settings.compile and next(student.parameters()).is_cuda
    loss_of = compiled_if(compiled, mixer_loss)

    def step_loss(share, rows):
        with torch.no_grad():
            seen = list(attention_io(teacher, rows, compiled=compiled))
        losses = {}
        for l, mixer in mixers.items():  # layers do not depend on one another: one graph at a time
            losses[l] = loss_of(mixer, *seen[l], settings.normalize)
            (losses[l] * (share / len(layers))).backward()
        return {l: loss.detach() for l, loss in losses.items()}

    groups = [(named, settings.learning_rate)]
    return train_steps("align", student, tokens, num_tokens, settings, groups, step_loss, checkpoint)


def match(hybrid, teacher, tokens, num_tokens: int, *, settings: MatchSettings | None = None,
          checkpoint: str | Path | None = None, until: int | None = None,
          states: TeacherStates | None = None) -> History:
    """Stage 2: train all weights of `hybrid`, in place, on the divergence of its next-token distributions.

    Parameters
    ----------
    hybrid, teacher, tokens, num_tokens, settings, checkpoint : as for `align`.
    until : stop after so many tokens of the run, as if it were killed right after a checkpoint; the same call with a
        later `until` goes on from `checkpoint`.
    states : the teacher's hidden states, shared with other runs over the same rows; None computes them here.

    Raises ValueError for bad settings or a foreign checkpoint, `DistillationDiverged` if the loss does. Source: paper
    section 3, stage 2.
    """
    settings = settings or MatchSettings()
    if states is not None and states.teacher is not teacher:
        raise ValueError("states are of another teacher; make them with TeacherStates(teacher)")
    prefixes = tuple(f"model.layers.{l}.self_attn." for l in linear_layers(hybrid.config))
    mixers = [(n, p) for n, p in hybrid.named_parameters() if n.startswith(prefixes)]
    others = [(n, p) for n, p in hybrid.named_parameters() if not n.startswith(prefixes)]
    compiled = settings.compile and next(hybrid.parameters()).is_cuda
    groups = [(mixers, settings.mixer_learning_rate), (others, settings.learning_rate)]
    targets = None if states is None else partial(states, compiled=compiled)
    return train_steps("match", hybrid, tokens, num_tokens, settings, groups,
                       matching_loss(hybrid, teacher, settings, compiled), checkpoint, until, targets)


def matching_loss(model, teacher, settings: MatchSettings, compiled: bool = False) -> Callable:
    """The `step_loss` of stage 2, see `train_steps`; without the teacher's hidden states it computes them."""
    def step_loss(share, rows, target=None):
        if target is None:
            with torch.no_grad():
                target = last_hidden(teacher, rows, compiled=compiled)
        loss = divergence_from_hidden(target, teacher.lm_head.weight, last_hidden(model, rows, compiled=compiled),
                                      model.lm_head.weight, kind=settings.divergence, alpha=settings.alpha,
                                      beta=settings.beta, temperature=settings.temperature)
        (loss * share).backward()
        return {None: loss.detach()}

    return step_loss


def train_steps(stage, model, tokens, num_tokens, settings, groups, step_loss: Callable, checkpoint, until=None,
                targets: Callable | None = None) -> History:
    """The loop. `step_loss` takes a share of the step, its rows and, if there are `targets`, what they make of them."""
    check_int("num_tokens", num_tokens, tokens.context)
    if until is not None:
        check_int("until", until, tokens.context)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens.context > limit:
        raise ValueError(f"context={tokens.context} is beyond the teacher's {limit}; load tokens with a shorter one")
    device = next(model.parameters()).device
    rows = settings.step_rows(tokens.context)
    micro = max(1, (settings.micro_batch_tokens or settings.batch_tokens) // tokens.context)
    steps = max(1, num_tokens // (rows * tokens.context))
    every = max(1, settings.checkpoint_every // (rows * tokens.context))
    end = steps if until is None else min(steps, max(1, until // (rows * tokens.context)))
    named = [pair for params, _ in groups for pair in params]
    if not named:
        raise ValueError(f"the model has no linear layer, so there is nothing to {stage}; restore fewer layers")

    trained = {id(p) for _, p in named}
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in frozen:
        p.requires_grad_(id(p) in trained)
    optimizer = torch.optim.AdamW([{"params": [p for _, p in params], "peak": rate} for params, rate in groups],
                                  lr=0.0, betas=settings.betas, weight_decay=settings.weight_decay,
                                  fused=device.type == "cuda")
    history, begun = History(stage), 0
    run = {"stage": stage, "num_tokens": num_tokens, "settings": settings.numbers(),
           "tokens": tokens.fingerprint, "weights": {n: list(p.shape) for n, p in named}}
    if checkpoint is not None and Path(checkpoint).exists():
        history, begun = load_checkpoint(Path(checkpoint), run, named, optimizer)
        if begun > end:
            raise ValueError(f"checkpoint={str(checkpoint)!r} is {history.tokens[-1]} tokens into the run, beyond "
                             f"until={until}; delete it to start anew")

    def gradients(*batch):
        optimizer.zero_grad(set_to_none=True)
        losses: dict = {}
        for part in zip(*(tensor.split(micro) for tensor in batch), strict=True):
            share = len(part[0]) / rows
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                for key, loss in step_loss(share, *part).items():
                    losses[key] = losses.get(key, 0) + loss * share
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], settings.clip)
        return list(losses), torch.stack([*losses.values(), norm])  # to be read at once: each reading waits

    model.train()
    graphed = Graphed(gradients) if settings.cuda_graph and device.type == "cuda" else None
    gradients, update = graphed or gradients, Update(optimizer, graphed)
    started = time.perf_counter() - history.seconds
    with tqdm(total=steps * rows * tokens.context, initial=begun * rows * tokens.context, unit="tok", unit_scale=True,
              desc=stage, leave=False) as bar:
        for step in range(begun, end):
            ids = tokens.rows(step * rows, rows)
            batch = [ids.to(device, non_blocking=True)]
            if targets is not None:
                batch.append(torch.cat([targets(part) for part in ids.split(micro)]))
            keys, numbers = gradients(*batch)
            *losses, norm = numbers.tolist()
            values, loss = dict(zip(keys, losses, strict=True)), sum(losses) / len(losses)
            check_finite(stage, step, values, norm, named, history, settings)
            update(rate_at(step, steps, settings))
            history.tokens.append((step + 1) * rows * tokens.context)
            history.losses.append(loss)
            history.seconds = time.perf_counter() - started
            history.elapsed.append(history.seconds)
            history.layer_losses = {key: value for key, value in values.items() if key is not None}
            bar.update(rows * tokens.context)
            bar.set_postfix(loss=f"{loss:.4f}")
            if checkpoint is not None and ((step + 1) % every == 0 or step + 1 == end):
                save_checkpoint(Path(checkpoint), run, named, optimizer, history, step + 1)
    optimizer.zero_grad(set_to_none=True)
    update.release()
    if graphed:
        graphed.release()
    for p, flag in frozen:
        p.requires_grad_(flag)
    model.eval()
    return history


def rate_at(step: int, steps: int, settings: _Settings) -> float:
    """The share of its peak that a learning rate has at a step."""
    warmup = math.ceil(settings.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def check_finite(stage, step, values, norm, named, history, settings) -> None:
    """Raise `DistillationDiverged` where the losses (values, by layer) or the gradient's norm are not finite, or grew.

    `named` : (name, weight with its gradient) of all trained weights, to say where; `history` : the steps before.
    """
    advice = "try a lower learning rate, a longer warmup or a smaller clip"
    bad = [key for key, value in values.items() if not math.isfinite(value)]
    if bad or not math.isfinite(norm):
        layer = bad[0] if bad and bad[0] is not None else _first_bad_layer(named)
        where = "no single layer" if layer is None else f"layer {layer}"
        raise DistillationDiverged(f"{stage} met a number that is not finite at step {step} in {where}; {advice}")
    loss, first = sum(values.values()) / len(values), history.losses[:10]
    if len(first) == 10 and loss > settings.divergence_factor * max(sum(first) / 10, settings.loss_floor):
        layer = max(values, key=values.get)
        where = "" if layer is None else f", worst in layer {layer}"
        raise DistillationDiverged(f"{stage} diverged at step {step}: loss {loss:.3g} against {sum(first) / 10:.3g} "
                                   f"over the first ten steps{where}; {advice}")


def _first_bad_layer(named):
    for tensor_of in (lambda p: p, lambda p: p.grad):
        for name, p in named:
            tensor = tensor_of(p)
            if tensor is not None and not bool(tensor.isfinite().all()):
                return int(name.split(".")[2]) if name.startswith("model.layers.") else name
    return None


def save_checkpoint(path, run, named, optimizer, history, step):
    tensors = {f"weight/{n}": p.detach() for n, p in named}
    for n, p in named:
        tensors |= {f"{key}/{n}": value for key, value in optimizer.state.get(p, {}).items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    state = {"run": run, "step": step, "history": {
        "tokens": history.tokens, "losses": history.losses, "elapsed": history.elapsed,
        "layer_losses": list(history.layer_losses.items()), "seconds": history.seconds}}
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, written, metadata={"state": json.dumps(state)})
        os.replace(written, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not save checkpoint {path}: {error}; the one before it, if any, is unchanged") from error
    finally:
        written.unlink(missing_ok=True)


@torch.no_grad()
def load_checkpoint(path, run, named, optimizer):
    try:
        with safe_open(path, "pt") as f:
            state = json.loads(f.metadata()["state"])
            tensors = {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, OSError, TypeError, KeyError, ValueError):
        raise ValueError(f"checkpoint={str(path)!r} is truncated or no checkpoint; delete it to start anew") from None
    for key, mine in run.items():
        if state["run"].get(key) != mine:
            raise ValueError(f"checkpoint={str(path)!r} belongs to another run ({key} differs); "
                             "delete it to start anew or give another file")
    for name, p in named:
        p.copy_(tensors[f"weight/{name}"])
        optimizer.state[p] = {key: tensors[f"{key}/{name}"].to(p.device if key != "step" else "cpu")
                              for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors}
        if next(iter(optimizer.param_groups))["fused"]:
            optimizer.state[p]["step"] = optimizer.state[p]["step"].to(p.device)
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    kept = state["history"]
    history = History(run["stage"], kept["tokens"], kept["losses"], kept["elapsed"],
                      {int(k): v for k, v in kept["layer_losses"]}, kept["seconds"])
    logger.info("resumed %s at step %d from %s", run["stage"], state["step"], path)
    return history, state["step"]
