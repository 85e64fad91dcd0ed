"""Scores from ablations: hand-edited teachers, plain recomputations, layers known to carry nothing or recall."""

from __future__ import annotations

import copy
import json
from functools import partial
from itertools import combinations

import pytest
import torch

import hybridlib as hl
from hybridlib.distill.choice import ChoiceTask, generate_choices
from hybridlib.distill.corpus import Tokens
from hybridlib.distill.recall import RecallTask, encode_recall, generate_recall, score_recall
from hybridlib.selection.scorers import ablation
from hybridlib.selection.scorers.ablation import (HALO_CAP, ablate, halo_values, score_associative_recall, score_halo,
                                                  score_perplexity)
from hybridlib.selection.scorers.speculative import (acceptance, draft_cost, maximize_over_sets, score_acceptance,
                                                     search_skips, throughput)

FAMILIES = ("llama", "llama_tied_bias", "qwen2", "qwen3", "mistral")


def silenced(teacher, layers):
    """A copy whose output projections are zero, in float64."""
    model = copy.deepcopy(teacher).double()
    for l in layers:
        for p in model.model.layers[l].self_attn.o_proj.parameters():
            p.zero_()
    return model


def log_probs(model, rows):
    return model(input_ids=rows.long()).logits.double().log_softmax(-1)


def plain_nats(model, rows):
    return -log_probs(model, rows)[:, :-1].gather(-1, rows[:, 1:, None].long()).mean().item()


@pytest.fixture(scope="module")
def lab():
    return hl.load_teacher("lab", device="cpu")


@pytest.fixture(scope="module")
def lab_tokens(lab):
    text = hl.load_tokens("lab", lab.tokenizer, context=128, max_tokens=6_400, heldout_tokens=1024)
    return Tokens(text.train, text.heldout, lab.tokenizer, text.source)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [(0,), (1, 2), ()])
def test_ablation_is_a_zero_output_projection_and_is_undone(tiny_teacher, tiny_tokens, family, layers):
    teacher, ids = tiny_teacher(family), tiny_tokens.heldout[:2].long()
    before = teacher(input_ids=ids).logits
    with pytest.raises(ZeroDivisionError), ablate(teacher, layers):
        ablated = teacher(input_ids=ids).logits
        cached = teacher.generate(ids, max_new_tokens=4, do_sample=False)
        raise ZeroDivisionError
    by_hand = silenced(teacher, layers)
    torch.testing.assert_close(ablated.double(), by_hand(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(cached, by_hand.generate(ids, max_new_tokens=4, do_sample=False))
    assert torch.equal(teacher(input_ids=ids).logits, before)
    assert not any(layer.self_attn._forward_hooks for layer in teacher.model.layers)
    assert bool(layers) != torch.equal(ablated, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_score_is_the_plain_rise_in_float64(tiny_teacher, tiny_tokens, family):
    teacher, rows = tiny_teacher(family), tiny_tokens.heldout
    scores = score_perplexity(teacher, tiny_tokens, batch_tokens=48)
    intact, *without = (torch.tensor([plain_nats(silenced(teacher, layers), r[None]) for r in rows])
                        for layers in ([], [0], [1], [2]))
    rises = torch.stack(without) - intact
    assert scores.values == pytest.approx(rises.mean(1).tolist(), rel=1e-4, abs=1e-5)
    assert scores.stderr == pytest.approx((rises.std(1) / len(rows) ** 0.5).tolist(), rel=1e-3)
    assert (scores.direction, scores.metric, scores.tokens) == ("remove", "ppl", 0)
    assert (scores.cost.forward_tokens, scores.cost.passes) == (4 * rows.numel(), 4)


def test_acceptance_of_two_classes_in_closed_form():
    p, q = torch.tensor([[0.9, 0.1], [0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.0, 1.0]])
    torch.testing.assert_close(acceptance(p.log(), q.log()), torch.tensor([0.7, 1.0, 0.0]))


def test_throughput_is_what_drafting_gives():
    assert throughput(0.8, 0.1, 3) == pytest.approx((1 - 0.8 ** 4) / (0.2 * 1.3))
    assert throughput(1.0, 0.5, 4) == pytest.approx(5 / 3) and throughput(0.0, 0.0, 4) == 1
    generator = torch.Generator().manual_seed(0)
    runs = (torch.rand(100_000, 3, generator=generator) < 0.8).int().cumprod(-1).sum(-1) + 1  # until the first refusal
    assert throughput(0.8, 0.1, 3) == pytest.approx(runs.float().mean().item() / 1.3, rel=0.01)


def test_a_draft_costs_the_weights_that_it_reads(tiny_teacher):
    for family in ("qwen2", "qwen2_tied"):  # the tied head is read too
        attention = 32 * (32 + 16 + 16 + 32) + 32 + 16 + 16  # q, k, v, o and the biases of q, k, v
        total = 3 * (attention + 3 * 32 * 48 + 2 * 32) + 32 + 64 * 32
        assert draft_cost(tiny_teacher(family), [0, 2]) == pytest.approx(1 - 2 * attention / total)
    assert draft_cost(tiny_teacher("llama"), []) == 1


def test_acceptance_score_is_the_plain_overlap(tiny_teacher, tiny_tokens):
    teacher, rows = tiny_teacher("mistral"), tiny_tokens.heldout
    scores = score_acceptance(teacher, tiny_tokens, batch_tokens=32)
    p = log_probs(silenced(teacher, ()), rows).exp()
    for l in range(3):
        overlap = torch.minimum(p, log_probs(silenced(teacher, [l]), rows).exp()).sum(-1).mean().item()
        assert scores.measured[l] == pytest.approx(overlap, rel=1e-4)
        assert scores.values[l] == pytest.approx(1 - overlap, rel=1e-3)
    assert scores.metric == "rad" and scores.tokens == 0 and scores.cost.forward_tokens == 4 * rows.numel()


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_the_best_set_with_fewer_trials_than_all(seed):
    weights = torch.rand(10, generator=torch.Generator().manual_seed(seed)).tolist()
    tried = []

    def value(chosen):
        tried.append(chosen)
        return sum(weights[l] for l in chosen) - 0.5 * (0 in chosen and 1 in chosen)

    every = {s: value(s) for s in combinations(range(10), 4)}
    tried.clear()
    best, found = maximize_over_sets(value, 10, 4, evaluations=50, seed=seed)
    assert best == max(every, key=every.get) and found == every[best]
    assert len(set(tried)) == len(tried) == 50 < len(every)
    again = maximize_over_sets(value, 10, 4, evaluations=50, seed=seed)
    assert again == (best, found) and tried[:50] == tried[50:]


@pytest.mark.parametrize("size, sets", [(0, 1), (2, 6), (4, 1)])
def test_a_search_over_few_sets_tries_each_once(size, sets):
    tried = []
    best, found = maximize_over_sets(lambda s: tried.append(s) or -sum(s), 4, size, first=range(size))
    assert best == tuple(range(size)) and len(tried) == len(set(tried)) == sets


def test_skips_found_are_those_of_an_exhaustive_search(tiny_teacher, tiny_tokens):
    teacher, rows = tiny_teacher("llama", layers=5), tiny_tokens.heldout
    found = search_skips(teacher, tiny_tokens, 2, evaluations=10, gamma=3)
    p = log_probs(teacher, rows).exp()
    overlap = {s: torch.minimum(p, log_probs(silenced(teacher, s), rows).exp()).sum(-1).mean().item()
               for s in combinations(range(5), 3)}
    skipped = max(overlap, key=overlap.get)
    assert found.layers == tuple(l for l in range(5) if l not in skipped) and found.evaluations == 10
    assert found.acceptance == pytest.approx(overlap[skipped], rel=1e-4)
    assert found.throughput == pytest.approx(throughput(overlap[skipped], draft_cost(teacher, skipped), 3), rel=1e-4)
    assert found.cost.forward_tokens == (2 + 5 + 10) * rows.numel() and found.cost.passes == 2 + 5 + 10
    assert found.scores.values == score_acceptance(teacher, tiny_tokens).values
    assert search_skips(teacher, tiny_tokens, 1.0).acceptance == pytest.approx(1)


def test_halo_values_by_hand_with_the_cap():
    recall, sense = [1.0, 0.2, 0.9, 0.5], [0.30, 0.40, 0.38, 0.30]
    assert halo_values(recall, sense) == pytest.approx([0, HALO_CAP, 0.1 / 0.02, 0.5 / 0.1])


def test_halo_measures_each_replaced_layer(lab, lab_tokens, monkeypatch):
    student, task, sense = hl.linearize(lab.model).train(), RecallTask("needle", pairs=4), ChoiceTask(6, 3, 4, 20)
    before = {n: p.clone() for n, p in [*student.named_parameters(), *lab.model.named_parameters()]}
    examples, rows = generate_recall(task, 12), lab_tokens.heldout[:2].long()
    monkeypatch.setattr(ablation, "HALO_CAP", 2.0)
    scores = score_halo(student, lab.model, Tokens(lab_tokens.train, rows, lab.tokenizer), task, num_examples=12,
                        sense=sense, batch_tokens=100)
    recall, chance, right = [], [], []
    for l in range(8):
        replaced = hl.restore(student, lab.model, [m for m in range(8) if m != l]).eval()
        recall.append(score_recall(replaced, lab.tokenizer, examples).exact_match)
        nats = [[sum(log_probs(replaced, option[None])[0, t - 1, option[t]].item() for t in range(20, 24))
                 for option in options] for options in generate_choices(rows, sense)]
        chance.append(sum(torch.tensor(n, dtype=torch.float64).softmax(0)[0].item() for n in nats) / 6)
        right.append(sum(n[0] == max(n) for n in nats) / 6)
    assert scores.measured == pytest.approx(recall) and len(set(chance)) == 8
    figures = scores.figures
    assert figures["sense"] == pytest.approx(chance, abs=1e-6) and figures["sense_accuracy"] == pytest.approx(right)
    assert scores.values == halo_values(recall, figures["sense"])
    assert 0 < figures["at_cap"] == sum(v == 2.0 for v in scores.values) and figures["items"] == 6
    assert hl.LayerScores.from_dict(json.loads(json.dumps(scores.to_dict()))) == scores
    prompts = sum(len(encode_recall(e, lab.tokenizer)[0]) for e in examples)
    assert scores.metric == "halo" and scores.cost.forward_tokens == 9 * prompts + 8 * 6 * (20 + 3 * 4)
    after = dict([*student.named_parameters(), *lab.model.named_parameters()])
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert student.training and not lab.model.training


def test_recall_is_lost_with_either_planted_layer_and_the_teacher_is_left(lab):
    task = RecallTask(pairs=6)
    before = {n: p.clone() for n, p in lab.model.named_parameters()}
    scores = score_associative_recall(lab.model, lab.tokenizer, task, num_examples=24)
    assert scores.metric == "ar" and set(scores.ranking[:3]) == {0, 1, 4}  # without layer 0, nothing works
    assert scores.measured == (0, 0, 1, 1, 0, 1, 1, 1)
    examples = generate_recall(task, 24)
    intact = score_recall(lab.model, lab.tokenizer, examples).exact_match
    for l in (1, 6):
        with ablate(lab.model, [l]):
            assert scores.measured[l] == score_recall(lab.model, lab.tokenizer, examples).exact_match
    lost = [intact - r for r in scores.measured]
    assert all(abs(v - x) < 0.5 / 24 for v, x in zip(scores.values, lost, strict=True))
    assert len(set(scores.values)) == 8  # ties in accuracy are ordered
    assert all(torch.equal(p, before[n]) for n, p in lab.model.named_parameters())
    task = RecallTask("variable_tracking", pairs=4, hops=2)
    scores = score_associative_recall(lab.model, lab.tokenizer, task, num_examples=16)
    assert scores.metric == "ar-mh" and {1, 4} < set(scores.ranking[:4])
    assert scores.measured[1] == scores.measured[4] == 0 and scores.measured[2] > 0.8


def test_recall_ties_follow_the_likelihood_lost(lab):
    task = RecallTask(pairs=6)
    scores = score_associative_recall(lab.model, lab.tokenizer, task, num_examples=4)
    likelihood = []
    for layers in [[], *([l] for l in range(8))]:
        nats = []
        with ablate(lab.model, layers), torch.no_grad():
            for example in generate_recall(task, 4):
                prompt, question, answer = (lab.tokenizer(text, add_special_tokens=False).input_ids
                                            for text in (example.prompt, *example.turns[0]))
                asked = [lab.tokenizer.bos_token_id, *prompt, *question]
                found = lab.model(input_ids=torch.tensor([asked + answer])).logits[0].double().log_softmax(-1)
                nats.append(sum(found[len(asked) - 1 + i, t].item() for i, t in enumerate(answer)) / len(answer))
        likelihood.append(sum(nats) / 4)
    for l in range(8):
        lost = likelihood[0] - likelihood[1 + l]
        rest = scores.values[l] - (1 - scores.measured[l])
        assert rest == pytest.approx(lost / (2 + 2 * abs(lost)) / 4, abs=1e-4)


def test_bad_calls_are_refused_and_so_is_a_teacher_at_chance(tiny_teacher, tiny_tokens, lab, lab_tokens):
    teacher, hard = tiny_teacher("llama"), RecallTask("multi_hop", pairs=8, hops=2)
    student, recall = hl.linearize(teacher), partial(score_associative_recall, lab.model, lab.tokenizer)
    for call, message in (
            (lambda: recall(hard, num_examples=24), r"name='multi_hop', pairs=8.* is beyond the teacher.*easier task"),
            (lambda: recall(RecallTask("multi_hop", pairs=4, hops=2)), r"answers 0.245 of 200 .* 0.3 or less tells"),
            (lambda: score_halo(hl.linearize(lab.model), lab.model, lab_tokens, hard, num_examples=24), "is beyond"),
            (lambda: recall(num_examples=0), "num_examples=0"),
            (lambda: recall(RecallTask(pairs=512), num_examples=1), "teacher's context is 1024; use fewer pairs"),
            (lambda: ablate(teacher, [3]).__enter__(), "layers holds 3; a layer index is a whole number from 0 to 2"),
            (lambda: score_perplexity(teacher, tiny_tokens, batch_tokens=0), "batch_tokens=0 is not a whole number"),
            (lambda: search_skips(teacher, tiny_tokens, 4), "budget=4 is not a count from 1 to 3"),
            (lambda: search_skips(teacher, tiny_tokens, 1, gamma=0), "gamma=0"),
            (lambda: search_skips(teacher, tiny_tokens, 1, evaluations=0), "evaluations=0"),
            (lambda: score_halo(hl.restore(student, teacher, [0]), teacher, tiny_tokens), "student has softmax")):
        with pytest.raises(ValueError, match=message):
            call()
