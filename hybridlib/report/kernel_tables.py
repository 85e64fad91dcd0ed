"""What the records of `kernel_speed` say: tables, points for a figure, and words.

They are read from tables of one row a record, as `kernel_speed.measure_kernels` returns them; records that have a
``reason`` in place of numbers are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

__all__ = ["bound_words", "counter_table", "kernel_table", "kernel_tables", "kernel_words", "latency_share",
           "scaling_points"]

_GROWTH = 3  # times as many programs, at least, must have been tried to say what bounds a kernel
_WAITS = 3  # reasons that a line names
_NEAR, _READY = 0.7, 0.5  # share of a peak that is near it; warps a scheduler that are ready, below which it idles
_NONE = "\u2013"


def kernel_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Every launch of a call: its time with quartiles, its share, what it could take at least, what it asks of a GPU.

    ``floor`` and ``products`` are the shares of its time that moving its bytes at the speed of a copy would take, and
    its matrix products at the speed of one large product; what the kernel before left in the cache comes faster than a
    copy. ``fit`` is how many programs a multiprocessor holds at once.
    """
    table = [_place(row, number) | {
        "kernel": _label(one),
        "time, \u00b5s": f"{_micro(one):.3g} [{_micro(one, 'low'):.3g}, {_micro(one, 'high'):.3g}]",
        "share": _percent(one["seconds"] / row["kernel_seconds"]),
        "floor": _percent(one["floor_seconds"] / one["seconds"]), "products": _percent(_products(row, one)),
        "programs": one["programs"], "fit": one["resident"], "waves": f"{one['waves']:.2f}", "warps": one["warps"],
        "registers": one["registers"], "spills": one["spills"], "shared, KiB": f"{one['shared'] / 1024:.3g}"}
        for row, number, one in _launches(frame)]
    return pd.DataFrame(table).set_index(["operator", "shape", "launch"]) if table else pd.DataFrame()


def counter_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Every launch of a call as the GPU counted it: shares of peaks, warps of a scheduler, what they wait for."""
    table = [_place(row, number) | {
        "kernel": _label(one), "issue slots": _percent(one["issue"]), "tensor cores": _percent(one["tensor"]),
        "DRAM": _percent(one["dram"]), "L1 and shared": _percent(one["l1"]), "occupancy": _percent(one["occupancy"]),
        "warps": _count(one["active"]), "eligible": _count(one["eligible"]), "waits": _waits(one) or _NONE}
        for row, number, one in _launches(frame)]
    return pd.DataFrame(table).set_index(["operator", "shape", "launch"]) if table else pd.DataFrame()


def scaling_points(frame: pd.DataFrame) -> pd.DataFrame:
    """Points of a figure: ``panel`` (operator, dims and call), ``kernel``, its ``programs``, ``microseconds``; and
    ``multiprocessors``.
    """
    points = [{"panel": f"{_operator(row)}, {int(row['dim'])} dims, {one['call']}", "kernel": _label(one),
               "programs": one["programs"], "microseconds": _micro(one),
               "multiprocessors": int(row["multiprocessors"])}
              for row, _, one in _launches(frame)]
    return pd.DataFrame(points)


def latency_share(programs: Sequence[int], seconds: Sequence[float], multiprocessors: int) -> float | None:
    """Of a kernel's time with a program on every multiprocessor, the share that it takes with the fewest, at most 1.

    Programs that each have a multiprocessor of their own share memory and nothing else: with few, a kernel takes as
    long as the chain of steps in a program, each waiting for the one before; what is added with more is waiting for
    memory. None if no two numbers of programs that differ by 3 times or more had a multiprocessor each.
    """
    alone = [point for point in sorted(zip(programs, seconds)) if point[0] <= multiprocessors]
    if not alone or alone[-1][0] < _GROWTH * alone[0][0]:
        return None
    return min(1.0, alone[0][1] / alone[-1][1])


def kernel_tables(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Of ``"kernels"`` and ``"counters"`` the tables above, by their captions, without those that are empty."""
    found = {"kernels of the fused operators, forward and backward": kernel_table(tables["kernels"]),
             "the same kernels by the GPU's counters": counter_table(tables["counters"])}
    return {caption: table for caption, table in found.items() if len(table)}


def kernel_words(tables: Mapping[str, pd.DataFrame]) -> str:
    """A list in Markdown: where the time of each call goes, kernel by kernel, how kernels grow with programs, and what
    stands around the operators in their mixers."""
    counted, lines = {_key(*found): found[-1] for found in _launches(tables["counters"])}, []
    for row, number, one in _launches(tables["kernels"]):
        if number == 1:
            graph = ("" if pd.isna(row["gpu_seconds"]) else
                     f"; {_short(1e6 * row['gpu_seconds'])} as a CUDA graph of the call")
            lines.append(f"- {_operator(row)}, {_shape(row)}, {row['dtype']}, forward and backward{_code(row)}: "
                         f"{_short(1e6 * row['kernel_seconds'])} in {len(row['kernels'])} kernels, one by one{graph}.")
        share = _percent(one["seconds"] / row["kernel_seconds"])
        lines.append(f"  - {_label(one)}: **{_short(_micro(one))}** ({share}); "
                     + _said(row, one, counted.get(_key(row, number, one))))
    points = scaling_points(tables["scaling"])
    for panel, part in points.groupby("panel", sort=False) if len(points) else ():
        lines.append(f"- {panel}, with more and more sequences of one head, on {part['multiprocessors'].iloc[0]} "
                     "multiprocessors:")
        lines += [f"  - {kernel}: {_grown(found.sort_values('programs'))}"
                  for kernel, found in part.groupby("kernel", sort=False)]
    mixers = tables.get("mixers", pd.DataFrame())
    lines += [_around(row) for _, row in (mixers[mixers["reason"].isna()].iterrows() if len(mixers) else ())]
    return "\n".join(lines)


def bound_words(tables: Mapping[str, pd.DataFrame], operator: str, shape: Sequence[int],
                direction: str = "forward+backward") -> str:
    """What bounds a call of the fused operator, in a sentence: its kernels' shares of the time, and their counters.

    Of the kernels of a call with gradients, for ``"forward"`` those of its forward pass. Empty without both records.
    """
    def asked(row):
        return (row["operator"], *(row[name] for name in ("batch", "time", "heads", "dim"))) == (operator, *shape)

    counted = {_key(*found): found[-1] for found in _launches(tables.get("counters", pd.DataFrame()))}
    found = [(row, one, counted.get(_key(row, number, one)))
             for row, number, one in _launches(tables.get("kernels", pd.DataFrame()))
             if asked(row) and (direction == "forward+backward" or one["pass"] == "forward")]
    if not found or any(count is None or _bound(count) is None for *_, count in found):
        return ""
    whole = sum(one["seconds"] for _, one, _ in found)
    said = [f"`{_label(one)}` {_percent(one['seconds'] / whole)} of the time, {_bound(count)}"
            for _, one, count in sorted(found, key=lambda each: -each[1]["seconds"])]
    part = " in a call with gradients" if direction == "forward" else ""
    return f"What bounds it, by the GPU's counters{part}{_code(found[0][0])}: {'; '.join(said)}."


def _code(row):
    """Which code a record is of, where it says so: kernels change, and a record tells of those it ran."""
    commit = row.get("commit")
    return f" (code of `{commit[:7]}`)" if isinstance(commit, str) else ""


def _bound(counted):
    """Which limit a kernel is near, in words: bandwidth, products, or neither, when its warps wait; None if unknown."""
    if any(pd.isna(counted[key]) for key in ("dram", "tensor", "eligible", "active")):
        return None
    for key, text in (("dram", "bandwidth"), ("tensor", "products")):
        if counted[key] >= _NEAR:
            return f"bound by {text} ({_percent(counted[key])} of the peak)"
    if counted["eligible"] >= _READY:
        return f"near no limit ({_count(counted['eligible'])} warps a scheduler are ready)"
    return (f"bound by latency ({_count(counted['eligible'])} of {_count(counted['active'])} warps a scheduler are "
            f"ready; DRAM {_percent(counted['dram'])}, tensor cores {_percent(counted['tensor'])} of their peaks)")


def _around(row):
    """How long each part of a mixer takes, and what its operator could absorb."""
    times = {name: 1e6 * part["seconds"] for name, part in row["parts"].items()}
    whole, around = sum(times.values()), times["before"] + times["after"]
    said = ", ".join(f"{text} {_short(times[name])} ({_percent(times[name] / whole)})" for name, text in (
        ("projections", "projections"), ("before", "activations, norms and gates"), ("operator", "the operator"),
        ("after", "norm and gate of its output"), ("output", "the output's projection")))
    return (f"- Mixer **{row['mixer']}**, {_shape(row)}, {row['dtype']}, {row['direction']}, part by part: "
            f"{_short(whole)}; {said}. Everything elementwise around the operator is {_percent(around / whole)} of "
            "that, an upper bound of what larger kernels could save.")


def _said(row, one, counted):
    parts = [f"moving its bytes would take {_percent(one['floor_seconds'] / one['seconds'])} of that"]
    if _products(row, one) is not None:
        parts[0] += f", its products {_percent(_products(row, one))}"
    parts.append(f"{one['programs']:,} programs of {one['warps']} warp{'s' * (one['warps'] > 1)} are "
                 f"{one['waves']:.2f} waves")
    if counted:
        shares = [f"{text} {_percent(counted[key])}" for key, text in (
            ("issue", "issue slots"), ("tensor", "tensor cores"), ("dram", "DRAM")) if pd.notna(counted[key])]
        warps = [f"{_count(counted['active'])} warps a scheduler, {_count(counted['eligible'])} of them ready"
                 ] if pd.notna(counted["active"]) and pd.notna(counted["eligible"]) else []
        waits = [f"most wait for {_waits(counted)}"] if _waits(counted) else []
        parts += [f"counted: {', '.join(shares + warps + waits)}"] if shares + warps + waits else []
        parts += [bound.split(" (")[0]] if (bound := _bound(counted)) else []
    return "; ".join(parts) + "."


def _grown(found):
    """The fewest programs, the most with a multiprocessor each, twice that, and the most: times, and what they say."""
    programs, times = found["programs"].tolist(), found["microseconds"].tolist()
    edge, last = found["multiprocessors"].iloc[0], len(programs) - 1
    alone, twice = (sum(number <= most for number in programs) - 1 for most in (edge, 2 * edge))
    shown = dict.fromkeys([0, max(alone, 0), max(twice, 0), last])
    text = ", ".join(f"{programs[i]:,} programs {_short(times[i])}"
                     + (f" ({times[i] / times[0]:.2f} times that)" if i else "") for i in shown)
    share = latency_share(programs, times, edge)
    if share is None:
        return f"{text}."
    return (f"{text}. With a program on every multiprocessor {_percent(share)} of its time is the chain of steps in a "
            f"program: **{'latency' if share > 0.5 else 'throughput'}** bounds it.")


def _launches(frame):
    """(record, number of the launch from 1, launch) of every launch of every record."""
    for _, row in frame[frame["reason"].isna()].iterrows() if len(frame) else ():
        yield from ((row, number, one) for number, one in enumerate(row["kernels"], 1))


def _place(row, number):
    return {"operator": _operator(row), "shape": _shape(row), "launch": number}


def _key(row, number, one):
    return row["device"], row["dtype"], *_place(row, number).values(), one["name"]


def _operator(row):
    return row["operator"].replace("_", " ")


def _shape(row):
    return f"({', '.join(str(int(row[name])) for name in ('batch', 'time', 'heads', 'dim'))})"


def _label(one):
    name = one["name"].split(".")[1]
    return name.replace("_", " ") + (", backward" if one["pass"] == "backward" and name in ("scan", "join") else "")


def _products(row, one):
    speed = row["product_flops_per_second"]
    return None if pd.isna(speed) or one["flops"] is None else one["flops"] / speed / one["seconds"]


def _waits(one):
    waits = sorted(((count, reason) for reason, count in one["stalls"].items() if reason != "selected"), reverse=True)
    return ", ".join(f"{reason.replace('_', ' ')} {count:.2f}" for count, reason in waits[:_WAITS] if count > 0)


def _micro(one, name="seconds"):
    return 1e6 * one[name]


def _short(microseconds):
    return f"{microseconds:.3g} \u00b5s" if microseconds < 1000 else f"{microseconds:,.0f} \u00b5s"


def _percent(share):
    return _NONE if pd.isna(share) else f"{100 * share:.2g}%" if share < 0.995 else f"{100 * share:.0f}%"


def _count(number):
    return _NONE if pd.isna(number) else f"{number:.2f}"
