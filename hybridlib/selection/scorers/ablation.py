"""Scores for layers from ablations of the teacher: what is lost where one layer's attention is silenced or replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import comb

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from hybridlib.checks import check_int, check_weights
from hybridlib.distill.choice import ChoiceTask, choice_probabilities, generate_choices
from hybridlib.distill.recall import ADDENDS, RecallTask, encode_recall, forced_answers, generate_recall
from hybridlib.models.hybrid import check_layers, linear_layers, restore
from hybridlib.models.passes import last_hidden, measuring
from hybridlib.models.teachers import check_family
from hybridlib.selection.cost import Meter
from hybridlib.selection.scores import LayerScores

__all__ = ["HALO_CAP", "LEAST_RECALL", "TaskTooHard", "ablate", "halo_values", "score_associative_recall", "score_halo",
           "score_perplexity", "silence_each"]

HALO_CAP = 50.0  # the highest score of HALO
LEAST_RECALL = 0.3  # of the intact teacher, above which a task can tell layers apart
_EXAMPLES_A_PASS = 32


class TaskTooHard(ValueError):
    """A recall task is beyond the teacher, so that it can score no layer."""


@contextmanager
def ablate(model, layers: Iterable[int]) -> Iterator[None]:
    """Within the context, the attention of `layers` adds nothing, nor its bias, to the residual stream of `model`."""
    layers = check_layers(layers, model.config.num_hidden_layers)

    def silence(module, args, output):
        return torch.zeros_like(output[0]), *output[1:]

    handles = [model.model.layers[l].self_attn.register_forward_hook(silence) for l in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def silence_each(teacher, tokens, batch_tokens: int, metric: str,
                 prepare: Callable[[list[torch.Tensor]], Callable[[], torch.Tensor]]) -> LayerScores:
    """Measure the held-out rows of `tokens`, `batch_tokens` a pass, with the attention of each layer silenced alone.

    `prepare` takes the rows in batches and gives a function that lets the silenced teacher read them and gives a
    number a row, (rows,); `values` and `measured` are its mean over rows.
    """
    check_family(teacher.config)
    check_weights("teacher", teacher)
    num_layers = teacher.config.num_hidden_layers
    meter, batches, rows = Meter(teacher), heldout_batches(teacher, tokens, batch_tokens), []
    with measuring(teacher):
        measure = prepare(batches)
        for l in tqdm(range(num_layers), desc=f"score ({metric})", unit="layer", leave=False):
            with ablate(teacher, [l]):
                rows.append(measure())
    rows = torch.stack(rows)  # (layers, rows)
    read = (num_layers + 1) * sum(ids.numel() for ids in batches)
    meter.forward(teacher, read, tokens.context, passes=num_layers + 1)
    cost, mean, stderr = meter.cost(), tuple(rows.mean(-1).tolist()), rows.std(-1) / rows.shape[1] ** 0.5
    return LayerScores("remove", metric, mean, mean, tuple(stderr.tolist()), 0, cost.seconds, cost)


def score_perplexity(teacher, tokens, *, batch_tokens: int = 8192) -> LayerScores:
    """PPL: how much harder held-out text gets for the teacher with layer l's attention silenced (arXiv 2512.20569).

    `values` and `measured` are the rise of the mean cross-entropy in nats a token, with its standard error over rows.
    """
    def prepare(batches):
        intact = _row_nats(teacher, batches)
        return lambda: _row_nats(teacher, batches) - intact

    return silence_each(teacher, tokens, batch_tokens, "ppl", prepare)


def score_associative_recall(teacher, tokenizer, task: RecallTask | None = None, *, num_examples: int = 200,
                             seed: int = 0) -> LayerScores:
    """AR, of one hop, and AR-MH, of more: how much recall the teacher loses with layer l silenced (arXiv 2512.20569).

    `task` None is ``RecallTask("needle")``; ``RecallTask("lookup_sum")`` asks as the authors do, but counts no answer
    that merely holds the right one. `measured` is the exact match (each answer token the arg max given the true text
    before it) with the layer silenced, with its binomial standard error; `values` is the exact match lost, where ties
    are ordered by log likelihood.

    Raises ValueError if an example is longer than the teacher's context, and `TaskTooHard` if the teacher's exact match
    is within two standard errors of guessing among the prompt's answers, or no more than `LEAST_RECALL`.
    """
    check_family(teacher.config)
    meter, (task, encoded, right, likelihood) = Meter(teacher), _intact(teacher, tokenizer, task, num_examples, seed)
    intact, answers, values, measured = right.mean(), len(right), [], []
    with measuring(teacher):
        for l in tqdm(range(teacher.config.num_hidden_layers), desc="score (recall)", unit="layer", leave=False):
            with ablate(teacher, [l]):
                right, ablated = _answers(teacher, encoded)
            lost = (likelihood - ablated).mean()
            values.append((intact - right.mean() + lost / (2 + 2 * lost.abs()) / answers).item())
            measured.append(right.mean().item())
    passes, (size, context) = len(values) + 1, _prompts(encoded)
    meter.forward(teacher, passes * size, context, head=False, passes=passes)  # the head reads the answers alone
    cost = meter.cost()
    metric = "ar-sum" if task.name == "lookup_sum" else "ar" if task.hops == 1 else "ar-mh"
    return LayerScores("remove", metric, tuple(values), tuple(measured),
                       _binomial_stderr(measured, answers), 0, cost.seconds, cost)


def score_halo(student, teacher, tokens, task: RecallTask | None = None, *, num_examples: int = 200, seed: int = 0,
               sense: ChoiceTask | None = None, batch_tokens: int = 8192) -> LayerScores:
    """HALO: recall lost over common sense lost, where layer l of the teacher alone is replaced by its aligned mixer.

    Recall, r(l), is the exact match of `score_associative_recall`, and raises as it does. Common sense, c(l), is the
    mean probability of the true continuation among those of `sense` (None: `ChoiceTask` as it is), cut from held-out
    rows, where the authors take the accuracy on question sets (arXiv 2601.22156): a probability has no ties. The
    student is all linear and aligned. `values` are `halo_values`, and `measured` is r(l) with its binomial standard
    error. Of `figures`, ``sense`` and ``sense_accuracy`` are c(l) and the share of items whose true continuation is
    likeliest, of ``items``; ``at_cap`` layers have the highest score, ``cap``, and their order is that of their index.
    """
    check_family(teacher.config)
    num_layers, sense = student.config.num_hidden_layers, sense or ChoiceTask()
    if linear_layers(student.config) != tuple(range(num_layers)):
        raise ValueError("student has softmax layers; score_halo takes the all-linear student that linearize gave")
    check_int("batch_tokens", batch_tokens, 1)
    check_weights("student", student)
    meter, items = Meter(teacher, student), generate_choices(tokens.heldout, sense, seed)
    _, encoded, answers, _ = _intact(teacher, tokens.tokenizer, task, num_examples, seed)
    (prompts, prompt), read = _prompts(encoded), len(items) * (items.shape[2] + (sense.choices - 1) * sense.length)
    meter.forward(teacher, prompts, prompt, head=False)
    recall, mean, accuracy = [], [], []
    for l in tqdm(range(num_layers), desc="score (halo)", unit="layer", leave=False):
        replaced = restore(student, teacher, [m for m in range(num_layers) if m != l])
        with measuring(replaced):
            recall.append(_answers(replaced, encoded)[0].mean().item())
            probabilities = choice_probabilities(replaced, items, sense.length, batch_tokens)
        mean.append(probabilities[:, 0].mean().item())
        accuracy.append((probabilities.argmax(1) == 0).double().mean().item())
        meter.forward(replaced, prompts, prompt, head=False)
        meter.forward(replaced, read, items.shape[2], head=False)
    cost, values = meter.cost(), halo_values(recall, mean)
    return LayerScores("remove", "halo", values, tuple(recall), _binomial_stderr(recall, len(answers)), 0,
                       cost.seconds, cost, figures={
                           "sense": tuple(mean), "sense_accuracy": tuple(accuracy), "items": len(items),
                           "at_cap": values.count(HALO_CAP), "cap": HALO_CAP})


def halo_values(recall, sense) -> tuple[float, ...]:
    """(max r - r(l)) / (max c - c(l) + 1e-10), at most `HALO_CAP`, from each layer's recall r and common sense c."""
    return tuple(min((max(recall) - r) / (max(sense) - c + 1e-10), HALO_CAP)
                 for r, c in zip(recall, sense, strict=True))


def heldout_batches(model, tokens, batch_tokens: int) -> list[torch.Tensor]:
    """Held-out rows as ids (rows, context) on the device of `model`, `batch_tokens` (or a row) at a time."""
    check_int("batch_tokens", batch_tokens, 1)
    device = next(model.parameters()).device
    return list(tokens.heldout.long().to(device).split(max(1, batch_tokens // tokens.context)))


def _row_nats(model, batches):
    """Mean cross-entropy of the next token in each row: (rows,), in float64."""
    rows = []
    for ids in batches:
        logits = model.lm_head(last_hidden(model, ids)).float()[:, :-1]  # (rows, context - 1, vocab)
        nats = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        rows.append(nats.double().mean(-1).cpu())
    return torch.cat(rows)


def _intact(teacher, tokenizer, task, num_examples, seed):
    """The task, its encoded prompts and `_answers` of the intact teacher. Raises `TaskTooHard` if that is at chance."""
    check_weights("teacher", teacher)
    task = task or RecallTask("needle")
    encoded = [encode_recall(example, tokenizer) for example in generate_recall(task, num_examples, seed)]
    longest, limit = max(len(ids) for ids, _ in encoded), teacher.config.max_position_embeddings
    if longest > limit:
        raise ValueError(f"task={task} gives an example of {longest} tokens, but the teacher's context is {limit}; "
                         "use fewer pairs or filler")
    with measuring(teacher):
        right, likelihood = _answers(teacher, encoded)
    _refuse_chance(task, right.mean().item(), len(right))
    return task, encoded, right, likelihood


def _prompts(encoded):
    """(tokens of all prompts, mean over these tokens of the length of their prompt)."""
    sizes = [len(ids) for ids, _ in encoded]
    return sum(sizes), sum(n * n for n in sizes) / sum(sizes)


def _answers(model, encoded):
    """`recall.forced_answers` in float64 on the CPU."""
    right, likelihood = forced_answers(model, encoded, _EXAMPLES_A_PASS)
    return right.double().cpu(), likelihood.double().cpu()


def _refuse_chance(task, accuracy, answers):
    chance = 1 / (comb(task.pairs, ADDENDS) if task.name == "lookup_sum" else task.pairs)
    guessed = chance + 2 * (chance * (1 - chance) / answers) ** 0.5
    if accuracy <= max(guessed, LEAST_RECALL):
        raise TaskTooHard(f"task={task} is beyond the teacher, which answers {accuracy:.3f} of {answers} exactly where "
                         f"guessing gives up to {guessed:.3f} and {LEAST_RECALL} or less tells nothing, so no layer "
                         "has recall to lose; give an easier task or another teacher")


def _binomial_stderr(shares, answers):
    return tuple((p * (1 - p) / answers) ** 0.5 for p in shares)
