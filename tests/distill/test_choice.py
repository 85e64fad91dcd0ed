"""Questions with several continuations: cut from rows as said, and answered as a loop over whole sequences does."""

import pytest
import torch

import hybridlib as hl
from hybridlib.distill.choice import ChoiceTask, choice_probabilities, generate_choices

ROWS = torch.arange(1, 61).view(4, 15)  # a token stands in one place alone


def test_questions_are_windows_of_rows_with_the_ends_of_others():
    items = generate_choices(ROWS, ChoiceTask(items=6, choices=3, length=2, prompt=5), seed=1)
    assert items.shape == (6, 3, 7)
    starts = {7 * i + 15 * row + 1 for row in range(4) for i in range(2)}
    assert {int(q[0, 0]) for q in items} <= starts and len({int(q[0, 0]) for q in items}) == 6
    truth = [tuple(q[0].tolist()) for q in items]
    assert all(t == tuple(range(t[0], t[0] + 7)) for t in truth)
    for question in items.tolist():
        ends = [tuple(option[-2:]) for option in question]
        assert len(set(ends)) == 3 and set(ends) <= {t[-2:] for t in truth}
        assert all(option[:5] == question[0][:5] for option in question)
    assert torch.equal(items, generate_choices(ROWS, ChoiceTask(6, 3, 2, 5), seed=1))
    assert not torch.equal(items, generate_choices(ROWS, ChoiceTask(6, 3, 2, 5), seed=2))
    assert generate_choices(ROWS, ChoiceTask(length=8)).shape == (4, 4, 15)  # rows shorter than asked for


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("softmax", [(), (0, 2), None])
def test_probabilities_are_those_of_whole_sequences(tiny_teacher, family, softmax):
    model = tiny_teacher(family)
    if softmax is not None:
        model = hl.restore(hl.linearize(model), model, list(softmax))
    items = generate_choices(ROWS, ChoiceTask(choices=4, length=3, prompt=4))
    probabilities = choice_probabilities(model, items, 3, batch_tokens=40)
    for question, found in zip(items, probabilities, strict=True):
        with torch.no_grad():
            nats = model(input_ids=question).logits.double().log_softmax(-1)
        whole = torch.stack([sum(row[t - 1, option[t]] for t in range(4, 7))
                             for row, option in zip(nats, question, strict=True)])
        torch.testing.assert_close(found, whole.softmax(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("task", "message"), [
    (dict(length=15), "^length=15 leaves no prompt in rows of context=15"), (dict(choices=1), "^choices=1 "),
    (dict(choices=5), "^choices=5 is too many for 4 questions"), (dict(length=0), "^length=0 ")])
def test_bad_tasks_are_refused(task, message):
    with pytest.raises(ValueError, match=message):
        generate_choices(ROWS, ChoiceTask(**task))
    with pytest.raises(ValueError, match="^choices=4 is too many for 4 questions, some with the same"):
        generate_choices(ROWS[[0, 0, 1, 2]], ChoiceTask())
