"""Imports run one way through the rooms, without circles, and no module hides one of Python's or of a dependency."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "hybridlib"
ROOMS = ("checks", "records", "kernels", "models", "distill", "selection", "study", "bench", "report")
PARTS = ("", "engine", "scorers")  # of selection: its own files come first
PACKAGES = {"accelerate", "datasets", "fla", "flash_qla", "gguf", "huggingface_hub", "kernels", "liger_kernel",
            "matplotlib", "numpy", "pandas", "pyarrow", "safetensors", "scipy", "statsmodels", "tilelang", "tokenizers",
            "torch", "tqdm", "transformers", "triton"}


def imports_of(folder: Path) -> dict[str, set[str]]:
    """Map each module of the package in `folder` to those of the package that it imports, anywhere in its code."""
    root, files = folder.name, {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    imports: dict[str, set[str]] = {}
    for module, path in files.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} imports relatively in line {node.lineno}"
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        inner = {name if name in files else name.rpartition(".")[0] for name in names if name.split(".")[0] == root}
        imports[module] = inner - {module}
    return imports


def place(module: str) -> tuple[int, int]:
    """Give a module its place in the order of rooms, and within selection; the package's own page comes last."""
    inner = module.split(".")[1:]
    if not inner:
        return len(ROOMS), 0
    assert inner[0] in ROOMS, f"{module} is in no room"
    part = inner[1] if inner[0] == "selection" and len(inner) > 1 else ""
    return ROOMS.index(inner[0]), PARTS.index(part) if part in PARTS else 0


def faults(folder: Path, forbidden: set[str]) -> list[str]:
    """List a package's imports that run back, a circle of its modules, and modules that bear a forbidden name."""
    imports = imports_of(folder)
    listed = [f"{module} imports {other}" for module, others in imports.items() for other in sorted(others)
              if place(other) > place(module)]
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        listed.append("circle: " + " ".join(error.args[1]))
    modules = {path for path in folder.rglob("*.py") if path.name != "__init__.py"}
    modules |= {path.parent for path in folder.glob("*/**/__init__.py")} - {folder / "kernels"}
    return listed + [f"{path.relative_to(folder)} hides a module" for path in sorted(modules) if path.stem in forbidden]


def test_imports_run_one_way_and_no_module_hides_another():
    assert faults(PACKAGE, PACKAGES | set(sys.stdlib_module_names)) == []


TREE = dict.fromkeys(("__init__", "records/ledger", "selection/rules", "selection/engine/__init__",
                      "selection/engine/rounds", "study/__init__"), "")


@pytest.mark.parametrize("module, text, fault", [
    ("study/__init__", "from house.selection.rules import select", None),
    ("records/ledger", "def f():\n    import house.study", "house.records.ledger imports house.study"),
    ("selection/rules", "from house.selection.engine import rounds",
     "house.selection.rules imports house.selection.engine.rounds"),
    ("selection/search", "import house.selection.engine", "house.selection.search imports house.selection.engine"),
    ("selection/rules", "from house.selection.cost import x", "circle: "),
    ("records/queue", "", "records/queue.py hides a module"),
    ("study/torch/__init__", "", "study/torch hides a module")])
def test_the_checker_finds_what_is_wrong(tmp_path, module, text, fault):
    for name, content in (TREE | {"selection/cost": "import house.selection.rules", module: text}).items():
        path = tmp_path / "house" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    listed = faults(tmp_path / "house", {"queue", "torch", "kernels"})
    assert listed == [] if fault is None else any(line.startswith(fault) for line in listed)
