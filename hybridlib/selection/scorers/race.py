"""Race: sets of layers train a little, the better half goes on, and halves again, until one set is left."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product

from hybridlib.checks import check_int
from hybridlib.distill.settings import DistillationDiverged
from hybridlib.models.hybrid import check_layers
from hybridlib.selection.cost import Cost
from hybridlib.selection.engine.candidates import Job, measure_sets, shares_step
from hybridlib.selection.search import Layers

__all__ = ["Race", "fitting_sets", "neighbours", "propose", "race", "race_rounds", "race_trained"]


@dataclass(frozen=True)
class Race:
    """The set `layers` that is left of a race; of every `rounds`, the tokens that a set had by its end, and the value
    of each set that was in it."""

    layers: Layers
    rounds: tuple[tuple[int, dict[Layers, float]], ...]

    @property
    def tokens(self) -> int:
        """Tokens that all sets were trained on."""
        starts = [0, *(until for until, _ in self.rounds)]
        return sum((until - since) * len(values) for since, (until, values) in zip(starts, self.rounds))


def race(measure: Callable[[tuple[Layers, ...], int, int], dict[Layers, float]], sets: Sequence[Layers],
         rounds: Sequence[tuple[int, int]]) -> Race:
    """Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): measure all, keep the best, until one is left.

    Parameters
    ----------
    measure : ``measure(sets, since, until)`` goes on with sets that have had `since` tokens until they have had
        `until`, and gives {layers: value}, lower for better; a set whose value is not finite is out.
    sets : different ones, as many as the first round has; of equals the earlier goes on.
    rounds : of `race_rounds`. Without one, a single set wins unmeasured.

    Raises ValueError for sets that are not as many as planned, `DistillationDiverged` if none is left.
    """
    alive = list(dict.fromkeys(map(tuple, sets)))
    planned = rounds[0][0] if rounds else 1
    if len(alive) != planned:
        raise ValueError(f"sets has {len(alive)} different sets; the first of rounds={list(rounds)} is for {planned}")
    since, measured = 0, []
    for i, (_, until) in enumerate(rounds, 1):
        left = rounds[i][0] if i < len(rounds) else 1
        values = measure(tuple(alive), since, until)
        measured.append((until, {layers: float(values[layers]) for layers in alive}))
        alive = sorted((layers for layers in alive if math.isfinite(values[layers])), key=values.__getitem__)[:left]
        if not alive:
            raise DistillationDiverged(f"none of the {len(values)} sets of layers can be trained to {until} tokens; "
                                       "try a lower learning rate")
        since = until
    return Race(alive[0], tuple(measured))


def race_rounds(num_sets: int, num_tokens: int, step_tokens: int = 1) -> list[tuple[int, int]]:
    """Plan a race: (sets, tokens that each has had by the end) of every round; none for a single set.

    The number of sets is halved, rounded up, down to 2. Every round gets an equal share of `num_tokens`, of all sets
    together, in whole steps of `step_tokens`; what one leaves goes to the next. Raises ValueError if the first has less
    than a step for each set.
    """
    check_int("num_sets", num_sets, 1)
    check_int("step_tokens", step_tokens, 1)
    check_int("num_tokens", num_tokens, 0)
    if num_sets > fitting_sets(num_sets, num_tokens, step_tokens):
        raise ValueError(f"num_tokens={num_tokens} in steps of {step_tokens} are too few for {num_sets} sets; at most "
                         f"{fitting_sets(num_sets, num_tokens, step_tokens)} can race")
    steps, count, spent, until, rounds = num_tokens // step_tokens, num_sets, 0, 0, []
    number = _number_of_rounds(num_sets)
    for i in range(1, number + 1):
        more = (steps * i // number - spent) // count
        spent, until = spent + more * count, until + more * step_tokens
        rounds.append((count, until))
        count = -(-count // 2)
    return rounds


def fitting_sets(most: int, num_tokens: int, step_tokens: int = 1) -> int:
    """How many sets, up to `most`, can race on `num_tokens`: in the first round each is trained for a step at least."""
    steps = num_tokens // step_tokens
    return max((n for n in range(2, most + 1) if steps // _number_of_rounds(n) >= n), default=1)


def _number_of_rounds(num_sets):
    return (num_sets - 1).bit_length()


def propose(proposals: Sequence[tuple[Layers, Sequence[float] | None]], count: int, seed: int = 0) -> list[Layers]:
    """Up to `count` different sets of one size: those of `proposals`, (layers, one value a layer or None), then the
    `neighbours` of those that have values, in turn."""
    check_int("count", count, 1)
    draw = random.Random(seed)
    near = [neighbours(layers, values, draw) for layers, values in proposals if values is not None]
    sets = dict.fromkeys(check_layers(layers, 10**6) for layers, _ in proposals)
    while near and len(sets) < count:
        if (layers := next(near[0], None)) is not None:
            sets.setdefault(layers)
            near.append(near[0])
        del near[0]
    return list(sets)[:count]


def neighbours(layers: Layers, values: Sequence[float], draw: random.Random) -> Iterator[Layers]:
    """All sets that exchange one of `layers` for another: first the lowest valued of the set for the highest valued
    outside, then exchanges among the two next to the cut on either side, the three next, and so on, each by lot."""
    kept = sorted(layers, key=lambda l: (values[l], -l))
    others = sorted(set(range(len(values))) - set(layers), key=lambda l: (-values[l], l))
    for ring in range(max(len(kept), len(others))):
        pairs = [(i, j) for i, j in product(range(len(kept)), range(len(others))) if max(i, j) == ring]
        for i, j in draw.sample(pairs, len(pairs)):
            yield tuple(sorted({*layers, others[j]} - {kept[i]}))


def race_trained(job: Job, sets: Sequence[Layers], rounds: Sequence[tuple[int, int]], group: int = 1
                 ) -> tuple[Race, list[dict], Cost]:
    """Race hybrids by their held-out KL: (the race, each round's figures, the cost).

    Held-out KL, not the loss of the last steps: all sets are read on the same rows with the weights that they have at
    the round's end, while a loss is that of the weights before a step, and in a first round of a few steps hardly of
    trained ones. Rows are read for as many tokens as a set has been trained on, so that measuring stays cheaper than
    training. A survivor goes on with its weights and its optimizer's state.

    Parameters
    ----------
    job : its `num_tokens` are those of the last round; its inputs are in this process.
    group : sets that train together, see `Engine.group_of`.

    Returns
    -------
    figures : a round each ``tokens`` that its sets have had, and ``sets``, each ``layers`` and ``kl``, ``kl_stderr`` or
        ``error``.
    """
    figures: list[dict] = []
    costs = []
    with ExitStack() as stack:
        stack.callback(job.inputs.forget)
        if group > 1 or not shares_step(job):
            job = replace(job, checkpoints=stack.enter_context(tempfile.TemporaryDirectory(prefix="hybridlib-race-")))

        def measure(alive, since, until):
            for layers in [s for s in sets if since and s not in alive]:  # what is out gives its room back
                job.inputs.alive.get("held", {}).pop(layers, None)
                if job.checkpoints is not None:
                    job.checkpoint(layers).unlink(missing_ok=True)
            part, measured = replace(job, heldout_tokens=until), {}
            for i in range(0, len(alive), group):
                measured |= measure_sets(part, alive[i:i + group], until, since)
            costs.extend(Cost.from_dict(own["cost"]) for own in measured.values() if "cost" in own)
            shown = ("kl", "kl_stderr", "error")
            figures.append({"tokens": until, "sets": [{"layers": list(layers)} | {
                name: measured[layers][name] for name in shown if name in measured[layers]} for layers in alive]})
            return {layers: own.get("kl", math.inf) for layers, own in measured.items()}

        result = race(measure, sets, rounds)
    return result, figures, Cost.total(costs)
