"""The layers that the paper's authors kept, and what was reported of them: facts to set our own results beside.

The tables are ``data/published/layer_sets.csv`` and ``results.csv``; the README beside them says where they come from
and how far to trust them. Nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from hybridlib.checks import check_choice
from hybridlib.records.folders import data_folder
from hybridlib.report.style import format_number
from hybridlib.selection.agreement import chance_jaccard, contiguity, contiguity_distribution, jaccard, spearman
from hybridlib.selection.rules import OFFSETS, select

__all__ = ["PATTERNS", "PublishedSettings", "agreement_words", "agreements", "clustering", "clustering_words",
           "differences", "load_layer_sets", "load_results", "mean_agreement", "of_share", "placed_words",
           "report_words", "reported", "slip_words"]

PATTERNS = ("SMART", "UNIFORM")  # listed in ascending order, so the order of their layers ranks nothing
_SETTING = ["teacher", "num_layers", "student_mixer", "probe_mixer", "budget", "selector"]
_SETS = [*_SETTING, "layers", "config"]
_SET_OF = {"GA-S1": "stage-1 MSE"}  # a score of the results and the name that the sets have for it: our reading
_RESULTS = ["teacher", "student_mixer", "budget", "selector", "metric", "value"]


@dataclass(frozen=True)
class PublishedSettings:
    """Parameters of the notebook `published_sets`: `share`, the budget at which sets are compared; `student`, the mixer
    of the hybrids that they were published for. Raises ValueError if there is no set of them.
    """

    share: float = 0.25
    student: str = "gdn"

    def __post_init__(self):
        sets = load_layer_sets()
        check_choice("student", self.student, tuple(dict.fromkeys(sets["student_mixer"])))
        shares = sorted(sets["budget"].dropna().unique().tolist())
        if self.share not in shares:
            raise ValueError(f"share={self.share!r} was not published; choose one of {', '.join(map(str, shares))}")


def load_layer_sets(path: str | Path | None = None) -> pd.DataFrame:
    """The published sets, a row each; `layers` is a tuple in the authors' order, `kept` says how many they are.

    `budget` is nan and `probe_mixer` is nan where the source has none. `path` is another file of the same columns.
    Raises ValueError for other columns, or layers that are not distinct, or not of the teacher.
    """
    frame = _read(path, "layer_sets.csv", _SETS)
    frame["layers"] = [tuple(map(int, str(text).split())) for text in frame["layers"]]
    for row in frame.itertuples():
        distinct = set(row.layers)
        if not distinct or len(distinct) < len(row.layers) or not distinct <= set(range(row.num_layers)):
            raise ValueError(f"layers={row.layers} of {row.config} are not distinct layers from 0 to "
                             f"{row.num_layers - 1}")
    return frame.assign(kept=frame["layers"].map(len))


def load_results(path: str | Path | None = None) -> pd.DataFrame:
    """The reported averages, a row each: second-hand. Raises ValueError for other columns or a share outside 0 to 1."""
    frame = _read(path, "results.csv", _RESULTS)
    if not frame["value"].between(0, 1).all():
        raise ValueError(f"value={frame['value'][~frame['value'].between(0, 1)].iloc[0]} is not a share from 0 to 1")
    return frame


def of_share(sets: pd.DataFrame, share: float, student: str, *, placed: bool = False) -> pd.DataFrame:
    """The sets of hybrids with the mixer `student` at the budget `share`, of a probe's only those of its own mixer.

    `placed` adds sets that were taken from other works, which have a number of layers of their own and no budget.
    """
    own = (sets["student_mixer"] == student) & (sets["probe_mixer"].isna() | (sets["probe_mixer"] == student))
    return sets[own & ((sets["budget"] == share) | (placed & sets["budget"].isna()))]


def placed_words(sets: pd.DataFrame, best: str = "GA-S2") -> str:
    """A list in Markdown of the sets without a budget: why they are in no comparison, and what they share with `best`.

    They are held to the set of `best` for the same teacher and student that is nearest in size, of equals the smaller.
    """
    lines = []
    for r in sets[sets["budget"].isna()].itertuples():
        line = (f"- **{r.selector}** on {r.teacher}: {r.kept} of {r.num_layers} layers, taken from another work and so "
                "of no budget; it is drawn here and compared nowhere below.")
        rivals = sets[(sets["teacher"] == r.teacher) & (sets["student_mixer"] == r.student_mixer)
                      & (sets["probe_mixer"] == r.student_mixer) & (sets["selector"] == best)]
        if len(rivals):
            other = min(rivals.itertuples(), key=lambda o: (abs(o.kept - r.kept), o.kept))
            shared = len(set(r.layers) & set(other.layers))
            tail = stats.hypergeom.sf(shared - 1, r.num_layers, r.kept, other.kept)
            line += (f" It shares {shared} layers with the {other.kept} of {best}, where random sets share "
                     f"{format_number(r.kept * other.kept / r.num_layers, 1)}; {_share(float(tail))} of them share as "
                     "many or more.")
        lines.append(line)
    return "\n".join(lines)


def agreements(frame: pd.DataFrame, across: str) -> pd.DataFrame:
    """Every pair of sets that differ in the column `across` alone, the number of layers being equal.

    `across` is ``"teacher"``, ``"budget"``, ``"selector"``, or ``"probe_mixer"``, which compares what each mixer's
    probe gave its own student. Columns: the setting, ``a`` and ``b`` (values of `across`), ``jaccard`` and its
    ``chance``, ``probability`` (the share of random sets of these sizes that overlap as much or more, hypergeometric),
    ``nested`` (one set holds the other), and ``spearman``: of the order of the layers that both rankings list, nan for
    patterns and for fewer than three shared layers.
    """
    check_choice("across", across, ("teacher", "budget", "selector", "probe_mixer"))
    same = [c for c in _SETTING if c != across and not (across in ("selector", "probe_mixer") and c == "probe_mixer")]
    if across == "probe_mixer":
        same.remove("student_mixer")  # a probe's own student
        frame = frame[frame["probe_mixer"] == frame["student_mixer"]]
    rows = []
    for key, part in frame.dropna(subset=[across]).groupby(same, dropna=False, sort=False):
        for a, b in combinations(part.itertuples(), 2):
            if getattr(a, across) == getattr(b, across):
                continue
            shared = len(set(a.layers) & set(b.layers))
            tail = stats.hypergeom.sf(shared - 1, a.num_layers, a.kept, b.kept)
            rows.append(dict(zip(same, key)) | {
                "a": getattr(a, across), "b": getattr(b, across), "jaccard": jaccard(a.layers, b.layers),
                "chance": chance_jaccard(a.num_layers, a.kept, b.kept), "probability": float(tail),
                "nested": set(a.layers) <= set(b.layers) or set(b.layers) <= set(a.layers),
                "spearman": _order(a, b)})
    return pd.DataFrame(rows)


def mean_agreement(pairs: pd.DataFrame, labels: Sequence[str], value: str = "jaccard") -> np.ndarray:
    """Matrix (n, n) of the mean of `value` over the `agreements` of two labels; nan without any, 1 of itself."""
    matrix = np.full((len(labels), len(labels)), np.nan)
    np.fill_diagonal(matrix, 1.0)
    for (i, a), (j, b) in combinations(enumerate(labels), 2):
        found = pairs[((pairs["a"] == a) & (pairs["b"] == b)) | ((pairs["a"] == b) & (pairs["b"] == a))][value].dropna()
        if len(found):
            matrix[i, j] = matrix[j, i] = found.mean()
    return matrix


def agreement_words(pairs: pd.DataFrame, by: str) -> str:
    """A list in Markdown: for each value of the column `by`, the mean Jaccard index of its pairs beside chance."""
    if pairs.empty:
        return "- There are no two sets to compare."
    lines = []
    for name, part in pairs.groupby(by, sort=False):
        rare = int((part["probability"] <= 0.05).sum())
        order = part["spearman"].dropna()
        said = f"; order of shared layers, Spearman {format_number(order.mean(), 2)} on average" if len(order) else ""
        lines.append(f"- **{name}**: Jaccard {format_number(part['jaccard'].mean(), 2)} on average over {len(part)} "
                     f"pair{'s' * (len(part) > 1)}, {format_number(part['chance'].mean(), 2)} by chance; an overlap "
                     f"that at most 5% of random sets reach in {rare} of {len(part)}{said}.")
    return "\n".join(lines)


def clustering(frame: pd.DataFrame) -> pd.DataFrame:
    """How the layers of each set lie: the setting, ``pairs`` of neighbours, ``expected`` and ``probability``.

    See `agreement.contiguity`.
    """
    found = [contiguity(row.layers, int(row.num_layers)) for row in frame.itertuples()]
    return frame[_SETTING + ["kept"]].assign(**{name: [f[i] for f in found] for i, name in
                                                enumerate(("pairs", "expected", "probability"))})


def clustering_words(table: pd.DataFrame) -> str:
    """A list in Markdown: a line a selector, whether its sets have more neighbours than random ones have.

    A selector's rows are pooled: of random draws of as many sets of these sizes, the share that has as many pairs in
    all or more, and as many or fewer; said where either is at most 2.5%. Give rows that are no cuts of one another,
    e.g. of one budget.
    """
    lines = []
    for name, part in table.groupby("selector", sort=False):
        pmf = np.ones(1)
        for row in part.itertuples():
            pmf = np.convolve(pmf, contiguity_distribution(row.kept, row.num_layers))
        total = int(part["pairs"].sum())
        more, fewer = float(pmf[total:].sum()), float(pmf[:total + 1].sum())
        word = "they **cluster**" if more <= 0.025 else "they **keep apart**" if fewer <= 0.025 else \
            "**no more and no less than chance**"
        lines.append(f"- **{name}**: {total} pairs of neighbours in {len(part)} set{'s' * (len(part) > 1)}, "
                     f"{format_number(part['expected'].sum(), 1)} expected; as many or more in {_share(more)} of "
                     f"random draws, as many or fewer in {_share(fewer)}: {word}.")
    return "\n".join(lines)


def reported(sets: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """Each reported figure with the set it belongs to: `layers` and its ``pairs`` of neighbours, None if not published.

    ``GA-S2 (gdn probe)`` in the results is the selector GA-S2 with that probe. GA-S1, greedy addition by the stage-1
    metric, is taken to be what the sets call stage-1 MSE: neither table says so.
    """
    rows = []
    for r in results.itertuples():
        name, _, probe = r.selector.partition(" (")
        probe = probe.removesuffix(" probe)") or r.student_mixer
        match = sets[(sets["teacher"] == r.teacher) & (sets["student_mixer"] == r.student_mixer)
                     & (sets["budget"] == r.budget) & (sets["selector"] == _SET_OF.get(name, name))
                     & (sets["probe_mixer"].isna() | (sets["probe_mixer"] == probe))]
        found = match.iloc[0] if len(match) else None
        rows.append({**{c: getattr(r, c) for c in _RESULTS}, "layers": None if found is None else found["layers"],
                     "pairs": None if found is None else contiguity(found["layers"], int(found["num_layers"]))[0]})
    return pd.DataFrame(rows)


def differences(table: pd.DataFrame, best: str = "GA-S2") -> pd.DataFrame:
    """What `best` is reported above each rival of its teacher, student and budget: a row a rival, ``difference``."""
    rows = []
    for (teacher, student, budget), part in table.groupby(["teacher", "student_mixer", "budget"], sort=False):
        own = part[part["selector"] == best]
        if len(own) == 1:
            rows += [{"teacher": teacher, "student_mixer": student, "budget": budget, "rival": r.selector,
                      "value": float(own["value"].iloc[0]), "rival_value": r.value,
                      "difference": float(own["value"].iloc[0] - r.value)}
                     for r in part.itertuples() if r.selector != best]
    return pd.DataFrame(rows)


def report_words(table: pd.DataFrame) -> str:
    """A list in Markdown of what the reported figures say of the paper's claims, and what they cannot say.

    `table` is that of `reported`. The figures have no seeds, so that no interval can be given.
    """
    lines, gaps = [], differences(table)
    if len(gaps):
        above = int((gaps["difference"] > 0).sum())
        lines.append(f"- **GA-S2 above its rivals**: so reported in {above} of {len(gaps)} comparisons on "
                     f"{gaps['teacher'].nunique()} teachers, by {_gap(gaps['difference'].min())} to "
                     f"{_gap(gaps['difference'].max())}. No seeds were reported, so **no interval can be given**.")
    even = gaps[gaps["rival"].isin(PATTERNS)] if len(gaps) else gaps
    if len(even):
        lines.append("- **Spacing hurts**: of the rivals, SMART and UNIFORM spread their layers, and GA-S2 is reported "
                     f"above them in {int((even['difference'] > 0).sum())} of {len(even)} comparisons. Such a "
                     "comparison changes the spacing and the choice at once, so it **cannot tell** which it was.")
    probes = table[table["selector"].str.contains(" probe)", regex=False)]
    for teacher, part in probes.groupby("teacher", sort=False):
        best, other = part.sort_values("value", ascending=False).iloc[:2].itertuples()
        overlap = "one of the sets is not published" if best.layers is None or other.layers is None else \
            f"the two sets differ in {len(set(best.layers) - set(other.layers))} of {len(best.layers)} layers"
        lines.append(f"- **Transfer of layers**: on {teacher}, a {best.student_mixer.upper()} student of "
                     f"{best.selector} is reported {_gap(best.value - other.value)} above that of {other.selector}; "
                     f"{overlap}. One pair without seeds **cannot tell** a better set from another run.")
    read = [name for name in _SET_OF if (table.loc[table["selector"] == name, "layers"].notna()).any()]
    lines += [f"- **{name}** is held to the published set of {_SET_OF[name]}: that they are one is our reading."
              for name in read]
    bare = table[table["layers"].isna()]
    if len(bare):
        names = ", ".join(dict.fromkeys(bare["selector"]))
        lines.append(f"- **Without a published set**: {names}. Their figures cannot be held to any layers.")
    return "\n".join(lines)


def slip_words(sets: pd.DataFrame) -> str:
    """A list in Markdown of what in the published sets does not fit itself: counts, rankings, even spacing."""
    lines = []
    counted = sets.dropna(subset=["budget"])
    for r in counted[(counted["kept"] - counted["budget"] * counted["num_layers"]).abs() >= 1].itertuples():
        twin = [o.budget for o in counted.itertuples()
                if set(o.layers) == set(r.layers) and o.Index != r.Index and o.teacher == r.teacher]
        lines.append(f"- **{r.teacher}, {r.selector} at {r.budget}**: {r.kept} layers, where "
                     f"{format_number(r.budget * r.num_layers, 1)} are due"
                     + (f"; the set of budget {twin[0]}." if twin else "."))
    ranked = agreements(counted[~counted["selector"].isin(PATTERNS)], "budget")
    broken = [f"{r.teacher}, {r.student_mixer}, {r.selector}, {r.a} in {r.b}" for r in ranked.itertuples()
              if not r.nested]
    lines.append(f"- **Rankings**: of {len(ranked)} pairs of budgets of one ranking, {int(ranked['nested'].sum())} are "
                 "nested, as cuts of one ranking must be" + (f"; not nested: {'; '.join(broken)}." if broken else "."))
    even = sets[sets["selector"] == "UNIFORM"]
    rules = {o: sum(select("uniform", r.kept, num_layers=r.num_layers, offset=o) == tuple(sorted(r.layers))
                    for r in even.itertuples()) for o in OFFSETS}
    lines.append(f"- **UNIFORM**: no one rule gives all {len(even)} sets; "
                 + ", ".join(f"`offset=\"{o}\"` gives {n}" for o, n in rules.items()) + "."
                 if max(rules.values()) < len(even) else "- **UNIFORM**: one rule gives all sets.")
    return "\n".join(lines)


def _read(path, name, columns):
    path = Path(path) if path is not None else data_folder("published") / name
    frame = pd.read_csv(path)
    if list(frame.columns) != columns:
        raise ValueError(f"{path.name} has the columns {', '.join(frame.columns)}; they must be {', '.join(columns)}")
    return frame


def _order(a, b):
    shared = [layer for layer in a.layers if layer in b.layers]
    if len(shared) < 3 or a.selector in PATTERNS or b.selector in PATTERNS:
        return float("nan")
    return spearman(range(len(shared)), [b.layers.index(layer) for layer in shared])


def _share(value):
    return "under 0.1%" if value < 0.001 else f"{format_number(100 * value, 1)}%"


def _gap(value):
    return format_number(value, 3)
