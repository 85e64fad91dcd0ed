"""Draw the README's figure, book/images/importance.png, from the records that `make book` left.

Usage: python book/figure.py
"""

from __future__ import annotations

from pathlib import Path

import hybridlib as hl
from hybridlib import plots

LABELS = {"gdn": "gated delta rule", "gla": "gated linear attention"}


def main():
    ledger = hl.Ledger(hl.results_folder())
    found = {label: ledger.find("score", mixer=mixer, direction="add", metric="kl") for mixer, label in LABELS.items()}
    if not all(found.values()):
        raise SystemExit(f"{ledger.folder} has no scores of both mixers; run `make book` first")
    scores = {}
    for label, records in found.items():
        longest = max(r.tokens for r in records)
        scores[label] = [r.metrics["values"] for r in records if r.tokens == longest]
    path = Path(__file__).resolve().parent / "images" / "importance.png"
    path.parent.mkdir(exist_ok=True)
    plots.layer_scores(scores, "score: \u2212KL (nats a token)").savefig(path)


if __name__ == "__main__":
    main()
