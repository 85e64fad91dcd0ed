"""What a score costs, counted alike for every scorer; the alignment that scores share is not counted."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from hybridlib.records.provenance import describe_device

__all__ = ["Cost", "Meter", "forward_flops", "held_beside", "heldout_size", "one_run_a_layer_flops", "training_flops"]


@dataclass(frozen=True)
class Cost:
    """What was spent; the sum of two is the cost of both, one after the other.

    Parameters
    ----------
    forward_tokens : tokens that a whole model read without a backward pass.
    training_tokens : tokens that went forward and backward, whether weights or only gates were trained.
    passes : how often a model went over a body of text (held-out rows, prompts, training rows).
    flops : estimated, see `forward_flops` and `training_flops`.
    peak_memory : most bytes that tensors held on the GPU, in older records also other work's; None on a CPU.
    """

    forward_tokens: int = 0
    training_tokens: int = 0
    passes: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    peak_memory: int | None = None
    device: str = ""

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
        return cls(**values)

    @staticmethod
    def total(costs: Iterable[Cost]) -> Cost:
        return sum(costs, Cost())


class Meter:
    """A counter of what models read; `cost` gives the sum.

    Memory is watched on the first model's device, less `beside` bytes that are not this work's (None: `held_beside`).
    A new meter resets the GPU's peak of memory, also for a meter that is still in use.
    """

    def __init__(self, *models: nn.Module, beside: int | None = None):
        self._device = next(models[0].parameters()).device
        self._beside = held_beside(*models) if beside is None else beside
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._forward = self._training = self._passes = 0
        self._flops, self._started = 0.0, time.perf_counter()

    def forward(self, model: nn.Module, tokens: int, context: float, *, head: bool = True, passes: int = 1) -> None:
        """Count `tokens`, in all `passes`, that `model` read in rows of `context`, with or without its `head`."""
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
        """Count `trained` tokens of stage 2 and a held-out KL over `measured`; the teacher read `taught`, None: all."""
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
    """Bytes that tensors hold on the GPU of these models beside the models themselves; 0 on a CPU."""
    device = next(models[0].parameters()).device
    if device.type != "cuda":
        return 0
    gc.collect()  # garbage would be given back at some moment of the work
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

    - A linear layer, the output head too: 2 x inputs x outputs.
    - Softmax attention: 4 x heads x head_dim x context, over the whole square of scores.
    - A mixer, per entry of its heads x head_dim x head_dim state: decay 1, writing 2, reading 2, the delta rule 2 more.

    Norms, activations, rotary embeddings, biases and the input embedding's look-up are left out.
    """
    products, mixing = _flops(module, context)
    return products + mixing


def training_flops(module: nn.Module, context: float, *, frozen: bool = False) -> float:
    """As `forward_flops`, forward and backward without the optimizer: 3 times that, 2 times for `frozen` weights."""
    products, mixing = _flops(module, context)
    return (2 if frozen else 3) * products + 3 * mixing


def one_run_a_layer_flops(student: nn.Module, teacher: nn.Module, num_tokens: int, heldout_tokens: int,
                          context: int) -> float:
    """Estimated FLOPs of GA-S2 on `num_tokens` a layer, with one pass of the teacher for all and layers alike."""
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
