"""Recall: examples are answerable and split as said; scoring against models whose answers are known."""

import re
from types import SimpleNamespace

import pytest
import torch

from hybridlib.distill.recall import (RecallExample, RecallTask, _is_heldout, encode_recall, generate_recall,
                                      score_recall)


class Letters:
    """A tokenizer of one token a character; it stands for any tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i > 2)


class Oracle(torch.nn.Module):
    """Knows the texts by heart: after a prefix of one of them it gives the next character, `wrong` ones excepted."""

    def __init__(self, texts, wrong=()):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(1))
        self.next = {t[:i]: c for t in texts for i, c in enumerate(t)}
        self.wrong, self.config = wrong, SimpleNamespace(max_position_embeddings=4096)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        logits = torch.zeros(*input_ids.shape, 128)
        for b, row in enumerate(input_ids.tolist()):
            start = 0 if attention_mask is None else int((attention_mask[b] == 0).sum())
            for t in range(start, len(row)):
                prefix = "".join(chr(c) for c in row[start:t + 1] if c > 2)
                c = self.next.get(prefix, "~")
                logits[b, t, ord("#" if any(prefix.endswith(w) for w in self.wrong) else c)] = 1.0
        return SimpleNamespace(logits=logits)

    def generate(self, input_ids, attention_mask, max_new_tokens, **kwargs):
        for _ in range(max_new_tokens):
            step = self(input_ids, attention_mask).logits[:, -1].argmax(-1, keepdim=True)
            input_ids = torch.cat((input_ids, step), 1)
            attention_mask = torch.cat((attention_mask, torch.ones_like(step)), 1)
        return input_ids


TASKS = [RecallTask(name, pairs=9, queries=3, hops=hops, filler=1) for name, hops in (
    ("key_value", 1), ("needle", 1), ("multi_hop", 2), ("variable_tracking", 2), ("lookup_sum", 1))]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_answer_follows_from_the_prompt(task):
    for example in generate_recall(task, 20, seed=3):
        text = example.prompt
        for question, answer in example.turns:
            if task.name == "key_value":
                assert f"\n{question.strip()}{answer}\n" in text
            elif task.name == "needle":
                assert f"{question.strip()}{answer}.\n" in text
            elif task.name == "multi_hop":
                middle = re.search(rf"(?m)^{question.removesuffix(' gets').strip()} is (.*)\.$", text)[1]
                assert f"\n{middle} has{answer}.\n" in "\n" + text
            elif task.name == "lookup_sum":
                facts = dict(re.findall(r"(?m)^(.*) has (\d+)\.$", text))
                names = re.split(", | and ", question.removesuffix(" have").strip())
                assert answer == f" {sum(int(facts[name]) for name in names)}." and len(facts) == 9
                assert len(set(names)) == 3 and all(_is_heldout(*fact) for fact in facts.items())
            else:
                first = re.search(rf"(?m)^set (.*) = {question.strip(' :' + chr(10))}$", text)[1]
                second = re.search(rf"(?m)^set (.*) = {first}$", text)[1]
                assert answer == f" {first} {second}" and text.index(f"set {first}") < text.index(f"set {second}")
        assert len({q for q, _ in example.turns}) == 3


def test_the_same_seed_gives_the_same_examples():
    assert generate_recall(TASKS[0], 5, seed=1) == generate_recall(TASKS[0], 5, seed=1)
    assert generate_recall(TASKS[0], 5, seed=1) != generate_recall(TASKS[0], 5, seed=2)


def test_no_pair_is_in_both_splits():
    pairs = {}
    for split in ("train", "heldout"):
        task = RecallTask("key_value", pairs=16, queries=16, digits=2, split=split)
        pairs[split] = {t for e in generate_recall(task, 200, seed=0) for t in e.turns}
        assert all(_is_heldout(q.strip("\n:"), a.strip()) == (split == "heldout") for q, a in pairs[split])
    assert not pairs["train"] & pairs["heldout"] and len(pairs["heldout"]) > 1000


@pytest.mark.parametrize("mode", ["teacher_forced", "greedy"])
def test_a_perfect_model_scores_one_and_a_lost_digit_costs_the_answer(mode):
    examples = generate_recall(RecallTask("key_value", pairs=4, filler=1), 6, seed=0)
    perfect = score_recall(Oracle([e.text for e in examples]), Letters(), examples, mode=mode, batch_size=4)
    assert (perfect.exact_match, perfect.answers, perfect.stderr) == (1.0, 6, 0.0)
    wrong = [e.prompt + e.turns[0][0] + e.turns[0][1][:3] for e in examples[:2]]  # the last digit of two answers
    score = score_recall(Oracle([e.text for e in examples], wrong), Letters(), examples, mode=mode, batch_size=4)
    assert score.exact_match == pytest.approx(4 / 6)
    assert score.stderr == pytest.approx((4 / 6 * 2 / 6 / 6) ** 0.5)


@pytest.mark.parametrize("digits", [1, 4])
def test_a_sum_that_goes_on_after_the_answer_is_wrong(digits):
    examples = generate_recall(RecallTask("lookup_sum", pairs=3, digits=digits), 4)
    wrong = [e.text[:-1] for e in examples[:3]]  # all digits are right, then another follows
    assert score_recall(Oracle([e.text for e in examples], wrong), Letters(), examples).exact_match == 1 / 4


def test_spans_are_the_answers():
    example = generate_recall(TASKS[3], 1)[0]
    ids, spans = encode_recall(example, Letters())
    assert [Letters().decode(ids[a:b]) for a, b in spans] == [a for _, a in example.turns]
    assert Letters().decode(ids) == example.text


def test_padding_changes_no_answer_of_a_model_of_transformers(tiny_teacher):
    class Small(Letters):
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [ord(c) // 2 % 2 for c in text]}

    teacher = tiny_teacher(max_position_embeddings=512, vocab_size=2)
    examples = generate_recall(RecallTask("key_value", pairs=2, queries=2, digits=2), 60)
    batched, single = (score_recall(teacher, Small(), examples, batch_size=size) for size in (8, 1))
    assert batched == single and 0 < single.exact_match < 1
    first = [RecallExample(e.prompt, e.turns[:1]) for e in examples]  # written right if right after the true text
    written = score_recall(teacher, Small(), examples, mode="greedy", batch_size=8)
    assert written == score_recall(teacher, Small(), first) and 0 < written.exact_match < 1


@pytest.mark.parametrize(("task", "message"), [
    (dict(name="maze"), "name='maze' is unknown"), (dict(pairs=1), "pairs=1 .* 2 to 512"),
    (dict(queries=17), "queries=17 .* 1 to 16"), (dict(hops=2), "hops=2 .* 1 to 1"),
    (dict(name="lookup_sum", pairs=2), "pairs=2 .* 3 to 512"), (dict(split="test"), "split='test'"),
    (dict(name="lookup_sum", queries=6), "queries=6 .* 1 to 5"), (dict(digits=0), "digits=0"),
    (dict(digits=1), "digits=1 is too few for pairs=16"), (dict(), "context is 8")])
def test_bad_tasks_and_calls_are_refused(task, message):
    model = Oracle([])
    model.config.max_position_embeddings = 8
    with pytest.raises(ValueError, match=message):
        score_recall(model, Letters(), generate_recall(RecallTask(**task), 1))
    with pytest.raises(ValueError, match="examples is empty"):
        score_recall(model, Letters(), [])
