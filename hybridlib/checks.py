"""Refusals: one sentence that names the argument, the value and what is allowed, before any compute."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch

__all__ = ["check_choice", "check_device", "check_executor", "check_finite", "check_int", "check_number",
           "check_weights", "is_number"]


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, allowed))}")


def check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise ValueError unless `value` is a whole number from `low` to `high` (no upper end if None)."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}={value!r} is not a whole number {allowed}")


def check_number(name: str, value: Any, low: float, high: float | None = None, *, open_low: bool = False) -> None:
    """Raise ValueError unless `value` is a finite number from `low` (excluded if `open_low`) to `high`."""
    if not is_number(value) or value < low or (open_low and value == low) or (high is not None and value > high):
        lower = f"above {low}" if open_low else f"of at least {low}"
        upper = "" if high is None else f" and at most {high}"
        raise ValueError(f"{name}={value!r} is not a number {lower}{upper}")


def check_finite(name: str, values: Iterable[Any]) -> None:
    """Raise ValueError at the first of a layer's `values`, (layers,), that is nan or infinite, by `name` and layer."""
    for layer, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"{name}={value!r} for layer {layer} is not a finite number; each layer must have one")


@torch.no_grad()
def check_weights(name: str, model: torch.nn.Module, *, beside: str | None = None) -> None:
    """Raise ValueError unless all weights of `model` are finite, but for those with `beside` in their names.

    It names the first that is not, with its layer, as in ``model.layers.3.mlp.up_proj.weight``, and the place in it.
    """
    for path, p in model.named_parameters():
        if not (p.is_meta or (beside and beside in path) or p.isfinite().all()):
            place = (~p.isfinite()).nonzero()[0].tolist()
            value = p[tuple(place)].item()
            raise ValueError(f"{name} has the weight {path}{place}={value}; all weights must be finite")


def is_number(value: Any) -> bool:
    """Tell whether `value` is a finite number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_device(device: str | torch.device) -> torch.device:
    """Return `device` as torch has it, ``"auto"`` as a GPU where there is one; raise ValueError if it is not there."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device={device!r} is unknown; choose 'auto', 'cpu' or 'cuda'") from None
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r} asks for a GPU, but this machine has none; use device='cpu'")
    return resolved


def check_executor(executor: object) -> None:
    """Raise ValueError unless `executor` is None or has the `submit` of a `concurrent.futures.Executor`."""
    if executor is not None and not hasattr(executor, "submit"):
        raise ValueError(f"executor={executor!r} has no submit; give a concurrent.futures.Executor or None")
