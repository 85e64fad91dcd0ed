"""Corpora: where tokens come from, packed to a context, in a seeded order.

==========================  ==========================================================================================
source                      meaning
==========================  ==========================================================================================
``"lab"``                   the corpus that ships with the project, ``data/corpus``
a folder or a file          ``.parquet`` or ``.jsonl`` with a column ``text``; in a folder, files whose name starts with
                            ``heldout`` are held out
``"owner/name"``            a data set of the Hugging Face hub, split ``train``, streamed; ``"hub:owner/name:config"``
                            where it needs a configuration
==========================  ==========================================================================================

Where no file is named ``heldout``, one document in 50 is held out, by a checksum of its text. No held-out text is ever
a training document.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hybridlib.checks import check_int
from hybridlib.distill.recall import TRAINING_FAMILIES, RecallTask, encode_recall, generate_recall
from hybridlib.records.folders import data_folder, sha256_of

__all__ = ["Tokens", "is_heldout_text", "load_tokens", "recall_tokens"]

HELDOUT_SHARE = 50  # one document in so many is held out, where the source does not say which
HELDOUT_TOKENS = 131_072
HUB_TOKENS = 20_000_000
KINDS = (".parquet", ".jsonl")
MOST_DRAWS = 1_000  # of prompts for a row
LINE_TOKENS = 12  # of a recall prompt, about
BATCH_CHARACTERS = 500_000  # of text that is tokenized at a time
_LOCAL = "a folder or file of .parquet or .jsonl text"


class Tokens:
    """Packed token ids of a corpus: documents, each with a token behind it that begins the next, cut into rows.

    That is the tokenizer's beginning-of-text token, or its end-of-text token where it has no other.

    `train` and `heldout` are int32 token ids (rows, context), in the order of the source; the rest as in `load_tokens`.
    """

    def __init__(self, train: torch.Tensor, heldout: torch.Tensor, tokenizer: PreTrainedTokenizerBase | None = None,
                 source: str = "", seed: int = 0):
        self.train, self.heldout, self.context = train.to(torch.int32), heldout.to(torch.int32), train.shape[1]
        self.tokenizer, self.source, self.seed = tokenizer, source, seed
        self._orders: dict[int, np.ndarray] = {}

    def __repr__(self) -> str:
        return (f"Tokens(source={self.source!r}, context={self.context}, seed={self.seed}, "
                f"train={self.train.numel():,} tokens, heldout={self.heldout.numel():,} tokens)")

    def rows(self, position: int, count: int) -> torch.Tensor:
        """Return rows of the endless training order, int64 (count, context), each epoch permuted by (seed, epoch)."""
        check_int("position", position, 0)
        check_int("count", count, 1)
        parts = []
        while count:
            epoch, start = divmod(position, len(self.train))
            parts.append(self._order(epoch)[start:start + count])
            position, count = position + len(parts[-1]), count - len(parts[-1])
        return self.train[torch.from_numpy(np.concatenate(parts))].long()

    def _order(self, epoch):
        if epoch not in self._orders:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.train))
            self._orders = dict([*self._orders.items(), (epoch, order)][-2:])
        return self._orders[epoch]

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256, in hex, over every row, the context and the seed."""
        digest = hashlib.sha256(json.dumps([self.context, self.seed, len(self.train), len(self.heldout)]).encode())
        for part in (self.train, self.heldout):
            digest.update(part.contiguous().numpy().astype("<i4", copy=False).data)
        return digest.hexdigest()


def load_tokens(source: str | Path = "lab", tokenizer: PreTrainedTokenizerBase | None = None, context: int = 512,
                seed: int = 0, *, max_tokens: int | None = None, heldout_tokens: int | None = None) -> Tokens:
    """Read, tokenize and pack a corpus.

    Parameters
    ----------
    source : ``"lab"``, a local folder or file, or a data set of the hub (see the module).
    context : tokens in a row.
    max_tokens : the most training tokens; all if None (20,000,000 from the hub). It does not change the held-out rows.
    heldout_tokens : the most held-out tokens; 131,072 if None.

    Raises ValueError for a source that cannot be read, has no column ``text``, or has too little text for one row of
    either kind.
    """
    check_int("context", context, 2)
    check_int("seed", seed, 0)
    _checked(tokenizer)
    for name, value in (("max_tokens", max_tokens), ("heldout_tokens", heldout_tokens)):
        if value is not None:
            check_int(name, value, context)
    name, documents, limit, apart = _open(str(source))
    most = {False: max_tokens or limit, True: max(heldout_tokens or HELDOUT_TOKENS, context)}
    parts, sizes = _tokenize(documents, tokenizer, most, apart)
    for kind, size in (("training", sizes[False]), ("held-out", sizes[True])):
        if size < context:
            raise ValueError(f"source={name!r} has {size} {kind} tokens, fewer than one context of {context}; "
                             "bring more text, a shorter context or a file whose name starts with heldout")
    train, heldout = (_pack(parts[h], context, most[h]) for h in (False, True))
    return Tokens(train, heldout, tokenizer, name, seed)


def recall_tokens(tokenizer: PreTrainedTokenizerBase, context: int, num_tokens: int, seed: int = 0) -> Tokens:
    """Generate rows of recall prompts with their answers to train on, none of them held out.

    A row is filled with whole prompts, and then with the beginning of one more. They are of `TRAINING_FAMILIES`, which
    `Tokens.source` names, of the train split, with 2 to 16 pairs, chains of 2 links, 1 or 2 questions, and 0 to 4
    filler sentences before each fact. Raises ValueError for a context that no prompt fits.
    """
    check_int("context", context, 2)
    check_int("num_tokens", num_tokens, context)
    end, rng, rows = _end(_checked(tokenizer)), random.Random(f"recall-{seed}"), []
    for _ in range(num_tokens // context):
        row: list[int] = []
        for _ in range(MOST_DRAWS):
            family, filler = rng.choice(TRAINING_FAMILIES), rng.randint(0, min(4, context // 64))
            hops = 1 if family == "needle" else 2
            most = max(2, min(16, context // (LINE_TOKENS * hops * (1 + filler))))
            task = RecallTask(family, rng.randint(2, most), rng.randint(1, 2), hops, filler=filler, split="train")
            ids, _ = encode_recall(generate_recall(task, 1, rng.getrandbits(60))[0], tokenizer)
            if row or len(ids) < context:
                row += ids if ids[0] == end else [*ids, end]
            if len(row) >= context:
                break
        else:
            raise ValueError(f"context={context} is too short for a recall prompt; use a longer one")
        rows.append(row[:context])
    train = torch.tensor(rows)
    return Tokens(train, train[:0], tokenizer, f"recall: {', '.join(TRAINING_FAMILIES)}", seed)


def is_heldout_text(text: str) -> bool:
    """Tell whether a document is held out where its source does not say."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % HELDOUT_SHARE == 0


def _checked(tokenizer):
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise ValueError(f"tokenizer={tokenizer!r} is no tokenizer; pass a teacher's: load_teacher('lab').tokenizer")
    if _end(tokenizer) is None:
        raise ValueError("tokenizer has neither an end-of-text nor a beginning-of-text token to put between documents")
    return tokenizer


def _end(tokenizer):
    """The token between documents: it begins the next one or, for a tokenizer without such a token, ends the last."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _tokenize(documents, tokenizer, most, apart):
    """Return token arrays and sizes by kind (held out or not), `most` of each; `apart`: held-out documents first."""
    parts: dict[bool, list[np.ndarray]] = {False: [], True: []}
    sizes, end, dtype = {False: 0, True: 0}, _end(tokenizer), np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    heldout_keys = set()  # checksums of held-out texts, which may not come again as training text
    with tqdm(total=most[False], unit="tok", unit_scale=True, delay=5, desc="tokenizing") as bar:
        for batch in _batches(documents, min(BATCH_CHARACTERS, 4 * (most[False] or BATCH_CHARACTERS))):
            texts = []
            for text, heldout in batch:
                key = hashlib.sha1(text.encode("utf-8", "surrogatepass")).digest()
                if heldout:
                    heldout_keys.add(key)
                if (heldout or key not in heldout_keys) and (most[heldout] is None or sizes[heldout] < most[heldout]):
                    texts.append((text, heldout))
            encoded = tokenizer([t for t, _ in texts], add_special_tokens=False, return_attention_mask=False,
                                return_token_type_ids=False, verbose=False)["input_ids"] if texts else []
            for (_, heldout), ids in zip(texts, encoded):
                if most[heldout] is None or sizes[heldout] < most[heldout]:
                    parts[heldout].append(np.array([*ids, end], dtype=dtype))
                    sizes[heldout] += len(ids) + 1
                    bar.update(0 if heldout else len(ids) + 1)
            if most[False] is not None and sizes[False] >= most[False] and (apart or sizes[True] >= most[True]):
                break
    return parts, sizes


def _batches(documents, characters):
    batch, size = [], 0
    for text, heldout in documents:
        batch.append((text, heldout))
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pack(parts, context, most):
    stream = np.concatenate(parts)[:most]
    return torch.from_numpy(stream[:len(stream) // context * context].astype(np.int32)).view(-1, context)


def _open(source):
    """Return a source's name, its (text, heldout) documents, its cap on training tokens, if held-out ones are first."""
    path = Path(source).expanduser()
    if source == "lab":
        return source, _lab(), None, True
    if source and path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in KINDS and f.is_file())
        if not files:
            raise ValueError(f"source={source!r} holds no .parquet or .jsonl file; name {_LOCAL}")
        marked = {f for f in files if f.name.startswith("heldout")}
        return source, _read(files, marked), None, bool(marked)
    if path.is_file():
        if path.suffix not in KINDS:
            raise ValueError(f"source={source!r} is neither a .parquet nor a .jsonl file; name {_LOCAL}")
        return source, _read([path], set()), None, False
    hub = source.removeprefix("hub:")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?", hub) and path.suffix not in KINDS:
        return source, _hub(source, *hub.split(":")), HUB_TOKENS, False
    if source.startswith("hub:"):
        raise ValueError(f"source={source!r} is no hub data set; write 'hub:owner/name' or 'hub:owner/name:config'")
    raise ValueError(f"source={source!r} is no corpus; choose 'lab', {_LOCAL}, or a hub data set 'owner/name'")


def _lab():
    file = data_folder("corpus") / "lab.parquet"
    manifest = file.with_name("manifest.json")
    try:
        expected = json.loads(manifest.read_text(encoding="utf-8"))["files"][file.name]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"source='lab' needs {manifest}, which is missing or unreadable") from None
    if not file.is_file() or sha256_of(file) != expected:
        raise ValueError(f"source='lab' needs {file} with the sha256 of its manifest; put it back or make it again")
    rows = [(text, split == "heldout") for text, split in _columns(file, "text", "split")]
    return iter(sorted(rows, key=lambda row: not row[1]))  # a stable sort


def _read(files, marked) -> Iterator[tuple[str, bool]]:
    """Return the (text, heldout) documents of `files`, those of `marked` (held out) first; columns are checked now."""
    for file in files:
        if file.suffix == ".parquet":
            with _readable(file, "parquet"):
                names = parquet.read_schema(file).names
            if "text" not in names:
                raise ValueError(f"{file} has no column 'text', only {', '.join(map(repr, names)) or 'none at all'}")
    return _documents(sorted(files, key=lambda file: file not in marked), marked)


def _documents(files, marked):
    for file in files:
        for (text,) in _columns(file, "text") if file.suffix == ".parquet" else _lines(file):
            if text is None or text == "":
                continue
            if not isinstance(text, str):
                raise ValueError(f"{file} has a 'text' of type {type(text).__name__}; every text must be a string")
            yield text, file in marked if marked else is_heldout_text(text)


def _columns(file, *names):
    with _readable(file, "parquet"):
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=256, columns=list(names)):
            yield from zip(*(batch.column(n).to_pylist() for n in names))


def _lines(file):
    with _readable(file, "JSON lines of UTF-8 text"), open(file, encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict) or "text" not in row:
                    raise ValueError(f"no field 'text' in line {number}")
                yield (row["text"],)


@contextlib.contextmanager
def _readable(file, kind):
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not readable as {kind} ({_first_line(error)})") from None


def _hub(source, name, config=None):
    """Stream (text, heldout) from a data set of the hub; ValueError at once if it cannot be reached."""
    from datasets import load_dataset
    from huggingface_hub import HfApi

    try:
        revision = HfApi().dataset_info(name, timeout=10).sha
        stream = load_dataset(name, config, split="train", streaming=True, revision=revision)
        first: dict = next(iter(stream), {})
    except Exception as error:  # no network or data set of that name; its script, configuration, split or files
        raise ValueError(f"source={source!r} is no local file or folder, and cannot be streamed from the hub: "
                         f"{type(error).__name__}, {_first_line(error)}") from None
    if not isinstance(first.get("text"), str):
        columns = ", ".join(map(repr, first)) or "no rows"
        raise ValueError(f"source={source!r} has no text column 'text', only {columns}")
    return ((row["text"], is_heldout_text(row["text"])) for row in stream if row["text"])


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
