"""Processes of one machine that score layers, each with a GPU of its own where there are any."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch

from hybridlib.checks import check_int
from hybridlib.models.passes import TeacherStates
from hybridlib.selection.engine.inputs import LoadedInputs
from hybridlib.selection.engine.candidates import Job, measure_sets

__all__ = ["count_workers", "pool_of_workers"]

READY_SECONDS = 600.0  # until all processes must have loaded their inputs


def count_workers(workers: int, device: str | torch.device) -> int:
    """`workers` or, of 0, as many as there are GPUs. ValueError where a process would have no GPU of its own."""
    check_int("workers", workers, 0)
    if torch.device(device).type != "cuda":
        if workers == 0:
            raise ValueError("workers=0 is one process a GPU, and there is none here; give a number of processes")
        return workers
    there = len(_gpus())
    if workers > there:
        raise ValueError(f"workers={workers} is more than the {there} GPU(s) here; each process takes one")
    return workers or there


@contextmanager
def pool_of_workers(job: Job, workers: int, warm_up: int = 0) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes have all loaded the `ScoringInputs` of `job` and seen their GPU (device ``"cuda"``) work.

    Each trains a throw-away candidate on `warm_up` tokens. Raises RuntimeError if a process did not come up.
    """
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    places, ready = context.Queue(), context.Barrier(workers)
    for name in (_gpus() or [None] * workers)[:workers]:
        places.put(name)
    with ProcessPoolExecutor(workers, context, _begin, (places, ready)) as pool:
        for started in [pool.submit(_load, job, warm_up) for _ in range(workers)]:
            why = started.result()
            if why:
                raise RuntimeError(f"a worker did not come up: {why}")
        yield pool


def _gpus():
    """What CUDA_VISIBLE_DEVICES is to be for each GPU that this process sees."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in seen.split(",")] if seen else [str(i) for i in range(torch.cuda.device_count())]
    return names[:torch.cuda.device_count()]


def _begin(places, ready):
    global _ready
    name, _ready = places.get(), ready
    if name is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = name  # before this process asks CUDA for anything


def _load(job, warm_up):
    """Load the inputs and wait for the others, so that each process takes one such task; returns what went wrong."""
    why = None
    try:
        inputs = job.inputs.load()
        if warm_up:  # not on the scoring's own states of the teacher, which a compiled pass rounds otherwise
            eager = replace(job.settings, compile=False, cuda_graph=False)  # compiling is part of the scoring
            apart = LoadedInputs(inputs.student, inputs.teacher, inputs.tokens, TeacherStates(inputs.teacher))
            first = replace(job, inputs=apart, num_tokens=warm_up, heldout_tokens=inputs.context, settings=eager,
                            checkpoints=None)
            why = measure_sets(first, [(0,)])[0,].get("error")
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    _ready.wait(READY_SECONDS)
    return why
