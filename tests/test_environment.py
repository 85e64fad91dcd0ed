"""pyproject.toml is the one source of dependencies; environment.yml and constraints.txt agree with it."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
CONDA = [entry for entry in ENVIRONMENT["dependencies"] if isinstance(entry, str)]
PIP = next(entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict))


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[^,]+", str(pin.specifier)) and pin.url is None for pin in requirements)
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in requirements}


def test_conda_gives_python_and_pip_alone_and_pip_the_project():
    assert sorted(re.split(r"[=<>]", entry)[0].strip() for entry in CONDA) == ["pip", "python"]
    version = next(entry for entry in CONDA if entry.startswith("python")).split("=")[-1]
    assert f"{version}.9" in SpecifierSet(PROJECT["requires-python"])
    assert sorted(PIP) == ["-c constraints.txt", "-e .[book,test]"] and {"book", "test"} <= set(EXTRAS)


@pytest.mark.parametrize("text", PROJECT["dependencies"] + EXTRAS["book"] + EXTRAS["test"] + EXTRAS["cluster"])
def test_constraints_pin_each_dependency_within_its_range(text):
    requirement, pinned = Requirement(text), pins()
    name = canonicalize_name(requirement.name)
    assert name in pinned, f"constraints.txt does not pin {name}"
    assert requirement.specifier.contains(pinned[name], prereleases=True)


def test_torch_is_pinned_without_a_build():
    assert "+" not in pins()["torch"]  # 2.13.0+cpu would shut out the CUDA build, and a range would take it on Linux


def test_pins_install_on_the_python_of_debian_12():
    for name, version in pins().items():
        try:
            installed = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue
        if installed["Version"].split("+")[0] == version:
            needed = SpecifierSet(installed.get("Requires-Python") or "")
            assert "3.11.2" in needed, f"{name} {version} needs a newer Python"
