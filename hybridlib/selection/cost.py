"""What a score costs: tokens, passes, estimated FLOPs, seconds, peak memory and device, counted alike for every scorer.

A scorer tells a `Meter` what each model reads, and keeps its `Cost` with the scores. The alignment of the student is
not counted: all scores that need the student share it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import torch
from torch import nn

from hybridlib.records.provenance import describe_device

__all__ = ["Cost", "Meter", "forward_flops", "held_beside", "heldout_size", "one_run_a_layer_flops", "training_flops"]


@dataclass(frozen=True)
class Cost:
    """What was spent.

    Parameters
    ----------
    forward_tokens : tokens that a whole model (teacher, student, hybrid, gated model) read without a backward pass;
        the tokens of a training count here for the teacher, below for the student.
    training_tokens : tokens that went forward and backward, whether weights or only gates were trained.
    passes : how often a model went over a body of text (held-out rows, prompts, training rows).
    flops : estimated, see `forward_flops` and `training_flops`.
    seconds : wall time.
    peak_memory : most bytes that tensors held on the GPU (``torch.cuda.max_memory_allocated``) for this work: the
        models that a `Meter` was given and all that was allocated after. In older records also what other work held
        there. None on a CPU.
    device : what it ran on.

    The sum of two is the cost of both, one after the other; its memory is the larger peak.
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
    def from_dict(cls, values: dict) -> Cost:
        """From `to_dict`. Raises ValueError if a field is missing or unknown."""
        names = {f.name for f in fields(cls)}
        if set(values) != names:
            raise ValueError(f"cost has the fields {sorted(values)}; it must have {sorted(names)}")
        return cls(**values)

    @staticmethod
    def total(costs: Iterable[Cost]) -> Cost:
        """The sum of `costs`; of none, nothing."""
        return sum(costs, Cost())


class Meter:
    """A counter of what models read from its making on; `cost` gives the sum.

    Parameters
    ----------
    models : the models of the work, at least one; memory is watched on the device of the first.
    beside : bytes on that GPU that are not this work's, `held_beside` of the models by default. The parts of a larger
        job, each with a meter, share the value from the job's start, so that what one part leaves for the next counts.

    A new meter resets the GPU's peak of memory, also for a meter that is still in use; so a larger job sums the costs
    of its parts.
    """

    def __init__(self, *models: nn.Module, beside: int | None = None):
        self._device = next(models[0].parameters()).device
        self._beside = held_beside(*models) if beside is None else beside
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._forward = self._training = self._passes = 0
        self._flops, self._started = 0.0, time.perf_counter()

    def forward(self, model: nn.Module, tokens: int, context: float, *, head: bool = True, passes: int = 1) -> None:
        """Count `tokens`, of all `passes` together, that `model` read in rows of `context`, its `head` among them."""
        self._forward += tokens
        self._passes += passes
        self._flops += tokens * forward_flops(model if head else model.model, context)

    def train(self, model: nn.Module, tokens: int, context: float, *, frozen: bool = False, passes: int = 1) -> None:
        """Count `tokens` that `model` read forward and backward; `frozen` if no weight was trained."""
        self._training += tokens
        self._passes += passes
        self._flops += tokens * training_flops(model, context, frozen=frozen)

    def parts(self, modules: Iterable[nn.Module], tokens: int, context: float) -> None:
        """Count the FLOPs alone of modules that read `tokens` which `forward` counts for a whole model."""
        self._flops += tokens * sum(forward_flops(m, context) for m in modules)

    def stage_2(self, hybrid: nn.Module, teacher: nn.Module, trained: int, measured: int, context: int,
                taught: int | None = None) -> None:
        """Count a stage 2 of `trained` tokens (0: none) and a held-out KL over `measured`; the teacher read `taught` of
        these tokens, None for all."""
        taught = trained + measured if taught is None else taught
        self.forward(teacher, taught, context, passes=0 if taught == 0 else 2 if trained else 1)
        if trained:
            self.train(hybrid, trained, context)
        self.forward(hybrid, measured, context)

    def cost(self) -> Cost:
        """The cost since the meter was made."""
        cuda = self._device.type == "cuda"
        peak = max(0, torch.cuda.max_memory_allocated(self._device) - self._beside) if cuda else None
        return Cost(self._forward, self._training, self._passes, self._flops, time.perf_counter() - self._started,
                    peak, describe_device("auto" if cuda else "cpu"))


def held_beside(*models: nn.Module) -> int:
    """Bytes that tensors hold on the GPU of these models beside the models themselves; 0 on a CPU.

    Garbage is collected first, since it would be given back at some moment of the work.
    """
    device = next(models[0].parameters()).device
    if device.type != "cuda":
        return 0
    gc.collect()
    storages = [t.untyped_storage() for m in models for t in (*m.parameters(), *m.buffers()) if t.device == device]
    own = {storage.data_ptr(): storage.nbytes() for storage in storages}  # models may share weights
    return max(0, torch.cuda.memory_allocated(device) - sum(own.values()))


def heldout_size(tokens, heldout_tokens: int | None) -> int:
    """Tokens in the held-out rows of `tokens` that a scorer reads, `heldout_tokens` at most (None: all)."""
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
    """Estimated FLOPs of scoring every layer by a stage 2 of its own (GA-S2), with one pass of the teacher for all.

    Each of the L layers costs `num_tokens` of training of the `student` with that layer's attention restored and a pass
    over `heldout_tokens`. Layers are taken to be alike.
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
        elif hasattr(part, "state_flops"):
            mixing += part.state_flops * part.num_heads * part.head_dim ** 2
        elif hasattr(part, "q_proj") and hasattr(part, "head_dim"):
            mixing += 4 * part.q_proj.out_features * context
    return products, mixing
