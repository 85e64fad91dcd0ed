"""What each layer's attention does, and what is lost without it: a layer needed is not a layer irreplaceable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch.nn import Module
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybridlib.checks import check_int, check_number, check_weights
from hybridlib.distill.corpus import Tokens
from hybridlib.distill.evaluate import heldout_row_kl
from hybridlib.distill.recall import RecallTask, encode_all, forced_answers, generate_recall
from hybridlib.models.branches import gated_model, set_gates
from hybridlib.models.hybrid import check_layers, restore
from hybridlib.models.passes import TeacherStates, last_hidden, measuring
from hybridlib.models.teachers import check_family
from hybridlib.selection.scorers.ablation import ablate

__all__ = ["attention_roles", "gate_curves", "recall_without_each"]

_PROMPTS_A_PASS = 128


def attention_roles(teacher: PreTrainedModel, rows: torch.Tensor, *, repeated: int = 128, repeats: int = 16,
                    seed: int = 0, batch_rows: int = 4) -> dict[str, list[list[float]]]:
    """Return how far each head of a teacher looks, and to where: lists (layers, heads) of means over queries.

    ``distance`` is the mean distance of what a query reads, in tokens, weighted by attention, and ``previous`` the
    weight on the token just before, both over the text of `rows`, ids (rows, time). ``induction`` is the weight on the
    token that followed the query's own last time, over the second halves of `repeats` rows of `repeated` random tokens
    said twice; other text, with no meaning, leaves copying alone (Olsson et al., arXiv 2209.11895).

    Attention is computed in full meanwhile, (heads, time, time) a row. Raises ValueError for a teacher of another
    family, or rows shorter than two tokens.
    """
    check_family(teacher.config)
    check_int("repeated", repeated, 2, teacher.config.max_position_embeddings // 2)
    check_int("repeats", repeats, 1)
    check_int("batch_rows", batch_rows, 1)
    if rows.dim() != 2 or rows.shape[1] < 2 or not len(rows):
        raise ValueError(f"rows has shape {tuple(rows.shape)}; it must be (rows, time), of at least two tokens")
    check_weights("teacher", teacher)
    drawn = torch.randint(teacher.config.vocab_size, (repeats, repeated),
                          generator=torch.Generator().manual_seed(seed))

    def text(weights):  # (rows, heads, time, time)
        place = torch.arange(weights.shape[-1], device=weights.device, dtype=weights.dtype)
        distance = (weights * (place[:, None] - place)).sum(-1)[..., 1:]  # the first token has nothing to look at
        return torch.stack((distance.mean(-1), weights.diagonal(-1, -2, -1).mean(-1)))

    def copying(weights):
        return weights.diagonal(1 - repeated, -2, -1)[..., 1:].mean(-1)[None]  # of queries of the second half

    distance, previous = _over_attention(teacher, rows, text, batch_rows)
    induction, = _over_attention(teacher, drawn.repeat(1, 2), copying, batch_rows)
    return {"distance": distance.tolist(), "previous": previous.tolist(), "induction": induction.tolist()}


def _over_attention(teacher, rows, measure: Callable[[torch.Tensor], torch.Tensor], batch_rows) -> torch.Tensor:
    """The mean over rows of what `measure` makes of a layer's attention weights: (figures, layers, heads)."""
    device, total = next(teacher.parameters()).device, 0
    with measuring(teacher), _plain_attention(teacher), ExitStack() as hooks:
        layers: list = []
        for layer in teacher.model.layers:
            hooks.callback(layer.self_attn.register_forward_hook(
                lambda module, args, output: layers.append(measure(output[1].float()).double().sum(1).cpu())).remove)
        for ids in rows.split(batch_rows):
            layers.clear()
            last_hidden(teacher, ids.to(device).long())
            total = total + torch.stack(layers, 1)
    return total / len(rows)


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, attention computes its weights, and gives them."""
    own = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(own)


def recall_without_each(student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                        task: RecallTask, *, num_examples: int = 200, seed: int = 1) -> dict:
    """Return the teacher's recall as it is, with each layer's attention silenced, and with it replaced by its mixer.

    ``intact`` is a share of answers, ``silenced`` and ``replaced`` are lists of shares, (layers,), of ``answers``:
    an answer is right if each of its tokens is the arg max after the true text before it. `student` is all linear and
    aligned.
    """
    check_int("num_examples", num_examples, 1)
    check_weights("teacher", teacher)
    check_weights("student", student)
    every = range(teacher.config.num_hidden_layers)
    encoded = encode_all(generate_recall(task, num_examples, seed=seed), tokenizer, teacher.config)

    def share(model: Module) -> float:
        with measuring(model):
            return forced_answers(model, encoded, _PROMPTS_A_PASS)[0].double().mean().item()

    figures: dict = {"intact": share(teacher), "silenced": [], "replaced": [], "answers": num_examples * task.queries}
    for l in tqdm(every, desc="recall without a layer", unit="layer", leave=False):
        with ablate(teacher, [l]):
            figures["silenced"].append(share(teacher))
        figures["replaced"].append(share(restore(student, teacher, [m for m in every if m != l])))
    return figures


def gate_curves(student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tokens, pair: Sequence[int],
                gates: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0), *, heldout_tokens: int | None = None
                ) -> list[dict]:
    """Return the held-out KL of the aligned student along a layer's gate, from its mixer (0) to softmax (1).

    Either layer of `pair` opens, ``layer``, while the other one, ``other``, is closed or open, ``open``; all other
    layers are linear and nothing trains. A point has its ``gate`` and ``kl``, in nats a token.
    """
    pair = check_layers(pair, student.config.num_hidden_layers)
    if len(pair) != 2:
        raise ValueError(f"pair={list(pair)!r} is not two layers")
    for gate in gates:
        check_number("gates", gate, 0, 1)
    check_weights("teacher", teacher)
    check_weights("student", student)
    model, states, points = gated_model(student, teacher), TeacherStates(teacher), []
    for layer, other in (pair, pair[::-1]):
        for open_ in (False, True):
            for gate in gates:
                placed = torch.zeros(student.config.num_hidden_layers)
                placed[layer], placed[other] = gate, float(open_)
                set_gates(model, placed)
                rows = heldout_row_kl(model, teacher, tokens, heldout_tokens=heldout_tokens, states=states)
                points.append({"layer": layer, "other": other, "open": open_, "gate": gate,
                               "kl": sum(rows) / len(rows)})
    return points
