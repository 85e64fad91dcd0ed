"""flash-linear-attention by its adapter: it runs its own kernels, also where FlashQLA is installed."""

from __future__ import annotations

import os
import sys
import types
from contextlib import nullcontext

import pytest

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
    monkeypatch.setenv("FLA_FLASH_QLA", "1")
    if before is None:
        monkeypatch.delenv("FLA_FLASH_QLA")
    inputs = list(operators.operator_inputs("gated_delta_rule", (1, 4, 1, 8)).values())
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        assert fla_adapter.gated_delta_rule(*inputs, 1.0, None)[0] is inputs[2]
    assert seen == ["0"] and os.environ.get("FLA_FLASH_QLA") == before  # elsewhere it may, as it might before
