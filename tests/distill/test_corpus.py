"""Corpora: packing, held-out documents, the endless order, sources, refusals, and how the shipped one is made."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hybridlib as hl
from hybridlib.distill.corpus import Tokens, is_heldout_text, load_tokens, recall_tokens
from hybridlib.distill.recall import TRAINING_FAMILIES, _is_heldout
from hybridlib.records import folders

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
END = len(CHARACTERS)


def character_tokenizer():
    """One token a character of ASCII, and an end-of-text token."""
    bpe = Tokenizer(models.BPE({c: i for i, c in enumerate(CHARACTERS)} | {"<end>": END}, []))
    bpe.decoder = decoders.Fuse()
    bpe.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<end>", eos_token="<end>", pad_token="<end>")


TOKENIZER = character_tokenizer()
TRAIN = [f"Document {i} says {'very ' * (i % 7)}little." for i in range(300)]
HELDOUT = [f"Held-out text {i} is never seen." for i in range(20)]


def documents_of(rows):
    """The whole documents in packed rows; the last may have been cut."""
    text = "".join("\0" if i == END else CHARACTERS[i] for i in rows.flatten().tolist())
    return text.split("\0")[:-1]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts)))
    return path


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [*TRAIN[:100], None, ""])
    pd.DataFrame({"id": range(202), "text": [*TRAIN[100:], None, ""]}).to_parquet(tmp_path / "b.parquet")
    write_jsonl(tmp_path / "heldout.jsonl", HELDOUT)
    return tmp_path


def refuses(match, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as caught:
        load_tokens(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_documents_are_packed_in_order_with_an_end_after_each(folder):
    tokens = load_tokens(folder, TOKENIZER, context=16)
    stream = [i for text in TRAIN for i in [*(CHARACTERS.index(c) for c in text), END]]
    assert tokens.train.flatten().tolist() == stream[:len(stream) // 16 * 16]
    assert tokens.train.dtype == tokens.heldout.dtype == torch.int32 and tokens.train.shape[1] == 16
    assert documents_of(tokens.heldout)[:-1] == HELDOUT[:len(documents_of(tokens.heldout)) - 1]
    assert tokens.context == 16 and tokens.source == str(folder) and tokens.tokenizer is TOKENIZER


def test_no_heldout_document_occurs_in_training(folder):
    write_jsonl(folder / "c.jsonl", [HELDOUT[3], "A text of its own.", HELDOUT[0], "The last text, which may be cut."])
    tokens = load_tokens(folder, TOKENIZER, context=8)
    assert documents_of(tokens.train)[:301] == [*TRAIN, "A text of its own."]

    (folder / "heldout.jsonl").unlink()
    write_jsonl(folder / "d.jsonl", [t for t in TRAIN if is_heldout_text(t)] * 2)
    tokens = load_tokens(folder, TOKENIZER, context=8)
    train, heldout = set(documents_of(tokens.train)), set(documents_of(tokens.heldout))
    assert {t for t in TRAIN if is_heldout_text(t)} >= heldout and len(heldout) >= 3
    assert not train & heldout and not any(is_heldout_text(t) for t in train & set(TRAIN))


def test_one_document_in_fifty_is_held_out():
    assert 140 < sum(is_heldout_text(f"text {i}") for i in range(10_000)) < 260


def test_max_tokens_stops_reading_early(folder):
    whole = load_tokens(folder, TOKENIZER, context=16)
    (folder / "b.parquet").unlink()
    (folder / "c.jsonl").write_text("this is not JSON")
    few = load_tokens(folder, TOKENIZER, context=16, max_tokens=100, heldout_tokens=64)
    assert few.train.shape == (6, 16) and few.heldout.shape == (4, 16)
    assert torch.equal(few.train, whole.train[:6])
    with pytest.raises(ValueError, match="c.jsonl is not readable"):
        load_tokens(folder, TOKENIZER, context=16)


def test_every_epoch_is_a_new_permutation_and_any_position_is_reached_at_once(folder):
    tokens = load_tokens(folder, TOKENIZER, context=16, seed=3)
    n = len(tokens.train)
    rows = tokens.rows(0, 3 * n)
    assert rows.dtype == torch.int64
    everything = sorted(tokens.train.tolist())
    epochs = [rows[e * n:(e + 1) * n].tolist() for e in range(3)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != tokens.train.tolist()
    again = load_tokens(folder, TOKENIZER, context=16, seed=3)
    assert torch.equal(again.rows(2 * n - 5, 9), rows[2 * n - 5:2 * n + 4])
    assert torch.equal(again.rows(7, 3), rows[7:10])
    assert again.rows(10 ** 12, 2).shape == (2, 16)
    assert not torch.equal(load_tokens(folder, TOKENIZER, context=16, seed=4).rows(0, n), rows[:n])


def test_the_fingerprint_tells_what_a_run_would_read(folder):
    def fingerprint(**changes):
        return load_tokens(folder, TOKENIZER, **{"context": 16, "seed": 0, **changes}).fingerprint

    base = fingerprint()
    assert base == fingerprint() and len(base) == 64
    changed = [fingerprint(seed=1), fingerprint(context=8), fingerprint(max_tokens=160), fingerprint(heldout_tokens=32)]
    assert len({base, *changed}) == 5
    one = Tokens(torch.zeros(4, 8), torch.zeros(2, 8))
    other = Tokens(torch.zeros(2, 8), torch.zeros(4, 8))
    assert one.fingerprint != other.fingerprint


def test_the_token_between_documents_begins_the_next_or_ends_the_last(folder):
    both, one = character_tokenizer(), character_tokenizer()
    both.eos_token, one.bos_token = "a", None
    for tokenizer in (both, one):
        rows = load_tokens(folder, tokenizer, context=16, max_tokens=640)
        assert torch.equal(rows.train, load_tokens(folder, TOKENIZER, context=16, max_tokens=640).train)


def test_bad_arguments_are_refused(folder):
    for context in (1, 16.0, True, None):
        refuses("context=.*whole number of at least 2", folder, TOKENIZER, context=context)
    refuses("tokenizer=None is no tokenizer", folder)
    refuses("seed=-1", folder, TOKENIZER, seed=-1)
    for name in ("max_tokens", "heldout_tokens"):
        refuses(f"{name}=10 is not a whole number of at least 16", folder, TOKENIZER, **{"context": 16, name: 10})
    endless = character_tokenizer()
    endless.bos_token = endless.eos_token = None
    refuses("neither an end-of-text nor", folder, endless)
    for source in ("nowhere", "/no/such/folder", "corpus.parquet", "folder/corpus.jsonl", "a/b/c", ""):
        refuses("is no corpus; choose 'lab'", source, TOKENIZER)
    with pytest.raises(ValueError, match="position=-1"):
        load_tokens(folder, TOKENIZER, context=16).rows(-1, 2)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("notes.txt", "text", "neither a .parquet nor a .jsonl"),
    ("bad.parquet", "PAR1 but no more", "bad.parquet is not readable as parquet"),
    ("bad.parquet", {"body": TRAIN}, "no column 'text', only 'body'"),
    ("bad.parquet", {"text": range(5)}, "every text must be a string"),
    ("bad.jsonl", '{"text": "fine"}\n{"body": "no text"}\n', "no field 'text' in line 2"),
    ("bad.jsonl", b'{"text": "\xff\xfe"}\n', "not readable as JSON lines"),
    ("short.jsonl", '{"text": "Just a few words."}\n', "training tokens, fewer than one context of 512")])
def test_corpora_that_are_unreadable_or_too_short_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, dict):
        pd.DataFrame(content).to_parquet(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuses(message, path, TOKENIZER)


def test_folders_without_text_and_without_held_out_text_are_refused(tmp_path):
    refuses("holds no .parquet or .jsonl file", tmp_path, TOKENIZER)
    write_jsonl(tmp_path / "none-held-out.jsonl", [t for t in TRAIN if not is_heldout_text(t)])
    refuses("0 held-out tokens.*name starts with heldout", tmp_path, TOKENIZER, context=16)


def test_hub_data_sets_are_streamed_and_capped(monkeypatch, tmp_path):
    import datasets
    import huggingface_hub

    pd.DataFrame({"text": TRAIN}).to_parquet(tmp_path / "x.parquet")
    requests = []

    def stream(name, config, **options):
        requests.append((name, config, options["streaming"], options["revision"]))
        return datasets.IterableDataset.from_generator(lambda: ({"text": t} for t in TRAIN))

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha="abc"))
    monkeypatch.setattr(datasets, "load_dataset", stream)
    there = load_tokens("hub:owner/name:small", TOKENIZER, context=16, max_tokens=320)
    assert requests == [("owner/name", "small", True, "abc")]
    whole = load_tokens(tmp_path / "x.parquet", TOKENIZER, context=16)
    assert torch.equal(there.train, whole.train[:20]) and torch.equal(there.heldout, whole.heldout)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", Mock(side_effect=ConnectionError("no network")))
    refuses("'owner/name' is no local file or folder, and cannot be .* ConnectionError, no network", "owner/name",
            TOKENIZER)
    refuses("write 'hub:owner/name'", "hub:name", TOKENIZER)


# How the shipped corpus is made, with a tiny random teacher.

def generator():
    path = Path(__file__).resolve().parents[2] / "data" / "corpus" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate_corpus", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=END + 1, max_position_embeddings=128,
                         bos_token_id=END, eos_token_id=END, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def test_sampled_tokens_are_among_the_likeliest_of_a_full_forward(teacher):
    model = LlamaForCausalLM.from_pretrained(teacher).eval()
    with torch.no_grad():  # so that documents end at very different lengths, and rows are dropped from the cache
        model.lm_head.weight[END] = 2.0 * model.lm_head.weight[CHARACTERS.index("e")]
    rows = generator().sample(model, [3, 5], END, 24, 40, torch.Generator().manual_seed(0), top_p=1.0, top_k=5,
                              temperature=1.0, bar=Mock())
    assert len({len(row) for row in rows}) > 4
    assert {row[0] for row in rows} == {3, 5}
    for row in rows:
        written = row[1:] if len(row) == 40 else [*row[1:], END]
        with torch.no_grad():
            logits = model(torch.tensor([[row[0], *written[:-1]]])).logits[0]
        fifth = logits.topk(5).values[:, -1]
        assert (logits[torch.arange(len(written)), torch.tensor(written)] >= fifth - 1e-4).all()


def test_a_narrow_nucleus_is_greedy(teacher):
    model = LlamaForCausalLM.from_pretrained(teacher).eval()
    rows = generator().sample(model, [7], END, 2, 30, torch.Generator().manual_seed(0), top_p=1e-6, top_k=9,
                              temperature=1.0, bar=Mock())
    greedy = model.generate(torch.tensor([[7]]), max_new_tokens=29, do_sample=False)[0].tolist()
    greedy = greedy[:greedy.index(END)] if END in greedy else greedy
    assert rows == [greedy, greedy]


def run(module, monkeypatch, teacher, out):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--teacher", str(teacher), "--out", str(out), "--tokens", "20000",
                                      "--recall-share", "0.85", "--document-tokens", "60", "--batch", "16",
                                      "--device", "cpu"])
    module.main()
    return pd.read_parquet(out / "lab.parquet")


def test_the_shipped_corpus_is_made_again_from_its_seed_and_resumed(teacher, tmp_path, monkeypatch):
    module, noted = generator(), []
    sample_text = module.sample_text

    def keep_progress(teacher_, settings, tokens, progress):
        texts = sample_text(teacher_, settings, tokens, progress)
        noted.append(progress.read_text())
        return texts

    monkeypatch.setattr(module, "sample_text", keep_progress)
    table = run(module, monkeypatch, teacher, tmp_path / "data" / "corpus")
    corpus, again = tmp_path / "data" / "corpus", tmp_path / "again"
    manifest = json.loads((corpus / "manifest.json").read_text())
    assert manifest["files"]["lab.parquet"]["sha256"] == folders.sha256_of(corpus / "lab.parquet")
    assert sum(c["documents"] for c in manifest["counts"]) == len(table)
    assert set(table["kind"]) == {"text", "key_value", "needle", "multi_hop", "variable_tracking"}
    assert sum(manifest["tokens"].values()) == table["text"].str.len().sum() + len(table)
    assert sorted(p.name for p in corpus.iterdir()) == ["lab.parquet", "manifest.json"]

    texts = {split: set(part["text"]) for split, part in table.groupby("split")}
    assert not texts["train"] & texts["heldout"]
    pairs = {split: set(re.findall(r"^([A-Za-z ]+): (\d+)$", "\n".join(part["text"]), re.M))
             for split, part in table[table["kind"] == "key_value"].groupby("split")}
    assert pairs["train"] and pairs["heldout"] and not pairs["train"] & pairs["heldout"]

    # A killed run: some batches are there, the last line is cut.
    again.mkdir()
    lines = noted[0].splitlines()
    assert len(lines) > 3
    (again / ".generate.jsonl").write_text("\n".join([*lines[:3], lines[3][:50]]))
    assert run(module, monkeypatch, teacher, again).equals(table) and noted[1] == noted[0]
    (again / ".generate.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match="left from a run with other settings"):
        run(module, monkeypatch, teacher, again)

    # It is what load_tokens("lab") reads, as it says itself what is held out.
    monkeypatch.setattr(folders, "PACKAGE", tmp_path / "hybridlib")
    tokens = load_tokens("lab", TOKENIZER, context=32)
    assert tokens.source == "lab" and set(documents_of(tokens.heldout)) <= texts["heldout"]
    assert not set(documents_of(tokens.train)) & texts["heldout"]
    (corpus / "lab.parquet").write_bytes((corpus / "lab.parquet").read_bytes() + b"x")
    refuses("lab.parquet with the sha256 of its manifest", "lab", TOKENIZER)
    (corpus / "manifest.json").unlink()
    refuses("manifest.json, which is missing", "lab", TOKENIZER)


def test_recall_rows_hold_whole_prompts_of_the_train_split_of_families_that_do_not_judge():
    tokenizer, kinds = hl.load_teacher("lab", device="cpu").tokenizer, set()
    tokens = recall_tokens(tokenizer, 256, 20_000, seed=3)
    assert tokens.train.shape == (78, 256) and tokens.heldout.shape == (0, 256) and "needle" in tokens.source
    for row in tokens.train:
        first, *rest = tokenizer.decode(row).removeprefix("<|endoftext|>").split("<|endoftext|>")
        for document in [first, *rest[:-1]]:  # the last may be cut
            prompt, answers = re.split(r"\n(?:Look up:|All names that equal)\n", document)
            facts = dict(re.findall(r"(?m)^(?:The code of |set )?([a-z]+ [a-z]+) (?:is|has|=) (.+?)\.?$", prompt))
            kinds.add("needle" if "The code" in prompt else "variable_tracking" if "Program" in prompt else "multi_hop")
            for question in answers.split("\n"):
                name, number = re.match(r"(?:The code of )?(.*?)(?: is|:| gets) (.*)", question).groups()
                if name.isdigit():
                    name, number = number[:number.index(" ", number.index(" ") + 1)], name
                while not facts[name].isdigit():
                    name = facts[name]
                assert facts[name] == number
            if "Program" in prompt:  # the last name of a chain and its number are what is split
                facts = {name: facts[other] for name, other in facts.items() if not other.isdigit()}
            assert not any(_is_heldout(*fact) for fact in facts.items() if fact[1].isdigit()) and len(facts) >= 2
    assert kinds == set(TRAINING_FAMILIES)
    same, other = (recall_tokens(tokenizer, 256, 2_560, seed=seed).fingerprint for seed in (3, 4))
    assert same == recall_tokens(tokenizer, 256, 2_560, seed=3).fingerprint != other
    with pytest.raises(ValueError, match="^context=16 is too short for a recall prompt"):
        recall_tokens(tokenizer, 16, 64)
