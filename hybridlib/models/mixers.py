"""The linear mixers that take attention's place, and how they start from its weights.

A mixer is called as a transformers decoder layer calls its ``self_attn``.

===================  ============================================================================================
paper                here
===================  ============================================================================================
q_t, k_t, v_t        ``q_proj``, ``k_proj``, ``v_proj``; grouped key/value heads are expanded to one a head
alpha_t, GDN         ``exp(log_decay)``, one a head: log_decay = -exp(A_log) * softplus(a_proj(x) + dt_bias)
alpha_t, GLA         ``exp(log_decay)``, one a key dimension: log_decay = logsigmoid(decay_proj(x)) / 16, of rank 16
beta_t               ``beta`` = sigmoid(b_proj(x))
S_t                  ``state``; while decoding, `MixerState` keeps it
output norm, gate    ``o_norm`` (RMSNorm over each head) times silu(``g_proj(x)``)
===================  ============================================================================================
"""

from __future__ import annotations

import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from hybridlib import kernels
from hybridlib.checks import check_choice
from hybridlib.kernels import fused, step

__all__ = ["GatedDeltaNet", "GatedLinearAttention", "KV_TRANSFERS", "MIXERS", "MixerState", "build_mixer"]

KV_TRANSFERS = ("repeat_heads", "repeat_rows")
# What transformers' models call their cache: "cache" from 5.24 on, "past_key_values" before.
CACHE_NAME = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def given_cache(past_key_values, cache, others: dict):
    """Return the cache that was given by either name, or None; ValueError for two, or one by a name in `others`."""
    for name, value in others.items():
        if isinstance(value, Cache) or (name in ("cache_params", "past_key_value", "layer_past") and value is not None):
            raise ValueError(f"{name} is a {type(value).__name__}; give a cache as past_key_values or cache")
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache were both given; give the cache by one of the two names")
    return cache if past_key_values is None else past_key_values


class MixerState(LinearAttentionLayer, CacheLayerMixin):
    """A mixer's layer of a transformers cache: `state` (batch, heads, key_dim, value_dim) after `num_tokens`."""

    is_compileable = False  # its count of tokens is a number, not a tensor

    def __init__(self):
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self)
        self.num_tokens = 0

    @property
    def state(self) -> torch.Tensor | None:
        return self.recurrent_states[0]

    def update_recurrent_state(self, recurrent_states, state_idx=0, num_tokens=1, **kwargs):
        """Take the state after `num_tokens` more tokens; nothing is written in place, so that gradients flow."""
        self.recurrent_states[0], self.device = recurrent_states, recurrent_states.device
        self.is_recurrent_states_initialized[0] = self.has_previous_state[0] = True
        self.num_tokens += num_tokens
        return recurrent_states

    def update(self, key_states, value_states, *args, **kwargs):
        raise ValueError("a linear layer's cache takes a state; make the cache with DynamicCache(config=model.config)")

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_tokens + query_length, 0  # (length, offset)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove} asks a linear layer to forget tokens; it cannot")

    def reset(self) -> None:
        self.__init__()


class _Mixer(nn.Module):
    """Projections, output norm and gate of both mixers.

    A subclass gives `operator`, the name of its function in `hybridlib.kernels`, `state_flops`, those of its recurrence
    for each entry of the state, `init_gates`, `gate_projections` and `mix`. `backend` is one of `hybridlib.kernels`.
    """

    operator: str
    state_flops: int

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(width, inner, bias=config.mixer_qkv_bias) for _ in range(3))
        if config.mixer_qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.g_proj = nn.Linear(width, inner, bias=False)
        self.o_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.o_proj = nn.Linear(inner, width, bias=config.mixer_o_bias)
        self.backend = "auto"

    def forward(self, hidden_states, padding_mask=None, past_key_values=None, cache=None, **kwargs):
        """Mix `hidden_states` (batch, time, width) along time; returns (output of the same shape, None).

        `padding_mask` (batch, time) is 0 at padding, which then neither enters nor decays the state. `past_key_values`
        or `cache` (one of them) has this layer's `MixerState`; by another name a cache is a ValueError. A decoder
        layer's attention mask and positions are ignored.
        """
        cache = given_cache(past_key_values, cache, kwargs)
        state = None if cache is None else self._cached(cache)
        q, k, v, g, *gates = self.project(hidden_states)
        o, state = self.mix(q, k, v, *gates, padding_mask, state)  # o: (batch, time, heads, head_dim)
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx, num_tokens=hidden_states.shape[1])
        return self.o_proj(self.gate_output(o, g)), None

    def project(self, hidden_states):
        """Return q, k, v and the output's gate, (batch, time, heads, head_dim) each, and the operator's raw gates."""
        parts = (self.q_proj, self.k_proj, self.v_proj, self.g_proj, *self.gate_projections())
        q, k, v, g, *gates = _project(hidden_states, parts)
        q, k, v, g = (self._heads(x) for x in (q, k, v, g))
        if hasattr(self, "q_norm"):
            q, k = _normed(self.q_norm, q), _normed(self.k_norm, k)
        return q, k, v, g, *gates

    def gate_output(self, o, g):
        """Normalise the operator's output head by head and gate it: (batch, time, heads * head_dim)."""
        norm = self.o_norm
        if o.shape[1] == 1 and norm.weight.shape == o.shape[-1:] and fused.takes_step(
                self.backend, norm.weight.shape, o, g, norm.weight):
            return fused.gated_norm(o[:, 0], g[:, 0], norm.weight, norm.eps).flatten(1)[:, None]
        return (_normed(norm, o) * F.silu(g)).flatten(2)

    def _cached(self, cache):
        layer = cache.layers[self.layer_idx]
        if not isinstance(layer, MixerState):
            raise ValueError(f"past_key_values has a {type(layer).__name__} for linear layer {self.layer_idx}, which "
                             "needs a MixerState; call the hybrid itself, or its .model with use_cache=False")
        return layer.state

    def _run(self, inputs, state):
        """Return (output, state) of `inputs`, (batch, time, heads, ...) each, by a step where one token is added."""
        if state is None or inputs[0].shape[1] > 1:
            return getattr(kernels, self.operator)(*inputs, initial_state=state, backend=self.backend)
        o, state = getattr(step, self.operator)(*(x[:, 0] for x in inputs), state, backend=self.backend)
        return o[:, None], state

    def _heads(self, x):
        return x.unflatten(-1, (self.num_heads, self.head_dim))  # (batch, time, heads * dim) -> (.., heads, dim)

    @torch.no_grad()
    def init_from_attention(self, attention: nn.Module, kv_transfer: str = "repeat_heads") -> None:
        """Copy the q, k, v and o weights, biases and q/k norms of a softmax attention layer.

        Grouped keys and values are expanded by repeating whole heads, so that every query head gets those it reads in
        the teacher. ``kv_transfer="repeat_rows"`` repeats single rows and leaves biases at zero, as the paper's code.
        """
        groups = self.k_proj.out_features // attention.k_proj.out_features
        for mine, theirs, repeats in ((self.q_proj, attention.q_proj, 1), (self.k_proj, attention.k_proj, groups),
                                      (self.v_proj, attention.v_proj, groups), (self.o_proj, attention.o_proj, 1)):
            mine.weight.copy_(self._expand(theirs.weight, repeats, kv_transfer))
            if mine.bias is not None:
                mine.bias.zero_()
                if kv_transfer == "repeat_heads":
                    mine.bias.copy_(self._expand(theirs.bias, repeats, kv_transfer))
        if hasattr(self, "q_norm"):
            self.q_norm.weight.copy_(attention.q_norm.weight)
            self.k_norm.weight.copy_(attention.k_norm.weight)

    def _expand(self, weight, repeats, kv_transfer):
        if repeats == 1:
            return weight
        if kv_transfer == "repeat_rows":
            return weight.repeat_interleave(repeats, 0)
        return weight.unflatten(0, (-1, self.head_dim)).repeat_interleave(repeats, 0).flatten(0, 1)


class GatedDeltaNet(_Mixer):
    """Gated delta rule mixer (arXiv 2412.06464, eq. 10), as the paper distils into it: without a short convolution."""

    operator = "gated_delta_rule"
    state_flops = 7  # decay 1, reading what is stored under the key 2, writing 2, reading 2

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.a_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.b_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(self.num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.num_heads))

    @torch.no_grad()
    def init_gates(self, generator: torch.Generator) -> None:
        """Draw the gates' start: A uniform in (0, 16), step log-uniform in 0.001 to 0.1 (Mamba-2, as GDN does)."""
        for proj in (self.a_proj, self.b_proj, self.g_proj):
            _init_linear(proj, generator)
        self.A_log.copy_(torch.empty(self.num_heads).uniform_(1e-3, 16, generator=generator).log())
        step = torch.empty(self.num_heads).uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def gate_projections(self):
        return self.a_proj, self.b_proj

    def mix(self, q, k, v, a, b, padding_mask, state):
        q, k, v, log_decay, beta = kernels.delta_rule_inputs(q, k, v, a, b, self.A_log, self.dt_bias, self.backend)
        if padding_mask is not None:
            keep = padding_mask[..., None].to(beta.dtype)
            beta, log_decay = beta * keep, log_decay * keep
        return self._run((q, k, v, log_decay, beta), state)


class GatedLinearAttention(_Mixer):
    """Gated linear attention mixer (arXiv 2312.06635, eq. 3 and section 4.4), with no feature map on q and k."""

    operator = "gated_linear_attention"
    state_flops = 5  # decay 1, writing 2, reading 2

    def __init__(self, config, layer_idx: int, rank: int = 16, temperature: float = 16.0):
        super().__init__(config, layer_idx)
        inner = self.num_heads * self.head_dim
        self.decay_proj = nn.Sequential(nn.Linear(config.hidden_size, rank, bias=False), nn.Linear(rank, inner))
        self.temperature = temperature

    @torch.no_grad()
    def init_gates(self, generator: torch.Generator) -> None:
        """Draw the gates' start: Xavier-uniform weights, zero bias."""
        for proj in (*self.decay_proj, self.g_proj):
            _init_linear(proj, generator)

    def gate_projections(self):
        return self.decay_proj[:1]

    def mix(self, q, k, v, low_rank, padding_mask, state):
        log_decay = self._heads(F.logsigmoid(self.decay_proj[1](low_rank).float()) / self.temperature)
        if padding_mask is not None:
            keep = padding_mask[..., None, None].to(k.dtype)
            k, log_decay = k * keep, log_decay * keep
        return self._run((q, k, v, log_decay), state)


MIXERS = {"gdn": GatedDeltaNet, "gla": GatedLinearAttention}


def build_mixer(name: str, config, layer_idx: int) -> _Mixer:
    """Make a mixer of one layer by name, ``"gdn"`` or ``"gla"``. Raises ValueError if the name is unknown."""
    check_choice("mixer", name, tuple(MIXERS))
    return MIXERS[name](config, layer_idx)


def _project(x, linears):
    """Apply each of `linears` to x (batch, time, width), in one product where the tokens are enough to pay for it."""
    if x.shape[0] * x.shape[1] < 64:
        return [linear(x) for linear in linears]
    sizes, like = [linear.out_features for linear in linears], linears[0].weight
    rest = -sum(sizes) % 64  # GPUs want aligned rows
    stack, width = like.shape[:-2], like.shape[-1]
    weight = torch.cat([*(linear.weight for linear in linears), like.new_zeros(*stack, rest, width)], -2)
    bias = None
    if any(linear.bias is not None for linear in linears):
        bias = torch.cat([*(like.new_zeros(*stack, linear.out_features) if linear.bias is None else linear.bias
                            for linear in linears), like.new_zeros(*stack, rest)], -1)
    product = getattr(linears[0], "product", F.linear)  # stacked weights bring their own
    return product(x, weight, bias).split([*sizes, rest], -1)[:len(sizes)]


def _normed(norm, x):
    """Apply `norm` to `x` in the norm's own precision, which under autocast is wider than that of `x`."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)


def _init_linear(linear, generator):
    bound = 2 ** -2.5 * (6 / (linear.in_features + linear.out_features)) ** 0.5  # Xavier, GDN's gain
    linear.weight.copy_(torch.empty(linear.weight.shape).uniform_(-bound, bound, generator=generator))
    if linear.bias is not None:
        linear.bias.zero_()
