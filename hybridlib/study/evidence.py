"""The study that decides the paper's claims on a language model, as pieces of a queue, those first that others need.

``python -m hybridlib.study.evidence SETTINGS --minutes M`` works on it for M minutes, SETTINGS being a YAML file of
`StudySettings`; call it again, anywhere that the records are, until nothing is left. With ``--worker I``, several
processes, one a GPU, share the work. What the settings say of writing and reading is measured in all parts from main on
but the random one.

=========== ========================================================================================================
part        what is run
=========== ========================================================================================================
regime      {rate} x {grouping} x {uniform, all linear}; the two best go on, and the best of these is the regime
scores      GA-S2 and GR-S2 after five numbers of tokens, and all that scores layers without them, three seeds
main        what each layer does; hybrids of nine selectors and of three random sets, three seeds, and five for three;
            the scores and hybrids of one seed come before those of the next
stability   GA-S2 and GR-S2 at the other rates, two seeds, after three numbers of tokens
causes      layers 17 and 18 in and out of GA-S2's set, three seeds
random      balanced random sets of layers, measured early and at their end
budgets     half and nearly twice the softmax layers, five selectors, three seeds
transfer    GLA's GA-S2; GLA students on GDN's, GLA's and uniform sets, GDN students on GDN's and GLA's, three seeds
greedy      forward and backward, adding or removing one layer at a time, and hybrids of what they choose
lab         of a teacher with few layers, where SETTINGS are those of `OracleSettings`: every set, and the contest
=========== ========================================================================================================
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import fields
from functools import cache, partial
from itertools import product
from math import comb
from pathlib import Path

import numpy as np
import yaml

from hybridlib.checks import check_int
from hybridlib.distill.reading import reading_files
from hybridlib.distill.settings import GROUPINGS
from hybridlib.selection.rules import budget_layers, select
from hybridlib.study.catalogue import SELECTORS
from hybridlib.study.contest import SelectorSettings, contest_parameters, run_contest
from hybridlib.study.oracle import OracleSettings, oracle_parameters, oracle_record
from hybridlib.study.pieces import Piece, work
from hybridlib.study.roles import role_parameters, roles_record
from hybridlib.study.selector import full_parameters
from hybridlib.study.settings import StudySettings
from hybridlib.study.study import Study

__all__ = ["Evidence", "arm_options", "balanced_sets", "lab"]

RATES = (1e-4, 3e-4, 1e-3)
SCORE_SHARES = (0.0, 0.1, 0.25, 0.5)  # of the tokens of a candidate, at which it is measured on the way
STABILITY_SHARE = 0.25  # of the tokens of a candidate, at the other rates
SEEDS, MORE_SEEDS = 3, 5
SCORERS = ("ga-s1", "gate-gradient", "learned-gates", "smart", "ppl", "ar", "halo", "gate-gradient-turns",
           "gate-gradient-path", "gate-gradient-2")
ONCE = ("gate-gradient-path", "gate-gradient-2")  # that take minutes: of the first seed alone
SECONDS = {"learned-gates": 120, "halo": 120, "gate-gradient-path": 120, "gate-gradient-2": 240, "race": 120}  # else 30
MAIN = ("ga-s2", "gr-s2", "avg", "ga-s1", "ar", "gate-gradient", "learned-gates", "uniform", "random", "race")
REPEATED = ("ga-s2", "gr-s2", "gate-gradient")  # with more seeds, for the hypotheses
RANDOM_SETS = 32
PAIR = (17, 18)  # of SmolLM2-135M: what recall hangs on


class Evidence:
    """The pieces of the study.

    Parameters
    ----------
    study : its settings are those of every part but what the part varies; `match_tokens` are those of the main part.
    speed : tokens of stage 2 a second, for estimates.
    """

    def __init__(self, study: Study, speed: float = 170_000):
        reading_files(study.settings.reading)  # what is not there is refused before hours of work
        self.study, self.speed = study, speed
        self.budget = budget_layers(study.settings.budget, study.num_layers)

    def pieces(self) -> Iterator[Piece]:
        """All pieces that records allow to name, in the order of their parts."""
        yield from self.regime()
        if (study := self.chosen()) is not None:
            for seed in range(MORE_SEEDS):
                yield from self.scores(study, seed)
                yield from self.main(study, seed)
            for part in (self.stability, self.causes, self.random, self.budgets, self.transfer, self.greedy):
                yield from part(study)

    def regime(self) -> Iterator[Piece]:
        """Every rate and grouping for 3/20 of the tokens, the two best for half of them."""
        yield self._align(0, self.study.settings.mixer)
        for study in self._regimes():
            for layers in self._yardsticks():
                yield self._hybrid("regime", study, layers)
        for study in self._best(self._regimes(), 2):
            for layers in self._yardsticks():
                yield self._hybrid("regime", study, layers)

    def chosen(self) -> Study | None:
        """The study under the best regime, once it is known."""
        s, finalists = self.study.settings, self._best(self._regimes(), 2)
        return next((best.under(written=s.written, reading=s.reading)
                     for best in self._best(finalists, 1, s.match_tokens)), None)

    def scores(self, study: Study, seed: int) -> Iterator[Piece]:
        points = [self._tokens(study.settings.score_tokens, share) for share in SCORE_SHARES] if seed < SEEDS else ()
        for direction in ("add", "remove"):
            yield from self._candidates("scores", study, seed, direction, points)
        for name in SCORERS if seed < SEEDS else ("gate-gradient",):
            if seed == 0 or name not in ONCE:
                yield self._scorer(study, name, seed)
        if seed < SEEDS:
            yield self._scorer(study, "ga-s1", seed, normalize=True)

    def random(self, study: Study) -> Iterator[Piece]:
        half = self._half(study).under(written=False, reading=())
        early = [self._tokens(study.settings.score_tokens, share) for share in (0.0, 0.25, 0.5, 1.0)]
        count = min(RANDOM_SETS, comb(study.num_layers, self.budget))
        for layers in balanced_sets(study.num_layers, self.budget, count):
            yield self._hybrid("random", half, layers, measure_at=early)

    def main(self, study: Study, seed: int) -> Iterator[Piece]:
        points = [self._tokens(study.settings.match_tokens, share) for share in (0.1, 0.3)]
        if seed == 0:
            teacher = self.study.ledger.path("teacher", study.evaluated_parameters())
            yield Piece("main: teacher", "main: teacher", 60, teacher.exists, study.teacher_record)
            yield from self.roles(study)
        if seed < SEEDS:
            yield self._scorer(study, "race", seed)
        for name in MAIN if seed < SEEDS else REPEATED:
            if (layers := self._layers(study, name, seed)) is not None:
                yield self._hybrid("main", study, layers, seed, points)

    def roles(self, study: Study) -> Iterator[Piece]:
        """What each layer does, of the first seed's student."""
        if study.num_layers > max(PAIR):
            yield Piece("main: roles", "main: roles", 90,
                        study.ledger.path("roles", role_parameters(study, PAIR)).exists,
                        partial(roles_record, study, PAIR), partial(study.is_aligned, study.settings.mixer, 0))

    def stability(self, study: Study) -> Iterator[Piece]:
        step = study.match_settings.step_rows(study.settings.context) * study.settings.context
        tokens = -(-round(STABILITY_SHARE * study.settings.score_tokens) // step) * step  # where scores were measured
        points = [self._tokens(study.settings.score_tokens, share) for share in SCORE_SHARES if share < STABILITY_SHARE]
        for rate in sorted(set(RATES) - {study.settings.attention_learning_rate}, reverse=True):
            other = study.under(attention_learning_rate=rate, score_tokens=tokens)
            for direction, seed in product(("add", "remove"), range(2)):
                yield from self._candidates("stability", other, seed, direction, points)

    def causes(self, study: Study) -> Iterator[Piece]:
        """GA-S2's set of seed 0 with both, one or none of `PAIR`, the places filled by the next best."""
        if study.num_layers <= max(PAIR) or not self._scored(study, "ga-s2", 0):
            return
        ranking = [l for l in study.scores(study.settings.mixer, 0).ranking if l not in PAIR]
        half = self._half(study)
        for kept, seed in product(((), PAIR[:1], PAIR[1:], PAIR), range(SEEDS)):
            yield self._hybrid("causes", half, (*kept, *ranking[:self.budget - len(kept)]), seed)

    def budgets(self, study: Study) -> Iterator[Piece]:
        for count, seed in product((self.budget // 2, min(2 * self.budget, study.num_layers) - 1), range(SEEDS)):
            half = self._half(study).under(budget=count)
            for name in (*REPEATED, "avg", "uniform"):
                if (layers := self._layers(half, name, seed)) is not None:
                    yield self._hybrid("budgets", half, layers, seed)

    def transfer(self, study: Study) -> Iterator[Piece]:
        half = self._half(study)
        other = half.under(mixer="gla" if half.settings.mixer == "gdn" else "gdn")
        for seed in range(SEEDS):
            yield from self._candidates("transfer", other, seed, "add", ())
            pairs = [(student, probe, "ga-s2") for student, probe in product((half, other), repeat=2)]
            for student, probe, name in (*pairs, (other, other, "uniform")):
                if (layers := self._layers(probe, name, seed)) is not None:
                    yield self._hybrid("transfer", student, layers, seed)

    def greedy(self, study: Study) -> Iterator[Piece]:
        """Candidates of a quarter of the tokens, as many as the search asks for."""
        half = self._half(study).under(score_tokens=self._tokens(study.settings.score_tokens, STABILITY_SHARE))
        sets = {"greedy-forward": self.budget * (2 * study.num_layers - self.budget + 1) // 2,
                "greedy-backward": (study.num_layers - self.budget) * (study.num_layers + self.budget + 1) // 2}
        for name, count in sets.items():
            yield self._scorer(half, name, 0, 3 * count)
            if (layers := self._layers(half, name, 0)) is not None:
                yield self._hybrid("greedy", half, layers)

    # What parts are made of.

    def _half(self, study):
        return study.under(match_tokens=self._tokens(study.settings.match_tokens, 0.5))

    def _tokens(self, tokens, share):
        """A share of tokens, in whole rows."""
        return round(share * tokens / self.study.settings.context) * self.study.settings.context

    def _regimes(self):
        tokens = self._tokens(self.study.settings.match_tokens, 0.15)
        return [self.study.under(attention_learning_rate=rate, grouping=grouping, match_tokens=tokens, written=False,
                                 reading=())
                for rate, grouping in product(RATES, GROUPINGS)]

    def _yardsticks(self):
        return select("uniform", self.budget, num_layers=self.study.num_layers), ()

    def _best(self, studies, count, tokens=None):
        """The `count` studies with the lowest mean KL over the yardsticks, with the tokens of the next round (None:
        half of the main part's); none until all are on record."""
        kl = []
        for study in studies:
            records = [study.ledger.path("hybrid", study.hybrid_parameters(layers)) for layers in self._yardsticks()]
            if not all(path.exists() for path in records):
                return []
            kl.append(sum(study.hybrid(layers).metrics["kl"] for layers in self._yardsticks()))
        best = sorted(range(len(kl)), key=kl.__getitem__)[:count]
        tokens = tokens or self._tokens(self.study.settings.match_tokens, 0.5)
        return [studies[i].under(match_tokens=tokens) for i in best]

    def _seconds(self, tokens):
        return 15 + tokens / self.speed

    def _align(self, seed, mixer):
        study, seconds = self.study, 60 + self.study.settings.align_tokens / 2 / self.speed
        return Piece(f"align {mixer}, seed {seed}", f"align {mixer} {seed}", seconds,
                     partial(study.is_aligned, mixer, seed), partial(study.aligned, mixer, seed))

    def _hybrid(self, part, study, layers, seed=0, measure_at=()):
        s = study.settings
        layers = tuple(sorted(layers))
        path = study.ledger.path("hybrid", study.hybrid_parameters(layers, None, seed, measure_at))
        regime = f"{s.mixer}, {s.grouping} at {s.attention_learning_rate:g}"
        group = f"{regime}, seed {seed}, {part}"
        return Piece(f"{group}: {layers}, {s.match_tokens} tokens", group,
                     self._seconds(s.match_tokens), path.exists,
                     partial(study.hybrid, layers, None, seed, measure_at), partial(study.is_aligned, s.mixer, seed))

    def _candidates(self, part, study, seed, direction, points):
        s, records = study.settings, study.candidates(direction, seed=seed)
        yield self._align(seed, s.mixer)
        group = f"{s.mixer}, {s.grouping} at {s.attention_learning_rate:g}, seed {seed}, {part}"
        for layer in range(study.num_layers):
            yield Piece(f"{group}: {direction} layer {layer}, {s.score_tokens} tokens", group,
                        self._seconds(s.score_tokens) - 10, records.path(layer, s.score_tokens).exists,
                        partial(study.candidate, layer, direction, None, seed, points),
                        partial(study.is_aligned, s.mixer, seed))

    def _scorer(self, study, name, seed, seconds=None, **options):
        options = arm_options(study, name) | options
        paths = self._score_paths(study, name, seed, **options)
        return Piece(f"scores: {name}, seed {seed} {options or ''}", f"scores {seed}", seconds or SECONDS.get(name, 30),
                     lambda: any(path.exists() for path in paths),
                     partial(study.selection, name, seed=seed, **options),
                     partial(study.is_aligned, study.settings.mixer, seed))

    def _score_paths(self, study, name, seed, **options):
        """The records of which one says what the selector's scores are."""
        s, selector = study.settings, SELECTORS[name]
        origin = (study.teacher_parameters() if selector.needs == "teacher"
                  else study.aligned_parameters(s.mixer, seed))
        return [study.ledger.path("score", full_parameters(own, s, origin))
                for own in selector.records(s, study.num_layers, seed, **options)]

    def _scored(self, study, name, seed):
        """Whether the selector can choose without computing: by a rule, its own record, or all candidates."""
        if SELECTORS[name].needs == "nothing":
            return True
        if name in ("ga-s2", "gr-s2", "avg"):
            return all(study.candidates(direction, seed=seed).path(layer, study.settings.score_tokens).exists()
                       for direction in {"ga-s2": ("add",), "gr-s2": ("remove",)}.get(name, ("add", "remove"))
                       for layer in range(study.num_layers))
        return any(path.exists() for path in self._score_paths(study, name, seed, **arm_options(study, name)))

    def _layers(self, study, name, seed):
        """The selector's layers, None until its scores are on record."""
        return study.select(name, seed=seed, **arm_options(study, name)) if self._scored(study, name, seed) else None


def arm_options(study: Study, name: str) -> dict:
    """The options of a selector in the study: GA-S1 by the paper's raw error, learned gates on a tenth of GA-S2's
    tokens."""
    tokens = study.num_layers * study.settings.score_tokens // 10
    return {"ga-s1": {"normalize": False},
            "learned-gates": {"num_tokens": max(study.settings.context, tokens)}}.get(name, {})


@cache
def balanced_sets(num_layers: int, size: int, count: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """`count` different sets of `size` layers in which all layers, and all pairs as far as it goes, are equally common.

    Layers are added one by one: of those in fewest sets, one that was least often with the set's layers, else by lot; a
    set that was there before gives way to the lot.
    """
    check_int("num_layers", num_layers, 2)
    check_int("size", size, 1, num_layers - 1)
    check_int("count", count, 1, comb(num_layers, size))
    draw, sets, repeats = random.Random(seed), [], 0
    together = np.zeros((num_layers, num_layers), dtype=int)  # sets with both layers; with the layer, on the diagonal
    while len(sets) < count:
        chosen: list[int] = []
        while len(chosen) < size:
            chosen.append(min(set(range(num_layers)) - set(chosen), key=lambda l: (
                together[l, l] + repeats * draw.random(), together[l, chosen].sum(), draw.random())))
        layers = tuple(sorted(chosen))
        repeats = repeats + 1 if layers in sets else 0
        if not repeats:
            sets.append(layers)
            together[np.ix_(layers, layers)] += 1
    return tuple(sets)


def lab(oracle: Study, contest: Study) -> Iterator[Piece]:
    """The pieces for a teacher of few layers: every set of layers distilled and, of each seed, the selectors' sets."""
    for seed in oracle.seeds:
        path = oracle.ledger.path("oracle", oracle_parameters(oracle, seed))
        yield Piece(f"lab: oracle, seed {seed}", f"oracle {seed}", 240, path.exists,
                    partial(oracle_record, oracle, seed))
    s = contest.settings
    parameters = full_parameters(contest_parameters(s), s, contest.aligned_parameters(s.mixer, 0))
    yield Piece("lab: contest", "contest", 400, contest.ledger.path("contest", parameters).exists,
                partial(run_contest, contest))


def main(arguments: Iterable[str] | None = None) -> None:
    """The command line, see the module."""
    parser = argparse.ArgumentParser(prog="python -m hybridlib.study.evidence", description=__doc__.splitlines()[0])
    parser.add_argument("settings", type=Path, help="a YAML file of StudySettings, or of OracleSettings")
    parser.add_argument("--minutes", type=float, required=True, help="how long to work")
    parser.add_argument("--worker", type=int, default=0, help="number of this process, 0 for the first")
    parser.add_argument("--memory", type=int, default=32, help="GiB for the teacher's hidden states")
    parser.add_argument("--results", help="folder of records, in place of the file's")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("hybridlib.study.pieces").setLevel(logging.INFO)
    named = yaml.safe_load(options.settings.read_text(encoding="utf-8"))
    named |= {"results": options.results} if options.results else {}
    how = {"memory": options.memory * 2**30, "checkpoints": False}
    if "sizes" in named:
        names = {field.name for field in fields(SelectorSettings)} - {"selectors"}
        study = Study(OracleSettings(**named), **how)
        pieces = partial(lab, study, Study(SelectorSettings(
            **{name: value for name, value in named.items() if name in names}, selectors=list(SELECTORS)), **how))
    else:
        study = Study(StudySettings(**named), **how)
        pieces = Evidence(study).pieces
    work(pieces, options.minutes, study.ledger.folder / "models" / "locks", worker=options.worker)


if __name__ == "__main__":
    main()
