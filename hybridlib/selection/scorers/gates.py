"""Selectors by gates: both branches in every layer, h_l(x) = (1 - g_l) linear_l(x) + g_l softmax_l(x)."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle

import torch
from tqdm.auto import tqdm

from hybridlib.checks import check_int, check_number, check_weights
from hybridlib.distill.loop import Run, train_steps
from hybridlib.distill.objectives import divergence_from_hidden
from hybridlib.distill.settings import MatchSettings
from hybridlib.distill.stages import matching_loss, weight_groups
from hybridlib.models.branches import GatedAttention, both_branches, gated_model, set_gates
from hybridlib.models.passes import half_on_gpu, last_hidden
from hybridlib.selection.cost import Meter, forward_flops, training_flops
from hybridlib.selection.rules import budget_layers
from hybridlib.selection.scores import LayerScores

__all__ = ["GateSettings", "LearnedGates", "gate_gradient", "gate_gradient_flops", "learned_gates"]


def gate_gradient(student, teacher, tokens, *, at: float = 0.0, order: int = 1, steps: int = 1,
                  skip: int = 0, num_tokens: int | None = None, batch_tokens: int = 8192, train_tokens: int = 0,
                  settings: MatchSettings | None = None) -> LayerScores:
    """Score every layer by how KL(teacher || gated model) falls as its gate opens: -dKL/dg_l, all layers at once.

    Parameters
    ----------
    student : all linear and aligned; teacher : the model it was made from. Both are left as they were.
    tokens : `corpus.Tokens`, whose held-out rows are used, or an integer tensor (rows, context) without padding.
    at : gate of all layers: 0 adds attention to the linear student, 1 removes it from the all-softmax model.
    order : 1, the slope g' = dKL/dg_l; 2, the change of KL as gate l alone goes from 0 to 1, to second order,
        g' + (1 - 2 at) h / 2 with h = d2KL/dg_l^2, the central difference of slopes.
    steps : 1 takes the slope at `at`; more, with order 1 at 0, its mean over as many midpoints of the diagonal from all
        0 to all 1 (integrated gradients, arXiv 1703.01365).
    skip : positions at the start of each row whose KL does not count.
    num_tokens : tokens to measure on, None for all rows; batch_tokens : tokens a forward pass.
    train_tokens : tokens of a stage 2 of copies of the weights before the slope is taken, at 0 only: each row has one
        layer's gate open, the layers taking turns.
    settings : of that stage 2; it runs without CUDA graphs and ``torch.compile``.

    Returns
    -------
    `LayerScores` of metric ``"gate"``, direction ``"remove"`` if `at` is 1 and ``"add"`` otherwise. `measured` is the
    slope or the predicted change in nats a token, mean and standard error over rows; `values` is its negative.
    """
    check_number("at", at, 0, 1)
    check_int("order", order, 1, 2)
    check_int("steps", steps, 1)
    check_int("train_tokens", train_tokens, 0)
    if train_tokens and (at != 0 or not hasattr(tokens, "rows")):
        raise ValueError(f"train_tokens={train_tokens} with at={at} and tokens a {type(tokens).__name__}; training "
                         "before the slope takes at=0 and Tokens")
    if steps > 1 and (order != 1 or at != 0):
        raise ValueError(f"steps={steps} with order={order} and at={at}; steps above 1 take order=1 and at=0")
    rows = _rows(tokens, num_tokens)
    check_int("batch_tokens", batch_tokens, rows.shape[1])
    check_int("skip", skip, 0, rows.shape[1] - 1)
    check_weights("teacher", teacher)
    check_weights("student", student)
    meter, model = Meter(teacher, student), gated_model(student, teacher)
    if train_tokens:
        model = _open_in_turn(student, teacher, tokens, train_tokens, settings, meter)
    num_layers, device = len(model.model.layers), next(student.parameters()).device
    slope_at = partial(_slope, model, teacher, skip)
    corner = torch.full((num_layers,), float(at), dtype=torch.float64)
    points = [corner] if steps == 1 else [torch.full_like(corner, (i + 0.5) / steps) for i in range(steps)]
    nudge = torch.finfo(next(student.parameters()).dtype).eps ** (1 / 3)  # where truncation meets rounding
    table = []  # (layers, rows of the batch)
    batches = rows.split(batch_tokens // rows.shape[1])
    for ids in tqdm(batches, desc="gate gradient", unit="batch", leave=False):
        ids = ids.to(device).long()
        with half_on_gpu(device) if order == 1 else contextlib.nullcontext():
            with torch.no_grad():
                target = last_hidden(teacher, ids)
            slope = sum(slope_at(target, ids, gates) for gates in points) / len(points)
            if order == 2:
                rise = [slope_at(target, ids, corner + step)[l] - slope_at(target, ids, corner - step)[l]
                        for l, step in enumerate(nudge * torch.eye(num_layers, dtype=torch.float64))]
                curvature = torch.stack(rise) / (2 * nudge)
                slope = slope + (1 - 2 * at) * curvature / 2
        table.append(slope)
    slopes = torch.cat(table, 1)
    measured, stderr = slopes.mean(1), slopes.std(1) / slopes.shape[1] ** 0.5  # nan for a single row
    passes = _passes(num_layers, order, steps)
    meter.forward(teacher, rows.numel(), rows.shape[1])
    meter.train(model, passes * rows.numel(), rows.shape[1], frozen=True, passes=passes)
    cost = meter.cost()
    return LayerScores("remove" if at == 1 else "add", "gate", tuple((-measured).tolist()), tuple(measured.tolist()),
                       tuple(stderr.tolist()), cost.training_tokens, cost.seconds, cost)


def gate_gradient_flops(student, teacher, context: int, order: int = 1, steps: int = 1, *,
                        frozen: bool = True) -> float:
    """Estimated FLOPs of `gate_gradient`, a token measured on or, not `frozen`, trained on, in rows of `context`."""
    passes = _passes(student.config.num_hidden_layers, order, steps)
    return (forward_flops(teacher, context)
            + passes * training_flops(gated_model(student, teacher), context, frozen=frozen))


def _passes(num_layers, order, steps):
    return steps if order == 1 else 1 + 2 * num_layers


@dataclass(frozen=True)
class GateSettings:
    """Settings of `learned_gates`.

    Parameters
    ----------
    batch_tokens : tokens a step; rounded down to whole rows, at least one.
    learning_rate : of Adam, on the gates' logits; constant.
    penalty : weight of ((sum of gates - K) / L)^2, in nats.
    start : gate that every layer starts from, 0 < start < 1; None for K / L (at most 0.9), where the penalty is 0.
    """

    batch_tokens: int = 16_384
    learning_rate: float = 0.05
    penalty: float = 10.0
    start: float | None = None

    def __post_init__(self):
        check_int("batch_tokens", self.batch_tokens, 1)
        check_number("learning_rate", self.learning_rate, 0, open_low=True)
        check_number("penalty", self.penalty, 0)
        if self.start is not None:
            check_number("start", self.start, 0, 1, open_low=True)
            if self.start == 1:
                raise ValueError("start=1 is not a number above 0 and below 1; a gate of 1 cannot be trained")


@dataclass(frozen=True)
class LearnedGates:
    """The result of `learned_gates`: `layers`, the K of the largest gates, ascending; `scores.values`, the gates.

    After `history_tokens[i]` tokens, the step's KL was `kl[i]` nats a token and its gates summed to `total[i]`.
    """

    scores: LayerScores
    layers: tuple[int, ...]
    history_tokens: tuple[int, ...]
    kl: tuple[float, ...]
    total: tuple[float, ...]


def learned_gates(student, teacher, tokens, budget: float | int, *, num_tokens: int, skip: int = 0,
                  settings: GateSettings | None = None) -> LearnedGates:
    """Train one gate a layer, all weights frozen, under a budget; the layers of the K largest gates stay softmax.

    With g = sigmoid(a), Adam on a lowers KL(teacher || gated model) + penalty ((sum g - K) / L)^2. Source: FlashMorph
    (arXiv 2606.30562); the sigmoid, the start, the KL and the penalty are chosen here, its code not being public.

    Parameters
    ----------
    student : all linear and aligned; teacher : the model it was made from. Both are left as they were.
    tokens : `corpus.Tokens`, whose training rows are read, or an integer tensor (rows, context), over and over.
    budget : share or count K of softmax layers, see `selection.budget_layers`.
    num_tokens : tokens to train on, in whole steps of ``settings.batch_tokens``.
    skip : positions at the start of each row whose KL does not count.

    Raises `DistillationDiverged` at the first loss that is not finite.
    """
    settings = settings or GateSettings()
    num_layers = student.config.num_hidden_layers
    count = budget_layers(budget, num_layers)
    rows = tokens if hasattr(tokens, "rows") else _RowsInTurn(_check_rows(tokens))
    check_int("num_tokens", num_tokens, rows.context)
    check_int("skip", skip, 0, rows.context - 1)
    check_weights("teacher", teacher)
    check_weights("student", student)
    meter, model = Meter(teacher, student), gated_model(student, teacher)
    start = min(0.9, count / num_layers) if settings.start is None else settings.start
    a = torch.full((num_layers,), math.log(start / (1 - start)), device=next(student.parameters()).device,
                   requires_grad=True)
    total = []

    def step_loss(share, ids):
        g = a.sigmoid()
        set_gates(model, g)
        with torch.no_grad():
            target = last_hidden(teacher, ids)
        divergence = _divergence(model, teacher, skip, target, ids)
        (divergence + settings.penalty * ((g.sum() - count) / num_layers) ** 2).backward()
        total.append(g.detach().sum())
        return {None: divergence.detach()}

    adam = MatchSettings(batch_tokens=settings.batch_tokens, warmup=0.0, betas=(0.9, 0.999), clip=1e30)  # no clipping
    run = Run("learned gates", rows, num_tokens, adam, [([("the gates", a)], settings.learning_rate)], step_loss)
    with tqdm(total=run.steps * run.step_tokens, desc="gates", unit="tok", unit_scale=True, leave=False) as bar:
        run.train(run.steps, bar=bar)
    if run.errors:
        raise run.errors[0]
    history, gates = run.histories[0], tuple(a.detach().sigmoid().tolist())
    meter.forward(teacher, history.tokens[-1], rows.context)
    meter.train(model, history.tokens[-1], rows.context, frozen=True)
    cost = meter.cost()
    scores = LayerScores("add", "learned_gate", gates, gates, (math.nan,) * num_layers, cost.training_tokens,
                         cost.seconds, cost)
    return LearnedGates(scores, tuple(sorted(scores.ranking[:count])), tuple(history.tokens), tuple(history.losses),
                        tuple(torch.stack(total).tolist()))


class _RowsInTurn:
    """Rows of ids (rows, context) as `Run` reads a corpus, over and over in their order."""

    def __init__(self, ids: torch.Tensor):
        self.ids, self.context = ids, ids.shape[1]

    def rows(self, position: int, count: int) -> torch.Tensor:
        return self.ids[torch.arange(position, position + count) % len(self.ids)].long()


def _open_in_turn(student, teacher, tokens, num_tokens, settings, meter):
    """A gated model of weights of its own, after a stage 2 in which row i has the gate of layer i mod L open."""
    settings = replace(settings or MatchSettings(), compile=False, cuda_graph=False)
    model = both_branches(student, teacher, GatedAttention)
    turns = cycle(torch.eye(len(model.model.layers), device=next(student.parameters()).device))

    def outputs(ids):
        set_gates(model, torch.stack([next(turns) for _ in ids], 1))
        return [(last_hidden(model, ids), model.lm_head.weight)]

    groups = weight_groups(model.named_parameters(), lambda name: ".self_attn.linear." in name, settings)
    spent = train_steps("gates in turn", model, tokens, num_tokens, settings, groups,
                        matching_loss(outputs, teacher, settings)).tokens[-1]
    meter.forward(teacher, spent, tokens.context)
    meter.train(model, spent, tokens.context)
    return model.eval().requires_grad_(False)


def _divergence(model, teacher, skip, target, ids):
    """KL(teacher || gated model), mean over tokens from `skip` on; `target` is the teacher's last hidden states."""
    return divergence_from_hidden(target[:, skip:], teacher.lm_head.weight, last_hidden(model, ids)[:, skip:],
                                  model.lm_head.weight)


@torch.enable_grad()
def _slope(model, teacher, skip, target, ids, gates):
    """dKL/dg of each layer and row at `gates` (layers,): (layers, rows), float64, in one pass forward and backward."""
    own = gates.to(ids.device)[:, None].repeat(1, len(ids)).requires_grad_()
    set_gates(model, own)
    slope, = torch.autograd.grad(_divergence(model, teacher, skip, target, ids), own)
    return slope.cpu() * len(ids)  # the mean over rows holds 1 / rows of each


def _rows(tokens, num_tokens):
    rows = _check_rows(tokens.heldout if hasattr(tokens, "heldout") else tokens)
    if num_tokens is None:
        return rows
    check_int("num_tokens", num_tokens, rows.shape[1])
    return rows[:num_tokens // rows.shape[1]]


def _check_rows(rows):
    if not isinstance(rows, torch.Tensor) or rows.dim() != 2 or rows.is_floating_point() or rows.numel() == 0:
        form = f"of shape {tuple(rows.shape)}, {rows.dtype}" if isinstance(rows, torch.Tensor) else type(rows).__name__
        raise ValueError(f"tokens is {form}; give Tokens, or an integer tensor (rows, context) with a row")
    return rows
