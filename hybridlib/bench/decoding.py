"""Decoding with a cache, timed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import pandas as pd
import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from hybridlib.bench.timing import Bench, peak_memory, time_graph
from hybridlib.models.hybrid import cache_memory, linearize, restore
from hybridlib.models.mixers import CACHE_NAME
from hybridlib.models.teachers import Teacher
from hybridlib.selection.rules import select

__all__ = ["time_decoding", "token_step"]


def token_step(model: nn.Module, token: torch.Tensor, cache: Cache) -> Callable[[], torch.Tensor]:
    """Make a call that decodes one token: logits (batch, 1, vocab) after `token` (batch, 1) and the text in `cache`,
    without padding, which is not written to. Every call decodes at the same position, for measurements, and never waits
    for the device, so that a CUDA graph can record it."""
    positions = torch.full((1, 1), cache.get_seq_length(), device=token.device)
    own_cache = copy.copy(cache)
    own_cache.layers = [_OneMore(layer) if isinstance(layer, DynamicLayer) else copy.deepcopy(layer)
                        for layer in cache.layers]

    @torch.no_grad()
    def step():
        x = model.model.embed_tokens(token)
        context = {"attention_mask": None, "position_ids": positions, CACHE_NAME: own_cache, "use_cache": True,
                   "position_embeddings": model.model.rotary_emb(x, positions)}
        for layer in model.model.layers:
            x = layer(x, **context)
        return model.lm_head(model.model.norm(x))

    return step


class _OneMore(DynamicLayer):
    """The keys and values of `layer` with a place for one token more, which every update overwrites."""

    def __init__(self, layer):
        super().__init__()
        self.keys, self.values = (torch.cat([x, x[:, :, -1:]], 2) for x in (layer.keys, layer.values))

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values


def time_decoding(bench: Bench, teacher: Teacher, *, share: float = 1.0, context: int = 1024, mixer: str = "gdn",
                  batch: int = 1, new_tokens: int = 32) -> dict:
    """Time greedy `generate` after `context` random tokens. Record kind ``"decoding_speed"``.

    `share` is that of softmax layers, evenly spaced: 1 is the teacher, 0 all linear; hybrids are not trained.
    `new_tokens` is at least 2. Metrics: ``tokens_per_second`` (`batch` over the median time between two tokens),
    ``prefill_seconds``, bytes of the cache (``full_attention``, ``linear_attention``) and ``peak_bytes``; on a GPU
    ``gpu_tokens_per_second`` by the CUDA graph of one `token_step`, with quartiles ``gpu_low`` and ``gpu_high``, or
    ``graph_reason`` where it has none.
    """
    source, num_layers = teacher.model, teacher.model.config.num_hidden_layers
    layers = select("uniform", float(share), num_layers=num_layers) if share else ()
    parameters = {"teacher": teacher.name, "revision": teacher.revision, "mixer": mixer if share < 1 else None,
                  "share": float(share), "layers": list(layers), "context": context, "batch": batch,
                  "new_tokens": new_tokens, "dtype": str(source.dtype).removeprefix("torch.")}

    def compute():
        model = source if share == 1 else linearize(source, mixer)
        model = (restore(model, source, layers) if 0 < share < 1 else model).eval()
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(model.config.vocab_size, (batch, context), generator=generator).to(source.device)

        def generate(count):
            stamps = _Stamps()
            out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True,
                                 max_new_tokens=count, min_new_tokens=count, pad_token_id=0, streamer=stamps,
                                 return_dict_in_generate=True)
            return [b - a for a, b in zip(stamps.times, stamps.times[1:])], out.past_key_values

        generate(2)
        ((prefill, *between), cache), peak = peak_memory(lambda: generate(new_tokens), source.device)
        timing = time_graph([token_step(model, prompt[:, -1:], cache)], source.device)
        seconds = timing.pop("gpu_seconds")
        if seconds is not None:
            timing = {"gpu_low": batch / timing["gpu_high"], "gpu_high": batch / timing["gpu_low"]}
        return {"tokens_per_second": batch / float(pd.Series(between).median()), "prefill_seconds": prefill,
                **cache_memory(cache), "peak_bytes": peak, "num_layers": num_layers,
                "gpu_tokens_per_second": None if seconds is None else batch / seconds, **timing}

    return bench.record("decoding_speed", parameters, compute)


class _Stamps:
    """Note the time of each token that is streamed, the prompt first."""

    def __init__(self):
        self.times = []

    def put(self, token_ids):
        self.times.append(time.perf_counter())

    def end(self):
        pass
