"""A recorded step trains as an ordinary one does."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import hybridlib as hl
from hybridlib.graphs import Graphed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SETTINGS = {"align": hl.AlignSettings(batch_tokens=128, learning_rate=1e-2),
            "match": hl.MatchSettings(batch_tokens=128, learning_rate=1e-3, mixer_learning_rate=3e-3)}


def train(stage, teacher, tokens, device, **changes):
    teacher = teacher.to(device)
    student = hl.linearize(teacher, seed=0)
    student = student if stage == "align" else hl.restore(student, teacher, [1])
    settings = dataclasses.replace(SETTINGS[stage], **changes)
    return getattr(hl, stage)(student, teacher, tokens, 2048, settings=settings), student


@pytest.mark.parametrize("stage", ["align", "match"])
def test_off_a_gpu_nothing_changes(tiny_teacher, tiny_tokens, stage):
    (one, first), (two, second) = (train(stage, tiny_teacher("llama"), tiny_tokens, "cpu", cuda_graph=on)
                                   for on in (False, True))
    assert one.losses == two.losses
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


@needs_gpu
@pytest.mark.parametrize("micro", [None, 64])
@pytest.mark.parametrize("stage", ["align", "match"])
def test_a_recorded_step_trains_as_an_ordinary_one(tiny_teacher, tiny_tokens, stage, micro):
    (one, first), (two, second) = (
        train(stage, tiny_teacher("llama"), tiny_tokens, "cuda", cuda_graph=on, micro_batch_tokens=micro)
        for on in (False, True))
    assert one.losses == pytest.approx(two.losses, rel=2e-2) and len(set(two.losses)) == len(two.losses)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert (p - q).norm() <= 2e-2 * p.norm() and p.grad is None and q.grad is None


@needs_gpu
def test_a_replay_computes_on_the_new_batch():
    weight = torch.ones(4, device="cuda", requires_grad=True)

    def compute(batch):
        weight.grad = None
        loss = (weight * batch).sum()
        loss.backward()
        return loss.detach()

    graphed = Graphed(compute)
    for value in range(6):
        assert float(graphed(torch.full((4,), float(value), device="cuda"))) == 4 * value
        assert weight.grad.tolist() == [value] * 4
    with pytest.raises(ValueError, match=r"batch has shape \(3,\)"):
        graphed(torch.zeros(3, device="cuda"))


def test_a_bad_switch_is_refused():
    with pytest.raises(ValueError, match="cuda_graph='yes' is neither True nor False"):
        hl.MatchSettings(cuda_graph="yes")
