"""Candidates at several rates, measured along their training: what says how far a ranking repeats itself."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from hybridlib.checks import check_int, check_number
from hybridlib.records.ledger import Record
from hybridlib.records.provenance import describe_device
from hybridlib.selection.engine.candidates import Job, measure_along, one_layer_sets, shares_step
from hybridlib.study.candidates import with_curve
from hybridlib.study.catalogue import SELECTORS
from hybridlib.study.selector import full_parameters
from hybridlib.study.settings import StudySettings
from hybridlib.study.study import Study

__all__ = ["StabilitySettings", "stability_records"]


@dataclass(frozen=True)
class StabilitySettings(StudySettings):
    """The parameters of a study, and what its candidates are trained and measured at.

    Parameters
    ----------
    rates : attention rates. At `attention_learning_rate` candidates train on `score_tokens`, as those of every study;
        at another they stop after the largest of `shares`.
    shares : of `score_tokens`, 0 to 1, both for the untrained and the early measurements; rounded up to whole steps.
    early_heldout_tokens : held-out tokens to measure on there and at the other rates, the first of `heldout_tokens`.
    """

    seeds: int = 2
    rates: Sequence[float] = (1e-3, 1e-4)
    shares: Sequence[float] = (0.0, 0.125)
    early_heldout_tokens: int = 2_048

    def __post_init__(self):
        super().__post_init__()
        check_int("score_tokens", self.score_tokens, self.context)
        for name, low in (("rates", 1), ("shares", 0)):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or len(set(values)) != len(values) or len(values) < low:
                raise ValueError(f"{name}={values!r} is not a list of different numbers, at least {low}")
            object.__setattr__(self, name, tuple(values))
        for rate in self.rates:
            check_number("rates", rate, 0)
        for share in self.shares:
            check_number("shares", share, 0, 1)
        check_int("early_heldout_tokens", self.early_heldout_tokens, self.context, self.heldout_tokens)
        if set(self.rates) - {self.attention_learning_rate} and not any(self.shares):
            raise ValueError(f"shares={list(self.shares)!r} has none above 0, which rates other than "
                             f"attention_learning_rate={self.attention_learning_rate!r} train for")

    @property
    def points(self) -> tuple[int, ...]:
        """Tokens, in whole steps, after which candidates are measured before their end."""
        return tuple(point for point in self._steps() if point < self.score_tokens)

    @property
    def early_tokens(self) -> int:
        """Tokens of a candidate at another rate than the study's."""
        return min(max(self._steps()), self.score_tokens)

    def _steps(self):
        step = self.match_settings.step_rows(self.context) * self.context
        steps = {-(-round(share * self.score_tokens) // step) * step for share in self.shares}
        return sorted(self.score_tokens if tokens > self.score_tokens - step else tokens for tokens in steps)


def stability_records(study: Study) -> list[Record]:
    """Train and measure what `study`, of `StabilitySettings`, names, and give its records, of kinds ``"align"``,
    ``"candidate"`` and ``"score"`` (of the gate gradient).

    Ends that other notebooks recorded stay; a candidate that was not measured on the way is trained that far again.
    Untrained candidates, which no rate changes, are measured at the first of the rates alone.
    """
    s, points, records = study.settings, study.settings.points, []
    gradient = SELECTORS["gate-gradient"]
    for seed in study.seeds:
        study.selection("gate-gradient", seed=seed)
        origin = study.aligned_parameters(s.mixer, seed)
        own = full_parameters(gradient.records(s, study.num_layers, seed)[0], s, origin)
        records += [study.ledger.run(*key, dict) for key in (("align", origin), ("score", own))]
        for rate, direction, layer in product(s.rates, ("add", "remove"), range(study.num_layers)):
            early = points if rate == s.rates[0] else tuple(point for point in points if point)
            at_rate, part = study, None
            if rate != s.attention_learning_rate:
                at_rate = study.under(rates=[rate], attention_learning_rate=rate, score_tokens=s.early_tokens)
                early = tuple(point for point in early if point < s.early_tokens)
                part = s.early_heldout_tokens if s.early_heldout_tokens < s.heldout_tokens else None
            records.append(_candidate(at_rate, layer, direction, seed, early, part))
    return records


def _candidate(study, layer, direction, seed, points, part=None):
    """The record of a candidate with the `points`, in whole steps, on its curve; its end is measured on `part`."""
    s, records = study.settings, study.candidates(direction, seed=seed)
    parameters = records.parameters | {"layer": layer} | ({"measured_tokens": part} if part else {})
    known, here = records.find(layer, s.score_tokens, part), describe_device(s.device)
    if known and study.ledger.run("candidate", parameters, dict).device != here:
        known = None if points else known  # one curve is of one device
    missing = [point for point in points if point not in {p["tokens"] for p in (known or {}).get("curve", ())}]
    if known is None or missing:
        job = Job(study.inputs(s.mixer, seed, s.score_tokens, "score"), s.score_tokens, study.match_settings, part)
        with tempfile.TemporaryDirectory() as checkpoints:
            figures = measure_along(job if shares_step(job) else replace(job, checkpoints=checkpoints),
                                    one_layer_sets(direction, study.num_layers)[layer], missing,
                                    s.early_heldout_tokens, end=known is None)
        end = figures.pop() if known is None else known | {"device": here}
        records.keep(layer, s.score_tokens, with_curve(end, figures), part)
    return study.ledger.run("candidate", parameters, dict)
