"""Adapter to FlashQLA (https://github.com/QwenLM/FlashQLA), an optional package: a peer that ours is measured against.

It is no backend of `hybridlib.kernels`: models do not run with it, since it takes little of what they have. Its kernels
are written in TileLang and compiled at their first call; `why_not` says what they cannot take before it is imported.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

__all__ = ["gated_delta_rule", "why_not"]


def why_not(operator: str, key_dim: int, value_dim: int, dtype: str, device: torch.device) -> str | None:
    """Why FlashQLA cannot run an operator on inputs of these dims and dtype, in one sentence; None if it can."""
    if importlib.util.find_spec("flash_qla") is None:
        return "FlashQLA is not installed (pip install flash-qla)"
    if device.type != "cuda":
        return f"FlashQLA needs a CUDA GPU, and this is on {device.type}"
    if (capability := torch.cuda.get_device_capability(device)) < (9, 0):
        return (f"FlashQLA needs a GPU of compute capability 9.0 (Hopper) or above, and this one has "
                f"{'.'.join(map(str, capability))}")
    if operator != "gated_delta_rule":
        return f"FlashQLA has the gated delta rule, not {operator.replace('_', ' ')}"
    if (key_dim, value_dim) != (128, 128):
        return f"FlashQLA takes key_dim and value_dim of 128, not {key_dim} and {value_dim}"
    if dtype not in ("bfloat16", "float16"):
        return f"FlashQLA takes bfloat16 and float16, not {dtype}"
    return None


def gated_delta_rule(q, k, v, log_decay, beta, scale=None, initial_state=None):
    """Run FlashQLA's chunked gated delta rule; arguments and result as `hybridlib.kernels.gated_delta_rule`.

    The sequences of a batch are given as one packed row, which copies nothing: only in such a row does FlashQLA cut
    long sequences into parts that run at once, where by its own reckoning that is faster.
    """
    from flash_qla import chunk_gated_delta_rule

    batch, time = v.shape[:2]
    q, k, v, log_decay, beta = (x.flatten(0, 1)[None] for x in (q.to(v.dtype), k.to(v.dtype), v, log_decay, beta))
    o, state = chunk_gated_delta_rule(q=q, k=k, v=v, g=log_decay.float(), beta=beta, scale=scale,
                                      initial_state=None if initial_state is None else initial_state.float(),
                                      output_final_state=True, cu_seqlens=_borders(batch, time, v.device))
    return o[0].unflatten(0, (batch, time)), state


@functools.lru_cache(maxsize=16)
def _borders(batch, time, device):
    """Where packed sequences begin, and the last ends: one tensor a shape, since FlashQLA waits to read a new one."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * time
