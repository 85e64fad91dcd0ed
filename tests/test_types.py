"""The README's script is typed: mypy accepts it under its strictest settings, and finds the mistakes that it should."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
MISTAKES = """
import hybridlib as hl
hl.restore("student", hl.load_teacher("lab").model, [0])   # [arg-type]
hl.load_tokens("lab", None, context="512")                 # [arg-type]
hl.evaluate(hl.load_hybrid("x"), hl.load_hybrid("y"))      # [call-arg]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="types of torch and transformers are read once")
def test_the_readme_is_typed_and_mistakes_are_found(tmp_path):
    (tmp_path / "readme.py").write_text(SCRIPT)
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    mypy = subprocess.run([sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent", "--cache-dir",
                           str(tmp_path / "cache"), str(tmp_path / "readme.py"), str(tmp_path / "mistakes.py")],
                          cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in mypy.stdout.splitlines() if " error: " in line]
    assert [line for line in lines if "mistakes.py" not in line] == [], mypy.stdout
    expected = [(str(n), line.split("# ")[1]) for n, line in enumerate(MISTAKES.splitlines(), 1) if "#" in line]
    assert [(line.split(":")[1], line.split()[-1]) for line in lines] == expected, mypy.stdout + mypy.stderr
