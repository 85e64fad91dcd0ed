"""A study read from its records, and its hybrids as a table, named by the selector that chose their layers.

Nothing is loaded, trained or written: a machine with the records and without the teacher can do it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from hybridlib.checks import check_choice
from hybridlib.distill.reading import READING_MODES
from hybridlib.records.ledger import Ledger, Record
from hybridlib.selection.rules import budget_layers
from hybridlib.selection.scorers.ablation import TaskTooHard
from hybridlib.study.catalogue import SELECTORS
from hybridlib.study.evidence import MAIN, Evidence, arm_options
from hybridlib.study.settings import StudySettings
from hybridlib.study.study import Study

__all__ = ["LEAST_SHARE", "NotRecorded", "RecordedStudy", "recall_tasks", "recorded_arms"]

LEAST_SHARE = 0.3  # that the teacher must be right of a task, for the task to judge hybrids
PHONE_BOOK = "phone book"
_JUDGING = ("recall", "recall_prompts", "reading", "reading_items")


class NotRecorded(TaskTooHard):
    """No record has what was asked for. To a selector it is as a task that was refused: the next one may be there."""


class RecordedStudy(Study):
    """A study whose every step is a record of `ledger` already.

    Raises NotRecorded for a step that is not, and ValueError for a ledger without an aligned student of `settings`.
    """

    def __init__(self, settings: StudySettings, ledger: Ledger):
        self.settings, self.ledger, self._done = replace(settings, recompute=False), ledger, set()
        self.entries = list(ledger)
        self._aligned: dict[str, dict] = {}
        if not any(self._aligns()):
            raise ValueError(f"ledger={str(ledger.folder)!r} has no aligned student of settings.teacher="
                             f"{settings.teacher!r}; name the folder of the study's records")

    @classmethod
    def in_folder(cls, folder: Path) -> RecordedStudy:
        """The study of the records in `folder`, whose settings are in the YAML file of its name beside it."""
        fields = yaml.safe_load(folder.with_suffix(".yaml").read_text(encoding="utf-8"))
        return cls(StudySettings(**fields | {"device": "auto", "results": str(folder)}), Ledger(folder))

    def _aligns(self) -> Iterator[Record]:
        s = self.settings
        own = {"teacher": s.teacher, "corpus": s.corpus, "context": s.context, "num_tokens": s.align_tokens,
               "settings": s.align_settings.numbers()}
        return (r for r in self.entries if r.kind == "align" and own.items() <= r.parameters.items())

    @cached_property
    def num_layers(self) -> int:
        return len(next(self._aligns()).metrics["heldout_error"])

    def aligned_parameters(self, mixer: str, seed: int) -> dict:
        own = {"mixer": mixer, "seed": seed}
        for record in self._aligns():
            if own.items() <= record.parameters.items():
                return record.parameters
        raise NotRecorded(f"no student with {mixer}, seed {seed}, is on record")

    def teacher_parameters(self) -> dict:
        s, names = self.settings, ("teacher", "revision", "corpus", "data", "context")
        own = {"teacher": s.teacher, "corpus": s.corpus, "context": s.context, "heldout_tokens": s.heldout_tokens}
        for record in self.entries:
            if record.kind == "score" and {*names} <= {*record.parameters} and own.items() <= record.parameters.items():
                return {name: record.parameters[name] for name in names}
        raise NotRecorded("no score of the teacher is on record")

    def record(self, kind, parameters, compute, missing=False) -> Record:
        if not (path := self.ledger.path(kind, parameters)).exists():
            raise NotRecorded(f"{path.name} is not on record")
        return self.ledger.run(kind, parameters, dict)

    def regime(self) -> Study | None:
        """The study under the regime that `Evidence` chooses, None until its records are there."""
        try:
            chosen = Evidence(self.under(written=False, reading=())).chosen()
        except NotRecorded:
            return None
        return chosen and self.under(attention_learning_rate=chosen.settings.attention_learning_rate,
                                     grouping=chosen.settings.grouping)

    def teacher_figures(self) -> Record | None:
        """The record of what the teacher itself writes and reads: that of most tasks, then the latest."""
        s = self.settings
        own = {"teacher": s.teacher, "corpus": s.corpus, "context": s.context}
        records = [r for r in self.entries if r.kind == "teacher" and own.items() <= r.parameters.items()
                   and r.parameters["recall"]["pairs"] == s.recall_pairs
                   and r.parameters.get("recall_prompts", StudySettings.recall_prompts) == s.recall_prompts]
        return max(records, default=None, key=lambda r: (
            len(r.metrics.get("reading", ())), "recall_written" in r.metrics, r.started))


def recall_tasks(study: RecordedStudy, mode: str = "written") -> pd.DataFrame:
    """What the teacher gets right: a row a ``task``, its ``teacher`` share by `mode` of `READING_MODES` (nan if not on
    record), and the ``outcome``: ``"judging"`` if it belongs to the recall composite, else why not."""
    check_choice("mode", mode, READING_MODES)
    record = study.teacher_figures()
    shares = {PHONE_BOOK: float("nan"), **{Path(name).stem: float("nan") for name in study.settings.reading}}
    if record is not None:
        shares |= _shares(record.metrics, mode)
    table = pd.DataFrame({"task": shares.keys(), "teacher": shares.values()})
    return table.assign(outcome=["not on record: teacher" if np.isnan(share) else "judging" if share >= LEAST_SHARE
                                 else f"left out: below {LEAST_SHARE:g}" for share in table["teacher"]])


def recorded_arms(study: RecordedStudy, arms=MAIN, mode: str = "written") -> pd.DataFrame:
    """The hybrids of the study's regime: a row for each, arm, and number of tokens at which it was measured.

    A hybrid has a row for each of the selectors `arms` that chooses its layers by the records' scores, and one with the
    arm ``""`` if none does. Columns are ``arm`` (``"ga-s2 by gdn"`` for scores of another mixer's student),
    ``seed``, ``layers``, ``budget`` (their number), ``mixer``, ``match_tokens`` (of the run), ``tokens`` (so far),
    ``end`` (whether that is all), ``main`` (whether it is the end of a run under the study's own mixer, budget and
    tokens), ``heldout_tokens``, ``kl``, ``recall_exact`` (the phone book, teacher-forced) and ``recall_written``,
    ``TASK_teacher_forced`` and ``TASK_written`` of reading, and ``recall_composite``: the mean share by `mode` of the
    tasks that are judging in `recall_tasks`, nan where one is not on record or was asked otherwise than the teacher.
    Of runs that differ in none of the first eight columns the one with a composite counts, then the latest. Empty
    until the regime is known.
    """
    tasks, record, regime = recall_tasks(study, mode), study.teacher_figures(), study.regime()
    judging, rows, names = tasks["task"][tasks["outcome"] == "judging"].tolist(), [], {}
    for hybrid in study.entries if regime else ():
        p, m = hybrid.parameters, hybrid.metrics
        if hybrid.kind != "hybrid" or p["settings"] != regime.match_settings.numbers():
            continue
        try:
            if p["aligned"] != study.aligned_parameters(p["mixer"], p["seed"]):
                continue
        except NotRecorded:
            continue
        key = p["mixer"], p["seed"], len(p["layers"])
        names[key] = names.get(key) or _choices(regime, *key, arms)
        s, shares = study.settings, _shares(m, mode)
        same = record is not None and all(p.get(name) == record.parameters.get(name) for name in _JUDGING)
        composite = [shares.get(task, float("nan")) if same else float("nan") for task in judging]
        end = {"recall_written": m.get("recall_written"), "heldout_tokens": p["heldout_tokens"],
               **{f"{task}_{how}": f[how] for task, f in m.get("reading", {}).items() for how in READING_MODES},
               "recall_composite": sum(composite) / len(composite) if composite else float("nan")}
        main = (p["mixer"], len(p["layers"]), p["num_tokens"]) == (
            s.mixer, budget_layers(s.budget, study.num_layers), s.match_tokens)
        for arm in [name for name, layers in names[key].items() if layers == tuple(p["layers"])] or [""]:
            for figures in (*m.get("curve", ()), m):
                rows.append({"arm": arm, "seed": p["seed"], "layers": tuple(p["layers"]), "budget": len(p["layers"]),
                             "mixer": p["mixer"], "match_tokens": p["num_tokens"], "tokens": figures["tokens"],
                             "end": figures is m, "main": main and figures is m, "kl": figures["kl"],
                             "recall_exact": figures.get("recall_exact"), **(end if figures is m else {})})
    columns = ["arm", "seed", "layers", "budget", "mixer", "match_tokens", "tokens", "end", "main", "heldout_tokens",
               "kl", "recall_exact", "recall_written", "recall_composite"]
    if not rows:
        return pd.DataFrame(columns=columns).astype({"end": bool, "main": bool})
    frame = pd.DataFrame(rows)
    frame = frame[[*columns, *(name for name in frame if name not in columns)]]
    frame = frame.iloc[frame["recall_composite"].notna().argsort(kind="stable")]
    return frame.drop_duplicates(columns[:8], keep="last").sort_values(
        ["main", "mixer", "budget", "match_tokens", "arm", "seed", "tokens"],
        ascending=[False, *[True] * 6], ignore_index=True)


def _choices(study, mixer, seed, count, arms) -> Mapping[str, tuple[int, ...]]:
    """{arm: layers} of what can choose `count` layers for a student of `mixer` by what is on record."""
    chosen = {}
    if not count:
        return chosen
    mixers = dict.fromkeys([mixer, *(r.parameters["mixer"] for r in study.entries if r.kind == "align")])
    for name in arms:
        for probe in mixers if SELECTORS[name].needs in ("student", "stage 2") else (mixer,):
            arm = name if probe == mixer else f"{name} by {probe}"
            try:
                chosen[arm] = study.under(budget=count, mixer=probe).select(name, probe, seed,
                                                                             **arm_options(study, name))
            except NotRecorded:
                continue
    return chosen


def _shares(metrics, mode) -> dict[str, float]:
    """{task: share right} by `mode` in a record of a hybrid or of the teacher."""
    own = metrics.get("recall_written" if mode == "written" else "recall_exact")
    reading = {task: figures[mode] for task, figures in metrics.get("reading", {}).items()}
    return ({PHONE_BOOK: own} if own is not None else {}) | reading
