"""Mixers: their formula spelled out in float64, a token at a time; causality; starting values."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import hybridlib as hl


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.fixture
def mixer_and_input(tiny_teacher):
    def make(name, family="llama_tied_bias"):
        mixer = hl.linearize(tiny_teacher(family), name, seed=3).double().model.layers[1].self_attn
        return mixer, torch.randn(2, 11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return make


@pytest.mark.parametrize("family", ["llama_tied_bias", "qwen3"])
@pytest.mark.parametrize("name", ["gdn", "gla"])
def test_a_mixer_is_its_equation(mixer_and_input, name, family):
    mixer, x = mixer_and_input(name, family)
    heads, dim = mixer.num_heads, mixer.head_dim
    q, k, v, gate = (p(x).view(2, 11, heads, dim) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj))
    if family == "qwen3":
        q, k = rms(q, mixer.q_norm.weight, 1e-6), rms(k, mixer.k_norm.weight, 1e-6)
    state, outputs = torch.zeros(2, heads, dim, dim, dtype=torch.float64), []
    if name == "gdn":
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        alpha = torch.exp(-mixer.A_log.exp() * F.softplus(mixer.a_proj(x) + mixer.dt_bias))
        beta = torch.sigmoid(mixer.b_proj(x))
    else:
        alpha = torch.sigmoid(mixer.decay_proj(x)).pow(1 / 16).view(2, 11, heads, dim)
    for t in range(11):
        if name == "gdn":
            state = alpha[:, t, :, None, None] * state
            written = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], written)
        else:
            state = alpha[:, t, :, :, None] * state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) / dim**0.5)
    o = rms(torch.stack(outputs, 1), mixer.o_norm.weight, 1e-6) * F.silu(gate)
    expected = mixer.o_proj(o.flatten(2))
    torch.testing.assert_close(mixer(hidden_states=x)[0], expected, rtol=1e-5, atol=1e-6)  # gates are float32 inside


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", ["gdn", "gla"])
def test_half_precision_stays_near_float32(tiny_teacher, name, family, recwarn):
    mixer = hl.linearize(tiny_teacher(family), name, seed=3).model.layers[1].self_attn
    x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))
    expected = mixer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = mixer(x)[0]
    assert got.dtype == torch.bfloat16 and (got - expected).norm() / expected.norm() < 2e-2
    assert not [w for w in recwarn if "dtype" in str(w.message)]


def test_the_same_seed_gives_the_same_student_and_another_seed_other_gates(tiny_teacher):
    a, b, c = (hl.linearize(tiny_teacher(), seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    differ = {k.rsplit("self_attn.", 1)[-1] for k in a if not torch.equal(a[k], c[k])}
    assert differ == {"a_proj.weight", "b_proj.weight", "g_proj.weight", "A_log", "dt_bias"}


def test_gdn_starts_with_steps_between_a_thousandth_and_a_tenth(tiny_teacher):
    mixer = hl.linearize(tiny_teacher(), "gdn").model.layers[0].self_attn
    step = F.softplus(mixer.dt_bias)
    assert ((step > 0.99e-3) & (step < 1.01e-1)).all()
    assert (mixer.A_log < math.log(16)).all()


def test_a_cache_without_a_mixer_state_is_refused(tiny_teacher):
    teacher = tiny_teacher()
    hybrid = hl.restore(hl.linearize(teacher), teacher, [0])
    with pytest.raises(ValueError, match="LinearAttentionLayer for linear layer 1, .* with use_cache=False"):
        hybrid.model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=True)
