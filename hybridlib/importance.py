"""Scores for layers: how much each one is worth keeping softmax."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from tqdm.auto import tqdm

from .checks import check_choice, check_int
from .cost import Cost, Meter
from .distill import MatchSettings, match
from .evaluate import heldout_kl
from .hybrid import linear_layers, restore
from .objectives import alignment_loss
from .passes import attention_io

__all__ = ["LayerScores", "score_layers"]


@dataclass(frozen=True)
class LayerScores:
    """One score a layer; a higher `values[l]` means that layer l is more worth keeping softmax.

    `measured[l]` is what was measured, with its standard error over held-out rows: the KL of layer l's candidate in
    nats a token (metric ``"kl"``), the alignment error (``"mse"``), or what the function that scored it names. `tokens`
    are those of training, forward and backward (``cost.training_tokens``), and `seconds` the time that scoring took;
    `cost` says all that it cost, None in records that are older than it.
    """

    direction: str
    metric: str
    values: tuple[float, ...]
    measured: tuple[float, ...]
    stderr: tuple[float, ...]
    tokens: int
    seconds: float
    cost: Cost | None = None

    @property
    def ranking(self) -> tuple[int, ...]:
        """Layers, the one most worth keeping first; ties go to the lower index."""
        return tuple(sorted(range(len(self.values)), key=lambda l: (-self.values[l], l)))

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> LayerScores:
        cost = fields.get("cost")
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**fields | {"cost": cost and Cost.from_dict(cost)})


def score_layers(student, teacher, tokens, *, direction: str = "add", metric: str = "kl", num_tokens: int = 500_000,
                 heldout_tokens: int | None = None, settings: MatchSettings | None = None, normalize: bool = True,
                 run: Callable[[int, Callable[[], dict]], dict] = lambda layer, compute: compute()) -> LayerScores:
    """Score every layer of an aligned all-linear student.

    Parameters
    ----------
    student : from `hybrid.linearize` and `distill.align`; it is left as it was.
    direction : ``"add"`` restores layer l alone in the linear student, I(l) = -KL (GA-S2); ``"remove"`` linearizes
        layer l alone in the teacher, I(l) = KL (GR-S2).
    metric : ``"kl"``, held-out KL after a stage 2 of `num_tokens` a layer; or ``"mse"``, the stage-1 error left at
        layer l on held-out text (GA-S1), which trains nothing and knows only direction ``"add"``.
    num_tokens : tokens of stage 2 for each layer's candidate; 0 measures the candidates untrained.
    heldout_tokens : held-out tokens to measure on, None for all.
    settings : of stage 2. Every candidate sees the same rows in the same order.
    normalize : for ``"mse"``, divide each layer's error by its output's power (the rankings differ).
    run : called with each layer and the function that trains and measures its candidate (``"kl"`` only), returns what
        that function does: a dict of numbers. For remembering candidates, so that a killed scoring goes on.

    Cost: L times `num_tokens` of training for ``"kl"``; one pass over the held-out rows for ``"mse"``. Source: paper
    section 4, algorithm 1, and its ablations (GR-S2, GA-S1).
    """
    check_choice("direction", direction, ("add", "remove"))
    check_choice("metric", metric, ("kl", "mse"))
    check_int("num_tokens", num_tokens, 0)
    num_layers = student.config.num_hidden_layers
    if linear_layers(student.config) != tuple(range(num_layers)):
        raise ValueError("student has softmax layers; score_layers takes the all-linear student that linearize gave")
    if metric == "mse":
        if direction != "add":
            raise ValueError("metric='mse' knows only direction='add'; the stage-1 error has no removal form")
        meter, read = Meter(teacher), heldout_size(tokens, heldout_tokens)
        measured, stderr = _alignment_errors(student, teacher, tokens, heldout_tokens, normalize)
        meter.forward(teacher, read, tokens.context, head=False)
        meter.parts([layer.self_attn for layer in student.model.layers], read, tokens.context)
        values, spent, cost = measured, 0, meter.cost()
        seconds = cost.seconds
    else:
        def candidate(l):
            begun, meter = time.perf_counter(), Meter(teacher)
            kept = [l] if direction == "add" else [m for m in range(num_layers) if m != l]
            model = restore(student, teacher, kept)
            spent = match(model, teacher, tokens, num_tokens, settings=settings).tokens[-1] if num_tokens else 0
            kl, error = heldout_kl(model, teacher, tokens, heldout_tokens=heldout_tokens)
            meter_hybrid(meter, model, teacher, spent, heldout_size(tokens, heldout_tokens), tokens.context)
            return {"kl": kl, "kl_stderr": error, "tokens": spent, "seconds": time.perf_counter() - begun,
                    "cost": meter.cost().to_dict()}

        found = [run(l, partial(candidate, l))
                 for l in tqdm(range(num_layers), desc=f"score ({direction})", unit="layer", leave=False)]
        measured, stderr = [c["kl"] for c in found], [c["kl_stderr"] for c in found]
        values = [-kl for kl in measured] if direction == "add" else measured
        spent, seconds = sum(c["tokens"] for c in found), sum(c["seconds"] for c in found)
        known = all("cost" in c for c in found)  # candidates recorded before costs were have none
        cost = Cost.total(Cost.from_dict(c["cost"]) for c in found) if known else None
    return LayerScores(direction, metric, tuple(values), tuple(measured), tuple(stderr), spent, seconds, cost)


def heldout_size(tokens, heldout_tokens: int | None) -> int:
    """Tokens in the held-out rows of `tokens` that a scorer reads, given at most how many it may."""
    rows = len(tokens.heldout)
    rows = rows if heldout_tokens is None else min(rows, max(1, heldout_tokens // tokens.context))
    return rows * tokens.context


def meter_hybrid(meter: Meter, hybrid, teacher, trained: int, measured: int, context: int) -> None:
    """Tell `meter` of a stage 2 of `trained` tokens (0: none) and of a held-out KL over `measured` tokens."""
    if trained:
        meter.forward(teacher, trained, context)
        meter.train(hybrid, trained, context)
    meter.forward(teacher, measured, context)
    meter.forward(hybrid, measured, context)


@torch.no_grad()
def _alignment_errors(student, teacher, tokens, heldout_tokens, normalize):
    """(mean, standard error over rows) of each layer's alignment error on held-out rows."""
    count = len(tokens.heldout) if heldout_tokens is None else max(1, heldout_tokens // tokens.context)
    device, layers = next(student.parameters()).device, linear_layers(student.config)
    errors = {l: [] for l in layers}
    for ids in tokens.heldout[:count].split(8):
        for l, (x, y) in enumerate(attention_io(teacher, ids.to(device).long())):
            outputs = student.model.layers[l].self_attn(x)[0]
            rows = [alignment_loss(o, t, normalize=normalize) for o, t in zip(outputs, y, strict=True)]
            errors[l] += torch.stack(rows).tolist()
    table = torch.tensor([errors[l] for l in layers], dtype=torch.float64)  # (layers, rows)
    stderr = table.std(-1) / table.shape[1] ** 0.5
    return table.mean(-1).tolist(), stderr.tolist()
