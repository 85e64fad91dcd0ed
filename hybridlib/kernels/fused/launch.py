"""Sizes of a call, and how each kernel is launched: warps, pipeline stages and the width of a program's tiles.

A launch that is not in the table may compute wrong results: the book's page on kernels says which do.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

SIZE = 64  # tokens in a chunk
LEAST, MOST = 8, 32  # chunks of a segment, segments of a sequence


class Launch(NamedTuple):
    """Warps and pipeline stages of a kernel, columns of the state in its tiles (0: none), registers a thread may have
    (0: any number), and whether it starts while the kernel before it runs."""

    warps: int
    stages: int
    width: int = 0
    registers: int = 0
    follows: bool = False


override: dict[str, Launch] = {}  # before the table; all the same in a forward pass and its backward pass
override_segments: int | None = None  # before `segments_of`
override_follows: bool | None = None  # before `follows`

_HALF: dict[str, Launch | tuple[Launch, Launch]] = {  # kernel: up to 64 dims, 128 dims
    "delta_rule.invert": (Launch(1, 1), Launch(1, 1)),
    "delta_rule.scan": (Launch(4, 3, 64), Launch(4, 3, 32)),
    "delta_rule.outputs": (Launch(4, 1, 64), Launch(4, 1, 64)),
    "delta_rule.scan_back": (Launch(4, 2, 64), Launch(4, 2, 32)),
    "delta_rule.gradients": (Launch(4, 1, 64), Launch(4, 1, 64)),
    "delta_rule.maps": (Launch(4, 2, 64), Launch(4, 2, 32)),
    "delta_rule.join": (Launch(4, 2, 16), Launch(8, 2, 16)),
    "linear_attention.scan": (Launch(4, 3, 64), Launch(4, 2, 64)),
    "linear_attention.outputs": (Launch(4, 1, 64, 128), Launch(4, 1, 64)),
    "linear_attention.gradients": Launch(4, 1, 64),
    "linear_attention.value_gradients": Launch(8, 2, 64),
    "linear_attention.join": (Launch(4, 1, 16), Launch(4, 1, 16)),
}
_FLOAT32: dict[str, Launch | tuple[Launch, Launch]] = {  # gated linear attention: 64 dims at most
    "delta_rule.invert": (Launch(1, 1), Launch(1, 1)),
    "delta_rule.scan": (Launch(4, 1, 32), Launch(8, 1, 32)),
    "delta_rule.outputs": (Launch(8, 1, 32), Launch(8, 1, 32)),
    "delta_rule.scan_back": (Launch(4, 1, 32), Launch(8, 1, 32)),
    "delta_rule.gradients": (Launch(8, 1, 32), Launch(8, 1, 32)),
    "delta_rule.maps": (Launch(4, 1, 32), Launch(8, 1, 32)),
    "delta_rule.join": (Launch(4, 2, 16), Launch(8, 2, 16)),
    "linear_attention.scan": Launch(4, 1, 16),
    "linear_attention.outputs": Launch(4, 1, 64),
    "linear_attention.gradients": Launch(4, 1, 64),
    "linear_attention.join": Launch(4, 1, 16),
}


def how(kernel: str, dtype: torch.dtype, key_dim: int, value_dim: int) -> Launch:
    """Return the launch of this kernel, its width at most that of the value (key, for linear attention's) dim."""
    table = _FLOAT32 if dtype == torch.float32 else _HALF
    entry = override.get(kernel) or table[kernel]
    use = entry if isinstance(entry, Launch) else entry[max(key_dim, value_dim) > 64]
    most = value_dim if kernel.startswith("delta_rule") else key_dim
    return use if use.width <= most else use._replace(width=most)


_compiled: dict = {}  # kernels by the key of a call: Triton's own look-up takes most of a launch


class Place:
    """Sizes of a call; calls of equal `key` run the same compiled kernels (None: a tensor not aligned to 16 bytes)."""

    def __init__(self, tokens, states, cu_seqlens, keep=None):
        """Take q, k, v and the other tensors by token; the initial state and the last one's gradient, or None."""
        q, v = tokens[0], tokens[2]
        self.batch, self.time, self.heads, self.key_dim = q.shape
        self.value_dim, self.dtype, self.many = v.shape[-1], v.dtype, 1
        if cu_seqlens is None:
            self.sequences = self.batch
            self.chunks = self.batch * -(-self.time // SIZE)
        else:
            self.sequences = len(cu_seqlens) - 1
            self.chunks = self.time // SIZE + self.sequences  # at least as many as there are
            self.many = max(16, 1 << (self.sequences - 1).bit_length())
        self.segments = segments_of(q, v, self.sequences)
        self.sizes = self.time, self.sequences, self.heads, self.segments
        self.packed, self.device = cu_seqlens is not None, q.device
        self.by_lower = max(self.key_dim, self.value_dim) <= 64  # scans forward read T by its lower half
        key, aligned = [q.device, keep, self.key_dim, self.value_dim, self.many, self.segments > 1], 0
        for x in tokens:
            key += x.dtype, x.stride(1)
            aligned |= x.data_ptr()
        for x in (*states, cu_seqlens):
            key.append(None if x is None else x.dtype)
            aligned |= 0 if x is None else x.data_ptr()
        self.key = tuple(key) if aligned % 16 == 0 else None

    def how(self, kernel: str) -> Launch:
        return how(kernel, self.dtype, self.key_dim, self.value_dim)

    def counts(self, tiles):
        """Allocate the counts of a scan of so many tiles (see `follow`), or None if no kernel is to start beside it."""
        if self.packed or not follows(self.device, tiles * self.heads * self.sequences * self.segments):
            return None
        return torch.empty(self.chunks * self.heads * tiles, dtype=torch.int32, device=self.device)

    def turns(self, ready):
        """Count a head's programs in a kernel with one for each chunk, which starts beside a scan if `ready` is set."""
        if ready is None:
            return self.chunks
        count = self.chunks // self.batch
        return self.batch * self.segments * -(-count // self.segments)  # the last segments may have fewer chunks

    def launch(self, kernel, use, grid, *arguments, part=0):
        """Run a kernel, whose arguments may differ in size, not in kind, from another's of equal `key` and part."""
        run(kernel, use, grid, arguments, None if self.key is None else (part, self.key))


def run(kernel, use, grid, arguments, key):
    """Run a kernel, compiled once for each launch and `key` (None: Triton inspects the arguments), and return it."""
    key = None if key is None else (id(kernel), use, key)
    _, compiled = _compiled.get(key, (kernel, None))
    if compiled is not None:
        compiled[grid](*arguments)
    else:
        compiled = kernel[grid](*arguments, num_warps=use.warps, num_stages=use.stages,
                                **({"maxnreg": use.registers} if use.registers else {}),
                                **({"launch_pdl": True} if use.follows else {}))
        if key is not None and compiled is not None:  # None from Triton's interpreter
            _compiled[key] = kernel, compiled


def segments_of(q: torch.Tensor, v: torch.Tensor, sequences: int) -> int:
    """Return into how many segments the scans cut each sequence, so that their programs fill the GPU; 1: none."""
    if override_segments is not None:
        return override_segments
    (batch, time, heads, key_dim), value_dim = q.shape, v.shape[-1]
    tiles = max(1, key_dim * value_dim // 4096)
    room = _multiprocessors(q.device) // (sequences * heads * tiles)
    chunks = batch * -(-time // SIZE) // sequences
    if tiles == 1 and chunks >= 2 * room * 2 * LEAST:
        room *= 2
    segments = min(room, chunks // LEAST, MOST)
    return segments if segments >= 3 else 1


def follows(device: torch.device, programs: int) -> bool:
    """Tell whether a kernel is to start while a scan of so many programs runs, which must leave it room."""
    if override_follows is not None:
        return override_follows
    return device.type == "cuda" and _capability(device) >= (9, 0) and programs <= 1.5 * _multiprocessors(device)


@functools.cache
def _capability(device):
    return torch.cuda.get_device_capability(device)


@functools.cache
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def precision(dtype: torch.dtype) -> str:
    """Return Triton's name for products of this dtype: float32 in three TF32 products, half precision as it is."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def dense_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def by_token(x: torch.Tensor) -> torch.Tensor:
    """Return x (batch, time, heads, ..), or a copy, with heads and dim dense and sequences one after another."""
    if x.is_contiguous():
        return x
    inner = x.shape[2:].numel()
    dense = x.stride(-1) == 1 and (x.dim() == 3 or x.stride(2) == x.shape[3])
    return x if dense and x.stride(1) >= inner and x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()
