"""The layers that the paper's authors and others kept, scores and results they reported, to set ours beside; nothing is
measured here. The README in ``data/published`` says where they come from and how far to trust them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from hybridlib.checks import check_choice, check_int
from hybridlib.records.folders import data_folder
from hybridlib.report.tables import neighbour_counts
from hybridlib.selection.agreement import (chance_jaccard, contiguity_distribution, jaccard, spearman,
                                           top_k_jaccard)
from hybridlib.selection.rules import OFFSETS, select
from hybridlib.selection.scorers.ablation import HALO_CAP

__all__ = ["ITEMS", "PATTERNS", "PublishedSettings", "agreement_matrix", "agreement_table", "agreements",
           "clustering_table", "consistency", "differences", "halo_redraws", "halo_table", "load_halo",
           "load_layer_sets", "load_other_sets", "load_perplexities", "load_results", "of_share", "overlaps",
           "redraw_accuracies", "repeats", "score_agreements", "with_layers"]

#: questions in each benchmark of HALO's common sense: the tests of ARC (arXiv 1803.05457), HellaSwag's validation set
#: (arXiv 1905.07830), whose test has no public answers
ITEMS = {"arc_challenge": 1172, "arc_easy": 2376, "hellaswag": 10042}
PATTERNS = ("SMART", "UNIFORM")  # listed in ascending order, so the order of their layers ranks nothing
_RECALL = ["fda", "ruler_qa_squad", "swde"]
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
    return _load_sets("layer_sets.csv")


def load_other_sets() -> pd.DataFrame:
    """Load what other works published, as `load_layer_sets` does, and the repository that is the ``source``; two rows
    are orders of replacement, which a ``selector`` of that name says."""
    return _load_sets("more_layer_sets.csv")


def load_halo() -> pd.DataFrame:
    """Load HALO's sweeps, accuracies from 0 to 1: a row a layer that alone is linear; ``layer`` nan is the teacher."""
    return pd.read_csv(data_folder("published") / "halo_layer_scores.csv")


def load_perplexities() -> pd.DataFrame:
    """Load Taylor-Calibrate's perplexities, a row a layer: the rise where it is ``ablated``, and for each start of the
    mixers the perplexity where it alone is softmax, untrained."""
    return pd.read_csv(data_folder("published") / "taylor_layer_scores.csv")


def load_results() -> pd.DataFrame:
    """Load the reported averages, shares from 0 to 1, a row each: second-hand."""
    return pd.read_csv(data_folder("published") / "results.csv")


def of_share(sets: pd.DataFrame, share: float, student: str) -> pd.DataFrame:
    """Take the sets for the mixer `student` at the budget `share`, of a probe's only those of its own mixer."""
    own = (sets["student_mixer"] == student) & (sets["probe_mixer"].isna() | (sets["probe_mixer"] == student))
    return sets[own & (sets["budget"] == share)]


def overlaps(frame: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """Compare each set of `others` with each of `frame` of its teacher: layers ``shared``, ``expected`` of random sets
    of these sizes, and the ``probability`` that those share as many or more."""
    rows = []
    for other, own in ((o, r) for o in others.itertuples() for r in frame[frame["teacher"] == o.teacher].itertuples()):
        shared, probability = _overlap(other, own)
        rows.append({"teacher": own.teacher, "other": other.selector, "other size": other.size,
                     "selector": own.selector, "size": own.size, "shared": shared,
                     "expected": other.size * own.size / own.num_layers, "probability": probability})
    return pd.DataFrame(rows, columns=["teacher", "other", "other size", "selector", "size", "shared", "expected",
                                       "probability"])


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


def agreement_matrix(pairs: pd.DataFrame, labels: Sequence[str], measure: str = "jaccard") -> np.ndarray:
    """Average a `measure` of `agreements` over two labels (n, n); nan without any, 1 on the diagonal."""
    both = pd.concat([pairs, pairs.rename(columns={"a": "b", "b": "a"})])
    matrix = both.pivot_table(measure, "a", "b").reindex(index=labels, columns=labels).to_numpy(copy=True)
    np.fill_diagonal(matrix, 1.0)
    return matrix


def agreement_table(pairs: pd.DataFrame, by: str | list[str]) -> pd.DataFrame:
    """Average `agreements` for each value of the columns `by`, and count pairs that overlap as few random sets do."""
    return pairs.assign(rare=pairs["probability"] <= 0.05).groupby(by, sort=False).agg(**{
        "pairs": ("jaccard", "size"), "Jaccard": ("jaccard", "mean"), "by chance": ("chance", "mean"),
        "that at most 5% of random sets reach": ("rare", "sum"), "Spearman of shared layers": ("spearman", "mean")})


def repeats(frame: pd.DataFrame) -> pd.DataFrame:
    """Compare, as `agreements` does, rankings that were published at several budgets, each cut to its teacher's and
    selector's smallest set: one ranking agrees with itself, one made anew as far as it repeats."""
    sizes = frame.groupby(["teacher", "selector"])["size"].transform("min")
    cuts = [layers[:size] for layers, size in zip(frame["layers"], sizes)]
    return agreements(frame.assign(layers=cuts, size=sizes), "budget")


def score_agreements(perplexities: pd.DataFrame) -> pd.DataFrame:
    """Correlate every two columns of `load_perplexities` over the layers of each teacher that has both: ``spearman`` of
    what they would keep first, a rise that is high and a perplexity that is low."""
    rows = []
    for teacher, part in perplexities.groupby("teacher", sort=False):
        scores = part.drop(columns=["teacher", "layer"]).dropna(axis=1)
        scores = -scores.assign(ablated=-scores["ablated"])
        rows += [{"teacher": teacher, "a": a, "b": b, "spearman": spearman(scores[a], scores[b])}
                 for a, b in combinations(scores, 2)]
    return pd.DataFrame(rows)


def halo_table(halo: pd.DataFrame, sets: pd.DataFrame) -> pd.DataFrame:
    """Show what HALO's quotient rests on, a row a teacher: layers ``within`` one ``standard error`` (binomial, of the
    best layer's mean common sense) of the best, and the ``spread`` of layers (interquartile range / 1.349). Noise is no
    wider than that only if layers answer alike the share ``alike`` of questions, or more. Then Spearman of the quotient
    with recall's drop alone, Jaccard of the best K of each, and how many of HALO's K layers, in `sets`, are among the
    quotient's best."""
    rows = {}
    for teacher, sense, recall, kept in _sweeps(halo, sets):
        quotient, mean, (error, spread, alike) = _quotient(recall, sense.mean(0)), sense.mean(0), _noise(sense)
        rows[teacher] = {
            "layers": len(mean), "K": len(kept), "standard error": error, "within": sum(mean >= mean.max() - error),
            "spread": spread, "alike": alike, "Spearman with recall": spearman(quotient, -recall),
            "Jaccard with recall": top_k_jaccard(quotient, -recall, len(kept)),
            "by chance": chance_jaccard(len(mean), len(kept)),
            "of HALO's set": len(kept & set(np.argsort(-quotient, kind="stable")[:len(kept)].tolist()))}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("teacher")


def halo_redraws(halo: pd.DataFrame, sets: pd.DataFrame, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Draw HALO's common sense again, recall as it was: mean and 95% range over `draws` of Spearman with the published
    ranking and of the Jaccard index of the best K, and ``certain``, the layers among them in 95% of draws. ``answers``
    is how layers answer: each for itself, alike in the least share that `halo_table` finds, or all alike; last, common
    sense is shuffled over the layers, which leaves recall alone to rank."""
    check_int("draws", draws, 1)
    rng, rows = np.random.default_rng(seed), []
    for teacher, sense, recall, kept in _sweeps(halo, sets):
        k, mean = len(kept), np.tile(sense.mean(0), (draws, 1))
        published = _quotient(recall, mean)
        for answers, alike in {"apart": 0.0, "least alike": _noise(sense)[2], "alike": 1.0, "shuffled": None}.items():
            drawn = rng.permuted(mean, axis=1) if alike is None else np.mean([
                redraw_accuracies(accuracies, items, draws, alike, rng)
                for accuracies, items in zip(sense, ITEMS.values())], axis=0)
            scores = _quotient(recall, drawn)
            counts = np.bincount(np.argsort(-scores, axis=1, kind="stable")[:, :k].ravel(), minlength=len(recall))
            row = {"teacher": teacher, "answers": answers, "K": k, "certain": int((counts >= 0.95 * draws).sum()),
                   "chance": chance_jaccard(len(recall), k)}
            for name, values in (("spearman", spearman(scores, published)),
                                 ("jaccard", top_k_jaccard(scores, published, k))):
                low, high = np.quantile(values, [0.025, 0.975])
                row |= {name: np.mean(values), f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


def redraw_accuracies(accuracies: np.ndarray, items: int, draws: int, alike: float,
                      rng: np.random.Generator) -> np.ndarray:
    """Draw the `accuracies` (layers,) on a benchmark of `items` questions again: (draws, layers), each binomial. In the
    share `alike` of the questions layers answer alike: a layer answers right what any worse one does."""
    order, common = np.argsort(accuracies), round(alike * items)
    steps = np.diff(accuracies[order], prepend=0.0, append=1.0)
    right = rng.binomial(items - common, accuracies, (draws, len(accuracies)))
    right[:, order] += rng.multinomial(common, steps, draws).cumsum(1)[:, :-1]
    return right / items


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


def _load_sets(name):
    empty = {"budget": [""], "probe_mixer": [""]}  # a set of no layers is no missing one
    frame = pd.read_csv(data_folder("published") / name, keep_default_na=False, na_values=empty)
    frame["layers"] = [tuple(map(int, text.split())) for text in frame["layers"]]
    return frame.assign(size=frame["layers"].map(len))


def _sweeps(halo, sets):
    """Yield of each teacher its layers' common sense (benchmarks, layers), their mean recall (layers,), HALO's set."""
    for teacher, part in halo.dropna(subset=["layer"]).sort_values("layer", kind="stable").groupby("teacher"):
        kept, = sets[(sets["teacher"] == teacher) & (sets["selector"] == "HALO")]["layers"]
        yield teacher, part[list(ITEMS)].to_numpy().T, part[_RECALL].mean(axis=1).to_numpy(), set(kept)


def _quotient(recall, sense):
    """Score by recall (layers,) and common sense (..., layers), as `ablation.halo_values` does, all draws at once."""
    lost = sense.max(-1, keepdims=True) - sense
    return np.minimum((recall.max() - recall) / (lost + 1e-10), HALO_CAP)


def _noise(sense):
    """The binomial standard error of the best layer's mean, the layers' spread, and the least share answered alike."""
    errors = np.sqrt((sense * (1 - sense) / np.array(list(ITEMS.values()))[:, None]).sum(0)) / len(sense)
    spread = float(np.subtract(*np.quantile(sense.mean(0), [0.75, 0.25])) / 1.349)
    error = float(errors[sense.mean(0).argmax()])
    return error, spread, max(0.0, 1 - (spread / error) ** 2)


def _overlap(a, b):
    """Count the layers two sets share, with the probability that random sets of their sizes share as many or more."""
    shared = len(set(a.layers) & set(b.layers))
    return shared, float(stats.hypergeom.sf(shared - 1, a.num_layers, a.size, b.size))


def _spearman_of_shared(a, b):
    shared = [layer for layer in a.layers if layer in b.layers]
    if len(shared) < 3 or a.selector in PATTERNS or b.selector in PATTERNS:
        return float("nan")
    return spearman(range(len(shared)), [b.layers.index(layer) for layer in shared])
