"""Adapter to flash-linear-attention (https://github.com/fla-org/flash-linear-attention), an optional package."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os

import torch
from torch.torch_version import TorchVersion

__all__ = ["gated_delta_rule", "gated_linear_attention", "why_not"]


@functools.cache
def why_not(delta_rule_gradients: bool = False) -> str | None:
    """Return why flash-linear-attention, or also its delta rule's gradients, cannot run here; None if it can."""
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed (pip install flash-linear-attention)"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed, and flash-linear-attention cannot be imported without it"
    if not torch.cuda.is_available():
        return "flash-linear-attention needs a CUDA GPU, and there is none"
    if delta_rule_gradients and torch.cuda.get_device_capability()[0] == 9:
        import triton

        version = TorchVersion(triton.__version__)
        if (3, 4, 0) <= version < (3, 7, 1) and importlib.util.find_spec("tilelang") is None:
            return (f"on a Hopper GPU triton {version} compiles the gradients of the gated delta rule wrongly and "
                    "flash-linear-attention refuses them; install triton >= 3.7.1 or tilelang")
    return None


def gated_delta_rule(q, k, v, log_decay, beta, scale, initial_state):
    """Run FLA's chunked gated delta rule, its own; arguments and result as `hybridlib.kernels.gated_delta_rule`."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, beta = q.to(v.dtype), k.to(v.dtype), beta.to(v.dtype)
    with _without_flash_qla():
        return chunk_gated_delta_rule(q, k, v, log_decay.float(), beta, scale=scale, output_final_state=True,
                                      initial_state=None if initial_state is None else initial_state.float())


@contextlib.contextmanager
def _without_flash_qla():
    before = os.environ.get("FLA_FLASH_QLA")
    os.environ["FLA_FLASH_QLA"] = "0"
    try:
        yield
    finally:
        os.environ.pop("FLA_FLASH_QLA") if before is None else os.environ.update(FLA_FLASH_QLA=before)


def gated_linear_attention(q, k, v, log_decay, scale, initial_state):
    """Run FLA's chunked gated linear attention; as `hybridlib.kernels.gated_linear_attention`."""
    from fla.ops.gla import chunk_gla

    return chunk_gla(q.to(v.dtype), k.to(v.dtype), v, log_decay.float(), scale=scale, output_final_state=True,
                     initial_state=None if initial_state is None else initial_state.float())
