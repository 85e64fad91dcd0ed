"""The selector that races sets of layers which cheaper selectors propose: what its record says, and its run."""

from __future__ import annotations

from hybridlib.checks import check_choice, check_int
from hybridlib.selection.cost import Cost
from hybridlib.selection.engine.candidates import Job
from hybridlib.selection.engine.rounds import Engine
from hybridlib.selection.rules import budget_layers
from hybridlib.selection.scorers.race import fitting_sets, propose, race_rounds, race_trained
from hybridlib.study.selector import SELECTORS, find_selector, run_selector

__all__ = ["race_record", "run_race"]


def race_record(settings, num_layers: int, seed: int, sets: int, num_tokens: int | None, proposers) -> dict:
    """The own parameters of a race of `sets` on `num_tokens`, its proposers' too; None stands for a tenth of GA-S2's.

    Learned gates that propose get a quarter of them. Raises ValueError for fewer than two sets, a negative number of
    tokens, and proposers that are no selectors.
    """
    num_tokens = num_layers * settings.score_tokens // 10 if num_tokens is None else num_tokens
    check_int("sets", sets, 2)
    check_int("num_tokens", num_tokens, 0)
    if not isinstance(proposers, (list, tuple)) or not proposers:
        raise ValueError(f"proposers={proposers!r} is not a list of names; give at least one of SELECTORS")
    for name in proposers:
        check_choice("proposers", name, [other for other in SELECTORS if other != "race"])
    asked = [[name, find_selector(name).records(settings, num_layers, seed, **_options(settings, name, num_tokens))]
             for name in proposers]
    return {"selector": "race", "budget": budget_layers(settings.budget, num_layers), "num_tokens": num_tokens,
            "settings": settings.match_settings.numbers(), "sets": sets, "proposers": asked}


def _options(settings, name, num_tokens):
    """Options of the proposer `name` in a race on `num_tokens`."""
    return {"num_tokens": max(settings.context, num_tokens // 4)} if name == "learned-gates" else {}


def run_race(study, mixer: str, seed: int, own: dict) -> dict:
    """The metrics of the record of a race under the parameters `own`: the set that won, its rounds and its cost."""
    s, step = study.settings, study.match_settings.step_rows(study.settings.context) * study.settings.context
    proposals = [run_selector(name, study, mixer, seed, _options(s, name, own["num_tokens"]))
                 for name, _ in own["proposers"]]
    costs = [proposal.cost for proposal in proposals]
    left = max(2 * step, own["num_tokens"] - sum(cost.training_tokens for cost in costs if cost is not None))
    sets = propose([(p.layers, p.values) for p in proposals], fitting_sets(own["sets"], left, step), seed)
    rounds, figures, layers = race_rounds(len(sets), left, step), [], sets[0]
    if rounds:
        job = Job(study.inputs(mixer, seed, max(s.score_tokens, rounds[-1][1]), "score"), rounds[-1][1],
                  study.match_settings)
        group = Engine(group=study.group).group_of(job.inputs.student, job.inputs.tokens, job.settings)
        result, figures, cost = race_trained(job, sets, rounds, group)
        layers, costs = result.layers, [*costs, cost]
    total = None if None in costs else Cost.total(costs)
    return {"layers": list(layers), "rounds": figures, "tokens": total and total.training_tokens,
            "cost": total and total.to_dict(),
            "proposals": [{"selector": p.selector, "layers": list(p.layers), "cost": p.cost and p.cost.to_dict()}
                          for p in proposals]}
