"""Folders that a checkout and an installed package share, and the hash of files in them."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from pathlib import Path

__all__ = ["PACKAGE", "data_folder", "follow_umask", "results_folder", "sha256_of"]

PACKAGE = Path(__file__).resolve().parents[1]


def data_folder(name: str) -> Path:
    """Return the folder ``data/<name>`` of the checkout, or that of a package installed from a wheel."""
    places = [PACKAGE.parent / "data" / name, PACKAGE / "data" / name]
    return next((p for p in places if p.is_dir()), places[0])


def follow_umask(files: Iterable[Path]) -> None:
    """Give `files` the mode of a file newly made beside them, since safetensors lets their owner alone read them."""
    for file in files:
        fresh = file.with_name(f".mode.{secrets.token_hex(4)}")
        try:
            fresh.touch()
            file.chmod(fresh.stat().st_mode & 0o777)
        finally:
            fresh.unlink(missing_ok=True)


def sha256_of(*files: str | Path) -> str:
    """Return the sha256, in hex, over the bytes of `files`, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def results_folder(name: str = "local") -> Path:
    """Return ``data/results/<name>`` of the checkout that this package lies in, else of the current folder."""
    root = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else Path.cwd()
    return root / "data" / "results" / name
