"""PostNAS: one student with both branches in every layer, trained under random placements, is searched as it is."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from hybridlib.checks import check_int, check_weights
from hybridlib.distill.evaluate import heldout_kl
from hybridlib.distill.loop import train_steps
from hybridlib.distill.settings import MatchSettings
from hybridlib.distill.stages import matching_loss, weight_groups
from hybridlib.models.branches import ChosenAttention, both_branches, place
from hybridlib.models.hybrid import restore
from hybridlib.models.passes import last_hidden
from hybridlib.selection.cost import Cost, Meter, heldout_size
from hybridlib.selection.rules import budget_layers
from hybridlib.selection.search import SearchResult, beam

__all__ = ["PostNAS", "search_once_for_all", "train_once_for_all"]


@dataclass(frozen=True)
class PostNAS:
    """The result of `search_once_for_all`: after `history_tokens[i]` tokens the KL was `losses[i]` nats a token."""

    layers: tuple[int, ...]
    search: SearchResult
    history_tokens: tuple[int, ...]
    losses: tuple[float, ...]
    cost: Cost


def train_once_for_all(student, teacher, tokens, budget: float | int, num_tokens: int, *,
                       settings: MatchSettings | None = None, seed: int = 0):
    """Train a student with both branches in every layer, each step under a random placement of the budget's size.

    All weights but those of the two branches are frozen, and these train at the rates that `settings` give them,
    without CUDA graphs and ``torch.compile``; the models given are left as they were. Returns (model,
    `distill.History`).
    """
    count = budget_layers(budget, student.config.num_hidden_layers)
    settings = replace(settings or MatchSettings(), compile=False, cuda_graph=False)
    check_int("seed", seed, 0)
    check_weights("teacher", teacher)
    check_weights("student", student)
    model = both_branches(student, teacher, ChosenAttention)
    draw, every = random.Random(seed), range(student.config.num_hidden_layers)

    def outputs(ids):
        place(model, draw.sample(every, count))
        return [(last_hidden(model, ids), model.lm_head.weight)]

    attention = [(name, p) for name, p in model.named_parameters() if ".self_attn." in name]
    groups = weight_groups(attention, lambda name: ".self_attn.linear." in name, settings)
    history = train_steps("once for all", model, tokens, num_tokens, settings, groups,
                          matching_loss(outputs, teacher, settings))
    return model, history


def search_once_for_all(student, teacher, tokens, budget: float | int, num_tokens: int, *, width: int = 4,
                        settings: MatchSettings | None = None, seed: int = 0) -> PostNAS:
    """PostNAS: `train_once_for_all`, then a beam search (`width` sets) for the K layers of the lowest held-out KL.

    Source: Jet-Nemotron (arXiv 2508.15884). Chosen here, its search code not being public: KL to the teacher in
    training and search (theirs searches by a task's score), sets of the budget's size, and what is frozen.
    """
    check_int("width", width, 1)
    num_layers, context = student.config.num_hidden_layers, tokens.context
    count, meter = budget_layers(budget, num_layers), Meter(teacher, student)
    model, history = train_once_for_all(student, teacher, tokens, budget, num_tokens, settings=settings, seed=seed)

    def measure(layers):
        place(model, layers)
        return heldout_kl(model, teacher, tokens)[0]

    search = beam(measure, num_layers, count, width)
    hybrid, read = restore(student, teacher, range(count)), heldout_size(tokens, None)  # of the size of all placements
    meter.forward(teacher, history.tokens[-1], context)
    meter.train(hybrid, history.tokens[-1], context)
    meter.forward(teacher, search.evaluations * read, context, passes=search.evaluations)
    meter.forward(hybrid, search.evaluations * read, context, passes=search.evaluations)
    return PostNAS(search.layers, search, tuple(history.tokens), tuple(history.losses), meter.cost())
