"""Both stages lower what they should, train what they should, stop in time, and resume to the same numbers."""

import copy
import math
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

import hybridlib as hl
from hybridlib.distill.loop import save_checkpoint
from hybridlib.distill.objectives import divergence
from hybridlib.distill.settings import DistillationDiverged
from hybridlib.models.passes import attention_io

ALIGN = hl.AlignSettings(batch_tokens=128, learning_rate=1e-2)
MATCH = hl.MatchSettings(batch_tokens=128, learning_rate=1e-3, attention_learning_rate=3e-3)


@pytest.fixture
def teacher(tiny_teacher):
    return tiny_teacher("llama_tied_bias")


@pytest.fixture
def hybrid(teacher):
    return hl.restore(hl.linearize(teacher), teacher, [1])


@pytest.mark.parametrize("mixer", ["gdn", "gla"])
def test_alignment_lowers_every_layers_error_and_trains_mixers_only(teacher, tiny_tokens, mixer):
    student = hl.linearize(teacher, mixer)
    before = hl.score_layers(student, teacher, tiny_tokens, metric="mse")
    weights = {n: p.clone() for n, p in student.named_parameters()}
    history = hl.align(student, teacher, tiny_tokens, 4096, settings=ALIGN)
    after = hl.score_layers(student, teacher, tiny_tokens, metric="mse")
    assert all(b < a for a, b in zip(before.values, after.values, strict=True))
    assert history.tokens[-1] == 4096 and set(history.layer_losses) == {0, 1, 2}
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, weights[n])}
    assert changed and all(".self_attn." in n for n in changed)
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("kind", [
    dict(), dict(divergence="reverse"), dict(divergence="jensen_shannon"),
    dict(divergence="alpha_beta", alpha=0.2, beta=0.7)], ids=lambda kind: kind.get("divergence", "forward"))
def test_matching_lowers_its_divergence_and_leaves_the_teacher(teacher, hybrid, tiny_tokens, kind):
    weights, settings = {n: p.clone() for n, p in teacher.named_parameters()}, replace(MATCH, **kind)

    def held_out():
        with torch.no_grad():
            logits = [m(input_ids=tiny_tokens.heldout.long()).logits for m in (teacher, hybrid)]
        return divergence(*logits, kind=settings.divergence, alpha=settings.alpha, beta=settings.beta).mean().item()

    before = held_out()
    history = hl.match(hybrid, teacher, tiny_tokens, 4096, settings=settings)
    assert held_out() < 0.8 * before
    assert history.losses[0] == pytest.approx(before, rel=0.2)  # of this kind, not of another
    assert all(torch.equal(p, weights[n]) for n, p in teacher.named_parameters())


@pytest.mark.parametrize("grouping", ["attention", "mixers"])
def test_the_two_rates_go_to_their_own_weights(teacher, hybrid, tiny_tokens, grouping):
    fast = {"mixers": ("model.layers.0.self_attn", "model.layers.2.self_attn"),  # layer 1 is softmax
            "attention": tuple(f"model.layers.{l}.{part}" for l in range(3) for part in ("self_attn", "input_layer"))}
    for rates in ({"learning_rate": 0.0}, {"attention_learning_rate": 0.0}):
        model = copy.deepcopy(hybrid)
        settings = replace(MATCH, grouping=grouping, **rates)
        hl.match(model, teacher, tiny_tokens, 128, settings=settings)
        changed = {n for (n, p), q in zip(model.named_parameters(), hybrid.parameters()) if not torch.equal(p, q)}
        every = {n for n, _ in hybrid.named_parameters()}
        chosen = {n for n in every if n.startswith(fast[grouping])}
        assert changed == (chosen if "learning_rate" in rates else every - chosen)


def test_numbers_of_settings_give_them_back_and_old_grouping_keeps_its_keys():
    for settings in (MATCH, hl.MatchSettings(grouping="mixers", attention_learning_rate=2e-3)):
        assert hl.MatchSettings.from_numbers(settings.numbers()) == settings
    old = hl.MatchSettings(grouping="mixers", warmup=0.05, weight_decay=0.0, attention_learning_rate=1e-3).numbers()
    assert old["mixer_learning_rate"] == 1e-3 and not {"grouping", "attention_learning_rate"} & set(old)


def test_a_run_that_ends_above_its_start_says_so(teacher, tiny_tokens, caplog):
    fine = hl.match(hl.linearize(teacher), teacher, tiny_tokens, 1024, settings=replace(MATCH, clip=1.0))
    assert not fine.rose and not caplog.records
    worse = hl.match(hl.linearize(teacher), teacher, tiny_tokens, 384, settings=replace(
        MATCH, learning_rate=0.3, attention_learning_rate=0.3))
    assert worse.rose and "ended with a higher loss than it started with" in caplog.text
    assert hl.History("match", losses=[1.0, *[3.0] * 17, 0.9, 1.2]).rose  # a tenth of 20 steps are two
    assert not hl.History("match", losses=[1.0, *[3.0] * 17, 1.2, 0.7]).rose


def test_micro_batches_give_the_same_training(teacher, hybrid, tiny_tokens):
    whole, parts = (hl.match(copy.deepcopy(hybrid), teacher, tiny_tokens, 1024,
                             settings=replace(MATCH, micro_batch_tokens=micro)).losses for micro in (None, 32))
    assert whole == pytest.approx(parts, rel=1e-4)


def test_attention_io_is_what_the_layer_computes(teacher, tiny_tokens):
    ids = tiny_tokens.rows(0, 2)
    out = teacher(input_ids=ids, output_hidden_states=True)
    x, y = list(attention_io(teacher, ids))[1]
    before = out.hidden_states[1]
    torch.testing.assert_close(x, teacher.model.layers[1].input_layernorm(before))
    torch.testing.assert_close(out.hidden_states[2], before + y + teacher.model.layers[1].mlp(
        teacher.model.layers[1].post_attention_layernorm(before + y)))


class Killed(hl.Tokens):
    def rows(self, position, count):
        if position >= 8 * 7:
            raise KeyboardInterrupt
        return super().rows(position, count)


@pytest.mark.parametrize("stage", ["align", "match"])
def test_a_stopped_run_resumes_to_the_same_numbers(teacher, hybrid, tiny_tokens, tmp_path, stage):
    run = getattr(hl, stage)
    settings = {"align": hl.AlignSettings, "match": hl.MatchSettings}[stage](batch_tokens=128, checkpoint_every=384)
    (broken, resumed), path = (copy.deepcopy(hybrid) for _ in range(2)), tmp_path / "c.safetensors"
    expected = run(hybrid, teacher, tiny_tokens, 1280, settings=settings)
    with pytest.raises(KeyboardInterrupt):
        run(broken, teacher, Killed(tiny_tokens.train, tiny_tokens.heldout), 1280, settings=settings, checkpoint=path)
    history = run(resumed, teacher, tiny_tokens, 1280, settings=settings, checkpoint=path)
    assert history.losses == expected.losses and history.tokens == expected.tokens
    assert all(torch.equal(a, b) for a, b in zip(hybrid.parameters(), resumed.parameters(), strict=True))
    assert [f.name for f in tmp_path.iterdir()] == ["c.safetensors"]


@pytest.mark.parametrize("stage", ["align", "match"])
def test_a_run_that_breaks_off_leaves_modes_flags_and_gradients(teacher, tiny_tokens, stage):
    hybrid = hl.restore(hl.linearize(teacher), teacher, [1]).train()
    hybrid.model.layers[0].mlp.eval()
    hybrid.model.norm.weight.requires_grad_(False)
    modes = {name: module.training for name, module in hybrid.named_modules()}
    settings = {"align": hl.AlignSettings, "match": hl.MatchSettings}[stage](batch_tokens=128)
    killed = Killed(tiny_tokens.train, tiny_tokens.heldout)
    advice = f"{stage} .* step 0 in layer 2; try a lower learning rate"
    for tokens, error, message in ((killed, KeyboardInterrupt, None), (tiny_tokens, DistillationDiverged, advice)):
        with pytest.raises(error, match=message):
            getattr(hl, stage)(hybrid, teacher, tokens, 1280, settings=settings)
        assert {name: module.training for name, module in hybrid.named_modules()} == modes
        assert [name for name, p in hybrid.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
        assert all(p.grad is None for p in hybrid.parameters())
        with torch.no_grad():
            hybrid.model.layers[2].self_attn.q_proj.weight[0, 0] = math.nan


def test_foreign_and_truncated_checkpoints_are_refused_and_a_full_disk_harms_none(teacher, tiny_tokens, tmp_path,
                                                                                  monkeypatch):
    path = tmp_path / "c.safetensors"
    hl.match(hl.linearize(teacher), teacher, tiny_tokens, 256, settings=MATCH, checkpoint=path)
    with pytest.raises(ValueError, match="another run \\(num_tokens differs\\)"):
        hl.match(hl.linearize(teacher), teacher, tiny_tokens, 512, settings=MATCH, checkpoint=path)
    with pytest.raises(ValueError, match="another run \\(stage differs\\)"):
        hl.align(hl.linearize(teacher), teacher, tiny_tokens, 256, settings=ALIGN, checkpoint=path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("hybridlib.distill.loop.os.replace", Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="the one before it, if any, is unchanged"):
            save_checkpoint(path, {}, [], {}, hl.History("match"), 1)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    path.write_bytes(before[:1000])
    with pytest.raises(ValueError, match="truncated or no checkpoint"):
        hl.match(hl.linearize(teacher), teacher, tiny_tokens, 256, settings=MATCH, checkpoint=path)


def test_divergence_stops_with_step_and_advice(teacher, tiny_tokens):
    settings = replace(MATCH, learning_rate=3.0, attention_learning_rate=3.0, clip=1e6, divergence_factor=1.5,
                       warmup=0.5)
    with pytest.raises(DistillationDiverged, match="step \\d+.*try a lower learning rate"):
        hl.match(hl.linearize(teacher), teacher, tiny_tokens, 8192, settings=settings)


@pytest.mark.parametrize(("settings", "message"), [
    (dict(batch_tokens=0), "batch_tokens=0"), (dict(schedule="linear"), "schedule='linear'"), (dict(clip=0), "clip=0"),
    (dict(learning_rate=-1.0), "learning_rate=-1.0"), (dict(temperature=0), "temperature=0"),
    (dict(cuda_graph="yes"), "cuda_graph='yes' is neither True nor False"), (dict(compile=1), "compile=1 is neither"),
    (dict(divergence="kl"), "divergence='kl'"), (dict(alpha=0.5), "alpha=0.5 is not taken by divergence='forward'")])
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        hl.MatchSettings(**settings)


def test_bad_calls_are_refused_before_compute(teacher, tiny_tokens):
    student = hl.linearize(teacher)
    with pytest.raises(ValueError, match="num_tokens=8 is not a whole number of at least 16"):
        hl.align(student, teacher, tiny_tokens, 8)
    with pytest.raises(ValueError, match="nothing to align"):
        hl.align(hl.restore(student, teacher, range(3)), teacher, tiny_tokens, 256)
    long = hl.Tokens(torch.zeros(4, 80, dtype=torch.int32), torch.zeros(2, 80, dtype=torch.int32))
    with pytest.raises(ValueError, match="context=80 is beyond the teacher's 64"):
        hl.match(student, teacher, long, 256)
