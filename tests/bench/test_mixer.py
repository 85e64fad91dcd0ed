"""The parts of a mixer are the mixer, and are timed one by one."""

from types import SimpleNamespace

import pytest
import torch

import hybridlib as hl
from hybridlib.bench import mixer as mixer_speed
from hybridlib.models.mixers import MIXERS, build_mixer
from hybridlib.report import kernel_tables as kernel_report


@pytest.mark.parametrize("name", MIXERS)
def test_the_parts_one_after_the_other_are_the_mixer(name):
    config = SimpleNamespace(num_attention_heads=2, head_dim=32, hidden_size=64, rms_norm_eps=1e-6, mixer_qk_norm=True,
                             mixer_qkv_bias=False, mixer_o_bias=False)
    torch.manual_seed(0)
    mixer = build_mixer(name, config, 0)
    mixer.init_gates(torch.Generator().manual_seed(0))
    x, parts = torch.randn(2, 70, 64), mixer_speed.mixer_parts(mixer)
    with torch.no_grad():
        given = mixer_speed._inputs(parts, x)
        assert tuple(parts) == tuple(given) == mixer_speed.PARTS
        assert torch.equal(parts["output"](*given["output"]), mixer(x)[0])


@pytest.mark.parametrize("name", MIXERS)
def test_every_part_is_timed_in_both_directions(name, tmp_path):
    ledger = hl.Ledger(tmp_path)
    for direction in ("forward", "forward+backward"):
        row = mixer_speed.time_mixer(ledger, name, (1, 64, 2, 16), direction=direction, device="cpu", repeats=3)
        assert row["reason"] is None and set(row["parts"]) == set(mixer_speed.PARTS)
        assert all(0 < part["low"] <= part["seconds"] <= part["high"] for part in row["parts"].values())
    assert [r.kind for r in ledger] == ["mixer_speed"] * 2


def test_words_name_what_an_operator_could_absorb():
    seconds = dict(zip(mixer_speed.PARTS, (4e-5, 1e-5, 3e-5, 1e-5, 1e-5)))
    row = {"mixer": "gdn", "batch": 1, "time": 2, "heads": 3, "dim": 4, "dtype": "bfloat16", "direction": "forward",
           "reason": None, "parts": {name: {"seconds": value} for name, value in seconds.items()}}
    assert kernel_report._around(row) == (
        "- Mixer **gdn**, (1, 2, 3, 4), bfloat16, forward, part by part: 100 \u00b5s; projections 40 \u00b5s (40%), "
        "activations, norms and gates 10 \u00b5s (10%), the operator 30 \u00b5s (30%), norm and gate of its output "
        "10 \u00b5s (10%), the output's projection 10 \u00b5s (10%). Everything elementwise around the "
        "operator is 20% of that, an upper bound of what larger kernels could save.")


@pytest.mark.parametrize("change, message", [({"mixer": "mamba"}, "mixer='mamba'"), ({"shape": (1, 2, 3)}, "shape"),
                                             ({"direction": "back"}, "direction='back'"),
                                             ({"repeats": 0}, "repeats=0")])
def test_bad_arguments_are_named(change, message, tmp_path):
    arguments = {"mixer": "gdn", "shape": (1, 64, 2, 16), "device": "cpu"} | change
    with pytest.raises(ValueError, match=message):
        mixer_speed.time_mixer(hl.Ledger(tmp_path), **arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MIXERS)
def test_parts_are_compiled_and_recorded_on_a_gpu(name, tmp_path):
    row = mixer_speed.time_mixer(hl.Ledger(tmp_path), name, (2, 256, 4, 64), repeats=5)
    assert row["reason"] is None and row["dtype"] == "bfloat16"
    assert all(part["seconds"] > 0 for part in row["parts"].values())
