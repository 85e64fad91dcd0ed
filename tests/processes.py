"""Processes that tests share or start, for to import hybridlib takes a process ten seconds of computing."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from multiprocessing import forkserver
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Functions that check kernels in Triton's interpreter: it needs TRITON_INTERPRET set before Triton is imported.
INTERPRETED = {"tests.kernels.test_fused": ["interpreted_checks", "interpreted_checks_of_segments",
                                            "interpreted_checks_of_inputs", "interpreted_checks_of_steps"],
               "tests.distill.test_objectives": ["kernel_errors"]}


def fork_context():
    """Make a multiprocessing context whose processes are forks of one that imported hybridlib and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hybridlib"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        forkserver.ensure_running()
    return context


def run_interpreted() -> dict[str, tuple[int, str]]:
    """Run each of `INTERPRETED`: name -> its exit status and what it printed, a traceback if it raised."""
    code = "from tests import processes; processes.print_interpreted()"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def print_interpreted():
    """Print what `run_interpreted` returns, in the process that has TRITON_INTERPRET set."""
    modules = {name: importlib.import_module(name) for name in INTERPRETED}
    print(json.dumps({name: _run_apart(getattr(modules[module], name))
                      for module, names in INTERPRETED.items() for name in names}))


def _run_apart(function):
    """Call a function in a fork of this process, whose patches and settings end with it."""
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
                function()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        file.seek(0)
        return status, file.read().decode()
