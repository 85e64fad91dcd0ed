"""The step form of each operator: the recurrence in float64, a token at a time; what it keeps and what it refuses."""

from __future__ import annotations

import pytest
import torch

from hybridlib import kernels
from hybridlib.kernels import step
from tests.kernels.cases import OPERATORS, make_inputs


@pytest.fixture(params=OPERATORS)
def case(request):
    """Step and whole form of an operator, its inputs of (2, 40, 3, ...) and a first state."""
    name = OPERATORS[request.param]
    return getattr(step, name), getattr(kernels, name), *make_inputs(request.param, 40, 8, 12, torch.float32)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_steps_are_the_recurrence(case, dtype, error):
    run, whole, tensors, first = case
    expected, last = whole(*(x.double() for x in tensors), initial_state=first.double(), backend="reference")
    state, outputs = first.to(dtype), []
    for t in range(40):
        o, state = run(*(x[:, t].to(dtype) for x in tensors), state)
        outputs.append(o)
    assert o.dtype == state.dtype == dtype
    assert (torch.stack(outputs, 1) - expected).abs().max() <= error
    assert (state - last).abs().max() <= error


def test_the_state_given_is_not_written_to_and_scale_scales(case):
    run, _, tensors, state = case
    before, token = state.clone(), [x[:, 0] for x in tensors]
    one, two = (run(*token, state, scale=s)[0] for s in (1.0, 2.0))
    assert torch.equal(state, before)
    torch.testing.assert_close(2 * one, two)


def test_half_precision_tokens_leave_a_float32_state(case):
    run, _, tensors, state = case
    token = [x[:, 0].bfloat16() for x in tensors]
    expected, wide = run(*(x.float() for x in token), state)
    with torch.autocast("cpu", torch.bfloat16):
        o, narrow = run(*token, state)
    assert o.dtype == torch.bfloat16 and narrow.dtype == torch.float32
    assert torch.equal(narrow, wide) and torch.equal(o, expected.bfloat16())


def test_wrong_shapes_are_refused_by_name(case):
    run, _, tensors, state = case
    token = [x[:, 0] for x in tensors]
    for arguments, message in (
            ((*tensors, state), r"q has shape \(2, 40, 3, 8\); it must be \(batch, heads, key_dim\)"),
            ((*token, state.mT), r"state has shape \(2, 3, 12, 8\); .* key_dim = 8, value_dim = 12\)"),
            ((*token[:3], token[3][:1], *token[4:], state), r"log_decay has shape \(1, 3")):
        with pytest.raises(ValueError, match=message):
            run(*arguments)
