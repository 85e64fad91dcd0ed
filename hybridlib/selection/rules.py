"""From scores to the set of layers that stay softmax."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hybridlib.checks import check_choice, check_int, check_number
from hybridlib.models.hybrid import check_layers
from hybridlib.selection.scores import LayerScores

__all__ = ["RULES", "SCORES_NEEDED", "budget_layers", "select"]

RULES = ("ga-s2", "ga-s2-spaced", "gr-s2", "ga-s1", "avg", "smart", "uniform", "random", "first", "last", "manual")
SCORES_NEEDED = {"ga-s2": (("add", "kl"),), "ga-s2-spaced": (("add", "kl"),), "gr-s2": (("remove", "kl"),),
                 "ga-s1": (("add", "mse"),), "avg": (("add", "kl"), ("remove", "kl")),
                 "smart": (("add", "kl"),)}  # direction and metric, as `score_layers` takes them
OFFSETS = ("centre", "start", "end")


def budget_layers(budget: float | int, num_layers: int) -> int:
    """K, how many layers stay softmax: a count (int), or a share (float), rounded, at least 1; else ValueError."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise ValueError(f"budget={budget!r} is not a number; give a share of layers (0 < budget <= 1.0) or a count")
    if isinstance(budget, int) and not 1 <= budget <= num_layers:
        raise ValueError(f"budget={budget} is not a count from 1 to {num_layers} layers; a share is written as a float")
    if isinstance(budget, float) and not 0 < budget <= 1:
        raise ValueError(f"budget={budget} is not a share of layers above 0 and at most 1")
    return budget if isinstance(budget, int) else max(1, round(budget * num_layers))


def select(name: str, budget: float | int | None = None, *, scores: LayerScores | Sequence[LayerScores] | None = None,
           num_layers: int | None = None, layers: Sequence[int] | None = None, seed: int = 0, offset: str = "centre",
           penalty: float = 0.25, distance: int = 1) -> tuple[int, ...]:
    """The layers to keep softmax, ascending.

    Parameters
    ----------
    name : which rule.

        - ``"ga-s2"``, ``"gr-s2"``, ``"ga-s1"``: the K best by `scores` of that kind (paper section 4);
        - ``"avg"``: the K best by the mean of their ranks in GA-S2's and GR-S2's `scores`; ties go to GA-S2;
        - ``"ga-s2-spaced"``: layer by layer, the best by GA-S2's `scores` less a `penalty` for a neighbour;
        - ``"smart"``: on GA-S2's `scores`, the best of the first and of the last L // K layers; the others lie the mean
          gap apart, rounded down or up, with the largest sum of scores (Zebra-Llama, arXiv 2505.17272);
        - ``"uniform"``: even spacing, see `offset`;
        - ``"random"``, ``"first"``, ``"last"``: K of all layers, drawn with `seed`, the first or the last;
        - ``"manual"``: `layers`, checked.
    budget : see `budget_layers`; not for ``"manual"``.
    num_layers : of the teacher; needed only without `scores`.
    offset : ``"centre"`` and ``"end"``, the middle or the last layers of K equal blocks; ``"start"``, every n-th from
        layer 0 with n = (L - 1) // (K - 1).
    penalty : what a layer loses, once, if a layer already chosen is at most `distance` from it, in units of the
        scores' spread, largest less smallest.

    Raises ValueError for an unknown name, a bad budget, or scores that are missing or of another kind.
    """
    check_choice("name", name, RULES)
    scores = [scores] if isinstance(scores, LayerScores) else list(scores or ())
    if num_layers is None and scores:
        num_layers = len(scores[0].values)
    check_int("num_layers", num_layers, 1)
    check_choice("offset", offset, OFFSETS)
    check_number("penalty", penalty, 0)
    check_int("distance", distance, 1)
    if name == "manual":
        if layers is None:
            raise ValueError("layers=None with selector 'manual'; give the layer indices to keep")
        return check_layers(layers, num_layers)
    count = budget_layers(budget, num_layers)
    if name == "uniform":
        return _uniform(num_layers, count, offset)
    if name == "random":
        return tuple(sorted(random.Random(seed).sample(range(num_layers), count)))
    if name in ("first", "last"):
        return tuple(range(count) if name == "first" else range(num_layers - count, num_layers))
    first, *second = (_of_kind(name, *kind, scores) for kind in SCORES_NEEDED[name])
    if name == "smart":
        return _smart(first.values, count)
    if name == "ga-s2-spaced":
        return _spaced(first.values, count, penalty, distance)
    if name == "avg":
        ranks = [{l: rank for rank, l in enumerate(s.ranking)} for s in (first, *second)]
        return tuple(sorted(sorted(first.ranking, key=lambda l: ranks[0][l] + ranks[1][l])[:count]))
    return first.best(count)


def _uniform(num_layers, count, offset):
    if offset == "start":
        stride = (num_layers - 1) // max(1, count - 1)
        return tuple(i * stride for i in range(count))
    if offset == "end":
        return tuple((i + 1) * num_layers // count - 1 for i in range(count))
    return tuple((2 * i + 1) * num_layers // (2 * count) for i in range(count))


def _smart(values, count):
    num_layers, block = len(values), len(values) // count
    first = max(range(block), key=lambda l: (values[l], -l))
    if count == 1:
        return (first,)
    last = max(range(num_layers - block, num_layers), key=lambda l: (values[l], -l))
    gap, longer = divmod(last - first, count - 1)  # `longer` of the gaps are gap + 1
    best = {0: (-values[first], (first,))}  # by the longer gaps so far: (-sum of values, layers), least first
    for i in range(1, count):
        reached = {}
        for used in range(max(0, longer - (count - 1 - i)), min(i, longer) + 1):
            layer = first + i * gap + used
            reached[used] = min((best[u][0] - values[layer], (*best[u][1], layer))
                                for u in (used - 1, used) if u in best)
        best = reached
    return best[longer][1]


def _spaced(values, count, penalty, distance):
    loss, layers = penalty * (max(values) - min(values)), []

    def worth(l):
        near = any(abs(l - m) <= distance for m in layers)
        return values[l] - (loss if near else 0), values[l], -l

    while len(layers) < count:
        layers.append(max((l for l in range(len(values)) if l not in layers), key=worth))
    return tuple(sorted(layers))


def _of_kind(selector, direction, metric, scores):
    for one in scores:
        if (one.direction, one.metric) == (direction, metric):
            return one
    raise ValueError(f"selector {selector!r} needs scores of score_layers(direction={direction!r}, metric={metric!r}); "
                     f"got {[(s.direction, s.metric) for s in scores] or None}")
