"""The queue: order, what builds on what, time, failures, and workers that share it."""

from __future__ import annotations

import math
import threading
from functools import partial

from hybridlib.study.pieces import Piece, work


def piece(folder, ran, name, group="", seconds=0.0, after=None):
    def run():
        ran.append(name)
        (folder / name).touch()

    return Piece(name, group, seconds, (folder / name).exists, run, (folder / after).exists if after else lambda: True)


def test_pieces_run_in_their_order_once_each_and_the_last_group_first(tmp_path):
    ran = []
    make = partial(piece, tmp_path, ran)

    def pieces():
        return [make("a", "x", after="b"), make("b", "y"), make("c", "x"), make("d", "y"), make("b", "y")]

    seconds = work(pieces, 1, tmp_path / "locks")
    assert ran == ["b", "d", "a", "c"] and list(seconds) == ran  # d goes on with what b left, then the first is a
    assert work(pieces, 1, tmp_path / "locks") == {} and len(ran) == 4


def test_what_records_decide_is_asked_for_again(tmp_path):
    ran = []
    first, second = piece(tmp_path, ran, "first"), piece(tmp_path, ran, "second")
    work(lambda: [first, second] if first.done() else [first], 1, tmp_path / "locks")
    assert ran == ["first", "second"]


def test_a_piece_that_takes_too_long_or_lacks_its_base_waits(tmp_path):
    ran = []
    make = partial(piece, tmp_path, ran)
    pieces = [make("long", seconds=61), make("short", seconds=1), make("later", after="long")]
    work(lambda: pieces, 1, tmp_path / "locks")
    work(lambda: pieces, 0, tmp_path / "locks")
    assert ran == ["short"]


def test_a_piece_that_fails_is_left_and_the_rest_goes_on(tmp_path, caplog):
    ran = []

    def fail():
        raise RuntimeError("out of luck")

    pieces = [Piece("bad", "", 0, lambda: False, fail), piece(tmp_path, ran, "good")]
    seconds = work(lambda: pieces, 1, tmp_path / "locks")
    assert ran == ["good"] and math.isnan(seconds["bad"]) and "out of luck" in caplog.text


def test_workers_share_the_pieces_and_begin_apart(tmp_path):
    ran, begun = {0: [], 1: []}, threading.Barrier(2)

    def pieces(worker):
        def run(name):
            if not ran[worker]:
                begun.wait(10)  # both have one
            ran[worker].append(name)
            (tmp_path / name).touch()

        return [Piece(name, name[0], 0, (tmp_path / name).exists, partial(run, name))
                for name in ("a1", "a2", "a3", "b1", "b2", "b3")]

    threads = [threading.Thread(target=work, args=(partial(pieces, i), 1, tmp_path / "locks"), kwargs={"worker": i})
               for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert ran[0][0] == "a1" and ran[1][0] == "b1"
    assert sorted(ran[0] + ran[1]) == ["a1", "a2", "a3", "b1", "b2", "b3"]
