"""A pass through a teacher or a hybrid, layer by layer: x + attention(norm(x)), then x + mlp(norm(x))."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from hybridlib.checks import check_int
from hybridlib.models.mixers import CACHE_NAME

__all__ = ["TeacherStates", "attention_io", "compiled_if", "evaluation_mode", "half_on_gpu", "last_hidden", "measuring",
           "repeatable"]

RECOMPILE_LIMIT = 64  # variants of a compiled function
_MASKLESS = ("sdpa", "flash_attention_2", "flash_attention_3")  # causal without a mask


def last_hidden(model: PreTrainedModel, input_ids: torch.Tensor, *, compiled: bool = False) -> torch.Tensor:
    """Return the hidden states after the final norm, (batch, time, width), of a teacher or a hybrid.

    `input_ids` (batch, time) have no padding. If `compiled`, the first call of each shape takes seconds to minutes.
    """
    layer = compiled_if(compiled, _layer)
    x, context = _begin(model, input_ids)
    for module in model.model.layers:
        x = layer(module, x, **context)
    return model.model.norm(x)


def attention_io(model: PreTrainedModel, input_ids: torch.Tensor, *, compiled: bool = False
                 ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the input and the output of each layer's attention, both (batch, time, width); see `last_hidden`."""
    layer = compiled_if(compiled, _layer_parts)
    x, context = _begin(model, input_ids)
    for module in model.model.layers:
        x, attention_input, attention_output = layer(module, x, **context)
        yield attention_input, attention_output


class TeacherStates:
    """A teacher's last hidden states, computed once a row and remembered for the models that are compared on it.

    A call with token ids, (rows, time), returns the teacher's `last_hidden`. Its weights must not change meanwhile.
    Rows beyond `memory` bytes are computed at every call; a token takes 2 x width bytes on a GPU (in bfloat16), 4 x
    width elsewhere. `computed` counts the tokens that the teacher has read.
    """

    def __init__(self, teacher: PreTrainedModel, memory: int = 4 * 2**30):
        check_int("memory", memory, 0)
        self.teacher, self.memory, self.used, self.computed = teacher, memory, 0, 0
        self._rows: dict[bytes, torch.Tensor] = {}

    def __reduce__(self):
        return TeacherStates, (self.teacher, self.memory)  # another process starts with no rows

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, *, compiled: bool = False) -> torch.Tensor:
        keys = [row.tobytes() for row in ids.cpu().to(torch.int32).numpy()]
        if all(key in self._rows for key in keys):
            return torch.stack([self._rows[key] for key in keys])
        device = next(self.teacher.parameters()).device
        with half_on_gpu(device):
            states = last_hidden(self.teacher, ids.to(device).long(), compiled=compiled)
        states = states.to(torch.bfloat16) if device.type == "cuda" else states
        self.computed += ids.numel()
        if self.used + states.nbytes <= self.memory:
            self.used += states.nbytes
            self._rows |= zip(keys, states, strict=True)
        return states


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` in evaluation mode within the context, and back in its own mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def half_on_gpu(device: torch.device) -> torch.autocast:
    """Return a context in which products are in bfloat16 on a GPU, and as they are elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Within the context, `model` is in evaluation mode, without gradients, in bfloat16 on a GPU."""
    with evaluation_mode(model), torch.no_grad(), half_on_gpu(next(model.parameters()).device):
        yield


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Let a GPU sum in the same order in every process within the context; RuntimeError for an operator that cannot."""
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a safeguard that would fill every new tensor
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills


@functools.cache
def compiled_if(compiled: bool, function: Callable) -> Callable:
    """Return `function`, or its compiled form, which sums in a fixed order where torch.compile can."""
    if not compiled:
        return function
    fixed = {"deterministic": True} if "deterministic" in torch._inductor.list_options() else None
    compiled_function = torch.compile(function, dynamic=False, options=fixed)

    @functools.wraps(function)
    def call(*args, **kwargs):
        # Layers differ by kind, shape, mode and gradients; beyond torch's limit of 8 it would run them uncompiled.
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            return compiled_function(*args, **kwargs)

    return call


def _begin(model, input_ids):
    x = model.model.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    mask = None  # transformers makes one while a CUDA graph is recorded, which rules the fast kernels out
    if model.config._attn_implementation not in _MASKLESS:
        mask = create_causal_mask(config=model.config, inputs_embeds=x, attention_mask=None, position_ids=positions,
                                  **{CACHE_NAME: None})
    return x, {"attention_mask": mask, "position_ids": positions,
               "position_embeddings": model.model.rotary_emb(x, positions)}


def _layer(layer, x, **context):
    return layer(x, **context)


def _layer_parts(layer, x, **context):
    attention_input = layer.input_layernorm(x)
    attention_output = layer.self_attn(hidden_states=attention_input, **context)[0]
    x = x + attention_output
    return x + layer.mlp(layer.post_attention_layernorm(x)), attention_input, attention_output
