"""Draw the README's figure, book/images/oracle.png, from the records in data/results/h100.

Usage: python book/figure.py
"""

from __future__ import annotations

from pathlib import Path

import hybridlib as hl
from hybridlib import oracle, oracle_report

SHOWN = ("ga-s2", "ga-s1", "uniform", "first")


def main():
    records, choices = oracle.recorded_oracle(hl.Ledger(hl.results_folder("h100")), "gdn")
    if not records:
        raise SystemExit("data/results/h100 has no record of the oracle; run notebooks/oracle.ipynb on a GPU first")
    judged = oracle.judge(records, choices)
    titles = {name: hl.SELECTORS[name].title for name in SHOWN}
    judged = judged.assign(selector=judged["selector"].replace(titles))
    path = Path(__file__).resolve().parent / "images" / "oracle.png"
    path.parent.mkdir(exist_ok=True)
    oracle_report.landscape(oracle.oracle_table(records), judged, selectors=tuple(titles.values())).savefig(path)


if __name__ == "__main__":
    main()
