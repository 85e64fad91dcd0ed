"""Passes and measurements leave a model and torch as they were, also where they raise midway."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import transformers

import hybridlib as hl
from hybridlib.distill.evaluate import heldout_kl
from hybridlib.distill.recall import RecallTask, generate_recall, score_recall
from hybridlib.models import teachers
from hybridlib.models.passes import evaluation_mode, repeatable


class Broken(Exception):
    """The fault of a pass that breaks off."""


class Letters:
    bos_token_id = eos_token_id = pad_token_id = 0
    padding_side = "right"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [3 + ord(c) % 60 for c in text]}


MEASURES = {
    "evaluate": lambda model, teacher, tokens: hl.evaluate(model, teacher, tokens),
    "heldout_kl": lambda model, teacher, tokens: heldout_kl(model, teacher, tokens),
    "recall": lambda model, teacher, tokens: score_recall(model, tokens.tokenizer, tokens.examples),
}


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("measure", MEASURES)
def test_a_measurement_puts_every_flag_back(tiny_teacher, tiny_tokens, measure, breaks):
    teacher = tiny_teacher("llama", max_position_embeddings=512)
    model, tokens = hl.linearize(teacher).train(), hl.Tokens(tiny_tokens.train, tiny_tokens.heldout, Letters())
    tokens.examples = generate_recall(RecallTask(pairs=2, digits=1, split="train"), 2)
    model.model.layers[1].eval()  # a part in a mode of its own
    model.lm_head.weight.requires_grad_(False)
    modes, passes = [], []
    model.model.layers[2].register_forward_pre_hook(lambda module, _: modes.append(module.training))

    def break_off(module, arguments):
        passes.append(1)
        if breaks:
            raise Broken

    hook = model.model.norm.register_forward_pre_hook(break_off)

    def state():
        return ({name: module.training for name, module in model.named_modules()},
                {name: p.requires_grad for name, p in model.named_parameters()},
                list(model.model.norm._forward_pre_hooks),
                torch.is_grad_enabled(), tokens.tokenizer.padding_side, torch.is_autocast_enabled("cpu"))

    before = state()
    with pytest.raises(Broken) if breaks else nullcontext():
        MEASURES[measure](model, teacher, tokens)
    assert state() == before and passes and hook.id in model.model.norm._forward_pre_hooks
    assert not any(modes) and model.training  # eval mode within


def test_evaluation_mode_and_repeatable_end_with_an_error(tiny_teacher):
    model = tiny_teacher().train()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(Broken), evaluation_mode(model), repeatable():
        assert not model.lm_head.training and torch.are_deterministic_algorithms_enabled()
        raise Broken
    assert model.training and model.lm_head.training and not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == fills


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_as_they_were_after_an_error(shown):
    bars = transformers.utils.logging
    before = bars.is_progress_bar_enabled()
    try:
        (bars.enable_progress_bar if shown else bars.disable_progress_bar)()
        with pytest.raises(Broken), teachers._quiet():
            assert not bars.is_progress_bar_enabled()
            raise Broken
        assert bars.is_progress_bar_enabled() == shown
    finally:
        (bars.enable_progress_bar if before else bars.disable_progress_bar)()
