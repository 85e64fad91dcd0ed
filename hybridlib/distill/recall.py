"""In-context recall: tasks generated from a seed, and how a causal LM scores on them.

=================  ==========================================================  ==============================
name               the prompt                                                  the question
=================  ==========================================================  ==============================
key_value          a phone book, one ``name: number`` a line                   a name's number
needle             ``The code of name is number.`` among filler sentences      a name's code
multi_hop          aliases ``name is other.`` that end in a number             the number behind a name
variable_tracking  assignments ``set name = number`` and ``set name = other``  every name with a value
lookup_sum         ``name has number.`` a line                                 the sum of three names' numbers
=================  ==========================================================  ==============================

The families follow associative recall (MQAR, arXiv 2312.04927) and RULER (arXiv 2404.06654: multi-key needle, variable
tracking); ``lookup_sum`` follows the question of arXiv 2512.20569. Names are two common words ("quiet river"). Each
(name, number) pair belongs to the ``train`` or to the ``heldout`` split by a checksum, so a model trained on one has
never seen a pair of the other.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybridlib.checks import check_choice, check_int
from hybridlib.models.passes import evaluation_mode, last_hidden

__all__ = ["JUDGING_FAMILIES", "RecallExample", "RecallScore", "RecallTask", "TRAINING_FAMILIES", "encode_all",
           "encode_recall", "forced_answers", "generate_recall", "marks", "recall_of_members", "rows_to_write",
           "score_recall", "share_of", "write"]

JUDGING_FAMILIES = ("key_value",)  #: on which hybrids are judged, so that no selector may choose by them
TRAINING_FAMILIES = ("needle", "multi_hop", "variable_tracking")  #: on which selectors may train
ADDENDS = 3  # in a sum
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
    """A family of examples, by its `name` in the module's table, and its difficulty.

    Parameters
    ----------
    pairs : facts with a number in the prompt (chains, in ``multi_hop`` and ``variable_tracking``); 2 to 512.
    queries : questions after the prompt, each on other facts; 1 to `pairs`, or a third of that in ``lookup_sum``.
    hops : links from a question's name to its number, 1 to 8 in ``multi_hop`` and ``variable_tracking``, else 1.
    digits : digits of a number, 1 to 12.
    filler : filler sentences before each fact, 0 to 64.
    split : ``"heldout"`` or ``"train"``.
    """

    name: str = "key_value"
    pairs: int = 16
    queries: int = 1
    hops: int = 1
    digits: int = 3
    filler: int = 0
    split: str = "heldout"

    def __post_init__(self):
        check_choice("name", self.name, _GENERATORS)
        check_choice("split", self.split, ("train", "heldout"))
        names = ADDENDS if self.name == "lookup_sum" else 1  # in a question
        check_int("pairs", self.pairs, max(2, names), 512)
        check_int("queries", self.queries, 1, self.pairs // names)
        check_int("hops", self.hops, 1, 8 if self.name in ("multi_hop", "variable_tracking") else 1)
        check_int("digits", self.digits, 1, 12)
        check_int("filler", self.filler, 0, 64)


@dataclass(frozen=True)
class RecallExample:
    """One prompt and its turns, each a (question, answer) of which the model must write the answer."""

    prompt: str
    turns: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        return self.prompt + "".join(q + a for q, a in self.turns)


@dataclass(frozen=True)
class RecallScore:
    """Share of answers right, with its binomial standard error, their number, and which are right."""

    exact_match: float
    stderr: float
    answers: int
    hits: tuple[bool, ...] = ()


def generate_recall(task: RecallTask, num_examples: int, seed: int = 0) -> list[RecallExample]:
    """Generate `num_examples` examples of `task`; the same seed gives the same examples on every machine."""
    check_int("num_examples", num_examples, 1)
    rng = random.Random(f"{task}-{seed}")
    return [_GENERATORS[task.name](task, rng) for _ in range(num_examples)]


def encode_recall(example: RecallExample, tokenizer: PreTrainedTokenizerBase
                  ) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the token ids of an example and, for each answer, its (start, end) in them.

    Prompt, questions and answers are tokenized apart, so that an answer's tokens never merge with its question's.
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


def score_recall(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[RecallExample], *,
                 mode: str = "teacher_forced", batch_size: int = 16) -> RecallScore:
    """Score a causal LM of transformers on recall, `batch_size` examples at a time.

    In mode ``"teacher_forced"`` an answer is right if each of its tokens is the arg max after the true text before it;
    in mode ``"greedy"`` the model writes the first answer of each example itself, token by token. Raises ValueError if
    there are no examples, or one is longer than the model's context.
    """
    check_choice("mode", mode, ("teacher_forced", "greedy"))
    encoded = encode_all(examples, tokenizer, model.config)
    with evaluation_mode(model):
        hits = (_written(model, tokenizer, encoded, batch_size) if mode == "greedy"
                else recall_of_members(model, tokenizer, encoded, batch_size)[0])
    return RecallScore(*share_of(hits), len(hits), tuple(hits))


def encode_all(examples: list[RecallExample], tokenizer: PreTrainedTokenizerBase, config
               ) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Apply `encode_recall` to each example; ValueError if there is none or one is beyond the context of `config`."""
    if not examples:
        raise ValueError("examples is empty; generate_recall makes some")
    encoded = [encode_recall(e, tokenizer) for e in examples]
    longest, limit = max(len(ids) for ids, _ in encoded), getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(f"an example has {longest} tokens, but the model's context is {limit}; "
                         "use fewer pairs or filler")
    return encoded


@torch.no_grad()
def recall_of_members(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, encoded, batch_size: int,
                      members: int = 1) -> list[list[bool]]:
    """Return which answers of each member are right.

    `encoded` is of `encode_all`. A `model` of several members gets each batch once for each, one after the other.
    """
    device = next(model.parameters()).device
    right: list[list[bool]] = [[] for _ in range(members)]
    for i in range(0, len(encoded), batch_size):
        part = encoded[i:i + batch_size]
        ids, mask = _pad_left([ids for ids, _ in part], tokenizer, device)
        predicted = _logits(model, ids.repeat(members, 1), mask.repeat(members, 1)).argmax(-1).cpu()
        ids = ids.cpu()  # at once: a number at a time would wait for the GPU as often
        for answers, own in zip(right, predicted.unflatten(0, (members, -1)), strict=True):
            for true, likeliest, (row, spans) in zip(ids, own, part, strict=True):
                shift = len(true) - len(row)
                answers += [torch.equal(likeliest[start + shift - 1:end + shift - 1], true[start + shift:end + shift])
                            for start, end in spans]
    return right


def _written(model, tokenizer, encoded, batch_size):
    """Whether the model writes the first answer of each example."""
    answers = [row[slice(*spans[0])] for row, spans in encoded]
    texts = write(model, tokenizer, [row[:spans[0][0]] for row, spans in encoded], max(map(len, answers)), batch_size)
    return [text[:len(answer)] == answer for text, answer in zip(texts, answers, strict=True)]


@torch.no_grad()
def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], new_tokens: int,
          batch_size: int) -> list[list[int]]:
    """Return the token ids, up to `new_tokens`, that a model writes greedily behind each of `prompts`, ids too."""
    device, texts, generate = next(model.parameters()).device, [], cast(Callable, model.generate)
    for i in range(0, len(prompts), batch_size):
        ids, mask = _pad_left(prompts[i:i + batch_size], tokenizer, device)
        texts += generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False,
                          pad_token_id=_pad_id(tokenizer))[:, ids.shape[1]:].tolist()
    return texts


def rows_to_write(model: torch.nn.Module) -> int:
    """Return how many prompts a model writes behind at once: more on a GPU, where a step takes as long for many."""
    return 512 if next(model.parameters()).is_cuda else 64


@torch.no_grad()
def forced_answers(model: PreTrainedModel, encoded, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether each answer's tokens are all the arg max, given the true text before it, and its log likelihood.

    Both are (answers,), the latter in nats a token. `encoded` is of `encode_recall`. Logits are made of answers alone.
    """
    device, right, likelihood = next(model.parameters()).device, [], []
    for i in range(0, len(encoded), batch_size):
        batch = encoded[i:i + batch_size]
        ids = pad_sequence([torch.tensor(row) for row, _ in batch], batch_first=True).to(device)
        hidden = last_hidden(model, ids)  # padding stands on the right, where a causal model does not look
        for row, states, (_, spans) in zip(ids, hidden, batch, strict=True):
            for start, end in spans:
                logits = model.lm_head(states[start - 1:end - 1]).float()
                right.append((logits.argmax(-1) == row[start:end]).all())
                likelihood.append(-cross_entropy(logits, row[start:end]))
    return torch.stack(right), torch.stack(likelihood)


def share_of(hits: Sequence[bool]) -> tuple[float, float]:
    """Return the share of answers that are right, and its binomial standard error."""
    p = sum(hits) / len(hits)
    return p, (p * (1 - p) / len(hits)) ** 0.5


def marks(hits: Sequence[bool]) -> str:
    """Return which answers are right as a record has it: ones and zeros, an answer each."""
    return "".join(str(int(hit)) for hit in hits)


def _pad_id(tokenizer):
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, 0)
    return next(i for i in ids if i is not None)


def _pad_left(rows, tokenizer, device):
    """Return rows as ids (rows, width) and mask (rows, width), of the longest's width."""
    return (pad_sequence(list(map(torch.tensor, parts)), batch_first=True, padding_value=value,
                         padding_side="left").to(device)
            for parts, value in ((rows, _pad_id(tokenizer)), ([[1] * len(row) for row in rows], 0)))


def _logits(model, ids, mask):
    """The logits (batch, time, vocab) of rows padded on the left, where `mask` is 0."""
    if bool(mask.all()):
        return model(input_ids=ids).logits
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits


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


def _key_value(task, rng):
    facts = _chains(rng, task)
    prompt = "Phone book:\n" + "".join(f"{_filler(rng, task)}{k}: {v}\n" for (k,), v in facts) + "\nLook up:"
    return RecallExample(prompt, tuple((f"\n{k}:", f" {v}") for (k,), v in rng.sample(facts, task.queries)))


def _needle(task, rng):
    facts = _chains(rng, task)
    prompt = "".join(f"{_filler(rng, task)}The code of {k} is {v}.\n" for (k,), v in facts)
    prompt += _filler(rng, task) + "\nLook up:"
    turns = ((f"\nThe code of {k} is", f" {v}") for (k,), v in rng.sample(facts, task.queries))
    return RecallExample(prompt, tuple(turns))


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


def _lookup_sum(task, rng):
    facts: dict[str, int] = {}
    for name in _names(rng, task.pairs):
        number = None
        while number is None or name in facts or _is_heldout(name, number) != (task.split == "heldout"):
            name, number = f"{rng.choice(_FIRST)} {name.split()[1]}", rng.randrange(10 ** task.digits)
        facts[name] = number
    prompt = "".join(f"{_filler(rng, task)}{k} has {v}.\n" for k, v in facts.items()) + "\nAdd up:"
    asked = rng.sample(list(facts), ADDENDS * task.queries)
    return RecallExample(prompt, tuple((f"\n{a}, {b} and {c} have", f" {facts[a] + facts[b] + facts[c]}.")
                                       for a, b, c in zip(*(asked[i::ADDENDS] for i in range(ADDENDS)))))


_GENERATORS = {"key_value": _key_value, "needle": _needle, "multi_hop": _multi_hop,
               "variable_tracking": _variable_tracking, "lookup_sum": _lookup_sum}
