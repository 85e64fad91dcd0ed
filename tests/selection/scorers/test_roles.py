"""What layers do: attention as transformers gives it, heads made by hand, recall and KL by plain hybrids."""

import pytest
import torch

import hybridlib as hl
from hybridlib.distill.evaluate import heldout_kl
from hybridlib.distill.recall import RecallTask, generate_recall, score_recall
from hybridlib.selection.scorers.roles import attention_roles, gate_curves, recall_without_each


def test_distances_and_weights_are_those_of_the_attention_that_transformers_gives(tiny_teacher, tiny_tokens):
    teacher, rows = tiny_teacher("qwen3"), tiny_tokens.heldout[:3]
    roles = attention_roles(teacher, rows, repeated=5, repeats=2, batch_rows=2)
    assert teacher.config._attn_implementation == "sdpa"  # as it was
    teacher.set_attn_implementation("eager")
    drawn = torch.randint(teacher.config.vocab_size, (2, 5), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    text, twice = (teacher(input_ids=ids.long(), output_attentions=True).attentions for ids in (rows, drawn))
    for layer, (weights, copied) in enumerate(zip(text, twice)):
        for head in range(weights.shape[1]):
            own, time = weights[:, head], weights.shape[-1]
            far = [sum(own[r, i, j] * (i - j) for j in range(i + 1)) for r in range(3) for i in range(1, time)]
            before = [own[r, i, i - 1] for r in range(3) for i in range(1, time)]
            after = [copied[r, head, i, i - 5 + 1] for r in range(2) for i in range(5, 10)]
            for name, values in (("distance", far), ("previous", before), ("induction", after)):
                assert roles[name][layer][head] == pytest.approx(float(sum(values) / len(values)), abs=1e-5)


def test_the_lab_teacher_copies_by_a_previous_token_head_and_an_induction_head_above_it():
    teacher = hl.load_teacher("lab", device="cpu")
    rows = hl.load_tokens("lab", teacher.tokenizer, context=128, max_tokens=6_400, heldout_tokens=256).heldout
    roles = attention_roles(teacher.model, rows, repeated=40, repeats=4)
    strongest = {name: torch.tensor(values).amax(1) for name, values in roles.items()}
    assert strongest["previous"].argmax() < strongest["induction"].argmax()
    assert strongest["previous"].max() > 0.5 and strongest["induction"].max() > 0.3


def test_recall_without_a_layer_is_that_of_a_hybrid_or_of_a_teacher_with_no_output():
    teacher = hl.load_teacher("lab", device="cpu")
    student = hl.linearize(teacher.model, "gdn")
    task = RecallTask("key_value", pairs=4)
    figures = recall_without_each(student, teacher.model, teacher.tokenizer, task, num_examples=8)
    prompts, layers = generate_recall(task, 8, seed=1), range(8)
    assert figures["intact"] == score_recall(teacher.model, teacher.tokenizer, prompts).exact_match > 0.9
    assert figures["answers"] == 8
    for l in (0, 1, 4):
        hybrid = hl.restore(student, teacher.model, [m for m in layers if m != l])
        assert figures["replaced"][l] == score_recall(hybrid, teacher.tokenizer, prompts).exact_match
        own = teacher.model.model.layers[l].self_attn.o_proj.weight
        kept = own.detach().clone()
        own.data.zero_()
        assert figures["silenced"][l] == score_recall(teacher.model, teacher.tokenizer, prompts).exact_match
        own.data.copy_(kept)


def test_a_gate_leads_from_one_hybrid_to_another(tiny_teacher, tiny_tokens):
    teacher = tiny_teacher("llama")
    student = hl.linearize(teacher, "gdn")
    points = gate_curves(student, teacher, tiny_tokens, (2, 0), gates=(0.0, 1.0))
    assert len(points) == 8
    for point in points:
        layers = [point["layer"]] * (point["gate"] == 1) + [point["other"]] * point["open"]
        expected = heldout_kl(hl.restore(student, teacher, layers), teacher, tiny_tokens)[0]
        assert point["kl"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("change, message", [
    (dict(pair=(1,)), r"pair=\[1\] is not two layers"), (dict(pair=(0, 1), gates=(2.0,)), "gates=2.0 is not a number")])
def test_gates_that_do_not_fit_are_refused(tiny_teacher, tiny_tokens, change, message):
    teacher = tiny_teacher("llama")
    with pytest.raises(ValueError, match=message):
        gate_curves(hl.linearize(teacher, "gdn"), teacher, tiny_tokens, **change)
