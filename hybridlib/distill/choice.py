"""Common sense as a multiple choice made of text: which continuation follows a prompt, by a causal LM's likelihood."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache

from hybridlib.checks import check_int

__all__ = ["ChoiceTask", "choice_probabilities", "generate_choices"]


@dataclass(frozen=True)
class ChoiceTask:
    """Questions cut from rows of text.

    Parameters
    ----------
    items : the most questions.
    choices : continuations of a question, one of them true; 2 to 64.
    length : tokens of a continuation.
    prompt : tokens before it; fewer where a row is shorter.
    """

    items: int = 200
    choices: int = 4
    length: int = 8
    prompt: int = 56

    def __post_init__(self):
        check_int("items", self.items, 2)
        check_int("choices", self.choices, 2, 64)
        check_int("length", self.length, 1)
        check_int("prompt", self.prompt, 1)


def generate_choices(rows: torch.Tensor, task: ChoiceTask, seed: int = 0) -> torch.Tensor:
    """Cut `rows`, ids (rows, context), into questions: token ids (items, choices, time), the true continuation first.

    Each row gives as many windows of prompt and continuation as it holds, of which `seed` draws; wrong continuations
    are those of other questions. Raises ValueError for rows too short or questions too few.
    """
    context = rows.shape[1]
    if context <= task.length:
        raise ValueError(f"length={task.length} leaves no prompt in rows of context={context}; use shorter ones")
    time = min(task.prompt + task.length, context)
    windows = rows[:, :context // time * time].reshape(-1, time).long()
    generator = torch.Generator().manual_seed(seed)
    windows = windows[torch.randperm(len(windows), generator=generator)[:task.items]]
    ends = windows[:, -task.length:]
    alike = (ends[:, None] == ends).all(-1)
    if len(windows) - int(alike.sum(1).max()) < task.choices - 1:
        raise ValueError(f"choices={task.choices} is too many for {len(windows)} questions, some with the same "
                         "continuation; use fewer choices or more held-out tokens")
    wrong = torch.rand(alike.shape, generator=generator).masked_fill(alike, 2.0).argsort(1)[:, :task.choices - 1]
    starts = windows[:, None, :-task.length].expand(-1, task.choices, -1)
    return torch.cat((starts, torch.cat((ends[:, None], ends[wrong]), 1)), 2)


@torch.no_grad()
def choice_probabilities(model, items: torch.Tensor, length: int, batch_tokens: int = 8192) -> torch.Tensor:
    """Softmax over each question's continuations of their summed log likelihoods, (items, choices), in float64.

    `model` is a causal LM of transformers in evaluation mode, `items` are of `generate_choices`, `length` of its task.
    A prompt is read once, then all its continuations from there; about `batch_tokens` in a batch of questions.
    """
    device, choices, parts = next(model.parameters()).device, items.shape[1], []
    for ids in items.to(device).split(max(1, batch_tokens // (items.shape[2] + (choices - 1) * length))):
        cache = DynamicCache(config=model.config)
        first = model(input_ids=ids[:, 0, :-length], use_cache=True, past_key_values=cache, logits_to_keep=1).logits
        question = torch.arange(len(ids), device=device).repeat_interleave(choices)
        cache.reorder_cache(question)  # type: ignore[arg-type]  # it names a legacy class
        ends = ids[:, :, -length:].flatten(0, 1)  # (questions x choices, length)
        rest = model(input_ids=ends, use_cache=True, past_key_values=cache).logits[:, :-1]
        nats = torch.cat((first[question], rest), 1).float().log_softmax(-1).gather(-1, ends[..., None])
        parts.append(nats.double().sum((1, 2)).view(-1, choices).softmax(-1).cpu())
    return torch.cat(parts)
