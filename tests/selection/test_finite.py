"""A number that is not finite stops, named by its layer and its place, before a set is chosen."""

import math

import pytest
import torch

import hybridlib as hl
from hybridlib.selection.engine.sets import match_sets
from hybridlib.selection.scorers.ablation import score_perplexity
from hybridlib.selection.scorers.gates import gate_gradient, learned_gates
from hybridlib.selection.scorers.postnas import search_once_for_all
from hybridlib.selection.scorers.speculative import score_acceptance, search_skips
from hybridlib.selection.scores import LayerScores

READS_THE_TEACHER = {
    "ppl": lambda s, t, x: score_perplexity(t, x), "rad": lambda s, t, x: score_acceptance(t, x),
    "skips": lambda s, t, x: search_skips(t, x, 1), "gradient": lambda s, t, x: gate_gradient(s, t, x),
    "gates": lambda s, t, x: learned_gates(s, t, x, 1, num_tokens=64),
    "postnas": lambda s, t, x: search_once_for_all(s, t, x, 1, 64),
    "mse": lambda s, t, x: hl.score_layers(s, t, x, metric="mse"), "kl": lambda s, t, x: hl.score_layers(s, t, x),
    "sets": lambda s, t, x: match_sets(s, t, x, [(0,)], 64),
}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["values", "measured"])
def test_scores_that_are_not_finite_are_refused_by_their_layer(field, bad):
    fine, broken = (3.0, 1.0, 2.0), (3.0, bad, 2.0)
    figures = {"values": fine, "measured": fine} | {field: broken}
    message = rf"^{field} of 'kl' scores={bad} for layer 1 is not a finite number; each layer must have one$"
    with pytest.raises(ValueError, match=message):
        LayerScores("add", "kl", stderr=(0.0,) * 3, tokens=0, seconds=0.0, **figures)
    stored = LayerScores("add", "kl", fine, fine, (math.nan,) * 3, 0, 0.0).to_dict()  # of a single row
    assert hl.select("ga-s2", 1, scores=LayerScores.from_dict(stored)) == (0,)
    with pytest.raises(ValueError, match=message):
        hl.select("ga-s2", 1, scores=LayerScores.from_dict(stored | {field: list(broken)}))


@pytest.mark.parametrize("name", READS_THE_TEACHER)
def test_a_weight_of_the_teacher_that_is_nan_stops_every_scorer_by_its_name(name, tiny_teacher, tiny_tokens):
    teacher = tiny_teacher("llama")
    student = hl.linearize(teacher)
    with torch.no_grad():
        teacher.model.layers[1].mlp.up_proj.weight[3, 5] = math.nan
    with pytest.raises(ValueError, match=r"^teacher has the weight model\.layers\.1\.mlp\.up_proj\.weight\[3, 5\]=nan; "
                                         "all weights must be finite$"):
        READS_THE_TEACHER[name](student, teacher, tiny_tokens)


def test_an_infinite_embedding_is_named_wherever_it_is(tiny_teacher, tiny_tokens):
    for broken in ("teacher", "student"):
        models = {"teacher": tiny_teacher("llama")}
        models["student"] = hl.linearize(models["teacher"])
        with torch.no_grad():
            models[broken].model.embed_tokens.weight[7, 2] = math.inf
        with pytest.raises(ValueError, match=rf"^{broken} has the weight model\.embed_tokens\.weight\[7, 2\]=inf; "):
            match_sets(models["student"], models["teacher"], tiny_tokens, [(0,), (1,)], 64)
