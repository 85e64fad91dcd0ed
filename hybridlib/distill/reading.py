"""Reading: items from parquet files, a text whose continuation stands in it, and how a causal LM scores on them.

A file has a row an item, with columns ``doc_id``, ``text`` (the prompt) and ``value`` (what follows). With a column
``key``, the prompt ends with the name of a field of that document; else it breaks off within a sentence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pyarrow.parquet as parquet
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybridlib.checks import check_choice, check_int
from hybridlib.distill.recall import RecallExample, encode_recall, forced_answers, marks, rows_to_write, share_of, write
from hybridlib.models.passes import evaluation_mode, measuring

__all__ = ["READING_MODES", "ReadingItem", "ReadingScore", "encode_reading", "load_reading", "reading_figures",
           "reading_files", "score_reading"]

READING_MODES = ("teacher_forced", "written")
FIELD_TOKENS, CLOZE_TOKENS = 48, 24  # that a model may write, where the file has keys and where it has none
_TAIL = 12  # characters of a prompt that tell how its value follows


@dataclass(frozen=True)
class ReadingItem:
    """A `prompt` and the `value` that follows it; a model may write `new_tokens`. `name` is for errors."""

    name: str
    prompt: str
    value: str
    new_tokens: int

    @property
    def example(self) -> RecallExample:
        """The item as an example of recall: its answer is the value, after a space unless the text has it without."""
        closed = self.prompt[-1:].isspace() or self.prompt[-_TAIL:] + self.value in self.prompt
        return RecallExample(self.prompt, (("", self.value if closed else f" {self.value}"),))


@dataclass(frozen=True)
class ReadingScore:
    """Share of items right, its binomial standard error, and which are right, in the order of the items."""

    share: float
    stderr: float
    hits: tuple[bool, ...]


def reading_files(reading: Sequence[str | Path]) -> dict[str, Path]:
    """Return {stem: path} of the parquet files that `reading` names, or that lie in folders it names.

    Raises ValueError for a name of neither, or for two files of one stem.
    """
    files: dict[str, Path] = {}
    for name in reading:
        path = Path(name).expanduser()
        part = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not part or not part[0].is_file():
            raise ValueError(f"reading names {str(name)!r}, which is neither a parquet file nor a folder with one")
        for file in part:
            if file.stem in files:
                raise ValueError(f"reading names {file.stem!r} twice; each file needs a stem of its own")
            files[file.stem] = file
    return files


def load_reading(path: str | Path, count: int = 500) -> list[ReadingItem]:
    """Load the first `count` items of a file, all if there are fewer; ValueError for a file that is not as said."""
    check_int("count", count, 1)
    try:
        table = parquet.read_table(path).slice(0, count)
    except (OSError, ValueError) as error:
        raise ValueError(f"path={str(path)!r} is not readable as parquet ({str(error).splitlines()[0]})") from None
    needed = ("doc_id", "text", "value")
    if not set(needed) <= set(table.column_names) or not len(table):
        raise ValueError(f"path={str(path)!r} has {len(table)} rows of {', '.join(table.column_names) or 'nothing'}; "
                         f"items need the columns {', '.join(needed)}")
    items, new_tokens = [], FIELD_TOKENS if "key" in table.column_names else CLOZE_TOKENS
    for i, row in enumerate(table.select(needed).to_pylist()):
        name = f"item {i} ({row['doc_id']}) of {Path(path).stem}"
        if not all(isinstance(row[column], str) and row[column].strip() for column in ("text", "value")):
            raise ValueError(f"{name} has a text or a value that is blank or no text")
        items.append(ReadingItem(name, row["text"], row["value"], new_tokens))
    return items


def encode_reading(items: Sequence[ReadingItem], tokenizer: PreTrainedTokenizerBase, config,
                   new_tokens: int | None = None) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Apply `encode_recall` to each item; ValueError if there is none, or one is beyond the context of `config`."""
    if not items:
        raise ValueError("items is empty; load_reading gives some")
    encoded = [encode_recall(item.example, tokenizer) for item in items]
    limit = getattr(config, "max_position_embeddings", None)
    for item, (ids, ((start, _),)) in zip(items, encoded, strict=True):
        longest = max(len(ids), start + (new_tokens or item.new_tokens))
        if limit is not None and longest > limit:
            raise ValueError(f"{item.name} takes {longest} tokens with what is written, but the model's context is "
                             f"{limit}; leave it out")
    return encoded


def score_reading(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[ReadingItem], *,
                  mode: str = "written", new_tokens: int | None = None, batch_size: int = 64) -> ReadingScore:
    """Score a causal LM of transformers on items, `batch_size` at a time, in the precision of its weights.

    In mode ``"written"`` the model writes up to `new_tokens` (None: each item's own) greedily, and is right if the
    first line holds the value, in upper or lower case. In mode ``"teacher_forced"`` it is right if each token of the
    value is the arg max after the true text before it. Raises ValueError as `encode_reading`.
    """
    check_choice("mode", mode, READING_MODES)
    if new_tokens is not None:
        check_int("new_tokens", new_tokens, 1)
    check_int("batch_size", batch_size, 1)
    encoded = encode_reading(items, tokenizer, model.config, new_tokens)
    order = sorted(range(len(items)), key=lambda i: len(encoded[i][0]))  # little padding
    with evaluation_mode(model):
        if mode == "teacher_forced":
            right = forced_answers(model, [encoded[i] for i in order], batch_size)[0].tolist()
        else:
            prompts = [encoded[i][0][:encoded[i][1][0][0]] for i in order]
            texts = write(model, tokenizer, prompts, new_tokens or max(item.new_tokens for item in items), batch_size)
            right = [_holds(items[i], tokenizer, text[:new_tokens or items[i].new_tokens])
                     for i, text in zip(order, texts, strict=True)]
    hits = tuple(hit for _, hit in sorted(zip(order, right, strict=True)))
    return ReadingScore(*share_of(hits), hits)


def _holds(item, tokenizer, text):
    """Whether the first line of the token ids in `text` holds the value."""
    return item.value.lower() in tokenizer.decode(text, skip_special_tokens=True).split("\n")[0].lower()


def reading_figures(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                    reading: Mapping[str, Sequence[ReadingItem]]) -> dict[str, dict]:
    """Return, for each of the files, the shares of both modes with their ``_stderr`` and ``_hits`` (ones and zeros)."""
    figures: dict[str, dict] = {stem: {} for stem in reading}
    with measuring(model):
        for (stem, items), mode in product(reading.items(), READING_MODES):
            score = score_reading(model, tokenizer, items, mode=mode, batch_size=rows_to_write(model))
            figures[stem] |= {mode: score.share, f"{mode}_stderr": score.stderr, f"{mode}_hits": marks(score.hits)}
    return figures
