"""All selectors on one teacher: what each chose, how good its hybrid is after equal distillation, and the cost."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import pandas as pd

from hybridlib.records.ledger import Ledger, Record
from hybridlib.selection.cost import Cost
from hybridlib.selection.scorers.ablation import TaskTooHard
from hybridlib.study.catalogue import SELECTORS, find_selector
from hybridlib.study.settings import StudySettings
from hybridlib.study.study import Study

__all__ = ["Contest", "FLOOR", "SelectorSettings", "contest_parameters", "recorded_contests", "run_contest"]

FLOOR = "none (all linear)"  #: what notebooks call the hybrid that keeps no layer
_METRICS = ("kl", "perplexity", "top1_agreement", "recall_exact")
_COSTS = [name for name in asdict(Cost()) if name != "device"]
_COLUMNS = ["selector", "name", "needs", "note", "seed", "layers", "values", *_METRICS, *asdict(Cost())]


@dataclass(frozen=True)
class SelectorSettings(StudySettings):
    """`StudySettings`, and `selectors`: names of `SELECTORS`, in the order of figures and tables."""

    selectors: list[str] = ("uniform", "random", "first", "last", "ppl", "ar", "ga-s1", "gate-gradient", "smart",
                            "ga-s2", "ga-s2-spaced", "gr-s2", "avg")

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.selectors, (list, tuple)) or not self.selectors:
            raise ValueError(f"selectors={self.selectors!r} is not a list of names; give at least one")
        for name in self.selectors:
            find_selector(name)
            if list(self.selectors).count(name) > 1:
                raise ValueError(f"selectors names {name!r} twice; each may be named once")


@dataclass(frozen=True)
class Contest:
    """The results of a contest.

    Parameters
    ----------
    rows : a line a selector and seed: ``selector`` (its title), ``name``, ``needs``, ``seed``, ``layers``, ``values``
        (a number a layer, or None), ``note``, the metrics of its hybrid, and the fields of its `Cost` (nan if unknown).
        The hybrid that keeps no layer is among them as `FLOOR`, with the name ``"none"``.
    refused : selectors that the teacher does not allow, title -> why.
    """

    rows: pd.DataFrame
    refused: dict[str, str]
    teacher: dict
    num_layers: int
    settings: dict
    device: str
    commit: str | None = None

    @property
    def chosen(self) -> pd.DataFrame:
        """`rows` without the hybrid that keeps no layer."""
        return self.rows[self.rows["name"] != "none"]

    @property
    def usable(self) -> pd.DataFrame:
        """`chosen` without controls, see `Selector`."""
        controls = [name for name, selector in SELECTORS.items() if selector.control]
        return self.chosen[~self.chosen["name"].isin(controls)]

    @property
    def sets(self) -> dict[str, list[tuple[int, ...]]]:
        """Title -> the layers that the selector chose, seed by seed."""
        return {title: list(rows["layers"]) for title, rows in self.chosen.groupby("selector", sort=False)}

    @property
    def titles(self) -> list[str]:
        """The selectors' titles, in their order."""
        return list(self.chosen["selector"].unique())


def run_contest(study: Study) -> Contest:
    """Let every selector of the study's `SelectorSettings` choose with every seed, and distil what each chose alike.

    Record kind ``"contest"``. A selector by a recall task that is beyond the teacher is named in `Contest.refused`.
    """
    s = study.settings

    def compute():
        rows, refused = [], {}
        for name in s.selectors:
            try:
                rows += [_row(name, seed, study.selection(name, seed=seed)) for seed in study.seeds]
            except TaskTooHard as error:
                refused[SELECTORS[name].title] = str(error)
        rows += [{"selector": FLOOR, "name": "none", "needs": "nothing", "note": "", "seed": seed, "layers": [],
                  "values": None, **Cost().to_dict()} for seed in study.seeds]
        for row in rows:
            metrics = study.hybrid(row["layers"], seed=row["seed"]).metrics
            row |= {name: metrics[name] for name in _METRICS if name in metrics}
        return {"rows": rows, "refused": refused, "teacher": study.teacher_record().metrics,
                "num_layers": study.num_layers}

    return _contest(study.remember(contest_parameters(s), compute, s.mixer, kind="contest"))


def contest_parameters(settings: SelectorSettings) -> dict:
    """The own parameters of the record of `run_contest`."""
    names = asdict(SelectorSettings()).keys() - {"device", "results", "recompute"}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items() if k in names}


def recorded_contests(ledger: Ledger) -> list[Contest]:
    """The contests in `ledger`, merged where only the selectors differ; the deepest teacher is first."""
    groups: dict[str, list[Contest]] = {}
    for record in sorted(ledger.find("contest"), key=lambda r: r.started):
        common = {k: v for k, v in record.parameters.items() if k != "selectors"}
        groups.setdefault(json.dumps(common, sort_keys=True), []).append(_contest(record))
    usual = StudySettings.budget, StudySettings.mixer
    return sorted(map(_merged, groups.values()), key=lambda c: (
        -c.num_layers, (c.settings["budget"], c.settings["mixer"]) != usual, -len(c.rows)))


def _merged(contests: list[Contest]) -> Contest:
    """One contest of several, the earliest first; selectors in the order of `SELECTORS`."""
    rows = pd.concat([c.rows for c in contests], ignore_index=True).drop_duplicates(["name", "seed"], keep="last")
    order = {name: i for i, name in enumerate((*SELECTORS, "none"))}
    rows = rows.sort_values(["name", "seed"], key=lambda c: c.map(order) if c.name == "name" else c, kind="stable")
    refused = {title: why for c in contests for title, why in c.refused.items() if title not in set(rows["selector"])}
    names = [name for name in rows["name"].unique() if name != "none"]
    return replace(contests[-1], rows=rows.reset_index(drop=True), refused=refused,
                   settings=contests[-1].settings | {"selectors": names},
                   commit=", ".join(dict.fromkeys(c.commit for c in contests if c.commit)) or None)


def _row(name, seed, selection):
    cost = selection.cost.to_dict() if selection.cost else dict.fromkeys(Cost().to_dict())
    return {"selector": SELECTORS[name].title, "name": name, "needs": SELECTORS[name].needs, "seed": seed,
            "layers": list(selection.layers), "note": selection.note,
            "values": None if selection.values is None else list(selection.values), **cost}


def _contest(record: Record) -> Contest:
    m = record.metrics
    rows = pd.DataFrame([{"note": "", **row} for row in m["rows"]])[_COLUMNS]  # older records have no notes
    rows["layers"] = [tuple(layers) for layers in rows["layers"]]
    rows["values"] = [tuple(values) if isinstance(values, list) else None for values in rows["values"]]
    ga = dict(rows.loc[rows["name"] == "ga-s2", ["seed", "values"]].itertuples(index=False))
    rows["values"] = [values if name == "ga-s2" or values != ga.get(seed) else None  # older records lend GA-S2's
                      for name, seed, values in zip(rows["name"], rows["seed"], rows["values"], strict=True)]
    rows[_COSTS] = rows[_COSTS].astype(float)
    return Contest(rows, m["refused"], m["teacher"], m["num_layers"], record.parameters, record.device, record.commit)
