"""Objectives against closed forms, spelled-out sums in float64, and torch's own gradients."""

from __future__ import annotations

import math

import pytest
import torch

import hybridlib as hl


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_of_two_coins_is_the_closed_form(temperature):
    p, q = 0.8, 0.3  # probabilities of heads after the temperature
    teacher = torch.tensor([[math.log(p / (1 - p)), 0.0]]) * temperature
    student = torch.tensor([[math.log(q / (1 - q)), 0.0]]) * temperature
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert hl.kl_divergence(teacher, student, temperature=temperature).item() == pytest.approx(
        temperature**2 * expected, rel=1e-5)


def test_kl_is_zero_for_equal_logits_up_to_a_constant():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    assert hl.kl_divergence(logits, logits + 3).abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk", [3, 100])
def test_kl_from_hidden_has_the_value_and_gradients_of_the_plain_formula(temperature, chunk):
    g = torch.Generator().manual_seed(0)
    teacher_hidden, teacher_head = torch.randn(2, 5, 6, generator=g), torch.randn(17, 6, generator=g)
    hidden, head = (torch.randn(*s, generator=g).requires_grad_() for s in ((2, 5, 4), (17, 4)))
    loss = hl.kl_from_hidden(teacher_hidden, teacher_head, hidden, head, temperature=temperature, chunk=chunk)
    got = torch.autograd.grad(loss * 3, (hidden, head))

    x, w = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    p = (teacher_hidden.double() @ teacher_head.double().T / temperature).softmax(-1)
    q = (x @ w.T / temperature).softmax(-1)
    plain = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    expected = torch.autograd.grad(plain * 3, (x, w))
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() / b.norm() < 1e-5


def test_kl_from_hidden_in_half_precision_stays_near_float32():
    g = torch.Generator().manual_seed(0)
    teacher_hidden, teacher_head = torch.randn(2, 50, 16, generator=g), torch.randn(97, 16, generator=g) / 4
    inputs = [torch.randn(*s, generator=g).requires_grad_() for s in ((2, 50, 16), (97, 16))]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = hl.kl_from_hidden(teacher_hidden, teacher_head, *inputs)
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    for exact, half in zip(*results, strict=True):
        assert half.dtype == torch.float32 and (half - exact).norm() / exact.norm() < 2e-2


def test_alignment_loss_is_error_over_power():
    teacher = torch.tensor([[[3.0, 4.0]]])  # mean square 12.5
    assert hl.alignment_loss(teacher + 1, teacher).item() == pytest.approx(1 / 12.5)
    assert hl.alignment_loss(teacher + 1, teacher, normalize=False).item() == pytest.approx(1.0)
    assert hl.alignment_loss(torch.zeros_like(teacher), teacher).item() == pytest.approx(1.0)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), "hot"])
def test_bad_temperatures_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature=.* is not a number above 0"):
        hl.kl_divergence(torch.zeros(2), torch.zeros(2), temperature=temperature)
