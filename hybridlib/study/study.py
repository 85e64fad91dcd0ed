"""A study: the steps of the paper under one set of parameters, each run once and remembered as a record."""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache, cached_property
from pathlib import Path

import pandas as pd

from hybridlib.checks import check_choice, check_device, check_executor, check_int
from hybridlib.distill.corpus import Tokens, load_tokens
from hybridlib.distill.evaluate import evaluate
from hybridlib.distill.reading import encode_reading, load_reading, reading_figures, reading_files
from hybridlib.distill.recall import RecallTask
from hybridlib.distill.settings import MatchSettings
from hybridlib.distill.stages import align
from hybridlib.models.hybrid import linearize, load_hybrid
from hybridlib.models.passes import TeacherStates
from hybridlib.models.teachers import SMOLLM2, Teacher, load_teacher
from hybridlib.records.folders import results_folder, sha256_of
from hybridlib.records.ledger import Ledger, Record
from hybridlib.selection.engine.candidates import Job, measure_along, one_layer_sets, shares_step
from hybridlib.selection.engine.inputs import LoadedInputs, ScoringInputs, weights_sha256
from hybridlib.selection.engine.rounds import EarlyStop, Engine
from hybridlib.selection.rules import budget_layers, select
from hybridlib.selection.scorers.importance import score_layers
from hybridlib.selection.scores import LayerScores
from hybridlib.study.candidates import StudyRecords, with_curve
from hybridlib.study.catalogue import run_selector, score_parameters
from hybridlib.study.selector import Selection, full_parameters
from hybridlib.study.settings import StudySettings

__all__ = ["Study"]

logger = logging.getLogger(__name__)
_sum_of = cache(sha256_of)


class Study:
    """The steps of the paper under one `StudySettings`, each a record in `ledger`, read where it was run before.

    Aligned students and checkpoints of long runs lie beside the records, in ``models/``.

    Parameters
    ----------
    executor : scores layers by tasks, as in `Engine`; its workers must see the folder of records.
    group, memory : layers that are scored together, and bytes for the teacher's states, as in `Engine`. No record
        depends on them.
    checkpoints : whether a run of more than ``checkpoint_every`` tokens leaves its state on disk.

    Raises ValueError if the teacher has a shorter context or fewer layers than `settings` ask for.
    """

    def __init__(self, settings: StudySettings | None = None, executor=None, group: int | None = None,
                 memory: int = 4 * 2**30, checkpoints: bool = True):
        check_executor(executor)
        if group is not None:
            check_int("group", group, 1)
        self.settings, self.executor, self.group = settings or StudySettings(), executor, group
        folder = Path(self.settings.results).expanduser() if self.settings.results else results_folder()
        self.ledger = Ledger(folder, device=str(check_device(self.settings.device)))
        self._tokens: dict[tuple, Tokens] = {}
        self._done: set[str] = set()
        self._inputs: dict[Path, LoadedInputs] = {}  # of one student
        self.memory, self.checkpoints = memory, checkpoints
        limit = self.teacher.model.config.max_position_embeddings
        if self.settings.context > limit:
            raise ValueError(f"context={self.settings.context} is beyond teacher {self.teacher.name}'s {limit} tokens")
        budget_layers(self.settings.budget, self.num_layers)

    def under(self, **changes) -> Study:
        """A study of other settings that shares what this one has loaded: its teacher, device and results are fixed."""
        if fixed := sorted({"teacher", "device", "results"} & set(changes)):
            raise ValueError(f"{fixed[0]}={changes[fixed[0]]!r} cannot change within a study; make another Study")
        other = copy.copy(self)
        other.settings = replace(self.settings, **changes)
        return other

    @cached_property
    def teacher(self) -> Teacher:
        return load_teacher(self.settings.teacher, device=self.settings.device)

    @property
    def num_layers(self) -> int:
        return self.teacher.model.config.num_hidden_layers

    @property
    def seeds(self) -> range:
        return range(self.settings.seeds)

    def tokens(self, seed: int, num_tokens: int, part: str = "test") -> Tokens:
        """Training rows for `num_tokens` in the order of `seed`, and the held-out rows ``"score"`` or ``"test"``."""
        s = self.settings
        most, heldout = max(num_tokens, s.context, s.corpus_tokens), s.heldout_tokens + self.test_tokens
        source = s.corpus, s.context, most, s.heldout_tokens, heldout
        if (*source, seed, part) in self._tokens:
            return self._tokens[*source, seed, part]
        if source not in self._tokens:
            self._tokens[source] = load_tokens(s.corpus, self.teacher.tokenizer, s.context, max_tokens=most,
                                               heldout_tokens=heldout)
        whole = self._tokens[source]
        first = len(whole.heldout) * s.heldout_tokens // heldout
        if first == 0:
            raise ValueError(f"corpus={s.corpus!r} has fewer than two held-out rows of context={s.context} tokens")
        last = 2 * first if self.test_tokens == s.heldout_tokens else len(whole.heldout)
        rows = whole.heldout[:first] if part == "score" else whole.heldout[first:last]
        tokens = self._tokens[*source, seed, part] = Tokens(whole.train, rows, whole.tokenizer, whole.source, seed)
        return tokens

    @property
    def test_tokens(self) -> int:
        """Held-out tokens that hybrids are measured on."""
        return self.settings.test_tokens or self.settings.heldout_tokens

    def is_aligned(self, mixer: str, seed: int) -> bool:
        """Whether the student of `aligned` lies on this machine."""
        parameters = self.aligned_parameters(mixer, seed)
        return self._folder("align", parameters).exists() and self.ledger.path("align", parameters).exists()

    def aligned(self, mixer: str, seed: int):
        """The all-linear student after stage 1, on the study's device. Record kind ``"align"``: ``repeats`` says how
        often it was aligned again, here or elsewhere, to the same weights."""
        parameters, settings = self.aligned_parameters(mixer, seed), self.settings.align_settings
        folder, path = self._folder("align", parameters), self.ledger.path("align", parameters)

        def compute():
            nonlocal loaded
            loaded = None  # the student from before
            teacher, tokens = self.teacher.model, self.tokens(seed, self.settings.align_tokens, "score")
            student = linearize(teacher, mixer, seed=seed, teacher_name=self.teacher.name,
                                teacher_revision=self.teacher.revision)
            before = score_layers(student, teacher, tokens, metric="mse")
            with self._checkpoint("align", parameters, self.settings.align_tokens, settings) as checkpoint:
                history = align(student, teacher, tokens, self.settings.align_tokens, settings=settings,
                                checkpoint=checkpoint and checkpoint / "align.safetensors")
            after = score_layers(student, teacher, tokens, metric="mse")
            measured = evaluate(student, teacher, tokens)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder.parent) as beside:
                student.save_pretrained(Path(beside) / folder.name)
                shutil.rmtree(folder, ignore_errors=True)
                (Path(beside) / folder.name).rename(folder)
            weights = weights_sha256(folder)
            earlier = self.ledger.run("align", parameters, dict).metrics if path.exists() else {}
            same = weights == earlier.get("weights_sha256")
            if not same and "weights_sha256" in earlier:
                logger.warning("the student aligned anew (%s, seed %d) has other weights than the recorded one", mixer,
                               seed)
            return {"weights_sha256": weights, "repeats": earlier.get("repeats", 0) + 1 if same else 0,
                    "loss": history.losses, "loss_tokens": history.tokens, "tokens": history.tokens[-1],
                    "train_seconds": history.seconds, "heldout_error": list(after.values),
                    "heldout_error_before": list(before.values), "kl": measured.kl, "kl_stderr": measured.kl_stderr}

        def load():
            return load_hybrid(folder, device=check_device(self.settings.device), teacher=self.teacher)

        try:
            loaded = load() if folder.exists() else None
        except ValueError as error:
            logger.warning("%s; the student is aligned again", error)
            loaded = None
        self.record("align", parameters, compute, missing=loaded is None)
        return load() if loaded is None else loaded

    def scores(self, mixer: str, seed: int, direction: str = "add", metric: str = "kl",
               normalize: bool = True, early_stop: EarlyStop | None = None) -> LayerScores:
        """Scores of all layers of the aligned student, as in `score_layers`. Record kind ``"score"``."""
        check_choice("direction", direction, ("add", "remove"))
        check_choice("metric", metric, ("kl", "mse"))
        s, settings = self.settings, self.match_settings
        parameters = full_parameters(score_parameters(s, direction, metric, normalize), s,
                                     self.aligned_parameters(mixer, seed))
        records = StudyRecords(self, parameters)
        if early_stop is not None:
            if metric != "kl":
                raise ValueError(f"early_stop={early_stop!r} is for metric 'kl'; metric={metric!r} trains nothing")
            parameters = parameters | {"early_stop": early_stop.parameters()}

        def compute():
            student, tokens = self.aligned(mixer, seed), self.tokens(seed, s.score_tokens, "score")
            inputs = self.scoring_inputs(mixer, seed, tokens) if self.executor is not None and metric == "kl" else None
            engine = Engine(self.executor, self.group, records=records, inputs=inputs,
                            checkpoints=self._folder("score", parameters))
            return score_layers(student, self.teacher.model, tokens, direction=direction, metric=metric,
                                num_tokens=s.score_tokens, settings=settings, normalize=normalize,
                                early_stop=early_stop, engine=engine).to_dict()

        return LayerScores.from_dict(self.record("score", parameters, compute).metrics)

    def candidate(self, layer: int, direction: str = "add", mixer: str | None = None, seed: int = 0,
                  measure_at: Iterable[int] = ()) -> None:
        """One candidate of `scores`, which reads its record. Record kind ``"candidate"``: its ``curve`` has the figures
        after each of `measure_at` tokens, rounded up to whole steps."""
        s, mixer = self.settings, mixer or self.settings.mixer
        records = self.candidates(direction, mixer, seed)
        if records.find(layer, s.score_tokens):
            return
        job = Job(self.inputs(mixer, seed, s.score_tokens, "score"), s.score_tokens, self.match_settings)
        with tempfile.TemporaryDirectory() as checkpoints:
            *curve, end = measure_along(job if shares_step(job) else replace(job, checkpoints=checkpoints),
                                        one_layer_sets(direction, self.num_layers)[layer], measure_at)
        records.keep(layer, s.score_tokens, with_curve(end, curve))

    def candidates(self, direction: str = "add", mixer: str | None = None, seed: int = 0) -> StudyRecords:
        """The records of the candidates of `scores`."""
        origin = self.aligned_parameters(mixer or self.settings.mixer, seed)
        own = score_parameters(self.settings, direction, "kl")
        return StudyRecords(self, full_parameters(own, self.settings, origin))

    def inputs(self, mixer: str, seed: int, num_tokens: int, part: str = "test") -> LoadedInputs:
        """The aligned student, the teacher and `tokens` for candidates; what they share is that of the last call for
        this student, so that they can go on with one recorded step."""
        key = self.ledger.path("align", self.aligned_parameters(mixer, seed))
        if key not in self._inputs:
            while self._inputs:  # before the next student takes memory
                self._inputs.popitem()[1].forget()
            self._inputs[key] = LoadedInputs(self.aligned(mixer, seed), self.teacher.model,
                                             self.tokens(seed, num_tokens, part),
                                             TeacherStates(self.teacher.model, self.memory))
        return replace(self._inputs[key], tokens=self.tokens(seed, num_tokens, part))

    def select(self, selector: str, mixer: str | None = None, seed: int = 0, **options) -> tuple[int, ...]:
        """The layers, ascending, that `selector`, a name of `SELECTORS`, keeps under the study's budget."""
        return self.selection(selector, mixer, seed, **options).layers

    def selection(self, selector: str, mixer: str | None = None, seed: int = 0, **options) -> Selection:
        """As `select`, with its cost and, where the selector makes them, one number a layer."""
        return run_selector(selector, self, mixer or self.settings.mixer, seed, options)

    def remember(self, parameters: Mapping, compute: Callable[[], dict], mixer: str | None = None, seed: int = 0, *,
                 kind: str = "score") -> Record:
        """The record of a measurement of the aligned student or, without `mixer`, of the teacher."""
        s = self.settings
        origin = self.teacher_parameters() if mixer is None else self.aligned_parameters(mixer, seed)
        return self.record(kind, full_parameters(parameters, s, origin), compute)

    def teacher_parameters(self) -> dict:
        """The parameters that records of measurements of the teacher build on."""
        s = self.settings
        rows = self.tokens(0, s.score_tokens, "score").heldout
        return {"teacher": self.teacher.name, "revision": self.teacher.revision, "corpus": s.corpus,
                "data": Tokens(rows, rows).fingerprint, "context": s.context}

    def hybrid(self, layers: Iterable[int], mixer: str | None = None, seed: int = 0,
               measure_at: Iterable[int] = ()) -> Record:
        """Restore `layers`, run stage 2 and measure. Record kind ``"hybrid"``: `evaluate`'s figures, the losses.

        ``curve`` has the figures after each of `measure_at` tokens, rounded up to whole steps, on as many held-out
        tokens as layers are scored on. What the settings say of writing and reading is measured at the end.
        """
        s, settings, mixer = self.settings, self.match_settings, mixer or self.settings.mixer
        parameters = self.hybrid_parameters(layers, mixer, seed, measure_at)
        layers, points = tuple(parameters["layers"]), parameters.get("measure_at", ())

        def compute():
            reading = self._reading()  # before anything is trained
            job = Job(self.inputs(mixer, seed, s.match_tokens), s.match_tokens, settings, evaluation=True,
                      recall=self.recall_task, recall_examples=s.recall_prompts, written=s.written, reading=reading)
            with self._checkpoint("hybrid", parameters, s.match_tokens, settings, points and not shares_step(job)
                                  ) as checkpoint:
                *curve, end = measure_along(replace(job, checkpoints=checkpoint), layers, points, s.heldout_tokens)
            figures = with_curve(end, curve)
            return {name: value for name, value in figures.items() if name not in ("seconds", "device")}

        return self.record("hybrid", parameters, compute)

    def hybrid_parameters(self, layers: Iterable[int], mixer: str | None = None, seed: int = 0,
                          measure_at: Iterable[int] = ()) -> dict:
        """The parameters of the record of `hybrid`."""
        s, mixer = self.settings, mixer or self.settings.mixer
        layers = select("manual", layers=list(layers), num_layers=self.num_layers)
        parameters = {"aligned": self.aligned_parameters(mixer, seed), "mixer": mixer, "seed": seed,
                      "layers": list(layers), "num_tokens": s.match_tokens, "settings": self.match_settings.numbers(),
                      "heldout_tokens": self.test_tokens, **self._judging()}
        if points := [int(point) for point in measure_at]:
            parameters["measure_at"] = points
        return parameters

    def teacher_record(self) -> Record:
        """The teacher's own perplexity and recall, and what it writes and reads. Record kind ``"teacher"``."""
        s = self.settings

        def compute():
            teacher, reading = self.teacher.model, self._reading()
            metrics = evaluate(teacher, teacher, self.tokens(0, s.match_tokens), recall=self.recall_task,
                               recall_examples=s.recall_prompts, written=s.written).metrics()
            return metrics | ({"reading": reading_figures(teacher, self.teacher.tokenizer, reading)} if reading else {})

        return self.record("teacher", self.evaluated_parameters(), compute)

    def evaluated_parameters(self) -> dict:
        """The parameters of `teacher_record`."""
        s = self.settings
        return {"teacher": self.teacher.name, "revision": self.teacher.revision, "corpus": s.corpus,
                "context": s.context, "heldout_tokens": self.test_tokens, **self._judging()}

    def _judging(self):
        """Parameters of what hybrids and the teacher are judged by; those that came later, only where they are set."""
        s, files = self.settings, reading_files(self.settings.reading)
        prompts = {} if s.recall_prompts == StudySettings.recall_prompts else {"recall_prompts": s.recall_prompts}
        written = {"written": True} if s.written else {}
        reading = {"reading": {stem: _sum_of(file) for stem, file in files.items()},
                   "reading_items": s.reading_items} if files else {}
        return {"recall": asdict(self.recall_task)} | prompts | written | reading

    def _reading(self):
        """{stem: items} of the files to read; ValueError if the teacher cannot read one of them."""
        files, teacher = reading_files(self.settings.reading), self.teacher
        if files and teacher.tokenizer is None:
            raise ValueError(f"reading={self.settings.reading!r} needs a tokenizer; teacher {teacher.name} has none")
        reading = {stem: load_reading(file, self.settings.reading_items) for stem, file in files.items()}
        for items in reading.values():
            encode_reading(items, teacher.tokenizer, teacher.model.config)
        return reading

    def compare(self, selections: Mapping[str, Mapping[int, Iterable[int]]], mixer: str | None = None) -> pd.DataFrame:
        """Distil every selection, {name: {seed: layers}}: a row each of ``selector``, ``seed``, ``layers``, metrics."""
        rows = []
        for name, by_seed in selections.items():
            for seed, layers in by_seed.items():
                record = self.hybrid(layers, mixer, seed)
                scalars = {k: v for k, v in record.metrics.items() if not isinstance(v, (list, dict))}
                rows.append({"selector": name, "seed": seed, "layers": tuple(record.parameters["layers"]), **scalars})
        return pd.DataFrame(rows)

    @property
    def recall_task(self) -> RecallTask:
        return RecallTask("key_value", pairs=self.settings.recall_pairs)

    def scoring_inputs(self, mixer: str, seed: int, tokens: Tokens) -> ScoringInputs:
        """Where workers find the aligned student, which `aligned` saved, and the `tokens` that layers are scored on."""
        s = self.settings
        folder = self._folder("align", self.aligned_parameters(mixer, seed))
        return ScoringInputs(str(folder.resolve()), weights_sha256(folder), _absolute(s.teacher), _absolute(s.corpus),
                             s.context, seed, max(s.score_tokens, s.context, s.corpus_tokens),
                             s.heldout_tokens + self.test_tokens,
                             (0, len(tokens.heldout)), tokens.fingerprint, s.device)

    def _folder(self, kind, parameters):
        return self.ledger.folder / "models" / self.ledger.path(kind, parameters).stem

    @property
    def match_settings(self) -> MatchSettings:
        return self.settings.match_settings

    def aligned_parameters(self, mixer: str, seed: int) -> dict:
        """The parameters of the record of `aligned`; records that build on that student have them as ``aligned``."""
        s = self.settings
        return {"teacher": self.teacher.name, "revision": self.teacher.revision, "mixer": mixer, "seed": seed,
                "corpus": s.corpus, "data": self.tokens(seed, s.align_tokens, "score").fingerprint,
                "context": s.context, "num_tokens": s.align_tokens, "settings": s.align_settings.numbers()}

    @contextmanager
    def _checkpoint(self, kind, parameters, num_tokens, settings, needed=False):
        folder = self._folder(kind, parameters).with_suffix(".checkpoint")
        yield folder if needed or self.checkpoints and num_tokens > settings.checkpoint_every else None
        shutil.rmtree(folder, ignore_errors=True)

    def record(self, kind: str, parameters: Mapping, compute: Callable[[], dict], missing: bool = False) -> Record:
        """The record of (kind, parameters), computed if it or a file of it is `missing`, or the study recomputes."""
        path = str(self.ledger.path(kind, parameters))
        again = (self.settings.recompute or missing) and path not in self._done
        self._done.add(path)
        return self.ledger.run(kind, parameters, compute, recompute=again)


def _absolute(name):
    path = Path(name).expanduser()
    return str(path.resolve()) if name not in ("lab", SMOLLM2) and path.exists() else name
