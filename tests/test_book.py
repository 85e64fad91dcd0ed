"""The book: it builds without a warning, and its pages need no network."""

import importlib
import inspect
import os
import re
import runpy
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from hybridlib.distill.settings import MatchSettings

ROOT = Path(__file__).resolve().parent.parent
MODULES = re.findall(r"automodule:: (\S+)", (ROOT / "book" / "api.md").read_text(encoding="utf-8"))
INTERNAL = {"style"}  # the look of figures: nothing that a reader of the book calls
EXTERNAL = re.compile(r"(https?:)?//", re.IGNORECASE)


class Page(HTMLParser):
    """What a page loads (not what it links to), its inline scripts, its ids and its classes."""

    def __init__(self, path: Path):
        super().__init__()
        self.loads, self.scripts, self.ids, self.classes, self._script = [], [], set(), set(), False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        self.classes.update((attrs.get("class") or "").split())
        if tag == "link" and attrs.get("rel") not in ("next", "prev", "search", "index", "canonical", "author"):
            self.loads.append(attrs.get("href"))
        elif tag != "a" and attrs.get("src"):
            self.loads.append(attrs["src"])
        self._script = tag == "script"

    def handle_data(self, data):
        if self._script:
            self.scripts.append(data)

    def handle_endtag(self, tag):
        self._script = False


@pytest.fixture(scope="module")
def build(tmp_path_factory, executed_notebooks) -> subprocess.CompletedProcess:
    """A copy of the book built from the smoke run's notebooks; its pages are under `.html`."""
    book = tmp_path_factory.mktemp("book") / "book"
    shutil.copytree(ROOT / "book", book, ignore=shutil.ignore_patterns("_build", "_generated", "notebooks"))
    (book / "notebooks").mkdir()
    for path in executed_notebooks.values():
        shutil.copy(path, book / "notebooks")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["generate.py", str(book / "_generated")])
        runpy.run_path(str(ROOT / "book" / "generate.py"), run_name="__main__")
    command = [Path(sys.executable).with_name("jupyter-book"), "build", book, "-W", "-n", "--keep-going"]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done.html = book / "_build" / "html"
    return done


@pytest.fixture(scope="module")
def pages(build) -> dict[str, Page]:
    assert build.returncode == 0, build.stdout[-8000:]
    return {path.relative_to(build.html).as_posix(): Page(path) for path in build.html.rglob("*.html")
            if "_static" not in path.relative_to(build.html).parts}


def test_book_builds_without_a_warning(build):
    assert build.returncode == 0, build.stdout[-8000:]
    assert "WARNING" not in build.stdout


def test_pages_load_nothing_from_the_network(pages, build):
    for name, page in pages.items():
        assert not [load for load in page.loads if load and EXTERNAL.match(load)], name
        assert not [script for script in page.scripts if re.search(r"https?://", script)], name
    for style in build.html.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_maths_is_rendered_by_the_mathjax_of_the_book(pages, build):
    assert "math" in pages["method.html"].classes
    scripts = [load for load in pages["method.html"].loads if load and "mathjax" in load.lower()]
    assert scripts
    for script in scripts:
        assert (build.html / script.split("?")[0]).is_file()
    assert list((build.html / "_static" / "mathjax").rglob("*.woff"))


def test_numbers_of_ours_are_filled_in_from_code_and_profiles(pages, build):
    text = re.sub(r"<[^>]+>", "", (build.html / "differences.html").read_text(encoding="utf-8"))
    tokens = yaml.safe_load((ROOT / "notebooks" / "profiles" / "gpu.yaml").read_text(encoding="utf-8"))["score_tokens"]
    assert f"all else at {MatchSettings().learning_rate:.4g}" in " ".join(text.split())
    assert f"Profile gpu: {tokens:,}; profile cpu" in " ".join(text.split())


@pytest.mark.parametrize("module", MODULES)
def test_api_page_has_every_public_name(module, pages):
    members = importlib.import_module(module)
    for name in members.__all__:
        value = getattr(members, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert f"{module}.{name}" in pages["api.html"].ids, f"{name} has no docstring, or api.md does not list it"


def test_api_page_has_every_module():
    package = ROOT / "hybridlib"
    paths = [path.relative_to(ROOT).with_suffix("") for path in package.rglob("*.py") if path.name != "__init__.py"]
    modules = {".".join(path.parts) for path in paths if path.parts[1] != "kernels" and path.stem not in INTERNAL}
    assert modules | {"hybridlib.kernels"} == set(MODULES)
