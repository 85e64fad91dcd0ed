"""PostNAS: a placement is the hybrid of the same layers, training teaches all, the search finds the best measured."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

import hybridlib as hl
from hybridlib.distill.evaluate import heldout_kl
from hybridlib.models.branches import place
from hybridlib.selection.engine.candidates import distilled_kl
from hybridlib.selection.scorers.postnas import search_once_for_all, train_once_for_all

LAYERS, KEPT = 4, 2


@pytest.fixture(scope="module")
def aligned(tiny_teacher, tiny_tokens):
    teacher = tiny_teacher(layers=LAYERS)
    student = hl.linearize(teacher)
    hl.align(student, teacher, tiny_tokens, 1024, settings=hl.AlignSettings(batch_tokens=128, learning_rate=1e-2))
    return student, teacher


def settings(rate=1e-3, attention_rate=3e-3):
    return hl.MatchSettings(batch_tokens=64, learning_rate=rate, attention_learning_rate=attention_rate)


def test_without_learning_every_placement_is_its_hybrid_and_the_search_finds_the_best(aligned, tiny_tokens):
    student, teacher = aligned
    found = search_once_for_all(student, teacher, tiny_tokens, KEPT, 64, width=LAYERS, settings=settings(0.0, 0.0))
    measure = distilled_kl(student, teacher, tiny_tokens, num_tokens=0)
    for layers in [*combinations(range(LAYERS), 1), *combinations(range(LAYERS), KEPT)]:
        assert found.search.values[layers] == pytest.approx(measure(layers), rel=1e-4)
    assert found.layers == min(combinations(range(LAYERS), KEPT), key=measure)
    evaluations = LAYERS + 6
    assert found.cost.training_tokens == 64 and found.cost.passes == 2 + 2 * evaluations
    assert found.cost.forward_tokens == 64 + 2 * evaluations * tiny_tokens.heldout.numel()


def test_training_helps_every_placement_and_moves_nothing_but_the_branches(aligned, tiny_tokens):
    student, teacher = aligned
    before = [{n: p.clone() for n, p in model.named_parameters()} for model in (student, teacher)]
    model, history = train_once_for_all(student, teacher, tiny_tokens, KEPT, 4096, settings=settings())
    for old, new in zip(before, (student, teacher), strict=True):
        assert all(torch.equal(old[n], p) for n, p in new.named_parameters())
    for layers in combinations(range(LAYERS), KEPT):
        place(model, layers)
        untrained = hl.restore(student, teacher, layers)
        assert heldout_kl(model, teacher, tiny_tokens)[0] < heldout_kl(untrained, teacher, tiny_tokens)[0]
    after, branches = dict(model.named_parameters()), 0
    for l in range(LAYERS):
        for branch, own in (("linear", student), ("softmax", teacher)):
            weight = own.model.layers[l].self_attn.q_proj.weight
            branches += not torch.equal(after[f"model.layers.{l}.self_attn.{branch}.q_proj.weight"], weight)
    assert branches == 2 * LAYERS and history.tokens[-1] == 4096
    others = [n for n in after if ".self_attn." not in n]
    assert others and all(torch.equal(after[n], before[0][n]) for n in others)


def test_the_seed_draws_the_placements(aligned, tiny_tokens):
    student, teacher = aligned
    runs = [search_once_for_all(student, teacher, tiny_tokens, KEPT, 256, settings=settings(), seed=seed)
            for seed in (0, 0, 1)]
    assert runs[0].losses == runs[1].losses != runs[2].losses and runs[0].search == runs[1].search


def test_bad_input_is_refused(aligned, tiny_tokens):
    student, teacher = aligned
    for arguments, changes, message in (((0, 64), {}, "budget=0"), ((KEPT, 8), {}, "num_tokens=8"),
                                        ((KEPT, 64), {"width": 0}, "width=0"), ((KEPT, 64), {"seed": -1}, "seed=-1")):
        with pytest.raises(ValueError, match=f"^{message}"):
            search_once_for_all(student, teacher, tiny_tokens, *arguments, **changes)
    with pytest.raises(ValueError, match="softmax layers"):
        search_once_for_all(hl.restore(student, teacher, [0]), teacher, tiny_tokens, KEPT, 64)
    model, _ = train_once_for_all(student, teacher, tiny_tokens, KEPT, 64, settings=settings())
    with pytest.raises(ValueError, match="layers holds 4"):
        place(model, [4])
    with pytest.raises(ValueError, match="^past_key_values was given to a model of both branches"):
        model.model.layers[0].self_attn(torch.zeros(1, 2, 32), past_key_values=object())
