"""What the README and the reproduce chapter tell a reader to type exists."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

import hybridlib

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "book/reproduce.md", "book/method.md"]
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_links_of_the_readme_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT["README.md"]) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_that_a_page_names_exist(page):
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", TEXT[page], re.MULTILINE)) <= TARGETS


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    named = re.findall(r"\b(?:notebooks|tests|book|data/teacher)/[\w/.-]*\.(?:ipynb|yaml|md|py|yml)\b", TEXT[page])
    assert [name for name in named if not (ROOT / name).exists() and not name.startswith("book/notebooks/")] == []


@pytest.mark.parametrize("page", PAGES)
def test_python_that_a_page_shows_parses_and_uses_public_names(page):
    blocks = re.findall(r"```python\n(.*?)```", TEXT[page], re.DOTALL)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hl":
                assert hasattr(hybridlib, node.attr), f"{page} uses hl.{node.attr}"


def test_map_of_the_house_names_every_room():
    text = TEXT["README.md"]
    rows = re.findall(r"^    +([\w/]+)/ ", text.split("## Map of the house")[1], re.MULTILINE)
    rooms = {path.parent.name for path in (ROOT / "hybridlib").glob("*/__init__.py")}
    assert rooms <= set(rows) and len(rows) <= 15


def test_make_knows_its_targets_without_installing_anything():
    shown = subprocess.run(["make", "--dry-run", "clean"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "pip" not in shown.stdout
