"""Write the book's generated pages, book/_generated/*.md, and the numbers of ours that other pages name, values.json,
from code, profiles, data cards and records.

Usage: python book/generate.py [OUT]

`make book` runs it before the book is rendered. What is missing is said to be missing.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import pandas as pd
import yaml

from hybridlib.distill.loop import rate_at
from hybridlib.distill.settings import AlignSettings, MatchSettings
from hybridlib.records.ledger import Ledger
from hybridlib.report import hypotheses as tests
from hybridlib.report.style import format_interval, format_number, label_of
from hybridlib.selection.scorers import ablation
from hybridlib.selection.scorers.gates import GateSettings
from hybridlib.study.catalogue import SELECTORS
from hybridlib.study.recorded import RecordedStudy, recall_tasks, recorded_arms
from hybridlib.study.settings import StudySettings

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ("smoke", "cpu", "gpu", "paper")
RECORD = re.compile(r"[a-z0-9_]+-[0-9a-f]{16}\.json")  # students are saved below results too, with JSON of their own
PACKAGES = ("torch", "transformers", "numpy", "pandas", "scipy", "statsmodels", "datasets", "papermill",
            "jupyter-book")


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; a pipe in a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def read_profiles() -> dict[str, dict]:
    """The parameters of each profile that is there."""
    paths = {name: ROOT / "notebooks" / "profiles" / f"{name}.yaml" for name in PROFILES}
    return {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def values() -> dict[str, str]:
    """Numbers of ours as text, by the name that the role ``{value}`` takes: settings and options by their owner."""
    align, match = AlignSettings(), MatchSettings()
    groups = {"align": vars(align) | {"last_rate": rate_at(999_999, 1_000_000, align)}, "match": vars(match),
              "gates": vars(GateSettings()),
              **{name: vars(StudySettings()) | own for name, own in read_profiles().items()},
              **{name: dict(selector.options) for name, selector in SELECTORS.items()},
              "task": {"cap": ablation.HALO_CAP, "least": ablation.LEAST_RECALL}}
    return {f"{group}.{name}": _cell(list(value) if isinstance(value, tuple) else value)
            for group, own in groups.items() for name, value in own.items()}


def profiles() -> str:
    """One column a profile, one row a parameter."""
    found = read_profiles()
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    rows = [[f"`{name}`", *(_cell(values.get(name, "")) for values in found.values())] for name in names]
    return table(["Parameter", *(f"`{name}`" for name in found)], rows)


def card(path: Path) -> str:
    """The scalars of a JSON file, nested names joined by a point; of a list, its length unless it is short."""
    where = f"`{path.relative_to(ROOT)}`"
    if not path.is_file():
        return f"{where} is not there."
    rows = [[f"`{name}`", _cell(value)] for name, value in _flat(json.loads(path.read_text(encoding="utf-8")))]
    return f"From {where}:\n\n" + table(["Field", "Value"], rows)


def records() -> str:
    """For each folder of records: how many of each kind, on what device, with which versions and code."""
    results = ROOT / "data" / "results"
    folders = sorted({path.parent for path in results.rglob("*.json") if RECORD.fullmatch(path.name)})
    parts = []
    for folder in folders:
        found = list(Ledger(folder))
        rows = []
        for kind, count in sorted(Counter(record.kind for record in found).items()):
            of_kind = [record for record in found if record.kind == kind]
            tokens = sum(record.tokens or 0 for record in of_kind)
            minutes = sum(record.seconds for record in of_kind) / 60
            rows.append([f"`{kind}`", count, f"{tokens:,}" if tokens else "", f"{minutes:.1f}"])
        versions = sorted({", ".join(f"{k} {v}" for k, v in sorted(record.versions.items())) for record in found})
        commits = sorted({record.commit or "none" for record in found})
        starts = sorted(record.started for record in found)
        about = [["Device", "; ".join(sorted({record.device for record in found}))], ["Software", "; ".join(versions)],
                 ["Commit", "; ".join(commits)], ["Started", f"{starts[0]} to {starts[-1]}"]]
        parts.append(f"### `{folder.relative_to(ROOT)}`\n\n" + table(["Kind", "Records", "Tokens", "Minutes"], rows)
                     + "\n\n" + table(["Field", "Value"], about))
    return "\n\n".join(parts) or "There are no records in this checkout yet."


def hypotheses(settings: Path = ROOT / "data" / "results" / "h200.yaml") -> str:
    """Verdicts on the hypotheses, and the tables beside them, from the records of the study with these `settings`."""
    where = settings.relative_to(ROOT) if settings.is_relative_to(ROOT) else settings
    try:
        study = RecordedStudy.in_folder(settings.with_suffix(""))
    except (FileNotFoundError, ValueError) as error:
        return f"There are no records of `{where}` in this checkout: {error}."
    frame, effect = recorded_arms(study), {"effect": "First less second [95%]"}
    pair = {"measure": "Measure", "a": "First", "b": "Second"}
    end = {"p": "p", "p_holm": "p, corrected", "seeds": "Seeds", "tokens": "Tokens", "method": "Test",
           "outcome": "Verdict"}
    tables = {
        "The hypotheses": (tests.hypotheses_table(frame), {"hypothesis": "", **pair, **effect, **end}),
        "Tasks of the recall composite": (recall_tasks(study), {"task": "Task", "teacher": "Teacher's share right",
                                                                "outcome": "In the composite"}),
        "Noise of training and of selection": (tests.variance_table(frame).rename(columns={"sd": "deviation"}), {
            "mixer": "Mixer", "budget": "Softmax layers", "tokens": "Tokens", "measure": "Measure",
            "component": "Noise of", "arm": "Arm", "sets": "Sets", "runs": "Runs", "df": "Degrees of freedom",
            "deviation": "Standard deviation", "p": "p", "outcome": "Verdict"}),
        "Equality with GA-S2": (tests.equivalence_table(frame), {
            **pair, "effect": "First less second [90%]", "margin": "Margin", "p": "p", "seeds": "Seeds",
            "outcome": "Verdict"}),
        "Other arms against GA-S2": (tests.dunnett_table(frame), {**pair, **effect, "p": "p, corrected",
                                                                  "seeds": "Seeds of the first", "outcome": "Verdict"}),
    }
    return "\n\n".join(f"### {title}\n\n{shown(*parts)}" for title, parts in tables.items())


def shown(frame: pd.DataFrame, headings: dict[str, str]) -> str:
    """The columns of a frame that `headings` names, as Markdown; an effect with its interval, a dash for no value."""
    def cell(name, row):
        value = row[name]
        if name == "measure":
            return label_of(value)
        if pd.isna(value):
            return "\u2013"
        if name == "effect":
            return format_interval(value, row["low"], row["high"], 4)
        if name == "deviation":
            return format_number(value, 5)
        if name in ("p", "p_holm"):
            return f"{value:.2g}" if value >= 1e-4 else "< 0.0001"
        return f"{int(value):,}" if name in ("seeds", "tokens", "sets", "runs", "df", "budget") else _cell(value)

    return table(list(headings.values()), [[cell(name, row) for name in headings] for _, row in frame.iterrows()])


def software() -> str:
    """Versions of what built this book."""
    rows = [["python", sys.version.split()[0]], *([name, metadata.version(name)] for name in PACKAGES)]
    return table(["Package", "Version"], rows)


def provenance() -> str:
    """The provenance page's body."""
    sections = {
        "The embedded teacher": card(ROOT / "data" / "teacher" / "training.json"),
        "The embedded corpus": card(ROOT / "data" / "corpus" / "manifest.json"),
        "Records": records(),
        "Software of this build": software(),
    }
    return "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items())


def write(path: Path, text: str) -> None:
    """Write `text` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _flat(value, name: str = ""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and (len(value) > 8 or any(isinstance(v, (dict, list)) for v in value)):
        yield name, f"{len(value)} entries"
    else:
        yield name, value


def _cell(value) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "none"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_cell(v) for v in value)
    return str(value).replace("\n", " ")


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "book" / "_generated"
    write(out / "values.json", json.dumps(values(), indent=1))
    write(out / "profiles.md", profiles())
    write(out / "provenance.md", provenance())
    write(out / "hypotheses.md", hypotheses())
