"""Fixtures that several test files share."""

import json
from pathlib import Path

import pandas as pd
import papermill
import pytest
import yaml
from jupyter_client import KernelManager
from jupyter_client.session import Session
from tests.processes import fork_context, run_interpreted

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ROOT / "notebooks" / "profiles"
NOTEBOOKS = ("importance_scoring", "add_or_remove", "kl_or_mse", "gdn_to_gla")
CONTESTS = ("selectors", "cost_of_selection")  # notebooks with one parameter more, and profiles of their own
SPEED = "mixers_and_speed"  # notebooks with parameters of their own, and maybe profiles
ORACLE = "oracle"
STABILITY = "stability"
PUBLISHED = "published_sets"
RANDOM = "sets_not_layers"
WHY = "why_these_layers"
OTHERS = (*CONTESTS, PUBLISHED, ORACLE, STABILITY, RANDOM, WHY, SPEED)
CONTEST_SETTINGS = dict(teacher="tiny", corpus="pattern", context=16, align_tokens=256, score_tokens=64,
                        match_tokens=128, batch_tokens=64, heldout_tokens=64, seeds=2, recall_pairs=2, budget=2,
                        device="cpu")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    """Tests that share what takes long to make go to one worker, so that it is made once."""
    for item in items:
        for name in {"executed_notebooks", "interpreted", "processes"} & set(item.fixturenames):
            item.add_marker(pytest.mark.xdist_group(name))


def profile_path(name: str, profile: str) -> Path:
    """The profile that `make book` gives a notebook: its own, where it has one."""
    own = PROFILES / name / f"{profile}.yaml"
    return own if own.is_file() else PROFILES / f"{profile}.yaml"


@pytest.fixture(scope="session")
def smoke_profile() -> dict:
    """Parameters of the smoke profile."""
    return yaml.safe_load((PROFILES / "smoke.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def smoke_results(tmp_path_factory) -> Path:
    """The folder of the records that `executed_notebooks` writes."""
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="session")
def smoke_teacher(tmp_path_factory) -> str:
    """A folder of the lab teacher's first four layers: notebooks do the same with it as with all eight."""
    from hybridlib import load_teacher

    teacher, folder = load_teacher("lab", device="cpu"), tmp_path_factory.mktemp("teacher")
    teacher.model.model.layers = teacher.model.model.layers[:4]
    teacher.model.config.num_hidden_layers = 4
    teacher.model.save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
    return str(folder)


class SharedKernel(KernelManager):
    """A kernel whose clients follow one another: each has a session of its own, or it would get another's replies."""

    def client(self, **options):
        return super().client(session=Session(key=self.session.key), **options)

    def forget(self):
        """Take all names away from the kernel."""
        client = self.client()
        client.start_channels()
        client.execute_interactive("%reset -f", timeout=180)
        client.stop_channels()


@pytest.fixture(scope="session")
def executed_notebooks(tmp_path_factory, smoke_results, smoke_teacher) -> dict[str, Path]:
    """Each notebook run by papermill under the smoke profile but for its teacher: its name and the executed copy.

    One kernel, which imports torch once, runs them one after another and forgets all names in between.
    """
    folder, changes = tmp_path_factory.mktemp("executed"), {"results": str(smoke_results), "teacher": smoke_teacher}
    executed, kernel = {name: folder / f"{name}.ipynb" for name in (*NOTEBOOKS, *OTHERS)}, SharedKernel()
    kernel.start_kernel(cwd=ROOT)
    try:
        for name, path in executed.items():
            kernel.forget()
            profile = yaml.safe_load(profile_path(name, "smoke").read_text(encoding="utf-8"))
            papermill.execute_notebook(ROOT / "notebooks" / f"{name}.ipynb", path, parameters=profile | changes,
                                       kernel_name="python3", progress_bar=False, km=kernel)
    finally:
        kernel.shutdown_kernel(now=True)
    return executed


@pytest.fixture(scope="session")
def interpreted() -> dict[str, tuple[int, str]]:
    """The checks of kernels in Triton's interpreter: name -> exit status and what was printed."""
    return run_interpreted()


@pytest.fixture(scope="session")
def processes():
    """A multiprocessing context for tests whose processes need hybridlib: they are forks of one that imported it."""
    return fork_context()


FAMILIES = ("llama", "llama_tied_bias", "qwen2", "qwen2_tied", "qwen3", "mistral")


@pytest.fixture(scope="session")
def tiny_teacher():
    """make(family, layers=3, **config): a tiny random teacher in float32 and eval mode, biases and norms random too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(family="llama", layers=3, **config):
        settings = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
                        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                        initializer_range=0.2, tie_word_embeddings="tied" in family)
        settings |= {"head_dim": 16} if family in ("qwen3", "mistral") else {}  # inner width is not the model's
        settings |= {"attention_bias": True} if "bias" in family else {}
        settings |= {"sliding_window": None} if family == "mistral" else {}
        torch.manual_seed(0)
        config = AutoConfig.for_model(family.split("_")[0], **settings | config)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for name, p in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                p.add_(0.3 * torch.randn(p.shape))
        return model

    return make


@pytest.fixture(scope="session")
def tiny_tokens():
    """Rows of 16 tokens with a pattern to learn (each token follows from the one before), and held-out ones."""
    import torch

    from hybridlib.distill.corpus import Tokens

    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, 64, (72, 1), generator=generator)
    rows = (start + 7 * torch.arange(16)) % 64
    return Tokens(rows[:64].int(), rows[64:].int(), source="pattern", seed=0)


class Characters:
    """A tokenizer of one token a character, of an alphabet that the tiny teachers have room for."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0
    alphabet = "\n abcdefghijklmnopqrstuvwxyz0123456789:.,()ABCDEFGHLPQZ"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [self.alphabet.find(c) + 3 for c in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.alphabet[i - 3:i - 2] for i in ids if i > 2)


@pytest.fixture(scope="session")
def characters():
    return Characters()


@pytest.fixture(scope="module")
def aligned(tiny_teacher, tiny_tokens):
    """(student, teacher): a tiny teacher and its aligned all-linear student, which tests leave as they are."""
    import hybridlib as hl

    teacher = tiny_teacher("llama")
    student = hl.linearize(teacher)
    hl.align(student, teacher, tiny_tokens, 2048, settings=hl.AlignSettings(batch_tokens=128, learning_rate=1e-2))
    return student, teacher


@pytest.fixture(scope="session")
def tiny_files(tiny_teacher, tmp_path_factory):
    """``teacher`` and ``corpus`` of a study's settings: folders of a tiny teacher and of text with a pattern."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("files")
    words = {f"w{i}": i for i in range(63)} | {"<end>": 63}
    plain = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny_teacher("llama").save_pretrained(folder / "teacher")
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>").save_pretrained(folder / "teacher")
    (folder / "corpus").mkdir()
    for name, documents in (("train", range(40)), ("heldout", range(40, 50))):
        texts = [" ".join(f"w{(n + 5 * i * (n % 3 + 1)) % 63}" for i in range(47)) for n in documents]
        (folder / "corpus" / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return {"teacher": str(folder / "teacher"), "corpus": str(folder / "corpus")}


def contest_row(title, needs, seed, layers, kl, recall, flops, values=None):
    """A row of `hybridlib.study.contest.Contest`."""
    return {"selector": title, "name": title, "needs": needs, "seed": seed, "layers": layers, "note": "",
            "values": values, "kl": kl, "recall_exact": recall, "forward_tokens": flops, "training_tokens": 0.0,
            "passes": 1.0, "flops": flops, "seconds": flops / 1e3, "peak_memory": float("nan")}


@pytest.fixture
def known():
    """Four layers, two kept: `free` is bad; `cheap` is as good as GA-S2 at a tenth; `dear` is the best in recall."""
    from hybridlib.study.contest import FLOOR, Contest

    ga, rows = [(4.0, 3.0, 2.0, 1.0), (4.0, 3.0, 1.0, 2.0)], []
    for seed, jitter in ((0, 0.0), (1, 0.001)):
        rows += [contest_row("free", "nothing", seed, (1, 3), 0.9 + 2 * jitter, 0.1, 0.0),
                 contest_row("cheap", "student", seed, (0, 1), 0.3 + jitter, 0.5, 1e5, ga[0]),
                 contest_row("GA-S2", "stage 2", seed, (0, 1), 0.3 + jitter, 0.5, 1e6, ga[seed]),
                 contest_row("dear", "stage 2", seed, (0, 2), 0.5 + 3 * jitter, 0.8 + jitter, 1e7, ga[seed]),
                 contest_row(FLOOR, "nothing", seed, (), 2.0, 0.0, 0.0) | {"name": "none"}]
    return Contest(pd.DataFrame(rows[0::5] + rows[1::5] + rows[2::5] + rows[3::5] + rows[4::5]), {},
                   {"recall_exact": 1.0}, 4, {}, "this CPU")
