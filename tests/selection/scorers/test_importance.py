"""Scores: what is measured, in which direction, on an independent recomputation; refusals."""

from __future__ import annotations

import pytest
import torch

import hybridlib as hl


def plain_kl(model, teacher, rows):
    p = teacher(input_ids=rows.long()).logits.double().log_softmax(-1)
    q = model(input_ids=rows.long()).logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("direction", ["add", "remove"])
def test_untrained_scores_are_the_kl_of_each_candidate(aligned, tiny_tokens, direction):
    student, teacher = aligned
    scores = hl.score_layers(student, teacher, tiny_tokens, direction=direction, num_tokens=0)
    for layer in range(3):
        kept = [layer] if direction == "add" else [m for m in range(3) if m != layer]
        kl = plain_kl(hl.restore(student, teacher, kept).eval(), teacher, tiny_tokens.heldout)
        assert scores.measured[layer] == pytest.approx(kl, rel=1e-4)
        assert scores.values[layer] == (-scores.measured[layer] if direction == "add" else scores.measured[layer])
    assert scores.tokens == 0


@pytest.mark.parametrize("normalize", [True, False])
def test_stage_one_error_is_that_of_each_layer(aligned, tiny_tokens, normalize):
    student, teacher = aligned
    scores = hl.score_layers(student, teacher, tiny_tokens, metric="mse", normalize=normalize)
    states = teacher(input_ids=tiny_tokens.heldout.long(), output_hidden_states=True).hidden_states
    for l, layer in enumerate(teacher.model.layers):
        x = layer.input_layernorm(states[l])
        positions = teacher.model.rotary_emb(x, torch.arange(16)[None])
        y = layer.self_attn(hidden_states=x, position_embeddings=positions, attention_mask=None)[0].double()
        error = (student.model.layers[l].self_attn(x)[0].double() - y).square().mean((1, 2))
        expected = (error / y.square().mean((1, 2)) if normalize else error).mean().item()
        assert scores.values[l] == pytest.approx(expected, rel=1e-4)


def test_ranking_is_best_first_with_ties_to_the_lower_index():
    scores = hl.LayerScores("add", "kl", (-3.0, -1.0, -2.0, -1.0), (3.0, 1.0, 2.0, 1.0), (0.0,) * 4, 0, 0.0)
    assert scores.ranking == (1, 3, 2, 0)


def test_bad_calls_are_refused(aligned, tiny_tokens):
    student, teacher = aligned
    for arguments, message in (({"direction": "up"}, "direction='up'"), ({"metric": "l1"}, "metric='l1'"),
                               ({"num_tokens": -1}, "num_tokens=-1"),
                               ({"metric": "mse", "direction": "remove"}, "only direction='add'")):
        with pytest.raises(ValueError, match=message):
            hl.score_layers(student, teacher, tiny_tokens, **arguments)
    with pytest.raises(ValueError, match="all-linear student"):
        hl.score_layers(hl.restore(student, teacher, [0]), teacher, tiny_tokens)
