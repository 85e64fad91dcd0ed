"""A kernel that starts while the scan before it runs, and takes each chunk once the scan has finished it.

It starts as soon as every program of the scan has (CUDA's programmatic dependent launch; compute capability 9.0). The
scan's programs set counts of chunks to 0 before that (`open_counts`), and their warps count each chunk up (`publish`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def open_counts(ready, chunk, count, head, heads, tile, tiles):
    """Set the counts of `count` chunks from `chunk` on to 0, of one head and tile, and let the next kernel start."""
    for c in range(count):
        tl.store(ready + ((chunk + c) * heads + head) * tiles + tile, 0)
    tl.inline_asm_elementwise("fence.acq_rel.gpu; bar.sync 0; mov.u32 $0, $1;", "=r,r", [tile], tl.int32, False, 1)
    gdc_launch_dependents()


@triton.jit
def publish(ready, more):
    """Add `more`, 0 or 1, to a count from each warp, after all that the warp has stored."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred %adds;
        .reg .u32 %lane;
        mov.u32 %lane, %laneid;
        setp.eq.u32 %adds, %lane, 0;
        setp.ne.and.u32 %adds, $2, 0, %adds;
        bar.warp.sync 0xffffffff;
        @%adds red.release.gpu.global.add.u32 [$1], $2;
        mov.u32 $0, 0;
        }""", "=r,l,r", [ready.to(tl.int64), more], tl.int32, False, 1)


@triton.jit
def wait_for(ready, at, TILES: tl.constexpr, WARPS: tl.constexpr):
    """Wait until all warps of all programs of a scan have finished chunk and head `at`."""
    for tile in range(TILES):
        while tl.atomic_add(ready + at * TILES + tile, 0, sem="acquire") < WARPS:
            pass


@triton.jit
def finish():
    """Let the first program, and it alone, wait until the kernel before has ended."""
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        gdc_wait()


@triton.jit
def in_turn(program, time, sequences, heads, segments, SIZE: tl.constexpr, BACK: tl.constexpr):
    """Return the program-th chunk and head in the order of scans, its first token and its sequence's end."""
    count = tl.cdiv(time, SIZE)
    each = tl.cdiv(count, segments)
    turn, head = program // heads, program % heads
    step, n = turn // (sequences * segments), turn % (sequences * segments)
    step = each - 1 - step if BACK else step
    c, n = n % segments * each + step, n // segments
    return (n * count + c) * heads + head, n * time + tl.minimum(c * SIZE, time), n * time + time
