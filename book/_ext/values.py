"""Sphinx extension: the role ``{value}`name` ``, a number of ours, from the ``_generated/values.json`` that
`book/generate.py` writes from code and profiles. An unknown name is a warning."""

from __future__ import annotations

import json
from pathlib import Path

from docutils import nodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

logger = logging.getLogger(__name__)


class Value(SphinxRole):
    """Put the value of a name into the text."""

    def run(self):
        path = Path(self.env.srcdir) / "_generated" / "values.json"
        self.env.note_dependency(str(path))
        values = json.loads(path.read_text(encoding="utf-8"))
        if self.text not in values:
            logger.warning("value %r is not in %s", self.text, path.name, location=self.get_location())
        return [nodes.inline(self.rawtext, values.get(self.text, self.text), classes=["value"])], []


def setup(app) -> dict:
    app.add_role("value", Value())
    return {"version": "1", "parallel_read_safe": True}
