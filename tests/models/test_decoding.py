"""Decoding with a cache gives what computing every token from the whole text gives."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.conftest import FAMILIES
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

import hybridlib as hl
from hybridlib.bench.decoding import token_step
from hybridlib.models.mixers import MixerState
from hybridlib.models.passes import last_hidden


def ids(time=11, batch=2, seed=1):
    return torch.randint(3, 64, (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def hybrid(tiny_teacher):
    """make(family, mixer, layers): a hybrid in eval mode with softmax attention in `layers`."""
    def make(family="llama", mixer="gdn", layers=(1,)):
        teacher = tiny_teacher(family)
        return hl.restore(hl.linearize(teacher, mixer), teacher, layers).eval().requires_grad_(False)
    return make


def generate(model, prompt, mask=None, new=12, **kwargs):
    mask = torch.ones_like(prompt) if mask is None else mask
    settings = dict(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0) | kwargs
    return model.generate(input_ids=prompt, attention_mask=mask, **settings)


def both(model, prompt, mask=None, **kwargs):
    """Tokens written with the cache and without it; the forward passes with it saw each token once."""
    seen = []
    with model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1])):
        cached = generate(model, prompt, mask, use_cache=True, **kwargs)
    assert seen[0] == prompt.shape[1] and set(seen[1:]) == {1}
    return cached, generate(model, prompt, mask, use_cache=False, **kwargs)


@pytest.mark.parametrize("mixer", ["gdn", "gla"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_a_token_at_a_time_are_those_of_the_whole_text(hybrid, family, mixer):
    model, text = hybrid(family, mixer), ids(40)
    expected = model(input_ids=text).logits
    for first in (1, 33):  # from the first token; and after a prompt longer than one chunk
        out = model(input_ids=text[:, :first], use_cache=True)
        logits = [out.logits]
        for t in range(first, 40):
            out = model(input_ids=text[:, t:t + 1], past_key_values=out.past_key_values)
            logits.append(out.logits)
        assert (torch.cat(logits, 1) - expected).abs().max() < 1e-4
        assert out.past_key_values.get_seq_length() == 40


@pytest.mark.parametrize("mixer", ["gdn", "gla"])
@pytest.mark.parametrize("layers", [[], [0], [2], [0, 1, 2]])
def test_every_layout_decodes(hybrid, layers, mixer):
    model, prompt = hybrid("qwen3", mixer, layers), ids()
    assert torch.equal(*both(model, prompt))
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    assert torch.equal(*both(model, prompt, mask))


@pytest.mark.parametrize(("family", "mixer"), [*zip(FAMILIES, ["gdn", "gla"] * 3)])
def test_a_left_padded_batch_writes_what_each_prompt_alone_does(hybrid, family, mixer):
    model, prompts = hybrid(family, mixer), [ids(t, 1, seed=t) for t in (5, 37, 12)]
    width = max(p.shape[1] for p in prompts)
    padded = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts])
    mask = torch.stack([(torch.arange(width) >= width - p.shape[1]).long() for p in prompts])
    batch = both(model, padded, mask)
    assert torch.equal(*batch)
    for row, prompt in zip(batch[0], prompts):
        assert torch.equal(row[width:], generate(model, prompt)[0, prompt.shape[1]:])


@pytest.mark.parametrize(("family", "mixer"), [("llama", "gdn"), ("qwen2", "gla")])
def test_sampled_and_beam_searched_tokens_are_those_of_recomputing(hybrid, family, mixer):
    model, prompt = hybrid(family, mixer), ids()
    written = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        written.append(generate(model, prompt, do_sample=True, num_return_sequences=3, use_cache=use_cache))
    assert written[0].shape == (6, 23) and torch.equal(*written)
    for layers, count in (((1,), 2), ((), 4)):
        assert torch.equal(*both(hybrid(family, mixer, layers), prompt, num_beams=4, num_return_sequences=count))


@pytest.mark.parametrize("layers", [(), (0,)])
def test_a_text_longer_than_the_teachers_window_decodes(tiny_teacher, layers):
    teacher = tiny_teacher("mistral")
    teacher.config.sliding_window = 64
    model = hl.restore(hl.linearize(teacher), teacher, layers).eval()
    assert model.config.sliding_window == 64
    assert torch.equal(*both(model, ids(50), new=30))


@pytest.mark.parametrize("mixer", ["gdn", "gla"])
@pytest.mark.parametrize("layers", [(), (1,)])
def test_a_cache_takes_more_tokens_than_one(hybrid, layers, mixer):
    model, text = hybrid("qwen3", mixer, layers), ids(50)
    mask = torch.ones_like(text)
    mask[0, :5] = 0  # left padding
    mask[1, 30:32] = 0  # padding among the tokens that are added
    expected = model(input_ids=text, attention_mask=mask).logits
    cache, logits = DynamicCache(config=model.config), []
    for start, end in ((0, 10), (10, 45), (45, 46), (46, 50)):
        out = model(input_ids=text[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        assert out.past_key_values is cache
        logits.append(out.logits)
    assert ((torch.cat(logits, 1) - expected).abs().amax(-1) * mask).max() < 1e-4
    assert torch.equal(generate(model, text, mask, prefill_chunk_size=8), generate(model, text, mask))


@pytest.mark.parametrize("layers", [(), (1,)])
def test_generation_goes_on_from_a_cache_that_was_kept(hybrid, layers):
    model, text = hybrid(layers=layers), ids(20)
    cache = model(input_ids=text[:, :-4], use_cache=True).past_key_values
    expected = generate(model, text, use_cache=False)
    assert torch.equal(generate(model, text, past_key_values=copy.deepcopy(cache)), expected)
    assert cache.get_seq_length() == 16
    assert torch.equal(generate(model, text, past_key_values=DynamicCache(config=model.config)), expected)


@pytest.mark.parametrize("layers", [(), (1,)])
def test_a_cache_reorders_and_forgets_its_rows(hybrid, layers):
    model, text = hybrid(layers=layers), ids(21)
    expected = model(input_ids=text).logits[[1, 0], -1:]
    cache = model(input_ids=text[:, :-1], use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    got = model(input_ids=text[[1, 0], -1:], past_key_values=cache).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    if not layers:  # transformers keeps the keys of softmax layers
        cache.reset()
        assert cache.get_seq_length() == 0 and not cache.has_previous_state()
        got = model(input_ids=text[[1, 0]], past_key_values=cache).logits[:, -1:]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mixer", ["gdn", "gla"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_by_layer_type_is_the_closed_form_and_states_stay_float32(hybrid, mixer, dtype):
    model = hybrid("qwen3", mixer, [1]).to(dtype)  # 4 heads of 16, 2 key/value heads
    assert hl.cache_memory(DynamicCache(config=model.config)) == {"full_attention": 0, "linear_attention": 0}
    out = model(input_ids=ids(9, batch=3), use_cache=True)
    for time in (9, 10):
        cache = out.past_key_values
        assert cache.layers[0].state.dtype == torch.float32 and cache.layers[1].keys.dtype == dtype
        assert hl.cache_memory(cache) == {"full_attention": 2 * 1 * 3 * 2 * time * 16 * dtype.itemsize,
                                          "linear_attention": 2 * 3 * 4 * 16 * 16 * 4}
        out = model(input_ids=ids(1, batch=3), past_key_values=cache)


def test_memory_of_a_teachers_cache_is_all_softmax(tiny_teacher):
    cache = tiny_teacher("llama")(input_ids=ids(9), use_cache=True).past_key_values
    assert hl.cache_memory(cache) == {"full_attention": 2 * 3 * 2 * 2 * 9 * 8 * 4, "linear_attention": 0}
    with pytest.raises(ValueError, match="cache is a tuple; give the past_key_values"):
        hl.cache_memory(())


class Waits(TorchDispatchMode):
    """Counts what would make Python wait for a GPU: a number, or a shape, that depends on what a tensor holds."""

    def __init__(self):
        super().__init__()
        self.calls = self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        self.waits += str(function).startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mixer", [None, "gdn", "gla"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_step_gives_the_logits_of_the_whole_text_and_never_waits(tiny_teacher, hybrid, family, mixer):
    model, text = hybrid(family, mixer) if mixer else tiny_teacher(family), ids(40)
    expected = model(input_ids=text).logits[:, -1:]
    cache = model(input_ids=text[:, :-1], use_cache=True).past_key_values
    held = copy.deepcopy(cache)
    step = token_step(model, text[:, -1:], cache)
    with Waits() as seen:
        logits = step()
    assert seen.calls > 50 and seen.waits == 0
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    again = step()  # at the same position, and of a hybrid from a later state
    assert mixer or torch.equal(logits, again)
    assert cache.get_seq_length() == 39 and hl.cache_memory(cache) == hl.cache_memory(held)
    torch.testing.assert_close(model(input_ids=text[:, -1:], past_key_values=cache).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("mixer", ["gdn", "gla"])
def test_a_token_step_by_kernels_can_be_recorded(tiny_teacher, mixer):
    teacher, text = tiny_teacher("qwen3", head_dim=32).to("cuda"), ids(21).cuda()  # heads that kernels can read
    model = hl.restore(hl.linearize(teacher, mixer), teacher, [1]).requires_grad_(False)
    assert torch.equal(*both(model, text, new=30))
    cache = model(input_ids=text[:, :-1], use_cache=True).past_key_values
    expected = model(input_ids=text).logits[:, -1:]
    step = token_step(model, text[:, -1:], cache)
    torch.testing.assert_close(step(), expected, rtol=0, atol=1e-3)
    graph, step = torch.cuda.CUDAGraph(), token_step(model, text[:, -1:], cache)
    with torch.cuda.graph(graph):
        logits = step()
    graph.replay()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)


def test_no_cache_is_made_unless_asked_for(hybrid, monkeypatch):
    model = hybrid()
    monkeypatch.setattr(MixerState, "__init__", None)
    model(input_ids=ids()), last_hidden(model, ids()), generate(model, ids(), use_cache=False)


@pytest.mark.parametrize("mixer", ["gdn", "gla"])
def test_gradients_through_a_cache_are_those_of_the_whole_text(hybrid, mixer):
    model, text = hybrid(mixer=mixer).requires_grad_(True), ids(6)
    model(input_ids=text).logits[:, -1].square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    cache = model(input_ids=text[:, :4], use_cache=True).past_key_values
    for t in (4, 5):
        logits = model(input_ids=text[:, t:t + 1], past_key_values=cache).logits
    logits[:, -1].square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-3)


def test_wrong_caches_are_refused(hybrid, tiny_teacher):
    model, text = hybrid(), ids()

    def refused(cache, message, model=model, batch=2):
        with pytest.raises(ValueError, match=message):
            model(input_ids=text[:1].expand(batch, -1), past_key_values=cache)

    refused(((text, text),), "is a tuple, and hybrids take a DynamicCache; make it with")
    with pytest.raises(ValueError, match="is a list, and hybrids take a DynamicCache; make it with"):
        generate(model, text, past_key_values=[])
    refused(StaticCache(config=model.config, max_cache_len=32), "is a StaticCache, and hybrids take a DynamicCache")
    refused(DynamicCache(), r"0 layers .* the model has 3 with linear ones at \[0, 2\]; make it with")
    with pytest.raises(ValueError, match=r"3 layers with linear ones at \[\], but the model"):
        generate(model, text, past_key_values=tiny_teacher()(input_ids=text, use_cache=True).past_key_values)
    cache = model(input_ids=text, use_cache=True).past_key_values
    refused(cache, r"3 layers with linear ones at \[0, 2\], but the model has 3 with .* \[1, 2\]", hybrid(layers=[0]))
    refused(cache, r"layer 0 a state of .* = \(2, 4, 8\), but .* need \(2, 4, 16\)", hybrid("qwen3"))
    refused(cache, r"layer 0 a state of .* = \(2, 4, 8\), but .* need \(3, 4, 8\)", batch=3)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1\); with 11 tokens cached .* \(2, 12\)"):
        model(input_ids=text[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)


def test_tokens_cannot_be_taken_back_from_a_state(hybrid):
    model, text = hybrid(), ids()
    cache = model(input_ids=text, use_cache=True).past_key_values
    cache.crop(0)
    with pytest.raises(ValueError, match="tokens_to_remove=-2 asks a linear layer to forget"):
        cache.crop(-2)
    cache.layers[1].crop(-2)
    with pytest.raises(ValueError, match="layers of 9 and of 11 tokens .* start a new cache"):
        model(input_ids=text, past_key_values=cache)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generate(model, text[:1], prompt_lookup_num_tokens=2)
    written = generate(hybrid(layers=[0, 1, 2]), text[:1], prompt_lookup_num_tokens=2)
    assert torch.equal(written, generate(hybrid(layers=[0, 1, 2]), text[:1], use_cache=False))
