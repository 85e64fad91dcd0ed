"""The parameters that notebooks share."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from hybridlib.checks import check_choice, check_device, check_int, check_number
from hybridlib.distill.settings import GROUPINGS, AlignSettings, MatchSettings
from hybridlib.models.mixers import MIXERS
from hybridlib.selection.rules import budget_layers

__all__ = ["NotebookSettings", "StudySettings", "notebook_settings"]


@dataclass(frozen=True)
class NotebookSettings:
    """The parameters of every notebook that trains; a notebook's `parameters` cell uses these names.

    Parameters
    ----------
    context, batch_tokens : tokens a row and a step.
    budget : share (float) or count (int) of softmax layers.
    results : folder of records; ``""`` is ``data/results/local`` of the checkout.
    recompute : run everything again, replacing its records.
    """

    teacher: str = "lab"
    mixer: str = "gdn"
    corpus: str = "lab"
    context: int = 256
    batch_tokens: int = 1_024
    budget: float | int = 0.25
    device: str = "auto"
    results: str = ""
    recompute: bool = False

    def __post_init__(self):
        for name in ("teacher", "corpus", "results"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r} is not text")
        check_choice("mixer", self.mixer, tuple(MIXERS))
        check_int("context", self.context, 2)
        check_int("batch_tokens", self.batch_tokens, self.context)
        budget_layers(self.budget, 10**6)  # its form; its range is checked with the teacher
        check_device(self.device)
        if not isinstance(self.recompute, bool):
            raise ValueError(f"recompute={self.recompute!r} is neither True nor False")


@dataclass(frozen=True)
class StudySettings(NotebookSettings):
    """The parameters of a study: those of `NotebookSettings`, and what it trains and measures.

    Parameters
    ----------
    align_tokens, match_tokens, score_tokens : tokens of stage 1, of stage 2, and of stage 2 for a layer's candidate.
    seeds : how many seeds; seed s = 0, 1, ... draws the mixers' gates and the order of the data.
    grouping : the weights at `attention_learning_rate`, see `MatchSettings`. With ``"mixers"``, stage 2 has a warm-up
        over a twentieth of its steps and no weight decay, as all records before there was a choice.
    corpus_tokens : training tokens of the corpus to draw rows from; 0 for as many as each run trains on.
    heldout_tokens, test_tokens : held-out tokens to score layers on, and others to measure hybrids on (0: as many).
    recall_pairs, recall_prompts : pairs of the key-value recall task that hybrids are scored on, and its prompts of one
        question.
    written : whether recall is also scored by what hybrids, and the teacher, write themselves.
    reading, reading_items : parquet files to read, or folders of them, and how many items of each; see `reading`.
    """

    align_tokens: int = 65_536
    score_tokens: int = 8_192
    match_tokens: int = 24_576
    seeds: int = 3
    heldout_tokens: int = 8_192
    align_learning_rate: float = 1e-2
    match_learning_rate: float = 3e-4
    attention_learning_rate: float = 1e-3
    recall_pairs: int = 16
    grouping: str = "attention"
    corpus_tokens: int = 0
    test_tokens: int = 0
    recall_prompts: int = 200
    written: bool = False
    reading: Sequence[str] = ()
    reading_items: int = 500

    def __post_init__(self):
        super().__post_init__()
        for name in ("align_tokens", "match_tokens", "heldout_tokens"):
            check_int(name, getattr(self, name), self.context)
        if self.score_tokens != 0:
            check_int("score_tokens", self.score_tokens, self.context)
        check_int("seeds", self.seeds, 1)
        check_number("align_learning_rate", self.align_learning_rate, 0, open_low=True)
        for name in ("match_learning_rate", "attention_learning_rate"):
            check_number(name, getattr(self, name), 0)
        check_int("recall_pairs", self.recall_pairs, 2)
        check_choice("grouping", self.grouping, GROUPINGS)
        for name in ("corpus_tokens", "test_tokens"):
            if getattr(self, name) != 0:
                check_int(name, getattr(self, name), self.context)
        check_int("recall_prompts", self.recall_prompts, 1)
        if not isinstance(self.written, bool):
            raise ValueError(f"written={self.written!r} is neither True nor False")
        if not isinstance(self.reading, (list, tuple)) or not all(isinstance(name, str) for name in self.reading):
            raise ValueError(f"reading={self.reading!r} is not a list of files or folders")
        check_int("reading_items", self.reading_items, 1)
        object.__setattr__(self, "reading", tuple(self.reading))

    @property
    def align_settings(self) -> AlignSettings:
        return AlignSettings(batch_tokens=self.batch_tokens, learning_rate=self.align_learning_rate, compile=True,
                             cuda_graph=True)

    @property
    def match_settings(self) -> MatchSettings:
        before = {"warmup": 0.05, "weight_decay": 0.0} if self.grouping == "mixers" else {}
        return MatchSettings(batch_tokens=self.batch_tokens, learning_rate=self.match_learning_rate,
                             attention_learning_rate=self.attention_learning_rate, grouping=self.grouping,
                             compile=True, cuda_graph=True, **before)

    @classmethod
    def from_record(cls, parameters: Mapping) -> StudySettings:
        """The settings among a record's `parameters`; of a record from before there was a choice of grouping, its.

        A record says what was read, but not where that lies, so that `reading` is empty.
        """
        own = {f.name: parameters[f.name] for f in fields(StudySettings) if f.name in {*parameters} - {"reading"}}
        if "mixer_learning_rate" in parameters:
            own |= {"grouping": "mixers", "attention_learning_rate": parameters["mixer_learning_rate"]}
        return StudySettings(**own)


def notebook_settings(namespace: Mapping, form: type = StudySettings):
    """Settings from a notebook's variables, called as ``notebook_settings(globals())`` right after its parameters.

    `form` is the dataclass of settings; parameters of `StudySettings` that it lacks are passed over. Raises ValueError
    for a value out of range and for any other plain variable (number, text, list, truth value).
    """
    names = {f.name for f in fields(form)}
    plain = {name: value for name, value in namespace.items()
             if not name.startswith("_") and name not in ("In", "Out", "quit", "exit")
             and isinstance(value, (bool, int, float, str, list, tuple, dict, type(None)))}
    unknown = [name for name in plain if name not in names | {f.name for f in fields(StudySettings)}]
    if unknown:
        close = difflib.get_close_matches(unknown[0], names, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose among {', '.join(sorted(names))}"
        raise ValueError(f"{unknown[0]}={plain[unknown[0]]!r} is no parameter of this notebook; {hint}")
    return form(**{name: value for name, value in plain.items() if name in names})
