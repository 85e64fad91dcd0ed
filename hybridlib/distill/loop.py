"""The training loop of both stages and of all that trains as they do: steps, rates, finite checks, checkpoints."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from hybridlib.checks import check_int
from hybridlib.distill.graphs import Graphed, Update
from hybridlib.distill.settings import DistillationDiverged, History, _Settings
from hybridlib.models.passes import half_on_gpu
from hybridlib.records.folders import follow_umask

__all__ = ["Run", "load_checkpoint", "save_checkpoint", "steps_done", "train_steps"]

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam keeps of a weight
ADVICE = "try a lower learning rate, a longer warmup or a smaller clip"


class Run:
    """Training over the rows of `tokens`: its steps, its optimizer, and how far each of its members has come.

    A run has one member, a model, unless a subclass trains several in one step. Each member has its own loss, gradient
    norm to clip, history and, where it diverged, error.

    Parameters
    ----------
    num_tokens : tokens of the whole run; `steps` of `step_tokens` each, at least one.
    groups : pairs of a list of (name, weight) to train and the peak of their learning rate.
    step_loss : takes the share of a step that some of its rows are, these rows (rows, context), and what `targets` gave
        for them. It sends the gradients of that share back and returns {layer or None: loss, () or (members,)}.
    targets : takes rows, on the CPU, and gives what a step reads beside them; None for nothing.
    """

    def __init__(self, stage: str, tokens, num_tokens: int, settings: _Settings, groups, step_loss: Callable, *,
                 targets: Callable | None = None, members: int = 1):
        self.stage, self.tokens, self.num_tokens, self.settings = stage, tokens, num_tokens, settings
        self.step_loss, self.targets = step_loss, targets
        self.named = [pair for pairs, _ in groups for pair in pairs]
        self.device = self.named[0][1].device
        self.rows = settings.step_rows(tokens.context)
        self.micro = max(1, (settings.micro_batch_tokens or settings.batch_tokens) // tokens.context)
        self.step_tokens = self.rows * tokens.context
        self.step, self.steps = 0, max(1, num_tokens // self.step_tokens)
        self.histories: list[History] = [History(stage) for _ in range(members)]
        self.errors: dict[int, DistillationDiverged] = {}
        self.optimizer = torch.optim.AdamW([{"params": [p for _, p in pairs], "peak": rate}
                                            for pairs, rate in groups if pairs],
                                           lr=0.0, betas=settings.betas, weight_decay=settings.weight_decay,
                                           fused=self.device.type == "cuda")
        self._graphed = Graphed(self._gradients) if settings.cuda_graph and self.device.type == "cuda" else None
        self._update = Update(self.optimizer, self._graphed)

    def steps_until(self, tokens: int) -> int:
        """The whole steps in `tokens` of the run: at least one, none for 0."""
        if tokens >= self.num_tokens or tokens == 0:
            return self.steps if tokens else 0
        return min(self.steps, max(1, tokens // self.step_tokens))

    def train(self, end: int, *, checkpoints: Mapping[int, Path] | None = None, bar=None) -> None:
        """Go on to step `end`, or until no member is left; `checkpoints` are the members' files."""
        count, every = len(self.histories), max(1, self.settings.checkpoint_every // self.step_tokens)
        compute = self._graphed or self._gradients
        for step in range(self.step, end):
            begun, ids = time.perf_counter(), self.tokens.rows(step * self.rows, self.rows)
            batch = [ids.to(self.device, non_blocking=True)]
            if self.targets is not None:
                batch.append(torch.cat([self.targets(part) for part in ids.split(self.micro)]))
            layers, numbers = compute(*batch)
            *losses, norms = numbers.tolist()  # (layers + 1, members), read at once: each reading waits
            values = [dict(zip(layers, loss, strict=True)) for loss in zip(*losses, strict=True)]
            for c in self._alive():
                try:
                    self._check(c, values[c], norms[c])
                except DistillationDiverged as error:
                    self.errors[c] = error
            if len(self.errors) == count:
                break
            self.silence()
            self._update(rate_at(step, self.steps, self.settings))
            self.step = step + 1
            seconds = (time.perf_counter() - begun) / count
            means = [sum(value.values()) / len(value) for value in values]
            for c in self._alive():
                history = self.histories[c]
                history.tokens.append(self.step * self.step_tokens)
                history.losses.append(means[c])
                history.seconds += seconds
                history.elapsed.append(history.seconds)
                history.layer_losses = {layer: value for layer, value in values[c].items() if layer is not None}
            if bar is not None:
                bar.update(self.step_tokens * count)
                bar.set_postfix(loss=f"{means[0]:.4f}" if count == 1 else f"{min(means):.4f} to {max(means):.4f}")
            if checkpoints and (self.step % every == 0 or self.step == end):
                for c in set(checkpoints) & set(self._alive()):
                    named, state = self.member(c)
                    save_checkpoint(checkpoints[c], self._identity(named), named, state, self.histories[c], self.step)

        for c in self._alive() if self.step == self.steps else ():
            if (history := self.histories[c]).rose:
                logger.warning("%s ended with a higher loss than it started with, %.4g after %.4g; %s", self.stage,
                               history.end_loss, history.losses[0], ADVICE)

    def resume(self, checkpoints: Mapping[int, Path]) -> None:
        """Take up all members where their `checkpoints`, of one step, left them; ValueError for a foreign one."""
        self.start_moments()
        for c, path in checkpoints.items():
            named, state = self.member(c)
            self.histories[c], self.step = load_checkpoint(path, self._identity(named), named, state)

    def release(self) -> None:
        """Give back gradients and recorded graphs; what is left can still be measured."""
        self.optimizer.zero_grad(set_to_none=True)
        self._update.release()
        if self._graphed is not None:
            self._graphed.release()

    # What a run of several members does otherwise.

    def clip(self) -> torch.Tensor:
        """Scale each member's gradient to a norm of at most ``settings.clip``; return the norms before, (members,)."""
        return nn.utils.clip_grad_norm_([p for _, p in self.named], self.settings.clip)[None]

    def own_weights(self, c: int) -> Iterable[tuple[str, nn.Parameter, tuple]]:
        """(name, parameter, index): ``parameter[index]`` is a weight of member `c`."""
        return [(name, p, ()) for name, p in self.named]

    def trained(self, c: int) -> list[tuple[str, torch.Tensor]]:
        """(name, weight) of member `c`, each with its gradient."""
        return self.named

    def silence(self) -> None:
        """Set the gradients of members that have stopped to 0."""

    def member(self, c: int) -> tuple[list[tuple[str, torch.Tensor]], dict]:
        """(name in its model, weight) of member `c`, and the optimizer's state of each weight: views of both."""
        named, state = [], {}
        for name, p, index in self.own_weights(c):
            view, moments = p.detach()[index], self.optimizer.state.get(p, {})
            named.append((name, view))
            state[view] = {key: value[index] if key in MOMENTS else value for key, value in moments.items()}
        return named, state

    def start_moments(self) -> None:
        """Set the optimizer's state to that before a first step, in place where a recorded update writes."""
        if self.optimizer.state:
            torch._foreach_zero_([x for moments in self.optimizer.state.values() for x in moments.values()])
            return
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                step = torch.zeros((), device=self.device if group["fused"] else "cpu")
                self.optimizer.state[p] = {"step": step, **{name: torch.zeros_like(p) for name in MOMENTS}}

    def _alive(self):
        return [c for c in range(len(self.histories)) if c not in self.errors]

    def _gradients(self, *batch):
        """Layers, and their losses with the gradient norms below, (layers + 1, members)."""
        self.optimizer.zero_grad(set_to_none=True)
        losses: dict = {}
        for part in zip(*(tensor.split(self.micro) for tensor in batch), strict=True):
            share = len(part[0]) / self.rows
            with half_on_gpu(self.device):
                for layer, loss in self.step_loss(share, *part).items():
                    losses[layer] = losses.get(layer, 0) + loss * share
        return list(losses), torch.stack([x.reshape(len(self.histories)) for x in (*losses.values(), self.clip())])

    def _check(self, c, values, norm):
        """Raise `DistillationDiverged` if member c's losses (by layer) or norm are not finite, or have grown."""
        bad = [layer for layer, value in values.items() if not math.isfinite(value)]
        if bad or not math.isfinite(norm):
            layer = bad[0] if bad and bad[0] is not None else _first_bad_layer(self.trained(c))
            where = "no single layer" if layer is None else layer if isinstance(layer, str) else f"layer {layer}"
            raise DistillationDiverged(f"{self.stage} met a number that is not finite at step {self.step} in {where}; "
                                       f"{ADVICE}")
        loss, first = sum(values.values()) / len(values), self.histories[c].losses[:10]
        start = sum(first) / 10
        if len(first) == 10 and loss > self.settings.divergence_factor * max(start, self.settings.loss_floor):
            layer = max(values, key=values.get)
            where = "" if layer is None else f", worst in layer {layer}"
            raise DistillationDiverged(f"{self.stage} diverged at step {self.step}: loss {loss:.3g} against "
                                       f"{start:.3g} over the first ten steps{where}; {ADVICE}")

    def _identity(self, named):
        return {"stage": self.stage, "num_tokens": self.num_tokens, "settings": self.settings.numbers(),
                "tokens": self.tokens.fingerprint, "weights": {name: list(p.shape) for name, p in named}}


def train_steps(stage: str, model: nn.Module, tokens, num_tokens: int, settings: _Settings, groups,
                step_loss: Callable, *, checkpoint: str | Path | None = None, until: int | None = None,
                targets: Callable | None = None) -> History:
    """Train `groups` of one `model` as `Run` and `stages.match` do; its mode and `requires_grad` are put back."""
    check_int("num_tokens", num_tokens, tokens.context)
    if until is not None:
        check_int("until", until, tokens.context)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens.context > limit:
        raise ValueError(f"context={tokens.context} is beyond the teacher's {limit}; load tokens with a shorter one")
    weights = [p for pairs, _ in groups for _, p in pairs]
    if not weights:
        raise ValueError(f"the model has no linear layer, so there is nothing to {stage}; restore fewer layers")
    with _trainable(model, weights):
        run = Run(stage, tokens, num_tokens, settings, groups, step_loss, targets=targets)
        try:
            end = run.steps_until(num_tokens if until is None else until)
            if checkpoint is not None and Path(checkpoint).exists():
                run.resume({0: Path(checkpoint)})
                if run.step > end:
                    raise ValueError(f"checkpoint={str(checkpoint)!r} is {run.histories[0].tokens[-1]} tokens into the "
                                     f"run, beyond until={until}; delete it to start anew")
            with tqdm(total=run.steps * run.step_tokens, initial=run.step * run.step_tokens, unit="tok",
                      unit_scale=True, desc=stage, leave=False) as bar:
                run.train(end, checkpoints=None if checkpoint is None else {0: Path(checkpoint)}, bar=bar)
        finally:
            run.release()
    if run.errors:
        raise run.errors[0]
    return run.histories[0]


@contextlib.contextmanager
def _trainable(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    chosen, modules = {id(p) for p in weights}, [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(id(p) in chosen)
        model.train()
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, training in modules:
            module.training = training


def rate_at(step: int, steps: int, settings: _Settings) -> float:
    warmup = math.ceil(settings.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def _first_bad_layer(named):
    for tensor_of in (lambda p: p, lambda p: p.grad):
        for name, p in named:
            tensor = tensor_of(p)
            if tensor is not None and not bool(tensor.isfinite().all()):
                return int(name.split(".")[2]) if name.startswith("model.layers.") else name
    return None


def save_checkpoint(path, run, named, state, history, step):
    """Write a run's state, in one step, so that a file that stands is whole. Raises OSError where it cannot."""
    tensors = {f"weight/{n}": p.detach() for n, p in named}
    for n, p in named:
        tensors |= {f"{key}/{n}": value for key, value in state.get(p, {}).items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    metadata = {"state": json.dumps({"run": run, "step": step, "history": asdict(history)})}
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, written, metadata=metadata)
        follow_umask([written])
        os.replace(written, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not save checkpoint {path}: {error}; the one before it, if any, is unchanged") from error
    finally:
        written.unlink(missing_ok=True)


@torch.no_grad()
def load_checkpoint(path, run, named, state):
    """Read a run into `named` weights and their optimizer's `state`, in place; return its history and its step."""
    entries, tensors = _read_checkpoint(path, True)
    for key, mine in run.items():
        if entries["run"].get(key) != mine:
            raise ValueError(f"checkpoint={str(path)!r} belongs to another run ({key} differs); "
                             "delete it to start anew or give another file")
    for name, p in named:
        p.copy_(tensors[f"weight/{name}"])
        for key, value in state[p].items():
            if f"{key}/{name}" in tensors:
                value.copy_(tensors[f"{key}/{name}"])
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    history = History(**entries["history"])
    history.layer_losses = {int(layer): loss for layer, loss in history.layer_losses.items()}
    logger.info("resumed %s at step %d from %s", run["stage"], entries["step"], path)
    return history, entries["step"]


def steps_done(checkpoint: Path | None) -> int:
    """Return how many steps of a run a checkpoint has, 0 if there is none; ValueError for a damaged one."""
    return 0 if checkpoint is None or not checkpoint.exists() else _read_checkpoint(checkpoint)[0]["step"]


def _read_checkpoint(path, weights=False):
    try:
        with safe_open(path, "pt") as f:
            return (json.loads(f.metadata()["state"]),
                    {name: f.get_tensor(name) for name in f.keys()} if weights else {})
    except (SafetensorError, OSError, TypeError, KeyError, ValueError):
        raise ValueError(f"checkpoint={str(path)!r} is truncated or no checkpoint; delete it to start anew") from None
