"""Gates: the corners are hybrids, slopes and curvatures are those of the plain KL, learned gates find the layers."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import hybridlib as hl
from hybridlib.models.branches import GatedAttention, both_branches, gated_model, set_gates
from hybridlib.selection.scorers.gates import GateSettings, gate_gradient, learned_gates

ROWS = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def all_in_float64(monkeypatch):
    """Norms and decays, which models compute in float32, in float64 too: differences then hold to many digits."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: self.weight * x * torch.rsqrt(
        x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def pair(tiny_teacher, family="llama", mixer="gdn", *, layers=3, other_weights=False):
    """(student, teacher) in float64; with `other_weights`, the student's MLPs are not the teacher's."""
    teacher = tiny_teacher(family, layers).double()
    student = hl.linearize(teacher, mixer, seed=0).eval()
    if other_weights:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for layer in student.model.layers:
                weight = layer.mlp.down_proj.weight
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return student, teacher


def plain_kl(model, teacher, skip=0):
    """KL of each row of ROWS from position `skip` on, by the formula, from logits: (rows,)."""
    with torch.no_grad():
        p, q = (m(input_ids=ROWS).logits[:, skip:].log_softmax(-1) for m in (teacher, model))
    return (p.exp() * (p - q)).sum(-1).mean(-1)


def kl_at(student, teacher, gates, skip=0):
    return plain_kl(gated_model(student, teacher, gates), teacher, skip)


def differences(student, teacher, at, skip=0, step=1e-4):
    """First and second derivative of each row's KL along each gate, from KL at five points, (layers, rows) each."""
    first, second = [], []
    for l in range(3):
        kl = {}
        for k in (-2, -1, 0, 1, 2):
            gates = torch.full((3,), at, dtype=torch.float64)
            gates[l] += k * step
            kl[k] = kl_at(student, teacher, gates, skip)
        first.append((8 * (kl[1] - kl[-1]) - (kl[2] - kl[-2])) / (12 * step))
        second.append((16 * (kl[1] + kl[-1]) - (kl[2] + kl[-2]) - 30 * kl[0]) / (12 * step**2))
    return torch.stack(first), torch.stack(second)


@pytest.mark.parametrize("family", ["llama", "llama_tied_bias", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize(("mixer", "attention"), [("gdn", "sdpa"), ("gla", "eager")])
def test_corners_are_the_student_and_the_restored_hybrids(tiny_teacher, family, mixer, attention):
    student, teacher = pair(tiny_teacher, family, mixer, other_weights=True)
    student.config._attn_implementation = teacher.config._attn_implementation = attention
    model = gated_model(student, teacher)
    for layers in ((), (0,), (1, 2), (0, 1, 2)):
        set_gates(model, torch.tensor([float(l in layers) for l in range(3)]))
        hybrid = hl.restore(student, teacher, layers).eval()
        assert torch.equal(model(input_ids=ROWS).logits, hybrid(input_ids=ROWS).logits)
    assert torch.equal(hl.restore(student, teacher, ()).eval()(input_ids=ROWS).logits, student(input_ids=ROWS).logits)


def test_a_layer_between_the_corners_mixes_its_two_branches(tiny_teacher):
    student, teacher = pair(tiny_teacher)
    seen = {}
    model = gated_model(student, teacher, torch.tensor([0.0, 0.3, 0.0]))
    model.model.layers[1].self_attn.register_forward_hook(lambda m, a, k, out: seen.update(k, out=out[0]),
                                                          with_kwargs=True)
    model(input_ids=ROWS)
    x = seen["hidden_states"]
    linear = student.model.layers[1].self_attn(x)[0]
    softmax = teacher.model.layers[1].self_attn(hidden_states=x, position_embeddings=seen["position_embeddings"],
                                                attention_mask=None)[0]
    torch.testing.assert_close(seen["out"], 0.7 * linear + 0.3 * softmax)


def test_padding_reaches_both_branches_and_each_row_may_have_gates_of_its_own(tiny_teacher):
    student, teacher = pair(tiny_teacher)
    mask = torch.ones_like(ROWS)
    mask[0, :4] = 0
    model, hybrid = gated_model(student, teacher, torch.tensor([1.0, 0.0, 0.0])), hl.restore(student, teacher, [0])
    torch.testing.assert_close(model(input_ids=ROWS, attention_mask=mask).logits[mask.bool()],
                               hybrid.eval()(input_ids=ROWS, attention_mask=mask).logits[mask.bool()])
    gates = torch.rand(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    together = gated_model(student, teacher, gates)(input_ids=ROWS).logits
    for r in range(3):
        alone = gated_model(student, teacher, gates[:, r])(input_ids=ROWS[r:r + 1]).logits[0]
        torch.testing.assert_close(together[r], alone)


def test_weights_are_shared_and_frozen_and_those_of_both_branches_are_copies(tiny_teacher):
    student, teacher = pair(tiny_teacher)
    model = gated_model(student, teacher)
    theirs = {p.data_ptr() for m in (student, teacher) for p in m.parameters()}
    assert {p.data_ptr() for p in model.parameters()} <= theirs
    assert not any(p.requires_grad for p in model.parameters()) and all(p.requires_grad for p in student.parameters())
    copy_of = both_branches(student, teacher, GatedAttention)
    assert not {p.data_ptr() for p in copy_of.parameters()} & theirs
    set_gates(copy_of, torch.full((3,), 0.5))
    copy_of(input_ids=ROWS).logits.sum().backward()
    assert all(p.grad is not None for n, p in copy_of.named_parameters() if "self_attn" in n)


@pytest.mark.parametrize(("mixer", "skip"), [("gdn", 5), ("gla", 0)])
@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_slopes_and_curvatures_are_those_of_the_plain_kl(tiny_teacher, all_in_float64, mixer, at, skip):
    student, teacher = pair(tiny_teacher, mixer=mixer, other_weights=True)
    first, second = differences(student, teacher, at, skip)
    slope = gate_gradient(student, teacher, ROWS, at=at, skip=skip)
    change = gate_gradient(student, teacher, ROWS, at=at, order=2, skip=skip)
    for scores, expected, rel in ((slope, first, 1e-5), (change, first + (0.5 - at) * second, 1e-3)):
        assert scores.measured == pytest.approx(expected.mean(1).tolist(), rel=rel, abs=1e-7)
        assert scores.stderr == pytest.approx((expected.std(1) / 3**0.5).tolist(), rel=rel, abs=1e-7)
        assert scores.values == tuple(-x for x in scores.measured)
        assert (scores.metric, scores.direction) == ("gate", "remove" if at == 1 else "add")
    assert max(abs(x) for x in slope.measured) > 1e-3
    assert (slope.tokens, change.tokens) == (36, 7 * 36)


@pytest.mark.parametrize("mixer", ["gdn", "gla"])
def test_training_in_turn_is_stage_2_of_the_restored_hybrid_and_the_slope_is_taken_there(tiny_teacher, all_in_float64,
                                                                                        mixer):
    student, teacher = pair(tiny_teacher, mixer=mixer)
    tokens = hl.Tokens(ROWS[:1], ROWS)
    settings = hl.MatchSettings(batch_tokens=12, learning_rate=1e-3, attention_learning_rate=1e-2, weight_decay=0.0)
    found = gate_gradient(student, teacher, tokens, train_tokens=12, settings=settings)  # a step, with layer 0 open
    hybrid = hl.restore(student, teacher, [0])
    hl.match(hybrid, teacher, tokens, 12, settings=settings)
    linear, softmax = copy.deepcopy(student), copy.deepcopy(teacher)
    trained = hybrid.state_dict()
    attention = {n.split("self_attn.")[1]: p for n, p in trained.items() if n.startswith("model.layers.0.self_attn.")}
    softmax.model.layers[0].self_attn.load_state_dict(attention)
    linear.load_state_dict({n: p for n, p in trained.items() if not n.startswith("model.layers.0.self_attn.")},
                           strict=False)
    expected = []
    for l in range(3):
        kl = [plain_kl(gated_model(linear, softmax, step * torch.eye(3, dtype=torch.float64)[l]), teacher).mean()
              for step in (-1e-5, 1e-5)]
        expected.append((kl[1] - kl[0]).item() / 2e-5)
    assert found.measured == pytest.approx(expected, rel=1e-4, abs=1e-7)
    before = gate_gradient(student, teacher, tokens).measured
    assert max(abs(a / b - 1) for a, b in zip(found.measured, before, strict=True)) > 0.02
    assert found.tokens == 12 + 36 and found.cost.forward_tokens == 12 + 36


def test_the_integrated_gradient_sums_to_the_change_of_kl(tiny_teacher):
    student, teacher = pair(tiny_teacher, other_weights=True)
    with torch.no_grad():
        for layer in (*student.model.layers, *teacher.model.layers):
            layer.self_attn.o_proj.weight.mul_(0.03)  # KL bends so gently along the way that few midpoints do
    linear, softmax = (kl_at(student, teacher, torch.full((3,), g)).mean().item() for g in (0.0, 1.0))
    found = gate_gradient(student, teacher, ROWS, steps=16)
    assert sum(found.values) == pytest.approx(linear - softmax, rel=1e-3) and linear - softmax > 1e-2
    assert found.tokens == 16 * 36 and found.direction == "add"
    slopes = [gate_gradient(student, teacher, ROWS, at=at).measured for at in (0.25, 0.75)]
    assert gate_gradient(student, teacher, ROWS, steps=2).measured == pytest.approx(
        [sum(pair) / 2 for pair in zip(*slopes, strict=True)])


def test_scores_do_not_depend_on_the_batch_and_take_heldout_rows(tiny_teacher, tiny_tokens):
    student, teacher = pair(tiny_teacher)
    whole = gate_gradient(student, teacher, tiny_tokens)
    parts = gate_gradient(student, teacher, tiny_tokens, batch_tokens=48)
    assert parts.measured == pytest.approx(whole.measured) and parts.stderr == pytest.approx(whole.stderr)
    few = gate_gradient(student, teacher, tiny_tokens, num_tokens=40)
    assert few.measured == gate_gradient(student, teacher, tiny_tokens.heldout[:2]).measured and few.tokens == 32


def test_gates_rank_a_destroyed_mixer_above_an_exact_one(tiny_teacher, tiny_tokens):
    """The teacher's layers 0 and 1 are silent; of the mixers, layer 0's nearly is, layer 1's is, layer 2's is noise."""
    teacher = tiny_teacher("llama")
    for l in (0, 1):
        teacher.model.layers[l].self_attn.o_proj.weight.zero_()
    student = hl.linearize(teacher, seed=0).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for l, size in ((0, 0.02), (2, 1.0)):
            student.model.layers[l].self_attn.o_proj.weight.normal_(0, size, generator=generator)
    slopes = gate_gradient(student, teacher, tiny_tokens)
    assert slopes.ranking[0] == 2 and slopes.measured[1] == pytest.approx(0, abs=1e-7)
    settings = GateSettings(batch_tokens=128, learning_rate=0.1)
    found = learned_gates(student, teacher, tiny_tokens, 1, num_tokens=128 * 80, settings=settings)
    gates = found.scores.values
    assert found.scores.ranking == (2, 0, 1) and found.layers == (2,) and gates[2] > 0.8 and gates[1] < 0.2
    assert found.scores.metric == "learned_gate" and found.scores.tokens == found.history_tokens[-1] == 128 * 80
    assert found.kl[-1] < 0.5 * found.kl[0] and found.total[0] == pytest.approx(1)
    assert abs(found.total[-1] - 1) < 0.5 and all(math.isnan(x) for x in found.scores.stderr)
    few, again = (learned_gates(student, teacher, tiny_tokens, 1, num_tokens=128 * 5, settings=settings)
                  for _ in range(2))
    assert again.scores.values == few.scores.values and again.kl == few.kl


def test_nothing_changes_in_student_or_teacher(tiny_teacher):
    student, teacher = pair(tiny_teacher)
    student.train()
    before = {(i, n): p.clone() for i, m in enumerate((student, teacher)) for n, p in m.state_dict().items()}
    flags = [p.requires_grad for m in (student, teacher) for p in m.parameters()]
    modules, layer_types = [str(student), str(teacher)], list(student.config.layer_types)
    gate_gradient(student, teacher, ROWS, order=2)
    learned_gates(student, teacher, ROWS, 0.4, num_tokens=72, settings=GateSettings(batch_tokens=36))
    after = {(i, n): p for i, m in enumerate((student, teacher)) for n, p in m.state_dict().items()}
    assert all(torch.equal(p, before[key]) for key, p in after.items())
    assert [p.requires_grad for m in (student, teacher) for p in m.parameters()] == flags
    assert all(p.grad is None for m in (student, teacher) for p in m.parameters()) and student.training
    assert [str(student), str(teacher)] == modules and student.config.layer_types == layer_types


def test_integer_rows_are_taken_over_and_over(tiny_teacher):
    student, teacher = pair(tiny_teacher)
    settings = GateSettings(batch_tokens=24, start=0.5, penalty=0.0)
    found = learned_gates(student, teacher, ROWS, 2, num_tokens=100, settings=settings)
    assert found.history_tokens == (24, 48, 72, 96) and found.total[0] == pytest.approx(1.5) and len(found.layers) == 2
    repeated = learned_gates(student, teacher, ROWS.repeat(4, 1), 2, num_tokens=100, settings=settings)
    assert repeated.kl == found.kl
    middle = torch.full((3,), 0.5)
    assert found.kl[0] == pytest.approx(kl_at(student, teacher, middle)[:2].mean().item(), rel=1e-6)
    answer = learned_gates(student, teacher, ROWS, 2, num_tokens=24, skip=9, settings=settings)
    assert answer.kl[0] == pytest.approx(kl_at(student, teacher, middle, skip=9)[:2].mean().item(), rel=1e-6)


def test_bad_calls_are_refused(tiny_teacher):
    student, teacher = pair(tiny_teacher)

    def gradient(tokens=ROWS, **changes):
        gate_gradient(student, teacher, tokens, **changes)

    def learned(tokens=ROWS, budget=1, num_tokens=36, **changes):
        learned_gates(student, teacher, tokens, budget, num_tokens=num_tokens, **changes)

    refusals = {gradient: [{"at": 1.5}, {"order": 3}, {"steps": 0}, {"skip": 12}, {"num_tokens": 5},
                           {"batch_tokens": 5}, {"train_tokens": -1}, {"train_tokens": 12}, {"steps": 4, "order": 2},
                           {"at": 1.0, "steps": 4}],
                learned: [{"budget": 4}, {"num_tokens": 3}, {"skip": -1}],
                GateSettings: [{"batch_tokens": 0}, {"learning_rate": 0}, {"penalty": -1.0}, {"start": 0.0}]}
    calls = [(call, changes, "{}={}".format(*next(iter(changes.items()))))
             for call, cases in refusals.items() for changes in cases]
    calls += [(call, {"tokens": rows}, "tokens is") for rows in (ROWS.float(), ROWS[0], ROWS[:0], [[1, 2]])
              for call in (gradient, learned)]
    calls += [(partial(gated_model, student), {"teacher": one, "gates": gates}, message) for one, gates, message in (
        (teacher, torch.zeros(2), r"shape \(2,\)"), (teacher, torch.zeros(3, dtype=torch.int64), "torch.int64"),
        (teacher, [0.0, 0.0, 0.0], "is a list"), (tiny_teacher("llama", 2), None, "num_hidden_layers=2"))]
    calls += [(gated_model(student, teacher), {"input_ids": ROWS, "use_cache": True}, "keeps no cache"),
              (gated_model, {"student": hl.restore(student, teacher, [0]), "teacher": teacher}, "all-linear student")]
    for call, changes, message in calls:
        with pytest.raises(ValueError, match=message):
            call(**changes)
