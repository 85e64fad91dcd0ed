"""The layers that the paper's authors kept and the results they reported, to set ours beside; nothing is measured here.
The README in ``data/published`` says where they come from and how far to trust them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from hybridlib.checks import check_choice
from hybridlib.records.folders import data_folder
from hybridlib.report.tables import neighbour_counts
from hybridlib.selection.agreement import chance_jaccard, contiguity_distribution, jaccard, spearman
from hybridlib.selection.rules import OFFSETS, select

__all__ = ["PATTERNS", "PublishedSettings", "agreement_matrix", "agreement_table", "agreements", "clustering_table",
           "consistency", "differences", "load_layer_sets", "load_results", "nearest_sets", "of_share", "with_layers"]

PATTERNS = ("SMART", "UNIFORM")  # listed in ascending order, so the order of their layers ranks nothing
_SETTING = ["teacher", "num_layers", "student_mixer", "probe_mixer", "budget", "selector"]


@dataclass(frozen=True)
class PublishedSettings:
    """The notebook's parameters: `share`, the budget of the sets, and `student`, their hybrids' mixer."""

    share: float = 0.25
    student: str = "gdn"

    def __post_init__(self):
        sets = load_layer_sets()
        check_choice("student", self.student, tuple(sets["student_mixer"].unique()))
        shares = sorted(sets["budget"].dropna().unique().tolist())
        if self.share not in shares:
            raise ValueError(f"share={self.share!r} was not published; choose one of {', '.join(map(str, shares))}")


def load_layer_sets() -> pd.DataFrame:
    """Load the published sets, a row each, layers in the authors' order; nan is what the source lacks."""
    frame = pd.read_csv(data_folder("published") / "layer_sets.csv")
    frame["layers"] = [tuple(map(int, str(text).split())) for text in frame["layers"]]
    return frame.assign(size=frame["layers"].map(len))


def load_results() -> pd.DataFrame:
    """Load the reported averages, shares from 0 to 1, a row each: second-hand."""
    return pd.read_csv(data_folder("published") / "results.csv")


def of_share(sets: pd.DataFrame, share: float, student: str, *, others: bool = False) -> pd.DataFrame:
    """Take the sets for the mixer `student` at the budget `share`, of a probe's only those of its own mixer; `others`
    adds sets of other works, which have no budget."""
    own = (sets["student_mixer"] == student) & (sets["probe_mixer"].isna() | (sets["probe_mixer"] == student))
    return sets[own & ((sets["budget"] == share) | (others & sets["budget"].isna()))]


def nearest_sets(sets: pd.DataFrame, best: str = "GA-S2") -> pd.DataFrame:
    """Compare each set of another work with the set of `best` nearest in size: layers ``shared``, ``expected`` of
    random sets, and the ``probability`` that those share as many or more; missing without a set of `best`."""
    rows = []
    for r in sets[sets["budget"].isna()].itertuples():
        rivals = sets[(sets["teacher"] == r.teacher) & (sets["student_mixer"] == r.student_mixer)
                      & (sets["probe_mixer"] == r.student_mixer) & (sets["selector"] == best)]
        row = {"selector": r.selector, "teacher": r.teacher, "layers": r.num_layers, "size": r.size}
        if len(rivals):
            other = min(rivals.itertuples(), key=lambda o: (abs(o.size - r.size), o.size))
            shared, probability = _overlap(r, other)
            row |= {f"size of {best}": other.size, "shared": shared, "expected": r.size * other.size / r.num_layers,
                    "probability": probability}
        rows.append(row)
    return pd.DataFrame(rows)


def agreements(frame: pd.DataFrame, across: str) -> pd.DataFrame:
    """Compare every two sets of one size that differ in the column `across` alone; for ``"probe_mixer"``, what each
    mixer's probe gave its own student. ``chance`` is the mean ``jaccard`` of random sets, ``probability`` the share of
    them that overlap as much or more (hypergeometric); ``nested`` says whether one set holds the other; ``spearman`` is
    of the layers in both rankings, nan for patterns and for fewer than three."""
    same = [c for c in _SETTING if c != across and not (across in ("selector", "probe_mixer") and c == "probe_mixer")]
    if across == "probe_mixer":
        same.remove("student_mixer")  # a probe's own student
        frame = frame[frame["probe_mixer"] == frame["student_mixer"]]
    rows = []
    for key, part in frame.dropna(subset=[across]).groupby(same, dropna=False, sort=False):
        for a, b in combinations(part.itertuples(), 2):
            if getattr(a, across) == getattr(b, across):
                continue
            rows.append(dict(zip(same, key)) | {
                "a": getattr(a, across), "b": getattr(b, across), "jaccard": jaccard(a.layers, b.layers),
                "chance": chance_jaccard(a.num_layers, a.size, b.size), "probability": _overlap(a, b)[1],
                "nested": set(a.layers) <= set(b.layers) or set(b.layers) <= set(a.layers),
                "spearman": _spearman_of_shared(a, b)})
    columns = [*same, "a", "b", "jaccard", "chance", "probability", "nested", "spearman"]
    return pd.DataFrame(rows, columns=columns)


def agreement_matrix(pairs: pd.DataFrame, labels: Sequence[str]) -> np.ndarray:
    """Average the Jaccard index of `agreements` over two labels (n, n); nan without any, 1 on the diagonal."""
    both = pd.concat([pairs, pairs.rename(columns={"a": "b", "b": "a"})])
    matrix = both.pivot_table("jaccard", "a", "b").reindex(index=labels, columns=labels).to_numpy(copy=True)
    np.fill_diagonal(matrix, 1.0)
    return matrix


def agreement_table(pairs: pd.DataFrame, by: str) -> pd.DataFrame:
    """Average `agreements` for each value of the column `by`, and count pairs that overlap as few random sets do."""
    return pairs.assign(rare=pairs["probability"] <= 0.05).groupby(by, sort=False).agg(**{
        "pairs": ("jaccard", "size"), "Jaccard": ("jaccard", "mean"), "by chance": ("chance", "mean"),
        "that at most 5% of random sets reach": ("rare", "sum"), "Spearman of shared layers": ("spearman", "mean")})


def clustering_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Count neighbours in each selector's pooled sets, no set a cut of another, beside what random sets expect, and the
    exact shares of random draws with as many or more, and as many or fewer."""
    rows = {}
    for name, part in neighbour_counts(frame).groupby("selector", sort=False):
        shares, pairs = np.ones(1), int(part["pairs"].sum())
        for r in part.itertuples():
            shares = np.convolve(shares, contiguity_distribution(r.size, r.num_layers))
        rows[name] = {"sets": len(part), "pairs": pairs, "expected": part["expected"].sum(),
                      "as many or more": shares[pairs:].sum(), "as many or fewer": shares[:pairs + 1].sum()}
    return pd.DataFrame.from_dict(rows, orient="index").astype({"sets": int, "pairs": int}).rename_axis("selector")


def with_layers(results: pd.DataFrame, sets: pd.DataFrame) -> pd.DataFrame:
    """Join each reported figure to its ``layers``, None if not published. GA-S1, greedy addition by the stage-1 metric,
    is taken to be what the sets call stage-1 MSE: neither table says so."""
    layers = []
    for r in results.itertuples():
        name, _, probe = r.selector.partition(" (")
        probe = probe.removesuffix(" probe)") or r.student_mixer
        match = sets[(sets["teacher"] == r.teacher) & (sets["student_mixer"] == r.student_mixer)
                     & (sets["budget"] == r.budget) & (sets["selector"] == {"GA-S1": "stage-1 MSE"}.get(name, name))
                     & (sets["probe_mixer"].isna() | (sets["probe_mixer"] == probe))]
        layers.append(match["layers"].iloc[0] if len(match) else None)
    return results.assign(layers=layers)


def differences(table: pd.DataFrame, best: str = "GA-S2") -> pd.DataFrame:
    """Show by how much `best` is reported above each rival of its teacher, student and budget, and how many of its
    layers the rival lacks. `table` is that of `with_layers`."""
    pairs = table[table["selector"] == best].merge(table, on=["teacher", "student_mixer", "budget", "metric"],
                                                   suffixes=("", "_rival"))
    pairs = pairs[pairs["selector_rival"] != best].reset_index(drop=True)
    others = [None if ours is None or theirs is None else len(set(ours) - set(theirs))
              for ours, theirs in zip(pairs["layers"], pairs["layers_rival"])]
    return pairs.assign(**{"difference": pairs["value"] - pairs["value_rival"],
                           "other layers": pd.array(others, dtype="Int64")}).rename(
        columns={"selector_rival": "rival"}).drop(columns=["selector", "layers", "layers_rival"])


def consistency(sets: pd.DataFrame) -> pd.DataFrame:
    """Check whether the published sets fit one another: a row a check, for how many it holds, which fail."""
    counted, even = sets.dropna(subset=["budget"]), sets[sets["selector"] == "UNIFORM"]
    nested = agreements(counted[~counted["selector"].isin(PATTERNS)], "budget")
    rows = {"as many layers as the budget asks for": [
        (abs(r.size - r.budget * r.num_layers) < 1, f"{r.teacher}, {r.selector} at {r.budget}: {r.size} layers")
        for r in counted.itertuples()]}
    rows["a smaller budget's set within a larger one's"] = [
        (r.nested, f"{r.teacher}, {r.student_mixer}, {r.selector}: {r.a} in {r.b}") for r in nested.itertuples()]
    rows |= {f'UNIFORM by offset="{offset}"': [
        (select("uniform", r.size, num_layers=r.num_layers, offset=offset) == tuple(sorted(r.layers)),
         f"{r.teacher} at {r.budget}") for r in even.itertuples()] for offset in OFFSETS}
    return pd.DataFrame({check: {"of": len(results), "hold": sum(bool(holds) for holds, _ in results),
                                 "fail": "; ".join(dict.fromkeys(name for holds, name in results if not holds))}
                         for check, results in rows.items()}).T.rename_axis("check")


def _overlap(a, b):
    """Count the layers two sets share, with the probability that random sets of their sizes share as many or more."""
    shared = len(set(a.layers) & set(b.layers))
    return shared, float(stats.hypergeom.sf(shared - 1, a.num_layers, a.size, b.size))


def _spearman_of_shared(a, b):
    shared = [layer for layer in a.layers if layer in b.layers]
    if len(shared) < 3 or a.selector in PATTERNS or b.selector in PATTERNS:
        return float("nan")
    return spearman(range(len(shared)), [b.layers.index(layer) for layer in shared])
