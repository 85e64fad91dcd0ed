"""Searches over layer sets: which set is best by a measure, when layers are not judged one by one.

A measure takes the layers that stay softmax, ascending, and gives a number, lower for better: `distilled_kl` makes one
of a short distillation. A search goes in rounds. The sets of a round do not depend on one another, so they can be
measured side by side; no set is measured twice. (`functools.cache` around a measure remembers across searches.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
from tqdm.auto import tqdm

from hybridlib.checks import check_choice, check_executor, check_int
from hybridlib.models.hybrid import check_layers
from hybridlib.selection.rules import budget_layers

__all__ = ["SearchResult", "beam", "exhaustive", "greedy_backward", "greedy_forward", "interactions", "rank_of",
           "regret"]

Layers = tuple[int, ...]
Measure = Callable[[Layers], float]


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    `layers` is the set it ends with. `path` has, a round each, the best set measured in it and its value; each round
    is of one size. `values` is every set measured, {layers: value}.
    """

    layers: Layers
    path: tuple[tuple[Layers, float], ...]
    values: dict[Layers, float]

    @property
    def evaluations(self) -> int:
        """How many sets were measured."""
        return len(self.values)


def greedy_forward(measure: Measure, num_layers: int, budget: float | int, *,
                   executor: Executor | None = None) -> SearchResult:
    """From no layer, add the one that helps most until K are kept; what is left is measured anew after every step.

    Parameters as in `beam`. Classical; exact if layers add up, and blind to a pair of which neither helps alone.

    Cost: K (2L - K + 1) / 2 evaluations in K rounds.
    """
    return beam(measure, num_layers, budget, 1, executor=executor)


def greedy_backward(measure: Measure, num_layers: int, budget: float | int, *,
                    executor: Executor | None = None) -> SearchResult:
    """From all layers, remove the one that is missed least until K are kept; the rest is measured anew every step.

    Parameters as in `beam`. Classical; exact if layers add up. It judges a layer among nearly all the others, where
    one can stand in for another, so for small budgets its first steps say little about the last.

    Cost: (L - K) (L + K + 1) / 2 evaluations in L - K rounds; none if K = L.
    """
    return beam(measure, num_layers, budget, 1, "remove", executor=executor)


def beam(measure: Measure, num_layers: int, budget: float | int, width: int, direction: str = "add", *,
         executor: Executor | None = None) -> SearchResult:
    """Greedy search that goes on from the `width` best sets of each size instead of the best alone.

    Parameters
    ----------
    measure : takes layers, ascending, and gives a number, lower for better.
    num_layers : L, layers of the teacher.
    budget : share or count of the layers to keep, K; see `selection.budget_layers`.
    width : sets kept after each round. 1 is greedy; with every set of each size kept, the search is exhaustive.
    direction : ``"add"`` grows sets from none, ``"remove"`` shrinks them from all.
    executor : anything with the `submit` of a `concurrent.futures.Executor`; a round's sets are submitted at once.
        None measures them one after the other.

    Of sets of equal value the first in the order of their layers is kept, so the same values give the same result
    wherever they are measured. If measuring fails, the error carries a note that names the layers, and sets of the
    round that have not begun are called off. Raises ValueError for a bad argument, or a value that is no number or nan.

    Cost: at most L + width (K - 1)(2L - K) / 2 evaluations in K rounds if adding, at most
    L + width (L - K - 1)(L + K) / 2 in L - K rounds if removing (none if K = L): fewer where kept sets lead to the
    same one. What an evaluation costs in tokens is `measure`'s to say; see `distilled_kl`.

    Assumes that the best set has a subset (if removing, a superset) among the `width` best of every size. Source:
    classical; the paper ranks once instead of after every step.
    """
    check_choice("direction", direction, ("add", "remove"))
    check_int("width", width, 1)
    count = _checked(measure, num_layers, budget, executor)
    everything = tuple(range(num_layers))
    kept, rounds = ([()], count) if direction == "add" else ([everything], num_layers - count)
    path, values = [], {}
    for _ in range(rounds):
        if direction == "add":
            reached = {tuple(sorted((*layers, l))) for layers in kept for l in everything if l not in layers}
        else:
            reached = {tuple(m for m in layers if m != l) for layers in kept for l in layers}
        values |= _measured(measure, sorted(reached), executor)
        kept = sorted(reached, key=lambda layers: (values[layers], layers))[:width]
        path.append((kept[0], values[kept[0]]))
    return SearchResult(kept[0], tuple(path), values)


def exhaustive(measure: Measure, num_layers: int, budget: float | int | None = None, *,
               executor: Executor | None = None) -> SearchResult:
    """Measure every set of K layers: the truth that other searches are compared with.

    Parameters as in `beam`; `budget` None measures every set of every size, from no layer to all. Then `path` has the
    best set of each size, and `layers` is the best of all; of equals, the smallest.

    Cost: L! / (K! (L - K)!) evaluations in one round, or 2 ** L in L + 1 rounds: for a small L. Assumes nothing but
    that `measure` tells sets apart.
    """
    count = _checked(measure, num_layers, 1 if budget is None else budget, executor)
    path, values = [], {}
    for size in range(num_layers + 1) if budget is None else (count,):
        found = _measured(measure, list(combinations(range(num_layers), size)), executor)
        path.append(min(found.items(), key=lambda item: (item[1], item[0])))
        values |= found
    return SearchResult(min(path, key=lambda item: item[1])[0], tuple(path), values)


def interactions(values: Mapping[Layers, float], num_layers: int) -> np.ndarray:
    """What two layers bring together less what each brings alone: (num_layers, num_layers), symmetric.

    I(i, j) = [v() - v(i, j)] - [v() - v(i)] - [v() - v(j)] = v(i) + v(j) - v() - v(i, j), in the measure's units, where
    v is lower for better: above 0 if the two help one another, below 0 if one stands in for the other. nan on the
    diagonal and where a set of the three was not measured.

    `values` are those of a search, ``values[()]``, the measure of no layer, among them: `exhaustive` of all sizes
    measures it, the other searches do not. Raises ValueError if it is missing or `values` names no sets of layers.
    """
    check_int("num_layers", num_layers, 1)
    v = {check_layers(layers, num_layers): value for layers, value in values.items()}
    if () not in v:
        raise ValueError("values lacks (), the set of no layer, which every interaction is counted from; "
                         "add values[()] = measure(())")
    matrix = np.full((num_layers, num_layers), np.nan)
    for i, j in combinations(range(num_layers), 2):
        if {(i,), (j,), (i, j)} <= v.keys():
            matrix[i, j] = matrix[j, i] = v[i,] + v[j,] - v[()] - v[i, j]
    return matrix


def regret(layers: Iterable[int], values: Mapping[Layers, float]) -> float:
    """How much worse `layers` are than the best set of as many layers in `values`; 0 for the best.

    It is the regret only if all sets of that size are in `values`, as after `exhaustive`; else a lower bound. Raises
    ValueError if `layers` are not in `values`.
    """
    own, rivals = _of_size(layers, values)
    return own - min(rivals)


def rank_of(layers: Iterable[int], values: Mapping[Layers, float]) -> tuple[int, int]:
    """(rank, count) of `layers` among the sets of as many layers in `values`; rank 1 is best, equals share it.

    Raises ValueError if `layers` are not in `values`.
    """
    own, rivals = _of_size(layers, values)
    return 1 + sum(value < own for value in rivals), len(rivals)


def _of_size(layers, values):
    layers = tuple(sorted(layers))
    rivals = [value for other, value in values.items() if len(other) == len(layers)]
    if layers not in values:
        raise ValueError(f"layers={layers} are not in values, which has {len(rivals)} sets of {len(layers)} layers; "
                         "give a set that was measured")
    return values[layers], rivals


def _checked(measure, num_layers, budget, executor):
    """K, once the arguments of a search are what they should be."""
    if not callable(measure):
        raise ValueError(f"measure={measure!r} cannot be called; give a function of layers, such as distilled_kl makes")
    check_int("num_layers", num_layers, 1)
    check_executor(executor)
    return budget_layers(budget, num_layers)


def _measured(measure, sets, executor):
    """{layers: value} of a round's `sets`, all of one size."""
    futures = [executor.submit(measure, layers) for layers in sets] if executor is not None else []
    calls = [future.result for future in futures] or [partial(measure, layers) for layers in sets]
    values = {}
    bar = tqdm(zip(sets, calls, strict=True), desc=f"sets of {len(sets[0])}", total=len(sets), unit="set", leave=False)
    for layers, call in bar:
        try:
            values[layers] = _number(call())
        except BaseException as error:
            error.add_note(f"while measuring the layers {layers}")
            for future in futures:
                future.cancel()
            raise
    return values


def _number(value):
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"measure gave {value!r}; it must give a number, lower for better")
    return number
