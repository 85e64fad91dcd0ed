"""A pass through a teacher or a hybrid, layer by layer, as ordinary calls or compiled.

All families that hybridlib takes build a layer alike: x + attention(norm(x)), then x + mlp(norm(x)). Compiled, each
kind of layer becomes a few kernels, once for all layers of the kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask

from .objectives import alignment_loss

__all__ = ["attention_io", "compiled_if", "last_hidden", "mixer_loss"]

_MASKLESS = ("sdpa", "flash_attention_2", "flash_attention_3")  # causal where no mask is given


def last_hidden(model: nn.Module, input_ids: torch.Tensor, *, compiled: bool = False) -> torch.Tensor:
    """Hidden states after the final norm, (batch, time, width), of a teacher or a hybrid.

    Parameters
    ----------
    input_ids : (batch, time), without padding.
    compiled : run each layer through ``torch.compile``; the first call of each shape takes seconds to minutes.
    """
    layer = compiled_if(compiled, _layer)
    x, context = _begin(model, input_ids)
    for module in model.model.layers:
        x = layer(module, x, **context)
    return model.model.norm(x)


def attention_io(model: nn.Module, input_ids: torch.Tensor, *, compiled: bool = False
                 ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each layer in turn, what its attention is given and what it returns, both (batch, time, width).

    Parameters as for `last_hidden`.
    """
    layer = compiled_if(compiled, _layer_parts)
    x, context = _begin(model, input_ids)
    for module in model.model.layers:
        x, given, returned = layer(module, x, **context)
        yield given, returned


def mixer_loss(mixer: nn.Module, given: torch.Tensor, returned: torch.Tensor, normalize: bool) -> torch.Tensor:
    """Stage 1's loss of a mixer on a layer's `attention_io`; see `objectives.alignment_loss`."""
    return alignment_loss(mixer(given)[0], returned, normalize=normalize)


def compiled_if(compiled: bool, function: Callable) -> Callable:
    """`function`, or its compiled form."""
    return _compile(function) if compiled else function


@functools.cache
def _compile(function):
    return torch.compile(function, dynamic=False)


def _begin(model, input_ids):
    """The first layer's input and what every layer is told about positions."""
    x = model.model.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    mask = None  # transformers makes one while a CUDA graph is recorded, which rules the fast kernels out
    if model.config._attn_implementation not in _MASKLESS:
        mask = create_causal_mask(config=model.config, inputs_embeds=x, attention_mask=None, past_key_values=None,
                                  position_ids=positions)
    return x, {"attention_mask": mask, "position_ids": positions,
               "position_embeddings": model.model.rotary_emb(x, positions)}


def _layer(layer, x, **context):
    return layer(x, **context)


def _layer_parts(layer, x, **context):
    given = layer.input_layernorm(x)
    returned = layer.self_attn(hidden_states=given, **context)[0]
    x = x + returned
    return x + layer.mlp(layer.post_attention_layernorm(x)), given, returned
