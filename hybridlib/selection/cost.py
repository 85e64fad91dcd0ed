"""What a score costs: tokens, passes, estimated FLOPs, seconds, peak memory and device, counted alike for every scorer.

A scorer keeps a `Meter` and tells it what it lets each model read; the `Cost` that comes out is kept with its scores.
What came before, the alignment of the student, is not in it: all scores that need the student share one.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import torch
from torch import nn

from hybridlib.models.mixers import GatedDeltaNet, GatedLinearAttention
from hybridlib.records.provenance import describe_device

__all__ = ["Cost", "Meter", "forward_flops", "held_beside", "heldout_size", "one_run_a_layer_flops", "training_flops"]

_STATE_FLOPS = {GatedDeltaNet: 7, GatedLinearAttention: 5}  # for each entry of the state: see `forward_flops`


@dataclass(frozen=True)
class Cost:
    """What was spent.

    Parameters
    ----------
    forward_tokens : tokens that a whole model (teacher, student, hybrid, gated model) read without a backward pass,
        each model's own reading counted: n tokens of training read by teacher and student are n here, n below.
    training_tokens : tokens that went forward and backward, whether weights or only gates were trained.
    passes : how often a model went over a body of text (held-out rows, prompts, training rows), with or without the
        way back.
    flops : estimated, see `forward_flops` and `training_flops`.
    seconds : wall time.
    peak_memory : most bytes that tensors held on the GPU (``torch.cuda.max_memory_allocated``) for this work: the
        models that a `Meter` was given, and all that was allocated since. What else lay there before is left out; in
        records older than that rule it is in. None on a CPU, where nothing counts them.
    device : what it ran on.

    The sum of two is what both take one after the other; memory is then the larger peak.
    """

    forward_tokens: int = 0
    training_tokens: int = 0
    passes: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    peak_memory: int | None = None
    device: str = ""

    @property
    def tokens(self) -> int:
        """All tokens read, forward or forward and backward."""
        return self.forward_tokens + self.training_tokens

    def __add__(self, other: Cost) -> Cost:
        peaks = [c.peak_memory for c in (self, other) if c.peak_memory is not None]
        devices = dict.fromkeys(d for c in (self, other) for d in c.device.split("; ") if d)
        return Cost(self.forward_tokens + other.forward_tokens, self.training_tokens + other.training_tokens,
                    self.passes + other.passes, self.flops + other.flops, self.seconds + other.seconds,
                    max(peaks, default=None), "; ".join(devices))

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, given: dict) -> Cost:
        """From `to_dict`. Raises ValueError if a field is missing or unknown."""
        names = {f.name for f in fields(cls)}
        if set(given) != names:
            raise ValueError(f"cost has the fields {sorted(given)}; it must have {sorted(names)}")
        return cls(**given)

    @staticmethod
    def total(costs: Iterable[Cost]) -> Cost:
        """The sum of `costs`; of none, nothing."""
        return sum(costs, Cost())


class Meter:
    """Counts what is read from now on; `cost` tells it.

    Parameters
    ----------
    models : those of the work that are there already, at least one; the device of the first is the one that is watched.
    beside : bytes on that GPU that are not this work's, `held_beside` of the models by default. The parts of a larger
        job, each with a meter, take what lay there when the job began, so that what one part leaves for the next is
        counted.

    On a GPU the peak of memory counts from here: a meter that is made while another runs cuts the other's peak off,
    so let the larger job sum the costs of its parts.
    """

    def __init__(self, *models: nn.Module, beside: int | None = None):
        self._device = next(models[0].parameters()).device
        self._beside = held_beside(*models) if beside is None else beside
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._forward = self._training = self._passes = 0
        self._flops, self._started = 0.0, time.perf_counter()

    def forward(self, model: nn.Module, tokens: int, context: float, *, head: bool = True, passes: int = 1) -> None:
        """`model` read `tokens` (in all `passes` together) in rows of `context`, with its output `head` or without."""
        self._forward += tokens
        self._passes += passes
        self._flops += tokens * forward_flops(model if head else model.model, context)

    def train(self, model: nn.Module, tokens: int, context: float, *, frozen: bool = False, passes: int = 1) -> None:
        """`model` read `tokens` forward and backward; `frozen` if no weight was trained."""
        self._training += tokens
        self._passes += passes
        self._flops += tokens * training_flops(model, context, frozen=frozen)

    def parts(self, modules: Iterable[nn.Module], tokens: int, context: float) -> None:
        """Single modules of a model read `tokens` beside a pass that is counted by `forward`: their FLOPs alone."""
        self._flops += tokens * sum(forward_flops(m, context) for m in modules)

    def stage_2(self, hybrid: nn.Module, teacher: nn.Module, trained: int, measured: int, context: int,
                taught: int | None = None) -> None:
        """A stage 2 of `trained` tokens (0: none) and a held-out KL over `measured`.

        `taught` is how many of both the teacher read; None for all of them.
        """
        taught = trained + measured if taught is None else taught
        self.forward(teacher, taught, context, passes=0 if taught == 0 else 2 if trained else 1)
        if trained:
            self.train(hybrid, trained, context)
        self.forward(hybrid, measured, context)

    def cost(self) -> Cost:
        """What was spent up to now."""
        cuda = self._device.type == "cuda"
        peak = max(0, torch.cuda.max_memory_allocated(self._device) - self._beside) if cuda else None
        return Cost(self._forward, self._training, self._passes, self._flops, time.perf_counter() - self._started,
                    peak, describe_device("auto" if cuda else "cpu"))


def held_beside(*models: nn.Module) -> int:
    """Bytes that tensors hold on the GPU of these models beside the models themselves; 0 on a CPU.

    What Python can no longer reach is collected before, for it would be given back at some moment of the work.
    """
    device = next(models[0].parameters()).device
    if device.type != "cuda":
        return 0
    gc.collect()
    storages = [t.untyped_storage() for m in models for t in (*m.parameters(), *m.buffers()) if t.device == device]
    own = {storage.data_ptr(): storage.nbytes() for storage in storages}  # models may share weights
    return max(0, torch.cuda.memory_allocated(device) - sum(own.values()))


def heldout_size(tokens, heldout_tokens: int | None) -> int:
    """Tokens in the held-out rows of `tokens` that a scorer reads, given at most how many it may."""
    rows = len(tokens.heldout)
    rows = rows if heldout_tokens is None else min(rows, max(1, heldout_tokens // tokens.context))
    return rows * tokens.context


def forward_flops(module: nn.Module, context: float) -> float:
    """Estimated floating point operations of a forward pass, a token, in rows of `context` tokens.

    - Each linear layer, the output head among them: 2 x inputs x outputs (a multiplication and an addition a weight).
    - Softmax attention: 4 x heads x head_dim x context, the two products of scores and values over the whole square;
      a kernel that skips what lies ahead of a token needs down to half of it.
    - A mixer, per entry of its heads x head_dim x head_dim state, as the recurrence has it: decay 1, writing 2, reading
      2, and for the delta rule 2 more to read what is stored under the key. Kernels in chunks do more than that.

    Norms, activations, rotary embeddings, biases and the input embedding's look-up are left out.
    """
    products, mixing = _flops(module, context)
    return products + mixing


def training_flops(module: nn.Module, context: float, *, frozen: bool = False) -> float:
    """As `forward_flops`, forward and backward: 3 times as much.

    A product's gradient takes two products of its size, one for its input and one for its weight; if the weights are
    `frozen`, one. The optimizer and activations that are computed again are left out.
    """
    products, mixing = _flops(module, context)
    return (2 if frozen else 3) * products + 3 * mixing


def one_run_a_layer_flops(student: nn.Module, teacher: nn.Module, num_tokens: int, heldout_tokens: int,
                          context: int) -> float:
    """Estimated FLOPs of scoring every layer by a stage 2 of its own (GA-S2, GR-S2) with the teacher's pass shared.

    Each of the L layers costs `num_tokens` of training of the `student` with that layer's attention restored and a pass
    over `heldout_tokens`; the teacher makes one pass over both for all. Layers are taken to be alike.
    """
    mixer, attention = student.model.layers[0].self_attn, teacher.model.layers[0].self_attn
    trained, read = (flops(student, context) - flops(mixer, context) + flops(attention, context)
                     for flops in (training_flops, forward_flops))
    return (student.config.num_hidden_layers * (num_tokens * trained + heldout_tokens * read)
            + (num_tokens + heldout_tokens) * forward_flops(teacher, context))


def _flops(module, context):
    """(products with weights, mixing along time), FLOPs a token."""
    products = mixing = 0.0
    for part in module.modules():
        if isinstance(part, nn.Linear):
            products += 2 * part.weight.numel()
        elif type(part) in _STATE_FLOPS:
            mixing += _STATE_FLOPS[type(part)] * part.num_heads * part.head_dim ** 2
        elif hasattr(part, "q_proj") and hasattr(part, "head_dim"):
            mixing += 4 * part.q_proj.out_features * context
    return products, mixing
