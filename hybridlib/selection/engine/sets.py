"""Stage 2 of many layer sets at once, and how many fit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from hybridlib.checks import check_int, check_weights
from hybridlib.distill.recall import RecallTask
from hybridlib.distill.settings import MatchSettings
from hybridlib.models.hybrid import check_layers, check_same_shape, linear_layers
from hybridlib.models.passes import TeacherStates
from hybridlib.selection.engine.candidates import Job, measure_sets
from hybridlib.selection.engine.inputs import LoadedInputs

__all__ = ["FIGURES", "group_size", "match_sets"]

FIGURES = ("kl", "kl_stderr", "perplexity", "top1_agreement", "recall_exact", "recall_stderr")


def match_sets(student, teacher, tokens, sets: Sequence[Iterable[int]], num_tokens: int, *,
               settings: MatchSettings | None = None, group: int | None = None, recall: RecallTask | None = None,
               recall_examples: int = 200, measure_at: Sequence[int] = ()) -> list[dict]:
    """Stage 2 and evaluation of many layer sets of one aligned student, a group of them at once.

    The figures are those of `match` and `evaluate` for each set alone, up to rounding.

    Parameters
    ----------
    student : aligned and all linear; it is left as it was.
    tokens : from `corpus.load_tokens`; with a tokenizer, if `recall` is given.
    sets : for each candidate, the layers that are softmax: none to all, in any order.
    num_tokens : tokens to train each candidate on, at least one row.
    settings : of stage 2; `compile` and `checkpoint_every` have no effect.
    group : candidates at a time, on which the figures do not depend; None for `group_size`.
    measure_at : tokens after which to measure on the way, 0 to `num_tokens`; rounded up to whole steps.

    Returns
    -------
    list of dict, one for each set in the order given
        ``layers``; `FIGURES`, as in `evaluate.Evaluation`; ``tokens`` trained on; ``losses`` of the steps and
        ``loss_tokens``, the tokens at the end of each; ``curve``, for each of `measure_at` a dict of ``tokens``,
        ``kl``, ``recall_exact``; ``seconds``, its share of its group's. Of a set that diverged, ``error`` says how, and
        the figures are None.
    """
    settings, num_layers = settings or MatchSettings(), student.config.num_hidden_layers
    if len(linear_layers(student.config)) != num_layers:
        raise ValueError("student has softmax layers; match_sets takes the all-linear student that linearize gave")
    check_same_shape(student, teacher)
    sets = [check_layers(layers, num_layers) for layers in sets]
    if not sets:
        raise ValueError("sets is empty; give at least one set of layers, () for the all-linear student")
    if not isinstance(settings, MatchSettings):
        raise ValueError(f"settings is a {type(settings).__name__}; it must be MatchSettings")
    if student.config.attention_dropout:
        raise ValueError(f"the student's config has attention_dropout={student.config.attention_dropout}, which draws "
                         "other numbers for a group than for one candidate; set it to 0")
    check_int("num_tokens", num_tokens, tokens.context)
    if group is not None:
        check_int("group", group, 1)
    for point in measure_at:
        check_int("measure_at", point, 0, num_tokens)
    if recall is not None and tokens.tokenizer is None:
        raise ValueError("recall is given, but tokens has no tokenizer; load tokens with the teacher's")
    check_int("recall_examples", recall_examples, 1)
    check_weights("teacher", teacher)
    check_weights("student", student, beside=".self_attn.")  # a mixer's stop the sets that have it, alone
    inputs = LoadedInputs(student, teacher, tokens, TeacherStates(teacher))
    job = Job(inputs, num_tokens, settings, evaluation=True, recall=recall, recall_examples=recall_examples)
    order = sorted(range(len(sets)), key=sets.__getitem__)  # neighbours share layers, and with them launches
    groups = -(-len(sets) // (group or group_size(student, tokens, settings, len(sets))))
    results: dict[int, dict] = {}
    with tqdm(total=len(sets), unit="set", desc="match sets", leave=False) as bar:
        for members in map(list, np.array_split(order, groups)):
            try:
                results |= zip(members, _match_group(job, [sets[i] for i in members], measure_at), strict=True)
            finally:
                inputs.forget()
            bar.update(len(members))
    return [results[i] for i in range(len(sets))]


def group_size(student, tokens, settings: MatchSettings, most: int) -> int:
    """How many candidates, up to `most`, half of a GPU's free memory or a quarter of a machine's holds, by estimate."""
    config, parameter = student.config, next(student.parameters())
    weights = sum(p.numel() for p in student.parameters())
    rows = max(1, (settings.micro_batch_tokens or settings.batch_tokens) // tokens.context)
    numbers = 16 * config.hidden_size + 10 * config.num_attention_heads * config.head_dim + 4 * config.intermediate_size
    held = rows * tokens.context * config.num_hidden_layers * numbers * 4 + 4 * weights * parameter.element_size()
    if parameter.is_cuda:
        cached = torch.cuda.memory_reserved(parameter.device) - torch.cuda.memory_allocated(parameter.device)
        memory = (torch.cuda.mem_get_info(parameter.device)[0] + cached) // 2
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return max(1, min(most, memory // held))


def _match_group(job, sets, measure_at):
    step = job.settings.step_rows(job.inputs.context) * job.inputs.context
    last = max(1, job.num_tokens // step) * step
    stops = [min(last, -(-point // step) * step) for point in measure_at]
    measured: dict[int, dict] = {}  # tokens: figures of each set
    for until in sorted({*stops, last}):
        since = max(measured, default=0)
        measured[until] = measure_sets(job, sets, job.num_tokens if until == last else until, since, stack=True)
        if all("error" in figures for figures in measured[until].values()):
            break
    return [_result(layers, [measured[until][layers] for until in sorted(measured)],
                    [measured[stop][layers] for stop in stops if stop in measured]) for layers in sets]


def _result(layers, measured, curve):
    """A set's result from its figures, the last of them at its end, and those that its curve shows."""
    end, error = measured[-1], measured[-1].get("error")
    result = {"layers": layers, **{name: None if error else end[name] for name in FIGURES},
              "tokens": end["tokens"], "losses": end["loss"], "loss_tokens": end["loss_tokens"],
              "curve": [{name: figures[name] for name in ("tokens", "kl", "recall_exact")}
                        for figures in curve if "error" not in figures],
              "seconds": sum(figures["seconds"] for figures in measured)}
    return result | ({"error": f"layers {layers}: {error.removeprefix('DistillationDiverged: ')}"} if error else {})
