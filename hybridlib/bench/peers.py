"""Other implementations of the operators, to measure beside ours: ``"flash_qla"``, FlashQLA's gated delta rule in
TileLang (https://github.com/QwenLM/FlashQLA), compiled at the first call, and ``"transformers"``, the chunked one that
Qwen3.5 runs where no kernels are installed."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import warnings
from collections.abc import Callable

import torch

__all__ = ["PEERS", "gated_delta_rule", "why_not"]

PEERS = ("flash_qla", "transformers")


def gated_delta_rule(peer: str) -> Callable:
    """Return a peer's gated delta rule: a function of q, k, v, log_decay and beta to output and final state."""
    if peer == "flash_qla":
        return _flash_qla
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of flash-linear-attention, which is imported where Triton is: no GPU
        from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule
    plain = inspect.unwrap(torch_chunk_gated_delta_rule)  # it is wrapped in what runs kernels where they are
    return functools.partial(plain, output_final_state=True)


def why_not(peer: str, operator: str, dim: int, dtype: str, device: torch.device) -> str | None:
    """Say why a peer cannot run an operator at keys and values of `dim`, in one sentence; None if it can."""
    if operator != "gated_delta_rule":
        return f"{peer} has the gated delta rule, not {operator.replace('_', ' ')}"
    if peer == "transformers":
        missing = importlib.util.find_spec("transformers.models.qwen3_5") is None
        return "this version of transformers has no Qwen3.5" if missing else None
    if importlib.util.find_spec("flash_qla") is None:
        return "FlashQLA is not installed (pip install flash-qla)"
    if device.type != "cuda":
        return f"FlashQLA needs a CUDA GPU, and this is on {device.type}"
    if (capability := torch.cuda.get_device_capability(device)) < (9, 0):
        return f"FlashQLA needs compute capability 9.0 or above, and this GPU has {'.'.join(map(str, capability))}"
    if dim != 128:
        return f"FlashQLA takes keys and values of 128 dims, not {dim}"
    if dtype not in ("bfloat16", "float16"):
        return f"FlashQLA takes bfloat16 and float16, not {dtype}"
    return None


def _flash_qla(q, k, v, log_decay, beta, scale=None, initial_state=None):
    """Run a batch as one packed row: only there does FlashQLA cut long sequences."""
    from flash_qla import chunk_gated_delta_rule

    batch, time = v.shape[:2]
    q, k, v, log_decay, beta = (x.flatten(0, 1)[None] for x in (q.to(v.dtype), k.to(v.dtype), v, log_decay, beta))
    o, state = chunk_gated_delta_rule(q=q, k=k, v=v, g=log_decay.float(), beta=beta, scale=scale,
                                      initial_state=None if initial_state is None else initial_state.float(),
                                      output_final_state=True, cu_seqlens=_borders(batch, time, v.device))
    return o[0].unflatten(0, (batch, time)), state


@functools.lru_cache(maxsize=16)
def _borders(batch, time, device):
    """Return borders (batch + 1,) of packed sequences, one tensor a shape, for FlashQLA waits to read a new one."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * time
