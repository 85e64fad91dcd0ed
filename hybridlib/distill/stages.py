"""The two stages of distillation: mixers are aligned layer by layer, then all weights match the teacher's output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hybridlib.distill.corpus import Tokens
from hybridlib.distill.loop import train_steps
from hybridlib.distill.objectives import divergence_from_hidden, mixer_loss
from hybridlib.distill.settings import AlignSettings, History, MatchSettings
from hybridlib.kernels import fused
from hybridlib.models.hybrid import linear_layers
from hybridlib.models.passes import TeacherStates, attention_io, compiled_if, last_hidden, repeatable

__all__ = ["align", "match", "matching_loss", "repeatable_if_fused", "weight_groups"]


def align(student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tokens, num_tokens: int, *,
          settings: AlignSettings | None = None, checkpoint: str | Path | None = None) -> History:
    """Stage 1: train every linear mixer of `student`, in place, to give the teacher's attention output.

    Parameters
    ----------
    student, teacher : from `hybrid.linearize`, and the model it was made from, on one device.
    num_tokens : tokens to train on, at least one row; rows are taken in the order of `tokens`.
    checkpoint : a file to save to along the way and, if it exists, to resume from, to the same numbers.

    Raises ValueError for arguments that do not fit or a foreign checkpoint, `DistillationDiverged` if a number is not
    finite or the loss grows. Source: paper section 3, stage 1.
    """
    settings = settings or AlignSettings()
    layers = linear_layers(student.config)
    mixers = {l: student.model.layers[l].self_attn for l in layers}
    named = [(f"model.layers.{l}.self_attn.{n}", p) for l, m in mixers.items() for n, p in m.named_parameters()]

    compiled = settings.compile and next(student.parameters()).is_cuda
    loss_of = compiled_if(compiled, mixer_loss)

    def step_loss(share, rows):
        with torch.no_grad():
            pairs = list(attention_io(teacher, rows, compiled=compiled))
        losses = {}
        for l, mixer in mixers.items():  # layers do not depend on one another: one graph at a time
            losses[l] = loss_of(mixer, *pairs[l], settings.normalize)
            (losses[l] * (share / len(layers))).backward()
        return {l: loss.detach() for l, loss in losses.items()}

    with repeatable_if_fused(student):
        return train_steps("align", student, tokens, num_tokens, settings, [(named, settings.learning_rate)],
                           step_loss, checkpoint=checkpoint)


def match(hybrid: PreTrainedModel, teacher: PreTrainedModel, tokens: Tokens, num_tokens: int, *,
          settings: MatchSettings | None = None, checkpoint: str | Path | None = None, until: int | None = None,
          states: TeacherStates | None = None) -> History:
    """Stage 2: train all weights of `hybrid`, in place, on the divergence of its next-token distributions.

    Arguments and errors are those of `align`, and training stops after `until` tokens of the run, to go on from
    `checkpoint` in a later call. `states` shares the teacher's hidden states with other runs over the same rows.
    Source: paper section 3, stage 2.
    """
    settings = settings or MatchSettings()
    if states is not None and states.teacher is not teacher:
        raise ValueError("states are of another teacher; make them with TeacherStates(teacher)")
    mixers = tuple(f"model.layers.{l}.self_attn." for l in linear_layers(hybrid.config))
    groups = weight_groups(hybrid.named_parameters(), lambda name: name.startswith(mixers), settings)
    compiled = settings.compile and next(hybrid.parameters()).is_cuda
    loss = matching_loss(lambda ids: [(last_hidden(hybrid, ids, compiled=compiled), hybrid.lm_head.weight)],
                         teacher, settings, compiled)
    return train_steps("match", hybrid, tokens, num_tokens, settings, groups, loss, checkpoint=checkpoint, until=until,
                       targets=None if states is None else partial(states, compiled=compiled))


@contextlib.contextmanager
def repeatable_if_fused(student: PreTrainedModel) -> Iterator[None]:
    """`passes.repeatable` for training `student`, where no operator is refused by it: its mixers run fused kernels."""
    with repeatable() if next(student.parameters()).is_cuda and _sums_in_order(student) else contextlib.nullcontext():
        yield


def _sums_in_order(student):
    mixers = [student.model.layers[l].self_attn for l in linear_layers(student.config)]
    return fused.why_not() is None and all(mixer.backend in ("auto", "fused") and mixer.head_dim in fused.DIMS
                                           for mixer in mixers)


def weight_groups(named, is_mixer: Callable[[str], bool], settings: MatchSettings) -> list:
    """Stage 2's groups for `Run` of `named` weights: those that `settings.grouping` names at their rate, then the rest.

    A stacked or gated model has a layer's mixer and softmax attention below ``self_attn``, as a hybrid has one of them.
    """
    named = list(named)
    chosen = is_mixer if settings.grouping == "mixers" else (
        lambda name: ".self_attn." in name or ".input_layernorm." in name)
    return [([(n, p) for n, p in named if chosen(n)], settings.attention_learning_rate),
            ([(n, p) for n, p in named if not chosen(n)], settings.learning_rate)]


def matching_loss(outputs: Callable, teacher: PreTrainedModel, settings: MatchSettings, compiled: bool = False, *,
                  skip: int = 0) -> Callable:
    """The `step_loss` of stage 2, see `Run`; where the run has no `targets`, it computes the teacher's hidden states.

    `outputs` takes ids (rows, time) and gives, for each member of the run, its last hidden states (rows, time, width)
    and the weight of its output head. The divergence of the first `skip` positions of a row does not count.
    """
    def step_loss(share, ids, target=None):
        if target is None:
            with torch.no_grad():
                target = last_hidden(teacher, ids, compiled=compiled)
        losses = torch.stack([divergence_from_hidden(target[:, skip:], teacher.lm_head.weight, hidden[:, skip:], head,
                                                     kind=settings.divergence, alpha=settings.alpha,
                                                     beta=settings.beta, temperature=settings.temperature)
                              for hidden, head in outputs(ids)])
        (losses.sum() * share).backward()
        return {None: losses.detach()}

    return step_loss
