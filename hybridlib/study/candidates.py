"""A study's candidates as records: where each lies, and the figures of one that was measured on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hybridlib.selection.cost import Cost

__all__ = ["StudyRecords", "with_curve"]


class StudyRecords:
    """The candidates of one scoring as records of kind ``"candidate"``, the `CandidateRecords` of an `Engine`."""

    def __init__(self, study, parameters: Mapping):
        self.study, self.parameters = study, parameters

    def path(self, candidate, tokens, heldout_tokens=None) -> Path:
        """The place of a record, which need not exist."""
        return self.study.ledger.path("candidate", self._of(candidate, tokens, heldout_tokens))

    def find(self, candidate, tokens, heldout_tokens=None):
        parameters = self._of(candidate, tokens, heldout_tokens)
        path = self.path(candidate, tokens, heldout_tokens)
        if not path.exists() or self.study.settings.recompute and str(path) not in self.study._done:
            return None
        return self.study.ledger.run("candidate", parameters, dict).metrics

    def keep(self, candidate, tokens, figures, heldout_tokens=None):
        parameters = self._of(candidate, tokens, heldout_tokens)
        self.study._done.add(str(self.study.ledger.path("candidate", parameters)))
        metrics = {name: value for name, value in figures.items() if name != "device"}
        self.study.ledger.add("candidate", parameters, metrics, seconds=figures["seconds"], device=figures["device"])

    def _of(self, layer, tokens, heldout_tokens):
        until = {} if tokens == self.parameters["num_tokens"] else {"until": tokens}
        part = {} if heldout_tokens is None else {"measured_tokens": heldout_tokens}
        return self.parameters | {"layer": layer} | until | part


def with_curve(end: Mapping, curve: Sequence[Mapping]) -> dict:
    """The figures of `measure_along` as one record: those at the end, whose ``curve`` gets those on the way, with the
    time and the cost of all."""
    if not curve:
        return dict(end)
    total = {"seconds": sum(figures["seconds"] for figures in (*curve, end)),
             "cost": Cost.total(Cost.from_dict(figures["cost"]) for figures in (*curve, end)).to_dict()}
    shown = ("tokens", "kl", "kl_stderr", "kl_rows", "perplexity", "top1_agreement", "recall_exact", "recall_stderr",
             "recall_hits")
    new = [{name: figures[name] for name in shown if name in figures} for figures in curve]
    return {**end, **total, "curve": sorted([*end.get("curve", ()), *new], key=lambda point: point["tokens"])}
