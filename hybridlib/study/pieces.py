"""A queue of long work that goes on after a kill: pieces that are known by their records, some minutes at a time."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hybridlib.checks import check_number

__all__ = ["Piece", "work"]

logger = logging.getLogger(__name__)
WAIT_SECONDS = 1.0  # for a piece that another worker has


@dataclass(frozen=True)
class Piece:
    """A piece of work.

    Parameters
    ----------
    name : what it is; pieces of one name are the same piece.
    group : pieces of one group go on with what the last of them left in memory.
    seconds : an estimate of the time that it takes.
    done, ready : whether its records exist, and those that it builds on.
    run : makes its records.
    """

    name: str
    group: str
    seconds: float
    done: Callable[[], bool]
    run: Callable[[], object]
    ready: Callable[[], bool] = lambda: True


def work(pieces: Callable[[], Iterable[Piece]], minutes: float, folder: str | Path, *, worker: int = 0) -> dict:
    """Run pieces, the first that can be run at a time, as long as `minutes` allow.

    Pieces of the last one's group come before those of others that stand between them. Several workers, each with its
    number, share the pieces through locks in `folder`; worker i begins with the i-th of the groups that it can run. A
    piece that fails is logged, and left.

    Parameters
    ----------
    pieces : gives all pieces, in the order of their priority; it is asked again after each, since records decide what
        comes next.

    Returns
    -------
    dict
        {name: seconds} of the pieces that this call ran, nan for one that failed.
    """
    check_number("minutes", minutes, 0)
    end, ran, group = time.monotonic() + 60 * minutes, {}, None
    while True:
        left = end - time.monotonic()
        waiting = [piece for piece in pieces() if piece.name not in ran and not piece.done()]
        open_pieces = [piece for piece in waiting if piece.ready() and piece.seconds <= left]
        groups = list(dict.fromkeys(piece.group for piece in open_pieces))
        first = group if group in groups else groups[worker % len(groups)] if groups else None
        shared = False
        for piece in sorted(open_pieces, key=lambda piece: piece.group != first):
            with _claim(Path(folder), piece.name) as mine:
                shared |= not mine
                if not mine or piece.done():
                    continue
                begun, group = time.monotonic(), piece.group
                try:
                    piece.run()
                    ran[piece.name] = time.monotonic() - begun
                except Exception:
                    logger.exception("%s failed", piece.name)
                    ran[piece.name] = float("nan")
                logger.info("%s: %.0f s, %.1f minutes are left", piece.name, ran[piece.name],
                            (end - time.monotonic()) / 60)
                break
        else:
            if not shared:
                return ran
            time.sleep(WAIT_SECONDS)


@contextmanager
def _claim(folder: Path, name: str) -> Iterator[bool]:
    """Whether this process alone has the piece, until the context or the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
