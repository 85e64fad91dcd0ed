"""Tables that every notebook shows: what was run, and the mean of each value over runs with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from hybridlib.records.ledger import Record
from hybridlib.records.provenance import code_commit, describe_device
from hybridlib.report.style import format_interval, label_of
from hybridlib.selection.agreement import RANGES, contiguity, interval
from hybridlib.selection.rules import budget_layers
from hybridlib.study.contest import Contest
from hybridlib.study.study import Study

__all__ = ["as_table", "attention_rate", "neighbour_counts", "settings_table"]

_SETTINGS = {"teacher": "teacher", "mixer": "mixer of the linear layers", "softmax_layers": "softmax layers",
             "align_tokens": "tokens of stage 1", "score_tokens": "tokens of stage 2 for a candidate",
             "match_tokens": "tokens of stage 2", "align_learning_rate": "rate of stage 1",
             "match_learning_rate": "rate of stage 2", "attention_learning_rate": "higher rate of stage 2",
             "grouping": "weights at the higher rate", "corpus": "text", "recall_pairs": "pairs in a recall prompt",
             "seeds": "seeds", "sets": "sets distilled", "failed": "sets that could not be trained", "device": "device",
             "commit": "commit"}


def settings_table(run: Study | Contest | pd.DataFrame | Sequence[Record] | None) -> pd.DataFrame:
    """List what was run, a line each, in a column, or one for each ``setting`` of a frame; empty where nothing was.
    `run` is a study, a contest, a frame of `verdicts.recorded_hybrids`, or the records of an oracle, one a seed."""
    if run is None or not isinstance(run, (Study, Contest)) and len(run) == 0:
        return pd.DataFrame()
    if isinstance(run, Study):
        s = run.settings
        values = vars(s) | {"teacher": run.teacher.name, "commit": code_commit(run.ledger.folder),
                            "softmax_layers": _count(budget_layers(s.budget, run.num_layers), run),
                            **attention_rate(vars(s.match_settings)), "device": describe_device(s.device)}
    elif isinstance(run, Contest):
        values = run.settings | {"teacher": run.settings["aligned"]["teacher"], "device": run.device,
                                 **attention_rate(run.settings), "commit": run.commit,
                                 "softmax_layers": _count(len(run.chosen["layers"].iloc[0]), run)}
    elif isinstance(run, pd.DataFrame):
        return pd.concat([_shown({key: _joined(part[key].dropna()) or None for key in _SETTINGS if key in part}
                                 | {"seeds": part["seed"].nunique()}, name)
                          for name, part in run.groupby("setting", sort=False)], axis=1)
    else:
        p, sets = run[0].parameters, [row for record in run for row in record.metrics["sets"]]
        trained = p.get("settings", {})
        values = {"teacher": p["aligned"]["teacher"], "mixer": p["mixer"], "match_tokens": p["num_tokens"],
                  "align_tokens": p["aligned"]["num_tokens"], "seeds": len(run), "sets": len(run[0].metrics["sets"]),
                  "align_learning_rate": p["aligned"].get("settings", {}).get("learning_rate"),
                  "match_learning_rate": trained.get("learning_rate"), **attention_rate(trained),
                  "failed": sum("error" in row for row in sets), "device": _joined(r.device for r in run),
                  "commit": _joined(r.commit for r in run)}
    return _shown(values, "value")


def as_table(frame: pd.DataFrame, by: str | Sequence[str], values: Sequence[str] | Mapping[str, str], *,
             digits: int = 3) -> pd.DataFrame:
    """Show as text, for each `by`, the number of runs and each value as ``mean [low, high]`` over them, 95% by
    Student's t, cut to what a metric can be; a dash is no value at all. `frame` has one row a run; `values` are
    columns, or column -> heading."""
    headings = values if isinstance(values, Mapping) else {name: label_of(name) for name in values}
    groups, table = frame.groupby(by, sort=False, dropna=False), {}
    for name, heading in headings.items():
        within = _range(name)
        table[heading] = groups[name].agg(lambda numbers, within=within: format_interval(
            *interval(numbers.dropna().astype(float), within=within), digits) if numbers.count() else "\u2013")
    return pd.DataFrame({"runs": groups.size(), **table})


def attention_rate(settings: Mapping) -> dict:
    """Return the higher rate of stage 2 in `settings` of a study or of stage 2, and the ``grouping`` of the weights
    that have it; before there was a choice these were the linear mixers, and the rate was called theirs."""
    rate = settings.get("attention_learning_rate", settings.get("mixer_learning_rate"))
    return {"attention_learning_rate": rate, "grouping": settings.get("grouping", "mixers")}


def neighbour_counts(frame: pd.DataFrame) -> pd.DataFrame:
    """Join to `frame` the `agreement.contiguity` of each row's ``layers`` among its ``num_layers``."""
    counts = [contiguity(layers, int(n)) for layers, n in zip(frame["layers"], frame["num_layers"])]
    return frame.join(pd.DataFrame(counts, frame.index, ["pairs", "expected", "probability"]))


def _range(column):
    if column.startswith("recall") and column.endswith("regret"):
        return None  # a set may recall more than the set that it is held against
    if column.endswith("regret") or column in ("rmse", "tied", "distinct"):
        return 0.0, np.inf
    ranges = RANGES | {"r2": (-np.inf, 1.0)}
    return next((within for name, within in ranges.items() if column.startswith(name)), None)


def _shown(values, column):
    shown = {heading: _text(values[name]) for name, heading in _SETTINGS.items() if values.get(name) is not None}
    return pd.DataFrame({column: shown}).rename_axis("setting")


def _count(count, run):
    return f"{count} of {run.num_layers}"


def _joined(values):
    return ", ".join(dict.fromkeys(map(_text, values)))


def _text(value):
    return f"{value:,}" if isinstance(value, (int, np.integer)) else str(value)
