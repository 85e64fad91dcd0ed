"""What the launch of a fused kernel asks of a GPU: programs, registers, bytes to move, FLOPs, and room.

A kernel's name is that of its launch ("delta_rule.scan"); `kernel_speed` sets all this beside the time it takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from hybridlib.kernels.fused import launch

__all__ = ["Limits", "limits_of", "product_flops", "resident_programs", "watch_launches"]

_TWICE = {("delta_rule.gradients", "dv"), ("delta_rule.join", "ends"), ("linear_attention.join", "ends")}  # in place


class Limits(NamedTuple):
    """A GPU's multiprocessors, and what each has: registers, bytes of shared memory, warps and programs at once."""

    multiprocessors: int
    registers: int
    shared: int
    warps: int
    programs: int


@contextmanager
def watch_launches(operator: str) -> Iterator[list[dict]]:
    """Within the block, a list that gets a dict for each launch of an operator's kernels, as they come.

    ``name``; ``symbol``, its function on the GPU; ``programs``, and ``warps`` of each; ``registers`` a thread,
    ``spills`` (numbers of 4 bytes that a thread keeps in memory instead) and bytes of ``shared`` memory (all three None
    in Triton's interpreter); ``flops`` (`product_flops`); and ``bytes``, the least that the kernel can move: every
    tensor that it is given once, twice if it is read and then replaced, and not if it is not looked at.
    """
    seen, before = [], launch.watch

    def watch(kernel, use, grid, arguments, compiled):
        named = dict(zip(inspect.signature(kernel.fn).parameters, arguments))
        name = f"{operator.removeprefix('gated_')}.{kernel.fn.__name__.removeprefix('_')}"
        tensors = {key: x for key, x in named.items() if isinstance(x, torch.Tensor)}
        seen.append({"name": name, "symbol": getattr(compiled, "name", kernel.fn.__name__),
                     "programs": grid[0] * grid[1] * grid[2], "warps": use.warps,
                     "registers": getattr(compiled, "n_regs", None), "spills": getattr(compiled, "n_spills", None),
                     "shared": compiled and compiled.metadata.shared, "flops": product_flops(name, named),
                     "bytes": sum(_moved(name, key, x, named) for key, x in tensors.items())})

    launch.watch = watch
    try:
        yield seen
    finally:
        launch.watch = before


def _moved(name, key, x, arguments):
    """Bytes of an argument that a kernel moves at least."""
    if key in ("inverse", "rest") and (arguments.get("LOWER") or arguments.get("ZEROS") is False):
        return x.nbytes * 10 // 16  # not the blocks above the diagonal
    return x.nbytes * (2 if (name, key) in _TWICE else 1)


def product_flops(name: str, arguments: Mapping) -> int | None:
    """FLOPs of the matrix products of one launch, 2 for each multiply-add; None for packed sequences.

    Products with matrices of zeros and ones, which sum, count as well, for they run on the same units. With chunks of
    C tokens, keys of K and values of V dims, V / W programs for the columns of a state, and f products for one with the
    inverse (3 where what rounding cut off is multiplied as well, else 1), the multiply-adds a chunk and head are

    - delta rule: invert 10 16^2 K + 40 16^3, scans (either way) 3 C K V + (f + 1) C^2 V + C^2 K V / W, without outputs
      2 C K V + C^2 V, outputs C K V + C^2 V + C^2 K, gradients 3 C K V + 2 C^2 V + 6 C^2 K, maps
      (K + V) (2 C K + f C^2);
    - linear attention: scans (either way) C K V + 2 C^2 K V / W, outputs and gradients of the values alone C K V +
      C^2 V + 3 C^2 K, gradients 3 C K V + 2 C^2 V + (5 + s) C^2 K, with s = 4, or 2 in float32, and without those of
      the values, by p programs, 2 C K V + p C^2 V + (4 + s) C^2 K; all in chunks that need no levels.

    A join has K^2 V for each segment of the delta rule, and none of linear attention.
    """
    if arguments.get("cu_seqlens") is not None:
        return None
    c, k = launch.SIZE, arguments["KEY_DIM"]
    v = arguments.get("VALUE_DIM", k)
    if name.endswith(".join"):
        return 0 if arguments["DIAGONAL"] else 2 * len(arguments["maps"]) * k * k * v
    fine, tiles = 1 if arguments.get("rest") is None else 3, v // arguments.get("WIDTH", v)
    summed = 2 if arguments["PRECISION"] == "tf32x3" else 4
    adds = {
        "delta_rule.invert": 10 * 16**2 * k + 40 * 16**3,
        "delta_rule.scan": 3 * c * k * v + (fine + 1) * c * c * v + c * c * k * tiles,
        "delta_rule.scan_back": 3 * c * k * v + (fine + 1) * c * c * v + c * c * k * tiles,
        "delta_rule.outputs": c * k * v + c * c * v + c * c * k,
        "delta_rule.gradients": 3 * c * k * v + 2 * c * c * v + 6 * c * c * k,
        "delta_rule.maps": (k + v) * (2 * c * k + fine * c * c),
        "linear_attention.scan": c * k * v + 2 * c * c * k * tiles,
        "linear_attention.outputs": c * k * v + c * c * v + 3 * c * c * k,
        "linear_attention.gradients": 3 * c * k * v + 2 * c * c * v + (5 + summed) * c * c * k,
        "linear_attention.value_gradients": c * k * v + c * c * v + 3 * c * c * k,
    }[name]
    if name == "delta_rule.scan" and arguments.get("o") is None:
        adds = 2 * c * k * v + c * c * v
    if name == "linear_attention.gradients" and arguments.get("dv") is None:
        adds = 2 * c * k * v + k // arguments["ROWS"] * c * c * v + (4 + summed) * c * c * k
    return 2 * adds * arguments["sequences"] * -(-arguments["time"] // c) * arguments["heads"]


def limits_of(device: str | torch.device) -> Limits:
    """What a GPU has, from its properties; programs at once by its compute capability."""
    found = torch.cuda.get_device_properties(device)
    programs = {(8, 6): 16, (8, 7): 16, (8, 9): 24, (12, 0): 24, (12, 1): 24}.get((found.major, found.minor), 32)
    return Limits(found.multi_processor_count, getattr(found, "regs_per_multiprocessor", 65536),
                  found.shared_memory_per_multiprocessor, found.max_threads_per_multi_processor // 32, programs)


def resident_programs(limits: Limits, warps: int, registers: int, shared: int) -> int:
    """Programs that fit on a multiprocessor at once, of so many warps, registers a thread and bytes of shared memory.

    Registers go to a warp in units of 256, from the quarter of the multiprocessor that it runs on. Shared memory goes
    to a program in units of 128 bytes, and 1,024 more are kept for the system.
    """
    a_warp = max(1, -(-registers * 32 // 256)) * 256
    by_registers = limits.registers // 4 // a_warp * 4 // warps
    by_shared = limits.shared // (-(-shared // 128) * 128 + 1024)
    return min(by_registers, by_shared, limits.warps // warps, limits.programs)
