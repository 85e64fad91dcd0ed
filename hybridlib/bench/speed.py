"""The speed study: what the notebook of speeds measures, and its records. `speed_report` says what they show.

Each part can be left out, by an empty list among the settings, and each number is a record as soon as it is measured:
see `hybridlib.bench.operators`.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch

from hybridlib.bench.decoding import time_decoding
from hybridlib.bench.exactness import CASES, EXACT, cases_for, measure_exactness
from hybridlib.bench.kernel_times import measure_kernels
from hybridlib.bench.objective import IMPLEMENTATIONS, check_objective_shape, time_objective
from hybridlib.bench.operators import BACKENDS, DIRECTIONS, DTYPES, OPERATORS, check_shape, dtype_name, time_operator
from hybridlib.bench.step import LOOPS, STAGES, check_align_tokens, time_step
from hybridlib.bench.timing import time_copy
from hybridlib.checks import check_choice, check_device, check_int, check_number
from hybridlib.distill.corpus import load_tokens
from hybridlib.models.mixers import MIXERS
from hybridlib.models.teachers import Teacher, load_teacher
from hybridlib.records.folders import results_folder
from hybridlib.records.ledger import Ledger
from hybridlib.selection.rules import budget_layers
from hybridlib.study.settings import StudySettings

__all__ = ["KINDS", "SpeedSettings", "SpeedStudy", "recorded_speed", "speed_settings"]

KINDS = {"operators": "operator_speed", "exactness": "operator_exactness", "objectives": "objective_speed",
         "steps": "step_speed", "decoding": "decoding_speed", "kernels": "kernel_speed", "scaling": "kernel_scaling",
         "counters": "kernel_counters", "mixers": "mixer_speed"}
_LISTS = {"operators": OPERATORS[:2], "backends": BACKENDS, "stages": STAGES, "exactness_cases": CASES,
          "exactness_dtypes": DTYPES[1:], "objectives": IMPLEMENTATIONS, "shapes": None, "objective_shapes": None,
          "contexts": None, "shares": None, "kernel_shapes": None}


@dataclass(frozen=True)
class SpeedSettings:
    """The parameters of the notebook ``mixers_and_speed``.

    Parameters
    ----------
    teacher, mixer, corpus, device, results, recompute : as in `StudySettings`.
    operators, backends, shapes : as `time_operator` takes them; ``"softmax"`` among the backends is softmax attention.
    dtype : of operators, objectives and decoding; ``"auto"`` is bfloat16 on a GPU and float32 on a CPU.
    repeats : samples of a timing; max_seconds : its samples end sooner once they have taken this long.
    exactness_cases, exactness_dtypes : names among `exactness.CASES`, for all operators and backends.
    objectives, objective_shapes : implementations of the forward KL, and their (tokens, width, vocab).
    stages : of the training step; context, batch_tokens, steps : tokens a row and a step, and steps timed.
    step_align_tokens : of stage 1 before stage 2 is timed, 0 for none; plain_backend : of mixers in the plain loop.
    budget : softmax layers of the hybrid in stage 2, share or count.
    contexts : prompts' lengths for decoding; shares : of softmax layers, 1 the teacher, 0 all linear.
    decode_batch : prompts at once; new_tokens : generated for each.
    kernel_shapes : shapes whose calls are taken apart: the fused operators kernel by kernel, on a GPU, and the mixers
        part by part.

    An empty list of shapes, exactness_cases, objective_shapes, stages, contexts or kernel_shapes leaves that part out.
    """

    teacher: str = "lab"
    mixer: str = "gdn"
    corpus: str = "lab"
    operators: list[str] = OPERATORS[:2]
    backends: list[str] = ("reference", "chunked", "fused", "fla", "softmax")
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
    stages: list[str] = STAGES
    context: int = 256
    batch_tokens: int = 1_024
    steps: int = 4
    step_align_tokens: int = 16_384
    budget: float | int = 0.25
    plain_backend: str = "chunked"
    contexts: list[int] = (128, 256, 512, 1024)
    shares: list[float] = (1.0, 0.5, 0.25, 0.125)
    decode_batch: int = 1
    new_tokens: int = 16
    kernel_shapes: list[list[int]] = ()
    device: str = "auto"
    results: str = ""
    recompute: bool = False

    def __post_init__(self):
        for name in ("teacher", "corpus", "results"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r} is not text")
        for name, allowed in _LISTS.items():
            if not isinstance(getattr(self, name), (list, tuple)):
                raise ValueError(f"{name}={getattr(self, name)!r} is not a list")
            for value in getattr(self, name) if allowed else ():
                check_choice(name, value, allowed)
        for shape in (*self.shapes, *self.kernel_shapes):
            check_shape(shape)
        for shape in self.objective_shapes:
            check_objective_shape(shape)
        for context in self.contexts:
            check_int("contexts", context, 1)
        for share in self.shares:
            check_number("shares", share, 0, 1)
        check_choice("mixer", self.mixer, tuple(MIXERS))
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("plain_backend", self.plain_backend, BACKENDS[:4])
        for name, low in (("repeats", 1), ("context", 2), ("steps", 1), ("decode_batch", 1), ("new_tokens", 2)):
            check_int(name, getattr(self, name), low)
        check_number("max_seconds", self.max_seconds, 0, open_low=True)
        check_int("batch_tokens", self.batch_tokens, self.context)
        check_align_tokens("step_align_tokens", self.step_align_tokens, self.context)
        budget_layers(self.budget, 10**6)
        check_device(self.device)
        if not isinstance(self.recompute, bool):
            raise ValueError(f"recompute={self.recompute!r} is neither True nor False")


def speed_settings(namespace: Mapping) -> SpeedSettings:
    """Settings from a notebook's variables, as `notebook_settings` takes them.

    A parameter that only the other notebooks have is passed over, so that one set of parameters can serve them all.
    Raises ValueError for a name that no notebook has, and for a value out of range.
    """
    known, others = ({f.name for f in fields(kind)} for kind in (SpeedSettings, StudySettings))
    plain = {name: value for name, value in namespace.items()
             if not name.startswith("_") and name not in ("In", "Out", "quit", "exit")
             and isinstance(value, (bool, int, float, str, list, tuple, dict, type(None)))}
    for name in plain:
        if name not in known | others:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose among {', '.join(sorted(known))}"
            raise ValueError(f"{name}={plain[name]!r} is no parameter of this notebook; {hint}")
    return SpeedSettings(**{name: value for name, value in plain.items() if name in known})


class SpeedStudy:
    """The measurements under one `SpeedSettings`, each a record in `ledger`; tables have one row a record.

    Raises ValueError for settings that the teacher cannot take.
    """

    def __init__(self, settings: SpeedSettings | None = None):
        self.settings = settings or SpeedSettings()
        self.device = check_device(self.settings.device)
        folder = Path(self.settings.results).expanduser() if self.settings.results else results_folder()
        self.ledger = Ledger(folder, device=str(self.device))
        if self.settings.stages:
            config = self.teacher.model.config
            budget_layers(self.settings.budget, config.num_hidden_layers)
            if self.settings.context > config.max_position_embeddings:
                raise ValueError(f"context={self.settings.context} is beyond teacher {self.teacher.name}'s "
                                 f"{config.max_position_embeddings} tokens")

    @cached_property
    def teacher(self) -> Teacher:
        return load_teacher(self.settings.teacher, device=self.device)

    def copy(self) -> dict:
        """Bandwidth of a copy: see `time_copy`."""
        return time_copy(self.ledger, device=self.device, recompute=self.settings.recompute)

    def operators(self) -> pd.DataFrame:
        """Every operator, backend, shape and direction: see `time_operator`. Softmax attention is measured once.

        Backends are timed one right after the other: a machine is not as fast at all times.
        """
        s = self.settings
        pairs = [(operator, backend) for backend in s.backends for operator in s.operators if backend != "softmax"]
        pairs += [(OPERATORS[2], "softmax")] if "softmax" in s.backends else []
        if s.shapes:
            self.copy()
        rows = [time_operator(self.ledger, operator, backend, shape, dtype=s.dtype, device=self.device,
                              direction=direction, repeats=s.repeats, max_seconds=s.max_seconds, recompute=s.recompute)
                for shape, direction, (operator, backend) in itertools.product(s.shapes, DIRECTIONS, sorted(pairs))]
        order = {pair: i for i, pair in enumerate(pairs)}
        return pd.DataFrame(sorted(rows, key=lambda row: order[row["operator"], row["backend"]]))

    def exactness(self) -> pd.DataFrame:
        """Every operator, backend and dtype over the cases that it takes: see `measure_exactness`."""
        s, rows = self.settings, []
        for operator, dtype in itertools.product(s.operators, s.exactness_dtypes):
            truths = {}
            rows += [measure_exactness(self.ledger, operator, backend, s.exactness_cases, dtype=dtype, truths=truths,
                                       device=self.device, recompute=s.recompute)
                     for backend in s.backends
                     if backend in EXACT and cases_for(operator, backend, dtype, s.exactness_cases)]
        return pd.DataFrame(rows)

    def objectives(self) -> pd.DataFrame:
        """Every shape, implementation and direction: see `time_objective`."""
        s, truths = self.settings, {}
        return pd.DataFrame([time_objective(self.ledger, name, shape, dtype=s.dtype, direction=direction,
                                            device=self.device, repeats=s.repeats, max_seconds=s.max_seconds,
                                            recompute=s.recompute, truths=truths)
                             for shape in s.objective_shapes for name in s.objectives for direction in DIRECTIONS])

    def steps(self) -> pd.DataFrame:
        """Both loops for every stage, one after the other: see `time_step`."""
        s, aligned = self.settings, {}
        if not s.stages:
            return pd.DataFrame()
        needed = max((s.steps + 2) * s.batch_tokens, s.step_align_tokens)
        tokens = load_tokens(s.corpus, self.teacher.tokenizer, s.context, max_tokens=needed, heldout_tokens=s.context)
        return pd.DataFrame([time_step(self.ledger, self.teacher, tokens, stage=stage, loop=loop, mixer=s.mixer,
                                       budget=s.budget, batch_tokens=s.batch_tokens, steps=s.steps,
                                       plain_backend=s.plain_backend, align_tokens=s.step_align_tokens,
                                       aligned=aligned, recompute=s.recompute)
                             for stage in s.stages for loop in LOOPS])

    def decoding(self) -> pd.DataFrame:
        """Every share and context: see `time_decoding`."""
        s = self.settings
        if not s.contexts:
            return pd.DataFrame()
        dtype = getattr(torch, dtype_name(s.dtype, self.device))
        teacher = self.teacher if dtype == torch.float32 else load_teacher(s.teacher, device=self.device, dtype=dtype)
        return pd.DataFrame([time_decoding(self.ledger, teacher, share=share, context=context, mixer=s.mixer,
                                           batch=s.decode_batch, new_tokens=s.new_tokens, recompute=s.recompute)
                             for share in s.shares for context in s.contexts])

    def kernels(self) -> dict[str, pd.DataFrame]:
        """What the fused operators spend kernel by kernel: see `measure_kernels`. Last of all: it brings a profiler."""
        s = self.settings
        return measure_kernels(self.ledger, s.operators, s.kernel_shapes, dtype=s.dtype, device=self.device,
                               repeats=s.repeats, recompute=s.recompute)


def recorded_speed(ledger: Ledger) -> dict[str, pd.DataFrame]:
    """The tables of `SpeedStudy` from a ledger's records, by the names in `KINDS`; of the same question, the latest.

    Each row has its ``commit`` beside. Memory floors are those of the ledger's latest `copy_speed` of the same device,
    not those of the record: all are held against one bandwidth. A table without records is empty.
    """
    tables, copied = {}, {r.parameters["device"]: r.metrics for r in ledger.find("copy_speed")
                      if r.metrics["reason"] is None}
    for name, kind in KINDS.items():
        latest = {}
        for r in (r for r in ledger if r.kind == kind):
            asked = {k: v for k, v in r.parameters.items() if k not in ("repeats", "max_seconds", "steps", "new_tokens",
                                                                        "data", "revision", "cases", "align_tokens")}
            metrics = _with_floor(r.metrics, copied.get(r.parameters.get("device")))
            latest[repr(sorted(asked.items()))] = r.parameters | metrics | {"commit": r.commit}
        tables[name] = pd.DataFrame(list(latest.values()))
    return tables


def _with_floor(metrics, copied):
    """Metrics, those of each kernel and part within too, with ``floor_seconds`` by what was `copied`."""
    if copied is None:
        return metrics
    if "kernels" in metrics:
        metrics = metrics | {"kernels": [_with_floor(one, copied) for one in metrics["kernels"]]}
    if "floor_seconds" in metrics:
        count = metrics.get("floor_bytes", metrics.get("bytes"))
        metrics = metrics | {"floor_seconds": count / copied["bytes_per_second"]}
    return metrics
