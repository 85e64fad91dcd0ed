"""Candidates that are scored in one model: the scores of candidates alone, and nothing lost by what fails."""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hybridlib as hl
from hybridlib.models.passes import TeacherStates
from hybridlib.distill import loop
from hybridlib.distill.reading import READING_MODES, ReadingItem, reading_figures
from hybridlib.distill.recall import RecallTask
from hybridlib.selection.engine import candidates, rounds
from hybridlib.selection.engine.inputs import LoadedInputs
from hybridlib.selection.engine.rounds import Engine, ScoringFailed
from hybridlib.selection.engine.switched import Switched

MATCH = hl.MatchSettings(batch_tokens=128, learning_rate=1e-3, attention_learning_rate=3e-3, clip=0.5)
NEVER = hl.EarlyStop(1, 256, window=100)
COUNTED = ("forward_tokens", "training_tokens", "flops")


def job_of(student, teacher, tokens, checkpoints=None):
    inputs = LoadedInputs(student, teacher, tokens, TeacherStates(teacher))
    return candidates.Job(inputs, 512, MATCH, checkpoints=checkpoints)


@pytest.fixture
def job(aligned, tiny_tokens, tmp_path):
    return job_of(*aligned, tiny_tokens, str(tmp_path))


@pytest.fixture(scope="module")
def alone(aligned, tiny_tokens):
    """{(layer, tokens): KL} of candidates that train alone, after 256 and 512 tokens."""
    whole = job_of(*aligned, tiny_tokens)
    return {(layer, until): candidates.measure_set(whole, (layer,), until)["kl"]
            for layer in range(3) for until in (256, 512)}


@pytest.fixture
def recorded(monkeypatch):
    """Candidates take turns in one step, as on a GPU; the candidates that did."""
    taken, take = [], Switched.take
    for module in (candidates, rounds):
        monkeypatch.setattr(module, "shares_step", lambda job: True)
    monkeypatch.setattr(Switched, "take", lambda self, kept, **k: taken.append((id(self), kept)) or take(
        self, kept, **k))
    return taken


def kls(figures):
    return [one["kl"] for _, one in sorted(figures.items())]


def assert_differ_by_rounding(found, one):
    assert np.ravel(found.history) == pytest.approx(np.ravel(one.history), abs=1e-5)
    assert found.stderr == pytest.approx(one.stderr, abs=1e-5) and len(set(found.values)) == 3
    assert (found.tokens, found.history_tokens, found.ranking) == (one.tokens, one.history_tokens, one.ranking)
    assert [getattr(found.cost, name) for name in COUNTED] == [getattr(one.cost, name) for name in COUNTED]


@pytest.mark.parametrize(("direction", "group", "stop"), [("add", 3, None), ("add", 2, NEVER), ("remove", 3, NEVER)])
def test_scores_of_a_group_are_those_of_candidates_alone(aligned, tiny_tokens, direction, group, stop, kept,
                                                         monkeypatch):
    student, teacher = aligned
    weights = [p.clone() for p in student.parameters()]
    made, cohort = [], candidates.Cohort
    monkeypatch.setattr(candidates, "Cohort", lambda *args: made.append(args[3]) or cohort(*args))
    arguments = dict(direction=direction, num_tokens=700, settings=MATCH, early_stop=stop, heldout_tokens=64)
    one = hl.score_layers(student, teacher, tiny_tokens, **arguments, engine=Engine(group=1))
    assert not made
    found = hl.score_layers(student, teacher, tiny_tokens, **arguments, engine=Engine(group=group, records=kept))
    assert_differ_by_rounding(found, one)
    softmax = {l: (l,) if direction == "add" else tuple(m for m in range(3) if m != l) for l in range(3)}
    assert made == [[softmax[l] for l in range(group)]]  # one model for all rounds; a third layer is alone in its task
    seconds = {until: {kept[l, until]["seconds"] for l in range(2)} for _, until in kept}
    assert all(len(each) == 1 for each in seconds.values())  # shared out evenly
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), weights, strict=True))


def test_either_way_goes_on_from_the_others_checkpoints(job, alone):
    first = candidates.measure_sets(job, [(0,), (1,), (2,)], 256)
    assert kls(first) == pytest.approx([alone[l, 256] for l in range(3)], abs=1e-5)
    job.inputs.forget()
    for layer in (0, 2):  # 1 stays behind
        assert candidates.measure_set(job, (layer,), 512, 256)["kl"] == pytest.approx(
            alone[layer, 512], abs=1e-5)
    found = candidates.measure_sets(job, [(0,), (1,), (2,)], 512, 256)
    assert kls(found) == pytest.approx([alone[l, 512] for l in range(3)], abs=1e-5)
    assert {one["tokens"] for one in found.values()} == {512}
    for layer in range(3):
        job.checkpoint((layer,)).unlink()
    for layer in (0, 1):
        candidates.measure_set(job, (layer,), 256)
    found = candidates.measure_sets(job, [(0,), (1,)], 512, 256)
    assert kls(found) == pytest.approx([alone[l, 512] for l in range(2)], abs=1e-5)


def test_a_group_that_lives_on_is_one_made_from_its_checkpoints(job, alone):
    candidates.measure_sets(job, [(0,), (1,), (2,)], 256)
    assert job.inputs.alive
    found = candidates.measure_sets(dataclasses.replace(job, checkpoints=None), [(0,), (1,), (2,)], 512, 256)
    assert kls(found) == pytest.approx([alone[l, 512] for l in range(3)], abs=1e-5)
    assert not job.inputs.alive
    lost = candidates.measure_sets(dataclasses.replace(job, checkpoints=None), [(0,), (1,), (2,)], 512, 256)
    assert kls(lost) == pytest.approx(kls(found), abs=1e-6)  # trained again from the start


@pytest.mark.parametrize(("num_tokens", "stop", "group", "shared_step"), [
    (0, None, 1, False), (512, None, 1, False), (512, None, 1, True), (512, None, 3, False), (512, NEVER, 3, False)])
def test_one_that_is_not_a_number_is_named_and_costs_no_other(aligned, tiny_tokens, kept, request, num_tokens, stop,
                                                              group, shared_step):
    student, teacher = aligned
    turns = request.getfixturevalue("recorded") if shared_step else []
    broken = hl.restore(student, teacher, [])
    with torch.no_grad():
        broken.model.layers[1].self_attn.q_proj.weight[0, 0] = math.nan
    arguments = dict(direction="remove", num_tokens=num_tokens, settings=MATCH, early_stop=stop)
    where = "match met a number that is not finite at step 0 in layer 1; " if num_tokens else ""
    with pytest.raises(ScoringFailed, match=rf"for layer 1 \(DistillationDiverged: {where}.*other 2 of 3 ") as e:
        hl.score_layers(broken, teacher, tiny_tokens, **arguments, engine=Engine(records=kept, group=group))
    assert set(e.value.failed) == {1} and "\n" not in str(e.value) and len(turns) == 3 * shared_step
    first = num_tokens if stop is None else 256
    assert set(kept) == {(0, first), (2, first)}
    good = hl.score_layers(student, teacher, tiny_tokens, **arguments, engine=Engine(group=1))
    assert [kept[l, first]["kl"] for l in (0, 2)] == pytest.approx([good.history[0][l] for l in (0, 2)], abs=1e-5)


def test_a_group_that_does_not_fit_is_measured_in_turn(job, alone, monkeypatch, caplog):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(candidates, "Cohort", full)
    found = candidates.measure_sets(job, [(0,), (1,), (2,)], 256)
    assert kls(found) == [alone[l, 256] for l in range(3)] and "now in turn" in caplog.text


def test_a_damaged_checkpoint_of_a_group_is_named(job):
    candidates.measure_sets(job, [(0,), (1,)], 256)
    job.inputs.forget()
    cut = job.checkpoint((1,))
    cut.write_bytes(cut.read_bytes()[:100])
    found = candidates.measure_sets(job, [(0,), (1,)], 512, 256)
    why = found[1,]["error"]
    assert "error" not in found[0,] and why.startswith("ValueError: checkpoint=") and "truncated" in why


@pytest.mark.parametrize(("family", "mixer", "direction", "stop"), [
    ("llama_tied_bias", "gla", "add", NEVER), ("qwen3", "gdn", "remove", None)])
def test_candidates_that_take_turns_in_one_step_have_the_scores_of_their_own_runs(
        tiny_teacher, tiny_tokens, recorded, monkeypatch, family, mixer, direction, stop):
    teacher = tiny_teacher(family)
    student = hl.linearize(teacher, mixer)
    with torch.no_grad():
        student.model.embed_tokens.weight.add_(0.01)  # none of the teacher's
    weights = [p.clone() for p in student.parameters()]
    arguments = dict(direction=direction, num_tokens=640, settings=MATCH, early_stop=stop, engine=Engine(group=1))
    found = hl.score_layers(student, teacher, tiny_tokens, **arguments)
    turns = 1 if stop is None else 3
    assert len({model for model, _ in recorded}) == 1 and len(recorded) == 3 * turns
    monkeypatch.setattr(candidates, "shares_step", lambda job: False)
    one = hl.score_layers(student, teacher, tiny_tokens, **arguments)
    assert len(recorded) == 3 * turns
    assert_differ_by_rounding(found, one)
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), weights, strict=True))


def test_the_shared_step_goes_on_from_checkpoints_from_memory_or_from_the_start(job, alone, recorded, monkeypatch):
    in_memory = dataclasses.replace(job, checkpoints=None)
    for layer in range(3):
        for kind in (job, in_memory):
            assert candidates.measure_set(kind, (layer,), 256)["kl"] == pytest.approx(
                alone[layer, 256], abs=1e-5)
    for layer in (2, 0):
        for kind in (job, in_memory, in_memory):  # the third time nothing is held
            assert candidates.measure_set(kind, (layer,), 512, 256)["kl"] == pytest.approx(
                alone[layer, 512], abs=1e-5)
    assert len(recorded) == 12
    monkeypatch.setattr(candidates, "shares_step", lambda job: False)  # and a run alone from its checkpoint
    assert candidates.measure_set(job, (1,), 512, 256)["kl"] == pytest.approx(alone[1, 512], abs=1e-5)


@pytest.mark.parametrize("every", [5_000_000, 256])
def test_states_wait_in_memory_unless_a_candidate_is_long(aligned, tiny_tokens, recorded, tmp_path, monkeypatch, every):
    student, teacher = aligned
    held, written, hold, save = [], [], Switched.hold, loop.save_checkpoint
    monkeypatch.setattr(Switched, "hold", lambda self: held.append(self.step) or hold(self))
    monkeypatch.setattr(loop, "save_checkpoint", lambda *args: written.append(args[-1]) or save(*args))
    settings = dataclasses.replace(MATCH, checkpoint_every=every)
    stop = hl.EarlyStop(2, 256, window=2, threshold=1 / 3, heldout_tokens=32)  # any two pairs of three share one
    arguments = dict(num_tokens=1024, settings=settings, engine=Engine(group=1, checkpoints=tmp_path / "c"))
    found = hl.score_layers(student, teacher, tiny_tokens, **arguments, early_stop=stop)
    assert found.history_tokens == (256, 512)
    assert bool(held) == (every > 1024) and bool(written) == (every < 1024) and not list(tmp_path.rglob("candidate-*"))
    whole = hl.score_layers(student, teacher, tiny_tokens, **arguments,
                            early_stop=dataclasses.replace(stop, heldout_tokens=None))
    assert found.values == pytest.approx(whole.values, abs=1e-5) and found.history[0] != whole.history[0]


def test_where_the_shared_step_cannot_run_candidates_have_their_own(job, alone, recorded, monkeypatch, caplog):
    tried = []
    monkeypatch.setattr(candidates, "Switched", lambda *args: tried.append(1) or {}["cannot be compiled"])
    found = {l: candidates.measure_set(job, (l,), 256) for l in range(3)}
    assert kls(found) == [alone[l, 256] for l in range(3)] and "now by itself" in caplog.text
    assert len(tried) == 1


@pytest.mark.parametrize("way", ["alone", "in turn", "together"])
def test_finished_hybrids_read_and_write_however_they_trained(aligned, tiny_tokens, characters, request, monkeypatch,
                                                              caplog, way):
    student, teacher = aligned
    monkeypatch.setattr(student.config, "max_position_embeddings", 128)
    if way == "in turn":
        request.getfixturevalue("recorded")  # and no warning below, so that it is not measured alone after all
    tokens, task = hl.Tokens(tiny_tokens.train, tiny_tokens.heldout, characters), RecallTask(pairs=2, digits=1)
    texts = [characters.decode(row[:4 + i].tolist()) + " " for i, row in enumerate(tiny_tokens.heldout[:4])]
    items = [ReadingItem(text, text, value, 6) for text in texts for value in characters.alphabet[2:]]
    job = dataclasses.replace(job_of(student, teacher, tokens), evaluation=True, recall=task, recall_examples=4,
                              written=True, reading={"pattern": items})
    sets = [(0,), (1, 2)]
    for until in (256, 512):
        found = candidates.measure_sets(job, sets, until, until - 256, stack=way == "together")
        for layers, figures in found.items():
            written = {name for name in figures if "written" in name or name == "reading"}
            assert len(written) == 4 * (until == 512)
    for layers in sets:
        hybrid = hl.restore(student, teacher, layers)
        hl.match(hybrid, teacher, tokens, 512, settings=MATCH)
        assert found[layers]["reading"] == reading_figures(hybrid, characters, job.reading)
        assert all("1" in found[layers]["reading"]["pattern"][f"{mode}_hits"] for mode in READING_MODES)
        measured = hl.evaluate(hybrid, teacher, tokens, recall=task, recall_examples=4, written=True)
        assert found[layers]["recall_written_hits"] == measured.recall_written_hits and not caplog.records


@pytest.mark.parametrize(("cuda", "flops", "executor", "expected"), [
    (True, 1e6, None, 10), (True, 1e9, None, 1), (False, 1e6, None, 1), (True, 1e6, ThreadPoolExecutor, 1)])
def test_layers_train_together_where_launches_take_longer(tiny_tokens, monkeypatch, cuda, flops, executor, expected):
    config = SimpleNamespace(num_hidden_layers=30, attention_dropout=0.0)
    student = SimpleNamespace(config=config, parameters=lambda: iter([SimpleNamespace(is_cuda=cuda)]))
    monkeypatch.setattr(rounds, "training_flops", lambda model, context: flops)
    monkeypatch.setattr(rounds, "group_size", lambda *args: 12)
    settings = hl.MatchSettings(batch_tokens=16_384)

    def group_of(group):
        return Engine(executor, group).group_of(student, tiny_tokens, settings)

    assert (group_of(None), group_of(7), group_of(64)) == (expected, 7, 30)
    config.attention_dropout = 0.1
    assert group_of(7) == 1
    with pytest.raises(ValueError, match="group=0"):
        Engine(group=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_group_lives_on_through_rounds(tiny_teacher, tiny_tokens):
    teacher = tiny_teacher("llama").to("cuda")
    student, graph = hl.linearize(teacher), dataclasses.replace(MATCH, cuda_graph=True, compile=True)
    one = hl.score_layers(student, teacher, tiny_tokens, num_tokens=2048, settings=MATCH, early_stop=NEVER,
                          engine=Engine(group=1))
    found = hl.score_layers(student, teacher, tiny_tokens, num_tokens=2048, settings=graph, early_stop=NEVER,
                            engine=Engine(group=3))
    assert found.values == pytest.approx(one.values, rel=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("full", [False, True])
def test_candidates_wait_on_the_gpu_while_an_eighth_of_it_is_free(tiny_teacher, tiny_tokens, monkeypatch, full):
    teacher, total = tiny_teacher("llama").to("cuda"), torch.cuda.mem_get_info()[1]
    student, graph = hl.linearize(teacher), dataclasses.replace(MATCH, cuda_graph=True)
    one = hl.score_layers(student, teacher, tiny_tokens, num_tokens=2048, settings=MATCH, early_stop=NEVER,
                          engine=Engine(group=1))
    held, hold = [], Switched.hold
    monkeypatch.setattr(Switched, "hold", lambda self: held.append(hold(self)) or held[-1])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0 if full else total, total))
    found = hl.score_layers(student, teacher, tiny_tokens, num_tokens=2048, settings=graph, early_stop=NEVER,
                            engine=Engine(group=1))
    assert found.values == pytest.approx(one.values, rel=2e-2)
    assert held and {kept[0].device.type for kept, *_ in held} == {"cpu" if full else "cuda"}
