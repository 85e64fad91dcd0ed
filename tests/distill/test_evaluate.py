"""Evaluation against plain formulas."""

import math

import pytest
import torch

import hybridlib as hl
from hybridlib.distill.evaluate import _row_figures, heldout_kl
from hybridlib.distill.recall import RecallTask, generate_recall, score_recall


def test_figures_are_those_of_the_plain_formulas(tiny_teacher, tiny_tokens):
    teacher = tiny_teacher()
    hybrid = hl.restore(hl.linearize(teacher), teacher, [1]).eval()
    measured = hl.evaluate(hybrid, teacher, tiny_tokens, batch_tokens=48)
    ids = tiny_tokens.heldout.long()
    p, q = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (teacher, hybrid))
    kl = (p.exp() * (p - q)).sum(-1).mean(-1)
    nats, least = (-x[:, :-1].gather(-1, ids[:, 1:, None]).mean() for x in (q, p))
    assert measured.kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert measured.kl_stderr == pytest.approx(kl.std().item() / math.sqrt(len(ids)), rel=1e-3)
    assert measured.perplexity == pytest.approx(nats.exp().item(), rel=1e-4)
    assert measured.teacher_perplexity == pytest.approx(least.exp().item(), rel=1e-4)
    assert measured.heldout_tokens == ids.numel() and measured.recall_exact is None
    assert measured.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert heldout_kl(hybrid, teacher, tiny_tokens)[0] == pytest.approx(measured.kl, rel=1e-5)


def test_fewer_held_out_tokens_are_the_first_rows(tiny_teacher, tiny_tokens):
    teacher = tiny_teacher()
    hybrid = hl.linearize(teacher)
    few = hl.Tokens(tiny_tokens.train, tiny_tokens.heldout[:3])
    assert heldout_kl(hybrid, teacher, tiny_tokens, heldout_tokens=50) == heldout_kl(hybrid, teacher, few)
    with pytest.raises(ValueError, match="heldout_tokens=15 is not a whole number of at least 16"):
        heldout_kl(hybrid, teacher, tiny_tokens, heldout_tokens=15)
    with pytest.raises(ValueError, match="tokens.tokenizer=None cannot encode recall"):
        hl.evaluate(hybrid, teacher, tiny_tokens, recall=RecallTask())


def test_what_is_written_is_the_greedy_recall_and_asked_for(tiny_teacher, tiny_tokens):
    class Bits:
        bos_token_id = eos_token_id = pad_token_id = 0

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [ord(c) // 2 % 2 for c in text]}

    teacher = tiny_teacher(max_position_embeddings=512, vocab_size=2, eos_token_id=None)
    task = RecallTask(pairs=2, digits=2)
    tokens = hl.Tokens(tiny_tokens.train % 2, tiny_tokens.heldout % 2, Bits())
    measured = hl.evaluate(teacher, teacher, tokens, recall=task, recall_examples=40, written=True)
    score = score_recall(teacher, Bits(), generate_recall(task, 40, seed=1), mode="greedy", batch_size=1)
    assert (measured.recall_written, measured.recall_written_stderr) == (score.exact_match, score.stderr)
    assert measured.recall_written_hits == "".join(str(int(hit)) for hit in score.hits) and 0 < score.exact_match < 1
    plain = hl.evaluate(teacher, teacher, tokens, recall=task, recall_examples=40).metrics()
    assert set(measured.metrics()) - set(plain) == {f"recall_written{end}" for end in ("", "_stderr", "_hits")}
    with pytest.raises(ValueError, match="written=True needs a recall task"):
        hl.evaluate(teacher, teacher, tokens, written=True)


def test_measuring_builds_no_graph_and_leaves_gradients_on(tiny_teacher, tiny_tokens):
    teacher = tiny_teacher()
    hybrid, graph = hl.linearize(teacher), []
    hybrid.lm_head.register_forward_hook(lambda module, args, output: graph.append(output.requires_grad))
    hl.evaluate(hybrid, teacher, tiny_tokens)
    assert graph and not any(graph)
    assert torch.is_grad_enabled() and hybrid(input_ids=tiny_tokens.rows(0, 1)).logits.requires_grad


def test_a_token_that_the_teacher_cannot_give_adds_nothing_to_kl():
    logits = torch.tensor([[[0.0, 1.0, -math.inf]] * 2]), torch.tensor([[[0.0, 2.0, 1.0]] * 2])
    ids = torch.tensor([[0, 1]])
    kl, nats, teacher_nats, agreement = _row_figures(*logits, ids)[0].tolist()
    q = [1, math.e**2, math.e]
    p = [1 / (1 + math.e), math.e / (1 + math.e)]
    assert kl == pytest.approx(sum(a * math.log(a * sum(q) / b) for a, b in zip(p, q[:2], strict=True)), rel=1e-6)
    assert nats == pytest.approx(math.log(sum(q)) - 2, rel=1e-6)
    assert teacher_nats == pytest.approx(-math.log(p[1]), rel=1e-6) and agreement == 1
    assert not _row_figures(*reversed(logits), ids)[0, 0].isfinite()
