"""Stage 2 of many layer sets at once.

Launching the kernels of a step takes a GPU longer than running them, where the teacher is small. Candidates, one for
each set of softmax layers, therefore share every launch: their weights are stacked, see
`hybridlib.selection.engine.stacked`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence

import torch
from tqdm.auto import tqdm

from hybridlib.checks import check_int
from hybridlib.distill.recall import RecallTask, encode_all, generate_recall
from hybridlib.distill.settings import MatchSettings
from hybridlib.models.hybrid import check_layers, check_same_shape, linear_layers
from hybridlib.selection.engine.cohort import Cohort

__all__ = ["match_sets"]


def match_sets(student, teacher, tokens, sets: Sequence[Iterable[int]], num_tokens: int, *,
               settings: MatchSettings | None = None, group: int | None = None, recall: RecallTask | None = None,
               recall_examples: int = 200, measure_at: Sequence[int] = ()) -> list[dict]:
    """Stage 2 and evaluation of many layer sets of one aligned student, a group of them at once.

    Each set is trained as ``match(restore(student, teacher, set), teacher, tokens, num_tokens)`` would train it, on the
    same rows in the same order, with its own gradient norm to clip, and measured as `evaluate` would measure it. The
    numbers differ by rounding only.

    Parameters
    ----------
    student : aligned and all linear, from `hybrid.linearize` and `distill.align`; it is left as it was.
    teacher : the model that it was made from, on the same device.
    tokens : from `corpus.load_tokens`; with a tokenizer, if `recall` is given.
    sets : for each candidate, the layers that are softmax: none to all, in any order.
    num_tokens : tokens to train each candidate on, at least one row.
    settings : of stage 2. `compile` is not offered here and `checkpoint_every` has no meaning.
    group : candidates at a time; the figures do not depend on it. None: as many as half of a GPU's free memory, or a
        quarter of a machine's memory, holds by an estimate: weights, gradients and AdamW's two moments, and for each
        layer and token of a micro batch four bytes times 16 widths, 10 widths of all heads and 4 of the MLP. Groups
        are then evened out.
    recall, recall_examples : a task to score as `evaluate` does, None to leave recall out, and examples of it.
    measure_at : tokens after which to measure on the way, 0 to `num_tokens`; rounded up to whole steps.

    Returns
    -------
    list of dict, one for each set in the order given
        ``layers``; ``kl``, ``kl_stderr``, ``perplexity``, ``top1_agreement``, ``recall_exact``, ``recall_stderr``, as
        in `evaluate.Evaluation`; ``tokens`` trained on; ``losses`` of the steps and ``loss_tokens``, the tokens at the
        end of each; ``curve``, for each of `measure_at` a dict of ``tokens``, ``kl``, ``recall_exact``; ``seconds``,
        wall time of its group divided by the group's size. Where `distill.match` would raise `DistillationDiverged`,
        the sentence is in ``error``, the figures are None, and losses and curve end before; the other candidates are
        not touched by that.

    Raises ValueError for arguments outside these, a student with softmax layers or a teacher of another shape.

    Cost: that of the single runs, less the launches that they share and all teacher's passes but one a group. Memory
    grows with the group. Meant for small teachers: a candidate that fills the GPU alone gains nothing.
    """
    settings = settings or MatchSettings()
    sets = _check(student, teacher, tokens, sets, num_tokens, settings, group, measure_at)
    examples = None
    if recall is not None:
        if tokens.tokenizer is None:
            raise ValueError("recall is given, but tokens has no tokenizer; load tokens with the teacher's")
        check_int("recall_examples", recall_examples, 1)
        examples = encode_all(generate_recall(recall, recall_examples, seed=1), tokens.tokenizer, student.config)
    size = group or group_size(student, tokens, settings, len(sets))
    order = sorted(range(len(sets)), key=sets.__getitem__)  # neighbours share layers, and with them launches
    results = {}
    with tqdm(total=len(sets) * num_tokens, unit="tok", unit_scale=True, desc="match sets", leave=False) as bar:
        for members in _parts(order, -(-len(sets) // -(-len(sets) // size))):
            started = time.perf_counter()
            found = _match_group(student, teacher, tokens, [sets[i] for i in members], num_tokens, settings, examples,
                                 measure_at, bar)
            seconds = (time.perf_counter() - started) / len(members)
            results |= {i: result | {"seconds": seconds} for i, result in zip(members, found, strict=True)}
    return [results[i] for i in range(len(sets))]


def _check(student, teacher, tokens, sets, num_tokens, settings, group, measure_at):
    """`sets` as tuples, ascending, once all arguments are what they should be."""
    num_layers = student.config.num_hidden_layers
    if len(linear_layers(student.config)) != num_layers:
        raise ValueError("student has softmax layers; match_sets takes the all-linear student that linearize gave")
    check_same_shape(student, teacher)
    sets = [check_layers(layers, num_layers) for layers in sets]
    if not sets:
        raise ValueError("sets is empty; give at least one set of layers, () for the all-linear student")
    if not isinstance(settings, MatchSettings):
        raise ValueError(f"settings is a {type(settings).__name__}; it must be MatchSettings")
    if settings.compile:
        raise ValueError("compile=True is not offered by match_sets; use compile=False, with cuda_graph=True on a GPU")
    if student.config.attention_dropout:
        raise ValueError(f"the student's config has attention_dropout={student.config.attention_dropout}, which draws "
                         "other numbers for a group than for one candidate; set it to 0")
    check_int("num_tokens", num_tokens, tokens.context)
    if tokens.context > student.config.max_position_embeddings:
        raise ValueError(f"context={tokens.context} is beyond the teacher's {student.config.max_position_embeddings}; "
                         "load tokens with a shorter one")
    if group is not None:
        check_int("group", group, 1)
    for point in measure_at:
        check_int("measure_at", point, 0, num_tokens)
    return sets


def group_size(student, tokens, settings, most):
    """How many candidates to train at once, by memory; see `match_sets`."""
    config, parameter = student.config, next(student.parameters())
    weights = sum(p.numel() for p in student.parameters())
    rows = max(1, (settings.micro_batch_tokens or settings.batch_tokens) // tokens.context)
    numbers = 16 * config.hidden_size + 10 * config.num_attention_heads * config.head_dim + 4 * config.intermediate_size
    held = rows * tokens.context * config.num_hidden_layers * numbers * 4 + 4 * weights * parameter.element_size()
    if parameter.is_cuda:
        kept = torch.cuda.memory_reserved(parameter.device) - torch.cuda.memory_allocated(parameter.device)
        memory = (torch.cuda.mem_get_info(parameter.device)[0] + kept) // 2
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return max(1, min(most, memory // held))


def _match_group(student, teacher, tokens, sets, num_tokens, settings, examples, measure_at, bar):
    """Results of `match_sets`, but for their seconds, of sets that are trained at once."""
    cohort = Cohort(student, teacher, tokens, sets, num_tokens, settings)
    stops = [cohort.steps_for(point) for point in measure_at]
    measured = {}  # step: figures of each candidate
    for step in sorted({*stops, cohort.steps}):
        cohort.train(step, bar=bar)
        if step == cohort.steps:
            cohort.release()
        measured[step] = cohort.figures(tokens, examples)
    errors = {c: f"layers {sets[c]}: {error}" for c, error in cohort.errors.items()}
    return [_result(sets[c], cohort.histories[c], errors.get(c), {step: m[c] for step, m in measured.items()}, stops,
                    cohort.step_tokens) for c in range(len(sets))]


def _result(layers, history, error, measured, stops, each):
    """A set's result; `measured` : figures by step, the last step among them."""
    done, figures = len(history.losses), measured[max(measured)]
    figures = dict.fromkeys(figures) if error else figures
    result = {"layers": layers, **figures, "tokens": done * each, "losses": history.losses,
              "loss_tokens": history.tokens,
              "curve": [{"tokens": step * each, "kl": measured[step]["kl"],
                         "recall_exact": measured[step]["recall_exact"]} for step in stops if step <= done]}
    return result | {"error": error} if error else result


def _parts(items, size):
    return (items[i:i + size] for i in range(0, len(items), size))
