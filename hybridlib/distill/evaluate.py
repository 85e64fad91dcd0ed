"""What a hybrid lost: divergence, perplexity and agreement on held-out text, and recall in context."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybridlib.checks import check_int
from hybridlib.distill.corpus import Tokens
from hybridlib.distill.objectives import divergence_from_hidden
from hybridlib.distill.recall import RecallTask, generate_recall, marks, rows_to_write, score_recall, share_of
from hybridlib.models.passes import TeacherStates, compiled_if, evaluation_mode, half_on_gpu, last_hidden, measuring

__all__ = ["Evaluation", "evaluate", "evaluate_members", "heldout_kl", "heldout_row_kl", "mean_stderr", "row_kl",
           "written_recall"]


@dataclass(frozen=True)
class Evaluation:
    """Figures on held-out text: `kl` in nats a token; `stderr`s over rows (kl) and over answers (recall).

    `kl_rows` are the means of each row, and `recall_hits` says which answers are right, as ones and zeros. Those of
    `written_recall` are None, and no metrics, unless asked for.
    """

    kl: float
    kl_stderr: float
    perplexity: float
    teacher_perplexity: float
    top1_agreement: float
    heldout_tokens: int
    recall_exact: float | None = None
    recall_stderr: float | None = None
    kl_rows: tuple[float, ...] = ()
    recall_hits: str | None = None
    recall_written: float | None = None
    recall_written_stderr: float | None = None
    recall_written_hits: str | None = None

    def metrics(self) -> dict:
        """The figures as a record has them, `kl_rows` to a millionth of a nat."""
        metrics = asdict(self) | {"kl_rows": [round(kl, 6) for kl in self.kl_rows]}
        return {name: value for name, value in metrics.items() if "written" not in name or value is not None}


@torch.no_grad()
def evaluate(model: PreTrainedModel, teacher: PreTrainedModel, tokens: Tokens, *, recall: RecallTask | None = None,
             recall_examples: int = 200, written: bool = False, heldout_tokens: int | None = None,
             batch_tokens: int = 8192) -> Evaluation:
    """Measure `model` (a hybrid, or the teacher itself) against `teacher` on the held-out rows of `tokens`.

    `recall` is a task to score by teacher-forced exact match and, if `written`, by what the model writes as well.
    `heldout_tokens` are those to measure on, None for all, and `batch_tokens` those of a forward pass. Perplexity is
    over all next tokens of a row. Raises ValueError if there are fewer held-out tokens than one row, for recall without
    `tokens.tokenizer`, or for `written` without recall.
    """
    if written and recall is None:
        raise ValueError("written=True needs a recall task to write the answers of; give recall")
    answers, own = None, {}
    with measuring(model):
        if recall is not None:
            if tokens.tokenizer is None:
                raise ValueError("tokens.tokenizer=None cannot encode recall; load tokens with the teacher's tokenizer")
            score = score_recall(model, tokens.tokenizer, generate_recall(recall, recall_examples, seed=1))
            answers = score.hits
            own = written_recall(model, tokens.tokenizer, recall, recall_examples) if written else {}
        return replace(evaluate_members(lambda ids: [model.lm_head(last_hidden(model, ids))], teacher, tokens,
                                        [answers], heldout_tokens=heldout_tokens, batch_tokens=batch_tokens)[0], **own)


def written_recall(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recall: RecallTask, examples: int
                   ) -> dict:
    """Return the figures ``recall_written*`` of `Evaluation`: as its recall, but of what the model writes itself."""
    prompts = generate_recall(recall, examples, seed=1)
    with measuring(model):
        score = score_recall(model, tokenizer, prompts, mode="greedy", batch_size=rows_to_write(model))
    return {"recall_written": score.exact_match, "recall_written_stderr": score.stderr,
            "recall_written_hits": marks(score.hits)}


@torch.no_grad()
def evaluate_members(logits: Callable[[torch.Tensor], Iterable[torch.Tensor]], teacher: PreTrainedModel, tokens: Tokens,
                     recall: Sequence[Sequence[bool] | None], *, heldout_tokens: int | None = None,
                     batch_tokens: int = 8192, states: TeacherStates | None = None, compiled: bool = False
                     ) -> list[Evaluation]:
    """Measure several models, in evaluation mode, as `evaluate` does one.

    `logits` takes ids (rows, time) and gives each model's logits (rows, time, vocab); `recall` says which of each one's
    answers are right. `states`, of this teacher, spare its pass. The figures of a batch can be `compiled`.
    """
    measure = compiled_if(compiled, _row_figures)
    measured: list[list[torch.Tensor]] = [[] for _ in recall]
    for ids, hidden in _batches(teacher, tokens, heldout_tokens, batch_tokens, states):
        with half_on_gpu(ids.device):
            expected = teacher.lm_head(hidden)
            for rows, own in zip(measured, logits(ids), strict=True):
                rows.append(measure(expected, own, ids))
    figures = []
    for rows, hits in zip(measured, recall, strict=True):
        kl, *others = torch.cat(rows).double().cpu().unbind(1)
        nats, teacher_nats, agreement = (other.mean().item() for other in others)
        share, stderr, right = (None, None, None) if hits is None else (*share_of(hits), marks(hits))
        figures.append(Evaluation(*mean_stderr(kl.tolist()), math.exp(nats), math.exp(teacher_nats), agreement,
                                  len(kl) * tokens.context, share, stderr, tuple(kl.tolist()), right))
    return figures


def _row_figures(expected, own, ids):
    """Of each row, (rows, 4): KL(teacher || model), both models' nats for a next token, how often they agree on it."""
    wide = torch.promote_types(own.dtype, torch.float32)
    log_p, log_q = (logits.log_softmax(-1, dtype=wide) for logits in (expected, own))
    kl = (log_p.exp() * (log_p - log_q).masked_fill(log_p == -math.inf, 0)).sum(-1)
    nats = [-log[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].mean(-1) for log in (log_q, log_p)]
    agreement = (expected.argmax(-1) == own.argmax(-1)).to(wide)
    return torch.stack([kl.mean(-1), *nats, agreement.mean(-1)], -1)


def heldout_kl(model: PreTrainedModel, teacher: PreTrainedModel, tokens: Tokens, *, heldout_tokens: int | None = None,
               states: TeacherStates | None = None) -> tuple[float, float]:
    """Return mean and standard error over rows of KL(teacher || model) in nats a token on held-out rows.

    `states`, of this teacher, spare its pass.
    """
    return mean_stderr(heldout_row_kl(model, teacher, tokens, heldout_tokens=heldout_tokens, states=states))


@torch.no_grad()
def heldout_row_kl(model: PreTrainedModel, teacher: PreTrainedModel, tokens: Tokens, *,
                   heldout_tokens: int | None = None, states: TeacherStates | None = None,
                   measure: Callable | None = None) -> list[float]:
    """Return the KL of `heldout_kl` row by row; `measure` is a faster `row_kl`, called with ids and teacher states."""
    values = []
    with evaluation_mode(model):  # no autocast around all calls: it keeps casts of weights, which a graph would reuse
        for ids, hidden in _batches(teacher, tokens, heldout_tokens, 8192, states):
            kl = measure(ids, hidden) if measure else row_kl(model, teacher, ids, hidden)
            values.append(kl.clone())  # the next call may write to the same place
    return torch.cat(values).tolist()


def row_kl(model: PreTrainedModel, teacher: PreTrainedModel, ids: torch.Tensor, teacher_states: torch.Tensor, *,
           compiled: bool = False) -> torch.Tensor:
    """Return KL(teacher || model) in nats a token, (rows,), of ids (rows, time), teacher_states (rows, time, width)."""
    with half_on_gpu(ids.device):
        states = last_hidden(model, ids, compiled=compiled)
        return torch.stack([divergence_from_hidden(t, teacher.lm_head.weight, s, model.lm_head.weight)
                            for t, s in zip(teacher_states, states, strict=True)])


def _batches(teacher, tokens, heldout_tokens, batch_tokens, states) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield held-out ids (rows, context) with the teacher's last hidden states (rows, context, width)."""
    count = len(tokens.heldout)
    if heldout_tokens is not None:
        check_int("heldout_tokens", heldout_tokens, tokens.context)
        count = min(count, heldout_tokens // tokens.context)
    device = next(teacher.parameters()).device
    for ids in tokens.heldout[:count].split(max(1, batch_tokens // tokens.context)):
        ids = ids.to(device).long()
        with half_on_gpu(device):
            hidden = last_hidden(teacher, ids) if states is None else states(ids)
        yield ids, hidden


def mean_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of `values` and its standard error, nan for a single one."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return tensor.mean().item(), tensor.std().item() / len(tensor) ** 0.5 if len(tensor) > 1 else math.nan
