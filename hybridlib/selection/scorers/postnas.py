"""PostNAS: one student with both branches in every layer, trained under random placements, is searched as it is."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from hybridlib.checks import check_int
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
    """The result of `search_once_for_all`: `layers`, what the `search` measured, and the training's loss.

    After `history_tokens[i]` tokens the step's KL, of the placement that it drew, was `losses[i]` nats a token.
    """

    layers: tuple[int, ...]
    search: SearchResult
    history_tokens: tuple[int, ...]
    losses: tuple[float, ...]
    cost: Cost


def train_once_for_all(student, teacher, tokens, budget: float | int, num_tokens: int, *,
                       settings: MatchSettings | None = None, seed: int = 0):
    """Train a student with both branches in every layer, each step under a random placement of the budget's size.

    Parameters
    ----------
    student : all linear and aligned; teacher : the model it was made from. Both are left as they were.
    budget : share or count of softmax layers; it gives K, see `selection.budget_layers`.
    num_tokens : tokens to train on, in the order of `tokens`.
    settings : of stage 2; `mixer_learning_rate` for the mixers, `learning_rate` for the softmax branches. It runs
        without CUDA graphs and ``torch.compile``, for a placement changes what is run.
    seed : draws the placements.

    Returns (model, `distill.History`). All weights but those of the two branches are frozen.
    """
    count = budget_layers(budget, student.config.num_hidden_layers)
    settings = replace(settings or MatchSettings(), compile=False, cuda_graph=False)
    check_int("seed", seed, 0)
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
    """PostNAS: `train_once_for_all`, then a beam search for the K layers of the lowest held-out KL, untrained.

    `width` is of the search, see `search.beam`; the other parameters are as for `train_once_for_all`.

    Cost: `num_tokens` forward through the teacher, forward and backward through the student; at most
    L + width (K - 1)(2L - K) / 2 times the held-out rows through both.

    Assumes that weights shared by all placements rank them as weights trained for each would, also those of fewer
    layers that the search measures on its way. Source: Jet-Nemotron (arXiv 2508.15884). Chosen here, its search code
    not being public: KL to the teacher in training and search (theirs searches by a task's score); sets of the budget's
    size, drawn evenly; all weights but attention and mixers frozen.
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
