"""A call's chunks in turns, so that a scan runs beside the kernel that takes each chunk by itself.

In a scan chunk waits for chunk: however long the text is, a head keeps one program busy, and most of a multiprocessor
idle. The kernels before it (`_invert`) or after it (`_outputs`, `_gradients`) have a program for every chunk and could
use what idles, if they did not have to wait for the whole scan. So the chunks of all sequences are taken in turns:

    forward, gated delta rule     invert 1, (scan 1 | invert 2), (scan 2 | invert 3), ..
    backward, both operators      scan back 4, (scan back 3 | gradients 4), (scan back 2 | gradients 3), ..

A scan goes on a stream of its own, before other programs in the queue, and hands on its state in float32, as it is:
results are the same bits in any number of turns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

__all__ = ["Turn", "override_turns", "side_by_side", "turns_of"]

LEAST, MOST = 4, 4  # chunks of a turn, turns
override_turns: int | None = None  # goes before the rule of `turns_of`


class Turn(NamedTuple):
    """`count` chunks of each sequence, from its chunk `first` on."""

    first: int
    count: int


def turns_of(chunks: int, programs: int, multiprocessors: int) -> list[Turn]:
    """The turns in which to take the `chunks` of each sequence where scans have so many programs.

    One turn where a scan has two programs or more for each multiprocessor, for then it leaves little idle.
    """
    number = min(chunks // LEAST, MOST) if programs < 2 * multiprocessors else 1
    number = max(1, number if override_turns is None else min(override_turns, chunks))
    each = -(-chunks // number)
    return [Turn(first, min(each, chunks - first)) for first in range(0, chunks, each)]


def side_by_side(turns: list[Turn], device: torch.device, first: Callable, then: Callable, scan: Callable):
    """Call ``first(turn, stream)`` and ``then(turn, stream)`` for every turn, `then` of one beside `first` of the next.

    `scan` is which of the two is the scan. The stream is None for the current one.
    """
    if len(turns) == 1 or device.type != "cuda":
        for turn in turns:
            first(turn, None)
            then(turn, None)
        return
    main, side = torch.cuda.current_stream(device), _side(device)
    side.wait_stream(main)
    streams = (side, main) if first is scan else (main, side)
    for turn in turns:
        first(turn, streams[0])
        streams[1].wait_stream(streams[0])
        then(turn, streams[1])
    main.wait_stream(side)


@functools.cache
def _side(device):
    return torch.cuda.Stream(device, priority=-1)
