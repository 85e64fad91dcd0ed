"""A cache works by either name that transformers gives it, and by no other."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import hybridlib as hl
from hybridlib.models.branches import GatedAttention
from hybridlib.models.mixers import MIXERS, MixerState

NAMES = ["past_key_values", "cache"]


def hidden(time=6):
    return torch.randn(2, time, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=sorted(MIXERS))
def hybrid(request, tiny_teacher):
    teacher = tiny_teacher()
    return hl.restore(hl.linearize(teacher, request.param), teacher, [1]).eval().requires_grad_(False)


def empty(model):
    cache = DynamicCache(config=model.config)
    cache.layers[0] = MixerState()
    return cache


@pytest.mark.parametrize("name", NAMES)
def test_a_mixer_keeps_its_state_in_a_cache_of_either_name(hybrid, name):
    mixer, x, cache = hybrid.model.layers[0].self_attn, hidden(), empty(hybrid)
    parts = [mixer(x[:, t:t + 1], **{name: cache})[0] for t in range(x.shape[1])]
    torch.testing.assert_close(torch.cat(parts, 1), mixer(x)[0], rtol=0, atol=1e-5)
    assert cache.layers[0].num_tokens == x.shape[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_hybrid_goes_on_from_a_cache_of_either_name(hybrid, name):
    text, cache = torch.arange(3, 23).view(2, 10), DynamicCache(config=hybrid.config)
    parts = [hybrid(input_ids=text[:, a:b], **{name: cache}).logits for a, b in ((0, 6), (6, 7), (7, 10))]
    torch.testing.assert_close(torch.cat(parts, 1), hybrid(input_ids=text).logits, rtol=0, atol=1e-4)


def test_a_cache_by_a_third_name_or_by_both_is_refused(hybrid):
    mixer, cache = hybrid.model.layers[0].self_attn, empty(hybrid)
    both = GatedAttention(mixer, copy.deepcopy(mixer))
    text = torch.arange(3, 9)[None]
    for call in (lambda **given: mixer(hidden(), **given), lambda **given: both(hidden(), **given),
                 lambda **given: hybrid(input_ids=text, **given)):
        with pytest.raises(ValueError, match="^memory is a DynamicCache; give a cache as past_key_values or cache$"):
            call(memory=cache)
        with pytest.raises(ValueError, match="^layer_past is a tuple; give"):
            call(layer_past=())
        with pytest.raises(ValueError, match="^past_key_values and cache were both given"):
            call(past_key_values=cache, cache=cache)
    assert cache.layers[0].num_tokens == 0
    for name in NAMES:
        with pytest.raises(ValueError, match=f"^{name} was given to a model of both branches"):
            both(hidden(), **{name: cache})
