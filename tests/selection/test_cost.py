"""Costs: FLOPs against PyTorch's own counter, sums, and what a meter is told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import hybridlib as hl
from hybridlib.models.branches import gated_model
from hybridlib.models.passes import last_hidden
from hybridlib.selection.cost import Cost, Meter, forward_flops, held_beside, training_flops
from hybridlib.selection.engine import candidates, inputs

TIME = 12  # tokens of a row; few enough that a mixer runs its projections one by one


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def of_angles(model):
    """What the counter counts for the angles of rotary positions: a product in some versions of transformers."""
    positions = torch.arange(TIME)[None]
    return counted(lambda: model.model.rotary_emb(model.model.embed_tokens(positions), positions))


def logits(model, ids):
    return model.lm_head(last_hidden(model, ids))


def by_recurrence(model):
    for layer in model.model.layers:
        layer.self_attn.backend = "reference"  # has no product of matrices
    return model


@pytest.mark.parametrize("family", ["llama", "llama_tied_bias", "qwen2", "qwen3", "mistral"])
def test_a_teachers_forward_and_backward_pass_are_what_the_counter_counts(tiny_teacher, family):
    teacher, ids = tiny_teacher(family), torch.arange(4 * TIME).view(4, TIME) % 64
    teacher.set_attn_implementation("eager")  # its products are counted both ways
    with torch.no_grad():
        assert forward_flops(teacher, TIME) * ids.numel() == counted(
            lambda: logits(teacher, ids)) - of_angles(teacher)
    student = hl.restore(hl.linearize(teacher), teacher, range(3)).requires_grad_()
    student.set_attn_implementation("eager")
    assert training_flops(student, TIME) * ids.numel() == counted(
        lambda: logits(student, ids).sum().backward()) - of_angles(student)


@pytest.mark.parametrize(("mixer", "a_state_entry"), [("gdn", 7), ("gla", 5)])
def test_a_students_products_are_counted_and_its_states_are_those_of_the_recurrence(tiny_teacher, mixer, a_state_entry):
    student = by_recurrence(hl.linearize(tiny_teacher("qwen3"), mixer))
    ids = torch.arange(4 * TIME).view(4, TIME) % 64
    states = 3 * 4 * 16 * 16 * a_state_entry  # layers, heads, key_dim, value_dim
    with torch.no_grad():
        assert (forward_flops(student, TIME) - states) * ids.numel() == counted(
            lambda: logits(student, ids)) - of_angles(student)
    assert forward_flops(student, 8 * TIME) == forward_flops(student, TIME)  # a state does not grow


def test_a_gated_model_does_the_work_of_both_branches_and_saves_the_weights_gradients(tiny_teacher):
    teacher = tiny_teacher("llama", layers=6)
    student, ids = by_recurrence(hl.linearize(teacher)), torch.arange(4 * TIME).view(4, TIME) % 64
    gates = torch.full((6,), 0.5, requires_grad=True)
    model = gated_model(student, teacher, gates)
    attention = sum(forward_flops(layer.self_attn, TIME) for layer in teacher.model.layers)
    assert forward_flops(model, TIME) == forward_flops(student, TIME) + attention
    whole = counted(lambda: logits(model, ids).sum().backward())
    states = 7 * 6 * 4 * 8 * 8
    estimate = (training_flops(model, TIME, frozen=True) - 3 * states) * ids.numel()
    assert 0.8 * estimate < whole < estimate  # what lies before the first gate needs no gradient
    assert training_flops(model, TIME, frozen=True) < training_flops(model, TIME)


def test_costs_add_up_and_come_back_from_their_dict():
    a = Cost(10, 20, 2, 5.0, 1.5, None, "this CPU")
    b = Cost(1, 2, 1, 0.5, 0.5, 7, "a GPU")
    assert a + b == Cost(11, 22, 3, 5.5, 2.0, 7, "this CPU; a GPU")
    assert Cost.total([a, a]) == Cost(20, 40, 4, 10.0, 3.0, None, "this CPU") and Cost.total([]) == Cost()
    assert Cost.from_dict(a.to_dict()) == a


def test_a_meter_counts_what_it_is_told(tiny_teacher):
    teacher = tiny_teacher()
    student = hl.linearize(teacher)
    meter = Meter(teacher)
    meter.forward(teacher, 30, 10)
    meter.forward(teacher, 40, 10, head=False, passes=2)
    meter.train(student, 50, 10)
    meter.parts([teacher.lm_head], 2, 10)
    cost = meter.cost()
    assert (cost.forward_tokens, cost.training_tokens, cost.passes) == (70, 50, 4)
    head = 2 * 32 * 64
    assert cost.flops == (70 * forward_flops(teacher, 10) - 40 * head + 50 * 3 * forward_flops(student, 10)
                          + 2 * head)
    assert cost.seconds > 0 and cost.device and cost.peak_memory is None


class OnGPU:
    """What a meter asks of a model: weights on a GPU, (address, bytes) each."""

    def __init__(self, *weights):
        self.weights = [SimpleNamespace(device=torch.device("cuda", 0), untyped_storage=lambda a=address, b=size: (
            SimpleNamespace(data_ptr=lambda: a, nbytes=lambda: b))) for address, size in weights]

    def parameters(self):
        return iter(self.weights[:1] * 2)

    def buffers(self):
        return iter(self.weights)


@pytest.fixture
def memory(monkeypatch):
    """A GPU's memory, as bytes that the test sets."""
    gpu = SimpleNamespace(now=0, peak=0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: gpu.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: gpu.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(gpu, "peak", gpu.now))
    return gpu


@pytest.mark.parametrize("others", [0, 5_000])
def test_peak_memory_is_the_works_own_whatever_else_lies_on_the_gpu(memory, others):
    teacher, student = OnGPU((1, 100), (2, 40)), OnGPU((2, 40), (3, 60))  # they share a weight of 40 bytes
    memory.now = memory.peak = others + 200
    memory.peak += 10_000  # before the meter was made
    meter = Meter(teacher, student)
    assert meter.cost().peak_memory == 200
    memory.peak += 30
    assert meter.cost().peak_memory == 230
    assert Meter(teacher).cost().peak_memory == 140  # a model that it was not given lay there before


def test_a_part_of_a_job_counts_what_earlier_parts_left(memory, aligned, tiny_tokens, monkeypatch):
    weights = OnGPU((1, 100))
    memory.now = memory.peak = 1_100
    assert held_beside(weights) == 1_000
    memory.now += 50  # what the first part leaves
    assert Meter(weights, beside=1_000).cost().peak_memory == 150
    memory.now = memory.peak = 900  # others gave back what was theirs
    assert Meter(weights, beside=1_000).cost().peak_memory == 0
    student, teacher = aligned
    calls, real = [], candidates.Meter
    monkeypatch.setattr(inputs, "held_beside", lambda *models: calls.append(models) or 7)
    monkeypatch.setattr(candidates, "Meter", lambda *models, beside: calls.append(beside) or real(*models))
    hl.score_layers(student, teacher, tiny_tokens, num_tokens=0)
    assert calls == [(teacher, student), 7, 7, 7]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose memory is counted")
def test_peak_memory_is_that_since_the_meter_was_made(tiny_teacher):
    teacher = tiny_teacher().cuda()
    others = torch.empty(2**26, device="cuda")
    meter = Meter(teacher)
    torch.empty(2**22, device="cuda")
    assert 2**24 <= meter.cost().peak_memory < 2**25 < others.nbytes


@pytest.mark.parametrize("direction", ["add", "remove"])
def test_scores_carry_what_a_candidate_a_layer_costs(tiny_teacher, tiny_tokens, direction):
    teacher = tiny_teacher()
    student, settings = hl.linearize(teacher), hl.MatchSettings(batch_tokens=64)
    scores = hl.score_layers(student, teacher, tiny_tokens, direction=direction, num_tokens=128, settings=settings)
    kept = {"add": [0], "remove": [0, 1]}[direction]
    one, theirs = hl.restore(student, teacher, kept), forward_flops(teacher, 16)
    assert scores.tokens == scores.cost.training_tokens == 3 * 128
    # the teacher reads the training rows and the held-out ones once, for all candidates
    assert scores.cost.forward_tokens == 2 * 128 + 3 * 128 and scores.cost.passes == 2 + 3 * 2
    expected = 2 * 128 * theirs + 3 * 128 * (training_flops(one, 16) + forward_flops(one, 16))
    assert scores.cost.flops == pytest.approx(expected) and scores.cost.seconds <= scores.seconds * 1.01
    assert hl.LayerScores.from_dict(scores.to_dict()) == scores


def test_scores_recorded_before_costs_were_are_still_read():
    old = {"direction": "add", "metric": "kl", "values": [-1.0], "measured": [1.0], "stderr": [0.0], "tokens": 1,
           "seconds": 1.0}
    assert hl.LayerScores.from_dict(old).cost is None


def test_the_stage_one_error_costs_a_pass_of_the_teacher_and_of_the_mixers(tiny_teacher, tiny_tokens):
    teacher = tiny_teacher()
    student = hl.linearize(teacher)
    cost = hl.score_layers(student, teacher, tiny_tokens, metric="mse", heldout_tokens=64).cost
    mixers = sum(forward_flops(layer.self_attn, 16) for layer in student.model.layers)
    assert (cost.forward_tokens, cost.training_tokens, cost.passes) == (64, 0, 1)
    assert cost.flops == 64 * (forward_flops(teacher.model, 16) + mixers)
