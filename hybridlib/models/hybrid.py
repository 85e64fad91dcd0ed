"""Hybrids: a transformers causal LM in which some layers keep softmax attention and the rest hold a linear mixer.

``config.layer_types`` says ``"linear_attention"`` or ``"full_attention"`` a layer. AutoModelForCausalLM reads what
`save_pretrained` writes, once hybridlib is imported. A cache holds keys and values, or a state in linear layers.
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, LlamaForCausalLM,
                          MistralConfig, MistralForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen2Config,
                          Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)
from transformers.cache_utils import LinearAttentionLayer
from transformers.masking_utils import create_causal_mask

from hybridlib.checks import check_choice, check_device
from hybridlib.models.mixers import CACHE_NAME, KV_TRANSFERS, MIXERS, MixerState, build_mixer, given_cache
from hybridlib.models.teachers import Teacher, check_family, load_weights, readable
from hybridlib.records.folders import follow_umask

__all__ = ["cache_memory", "check_layers", "check_same_shape", "linear_layers", "linearize", "load_hybrid", "restore",
           "softmax_layers"]

LINEAR, SOFTMAX = "linear_attention", "full_attention"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


class _HybridModel:
    """What a hybrid adds to its family's causal LM: mixers in the linear layers, and padding masks for them."""

    def __init__(self, config):
        super().__init__(config)
        for l in linear_layers(config):
            self.model.layers[l].self_attn = build_mixer(config.mixer, config, l)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                inputs_embeds=None, use_cache=False, logits_to_keep=0, cache=None, **kwargs):
        """Run the family's forward, which makes a cache only if `use_cache` is True.

        `attention_mask` (batch, cached time + time) with 0 at padding holds in linear layers too. Raises ValueError for
        one of another shape, or a cache that is no ``DynamicCache(config=model.config)``; `past_key_values` and `cache`
        are two names of it.
        """
        batch, time = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        cache, past = given_cache(past_key_values, cache, kwargs), 0
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            _put_states(cache, self.config)
            past = _cached_time(cache, self.config, batch)
        if attention_mask is not None:
            if tuple(attention_mask.shape) != (batch, past + time):
                raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; with {past} tokens cached "
                                 f"and {time} given it must be (batch, time) = {(batch, past + time)}")
            if not bool(attention_mask[:, past:].all()):
                kwargs["padding_mask"] = attention_mask[:, past:]
        if self.config.model_type in ("hybrid_qwen2", "hybrid_qwen3"):  # they look masks up by the layer's type
            inputs_embeds = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            mask = create_causal_mask(config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
                                      position_ids=position_ids, **{CACHE_NAME: cache})
            input_ids, attention_mask = None, {SOFTMAX: mask, LINEAR: None}
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                               inputs_embeds=inputs_embeds, use_cache=cache is not None,
                               logits_to_keep=logits_to_keep, **{CACHE_NAME: cache}, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if model_kwargs.get(CACHE_NAME) is not None:
            _put_states(model_kwargs[CACHE_NAME], self.config)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if model_kwargs.get(CACHE_NAME) is not None:
            _put_states(model_kwargs[CACHE_NAME], self.config)

    @property
    def _is_stateful(self):  # transformers then refuses decoding that takes tokens back
        return bool(linear_layers(self.config))

    def save_pretrained(self, save_directory, **kwargs):
        """Write config and safetensors into a folder; OSError, if that fails, leaves the folder as it was.

        Weights that an earlier save left under other names (shards, or one file) go once the new ones stand.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
            try:
                super().save_pretrained(temporary, **kwargs)
                follow_umask(f for f in list(Path(temporary).iterdir()) if f.is_file())
            except (OSError, SafetensorError) as error:
                raise OSError(f"could not save to {folder}: {error}; what was there is unchanged") from error
            order = {".safetensors": 0, ".json": 1}  # weights, then their index, last the config
            files = sorted(Path(temporary).iterdir(), key=lambda f: (f.name == "config.json", order.get(f.suffix, 2)))
            names = {file.name for file in files}
            old = {file for file in folder.iterdir() if _WEIGHTS.fullmatch(file.name) and file.name not in names}
            for file in files[:-1]:
                os.replace(file, folder / file.name)
            for file in sorted(old, reverse=True):  # an index before the shards that it names
                file.unlink()
            os.replace(files[-1], folder / files[-1].name)


@dataclass(kw_only=True)
class _HybridFields:
    """What a hybrid's config says beyond its family's: the mixer, its weights, and the teacher it came from."""

    mixer: str = "gdn"
    layer_types: list[str] | None = None
    mixer_qkv_bias: bool = False
    mixer_o_bias: bool = False
    mixer_qk_norm: bool = False
    kv_transfer: str = "repeat_heads"
    teacher_name: str | None = None
    teacher_revision: str | None = None


class HybridLlamaConfig(_HybridFields, LlamaConfig):
    model_type = "hybrid_llama"


class HybridMistralConfig(_HybridFields, MistralConfig):
    model_type = "hybrid_mistral"


class HybridQwen2Config(_HybridFields, Qwen2Config):
    model_type = "hybrid_qwen2"
    head_dim: int | None = None
    mixer_qkv_bias: bool = True


class HybridQwen3Config(_HybridFields, Qwen3Config):
    model_type = "hybrid_qwen3"
    mixer_qk_norm: bool = True


class HybridLlamaForCausalLM(_HybridModel, LlamaForCausalLM):
    config_class = HybridLlamaConfig


class HybridMistralForCausalLM(_HybridModel, MistralForCausalLM):
    config_class = HybridMistralConfig


class HybridQwen2ForCausalLM(_HybridModel, Qwen2ForCausalLM):
    config_class = HybridQwen2Config


class HybridQwen3ForCausalLM(_HybridModel, Qwen3ForCausalLM):
    config_class = HybridQwen3Config


HYBRIDS = {"llama": HybridLlamaForCausalLM, "mistral": HybridMistralForCausalLM,
           "qwen2": HybridQwen2ForCausalLM, "qwen3": HybridQwen3ForCausalLM}
for _model in HYBRIDS.values():
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModelForCausalLM.register(_model.config_class, _model)


def softmax_layers(config: PreTrainedConfig) -> tuple[int, ...]:
    """Return the indices of the layers that keep softmax attention, ascending."""
    return tuple(l for l, kind in enumerate(config.layer_types) if kind == SOFTMAX)


def linear_layers(config: PreTrainedConfig) -> tuple[int, ...]:
    """Return the indices of the layers that hold a linear mixer, ascending."""
    return tuple(l for l, kind in enumerate(config.layer_types) if kind == LINEAR)


def cache_memory(cache: Cache) -> dict[str, int]:
    """Count a cache's bytes: {"full_attention": bytes, "linear_attention": bytes}. ValueError for no cache."""
    if not isinstance(cache, Cache):
        raise ValueError(f"cache is a {type(cache).__name__}; give the past_key_values that a model returned")
    sizes = {SOFTMAX: 0, LINEAR: 0}
    for layer in cache.layers:
        linear = isinstance(layer, LinearAttentionLayer)
        tensors = layer.recurrent_states.values() if linear else (layer.keys, layer.values)
        sizes[LINEAR if linear else SOFTMAX] += sum(x.nbytes for x in tensors if x is not None)
    return sizes


def check_layers(layers: Iterable[int], num_layers: int) -> tuple[int, ...]:
    """Return `layers` ascending; ValueError unless they are different whole numbers from 0 to `num_layers` - 1."""
    layers = tuple(layers)
    for l in layers:
        if not isinstance(l, int) or isinstance(l, bool) or not 0 <= l < num_layers:
            raise ValueError(f"layers holds {l!r}; a layer index is a whole number from 0 to {num_layers - 1}")
        if layers.count(l) > 1:
            raise ValueError(f"layers={list(layers)} names layer {l} twice; each layer may be named once")
    return tuple(sorted(layers))


def linearize(teacher: PreTrainedModel, mixer: str = "gdn", *, seed: int = 0, kv_transfer: str = "repeat_heads",
              teacher_name: str | None = None, teacher_revision: str | None = None) -> PreTrainedModel:
    """Make an all-linear student of `teacher`: every attention layer becomes a mixer that starts from its weights.

    Parameters
    ----------
    teacher : a causal LM of transformers, of a family that `hybridlib.models.teachers.check_family` accepts.
    mixer : ``"gdn"`` or ``"gla"``.
    seed : of the weights that attention has no counterpart for (decay, beta, output gate).
    kv_transfer : how grouped key/value heads are expanded, ``"repeat_heads"`` or, as in the paper, ``"repeat_rows"``.
    teacher_name, teacher_revision : entries of the config; those that `load_teacher` noted on the model if None.

    Returns a new model on the teacher's device, in its dtype. Source: paper section 3.
    """
    check_choice("mixer", mixer, tuple(MIXERS))
    check_choice("kv_transfer", kv_transfer, KV_TRANSFERS)
    check_family(teacher.config)
    attention = teacher.model.layers[0].self_attn
    settings = {"head_dim": attention.head_dim, "mixer": mixer, "kv_transfer": kv_transfer,
                 "layer_types": [LINEAR] * teacher.config.num_hidden_layers,
                 "mixer_qkv_bias": attention.q_proj.bias is not None, "mixer_o_bias": attention.o_proj.bias is not None,
                 "mixer_qk_norm": hasattr(attention, "q_norm"),
                 "teacher_name": teacher_name or getattr(teacher, "teacher_name", None),
                 "teacher_revision": teacher_revision or getattr(teacher, "teacher_revision", None)}
    student = _new_model(HYBRIDS[teacher.config.model_type], settings, teacher)
    generator = torch.Generator().manual_seed(seed)
    for layer, teacher_layer in zip(student.model.layers, teacher.model.layers):
        layer.self_attn.init_gates(generator)
        layer.self_attn.init_from_attention(teacher_layer.self_attn, kv_transfer)
    return student.eval()


def restore(student: PreTrainedModel, teacher: PreTrainedModel, layers: Iterable[int]) -> PreTrainedModel:
    """Copy `student`, with the teacher's softmax attention in `layers`; raises ValueError where these do not fit."""
    layers = check_layers(layers, student.config.num_hidden_layers)
    check_same_shape(student, teacher)
    kinds = [SOFTMAX if l in layers else kind for l, kind in enumerate(student.config.layer_types)]
    hybrid = _new_model(type(student), {"layer_types": kinds}, student)
    for l in range(hybrid.config.num_hidden_layers):
        source = teacher if l in layers else student
        hybrid.model.layers[l].self_attn.load_state_dict(source.model.layers[l].self_attn.state_dict())
    return hybrid.eval()


def load_hybrid(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
                teacher: Teacher | None = None) -> PreTrainedModel:
    """Load a hybrid that `save_pretrained` wrote; raises ValueError if it is damaged or not of `teacher`."""
    path, device = Path(path), check_device(device)
    with readable(f"path={str(path)!r}", "config.json", "give a folder that save_pretrained wrote"):
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    if not isinstance(config, _HybridFields):
        raise ValueError(f"{path} holds a model of type {config.model_type!r}, which is no hybrid; "
                         "load it with load_teacher")
    if teacher is not None and config.teacher_revision != teacher.revision:
        raise ValueError(f"{path} was distilled from teacher revision {config.teacher_revision}, "
                         f"but the teacher given is revision {teacher.revision}; load the matching teacher")
    return load_weights(AutoModelForCausalLM, path, str(path), exact=True, config=config,
                        dtype=dtype or config.dtype or torch.float32).to(device)


def _new_model(model_class, settings, like):
    """Make a `model_class` with the config of model `like` but for `settings`, and its weights where they fit."""
    parameter, own = next(like.parameters()), ("model_type", "architectures", "transformers_version")
    config = {k: v for k, v in like.config.to_dict().items() if k not in own}
    with torch.device(parameter.device):  # drawing weights that are then replaced takes seconds on a CPU
        model = model_class(model_class.config_class(**config | settings)).to(parameter.dtype)
    model.load_state_dict({k: v for k, v in like.state_dict().items() if ".self_attn." not in k}, strict=False)
    model.config._attn_implementation = like.config._attn_implementation
    model.generation_config = copy.deepcopy(like.generation_config)
    return model


def _put_states(cache, config):
    advice = "make it with DynamicCache(config=model.config)"
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"past_key_values is a {type(cache).__name__}, and hybrids take a DynamicCache; {advice}")
    kinds = [LINEAR if isinstance(layer, LinearAttentionLayer) else SOFTMAX for layer in cache.layers]
    if kinds != list(config.layer_types):
        linear = [l for l, kind in enumerate(kinds) if kind == LINEAR]
        raise ValueError(f"past_key_values has {len(kinds)} layers with linear ones at {linear}, but the model has "
                         f"{config.num_hidden_layers} with linear ones at {list(linear_layers(config))}; {advice}")
    for l in linear_layers(config):
        if not isinstance(cache.layers[l], MixerState):
            cache.layers[l] = MixerState()


def _cached_time(cache, config, batch):
    """Count the tokens that `cache` holds; ValueError unless its layers agree and fit `config` and the batch."""
    times = {layer.get_seq_length() for layer in cache.layers}
    if len(times) > 1:
        raise ValueError(f"past_key_values has layers of {min(times)} and of {max(times)} tokens (one of them was "
                         "cropped, or a forward pass broke off); start a new cache")
    for l, layer in enumerate(cache.layers if max(times) else ()):
        kind, heads, x = "keys", config.num_key_value_heads, layer.keys
        if isinstance(layer, MixerState):
            kind, heads, x = "a state", config.num_attention_heads, layer.state
        shape, expected = (*x.shape[:2], x.shape[-1]), (batch, heads, config.head_dim)
        if shape != expected:
            raise ValueError(f"past_key_values holds in layer {l} {kind} of (batch, heads, dim) = {shape}, but the "
                             f"inputs and the model need {expected}; give the cache that the same texts left")
    return max(times)


def check_same_shape(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise ValueError unless both have the same layers, width, heads and vocabulary."""
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        mine, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if mine != theirs:
            raise ValueError(f"teacher has {name}={theirs}, but the student has {mine}; give the student's own teacher")
