"""Records that tests of scoring look into."""

from __future__ import annotations

import pytest


class Kept(dict):
    """Records in memory."""

    def find(self, layer, tokens, part=None):
        return self.get((layer, tokens) if part is None else (layer, tokens, part))

    def keep(self, layer, tokens, found, part=None):
        self[(layer, tokens) if part is None else (layer, tokens, part)] = found


@pytest.fixture
def kept():
    return Kept()
