"""From scores to the set of layers that stay softmax."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .checks import check_choice, check_int
from .hybrid import check_layers
from .importance import LayerScores

__all__ = ["SCORES_NEEDED", "SELECTORS", "budget_layers", "select"]

SELECTORS = ("ga-s2", "gr-s2", "ga-s1", "avg", "uniform", "random", "manual")
SCORES_NEEDED = {"ga-s2": (("add", "kl"),), "gr-s2": (("remove", "kl"),), "ga-s1": (("add", "mse"),),
                 "avg": (("add", "kl"), ("remove", "kl"))}  # direction and metric, as `score_layers` takes them


def budget_layers(budget: float | int, num_layers: int) -> int:
    """K, how many layers `budget` keeps: round(share x layers), at least 1, or the count itself.

    A float is a share, 0 < budget <= 1; an int is a count, 1 to `num_layers` (the float 1.0 keeps all, the int 1 keeps
    one). Halves round to even, as Python's round does. Raises ValueError for anything else.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise ValueError(f"budget={budget!r} is not a number; give a share of layers (0 < budget <= 1.0) "
                         "or a whole count")
    if isinstance(budget, int):
        if not 1 <= budget <= num_layers:
            raise ValueError(f"budget={budget} is not a count from 1 to {num_layers} layers; "
                             "a share is written as a float")
        return budget
    if not 0 < budget <= 1:
        raise ValueError(f"budget={budget} is not a share of layers above 0 and at most 1")
    return max(1, round(budget * num_layers))


def select(name: str, budget: float | int | None = None, *, scores: LayerScores | Sequence[LayerScores] | None = None,
           num_layers: int | None = None, layers: Sequence[int] | None = None, seed: int = 0) -> tuple[int, ...]:
    """The layers to keep softmax, ascending.

    Parameters
    ----------
    name : which rule.

        - ``"ga-s2"``, ``"gr-s2"``, ``"ga-s1"``: the K best by `scores`, which must be of that kind (paper section 4);
        - ``"avg"``: the K best by the mean of their ranks in two `scores`, GA-S2's and GR-S2's; ties go to GA-S2;
        - ``"uniform"``: the centres of K equal blocks of layers;
        - ``"random"``: K of all layers, drawn with `seed`;
        - ``"manual"``: `layers`, checked.
    budget : share or count, see `budget_layers`; not for ``"manual"``.
    num_layers : of the teacher, where no `scores` tell.

    Raises ValueError for an unknown name, a bad budget, or scores that are missing or of another kind.
    """
    check_choice("name", name, SELECTORS)
    given = [scores] if isinstance(scores, LayerScores) else list(scores or ())
    if num_layers is None and given:
        num_layers = len(given[0].values)
    check_int("num_layers", num_layers, 1)
    if name == "manual":
        if layers is None:
            raise ValueError("layers=None with selector 'manual'; give the layer indices to keep")
        return check_layers(layers, num_layers)
    count = budget_layers(budget, num_layers)
    if name == "uniform":
        return tuple((2 * i + 1) * num_layers // (2 * count) for i in range(count))
    if name == "random":
        return tuple(sorted(random.Random(seed).sample(range(num_layers), count)))
    found = [_of_kind(name, *kind, given) for kind in SCORES_NEEDED[name]]
    order = _mean_rank(*found) if name == "avg" else found[0].ranking
    return tuple(sorted(order[:count]))


def _of_kind(selector, direction, metric, given):
    for scores in given:
        if (scores.direction, scores.metric) == (direction, metric):
            return scores
    raise ValueError(f"selector {selector!r} needs scores of score_layers(direction={direction!r}, metric={metric!r}); "
                     f"got {[(s.direction, s.metric) for s in given] or None}")


def _mean_rank(first, second):
    ranks = [{l: r for r, l in enumerate(s.ranking)} for s in (first, second)]
    return sorted(ranks[0], key=lambda l: (ranks[0][l] + ranks[1][l], ranks[0][l]))
