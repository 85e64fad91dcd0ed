"""Do the selectors of a contest rank layers alike, and as GA-S2 does, and how far does GA-S2 repeat itself?

`aim_words` says whether the gate gradient met what was asked of it: to rank layers as GA-S2 does for a small share of
its cost; `rank_gaps` shows where it does not.

What a selector scored is read from a contest or from the records of scores. Those of a study are told from others by
asking each selector, which computes nothing here, for the parameters that its record would have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np
import pandas as pd

from hybridlib.bench.scoring import loop_rankings, loop_words
from hybridlib.checks import check_int
from hybridlib.records.ledger import Ledger
from hybridlib.report.contest import _range as spread, mean_agreement
from hybridlib.report.style import format_interval, format_number
from hybridlib.selection.agreement import bootstrap_interval, kendall, spearman
from hybridlib.selection.cost import Cost
from hybridlib.selection.scorers.ablation import TaskTooHard
from hybridlib.study.catalogue import SELECTORS, run_selector
from hybridlib.study.contest import Contest, SelectorSettings
from hybridlib.study.steps import Selection
from hybridlib.study.study import Study

__all__ = ["AIM", "agreement_of_scores", "aim_words", "rank_gaps", "recorded_scores", "repeat_words", "score_pairs"]

AIM = (0.9, 1 / 20)  # Spearman's correlation with GA-S2, at least; share of its FLOPs, at most
_OURS, _THEIRS = "gate-gradient", "ga-s2"


def recorded_scores(ledger: Ledger, contest: Contest) -> dict[str, tuple[float, ...]]:
    """Every score in `ledger` under the settings of `contest`, the latest of equals: title -> a number a layer, higher
    for keep.

    With or without a hybrid, of every selector and seed, but only as the selector asks with its own options: the same
    teacher, alignment, corpus, budget, tokens and rates. Seeds other than 0 are told apart in the title. Selectors that
    order what others measured (AVG, spacing) or search sets have no scores of their own. In the order of `SELECTORS`.
    """
    return {SELECTORS[name].title + (f", seed {seed}" if seed else ""): scores.values
            for (name, seed), scores in _scores(ledger, contest).items()}


def _scores(ledger, contest) -> dict[tuple[str, int], Selection]:
    """The same by (name, seed), with what it cost; the layers are empty."""
    records = {_text(r.parameters): r for r in sorted(ledger.find("score"), key=lambda r: r.started)
               if "values" in r.metrics}
    seeds, found = sorted({r.parameters.get("seed", 0) for r in records.values()}), {}
    for name in SELECTORS:
        for seed in seeds:
            asked = next((records[key] for key in map(_text, _Asking(contest).asked_by(name, seed)) if key in records),
                         None)
            if asked is not None and asked not in found.values():  # nor the teacher's own once more for each seed
                found[name, seed] = asked
    return {key: Selection(key[0], (), Cost.from_dict(cost) if (cost := record.metrics.get("cost")) else None,
                           tuple(record.metrics["values"])) for key, record in found.items()}


class _Asking(Study):
    """A study of a recorded contest that computes and reads nothing: it notes what selectors ask records for."""

    def __init__(self, contest):
        known, s = {f.name for f in fields(SelectorSettings)}, contest.settings
        self.settings = SelectorSettings(**{name: value for name, value in s.items() if name in known})
        self._depth, self._made, self._asked = contest.num_layers, s["aligned"], []

    @property
    def num_layers(self):
        return self._depth

    def asked_by(self, name, seed):
        """Parameters of the records that a selector would take its scores from, in its order of preference."""
        self._asked = []
        try:
            run_selector(name, self, self.settings.mixer, seed, {})
        except ValueError:  # of `record`; or there are too many sets to search
            pass
        return self._asked

    def remember(self, parameters, compute, mixer=None, seed=0, *, kind="score"):
        known = {"heldout_tokens": self.settings.heldout_tokens}
        if mixer is None:
            known |= {name: self._made[name] for name in ("teacher", "revision", "corpus", "context")}
        else:
            known |= {"aligned": self.aligned_parameters(mixer, seed), "mixer": mixer, "seed": seed}
        return self.record(kind, known | dict(parameters), compute)

    def aligned_parameters(self, mixer, seed):
        return self._made | {"mixer": mixer, "seed": seed}

    def record(self, kind, parameters, compute, missing=False):
        self._asked += [parameters] if kind == "score" else []
        raise TaskTooHard("nothing is computed here")  # so that a selector asks for all tasks that it would try


def _text(parameters):
    """Parameters as text, without the fingerprints of text that only loading it would give."""
    plain = {k: v for k, v in parameters.items() if k != "data"}
    if "aligned" in plain:
        plain["aligned"] = {k: v for k, v in plain["aligned"].items() if k != "data"}
    return json.dumps(plain, sort_keys=True)


def score_pairs(scores: Mapping[str, Sequence[float]], reference: str = "GA-S2") -> dict[str, tuple]:
    """Pairs of `recorded_scores` for `reading.rankings`: each selector's with the reference's of the same seed (of seed
    0, where a selector asks the teacher alone), then each selector's own of two seeds, where it has them."""
    pairs = {}
    for title, values in scores.items():
        base, _, seed = title.partition(", seed ")
        theirs = f"{reference}, seed {seed}" if seed else reference
        if base != reference and theirs in scores:
            pairs[f"{title} with {theirs}"] = values, scores[theirs]
    for title, values in scores.items():
        base, _, seed = title.partition(", seed ")
        if seed and base in scores:
            pairs[f"{base} with itself, seed {seed}"] = scores[base], values
    return pairs


def agreement_of_scores(contest: Contest) -> tuple[list[str], np.ndarray]:
    """(titles, mean over seeds of Spearman's correlation) of the selectors that give each layer a number of their own.

    RAD's are those of layers skipped alone, of which its search over sets only begins.
    """
    rows = contest.chosen
    titles = [t for t in contest.titles if all(v is not None for v in rows.loc[rows["selector"] == t, "values"])]
    return titles, mean_agreement(contest, titles, "values", spearman)


def repeat_words(contest: Contest, titles: Sequence[str], reference: str = "GA-S2",
                 again: str = "GA-S2, other text") -> str:
    """How far two runs of one selector rank layers alike, the second on other text, and how each of `titles` ranks them
    against one run and against the mean of both, in Markdown: what does not repeat itself nothing can agree with."""
    rows = contest.chosen
    values = {t: rows[rows["selector"] == t].set_index("seed")["values"] for t in (reference, again, *titles)}
    if any(values[t].empty for t in (reference, again)):
        return f"- **{reference}** was not run twice, so how far it repeats itself is not known."
    seeds = values[reference].index
    ceiling = [spearman(values[reference][s], values[again][s]) for s in seeds]
    both = {s: np.add(values[reference][s], values[again][s]) / 2 for s in seeds}
    tau = spread([kendall(values[reference][s], values[again][s]) for s in seeds])
    lines = [f"- **{reference}** against itself, trained on other text: Spearman {spread(ceiling)}, Kendall {tau}."]
    for title in titles:
        if values[title].empty or any(v is None for v in values[title]):
            continue
        one, mean = ([spearman(values[title][s], of[s]) for s in seeds] for of in (values[reference], both))
        lines.append(f"- **{title}**: Spearman {spread(one)} with one run of {reference}, {spread(mean)} with the "
                     "mean of its two.")
    return "\n".join(lines)


def aim_words(ledger: Ledger, contests: Sequence[Contest]) -> str:
    """In Markdown, for each teacher of `contests`: did the gate gradient rank its layers as GA-S2 does, for how little?

    By the records of `ledger` under the settings of the teacher's first contest, over all seeds that both scored; the
    aim is `AIM`. Beside it stands what can be asked for: how far GA-S2 repeats itself on other text, at another seed,
    and in another loop over the same text (`scoring_speed.loop_rankings`, at the settings at which it does so best, if
    that is better), with the gate gradient's agreement there. Intervals are bootstrapped over layers.
    """
    lines = [f"The aim of the gate gradient: a Spearman correlation with GA-S2 of at least {AIM[0]:g}, for at most "
             f"1/{1 / AIM[1]:.0f} of its FLOPs."]
    for teacher, contest in _first_of_each_teacher(contests).items():
        scores = _scores(ledger, contest)
        seeds = [seed for name, seed in scores if name == _OURS and (_THEIRS, seed) in scores]
        pairs = {seed: (scores[_OURS, seed], scores[_THEIRS, seed]) for seed in seeds}
        shares = {seed: a.cost.flops / b.cost.flops for seed, (a, b) in pairs.items() if a.cost and b.cost}
        met = [seed for seed, (a, b) in pairs.items() if _agree(a, b)[0] >= AIM[0] and shares.get(seed, 1) <= AIM[1]]
        said = "; ".join(f"at seed {seed} {format_interval(*_agree(a, b), 2)}, Kendall "
                         f"{format_number(kendall(a.values, b.values), 2)}, for {_cost_share(shares.get(seed))}"
                         for seed, (a, b) in pairs.items())
        if pairs:
            lines.append(f"- **{teacher}**: {_verdict(len(met), len(pairs))}; {said}.{_unsure(pairs, met)}")
            ceiling = _ceiling(scores)
            lines += [f"  - {line}" for line in _ceiling_words(ceiling) + _steadier(ledger, contest, scores, ceiling)]
    return "\n".join(lines) if len(lines) > 1 else "The gate gradient and GA-S2 were not both run."


def _first_of_each_teacher(contests):
    found = {}
    for contest in contests:
        found.setdefault(contest.settings["aligned"]["teacher"], contest)
    return found


def _agree(a, b):
    return bootstrap_interval(spearman, a.values, b.values)


def _cost_share(share):
    return "an unknown share of the FLOPs" if share is None else f"1/{1 / share:,.0f} of the FLOPs"


def _verdict(met, seeds):
    return "**not met**" if not met else "**met**" if met == seeds else f"**met on {met} of {seeds} seeds**"


def _unsure(pairs, met):
    """Of the seeds that met the aim, whether another draw of layers might not have."""
    below = [seed for seed in met if not _agree(*pairs[seed])[1] >= AIM[0]]
    return f" An interval of {len(below)} of those reaches below the aim." if below else ""


def _ceiling(scores):
    """How far GA-S2 repeats itself: on other text, seed by seed, and between seeds, each a list."""
    of = {seed: s.values for (name, seed), s in scores.items() if name == _THEIRS}
    again = [spearman(of[seed], s.values) for (name, seed), s in scores.items()
             if name == "ga-s2-again" and seed in of]
    between = [spearman(of[a], of[b]) for i, a in enumerate(of) for b in list(of)[i + 1:]]
    return {what: values for what, values in (("on other text", again), ("at another seed", between)) if values}


def _ceiling_words(ceiling):
    if not ceiling:
        return ["How far GA-S2 repeats itself was not measured."]
    found = " and by ".join(f"{spread(values)} {what}" for what, values in ceiling.items())
    below = max(map(np.mean, ceiling.values())) < AIM[0]
    return [f"GA-S2 agrees with itself by {found}"
            + (": the aim asks for more than GA-S2 itself gives at these settings." if below else ".")]


def _steadier(ledger, contest, scores, ceiling):
    """The same with the recorded ranking by GA-S2 that repeats itself best, if that is better than the contest's."""
    aligned, ours = contest.settings["aligned"], scores.get((_OURS, 0))
    repeats = loop_rankings(ledger, aligned["teacher"], contest.settings["mixer"])
    if ours is None or not repeats:
        return []
    key, (steady, again) = list(repeats.items())[-1]
    itself = spearman(steady, again)
    if ceiling and itself <= max(map(np.mean, ceiling.values())):
        return []
    value, low, high = bootstrap_interval(spearman, ours.values, steady)
    return [f"With GA-S2 over {loop_words(*key)}, which agrees with itself by {format_number(itself, 2)} in "
            f"another loop over the same text: {format_interval(value, low, high, 2)}, Kendall "
            f"{format_number(kendall(ours.values, steady), 2)}; {_verdict(int(value >= AIM[0]), 1)}."]


def rank_gaps(ledger: Ledger, contest: Contest, count: int = 4) -> pd.DataFrame:
    """Why the gate gradient and GA-S2 disagree: of each seed the `count` layers whose ranks differ most, widest first.

    Ranks count from 1, the layer most worth keeping. Beside those of the two stand those of GA-S2 on other text and of
    others that tell whether it is the slope that errs or GA-S2 that does not repeat itself, a dash where they were not
    run; and what part of the lost agreement the layer holds: Spearman's loses 6 d^2 / (L (L^2 - 1)) by a layer whose
    ranks differ by d.
    """
    check_int("count", count, 1)
    scores, rows = _scores(ledger, contest), {}
    beside = {"GA-S2, other text": "ga-s2-again", "GA-S2, slow": "ga-s2-slow", "untrained candidates": "smart",
              "GR-S2": "gr-s2"}
    for seed in [seed for name, seed in scores if name == _OURS and (_THEIRS, seed) in scores]:
        ranks = {name: _ranks(scores[name, seed].values) for name in (_OURS, _THEIRS, *beside.values())
                 if (name, seed) in scores}
        gaps = {l: abs(ranks[_OURS][l] - ranks[_THEIRS][l]) for l in range(contest.num_layers)}
        lost = sum(gap ** 2 for gap in gaps.values())
        for l in sorted(gaps, key=lambda l: (-gaps[l], l))[:count]:
            if gaps[l]:
                rows[seed, l] = {SELECTORS[name].title: ranks[name][l] for name in (_OURS, _THEIRS)} | {
                    label: ranks[name][l] if name in ranks else "\u2013" for label, name in beside.items()} | {
                    "of what is lost": f"{100 * gaps[l] ** 2 / lost:.0f}%"}
    frame = pd.DataFrame.from_dict(rows, orient="index")
    return frame.set_axis(pd.MultiIndex.from_tuples(rows, names=["seed", "layer"])) if rows else frame


def _ranks(values):
    return {l: rank for rank, l in enumerate(sorted(range(len(values)), key=lambda l: (-values[l], l)), 1)}
