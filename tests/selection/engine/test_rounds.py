"""Scoring as tasks: the same scores from any executor, nothing lost by what fails or kills, an early end."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hybridlib as hl
from hybridlib.distill import stages
from hybridlib.distill.evaluate import heldout_kl
from hybridlib.models import passes
from hybridlib.models.passes import TeacherStates
from hybridlib.records import ledger
from hybridlib.selection.engine import candidates, inputs as inputs_module, rounds, workers
from hybridlib.selection.engine.candidates import Job, distilled_kl
from hybridlib.selection.engine.inputs import LoadedInputs
from hybridlib.selection.engine.rounds import Engine, ScoringFailed, run_candidates

MATCH = hl.MatchSettings(batch_tokens=128, learning_rate=1e-3, attention_learning_rate=3e-3)
NEVER = hl.EarlyStop(1, 256, window=100)


@pytest.fixture(scope="module")
def settings(tiny_files, tmp_path_factory):
    """Of a study whose teacher and corpus are files, so that other processes find them."""
    return hl.StudySettings(**tiny_files, context=16, align_tokens=512, score_tokens=512, match_tokens=128,
                            batch_tokens=64, heldout_tokens=128, seeds=1, recall_pairs=2, budget=1, device="cpu",
                            results=str(tmp_path_factory.mktemp("inputs") / "whole"))


@pytest.fixture(scope="module")
def whole(settings):
    """The scores that a study computes in this process."""
    return hl.Study(settings).scores("gdn", 0)


def fresh(settings, folder):
    return dataclasses.replace(settings, results=str(folder / "results"))


def test_candidates_are_what_the_plain_loop_gives(aligned, tiny_tokens):
    student, teacher = aligned
    scores = hl.score_layers(student, teacher, tiny_tokens, num_tokens=1024, settings=MATCH)
    for layer in range(3):
        model = hl.restore(student, teacher, [layer])
        hl.match(model, teacher, tiny_tokens, 1024, settings=MATCH)
        assert (scores.measured[layer], scores.stderr[layer]) == heldout_kl(model, teacher, tiny_tokens)
    assert scores.history == (scores.values,) and scores.history_tokens == (1024,)


def test_the_teacher_passes_once_over_each_row(aligned, tiny_tokens, monkeypatch):
    student, teacher = aligned
    passed, real = [], passes.last_hidden
    monkeypatch.setattr(passes, "last_hidden", lambda model, ids, **k: passed.append(len(ids)) or real(model, ids, **k))
    one = hl.score_layers(student, teacher, tiny_tokens, num_tokens=1024, settings=MATCH)
    assert sum(passed) == 64 + 8  # 1,024 tokens of training and 8 held-out rows, for three candidates
    again = hl.score_layers(student, teacher, tiny_tokens, num_tokens=1024, settings=MATCH, engine=Engine(memory=0))
    assert sum(passed) == 4 * (64 + 8) and again.values == one.values


@pytest.mark.parametrize(("memory", "micro"), [(0, None), (20 * 16 * 32 * 4, None), (2**30, None), (2**30, 48)])
def test_shared_states_train_to_the_same_weights(aligned, tiny_tokens, memory, micro):
    student, teacher = aligned
    states, settings = TeacherStates(teacher, memory), dataclasses.replace(MATCH, micro_batch_tokens=micro)
    found = []
    for shared in (None, states, states):
        hybrid = hl.restore(student, teacher, [1])
        history = hl.match(hybrid, teacher, tiny_tokens, 1280, settings=settings, states=shared)
        found.append((history.losses, heldout_kl(hybrid, teacher, tiny_tokens, states=shared), hybrid))
    for losses, kl, hybrid in found[1:]:
        assert losses == found[0][0] and kl == found[0][1]
        assert all(torch.equal(p, q) for p, q in zip(hybrid.parameters(), found[0][2].parameters(), strict=True))
    assert states.used <= memory


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_step_takes_shared_states(tiny_teacher, tiny_tokens):
    teacher = tiny_teacher("llama").to("cuda")
    student, states, losses = hl.linearize(teacher), TeacherStates(teacher), []
    for shared, graph in ((None, False), (states, False), (states, True)):
        settings = dataclasses.replace(MATCH, cuda_graph=graph)
        hybrid = hl.restore(student, teacher, [1])
        losses.append(hl.match(hybrid, teacher, tiny_tokens, 2048, settings=settings, states=shared).losses)
    assert losses[0] == pytest.approx(losses[1], rel=2e-2) and losses[0] == pytest.approx(losses[2], rel=2e-2)


def test_a_run_in_parts_is_the_run(aligned, tiny_tokens, tmp_path):
    student, teacher = aligned
    once, parts = (hl.restore(student, teacher, [0]) for _ in range(2))
    expected = hl.match(once, teacher, tiny_tokens, 1280, settings=MATCH)
    for until in (400, 1000, 1280):
        parts = hl.restore(student, teacher, [0])
        history = hl.match(parts, teacher, tiny_tokens, 1280, settings=MATCH, checkpoint=tmp_path / "c", until=until)
        assert history.losses == expected.losses[:until // 128]
    assert all(torch.equal(p, q) for p, q in zip(once.parameters(), parts.parameters(), strict=True))
    with pytest.raises(ValueError, match="is 1280 tokens into the run, beyond until=400"):
        hl.match(parts, teacher, tiny_tokens, 1280, settings=MATCH, checkpoint=tmp_path / "c", until=400)


def test_measuring_along_the_way_changes_no_score(aligned, tiny_tokens, tmp_path):
    student, teacher = aligned
    plain = hl.score_layers(student, teacher, tiny_tokens, num_tokens=1100, settings=MATCH)
    along = hl.score_layers(student, teacher, tiny_tokens, num_tokens=1100, settings=MATCH, early_stop=NEVER,
                            engine=Engine(checkpoints=tmp_path))
    assert along.values == plain.values and along.tokens == plain.tokens == 3 * 1024
    assert along.history_tokens == (256, 512, 768, 1024) and along.history[-1] == along.values
    assert len(set(along.history)) == 4 and not list(tmp_path.iterdir())
    assert hl.LayerScores.from_dict(json.loads(json.dumps(along.to_dict()))) == along


@pytest.mark.parametrize("group", [1, 3])
def test_an_end_found_on_few_held_out_tokens_is_scored_on_all(aligned, tiny_tokens, group, kept):
    student, teacher = aligned
    still = dataclasses.replace(MATCH, learning_rate=1e-9, attention_learning_rate=1e-9)
    stop = hl.EarlyStop(2, 256, window=3)
    score = {"num_tokens": 2048, "settings": still}
    whole = hl.score_layers(student, teacher, tiny_tokens, **score, early_stop=stop, engine=Engine(group=group))
    part = hl.score_layers(student, teacher, tiny_tokens, **score, engine=Engine(group=group, records=kept),
                           early_stop=dataclasses.replace(stop, heldout_tokens=32))
    assert part.values == pytest.approx(whole.values, abs=1e-7) and part.history[0] != whole.history[0]
    assert part.history[-1] == part.values and part.history_tokens == whole.history_tokens == (256, 512, 768)
    assert sorted(kept) == sorted([*itertools.product(range(3), (256, 512, 768), (32,)),
                                   *itertools.product(range(3), (768,))])
    assert part.history[0] == tuple(-kept[l, 256, 32]["kl"] for l in range(3))
    # the teacher reads a row again in another batch; candidates read 32 tokens three times, all 128 at the end
    assert part.cost.training_tokens == whole.cost.training_tokens == part.tokens == 3 * 768
    assert part.cost.forward_tokens == 768 + 32 + 128 + 3 * (3 * 32 + 128)


def test_scoring_goes_on_while_the_best_layers_change(aligned, tiny_tokens, monkeypatch):
    student, teacher = aligned
    asked = []

    def measured(job, sets, until, since):
        """The best layer is another at every measurement but the sixth, which repeats the fifth."""
        asked.append((until, *sets))
        best = min(until // 256, 5) % 3
        return {layers: {"kl": float(layers != (best,)), "kl_stderr": 0.0, "tokens": until, "seconds": 0.0}
                for layers in sets}

    monkeypatch.setattr(rounds, "measure_sets", measured)
    score = {"num_tokens": 2048, "settings": MATCH}
    scores = hl.score_layers(student, teacher, tiny_tokens, **score, early_stop=hl.EarlyStop(1, 256, window=2))
    assert asked == [(until, (l,)) for until in range(256, 6 * 256 + 1, 256) for l in range(3)]
    assert scores.ranking[0] == 5 % 3 and scores.tokens == 3 * 6 * 256
    scores = hl.score_layers(student, teacher, tiny_tokens, **score, early_stop=hl.EarlyStop(1, 256, window=5))
    assert scores.tokens == 3 * 2048
    removed = hl.score_layers(student, teacher, tiny_tokens, **score, direction="remove",
                              early_stop=hl.EarlyStop(2, 256, window=3, threshold=1 / 3))
    assert removed.tokens == 3 * 768  # any two pairs of three layers share one


@pytest.mark.parametrize(("window", "threshold", "expected"), [(2, 1.0, 4), (3, 1.0, None), (3, 0.3, 4), (2, 0.3, 3)])
def test_the_rule_is_that_of_its_words(window, threshold, expected):
    sets = [{0, 1}, {2, 3}, {1, 2}, {1, 2}]
    history = [[float(l in kept) for l in range(4)] for kept in sets]
    rule = hl.EarlyStop(0.5, 64, window, threshold)

    def agree(n):
        recent = sets[max(0, n - window):n]
        return n >= window and all(len(a & b) / len(a | b) >= threshold for a, b in itertools.combinations(recent, 2))

    assert rule.parameters() == {"budget": 0.5, "measure_every": 64, "window": window, "threshold": threshold}
    stops = [n for n in range(1, 5) if rule.settled(history[:n])]
    assert stops == [n for n in range(1, 5) if agree(n)] and (stops[0] if stops else None) == expected


def test_a_worker_that_dies_is_named_and_costs_no_other(aligned, tiny_tokens, kept):
    student, teacher = aligned

    class Failing(ThreadPoolExecutor):
        def submit(self, call):
            if (0,) in call.args[1]:
                lost = Future()
                lost.set_exception(RuntimeError("the worker is gone\nand a trace"))
                return lost
            return super().submit(call)

    with Failing(1) as pool, pytest.raises(ScoringFailed, match=r"layer 0 \(RuntimeError: the worker is gone\);"):
        hl.score_layers(student, teacher, tiny_tokens, num_tokens=128, settings=MATCH,
                        engine=Engine(executor=pool, records=kept))
    assert set(kept) == {(1, 128), (2, 128)}


def test_candidates_of_a_task_are_measured_together(aligned, tiny_tokens):
    student, teacher = aligned
    job, tasks = Job(LoadedInputs(student, teacher, tiny_tokens, TeacherStates(teacher)), 0), []

    class Counting(ThreadPoolExecutor):
        def submit(self, call):
            tasks.append(call.args[1])
            return super().submit(call)

    with Counting(1) as pool:
        pairs = run_candidates(job, [(0,), (1,), (2,)], Engine(pool), group=2)
    assert tasks == [[(0,), (1,)], [(2,)]]
    one = hl.score_layers(student, teacher, tiny_tokens, num_tokens=0)
    assert [c["kl"] for c in pairs[0]] == list(one.measured)


def test_a_search_finds_its_inputs_where_scoring_does(settings, whole):
    study = hl.Study(settings)
    tokens = study.tokens(0, settings.score_tokens, "score")
    measure = distilled_kl(study.aligned("gdn", 0), study.teacher.model, tokens, num_tokens=settings.score_tokens,
                              settings=study.match_settings, inputs=study.scoring_inputs("gdn", 0, tokens))
    sent = pickle.dumps(measure)
    assert len(sent) < 10_000  # names, no weights
    assert -pickle.loads(sent)((1,)) == whole.values[1]


def test_states_travel_without_what_they_remember(aligned, tiny_tokens):
    states = TeacherStates(aligned[1], 2**20)
    expected = states(tiny_tokens.heldout)
    other = pickle.loads(pickle.dumps(states))
    assert (states.used, other.used, other.memory) == (expected.nbytes, 0, 2**20)
    assert torch.equal(other(tiny_tokens.heldout), expected)


def test_two_dask_workers_give_the_same_scores(settings, whole, tmp_path, processes):
    distributed = pytest.importorskip("distributed", reason="needs distributed, of the extra cluster")
    from dask import config

    with (config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
          distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
                                   local_directory=str(tmp_path)) as cluster, distributed.Client(cluster) as client):
        study = hl.Study(fresh(settings, tmp_path), executor=client.get_executor())
        assert study.scores("gdn", 0).values == pytest.approx(whole.values, rel=1e-5)
        stopped = study.scores("gdn", 0, early_stop=hl.EarlyStop(1, 128, window=4))
    assert stopped.history_tokens == (128, 256, 384, 512)
    assert stopped.values == pytest.approx(whole.values, rel=1e-5)
    assert len(study.ledger.find("candidate")) == 3 * 4


def own_gpu(places):
    os.environ["CUDA_VISIBLE_DEVICES"] = places.get()  # before this worker asks CUDA for anything


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_worker_a_gpu_gives_the_same_scores(settings, tmp_path):
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    on_gpu = dataclasses.replace(settings, device="cuda", results=str(tmp_path / "one"))
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for name in names[:2]:
        places.put(name)
    begun = time.perf_counter()
    expected = hl.Study(on_gpu).scores("gdn", 0)
    here, begun = time.perf_counter() - begun, time.perf_counter()
    shutil.copytree(tmp_path / "one", tmp_path / "two", ignore=shutil.ignore_patterns("candidate-*", "score-*.json"))
    with ProcessPoolExecutor(2, context, own_gpu, (places,)) as pool:
        study = hl.Study(dataclasses.replace(on_gpu, results=str(tmp_path / "two")), executor=pool)
        found = study.scores("gdn", 0)
    print(f"{here:.1f} s in one process, {time.perf_counter() - begun:.1f} s by two workers, their start included")
    assert found.values == pytest.approx(expected.values, rel=1e-2) and len(study.ledger.find("candidate")) == 3


def test_what_a_worker_warms_up_on_is_not_what_it_scores_with(settings, monkeypatch):
    study = hl.Study(settings)
    study.aligned("gdn", 0)
    job = Job(study.scoring_inputs("gdn", 0, study.tokens(0, 512, "score")), 512, MATCH)
    inputs_module._load.cache_clear()
    monkeypatch.setattr(workers, "_ready", SimpleNamespace(wait=lambda seconds: None), raising=False)
    assert workers._load(job, 64) is None
    inputs = job.inputs.load()
    assert inputs.states.computed == 0 and not inputs.states.used


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_step_gives_a_candidate_the_same_bits_again(tiny_teacher, tiny_tokens, caplog):
    teacher = tiny_teacher("llama", head_dim=32).to("cuda")  # a dim that the fused kernels take
    student, graph = hl.linearize(teacher), dataclasses.replace(MATCH, cuda_graph=True, compile=True)
    once, again = (hl.score_layers(student, teacher, tiny_tokens, num_tokens=2048, settings=graph,
                                   engine=Engine(group=1))
                   for _ in range(2))
    assert once.values == again.values and "now by itself" not in caplog.text


@pytest.mark.parametrize(("why_not", "other_dim", "last", "expected"), [
    (None, 0, "fused", True), (None, 1, "fused", False), (None, 0, "chunked", False), ("no GPU", 0, "fused", False)])
def test_steps_are_bound_to_one_order_of_sums_where_all_mixers_run_the_fused_kernels(
        tiny_teacher, monkeypatch, why_not, other_dim, last, expected):
    student = hl.linearize(tiny_teacher("llama"))
    mixers = [layer.self_attn for layer in student.model.layers]
    mixers[-1].backend = last
    monkeypatch.setattr(stages.fused, "why_not", lambda: why_not)
    monkeypatch.setattr(stages.fused, "DIMS", (mixers[0].head_dim + other_dim,))
    assert stages._sums_in_order(student) == expected


def test_submitit_gives_the_same_scores(settings, whole, tmp_path):
    submitit = pytest.importorskip("submitit", reason="needs submitit, of the extra cluster")
    executor = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="debug")
    study = hl.Study(fresh(settings, tmp_path), executor=executor)
    assert study.scores("gdn", 0).values == pytest.approx(whole.values, rel=1e-5)


def test_workers_refuse_other_inputs_than_those_to_be_scored(settings, whole, tmp_path):
    study = hl.Study(settings)
    inputs = study.scoring_inputs("gdn", 0, study.tokens(0, settings.score_tokens, "score"))
    assert inputs.load() is inputs.load()
    for changes, message in (({"student_sha256": "0"}, "holds other weights than those to be scored"),
                             ({"seed": 1}, "gives other tokens here than where the scoring began")):
        job = Job(dataclasses.replace(inputs, **changes), 0)
        assert message in candidates.measure_sets(job, [(2,)])[2,]["error"]


def score_and_wait(settings, stop, left, group, waiting):
    """Score, but train only `left` times; say so through `waiting` when about to do so again."""
    def counted(train):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                waiting.send("waiting")
                time.sleep(600)
            return train(*args, **kwargs)
        return call

    candidates.match, candidates.Cohort.train = counted(candidates.match), counted(candidates.Cohort.train)
    hl.Study(settings, group=group).scores("gdn", 0, early_stop=stop)


def kill(processes, settings, stop, before, group=1):
    """Score in another process and kill it when it has trained so many times and is about to do so again."""
    told, waiting = processes.Pipe(duplex=False)
    process = processes.Process(target=score_and_wait, args=(settings, stop, before, group, waiting))
    process.start()
    waiting.close()
    try:
        assert told.recv() == "waiting"
    finally:
        process.kill()
        process.join()


def test_a_scoring_in_groups_that_was_killed_goes_on_in_other_groups(settings, whole, tmp_path, processes):
    mine, stop = fresh(settings, tmp_path), hl.EarlyStop(1, 128, window=4)
    kill(processes, mine, stop, 3, group=2)  # in the second round, once layers 0 and 1 are through
    study = hl.Study(mine)
    found = {r.key: (r.started, r.parameters["layer"]) for r in study.ledger.find("candidate")}
    assert sorted(layer for _, layer in found.values()) == [0, 0, 1, 1, 2]
    scores = study.scores("gdn", 0, early_stop=stop)
    assert scores.values == pytest.approx(whole.values, rel=1e-5)
    records = {r.key: (r.started, r.parameters["layer"]) for r in study.ledger.find("candidate")}
    assert len(records) == 3 * 4 and found.items() <= records.items()
    grouped = hl.Study(dataclasses.replace(mine, recompute=True), group=3).scores("gdn", 0)
    assert grouped.values == pytest.approx(whole.values, rel=1e-5)
    assert {r.key for r in hl.Study(settings).ledger.find("candidate")} <= {
        r.key for r in study.ledger.find("candidate")}  # no record depends on how layers are grouped


def test_states_that_stay_in_memory_are_not_written_and_no_measurement_is_lost(settings, whole, tmp_path, processes):
    mine, stop = fresh(settings, tmp_path), hl.EarlyStop(1, 128, window=4)
    kill(processes, mine, stop, 2, group=3)
    study = hl.Study(mine, group=3)
    found = {r.key: r.started for r in study.ledger.find("candidate")}
    assert len(found) == 2 * 3 and not list((study.ledger.folder / "models").rglob("candidate-*.safetensors"))
    assert study.scores("gdn", 0, early_stop=stop).values == pytest.approx(whole.values, rel=1e-5)
    records = {r.key: r.started for r in study.ledger.find("candidate")}
    assert len(records) == 4 * 3 and found.items() <= records.items()


@pytest.mark.parametrize(("stop", "before"), [(None, 1), (hl.EarlyStop(1, 128, window=4), 4)])
def test_a_scoring_killed_at_once_goes_on_to_the_same_scores(settings, whole, tmp_path, stop, before, monkeypatch,
                                                                  processes):
    mine = fresh(settings, tmp_path)
    kill(processes, mine, stop, before)
    found = {r.key: r.started for r in hl.Study(mine).ledger.find("candidate")}
    assert len(found) == before
    calls, train = [], candidates.match
    monkeypatch.setattr(candidates, "match", lambda *a, **k: calls.append(k["until"]) or train(*a, **k))
    study = hl.Study(mine)
    scores = study.scores("gdn", 0, early_stop=stop)
    assert scores.values == whole.values
    assert len(calls) == (3 if stop is None else 3 * 4) - before
    records = {r.key: r.started for r in study.ledger.find("candidate")}
    assert len(records) == len(calls) + before and found.items() <= records.items()
    assert not list((study.ledger.folder / "models").rglob("candidate-*.safetensors"))


def test_a_full_disk_costs_one_record(settings, whole, tmp_path, monkeypatch):
    study, replace, written = hl.Study(fresh(settings, tmp_path)), ledger.os.replace, []

    def full(source, target):
        if Path(target).name.startswith("candidate"):
            written.append(target)
            if len(written) == 2:
                raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(ledger.os, "replace", full)
    with pytest.raises(ScoringFailed, match=r"layer 1 \(OSError: .*No space left on device.*the other 2 of 3"):
        study.scores("gdn", 0)
    assert [r.parameters["layer"] for r in study.ledger.find("candidate")] == [0, 2]
    assert study.scores("gdn", 0).values == whole.values and len(written) == 4


def test_a_record_cut_short_is_named_and_kept(settings, tmp_path, whole):
    study = hl.Study(fresh(settings, tmp_path))
    study.scores("gdn", 0)
    parameters = study.ledger.find("candidate", layer=1)[0].parameters
    cut = study.ledger.path("candidate", parameters)
    cut.write_text(cut.read_text()[:100])
    next(study.ledger.folder.glob("score-*.json")).unlink()
    before = {p.name: p.read_text() for p in study.ledger.folder.glob("*.json")}
    with pytest.raises(ValueError, match=f"{cut.name} is not a whole record"):
        study.scores("gdn", 0)
    assert {p.name: p.read_text() for p in study.ledger.folder.glob("*.json")} == before
    cut.unlink()
    assert study.scores("gdn", 0).values == whole.values


def test_records_of_candidates_say_what_they_took(settings, whole):
    records = hl.Study(settings).ledger.find("candidate")
    assert [r.metrics["tokens"] for r in records] == [512] * 3 and all(r.device == records[0].device for r in records)
    for record in records:
        assert record.seconds == pytest.approx(record.metrics["seconds"], abs=1e-3) and "until" not in record.parameters


def test_bad_calls_are_refused_before_compute(aligned, tiny_teacher, tiny_tokens, settings, monkeypatch):
    student, teacher = aligned
    hybrid, others = hl.restore(student, teacher, [1]), TeacherStates(tiny_teacher("llama"))
    with pytest.raises(ValueError, match="states are of another teacher"):
        hl.match(hybrid, teacher, tiny_tokens, 128, states=others)
    monkeypatch.setattr(candidates, "match", None)
    score = partial(hl.score_layers, student, teacher, tiny_tokens, settings=MATCH, num_tokens=512)
    for call, arguments, message in (
            (hl.EarlyStop, (0, 64), "budget=0"), (hl.EarlyStop, (1.5, 64), "budget=1.5"),
            (hl.EarlyStop, (1, 0), "measure_every=0"), (hl.EarlyStop, (1, 64, 1), "window=1"),
            (hl.EarlyStop, (1, 64, 2, 0), "threshold=0"), (hl.EarlyStop, (1, 64, 2, 1.5), "threshold=1.5"),
            (hl.EarlyStop, (1, 64, 2, 1.0, 0), "heldout_tokens=0"), (Engine, (3,), "executor=3 has no submit"),
            (partial(Engine, memory=-1), (), "memory=-1"),
            (partial(hl.Study, settings, executor=3), (), "executor=3 has no submit"),
            (partial(score, early_stop=hl.EarlyStop(4, 256)), (), "budget=4 is not a count from 1 to 3"),
            (partial(score, early_stop=hl.EarlyStop(1, 64)), (), "measure_every=64 is less than a step of 128"),
            (partial(score, num_tokens=8), (), "num_tokens=8 is not a whole number of at least 16"),
            (partial(hl.Study(settings).scores, metric="mse", early_stop=NEVER), ("gdn", 0),
             "metric='mse' trains nothing")):
        with pytest.raises(ValueError, match=message):
            call(*arguments)
