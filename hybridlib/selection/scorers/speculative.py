"""Redundant layers by self-speculation: attention that a draft of the teacher can skip is attention to linearize."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import norm

from hybridlib.checks import check_int
from hybridlib.models.passes import last_hidden, measuring
from hybridlib.selection.cost import Cost, Meter
from hybridlib.selection.rules import budget_layers
from hybridlib.selection.scorers.ablation import ablate, heldout_batches, silence_each
from hybridlib.selection.scores import LayerScores

__all__ = ["SkipSearch", "acceptance", "draft_cost", "maximize_over_sets", "score_acceptance", "search_skips",
           "throughput"]


@dataclass(frozen=True)
class SkipSearch:
    """The result of `search_skips`: `layers` are to stay softmax, and the draft skips the others.

    `acceptance` and `throughput` are the draft's, `scores` those of single layers; `evaluations` counts sets tried.
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

    `gamma` tokens are drafted at a time, each is accepted with probability `acceptance`, a, and `cost`, c, is the time
    of a draft's pass over that of a teacher's.
    """
    return sum(acceptance ** i for i in range(gamma + 1)) / (gamma * cost + 1)  # the geometric sum, for a = 1 too


def draft_cost(model, skipped: Iterable[int]) -> float:
    """Share of the teacher's weights that a draft reads, output head included, hence of the time to decode."""
    def size(module):
        return sum(p.numel() for p in module.parameters())

    read = size(model.model) - size(model.model.embed_tokens) + size(model.lm_head)
    return 1 - sum(size(model.model.layers[l].self_attn) for l in skipped) / read


def score_acceptance(teacher, tokens, *, batch_tokens: int = 8192) -> LayerScores:
    """RAD, layer by layer: the share of drafted tokens that is refused if the draft skips layer l's attention alone.

    `measured` is the share accepted on held-out text, with its standard error over rows; `values` is 1 - `measured`.
    Source: arXiv 2505.22135, which searches sets; a score for each layer is ours.
    """
    def prepare(batches):
        states = [last_hidden(teacher, ids) for ids in batches]
        return lambda: _row_acceptance(teacher, batches, states)

    scores = silence_each(teacher, tokens, batch_tokens, "rad", prepare)
    return replace(scores, values=tuple(1 - a for a in scores.measured))


def search_skips(teacher, tokens, budget: float | int, *, gamma: int = 4, evaluations: int = 64, seed: int = 0,
                 batch_tokens: int = 8192) -> SkipSearch:
    """RAD: keep the layers that the best draft of L - K skipped layers, of the highest `throughput`, does not skip.

    At most `evaluations` sets are tried, from the one that `score_acceptance` suggests; that start, and that exactly
    L - K layers are skipped, is chosen here. Sources: arXiv 2505.22135 and, for the search, 2309.08168.
    """
    check_int("gamma", gamma, 1)
    check_int("evaluations", evaluations, 1)
    num_layers = teacher.config.num_hidden_layers
    size = num_layers - budget_layers(budget, num_layers)
    batches = heldout_batches(teacher, tokens, batch_tokens)
    scores = score_acceptance(teacher, tokens, batch_tokens=batch_tokens)
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

    A point stands for the set of its `size` largest coordinates; a Gaussian process, with covariance exp(-d / (2 s^2))
    for sets that differ in d layers, models `value`. After the `first` set and random ones, each evaluation goes to the
    set with the highest expected improvement. `value` is called once for a set, an ascending tuple.
    """
    rng, values, sets = np.random.default_rng(seed), {}, math.comb(num_layers, size)

    def nearest_sets(points):  # (points, layers) -> untried sets
        return sorted({tuple(sorted(p.tolist())) for p in np.argsort(-points)[:, :size]} - set(values))

    def indicators(chosen):
        return np.array([[l in s for l in range(num_layers)] for s in chosen], dtype=float)

    if first is not None:
        values[tuple(sorted(first))] = value(tuple(sorted(first)))
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
    """Of each candidate over the largest y, under a Gaussian process fitted to y (points,) at x (points, layers)."""
    y = (y - y.mean()) / (y.std() + 1e-12)

    def covariance(a, b, scale):
        return np.exp(-np.abs(a[:, None] - b[None]).sum(-1) / (2 * scale ** 2))

    fits = []
    for scale in (0.5, 1.0, 2.0, 4.0, 8.0):
        factor = cho_factor(covariance(x, x, scale) + 1e-4 * np.eye(len(x)), lower=True)
        weights = cho_solve(factor, y)
        fits.append((-y @ weights / 2 - np.log(np.diag(factor[0])).sum(), scale, factor, weights))
    _, scale, factor, weights = max(fits, key=lambda fit: fit[0])
    cross = covariance(x, candidates, scale)  # (points, candidates)
    mean = cross.T @ weights
    spread = np.sqrt((1 - (cross * cho_solve(factor, cross)).sum(0)).clip(1e-12))
    gain = mean - y.max()
    return gain * norm.cdf(gain / spread) + spread * norm.pdf(gain / spread)


def _row_acceptance(draft, batches, states):
    """Mean acceptance over each held-out row, (rows,), in float64; `states` are the intact teacher's, a batch each."""
    rows = [acceptance(draft.lm_head(intact), draft.lm_head(last_hidden(draft, ids))).double().mean(-1).cpu()
            for ids, intact in zip(batches, states, strict=True)]
    return torch.cat(rows)
