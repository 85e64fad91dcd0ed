"""What layers do, from records of kind ``"roles"``, and what hybrids with and without two of them lose: frames and
figures."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hybridlib.records.ledger import Record
from hybridlib.report.style import (INK, MUTED, Plot, finish, format_number, house_style, layer_ticks, look, new_figure,
                                    plain_axes)

__all__ = ["ROLES", "gate_figure", "gate_table", "pair_table", "role_strip", "role_table"]

ROLES = {"distance": "attention distance (tokens)", "previous": "weight on the previous token",
         "induction": "weight on what came next before", "silenced": "recall lost, silenced",
         "replaced": "recall lost, replaced"}
_SHADES = ("#f2f5f8", "#9cc3e0", "#2f6ea8", "#0b2a4f")


def role_table(record: Record) -> pd.DataFrame:
    """Make a row a layer: ``distance``, the mean over heads in tokens; ``previous`` and ``induction``, the weight of
    the layer's strongest head; ``silenced`` and ``replaced``, the shares of recall lost without its attention."""
    m = record.metrics
    table = pd.DataFrame({"distance": np.mean(m["distance"], axis=1), "previous": np.max(m["previous"], axis=1),
                          "induction": np.max(m["induction"], axis=1),
                          **{name: m["intact"] - np.array(m[name]) for name in ("silenced", "replaced")}})
    return table.rename_axis("layer")


def gate_table(record: Record) -> pd.DataFrame:
    """Make a row a way to open a gate of the record's pair: ``layer``, whether the ``other`` is open, KL in nats a
    token with the gate closed and open, the ``slope`` at its closed end by the first two points, and the lowest KL
    and the gate where it is."""
    rows = []
    for (layer, other, is_open), part in pd.DataFrame(record.metrics["gates"]).groupby(["layer", "other", "open"]):
        part = part.sort_values("gate")
        gate, kl = part["gate"].to_numpy(), part["kl"].to_numpy()
        rows.append({"layer": layer, "other": other, "other is": "softmax" if is_open else "linear", "closed": kl[0],
                     "open": kl[-1], "slope": (kl[1] - kl[0]) / (gate[1] - gate[0]), "lowest": kl.min(),
                     "at gate": gate[kl.argmin()]})
    return pd.DataFrame(rows)


def pair_table(hybrids: pd.DataFrame, pair: Iterable[int], recall: str = "recall_exact") -> pd.DataFrame:
    """Make a row for each way in which `hybrids`, as of `recorded_arms`, keep the layers of `pair`: how many there are
    (of one set and seed, one), the mean KL in nats a token, and the lowest, mean and highest recall."""
    first, second = sorted(pair)
    runs = hybrids[hybrids["end"]].drop_duplicates(["layers", "seed", "mixer", "match_tokens"])
    keeps = runs["layers"].map(lambda layers: (first in layers, second in layers))
    names = {(True, True): "both", (False, True): f"{second} alone", (True, False): f"{first} alone",
             (False, False): "neither"}
    rows = []
    for way, name in names.items():
        part = runs[keeps == way]
        low, mean, high = part[recall].agg(["min", "mean", "max"])
        rows.append({"softmax": name, "hybrids": len(part), "kl": part["kl"].mean(), "lowest recall": low,
                     "mean recall": mean, "highest recall": high})
    return pd.DataFrame(rows)


def role_strip(table: pd.DataFrame, layers: Iterable[int] = ()) -> Figure:
    """Draw a `role_table`: a row a role, a cell a layer, from light (0) to dark (the row's highest, written beside
    it); `layers` are outlined."""
    gradient, count = LinearSegmentedColormap.from_list("house", list(_SHADES)), len(table)
    with house_style():
        figure, axes = new_figure(7, 0.75 + 0.3 * len(ROLES))
        for row, name in enumerate(ROLES):
            values = table[name].clip(lower=0).to_numpy()
            most = values.max() or 1.0
            axes.pcolormesh(np.arange(count + 1) - 0.5, [row - 0.42, row + 0.42], values[None] / most, cmap=gradient,
                            vmin=0, vmax=1, edgecolors="white", linewidth=1)
            axes.annotate(format_number(most, 0 if most > 10 else 2), (1.01, row), va="center", fontsize=8, color=MUTED,
                          xycoords=("axes fraction", "data"), annotation_clip=False)
        for layer in layers:
            axes.plot(np.array([-0.5, 0.5, 0.5, -0.5, -0.5]) + layer, np.array([0, 0, 1, 1, 0]) * len(ROLES) - 0.5,
                      color="#d55e00", linewidth=1.2, clip_on=False, zorder=5)
        axes.set_ylim(len(ROLES) - 0.5, -0.5)
        axes.set_yticks(range(len(ROLES)), list(ROLES.values()))
        layer_ticks(axes, count)
        plain_axes(axes)
        return finish(figure)


def gate_figure(record: Record) -> Figure:
    """Draw the KL of the aligned student along each gate of the record's pair, the other one's closed and open."""
    points = pd.DataFrame(record.metrics["gates"])
    with house_style():
        figure = Plot(figsize=(7, 2.9), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, layer in zip(panels, sorted(record.metrics["pair"]), strict=True):
            for i, is_open in enumerate((False, True)):
                line = points[(points["layer"] == layer) & (points["open"] == is_open)].sort_values("gate")
                axes.plot(line["gate"], line["kl"], **look(i), markeredgecolor="white", markeredgewidth=0.6)
            axes.set_xlabel(f"gate of layer {layer} (0 linear, 1 softmax)")
            axes.grid()
        panels[0].set_ylabel("held-out KL (nats a token)", color=INK)
        return finish(figure, [Line2D([], [], **look(i), label=f"the other layer {word}")
                               for i, word in enumerate(("linear", "softmax"))])
