"""Candidates that train together: a stacked model, its optimizer, and what each candidate has come to.

Launching the kernels of a step takes a GPU longer than running them, where the teacher is small. Candidates, one for
each set of softmax layers, therefore share every launch. Each has its own loss, its own gradient norm to clip and its
own end if it meets a number that is not finite; its state on disk is that of a run of `distill.match` by itself.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from hybridlib.distill.evaluate import compare, mean_stderr
from hybridlib.distill.graphs import Graphed, Update
from hybridlib.distill.loop import check_finite, load_checkpoint, rate_at, save_checkpoint
from hybridlib.distill.objectives import divergence_from_hidden
from hybridlib.distill.recall import exact_match, judge, pad_left, recall_logits
from hybridlib.distill.settings import DistillationDiverged, History, MatchSettings
from hybridlib.models.passes import TeacherStates, last_hidden
from hybridlib.selection.engine.stacked import own_weights, stacked, stacked_weights

__all__ = ["Cohort", "MOMENTS", "steps_done"]

MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam keeps of a weight


class Cohort:
    """The hybrids of one student with these `sets` of softmax layers, in training together.

    Candidate c is trained as ``match(restore(student, teacher, sets[c]), teacher, tokens, num_tokens, ...)`` would
    train it, to rounding.

    Parameters
    ----------
    student, teacher, tokens, num_tokens, settings, states : as `distill.match` takes them, the student all linear.
        ``settings.compile`` is not offered here: the layers run as they are.
    sets : for each candidate, its softmax layers, ascending.

    `step` of `steps`, of `step_tokens` tokens each, are done; `histories[c]` is what candidate c did (of the group's
    time it has an equal share), and `errors[c]` why it stopped, if it did.
    """

    compiled = False  # layers run as they are

    def __init__(self, student, teacher, tokens, sets: Sequence[tuple[int, ...]], num_tokens: int,
                 settings: MatchSettings, states: TeacherStates | None = None):
        self.teacher, self.tokens, self.settings, self.states = teacher, tokens, settings, states
        self.device, self.sets = next(student.parameters()).device, sets
        self.rows = settings.step_rows(tokens.context)
        self.micro = max(1, (settings.micro_batch_tokens or settings.batch_tokens) // tokens.context)
        self.step_tokens = self.rows * tokens.context
        self.step, self.steps = 0, max(1, num_tokens // self.step_tokens)
        self.histories, self.errors = [History("match") for _ in sets], {}
        self._run = {"stage": "match", "num_tokens": num_tokens, "settings": settings.numbers(),
                     "tokens": tokens.fingerprint}
        self.stack = self._build(student, teacher)
        self.weights = list(self._weights())
        mixers = [p for name, p, _ in self.weights if ".self_attn.linear." in name]
        others = [p for name, p, _ in self.weights if ".self_attn.linear." not in name]
        groups = [(mixers, settings.mixer_learning_rate), (others, settings.learning_rate)]
        self.optimizer = torch.optim.AdamW([{"params": params, "peak": rate} for params, rate in groups if params],
                                           lr=0.0, betas=settings.betas, weight_decay=settings.weight_decay,
                                           fused=self.device.type == "cuda")
        self._graphed = Graphed(self._gradients) if settings.cuda_graph and self.device.type == "cuda" else None
        self._update = Update(self.optimizer, self._graphed)

    def steps_for(self, tokens: int) -> int:
        """Whole steps, at most all, in which at least so many tokens are read."""
        return min(self.steps, -(-tokens // self.step_tokens))

    def train(self, end: int, *, checkpoints: Mapping[int, Path] | None = None, bar=None) -> None:
        """Go on to step `end`. `checkpoints` : for candidates, where their state goes at the end and along the way."""
        count, every = len(self.sets), max(1, self.settings.checkpoint_every // self.step_tokens)
        self.stack.train()
        for step in range(self.step, end):
            begun, ids = time.perf_counter(), self.tokens.rows(step * self.rows, self.rows)
            batch = [ids.to(self.device, non_blocking=True)]
            if self.states is not None:
                batch.append(torch.cat([self.states(part, compiled=self.compiled) for part in ids.split(self.micro)]))
            losses, norms = (x.tolist() for x in (self._graphed or self._gradients)(*batch))
            for c in set(range(count)) - set(self.errors):
                named = () if math.isfinite(losses[c] + norms[c]) else self._trained(c)
                try:
                    check_finite("match", step, {None: losses[c]}, norms[c], named, self.histories[c], self.settings)
                except DistillationDiverged as error:
                    self.errors[c] = error
            if len(self.errors) == count:
                break
            _silence(self.weights, self.errors)
            self._update(rate_at(step, self.steps, self.settings))
            self.step = step + 1
            seconds = (time.perf_counter() - begun) / count
            for c in set(range(count)) - set(self.errors):
                history = self.histories[c]
                history.tokens.append(self.step * self.step_tokens)
                history.losses.append(losses[c])
                history.seconds += seconds
                history.elapsed.append(history.seconds)
            if bar is not None:
                bar.update(self.step_tokens * count)
                bar.set_postfix(loss=f"{min(losses):.4f} to {max(losses):.4f}")
            if checkpoints and (self.step % every == 0 or self.step == end):
                for c in set(checkpoints) - set(self.errors):
                    named, state = self._candidate(c)
                    save_checkpoint(checkpoints[c], self._run_of(named), named, state, self.histories[c], self.step)
        if self._graphed is None:  # what a graph writes to must stay
            self.optimizer.zero_grad(set_to_none=True)

    def resume(self, checkpoints: Mapping[int, Path]) -> None:
        """Take up candidates where `checkpoints`, one for each, of one step, left them; before any training here.

        Raises ValueError for a damaged or foreign one.
        """
        self._start_moments()
        for c, path in checkpoints.items():
            named, state = self._candidate(c)
            held = {id(p): state.state[p] for _, p in named}
            self.histories[c], self.step = load_checkpoint(path, self._run_of(named), named, state)
            for _, p in named:  # they were read into tensors of their own
                for name, value in state.state[p].items():
                    held[id(p)][name].copy_(value)

    def figures(self, tokens, examples=None) -> list[dict]:
        """Of each candidate, the figures of `evaluate.evaluate` on the held-out rows of `tokens`; recall if there are
        `examples` of it. Those of a candidate in `errors` mean nothing."""
        return _figures(self.stack, self.teacher, tokens, examples, len(self.sets), self.states)

    def release(self) -> None:
        """Give back what training needs; what is left can still be measured."""
        self.optimizer.zero_grad(set_to_none=True)
        self._update.release()
        if self._graphed is not None:
            self._graphed.release()

    def _gradients(self, ids, target=None):
        self.optimizer.zero_grad(set_to_none=True)
        settings, count = self.settings, len(self.sets)
        losses = torch.zeros(count, device=self.device)
        targets = [None] * -(-len(ids) // self.micro) if target is None else target.split(self.micro)
        for part, target in zip(ids.split(self.micro), targets, strict=True):
            share = len(part) / self.rows
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                if target is None:
                    with torch.no_grad():
                        target = last_hidden(self.teacher, part, compiled=self.compiled)
                loss = torch.stack([
                    divergence_from_hidden(target, self.teacher.lm_head.weight, hidden, head, kind=settings.divergence,
                                           alpha=settings.alpha, beta=settings.beta, temperature=settings.temperature)
                    for hidden, head in self._candidates(part)])
                (loss.sum() * share).backward()
            losses = losses + loss.detach() * share
        return losses, self._clipped()

    def _build(self, student, teacher):
        return stacked(student, teacher, self.sets)

    def _weights(self):
        return stacked_weights(self.stack)

    def _own_weights(self, c):
        return own_weights(self.stack, c)

    def _candidates(self, ids):
        return _candidates(self.stack, ids, len(self.sets))

    def _clipped(self):
        return _clip(self.weights, len(self.sets), self.settings.clip)

    def _trained(self, c):
        return _own(self.weights, c)

    def _start_moments(self):
        """The optimizer's state before a first step, in place where there is one: a recorded update writes there."""
        if self.optimizer.state:
            torch._foreach_zero_([x for kept in self.optimizer.state.values() for x in kept.values()])
            return
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                step = torch.zeros((), device=self.device if group["fused"] else "cpu")
                self.optimizer.state[p] = {"step": step, **{name: torch.zeros_like(p) for name in MOMENTS}}

    def _candidate(self, c):
        """Weights of candidate `c` by their names in its hybrid, and the optimizer's state of them: views of both."""
        named, state = [], {}
        for name, p, index in self._own_weights(c):
            own, kept = p.detach()[index], self.optimizer.state.get(p, {})
            named.append((name, own))
            state[own] = {key: value[index] if key in MOMENTS else value for key, value in kept.items()}
        return named, SimpleNamespace(state=state, param_groups=self.optimizer.param_groups)

    def _run_of(self, named):
        return self._run | {"weights": {name: list(p.shape) for name, p in named}}


def steps_done(checkpoint: Path | None) -> int:
    """How many steps of a run a checkpoint has; 0 if there is none. Raises ValueError for a damaged one."""
    if checkpoint is None or not checkpoint.exists():
        return 0
    try:
        with safe_open(checkpoint, "pt") as f:
            return json.loads(f.metadata()["state"])["step"]
    except (SafetensorError, OSError, TypeError, KeyError, ValueError):
        raise ValueError(f"checkpoint={str(checkpoint)!r} is truncated or no checkpoint; delete it to start anew"
                         ) from None


@torch.no_grad()
def _figures(stack, teacher, tokens, examples, count, states, batch_tokens=8192):
    """The figures of `evaluate.evaluate` for each candidate."""
    device = next(stack.parameters()).device
    stack.eval()
    kl, sums = [[] for _ in range(count)], torch.zeros(count, 2, dtype=torch.float64)
    for ids in tokens.heldout.split(max(1, batch_tokens // tokens.context)):
        ids = ids.to(device).long()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden = last_hidden(teacher, ids) if states is None else states(ids)
            theirs = teacher.lm_head(hidden).float()
            for c, (hidden, head) in enumerate(_candidates(stack, ids, count)):
                row_kl, *row_sums = compare(theirs, F.linear(hidden, head).float(), ids)
                kl[c] += row_kl
                sums[c] += torch.tensor(row_sums, dtype=torch.float64)
    nats, agree = (sums / len(tokens.heldout)).unbind(1)
    right = _recall(stack, tokens.tokenizer, examples, count) if examples else [None] * count
    return [dict(zip(("kl", "kl_stderr", "perplexity", "top1_agreement", "recall_exact", "recall_stderr"),
                     (*mean_stderr(kl[c]), nats[c].exp().item(), agree[c].item(),
                      *((None, None) if right[c] is None else exact_match(right[c]))))) for c in range(count)]


def _recall(stack, tokenizer, examples, count, batch_rows=128):
    """For each candidate, which answers are right, as `recall.score_recall` judges them; the logits of 128 rows."""
    device, right = next(stack.parameters()).device, [[] for _ in range(count)]
    size = max(1, batch_rows // count)
    for part in (examples[i:i + size] for i in range(0, len(examples), size)):
        ids, mask, shift = pad_left([ids for ids, _ in part], tokenizer, device)
        predicted = recall_logits(stack, ids.repeat(count, 1), mask.repeat(count, 1)).argmax(-1).cpu()
        ids = ids.cpu()  # at once: a number at a time would wait for the GPU as often
        for c, predicted in enumerate(predicted.unflatten(0, (count, -1))):
            right[c] += [exact for exact, _, _ in judge(predicted, ids, shift, part)]
    return right


def _candidates(stack, ids, count):
    """For each candidate, its last hidden states on `ids` (rows, time), (rows, time, width), and its output head."""
    hidden = last_hidden(stack, ids.repeat(count, 1)).unflatten(0, (count, -1))
    return list(zip(hidden.unbind(0), stack.lm_head.weight.unbind(0), strict=True))


def _clip(weights, count, clip):
    """Scale every candidate's gradient to a norm of at most `clip`; returns the norms before, (candidates,)."""
    first = weights[0][1]
    squares = torch.zeros(count, device=first.device, dtype=torch.promote_types(first.dtype, torch.float32))
    for _, p, members in weights:
        squares = squares.index_add(0, members, p.grad.flatten(1).to(squares.dtype).square().sum(1))
    norms = squares.sqrt()
    factors = (clip / (norms + 1e-6)).clamp(max=1)
    for _, p, members in weights:
        p.grad.mul_(factors[members].view(-1, *[1] * (p.dim() - 1)))
    return norms


def _silence(weights, errors):
    """Put 0 in the place of the gradients of the candidates that went wrong."""
    for _, p, members in weights if errors else ():
        p.grad[[i for i, c in enumerate(members.tolist()) if c in errors]] = 0


def _own(weights, c):
    """(name, weight) of candidate `c`, each with its gradient."""
    named = []
    for name, p, members in weights:
        for i in (members == c).nonzero().flatten().tolist():
            own = p.detach()[i]
            own.grad = p.grad[i]
            named.append((name, own))
    return named
