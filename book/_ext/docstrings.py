"""Sphinx extension: the house style of docstrings, for napoleon.

In Parameters, Returns and Raises sections a docstring says ``name : what it is`` on one line, which may wrap. Napoleon
would take that for a type; here it becomes the description below the name. A short line with an indented block below
it is a type with its description, and stays. A paragraph after the items belongs to no section. A bar such as in |x|
is no substitution.
"""

from __future__ import annotations

import re

SECTIONS = {"Parameters", "Other Parameters", "Attributes", "Returns", "Raises"}
ITEM = re.compile(r"(?P<name>[*\w][\w.*]*(?:, [*\w][\w.*]*)*) : (?P<text>.+)")
WRAPPED = 90  # columns; a line this long that goes on below was wrapped


def describe(lines: list[str]) -> list[str]:
    """The lines of a docstring with each one-line item split into its name and its description."""
    out, section, indent = [], None, ""
    for i, line in enumerate(lines):
        following = lines[i + 1] if i + 1 < len(lines) else ""
        if following.strip() and set(following.strip()) == {"-"}:
            section, indent = line.strip(), line[:len(line) - len(line.lstrip())]
        item = ITEM.fullmatch(line[len(indent):]) if section in SECTIONS and line.startswith(indent) else None
        goes_on = following.startswith(indent + " ") and following.strip() != ""
        outside = section in SECTIONS and i > 0 and not lines[i - 1].strip() and line.strip() and not item
        if outside and not goes_on and not line.startswith(indent + " ") and section != line.strip():
            out.append("")  # a second blank line is where a section ends for napoleon
            section = None
        if item and (not goes_on or len(line) >= WRAPPED):
            out += [indent + item["name"], f"{indent}    {item['text']}"]
        else:
            out.append(line)
    return out


def escape_bars(line: str) -> str:
    """`line` with bars escaped, unless they stand in a literal or draw a table."""
    table = line.strip().startswith("+") or re.fullmatch(r"\s*\|.*\|\s*", line)
    return line if table or "``" in line else re.sub(r"(?<!\\)\|", r"\\|", line)


def part_plurals(line: str) -> str:
    """`line` with letters right after a name in single backticks, as in `seed`s, told apart from it."""
    return re.sub(r"(?<![`\w])(`[^`\s][^`]*`)(?=\w)", r"\1\\ ", line)


def process(app, what, name, obj, options, lines) -> None:
    """Handler of ``autodoc-process-docstring``."""
    lines[:] = [part_plurals(escape_bars(line)) for line in describe(lines)]


def setup(app) -> dict:
    """Connect before napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"version": "1", "parallel_read_safe": True}
