"""What a record says of its origin is true."""

import subprocess
import types
from unittest.mock import Mock

from hybridlib.records import provenance
from hybridlib.records.provenance import code_commit, describe_device, software_versions


def _git(folder, *arguments):
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=folder, check=True,
                   capture_output=True)


def test_commit_of_the_code(tmp_path, monkeypatch):
    package, records = tmp_path / "pkg", tmp_path / "results" / "local"
    package.mkdir()
    records.mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    monkeypatch.setattr(provenance, "PACKAGE", package)
    assert code_commit() is None  # no checkout
    (tmp_path / ".git_archival.txt").write_text("$Format:%H$\n")
    assert code_commit() is None  # not put in by git archive
    (tmp_path / ".git_archival.txt").write_text(40 * "a" + "\n")
    assert code_commit() == 40 * "a"
    (tmp_path / ".git_archival.txt").unlink()
    _git(tmp_path, "init", "-q")
    assert code_commit() is None  # not under version control
    _git(tmp_path, "add", "pkg")
    assert code_commit() is None  # no commit
    _git(tmp_path, "commit", "-qm", "first")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    assert len(head) == 40 and code_commit() == head
    (records / "score-0.json").write_text("{}")
    assert code_commit(records) == head  # a new record is no change of the code
    assert code_commit() == head + "+dirty"
    (package / "__init__.py").write_text("x = 2\n")
    assert code_commit(records) == head + "+dirty"
    monkeypatch.setenv("PATH", "")
    assert code_commit() is None  # no git


def test_names_of_devices(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: Other\n")
    assert provenance._cpu_model(str(info)) == "Some CPU @ 2 GHz"
    monkeypatch.setattr(provenance.platform, "processor", lambda: "")
    monkeypatch.setattr(provenance.platform, "machine", lambda: "arm64")
    assert provenance._cpu_model(str(tmp_path / "none")) == "arm64"
    monkeypatch.setattr(provenance, "_cpu_model", lambda: "Some CPU")
    monkeypatch.setattr(provenance.os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert describe_device("cpu") == "Some CPU, 1 core"
    monkeypatch.setattr(provenance.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(provenance.torch.cuda, "current_device", lambda: 0)
    gpu = type("GPU", (), {"name": "Some GPU", "total_memory": 80 * 2**30})
    monkeypatch.setattr(provenance.torch.cuda, "get_device_properties", lambda _: gpu)
    assert describe_device() == "Some GPU, 80 GiB" and describe_device("cpu") == "Some CPU, 1 core"


def test_a_version_is_that_of_what_is_imported(monkeypatch):
    monkeypatch.setattr(provenance.metadata, "version", lambda name: "of the disk")
    monkeypatch.setitem(provenance.sys.modules, "triton", types.SimpleNamespace(__version__="of the process"))
    monkeypatch.setitem(provenance.sys.modules, "flash_qla", None)
    assert (software_versions()["triton"], software_versions()["flash-qla"]) == ("of the process", "of the disk")
    missing = Mock(side_effect=provenance.metadata.PackageNotFoundError("transformers"))
    monkeypatch.setattr(provenance.metadata, "version", missing)
    monkeypatch.setitem(provenance.sys.modules, "transformers", None)
    assert software_versions()["transformers"] == "not installed"
