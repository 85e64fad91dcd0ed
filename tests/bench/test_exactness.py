"""Exactness: errors by hand, cases as they are named, known wrongs found; the backends' own errors within bounds."""

import dataclasses
import math
from unittest.mock import Mock

import pytest
import torch

import hybridlib as hl
from hybridlib import kernels
from hybridlib.bench import exactness
from hybridlib.bench.exactness import CASES, Case, make_case
from hybridlib.bench.timing import Bench

OPERATORS = ("gated_delta_rule", "gated_linear_attention")


@pytest.fixture
def small(monkeypatch):
    """Three cases of few tokens under names of their own."""
    cases = {"one": Case(2, 3, 1, 4, 4), "two": Case(3, 5, 2, 4, 8, decay="mixed", seed=1),
             "packed": Case(1, 7, 1, 4, 4, borders=(0, 2, 2, 7))}
    monkeypatch.setattr(exactness, "CASES", cases)
    return cases


def measure(bench, operator=OPERATORS[0], backend="chunked", cases=("one", "two", "packed"), dtype="float32", **truths):
    return exactness.measure_exactness(dataclasses.replace(bench, dtype=dtype), operator, backend, cases, **truths)


def test_an_error_is_relative_to_the_truth():
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert exactness.relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert exactness.relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert exactness.relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    assert exactness.relative_error(torch.tensor([3.0, math.nan]), truth) == math.inf
    assert exactness.relative_error(torch.tensor([3.0, math.inf]), truth) == math.inf


@pytest.mark.parametrize("operator", OPERATORS)
def test_cases_are_what_their_names_say(operator):
    inputs = {name: make_case(operator, case) for name, case in CASES.items() if case.time < 500}
    gates = {name: x["log_decay"] for name, x in inputs.items()}
    assert all((x <= 0).all() for x in gates.values())
    assert (gates["none"] == 0).all() and (gates["strong"] == -20).all()
    assert -1e-6 <= gates["near none"].min() < 0 and -0.1 <= gates["mild"].min() < -0.09
    assert set((gates["mixed"] == -20).unique().tolist()) == {False, True}
    half = gates["strong then mild"]
    assert (half[:, :65] == -20).all() and (half[:, 65:] > -0.01).all()
    assert inputs["length 63"]["q"].shape == (2, 63, 9, 64) and inputs["packed"]["initial_state"].shape[0] == 6
    assert inputs["keys 64 and values 128"]["initial_state"].shape == (2, 9, 64, 128)
    keys = inputs["repeated keys"]["k"]
    assert torch.equal(keys, keys[:, :1].expand_as(keys)) and torch.allclose(keys.norm(dim=-1), torch.ones(1))
    assert not torch.equal(inputs["random 1"]["q"].flatten()[:9], inputs["random 2"]["q"].flatten()[:9])
    if operator == "gated_delta_rule":
        assert (inputs["beta 0"]["beta"] == 0).all() and (inputs["beta 1"]["beta"] == 1).all()
    halves = make_case(operator, CASES["mild"], "bfloat16")
    assert halves["v"].dtype == torch.bfloat16
    assert halves["log_decay"].dtype == halves["initial_state"].dtype == torch.float32


def test_cases_that_an_operator_dtype_or_backend_cannot_hold_are_left_out():
    delta, linear = (set(exactness.cases_for(operator, "chunked", "float32")) for operator in OPERATORS)
    assert delta == set(CASES) and delta - linear == {"beta 0", "beta 1", "repeated keys at beta 1"}
    half = set(exactness.cases_for(OPERATORS[0], "chunked", "float16"))
    assert delta - half == {"strong", "strong then mild"}
    by_token = exactness.cases_for(OPERATORS[0], "reference", "float32")
    assert max(case.time for case in by_token.values()) == 400
    assert exactness.cases_for(OPERATORS[0], "fla", "float32") == {}
    by_fla = exactness.cases_for(OPERATORS[0], "fla", "bfloat16", ["mild", "length 1", "dims 32", "packed"])
    assert set(by_fla) == {"mild"}
    by_peer = exactness.cases_for(OPERATORS[0], "flash_qla", "bfloat16")
    assert list(by_peer) == ["dims 128", "2 x 4096 x 16 x 128"]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_backends_are_within_their_bounds(bench, small, operator, dtype, backend):
    row = measure(bench, operator, backend, dtype=dtype)
    assert row["reason"] is None and row["reasons"] == {} and all(row["equal"].values())
    names = {"output", "final state", "gradient of q", "gradient of k", "gradient of v", "gradient of log decay",
             "gradient of initial state"} | ({"gradient of beta"} if operator == OPERATORS[0] else set())
    assert all(set(errors) == names for errors in row["errors"].values()) and list(row["errors"]) == list(small)
    worst = max(error for errors in row["errors"].values() for error in errors.values())
    assert (0 if dtype == "float32" else 1e-4) < worst <= exactness.error_bound(backend, dtype)


def test_a_known_wrong_is_found_in_the_tensor_that_has_it(bench, small, monkeypatch):
    right = kernels.gated_delta_rule

    def wrong(q, k, v, *gates, backend, **options):
        o, state = right(q, k, v, *gates, backend=backend, **options)
        return (o, state) if backend == "reference" else (o, state + 1e-3 * state.detach())

    monkeypatch.setattr(kernels, "gated_delta_rule", wrong)
    row = measure(bench)
    for errors in row["errors"].values():
        assert errors["final state"] == pytest.approx(1e-3, rel=1e-2)
        assert max(error for name, error in errors.items() if name != "final state") < 1e-5


def test_runs_that_differ_are_said_to(bench, small, monkeypatch):
    right, calls = kernels.gated_delta_rule, []

    def moving(*inputs, backend, **options):
        o, state = right(*inputs, backend=backend, **options)
        calls.append(backend)
        return (o + 1e-7 * len(calls), state) if o.shape[1] == 3 else (o, state)

    monkeypatch.setattr(kernels, "gated_delta_rule", moving)
    row = measure(bench)
    assert row["equal"] == {"one": False, "two": True, "packed": True}


def test_truth_by_a_few_sequences_is_the_truth(small, monkeypatch):
    monkeypatch.setattr(exactness, "_AT_ONCE", 1)
    answers = exactness._Answers(OPERATORS[0], small["two"], "float32", "cpu")
    whole = answers.by("reference", torch.float64)
    assert all(torch.allclose(answers.truth[name], x, rtol=1e-12, atol=1e-14) for name, x in whole.items())
    packed = exactness._Answers(OPERATORS[0], small["packed"], "float32", "cpu")
    assert packed.truth["final state"].shape == (3, 1, 4, 4)
    state = packed.inputs["initial_state"][1]
    assert torch.equal(packed.truth["final state"][1], state.double())  # a sequence without a token


def test_the_long_truth_is_that_of_the_recurrence():
    answers = exactness._Answers(OPERATORS[0], Case(1, 1100, 1, 8, 8), "float32", "cpu")
    by_token = answers.by("reference", torch.float64)
    assert max(exactness.relative_error(answers.truth[name], x) for name, x in by_token.items()) < 1e-12
    assert not all(torch.equal(answers.truth[name], x) for name, x in by_token.items())  # it is another backend's


def test_gradients_are_those_of_output_and_final_state(small):
    answers = exactness._Answers(OPERATORS[1], small["one"], "float32", "cpu")
    v, step, (by_o, by_state) = answers.inputs["v"].double(), 1e-3, (x.double() for x in answers.weights)

    def functional(change):
        inputs = {name: x.double() for name, x in answers.inputs.items()} | {"v": v + change}
        o, state = kernels.gated_linear_attention(*list(inputs.values())[:4], initial_state=inputs["initial_state"],
                                                  backend="reference")
        return ((o * by_o).sum() + (state * by_state).sum()).item()

    one = torch.zeros_like(v)
    one[1, 2, 0, 3] = step
    assert answers.truth["gradient of v"][1, 2, 0, 3].item() == pytest.approx((functional(one) - functional(-one))
                                                                           / (2 * step))


def test_a_case_that_fails_leaves_the_others_and_a_backend_that_is_not_here_has_its_reason(bench, small, monkeypatch):
    right = kernels.gated_delta_rule

    def refuses(*inputs, backend, **options):
        if inputs[0].shape[1] == 5 and backend == "chunked":
            raise RuntimeError("five tokens are too many")
        return right(*inputs, backend=backend, **options)

    monkeypatch.setattr(kernels, "gated_delta_rule", refuses)
    row = measure(bench)
    assert row["reason"] is None and set(row["errors"]) == {"one", "packed"}
    assert row["reasons"] == {"two": "RuntimeError: five tokens are too many"}
    assert measure(bench, cases=["two"])["reason"] == "RuntimeError: five tokens are too many"
    monkeypatch.setattr(kernels, "available_backends", lambda: {"fused": "it is not here"})
    row = measure(bench, backend="fused")
    assert row["reason"] == "it is not here" and "errors" not in row
    with pytest.raises(ValueError, match=r"^cases=\[\] has none that 'chunked' takes"):
        measure(bench, cases=[])


def test_truths_are_kept_for_the_next_backend_and_records_for_the_next_question(bench, small, monkeypatch):
    draw, truths = Mock(wraps=exactness.make_case), {}
    monkeypatch.setattr(exactness, "make_case", draw)
    first = measure(bench, truths=truths)
    measure(bench, backend="reference", truths=truths)
    assert draw.call_count == 3 and set(truths) == set(small)
    assert measure(bench) == first and len(bench.ledger.find("operator_exactness")) == 2
    measure(dataclasses.replace(bench, recompute=True))
    assert draw.call_count == 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_kernels_are_within_their_bounds(tmp_path, dtype):
    bench = Bench(hl.Ledger(tmp_path), "cuda", dtype)
    row = exactness.measure_exactness(bench, OPERATORS[0], "fused", ["length 65", "packed"])
    assert row["reason"] is None and row["reasons"] == {} and all(row["equal"].values())
    assert max(e for errors in row["errors"].values() for e in errors.values()) <= exactness.error_bound("fused", dtype)
