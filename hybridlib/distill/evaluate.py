"""What a hybrid lost: divergence, perplexity and agreement on held-out text, and recall in context."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from hybridlib.checks import check_int
from hybridlib.distill.objectives import divergence_from_hidden, kl_divergence
from hybridlib.distill.recall import RecallTask, generate_recall, score_recall
from hybridlib.models.passes import TeacherStates, last_hidden

__all__ = ["Evaluation", "evaluate", "heldout_kl", "row_kl"]


@dataclass(frozen=True)
class Evaluation:
    """Figures on held-out text: `kl` in nats a token; `stderr`s over rows (kl) and over answers (recall)."""

    kl: float
    kl_stderr: float
    perplexity: float
    teacher_perplexity: float
    top1_agreement: float
    heldout_tokens: int
    recall_exact: float | None = None
    recall_stderr: float | None = None

    def metrics(self) -> dict:
        return asdict(self)


def evaluate(model, teacher, tokens, *, recall: RecallTask | None = None, recall_examples: int = 200,
             heldout_tokens: int | None = None, batch_tokens: int = 8192) -> Evaluation:
    """Measure `model` (a hybrid, or the teacher itself) against `teacher` on the held-out rows of `tokens`.

    Parameters
    ----------
    recall : a task to score by teacher-forced exact match, None to leave recall out.
    recall_examples : examples of it.
    heldout_tokens : held-out tokens to measure on, None for all.
    batch_tokens : tokens a forward pass.

    Raises ValueError if there are fewer held-out tokens than one row. Perplexity is over all next tokens of a row.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    kl = []
    for row_kl, nats, agree, teacher_nats in _measured(model, teacher, tokens, heldout_tokens, batch_tokens):
        kl += row_kl
        sums += torch.tensor([nats, teacher_nats, agree], dtype=torch.float64)
    count = len(kl)
    mean, stderr = mean_stderr(kl)
    nats, teacher_nats, agree = (sums / count).tolist()
    score = None
    if recall is not None:
        score = score_recall(model, tokens.tokenizer, generate_recall(recall, recall_examples, seed=1))
    return Evaluation(mean, stderr, math.exp(nats), math.exp(teacher_nats), agree, count * tokens.context,
                      score and score.exact_match, score and score.stderr)


@torch.no_grad()
def heldout_kl(model, teacher, tokens, *, heldout_tokens: int | None = None, batch_tokens: int = 8192,
               states: TeacherStates | None = None, measure: Callable | None = None):
    """(mean, standard error over rows) of KL(teacher || model) in nats a token on held-out rows.

    `states`, of this teacher, spare its pass where another model was measured on the same rows. `measure`, of ids and
    the teacher's last hidden states, is `row_kl` of both models, unless the caller has a faster form of it.
    """
    measure, values = measure or partial(row_kl, model, teacher), []
    for ids, theirs in _read(model, teacher, tokens, heldout_tokens, batch_tokens, states):
        values.append(measure(ids, theirs).clone())  # the next call may write to the same place
    return mean_stderr(torch.cat(values).tolist())


def row_kl(model, teacher, ids: torch.Tensor, theirs: torch.Tensor, *, compiled: bool = False) -> torch.Tensor:
    """KL(teacher || model) in nats a token of each row, (rows,), with logits of a row at a time.

    `ids` : (rows, time); `theirs` : the teacher's last hidden states of them, (rows, time, width). `compiled` runs the
    model's layers through ``torch.compile``.
    """
    with _autocast(ids.device):
        mine = last_hidden(model, ids, compiled=compiled)
        return torch.stack([divergence_from_hidden(t, teacher.lm_head.weight, m, model.lm_head.weight)
                            for t, m in zip(theirs, mine, strict=True)])


@torch.no_grad()
def _measured(model, teacher, tokens, heldout_tokens, batch_tokens):
    """A batch at a time: KL of each row, and sums over rows of the model's nats, the agreement, the teacher's nats."""
    for ids, theirs in _read(model, teacher, tokens, heldout_tokens, batch_tokens):
        with _autocast(ids.device):
            theirs, mine = teacher.lm_head(theirs).float(), model.lm_head(last_hidden(model, ids)).float()
        yield (*compare(theirs, mine, ids), _nats(theirs, ids).sum().item())


def _read(model, teacher, tokens, heldout_tokens, batch_tokens, states=None):
    """A batch at a time: held-out ids (rows, context), and the teacher's last hidden states (rows, context, width).

    Meanwhile `model` is in its evaluation mode.
    """
    count = len(tokens.heldout)
    if heldout_tokens is not None:
        check_int("heldout_tokens", heldout_tokens, tokens.context)
        count = min(count, heldout_tokens // tokens.context)
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    for ids in tokens.heldout[:count].split(max(1, batch_tokens // tokens.context)):
        ids = ids.to(device).long()
        with _autocast(device):
            theirs = last_hidden(teacher, ids) if states is None else states(ids)
        yield ids, theirs
    model.train(was_training)


def _autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def compare(teacher_logits, logits, ids) -> tuple[list[float], float, float]:
    """KL of each row, and sums over rows of the nats of the next token and of the agreement on the likeliest.

    `teacher_logits`, `logits` : (rows, time, vocab); `ids` : (rows, time).
    """
    kl = kl_divergence(teacher_logits, logits).mean(-1)  # (rows,)
    agree = (teacher_logits.argmax(-1) == logits.argmax(-1)).float().mean(-1)
    return kl.tolist(), _nats(logits, ids).sum().item(), agree.sum().item()


def _nats(logits, ids):
    """Mean cross-entropy of the next token, a row each: (rows,)."""
    nats = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nats.view(len(ids), -1).mean(-1)


def mean_stderr(values) -> tuple[float, float]:
    """Mean and its standard error, which is nan for a single value."""
    values = torch.tensor(values, dtype=torch.float64)
    stderr = values.std().item() / len(values) ** 0.5 if len(values) > 1 else math.nan
    return values.mean().item(), stderr
