"""The speed study: what the notebook of speeds measures, and its records."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch

from hybridlib.bench.decoding import time_decoding
from hybridlib.bench.exactness import CASES, EXACT, cases_for, measure_exactness
from hybridlib.bench.objective import IMPLEMENTATIONS, time_objective
from hybridlib.bench.operators import BACKENDS, DIRECTIONS, MODEL_BACKENDS, OPERATORS, time_operator
from hybridlib.bench.step import LOOPS, STAGES, StepSettings, time_step
from hybridlib.bench.timing import DTYPES, Bench, time_copy
from hybridlib.checks import check_choice, check_device, check_int, check_number
from hybridlib.distill.corpus import load_tokens
from hybridlib.models.teachers import Teacher, load_teacher
from hybridlib.records.folders import results_folder
from hybridlib.records.ledger import Ledger
from hybridlib.selection.rules import budget_layers

__all__ = ["KINDS", "SpeedSettings", "SpeedStudy", "recorded_speed"]

#: a table of `recorded_speed` -> the kind of its records
KINDS = {"operators": "operator_speed", "exactness": "operator_exactness", "objectives": "objective_speed",
         "steps": "step_speed", "decoding": "decoding_speed"}
_NAMES = {"operators": OPERATORS[:2], "backends": BACKENDS, "stages": STAGES, "exactness_cases": CASES,
          "exactness_dtypes": DTYPES[1:], "objectives": IMPLEMENTATIONS}
_SHAPES = {"shapes": "batch, time, heads, dim", "objective_shapes": "tokens, width, vocab"}
_EFFORT = ("repeats", "max_seconds", "steps", "new_tokens", "data", "revision", "cases", "align_tokens")


@dataclass(frozen=True)
class SpeedSettings(StepSettings):
    """The parameters of the notebook ``mixers_and_speed``: those of `StepSettings`, and these.

    `operators`, `backends` and `shapes` are as `time_operator` takes them, ``"softmax"`` among the backends being
    softmax attention; `dtype`, `repeats` and `max_seconds` are those of `Bench`. `exactness_cases` are names in
    `exactness.CASES`, `objectives` implementations of the forward KL, `objective_shapes` (tokens, width, vocab);
    `contexts`, `shares`, `decode_batch` and `new_tokens` are for `time_decoding`. An empty list of shapes,
    exactness_cases, objective_shapes, stages or contexts leaves that part out.
    """

    operators: list[str] = OPERATORS[:2]
    backends: list[str] = (*MODEL_BACKENDS, "softmax")
    shapes: list[list[int]] = ((4, 256, 4, 32), (2, 512, 4, 32), (1, 1024, 4, 32))
    dtype: str = "auto"
    repeats: int = 20
    max_seconds: float = 0.1
    exactness_cases: list[str] = ("near none", "strong", "mixed", "strong then mild", "beta 0", "beta 1", "length 1",
                                  "length 63", "length 65", "length 4097", "repeated keys at beta 1", "dims 32",
                                  "packed", "random 1")
    exactness_dtypes: list[str] = ("float32", "bfloat16")
    objectives: list[str] = tuple(IMPLEMENTATIONS)
    objective_shapes: list[list[int]] = ((256, 64, 4096), (1024, 64, 4096))
    contexts: list[int] = (128, 256, 512, 1024)
    shares: list[float] = (1.0, 0.5, 0.25, 0.125)
    decode_batch: int = 1
    new_tokens: int = 16

    def __post_init__(self):
        super().__post_init__()
        for name in (*_NAMES, *_SHAPES, "contexts", "shares"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise ValueError(f"{name}={getattr(self, name)!r} is not a list")
        for name, allowed in _NAMES.items():
            for value in getattr(self, name):
                check_choice(name, value, allowed)
        for name, sizes in _SHAPES.items():
            for shape in getattr(self, name):
                _check_shape(shape, sizes)
        for context in self.contexts:
            check_int("contexts", context, 1)
        for share in self.shares:
            check_number("shares", share, 0, 1)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("plain_backend", self.plain_backend, MODEL_BACKENDS)
        for name, low in (("repeats", 1), ("steps", 1), ("decode_batch", 1), ("new_tokens", 2)):
            check_int(name, getattr(self, name), low)
        check_number("max_seconds", self.max_seconds, 0, open_low=True)
        if self.step_align_tokens != 0:
            check_int("step_align_tokens", self.step_align_tokens, self.context)


def _check_shape(shape, sizes):
    count = len(sizes.split(", "))
    if (not isinstance(shape, (list, tuple)) or len(shape) != count
            or not all(type(n) is int and n > 0 for n in shape)):
        raise ValueError(f"shape={shape!r} is not ({sizes}), {count} whole numbers of at least 1")


class SpeedStudy:
    """Take the measurements of one `SpeedSettings`, each a record in `bench.ledger` and a row of a table. Raises
    ValueError for settings that the teacher cannot take."""

    def __init__(self, settings: SpeedSettings | None = None):
        self.settings = s = settings or SpeedSettings()
        device = check_device(s.device)
        folder = Path(s.results).expanduser() if s.results else results_folder()
        self.bench = Bench(Ledger(folder, device=str(device)), device, s.dtype, s.repeats, s.max_seconds, s.recompute)
        if s.stages:
            config = self.teacher.model.config
            budget_layers(s.budget, config.num_hidden_layers)
            if s.context > config.max_position_embeddings:
                raise ValueError(f"context={s.context} is beyond teacher {self.teacher.name}'s "
                                 f"{config.max_position_embeddings} tokens")

    @cached_property
    def teacher(self) -> Teacher:
        return load_teacher(self.settings.teacher, device=self.bench.device)

    def copy(self) -> dict:
        """Measure the bandwidth of a copy: see `time_copy`."""
        return time_copy(self.bench)

    def operators(self) -> pd.DataFrame:
        """Time every operator, backend, shape and direction: see `time_operator`; softmax attention once."""
        s = self.settings
        pairs = [(operator, backend) for backend in s.backends for operator in s.operators if backend != "softmax"]
        pairs += [(OPERATORS[2], "softmax")] if "softmax" in s.backends else []
        if s.shapes:
            self.copy()
        # backends one right after the other: a machine is not as fast at all times
        rows = [time_operator(self.bench, operator, backend, shape, direction)
                for shape, direction, (operator, backend) in itertools.product(s.shapes, DIRECTIONS, sorted(pairs))]
        return pd.DataFrame(sorted(rows, key=lambda row: pairs.index((row["operator"], row["backend"]))))

    def exactness(self) -> pd.DataFrame:
        """Measure every operator, backend and dtype over the cases that it takes: see `measure_exactness`."""
        s, rows = self.settings, []
        for operator, dtype in itertools.product(s.operators, s.exactness_dtypes):
            bench, truths = replace(self.bench, dtype=dtype), {}
            rows += [measure_exactness(bench, operator, backend, s.exactness_cases, truths) for backend in s.backends
                     if backend in EXACT and cases_for(operator, backend, dtype, s.exactness_cases)]
        return pd.DataFrame(rows)

    def objectives(self) -> pd.DataFrame:
        """Time every shape, implementation and direction: see `time_objective`."""
        s, truths = self.settings, {}
        return pd.DataFrame([time_objective(self.bench, name, shape, direction, truths)
                             for shape in s.objective_shapes for name in s.objectives for direction in DIRECTIONS])

    def steps(self) -> pd.DataFrame:
        """Time both loops for every stage, one after the other: see `time_step`."""
        s, aligned = self.settings, {}
        if not s.stages:
            return pd.DataFrame()
        needed = max((s.steps + 2) * s.batch_tokens, s.step_align_tokens)
        tokens = load_tokens(s.corpus, self.teacher.tokenizer, s.context, max_tokens=needed, heldout_tokens=s.context)
        return pd.DataFrame([time_step(self.bench, self.teacher, tokens, stage, loop, s, aligned)
                             for stage in s.stages for loop in LOOPS])

    def decoding(self) -> pd.DataFrame:
        """Time every share and context: see `time_decoding`."""
        s, bench = self.settings, self.bench
        if not s.contexts:
            return pd.DataFrame()
        teacher = (self.teacher if bench.dtype == "float32" else
                   load_teacher(s.teacher, device=bench.device, dtype=getattr(torch, bench.dtype)))
        return pd.DataFrame([time_decoding(bench, teacher, share=share, context=context, mixer=s.mixer,
                                           batch=s.decode_batch, new_tokens=s.new_tokens)
                             for share in s.shares for context in s.contexts])


def recorded_speed(ledger: Ledger) -> dict[str, pd.DataFrame]:
    """Read the tables of `SpeedStudy` from a ledger by the names in `KINDS`, of one question the latest record, with
    its ``commit``. Memory floors are by the ledger's latest copy on the same device."""
    copies = {r.parameters["device"]: r.metrics for r in ledger.find("copy_speed") if r.metrics["reason"] is None}
    tables = {}
    for name, kind in KINDS.items():
        latest = {}
        for r in ledger.find(kind):
            question = sorted(item for item in r.parameters.items() if item[0] not in _EFFORT)
            row = r.parameters | r.metrics | {"commit": r.commit}
            if "floor_seconds" in row and row["device"] in copies:
                row["floor_seconds"] = row["floor_bytes"] / copies[row["device"]]["bytes_per_second"]
            latest[repr(question)] = row
        tables[name] = pd.DataFrame(list(latest.values()))
    return tables
