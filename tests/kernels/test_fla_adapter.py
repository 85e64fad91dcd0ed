"""flash-linear-attention by its adapter: it runs its own kernels, also where FlashQLA is installed."""

from __future__ import annotations

import importlib.util
import os
import sys
import types

import pytest
import torch

from hybridlib import kernels
from hybridlib.bench import operators
from hybridlib.kernels import fla_adapter


@pytest.mark.parametrize("before", [None, "1"])
@pytest.mark.parametrize("fails", [False, True])
def test_fla_does_not_hand_its_call_to_flash_qla(monkeypatch, before, fails):
    seen = []

    def chunk_gated_delta_rule(q, k, v, g, beta, **options):
        seen.append(os.environ.get("FLA_FLASH_QLA"))
        return 1 / 0 if fails else (v, None)

    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[name].chunk_gated_delta_rule = chunk_gated_delta_rule
    if before is None:
        monkeypatch.delenv("FLA_FLASH_QLA", raising=False)
    else:
        monkeypatch.setenv("FLA_FLASH_QLA", before)
    inputs = list(operators.operator_inputs("gated_delta_rule", (1, 4, 1, 8)).values())
    if fails:
        with pytest.raises(ZeroDivisionError):
            fla_adapter.gated_delta_rule(*inputs, 1.0, None)
    else:
        assert fla_adapter.gated_delta_rule(*inputs, 1.0, None)[0] is inputs[2]
    assert seen == ["0"] and os.environ.get("FLA_FLASH_QLA") == before  # elsewhere it may, as it might before


@pytest.mark.skipif(fla_adapter.why_not() is not None or importlib.util.find_spec("flash_qla") is None,
                    reason=f"fla: {fla_adapter.why_not()}; or flash_qla is not installed")
def test_fla_itself_runs_its_own_kernels(monkeypatch):
    def theirs(**inputs):
        raise AssertionError("FLA handed its call to FlashQLA")

    import flash_qla as package

    monkeypatch.setattr(package, "chunk_gated_delta_rule", theirs)
    inputs = operators.operator_inputs("gated_delta_rule", (1, 128, 2, 128), "bfloat16", "cuda")
    with torch.no_grad():
        assert kernels.gated_delta_rule(*inputs.values(), backend="fla")[0].isfinite().all()
