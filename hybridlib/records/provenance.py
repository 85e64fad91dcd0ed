"""What a record says of its origin: software versions, the device, the commit of the code."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from hybridlib.records.folders import PACKAGE

__all__ = ["code_commit", "describe_device", "software_versions"]

_KERNELS = ("triton", "flash-linear-attention", "flash-qla", "tilelang", "liger-kernel")


def software_versions() -> dict[str, str]:
    """Return the versions, as imported, of python, torch, transformers, numpy, hybridlib and kernel libraries."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}  # its own text names the build
    for name in ("transformers", "numpy", "hybridlib", *_KERNELS):
        imported = getattr(sys.modules.get(name.replace("-", "_")), "__version__", None)
        try:
            versions[name] = imported if isinstance(imported, str) else metadata.version(name)
        except metadata.PackageNotFoundError:
            if name not in _KERNELS:
                versions[name] = "not installed"
    return versions


def describe_device(device: str = "auto") -> str:
    """Return a GPU's name with its memory, or the CPU's model with the cores that this process may use."""
    if not device.startswith("cpu") and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpu_model()}, {cores} core{'s' if cores != 1 else ''}"


def code_commit(records: str | Path | None = None) -> str | None:
    """Return this code's git commit, with ``+dirty`` if a file outside `records` differs; None if there is none."""
    root = _git(PACKAGE, "rev-parse", "--show-toplevel")
    if root is None or _git(PACKAGE, "ls-files", "--error-unmatch", "__init__.py") is None:
        archived = PACKAGE.parent / ".git_archival.txt"
        text = archived.read_text().strip() if archived.is_file() else ""
        return text if re.fullmatch("[0-9a-f]{40}", text) else None
    commit, paths = _git(PACKAGE, "rev-parse", "--verify", "--quiet", "HEAD"), ["."]
    if commit is None:
        return None
    if records is not None and Path(records).resolve().is_relative_to(root):
        paths.append(f":(exclude,literal){Path(records).resolve().relative_to(root).as_posix()}")
    return commit + ("+dirty" if _git(Path(root), "status", "--porcelain", "--", *paths) else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30,
                              check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model(cpuinfo: str = "/proc/cpuinfo") -> str:
    lines = Path(cpuinfo).read_text().splitlines() if Path(cpuinfo).is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine() or "unknown CPU"])[0]
