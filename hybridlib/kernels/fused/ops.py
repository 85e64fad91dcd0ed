"""Our kernels as custom operators of torch: torch.compile takes a call whole instead of breaking off there."""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from hybridlib.kernels.fused.launch import SIZE, by_token, dense_like

_OPERATORS = {"gated_delta_rule": "delta_rule", "gated_linear_attention": "linear_attention"}
_MODULES = {**_OPERATORS, "delta_rule_inputs": "delta_inputs", "step": "step"}


@functools.cache
def module(name: str):
    """Import the module of an operator's `forward` and `backward`, or of steps, and Triton with it."""
    return importlib.import_module(f".{_MODULES[name]}", __package__)


def _define(name):
    """Define the operator hybridlib::name: inputs, scale, initial state, cu_seqlens, keep -> o, state, *saved."""

    @torch.library.custom_op(f"hybridlib::{name}", mutates_args=())
    def forward(inputs: list[Tensor], scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None,
                keep: bool) -> list[Tensor]:
        initial_state = None if initial_state is None else initial_state.contiguous()
        o, state, saved = module(name).forward(*map(by_token, inputs), scale, initial_state, cu_seqlens, keep)
        return [o, state, *_filled(saved, o)] if keep else [o, state]

    @forward.register_fake
    def _(inputs, scale, initial_state, cu_seqlens, keep):
        q, v = inputs[0], inputs[2]
        (batch, time, heads, key_dim), value_dim = q.shape, v.shape[-1]
        sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
        chunks = batch * -(-time // SIZE) if cu_seqlens is None else time // SIZE + sequences
        state = q.new_empty(sequences, heads, key_dim, value_dim, dtype=torch.float32)
        saved = _filled(module(name).saved_tensors(q, v, chunks * heads, True, sequences), v) if keep else []
        return [dense_like(v), state, *saved]

    @torch.library.custom_op(f"hybridlib::{name}_backward", mutates_args=())
    def backward(inputs: list[Tensor], scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None,
                 saved: list[Tensor], d_o: Tensor, d_state: Tensor | None) -> list[Tensor]:
        initial_state, d_state = (None if x is None else x.contiguous() for x in (initial_state, d_state))
        tensors = [None if x.numel() == 0 else x.contiguous() for x in saved]
        grads = module(name).backward(*map(by_token, inputs), scale, initial_state, cu_seqlens, tensors,
                                      by_token(d_o), d_state)
        return _filled(grads, d_o)

    @backward.register_fake
    def _(inputs, scale, initial_state, cu_seqlens, saved, d_o, d_state):
        return [*map(dense_like, inputs), d_o.new_empty(0) if initial_state is None else dense_like(initial_state)]

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.count = inputs[1], len(inputs[0])
        ctx.save_for_backward(inputs[2], inputs[3], *inputs[0], *output[2:])

    def gradients(ctx, grads):
        d_o, d_state = grads[:2]
        initial_state, cu_seqlens, *tensors = ctx.saved_tensors
        inputs, saved = tensors[:ctx.count], tensors[ctx.count:]
        d_o = torch.zeros_like(inputs[2]) if d_o is None else d_o
        *d_inputs, d_initial = backward(inputs, ctx.scale, initial_state, cu_seqlens, saved, d_o, d_state)
        return d_inputs, None, None if initial_state is None else d_initial, None, None

    forward.register_autograd(gradients, setup_context=setup)
    return forward


def _filled(tensors, like):
    """Return `tensors` with an empty one in the place of each None, which operators cannot return."""
    return [like.new_empty(0) if x is None else x for x in tensors]


OPERATORS = {name: _define(name) for name in _OPERATORS}


@torch.library.custom_op("hybridlib::delta_rule_inputs", mutates_args=())
def delta_rule_inputs(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor,
                      dt_bias: Tensor) -> list[Tensor]:
    """Run the function of that name in `hybridlib.kernels` as an operator."""
    return module("delta_rule_inputs").forward(q, k, v, a, b, A_log, dt_bias)


@delta_rule_inputs.register_fake
def _(q, k, v, a, b, A_log, dt_bias):
    return [*map(dense_like, (q, k, v)), a.new_empty(a.shape, dtype=torch.float32), dense_like(b)]


@torch.library.custom_op("hybridlib::delta_rule_inputs_backward", mutates_args=())
def _inputs_backward(projections: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    return module("delta_rule_inputs").backward(*projections, *grads)


@_inputs_backward.register_fake
def _(projections, grads):
    A_log = projections[5]
    return [*map(dense_like, projections[:5]), A_log.new_empty(2, *A_log.shape, dtype=torch.float32)]


def _inputs_gradients(ctx, grads):
    *d_projections, d_gates = _inputs_backward([*ctx.saved_tensors], grads)
    return *d_projections, *d_gates.to(ctx.saved_tensors[5].dtype).unbind(0)


delta_rule_inputs.register_autograd(
    _inputs_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
