"""A layer that holds both branches, softmax attention and a linear mixer."""

from __future__ import annotations

import copy

import torch
from torch import nn

from hybridlib.models.hybrid import SOFTMAX, check_layers, check_same_shape, linear_layers

__all__ = ["EitherAttention", "GatedAttention", "gated_model", "place", "set_gates"]


class _Switch(nn.Module):
    """A layer's attention: the mixer, or softmax where `keeps` is true."""

    def __init__(self, mixer: nn.Module, attention: nn.Module):
        super().__init__()
        self.linear, self.softmax = mixer, attention
        self.register_buffer("keeps", torch.zeros((), dtype=torch.bool), persistent=False)

    def forward(self, hidden_states, **kwargs):
        linear, softmax = self.linear(hidden_states, **kwargs)[0], self.softmax(hidden_states, **kwargs)[0]
        return torch.where(self.keeps, softmax, linear), None


class GatedAttention(nn.Module):
    """(1 - gate) linear(x) + gate softmax(x), called as a decoder layer calls its ``self_attn``.

    `gate` is a tensor () or (rows,), one number for all rows of a batch or one for each; see `set_gates`.
    """

    def __init__(self, linear: nn.Module, softmax: nn.Module):
        super().__init__()
        self.linear, self.softmax, self.gate = linear, softmax, torch.zeros(())

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        if past_key_values is not None:
            raise ValueError("past_key_values was given to a gated model, which keeps no cache; call it without, or "
                             "decode with the hybrid that restore gives")
        linear = self.linear(hidden_states, **kwargs)[0]
        softmax = self.softmax(hidden_states, **kwargs)[0]
        g = self.gate.to(linear.device, torch.promote_types(linear.dtype, torch.float32))[..., None, None]
        return ((1 - g) * linear + g * softmax).to(linear.dtype), None  # (rows, time, width)


def gated_model(student, teacher, gates: torch.Tensor | None = None, *, frozen: bool = True) -> nn.Module:
    """A model that holds, in every layer, the student's mixer and the teacher's attention, mixed by a gate.

    With gates of 0 and 1 only, its logits are those of ``restore(student, teacher, layers of gate 1)``. No weight is
    copied: the model shares memory with student and teacher, which stay as they were. It is in eval mode; it is for
    measuring and for training gates, keeps no cache and is not for saving.

    Parameters
    ----------
    student : all linear, from `hybrid.linearize`.
    teacher : the model it was made from, on the same device.
    gates : (layers,) or (layers, rows), see `set_gates`; zeros if None.
    frozen : no gradient goes to the weights. If False their `requires_grad` is the student's and the teacher's, and
        training the gated model changes them.

    Raises ValueError for a student with softmax layers, a teacher of another shape, or gates that do not fit.
    """
    if linear_layers(student.config) != tuple(range(student.config.num_hidden_layers)):
        raise ValueError("student has softmax layers; a gated model takes the all-linear student that linearize gave")
    check_same_shape(student, teacher)
    model = _sharing(student, frozen)
    model.config.layer_types = [SOFTMAX] * student.config.num_hidden_layers  # so that every layer is given its mask
    for layer, theirs in zip(model.model.layers, teacher.model.layers, strict=True):
        softmax = _sharing(theirs.self_attn, frozen)
        softmax.config = model.config
        layer.self_attn = GatedAttention(layer.self_attn, softmax)
    set_gates(model, torch.zeros(len(model.model.layers)) if gates is None else gates)
    return model.eval()


def set_gates(model, gates: torch.Tensor) -> None:
    """Give the layers of a `gated_model` their gates, (layers,), or (layers, rows) for a batch of that many rows.

    A gradient that goes to a gate goes on to `gates`. Raises ValueError unless `gates` is floating and of that shape;
    its values are not checked (they need not lie in [0, 1]).
    """
    layers = model.model.layers
    if not isinstance(gates, torch.Tensor) or not gates.is_floating_point():
        raise ValueError(f"gates is a {getattr(gates, 'dtype', type(gates).__name__)}; it must be a floating tensor")
    if gates.dim() not in (1, 2) or len(gates) != len(layers):
        raise ValueError(f"gates has shape {tuple(gates.shape)}; it must be ({len(layers)},) or ({len(layers)}, rows)")
    for layer, gate in zip(layers, gates, strict=True):
        layer.self_attn.gate = gate


def _sharing(module, frozen):
    """A copy of `module` whose weights and buffers are those of `module` itself, if `frozen` without gradients."""
    tensors = {id(b): b for b in module.buffers()}
    tensors |= {id(p): nn.Parameter(p.detach(), requires_grad=False) if frozen else p for p in module.parameters()}
    return copy.deepcopy(module, tensors)


class EitherAttention(nn.Module):
    """softmax(x) if `keep`, else linear(x), called as a decoder layer calls its ``self_attn``."""

    def __init__(self, linear: nn.Module, softmax: nn.Module):
        super().__init__()
        self.linear, self.softmax, self.keep = linear, softmax, False

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        if past_key_values is not None:
            raise ValueError("past_key_values was given to a once-for-all student, which keeps no cache; call it "
                             "without, or decode with the hybrid that restore gives")
        return (self.softmax if self.keep else self.linear)(hidden_states, **kwargs)[0], None


def place(model, layers) -> None:
    """Let `layers` of a once-for-all student be softmax and the others linear."""
    layers = check_layers(layers, len(model.model.layers))
    for l, layer in enumerate(model.model.layers):
        layer.self_attn.keep = l in layers
