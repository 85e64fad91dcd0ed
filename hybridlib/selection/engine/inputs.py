"""Where the inputs of candidates are, in this process or on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedModel

from hybridlib.distill.corpus import Tokens, load_tokens
from hybridlib.models.hybrid import load_hybrid
from hybridlib.models.passes import TeacherStates
from hybridlib.models.teachers import load_teacher, readable, weight_files
from hybridlib.records.folders import sha256_of
from hybridlib.selection.cost import held_beside

__all__ = ["LoadedInputs", "ScoringInputs", "weights_sha256"]


@dataclass(frozen=True)
class LoadedInputs:
    """Inputs of candidates as they lie in this process.

    `states`, the teacher's, are shared by the candidates; None computes them in every step. `alive` has what the next
    task may go on with, and does not travel; `beside` is for `Meter`.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    tokens: Tokens
    states: TeacherStates | None = None
    alive: dict = field(default_factory=dict, compare=False, repr=False)
    beside: int = field(init=False, compare=False, repr=False)

    def __post_init__(self):
        limit = self.teacher.config.max_position_embeddings
        if self.tokens.context > limit:
            raise ValueError(f"context={self.tokens.context} is beyond the teacher's {limit}; load tokens with a "
                             "shorter one")
        object.__setattr__(self, "beside", held_beside(self.teacher, self.student))

    def __reduce__(self):
        return LoadedInputs, (self.student, self.teacher, self.tokens, self.states)

    @property
    def context(self) -> int:
        return self.tokens.context

    def load(self) -> LoadedInputs:
        return self

    def forget(self) -> None:
        """Free what `alive` holds."""
        for name in {"cohort", "step"} & set(self.alive):
            self.alive[name][1].release()
        self.alive.clear()


@dataclass(frozen=True)
class ScoringInputs:
    """Where the inputs of candidates are, so that a worker can load them itself; it keeps those that it loaded last.

    Parameters
    ----------
    student : folder of the aligned student, one that every worker sees.
    student_sha256, fingerprint : of its weights (see `weights_sha256`) and of the tokens; a worker refuses others.
    teacher, corpus, context, seed, device : as `load_teacher` and `load_tokens` take them.
    max_tokens, heldout_tokens : training and held-out tokens to load; `heldout_rows` (first, end) are measured on.
    memory : bytes for the teacher's states, see `TeacherStates`.
    """

    student: str
    student_sha256: str
    teacher: str
    corpus: str
    context: int
    seed: int
    max_tokens: int
    heldout_tokens: int
    heldout_rows: tuple[int, int]
    fingerprint: str
    device: str = "auto"
    memory: int = 4 * 2**30

    def load(self) -> LoadedInputs:
        """Load everything; raises ValueError if it is not what the scoring began with."""
        return _load(self)


@lru_cache(maxsize=1)
def _load(inputs):
    if weights_sha256(inputs.student) != inputs.student_sha256:
        raise ValueError(f"student={inputs.student!r} holds other weights than those to be scored; "
                         "let every worker see the same folder")
    teacher = load_teacher(inputs.teacher, device=inputs.device)
    whole = load_tokens(inputs.corpus, teacher.tokenizer, inputs.context, inputs.seed, max_tokens=inputs.max_tokens,
                        heldout_tokens=inputs.heldout_tokens)
    rows = whole.heldout[slice(*inputs.heldout_rows)]
    tokens = Tokens(whole.train, rows, whole.tokenizer, whole.source, whole.seed)
    if tokens.fingerprint != inputs.fingerprint:
        raise ValueError(f"corpus={inputs.corpus!r} gives other tokens here than where the scoring began; "
                         "let every worker see the same files")
    student = load_hybrid(inputs.student, device=inputs.device, teacher=teacher)
    return LoadedInputs(student, teacher.model, tokens, TeacherStates(teacher.model, inputs.memory))


def weights_sha256(folder: str | Path) -> str:
    """The sha256 over the weights of a saved hybrid, those that `load_hybrid` reads; ValueError if one is missing."""
    with readable(f"folder={str(folder)!r}", "safetensors weights"):
        files = weight_files(Path(folder))
    return sha256_of(*files)
