"""The oracle: every layer set of a small teacher distilled and measured, and selectors judged by it."""

from __future__ import annotations

import copy
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from math import comb

import numpy as np
import pandas as pd

from hybridlib.checks import check_choice, check_int, check_number
from hybridlib.distill.corpus import Tokens
from hybridlib.records.ledger import Ledger, Record
from hybridlib.selection.agreement import spearman
from hybridlib.selection.engine.sets import match_sets
from hybridlib.selection.scorers.ablation import TaskTooHard
from hybridlib.selection.search import beam, greedy_backward, greedy_forward, interactions, regret
from hybridlib.study.catalogue import SELECTORS
from hybridlib.study.settings import StudySettings
from hybridlib.study.study import Study

__all__ = ["METRICS", "OTHER_SEEDS", "OracleSettings", "SEARCHES", "additivity", "choices", "interaction_maps", "judge",
           "oracle_parameters", "oracle_record", "oracle_table", "recorded_oracle", "sets_of_sizes", "settling",
           "values"]

METRICS = ("kl", "recall_exact")
OTHER_SEEDS = "best KL of other seeds"  # the set that the other seeds' records call best
SEARCHES = {"oracle-greedy": greedy_forward, "oracle-backward": greedy_backward, "oracle-beam": partial(beam, width=4)}
_FIGURES = ("kl", "kl_stderr", "perplexity", "top1_agreement", "recall_exact", "recall_stderr")


@dataclass(frozen=True)
class OracleSettings(StudySettings):
    """The parameters of a study, and what is enumerated.

    Parameters
    ----------
    sizes : how many layers the sets have that are distilled; empty for all, from none to every layer.
    oracle_tokens, oracle_heldout_tokens : tokens of stage 2 for each set, and test tokens to measure on.
    oracle_points : shares of `oracle_tokens`, 0 to 1, after which every set is measured on the way to the end.
    piece : sets to a record.
    selectors : what is judged: names that `Study.select` takes, and those of `SEARCHES`.
    """

    sizes: Sequence[int] = (0, 1, 2)
    oracle_tokens: int = 4_096
    oracle_points: Sequence[float] = (0.5,)
    oracle_heldout_tokens: int = 2_048
    recall_examples: int = 8
    piece: int = 8
    selectors: Sequence[str] = ("ga-s2", "gr-s2", "gate-gradient", "ga-s1", "smart", "uniform", "first", "last",
                                "oracle-greedy")

    def __post_init__(self):
        super().__post_init__()
        for name in ("sizes", "oracle_points", "selectors"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise ValueError(f"{name}={getattr(self, name)!r} is not a list")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for size in self.sizes:
            check_int("sizes", size, 0)
        for point in self.oracle_points:
            check_number("oracle_points", point, 0, 1)
        for selector in self.selectors:
            check_choice("selectors", selector, (*(s for s in SELECTORS if s != "manual"), *SEARCHES))
        check_int("oracle_tokens", self.oracle_tokens, self.context)
        check_int("oracle_heldout_tokens", self.oracle_heldout_tokens, self.context, self.heldout_tokens)
        check_int("recall_examples", self.recall_examples, 1)
        check_int("piece", self.piece, 1)

    @property
    def measure_at(self) -> tuple[int, ...]:
        """Tokens after which sets are measured: those of `oracle_points`, and the end."""
        return tuple(sorted({*(round(share * self.oracle_tokens) for share in self.oracle_points), self.oracle_tokens}))


def sets_of_sizes(num_layers: int, sizes: Iterable[int] = ()) -> list[tuple[int, ...]]:
    """All sets of layers that have these sizes, smaller ones first; all 2 ** num_layers of them if `sizes` is empty."""
    sizes = sorted(set(sizes)) or range(num_layers + 1)
    for size in sizes:
        check_int("sizes", size, 0, num_layers)
    return [layers for size in sizes for layers in combinations(range(num_layers), size)]


def oracle_record(study: Study, seed: int) -> Record:
    """Distil and measure every set of the sizes that `study`, of `OracleSettings`, names. Record kind ``"oracle"``.

    The record's ``sets`` has for each set: layers, kl (nats a token), kl_stderr, perplexity, top1_agreement,
    recall_exact, recall_stderr, curve, and, where it could not be trained, ``error`` with figures that are None. Sets
    are measured in pieces, each a record, so that a killed run goes on.
    """
    s, settings, task = study.settings, replace(study.match_settings, compile=False), study.recall_task
    parameters = oracle_parameters(study, seed)
    tokens, sets = s.oracle_tokens, [tuple(layers) for layers in parameters["sets"]]
    common = {name: value for name, value in parameters.items() if name != "sets"}

    def compute_piece(part):
        whole = study.tokens(seed, tokens)
        rows = Tokens(whole.train, whole.heldout[:s.oracle_heldout_tokens // s.context], whole.tokenizer, whole.source,
                      whole.seed)
        results = match_sets(study.aligned(s.mixer, seed), study.teacher.model, rows, part, tokens, settings=settings,
                             recall=task, recall_examples=s.recall_examples, measure_at=s.measure_at)
        return {"sets": [_without_losses(row) for row in results], "tokens": sum(row["tokens"] for row in results)}

    def compute():
        records = [] if s.recompute else [record for kind in ("oracle", "oracle_piece")
                                          for record in study.ledger.find(kind, **common)]
        measured = {tuple(row["layers"]): row for record in records for row in record.metrics["sets"]}
        missing = [layers for layers in sets if layers not in measured]
        for part in (missing[begin:begin + s.piece] for begin in range(0, len(missing), s.piece)):
            record = study.record("oracle_piece", common | {"sets": [list(p) for p in part]},
                                  partial(compute_piece, part))
            measured |= {tuple(row["layers"]): row for row in record.metrics["sets"]}
        return {"sets": [measured[layers] for layers in sets], "tokens": tokens * len(sets)}

    return study.record("oracle", parameters, compute)


def oracle_parameters(study: Study, seed: int) -> dict:
    """The parameters of `oracle_record`."""
    check_int("seed", seed, 0)
    s = study.settings
    return {"aligned": study.aligned_parameters(s.mixer, seed), "mixer": s.mixer, "seed": seed,
            "num_tokens": s.oracle_tokens, "measure_at": list(s.measure_at), "settings": study.match_settings.numbers(),
            "heldout_tokens": s.heldout_tokens, "measured_tokens": s.oracle_heldout_tokens,
            "recall": asdict(study.recall_task), "recall_examples": s.recall_examples,
            "sets": [list(layers) for layers in sets_of_sizes(study.num_layers, s.sizes)]}


def oracle_table(records: Sequence[Record]) -> pd.DataFrame:
    """A row a set and seed: ``seed``, ``size``, ``layers``, the figures; none for a set that could not be trained.

    Among its size and seed, each metric has a ``{metric}_regret`` (0 for the best, in units of the metric) and a
    ``{metric}_rank`` (1 is best, equals share it).
    """
    table = pd.DataFrame([{"seed": record.seed, "size": len(row["layers"]), "layers": tuple(row["layers"]),
                           **{name: row[name] for name in _FIGURES}}
                          for record in records for row in record.metrics["sets"] if "error" not in row])
    table = table.astype(dict.fromkeys(METRICS, float))
    for metric in METRICS:
        lower = table[metric] if metric == "kl" else -table[metric]
        rivals = lower.groupby([table["seed"], table["size"]])
        table[f"{metric}_regret"] = lower - rivals.transform("min")
        table[f"{metric}_rank"] = rivals.rank(method="min")
    return table.assign(sets=table.groupby(["seed", "size"])["kl"].transform("count"))


def values(record: Record, metric: str = "kl", tokens: int | None = None) -> dict[tuple[int, ...], float]:
    """{layers: value}, lower for better: the KL, or the share of recall missed, after `tokens` or at the end."""
    check_choice("metric", metric, METRICS)
    by_set = {}
    for row in record.metrics["sets"]:
        point = row if tokens is None else next((p for p in row["curve"] if p["tokens"] == tokens), {})
        if point.get(metric) is not None and np.isfinite(point[metric]):
            by_set[tuple(row["layers"])] = point[metric] if metric == "kl" else 1 - point[metric]
    return by_set


def settling(records: Sequence[Record], metric: str = "kl") -> pd.DataFrame:
    """Whether the ranking of sets has settled: a row a seed, size and point of the curve before the end.

    Columns: ``tokens``; ``spearman_next`` and ``spearman_end``, of the values there and at the next point or the end;
    ``early_regret``, at the end, of the set that is best here; and of the values at the end, how many share the best,
    ``tied``, and how many are ``distinct``. Sizes of fewer than three sets are left out.
    """
    rows = []
    for record in records:
        end = max(row["tokens"] for row in record.metrics["sets"])
        points = sorted({p["tokens"] for row in record.metrics["sets"] for p in row["curve"] if p["tokens"] < end})
        tables = [*(values(record, metric, point) for point in points), values(record, metric)]
        complete = [layers for layers in tables[-1] if all(layers in table for table in tables)]
        for sets in _by_size(complete):
            ranked = [[table[layers] for layers in sets] for table in tables]
            for i, point in enumerate(points):
                early = sets[int(np.argmin(ranked[i]))]
                rows.append({"seed": record.seed, "size": len(sets[0]), "sets": len(sets), "tokens": point,
                             "spearman_next": spearman(ranked[i], ranked[i + 1]),
                             "spearman_end": spearman(ranked[i], ranked[-1]),
                             "early_regret": tables[-1][early] - min(ranked[-1]),
                             "tied": ranked[-1].count(min(ranked[-1])), "distinct": len(set(ranked[-1]))})
    return pd.DataFrame(rows, columns=["seed", "size", "sets", "tokens", "spearman_next", "spearman_end",
                                       "early_regret", "tied", "distinct"])


def choices(study: Study, selectors: Iterable[str], record: Record) -> Record:
    """The set that each selector keeps at every size that `record` has in full. Record kind ``"choices"``.

    Searches that ask for a set not measured, and selectors whose task is beyond the teacher, are left out.
    """
    p, s, table, num_layers = record.parameters, study.settings, values(record), study.num_layers
    selectors, counts = list(selectors), Counter(map(len, table))
    sizes = [size for size in range(1, num_layers) if counts[size] == comb(num_layers, size)]
    parameters = {"oracle": record.key, "aligned": p["aligned"], "mixer": p["mixer"], "seed": p["seed"],
                  "selectors": selectors, "sizes": sizes, "score_tokens": s.score_tokens,
                  "heldout_tokens": s.heldout_tokens, "settings": study.match_settings.numbers()}

    def choose(selector, size):
        if selector in SEARCHES:
            result = SEARCHES[selector](table.__getitem__, num_layers, size)
            return {"layers": list(result.layers), "evaluations": result.evaluations}
        at_size = copy.copy(study)  # shares teacher, tokens and records
        at_size.settings = replace(s, budget=size)
        return {"layers": list(at_size.select(selector, p["mixer"], p["seed"]))}

    def compute():
        rows = []
        for size in sizes:
            for selector in selectors:
                with suppress(TaskTooHard, *([KeyError] if selector in SEARCHES else [])):
                    rows.append({"selector": selector, "size": size, **choose(selector, size)})
        return {"choices": rows}

    return study.record("choices", parameters, compute)


def judge(table: pd.DataFrame, chosen: Iterable[Record | Mapping]) -> pd.DataFrame:
    """Every chosen set against all sets of its size: a row a selector, seed and size, with the columns of `table`.

    `chosen` has records of `choices`, or mappings with ``seed`` and ``choices``, {selector, layers} each. Rows of
    `OTHER_SEEDS` show what noise between seeds costs. Raises ValueError for a set that was not measured.
    """
    rows, seeds = [], table["seed"].nunique()
    for choice in chosen:
        seed, metrics = (choice.seed, choice.metrics) if isinstance(choice, Record) else (choice["seed"], choice)
        rows += [{"selector": c["selector"], "seed": seed, "layers": tuple(sorted(c["layers"]))}
                 for c in metrics["choices"] if (table["seed"] == seed).any()]
    judged = pd.DataFrame(rows, columns=["selector", "seed", "layers"]).merge(table, "left", ["seed", "layers"])
    if judged["kl"].isna().any():
        layers, seed = judged.loc[judged["kl"].isna(), ["layers", "seed"]].iloc[0]
        raise ValueError(f"layers={layers} were not measured with seed {seed}; give sets of the table")
    if seeds == 1:
        return judged
    by_set = table.groupby("layers")["kl"]
    others = (by_set.transform("sum") - table["kl"])[by_set.transform("count") == seeds]
    best = table.loc[others.groupby([table["seed"], table["size"]]).idxmin()]
    best = best[best["size"].isin(judged["size"])].assign(selector=OTHER_SEEDS)
    return pd.concat([judged, best], ignore_index=True)


def interaction_maps(records: Sequence[Record], metric: str = "kl") -> np.ndarray:
    """`search.interactions` of every record, (records, layers, layers); records need sizes 0, 1 and 2."""
    num_layers = max(_depth(values(record, metric)) for record in records)
    return np.stack([interactions(values(record, metric), num_layers) for record in records])


def additivity(records: Sequence[Record], metric: str = "kl") -> pd.DataFrame:
    """How far layers add up: a row a seed and size from 2 on.

    Predicted is v(none) less the gain of each layer alone, v(none) - v(l). Columns: ``error``, the mean of measured
    less predicted; ``rmse`` and ``spearman`` of the two; ``r2``, the share of the variance that the best fit of one
    number a layer explains; and ``pick_regret`` of the set that is predicted best.
    """
    rows, columns = [], ["seed", "size", "sets", "error", "rmse", "spearman", "r2", "pick_regret"]
    for record in records:
        v = values(record, metric)
        num_layers = _depth(v)
        if not {(), *((layer,) for layer in range(num_layers))} <= v.keys():
            continue
        gain = np.array([v[()] - v[layer,] for layer in range(num_layers)])
        for sets in _by_size(layers for layers in v if 2 <= len(layers) < num_layers):
            member = np.array([np.isin(range(num_layers), layers) for layers in sets], dtype=float)
            measured, predicted = np.array([v[layers] for layers in sets]), v[()] - member @ gain
            residual = measured - member @ np.linalg.lstsq(member, measured, rcond=None)[0]
            enough, error = len(sets) > num_layers and measured.var() > 0, measured - predicted
            r2 = 1 - float((residual ** 2).mean() / measured.var()) if enough else float("nan")
            rows.append((record.seed, len(sets[0]), len(sets), float(error.mean()), float(np.sqrt((error ** 2).mean())),
                         spearman(predicted, measured), r2, regret(sets[int(np.argmin(predicted))], v)))
    return pd.DataFrame(rows, columns=columns)


def recorded_oracle(ledger: Ledger, mixer: str | None = None) -> tuple[list[Record], list[Record | dict]]:
    """The oracle with most sets measured, a record a seed, and the choices that `judge` takes; empty if none."""
    ledger_records = list(ledger)
    settings: dict[str, dict[int, Record]] = {}
    for record in (r for r in ledger_records if r.kind == "oracle" and mixer in (None, r.parameters["mixer"])):
        common = {k: v for k, v in record.parameters.items() if k not in ("seed", "aligned")}
        key = json.dumps(common | {"aligned": _alignment(record)}, sort_keys=True)
        settings.setdefault(key, {})[record.seed] = record
    if not settings:
        return [], []
    fullest = max(settings.values(), key=lambda group: (sum(len(r.metrics["sets"]) for r in group.values()),
                                                        max(r.started for r in group.values())))
    records = [fullest[seed] for seed in sorted(fullest)]
    by_oracle = {r.parameters["oracle"]: r for r in sorted(
        (r for r in ledger_records if r.kind == "choices"), key=lambda r: (len(r.metrics["choices"]), r.started))}
    chosen = [by_oracle[r.key] for r in records if r.key in by_oracle]
    present = {(r.seed, c["selector"], len(c["layers"])) for r in chosen for c in r.metrics["choices"]}
    for row in (row for r in ledger_records if r.kind == "contest" and _alignment(r) == _alignment(records[0])
                for row in r.metrics["rows"]):
        key = row["seed"], row["name"], len(row["layers"])
        if row["seed"] in fullest and row["name"] in SELECTORS and key not in present:
            present.add(key)
            chosen.append({"seed": row["seed"], "choices": [{"selector": row["name"], "layers": row["layers"]}]})
    return records, chosen


def _alignment(record):
    return {k: v for k, v in record.parameters["aligned"].items() if k not in ("seed", "data")}


def _by_size(sets):
    """Lists of the sets of one size, smaller sizes first; sizes of fewer than three sets rank nothing."""
    groups = defaultdict(list)
    for layers in sets:
        groups[len(layers)].append(layers)
    return [groups[size] for size in sorted(groups) if len(groups[size]) >= 3]


def _depth(v):
    return 1 + max((layers[-1] for layers in v if layers), default=0)


def _without_losses(row):
    figures = {name: row[name] for name in (*_FIGURES, "tokens", "seconds", "error") if name in row}
    return {"layers": list(row["layers"]), **figures, "curve": [dict(point) for point in row["curve"]]}
