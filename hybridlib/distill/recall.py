"""In-context recall: tasks generated from a seed, or loaded, and how a causal LM scores on them.

Four families, each a few lines of plain text that any tokenizer can read, with knobs for difficulty:

=================  ==========================================================  =====================
name               the prompt                                                  the question
=================  ==========================================================  =====================
key_value          a phone book, one ``name: number`` a line                   a name's number
needle             ``The code of name is number.`` among filler sentences      a name's code
multi_hop          aliases ``name is other.`` that end in a number             the number behind a name
variable_tracking  assignments ``set name = number`` and ``set name = other``  every name with a value
=================  ==========================================================  =====================

Names are two common words ("quiet river"), so that most tokenizers give them few tokens. The families follow
associative recall (MQAR, arXiv 2312.04927) and RULER (arXiv 2404.06654: multi-key needle, variable tracking); the
texts are our own. Names and numbers are drawn at random. Each (name, number) pair belongs to the ``train`` or to the
``heldout`` split by a checksum, so a model trained on one has never seen a pair of the other.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybridlib.checks import check_choice, check_int
from hybridlib.models.passes import evaluation_mode

__all__ = ["RECALL_TASKS", "RecallExample", "RecallScore", "RecallTask", "encode_all", "encode_recall", "exact_match",
           "generate_recall", "judge", "load_recall", "pad_left", "recall_logits", "score_recall"]

RECALL_TASKS = ("key_value", "needle", "multi_hop", "variable_tracking")
HELDOUT_SHARE = 8  # one (name, number) pair in so many belongs to the heldout split

_FIRST = ("amber big black blue bold brave bright brown calm clean clear cold cool dark deep dry early empty "
          "fair fast fine fresh full gold good grand great green grey hard high hot iron kind large late "
          "light little long low narrow new old open pale plain proud quick quiet red rich round royal rough "
          "sharp short silver slow small soft steep still strong sweet tall thin true warm white wide wild "
          "wise wooden young").split()
_SECOND = ("arm bank bear bell bird boat bone book box bridge camp castle cave chair church city cloud coast "
           "corn cow crown dog door dream dress eagle engine farm field fire fish flag flower fly forest fox "
           "garden gate glass gun hall hand harbor hat hill horse house island key king knife lake lamp land "
           "leaf lion map market mill moon mountain mouse night ocean paper path pen plant pool port queen "
           "rain ring river road rock roof room rose sea ship shop sky snake snow star station stone storm "
           "street sun table tower town train tree valley village wall watch water wheel wind window wing wolf "
           "wood yard").split()
_SUBJECTS = ("The miller", "A young clerk", "The captain", "Her neighbour", "The old teacher", "A tired rider")
_VERBS = ("walked past", "wrote about", "looked for", "paid for", "spoke of", "waited near")
_OBJECTS = ("the river", "a stone bridge", "the winter market", "an empty house", "the north road", "a small boat")
_ENDS = ("in the morning", "before the rain", "without a word", "for many years", "once again", "after the harvest")


@dataclass(frozen=True)
class RecallTask:
    """A family of examples and its difficulty.

    Parameters
    ----------
    name : one of `RECALL_TASKS`.
    pairs : facts with a number in the prompt (chains, for the last two families); 2 to 512.
    queries : questions after the prompt, each on another fact; 1 to `pairs`.
    hops : links from a question's name to its number, 1 to 8; 1 for ``key_value`` and ``needle``.
    digits : digits of a number, 1 to 12.
    filler : filler sentences before each fact, 0 to 64.
    split : ``"heldout"`` or ``"train"``; no (name, number) pair is in both.
    """

    name: str = "key_value"
    pairs: int = 16
    queries: int = 1
    hops: int = 1
    digits: int = 3
    filler: int = 0
    split: str = "heldout"

    def __post_init__(self):
        check_choice("name", self.name, RECALL_TASKS)
        check_choice("split", self.split, ("train", "heldout"))
        check_int("pairs", self.pairs, 2, 512)
        check_int("queries", self.queries, 1, self.pairs)
        check_int("hops", self.hops, 1, 1 if self.name in ("key_value", "needle") else 8)
        check_int("digits", self.digits, 1, 12)
        check_int("filler", self.filler, 0, 64)


@dataclass(frozen=True)
class RecallExample:
    """One prompt and its turns, each a (question, answer) of which the model must write the answer.

    Greedy generation must match the whole answer if `exact`, else hold it in its first line, whatever its case.
    """

    prompt: str
    turns: tuple[tuple[str, str], ...]
    exact: bool = True

    @property
    def text(self) -> str:
        return self.prompt + "".join(q + a for q, a in self.turns)


@dataclass(frozen=True)
class RecallScore:
    """Share of answers right, with its binomial standard error, and the share of answer tokens right."""

    exact_match: float
    stderr: float
    token_accuracy: float
    answers: int


def generate_recall(task: RecallTask, num_examples: int, seed: int = 0) -> list[RecallExample]:
    """Generate `num_examples` examples of `task`; the same seed gives the same examples on every machine."""
    check_int("num_examples", num_examples, 1)
    rng = random.Random(f"{task}-{seed}")
    return [_GENERATORS[task.name](task, rng) for _ in range(num_examples)]


def load_recall(path: str | Path, limit: int | None = None) -> list[RecallExample]:
    """Load a recall set: a parquet or jsonl file with text columns ``text`` (the prompt) and ``value``.

    A model continues the text and is right if `value` is in its first line, whatever its case (the scoring of SWDE,
    FDA and SQuAD in arXiv 2402.18668). Raises ValueError if the file or a column is missing.
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path={str(path)!r} is no file; name a .parquet or .jsonl file with columns text and value")
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_json(path, lines=True)
    missing = {"text", "value"} - set(table.columns)
    if missing:
        raise ValueError(f"{path.name} has no column {sorted(missing)[0]!r}; it needs columns text and value")
    rows = table if limit is None else table.head(limit)
    return [RecallExample(p, (("", " " + v.strip()),), exact=False) for p, v in zip(rows["text"], rows["value"])]


def encode_recall(example: RecallExample, tokenizer: PreTrainedTokenizerBase
                  ) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the token ids of an example and, for each answer, its (start, end) in them.

    Prompt, questions and answers are tokenized apart, so that an answer's tokens never merge with its question's.
    A beginning-of-text token comes first if the tokenizer has one.
    """
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    spans = []
    ids += _ids(tokenizer, example.prompt)
    for question, answer in example.turns:
        ids += _ids(tokenizer, question)
        start = len(ids)
        ids += _ids(tokenizer, answer)
        spans.append((start, len(ids)))
    return ids, spans


@torch.no_grad()
def score_recall(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[RecallExample], *,
                 mode: str = "teacher_forced", batch_size: int = 16) -> RecallScore:
    """Score a causal LM of transformers on recall.

    Parameters
    ----------
    model : maps ``input_ids`` (batch, time) and ``attention_mask`` to ``.logits`` (batch, time, vocab).
    mode : ``"teacher_forced"``, an answer counts if every one of its tokens is the arg max after the true text before
        it; or ``"greedy"``, the model writes the first answer itself, token by token.
    batch_size : examples at a time; shorter ones are padded on the left.

    Raises
    ------
    ValueError : unknown mode, no examples, or an example longer than the model's context.
    """
    check_choice("mode", mode, ("teacher_forced", "greedy"))
    encoded = encode_all(examples, tokenizer, model.config)
    score, answers = _teacher_forced if mode == "teacher_forced" else _greedy, []
    with evaluation_mode(model):
        for i in range(0, len(encoded), batch_size):
            answers += score(model, tokenizer, examples[i:i + batch_size], encoded[i:i + batch_size])
    right, hits, counts = zip(*answers)
    return RecallScore(*exact_match(right), sum(hits) / sum(counts), len(right))


def encode_all(examples: list[RecallExample], tokenizer: PreTrainedTokenizerBase, config
               ) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Apply `encode_recall` to each example; ValueError if there is none or one is beyond the context of `config`."""
    if not examples:
        raise ValueError("examples is empty; generate_recall or load_recall makes some")
    encoded = [encode_recall(e, tokenizer) for e in examples]
    longest, limit = max(len(ids) for ids, _ in encoded), getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(f"an example has {longest} tokens, but the model's context is {limit}; "
                         "use fewer pairs or filler")
    return encoded


def exact_match(right: Sequence[bool]) -> tuple[float, float]:
    """Return the share of answers that are right, and its binomial standard error."""
    p = sum(right) / len(right)
    return p, (p * (1 - p) / len(right)) ** 0.5


def _teacher_forced(model, tokenizer, examples, encoded):
    input_ids, mask, shift = pad_left([ids for ids, _ in encoded], tokenizer, next(model.parameters()).device)
    return judge(recall_logits(model, input_ids, mask).argmax(-1), input_ids, shift, encoded)


def judge(predicted: torch.Tensor, input_ids: torch.Tensor, shift: list[int], encoded
          ) -> Iterator[tuple[bool, int, int]]:
    """Yield for each answer of padded examples whether it is right, its right tokens, and all its tokens.

    `predicted`, `input_ids` : (batch, time), the likeliest next token and the true one; `shift` : padding of each row.
    """
    for row, (_, spans) in enumerate(encoded):
        for start, end in spans:
            start, end = start + shift[row], end + shift[row]
            hits = int((predicted[row, start - 1:end - 1] == input_ids[row, start:end]).sum())
            yield hits == end - start, hits, end - start


def _greedy(model, tokenizer, examples, encoded):
    device = next(model.parameters()).device
    starts = [spans[0][0] for _, spans in encoded]
    gold = [ids[spans[0][0]:spans[0][1]] for ids, spans in encoded]
    input_ids, mask, _ = pad_left([ids[:s] for (ids, _), s in zip(encoded, starts)], tokenizer, device)
    room = max(map(len, gold)) + (0 if examples[0].exact else 16)
    out = model.generate(input_ids=input_ids, attention_mask=mask, max_new_tokens=room, do_sample=False,
                         pad_token_id=_pad_id(tokenizer))[:, input_ids.shape[1]:].tolist()
    for example, answer, written in zip(examples, gold, out):
        hits = sum(a == b for a, b in zip(answer, written))
        if example.exact:
            exact = written[:len(answer)] == answer
        else:
            lines = tokenizer.decode(written, skip_special_tokens=True).strip().splitlines()
            exact = bool(lines) and example.turns[0][1].strip().lower() in lines[0].lower()
        yield exact, hits, len(answer)


def recall_logits(model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the logits (batch, time, vocab) of rows padded on the left, where `mask` is 0."""
    if bool(mask.all()):
        return model(input_ids=input_ids).logits
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=input_ids, attention_mask=mask, position_ids=positions).logits


def _pad_id(tokenizer):
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, 0) if i is not None)


def pad_left(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, device: torch.device
             ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Return rows as ids (rows, width) and mask (rows, width) of the longest's width, and the padding of each."""
    ids, mask = (pad_sequence(list(map(torch.tensor, parts)), batch_first=True, padding_value=value,
                              padding_side="left").to(device)
                 for parts, value in ((rows, _pad_id(tokenizer)), ([[1] * len(r) for r in rows], 0)))
    return ids, mask, [ids.shape[1] - len(r) for r in rows]


def _ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _names(rng, count):
    """Draw `count` different names of two words; the second words differ too while there are enough of them."""
    seconds = [word for i in range(-(-count // len(_SECOND))) for word in rng.sample(_SECOND, len(_SECOND))][:count]
    names = []
    for second in seconds:
        name = f"{rng.choice(_FIRST)} {second}"
        while name in names:
            name = f"{rng.choice(_FIRST)} {second}"
        names.append(name)
    return names


def _is_heldout(name, number):
    return zlib.crc32(f"{name}={number}".encode()) % HELDOUT_SHARE == 0


def _number(rng, name, task, taken):
    for _ in range(10_000):
        number = str(rng.randrange(10 ** task.digits)).zfill(task.digits)
        if number not in taken and _is_heldout(name, number) == (task.split == "heldout"):
            taken.add(number)
            return number
    raise ValueError(f"digits={task.digits} is too few for pairs={task.pairs} different numbers; use more digits")


def _filler(rng, task):
    sentences = (f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)} {rng.choice(_ENDS)}."
                 for _ in range(task.filler))
    return "".join(s + "\n" for s in sentences)


def _facts(rng, task):
    taken: set[str] = set()
    return [(name, _number(rng, name, task, taken)) for name in _names(rng, task.pairs)]


def _key_value(task, rng):
    facts = _facts(rng, task)
    prompt = "Phone book:\n" + "".join(f"{_filler(rng, task)}{k}: {v}\n" for k, v in facts) + "\nLook up:"
    return RecallExample(prompt, tuple((f"\n{k}:", f" {v}") for k, v in rng.sample(facts, task.queries)))


def _needle(task, rng):
    facts = _facts(rng, task)
    prompt = "".join(f"{_filler(rng, task)}The code of {k} is {v}.\n" for k, v in facts)
    prompt += _filler(rng, task) + "\nLook up:"
    return RecallExample(prompt, tuple((f"\nThe code of {k} is", f" {v}") for k, v in rng.sample(facts, task.queries)))


def _chains(rng, task):
    """Draw (names of each chain, its number); the last name of a chain holds the number."""
    taken: set[str] = set()
    names = _names(rng, task.pairs * task.hops)
    chains = [names[i * task.hops:(i + 1) * task.hops] for i in range(task.pairs)]
    return [(chain, _number(rng, chain[-1], task, taken)) for chain in chains]


def _multi_hop(task, rng):
    chains = _chains(rng, task)
    lines = [f"{a} is {b}.\n" for chain, _ in chains for a, b in zip(chain, chain[1:])]
    lines += [f"{chain[-1]} has {v}.\n" for chain, v in chains]
    rng.shuffle(lines)
    prompt = "Who has what:\n" + "".join(_filler(rng, task) + line for line in lines) + "\nLook up:"
    return RecallExample(prompt, tuple((f"\n{c[0]} gets", f" {v}") for c, v in rng.sample(chains, task.queries)))


def _variable_tracking(task, rng):
    chains = _chains(rng, task)
    lines = [[f"set {chain[0]} = {v}\n", *(f"set {b} = {a}\n" for a, b in zip(chain, chain[1:]))]
             for chain, v in chains]
    order = [i for i, chain in enumerate(lines) for _ in chain]
    rng.shuffle(order)  # chains are interleaved; within a chain, a name is set before it is used
    prompt = "Program:\n" + "".join(_filler(rng, task) + lines[i].pop(0) for i in order) + "\nAll names that equal"
    return RecallExample(prompt, tuple((f"\n{v}:", "".join(f" {n}" for n in chain))
                                       for chain, v in rng.sample(chains, task.queries)))


_GENERATORS = {"key_value": _key_value, "needle": _needle, "multi_hop": _multi_hop,
               "variable_tracking": _variable_tracking}
