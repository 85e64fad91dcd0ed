"""Our kernels as custom operators of torch: torch.compile takes a call whole instead of breaking off there."""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from hybridlib.kernels.fused.launch import SIZE, by_token

__all__ = ["OPERATORS", "delta_rule_inputs", "module"]

_OPERATORS = {"gated_delta_rule": "delta_rule", "gated_linear_attention": "linear_attention"}
_MODULES = {**_OPERATORS, "delta_rule_inputs": "delta_inputs", "step": "step"}


@functools.cache
def module(name: str):
    """The module with an operator's `forward` and `backward`, or with those of a step; it imports Triton."""
    return importlib.import_module(f".{_MODULES[name]}", __package__)


def _define(name):
    """The operator hybridlib::name: inputs, scale, initial state, cu_seqlens, keep -> o, state, *kept."""

    @torch.library.custom_op(f"hybridlib::{name}", mutates_args=())
    def forward(inputs: list[Tensor], scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None,
                keep: bool) -> list[Tensor]:
        initial_state = None if initial_state is None else initial_state.contiguous()
        o, state, kept = module(name).forward(*map(by_token, inputs), scale, initial_state, cu_seqlens, keep)
        return [o, state, *_filled(kept, o)] if keep else [o, state]

    @forward.register_fake
    def _(inputs, scale, initial_state, cu_seqlens, keep):
        q, v = inputs[0], inputs[2]
        (batch, time, heads, key_dim), value_dim = q.shape, v.shape[-1]
        sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
        chunks = batch * -(-time // SIZE) if cu_seqlens is None else time // SIZE + sequences
        state = q.new_empty(sequences, heads, key_dim, value_dim, dtype=torch.float32)
        kept = _filled(module(name).kept(q, v, chunks * heads, True, sequences), v) if keep else []
        return [_empty_like(v), state, *kept]

    @torch.library.custom_op(f"hybridlib::{name}_backward", mutates_args=())
    def backward(inputs: list[Tensor], scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None,
                 kept: list[Tensor], d_o: Tensor, d_state: Tensor | None) -> list[Tensor]:
        initial_state, d_state = (None if x is None else x.contiguous() for x in (initial_state, d_state))
        kept = [None if x.numel() == 0 else x.contiguous() for x in kept]
        grads = module(name).backward(*map(by_token, inputs), scale, initial_state, cu_seqlens, kept, by_token(d_o),
                                      d_state)
        return _filled(grads, d_o)

    @backward.register_fake
    def _(inputs, scale, initial_state, cu_seqlens, kept, d_o, d_state):
        return [*map(_empty_like, inputs), d_o.new_empty(0) if initial_state is None else _empty_like(initial_state)]

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.count = inputs[1], len(inputs[0])
        ctx.save_for_backward(inputs[2], inputs[3], *inputs[0], *output[2:])

    def gradients(ctx, grads):
        d_o, d_state = grads[:2]
        initial_state, cu_seqlens, *saved = ctx.saved_tensors
        inputs, kept = saved[:ctx.count], saved[ctx.count:]
        d_o = torch.zeros_like(inputs[2]) if d_o is None else d_o
        *found, d_initial = backward(inputs, ctx.scale, initial_state, cu_seqlens, kept, d_o, d_state)
        return found, None, None if initial_state is None else d_initial, None, None

    forward.register_autograd(gradients, setup_context=setup)
    return forward


def _filled(tensors, like):
    """`tensors` with an empty one in the place of each None, which operators cannot return."""
    return [like.new_empty(0) if x is None else x for x in tensors]


def _empty_like(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


OPERATORS = {name: _define(name) for name in _OPERATORS}


@torch.library.custom_op("hybridlib::delta_rule_inputs", mutates_args=())
def delta_rule_inputs(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor,
                      dt_bias: Tensor) -> list[Tensor]:
    """The operator hybridlib::delta_rule_inputs: arguments and result of the function of that name in `kernels`."""
    return module("delta_rule_inputs").forward(q, k, v, a, b, A_log, dt_bias)


@delta_rule_inputs.register_fake
def _(q, k, v, a, b, A_log, dt_bias):
    return [*map(_empty_like, (q, k, v)), a.new_empty(a.shape, dtype=torch.float32), _empty_like(b)]


@torch.library.custom_op("hybridlib::delta_rule_inputs_backward", mutates_args=())
def _inputs_backward(given: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    return module("delta_rule_inputs").backward(*given, *grads)


@_inputs_backward.register_fake
def _(given, grads):
    return [*map(_empty_like, given[:5]), given[5].new_empty(2, *given[5].shape, dtype=torch.float32)]


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _inputs_gradients(ctx, grads):
    *found, own = _inputs_backward([*ctx.saved_tensors], grads)
    return *found, *own.to(ctx.saved_tensors[5].dtype).unbind(0)


delta_rule_inputs.register_autograd(_inputs_gradients, setup_context=_keep)
