"""Candidates that train together, in a stacked model, so that a small teacher's students share every launch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from hybridlib.distill.evaluate import evaluate_members
from hybridlib.distill.loop import Run
from hybridlib.distill.recall import recall_of_members
from hybridlib.distill.settings import MatchSettings
from hybridlib.distill.stages import matching_loss, weight_groups
from hybridlib.models.hybrid import restore
from hybridlib.models.passes import TeacherStates, last_hidden, measuring
from hybridlib.selection.engine.stacked import own_weights, stacked, stacked_weights

__all__ = ["Cohort"]


class Cohort(Run):
    """The hybrids of one student with these `sets` of softmax layers, trained together as `match` would train each."""

    compiled = False  # layers run as they are

    def __init__(self, student, teacher, tokens, sets: Sequence[tuple[int, ...]], num_tokens: int,
                 settings: MatchSettings, states: TeacherStates | None = None):
        self.student, self.teacher, self.states, self.sets = student, teacher, states, sets
        self.stack = self.build(student, teacher)
        self.members = self.members_of_weights()
        groups = weight_groups(self.stack.named_parameters(), lambda name: ".self_attn.linear." in name, settings)
        super().__init__("match", tokens, num_tokens, settings, groups,
                         matching_loss(self.outputs, teacher, settings, self.compiled), members=len(sets),
                         targets=None if states is None else partial(states, compiled=self.compiled))
        self.named = list(self.stack.named_parameters())  # in the model's order

    def train(self, end: int, **how) -> None:
        self.stack.train()
        super().train(end, **how)

    def figures(self, tokens, heldout_tokens: int | None = None, examples=None) -> list[dict]:
        """Each candidate's figures of `evaluate`, with recall if there are `examples`; void for one in `errors`."""
        count = len(self.sets)
        with measuring(self.stack):
            recall = (recall_of_members(self.stack, tokens.tokenizer, examples, max(1, 128 // count), count)
                      if examples else [None] * count)
            return [member.metrics() for member in evaluate_members(
                lambda ids: (F.linear(*output) for output in self.outputs(ids)), self.teacher, tokens, recall,
                heldout_tokens=heldout_tokens, states=self.states, compiled=self.compiled)]

    @torch.no_grad()
    def hybrid(self, c: int = 0) -> PreTrainedModel:
        """Candidate c as it stands now, as `restore` and `match` alone make it: a model to write with, or to save."""
        hybrid, trained = restore(self.student, self.teacher, self.sets[c]), dict(self.member(c)[0])
        for name, weight in hybrid.named_parameters():
            weight.copy_(trained[name])
        return hybrid

    def build(self, student, teacher):
        """The model that trains."""
        return stacked(student, teacher, self.sets)

    def members_of_weights(self):
        """{name: candidates that the weight's first dimension is of}."""
        return {name: members for name, _, members in stacked_weights(self.stack)}

    def outputs(self, ids):
        """For each candidate, its last hidden states on `ids` (rows, time), and its output head."""
        hidden = last_hidden(self.stack, ids.repeat(len(self.sets), 1)).unflatten(0, (len(self.sets), -1))
        return list(zip(hidden.unbind(0), self.stack.lm_head.weight.unbind(0), strict=True))

    def clip(self):
        first = self.named[0][1]
        squares = torch.zeros(len(self.sets), device=first.device,
                              dtype=torch.promote_types(first.dtype, torch.float32))
        for name, p in self.named:
            squares = squares.index_add(0, self.members[name], p.grad.flatten(1).to(squares.dtype).square().sum(1))
        norms = squares.sqrt()
        factors = (self.settings.clip / (norms + 1e-6)).clamp(max=1)
        for name, p in self.named:
            p.grad.mul_(factors[self.members[name]].view(-1, *[1] * (p.dim() - 1)))
        return norms

    def own_weights(self, c):
        return own_weights(self.stack, c)

    def trained(self, c):
        weights = []
        for name, p in self.named:
            for i in (self.members[name] == c).nonzero().flatten().tolist():
                weight = p.detach()[i]
                weight.grad = p.grad[i]
                weights.append((name, weight))
        return weights

    def silence(self):
        for name, p in self.named if self.errors else ():
            p.grad[[i for i, c in enumerate(self.members[name].tolist()) if c in self.errors]] = 0
