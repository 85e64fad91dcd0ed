"""Searches over layer sets by a measure: a function of the softmax layers, ascending, that is lower for better."""

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

__all__ = ["SearchResult", "beam", "exhaustive", "greedy_backward", "greedy_forward", "interactions", "regret"]

Layers = tuple[int, ...]
Measure = Callable[[Layers], float]


@dataclass(frozen=True)
class SearchResult:
    """The set `layers` that a search ends with; `path`, each round's best set and its value; `values` of all sets."""

    layers: Layers
    path: tuple[tuple[Layers, float], ...]
    values: dict[Layers, float]

    @property
    def evaluations(self) -> int:
        """How many sets were measured."""
        return len(self.values)


def greedy_forward(measure: Measure, num_layers: int, budget: float | int, *,
                   executor: Executor | None = None) -> SearchResult:
    """From no layer, add the one that helps most until K are kept; K (2L - K + 1) / 2 evaluations. See `beam`."""
    return beam(measure, num_layers, budget, 1, executor=executor)


def greedy_backward(measure: Measure, num_layers: int, budget: float | int, *,
                    executor: Executor | None = None) -> SearchResult:
    """From all layers, remove the one that is missed least until K are kept; (L - K) (L + K + 1) / 2 evaluations."""
    return beam(measure, num_layers, budget, 1, "remove", executor=executor)


def beam(measure: Measure, num_layers: int, budget: float | int, width: int, direction: str = "add", *,
         executor: Executor | None = None) -> SearchResult:
    """Greedy search that goes on from the `width` best sets of each size instead of the best alone.

    Parameters
    ----------
    measure : takes layers, ascending, and gives a number, lower for better.
    budget : share or count K of the layers to keep.
    direction : ``"add"`` grows sets from none, ``"remove"`` shrinks them from all.
    executor : anything with the `submit` of a `concurrent.futures.Executor`, which gets a round's sets at once.

    At most L + width (K - 1)(2L - K) / 2 evaluations in K rounds if adding, L + width (L - K - 1)(L + K) / 2 in L - K
    if removing. If measuring fails, the error carries a note that names the layers.
    """
    check_choice("direction", direction, ("add", "remove"))
    check_int("width", width, 1)
    count = _checked(measure, num_layers, budget, executor)
    everything = tuple(range(num_layers))
    best, rounds = ([()], count) if direction == "add" else ([everything], num_layers - count)
    path, values = [], {}
    for _ in range(rounds):
        if direction == "add":
            reached = {tuple(sorted((*layers, l))) for layers in best for l in everything if l not in layers}
        else:
            reached = {tuple(m for m in layers if m != l) for layers in best for l in layers}
        values |= _measured(measure, sorted(reached), executor)
        best = sorted(reached, key=lambda layers: (values[layers], layers))[:width]
        path.append((best[0], values[best[0]]))
    return SearchResult(best[0], tuple(path), values)


def exhaustive(measure: Measure, num_layers: int, budget: float | int | None = None, *,
               executor: Executor | None = None) -> SearchResult:
    """Measure all L! / (K! (L - K)!) sets of K layers, or with `budget` None all 2 ** L sets; see `beam`.

    Then `path` has the best set of each size, and `layers` is the best of all; of equals, the smallest.
    """
    count = _checked(measure, num_layers, 1 if budget is None else budget, executor)
    path, values = [], {}
    for size in range(num_layers + 1) if budget is None else (count,):
        measured = _measured(measure, list(combinations(range(num_layers), size)), executor)
        path.append(min(measured.items(), key=lambda item: (item[1], item[0])))
        values |= measured
    return SearchResult(min(path, key=lambda item: item[1])[0], tuple(path), values)


def interactions(values: Mapping[Layers, float], num_layers: int) -> np.ndarray:
    """What two layers bring together less what each brings alone: (num_layers, num_layers), symmetric.

    I(i, j) = v(i) + v(j) - v() - v(i, j), in the measure's units: above 0 if the two help one another. It is nan on the
    diagonal and where a set was not measured. Raises ValueError without ``values[()]``.
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
    """How much worse `layers` are than the best set of as many layers in `values`. ValueError if they are not there."""
    layers = tuple(sorted(layers))
    rivals = [value for other, value in values.items() if len(other) == len(layers)]
    if layers not in values:
        raise ValueError(f"layers={layers} are not in values, which has {len(rivals)} sets of {len(layers)} layers; "
                         "give a set that was measured")
    return values[layers] - min(rivals)


def _checked(measure, num_layers, budget, executor):
    if not callable(measure):
        raise ValueError(f"measure={measure!r} cannot be called; give a function of layers, such as distilled_kl makes")
    check_int("num_layers", num_layers, 1)
    check_executor(executor)
    return budget_layers(budget, num_layers)


def _measured(measure, sets, executor):
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
