"""One score a layer, as every scorer returns it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from hybridlib.checks import check_finite
from hybridlib.selection.cost import Cost

__all__ = ["LayerScores"]


@dataclass(frozen=True)
class LayerScores:
    """One score a layer; a higher `values[l]` means that layer l is more worth keeping softmax.

    Parameters
    ----------
    direction, metric : as in `score_layers`, or the metric that another scorer names.
    measured, stderr : (layers,), the measurement behind each value, with its standard error over held-out rows: the KL
        of a candidate in nats a token (``"kl"``), the alignment error (``"mse"``), or what the scorer says.
    tokens, seconds : of training, forward and backward; of scoring.
    cost : all that scoring cost; None in old records.
    rose : layers whose candidate ended with a higher loss than it started with, see `distill.settings.History`.
    history, history_tokens : the values at every measurement along training, and after how many tokens each was.
    figures : what else the scorer says, by name.

    Raises ValueError if a value or a measurement is not finite; a standard error is nan for a single row.
    """

    direction: str
    metric: str
    values: tuple[float, ...]
    measured: tuple[float, ...]
    stderr: tuple[float, ...]
    tokens: int
    seconds: float
    cost: Cost | None = None
    history: tuple[tuple[float, ...], ...] = ()
    history_tokens: tuple[int, ...] = ()
    rose: tuple[int, ...] = ()
    figures: Mapping = field(default_factory=dict)

    def __post_init__(self):
        for name, rows in (("values", [self.values]), ("measured", [self.measured]), ("history", self.history)):
            for values in rows:
                check_finite(f"{name} of {self.metric!r} scores", values)

    @property
    def ranking(self) -> tuple[int, ...]:
        """Layers, the one most worth keeping first; ties go to the lower index."""
        return tuple(sorted(range(len(self.values)), key=lambda l: (-self.values[l], l)))

    def best(self, count: int) -> tuple[int, ...]:
        """The `count` layers most worth keeping, ascending."""
        return tuple(sorted(self.ranking[:count]))

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> LayerScores:
        cost = fields.get("cost")
        return cls(**{k: _tuples(v) for k, v in fields.items()} | {"cost": cost and Cost.from_dict(cost)})


def _tuples(value):
    if isinstance(value, Mapping):
        return {name: _tuples(part) for name, part in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
