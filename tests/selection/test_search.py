"""Searches against brute force on made-up set functions, and on a tiny teacher."""

from __future__ import annotations

import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from math import comb, isnan
from types import SimpleNamespace

import pytest

import hybridlib as hl
from hybridlib.distill.evaluate import heldout_kl
from hybridlib.distill.settings import DistillationDiverged
from hybridlib.selection.engine.candidates import distilled_kl
from hybridlib.selection.search import beam, exhaustive, greedy_backward, greedy_forward, interactions, regret

SIZES = [(n, k) for n in range(1, 8) for k in range(1, n + 1)]


def counting(measure):
    """(measure, the sets it was called with, in order)."""
    calls = []
    return lambda layers: calls.append(layers) or measure(layers), calls


def arbitrary(seed, levels=10**6):
    """A set function without structure; few `levels` make many ties."""
    return lambda layers: random.Random(f"{seed} {layers}").randrange(levels)


def best_of(measure, num_layers, size):
    return min(combinations(range(num_layers), size), key=lambda s: (measure(s), s))


def plain_forward(measure, num_layers, count):
    kept = set()
    while len(kept) < count:
        left = [l for l in range(num_layers) if l not in kept]
        kept.add(min(left, key=lambda l: (measure(tuple(sorted(kept | {l}))), sorted(kept | {l}))))
    return tuple(sorted(kept))


def plain_backward(measure, num_layers, count):
    kept = set(range(num_layers))
    while len(kept) > count:
        kept.remove(min(kept, key=lambda l: (measure(tuple(sorted(kept - {l}))), sorted(kept - {l}))))
    return tuple(sorted(kept))


@pytest.mark.parametrize("levels", [1, 3, 10**6])
@pytest.mark.parametrize("seed", range(5))
def test_searches_do_what_plain_loops_do_and_ties_go_to_low_layers(seed, levels):
    for num_layers, count in SIZES:
        measure = arbitrary(seed, levels)
        assert greedy_forward(measure, num_layers, count).layers == plain_forward(measure, num_layers, count)
        assert greedy_backward(measure, num_layers, count).layers == plain_backward(measure, num_layers, count)
        best = best_of(measure, num_layers, count)
        assert exhaustive(measure, num_layers, count).layers == best
        for direction, plain in (("add", plain_forward), ("remove", plain_backward)):
            assert beam(measure, num_layers, count, comb(7, 3), direction).layers == best  # it drops nothing
            assert beam(measure, num_layers, count, 1, direction).layers == plain(measure, num_layers, count)


@pytest.mark.parametrize(("L", "K"), SIZES)
def test_evaluations_are_as_many_as_stated_and_no_set_is_measured_twice(L, K):
    plain = arbitrary(0)
    stated = {greedy_forward: K * (2 * L - K + 1) // 2, greedy_backward: (L - K) * (L + K + 1) // 2,
              exhaustive: comb(L, K)}
    for search, evaluations in stated.items():
        measure, calls = counting(plain)
        found = search(measure, L, K)
        assert found.evaluations == len(calls) == len(set(calls)) == evaluations
        assert found.values == {layers: plain(layers) for layers in calls}
        assert all(layers == tuple(sorted(layers)) for layers in calls)
    for width in (1, 2, 3):
        for direction, bound in (("add", L + width * (K - 1) * (2 * L - K) // 2),
                                 ("remove", L + width * (L - K - 1) * (L + K) // 2 if K < L else 0)):
            measure, calls = counting(plain)
            assert beam(measure, L, K, width, direction).evaluations == len(set(calls)) == len(calls) <= bound


def test_every_size_from_none_to_all():
    measure = arbitrary(1)
    found = exhaustive(measure, 5)
    assert found.path == tuple((layers, measure(layers)) for layers in (best_of(measure, 5, k) for k in range(6)))
    assert found.evaluations == 2 ** 5 and found.values[found.layers] == min(found.values.values())
    for search in (greedy_forward, greedy_backward, exhaustive):
        assert search(lambda layers: float("inf"), 5, 2).layers == (0, 1)


def test_the_path_has_the_best_set_of_each_round():
    measure = arbitrary(2)
    for found, sizes in ((greedy_forward(measure, 6, 4), [1, 2, 3, 4]), (greedy_backward(measure, 6, 4), [5, 4]),
                         (beam(measure, 6, 3, 3), [1, 2, 3]), (greedy_backward(measure, 6, 6), [])):
        assert [len(layers) for layers, _ in found.path] == sizes
        for layers, value in found.path:
            assert value == min(v for s, v in found.values.items() if len(s) == len(layers)) == found.values[layers]
        assert found.layers == (found.path[-1][0] if sizes else tuple(range(6)))
    assert greedy_forward(measure, 6, 0.5).layers == greedy_forward(measure, 6, 3).layers


def test_a_beam_finds_the_pair_that_layers_judged_alone_hide():
    alone = [5, 4, 3, 0, 2, 1]

    def measure(layers):  # 2 and 3 help one another: neither is among the best two, or needed by all the others
        return 100 - sum(alone[l] for l in layers) - (20 if {2, 3} <= set(layers) else 0)

    one_shot = tuple(sorted(range(6), key=lambda l: measure((l,)))[:2])
    assert one_shot == greedy_forward(measure, 6, 2).layers == beam(measure, 6, 2, 2).layers == (0, 1)
    assert beam(measure, 6, 2, 3).layers == exhaustive(measure, 6, 2).layers == (2, 3)
    assert interactions(exhaustive(measure, 6).values, 6)[2, 3] == 20


class Asynchronous:
    """An executor that computes nothing until a result is waited for; `rounds` has how many calls were then there."""

    def __init__(self):
        self.waiting, self.rounds, self.cancelled = 0, [], 0

    def submit(self, function, *arguments):
        self.waiting += 1
        return SimpleNamespace(result=lambda: self.compute(function, *arguments), cancel=self.cancel)

    def compute(self, function, *arguments):
        self.rounds += [self.waiting] if self.waiting else []
        self.waiting = 0
        return function(*arguments)

    def cancel(self):
        self.cancelled += 1


def test_an_executor_gives_the_same_and_the_sets_of_a_round_are_submitted_at_once():
    measure, executor = arbitrary(3, levels=5), Asynchronous()
    with ThreadPoolExecutor(3) as pool:
        for search in (greedy_forward, greedy_backward, exhaustive, lambda *a, **k: beam(*a, width=3, **k)):
            assert search(measure, 6, 3, executor=pool) == search(measure, 6, 3)
    greedy_forward(measure, 6, 3, executor=executor)
    assert executor.rounds == [6, 5, 4]


def test_a_failure_names_the_layers_and_calls_off_the_rest():
    def measure(layers):
        if layers == (0, 2):
            raise DistillationDiverged("loss 7")
        return -layers.count(0)

    executor = Asynchronous()
    for pool in (None, executor):
        with pytest.raises(DistillationDiverged, match="loss 7") as error:
            greedy_forward(measure, 4, 2, executor=pool)
        assert error.value.__notes__ == ["while measuring the layers (0, 2)"]
    assert executor.cancelled == 3


def test_bad_arguments_are_refused_before_anything_is_measured_and_values_that_are_no_numbers():
    for value in (float("nan"), None, "low"):
        with pytest.raises(ValueError, match="measure gave .*; it must give a number") as error:
            exhaustive(lambda layers: value if layers == (1,) else 0, 3, 1)
        assert "(1,)" in error.value.__notes__[0]
    measure, calls = counting(arbitrary(0))
    for search, message in ((lambda: greedy_forward(3, 4, 2), "measure=3 cannot be called"),
                            (lambda: greedy_forward(measure, 0, 2), "num_layers=0 .* at least 1"),
                            (lambda: greedy_backward(measure, 4, 5), "budget=5 .* 1 to 4"),
                            (lambda: exhaustive(measure, 4, 1.5), "budget=1.5"),
                            (lambda: beam(measure, 4, 2, 0), "width=0 .* at least 1"),
                            (lambda: beam(measure, 4, 2, 1, "up"), "direction='up' .* 'add', 'remove'"),
                            (lambda: exhaustive(measure, 4, 2, executor=8), "executor=8 has no submit")):
        with pytest.raises(ValueError, match=message):
            search()
    assert not calls


def test_interactions_by_hand():
    values = {(): 10.0, (0,): 7.0, (1,): 6.0, (2,): 9.0, (1, 0): 1.0, (1, 2): 6.0}
    found = interactions(values, 3)
    assert found[0, 1] == found[1, 0] == 9 - 3 - 4 and found[1, 2] == 4 - 4 - 1
    assert isnan(found[0, 2]) and all(isnan(found[l, l]) for l in range(3))
    for values, message in (({(0,): 1.0}, r"values lacks \(\)"), ({(): 1.0, (2,): 1.0}, "0 to 1")):
        with pytest.raises(ValueError, match=message):
            interactions(values, 2)


def test_regret_is_among_sets_of_the_same_size():
    values = {(0, 1): 3.0, (0, 2): 1.0, (1, 2): 3.0, (1, 3): 4.0, (0,): 0.0, (0, 1, 2): 0.5}
    assert regret((0, 2), values) == 0 and regret((2, 1), values) == 2
    with pytest.raises(ValueError, match=r"layers=\(2, 3\) are not in values, which has 4 sets of 2 layers"):
        regret((2, 3), values)


def test_distilled_kl_trains_each_set_alike_and_leaves_the_student(aligned, tiny_tokens):
    student, teacher = aligned
    before = {n: p.clone() for n, p in student.named_parameters()}
    settings = hl.MatchSettings(batch_tokens=128, learning_rate=1e-3, attention_learning_rate=3e-3)
    measure = distilled_kl(student, teacher, tiny_tokens, num_tokens=512, settings=settings, heldout_tokens=64)
    untrained = distilled_kl(student, teacher, tiny_tokens, num_tokens=0, heldout_tokens=64)
    found = greedy_forward(untrained, 3, 2)
    plain, _ = heldout_kl(hl.restore(student, teacher, found.layers), teacher, tiny_tokens, heldout_tokens=64)
    assert found.path[1] == (found.layers, plain)
    assert measure((1,)) == measure((1,)) < untrained((1,)) and measure(()) < untrained(())
    assert untrained((0, 1, 2)) == pytest.approx(0, abs=1e-6)
    assert measure((0, 1, 2)) >= 0  # nothing linear is left, and it still can be measured
    assert all((p == before[n]).all() for n, p in student.named_parameters())
    assert pickle.loads(pickle.dumps(measure))((1,)) == measure((1,))
    for arguments, message in (({"num_tokens": -1}, "num_tokens=-1"),
                               ({"heldout_tokens": 8}, "heldout_tokens=8 .* at least 16")):
        with pytest.raises(ValueError, match=message):
            distilled_kl(student, teacher, tiny_tokens, **arguments)
