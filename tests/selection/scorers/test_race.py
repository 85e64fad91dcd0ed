"""A race on made-up measures with known truths, and of tiny hybrids."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations
from math import inf

import pytest

import hybridlib as hl
from hybridlib.distill.settings import DistillationDiverged
from hybridlib.models.passes import TeacherStates
from hybridlib.selection.engine.candidates import Job, measure_set
from hybridlib.selection.engine.inputs import LoadedInputs
from hybridlib.selection.scorers.race import fitting_sets, neighbours, propose, race, race_rounds, race_trained

EVERY = list(combinations(range(6), 3))


def made_up(noise, calls=None, seed=0):
    """A measure whose noise shrinks with the tokens: (measure, {layers: truth})."""
    draw = random.Random(seed)
    truth = {layers: draw.random() for layers in EVERY}

    def measure(sets, since, until):
        if calls is not None:
            calls.append((sets, since, until))
        return {layers: truth[layers] + draw.gauss(0, noise) / until ** 0.5 for layers in sets}

    return measure, truth


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 16, 20])
def test_without_noise_the_best_set_wins_on_the_tokens_planned(count):
    calls = []
    measure, truth = made_up(0.0, calls)
    rounds = race_rounds(count, 1000, 10)
    result = race(measure, EVERY[:count], rounds)
    assert result.layers == min(EVERY[:count], key=truth.__getitem__)
    assert [(len(sets), until) for sets, _, until in calls] == rounds
    assert [since for _, since, _ in calls] == [0, *(until for _, until in rounds)][:len(rounds)]
    spent = sum(len(sets) * (until - since) for sets, since, until in calls)
    assert result.tokens == spent <= 1000 and all(until % 10 == 0 for _, until in rounds)
    assert count == 1 or 1000 - spent < 20  # less than a step of the last two
    for (sets, *_), (after, *_) in zip(calls, calls[1:]):
        assert set(after) == set(sorted(sets, key=truth.__getitem__)[:-(-len(sets) // 2)])


def test_a_round_has_an_equal_share_and_what_the_one_before_left():
    assert race_rounds(16, 64) == [(16, 1), (8, 3), (4, 7), (2, 15)]
    assert race_rounds(16, 183 * 16384, 16384) == [(16, 2 * 16384), (8, 9 * 16384), (4, 21 * 16384), (2, 44 * 16384)]
    assert race_rounds(1, 0) == [] and race_rounds(2, 5) == [(2, 2)]
    assert [fitting_sets(16, n) for n in (0, 2, 5, 6, 8, 63, 64, 10**6)] == [1, 2, 2, 3, 4, 15, 16, 16]
    with pytest.raises(ValueError, match="num_tokens=63 in steps of 1 are too few for 16 sets; at most 15 can race"):
        race_rounds(16, 63)


def test_more_tokens_find_the_best_set_more_often_in_noise():
    def share(tokens):
        won = [race(measure, EVERY[:16], race_rounds(16, tokens)).layers == min(EVERY[:16], key=truth.__getitem__)
               for measure, truth in (made_up(1.0, seed=seed) for seed in range(60))]
        return sum(won) / len(won)

    assert share(64) < share(6_400) < 1.01 * share(640_000) and share(640_000) > 0.9


def test_sets_that_fail_are_out_and_ties_go_to_the_first():
    values = {layers: 1.0 for layers in EVERY[:4]} | {EVERY[0]: inf, EVERY[1]: float("nan")}
    result = race(lambda sets, *_: {layers: values[layers] for layers in sets}, EVERY[:4], race_rounds(4, 100))
    assert result.layers == EVERY[2] and list(result.rounds[1][1]) == EVERY[2:4]
    with pytest.raises(DistillationDiverged, match="none of the 4 sets"):
        race(lambda sets, *_: dict.fromkeys(sets, inf), EVERY[:4], race_rounds(4, 100))
    with pytest.raises(ValueError, match="sets has 3 different sets; the first of rounds="):
        race(dict.fromkeys, [*EVERY[:3], EVERY[0]], race_rounds(4, 100))


def test_proposals_come_first_then_their_neighbours_from_the_cut_on():
    values = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    near = list(neighbours((0, 1, 2), values, random.Random(0)))
    assert near[0] == (0, 1, 3) and set(near[1:4]) == {(0, 1, 4), (0, 2, 3), (0, 2, 4)}
    assert len(near) == len(set(near)) == 9 and all(len({0, 1, 2} & set(s)) == 2 for s in near)
    sets = propose([((0, 1, 2), values), ((0, 2, 4), None), ((3, 4, 5), values[::-1])], 6, seed=1)
    assert sets[:3] == [(0, 1, 2), (0, 2, 4), (3, 4, 5)] and sets[3:5] == [(0, 1, 3), (2, 4, 5)]
    assert sets == propose([((0, 1, 2), values), ((0, 2, 4), None), ((3, 4, 5), values[::-1])], 6, seed=1)
    drawn = {tuple(propose([((0, 1, 2), values)], 4, seed)) for seed in range(8)}
    assert len(drawn) > 1 and {sets[:2] for sets in drawn} == {((0, 1, 2), (0, 1, 3))}
    assert len(propose([((0, 1, 2), values)], 100)) == 10 and propose([((1, 3), None)], 9) == [(1, 3)]
    assert propose([((0, 1), [1.0, 0.5])], 9) == [(0, 1)]  # there is no other set


@pytest.mark.parametrize("group", [1, 3])
def test_survivors_go_on_with_their_training(aligned, tiny_tokens, tmp_path, group):
    student, teacher = aligned
    settings = hl.MatchSettings(batch_tokens=64, learning_rate=1e-3, attention_learning_rate=1e-2)
    inputs = LoadedInputs(student, teacher, tiny_tokens, TeacherStates(teacher))
    rounds, sets = race_rounds(3, 12 * 64, 64), [(0,), (1,), (2,)]
    job = Job(inputs, rounds[-1][1], settings)
    result, figures, cost = race_trained(job, sets, rounds, group)
    assert result.tokens == cost.training_tokens == 12 * 64 and not inputs.alive
    assert [(len(r["sets"]), r["tokens"]) for r in figures] == rounds == [(3, 128), (2, 320)]
    for row in figures[1]["sets"]:  # as if it had trained in one go
        alone = measure_set(replace(job, heldout_tokens=320), tuple(row["layers"]))
        assert row["kl"] == pytest.approx(alone["kl"], rel=1e-4)
    assert result.layers == tuple(min(figures[1]["sets"], key=lambda row: row["kl"])["layers"])
    read = 3 * min(128, tiny_tokens.heldout.numel()) + 2 * min(320, tiny_tokens.heldout.numel())
    assert cost.forward_tokens > read
