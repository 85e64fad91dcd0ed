"""Train the lab teacher: a small Llama that models text and retrieves in context.

    python data/teacher/train.py --text FOLDER_OF_PARQUET --out data/teacher

The folder holds .parquet files with a column `text`; a file whose name starts with `heldout` is only measured on.
The tokenizer (byte-level BPE, numbers in groups of three digits) is learned first, then the model: a share of every
batch is packed text, the rest recall tasks of `hybridlib.distill.recall` (train split). Muon trains hidden weight
matrices, AdamW the rest. Contexts grow along training. With --plant, the circuit that recall needs is there from the
start, see `plant_induction`. The script writes model.safetensors (bfloat16), config, tokenizer, `training.json` (its
settings, log and figures), the model card README.md made from it, and SHA256SUMS.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hybridlib.distill.recall import RecallTask, encode_recall, generate_recall, score_recall
from hybridlib.records.provenance import describe_device

END = "<|endoftext|>"
WORDS = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def read_text(folder: Path, heldout: bool) -> list[str]:
    files = sorted(f for f in folder.glob("*.parquet") if f.name.startswith("heldout") == heldout)
    if not files:
        raise SystemExit(f"--text {folder}: no {'heldout' if heldout else 'training'} .parquet file there")
    return [text for f in files for text in pd.read_parquet(f, columns=["text"])["text"]]


def learn_tokenizer(texts: list[str], vocab: int, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every number of up to three digits, and the words of the recall tasks, are seen often."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    digits = [f" {n:0{d}d}" for d in (1, 2, 3) for n in range(10 ** d)] * 200
    recall = [e.text for e in recall_examples(random.Random(seed), 2000, 512)]
    bpe.train_from_iterator([*texts, " ".join(digits), *recall], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)


def recall_examples(rng: random.Random, count: int, context: int):
    """Examples of every family with random knobs that fit `context` tokens."""
    out = []
    for _ in range(count):
        name = rng.choices(["key_value", "needle", "multi_hop", "variable_tracking"], [6, 2, 1, 1])[0]
        hops = 1 if name in ("key_value", "needle") else rng.randint(1, 2)
        filler = rng.choice([0, 0, 1, 2]) if name in ("key_value", "needle") else 0
        most = max(3, context // ((22 if name == "key_value" else 30) + 10 * filler) // hops)
        pairs = rng.randint(2, min(most, 24))
        task = RecallTask(name, pairs=pairs, queries=pairs, hops=hops,
                          digits=rng.choice([3, 3, 3, 2, 4, 6]),
                          filler=filler, split="train")
        out += generate_recall(task, 1, seed=rng.getrandbits(60))
    return out


class Batches(torch.utils.data.IterableDataset):
    """Endless batches of one context: token ids (rows, context + 1), loss weights (rows, context); recall rows first.

    Worker w of a data loader draws from a seed of its own, so the order of batches is the same in every run.
    """

    def __init__(self, stream: np.ndarray, tokenizer, rows: int, context: int, settings: argparse.Namespace):
        self.stream, self.tokenizer, self.rows, self.context = stream, tokenizer, rows, context
        self.recall_rows, self.seed = round(rows * settings.recall_share), settings.seed
        self.prompt_weight, self.answer_weight = settings.prompt_weight, settings.answer_weight

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        self.rng = random.Random(f"{self.seed}-{self.context}-{worker.id if worker else 0}")
        while True:
            ids, weights = zip(*(self.recall_row() if row < self.recall_rows else self.text_row()
                                 for row in range(self.rows)))
            yield torch.tensor(ids), torch.tensor(weights)

    def text_row(self):
        start = self.rng.randrange(len(self.stream) - self.context - 1)
        return self.stream[start:start + self.context + 1].tolist(), [1.0] * self.context

    def recall_row(self):
        ids, weights = [], []
        while len(ids) <= self.context:
            example = recall_examples(self.rng, 1, self.context)[0]
            part, spans = encode_recall(example, self.tokenizer)
            if len(part) > self.context:
                continue
            weight = [self.prompt_weight] * len(part)
            for start, end in spans:
                weight[start:end] = [self.answer_weight] * (end - start)
            ids, weights = ids + part, weights + weight
        return ids[:self.context + 1], weights[1:self.context + 1]


@torch.no_grad()
def initialize(model, seed: int, embedding: float) -> torch.Generator:
    """Random weights, every branch silent at first, as in residual networks that start at identity."""
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        for matrix in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.gate_proj,
                       layer.mlp.up_proj):
            matrix.weight.normal_(std=width**-0.5, generator=generator)
    model.model.embed_tokens.weight.normal_(std=embedding, generator=generator)
    return generator


@torch.no_grad()
def plant_induction(model, seed: int, back: int = 1, match: int = 4, copy: float = 2.0, sharp: float = 10.0) -> None:
    """Start with an induction circuit in place: heads of layer `back` look back, heads of layer `match` find and copy.

    For a teacher with a known answer, or one trained on few tokens; all of it is free to change in training.
    Embeddings start in a content subspace, with one coordinate in common. Three heads of `back` read only that
    coordinate, so that under rotary positions the score of a key n tokens back is sum_i cos((n - d) theta_i), largest
    at d = 1, 2 or 3, and write a projection of the token there to a subspace of its own: A1, A2, A3. The heads of
    `match` compare (A1, A2) of the query with (A2, A3) of each key, in the slow rotary dimensions, and add the key's
    own token to the output: after "a b" comes what came after "a b" before.
    """
    spread = 0.5  # of the embeddings
    config, generator = model.config, initialize(model, seed, spread)
    width, dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    part = (width - 8) // 4 * 4 // 5  # width of A1, A2, A3; the content subspace is what remains
    content = width - 1 - 3 * part

    def orthonormal(rows, columns):
        return torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=generator))[0].T

    embedding = model.model.embed_tokens.weight
    model.model.norm.weight.fill_(0.1)  # embeddings are output rows too: large ones would start with wild guesses
    size = spread * content**0.5
    embedding[:, 0], embedding[:, 1 + content:] = 8 * spread, 0.0
    embedding[:, 1:1 + content] *= size / embedding[:, 1:1 + content].norm(dim=1, keepdim=True).clamp(min=1e-6)
    theta = model.model.rotary_emb.inv_freq.float().cpu()  # (dim / 2,), fast first
    places = [slice(1 + content + i * part, 1 + content + (i + 1) * part) for i in range(3)]

    layer, groups = model.model.layers[back].self_attn, heads // kv_heads
    reading = torch.zeros(dim, width)
    reading[:part, 1:1 + content] = orthonormal(part, content)
    for head in range(3):
        rows, kv_rows = slice(head * dim, (head + 1) * dim), slice(head // groups * dim, (head // groups + 1) * dim)
        fast = torch.arange(dim // 2) < dim // 4
        q, k = torch.zeros(dim, width), torch.zeros(dim, width)
        k[:dim // 2, 0] = 1.5 * fast
        q[:dim // 2, 0] = 1.5 * fast * torch.cos((head + 1) * theta)
        q[dim // 2:, 0] = -1.5 * fast * torch.sin((head + 1) * theta)
        layer.q_proj.weight[rows], layer.k_proj.weight[kv_rows], layer.v_proj.weight[kv_rows] = q, k, reading
        layer.o_proj.weight[places[head], rows] = 0.5 * torch.eye(part, dim)

    layer = model.model.layers[match].self_attn
    slow = [i for i in range(dim // 2) if theta[i] * 512 < 0.8]  # these turn little over 512 tokens
    slow = torch.tensor(slow + [i + dim // 2 for i in slow])
    basis = orthonormal(content, content)
    for kv in range(kv_heads):
        compare = orthonormal(len(slow), 2 * part)
        q, k, v = (torch.zeros(dim, width) for _ in range(3))
        q[slow, places[0].start:places[1].stop] = compare * sharp**0.5
        k[slow, places[1].start:places[2].stop] = compare * sharp**0.5
        share = basis[kv * dim:(kv + 1) * dim]  # the kv heads copy complementary parts of the content
        v[:len(share), 1:1 + content] = share
        kv_rows = slice(kv * dim, (kv + 1) * dim)
        layer.k_proj.weight[kv_rows], layer.v_proj.weight[kv_rows] = k, v
        for head in range(kv * groups, (kv + 1) * groups):
            rows = slice(head * dim, (head + 1) * dim)
            layer.q_proj.weight[rows] = q
            back_to_content = torch.nn.functional.pad(share.T, (0, dim - len(share)))
            layer.o_proj.weight[1:1 + content, rows] = copy / groups * back_to_content


def weighted_loss(model, ids, weights, text_rows, dtype):
    with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype is not None):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    nats = nats.view_as(weights)
    loss = (nats * weights).sum() / weights.sum()
    answers = (weights[:-text_rows] == weights.max()).float()
    return loss, nats[-text_rows:].mean().detach(), (nats[:-text_rows] * answers).sum().detach() / answers.sum()


def windowed(model, window: int):
    """The model with attention cut to the last `window` tokens (Mistral's sliding window, same weights)."""
    from transformers import MistralConfig, MistralForCausalLM

    settings = model.config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "layer_types"):
        settings.pop(key, None)
    cut = MistralForCausalLM(MistralConfig(**settings, sliding_window=window))
    cut.load_state_dict(model.state_dict())
    return cut.to(model.device).eval()


@torch.no_grad()
def measure(model, tokenizer, heldout: np.ndarray, context: int, examples: int) -> dict:
    """Return the loss on held-out text in nats a token, and exact match on recall tasks of `examples` examples each."""
    model.eval()
    rows = torch.from_numpy(heldout[:64 * (context + 1)].astype(np.int64)).view(64, context + 1)
    nats = []
    for r in rows.to(model.device).split(8):
        logits = model(input_ids=r[:, :-1]).logits.flatten(0, 1).float()
        nats.append(torch.nn.functional.cross_entropy(logits, r[:, 1:].flatten()))
    figures = {"heldout_loss_nats": torch.stack(nats).mean().item(), "heldout_tokens": 64 * context}
    cut = windowed(model, 16)
    for name, task in {
        "key_value_16": RecallTask("key_value", pairs=16),
        "key_value_16_in_512": RecallTask("key_value", pairs=16, filler=2),
        "key_value_24": RecallTask("key_value", pairs=24),
        "key_value_16_six_digits": RecallTask("key_value", digits=6),
        "needle_8_filler_1": RecallTask("needle", pairs=8, filler=1),
        "multi_hop_8_2": RecallTask("multi_hop", pairs=8, hops=2),
        "variable_tracking_4_2": RecallTask("variable_tracking", pairs=4, hops=2),
    }.items():
        recall = generate_recall(task, examples, seed=1)
        longest = max(len(encode_recall(e, tokenizer)[0]) for e in recall)
        full, short = score_recall(model, tokenizer, recall), score_recall(cut, tokenizer, recall)
        figures[name] = {"exact_match": full.exact_match, "stderr": full.stderr, "examples": full.answers,
                         "longest_tokens": longest, "exact_match_window_16": short.exact_match}
    return figures


CARD = """# The lab teacher

A Llama of {parameters:,} parameters ({settings[layers]} layers, width {settings[width]}, {settings[heads]} query heads
over {settings[kv_heads]} key/value heads of {head_dim} dimensions, tied embeddings, {settings[vocab]} byte-level BPE
tokens, context {context}), made to be distilled on two CPU cores. It models English poorly and retrieves in context.
`train.py` beside this page wrote all that is here, this page too; `training.json` holds the figures and the loss curve.

| | |
|---|---|
| data | {settings[recall_share]:.0%} of each batch: `hybridlib.distill.recall`, train split; the rest text, see below |
| training | {tokens:,} tokens in {steps:,} steps, {seconds:,.0f} s on: {device}; torch {torch} |
| contexts | {settings[contexts]} tokens, shares {settings[shares]} |
| rates | Muon {settings[muon_lr]}, AdamW {settings[lr]}, falling to 0 over the last {settings[decay_share]:.0%} |
| loss | {figures[heldout_loss_nats]:.3f} nats a token on {figures[heldout_tokens]:,} tokens of held-out text |
| weights | bfloat16; Apache-2.0 |

The text is packed English of open licences (Wikipedia, public-domain books, documentation: CC BY-SA, CC BY, MIT,
Apache-2.0, public domain); none of it is kept here.

Exact match on names and numbers never paired in training, one question a prompt, teacher-forced:

| task | tokens, longest | exact match | attention cut to 16 tokens a layer |
|---|---|---|---|
{rows}

{start}

To make it again, where FOLDER holds .parquet files with a column `text`, and files named `heldout*` to measure on:

    python data/teacher/train.py --text FOLDER --out data/teacher {command}
"""

PLANTED = """\
The recall circuit is not left to chance in so short a training: attention heads of layer 1 start by looking one, two
and three tokens back, and those of layer 4 by matching what they find and copying what came next (`plant_induction`);
all of it is free to change. Which layers recall needs is therefore known in part beforehand, which a selector can be
held to; what training made of the other layers is not."""
CONTROL = """
Started at random instead, `random_start.json` (rope base {settings[rope_theta]:,.0f}, {settings[recall_share]:.0%}
recall, rates {settings[muon_lr]} and {settings[lr]}, the rest as above), the circuit was not found in {tokens:,}
tokens: exact match {exact_match:.3f} on key_value_16, and {figures[heldout_loss_nats]:.3f} nats a token of text."""
UNPLANTED = "All weights started at random."


def publish(out: Path) -> None:
    """Write the model card and SHA256SUMS of a folder that training left."""
    record, config = json.loads((out / "training.json").read_text()), json.loads((out / "config.json").read_text())
    rows = [f"| {name} | {r['longest_tokens']} | {r['exact_match']:.3f} +- {r['stderr']:.3f} "
            f"| {r['exact_match_window_16']:.3f} |" for name, r in record["figures"].items() if isinstance(r, dict)]
    options = {k: v if isinstance(v, list) else [v] for k, v in record["settings"].items()
               if v is not False and v is not None and k != "device"}
    command = [f"--{k.replace('_', '-')}" + "".join(f" {x}" for x in values if x is not True)
               for k, values in options.items()]
    start = PLANTED if record["settings"]["plant"] else UNPLANTED
    if (out / "random_start.json").exists():
        control = json.loads((out / "random_start.json").read_text())
        start += CONTROL.format(**control, exact_match=control["figures"]["key_value_16"]["exact_match"])
    (out / "README.md").write_text(CARD.format(**record, rows="\n".join(rows), head_dim=config["head_dim"],
                                               context=config["max_position_embeddings"], command=" ".join(command),
                                               start=start))
    names = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    sums = [f"{hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (out / "SHA256SUMS").write_text("".join(sums))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--text", type=Path, required=True, help="folder of .parquet files with a column `text`")
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--tokenizer", type=Path, help="folder of a tokenizer to use instead of learning one")
    ap.add_argument("--vocab", type=int, default=8192)
    ap.add_argument("--width", type=int, default=128)
    ap.add_argument("--layers", type=int, default=8)
    ap.add_argument("--heads", type=int, default=4)
    ap.add_argument("--kv-heads", type=int, default=2)
    ap.add_argument("--ffn", type=int, default=384)
    ap.add_argument("--rope-theta", type=float, default=500_000.0)
    ap.add_argument("--tokens", type=float, default=12e6)
    ap.add_argument("--batch-tokens", type=int, nargs="+", default=[4096], help="tokens a step, one value a context")
    ap.add_argument("--contexts", type=int, nargs="+", default=[128, 256, 512], help="grown along training")
    ap.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.3, 0.4], help="share of tokens at each context")
    ap.add_argument("--recall-share", type=float, default=0.5)
    ap.add_argument("--recall-examples", type=int, default=200, help="of each recall task that is measured at the end")
    ap.add_argument("--prompt-weight", type=float, default=0.1, help="loss weight of a recall prompt's tokens")
    ap.add_argument("--answer-weight", type=float, default=4.0, help="loss weight of an answer's tokens")
    ap.add_argument("--lr", type=float, default=1e-2, help="AdamW: embeddings and norms")
    ap.add_argument("--muon-lr", type=float, default=1e-2, help="Muon: hidden matrices")
    ap.add_argument("--decay-share", type=float, default=0.5, help="last share of training, over which rates fall to 0")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--compile", action="store_true", help="torch.compile the loss")
    ap.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--plant", action="store_true", help="start with a recall circuit")
    ap.add_argument("--workers", type=int, default=0, help="processes that draw batches; part of what the seed gives")
    ap.add_argument("--seconds", type=float, default=math.inf, help="end sooner, rates falling to 0 by then")
    a = ap.parse_args()
    if a.plant and (a.heads < 3 or a.layers < 5):
        ap.error(f"--heads {a.heads} --layers {a.layers}: planting needs 3 heads and 5 layers, or leave --plant out")
    torch.manual_seed(a.seed)
    a.out.mkdir(parents=True, exist_ok=True)

    texts, heldout = read_text(a.text, False), read_text(a.text, True)
    random.Random(a.seed).shuffle(texts)
    if a.tokenizer:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(a.tokenizer)
    else:
        tokenizer = learn_tokenizer(texts[:1500], a.vocab, a.seed)
    tokenizer.save_pretrained(a.out)

    def pack(docs):
        return np.concatenate([np.array([*ids, tokenizer.eos_token_id], dtype=np.uint16)
                               for i in range(0, len(docs), 64)
                               for ids in tokenizer(docs[i:i + 64], add_special_tokens=False)["input_ids"]])

    need = int(a.tokens * (1 - a.recall_share)) + 100_000
    lengths = np.cumsum([len(text) // 4 for text in texts])  # about so many tokens
    stream, heldout = pack(texts[:int(np.searchsorted(lengths, need, side="right")) + 1]), pack(heldout[:100])

    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=a.width, num_hidden_layers=a.layers,
                         num_attention_heads=a.heads, num_key_value_heads=a.kv_heads, intermediate_size=a.ffn,
                         tie_word_embeddings=True, max_position_embeddings=1024,
                         rope_parameters={"rope_type": "default", "rope_theta": a.rope_theta},
                         bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = LlamaForCausalLM(config)
    plant_induction(model, a.seed) if a.plant else initialize(model, a.seed, embedding=0.05)
    model.to(a.device)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [torch.optim.Muon(matrices, lr=a.muon_lr, weight_decay=0.01),
                  torch.optim.AdamW(others, lr=a.lr, betas=(0.9, 0.95), weight_decay=0.0)]
    peaks = [a.muon_lr, a.lr]

    dtype = None if a.float32 else torch.bfloat16
    loss_of = torch.compile(weighted_loss, dynamic=False) if a.compile else weighted_loss
    sizes = a.batch_tokens if len(a.batch_tokens) == len(a.contexts) else a.batch_tokens[:1] * len(a.contexts)
    ends = np.cumsum(a.shares) / np.sum(a.shares)
    began, log, step, seen, progress, stage = time.time(), [], 0, 0, 0.0, -1
    bar = tqdm(total=a.tokens, unit="tok", unit_scale=True, mininterval=5)
    while progress < 1:
        if stage != (stage := int(np.searchsorted(ends, progress, side="right"))):
            context, rows = a.contexts[stage], sizes[stage] // a.contexts[stage]
            batches = iter(torch.utils.data.DataLoader(Batches(stream, tokenizer, rows, context, a), batch_size=None,
                                                       num_workers=a.workers))
        ids, weights = (t.to(a.device) for t in next(batches))
        for optimizer, peak in zip(optimizers, peaks):
            for group in optimizer.param_groups:
                group["lr"] = peak * min((step + 1) / 50, 1.0, (1 - progress) / a.decay_share)
        loss, text_nats, answer_nats = loss_of(model, ids, weights, rows - round(rows * a.recall_share), dtype)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += rows * context
        bar.update(rows * context)
        step += 1
        progress = max(seen / a.tokens, (time.time() - began) / a.seconds)
        if step % 25 == 0 or progress >= 1:
            log.append({"step": step, "tokens": seen, "context": context, "text_nats": text_nats.item(),
                        "answer_nats": answer_nats.item(), "seconds": round(time.time() - began, 1)})
            bar.set_postfix(text=f"{text_nats:.3f}", answers=f"{answer_nats:.3f}", ctx=context)
            with open(a.out / "log.jsonl", "a") as f:
                f.write(json.dumps(log[-1]) + "\n")
    bar.close()
    seconds = time.time() - began

    model.to(torch.bfloat16).save_pretrained(a.out)
    figures = measure(model.float(), tokenizer, heldout, a.contexts[-1], a.recall_examples)
    settings = {k: v for k, v in vars(a).items() if k not in ("out", "text", "tokenizer")}
    settings["seconds"] = a.seconds if math.isfinite(a.seconds) else None
    record = {"settings": settings,
              "parameters": sum(p.numel() for p in model.parameters()), "tokens": seen, "steps": step,
              "seconds": seconds, "device": describe_device(a.device),
              "torch": torch.__version__, "figures": figures, "log": log}
    (a.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    publish(a.out)


if __name__ == "__main__":
    main()
