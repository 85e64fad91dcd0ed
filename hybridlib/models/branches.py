"""Layers of both softmax attention and a linear mixer, and models of such layers: to measure or train, not to save."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from hybridlib.models.hybrid import SOFTMAX, check_layers, check_same_shape, linear_layers, restore
from hybridlib.models.mixers import given_cache

__all__ = ["BothBranches", "ChosenAttention", "GatedAttention", "SwitchedAttention", "both_branches", "gated_model",
           "place", "set_gates"]


class BothBranches(nn.Module):
    """A layer's attention with both branches; a subclass gives `mix`, from (batch, time, width) to the same."""

    def __init__(self, linear: nn.Module, softmax: nn.Module):
        super().__init__()
        self.linear, self.softmax = linear, softmax

    def forward(self, hidden_states, past_key_values=None, cache=None, **kwargs):
        if given_cache(past_key_values, cache, kwargs) is not None:
            name = "cache" if past_key_values is None else "past_key_values"
            raise ValueError(f"{name} was given to a model of both branches, which keeps no cache")
        return self.mix(hidden_states, **kwargs), None


class GatedAttention(BothBranches):
    """(1 - gate) linear(x) + gate softmax(x), with `gate` () or (rows,), see `set_gates`."""

    gate = torch.zeros(())

    def mix(self, x, **kwargs):
        linear, softmax = self.linear(x, **kwargs)[0], self.softmax(x, **kwargs)[0]
        g = self.gate.to(linear.device, torch.promote_types(linear.dtype, torch.float32))[..., None, None]
        return ((1 - g) * linear + g * softmax).to(linear.dtype)


class ChosenAttention(BothBranches):
    """softmax(x) or linear(x), as `place` chose; the other branch is not computed."""

    chosen = False  # whether softmax is

    def choose(self, softmax: bool) -> None:
        self.chosen = softmax

    def mix(self, x, **kwargs):
        return (self.softmax if self.chosen else self.linear)(x, **kwargs)[0]


class SwitchedAttention(BothBranches):
    """As `ChosenAttention`, but both are computed, so that one recorded graph serves every choice."""

    def __init__(self, linear: nn.Module, softmax: nn.Module):
        super().__init__(linear, softmax)
        self.register_buffer("chosen", torch.zeros((), dtype=torch.bool), persistent=False)

    def choose(self, softmax: bool) -> None:
        self.chosen.fill_(softmax)

    def mix(self, x, **kwargs):
        linear, softmax = self.linear(x, **kwargs)[0], self.softmax(x, **kwargs)[0]
        return torch.where(self.chosen, softmax, linear)


def place(model: nn.Module, layers: Iterable[int]) -> None:
    """Make `layers` of a model of `ChosenAttention` or `SwitchedAttention` softmax, and the others linear."""
    layers = check_layers(layers, len(model.model.layers))
    for l, layer in enumerate(model.model.layers):
        layer.self_attn.choose(l in layers)


def both_branches(student: PreTrainedModel, teacher: PreTrainedModel,
                  attention: Callable[[nn.Module, nn.Module], BothBranches]) -> PreTrainedModel:
    """Copy `student`, with ``attention(mixer, softmax)`` in each layer and all weights trainable; see `gated_model`."""
    _check_linear(student)
    every = range(student.config.num_hidden_layers)
    linear, model = restore(student, teacher, ()), restore(student, teacher, every)  # softmax: given their mask
    for mixers, layer in zip(linear.model.layers, model.model.layers, strict=True):
        layer.self_attn = attention(mixers.self_attn, layer.self_attn)
    return model.to(next(student.parameters()).device).requires_grad_()


def gated_model(student: PreTrainedModel, teacher: PreTrainedModel, gates: torch.Tensor | None = None
                ) -> PreTrainedModel:
    """Return a model that holds, in every layer, the student's mixer and the teacher's attention, mixed by a gate.

    With gates of 0 and 1 only, its logits are those of ``restore(student, teacher, layers of gate 1)``. It shares
    memory with student and teacher, which stay as they were, gives weights no gradient, and is in eval mode.

    `student` is all linear, from `hybrid.linearize` of `teacher`, on one device. `gates` are as in `set_gates`, zeros
    if None. Raises ValueError for a student with softmax layers, a teacher of another shape, or gates that do not fit.
    """
    _check_linear(student)
    check_same_shape(student, teacher)
    model = _sharing(student)
    model.config.layer_types = [SOFTMAX] * student.config.num_hidden_layers  # so that every layer is given its mask
    for layer, theirs in zip(model.model.layers, teacher.model.layers, strict=True):
        softmax = _sharing(theirs.self_attn)
        softmax.config = model.config
        layer.self_attn = GatedAttention(layer.self_attn, softmax)
    set_gates(model, torch.zeros(len(model.model.layers)) if gates is None else gates)
    return model.eval()


def set_gates(model: nn.Module, gates: torch.Tensor) -> None:
    """Give the layers of a model of `GatedAttention` their gates: (layers,), or (layers, rows) for a batch of rows.

    A gradient that goes to a gate goes on to `gates`. Raises ValueError unless `gates` is floating and of that shape.
    """
    layers = model.model.layers
    if not isinstance(gates, torch.Tensor) or not gates.is_floating_point():
        raise ValueError(f"gates is a {getattr(gates, 'dtype', type(gates).__name__)}; it must be a floating tensor")
    if gates.dim() not in (1, 2) or len(gates) != len(layers):
        raise ValueError(f"gates has shape {tuple(gates.shape)}; it must be ({len(layers)},) or ({len(layers)}, rows)")
    for layer, gate in zip(layers, gates, strict=True):
        layer.self_attn.gate = gate


def _check_linear(student):
    if linear_layers(student.config) != tuple(range(student.config.num_hidden_layers)):
        raise ValueError("student has softmax layers; give the all-linear student that linearize made")


def _sharing(module):
    tensors = {id(b): b for b in module.buffers()}
    tensors |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, tensors)
