"""Sets of layers of one student, distilled alike and measured on the way by their KL alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import comb

import pandas as pd

from hybridlib.checks import check_int, check_number
from hybridlib.records.ledger import Record
from hybridlib.selection.cost import Cost
from hybridlib.selection.engine.candidates import Job, measure_along, shares_step
from hybridlib.study.evidence import balanced_sets
from hybridlib.study.selector import Selection
from hybridlib.study.settings import StudySettings
from hybridlib.study.study import Study

__all__ = ["SetSettings", "distilled_choices", "distilled_sets"]

_FIGURES = ("tokens", "kl", "kl_stderr")


@dataclass(frozen=True)
class SetSettings(StudySettings):
    """The parameters of a study, and of its random sets and races.

    Parameters
    ----------
    random_sets : balanced random sets of the budget's size to distil, 3 at least; all there are, where they are fewer.
    set_points : shares of `match_tokens`, 0 to 1, after which each is measured on the way.
    set_heldout_tokens : test tokens to measure sets on.
    race_sets : sets that a race begins with, at most.
    race_shares : of GA-S2's tokens, above 0, a race each.
    """

    random_sets: int = 16
    set_points: Sequence[float] = (0.0, 0.25, 0.5)
    set_heldout_tokens: int = 2_048
    race_sets: int = 16
    race_shares: Sequence[float] = (0.1, 1.0)

    def __post_init__(self):
        super().__post_init__()
        check_int("random_sets", self.random_sets, 3)
        check_int("race_sets", self.race_sets, 2)
        check_int("set_heldout_tokens", self.set_heldout_tokens, self.context, self.test_tokens or self.heldout_tokens)
        for name, most in (("set_points", 1), ("race_shares", None)):
            shares = getattr(self, name)
            if not isinstance(shares, (list, tuple)) or not shares:
                raise ValueError(f"{name}={shares!r} is not a list of shares; give at least one")
            for share in shares:
                check_number(name, share, 0, most, open_low=name == "race_shares")
            object.__setattr__(self, name, tuple(shares))

    @property
    def measure_at(self) -> list[int]:
        """Tokens after which random sets are measured."""
        return [round(share * self.match_tokens) for share in self.set_points]

    def races(self, num_layers: int) -> dict[str, tuple[str, dict]]:
        """The races, label -> (name, options) for `Study.selection`."""
        return {f"race, {share:g} of the tokens": ("race", {
            "sets": self.race_sets, "num_tokens": int(share * num_layers * self.score_tokens)})
            for share in self.race_shares}

    def sets(self, num_layers: int, size: int) -> tuple[tuple[int, ...], ...]:
        """The random sets of `size` of `num_layers` layers."""
        return balanced_sets(num_layers, size, min(self.random_sets, comb(num_layers, size)))


def distilled_sets(study: Study, sets: Iterable[Iterable[int]], seed: int = 0, measure_at: Iterable[int] = ()
                   ) -> list[Record]:
    """Restore each set of layers, run stage 2, and measure its held-out KL. Record kind ``"set"``, one each.

    Stage 2 is that of `Study.hybrid`, but nothing else is measured, and on the first `set_heldout_tokens` of the test
    rows. ``curve`` has the figures after each of `measure_at` tokens, rounded up to whole steps. `study` is one of
    `SetSettings`.
    """
    s, points = study.settings, list(measure_at)

    def compute(layers):
        job = Job(study.inputs(s.mixer, seed, s.match_tokens), s.match_tokens, study.match_settings,
                  s.set_heldout_tokens)
        with tempfile.TemporaryDirectory(prefix="hybridlib-sets-") as folder:
            figures = measure_along(job if shares_step(job) else replace(job, checkpoints=folder), layers, points)
        return {**{name: figures[-1][name] for name in (*_FIGURES, "kl_rows", "rose")},
                "curve": [{name: point[name] for name in _FIGURES} for point in figures[:-1]],
                "cost": Cost.total(Cost.from_dict(point["cost"]) for point in figures).to_dict()}

    records = []
    for layers in sets:
        own = study.hybrid_parameters(layers, s.mixer, seed, points)
        parameters = {name: own[name] for name in ("aligned", "mixer", "seed", "layers", "num_tokens", "settings",
                                                   "measure_at") if name in own}
        records.append(study.record("set", parameters | {"heldout_tokens": s.set_heldout_tokens},
                                    partial(compute, tuple(own["layers"]))))
    return records


def distilled_choices(study: Study, choices: Mapping[str, Mapping[int, Selection]]) -> pd.DataFrame:
    """Make a row a selection of `choices`, label -> seed -> selection: ``selector`` (the label), ``seed``, ``layers``,
    and the ``kl`` of its hybrid by `distilled_sets`."""
    rows = [{"selector": label, "seed": seed, "layers": one.layers,
             "kl": distilled_sets(study, [one.layers], seed)[0].metrics["kl"]}
            for label, by_seed in choices.items() for seed, one in by_seed.items()]
    return pd.DataFrame(rows, columns=["selector", "seed", "layers", "kl"])
