"""Settings of the two stages, and the history of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from hybridlib.checks import check_choice, check_int, check_number
from hybridlib.distill.objectives import check_divergence

__all__ = ["GROUPINGS", "AlignSettings", "DistillationDiverged", "History", "MatchSettings"]

GROUPINGS = ("attention", "mixers")  # the weights that stage 2 trains at the attention rate, see `MatchSettings`


class DistillationDiverged(RuntimeError):
    """Training met a number that is not finite, or a loss far above its start; says where and what to try."""


@dataclass(frozen=True)
class _Settings:
    """Settings that both stages share.

    Parameters
    ----------
    batch_tokens : tokens a step; rounded down to whole rows, at least one.
    micro_batch_tokens : tokens a forward pass, None for the whole batch; smaller needs less memory, same gradients.
    schedule : ``"cosine"`` (down to a tenth) or ``"constant"``, after a linear warm-up.
    warmup : share of the steps over which the rates rise from 0.
    clip : largest norm of the gradient over all trained weights.
    checkpoint_every : tokens between two checkpoints.
    compile, cuda_graph : on a GPU, ``torch.compile`` the layers (a minute, once), and replay a recorded step.
    divergence_factor : stop if a step's loss is this many times the mean of the first ten steps, or `loss_floor`.
    """

    batch_tokens: int = 16_384
    micro_batch_tokens: int | None = None
    schedule: str = "constant"
    warmup: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    checkpoint_every: int = 5_000_000
    compile: bool = False
    cuda_graph: bool = False
    divergence_factor: float = 10.0
    loss_floor: float = 0.1

    def __post_init__(self):
        check_int("batch_tokens", self.batch_tokens, 1)
        if self.micro_batch_tokens is not None:
            check_int("micro_batch_tokens", self.micro_batch_tokens, 1)
        check_choice("schedule", self.schedule, ("cosine", "constant"))
        check_number("warmup", self.warmup, 0, 1)
        check_number("weight_decay", self.weight_decay, 0)
        check_number("clip", self.clip, 0, open_low=True)
        check_int("checkpoint_every", self.checkpoint_every, 1)
        for name in ("compile", "cuda_graph"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is neither True nor False")
        check_number("divergence_factor", self.divergence_factor, 1, open_low=True)

    def step_rows(self, context: int) -> int:
        """Rows of `context` tokens in a step."""
        return max(1, self.batch_tokens // context)

    def numbers(self) -> dict:
        """The settings that a run's figures depend on, as JSON has them: all but `compile` and `cuda_graph`."""
        return json.loads(json.dumps({k: v for k, v in asdict(self).items() if k not in ("compile", "cuda_graph")}))


@dataclass(frozen=True)
class AlignSettings(_Settings):
    """Stage 1 (paper: 100M tokens at context 512, rate 1e-3, cosine). `normalize` as in `objectives.alignment_loss`."""

    learning_rate: float = 1e-3
    schedule: str = "cosine"
    normalize: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_number("learning_rate", self.learning_rate, 0, open_low=True)


@dataclass(frozen=True)
class MatchSettings(_Settings):
    """Stage 2 (paper: 600M tokens at context 4096, constant rates, 7e-6 and 1e-4; its code: decay .01, no warm-up).

    `attention_learning_rate` is the rate of the weights that `grouping` names, `learning_rate` that of all others.
    Grouping ``"attention"`` is that of the authors' code: all weights of every attention layer, linear or softmax, and
    of the norm before it. ``"mixers"`` are those of linear layers alone. `divergence`, `temperature`, `alpha` and
    `beta` are as in `objectives.divergence`.
    """

    warmup: float = 0.0
    weight_decay: float = 0.01
    learning_rate: float = 7e-6
    attention_learning_rate: float = 1e-4
    grouping: str = "attention"
    temperature: float = 1.0
    divergence: str = "forward"
    alpha: float | None = None
    beta: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check_number("learning_rate", self.learning_rate, 0)
        check_number("attention_learning_rate", self.attention_learning_rate, 0)
        check_choice("grouping", self.grouping, GROUPINGS)
        check_number("temperature", self.temperature, 0, open_low=True)
        check_divergence(self.divergence, self.alpha, self.beta, name="divergence")

    def numbers(self) -> dict:
        """As in `AlignSettings`; with grouping ``"mixers"``, as records have had it before there was a choice."""
        numbers = super().numbers()
        if self.grouping == "mixers":
            del numbers["grouping"]
            numbers["mixer_learning_rate"] = numbers.pop("attention_learning_rate")
        return numbers

    @classmethod
    def from_numbers(cls, numbers: Mapping) -> MatchSettings:
        """The settings that `numbers` gave."""
        fields = dict(numbers)
        if "mixer_learning_rate" in fields:
            fields |= {"grouping": "mixers", "attention_learning_rate": fields.pop("mixer_learning_rate")}
        return cls(**fields | {"betas": tuple(fields.get("betas", cls.betas))})


@dataclass
class History:
    """The loss and the seconds since the start after `tokens[i]` tokens; `layer_losses` (stage 1) of the last step."""

    stage: str
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    elapsed: list[float] = field(default_factory=list)
    layer_losses: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def end_loss(self) -> float:
        """The mean loss of the last tenth of the steps, at least one."""
        last = self.losses[-max(1, len(self.losses) // 10):]
        return sum(last) / len(last)

    @property
    def rose(self) -> bool:
        """Whether `end_loss` is above the loss of the first step; of a run without steps it is not."""
        return bool(self.losses) and self.end_loss > self.losses[0]
