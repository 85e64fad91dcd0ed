"""The step form of each operator: the recurrence in float64, a token at a time; what it keeps and what it refuses."""

from __future__ import annotations

import pytest
import torch

from hybridlib import kernels
from hybridlib.kernels import step
from tests.kernels.cases import make_inputs

OPERATORS = ("gated_delta_rule", "gated_linear_attention")


def inputs(operator, dtype=torch.float32):
    """q, k, v, log_decay (and beta) of (2, 40, 3, ...) and a first state."""
    tensors, state = make_inputs("gdn" if operator == OPERATORS[0] else "gla", 40, 8, 12, torch.float32)
    return [x.to(dtype) for x in tensors], state.to(dtype)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_steps_are_the_recurrence(operator, dtype, error):
    tensors, first = inputs(operator, dtype)
    run = getattr(kernels, operator)
    expected, last = run(*(x.double() for x in tensors), initial_state=first.double(), backend="reference")
    state, outputs = first.clone(), []
    for t in range(40):
        o, state = getattr(step, operator)(*(x[:, t] for x in tensors), state)
        outputs.append(o)
    assert o.dtype == state.dtype == dtype
    assert (torch.stack(outputs, 1) - expected).abs().max() <= error
    assert (state - last).abs().max() <= error


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_state_given_is_not_written_to_and_scale_scales(operator):
    tensors, state = inputs(operator)
    before, token = state.clone(), [x[:, 0] for x in tensors]
    one, two = (getattr(step, operator)(*token, state, scale=s)[0] for s in (1.0, 2.0))
    assert torch.equal(state, before)
    torch.testing.assert_close(2 * one, two)


@pytest.mark.parametrize("operator", OPERATORS)
def test_half_precision_tokens_leave_a_float32_state(operator):
    tensors, state = inputs(operator)
    token = [x[:, 0].bfloat16() for x in tensors]
    expected, wide = getattr(step, operator)(*(x.float() for x in token), state)
    with torch.autocast("cpu", torch.bfloat16):
        o, narrow = getattr(step, operator)(*token, state)
    assert o.dtype == torch.bfloat16 and narrow.dtype == torch.float32
    assert torch.equal(narrow, wide) and torch.equal(o, expected.bfloat16())


@pytest.mark.parametrize("operator", OPERATORS)
def test_wrong_shapes_are_refused_by_name(operator):
    tensors, state = inputs(operator)
    token, run = [x[:, 0] for x in tensors], getattr(step, operator)
    with pytest.raises(ValueError, match=r"q has shape \(2, 40, 3, 8\); it must be \(batch, heads, key_dim\)"):
        run(*tensors, state)
    with pytest.raises(ValueError, match=r"state has shape \(2, 3, 12, 8\); .* key_dim = 8, value_dim = 12\)"):
        run(*token, state.mT)
    with pytest.raises(ValueError, match=r"log_decay has shape \(1, 3"):
        run(*token[:3], token[3][:1], *token[4:], state)
