"""The training step: both loops train alike and begin alike; how fast they are is never asserted."""

import dataclasses

import pytest
import torch

import hybridlib as hl
from hybridlib.bench import step
from hybridlib.bench.speed import SpeedSettings


@pytest.mark.parametrize("stage", step.STAGES)
def test_both_loops_of_a_stage_train_alike(bench, teacher, tiny_tokens, stage):
    how = SpeedSettings(context=16, budget=1, batch_tokens=64, steps=3, step_align_tokens=128)
    rows = [step.time_step(bench, teacher, tiny_tokens, stage, loop, how) for loop in step.LOOPS]
    assert [row["reason"] for row in rows] == [None, None]
    ours, plain = (torch.tensor(row["loss"]) for row in rows)
    assert torch.allclose(ours, plain, rtol=2e-4) and len(ours) == 3
    assert rows[0]["loss_tokens"] == [64, 128, 192] and rows[0]["teacher"] == "tiny"
    timed = [phase for phase in step.PHASES if (stage, phase) != ("align", "objective")]
    assert all(row[f"{phase}_seconds"] > 0 for row in rows for phase in timed)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert rows[0].get("noise_loss") is None and len(rows[1]["noise_loss"]) == 3
    noise = (torch.tensor(rows[1]["noise_loss"]) - plain).abs()
    assert noise.max() > 3 * (ours - plain).abs().max() and (noise < 0.1 * plain).all()


def test_stage_2_is_timed_from_one_aligned_student_for_both_loops(bench, teacher, tiny_tokens, monkeypatch):
    student, ids = hl.linearize(teacher.model), tiny_tokens.rows(0, 4)
    hl.align(student, teacher.model, tiny_tokens, 512, settings=hl.AlignSettings(batch_tokens=64))
    calls, aligned = [], {}
    monkeypatch.setattr(step, "align", lambda *a, **k: calls.append(a[3]) or hl.align(*a, **k))

    def time_step(stage="match", loop="plain", tokens=512, **cache):
        how = SpeedSettings(context=16, budget=1, batch_tokens=64, steps=2, step_align_tokens=tokens)
        again = dataclasses.replace(bench, recompute=True)
        return step.time_step(again, teacher, tiny_tokens, stage, loop, how, **cache)

    @torch.no_grad()
    def first_loss(student, half=False):
        models = teacher.model, hl.restore(student, teacher.model, [1])
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            p, q = (model(ids).logits.float().log_softmax(-1) for model in models)
        return float((p.exp() * (p - q)).sum(-1).mean())

    rows = [time_step(loop=loop, aligned=aligned) for loop in step.LOOPS]
    assert calls == [512]
    assert [row["loss"][0] for row in rows] == pytest.approx([first_loss(student)] * 2, rel=1e-5)
    assert rows[1]["noise_loss"][0] == pytest.approx(first_loss(student, half=True), rel=1e-3)
    assert abs(rows[1]["noise_loss"][0] - rows[1]["loss"][0]) > 1e-4
    assert time_step()["loss"] == rows[1]["loss"] and calls == [512, 512]  # made again: the same to the bit
    plain = time_step(tokens=0, aligned=aligned)
    assert len(calls) == 2 and plain["loss"][0] == pytest.approx(first_loss(hl.linearize(teacher.model)), rel=1e-5)
    assert [row["align_tokens"] for row in (*rows, plain)] == [512, 512, 0]
    assert len(bench.ledger.find("step_speed")) == 3
    time_step(tokens=64, aligned=aligned)
    assert len(calls) == 3 and len(aligned) == 2
    calls.clear()
    assert time_step(stage="align", loop="plain")["align_tokens"] is None and not calls


def test_what_a_hybridlib_step_is_timed_by_is_what_align_and_match_compute(teacher, tiny_tokens):
    for run, settings in ((hl.align, hl.AlignSettings), (hl.match, hl.MatchSettings)):
        settings = settings(batch_tokens=64, schedule="constant", warmup=0.0)
        losses, _ = step._loop(hl.linearize(teacher.model), teacher.model, tiny_tokens, 3, settings, plain=False)
        history = run(hl.linearize(teacher.model), teacher.model, tiny_tokens, 192, settings=settings)
        assert losses == pytest.approx(history.losses, rel=1e-5)


@pytest.mark.parametrize("stage, loop, change, sentence", [
    ("score", "plain", {}, "stage='score' is unknown"), ("match", "fast", {}, "loop='fast' is unknown"),
    ("match", "plain", {"budget": 9}, "budget=9 is not a count from 1 to 3 layers")])
def test_bad_steps_are_refused(bench, teacher, tiny_tokens, stage, loop, change, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        step.time_step(bench, teacher, tiny_tokens, stage, loop, SpeedSettings(**change))
