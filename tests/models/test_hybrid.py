"""Hybrids: logit parity with the teacher, what the transfer does to heads, saving and loading, refusals."""

from __future__ import annotations

import json
import os

import pytest
import torch
from tests.conftest import FAMILIES
from transformers import AutoModelForCausalLM

import hybridlib as hl
from hybridlib.models.hybrid import softmax_layers
from hybridlib.models.teachers import Teacher

IDS = torch.randint(0, 64, (2, 23), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mixer", ["gdn", "gla"])
@pytest.mark.parametrize("family", FAMILIES)
def test_restoring_all_layers_gives_the_teachers_logits(tiny_teacher, family, mixer):
    teacher = tiny_teacher(family)
    student = hl.linearize(teacher, mixer)
    hybrid = hl.restore(student, teacher, range(3)).eval()
    assert softmax_layers(hybrid.config) == (0, 1, 2)
    expected = teacher(input_ids=IDS).logits
    torch.testing.assert_close(hybrid(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert (student.eval()(input_ids=IDS).logits - expected).abs().max() > 0.1  # the linear student differs


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_gives_the_students_logits(tiny_teacher, family, tmp_path):
    teacher = tiny_teacher(family)
    hybrid = hl.restore(hl.linearize(teacher, "gla", teacher_name="tiny", teacher_revision="r1"), teacher, [1]).eval()
    with torch.no_grad():  # as after stage 2: every weight differs from the teacher's, the output head too
        for p in hybrid.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    expected = hybrid(input_ids=IDS).logits
    hybrid.save_pretrained(tmp_path / "hybrid")
    loaded = hl.load_hybrid(tmp_path / "hybrid")
    assert torch.equal(loaded(input_ids=IDS).logits, expected)
    assert loaded.config.mixer == "gla" and softmax_layers(loaded.config) == (1,)
    assert (loaded.config.teacher_name, loaded.config.teacher_revision) == ("tiny", "r1")
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")
    assert torch.equal(by_transformers(input_ids=IDS).logits, expected)


def test_restore_leaves_student_and_teacher_as_they_were(tiny_teacher):
    teacher = tiny_teacher()
    student = hl.linearize(teacher)
    before = {k: v.clone() for m in (student, teacher) for k, v in m.state_dict().items()}
    hybrid = hl.restore(student, teacher, [2])
    with torch.no_grad():
        for p in hybrid.parameters():
            p.zero_()
    after = {k: v for m in (student, teacher) for k, v in m.state_dict().items()}
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("family", ["llama_tied_bias", "qwen2"])
def test_each_query_head_gets_the_key_head_that_it_reads_in_the_teacher(tiny_teacher, family):
    teacher = tiny_teacher(family)
    attention, x = teacher.model.layers[0].self_attn, torch.randn(1, 5, 32)
    keys = attention.k_proj(x).unflatten(-1, (2, 8))  # (batch, time, kv_heads, dim)
    right = hl.linearize(teacher).model.layers[0].self_attn.k_proj(x).unflatten(-1, (4, 8))
    for head in range(4):
        torch.testing.assert_close(right[:, :, head], keys[:, :, head // 2])
    rows = hl.linearize(teacher, kv_transfer="repeat_rows").model.layers[0].self_attn.k_proj(x).unflatten(-1, (4, 8))
    assert (rows[:, :, 0] - keys[:, :, 0]).abs().max() > 0.1


@pytest.mark.parametrize(("layers", "message"), [([3], "from 0 to 2"), ([-1], "from 0 to 2"), ([1, 1], "layer 1 twice"),
                                                 ([0.5], "whole number"), ([True], "whole number")])
def test_bad_layers_are_refused(tiny_teacher, layers, message):
    teacher = tiny_teacher()
    with pytest.raises(ValueError, match=message):
        hl.restore(hl.linearize(teacher), teacher, layers)


def test_bad_names_and_teachers_are_refused(tiny_teacher):
    teacher = tiny_teacher()
    with pytest.raises(ValueError, match="mixer='mamba' is unknown"):
        hl.linearize(teacher, "mamba")
    with pytest.raises(ValueError, match="kv_transfer='rows' is unknown"):
        hl.linearize(teacher, kv_transfer="rows")
    with pytest.raises(ValueError, match="num_hidden_layers=2, but the student has 3"):
        hl.restore(hl.linearize(teacher), tiny_teacher(layers=2), [0])


@pytest.fixture
def saved(tiny_teacher, tmp_path):
    hybrid = hl.linearize(tiny_teacher(), teacher_name="tiny", teacher_revision="r1")
    hybrid.save_pretrained(tmp_path / "hybrid")
    return tmp_path / "hybrid"


def test_damaged_or_foreign_checkpoints_are_refused_by_name(saved, tiny_teacher, tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        hl.load_hybrid(tmp_path / "nowhere")
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="'llama', which is no hybrid"):
        hl.load_hybrid(tmp_path / "teacher")
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "mixer": "gla"}))
    with pytest.raises(ValueError, match="21 weights too few or too many for its config"):
        hl.load_hybrid(saved)
    other = ["full_attention"] + config["layer_types"][1:]
    (saved / "config.json").write_text(json.dumps({**config, "layer_types": other}))
    with pytest.raises(ValueError, match="weights"):
        hl.load_hybrid(saved)
    (saved / "config.json").write_text(json.dumps(config))
    weights = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(weights[:len(weights) // 2])
    with pytest.raises(ValueError, match="no safetensors weights .*that can be read"):
        hl.load_hybrid(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no config.json that can be read .*JSON"):
        hl.load_hybrid(saved)


def test_another_teacher_revision_is_refused(saved, tiny_teacher):
    hl.load_hybrid(saved, teacher=Teacher(tiny_teacher(), None, "tiny", "r1"))
    with pytest.raises(ValueError, match="revision r1, but the teacher given is revision r2"):
        hl.load_hybrid(saved, teacher=Teacher(tiny_teacher(), None, "tiny", "r2"))


def test_a_full_disk_leaves_the_saved_model_as_it_was(saved, tiny_teacher, monkeypatch):
    before = {f.name: f.read_bytes() for f in saved.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="could not save .* unchanged"):
        hl.linearize(tiny_teacher(), seed=5).save_pretrained(saved)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_saved_files_and_checkpoints_have_the_mode_that_the_umask_gives(tiny_teacher, tiny_tokens, tmp_path, mask):
    old, teacher = os.umask(mask), tiny_teacher()
    try:
        hybrid = hl.linearize(teacher)
        hl.match(hybrid, teacher, tiny_tokens, 64, settings=hl.MatchSettings(batch_tokens=64),
                 checkpoint=tmp_path / "run" / "checkpoint.safetensors")
        hybrid.save_pretrained(tmp_path / "hybrid")
        hybrid.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        hl.Ledger(tmp_path / "records").run("probe", {"seed": 0}, dict)
    finally:
        os.umask(old)
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert len([f for f in files if f.suffix == ".safetensors"]) > 3 and len(files) > 7
    assert {f.stat().st_mode & 0o777 for f in files} == {0o666 & ~mask}


def names(folder):
    return {f.name for f in folder.iterdir()}


@pytest.mark.parametrize("first, second", [("20KB", "1GB"), ("1GB", "20KB"), ("20KB", "40KB")])
def test_a_save_over_a_save_with_other_files_is_what_loads(tiny_teacher, tmp_path, first, second):
    old, new = (hl.linearize(tiny_teacher(), seed=seed) for seed in (0, 5))
    old.save_pretrained(tmp_path / "over", max_shard_size=first)
    (tmp_path / "over" / "notes.safetensors").write_bytes(b"mine")
    new.save_pretrained(tmp_path / "over", max_shard_size=second)
    new.save_pretrained(tmp_path / "alone", max_shard_size=second)
    assert names(tmp_path / "over") == names(tmp_path / "alone") | {"notes.safetensors"}
    expected = new(input_ids=IDS).logits
    assert not torch.equal(old(input_ids=IDS).logits, expected)
    assert torch.equal(hl.load_hybrid(tmp_path / "over")(input_ids=IDS).logits, expected)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "over")(input_ids=IDS).logits, expected)


def test_a_save_that_breaks_off_between_its_files_leaves_what_can_be_loaded(tiny_teacher, tmp_path, monkeypatch):
    old, new = (hl.linearize(tiny_teacher(), seed=seed) for seed in (0, 5))
    either = [m(input_ids=IDS).logits for m in (old, new)]
    for first, second in (("20KB", "1GB"), ("1GB", "20KB")):
        for stop in range(40):
            folder, replace = tmp_path / f"{first}-{stop}", os.replace
            old.save_pretrained(folder, max_shard_size=first)
            left = iter(range(stop))

            def killed(source, target, left=left, replace=replace):
                if next(left, None) is None:
                    raise KeyboardInterrupt
                replace(source, target)

            with monkeypatch.context() as patch:
                patch.setattr("hybridlib.models.hybrid.os.replace", killed)
                try:
                    new.save_pretrained(folder, max_shard_size=second)
                except KeyboardInterrupt:
                    loaded = hl.load_hybrid(folder)(input_ids=IDS).logits
                    assert any(torch.equal(loaded, logits) for logits in either)
                else:
                    break
        assert stop > 1
        assert torch.equal(hl.load_hybrid(folder)(input_ids=IDS).logits, either[1])


def test_only_what_the_index_names_is_read(tiny_teacher, tmp_path, monkeypatch):
    hybrid, folder = hl.linearize(tiny_teacher()), tmp_path / "hybrid"
    hl.linearize(tiny_teacher(), seed=5).save_pretrained(tmp_path / "other")
    hybrid.save_pretrained(folder, max_shard_size="20KB")
    (tmp_path / "other" / "model.safetensors").rename(folder / "model.safetensors")
    for stray in ("pytorch_model.bin", "adapter_model.bin", "model-00099-of-00099.safetensors"):
        (folder / stray).write_bytes(b"stray")
    (folder / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(torch, "load", None)
    assert torch.equal(hl.load_hybrid(folder)(input_ids=IDS).logits, hybrid(input_ids=IDS).logits)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for bad in ("pytorch_model.bin", "../other/model.safetensors"):
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({**index, "weight_map": dict.fromkeys(index["weight_map"], bad)}))
        with pytest.raises(ValueError, match=f"index.json names '{bad}', which is no safetensors file beside it"):
            hl.load_hybrid(folder)
