"""Make the corpus that ships with the project: text that a teacher wrote, and recall documents.

    python data/corpus/generate.py --teacher lab --out data/corpus --tokens 3e6 --seed 0

Text is sampled from the teacher, many documents at a time, each from a capitalised word on that is drawn evenly: from
the end-of-text token on, the lab teacher would mostly write recall tasks, as it was trained to. Recall documents come
from `hybridlib.distill.recall`; those of the held-out split hold only pairs that no training document holds. Writes
lab.parquet (columns text, split, kind) and manifest.json (what made it). A run that was cut short goes on where it
stopped when it is called again with the same settings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import zlib
from pathlib import Path

import pandas as pd
import torch
import transformers
from tqdm.auto import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hybridlib.checks import check_device
from hybridlib.distill.recall import RecallTask, encode_recall, generate_recall
from hybridlib.models.teachers import load_teacher
from hybridlib.records.folders import sha256_of

HELDOUT_SHARE = 20  # one document in so many is held out
RECALL_TOKENS = 512  # a recall document is no longer
SHORTEST = 32  # tokens; sampled documents below are dropped
LARGEST = 8_000_000  # bytes of lab.parquet
RECALL_MARKS = re.compile(r"Phone book:|Look up:|The code of [\w ]+ is \d|Who has what:|Program:\nset|All names that")


class Room(DynamicLayer):
    """Keys and values of one layer, written into room that is there from the start rather than appended by a copy."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.used, self.store = size, 0, None

    def update(self, key_states, value_states, *args, **kwargs):
        """Add (batch, heads, time, dim) keys and values; returns all there are so far."""
        if self.store is None:
            batch, heads, _, dim = key_states.shape
            self.store = [key_states.new_empty(batch, heads, self.size, dim) for _ in range(2)]
            self.is_initialized = True
        end = self.used + key_states.shape[2]
        for store, new in zip(self.store, (key_states, value_states)):
            store[:, :, self.used:end] = new
        self.used = end
        return self.store[0][:, :, :end], self.store[1][:, :, :end]

    def get_seq_length(self):
        return self.used

    def keep(self, rows):
        """Drop all but `rows` of the batch."""
        self.store = [store[rows] for store in self.store]


@torch.no_grad()
def sample(model, starts: list[int], end: int, count: int, length: int, generator, *, top_p: float, top_k: int,
           temperature: float, bar):
    """`count` documents of at most `length` token ids: a first token out of `starts`, then the model's, up to `end`.

    Tokens are drawn from the `top_k` likeliest, of them from those that make up `top_p` of the probability.
    """
    layers, device = [Room(length + 1) for _ in range(model.config.num_hidden_layers)], model.device
    cache = DynamicCache()
    cache.layers = layers
    out = torch.full((count, length), end, device=device)
    alive = torch.arange(count, device=device)  # the documents that the rows of the batch write
    last = torch.tensor(starts)[torch.randint(len(starts), (count, 1), generator=generator)].to(device)
    out[:, :1] = last
    for step in range(1, length):
        logits = model(input_ids=last, past_key_values=cache, use_cache=True).logits[:, -1].float() / temperature
        total = logits.logsumexp(-1, keepdim=True)
        best, ids = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
        p = (best - total).exp()
        p[p.cumsum(-1) - p >= top_p] = 0.0  # a token stays while those before it make up less than top_p
        picked = torch.multinomial(p.cpu(), 1, generator=generator).to(device)
        last = ids.gather(1, picked)
        out[alive, step] = last[:, 0]
        bar.update(len(alive))
        running = last[:, 0] != end
        if not running.all():
            keep = running.nonzero()[:, 0]
            if not len(keep):
                break
            alive, last = alive[keep], last[keep]
            for layer in layers:
                layer.keep(keep)
    rows = out.tolist()
    return [row[:row.index(end)] if end in row else row for row in rows]


def sample_text(teacher, settings: dict, tokens: int, progress: Path) -> list[str]:
    """About `tokens` tokens of sampled documents; every batch is noted in `progress`, from which a new run goes on."""
    head = json.dumps({"teacher": teacher.revision, **settings}, sort_keys=True)
    lines = progress.read_text(encoding="utf-8").splitlines() if progress.is_file() else []
    if lines and lines[0] != head:
        raise SystemExit(f"{progress} is left from a run with other settings; delete it to start anew")
    batches = [json.loads(line) for line in lines[1:] if line.endswith("]}")]  # the last line may be cut short
    lines = [head, *(json.dumps(batch) for batch in batches)]
    write(progress, "".join(line + "\n" for line in lines))
    tokenizer, done = teacher.tokenizer, sum(batch["tokens"] for batch in batches)
    end = tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    words = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    starts = [i for i, word in enumerate(words) if re.fullmatch(r" [A-Z][a-z]{2,}", word)]
    starts = starts or [i for i in range(len(words)) if i != end]  # a tokenizer without whole words
    with tqdm(total=tokens, initial=done, unit="tok", unit_scale=True, mininterval=5) as bar:
        while done < tokens:
            generator = torch.Generator().manual_seed(settings["seed"] * 1_000_003 + len(batches))
            rows = sample(teacher.model, starts, end, settings["batch"], settings["document_tokens"], generator,
                          bar=bar, **{k: settings[k] for k in ("top_p", "top_k", "temperature")})
            rows = [row for row in rows if len(row) >= SHORTEST]
            texts = [text.strip() for text in tokenizer.batch_decode(rows)]
            whole = [i for i, text in enumerate(texts)
                    if text and "\ufffd" not in text and not RECALL_MARKS.search(text)]
            batches.append({"tokens": sum(len(rows[i]) for i in whole), "texts": [texts[i] for i in whole]})
            if not whole:
                raise SystemExit(f"none of {settings['batch']} sampled documents can be kept; is --teacher trained?")
            with open(progress, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(batches[-1]) + "\n")
            done += batches[-1]["tokens"]
    return [text for batch in batches for text in batch["texts"]]


def recall_texts(tokenizer, tokens: int, seed: int, split: str):
    """(text, family) of recall documents of every family and many difficulties, about `tokens` tokens in all."""
    rng, out, done = random.Random(f"corpus-{split}-{seed}"), [], 0
    while done < tokens:
        family = rng.choices(["key_value", "needle", "multi_hop", "variable_tracking"], [6, 2, 1, 1])[0]
        hops = 1 if family in ("key_value", "needle") else rng.randint(1, 2)
        pairs = rng.randint(2, 24 // hops)
        task = RecallTask(family, pairs=pairs, queries=rng.randint(1, min(pairs, 8)), hops=hops,
                          digits=rng.choice([3, 3, 3, 4, 6]), split=split,
                          filler=rng.choice([0, 0, 1, 2]) if hops == 1 and family != "variable_tracking" else 0)
        example = generate_recall(task, 1, seed=rng.getrandbits(60))[0]
        length = len(encode_recall(example, tokenizer)[0])
        if length <= RECALL_TOKENS:
            out.append((example.text, family))
            done += length
    return out


def write(path: Path, content: str) -> None:
    """Write text to a temporary name, then rename it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(content, encoding="utf-8")
    os.replace(part, path)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--teacher", default="lab", help="a name or folder that hybridlib.load_teacher takes")
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--tokens", type=float, default=3e6, help="tokens in all, of the teacher's tokenizer")
    ap.add_argument("--recall-share", type=float, default=0.4, help="share of the tokens in recall documents")
    ap.add_argument("--document-tokens", type=int, default=500, help="a sampled document is cut there")
    ap.add_argument("--batch", type=int, default=128, help="documents sampled at a time")
    ap.add_argument("--temperature", type=float, default=1.0)
    ap.add_argument("--top-p", type=float, default=0.95)
    ap.add_argument("--top-k", type=int, default=512)
    ap.add_argument("--device", default="auto", help="auto, cpu (samples in float32) or cuda (in bfloat16)")
    ap.add_argument("--seed", type=int, default=0)
    a = ap.parse_args()
    if not (0 <= a.recall_share < 1 and a.tokens > 0 and a.temperature > 0 and 0 < a.top_p <= 1 and a.top_k > 0
            and a.batch > 0):
        ap.error("tokens, temperature, top-k and batch are above 0, top-p in (0, 1], recall-share in [0, 1)")
    a.out.mkdir(parents=True, exist_ok=True)
    device = check_device(a.device)
    teacher = load_teacher(a.teacher, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    if not SHORTEST < a.document_tokens < teacher.model.config.max_position_embeddings:
        ap.error(f"document-tokens is above {SHORTEST} and below the teacher's context, "
                 f"{teacher.model.config.max_position_embeddings}")
    settings = {k: getattr(a, k) for k in ("batch", "document_tokens", "temperature", "top_p", "top_k", "seed")}
    settings["dtype"] = str(teacher.model.dtype).removeprefix("torch.")
    progress, recall = a.out / ".generate.jsonl", a.tokens * a.recall_share

    texts = dict.fromkeys(sample_text(teacher, settings, int(a.tokens - recall), progress))  # each once
    rows = [(t, "heldout" if zlib.crc32(t.encode()) % HELDOUT_SHARE == 0 else "train", "text") for t in texts]
    for split, share in (("heldout", 1 / HELDOUT_SHARE), ("train", 1 - 1 / HELDOUT_SHARE)):
        if recall:
            documents = recall_texts(teacher.tokenizer, int(recall * share), a.seed, split)
            rows += [(text, split, family) for text, family in documents]
    random.Random(a.seed).shuffle(rows)
    table = pd.DataFrame(rows, columns=["text", "split", "kind"])
    part = a.out / ".lab.parquet.part"
    table.to_parquet(part, compression="zstd", compression_level=19, index=False)
    if part.stat().st_size > LARGEST:
        raise SystemExit(f"{part} has {part.stat().st_size:,} bytes, more than {LARGEST:,}; ask for fewer --tokens")
    os.replace(part, a.out / "lab.parquet")

    table["tokens"] = [len(ids) + 1 for ids in teacher.tokenizer(table["text"].tolist(), add_special_tokens=False,
                                                                 verbose=False)["input_ids"]]
    counts = [{"split": split, "kind": kind, "documents": len(group), "tokens": int(group["tokens"].sum())}
              for (split, kind), group in table.groupby(["split", "kind"])]
    write(a.out / "manifest.json", json.dumps({
        "teacher": {"name": teacher.name, "revision": teacher.revision},
        "settings": {**settings, "tokens": int(a.tokens), "recall_share": a.recall_share},
        "counts": counts,
        "tokens": {split: sum(c["tokens"] for c in counts if c["split"] == split) for split in ("train", "heldout")},
        "files": {"lab.parquet": {"sha256": sha256_of(a.out / "lab.parquet"),
                                  "bytes": (a.out / "lab.parquet").stat().st_size}},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "pandas": pd.__version__},
        "licence": "Apache-2.0"}, indent=1) + "\n")
    progress.unlink()


if __name__ == "__main__":
    main()
