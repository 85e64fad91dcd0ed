"""Make a virtual environment with pip in it, also where Python comes without ensurepip (Debian's python3 alone).

Usage: python3 .ci/make_venv.py FOLDER
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import venv
from pathlib import Path

WHEEL = "pip-26.3-py3-none-any.whl"
SHA256 = "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13"


def fetch_pip(folder: Path) -> Path:
    """Download the pip wheel from the package index, refuse it unless its sha256 is `SHA256`."""
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/pip/"
    with urllib.request.urlopen(index, timeout=60) as page:
        links = re.findall(r'href="([^"]+)"', page.read().decode())
    link = next((link for link in links if link.split("#")[0].endswith("/" + WHEEL)), None)
    if link is None:
        sys.exit(f"{index} does not list {WHEEL}; install python3-venv, then run make again")
    with urllib.request.urlopen(urllib.parse.urljoin(index, link), timeout=60) as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() != SHA256:
        sys.exit(f"{WHEEL} from {index} has another sha256 than {SHA256}; it was not used")
    wheel = folder / WHEEL
    wheel.write_bytes(content)
    return wheel


def main(folder: str) -> None:
    """Create the environment in `folder`; an unfinished one there is made anew."""
    with_pip = importlib.util.find_spec("ensurepip") is not None
    venv.create(folder, with_pip=with_pip, clear=True, symlinks=os.name != "nt")
    if not with_pip:
        with tempfile.TemporaryDirectory() as download:
            wheel = fetch_pip(Path(download))
            python = Path(folder) / "bin" / "python"
            subprocess.run([python, wheel / "pip", "install", "--no-index", wheel], check=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
