"""A hybrid that can become any other by a switch in every layer, so that one CUDA graph serves all candidates."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from hybridlib.distill.evaluate import heldout_row_kl, row_kl
from hybridlib.distill.graphs import Graphed
from hybridlib.distill.loop import MOMENTS, Run
from hybridlib.distill.settings import History
from hybridlib.models.branches import SwitchedAttention, both_branches, place
from hybridlib.models.passes import last_hidden
from hybridlib.selection.engine.cohort import Cohort

__all__ = ["Switched"]


class Switched(Cohort):
    """One candidate at a time, the one that `take` took, in a model, a step and a CUDA graph that all of them share."""

    clip, trained, silence = Run.clip, Run.trained, Run.silence  # there is one

    def __init__(self, student, teacher, tokens, num_tokens, settings, states=None):
        self.compiled = settings.compile and next(student.parameters()).is_cuda
        super().__init__(student, teacher, tokens, [()], num_tokens, settings, states)
        self._origins = [_origin(name) for name, _ in self.named]
        self._sources = [(teacher if branch == "softmax" else student).get_parameter(own)
                         for own, branch, _ in self._origins]
        self._unfit = (~torch.stack([source.isfinite().all() for source in self._sources])).nonzero().flatten().tolist()
        self._measures: dict[torch.Size, Graphed] = {}

    @torch.no_grad()
    def take(self, softmax: Sequence[int], *, checkpoint: Path | None = None, held: tuple | None = None) -> None:
        """Become the candidate with these softmax layers, untrained, or as a checkpoint or what `hold` gave has it."""
        self.sets, self.histories, self.errors, self.step = [tuple(softmax)], [History("match")], {}, 0
        place(self.stack, softmax)
        weights = [p for _, p in self.named]
        torch._foreach_copy_(weights, self._sources)
        for i in self._unfit:
            _, branch, layer = self._origins[i]
            if branch is not None and (branch == "softmax") != (layer in softmax):
                weights[i].nan_to_num_()  # it does not count, and must not be felt
        self.start_moments()
        if held is not None:
            state, history, self.step = held
            self.histories = [copy.deepcopy(history)]
            torch._foreach_add_([self.optimizer.state[p]["step"] for p in weights], self.step)
            torch._foreach_copy_(self._state(), state, non_blocking=True)
        elif checkpoint is not None:
            self.resume({0: checkpoint})

    def hold(self) -> tuple:
        """The candidate's state, for `take`: on the GPU while there is room, else in the machine's memory."""
        state = self._state()
        room = _room_for(state)
        torch._foreach_copy_(room, state, non_blocking=True)
        return room, copy.deepcopy(self.histories[0]), self.step

    def _state(self):
        named, state = self.member(0)
        return [p for _, p in named] + [state[p][key] for key in MOMENTS for _, p in named]

    def heldout_row_kl(self, tokens, heldout_tokens: int | None) -> list[float]:
        """`evaluate.heldout_row_kl` of the candidate, of which each shape of a batch is recorded as well."""
        return heldout_row_kl(self.stack, self.teacher, tokens, heldout_tokens=heldout_tokens, states=self.states,
                              measure=self._measure)

    def release(self) -> None:
        super().release()
        for graphed in self._measures.values():
            graphed.release()
        self._measures.clear()

    def _measure(self, ids, theirs):
        measure = partial(row_kl, self.stack, self.teacher, compiled=self.compiled)
        if self._graphed is None:
            return measure(ids, theirs)
        if ids.shape not in self._measures:
            self._measures[ids.shape] = Graphed(measure)
        return self._measures[ids.shape](ids, theirs)

    def build(self, student, teacher):
        return both_branches(student, teacher, SwitchedAttention)

    def members_of_weights(self):
        return {}

    def own_weights(self, c):
        for (own, branch, layer), (_, p) in zip(self._origins, self.named, strict=True):
            if branch is None or (branch == "softmax") == (layer in self.sets[0]):
                yield own, p, ()

    def outputs(self, ids):
        return [(last_hidden(self.stack, ids, compiled=self.compiled), self.stack.lm_head.weight)]


def _room_for(tensors):
    """Room for a copy of each, in one block; on the GPU if that leaves an eighth of it free at the peak."""
    device, sizes = tensors[0].device, [-(-t.nbytes // 16) * 16 for t in tensors]
    block = None
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        spare = free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device) - sum(sizes)
        with contextlib.suppress(torch.OutOfMemoryError):  # what is free may lie in pieces
            block = torch.empty(sum(sizes), dtype=torch.uint8, device=device) if spare > total // 8 else None
    if block is None:
        block = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    return [part[:t.nbytes].view(t.dtype).view(t.shape) for part, t in zip(block.split(sizes), tensors, strict=True)]


def _origin(name):
    """(name in a hybrid, branch, layer) of a weight of a switched model; no branch outside attention."""
    head, part, own = name.partition(".self_attn.")
    if not part:
        return name, None, None
    branch, _, rest = own.partition(".")
    return f"{head}.self_attn.{rest}", branch, int(head.split(".")[2])
