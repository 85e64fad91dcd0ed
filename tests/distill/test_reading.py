"""Reading: items of files, and their scores against a plain loop, an item at a time, without padding or cache."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

import hybridlib as hl
from hybridlib.distill.reading import (ReadingItem, load_reading, reading_figures, reading_files, score_reading)


def plainly_written(model, tokenizer, prompt, new_tokens):
    """The text that the model writes, a pass over all of it a token, and the prompt's ids."""
    ids = [tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]
    written = []
    while len(written) < new_tokens and written[-1:] != [tokenizer.eos_token_id]:
        written.append(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax().item())
    return tokenizer.decode(written), ids


def plainly_forced(model, tokenizer, ids, answer):
    right = True
    for i in tokenizer(answer)["input_ids"]:
        right, ids = right and model(input_ids=torch.tensor([ids])).logits[0, -1].argmax() == i, [*ids, i]
    return bool(right)


@pytest.mark.parametrize("kind", ["teacher", "gdn", "gla"])
@torch.no_grad()
def test_scores_are_those_of_a_plain_loop(tiny_teacher, characters, kind):
    model = tiny_teacher()
    if kind != "teacher":
        model = hl.restore(hl.linearize(model, kind), model, [1])
    items, generator = [], torch.Generator().manual_seed(3)
    for i in range(40):
        letters = torch.randint(3, 40, (int(torch.randint(1, 40, (), generator=generator)),), generator=generator)
        prompt = characters.decode(letters.tolist()) + " " * (i % 4 < 3)
        written, _ = plainly_written(model, characters, prompt, 8)
        values = (written[:2], written[:2].upper(), "qq", written[1:3])
        items.append(ReadingItem(f"item {i}", prompt, values[i % 4] or "z", 8))
    plain = {"written": [], "teacher_forced": []}
    for item in items:
        written, ids = plainly_written(model, characters, item.prompt, 8)
        plain["written"].append(item.value.lower() in written.split("\n")[0].lower())
        plain["teacher_forced"].append(plainly_forced(model, characters, ids, item.example.turns[0][1]))
    for mode, hits in plain.items():
        score = score_reading(model, characters, items, mode=mode, batch_size=7)
        assert score.hits == tuple(hits) and 0.1 < score.share < 0.95
        assert score.share == sum(hits) / 40 and score.stderr == (score.share * (1 - score.share) / 40) ** 0.5
    fewer = score_reading(model, characters, items, new_tokens=1)
    assert fewer.hits == score_reading(model, characters, items, new_tokens=1, batch_size=40).hits
    assert fewer.share < score_reading(model, characters, items).share
    figures = reading_figures(model, characters, {"a": items, "b": items[:3]})
    assert list(figures) == ["a", "b"] and len(figures["b"]["written_hits"]) == 3
    assert figures["a"]["teacher_forced_hits"] == "".join(str(int(hit)) for hit in plain["teacher_forced"])


def test_files_hold_items(tmp_path):
    rows = pd.DataFrame({"doc_id": ["a", "b", "c"], "value": ["four", "six", "8"],
                         "text": ["One, two, three:", "Then he says \"six\" again.\nThen he says \"", "end "]})
    rows.to_parquet(tmp_path / "cloze.parquet")
    rows.assign(key="next").to_parquet(tmp_path / "fields.parquet")
    (tmp_path / "README.md").write_text("text")
    files = reading_files([str(tmp_path)])
    assert files == {stem: tmp_path / f"{stem}.parquet" for stem in ("cloze", "fields")}
    items = load_reading(files["cloze"])
    assert [item.example.turns[0] for item in items] == [("", " four"), ("", "six"), ("", "8")]
    assert [item.new_tokens for item in items] == [24] * 3 and items[0].name == "item 0 (a) of cloze"
    assert [item.new_tokens for item in load_reading(files["fields"], 2)] == [48] * 2
    for names, message in ((["no"], "reading names 'no', which is neither"),
                           ([str(tmp_path), str(files["cloze"])], "reading names 'cloze' twice")):
        with pytest.raises(ValueError, match=message):
            reading_files(names)


@pytest.mark.parametrize(("columns", "message"), [
    ({"text": ["a"], "value": ["b"]}, "has 1 rows of text, value; items need the columns doc_id, text, value"),
    ({"doc_id": [], "text": [], "value": []}, "has 0 rows"),
    ({"doc_id": ["x", "y"], "text": ["a", "b"], "value": ["b", " "]}, r"item 1 \(y\) of bad has a text or a value"),
    (None, "is not readable as parquet")])
def test_bad_files_are_refused(tmp_path, columns, message):
    path = tmp_path / "bad.parquet"
    path.write_text("no") if columns is None else pd.DataFrame(columns).to_parquet(path)
    with pytest.raises(ValueError, match=message):
        load_reading(path)


def test_bad_calls_are_refused(tiny_teacher, characters):
    items = [ReadingItem("short", "a", "b", 8), ReadingItem("item 1 (x) of long", "a" * 56, "b", 8)]
    for arguments, message in ((dict(items=items), r"item 1 \(x\) of long takes 65 tokens .* context is 64"),
                               (dict(items=[]), "items is empty"), (dict(items=items, mode="spoken"), "mode='spoken'"),
                               (dict(items=items, new_tokens=0), "new_tokens=0")):
        with pytest.raises(ValueError, match=message):
            score_reading(tiny_teacher(), characters, **arguments)
