"""What a selector is, how it is declared, and how it is run; `hybridlib.study.catalogue` declares all."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from hybridlib.selection.cost import Cost
from hybridlib.selection.rules import budget_layers, select
from hybridlib.selection.scorers.ablation import TaskTooHard
from hybridlib.selection.scores import LayerScores

__all__ = ["SELECTORS", "Selection", "Selector", "find_selector", "full_parameters", "run_selector", "scorer",
           "selector"]


@dataclass(frozen=True)
class Selection:
    """What a selector, by its name in `SELECTORS`, chose: `layers`, ascending, and its `cost` (None if unknown).

    `values` has one number a layer, higher for more worth keeping, or is None; `note` says what it settled on.
    """

    layers: tuple[int, ...]
    cost: Cost | None
    values: tuple[float, ...] | None = None
    note: str = ""
    selector: str = ""


@dataclass(frozen=True)
class Selector:
    """A selector.

    Parameters
    ----------
    needs : ``"nothing"``, ``"teacher"``, ``"student"`` (all linear, aligned) or ``"stage 2"`` (and trains candidates).
    cost : what it computes, in words, for L layers of which K are kept; "held-out" are the rows that layers are scored
        on, T the study's ``score_tokens``, and a candidate is trained on T tokens and then measured.
    choose : ``choose(study, mixer, seed, **options)`` gives the `Selection`.
    options : keywords of `choose` and `record` with their defaults.
    record : the own parameters of its ``"score"`` record, or a function ``record(settings, num_layers, seed,
        **options)`` that gives them; of a list the first that the teacher allows is made.
    """

    title: str
    source: str
    needs: str
    assumes: str
    cost: str
    choose: Callable[..., Selection]
    options: Mapping[str, object] = field(default_factory=dict)
    record: Mapping | Callable[..., Mapping | list[Mapping]] | None = None
    control: bool = False

    def records(self, settings, num_layers: int, seed: int, **options) -> list[Mapping]:
        """`record` as a list under these `StudySettings`."""
        own = self.record or []
        own = own(settings, num_layers, seed, **{**self.options, **options}) if callable(own) else own
        return own if isinstance(own, list) else [own]


#: name -> `Selector`, in the order of figures and tables
SELECTORS: dict[str, Selector] = {}


def find_selector(name: str) -> Selector:
    """The selector of that name. Raises ValueError for an unknown name."""
    if not isinstance(name, str) or name not in SELECTORS:
        close = difflib.get_close_matches(str(name), SELECTORS, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose among {', '.join(SELECTORS)}"
        raise ValueError(f"selector={name!r} is unknown; {hint}")
    return SELECTORS[name]


def run_selector(name: str, study, mixer: str, seed: int, options: Mapping[str, object]) -> Selection:
    """Let the selector choose. Raises ValueError for an unknown name or option."""
    method = find_selector(name)
    for option, value in options.items():
        if option not in method.options:
            allowed = ", ".join(method.options) or "none"
            raise ValueError(f"{option}={value!r} is no option of selector {name!r}; its options: {allowed}")
    return replace(method.choose(study, mixer, seed, **{**method.options, **options}), selector=name)


def full_parameters(own: Mapping, settings, origin: Mapping) -> dict:
    """All parameters of a record that scores layers: its `own`, the held-out tokens, and the `origin` of its models."""
    if "mixer" in origin:
        origin = {"aligned": origin, "mixer": origin["mixer"], "seed": origin["seed"]}
    return {"heldout_tokens": settings.heldout_tokens, **origin, **own}


def selector(name: str, title: str, source: str, needs: str, assumes: str, cost: str, **fields):
    """Declare the decorated function as the `Selector.choose` of selector `name`."""
    def declare(choose):
        SELECTORS[name] = Selector(title, source, needs, assumes, cost, choose, **fields)
        return choose
    return declare


def scorer(name: str, title: str, source: str, needs: str, assumes: str, cost: str, *, rule: str | None = None,
           note: str = "", **fields):
    """Declare selector `name` by the decorated function ``measure(study, mixer, seed, own)``, remembered as a record.

    It gives `LayerScores`, or metrics with ``cost`` and with ``layers``, ``values`` or both. Where it gives no layers,
    `rule` of `select` chooses them, or the K best are. `note` is a format, filled from `own`.
    """
    def declare(measure):
        def choose(study, mixer, seed, **options):
            def compute():
                result = measure(study, mixer, seed, own)
                return result.to_dict() if isinstance(result, LayerScores) else result

            records = SELECTORS[name].records(study.settings, study.num_layers, seed, **options)
            for own in records:
                try:
                    metrics = study.remember(own, compute, None if needs == "teacher" else mixer, seed).metrics
                    break
                except TaskTooHard:
                    if own is records[-1]:
                        raise
            layers, values, cost = (metrics.get(key) for key in ("layers", "values", "cost"))
            if layers is None:
                scores, budget = LayerScores.from_dict(metrics), study.settings.budget
                count = budget_layers(budget, study.num_layers)
                layers = select(rule, budget, scores=scores) if rule else scores.best(count)
            return Selection(tuple(layers), cost and Cost.from_dict(cost), values and tuple(values), note.format(**own))
        selector(name, title, source, needs, assumes, cost, **fields)(choose)
        return measure
    return declare
