"""Corpora: where tokens come from, packed to a context, in a seeded order that can be resumed anywhere.

==========================  ==========================================================================================
source                      meaning
==========================  ==========================================================================================
``"lab"``                   the corpus that ships with the project (``data/corpus``): text that the lab teacher wrote,
                            and recall documents
a folder or a file          ``.parquet`` or ``.jsonl`` with a column ``text``; in a folder, files whose name starts with
                            ``heldout`` are held out
``"owner/name"``            a data set of the Hugging Face hub, split ``train``, streamed; ``"hub:owner/name:config"``
                            where it needs a configuration
==========================  ==========================================================================================

Where no file is named ``heldout``, one document in 50 is held out, by a checksum of its text. Either way no held-out
text is ever a training document.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hybridlib.checks import check_int
from hybridlib.records.folders import data_folder, sha256_of

__all__ = ["Tokens", "is_heldout_text", "load_tokens"]

logger = logging.getLogger(__name__)

HELDOUT_SHARE = 50  # one document in so many is held out, where the source does not say which
HELDOUT_TOKENS = 131_072
HUB_TOKENS = 20_000_000
KINDS = (".parquet", ".jsonl")

_BATCH_CHARACTERS = 500_000  # of text that is tokenized at a time
_LOCAL = "a folder or file of .parquet or .jsonl text"


class Tokens:
    """Packed token ids of a corpus.

    Documents follow one another, each with an end-of-text token behind it, and are cut into rows of `context` tokens;
    the rest at the end is dropped.

    Attributes
    ----------
    context : tokens in a row.
    tokenizer, source, seed : arguments of `load_tokens`.
    train, heldout : int32 token ids (rows, context), in the order of the source.
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
        """Return rows `position` to `position + count` of the endless training order, as int64 (count, context).

        Each epoch is a permutation of all training rows, drawn from (seed, epoch), so that a position is enough to
        resume a run.
        """
        check_int("position", position, 0)
        check_int("count", count, 1)
        picked, rows = [], len(self.train)
        while count:
            epoch, start = divmod(position, rows)
            part = self._order(epoch)[start:start + count]
            picked.append(part)
            position, count = position + len(part), count - len(part)
        return self.train[torch.from_numpy(np.concatenate(picked))].long()

    def _order(self, epoch):
        if epoch not in self._orders:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.train))
            self._orders = dict([*self._orders.items(), (epoch, order)][-2:])
        return self._orders[epoch]

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256, in hex, over every row, the context and the seed, which name the tokens that a run reads."""
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
    tokenizer : a teacher's tokenizer.
    context : tokens in a row.
    seed : of the order of training rows.
    max_tokens : the most training tokens; all if None (20,000,000 from the hub). Files are read in the order of their
        names, and no further than both kinds need, so that `max_tokens` does not change the held-out rows.
    heldout_tokens : the most held-out tokens; 131,072 if None.

    Raises
    ------
    ValueError : unknown source, no column ``text``, a file that cannot be read, or too little text for one row of
        either kind.
    """
    check_int("context", context, 2)
    check_int("seed", seed, 0)
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise ValueError(f"tokenizer={tokenizer!r} is no tokenizer; pass a teacher's: load_teacher('lab').tokenizer")
    if _end(tokenizer) is None:
        raise ValueError("tokenizer has neither an end-of-text nor a beginning-of-text token to put between documents")
    for name, value in (("max_tokens", max_tokens), ("heldout_tokens", heldout_tokens)):
        if value is not None:
            check_int(name, value, context)
    name, documents, limit, apart = _open(str(source))
    most = {False: max_tokens or limit, True: max(heldout_tokens or HELDOUT_TOKENS, context)}
    parts, sizes = _tokenize(documents, tokenizer, most, apart)
    for kind, size, remedy in (("training", sizes[False], " or a shorter context"),
                               ("held-out", sizes[True], ", or a file whose name starts with heldout")):
        if size < context:
            raise ValueError(f"source={name!r} has {size} {kind} tokens, fewer than one context of {context}; "
                             f"bring more text{remedy}")
    train, heldout = (_pack(parts[h], context, most[h]) for h in (False, True))
    return Tokens(train, heldout, tokenizer, name, seed)


def is_heldout_text(text: str) -> bool:
    """Tell whether a document is held out where its source does not say: one in 50 is, by a checksum of the text."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % HELDOUT_SHARE == 0


def _end(tokenizer):
    return tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def _tokenize(documents, tokenizer, most, apart):
    """Return token arrays and their sizes by kind (held out or not), read until both kinds have their `most`.

    If `apart`, held-out documents come before all others, and training tokens alone decide where to stop.
    """
    parts: dict[bool, list[np.ndarray]] = {False: [], True: []}
    sizes, end, dtype = {False: 0, True: 0}, _end(tokenizer), np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    heldout_keys = set()  # checksums of held-out texts, which may not come again as training text
    with tqdm(total=most[False], unit="tok", unit_scale=True, delay=5, desc="tokenizing") as bar:
        for batch in _batches(documents, min(_BATCH_CHARACTERS, 4 * (most[False] or _BATCH_CHARACTERS))):
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
    """Yield lists of (text, heldout) of about `characters` characters."""
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
    """Return the documents of the shipped corpus, held-out ones first, after a check of its sha256."""
    file = data_folder("corpus") / "lab.parquet"
    try:
        expected = json.loads(file.with_name("manifest.json").read_text(encoding="utf-8"))["files"][file.name]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"source='lab' needs {file.with_name('manifest.json')}, which is missing or "
                         "unreadable") from None
    if not file.is_file() or sha256_of(file) != expected:
        raise ValueError(f"source='lab' needs {file} with the sha256 of its manifest; put it back or make it again")
    rows = [(text, split == "heldout") for text, split in _columns(file, "text", "split")]
    return iter(sorted(rows, key=lambda row: not row[1]))  # a stable sort


def _read(files, marked) -> Iterator[tuple[str, bool]]:
    """Return the (text, heldout) documents of `files`, those of `marked` (held out) first; columns are checked now."""
    import pyarrow.parquet as parquet

    for file in files:
        if file.suffix == ".parquet":
            try:
                names = parquet.read_schema(file).names
            except (OSError, ValueError) as error:
                raise ValueError(f"{file} is not a readable parquet file ({_first_line(error)})") from None
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
    import pyarrow.parquet as parquet

    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=256, columns=list(names)):
            yield from zip(*(batch.column(n).to_pylist() for n in names))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not a readable parquet file ({_first_line(error)})") from None


def _lines(file):
    try:
        with open(file, encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict) or "text" not in row:
                        raise KeyError(number)
                    yield (row["text"],)
    except KeyError:
        raise ValueError(f"{file} has no field 'text' in line {number}; each line is a JSON object with one") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not readable as JSON lines of UTF-8 text ({_first_line(error)})") from None


def _hub(source, name, config=None):
    """Stream (text, heldout) from a data set of the hub; ValueError at once if it cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    where = f"source={source!r} is no local file or folder"
    try:
        revision = HfApi().dataset_info(name, timeout=10).sha
    except RepositoryNotFoundError:
        raise ValueError(f"{where}, and the hub has no data set of that name that you may read") from None
    except Exception as error:  # no network, in one of many guises
        raise ValueError(f"{where}, and the hub cannot be reached ({_first_line(error)})") from None
    from datasets import load_dataset

    try:
        stream = load_dataset(name, config, split="train", streaming=True, revision=revision)
        first: dict = next(iter(stream), {})
    except Exception as error:  # its script, configuration, split or files
        raise ValueError(f"source={source!r} cannot be streamed from the hub: {_first_line(error)}") from None
    if not isinstance(first.get("text"), str):
        columns = ", ".join(map(repr, first)) or "no rows"
        raise ValueError(f"source={source!r} has no text column 'text', only {columns}")
    return ((row["text"], is_heldout_text(row["text"])) for row in stream if row["text"])


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
