"""Redundant layers by self-speculation: attention that a draft of the teacher can skip is attention to linearize.

A draft is the teacher with the attention of some layers silenced. Speculative decoding accepts a drafted token with
probability sum(min(p, q)) over the vocabulary, p the teacher's distribution and q the draft's (arXiv 2211.17192).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import norm

from hybridlib.checks import check_int, check_number
from hybridlib.models.hybrid import check_layers
from hybridlib.models.passes import last_hidden
from hybridlib.models.teachers import check_family
from hybridlib.selection.cost import Cost, Meter
from hybridlib.selection.rules import budget_layers
from hybridlib.selection.scorers.ablation import ablate, heldout_batches, measuring, silence_each
from hybridlib.selection.scores import LayerScores

__all__ = ["SkipSearch", "acceptance", "draft_cost", "maximize_over_sets", "score_acceptance", "search_skips",
           "throughput"]


@dataclass(frozen=True)
class SkipSearch:
    """The result of `search_skips`.

    `layers` are to stay softmax. The draft that skips the attention of the others has this `acceptance` and this
    `throughput`, in tokens for the time that the teacher takes for one. `scores` are of single layers, `evaluations`
    is the number of sets that were tried, `cost` that of scores and search together.
    """

    layers: tuple[int, ...]
    acceptance: float
    throughput: float
    scores: LayerScores
    evaluations: int
    cost: Cost


def acceptance(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """Probability that a token drawn from q's logits (..., vocab) is accepted for p's: sum of min(p, q), (...)."""
    return torch.minimum(p_logits.float().softmax(-1), q_logits.float().softmax(-1)).sum(-1)


def throughput(acceptance: float, cost: float, gamma: int) -> float:
    """Tokens in the time of one teacher pass: (1 - a^(gamma+1)) / ((1 - a)(gamma c + 1)) (arXiv 2211.17192, thm 3.8).

    Parameters
    ----------
    acceptance : a, of a drafted token, 0 to 1; taken as the same and independent for each.
    cost : c, time of a draft's pass over that of a teacher's, 0 to 1.
    gamma : tokens drafted before the teacher checks them all in one pass.
    """
    check_number("acceptance", acceptance, 0, 1)
    check_number("cost", cost, 0, 1)
    check_int("gamma", gamma, 1)
    return sum(acceptance ** i for i in range(gamma + 1)) / (gamma * cost + 1)  # the geometric sum, for a = 1 too


def draft_cost(model, skipped: Iterable[int]) -> float:
    """Share of the teacher's weights that a draft reads: decoding one sequence takes the time of reading them.

    Input embeddings are looked up, not read; the output head is read. Keys and values are left out, so for long texts
    a draft is cheaper than this.
    """
    skipped = check_layers(skipped, model.config.num_hidden_layers)

    def size(module):
        return sum(p.numel() for p in module.parameters())

    read = size(model.model) - size(model.model.embed_tokens) + size(model.lm_head)
    return 1 - sum(size(model.model.layers[l].self_attn) for l in skipped) / read


def score_acceptance(teacher, tokens, *, heldout_tokens: int | None = None, batch_tokens: int = 8192) -> LayerScores:
    """RAD, layer by layer: the share of drafted tokens that is refused if the draft skips layer l's attention alone.

    Parameters as in `silence_each`. Metric ``"rad"``: `values` is 1 - acceptance, `measured` the acceptance with its
    standard error over rows. It is in closed form and teacher-forced: both models read the same held-out text.

    Assumes that layers are independent; `search_skips` does not. Source: arXiv 2505.22135, which searches sets; a score
    for each layer is ours, to rank with.
    """
    def prepare(batches):
        states = [last_hidden(teacher, ids) for ids in batches]
        return lambda: _row_acceptance(teacher, batches, states)

    mean, stderr, cost = silence_each(teacher, tokens, heldout_tokens, batch_tokens, "score (rad)", prepare)
    return LayerScores("remove", "rad", tuple(1 - a for a in mean), tuple(mean), tuple(stderr), 0, cost.seconds, cost)


def search_skips(teacher, tokens, budget: float | int, *, gamma: int = 4, evaluations: int = 64, seed: int = 0,
                 heldout_tokens: int | None = None, batch_tokens: int = 8192) -> SkipSearch:
    """RAD: keep the layers that the best draft of L - K skipped layers does not skip.

    The best draft has the highest `throughput`, given its acceptance (as in `score_acceptance`) and its `draft_cost`.
    Chosen here, where the source leaves it open: exactly L - K layers are skipped, so that a budget is met (the cost is
    then the same for all sets where layers are of one size, and the most accepted set wins); the search starts from
    the set that `score_acceptance` suggests, so that its result is at least as good on the same text.

    Assumes that a linear mixer does for a layer at least what nothing does for it. Cost: 2 + L + `evaluations` forward
    passes over the held-out tokens. Source: arXiv 2505.22135; Bayesian optimization of skipped layers: arXiv
    2309.08168.

    Parameters
    ----------
    teacher, tokens, heldout_tokens, batch_tokens : as for `score_acceptance`.
    budget : share or count of layers to keep, see `selection.budget_layers`.
    gamma : drafted tokens a check, see `throughput`.
    evaluations : sets to try at most.
    seed : of the search.
    """
    check_family(teacher.config)
    check_int("gamma", gamma, 1)
    check_int("evaluations", evaluations, 1)
    num_layers = teacher.config.num_hidden_layers
    size = num_layers - budget_layers(budget, num_layers)
    batches = heldout_batches(teacher, tokens, heldout_tokens, batch_tokens)
    scores = score_acceptance(teacher, tokens, heldout_tokens=heldout_tokens, batch_tokens=batch_tokens)
    meter, accepted = Meter(teacher), {}

    def value(skipped):
        with ablate(teacher, skipped):
            accepted[skipped] = min(1.0, _row_acceptance(teacher, batches, states).mean().item())
        return throughput(accepted[skipped], draft_cost(teacher, skipped), gamma)

    with measuring(teacher):
        states = [last_hidden(teacher, ids) for ids in batches]
        skipped, best = maximize_over_sets(value, num_layers, size, evaluations=evaluations, seed=seed,
                                           first=scores.ranking[num_layers - size:])
    passes = len(accepted) + 1
    meter.forward(teacher, passes * sum(ids.numel() for ids in batches), tokens.context, passes=passes)
    return SkipSearch(tuple(l for l in range(num_layers) if l not in skipped), accepted[skipped], best, scores,
                      len(accepted), scores.cost + meter.cost())


def maximize_over_sets(value: Callable[[tuple[int, ...]], float], num_layers: int, size: int, *, evaluations: int = 64,
                       seed: int = 0, first: Iterable[int] | None = None) -> tuple[tuple[int, ...], float]:
    """The best set of `size` layers, and its value, by Bayesian optimization over [0, 1]^L.

    A point stands for the set of its `size` largest coordinates. A Gaussian process models `value` on sets: mean 0 and
    variance 1 after standardizing, covariance exp(-d / (2 s^2)) for sets that differ in d layers, s by its likelihood.
    After `first`, if given, and as many random sets as there are layers (at most half of `evaluations`), each
    evaluation goes to the set with the highest expected improvement among random points and points near the best one.

    Parameters
    ----------
    value : of a set, given as an ascending tuple; called at most once for each.
    num_layers : L.
    size : layers in a set.
    evaluations : calls at most; fewer if there are fewer sets, and then all are tried.
    seed : of the random points.
    first : a set to start from.
    """
    check_int("size", size, 0, num_layers)
    check_int("evaluations", evaluations, 1)
    rng, values, sets = np.random.default_rng(seed), {}, math.comb(num_layers, size)

    def nearest_sets(points):  # (points, layers) -> untried sets
        return sorted({tuple(sorted(p.tolist())) for p in np.argsort(-points)[:, :size]} - set(values))

    def indicators(chosen):
        return np.array([[l in s for l in range(num_layers)] for s in chosen], dtype=float)

    if first is not None:
        chosen = check_layers(first, num_layers)
        if len(chosen) != size:
            raise ValueError(f"first={chosen} holds {len(chosen)} layers; the set to start from must hold size={size}")
        values[chosen] = value(chosen)
    drawn = max(1, len(values) + min(num_layers, evaluations // 2))
    while len(values) < min(evaluations, sets):
        if len(values) < drawn:
            candidates = nearest_sets(rng.random((1, num_layers)))
            expected = np.zeros(len(candidates))
        else:
            best = indicators([max(values, key=values.get)])
            near = best + rng.normal(scale=0.5, size=(256, num_layers))
            candidates = nearest_sets(np.concatenate([rng.random((512, num_layers)), near.clip(0, 1)]))
            expected = _expected_improvement(indicators(values), np.array([*values.values()]), indicators(candidates))
        if candidates:
            chosen = candidates[int(np.argmax(expected))]
            values[chosen] = value(chosen)
    best = max(values, key=values.get)
    return best, values[best]


def _expected_improvement(x, y, candidates):
    """Of each candidate over the largest y, under a Gaussian process that saw y (points,) at x (points, layers)."""
    y = (y - y.mean()) / (y.std() + 1e-12)

    def covariance(a, b, scale):
        return np.exp(-np.abs(a[:, None] - b[None]).sum(-1) / (2 * scale ** 2))

    fits = []
    for scale in (0.5, 1.0, 2.0, 4.0, 8.0):
        factor = cho_factor(covariance(x, x, scale) + 1e-4 * np.eye(len(x)), lower=True)
        weights = cho_solve(factor, y)
        fits.append((-y @ weights / 2 - np.log(np.diag(factor[0])).sum(), scale, factor, weights))
    _, scale, factor, weights = max(fits, key=lambda fit: fit[0])
    seen = covariance(x, candidates, scale)  # (points, candidates)
    mean = seen.T @ weights
    spread = np.sqrt((1 - (seen * cho_solve(factor, seen)).sum(0)).clip(1e-12))
    gain = mean - y.max()
    return gain * norm.cdf(gain / spread) + spread * norm.pdf(gain / spread)


def _row_acceptance(draft, batches, states):
    """Mean acceptance over each held-out row, (rows,), in float64; `states` are the intact teacher's, a batch each."""
    rows = [acceptance(draft.lm_head(intact), draft.lm_head(last_hidden(draft, ids))).double().mean(-1).cpu()
            for ids, intact in zip(batches, states, strict=True)]
    return torch.cat(rows)
