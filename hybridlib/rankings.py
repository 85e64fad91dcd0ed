"""Do the selectors of a contest rank layers alike, and as GA-S2 does, and how far does GA-S2 repeat itself?

What a selector scored is read from a contest or from the records of scores. Those of a study are told from others by
asking each selector, which computes nothing here, for the parameters that its record would have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np

from .ablation import TaskTooHard
from .agreement import spearman
from .contest import Contest, SelectorSettings, mean_agreement, spread
from .ledger import Ledger, Record
from .selectors import SELECTORS, run_selector
from .study import Study

__all__ = ["agreement_of_scores", "recorded_scores", "repeat_words", "score_pairs"]


def recorded_scores(ledger: Ledger, contest: Contest) -> dict[str, tuple[float, ...]]:
    """Every score in `ledger` under the settings of `contest`, the latest of equals: title -> a number a layer, higher
    for keep.

    With or without a hybrid, of every selector and seed, but only as the selector asks with its own options: the same
    teacher, alignment, corpus, budget, tokens and rates. Seeds other than 0 are told apart in the title. Selectors that
    order what others measured (AVG, spacing) or search sets have no scores of their own. In the order of `SELECTORS`.
    """
    return {SELECTORS[name].title + (f", seed {seed}" if seed else ""): tuple(record.metrics["values"])
            for (name, seed), record in _records(ledger, contest).items()}


def _records(ledger, contest) -> dict[tuple[str, int], Record]:
    records = {_text(r.parameters): r for r in sorted(ledger.find("score"), key=lambda r: r.started)
               if "values" in r.metrics}
    seeds, found = sorted({r.parameters.get("seed", 0) for r in records.values()}), {}
    for name in SELECTORS:
        for seed in seeds:
            asked = next((records[key] for key in map(_text, _Asking(contest).asked_by(name, seed)) if key in records),
                         None)
            if asked is not None and asked not in found.values():  # nor the teacher's own once more for each seed
                found[name, seed] = asked
    return found


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
        except ValueError:  # of `_run`; or there are too many sets to search
            pass
        return self._asked

    def remember(self, parameters, compute, mixer=None, seed=0, *, kind="score"):
        known = {"heldout_tokens": self.settings.heldout_tokens}
        if mixer is None:
            known |= {name: self._made[name] for name in ("teacher", "revision", "corpus", "context")}
        else:
            known |= {"aligned": self._align_parameters(mixer, seed)[0], "mixer": mixer, "seed": seed}
        return self._run(kind, known | dict(parameters), compute)

    def _align_parameters(self, mixer, seed):
        return self._made | {"mixer": mixer, "seed": seed}, None

    def _run(self, kind, parameters, compute, missing=False):
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
    """(titles, mean over seeds of Spearman's correlation) of the selectors that give each layer a number."""
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
    lines = [f"- **{reference}** against itself, trained on other text: Spearman {spread(ceiling)}."]
    for title in titles:
        if values[title].empty or any(v is None for v in values[title]):
            continue
        one, mean = ([spearman(values[title][s], of[s]) for s in seeds] for of in (values[reference], both))
        lines.append(f"- **{title}**: Spearman {spread(one)} with one run of {reference}, {spread(mean)} with the "
                     "mean of its two.")
    return "\n".join(lines)


