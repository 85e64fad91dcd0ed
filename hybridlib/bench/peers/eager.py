"""Adapters to other people's PyTorch forms of the operators, peers that `"chunked"` is measured against on any device.

``"transformers"`` is the chunked gated delta rule that Qwen3.5 runs where no kernels are installed. ``"naive"`` are the
functions that flash-linear-attention gives as a reference: the gated delta rule in chunks, gated linear attention a
token at a time. They are read from their files, for to import that package needs Triton.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import warnings
from pathlib import Path

__all__ = ["PEERS", "run", "why_not"]

PEERS = ("transformers", "naive")
_NAIVE = {"gated_delta_rule": ("gated_delta_rule", "naive_chunk_gated_delta_rule"),
          "gated_linear_attention": ("gla", "naive_recurrent_gla")}


def why_not(peer: str, operator: str) -> str | None:
    """Why a peer cannot run an operator here, in one sentence; None if it can."""
    if peer == "transformers":
        if operator != "gated_delta_rule":
            return f"transformers' Qwen3.5 has the gated delta rule, not {operator.replace('_', ' ')}"
        if importlib.util.find_spec("transformers.models.qwen3_5") is None:
            return "this version of transformers has no Qwen3.5"
        return None
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed (pip install fla-core)"
    if importlib.util.find_spec("einops") is None:
        return "einops is not installed (pip install einops), which flash-linear-attention's naive functions need"
    return None


def run(peer: str, operator: str, q, k, v, log_decay, beta=None):
    """Output and final state of an operator by a peer; arguments as `hybridlib.kernels` takes them, with its scale."""
    if peer == "transformers":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of flash-linear-attention, which is imported where Triton is: no GPU
            from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule
        plain = inspect.unwrap(torch_chunk_gated_delta_rule)  # around it, what runs kernels where fla can be imported
        return plain(q, k, v, log_decay, beta, output_final_state=True)
    if beta is None:
        return _naive(operator)(q, k, v, log_decay, output_final_state=True)
    return _naive(operator)(q, k, v, log_decay, beta, output_final_state=True)


@functools.cache
def _naive(operator):
    folder, name = _NAIVE[operator]
    root = Path(importlib.util.find_spec("fla").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location(f"_fla_naive_{folder}", root / "ops" / folder / "naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
