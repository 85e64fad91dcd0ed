"""Sets trained at once end where the same sets end that are restored, matched and evaluated one by one."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import zlib

import pytest
import torch

import hybridlib as hl
from hybridlib.distill.recall import RecallTask
from hybridlib.distill.settings import DistillationDiverged
from hybridlib.selection.engine.cohort import Cohort
from hybridlib.selection.engine.sets import group_size, match_sets
from hybridlib.selection.engine.switched import Switched

SETTINGS = hl.MatchSettings(batch_tokens=64, learning_rate=1e-3, attention_learning_rate=3e-3, clip=0.5,
                            weight_decay=0.1)
SETS = [(), (1,), (2, 0), (0, 1, 2)]
TASK = RecallTask(pairs=2, queries=2, digits=2)


class Words:
    """A tokenizer of one token a word or mark, by checksum, and at times two, so that examples differ in length."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __call__(self, text, add_special_tokens=True):
        found = [zlib.crc32(part.encode()) for part in re.findall(r"\w+|[^\w ]", text)]
        return {"input_ids": [i % 61 + 3 for n in found for i in ([n] if n % 3 else [n, n // 7])]}


def in_double(model):
    return copy.deepcopy(model).double()


@pytest.fixture
def tokens(tiny_tokens):
    return hl.Tokens(tiny_tokens.train, tiny_tokens.heldout, tokenizer=Words())


def student_of(teacher, mixer="gdn"):
    """A linear student whose other weights are not the teacher's either."""
    student, generator = hl.linearize(teacher, mixer), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return student


def one_by_one(student, teacher, tokens, sets, num_tokens, settings, **measured):
    for layers in sets:
        hybrid = hl.restore(student, teacher, layers)
        history = hl.match(hybrid, teacher, tokens, num_tokens, settings=settings)
        yield history, hl.evaluate(hybrid, teacher, tokens, **measured)


FIGURES = ("kl", "kl_stderr", "perplexity", "top1_agreement", "recall_exact", "recall_stderr")


@pytest.mark.parametrize(("family", "mixer"), [("llama", "gdn"), ("llama_tied_bias", "gla"), ("qwen3", "gdn"),
                                               ("mistral", "gla")])
def test_sets_at_once_are_sets_one_by_one(tiny_teacher, tokens, family, mixer):
    teacher = in_double(tiny_teacher(family))
    student = student_of(teacher, mixer)
    weights = [p.clone() for p in student.parameters()]
    found = match_sets(student, teacher, tokens, SETS, 512, settings=SETTINGS, recall=TASK, recall_examples=12)
    expected = one_by_one(student, teacher, tokens, SETS, 512, SETTINGS, recall=TASK, recall_examples=12)
    for layers, result, (history, measured) in zip(SETS, found, expected, strict=True):
        assert result["layers"] == tuple(sorted(layers)) and result["tokens"] == 512 and result["seconds"] > 0
        assert result["losses"] == pytest.approx(history.losses, rel=1e-7) and result["loss_tokens"] == history.tokens
        assert len(set(result["losses"])) == 8 and "error" not in result and result["curve"] == []
        assert [result[name] for name in FIGURES] == pytest.approx([getattr(measured, name) for name in FIGURES], 1e-5)
    assert len({result["kl"] for result in found}) == 4
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), weights, strict=True))


def test_in_single_precision_they_differ_by_rounding(tiny_teacher, tokens):
    teacher = tiny_teacher("llama")
    student = student_of(teacher)
    found = match_sets(student, teacher, tokens, SETS, 512, settings=SETTINGS)
    for result, (history, measured) in zip(found, one_by_one(student, teacher, tokens, SETS, 512, SETTINGS)):
        assert result["losses"] == pytest.approx(history.losses, abs=1e-5)
        assert result["kl"] == pytest.approx(measured.kl, abs=1e-5) and result["recall_exact"] is None


@pytest.mark.parametrize(("family", "mixer"), [("qwen2", "gdn"), ("llama_tied_bias", "gla"), ("qwen3", "gdn")])
@torch.no_grad()
def test_a_candidate_becomes_the_plain_hybrid_of_a_single_run(tiny_teacher, tokens, tmp_path, family, mixer):
    teacher = in_double(tiny_teacher(family))
    student, ids = student_of(teacher, mixer), tokens.heldout.long()
    with torch.enable_grad():
        cohort = Cohort(student, teacher, tokens, SETS, 256, SETTINGS)
        switched = Switched(student, teacher, tokens, 256, SETTINGS)
        cohort.train(cohort.steps)
    outputs = [states @ head.mT for states, head in cohort.outputs(ids)]
    for c, layers in enumerate(SETS):
        single = hl.restore(student, teacher, layers)
        switched.take(layers)
        with torch.enable_grad():
            hl.match(single, teacher, tokens, 256, settings=SETTINGS)
            switched.train(switched.steps)
        for hybrid in (cohort.hybrid(c), switched.hybrid()):
            theirs = dict(single.named_parameters())
            assert type(hybrid) is type(single) and not hybrid.training
            assert all(torch.allclose(p, theirs.pop(name), rtol=1e-5, atol=1e-7)
                       for name, p in hybrid.named_parameters()) and not theirs
            logits = hybrid(input_ids=ids).logits
            assert torch.allclose(logits, outputs[c], rtol=1e-5, atol=1e-7)
            assert torch.allclose(logits, single(input_ids=ids).logits, rtol=1e-5, atol=1e-7)
            assert not torch.allclose(logits, hl.restore(student, teacher, layers)(input_ids=ids).logits, rtol=1e-3)
    hybrid.save_pretrained(tmp_path / "hybrid")
    again = hl.load_hybrid(tmp_path / "hybrid", dtype=torch.float64)
    assert torch.equal(again(input_ids=ids).logits, logits)


@pytest.mark.parametrize("change", [dict(micro_batch_tokens=16), dict(schedule="cosine", warmup=0.5),
                                    dict(divergence="jensen_shannon", temperature=2.0)], ids=lambda change: min(change))
def test_settings_are_honoured(tiny_teacher, tokens, change):
    teacher = in_double(tiny_teacher("llama"))
    student, settings = student_of(teacher), dataclasses.replace(SETTINGS, **change)
    found = match_sets(student, teacher, tokens, [(0,), (1, 2)], 256, settings=settings)
    for result, (history, _) in zip(found, one_by_one(student, teacher, tokens, [(0,), (1, 2)], 256, settings)):
        assert result["losses"] == pytest.approx(history.losses, rel=1e-7)


def test_the_size_of_groups_changes_nothing_nor_does_their_order(tiny_teacher, tokens):
    teacher = in_double(tiny_teacher("qwen3"))
    student = student_of(teacher)
    whole = match_sets(student, teacher, tokens, SETS, 256, settings=SETTINGS, group=4)
    for group in (1, 3):
        parts = match_sets(student, teacher, tokens, SETS[::-1], 256, settings=SETTINGS, group=group)[::-1]
        for one, other in zip(whole, parts, strict=True):
            assert one["losses"] == pytest.approx(other["losses"], rel=1e-7)
            assert one["kl"] == pytest.approx(other["kl"], rel=1e-5)


def test_groups_fit_the_memory_that_a_micro_batch_needs(tiny_teacher, tokens):
    student = hl.linearize(tiny_teacher("llama"))
    huge = dataclasses.replace(SETTINGS, batch_tokens=10**12)
    assert [group_size(student, tokens, settings, 4) for settings in
            (SETTINGS, huge, dataclasses.replace(huge, micro_batch_tokens=64))] == [4, 1, 4]


def test_a_curve_is_what_shorter_runs_at_the_same_rates_end_with(tiny_teacher, tokens):
    teacher = in_double(tiny_teacher("llama"))
    student, settings = student_of(teacher), dataclasses.replace(SETTINGS, warmup=0.0)
    result, = match_sets(student, teacher, tokens, [(1,)], 256, settings=settings, measure_at=(0, 100, 256),
                            recall=TASK, recall_examples=12)
    untrained = hl.evaluate(hl.restore(student, teacher, [1]), teacher, tokens, recall=TASK, recall_examples=12)
    (_, part), = one_by_one(student, teacher, tokens, [(1,)], 128, settings, recall=TASK, recall_examples=12)
    assert [point["tokens"] for point in result["curve"]] == [0, 128, 256]
    assert [point["kl"] for point in result["curve"]] == pytest.approx([untrained.kl, part.kl, result["kl"]], rel=1e-5)
    assert [point["recall_exact"] for point in result["curve"]] == [untrained.recall_exact, part.recall_exact,
                                                                    result["recall_exact"]]


def test_not_a_number_in_one_candidate_is_named_and_kept_there(tiny_teacher, tokens):
    teacher = in_double(tiny_teacher("llama"))
    student = student_of(teacher)
    with torch.no_grad():
        student.model.layers[2].self_attn.q_proj.weight[0, 0] = math.nan
    bad, *good = match_sets(student, teacher, tokens, [(0,), (2,), (1, 2)], 256, settings=SETTINGS, measure_at=(0,),
                               recall=TASK, recall_examples=12)
    assert re.fullmatch(r"layers \(0,\): match met .* at step 0 in layer 2; try .*", bad["error"])
    assert bad["losses"] == [] and bad["tokens"] == 0 and all(bad[name] is None for name in FIGURES)
    for result, (history, measured) in zip(good, one_by_one(student, teacher, tokens, [(2,), (1, 2)], 256, SETTINGS)):
        assert result["losses"] == pytest.approx(history.losses, rel=1e-7) and "error" not in result
        assert result["kl"] == pytest.approx(measured.kl, rel=1e-5)


def test_a_candidate_that_breaks_on_the_way_stops_alone(tiny_teacher, tokens):
    teacher = in_double(tiny_teacher("llama"))
    student = student_of(teacher)
    settings = hl.MatchSettings(batch_tokens=128, learning_rate=0.0, attention_learning_rate=1e3, clip=1e6, warmup=0.5,
                                grouping="mixers")
    bad, good = match_sets(student, teacher, tokens, [(), (0, 1, 2)], 2048, settings=settings,
                           measure_at=(128, 2048))
    with pytest.raises(DistillationDiverged, match="match met a number that is not finite at step [1-9]"):
        hl.match(hl.restore(student, teacher, ()), teacher, tokens, 2048, settings=settings)
    assert re.match(r"layers \(\): match met a number that is not finite at step [1-9]", bad["error"])
    assert 128 < bad["tokens"] == 128 * len(bad["losses"]) < 2048
    assert [point["tokens"] for point in bad["curve"]] == [128] and bad["kl"] is None
    (history, measured), = one_by_one(student, teacher, tokens, [(0, 1, 2)], 2048, settings)
    assert good["losses"] == pytest.approx(history.losses, rel=1e-7) and "error" not in good
    assert good["curve"][1]["kl"] == good["kl"] == pytest.approx(measured.kl, rel=1e-5)


@pytest.mark.parametrize(("change", "message"), [
    (dict(sets=[]), "sets is empty"), (dict(sets=[(3,)]), "layers holds 3"), (dict(sets=[(1, 1)]), "layer 1 twice"),
    (dict(num_tokens=8), "num_tokens=8"), (dict(group=0), "group=0"), (dict(measure_at=(512,)), "measure_at=512"),
    (dict(settings=hl.AlignSettings()), "settings is a AlignSettings"), (dict(recall=TASK, recall_examples=0), "=0")],
    ids=lambda value: "" if isinstance(value, str) else min(value))
def test_bad_calls_are_refused(tiny_teacher, tokens, change, message):
    teacher = tiny_teacher("llama")
    call = {"sets": SETS, "num_tokens": 256, "settings": SETTINGS} | change
    with pytest.raises(ValueError, match=message):
        match_sets(hl.linearize(teacher), teacher, tokens, call.pop("sets"), call.pop("num_tokens"), **call)


def test_students_and_tokens_that_do_not_fit_are_refused(tiny_teacher, tokens, tiny_tokens):
    teacher = tiny_teacher("llama")
    student = hl.linearize(teacher)
    with pytest.raises(ValueError, match="student has softmax layers"):
        match_sets(hl.restore(student, teacher, [0]), teacher, tokens, SETS, 256)
    with pytest.raises(ValueError, match="num_hidden_layers=2"):
        match_sets(student, tiny_teacher("llama", layers=2), tokens, SETS, 256)
    with pytest.raises(ValueError, match="no tokenizer"):
        match_sets(student, teacher, tiny_tokens, SETS, 256, recall=TASK)
    long = hl.Tokens(torch.zeros(4, 80, dtype=torch.int32), torch.zeros(2, 80, dtype=torch.int32))
    with pytest.raises(ValueError, match="context=80 is beyond the teacher's 64"):
        match_sets(student, teacher, long, SETS, 256)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mixer", ["gdn", "gla"])
def test_on_a_gpu_a_recorded_step_trains_as_an_ordinary_one_and_as_single_runs(tiny_teacher, tokens, mixer):
    teacher = copy.deepcopy(tiny_teacher("llama"))
    student = student_of(teacher, mixer).cuda()
    teacher.cuda()
    plain, recorded = (match_sets(student, teacher, tokens, SETS, 1024, recall=TASK, recall_examples=12,
                                     settings=dataclasses.replace(SETTINGS, cuda_graph=on)) for on in (False, True))
    single = one_by_one(student, teacher, tokens, SETS, 1024, SETTINGS)
    for one, other, (history, measured) in zip(plain, recorded, single, strict=True):
        assert other["losses"] == pytest.approx(one["losses"], rel=2e-2) and len(set(other["losses"])) == 16
        assert one["losses"] == pytest.approx(history.losses, rel=5e-2)
        assert [one["kl"], other["kl"]] == pytest.approx([measured.kl] * 2, rel=5e-2)
