"""Scores for layers: how much each one is worth keeping softmax."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from hybridlib.checks import check_choice, check_int, check_weights
from hybridlib.distill.corpus import Tokens
from hybridlib.distill.objectives import alignment_loss
from hybridlib.distill.settings import MatchSettings
from hybridlib.models.hybrid import linear_layers
from hybridlib.models.passes import TeacherStates, attention_io
from hybridlib.selection.cost import Cost, Meter, heldout_size
from hybridlib.selection.engine.candidates import Job, one_layer_sets
from hybridlib.selection.engine.inputs import LoadedInputs
from hybridlib.selection.engine.rounds import EarlyStop, Engine, run_candidates
from hybridlib.selection.scores import LayerScores

__all__ = ["score_layers"]


def score_layers(student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tokens, *, direction: str = "add",
                 metric: str = "kl", num_tokens: int = 500_000, heldout_tokens: int | None = None,
                 settings: MatchSettings | None = None, normalize: bool = True, early_stop: EarlyStop | None = None,
                 engine: Engine | None = None) -> LayerScores:
    """Score every layer of an aligned all-linear student (paper section 4, algorithm 1, and its ablations).

    Parameters
    ----------
    student : all linear and aligned; it is left as it was.
    direction : ``"add"`` restores layer l alone in the linear student, I(l) = -KL (GA-S2); ``"remove"`` linearizes
        layer l alone in the teacher, I(l) = KL (GR-S2).
    metric : ``"kl"``, held-out KL after a stage 2 of `num_tokens` a layer; or ``"mse"``, the stage-1 error left at
        layer l on held-out text (GA-S1), which trains nothing and knows only direction ``"add"``.
    num_tokens, heldout_tokens : of stage 2 for each candidate (0: untrained), and held out to measure on (None: all).
    normalize : for ``"mse"``, divide each layer's error by its output's power (the rankings differ).
    early_stop : for ``"kl"``, measure candidates along their training and stop once the top-K set has settled.
    engine : for ``"kl"``, how candidates are run; None for one after the other, here.

    A candidate that fails does not stop the others; then `ScoringFailed` names the layers that failed, and why.
    """
    check_choice("direction", direction, ("add", "remove"))
    check_choice("metric", metric, ("kl", "mse"))
    check_int("num_tokens", num_tokens, 0 if num_tokens == 0 else tokens.context)
    num_layers = student.config.num_hidden_layers
    if linear_layers(student.config) != tuple(range(num_layers)):
        raise ValueError("student has softmax layers; score_layers takes the all-linear student that linearize gave")
    check_weights("teacher", teacher)
    if metric == "mse":
        if direction != "add":
            raise ValueError("metric='mse' knows only direction='add'; the stage-1 error has no removal form")
        meter, read = Meter(teacher, student), heldout_size(tokens, heldout_tokens)
        measured, stderr = _alignment_errors(student, teacher, tokens, heldout_tokens, normalize)
        meter.forward(teacher, read, tokens.context, head=False)
        meter.parts([layer.self_attn for layer in student.model.layers], read, tokens.context)
        cost = meter.cost()
        return LayerScores(direction, metric, tuple(measured), tuple(measured), tuple(stderr), 0, cost.seconds, cost)
    if early_stop is not None:
        early_stop.count(num_layers)
    settings, engine = settings or MatchSettings(), engine or Engine()
    inputs = engine.inputs or LoadedInputs(student, teacher, tokens, TeacherStates(teacher, engine.memory))
    rounds = run_candidates(Job(inputs, num_tokens, settings, heldout_tokens), one_layer_sets(direction, num_layers),
                            engine, engine.group_of(student, tokens, settings), early_stop=early_stop,
                            sign=-1 if direction == "add" else 1)
    figures = list(rounds.values())
    sign, last, measurements = -1 if direction == "add" else 1, figures[-1], [c for each in figures for c in each]
    history = tuple(tuple(sign * candidate["kl"] for candidate in each) for each in figures)
    counted = all("cost" in c for c in measurements)  # candidates recorded before costs were have none
    return LayerScores(direction, metric, history[-1], tuple(c["kl"] for c in last),
                       tuple(c["kl_stderr"] for c in last), sum(c["tokens"] for c in last),
                       sum(c["seconds"] for c in measurements),
                       Cost.total(Cost.from_dict(c["cost"]) for c in measurements) if counted else None, history,
                       tuple(each[0]["tokens"] for each in figures),
                       tuple(l for l, c in enumerate(last) if c.get("rose")))


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
