"""The lab teacher retrieves in context and not without long attention; its training script runs on any text."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import hybridlib as hl
from hybridlib.distill.recall import RecallTask, encode_recall, generate_recall, score_recall

FOLDER = Path(__file__).resolve().parent.parent / "data" / "teacher"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_teacher", FOLDER / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_lab_teacher_recalls_and_needs_long_attention_for_it(script):
    teacher = hl.load_teacher("lab", device="cpu")
    examples = generate_recall(RecallTask("key_value", pairs=16, filler=2), 20, seed=7)
    lengths = [len(encode_recall(e, teacher.tokenizer)[0]) for e in examples]
    assert 384 < min(lengths) and max(lengths) <= 512
    assert score_recall(teacher.model, teacher.tokenizer, examples).exact_match >= 0.9
    cut = score_recall(script.windowed(teacher.model, 16), teacher.tokenizer, examples).exact_match
    assert cut <= 1 / 16 + 3 * (1 / 16 * 15 / 16 / 20) ** 0.5  # guessing among the 16 numbers, and three deviations


def test_cutting_attention_to_the_whole_text_changes_nothing(script):
    teacher = hl.load_teacher("lab", device="cpu")
    ids = torch.arange(40)[None] + 300
    torch.testing.assert_close(script.windowed(teacher.model, 64)(input_ids=ids).logits,
                               teacher.model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_the_card_and_the_sums_are_those_of_the_record(script, tmp_path):
    for name in ("training.json", "config.json", "model.safetensors", "generation_config.json", "tokenizer.json",
                 "tokenizer_config.json", "random_start.json"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    script.publish(tmp_path)
    for name in ("README.md", "SHA256SUMS"):
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text()


def test_the_training_script_runs_on_a_folder_of_text(script, tmp_path, monkeypatch):
    words = "the cat sat on a mat while two dogs ran by and seven birds sang about rain in spring".split()
    text = [" ".join(words[(i * j) % len(words)] for j in range(1, 400)) for i in range(1, 90)]
    (tmp_path / "text").mkdir()
    pd.DataFrame({"text": text}).to_parquet(tmp_path / "text" / "train-0.parquet")
    pd.DataFrame({"text": text[::-1]}).to_parquet(tmp_path / "text" / "heldout.parquet")
    out = tmp_path / "teacher"
    monkeypatch.setattr(sys, "argv", [
        "train.py", "--text", str(tmp_path / "text"), "--out", str(out), "--vocab", "600", "--tokens", "4096",
        "--batch-tokens", "512", "--contexts", "64", "128", "--shares", "0.5", "0.5", "--layers", "5", "--width", "64",
        "--heads", "4", "--kv-heads", "2", "--ffn", "64", "--recall-examples", "8", "--device", "cpu", "--float32"])
    script.main()
    record = json.loads((out / "training.json").read_text())
    assert record["tokens"] == 4096 and record["log"][-1]["text_nats"] < math.log(600)
    made = hl.load_teacher(str(out), device="cpu")
    assert made.model.config.num_hidden_layers == 5 and "never paired" in (out / "README.md").read_text()
