"""Many hybrids of one student as one model, with stacked weights; the batch holds the rows of each in turn."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from hybridlib.models.branches import BothBranches, ChosenAttention, both_branches

__all__ = ["own_weights", "stacked", "stacked_weights"]


def stacked(student: nn.Module, teacher: nn.Module, sets: Sequence[Sequence[int]]) -> nn.Module:
    """A hybrid of the same family whose weights are stacks of those of ``restore(student, teacher, set)``, a set each.

    It is called with the rows of all candidates one after the other, as many of each, and keeps no cache.
    """
    stack = both_branches(student, teacher, ChosenAttention)
    for l, layer in enumerate(stack.model.layers):
        layer.self_attn = StackedAttention(layer.self_attn.linear, layer.self_attn.softmax, [l in s for s in sets])
    _stack(stack, len(sets))
    if stack.config.tie_word_embeddings:
        stack.lm_head.weight = stack.model.embed_tokens.weight
    return stack.to(next(student.parameters()).device).requires_grad_()


def stacked_weights(stack: nn.Module) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    """(name, parameter, members) of each weight of a `stacked` model: the candidates that its first dimension is of."""
    everyone = torch.arange(len(stack.lm_head.weight), device=stack.lm_head.weight.device)
    for name, p in stack.named_parameters():
        layer, _, own = name.partition(".self_attn.")
        if own:
            yield name, p, getattr(stack.get_submodule(layer).self_attn, f"{own.split('.')[0]}_members")
        else:
            yield name, p, everyone


def own_weights(stack: nn.Module, candidate: int) -> Iterator[tuple[str, nn.Parameter, tuple]]:
    """(name, parameter, index) of each weight of a candidate: ``parameter[index]`` is its hybrid's weight `name`."""
    for name, p, members in stacked_weights(stack):
        for place in (members == candidate).nonzero().flatten().tolist():
            own = re.sub(r"self_attn\.(linear|softmax)\.(stacked\.)?", "self_attn.", name)
            if own.endswith("norm.norm.weight"):  # of shape (candidates, 1, dim)
                yield own.removesuffix("norm.weight") + "weight", p, (place, 0)
            else:
                yield own, p, (place,)


def _stack(module, count):
    """`module` with `count` copies of every weight; in place, but for modules that are nothing but weights."""
    if isinstance(module, StackedAttention):
        return module
    if isinstance(module, nn.Embedding):
        return _Embeddings(module, count)
    if isinstance(module, nn.Linear):
        return _Linears(module, count)
    if type(module).__name__.endswith("RMSNorm"):
        return _Norms(module, count)
    for name, part in module.named_children():
        setattr(module, name, _stack(part, count))
    return module


def _copies(weight, count):
    return nn.Parameter(weight.detach().expand(count, *weight.shape).clone())


class StackedAttention(BothBranches):
    """A layer's attention: the mixer for some candidates, softmax for those `chosen`; an unused branch is None."""

    def __init__(self, linear: nn.Module, softmax: nn.Module, chosen: list[bool]):
        super().__init__(linear, softmax)
        self.candidates, mixer = len(chosen), linear
        members = {kind: torch.tensor([c for c, is_softmax in enumerate(chosen) if is_softmax == (kind == "softmax")],
                                      dtype=torch.long) for kind in ("linear", "softmax")}
        for kind in members:
            setattr(self, kind, _stack(getattr(self, kind), len(members[kind])) if len(members[kind]) else None)
            self.register_buffer(f"{kind}_members", members[kind], persistent=False)
        self.register_buffer("places", torch.cat(list(members.values())).argsort(), persistent=False)
        if self.linear is not None:  # weights that are no module's of their own: one number a head
            own = {name: _copies(p, len(self.linear_members)) for name, p in mixer.named_parameters(recurse=False)}
            for name in own:
                delattr(mixer, name)
            mixer.stacked = nn.ParameterDict(own)

    def mix(self, hidden_states, **kwargs):
        x, outputs = hidden_states.unflatten(0, (self.candidates, -1)), []  # (candidates, rows, time, width)
        for kind in ("linear", "softmax"):
            branch, members = getattr(self, kind), getattr(self, f"{kind}_members")
            if branch is None:
                continue
            rows = (x if len(members) == len(x) else x.index_select(0, members)).flatten(0, 1)
            if kind == "linear":
                for name, p in branch.stacked.items():  # (candidates, heads) to (candidates * rows, 1, heads)
                    setattr(branch, name, p[:, None, None].expand(-1, x.shape[1], 1, -1).flatten(0, 1))
            arguments = {name: _first_rows(value, len(hidden_states), len(rows)) for name, value in kwargs.items()}
            outputs.append(branch(rows, **arguments)[0].unflatten(0, (len(members), -1)))
        if len(outputs) == 1:
            return outputs[0].flatten(0, 1)
        return torch.cat(outputs).index_select(0, self.places).flatten(0, 1)


def _first_rows(value, batch, rows):
    """The part of an argument for the first `rows` of the batch: all candidates share one value a row."""
    if isinstance(value, tuple):
        return tuple(_first_rows(x, batch, rows) for x in value)
    return value[:rows] if isinstance(value, torch.Tensor) and len(value) == batch else value


class _Embeddings(nn.Module):
    def __init__(self, embedding: nn.Embedding, count: int):
        super().__init__()
        self.weight = _copies(embedding.weight, count)  # (candidates, vocab, width)

    def forward(self, ids):
        count, vocab, _ = self.weight.shape
        ids = ids.unflatten(0, (count, -1)) + vocab * torch.arange(count, device=ids.device)[:, None, None]
        return F.embedding(ids.flatten(0, 1), self.weight.flatten(0, 1))


class _Linears(nn.Module):
    def __init__(self, linear: nn.Linear, count: int):
        super().__init__()
        self.out_features = linear.out_features
        self.weight = _copies(linear.weight, count)  # (candidates, out, in)
        self.bias = None if linear.bias is None else _copies(linear.bias, count)

    def forward(self, x):
        return self.product(x, self.weight, self.bias)

    @staticmethod
    def product(x, weight, bias):
        y = x.unflatten(0, (len(weight), -1)).flatten(1, -2)  # (candidates, tokens, in)
        y = y @ weight.mT if bias is None else torch.baddbmm(bias[:, None], y, weight.mT)
        return y.view(*x.shape[:-1], -1)


class _Norms(nn.Module):
    def __init__(self, norm: nn.Module, count: int):
        super().__init__()
        self.norm = norm
        norm.weight = _copies(norm.weight[None], count)  # (candidates, 1, dim)

    @property
    def weight(self):
        return self.norm.weight

    def forward(self, x):
        y = x.unflatten(0, (len(self.weight), -1)).flatten(1, -2)  # (candidates, rows and more, dim)
        if isinstance(self.norm, nn.RMSNorm):  # it takes a weight of one dimension only
            y = F.rms_norm(y, self.norm.normalized_shape, None, self.norm.eps) * self.weight
        else:
            y = self.norm(y)
        return y.reshape(x.shape)
