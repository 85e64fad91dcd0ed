"""Studies of a tiny teacher that has no tokenizer."""

from __future__ import annotations

import pytest
from tests.conftest import CONTEST_SETTINGS

import hybridlib as hl
from hybridlib.selection.engine import candidates
from hybridlib.study import study as study_module


@pytest.fixture
def layers():
    """Layers of the teacher."""
    return 3


@pytest.fixture
def studies(tiny_teacher, tiny_tokens, tmp_path, monkeypatch, layers):
    """studies(settings_class, **changes): a study; all share their records."""
    teacher, evaluate = tiny_teacher(layers=layers), hl.evaluate
    monkeypatch.setattr(study_module, "load_teacher", lambda *a, **k: hl.Teacher(teacher, None, "tiny", "r1"))
    monkeypatch.setattr(study_module, "load_tokens", lambda *a, **k: tiny_tokens)
    for module in (study_module, candidates):
        monkeypatch.setattr(module, "evaluate", lambda *a, recall=None, **k: evaluate(*a, **k))

    def make(settings_class=hl.StudySettings, **changes):
        return hl.Study(settings_class(**CONTEST_SETTINGS | {"results": str(tmp_path / "results")} | changes))

    return make
